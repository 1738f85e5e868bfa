"""Sends a Megatron checkpoint for Megatron-LM's converter; see megatron_ssm/conversion/plugin_protocol.py."""

from __future__ import annotations

from megatron_ssm.conversion import plugin_loader
from megatron_ssm.conversion.options import MEGATRON


def add_arguments(parser) -> None:
    """Add the loader's options to the converter's."""
    plugin_loader.add_arguments(parser, MEGATRON)


def load_checkpoint(queue, args) -> None:
    """Put the checkpoint in args.load_dir on the queue."""
    plugin_loader.load_checkpoint(queue, args, MEGATRON)
