"""The sizes of models that benchmarks run and predictions are made for, as options of transformers configs.

Those of Mamba, Mamba-2 and the 7B models are the published ones. Falcon-Mamba and Zamba were published in one size;
their smaller shapes have the widths and depths of Mamba's, so that families can be compared.
"""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

_MAMBA = {"vocab_size": 50280, "state_size": 16, "tie_word_embeddings": True}
_MAMBA2 = {
    "vocab_size": 50288,
    "state_size": 128,
    "head_dim": 64,
    "n_groups": 1,
    "chunk_size": 256,
    "tie_word_embeddings": True,
}
# Width and layers by size.
_WIDTHS = {
    "tiny": (64, 9),  # for a quick look at a tool
    "130M": (768, 24),
    "370M": (1024, 48),
    "790M": (1536, 48),
    "1.4B": (2048, 48),
    "2.8B": (2560, 64),
}


def _mamba(width: int, layers: int) -> dict:
    return {"model_type": "mamba", "hidden_size": width, "num_hidden_layers": layers, **_MAMBA}


def _falcon_mamba(width: int, layers: int) -> dict:
    return {**_mamba(width, layers), "model_type": "falcon_mamba", "intermediate_size": 2 * width}


def _mamba2(width: int, layers: int) -> dict:
    heads = 2 * width // _MAMBA2["head_dim"]
    return {
        "model_type": "mamba2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "expand": 2,
        **_MAMBA2,
    }


def _zamba(width: int, layers: int) -> dict:
    return {
        "model_type": "zamba",
        "hidden_size": width,
        "attention_hidden_size": 2 * width,
        "attention_head_dim": 2 * width // 16,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_mamba_heads": 2,
        "mamba_d_state": 16,
        "mamba_dt_rank": -(-width // 16),
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    }


FAMILIES = {"mamba": _mamba, "falcon_mamba": _falcon_mamba, "zamba": _zamba, "mamba2": _mamba2}
_PUBLISHED = {
    ("falcon_mamba", "7B"): {**_falcon_mamba(4096, 64), "vocab_size": 65024, "tie_word_embeddings": False},
    ("zamba", "7B"): {**_zamba(3712, 76), "tie_word_embeddings": True},
    ("mamba2", "2.7B"): _mamba2(2560, 64),
}


def shape(family: str, size: str) -> dict:
    """A model's `model_type` and options.

    Raises:
        ValueError: there is no such family or size; names those there are.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, found {family!r}")
    if (family, size) in _PUBLISHED:
        return dict(_PUBLISHED[family, size])
    if size not in sizes(family):
        raise ValueError(f"shape: expected one of {', '.join(sizes(family))} of {family}, found {size!r}")
    return FAMILIES[family](*_WIDTHS[size])


def sizes(family: str) -> list[str]:
    """The sizes that a family's shapes have."""
    published = [size for name, size in _PUBLISHED if name == family]
    return [*(size for size in _WIDTHS if not (family == "mamba2" and size == "2.8B")), *published]


def config_of(options: dict) -> PretrainedConfig:
    """The transformers config of a shape."""
    options = dict(options)
    return AutoConfig.for_model(options.pop("model_type"), **options)
