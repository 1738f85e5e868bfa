"""SSMInferenceContext: what the model remembers of a batch, from prefill through decode.

For a selective state-space model the whole past of a sequence is one conv state and one SSM state a layer, of a size
that does not grow; attention layers of a hybrid remember every token's key and value. The context owns those of every
layer on this rank, hands each layer its own, and alone moves them: forward, to other rows, to a copy. It is a
transformers `Cache`, so that a Hugging Face model takes it as its own.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        grows: whether it has an entry for every token.
    """

    data: torch.Tensor
    layers: list[int]
    grows: bool

    def with_data(self, data: torch.Tensor) -> _Store:
        return _Store(data, self.layers, self.grows)


class SSMInferenceContext(Cache):
    """The state of `batch_size` sequences in every layer, on one rank; zero, which is an empty past, at first.

    Args:
        plan: of the model whose state it is.
        batch_size: B, the number of sequences.
        ranks: over how many ranks the state is cut.
        dtype: of the activations, which most states have too; the SSM state is fp32, or fp64 where `dtype` is.
        device: where it lies.

    Attributes:
        recorded: a decode step recorded on this memory, by whoever decodes; None again once the memory moves.
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
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, found {batch_size!r}")
        layouts: dict[tuple[str, tables.StateLayout], list[int]] = {}
        for index, layer in enumerate(plan.layers):
            for part in layer.parts():
                for name, layout in tables.state(part).items():
                    layouts.setdefault((name, layout), []).append(index)
        stores = {name: [] for name, _ in layouts}
        for (name, state), layers in layouts.items():
            kept = torch.promote_types(dtype, torch.float32) if state.layout.keep_fp32 else dtype
            first, *rest = state.layout.local_shape(ranks)
            shape = (first, 0, *rest) if state.grows else (first, *rest)
            data = torch.zeros((len(layers), batch_size, *shape), dtype=kept, device=device)
            stores[name].append(_Store(data, layers, state.grows))
        self._layer_count = len(plan.layers)
        self._adopt(stores, torch.zeros(batch_size, dtype=torch.int64, device="cpu"))

    def _adopt(self, stores: dict[str, list[_Store]] | None, positions: torch.Tensor) -> None:
        self._stores = stores
        self.positions = positions  # [B], tokens seen, on the CPU
        self._hand_out()

    def _hand_out(self) -> None:
        """Make the layers' states, and what transformers sees of them, views of the stores."""
        self.recorded = None
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
    def grows(self) -> bool:
        """Whether some of the state has an entry for every token."""
        return any(store.grows for stores in self._stores.values() for store in stores)

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
        growing = [store for stores in self._stores.values() for store in stores if store.grows]
        if not growing:
            return
        needed = int((self.positions + tokens).max())
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
        self.positions = self.positions + tokens
        for state in self._states:
            state.positions = self.positions

    def nbytes(self) -> int:
        """Bytes that the state takes on this rank."""
        self.check_alive()
        return sum(store.data.nbytes for stores in self._stores.values() for store in stores)

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
        copy._layer_count = self._layer_count
        copy._adopt(self._each(torch.clone), self.positions.clone())
        return copy

    def _each(self, change) -> dict[str, list[_Store]]:
        return {
            name: [store.with_data(change(store.data)) for store in stores] for name, stores in self._stores.items()
        }

    def free(self) -> None:
        """Give the memory back; any later use raises ValueError."""
        self._stores = self.recorded = None
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
        for stores in self._stores.values():
            for store in stores:
                store.data[:, rows.to(store.data.device)] = 0
        self.positions = self.positions.masked_fill(rows, 0)
        self.advance(0)

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
