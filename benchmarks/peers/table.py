"""The results as Markdown: a table a shape."""

from __future__ import annotations


def tables(results: dict) -> str:
    """One heading and one table for each shape of what `run.py` wrote."""
    return "\n\n".join(_table(name, results[name], results["prompt"]) for name in results["shapes"])


def _table(name: str, result: dict, prompt: int) -> str:
    ours = list(result["ours_faster_by"])
    heads = ["", f"prefill of {prompt}", "decode", "a step reads", "of the bandwidth"]
    heads += [f"{mine} is faster: prefill, decode" for mine in ours]
    bandwidth = result["read_bandwidth_gb_per_second"]
    lines = [f"### {name}, the memory read at {bandwidth:.1f} GB/s", ""]
    lines += [_row(heads), _row(["---"] * len(heads))]
    for system, found in result["systems"].items():
        faster = [_faster(result["ours_faster_by"][mine].get(system)) for mine in ours]
        lines.append(_row([system, *_speeds(found), *faster]))
    lines.append("")
    for mine, times in result["tokens_per_second_of_batch_over_one"].items():
        lines.append(f"{mine}: batched decode gives {times:.2f}× the tokens a second of one sequence.")
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _speeds(found: dict) -> list[str]:
    prefill = f"{found['prefill_tokens_per_second']:,.0f} tokens/s" if "prefill_tokens_per_second" in found else ""
    decode = f"{found['decode_ms']:.2f} ms"
    if found["batch"] > 1:
        decode += f", {found['decode_tokens_per_second']:,.0f} tokens/s"
    return [prefill, decode, f"{found['megabytes_a_step']:,.0f} MB", f"{found['share_of_read_bandwidth']:.0%}"]


def _faster(ratios: dict | None) -> str:
    return "" if ratios is None else f"{ratios['prefill']:.2f}×, **{ratios['decode']:.2f}×**"
