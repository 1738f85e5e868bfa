"""Measures the codecs against the memory: bytes that they read and write a second, as a share of what copying gets.

One thread, a tensor of 1024 x 4096 in bf16 and two wires to sum, everything in turn in one run.
"""

from __future__ import annotations

import statistics

from deepspeed_inference.benchmarks.benchmarking import interleaved

SHAPE = (1024, 4096)
ROUNDS = 25


def codec_speeds(rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """By codec and op, its share of the rate of copying; and that rate, "copying" in bytes a second."""
    import torch

    import ssm_kernels
    from ssm_kernels.codecs import CODECS

    torch.set_num_threads(1)
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).flatten()
    count, out = values.numel(), torch.empty_like(values)
    actions, nbytes = {"copying": lambda: out.copy_(values)}, {"copying": 2 * values.nbytes}
    for name, codec in CODECS.items():
        wires = [ssm_kernels.quantize(values, codec) for _ in range(2)]
        total, size = torch.empty_like(wires[0]), codec.nbytes(count)
        bound = {"codec": codec, "wires": wires, "total": total}
        actions |= {
            f"{name} quantize": lambda b=bound: ssm_kernels.quantize(values, b["codec"], out=b["total"]),
            f"{name} dequantize_sum": lambda b=bound: ssm_kernels.dequantize_sum(
                b["wires"], b["codec"], count, out.dtype, out=out
            ),
            f"{name} quantize_sum": lambda b=bound: ssm_kernels.quantize_sum(
                b["wires"], b["codec"], count, out=b["total"]
            ),
        }
        nbytes |= {
            f"{name} quantize": values.nbytes + size,
            f"{name} dequantize_sum": 2 * size + values.nbytes,
            f"{name} quantize_sum": 3 * size,
        }
    seconds = interleaved(actions, rounds)
    rates = {name: [nbytes[name] / each for each in seconds[name]] for name in actions}
    found: dict[str, dict[str, float]] = {"copying": {"bytes_per_second": statistics.median(rates["copying"])}}
    for name in list(actions)[1:]:
        codec, op = name.split()
        share = statistics.median(own / copy for own, copy in zip(rates[name], rates["copying"], strict=True))
        found.setdefault(codec, {})[op] = share
    return found
