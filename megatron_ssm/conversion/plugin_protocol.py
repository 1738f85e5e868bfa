"""What a loader sends to a saver of Megatron-LM's converter, tools/checkpoint/convert.py, for models with SSM layers.

    PYTHONPATH=<this>/tools/checkpoint python <Megatron-LM>/tools/checkpoint/convert.py --model-type GPT \\
        --loader ssm_hf --saver ssm_megatron --load-dir MODEL --save-dir CHECKPOINTS \\
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2
    …       --loader ssm_megatron --saver ssm_hf --load-dir CHECKPOINTS --save-dir MODEL

The converter joins the two processes by a queue. On it are, in this order, whole tensors without padding:

    metadata                types.SimpleNamespace: what stock savers expect, and in `ssm` what ours do (SsmMetadata)
    "embeddings"            "word embeddings"
    "transformer layer N"   one of Megatron's layers (M, *, - or B: megatron_ssm/hybrid/form.py), over all stages
    "final norm"            "weight"
    "output layer"          "weight"; only where it is not tied to the embedding
    "done"                  or "exit", at any time: the loader has failed

Each message but the first and the last is a dictionary with its "name". In a layer that stock Megatron has too (*, -)
tensors have stock names (`STOCK`); in others, those below the layer, such as "mixer.in_proj.weight". A saver takes both
everywhere. linear_fc1 of a gated layer is halved, W the gate and V what it gates.

At most --max-queue-size messages wait in shared memory: for models whose layers are large, say 4 instead of 50.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_ssm.checkpoint.megatron_arguments import megatron_arguments
from megatron_ssm.hybrid.form import EMBEDDING, FINAL_NORM, HEAD, MegatronTensor
from megatron_ssm.layout import Index

DONE, EXIT = "done", "exit"
STOCK = {
    "self_attention.linear_qkv.layer_norm_weight": "input norm weight",
    "self_attention.linear_qkv.weight": "qkv weight",
    "self_attention.linear_qkv.bias": "qkv bias",
    "self_attention.linear_proj.weight": "dense weight",
    "self_attention.linear_proj.bias": "dense bias",
    "mlp.linear_fc1.layer_norm_weight": "post norm weight",
    "mlp.linear_fc1.weight": "mlp l0 weight",
    "mlp.linear_fc1.bias": "mlp l0 bias",
    "mlp.linear_fc2.weight": "mlp l1 weight",
    "mlp.linear_fc2.bias": "mlp l1 bias",
}
_AROUND_THE_LAYERS = {
    EMBEDDING: ("embeddings", "word embeddings"),
    FINAL_NORM: ("final norm", "weight"),
    HEAD: ("output layer", "weight"),
}
_HALVES = ("W", "V")
_DIVISIBLE_BY = 128  # Megatron-LM's default; what is sent has no padding


@dataclass(frozen=True, kw_only=True)
class SsmMetadata:
    """What a saver of ours needs to know before the first tensor comes.

    Args:
        source: "hf" or "megatron", what the loader reads.
        hugging_face_config: the text of config.json.
        beside: the path of the Hugging Face files at the loader's.
        files: paths of all that is read.
        dtypes: of the tensors, by name of the Megatron form.
    """

    source: str
    hugging_face_config: str
    beside: str
    files: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message with tensors.

    Args:
        name: that it has on the queue.
        tensors: what is in it.
    """

    name: str
    tensors: tuple[MegatronTensor, ...]


def messages(tensors: Mapping[str, MegatronTensor]) -> list[Message]:
    """The messages of a model, in order.

    Args:
        tensors: of its Megatron form, in order.
    """
    grouped: dict[str, list[MegatronTensor]] = {}
    for tensor in tensors.values():
        around = _AROUND_THE_LAYERS.get(tensor.name)
        name = around[0] if around else f"transformer layer {tensor.layer}"
        grouped.setdefault(name, []).append(tensor)
    return [Message(name=name, tensors=tuple(group)) for name, group in grouped.items()]


def fields(tensor: MegatronTensor) -> dict[str, Index]:
    """Under which names a tensor is sent, each with the part of it that is meant."""
    layout = tensor.layout
    everything = tuple(slice(0, size) for size in layout.shape)
    if tensor.layer is None:
        return {_AROUND_THE_LAYERS[tensor.name][1]: everything}
    below = below_layer(tensor)
    name = STOCK.get(below, below)
    if name == below or len(layout.segments) < 2:
        return {name: everything}
    halves = zip(_HALVES, layout.local_segments(1).values(), strict=True)
    return {f"{name} {half}": (rows, *everything[1:]) for half, rows in halves}


def below_layer(tensor: MegatronTensor) -> str:
    """The name of a layer's tensor, without the layer's."""
    return tensor.name.removeprefix(f"decoder.layers.{tensor.layer}.")


def metadata(model_type: str, plan, dtype: torch.dtype, ssm: SsmMetadata, sizes: Mapping[str, int]):
    """The first message.

    Args:
        model_type: as the converter was told.
        plan: of the model.
        dtype: that most of its values have.
        ssm: what ours need.
        sizes: previous_tensor_parallel_size and previous_pipeline_parallel_size, as far as they are known.
    """
    arguments = megatron_arguments(
        plan,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        padded_vocab_size=plan.vocab_size,
        params_dtype=dtype,
    )
    # Two that a stock saver asks for.
    arguments.make_vocab_size_divisible_by = _DIVISIBLE_BY
    arguments.apply_query_key_layer_scaling = False
    return types.SimpleNamespace(
        model_type=model_type,
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        seq_length=arguments.seq_length,
        num_attention_heads=arguments.num_attention_heads,
        max_position_embeddings=arguments.max_position_embeddings,
        position_embedding_type=arguments.position_embedding_type,
        tokenizer_type=arguments.tokenizer_type,
        iteration=0,
        params_dtype=dtype,
        bert_binary_head=False,
        output_layer=not plan.tied,
        linear_bias=arguments.add_bias_linear,
        qkv_bias=arguments.add_qkv_bias,
        norm_has_bias=False,
        swiglu=arguments.swiglu,
        true_vocab_size=plan.vocab_size,
        make_vocab_size_divisible_by=_DIVISIBLE_BY,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        checkpoint_args=arguments,
        ssm=ssm,
        **sizes,
    )
