"""Serving through megatron-core's static context: in whatever pieces a text comes, its logits are the one-shot ones.

At T tensor-parallel ranks the pool's four ranks are 4 / T replicas; each takes its share of the variants.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron_models import family_model, gathered_logits, model_parallel
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS

from ssm_kernels.observe import observing

TOLERANCE = 1e-4
LENGTH = 19
# A prompt and steps; pieces of one token, of fewer and of more than a convolution is wide; short pieces and a step.
SPLITS = ([13, 1, 1, 1, 1, 1, 1], [1, 3, 15], [3, 3, 3, 3, 3, 3, 1])
ALL_SPLITS = (*SPLITS, [LENGTH], [1] * LENGTH, [17, 2])
# At one rank a model of each kind of mixer, and each letter and kind of block beside them.
CHOICE = {
    1: ["mamba", "mamba2-groups3", "jamba", "zamba", "zamba2-adapters-rope", "nemotron_h", "falcon_h1", "bamba"],
    2: ["falcon_mamba", "zamba2-two-blocks", "nemotron_h-latent-bias", "granitemoehybrid-rope-multipliers"],
    4: ["zamba-kv2-bias", "nemotron_h"],
}


def in_pieces(model, ids, lengths, context=None):
    """[B, L, vocabulary]: the logits of a text that comes in pieces of these lengths."""
    if context is None:
        context = StaticInferenceContext(*ids.shape)
    context.materialize_only_last_token_logits = False
    logits = []
    for piece in ids.split(list(lengths), dim=1):
        logits.append(gathered_logits(model, piece, inference_context=context))
        context.increment_sequence_len_offset(piece.shape[1])
    return torch.cat(logits, dim=1)


def difference(found, expected):
    """The largest one, relative to the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def own_share(groups, variants):
    """The variants that this replica takes."""
    return list(variants)[groups.dp.rank() :: groups.dp.size()]


def check_shares(by_rank, variants):
    """That the replicas' answers, {variant: {case: difference}}, are about all variants, and all differences small."""
    found = {variant: cases for answer in by_rank for variant, cases in answer.items()}
    assert set(found) == set(variants)
    cases = {(variant, case): value for variant, cases in found.items() for case, value in cases.items()}
    assert not {case: value for case, value in cases.items() if not value < TOLERANCE}


@torch.no_grad()
def _pieces(context, directories, tensor, splits):
    groups, ids, found = model_parallel(tensor), random_ids(2, LENGTH), {}
    for variant in own_share(groups, directories):
        model = family_model(directories[variant], groups).eval()
        whole = gathered_logits(model, ids)
        found[variant] = {str(lengths): difference(in_pieces(model, ids, lengths), whole) for lengths in splits}
        # A context that served other rows, and more of them, is as good as new after a reset.
        context = StaticInferenceContext(3, 25)
        in_pieces(model, random_ids(3, 25, seed=5), [20, 1, 4], context)
        context.reset()
        found[variant]["after reset"] = difference(in_pieces(model, ids, [7, 1, 11], context), whole)
    return found


def _check_pieces(ranks, variants, tensor, splits=SPLITS, timeout=120):
    directories = {variant: tiny_checkpoint(variant) for variant in variants}
    check_shares(ranks(_pieces, 4, directories, tensor, splits, timeout=timeout), variants)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_pieces_are_the_whole(ranks, tensor):
    _check_pieces(ranks, CHOICE[tensor], tensor)


@pytest.mark.full
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_pieces_are_the_whole_for_every_variant(ranks, tensor):
    _check_pieces(ranks, ALL_VARIANTS, tensor, ALL_SPLITS, timeout=600)


@torch.no_grad()
def _packed(context, directories):
    lengths, groups, found = [5, 1, 13, 4], model_parallel(2), {}
    ids = random_ids(1, sum(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    for variant in own_share(groups, directories):
        model = family_model(directories[variant], groups).eval()
        alone = torch.cat([gathered_logits(model, text) for text in ids.split(lengths, dim=1)], dim=1)
        found[variant] = {"packed": difference(gathered_logits(model, ids, packed_seq_params=packed), alone)}
    return found


def test_packed_sequences_are_as_if_alone(ranks):
    variants = ["jamba", "zamba2", "nemotron_h", "falcon_h1"]
    check_shares(ranks(_packed, 4, {variant: tiny_checkpoint(variant) for variant in variants}), variants)


@torch.no_grad()
def _one_context(context, directory, expected):
    model, ids = family_model(directory, model_parallel(2)).eval(), random_ids(4, LENGTH)
    assert difference(in_pieces(model, ids, [12, 1, 1, 5])[..., : expected.shape[-1]], expected) < TOLERANCE

    # Two micro-batches, each behind the rows of the one before it.
    context, found = StaticInferenceContext(4, LENGTH), []
    context.materialize_only_last_token_logits = False
    for piece in ids.split([11, 1, 7], dim=1):
        rows = []
        for batch in piece.split([1, 3]):
            rows.append(gathered_logits(model, batch, inference_context=context))
            context.increment_batch_size_offset(len(batch))
        context.reset_batch_size_offset()
        context.increment_sequence_len_offset(piece.shape[1])
        found.append(torch.cat(rows))
    whole = gathered_logits(model, ids)
    assert difference(torch.cat(found, dim=1), whole) < TOLERANCE

    context.reset()
    context.materialize_only_last_token_logits = True
    last = gathered_logits(model, ids, inference_context=context)
    assert last.shape[1] == 1 and difference(last, whole[:, -1:]) < TOLERANCE

    # In training mode a context is without effect.
    context = StaticInferenceContext(4, LENGTH)
    model.train()
    assert difference(gathered_logits(model, ids, inference_context=context), whole) < TOLERANCE
    assert not context.key_value_memory_dict


def test_logits_of_transformers_micro_batches_last_logits_and_training_mode(ranks):
    with torch.no_grad():
        expected = tiny_model("nemotron_h")(random_ids(4, LENGTH), use_cache=False).logits
    ranks(_one_context, 4, tiny_checkpoint("nemotron_h"), expected)


@torch.no_grad()
def _stages(context, directory):
    groups, ids = model_parallel(tensor=2, pipeline=2), random_ids(2, LENGTH)
    model = family_model(directory, groups).eval()
    logits, context = [], StaticInferenceContext(*ids.shape)
    context.materialize_only_last_token_logits = False
    for piece in ids.split([12, 1, 6], dim=1):
        if groups.pp.rank() == 1:
            hidden = torch.empty(piece.shape[1], len(piece), model.config.hidden_size)
            dist.recv(hidden, group=groups.pp, group_src=0)
            model.set_input_tensor(hidden)
        output = gathered_logits(model, piece, inference_context=context)
        if groups.pp.rank() == 0:
            dist.send(output, group=groups.pp, group_dst=1)
        context.increment_sequence_len_offset(piece.shape[1])
        logits.append(output)
    return torch.cat(logits, dim=1) if groups.pp.rank() == 1 else None


def test_pipeline_stages(ranks):
    with torch.no_grad():
        expected = tiny_model("nemotron_h")(random_ids(2, LENGTH), use_cache=False).logits
    found = [logits for logits in ranks(_stages, 4, tiny_checkpoint("nemotron_h")) if logits is not None]
    assert len(found) == 2
    for logits in found:
        assert difference(logits[..., : expected.shape[-1]], expected) < TOLERANCE


@torch.no_grad()
def _refusals(context, directory):
    groups = model_parallel(2)
    model, ids = family_model(directory, groups).eval(), random_ids(2, 10)
    context, whole = StaticInferenceContext(2, 10), gathered_logits(model, ids)
    with pytest.raises(ValueError, match="at most max_sequence_length=10 tokens, found 11"):
        in_pieces(model, random_ids(2, 11), [11], context)
    with pytest.raises(ValueError, match="at most max_batch_size=2 rows, found 3"):
        in_pieces(model, random_ids(3, 4), [4], context)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 4, 10], dtype=torch.int32))
    with pytest.raises(ValueError, match="expected a sequence a row, found packed sequences"):
        gathered_logits(model, ids[:1], inference_context=context, packed_seq_params=packed)
    # The ranks are in step, and nothing was begun.
    assert difference(in_pieces(model, ids, [8, 1, 1], context), whole) < TOLERANCE
    with pytest.raises(ValueError, match="at most max_sequence_length=10 tokens, found 11"):
        in_pieces(model, ids[:, :1], [1], context)
    cut = family_model(directory, groups, sequence_parallel=True).eval()
    with pytest.raises(ValueError, match="expected a model without sequence parallelism"):
        gathered_logits(cut, ids, inference_context=StaticInferenceContext(2, 10))
    mixer = cut.decoder.layers[0].mixer
    with pytest.raises(ValueError, match="expected a model without sequence parallelism"):  # in a stack of one's own
        mixer(torch.zeros(1, 2, cut.config.hidden_size), StaticInferenceContext(2, 10))


def test_refusals(ranks):
    ranks(_refusals, 4, tiny_checkpoint("nemotron_h"))


@torch.no_grad()
def _bfloat16(context, directory):
    model, ids = family_model(directory, model_parallel(2), params_dtype=torch.bfloat16).eval(), random_ids(2, LENGTH)
    context = StaticInferenceContext(2, LENGTH)
    found = in_pieces(model, ids, [13, 1, 1, 4], context)
    conv, ssm = context.key_value_memory_dict[1]
    assert conv.dtype is torch.bfloat16 and ssm.dtype is torch.float32
    assert difference(found.float(), gathered_logits(model, ids).float()) < 0.03


def test_bfloat16_keeps_the_ssm_state_in_fp32(ranks):
    ranks(_bfloat16, 4, tiny_checkpoint("bamba"))


@torch.no_grad()
def _decode_work(context, directories):
    groups, ids = model_parallel(2), random_ids(2, 400)
    for variant in own_share(groups, directories):
        model = family_model(directories[variant], groups).eval()
        seen, kept = [], []
        for past, room in ((3, 4), (399, 4000)):
            context, calls = StaticInferenceContext(2, room), []
            in_pieces(model, ids[:, :past], [past], context)
            with observing(calls.append):
                in_pieces(model, ids[:, past : past + 1], [1], context)
            seen.append([(call.name, [tuple(value.shape) for value in _tensors(call)]) for call in calls])
            kept.append(
                {n: [tuple(pool.shape) for pool in pools] for n, pools in context.key_value_memory_dict.items()}
            )
        assert seen[0] == seen[1] and kept[0] == kept[1]
        assert not {"causal_conv1d", "selective_scan", "ssd_scan"} & {name for name, _ in seen[0]}


def _tensors(call):
    return [value for value in (*call.arguments, *call.keywords.values()) if isinstance(value, torch.Tensor)]


def test_a_decode_step_costs_the_same_whatever_the_past(ranks):
    ranks(_decode_work, 4, {variant: tiny_checkpoint(variant) for variant in ("mamba", "mamba2-groups2")})
