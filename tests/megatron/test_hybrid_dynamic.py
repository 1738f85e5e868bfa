"""Serving through megatron-core's dynamic context: requests come, go on in pieces, decode and leave, step by step.

Its attention needs flash-attn on a GPU. Without one, models without attention run in a context that is told of an
attention layer behind the last, because it refuses to do without.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from megatron.core.inference.contexts.attention_context.mamba_metadata import MambaInferenceStateConfig
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.utils import get_mamba_inference_state_config_from_model
from megatron_models import family_model, gathered_logits, model_parallel
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import M

TEXTS = {number: random_ids(1, length, seed=number)[0] for number, length in enumerate((12, 14, 3, 13))}
SLOTS = 8


class _Server:
    """Steps over texts that are known; keeps the logits of every token.

    Args:
        model: in eval mode.
        letters: those of its layers, as the context is to see them.
        block: tokens in a block of keys and values.
    """

    def __init__(self, model, groups, letters, block=8):
        config, (conv, ssm) = model.config, model.decoder.mamba_state_shapes_per_request()
        self.model, self.device = model, next(model.parameters()).device
        self.logits = {number: {} for number in TEXTS}
        self.context = DynamicInferenceContext(
            params_dtype=config.params_dtype,
            num_layers=len(letters),
            kv_channels=config.kv_channels,
            num_attention_heads=max(config.num_query_groups, groups.tp.size()),
            max_sequence_length=2 * block,
            buffer_size_gb=0.01,
            block_size_tokens=block,
            max_requests=SLOTS,
            max_tokens=64,
            pg_collection=groups,
            materialize_only_last_token_logits=False,
            mamba_inference_state_config=MambaInferenceStateConfig(list(letters), conv, ssm),
        )
        # A slot that nobody owns must stay as it is, and a request's must be emptied before it is read.
        self.context.mamba_conv_states.fill_(torch.nan)
        self.context.mamba_ssm_states.fill_(torch.nan)
        self.waiting = {}

    def add(self, number, length, first=None):
        """Request `number` comes with a prompt of so many tokens, of which the `first` come now and the rest next."""
        prompt = TEXTS[number][:length].to(self.device)
        greedy = SamplingParams(num_tokens_to_generate=50, termination_id=-1)
        request = DynamicInferenceRequest(request_id=number, prompt_tokens=prompt, sampling_params=greedy)
        self.context.add_request(request, chunk_length=first)
        if first is not None:
            self.context.chunked_prefill_request_id, self.context.has_explicit_chunked_prefill_req = number, True
            request.remaining_prompt_tokens = prompt[first:]
            request.finished_chunk_token_count = first
            self.waiting[number] = request

    def go_on(self, number):
        """The rest of a prompt comes."""
        self.context.chunked_prefill_request_id, self.context.has_explicit_chunked_prefill_req = -1, True
        self.context.add_request(self.waiting.pop(number))

    def step(self):
        """Run the model, and hand the context the next token of each text; requests whose texts are over leave."""
        context = self.context
        context.initialize_attention_state()
        ids, positions = context.current_input_and_position_ids()
        logits = self.model(ids, positions, None, inference_context=context, runtime_gather_output=True)
        for place in range(context.active_token_count):
            number = int(context.request_ids[context.token_to_request_idx[place]])
            self.logits[number][int(context.token_to_position_in_request[place])] = logits[0, place]
        numbers = context.request_ids[context.paused_request_count : context.total_request_count].tolist()
        seen = [max(self.logits[number]) + 1 for number in numbers]
        stays = torch.tensor([count < len(TEXTS[n]) for n, count in zip(numbers, seen, strict=True)])
        following = [TEXTS[n][min(count, len(TEXTS[n]) - 1)] for n, count in zip(numbers, seen, strict=True)]
        context.update_requests(stays.to(self.device, torch.uint8), torch.stack(following).to(self.device))

    def difference(self):
        """The largest one from the one-shot logits, relative to their largest value."""
        worst = 0.0
        for number, found in self.logits.items():
            whole = gathered_logits(self.model, TEXTS[number].to(self.device).unsqueeze(0))[0]
            assert sorted(found) == list(range(len(whole))), f"request {number}"
            found = torch.stack([found[place] for place in range(len(whole))])
            worst = max(worst, float((found - whole).abs().max() / whole.abs().max()))
        return worst


def _serve(server):
    """All kinds of steps: prompts alone, beside decoding, in pieces; decoding alone; a slot that changes hands."""
    server.add(0, 5)
    server.step()
    server.add(1, 9)
    server.add(2, 1)
    server.step()
    server.step()
    server.step()  # the text of 2 is over
    server.add(3, 11, first=4)
    server.step()
    server.go_on(3)
    while server.context.total_request_count:
        server.step()
    used = server.context.mamba_ssm_states.isfinite().flatten(2).all(2).any(0)
    assert int(used.sum()) == 3 and server.context.mamba_ssm_states[:, ~used].isnan().all()
    return server.difference()


@torch.no_grad()
def _mixers(context, directories):
    groups = model_parallel(tensor=2)
    for name in list(directories)[groups.dp.rank() :: groups.dp.size()]:
        model = family_model(directories[name], groups).eval()
        difference = _serve(_Server(model, groups, [*model.decoder.layer_type_list, "*"]))
        assert difference < 1e-4, f"{name}: {difference}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pool's models lie on the CPU")
def test_mixers_and_experts(ranks, tmp_path):
    experts = tmp_path / "experts"
    tiny_model("nemotron_h", layers_block_type=[M, "moe", M, "mlp"]).save_pretrained(experts)
    variants = ("mamba", "mamba2-groups2", "falcon_mamba")
    ranks(_mixers, 4, {**{variant: tiny_checkpoint(variant) for variant in variants}, "experts": experts})


@torch.no_grad()
def _what_is_asked(context, directories):
    groups = model_parallel(tensor=2)
    model = family_model(directories["nemotron_h"], groups).eval()
    asked = get_mamba_inference_state_config_from_model(model)
    assert "".join(asked.layer_type_list) == "M*EM*-"
    heads, size, states = asked.mamba_ssm_states_shape
    assert (heads, size, states) == (4, 6, 10)  # 8 heads on two ranks
    assert asked.mamba_conv_states_shape == (4 * 6 + 2 * 10, 4)  # one of two groups; conv_kernel inputs

    # A layer with an attention of its own: the context has no place for its keys and values.
    model = family_model(directories["zamba2"], groups).eval()
    server = _Server(model, groups, "M*M**")
    server.add(0, 5)
    with pytest.raises(ValueError, match="layer 2: expected a StaticInferenceContext, found a DynamicInferenceContext"):
        server.step()
    cut = family_model(directories["nemotron_h"], groups, sequence_parallel=True).eval()
    server.model = cut
    with pytest.raises(ValueError, match="expected a model without sequence parallelism"):
        server.step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pool's models lie on the CPU")
def test_what_a_context_is_told_and_what_is_refused(ranks):
    ranks(_what_is_asked, 4, {variant: tiny_checkpoint(variant) for variant in ("nemotron_h", "zamba2")})


@torch.no_grad()
def _with_attention(context, directory):
    groups = model_parallel(tensor=1)
    model = family_model(directory, groups, params_dtype=torch.bfloat16).cuda().eval()
    # Blocks as large as flash-attn asks for.
    assert _serve(_Server(model, groups, model.decoder.layer_type_list, block=256)) < 0.05


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="attention needs a GPU and flash-attn"
)
def test_with_attention(ranks, tmp_path):
    kinds = [M, "full_attention", "mlp", M]
    tiny_model("nemotron_h", layers_block_type=kinds, head_dim=16).save_pretrained(tmp_path)
    ranks(_with_attention, 4, tmp_path)
