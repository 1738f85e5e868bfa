"""Reductions behind work: late waits give the same bits, two chunks the same answers, and both do overlap."""

from __future__ import annotations

from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS

from megatron_ssm.families.communication import layer_collectives, model_collectives
from megatron_ssm.overlap import TWO_CHUNKS_FROM, Overlap, two_chunks_pay

ROWS, LENGTH, PIECE = 3, 150, 20
# Together 155 tokens, cut at 64: a row in the first chunk, one across the cut, one in the second.
UNEVEN = (40, 70, 45)
TOLERANCE = 1e-5


def _grid(variants):
    """Every variant at two ranks, some at four; all at four too in the full run."""
    cases = []
    for place, variant in enumerate(variants):
        for size in (2, 4):
            marks = () if size == 2 or place % 9 == 4 else pytest.mark.full
            cases.append(pytest.param(variant, size, marks=marks, id=f"{variant}-{size}"))
    return pytest.mark.parametrize(("variant", "size"), cases)


def _engine(context, directory: Path, dtype: torch.dtype = torch.float32, **options):
    from deepspeed_inference import init_inference

    parallel = {"tp_size": context.size, "tp_group": context.group}
    return init_inference(directory, tensor_parallel=parallel, dtype=dtype, **options)


def _answers(engine, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prompts in one piece, in two and of different lengths, and the step behind each."""
    one, two, uneven = (engine.new_context(ROWS) for _ in range(3))
    found = {"whole": engine.prefill(ids, one), "step": engine.decode(ids[:, 0], one)}
    engine.prefill(ids[:, :PIECE], two)
    found["piece"], found["step_behind_piece"] = engine.prefill(ids[:, PIECE:], two), engine.decode(ids[:, 0], two)
    lengths = torch.tensor(UNEVEN)
    found["uneven"] = engine.prefill(ids, uneven, lengths=lengths)
    found["uneven_piece"] = engine.prefill(ids, uneven, lengths=lengths.flip(0))
    found["step_behind_uneven"] = engine.decode(ids[:, 0], uneven)
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        mask[0, 30:90], mask[1, :110], mask[2, 20:] = 0, 0, 0
        found["padded"] = engine(ids, attention_mask=mask, use_cache=True).logits[:, -1][mask[:, -1] > 0]
    return found


# ---- Late waits


@contextmanager
def _split_always():
    """Mixers compute z by itself however few the tokens are."""
    from megatron_ssm.mixers import mamba1

    before, mamba1.FEW_TOKENS = mamba1.FEW_TOKENS, 0
    try:
        yield
    finally:
        mamba1.FEW_TOKENS = before


def _late_and_at_once(context, directory: Path, ids: torch.Tensor, dtype: torch.dtype) -> list[dict]:
    with closing(_engine(context, directory, dtype)) as engine, _split_always():
        found = []
        for choice in ("never", "auto"):
            engine.stack.hide(Overlap(choice))
            found.append(_answers(engine, ids))
        return found


# Those with a small reduction; Zamba's two heads have one where there are more ranks than that.
LATE = [("mamba", 2), ("mamba-untied-bias", 4), ("falcon_mamba", 2), ("jamba", 4), ("zamba", 4)]
LATE_FULL = [("mamba", 4), ("mamba-narrow-conv", 2), ("falcon_mamba", 4), ("jamba", 2), ("zamba-kv2-bias", 4)]


@pytest.mark.parametrize(
    ("variant", "size"), [*LATE, *(pytest.param(*case, marks=pytest.mark.full) for case in LATE_FULL)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_late_waits_give_the_same_bits(ranks, variant, size, dtype):
    for rank, (at_once, late) in enumerate(
        ranks(_late_and_at_once, size, tiny_checkpoint(variant), random_ids(ROWS, LENGTH), dtype)
    ):
        for name, answer in at_once.items():
            assert torch.equal(late[name], answer), f"rank {rank}: {name}"


def _order_of_events(context, directory: Path, choice: str, tokens: int) -> list[str]:
    """What the mixer of one layer does, in order."""
    events: list[str] = []
    with closing(_engine(context, directory, hide_reductions=choice)) as engine:
        mixer, reduction = engine.stack.layers[0].mixer, engine.reduction
        segment, start, reduce = mixer.in_proj.segment, reduction.start, reduction.reduce

        def noted_start(partial, site):
            events.append(f"start {site.name}")
            handle = start(partial, site)

            def wait():
                events.append(f"wait {site.name}")
                return handle.wait()

            return SimpleNamespace(wait=wait)

        def noted_reduce(partial, site):
            events.append(f"reduce {site.name}")
            return reduce(partial, site)

        mixer.in_proj.segment = lambda hidden, name: (events.append(name), segment(hidden, name))[1]
        reduction.start, reduction.reduce = noted_start, noted_reduce
        with torch.inference_mode():
            mixer(torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(0)))
        return events


@pytest.mark.parametrize(
    ("choice", "tokens", "expected"),
    [
        ("auto", 65, ["x", "start x_proj", "z", "wait x_proj"]),
        ("always", 65, ["x", "start x_proj", "z", "wait x_proj"]),
        ("never", 65, ["x", "reduce x_proj", "z"]),
        ("auto", 64, ["reduce x_proj"]),
        ("never", 64, ["reduce x_proj"]),
    ],
)
def test_z_is_computed_while_the_small_reduction_is_under_way(ranks, choice, tokens, expected):
    assert ranks(_order_of_events, 2, tiny_checkpoint(), choice, tokens) == [expected] * 2


# ---- Two chunks


def _in_one_and_in_two(context, directory: Path, ids: torch.Tensor) -> tuple[dict, dict, int]:
    with closing(_engine(context, directory)) as engine:
        engine.stack.hide(Overlap("never"))
        one = _answers(engine, ids)
        engine.stack.hide(Overlap("always"))
        with _outstanding(engine.reduction) as most:
            return one, _answers(engine, ids), max(most)


@contextmanager
def _outstanding(reduction):
    """How many sums of sublayers are under way whenever one more is started."""
    start, under_way, counts = reduction.start, set(), []

    def counted(partial, site):
        handle, number = start(partial, site), len(counts)
        under_way.add(number)
        counts.append(len(under_way))

        def wait():
            under_way.discard(number)
            return handle.wait()

        return SimpleNamespace(wait=wait)

    reduction.start = counted
    try:
        yield counts
    finally:
        del reduction.start


@_grid(ALL_VARIANTS)
def test_two_chunks_give_the_answers_of_one(ranks, variant, size):
    results = ranks(_in_one_and_in_two, size, tiny_checkpoint(variant), random_ids(ROWS, LENGTH), timeout=120)
    for rank, (one, two, most) in enumerate(results):
        assert most >= 2, "nothing overlapped"
        for name, answer in one.items():
            error = float((two[name] - answer).abs().max() / answer.abs().max())
            assert error <= TOLERANCE, f"rank {rank}: {name} differs by {error:.1e}"
            assert torch.equal(two[name], results[0][1][name]), f"rank {rank} has other bits of {name} than rank 0"


def _by_messages(context, directory: Path, ids: torch.Tensor, codec: str) -> list[dict[str, torch.Tensor]]:
    options = {"reduction": "torch", "quantized_all_reduce": codec}
    with closing(_engine(context, directory, **options)) as engine:
        found = []
        for choice in ("never", "always"):
            engine.stack.hide(Overlap(choice))
            found.append(_answers(engine, ids))
        return found


@pytest.mark.parametrize(("codec", "tolerance"), [("exact", TOLERANCE), ("int8", 0.1)])
@pytest.mark.parametrize("variant", ["mamba", "mamba2", "falcon_h1-norm-after-gate"])
def test_messages_of_two_chunks_keep_apart(ranks, variant, codec, tolerance):
    results = ranks(_by_messages, 2, tiny_checkpoint(variant), random_ids(ROWS, LENGTH), codec)
    for rank, (one, two) in enumerate(results):
        for name, answer in one.items():
            error = float((two[name] - answer).abs().mean() / answer.abs().max())
            assert error <= tolerance, f"rank {rank}: {name} differs by {error:.1e}"
            assert torch.equal(two[name], results[0][1][name]), f"rank {rank} has other bits of {name} than rank 0"


def _bf16_and_fp32(context, directory: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for dtype, choice in ((torch.float32, "never"), (torch.bfloat16, "never"), (torch.bfloat16, "always")):
        with closing(_engine(context, directory, dtype, hide_reductions=choice)) as engine:
            found.append(engine.prefill(ids, engine.new_context(ROWS)).float())
    return found


@pytest.mark.parametrize("variant", ["mamba2", "falcon_h1-norm-after-gate"])
def test_bf16_is_no_worse_in_two_chunks(ranks, variant):
    for exact, one, two in ranks(_bf16_and_fp32, 4, tiny_checkpoint(variant), random_ids(ROWS, LENGTH)):
        assert (two - exact).abs().mean() <= 1.5 * (one - exact).abs().mean()


def _traffic(context, directory: Path, ids: torch.Tensor, dtype: torch.dtype) -> dict:
    with closing(_engine(context, directory, dtype, hide_reductions="always")) as engine:
        engine.reduction.traffic.reset()
        engine.prefill(ids, engine.new_context(ROWS), gather_logits=False)
        return engine.reduction.traffic.snapshot()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
@pytest.mark.parametrize("variant", ["mamba", "mamba2", "mamba2-groups2", "zamba", "falcon_h1-norm-after-gate"])
def test_the_collectives_of_a_layer_are_made_once_a_chunk(ranks, variant, dtype):
    from megatron_ssm.families import family_of

    config, ids = tiny_model(variant).config, random_ids(ROWS, LENGTH)
    plan = family_of(config).plan(config)
    counts, sizes = Counter(), Counter()
    for tokens in (ROWS * 64, ROWS * (LENGTH - 64)):
        for layer in plan.layers:
            for item in layer_collectives(layer, plan.hidden_size, 4, tokens, dtype):
                counts[item.site] += 1
                sizes[item.site] += tokens * item.bytes(dtype, 4)
    embedding = model_collectives(plan, 4, ids.numel(), dtype)[0]
    counts[embedding.site], sizes[embedding.site] = 1, ids.numel() * embedding.bytes(dtype, 4)
    for traffic in ranks(_traffic, 4, tiny_checkpoint(variant), ids, dtype):
        assert traffic == {site: (counts[site], sizes[site]) for site in counts}


def _sums_a_forward(context, directory: Path, ids: torch.Tensor) -> dict[str, int]:
    def sums(run) -> int:
        engine.reduction.traffic.reset()
        with torch.enable_grad():
            run()
        return engine.reduction.traffic.snapshot()["out_proj"][0]

    with closing(_engine(context, directory, hide_reductions="always")) as engine:
        whole, short = engine.new_context, ids[:, :127]
        return {
            "prefill": sums(lambda: engine.prefill(ids, whole(ROWS))),
            "through_transformers": sums(lambda: torch.no_grad()(engine.module)(ids, use_cache=True)),
            "short": sums(lambda: engine.prefill(short, whole(ROWS))),
            "without_state": sums(lambda: torch.no_grad()(engine.module)(ids, use_cache=False)),
            "with_gradient": sums(lambda: engine.module(ids, use_cache=True)),
            "streams": sums(lambda: torch.no_grad()(engine.module)(ids, use_cache=True, output_hidden_states=True)),
        }


def test_only_long_prompts_with_a_state_and_without_a_gradient_are_split(ranks):
    for counts in ranks(_sums_a_forward, 2, tiny_checkpoint(), random_ids(ROWS, LENGTH)):
        assert {name for name, count in counts.items() if count == 6} == {"prefill", "through_transformers"}
        assert set(counts.values()) == {3, 6}


def _pays(context, directory: Path) -> list[bool]:
    with (
        closing(_engine(context, directory)) as shared,
        closing(_engine(context, directory, reduction="torch")) as other,
    ):
        lengths = (TWO_CHUNKS_FROM - 1, TWO_CHUNKS_FROM)
        return [two_chunks_pay(engine.reduction, tokens) for engine in (shared, other) for tokens in lengths]


def test_auto_splits_where_it_was_measured_to_win(ranks):
    assert ranks(_pays, 2, tiny_checkpoint()) == [[False, False, False, True]] * 2
    one = SimpleNamespace(size=1)
    assert not Overlap("always").wants_chunks(one, 10**6)
