"""Predict what models take on 1 to 64 GPUs, and advise how to lay a model out on given ones.

python tools/model_scaling.py                                    # writes benchmarks/model_scaling.json and .md
python tools/model_scaling.py --advise mamba-2.8B --gpus 4xA100  # or 2x4xA100 --between infiniband-hdr

The model of the work is fitted to what tools/benchmark.py measured on this machine, where its record is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def main() -> int:
    """Predict or advise. Returns 0; 2 where what was asked for cannot be."""
    options = _options()
    quiet()
    try:
        return _advise(options) if options.advise else _predict(options)
    except ValueError as error:
        print(f"model_scaling: {error}", file=sys.stderr)
        return 2


def _advise(options: argparse.Namespace) -> int:
    from deepspeed_inference.benchmarks.scaling.advice import advise
    from deepspeed_inference.benchmarks.scaling.hardware import cluster_named
    from deepspeed_inference.benchmarks.scaling.models import model_named
    from deepspeed_inference.benchmarks.scaling.tables import advice_text

    cluster = cluster_named(options.gpus, within=options.within, between=options.between)
    requests = {"prompt": options.prompt, "output": options.tokens, "batch": options.batch}
    measured = _measured(options).get(cluster.device.name)
    found = advise(model_named(options.advise), cluster, **requests, measured=measured)
    print(f"{options.advise} on {cluster}\n\n{advice_text(found)}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from deepspeed_inference.benchmarks.scaling.report import Report

    report = Report.of(options.record, _measured(options))
    options.output.write_text(json.dumps(report.data(), indent=1) + "\n")
    options.output.with_suffix(".md").write_text(report.markdown() + "\n")
    print(report.told())
    print(f"written: {options.output} and {options.output.with_suffix('.md').name}")
    return 0


def _measured(options: argparse.Namespace) -> dict:
    from deepspeed_inference.benchmarks.scaling.measured import read

    found = read(options.gpu_record)
    return {} if found is None else {found.device.name: found}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, default=BENCHMARKS / "two_cores.json", help="of tools/benchmark.py")
    parser.add_argument("--gpu-record", type=Path, default=BENCHMARKS / "gpu.json", help="of tools/gpu_check.py")
    parser.add_argument(
        "--output", type=Path, default=BENCHMARKS / "model_scaling.json", help="the tables go beside it"
    )
    parser.add_argument("--advise", metavar="MODEL", help="family-size, as mamba-2.8B, or a checkpoint's directory")
    parser.add_argument("--gpus", help="GPUs, or hosts x GPUs of each: 4xA100, 2x4xA6000")
    parser.add_argument("--within", help="the link of a host's GPUs (default: what such GPUs have)")
    parser.add_argument("--between", default="ethernet-100g", help="the link of hosts")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of a request's prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--batch", type=int, default=64, help="requests at once, for throughput")
    options = parser.parse_args()
    if bool(options.advise) != bool(options.gpus):
        parser.error("expected --advise and --gpus together")
    return options


if __name__ == "__main__":
    sys.exit(main())
