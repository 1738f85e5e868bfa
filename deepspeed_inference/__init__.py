"""How a tensor-parallel selective state-space model is served: injection, the engine, its context, generation.

Names are imported when first used, so that a command line can answer `--help` without loading the whole stack.
"""

import importlib

_HOMES = {
    "Answer": "batching.request",
    "InferenceConfig": "config",
    "Request": "batching.request",
    "SSMInferenceContext": "state.context",
    "SSMInferenceEngine": "engine",
    "Sampling": "sampling",
    "TensorParallelConfig": "config",
    "init_inference": "engine",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return __all__
