"""The demo as a Hugging Face checkpoint: parameters, tokenizer, config; its record and its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepspeed_inference.demo_training.corpus import END
from megatron_ssm.checkpoint import save_safetensors
from megatron_ssm.layout import ParameterLayout

EOS_TOKEN = "<|end|>"


def write_checkpoint(model, table: Mapping[str, ParameterLayout], whole: Mapping, directory: Path) -> None:
    """Write what `init_inference` and transformers read.

    Args:
        model: for its config.
        table: layouts by name on disk; what it keeps in fp32 stays so, all else becomes bfloat16.
        whole: the whole parameters by name.
        directory: made if it is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: whole[name].detach().cpu().to(torch.float32 if layout.keep_fp32 else torch.bfloat16)
        for name, layout in table.items()
    }
    save_safetensors(tensors, directory / "model.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    # It belongs to the initial values only, but transformers' from_pretrained would scale what it has loaded too.
    model.config.rescale_prenorm_residual = False
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes of the UTF-8 text; 256 ends a file."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # The byte-level alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on.
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocabulary = {letters[byte]: byte for byte in range(256)} | {EOS_TOKEN: END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )
