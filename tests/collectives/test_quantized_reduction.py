"""Quantized sums over real ranks: what the codecs promise, to the bit, and the same bits on every rank."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks import RankContext

import ssm_kernels
from megatron_ssm.collectives import (
    DOWN_PROJ,
    NORM_SUMS,
    O_PROJ,
    OUT_PROJ,
    X_PROJ,
    ReductionError,
    Site,
    exchange,
    make_quantized_reduction,
)
from megatron_ssm.collectives.host import HOST_VARIABLE
from megatron_ssm.collectives.quantized import QuantizedReduction
from megatron_ssm.collectives.shared_memory import SharedMemoryReduction
from megatron_ssm.collectives.torch_reduction import LocalReduction, TorchReduction
from ssm_kernels.codecs import CODECS, RAW, codec_named

CODEC_NAMES = (*CODECS, "exact")
SHAPES = [(1,), (1, 1, 96), (3, 7), (5, 1003), (2, 64, 768)]
# In one exchange or two phases at four ranks; in several pieces, one after the other or in the thread.
LARGE = (700, 2048)


def make(context: RankContext, codec: str = "int8", **options):
    return make_quantized_reduction(context.group, "cpu", codec, kind="torch", **options)


def partial_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    values = torch.randn(shape, generator=generator)
    values[..., 0] *= 30  # an outlier channel
    return values.to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def expected_sum(partials: list[torch.Tensor], codec_name: str) -> torch.Tensor:
    """What the messages must come to, computed by one process: no transport, no pieces."""
    dtype, count = partials[0].dtype, partials[0].numel()
    codec = RAW[dtype] if codec_name == "exact" else codec_named(codec_name)
    peers = len(partials)
    flats = [partial.reshape(-1) for partial in partials]
    if peers == 2 or (peers - 1) * codec.nbytes(count) <= exchange.ONE_EXCHANGE_BYTES:
        wires = [ssm_kernels.quantize(flat, codec) for flat in flats]
        return ssm_kernels.dequantize_sum(wires, codec, count, dtype).view_as(partials[0])
    # Shards begin at whole groups, so that where they are cut changes nothing.
    first = CODECS["int6"] if codec_name == "int4" and peers == 8 else codec
    wires = [ssm_kernels.quantize(flat, first) for flat in flats]
    total = ssm_kernels.quantize(ssm_kernels.dequantize_sum(wires, first, count, torch.float32), codec)
    return ssm_kernels.dequantize_sum([total], codec, count, dtype).view_as(partials[0])


def sum_everything(context: RankContext, codec: str) -> list[bytes]:
    found = []
    with make(context, codec) as reduction:
        assert isinstance(reduction, QuantizedReduction)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for seed, shape in enumerate(SHAPES):
                partials = [partial_of(rank, shape, dtype, seed) for rank in range(context.size)]
                given = partials[context.rank].clone()
                result = reduction.reduce(given, OUT_PROJ)
                assert torch.equal(given, partials[context.rank]), "the partial was modified"
                assert result.dtype == dtype and result.shape == shape
                assert bits(result) == bits(expected_sum(partials, codec)), (dtype, shape)
                found.append(bits(result))
    return found


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_sums_are_what_the_codec_promises_on_every_rank(ranks, codec, size):
    results = ranks(sum_everything, size, codec)
    assert all(result == results[0] for result in results)


def sum_in_pieces(context: RankContext, codec: str) -> None:
    partials = [partial_of(rank, LARGE, torch.bfloat16) for rank in range(context.size)]
    expected = expected_sum(partials, codec)
    own = partials[context.rank]
    with make(context, codec) as reduction:
        assert bits(reduction.reduce(own, OUT_PROJ)) == bits(expected)
        # Two in the thread, small ones between them and behind them, and one that has to queue.
        first, small = reduction.start(own, OUT_PROJ), partial_of(context.rank, (3, 96), torch.bfloat16)
        exact = reduction.reduce(small.float(), X_PROJ)
        second = reduction.start(own * 2, DOWN_PROJ)
        handle = reduction.start(small, O_PROJ)
        third = reduction.reduce(own, OUT_PROJ)
        assert bits(second.wait()) == bits(expected * 2)
        assert bits(first.wait()) == bits(expected) == bits(third)
        assert first.wait() is first.wait()
        smalls = [partial_of(rank, (3, 96), torch.bfloat16) for rank in range(context.size)]
        assert bits(handle.wait()) == bits(expected_sum(smalls, codec))
        assert bits(exact) == bits(expected_sum([value.float() for value in smalls], "exact"))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("codec", ["int8", "int6", "exact"])
def test_large_tensors_and_several_handles(ranks, codec, size):
    ranks(sum_in_pieces, size, codec)


def sum_special(context: RankContext, codec: str) -> list[bytes]:
    special = {0: (float("nan"), 3), 1: (float("inf"), 700), 2: (float("-inf"), 700), 3: (-0.0, 5)}
    value = partial_of(context.rank, (1, 1029), torch.bfloat16)
    value[0, 200:330] = 0.0  # whole groups of zeros on all ranks
    if context.rank in special:
        number, place = special[context.rank]
        value[0, place] = number
    with make(context, codec) as reduction:
        result = reduction.reduce(value, OUT_PROJ)
        # Not finite: the group that had it, and nothing else; so nobody goes on with a wrong number.
        group = 1 if codec == "exact" else CODECS[codec].group
        bad = {3 // group} | ({700 // group} if context.size > 1 else set())
        for index in range(-(-1029 // group)):
            finite = bool(torch.isfinite(result[0, index * group : (index + 1) * group]).all())
            assert finite == (index not in bad), (index, group)
        assert result[0, 256:320].abs().max() == 0
        nothing = reduction.reduce(torch.empty(0, 7), OUT_PROJ)
        assert nothing.shape == (0, 7)
        strided = partial_of(context.rank, (64, 48), torch.float32).t()[::3]
        everybody = [partial_of(rank, (64, 48), torch.float32).t()[::3] for rank in range(context.size)]
        assert bits(reduction.reduce(strided, OUT_PROJ)) == bits(expected_sum(everybody, codec))
    return [bits(result)]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_nan_infinity_zero_empty_and_strided(ranks, codec, size):
    results = ranks(sum_special, size, codec)
    assert all(result == results[0] for result in results)


def stay_exact(context: RankContext) -> None:
    shape = (2, 5, 96)
    value = partial_of(context.rank, shape, torch.float32)
    everybody = [partial_of(rank, shape, torch.float32) for rank in range(context.size)]
    exact = expected_sum(everybody, "exact")
    lossy = expected_sum(everybody, "int4")
    assert not torch.equal(exact, lossy)
    joint = Site.joint([OUT_PROJ, O_PROJ])
    with make(context, "int4", sites=["out_proj"]) as reduction:
        for site in (X_PROJ, NORM_SUMS, O_PROJ, DOWN_PROJ, joint, OUT_PROJ.gradient):
            assert torch.equal(reduction.reduce(value, site), exact), site
        assert torch.equal(reduction.reduce(value, OUT_PROJ), lossy)
        # fp64, integers and what learns are the stock reduction's.
        assert torch.allclose(reduction.reduce(value.double(), OUT_PROJ), sum(one.double() for one in everybody))
        numbers = torch.arange(5) + context.rank
        ranks_sum = context.size * (context.size - 1) // 2
        assert torch.equal(reduction.reduce(numbers, OUT_PROJ), torch.arange(5) * context.size + ranks_sum)
        learning = value.clone().requires_grad_()
        total = reduction.reduce(learning, OUT_PROJ)
        assert torch.allclose(total, exact, atol=1e-5)
        total.sum().backward()
        assert torch.equal(learning.grad, torch.ones(shape))
    with make(context, "int4") as reduction:
        assert torch.equal(reduction.reduce(value, joint), lossy)


@pytest.mark.parametrize("size", [2, 4])
def test_what_must_stay_exact_does(ranks, size):
    ranks(stay_exact, size)


def carry_a_tail(context: RankContext, dtype: torch.dtype, tokens: int) -> list[bytes]:
    def numbers(rank: int) -> torch.Tensor:
        return torch.rand(1, tokens, 3, generator=torch.Generator().manual_seed(rank)) * 1e4

    partials = [partial_of(rank, (1, tokens, 320), dtype) for rank in range(context.size)]
    with make(context, "int8") as reduction:
        before = reduction.traffic.collectives
        total, tail = reduction.reduce_with(partials[context.rank], numbers(context.rank), OUT_PROJ)
        assert reduction.traffic.collectives == before + 1
        assert bits(total) == bits(expected_sum(partials, "int8"))
        exact = expected_sum([numbers(rank) for rank in range(context.size)], "exact")
        assert tail.dtype == torch.float32 and bits(tail) == bits(exact)
        kept, tail = reduction.reduce_with(partials[context.rank], numbers(context.rank), NORM_SUMS)
        assert torch.allclose(tail, exact) and kept.dtype == dtype
    return [bits(total), bits(tail)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tokens", [1, 3000])
def test_a_tail_of_exact_numbers(ranks, size, tokens):
    for dtype in (torch.bfloat16, torch.float32):
        results = ranks(carry_a_tail, size, dtype, tokens)
        assert all(result == results[0] for result in results)


def sum_over_hosts(context: RankContext, hosts: tuple[int, ...], codec: str) -> list[bytes]:
    names = [name for name, size in enumerate(hosts) for _ in range(size)]
    os.environ[HOST_VARIABLE] = f"host {names[context.rank]}"
    try:
        reduction = make_quantized_reduction(context.group, "cpu", codec, timeout=30)
    finally:
        del os.environ[HOST_VARIABLE]
    found = [reduction.reason.encode()]
    with reduction:
        for seed, shape in enumerate([*SHAPES, LARGE, (1, 3, 5)]):
            partials = [partial_of(rank, shape, torch.bfloat16, seed) for rank in range(context.size)]
            exact = sum(partial.double() for partial in partials)
            result = reduction.reduce(partials[context.rank], OUT_PROJ)
            handle = reduction.start(partials[context.rank], OUT_PROJ)
            small = reduction.reduce(torch.ones(70) * context.rank, X_PROJ)
            assert torch.equal(small, torch.ones(70) * sum(range(context.size)))
            assert bits(handle.wait()) == bits(result)
            # A rounding of each partial, and one of the sum, to one in 254 or to the 8 bits of bf16.
            most = sum(partial.double().abs().max() for partial in partials) / 100
            assert (result.double() - exact).abs().max() < most, shape
            found.append(bits(result))
        total, tail = reduction.reduce_with(torch.ones(1, 2, 96), torch.full((1, 2, 1), 1 / 3), OUT_PROJ)
        assert torch.allclose(tail, torch.full((1, 2, 1), context.size / 3))
        found.append(bits(total))
    return found


@pytest.mark.parametrize("codec", ["int8", "exact"])
@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        ((2, 2), "2 hosts of 2 ranks, shared memory within"),
        ((1, 1), "between 2 ranks"),
        ((1, 1, 1, 1), "between 4 ranks"),
        ((3, 1), "4 ranks (2 hosts of 1 to 3 ranks, which is uneven"),
        ((4, 4), "2 hosts of 4 ranks"),
        ((2, 2, 2, 2), "4 hosts of 2 ranks"),
    ],
)
def test_shared_memory_within_hosts_and_messages_between(ranks, hosts, reason, codec):
    results = ranks(sum_over_hosts, sum(hosts), hosts, codec)
    assert all(result == results[0] for result in results)
    assert reason in results[0][0].decode()


def stay_on_one_host(context: RankContext) -> tuple[type, str]:
    with make_quantized_reduction(context.group, "cpu", "int8") as reduction:
        return type(reduction), reduction.reason


def test_ranks_of_one_host_share_memory_and_have_nothing_to_quantize(ranks):
    for kind, reason in ranks(stay_on_one_host, 2):
        assert kind is SharedMemoryReduction
        assert reason.endswith("CPU ranks on one host; int8 is for ranks on several hosts")


def refuse(context: RankContext) -> None:
    with pytest.raises(ValueError, match=r"int8, fp8-e4m3, int6, int4.*'int7'"):
        make(context, "int7")
    with pytest.raises(ValueError, match=r"sites: expected some of out_proj, o_proj, down_proj, found \['x_proj'\]"):
        make(context, "int8", sites=["x_proj"])
    with pytest.raises(ValueError, match="sites: expected some of out_proj, o_proj, down_proj, found 'out_proj'"):
        make(context, "int8", sites="out_proj")
    with pytest.raises(ValueError, match="unknown kind of reduction"):
        make_quantized_reduction(context.group, "cpu", "int8", kind="pigeon")


@pytest.mark.parametrize("size", [1, 2])
def test_bad_arguments(ranks, size):
    ranks(refuse, size)


def alone(context: RankContext) -> None:
    for group in (None, context.group):
        reduction = make_quantized_reduction(group, "cpu", "int4")
        value = torch.randn(3, 5)
        assert isinstance(reduction, LocalReduction) and reduction.reduce(value, OUT_PROJ) is value
        assert reduction.reason == "one rank: nothing to quantize"


def test_a_group_of_one_is_a_no_op(ranks):
    ranks(alone, 1)


def count_traffic(context: RankContext) -> None:
    with make(context, "int8") as reduction:
        reduction.reduce(torch.ones(640, dtype=torch.bfloat16), OUT_PROJ)
        reduction.start(torch.ones(640, dtype=torch.bfloat16), OUT_PROJ).wait()
        reduction.reduce(torch.ones(5), X_PROJ)
        codec = CODECS["int8"]
        expected = {"out_proj": (2, 2 * codec.nbytes(640)), "x_proj": (1, RAW[torch.float32].nbytes(5))}
        assert reduction.traffic.snapshot() == expected


def test_traffic_is_counted_in_bytes_of_the_wire(ranks):
    ranks(count_traffic, 2)


def use_after_an_error(context: RankContext) -> None:
    reduction = make(context, "int8")
    reduction.close()
    with pytest.raises(ReductionError, match="cannot be used any more: it is closed"):
        reduction.reduce(torch.ones(5), OUT_PROJ)
    dist.barrier(context.group)
    # What is not quantized is the stock reduction's, which has nothing to close.
    assert isinstance(reduction.plain, TorchReduction)


def test_a_closed_reduction_refuses(ranks):
    ranks(use_after_an_error, 2)
