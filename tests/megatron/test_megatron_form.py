"""The Megatron form: every tensor on disk is in it once, packed as megatron-core has it; its chunks fit together."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from tiny_variants import ALL_VARIANTS, sizes

from megatron_ssm.checkpoint.chunks import chunks
from megatron_ssm.config import AttentionConfig
from megatron_ssm.families import families, family_of
from megatron_ssm.hybrid.form import attention_packing, megatron_tensors, pattern

PATTERNS = {
    "mamba": "MMM",
    "falcon_mamba": "MMM",
    "mamba2": "MMM",
    "zamba": "MBMBM",
    "zamba2": "MBMBB",
    "bamba": "M-B-M-B-",
    "falcon_h1": "B-B-B-",
    "jamba": "M-*BM-MB*-MB",
    "nemotron_h": "M*BM*-",
    "granitemoehybrid": "MB*BMB*B",
}


def test_every_family_has_a_pattern():
    assert set(PATTERNS) == set(families())


@pytest.mark.parametrize(("variant", "letters"), PATTERNS.items())
def test_letters_of_the_layers(variant, letters):
    config = tiny_model(variant).config
    assert pattern(family_of(config).plan(config)) == letters


def _numbered(table):
    """Tensors all of whose values differ, by name on disk."""
    numbered, start = {}, 0
    for name, layout in table.items():
        count = torch.Size(layout.shape).numel()
        numbered[name] = torch.arange(start, start + count).view(layout.shape)
        start += count
    return numbered


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_packing_and_unpacking_moves_every_value_once(variant):
    config = tiny_model(variant).config
    family = family_of(config)
    on_disk = _numbered(family.parameters(config))
    packed = {
        name: (tensor, tensor.packed(lambda stored, index: on_disk[stored][index]))
        for name, tensor in megatron_tensors(family, config).items()
    }
    assert {name: tuple(whole.shape) for name, (_, whole) in packed.items()} == {
        name: tensor.layout.shape for name, (tensor, _) in packed.items()
    }
    unpacked = {name: torch.full_like(whole, -1) for name, whole in on_disk.items()}
    for tensor, whole in packed.values():
        for piece in tensor.pieces:
            for there, here in piece.copies:
                unpacked[piece.name][there] = whole[here]
    assert {name for name in on_disk if not torch.equal(unpacked[name], on_disk[name])} == set()


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_first_chunks_of_all_ranks_are_the_whole_tensors_and_all_chunks_agree_with_them(variant):
    config = tiny_model(variant).config
    for ranks in sizes(variant):
        for name, tensor in megatron_tensors(family_of(config), config).items():
            tensor = tensor.padded(-(-config.vocab_size // ranks) * ranks)
            layout = tensor.layout
            if ranks > 1 and "linear_qkv" in name and layout.shape[0] % ranks:
                continue
            layout.check(name, ranks)
            whole = torch.arange(torch.Size(layout.shape).numel()).view(layout.shape)
            stored = {}
            for firsts in (True, False):
                for rank in range(ranks):
                    piece = layout.shard(whole, rank, ranks)
                    seen = torch.zeros_like(piece, dtype=torch.bool)
                    for chunk in chunks(name, layout, rank, ranks, key_a_segment=tensor.key_a_segment):
                        assert torch.equal(piece[chunk.place], whole[chunk.whole]), (name, rank)
                        assert not seen[chunk.place].any()
                        seen[chunk.place] = True
                        target = stored.setdefault(chunk.key, torch.full(chunk.shape, -1))
                        part = tuple(
                            slice(o, o + n) for o, n in zip(chunk.offset, piece[chunk.place].shape, strict=True)
                        )
                        if firsts and chunk.is_first:
                            assert (target[part] == -1).all(), f"{name}: two ranks would write {chunk.key}"
                            target[part] = piece[chunk.place]
                        elif not firsts:
                            assert torch.equal(target[part], piece[chunk.place]), name
                    assert seen.all(), name
                if firsts:
                    assert sorted(torch.cat([part.flatten() for part in stored.values()]).tolist()) == list(
                        range(whole.numel())
                    )


def test_mamba_2_chunks_have_the_names_of_megatron_core():
    config = tiny_model("mamba2").config
    tensors = megatron_tensors(family_of(config), config)
    tensor = tensors["decoder.layers.1.mixer.in_proj.weight"]
    keys = [chunk.key.rpartition(".")[2] for chunk in chunks(tensor.name, tensor.layout, 0, 2)]
    assert keys == ["z", "x", "B", "C", "dt"]
    tensor = tensors["decoder.layers.1.mixer.conv1d.weight"]
    assert [chunk.key.rpartition(".")[2] for chunk in chunks(tensor.name, tensor.layout, 1, 2)] == ["x", "B", "C"]


def test_linear_qkv_is_packed_by_groups():
    config = AttentionConfig(input_size=8, output_size=8, heads=4, key_value_heads=2, head_size=3, scale=1.0)
    assert attention_packing(config) == {
        "q": [slice(0, 6), slice(12, 18)],
        "k": [slice(6, 9), slice(18, 21)],
        "v": [slice(9, 12), slice(21, 24)],
    }
