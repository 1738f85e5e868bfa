"""Print how many collectives a forward pass of a model needs, and how many KiB each rank hands over for a token.

python tools/collectives.py                       every family, in the size of transformers' default config
python tools/collectives.py path/to/checkpoint    models of your own; only config.json is read
"""

from __future__ import annotations

import argparse
import sys

from deepspeed_inference.command_line.quiet import quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="checkpoint directories or hub ids")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8], help="numbers of ranks (2 4 8)")
    parser.add_argument("--tokens", type=int, default=1, help="that go through the model together (1, a decode step)")
    options = parser.parse_args()
    if min(options.ranks) < 1 or options.tokens < 1:
        parser.error("--ranks and --tokens: expected positive integers")

    quiet()
    from deepspeed_inference.communication_table import family_configs, markdown, rows
    from deepspeed_inference.pretrained import model_directory, read_config

    try:
        named = {model: read_config(model_directory(model))[0] for model in options.models} or family_configs()
        table = rows(named, options.ranks, options.tokens)
    except ValueError as error:
        sys.stderr.write(f"collectives.py: error: {error}\n")
        return 2
    print(markdown(table, options.ranks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
