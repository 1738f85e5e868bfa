"""A profile for people, as tables, and for programs, as one JSON object."""

from __future__ import annotations

from deepspeed_inference.profile import TORCH, Cost, Profile, Row, StepProfile

_HEADS = ("", "calls", "ms", "of step", "MB", "GB/s", "of read", "GFLOP/s", "of product")


def table(profile: Profile) -> str:
    """Tables of a prefill and of a decode step, and what Python takes of the latter."""
    ranks = f"{profile.ranks} × {profile.threads} (ranks × threads)"
    reads = "" if profile.bytes_a_second is None else f"memory reads {profile.bytes_a_second / 1e9:.1f} GB/s, "
    product = f"a large product runs at {profile.flops_a_second / 1e9:,.0f} GFLOP/s"
    lines = [f"{ranks}, {str(profile.dtype).removeprefix('torch.')}; {reads}{product}"]
    prefill = f"prefill of {profile.prompt_tokens} tokens, median of {profile.prefill.steps}"
    lines += ["", prefill, *_table(profile.prefill, profile)]
    step = profile.played or profile.written
    how = "played from its recording" if profile.played else f"as it is written: {profile.refusal}"
    lines += ["", f"decode step, median of {step.steps}, {how}", *_table(step, profile)]
    if profile.played:
        written, played = profile.written, profile.played
        lines += [
            "",
            f"without the recording {_ms(written.seconds)} ms: {_ms(written.watched)} in the ops and their Python, "
            f"{_ms(written.rest)} between them",
            f"as served             {_ms(played.seconds)} ms: {_ms(played.watched)} in the ops alone, "
            f"{_ms(played.rest)} around them",
        ]
    return "\n".join(lines)


def as_json(profile: Profile) -> dict:
    """The same numbers; times in ms, bytes in MB, rates in GB/s and GFLOP/s, shares of 1."""
    return {
        "prompt_tokens": profile.prompt_tokens,
        "ranks": profile.ranks,
        "threads": profile.threads,
        "dtype": str(profile.dtype).removeprefix("torch."),
        "read_gb_per_second": None if profile.bytes_a_second is None else profile.bytes_a_second / 1e9,
        "product_gflop_per_second": profile.flops_a_second / 1e9,
        "prefill": _step(profile.prefill, profile),
        "decode_as_written": _step(profile.written, profile),
        "decode_played": None if profile.played is None else _step(profile.played, profile),
        "refusal": profile.refusal,
    }


def _step(step: StepProfile, profile: Profile) -> dict:
    rows = [_record(row, cost, step, profile) for row, cost in _sorted(step)]
    return {
        "steps": step.steps,
        "ms": 1e3 * step.seconds,
        "ops": [record for record in rows if record["kind"] == "op"],
        "reductions": [record for record in rows if record["kind"] == "reduction"],
        "torch_ms": 1e3 * step.rows.get(TORCH, Cost()).seconds,
        "rest_ms": 1e3 * step.rest,
    }


def _record(row: Row, cost: Cost, step: StepProfile, profile: Profile) -> dict:
    """One line; None where a number has no meaning."""
    # What a sum waits for is not its few bytes, so it has no rate.
    rate = cost.nbytes / cost.seconds if cost.nbytes and cost.seconds and not row.is_reduction else None
    reads = profile.bytes_a_second
    flops = cost.flops / cost.seconds if cost.flops and cost.seconds else None
    return {
        "kind": "torch" if row is TORCH else "reduction" if row.is_reduction else "op",
        "name": row.name,
        "weight": None if row.weight is None else list(row.weight),
        "calls": cost.calls,
        "ms": 1e3 * cost.seconds,
        "share": cost.seconds / step.seconds,
        "mb": cost.nbytes / 1e6 if cost.nbytes else None,
        "gb_per_second": None if rate is None else rate / 1e9,
        "share_of_read": None if rate is None or reads is None else rate / reads,
        "gflop_per_second": None if flops is None else flops / 1e9,
        "share_of_product": None if flops is None else flops / profile.flops_a_second,
    }


def _sorted(step: StepProfile) -> list[tuple[Row, Cost]]:
    """Ops, reductions, torch; each with what takes longest first."""
    return sorted(step.rows.items(), key=lambda item: (item[0] is TORCH, item[0].is_reduction, -item[1].seconds))


def _table(step: StepProfile, profile: Profile) -> list[str]:
    cells = [_HEADS]
    for row, cost in _sorted(step):
        record = _record(row, cost, step, profile)
        cells.append(
            (
                _label(row),
                f"{record['calls']}",
                _ms(cost.seconds),
                _percent(record["share"]),
                _number(record["mb"], 2),
                _number(record["gb_per_second"], 1),
                _percent(record["share_of_read"]),
                _number(record["gflop_per_second"], 0),
                _percent(record["share_of_product"]),
            )
        )
    unwatched = "Python and choice of token" if step is profile.played else "Python and torch between them"
    for label, seconds in ((unwatched, step.rest), ("the step", step.seconds)):
        cells.append((label, "", _ms(seconds), _percent(seconds / step.seconds), *[""] * 5))
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADS))]
    return [
        ("  " + row[0].ljust(widths[0]) + "".join(f"  {row[i].rjust(widths[i])}" for i in range(1, len(row)))).rstrip()
        for row in cells
    ]


def _label(row: Row) -> str:
    if row.weight is not None:
        return f"{row.name} {' × '.join(map(str, row.weight))}"
    return f"reduction {row.name}" if row.is_reduction else row.name


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
