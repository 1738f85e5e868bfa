"""Draw the curves of the demo model from the record beside it: training.svg and positions.svg."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("checkpoints/demo"))
    directory = parser.parse_args().directory
    quiet()
    try:
        from deepspeed_inference.demo_training.plots import draw_positions, draw_training
    except ImportError as error:
        sys.stderr.write(f"plot_demo.py: error: {error}; pip install 'megatron-ssm[tools]'\n")
        return 2
    file = directory / "training.json"
    try:
        record = json.loads(file.read_text())
        draw_training(record, directory / "training.svg")
        draw_positions(record, directory / "positions.svg")
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"plot_demo.py: error: expected {file} as tools/train_demo.py writes it, found {error!r}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
