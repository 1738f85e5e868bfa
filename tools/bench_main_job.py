"""The numbers of README.md: `make bench`. Writes benchmarks/main_job.json and prints the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def table(results: dict) -> str:
    bf16, fp32 = results["transformers_bfloat16"], results["transformers_float32"]
    ranks, memory = results["ranks"], results["memory"]
    rows = [
        ("prefill of 512, bf16", *_prefill(bf16), "10×", _limit(bf16)),
        ("prefill of 512, fp32", *_prefill(fp32), "5×", _limit(fp32)),
        ("decode, bf16", *_decode(bf16), "1.8×", ""),
        ("decode, fp32", *_decode(fp32), "–", ""),
    ]
    lines = ["| | transformers | ours | ratio | wanted | matrix products alone |", "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "| bf16, ranks × threads | 1 × 1 | 1 × 2 | 2 × 1 | ratio | wanted |", "|---|---|---|---|---|---|"]
    prefill = [f"{ranks[f'{layout}_prefill_tokens_per_second']:,.0f} tokens/s" for layout in ("1x1", "1x2", "2x1")]
    decode = [f"{ranks[f'{layout}_decode_ms']:.1f} ms" for layout in ("1x1", "1x2", "2x1")]
    faster = f"{ranks['prefill_speedup_of_2_ranks_over_1']:.2f}× of 1 × 1"
    slower = f"{ranks['decode_time_of_2_ranks_over_2_threads']:.2f}× the time of 1 × 2"
    lines.append("| " + " | ".join(["prefill of 512", *prefill, faster, "≥ 1.9×"]) + " |")
    lines.append("| " + " | ".join(["decode", *decode, slower, "≤ 1.05×"]) + " |")
    lines += ["", _strangers(ranks), "", _long_prompts(results["long_prompts"]), ""]
    lines.append(
        f"Loading {memory['share_mb'] * memory['ranks']:,.0f} MB of parameters at {memory['ranks']} ranks: each rank "
        f"grows by at most {max(memory['grown_mb']):,.0f} MB; its share is {memory['share_mb']:,.0f} MB, allowed are "
        f"{memory['allowed_mb']:,.0f} MB (share + 15 % + the largest tensor)."
    )
    return "\n".join(lines)


def _strangers(ranks: dict) -> str:
    return (
        "Two ranks of one core that each run a model of their own do "
        f"{ranks['prefill_speedup_of_2_strangers']:.2f}× the prefill of one: that is what the cores have to give."
    )


def _long_prompts(result: dict) -> str:
    times = " and ".join(f"{time:,.0f} µs at {length}" for length, time in result["us_per_token"].items())
    grown = " and ".join(f"{grown:,.0f} MB at {length}" for length, grown in result["grown_mb"].items())
    return (
        f"Long prompts, bf16: a token takes {times} tokens, {result['time_per_token_of_long_over_short']:.2f}× of the "
        f"shorter (wanted ≤ 1.1×); memory grows by {grown}."
    )


def _prefill(result: dict) -> tuple[str, str, str]:
    theirs, ours = result["their_prefill_tokens_per_second"], result["our_prefill_tokens_per_second"]
    return f"{theirs:,.0f} tokens/s", f"{ours:,.0f} tokens/s", f"**{result['prefill_speedup']:.1f}×**"


def _limit(result: dict) -> str:
    speedup = result["prefill_speedup_of_products_alone"]
    return f"{result['products_alone_tokens_per_second']:,.0f} tokens/s, {speedup:.1f}×"


def _decode(result: dict) -> tuple[str, str, str]:
    return (
        f"{result['their_decode_ms']:.1f} ms",
        f"{result['our_decode_ms']:.1f} ms",
        f"**{result['decode_speedup']:.2f}×**",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decode-steps", type=int, default=16)
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/main_job.json"))
    arguments = parser.parse_args()
    quiet()
    import torch

    from deepspeed_inference.benchmarks import main_job as bench
    from deepspeed_inference.benchmarks.benchmarking import measure_all

    shape = {**bench.SHAPE_130M, "num_hidden_layers": arguments.layers}
    each = (arguments.rounds, arguments.decode_steps, shape)
    measures = {
        "ranks": lambda: bench.over_ranks(torch.bfloat16, *each),
        "long_prompts": lambda: bench.long_prompts(torch.bfloat16, max(1, arguments.rounds // 3), shape),
        "memory": lambda: bench.memory_of_loading(4, torch.float32, shape),
        "transformers_float32": lambda: bench.against_transformers(torch.float32, *each),
        "transformers_bfloat16": lambda: bench.against_transformers(torch.bfloat16, *each),
    }
    results = measure_all(measures, {"shape": shape, "rounds": arguments.rounds}, arguments.output)
    print(f"\n{json.dumps(results['hardware'])}\n\n{table(results)}")


if __name__ == "__main__":
    main()
