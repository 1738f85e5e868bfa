"""Sums and gathers over real ranks: which bits, which gradients, which errors, and what is counted."""

import math

import pytest
import torch
from ranks import RankContext

from megatron_ssm.collectives import EMBEDDING, OUT_PROJ, X_PROJ, Site, make_reduction
from megatron_ssm.collectives.reduction import Reduction
from megatron_ssm.collectives.shared_memory import SharedMemoryReduction
from megatron_ssm.collectives.torch_reduction import LocalReduction, TorchReduction

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALL_SLOT = 1024
# 40,000 fp32 elements take the two-phase path in a slot of the default size, and many pieces in a small one.
SHAPES = ((0,), (1,), (7,), (3, 5), (80,), (768,), (1, 257, 3), (40_001,))


def make(kind: str, context: RankContext) -> Reduction:
    if kind == "small_slots":
        return SharedMemoryReduction(context.group, timeout=30, slot_bytes=SMALL_SLOT)
    if kind == "torch_forced":
        return TorchReduction(context.group)
    return SharedMemoryReduction(context.group, timeout=30)


def partial_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A rank's partial: values of many magnitudes, so that the order of the sum shows in its bits."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    scales = torch.randint(-6, 7, shape, generator=generator)
    return (values * torch.exp2(scales.double())).to(dtype)


def rank_ordered_sum(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    total = partial_of(0, shape, dtype, seed).to(accumulate)
    for rank in range(1, size):
        total = total + partial_of(rank, shape, dtype, seed).to(accumulate)
    return total.to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sum_everything(context: RankContext, kind: str) -> list[bytes]:
    results = []
    with make(kind, context) as reduction:
        for seed, shape in enumerate(SHAPES):
            for dtype in FLOATS:
                partial = partial_of(context.rank, shape, dtype, seed)
                before = bits(partial)
                result = reduction.reduce(partial, OUT_PROJ)
                assert result.shape == partial.shape and result.dtype == dtype, (shape, dtype, result.shape)
                assert bits(partial) == before, "the partial was modified"
                if kind == "torch_forced":
                    expected = rank_ordered_sum(context.size, shape, torch.float64, seed)
                    # Two roundings for each rank that the backend adds in the tensor's own dtype, at most.
                    bound = context.size * 200 * torch.finfo(dtype).eps
                    assert torch.allclose(result.double(), expected, rtol=0, atol=bound), (shape, dtype)
                else:
                    expected = rank_ordered_sum(context.size, shape, dtype, seed)
                    assert bits(result) == bits(expected), (shape, dtype)
                results.append(bits(result))
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["torch_forced", "shared_memory", "small_slots"])
def test_sum_is_right_and_the_same_bits_on_every_rank(ranks, kind, size):
    results = ranks(sum_everything, size, kind)
    assert all(result == results[0] for result in results)


def sum_strided(context: RankContext, kind: str) -> None:
    with make(kind, context) as reduction:
        for dtype in (torch.float32, torch.bfloat16):
            base = partial_of(context.rank, (6, 10, 8), dtype)
            total = rank_ordered_sum(context.size, (6, 10, 8), dtype)
            for view in (lambda t: t.transpose(0, 2), lambda t: t[:, ::3], lambda t: t[:, 1:2].expand(6, 5, 8)):
                result = reduction.reduce(view(base), OUT_PROJ)
                assert torch.allclose(result, view(total), rtol=0.02, atol=1), dtype
                if kind != "torch_forced":
                    assert torch.equal(result, view(total)), dtype


@pytest.mark.parametrize("kind", ["torch_forced", "shared_memory", "small_slots"])
def test_non_contiguous_partials(ranks, kind):
    ranks(sum_strided, 2, kind)


def sum_large(context: RankContext) -> None:
    with SharedMemoryReduction(context.group, timeout=30) as reduction:
        shape = (3, (1 << 20) + 5)  # bf16: six slots and a bit
        result = reduction.reduce(partial_of(context.rank, shape, torch.bfloat16), OUT_PROJ)
        assert torch.equal(result, rank_ordered_sum(context.size, shape, torch.bfloat16))


@pytest.mark.parametrize("size", [2, 4])
def test_larger_than_the_segment(ranks, size):
    ranks(sum_large, size)


def sum_integers(context: RankContext) -> None:
    with SharedMemoryReduction(context.group, timeout=30) as reduction:
        result = reduction.reduce(torch.tensor([1, 2**40]) * (context.rank + 1), OUT_PROJ)
        assert result.tolist() == [3, 3 * 2**40]


def test_other_dtypes_go_through_torch(ranks):
    ranks(sum_integers, 2)


def sum_special(context: RankContext) -> list[bytes]:
    nan, inf = math.nan, math.inf
    rows = [
        [nan, inf, inf, -inf, -0.0, 0.0, 65504.0, 1e-8, 5.9e-8, 6.1e-5],
        [1.0, 1.0, -inf, -inf, -0.0, -0.0, 65504.0, 1e-8, 5.9e-8, -6.0e-5],
    ]
    results = []
    with SharedMemoryReduction(context.group, timeout=30) as reduction:
        for dtype in FLOATS:
            partials = [torch.tensor(rows[rank % 2], dtype=torch.float64).to(dtype) for rank in range(context.size)]
            accumulate = torch.float64 if dtype == torch.float64 else torch.float32
            expected = partials[0].to(accumulate)
            for partial in partials[1:]:
                expected = expected + partial.to(accumulate)
            result = reduction.reduce(partials[context.rank], OUT_PROJ)
            torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
            assert torch.equal(result.signbit()[3:], expected.signbit()[3:]), dtype
            results.append(bits(result))
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_nan_infinity_signed_zero_and_subnormals(ranks, size):
    results = ranks(sum_special, size)
    assert all(result == results[0] for result in results)


def sum_all_halves(context: RankContext) -> None:
    # Every fp16 and bf16 number, added to zero, to one that nearly cancels it, and to a stranger.
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    with SharedMemoryReduction(context.group, timeout=30) as reduction:
        for dtype in (torch.float16, torch.bfloat16):
            numbers = codes.view(dtype)
            for others in (torch.zeros_like(numbers), -torch.roll(numbers, 1), torch.roll(numbers, 12_345)):
                result = reduction.reduce(numbers if context.rank == 0 else others, OUT_PROJ)
                expected = (numbers.float() + others.float()).to(dtype)
                torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_every_half_precision_number(ranks):
    ranks(sum_all_halves, 2)


def overlap_handles(context: RankContext, kind: str) -> None:
    shapes = ((100,), (7,), (3000,), (50,), (2000,))
    with make(kind, context) as reduction:
        for order in ((0, 1, 2, 3, 4), (1, 0, 4, 3, 2)):
            handles = {}
            for seed, shape in enumerate(shapes):
                handles[seed] = reduction.start(partial_of(context.rank, shape, torch.float32, seed), X_PROJ)
                if seed == 2:  # in between, an operation of another kind
                    assert reduction.all_gather(torch.tensor([context.rank])).tolist() == list(range(context.size))
            for seed in order:
                result = handles[seed].wait()
                expected = rank_ordered_sum(context.size, shapes[seed], torch.float32, seed)
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)
                assert handles[seed].wait() is result


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["torch_forced", "shared_memory", "small_slots"])
def test_several_handles_outstanding(ranks, kind, size):
    ranks(overlap_handles, size, kind)


def race_ahead(context: RankContext) -> None:
    # The ranks take turns at being late, between start and wait too: no slot may be overwritten before it is read.
    with SharedMemoryReduction(context.group, timeout=30) as reduction:
        previous = None
        for step in range(300):
            partial = torch.full((64,), float(step * (context.rank + 1)))
            handle = reduction.start(partial, X_PROJ)
            if (step * 7 + context.rank * 3) % 11 == 0:
                torch.randn(20_000)
            if previous is not None:
                total = (step - 1) * context.size * (context.size + 1) / 2
                assert torch.equal(previous.wait(), torch.full((64,), total)), step
            previous = handle


@pytest.mark.parametrize("size", [2, 4])
def test_slots_are_not_overwritten_early(ranks, size):
    ranks(race_ahead, size)


def gather(context: RankContext, kind: str) -> None:
    with make(kind, context) as reduction:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.int16):
            for shape in ((3,), (2, 5), (2, 3, 4), (1, 1000, 7), (2, 0)):
                parts = [partial_of(rank, shape, torch.float32).to(dtype) for rank in range(context.size)]
                for dim in range(-len(shape), len(shape)):
                    result = reduction.all_gather(parts[context.rank], dim)
                    assert torch.equal(result, torch.cat(parts, dim)), (dtype, shape, dim)
        strided = [part.transpose(0, 1) for part in (torch.arange(6).view(2, 3) + 10 * r for r in range(context.size))]
        assert torch.equal(reduction.all_gather(strided[context.rank]), torch.cat(strided, -1))
        with pytest.raises(ValueError, match="dim 1 is out of range"):
            reduction.all_gather(torch.zeros(3), 1)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["torch_forced", "shared_memory", "small_slots"])
def test_all_gather_joins_in_rank_order(ranks, kind, size):
    ranks(gather, size, kind)


def two_layers(reduction: Reduction, hidden, weights, rank: int, size: int):
    """hidden ─▶ column-cut w0 ─▶ row-cut w1 ─▶ sum that feeds rank-local work ─▶ row-cut w2 ─▶ output sum."""
    channels = weights[0].shape[1] // size
    mine = slice(rank * channels, (rank + 1) * channels)
    x = torch.tanh(reduction.copy_to_ranks(hidden) @ weights[0][:, mine])
    handle = reduction.start(x @ weights[1][mine], X_PROJ)
    gate = x.sin()
    local = gate * (handle.wait() @ weights[2][:, mine])
    return reduction.reduce(local @ weights[3][mine], OUT_PROJ)


def gradients(context: RankContext, kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((6, 8), (8, 4), (4, 8), (8, 6))
    hidden = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def run(reduction: Reduction, rank: int, size: int) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, *values)]
        output = two_layers(reduction, leaves[0], leaves[1:], rank, size)
        (output * torch.arange(6)).square().sum().backward()
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    whole = run(LocalReduction(), 0, 1)
    with make(kind, context) as reduction:
        cut = run(reduction, context.rank, context.size)
        torch.testing.assert_close(cut[0], whole[0], msg="output")
        torch.testing.assert_close(cut[1], whole[1], msg="gradient of hidden")
        for number, (part, all_of_it) in enumerate(zip(cut[2:], whole[2:], strict=True)):
            # A rank has the gradient of its own cut only: the cuts together are the whole.
            total = reduction.reduce(part, Site("test", backward_reduces=False))
            torch.testing.assert_close(total, all_of_it, msg=f"gradient of weight {number}")
        counted = reduction.traffic.snapshot()
        expected = {"x_proj", "out_proj", "x_proj.backward", "column_input.backward", "test"}
        assert set(counted) == (expected if reduction.size > 1 or kind != "local" else set())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["torch_forced", "shared_memory"])
def test_gradients_of_ranks_equal_those_of_one(ranks, kind, size):
    ranks(gradients, size, kind)


def gradients_of_sites(context: RankContext) -> list[list[float]]:
    results = []
    with make("shared_memory", context) as reduction:
        for site in (OUT_PROJ, EMBEDDING, X_PROJ):
            partial = torch.ones(2, requires_grad=True)
            reduction.reduce(partial, site).backward(torch.full((2,), float(context.rank + 1)))
            results.append(partial.grad.tolist())
        tensor = torch.ones(1, 2, requires_grad=True)
        reduction.all_gather(tensor).backward(torch.arange(2.0 * context.size).view(1, -1))
        results.append(tensor.grad[0].tolist())
        with torch.inference_mode():
            assert not reduction.reduce(partial, X_PROJ).requires_grad
    return results


def test_backward_is_the_identity_or_a_sum_by_site(ranks):
    first, second = ranks(gradients_of_sites, 2)
    assert first == [[1, 1], [1, 1], [3, 3], [0, 1]]
    assert second == [[2, 2], [2, 2], [3, 3], [2, 3]]


def count_traffic(context: RankContext, kind: str) -> None:
    with make(kind, context) as reduction:
        reduction.reduce(torch.zeros(2, 8, dtype=torch.bfloat16), OUT_PROJ)
        reduction.start(torch.zeros(5), X_PROJ).wait()
        reduction.reduce(torch.zeros(5), X_PROJ)
        reduction.reduce(torch.zeros(3, dtype=torch.int64), EMBEDDING)
        reduction.reduce(torch.zeros(0), OUT_PROJ)
        reduction.all_gather(torch.zeros(4))
        reduction.barrier()
        snapshot = reduction.traffic.snapshot()
        assert snapshot == {"out_proj": (1, 32), "x_proj": (2, 40), "embedding": (1, 24), "all_gather": (1, 16)}
        assert (reduction.traffic.collectives, reduction.traffic.payload_bytes) == (5, 112)
        reduction.traffic.reset()
        assert reduction.traffic.snapshot() == {} and reduction.traffic.collectives == 0


@pytest.mark.parametrize("kind", ["torch_forced", "shared_memory"])
def test_traffic_is_counted_by_site(ranks, kind):
    ranks(count_traffic, 2, kind)


def agree_on_errors(context: RankContext, kind: str) -> None:
    with make(kind, context) as reduction:
        reduction.agree(None)
        with pytest.raises(ValueError, match=r"^expected 4, found 5$"):
            reduction.agree(ValueError("expected 4, found 5") if context.rank == 1 else None)
        with pytest.raises(ValueError, match=r"^from rank 0$"):
            reduction.agree(ValueError(f"from rank {context.rank}"))
        own = KeyError("weight")
        expected = (
            (KeyError, "weight") if context.rank == 1 else (RuntimeError, "rank 1 failed with KeyError: 'weight'")
        )
        with pytest.raises(expected[0], match=expected[1]):
            reduction.agree(own if context.rank == 1 else None)
        assert reduction.exchange({"rank": context.rank}) == [{"rank": rank} for rank in range(context.size)]
        reduction.barrier()


@pytest.mark.parametrize("kind", ["torch_forced", "shared_memory"])
def test_an_error_on_one_rank_is_raised_on_all(ranks, kind):
    ranks(agree_on_errors, 2, kind)


def test_one_rank_without_a_process_group():
    with make_reduction(None, "cpu") as reduction:
        assert isinstance(reduction, LocalReduction) and reduction.reason == "one rank"
        assert (reduction.rank, reduction.size) == (0, 1)
        partial = torch.randn(3, 5, requires_grad=True)
        assert reduction.reduce(partial, OUT_PROJ) is partial
        assert reduction.start(partial, X_PROJ).wait() is partial
        assert reduction.copy_to_ranks(partial) is partial
        assert torch.equal(reduction.all_gather(partial, 0), partial)
        assert reduction.exchange(3) == [3]
        reduction.barrier()
        reduction.agree(None)
        with pytest.raises(ValueError, match=r"^wrong$"):
            reduction.agree(ValueError("wrong"))
        with pytest.raises(KeyError):
            reduction.agree(KeyError("wrong"))
        assert reduction.traffic.snapshot() == {}


def two_groups_and_two_models(context: RankContext) -> None:
    import torch.distributed as dist

    # Ranks {0, 2} and {1, 3}: a group's ranks are not the world's, and two segments live in each process.
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[context.rank % 2]
    with make_reduction(group, "cpu") as pair, make_reduction(context.group, "cpu") as everybody:
        assert (pair.rank, pair.size) == (context.rank // 2, 2)
        for step in range(20):
            value = torch.tensor([10.0**context.rank + step])
            handle = pair.start(value, OUT_PROJ)
            assert everybody.reduce(value, OUT_PROJ).item() == 1111 + 4 * step
            assert handle.wait().item() == (101 if context.rank % 2 == 0 else 1010) + 2 * step
    for made in groups:
        if made is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(made)


def test_subgroups_and_several_models(ranks):
    ranks(two_groups_and_two_models, 4)


def sum_with_exact_numbers(context: RankContext, kind: str) -> list[bytes]:
    results = []
    with make(kind, context) as reduction:
        for dtype in FLOATS:
            wide = torch.promote_types(dtype, torch.float32)
            partial = partial_of(context.rank, (2, 3, 40), dtype)
            exact = partial_of(context.rank, (2, 3, 2), wide, seed=5) * 1000
            total, numbers = reduction.reduce_with(partial, exact, OUT_PROJ)
            assert total.dtype == dtype and numbers.dtype == wide
            largest = rank_ordered_sum(context.size, (2, 3, 40), torch.float64).abs().max()
            expected = rank_ordered_sum(context.size, (2, 3, 40), torch.float64).to(dtype)
            bound = 4 * context.size * torch.finfo(dtype).eps * largest
            assert (total.double() - expected.double()).abs().max() <= bound, dtype
            parts = [partial_of(rank, (2, 3, 2), wide, seed=5) * 1000 for rank in range(context.size)]
            bound = 4 * torch.finfo(wide).eps * sum(part.abs() for part in parts)
            assert ((numbers - sum(parts)).abs() <= bound).all(), dtype
            if dtype is torch.bfloat16:  # nothing but zeros was added to any rank's numbers
                assert torch.equal(numbers, torch.stack(parts).sum(0))
            results += [bits(total), bits(numbers)]
        poisoned = torch.full((1, 1), float("nan") if context.rank == context.size - 1 else 1.0)
        assert reduction.reduce_with(torch.ones(1, 4, dtype=torch.bfloat16), poisoned, OUT_PROJ)[1].isnan()
    return results


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["torch_forced", "shared_memory", "small_slots"])
def test_a_few_numbers_travel_exactly_beside_a_tensor_of_any_dtype(ranks, kind, size):
    answers = ranks(sum_with_exact_numbers, size, kind)
    assert all(answer == answers[0] for answer in answers)
