"""What an engine says that it will take is what it takes."""

from __future__ import annotations

import pytest
import torch
from ranks import RankContext
from tiny import tiny_checkpoint

from deepspeed_inference.engine import init_inference
from ssm_kernels.int8_weight import Int8Weight


def _bytes_of_weights(engine) -> int:
    in_int8 = sum(module.nbytes for module in engine.module.modules() if isinstance(module, Int8Weight))
    return in_int8 + sum(parameter.nbytes for parameter in engine.module.parameters())


def _compare(context: RankContext, checkpoint, options: dict) -> None:
    told = []
    place = {"tp_size": context.size, "tp_group": context.group}
    engine = init_inference(checkpoint, tensor_parallel=place, announce=told.append, **options)
    assert told == ([engine.memory] if context.rank == 0 else [])
    assert engine.memory.weights_bytes == _bytes_of_weights(engine)
    pool = engine.new_context(5)
    assert pool.nbytes() == 5 * engine.memory.sequence_bytes
    pool.make_room(300)
    assert pool.nbytes() == 5 * (engine.memory.sequence_bytes + 300 * engine.memory.token_bytes)


@pytest.mark.parametrize(
    ("family", "size", "options"),
    [
        ("mamba", 1, {}),
        ("mamba", 2, {"dtype": "bfloat16"}),
        ("mamba2", 2, {"state_dtype": "bfloat16"}),
        ("zamba2", 2, {}),
        ("jamba", 2, {"dtype": "bfloat16"}),
        ("bamba", 4, {}),
        ("wide-mamba", 1, {"dtype": "bfloat16", "weights": "int8"}),
    ],
)
def test_what_it_says_is_what_it_takes(ranks, family, size, options):
    ranks(_compare, size, tiny_checkpoint(family), options)


def test_a_cache_without_room_for_a_snapshot_is_refused_before_anything_is_read():
    checkpoint = tiny_checkpoint("mamba")
    needed = init_inference(checkpoint).memory.sequence_bytes
    for share in (1.0, 3.5):
        assert init_inference(checkpoint, prefix_cache_mb=share * needed / 1e6).prefix_cache is not None
    told = []
    with pytest.raises(ValueError, match=r"prefix_cache_mb: expected room for one snapshot, 0\.0\d+ MB a rank, found"):
        init_inference(checkpoint, prefix_cache_mb=0.9 * needed / 1e6, announce=told.append)
    with pytest.raises(ValueError, match=r"prefix_cache_spill_mb: expected room for one snapshot"):
        init_inference(
            checkpoint, prefix_cache_mb=1, prefix_cache_spill="host", prefix_cache_spill_mb=0.5 * needed / 1e6
        )
    assert not told


def test_a_snapshot_that_never_fits_costs_its_prompt_nothing():
    engine = init_inference(tiny_checkpoint("zamba"), prefix_cache_mb=0.03)
    ids = torch.randint(1, 96, (1, 400), generator=torch.Generator().manual_seed(0))
    found = engine.prefill(ids, engine.new_context())
    assert engine.prefix_cache.stats.refused > 0
    engine.prefix_cache = None
    torch.testing.assert_close(found, engine.prefill(ids, engine.new_context()), rtol=1e-4, atol=1e-4)


def test_lines_say_what_is_there():
    lines = init_inference(
        tiny_checkpoint("zamba2"), batch_size=3, max_sequence_length=100, prefix_cache_mb=2, prefix_cache_spill="host"
    ).memory.lines()
    assert lines[0].startswith("weights: 0.") and lines[0].endswith(" MB a rank")
    assert lines[1].startswith("state: 3 slots × (0.01 MB + ") and "kB a token, for 100 tokens)" in lines[1]
    assert lines[2:] == ["prefix cache: 2.0 MB a rank", "beyond it: 1,024.0 MB a rank in host memory"]
