"""Writes a transformers Mamba or Mamba-2 model as the GGUF file that llama.cpp loads, without a vocabulary.

Matrices are bf16 or q8_0; what llama.cpp's own converter keeps in fp32 (A, D, the step's bias, norms, the convolution)
is fp32 here too. The names and the metadata are those of its `conversion/mamba.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deepspeed_inference.benchmarks.peers import installed

MODEL_TYPES = ("mamba", "mamba2")

_MODEL_NAMES = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_MATRICES = ("token_embd", "output", "ssm_in", "ssm_x", "ssm_dt", "ssm_out")
_QUANTIZED_BLOCK = 32  # numbers that share a scale in q8_0


def write_gguf(model, file: Path, weights: str) -> int:
    """Write a model.

    Args:
        model: a MambaForCausalLM or a Mamba2ForCausalLM in fp32.
        file: to write.
        weights: what the matrices become, `bf16` or `q8_0`.

    Returns:
        the bytes of all that a decode step reads: of every tensor but an embedding that is not the head too.
    """
    gguf = installed.gguf()
    writer = gguf.GGUFWriter(file, model.config.model_type)
    _add_metadata(writer, model.config, weights)
    nbytes = 0
    for name, tensor in _tensors(model).items():
        kind = _kind(gguf, name, tensor.shape, weights)
        data = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        if model.config.tie_word_embeddings or name != "token_embd.weight":
            nbytes += data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return nbytes


def _add_metadata(writer, config, weights: str) -> None:
    writer.add_context_length(2**20)  # it limits nothing: the state does not grow
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.expand * config.hidden_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    if config.model_type == "mamba2":
        writer.add_ssm_time_step_rank(config.num_heads)  # llama.cpp's name for the number of heads
        writer.add_ssm_group_count(config.n_groups)
    else:
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_ssm_dt_b_c_rms(False)
    file_types = installed.gguf().LlamaFileType
    writer.add_file_type({"bf16": file_types.MOSTLY_BF16, "q8_0": file_types.MOSTLY_Q8_0}[weights])


def _tensors(model) -> dict[str, np.ndarray]:
    """Every tensor by llama.cpp's name, in fp32 and in its shape."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[_renamed(name)] = _reshaped(name, tensor.float(), config).contiguous().numpy()
    return tensors


def _renamed(name: str) -> str:
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    index, _, rest = name.removeprefix("backbone.layers.").partition(".")
    return f"blk.{index}.{_LAYER_NAMES[rest]}"


def _reshaped(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    if name.endswith("conv1d.weight"):
        return tensor.squeeze(1)  # [C, 1, K] -> [C, K]
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    if config.model_type == "mamba2":
        if name.endswith(("A_log", ".D")):
            return tensor.unsqueeze(-1)  # [heads, 1]
        if name.endswith("mixer.norm.weight"):
            return tensor.reshape(config.n_groups, -1)
    return tensor


def _kind(gguf, name: str, shape: tuple[int, ...], weights: str):
    kinds = gguf.GGMLQuantizationType
    if name.removesuffix(".weight").rpartition(".")[2] not in _MATRICES or len(shape) == 1:
        return kinds.F32
    if weights == "bf16":
        return kinds.BF16
    # As llama.cpp's converter has it where rows are no whole blocks.
    return kinds.F16 if shape[-1] % _QUANTIZED_BLOCK else kinds.Q8_0
