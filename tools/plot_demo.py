"""Draw the curves of the demo model from the record beside it: training.svg and positions.svg."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deepspeed_inference.quiet import quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("checkpoints/demo"))
    directory = parser.parse_args().directory
    quiet()
    from deepspeed_inference.demo_training.plots import draw_positions, draw_training

    file = directory / "training.json"
    if not file.is_file():
        sys.stderr.write(f"plot_demo.py: error: expected {file}, as tools/train_demo.py writes it, found none\n")
        return 2
    record = json.loads(file.read_text())
    draw_training(record, directory / "training.svg")
    draw_positions(record, directory / "positions.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
