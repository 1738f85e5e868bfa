"""Train the demo model: a byte-level Mamba on the source of Python's standard library.

python tools/train_demo.py --minutes 30            # again with the same --work-dir to go on where it stopped
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from deepspeed_inference.quiet import quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, over all calls")
    parser.add_argument("--work-dir", type=Path, default=Path("out/train_demo"), help="what a later call resumes from")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/demo"), help="the Hugging Face checkpoint")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    arguments = parser.parse_args()
    quiet()
    import torch

    from deepspeed_inference.demo_training import Recipe, train, write_checkpoint

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.fresh:
        shutil.rmtree(arguments.work_dir, ignore_errors=True)
    model, record = train(Recipe(), arguments.minutes, arguments.work_dir)
    write_checkpoint(model, record, arguments.output)
    print(f"held out: {record['held_out_bits_per_byte']:.3f} bits a byte; wrote {arguments.output}")


if __name__ == "__main__":
    main()
