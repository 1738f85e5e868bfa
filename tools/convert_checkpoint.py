"""Converts checkpoints between Hugging Face and Megatron (see megatron_ssm/conversion/command_line.py)."""

from __future__ import annotations

import sys

from deepspeed_inference.command_line.quiet import quiet

if __name__ == "__main__":
    quiet()
    from megatron_ssm.conversion.command_line import main

    sys.exit(main())
