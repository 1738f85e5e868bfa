"""Says what a checkpoint directory is (see megatron_ssm/conversion/inspect_command_line.py)."""

from __future__ import annotations

import sys

from deepspeed_inference.command_line.quiet import quiet

if __name__ == "__main__":
    quiet()
    from megatron_ssm.conversion.inspect_command_line import main

    sys.exit(main())
