"""Writes a Hugging Face checkpoint for Megatron-LM's converter; see megatron_ssm/conversion/plugin_protocol.py."""

from __future__ import annotations

from megatron_ssm.conversion import plugin_saver
from megatron_ssm.conversion.options import HUGGING_FACE


def add_arguments(parser) -> None:
    """Add the saver's options to the converter's."""
    plugin_saver.add_arguments(parser, HUGGING_FACE)


def save_checkpoint(queue, args) -> None:
    """Write what is on the queue to args.save_dir."""
    plugin_saver.save_checkpoint(queue, args, HUGGING_FACE)
