"""What a cell of the record does on this machine, in amounts whose prices are fitted.

    seconds = sum over amounts of price · amount

    FLOP of products, by dtype, and of scans, exponentials     a core's; shared out among a rank's threads
    bytes of weights and states                                 one price where one core is busy, one where several are:
                                                                then it is all ranks' bytes, since they share a memory
    bytes of keys and values                                    a core's: attention takes far longer than memory does
    kernels, passes, rows                                       what starting each takes
    messages and their bytes, by link                           on emulated links also bytes / the rate measured

Amounts are those of `work.py` and `families/communication.py`, which predict GPUs too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

from deepspeed_inference.benchmarks.all_reduce import Layout, ring_cost
from deepspeed_inference.benchmarks.scaling.record import PREFILL, STEP, WHOLE, Cell
from deepspeed_inference.benchmarks.scaling.schedule import Pass, schedule
from deepspeed_inference.benchmarks.scaling.work import Load, Operation, head_work, layers_work
from deepspeed_inference.config import DTYPES
from megatron_ssm.collectives.quantized import QUANTIZABLE_SITES
from megatron_ssm.families.communication import Collective, model_collectives
from ssm_kernels.codecs import codec_named

Amounts = dict[str, float]


def cell_amounts(cell: Cell) -> dict[str, Amounts]:
    """Of the medians of a cell's times to first tokens and between tokens, and of its whole batch."""
    plan = schedule(cell.share, cell.prompt, cell.output)
    each = [pass_amounts(cell, step) for step in plan.passes]
    found = {PREFILL: _median(plan.first_tokens, each), WHOLE: _sum(each)}
    if cell.output > 1:
        found[STEP] = _median(plan.between_tokens, each)
    return found


def _median(spans: Sequence[range], each: Sequence[Amounts]) -> Amounts:
    """Of the span in the middle, or the mean of the two that are."""
    middle = {(len(spans) - 1) // 2, len(spans) // 2}
    total = _sum([each[number] for place in middle for number in spans[place]])
    return {name: amount / len(middle) for name, amount in total.items()}


def _sum(amounts: Iterable[Amounts]) -> Amounts:
    total: Amounts = defaultdict(float)
    for each in amounts:
        for name, amount in each.items():
            total[name] += amount
    return dict(total)


@cache
def pass_amounts(cell: Cell, step: Pass) -> Amounts:
    """Of one pass over the layers."""
    dtype, is_step = DTYPES[cell.dtype], step.tokens == 0
    load = Load(
        tokens=step.sequences if is_step else step.tokens,
        sequences=step.sequences,
        keys=cell.prompt + cell.output / 2 if is_step else cell.prompt / 2,
        dtype=dtype,
    )
    return _pass_amounts(cell, load, logits=step.ends)


def _pass_amounts(cell: Cell, load: Load, logits: float) -> Amounts:
    plan = cell.model().plan
    work = [*layers_work(plan, cell.tensor, load), head_work(plan, cell.tensor, logits, load.dtype)]
    found = _computing(cell, load, work)
    found["passes"] = 1.0
    found["rows"] = logits
    if cell.tensor > 1:
        collectives = model_collectives(plan, cell.tensor, round(load.tokens), load.dtype)
        for collective, count in Counter(collectives).items():
            for name, amount in _sending(cell, collective, load).items():
                found[name] += count * amount
    return dict(found)


def _computing(cell: Cell, load: Load, work: Iterable[Operation]) -> Amounts:
    found: Amounts = defaultdict(float)
    kind = "step" if load.is_step else "prefill"
    for operation in work:
        rate = f"{operation.name} FLOP" if operation.name in ("scan", "attention") else f"FLOP of {cell.dtype}, {kind}"
        found[rate] += operation.flops / cell.threads
        found["exponentials"] += operation.exponentials / cell.threads
        found["bytes of activations"] += operation.activation_bytes / cell.threads
        if operation.name == "attention":
            found["bytes of keys and values"] += operation.state_bytes / cell.threads
            operation = replace(operation, state_bytes=0.0)
        alone = cell.busy_cores == 1
        memory = "bytes, one core busy" if alone else "bytes, several cores busy"
        found[memory] += cell.ranks * (operation.weight_bytes + operation.state_bytes)
        found["kernels"] += operation.launches
    return found


def _sending(cell: Cell, collective: Collective, load: Load) -> Amounts:
    tokens = round(load.tokens)
    if cell.link is None:
        return {"messages in memory": 1.0, "bytes in memory": collective.bytes(load.dtype, cell.tensor) * tokens}
    bears = set(QUANTIZABLE_SITES).issuperset(collective.site.split("+"))
    if cell.codec in (None, "exact") or not bears:
        wire = ring_cost(collective.bytes(load.dtype, cell.tensor) * tokens, Layout(cell.tensor, 1)).wire
        kind = "plain"
    else:
        peers = cell.tensor - 1
        wire, kind = peers * collective.message_bytes(tokens, load.dtype, codec_named(cell.codec)), "quantized"
    return {
        f"{kind} messages between hosts": 1.0,
        "bytes between hosts": wire,
        "seconds of the link": wire / cell.link.both_ways,
    }
