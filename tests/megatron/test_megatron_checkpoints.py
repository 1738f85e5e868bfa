"""Megatron's checkpoint formats: what is written is read again, whoever reads it and however often it was begun."""

from __future__ import annotations

import itertools
import os
import zipfile
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_variants import ALL_VARIANTS, sizes

from megatron_ssm.checkpoint.legacy_writer import LegacyWriter
from megatron_ssm.checkpoint.megatron_arguments import megatron_arguments
from megatron_ssm.checkpoint.megatron_directory import TRACKER, find_iteration, format_of, open_megatron
from megatron_ssm.checkpoint.torch_dist_writer import TorchDistWriter
from megatron_ssm.families import family_of
from megatron_ssm.hybrid.form import EMBEDDING, HEAD, megatron_tensors

WRITERS = {"torch_dist": TorchDistWriter, "legacy": LegacyWriter}
# Every kind of packing, tied and untied, both formats, several stages: each is in some row.
GRID = [
    ("mamba", 2, 3, "torch_dist"),
    ("mamba", 4, 1, "legacy"),
    ("falcon_mamba", 1, 3, "legacy"),
    ("mamba2-groups3", 2, 1, "torch_dist"),
    ("mamba2-groups3", 4, 3, "legacy"),
    ("mamba2-groups2", 4, 3, "torch_dist"),
    ("zamba", 2, 1, "legacy"),
    ("zamba", 4, 5, "torch_dist"),
    ("zamba-untied", 4, 1, "legacy"),
    ("zamba2-two-blocks", 2, 2, "torch_dist"),
    ("bamba", 4, 2, "torch_dist"),
    ("bamba-bias-groups2", 2, 2, "legacy"),
    ("falcon_h1-multipliers", 4, 2, "legacy"),
    ("jamba", 1, 2, "torch_dist"),
    ("jamba-bias-top1", 2, 2, "torch_dist"),
    ("nemotron_h", 2, 1, "legacy"),
    ("nemotron_h-latent-bias", 4, 2, "torch_dist"),
    ("granitemoehybrid", 4, 2, "legacy"),
]


@cache
def _config(variant):
    return tiny_model(variant).config


def _form(variant):
    return megatron_tensors(family_of(_config(variant)), _config(variant))


def _padded(variant, ranks):
    rows = -(-_config(variant).vocab_size // ranks) * ranks
    return {name: tensor.padded(rows) for name, tensor in _form(variant).items()}


def numbered(tensors, dtype=torch.float32):
    """Whole tensors all of whose values differ (in fp32), by name."""
    found, start = {}, 0
    for name, tensor in tensors.items():
        count = torch.Size(tensor.layout.shape).numel()
        found[name] = torch.arange(start, start + count).view(tensor.layout.shape).to(dtype)
        start += count
    assert dtype is not torch.float32 or start < 1 << 24
    return found


def writer(kind, folder, tensors, wholes, ranks, stages):
    dtypes = {name: whole.dtype for name, whole in wholes.items()}
    return WRITERS[kind](folder, tensors, dtypes, tensor_parallel_size=ranks, pipeline_parallel_size=stages)


def write(kind, folder, tensors, wholes, ranks, stages, args=None):
    """A checkpoint of all tensors."""
    writing = writer(kind, folder, tensors, wholes, ranks, stages)
    for name, whole in wholes.items():
        assert not writing.is_written(name)
        writing.write(name, whole)
        assert writing.is_written(name)
    writing.finish({"args": args})
    writing.close()
    return folder


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _check_round_trip(variant, ranks, stages, kind, folder, dtype=torch.float32):
    tensors = _padded(variant, ranks)
    wholes = numbered(tensors, dtype)
    exact = [name for name, tensor in tensors.items() if tensor.layout.keep_fp32]
    wholes |= {name: wholes[name].float() for name in exact}
    write(kind, folder, tensors, wholes, ranks, stages)
    assert format_of(folder) == kind
    reader = open_megatron(folder, _form(variant))
    assert reader.shapes() == {name: tuple(whole.shape) for name, whole in wholes.items()}
    assert reader.dtypes() == {name: whole.dtype for name, whole in wholes.items()}
    for name, whole in wholes.items():
        assert torch.equal(reader.read(name), whole), name
        assert Path(reader.where(name)).is_file()
    assert (reader.common["iteration"], reader.common["checkpoint_version"]) == (0, 3.0)
    reader.close()


@pytest.mark.parametrize(("variant", "ranks", "stages", "kind"), GRID)
def test_what_is_written_is_read(variant, ranks, stages, kind, tmp_path):
    _check_round_trip(variant, ranks, stages, kind, tmp_path / "release", torch.float32)


@pytest.mark.full
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_what_is_written_is_read_for_every_variant(variant, kind, tmp_path):
    layers = 1 + max(tensor.layer for tensor in _form(variant).values() if tensor.layer is not None)
    for ranks, stages in itertools.product(sizes(variant), (1, 2, 3, 5)):
        qkv = [tensor.layout.shape[0] for name, tensor in _form(variant).items() if "linear_qkv" in name]
        if layers % stages == 0 and not any(rows % ranks for rows in qkv):
            _check_round_trip(variant, ranks, stages, kind, tmp_path / f"{ranks}-{stages}", torch.bfloat16)


@pytest.mark.parametrize("kind", WRITERS)
def test_dtypes_stay_as_they_are(kind, tmp_path):
    _check_round_trip("mamba2-groups2", 2, 1, kind, tmp_path, torch.bfloat16)


# What others read.


def test_torch_loads_a_rank_of_the_older_format_by_itself(tmp_path):
    tensors = _padded("bamba-bias-groups2", 2)
    wholes = numbered(tensors)
    write("legacy", tmp_path, tensors, wholes, 2, 2, Namespace(hidden_size=48))
    for rank, stage in itertools.product(range(2), range(2)):
        path = tmp_path / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
        for mapped in (False, True):
            with torch.serialization.safe_globals([Namespace]):
                content = torch.load(path, weights_only=True, mmap=mapped)
            assert content["args"] == Namespace(hidden_size=48)
            assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)
            held = content["model"]
            assert held["decoder.layers.0.mixer.in_proj.weight"].is_contiguous()
            for name, tensor in tensors.items():
                if tensor.layer is None or tensor.layer // 4 != stage:
                    continue
                local = name.replace(f"layers.{tensor.layer}.", f"layers.{tensor.layer % 4}.")
                assert torch.equal(held[local], tensor.layout.shard(wholes[name], rank, 2)), name
            # The head is the embedding: the last stage has a copy of it, by the head's name.
            rows = wholes[EMBEDDING].shape[0] // 2
            name = HEAD if stage else EMBEDDING
            assert torch.equal(held[name], wholes[EMBEDDING][rank * rows : (rank + 1) * rows])
            assert (EMBEDDING in held) is (stage == 0) and (HEAD in held) is (stage == 1)
        assert zipfile.ZipFile(path).testzip() is None


def _load_with_megatron_core(context, folder, hidden, inner, shared, heads, rows):
    """Rank-local pieces of some tensors of a Mamba-2 model, as megatron-core names and cuts them."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, ranks = context.rank, context.size

    def cut(key, *shape, dim):
        shape = [size // ranks if place == dim else size for place, size in enumerate(shape)]
        return ShardedTensor.from_rank_offsets(key, torch.full(shape, -1.0), (dim, rank, ranks))

    mixer = "decoder.layers.1.mixer."
    widths = {"z": inner, "x": inner, "B": shared, "C": shared, "dt": heads}
    asked = {name: cut(f"{mixer}in_proj.weight.{name}", width, hidden, dim=0) for name, width in widths.items()}
    asked["out"] = cut(f"{mixer}out_proj.weight", hidden, inner, dim=1)
    asked["embedding"] = cut(EMBEDDING, rows, hidden, dim=0)
    norm = torch.full((hidden,), -1.0)
    asked["norm"] = ShardedTensor.from_rank_offsets(f"{mixer}in_proj.layer_norm_weight", norm, replica_id=rank)
    loaded = dist_checkpointing.load(asked, folder)
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}, loaded["iteration"]


def test_megatron_core_loads_the_distributed_format_at_another_number_of_ranks(ranks, tmp_path):
    variant = "mamba2-groups4-bias"
    tensors, config = _padded(variant, 4), _config(variant)
    wholes = numbered(tensors)
    write("torch_dist", tmp_path, tensors, wholes, 2, 3)
    inner, shared = config.num_heads * config.head_dim, config.n_groups * config.state_size
    rows = wholes[EMBEDDING].shape[0]
    arguments = (str(tmp_path), config.hidden_size, inner, shared, config.num_heads, rows)
    mixer = "decoder.layers.1.mixer."
    parts = wholes[f"{mixer}in_proj.weight"].split([inner, inner, shared, shared, config.num_heads])
    expected = dict(zip(("z", "x", "B", "C", "dt"), parts, strict=True))
    expected |= {"out": wholes[f"{mixer}out_proj.weight"], "embedding": wholes[EMBEDDING]}
    for rank, (loaded, iteration) in enumerate(ranks(_load_with_megatron_core, 4, *arguments)):
        assert iteration == 0
        assert torch.equal(loaded.pop("norm"), wholes[f"{mixer}in_proj.layer_norm_weight"])
        assert set(loaded) == set(expected)
        for name, piece in loaded.items():
            assert torch.equal(piece, expected[name].chunk(4, dim=int(name == "out"))[rank]), name


# What a killed writer left.


def _half_written(kind, folder, tensors, wholes, count):
    writing = writer(kind, folder, tensors, wholes, 2, 2)
    for name in list(wholes)[:count]:
        writing.write(name, wholes[name])
    return [name for name in wholes if writing.is_written(name)]


def _go_on(kind, folder, tensors, wholes):
    """Write what is missing; says what was there."""
    writing = writer(kind, folder, tensors, wholes, 2, 2)
    there = [name for name in wholes if writing.is_written(name)]
    for name, whole in wholes.items():
        if name not in there:
            writing.write(name, whole)
    writing.finish({"args": None})
    return there


def _damage(kind, folder):
    """Cut off half of the largest file that was not finished."""
    largest = max(folder.rglob("*.partial"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("damage", ["none", "cut file", "cut journal", "unnoted values"])
def test_a_killed_writer_is_gone_on_with(kind, damage, tmp_path):
    tensors = _padded("bamba", 2)
    wholes = numbered(tensors)
    expected = _files(write(kind, tmp_path / "at once", tensors, wholes, 2, 2))
    folder = tmp_path / "in two goes"
    written = _half_written(kind, folder, tensors, wholes, 25)
    assert len(written) == 25
    journal = folder / "writing.jsonl"
    if damage == "cut file":
        _damage(kind, folder)
    elif damage == "cut journal":
        os.truncate(journal, journal.stat().st_size - 9)
    elif damage == "unnoted values":
        noted = journal.read_bytes()
        writer(kind, folder, tensors, wholes, 2, 2).write(list(wholes)[25], torch.zeros_like(wholes[list(wholes)[25]]))
        journal.write_bytes(noted)
    there = _go_on(kind, folder, tensors, wholes)
    if damage in ("none", "unnoted values"):
        assert there == written
    else:
        assert set(there) < set(written)
    assert _files(folder) == expected


@pytest.mark.parametrize("kind", WRITERS)
def test_a_writer_killed_at_its_end_is_gone_on_with(kind, tmp_path, monkeypatch):
    tensors = _padded("bamba", 2)
    wholes = numbered(tensors)
    expected = _files(write(kind, tmp_path / "at once", tensors, wholes, 2, 2))
    folder = tmp_path / "in three goes"
    _half_written(kind, folder, tensors, wholes, len(wholes))
    replace, calls = os.replace, itertools.count()

    def killed(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        replace(*args)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            calls = itertools.count()
            _go_on(kind, folder, tensors, wholes)
    assert _go_on(kind, folder, tensors, wholes) == list(wholes)
    assert _files(folder) == expected


# Directories and arguments.


def test_the_latest_iteration_is_found(tmp_path):
    tensors = _padded("mamba", 1)
    wholes = numbered(tensors)
    for name in ("release", "iter_0000012"):
        write("torch_dist", tmp_path / name, tensors, wholes, 1, 1)
    for latest, name in (("release\n", "release"), ("12", "iter_0000012")):
        (tmp_path / TRACKER).write_text(latest)
        assert find_iteration(tmp_path) == tmp_path / name
    assert find_iteration(tmp_path / "release") == tmp_path / "release"


def test_arguments_are_those_of_megatron_lm():
    def arguments(variant, **changes):
        config = tiny_model(variant, **changes).config
        plan = family_of(config).plan(config)
        sizes = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "padded_vocab_size": 104}
        return plan, megatron_arguments(plan, **sizes, params_dtype=torch.bfloat16)

    plan, found = arguments("nemotron_h")
    assert (found.num_layers, found.hybrid_override_pattern) == (6, "M*BM*-")
    assert (found.hidden_size, found.kv_channels, found.ffn_hidden_size) == (36, 10, 56)
    assert (found.mamba_num_heads, found.mamba_head_dim, found.mamba_state_dim, found.mamba_num_groups) == (8, 6, 10, 2)
    assert found.squared_relu and not found.swiglu and not found.add_bias_linear
    assert (found.tensor_model_parallel_size, found.pipeline_model_parallel_size, found.world_size) == (4, 2, 8)
    assert (found.vocab_size, found.padded_vocab_size) == (plan.vocab_size, 104)
    assert found.params_dtype is torch.bfloat16 and found.bf16 and not found.fp16
    _, found = arguments("bamba-bias-groups2")
    assert not found.untie_embeddings_and_output_weights and found.add_bias_linear and found.add_qkv_bias
    assert (found.num_attention_heads, found.num_query_groups) == (4, 2)  # of a layer that Megatron does not have
    _, found = arguments("jamba", num_key_value_heads=4)
    assert (found.num_query_groups, found.num_attention_heads, found.group_query_attention) == (4, 4, False)
    assert found.swiglu and found.mamba_state_dim == 6 and not hasattr(found, "mamba_num_heads")
    _, found = arguments("mamba2")
    assert (found.num_layers, found.hybrid_override_pattern, found.num_attention_heads) == (3, "MMM", 4)
