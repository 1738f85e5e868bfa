"""Keeps what a user of the command line cannot act on out of its output; errors still come through.

The libraries speak while they are imported and while they connect, so this runs before them. An engine used as a
library changes nobody's warnings: only the command line calls it.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch


def quiet() -> None:
    """Silence the notices of torch, transformers, megatron-core and DeepSpeed, but not their errors."""
    for name, value in {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # gloo announces every connection
        "GLOO_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu",  # else DeepSpeed warns that it found none
    }.items():
        os.environ.setdefault(name, value)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        for module in ("torch", "transformers", "megatron", "deepspeed", "pydantic"):
            warnings.filterwarnings("ignore", category=category, module=rf"{module}(\.|$)")
    for name in ("DeepSpeed", "transformers", "torch.distributed", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
