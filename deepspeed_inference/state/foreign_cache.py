"""A transformers cache that somebody else made, for the time of one call: read into a context, and written back.

transformers keeps K columns of convolution state where our kernels need K − 1, and grows its keys and values by
concatenation. Our own context needs none of this, and is what `generate` gets by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from deepspeed_inference.packing import Packing
from deepspeed_inference.state.context import SSMInferenceContext
from megatron_ssm.state import LayerState


@contextmanager
def as_context(
    cache: Cache | None, backbone, rows: int, packing: Packing | None
) -> Iterator[SSMInferenceContext | None]:
    """The cache as a context of `rows` sequences; what happens to it within the block is written back.

    Args:
        cache: our context, which is handed through; a transformers cache; or none.
        backbone: whose cache it is; makes the context.
        rows: B.
        packing: of the batch that comes next.

    Raises:
        ValueError: the cache has another number of rows or layers, is of a kind that is not supported, or has keys and
            values and the batch is padded.
    """
    if cache is None or isinstance(cache, SSMInferenceContext):
        if cache is not None and cache.batch_size != rows:
            raise ValueError(f"expected {cache.batch_size} rows, as the context has, found {rows}")
        yield cache
        return
    context = backbone.new_context(rows)
    _check(cache, context, rows)
    remembers_tokens = any(context.layer(index).keys is not None for index in range(len(cache.layers)))
    if remembers_tokens and packing is not None:
        raise ValueError(
            "a padded batch with a transformers cache: expected no cache, or one of engine.new_context, found "
            f"{type(cache).__name__}, whose keys and values would be those of padding"
        )
    seen = _tokens_seen(cache)
    context.reserve(seen)
    context.advance(seen)
    for layer, index in zip(cache.layers, range(len(cache.layers)), strict=True):
        _read(layer, context.layer(index), seen)
    yield context
    for layer, index in zip(cache.layers, range(len(cache.layers)), strict=True):
        _write(layer, context.layer(index), seen, int(context.positions.max()))


def _check(cache: Cache, context: SSMInferenceContext, rows: int) -> None:
    """Raise ValueError for a cache that would forget: only those made as `DynamicCache(config=...)` are known."""
    expected = "a DynamicCache(config=model.config), or a context of engine.new_context"
    if len(cache.layers) != len(context.layers):
        raise ValueError(
            f"cache: expected {expected}, found {type(cache).__name__} of {len(cache.layers)} layers, "
            f"the model has {len(context.layers)}"
        )
    for index, layer in enumerate(cache.layers):
        state = context.layer(index)
        keeps = isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)
        if (state.keys is not None and not keeps) or (state.conv is not None and not _has_recurrence(layer)):
            raise ValueError(f"cache: expected {expected}, found {type(layer).__name__} for layer {index}")
        for known in (getattr(layer, "keys", None), *getattr(layer, "conv_states", {}).values()):
            if known is not None and known.numel() and known.shape[0] != rows:
                raise ValueError(f"cache: expected {rows} rows, as the batch has, found {known.shape[0]}")


def _tokens_seen(cache: Cache) -> int:
    lengths = [layer.get_seq_length() for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return max(lengths, default=0)


def _has_recurrence(layer) -> bool:
    return hasattr(layer, "recurrent_states")


def _read(layer, state: LayerState, seen: int) -> None:
    if state.conv is not None and _has_recurrence(layer) and layer.has_previous_state[0]:
        state.conv.copy_(layer.conv_states[0][..., -state.conv.shape[-1] :])
        state.ssm.copy_(layer.recurrent_states[0].reshape(state.ssm.shape))
    if state.keys is not None and seen:
        state.keys[:, :, :seen] = layer.keys
        state.values[:, :, :seen] = layer.values


def _write(layer, state: LayerState, seen: int, now: int) -> None:
    if state.conv is not None:
        wide = torch.nn.functional.pad(state.conv, (1, 0))
        if not layer.is_conv_states_initialized[0]:
            layer.lazy_initialization(conv_states=wide)
        if not layer.is_recurrent_states_initialized[0]:
            layer.lazy_initialization(recurrent_states=state.ssm)
        layer.conv_states[0].copy_(wide)
        layer.recurrent_states[0].copy_(state.ssm)
        layer.has_previous_state[0] = True
    if state.keys is not None:
        layer.update(state.keys[:, :, seen:now].clone(), state.values[:, :, seen:now].clone())
