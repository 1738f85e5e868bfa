"""Generate text, tensor-parallel: `deepspeed --num_gpus N infer.py --prompt "def "` (see --help)."""

import sys

from deepspeed_inference.command_line.cli import main

if __name__ == "__main__":
    sys.exit(main())
