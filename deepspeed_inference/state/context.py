"""SSMInferenceContext: what the model remembers of a batch, from prefill through decode.

For a selective state-space model the whole past of a sequence is one conv state and one SSM state a layer, of a size
that does not grow; attention layers of a hybrid remember every token's key and value. The context owns those of every
layer on this rank, hands each layer its own, and alone moves them: forward, to other rows, to a copy. It is a
transformers `Cache`, so that a Hugging Face model takes it as its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from megatron_ssm.families import tables
from megatron_ssm.plan import ModelPlan
from megatron_ssm.state import LayerState

_FIRST_CAPACITY = 64  # tokens of keys and values; doubled whenever it is not enough


@dataclass
class _Store:
    """One kind of state, of every layer that has it.

    Args:
        data: [layers that have it, B, …]; where it grows, tokens are the fourth dimension.
        layers: which.
        layout: of one sequence's, in one layer.
    """

    data: torch.Tensor
    layers: list[int]
    layout: tables.StateLayout

    @property
    def grows(self) -> bool:
        return self.layout.grows

    def with_data(self, data: torch.Tensor) -> _Store:
        return _Store(data, self.layers, self.layout)


def layers_by_state(plan: ModelPlan) -> dict[tuple[str, tables.StateLayout], list[int]]:
    """Which layers of a model keep which state: (LayerState's name for it, its layout) -> their numbers."""
    layers: dict[tuple[str, tables.StateLayout], list[int]] = {}
    for index, layer in enumerate(plan.layers):
        for part in layer.parts():
            for name, layout in tables.state(part).items():
                layers.setdefault((name, layout), []).append(index)
    return layers


def dtype_of(state: tables.StateLayout, dtype: torch.dtype, state_dtype: torch.dtype | None) -> torch.dtype:
    """What a state is kept in, where activations are of `dtype`; arguments as SSMInferenceContext has them."""
    if not state.layout.keep_fp32:
        return dtype
    return state_dtype or torch.promote_types(dtype, torch.float32)


class SSMInferenceContext(Cache):
    """The state of `batch_size` sequences in every layer, on one rank; zero, which is an empty past, at first.

    Args:
        plan: of the model whose state it is.
        batch_size: B, the number of sequences.
        ranks: over how many ranks the state is cut.
        dtype: of the activations, which most states have too.
        device: where it lies.
        state_dtype: of the SSM state; None for fp32, or fp64 where `dtype` is.

    Attributes:
        recordings: decode steps recorded on this memory, by whoever decodes; none any more once the memory moves. That
            of all rows is `recorded`; those of selections have their sizes as keys, and graphs are `("graph", …)`.
        device: where it lies.
    """

    @torch.inference_mode(False)  # state is ordinary memory, whoever makes or moves it
    def __init__(
        self,
        plan: ModelPlan,
        *,
        batch_size: int,
        ranks: int,
        dtype: torch.dtype,
        device: torch.device,
        state_dtype: torch.dtype | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, found {batch_size!r}")
        layouts = layers_by_state(plan)
        stores = {name: [] for name, _ in layouts}
        for (name, state), layers in layouts.items():
            kept = dtype_of(state, dtype, state_dtype)
            data = torch.zeros((len(layers), batch_size, *state.local_shape(ranks, 0)), dtype=kept, device=device)
            stores[name].append(_Store(data, layers, state))
        self.device = torch.device(device)
        self._layer_count = len(plan.layers)
        self._adopt(stores, torch.zeros(batch_size, dtype=torch.int64, device="cpu"))

    def _adopt(self, stores: dict[str, list[_Store]] | None, positions: torch.Tensor) -> None:
        self._stores = stores
        self.positions = positions  # [B], tokens seen, on the CPU
        self._hand_out()

    def _hand_out(self) -> None:
        """Make the layers' states, and what transformers sees of them, views of the stores."""
        self.recordings: dict[Any, Any] = {}
        self._states = [LayerState(positions=self.positions) for _ in range(self._layer_count)]
        for name, stores in self._stores.items():
            for store in stores:
                for place, index in enumerate(store.layers):
                    setattr(self._states[index], name, store.data[place])
        super().__init__(layers=[_CacheLayer(self, state) for state in self._states])

    @property
    def batch_size(self) -> int:
        """How many sequences it holds."""
        return self.positions.numel()

    @property
    def layer_count(self) -> int:
        """How many layers the model has."""
        return self._layer_count

    @property
    def recorded(self) -> Any:
        """A decode step of all rows, recorded; None where there is none, or the memory has moved since."""
        return self.recordings.get(None)

    @recorded.setter
    def recorded(self, recording: Any) -> None:
        self.recordings[None] = recording

    indices = None  # row i is slot i

    @property
    def pool(self) -> SSMInferenceContext:
        """The context whose slots its sequences are in: itself."""
        return self

    @property
    def slots(self) -> torch.Tensor:
        """[B] int64 on the CPU, the slot of each sequence."""
        return torch.arange(self.batch_size, device="cpu")

    def as_recorded(self) -> SSMInferenceContext:
        """What a recording is to read: the context itself."""
        return self

    @property
    def grows(self) -> bool:
        """Whether some of the state has an entry for every token."""
        return any(store.grows for store in self._all_stores())

    def _all_stores(self) -> Iterator[_Store]:
        for stores in self._stores.values():
            yield from stores

    def layer(self, index: int) -> LayerState:
        """The state that layer `index` reads and overwrites.

        Raises:
            ValueError: the context was freed.
        """
        self.check_alive()
        return self._states[index]

    @torch.inference_mode(False)
    def reserve(self, tokens: int | torch.Tensor) -> None:
        """Make room for so many more tokens of every sequence, one number or one a row. Before the layers run."""
        self.check_alive()
        self.make_room(int((self.positions + tokens).max()))

    @torch.inference_mode(False)
    def make_room(self, needed: int) -> None:
        """Let every sequence be as long as `needed` tokens."""
        growing = [store for store in self._all_stores() if store.grows]
        if not growing:
            return
        if growing[0].data.shape[3] >= needed:
            return
        capacity = max(_FIRST_CAPACITY, needed, 2 * growing[0].data.shape[3])
        larger = [store.data.new_zeros((*store.data.shape[:3], capacity, *store.data.shape[4:])) for store in growing]
        for store, data in zip(growing, larger, strict=True):
            data[:, :, :, : store.data.shape[3]] = store.data
            store.data = data
        self._hand_out()

    @torch.inference_mode(False)
    def advance(self, tokens: int | torch.Tensor) -> None:
        """Note that every sequence went on by `tokens`, one number or one a row."""
        self.move_to(self.positions + tokens)

    def move_to(self, positions: torch.Tensor) -> None:
        """Note how many tokens every sequence has seen, [B] int64."""
        self.positions = positions
        for state in self._states:
            state.positions = self.positions

    @torch.inference_mode(False)
    def place(self, row: int, position: int) -> None:
        """Note that one sequence has seen so many tokens, whose state was written here."""
        positions = self.positions.clone()
        positions[row] = position
        self.move_to(positions)

    def nbytes(self) -> int:
        """Bytes that the state takes on this rank."""
        self.check_alive()
        return sum(store.data.nbytes for store in self._all_stores())

    def fixed(self, row: int) -> list[torch.Tensor]:
        """Of one sequence, the state that has one size however long it is: views [layers, …], alike in all contexts."""
        self.check_alive()
        return [store.data[:, row] for store in self._all_stores() if not store.grows]

    def growing(self, row: int, start: int, stop: int) -> list[torch.Tensor]:
        """What a sequence keeps of its tokens start..stop, where there is room: views [layers, heads, tokens, P]."""
        self.check_alive()
        return [store.data[:, row, :, start:stop] for store in self._all_stores() if store.grows]

    def by_layer(self) -> Iterator[tuple[str, tables.StateLayout, torch.Tensor]]:
        """Every state: "layers.3.ssm", its layout, and a view of this rank's [B, …], or [B, heads, capacity, P]."""
        self.check_alive()
        for name, stores in self._stores.items():
            for store in stores:
                for place, index in enumerate(store.layers):
                    yield f"layers.{index}.{name}", store.layout, store.data[place]

    @torch.inference_mode(False)
    def reorder(self, index: torch.Tensor) -> None:
        """Make row i what row index[i] was; rows may repeat, and their number may change.

        Args:
            index: [B'] integers in 0..B-1.

        Raises:
            ValueError: an index is out of range.
        """
        self.check_alive()
        rows = torch.as_tensor(index, device="cpu")
        is_list = rows.dim() == 1 and rows.numel() > 0 and not rows.is_floating_point()
        if not is_list or rows.min() < 0 or rows.max() >= self.batch_size:
            raise ValueError(f"reorder: expected row indices in 0..{self.batch_size - 1}, found {rows.tolist()}")
        rows = rows.to(torch.int64)
        self._adopt(self._each(lambda data: data.index_select(1, rows.to(data.device))), self.positions[rows])

    @torch.inference_mode(False)
    def fork(self) -> SSMInferenceContext:
        """A copy that goes its own way from here."""
        self.check_alive()
        copy = object.__new__(type(self))
        copy._layer_count, copy.device = self._layer_count, self.device
        copy._adopt(self._each(torch.clone), self.positions.clone())
        return copy

    def _each(self, change) -> dict[str, list[_Store]]:
        return {
            name: [store.with_data(change(store.data)) for store in stores] for name, stores in self._stores.items()
        }

    def free(self) -> None:
        """Give the memory back; any later use raises ValueError."""
        self._stores = None
        self.recordings = {}
        self._states = []
        self.layers = []

    @torch.inference_mode(False)
    def reset(self, rows: torch.Tensor | None = None) -> None:
        """Forget the past of every row, or of some.

        Args:
            rows: [B] bool, which.

        Raises:
            ValueError: `rows` is something else.
        """
        self.check_alive()
        rows = torch.as_tensor([True] * self.batch_size if rows is None else rows, device="cpu")
        if rows.dtype is not torch.bool or rows.shape != (self.batch_size,):
            raise ValueError(f"reset: expected {self.batch_size} booleans, found {rows.tolist()}")
        for store in self._all_stores():
            store.data[:, rows.to(store.data.device)] = 0
        self.move_to(self.positions.masked_fill(rows, 0))

    # What transformers asks of a Cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by the longest row."""
        return int(self.positions.max())

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token has been seen."""
        return self.get_seq_length() > 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """`reorder`, by the name that beam search calls."""
        self.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """`reorder`, by another name."""
        self.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.reorder(torch.arange(self.batch_size).repeat_interleave(repeats))

    def __repr__(self) -> str:
        if self._stores is None:
            return f"{type(self).__name__}(freed)"
        return f"{type(self).__name__}(layers={len(self._states)}, positions={self.positions.tolist()})"

    def check_alive(self) -> None:
        """Raise ValueError if the context was freed."""
        if self._stores is None:
            raise ValueError("this context was freed, or its last step failed; make another with engine.new_context")


class _CacheLayer(LinearAttentionLayer):
    """One layer as transformers sees it: a window on the context's tensors."""

    is_compileable = False  # its tensors grow and move

    def __init__(self, context: SSMInferenceContext, state: LayerState):
        super().__init__()
        self.batch_size = context.batch_size
        self.keys, self.values = state.keys, state.values
        if state.conv is None:
            return
        self.dtype, self.device = state.conv.dtype, state.conv.device
        self.conv_states[0], self.recurrent_states[0] = state.conv, state.ssm
        self.conv_kernel_size[0] = state.conv.shape[-1] + 1
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True
