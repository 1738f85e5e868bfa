"""The context: state enters a prefill of any length, moves between rows, and rows of different lengths stay apart."""

from __future__ import annotations

import pytest
import torch
from tiny import VARIANTS, random_ids, tiny_checkpoint, tiny_model
from transformers import DynamicCache, StaticCache

from deepspeed_inference import init_inference

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
HYBRIDS = (
    "mamba2-groups3",
    "zamba-kv2-bias",
    "zamba2-two-blocks",
    "bamba-kv3",
    "falcon_h1-norm-before-gate",
    "jamba",
    "nemotron_h",
    "granitemoehybrid-rope-multipliers",
)


@pytest.fixture(scope="module", params=[*VARIANTS, *HYBRIDS])
def engine(request):
    engine = init_inference(tiny_checkpoint(request.param), dtype=torch.float32)
    engine.variant = request.param
    return engine


def test_prefill_then_one_step_equals_a_longer_prefill(engine):
    ids = random_ids(2, 30)
    whole, split = engine.new_context(2), engine.new_context(2)
    expected = engine.prefill(ids, whole)
    engine.prefill(ids[:, :-1], split)
    torch.testing.assert_close(engine.decode(ids[:, -1:], split), expected, **CLOSE)
    for index in range(len(engine.plan.layers)):
        for name in ("conv", "ssm", "keys", "values"):
            got, expected = getattr(split.layer(index), name), getattr(whole.layer(index), name)
            if expected is not None:
                torch.testing.assert_close(got, expected, **CLOSE)
    assert whole.positions.tolist() == split.positions.tolist() == [30, 30]


def test_rows_of_different_lengths_equal_each_row_alone(engine):
    lengths = torch.tensor([5, 17, 1, 3])
    ids = random_ids(4, 17)
    together = engine.new_context(4)
    logits = engine.prefill(ids, together, lengths=lengths)
    following = engine.decode(ids[:, 0], together)
    for row, length in enumerate(lengths.tolist()):
        alone = engine.new_context(1)
        expected = engine.prefill(ids[row : row + 1, :length], alone)
        torch.testing.assert_close(logits[row : row + 1], expected, **CLOSE)
        torch.testing.assert_close(following[row : row + 1], engine.decode(ids[row : row + 1, 0], alone), **CLOSE)
    assert together.positions.tolist() == [6, 18, 2, 4]


def test_padding_at_either_side_changes_nothing(engine):
    text = random_ids(1, 8)
    expected = engine.generate(text, max_new_tokens=6, eos_token_id=[])[:, 8:]
    filler = torch.full((1, 3), 1)
    for ids, mask in (
        (torch.cat([filler, text], 1), [0] * 3 + [1] * 8),
        (torch.cat([text, filler], 1), [1] * 8 + [0] * 3),
    ):
        got = engine.generate(ids, attention_mask=torch.tensor([mask]), max_new_tokens=6, eos_token_id=[])
        assert torch.equal(got[:, :11], ids)
        assert torch.equal(got[:, 11:], expected)
    padding = torch.zeros(1, 3, dtype=torch.int64)  # the model's own padding id needs no mask
    got = engine.generate(torch.cat([padding, text], 1), max_new_tokens=6, eos_token_id=[])
    assert torch.equal(got[:, 11:], expected)


def test_transformers_forward_honours_the_mask_and_its_own_cache(engine):
    text = random_ids(1, 8)
    padded = torch.cat([torch.full((1, 3), 5), text], 1)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    with torch.inference_mode():
        expected = engine(text).logits
        first = engine.module(padded, attention_mask=mask, use_cache=True)
        torch.testing.assert_close(first.logits[:, 3:], expected, **CLOSE)
        name = "cache_params" if "mamba" in type(engine.module).__name__.lower() else "past_key_values"
        for cache in (None, engine.new_context(1), DynamicCache(config=engine.module.config)):
            given = {} if cache is None else {name: cache}
            cache = getattr(engine.module(text[:, :5], use_cache=True, **given), name)
            rest = engine.module(text[:, 5:], **{name: cache}).logits
            torch.testing.assert_close(rest, expected[:, 5:], **CLOSE)


def test_transformers_forward_takes_embeddings_and_shows_the_stream(engine):
    ids = random_ids(2, 6)
    with torch.inference_mode():
        expected = engine.module(ids).logits
        embeddings = engine.stack.embedding(ids)
        got = engine.module(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
        torch.testing.assert_close(got.logits, expected, **CLOSE)
        assert len(got.hidden_states) == len(engine.plan.layers) + 1
        torch.testing.assert_close(got.hidden_states[0], engine.stack.times(embeddings))
        backbone = engine.module.get_submodule(engine.family.backbone)
        for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                backbone(**wrong)
        with pytest.raises(ValueError, match=r"attention_mask: expected \[B, L\]"):
            backbone(ids, attention_mask=torch.ones(2, 1, 6, 6))


def test_keys_and_values_grow_and_are_counted(engine):
    ids, context = random_ids(2, 150), engine.new_context(2)
    empty = context.nbytes()
    expected = engine.prefill(ids, engine.new_context(2))
    for piece in ids.split((60, 1, 20, 69), dim=1):
        last = engine.prefill(piece, context)
    torch.testing.assert_close(last, expected, **CLOSE)
    growing = sum(layer.keys is not None for layer in map(context.layer, range(len(engine.plan.layers))))
    assert (context.nbytes() > empty) == bool(growing)


def test_beams_move_the_state_of_every_layer(engine):
    ids = random_ids(1, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "eos_token_id": -1}
    beams = engine.module.generate(ids, **options)
    theirs = tiny_model(engine.variant).generate(ids, **options, use_cache=False)
    assert torch.equal(beams, theirs)


def test_padding_and_keys_in_a_cache_of_transformers_are_refused_together():
    engine = init_inference(tiny_checkpoint("jamba"), dtype=torch.float32)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(ValueError, match=r"padded batch with a transformers cache: .* found DynamicCache"):
        engine.module(random_ids(2, 3), attention_mask=mask, past_key_values=DynamicCache(config=engine.module.config))


def test_reorder_fork_reset_and_free(engine):
    ids = random_ids(3, 7)
    context = engine.new_context(3)
    engine.prefill(ids, context)
    copy = context.fork()
    expected = engine.decode(ids[:, 0], copy.fork())
    context.reorder(torch.tensor([2, 0, 0, 1]))
    got = engine.decode(ids[[2, 0, 0, 1], 0], context)
    torch.testing.assert_close(got, expected[[2, 0, 0, 1]], **CLOSE)
    assert context.batch_size == 4 and copy.batch_size == 3
    torch.testing.assert_close(engine.decode(ids[:, 0], copy), expected, **CLOSE)  # the fork went its own way
    copy.reset()
    assert copy.get_seq_length() == 0 and not copy.has_previous_state()
    torch.testing.assert_close(engine.prefill(ids, copy), engine.prefill(ids, engine.new_context(3)))
    context.free()
    with pytest.raises(ValueError, match="freed"):
        engine.decode(ids[[0, 0, 0, 0], 0], context)


def test_a_row_that_is_reset_begins_anew_and_the_others_go_on(engine):
    ids, context = random_ids(3, 12), engine.new_context(3)
    engine.prefill(ids, context)
    kept = context.fork()
    context.reset(torch.tensor([False, True, False]))
    assert context.positions.tolist() == [12, 0, 12]
    logits, others = engine.prefill(ids, context), engine.prefill(ids, kept)
    torch.testing.assert_close(logits[1:2], engine.prefill(ids[1:2], engine.new_context(1)), **CLOSE)
    torch.testing.assert_close(logits[::2], others[::2], **CLOSE)
    assert not torch.allclose(logits[1], others[1], **CLOSE)
    for wrong in (torch.tensor([True]), torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match="reset: expected 3 booleans, found"):
            context.reset(wrong)


def test_wrong_input_is_named(engine):
    context = engine.new_context(2)
    for ids, message in (
        (torch.zeros(2, 0, dtype=torch.int64), "at least one token"),
        (torch.tensor([[1, 97], [1, 2]]), r"expected ids in 0\.\.96, found 97"),
        (torch.tensor([[1, -1], [1, 2]]), r"expected ids in 0\.\.96, found -1"),
        (torch.zeros(2, 3), "expected integers"),
        (torch.zeros(3, 3, dtype=torch.int64), "expected 2 rows, as the context has, found 3"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.prefill(ids, context)
    with pytest.raises(ValueError, match=r"expected ids in 0\.\.96, found 97"):
        engine(torch.tensor([[97]]))
    ids = random_ids(2, 4)
    for lengths in ([0, 4], [5, 4], [4]):
        with pytest.raises(ValueError, match="lengths: expected"):
            engine.prefill(ids, context, lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match="one token a row"):
        engine.decode(ids, context)
    for index in ([2], [-1], []):
        with pytest.raises(ValueError, match=r"expected row indices in 0\.\.1"):
            context.reorder(torch.tensor(index, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch_size: expected"):
        engine.new_context(0)
    assert context.positions.tolist() == [0, 0]


def test_rows_end_by_themselves_and_are_filled(engine):
    ids = random_ids(2, 5)
    free = engine.generate(ids, max_new_tokens=12, eos_token_id=[])
    end = int(free[0, 8])
    got = engine.generate(ids, max_new_tokens=12, eos_token_id=end)
    for row in range(2):
        new = free[row, 5:].tolist()
        kept = new[: new.index(end) + 1] if end in new else new
        assert got[row, 5 : 5 + len(kept)].tolist() == kept
        assert set(got[row, 5 + len(kept) :].tolist()) <= {0}


def test_deepspeed_is_underneath_and_replaced_nothing():
    from deepspeed.inference.engine import InferenceEngine

    engine = init_inference(tiny_model(), dtype=torch.float32)
    assert isinstance(engine, InferenceEngine)
    modules = {type(module).__module__.split(".")[0] for module in engine.module.modules()}
    assert modules <= {"transformers", "deepspeed_inference", "megatron_ssm", "torch"}
    assert "nn.Linear" not in {f"nn.{type(m).__name__}" for m in engine.module.modules()}


def test_a_step_that_fails_leaves_a_context_that_nobody_can_continue(engine, monkeypatch):
    context = engine.new_context(1)
    engine.prefill(random_ids(1, 4), context)
    monkeypatch.setattr(engine.stack.layers[1], "step", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.decode(torch.tensor([3]), context)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="its last step failed"):
        engine.decode(torch.tensor([3]), context)


def test_numbers_that_are_no_integers_are_refused(engine):
    context = engine.new_context(2)
    with pytest.raises(ValueError, match=r"lengths: expected integers, found torch\.float32"):
        engine.prefill(random_ids(2, 4), context, lengths=torch.tensor([2.9, 3.5]))
    with pytest.raises(ValueError, match="expected row indices"):
        context.reorder(torch.tensor([0.9, 1.2]))
    for wrong in (2.5, "a", 0):
        with pytest.raises(ValueError, match="max_new_tokens: expected a positive integer"):
            engine.generate(random_ids(1, 4), max_new_tokens=wrong)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[1, 4\], found \[4\]"):
        engine.generate(random_ids(1, 4), attention_mask=torch.ones(4))


def test_ends_as_a_list_fill_with_the_first_of_them(engine):
    ids = random_ids(2, 5)
    free = engine.generate(ids, max_new_tokens=10, eos_token_id=[])[:, 5:]
    early, never = int(free[0, 2]), next(token for token in range(96, 0, -1) if token not in free)
    engine.module.generation_config.pad_token_id, padding = None, engine.module.generation_config.pad_token_id
    try:
        got = engine.generate(ids, None, 10, False, [never, early])
    finally:
        engine.module.generation_config.pad_token_id = padding
    row = got[0, 5:].tolist()
    assert set(row[row.index(early) + 1 :]) <= {never}


def test_a_batch_of_another_size_than_the_context_is_refused_through_transformers_too(engine):
    with pytest.raises(ValueError, match="expected 3 rows, as the context has, found 2"):
        engine.module(random_ids(2, 4), cache_params=engine.new_context(3))


@pytest.fixture(scope="module")
def jamba():
    return init_inference(tiny_checkpoint("jamba"), dtype=torch.float32)


def test_a_cache_of_transformers_that_would_forget_is_refused(jamba):
    model, ids = jamba.module, random_ids(2, 3)
    one_row = DynamicCache(config=model.config)
    model(ids[:1], past_key_values=one_row)
    for cache, message in (
        (DynamicCache(), "expected a DynamicCache.config=model.config., .* found DynamicCache of 0 layers"),
        (StaticCache(config=model.config, max_cache_len=16), "found StaticLayer for layer"),
        (one_row, "cache: expected 2 rows, as the batch has, found 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=cache)


def test_what_would_be_ignored_and_change_the_answer_is_refused(jamba):
    backbone, ids = jamba.module.model, random_ids(2, 4)
    for given, message in (
        ({"output_attentions": True}, "output_attentions: expected none, found True"),
        ({"output_router_logits": True}, "output_router_logits: expected none, found True"),
        ({"seq_idx": torch.zeros(2, 4)}, "seq_idx: expected none"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "position_ids: expected them to rise in each row"),
        ({"attention_mask": torch.ones(2, 3)}, r"expected 2 rows of at least 4, found \[2, 3\]"),
        ({"attention_mask": torch.zeros(2, 4)}, "found only padding"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone(ids, **given)
    model = tiny_model("jamba", attention_dropout=0.1)
    engine = init_inference(model, dtype=torch.float32)
    engine.module(ids)
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0 in training, found 0.1"):
        engine.module.train()(ids)


def test_a_row_that_was_poisoned_is_well_after_a_reset(jamba):
    ids, context = random_ids(2, 5), jamba.new_context(2)
    jamba.prefill(ids, context)
    for index in range(len(jamba.plan.layers)):
        for name in ("conv", "ssm", "keys", "values"):
            state = getattr(context.layer(index), name)
            if state is not None:
                state[0] = float("nan")
    context.reset(torch.tensor([True, False]))
    torch.testing.assert_close(
        jamba.prefill(ids[:, :3], context)[:1], jamba.prefill(ids[:1, :3], jamba.new_context(1)), **CLOSE
    )


@pytest.mark.parametrize("variant", ["mamba", "bamba"])
def test_positions_stay_on_the_cpu_whatever_the_default_device(variant):
    engine = init_inference(tiny_checkpoint(variant), dtype=torch.float32)
    ids, lengths = random_ids(2, 6), torch.tensor([6, 4])
    expected = engine.prefill(ids, engine.new_context(2), lengths=lengths)
    with torch.device("meta"):
        context = engine.new_context(2)
        assert context.positions.is_cpu
        context.reset()
        got = engine.prefill(ids, context, lengths=lengths)
    torch.testing.assert_close(got, expected)
