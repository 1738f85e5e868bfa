"""Measures models over layouts, prompts, codecs and links as a YAML of configs/benchmarks/ says.

Writes a record (JSON), and of it a table (Markdown), plots (PNG) and one page (HTML), beside each other. A run that was
ended goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="small", help="a YAML file, or the name of one that is shipped")
    parser.add_argument("--output", type=Path, help="the record (default: benchmarks/CONFIG.json)")
    parser.add_argument("--restart", action="store_true", help="begin anew where an earlier run was ended")
    parser.add_argument("--list", action="store_true", help="say what would be measured, and measure nothing")
    parser.add_argument("--present", action="store_true", help="make table, plots and page of a record anew")
    arguments = parser.parse_args()
    output = arguments.output or Path("benchmarks") / f"{Path(arguments.config).stem}.json"
    quiet()
    from deepspeed_inference.benchmarks.grid.cells import cells_of
    from deepspeed_inference.benchmarks.grid.config import read_config
    from deepspeed_inference.benchmarks.grid.presentation import present
    from deepspeed_inference.benchmarks.grid.running import run

    try:
        config = read_config(arguments.config)
        if arguments.list:
            print("\n".join(cell.key for cell in cells_of(config)))
            return 0
        if arguments.present:
            record = json.loads(output.read_text(encoding="utf-8"))
        else:
            if arguments.restart:
                output.with_name(f"{output.name}.journal").unlink(missing_ok=True)
            command = shlex.join(["python", "tools/benchmark.py", arguments.config])
            record = run(config, output, command=command)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"benchmark.py: error: {error}\n")
        return 2
    for file in present(record, output):
        print(file)
    return 1 if any("error" in cell for cell in record["cells"]) else 0


if __name__ == "__main__":
    sys.exit(main())
