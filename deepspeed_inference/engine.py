"""The engine: a Hugging Face model cut over the ranks, with DeepSpeed's InferenceEngine underneath.

`init_inference` injects our modules and returns it. `prefill` and `decode` run our own short loop over the injected
blocks; Hugging Face's forward and generate stay available over the same modules as `engine.module`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.engine import InferenceEngine
from tqdm import tqdm
from transformers import PreTrainedModel

import ssm_kernels
from deepspeed_inference import policy
from deepspeed_inference.batching.continuous_batch import ContinuousBatch
from deepspeed_inference.batching.prefill import Piece, Prefills
from deepspeed_inference.batching.request import Id, Request
from deepspeed_inference.captured_decode import CapturedDecode
from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.generate import stream
from deepspeed_inference.model_memory import ModelMemory
from deepspeed_inference.opening import open_model, options_of
from deepspeed_inference.padding import left_aligned, mask_of_padding
from deepspeed_inference.placement import Placement
from deepspeed_inference.recorded_decode import RecordedDecode
from deepspeed_inference.sampling import Sampling
from deepspeed_inference.scoring import log_probabilities
from deepspeed_inference.state import saved_session
from deepspeed_inference.state.context import SSMInferenceContext
from deepspeed_inference.state.memory_figures import MemoryFigures
from deepspeed_inference.state.prefix_cache import PrefixCache
from deepspeed_inference.state.saved_session import ModelIdentity
from deepspeed_inference.state.selection import Sequences
from deepspeed_inference.state.spill import second_tier
from megatron_ssm.checkpoint import fingerprint
from megatron_ssm.collectives import ParallelGroups, Reduction
from megatron_ssm.device_copies import send
from megatron_ssm.families import Family
from megatron_ssm.overlap import Overlap


@torch.inference_mode(False)  # parameters are ordinary tensors, wherever the caller makes the engine
def init_inference(
    model: str | Path | PreTrainedModel | None = None,
    config: InferenceConfig | dict | str | Path | None = None,
    *,
    announce: Callable[[MemoryFigures], None] | None = None,
    **keywords,
) -> SSMInferenceEngine:
    """Cut a model over the ranks that were launched and return the engine that runs it.

    Args:
        model: a checkpoint directory, a hub id, or a Hugging Face model, whose modules are then replaced in place.
        config: an InferenceConfig, its options, or a YAML preset; `keywords` go over it.
        announce: called on the first rank with the memory that each will need, before any of it is allocated.
        keywords: fields of InferenceConfig, for example `tensor_parallel={"tp_size": 2}, dtype=torch.float32`.

    Raises:
        ValueError: on every rank, whatever is wrong with the options, the model or its checkpoint.
    """
    options = options_of(model, config, keywords)
    place = Placement.of(options)
    opened = place.reduction.together(lambda: open_model(model, options, place.reduction.size))
    if announce is not None and place.is_first:
        announce(opened.memory)
    show = options.progress and place.is_first

    def progress(names):
        return tqdm(names, desc="loading", unit=" tensors", disable=None if show else True, leave=False)

    policy.inject(
        opened.model,
        opened.family,
        opened.source,
        reduction=place.reduction,
        dtype=opened.dtype,
        device=place.device,
        weights=options.weights,
        progress=progress,
    )
    identity = ModelIdentity(
        fingerprint=fingerprint(opened.source, opened.family, opened.model.config),
        dtype=opened.dtype,
        weights=options.weights,
    )
    opened.source.close()
    return SSMInferenceEngine(
        opened.model,
        opened.family,
        reduction=place.reduction,
        groups=place.groups,
        dtype=opened.dtype,
        identity=identity,
        options=options,
        memory=opened.memory,
        directory=opened.directory,
    )


class SSMInferenceEngine(InferenceEngine):
    """Runs an injected model. Call it as the Hugging Face model: `engine(input_ids).logits`.

    Args:
        model: the injected model.
        family: its family.
        reduction: the ranks that share it.
        groups: where this rank stands among all.
        dtype: the model runs in.
        identity: by which saved sessions know the model.
        options: how it is run.
        memory: what it takes.
        directory: of the checkpoint; None for a model that was handed over in memory.

    Attributes:
        prefix_cache: states of prompts that others may begin with; None where none are kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        *,
        reduction: Reduction,
        groups: ParallelGroups,
        dtype: torch.dtype,
        identity: ModelIdentity,
        options: InferenceConfig,
        memory: MemoryFigures,
        directory: Path | None = None,
    ):
        # DeepSpeed is told of one rank and to leave the model where it is: it is cut already, and lies on its device.
        # A dtype that it does not know is none of its business either: our modules keep theirs.
        known = dtype if dtype in get_accelerator().supported_dtypes() else torch.float32
        super().__init__(model, DeepSpeedInferenceConfig(dtype=known, keep_module_on_host=True))
        del self.generate  # the base class puts its own over ours
        self.mp_group = reduction.group
        self.family = family
        self.plan = family.plan(model.config)
        self.reduction = reduction
        self.groups = groups
        self.dtype = dtype
        self.directory = directory
        self.identity = identity
        self.options = options
        self.head = policy.head_module(model, family)
        self.stack = policy.backbone_module(model, family)
        self.stack.hide(Overlap(options.hide_reductions))
        self.stack.state_dtype = options.state_dtype
        self.memory = memory
        self.prefix_cache = self._make_prefix_cache()
        memory = ModelMemory(self.stack, self.head)
        kept = RecordedDecode if memory.device.type == "cpu" else CapturedDecode
        self._decode = kept(memory, self._step, options.record_decode)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.head.weight.device

    def new_context(self, batch_size: int = 1) -> SSMInferenceContext:
        """The state of `batch_size` empty sequences."""
        return self.stack.new_context(batch_size)

    def save_session(self, context: Sequences, path: str | Path) -> None:
        """Write the state of a context's sequences to a safetensors file, from which any number of ranks can go on.

        Every rank calls it. A file that is there already stays whole until the new one is.

        Raises:
            ValueError: the context was freed.
            OSError: the file cannot be written, on the first rank; RuntimeError on the others.
        """
        saved_session.save(context, path, reduction=self.reduction, model=self.identity)

    def load_session(self, path: str | Path) -> SSMInferenceContext:
        """The context that `save_session` wrote, cut for these ranks. Every rank calls it.

        Raises:
            ValueError: the file is missing, damaged, of another version, or of another model, dtype or kind of weights.
        """
        return saved_session.load(path, self.new_context, reduction=self.reduction, model=self.identity)

    def forward(self, input_ids: torch.Tensor | None = None, *arguments, **keywords):
        """Hugging Face's forward over the injected modules: `.logits` is [B, L, vocab], the same on every rank."""
        if input_ids is not None:
            self._check_ids(input_ids)
        with self._backend():
            return super().forward(input_ids, *arguments, **keywords)

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: torch.Tensor,
        context: Sequences,
        lengths: torch.Tensor | None = None,
        gather_logits: bool = True,
    ) -> torch.Tensor:
        """Take prompts, or more of them, into the context. Its state is where they continue from.

        Where the context is empty, the prefix cache may know the state behind some of their tokens.

        Args:
            input_ids: [B, L] ids, rows beginning at the left.
            context: of B sequences.
            lengths: [B], how many of each row's tokens count, 1..L; None for all.
            gather_logits: False leaves the logits cut over the ranks, [B, V/T].

        Returns:
            [B, V] logits at each row's last token, fp32 (fp64 where the model runs in fp64).

        Raises:
            ValueError: an empty prompt, an id out of range, a batch that is not the context's.
        """
        self._check_ids(input_ids)
        rows, width = input_ids.shape
        self._check_batch(rows, context)
        ends = [width] * rows if lengths is None else _check_lengths(lengths, rows, width).tolist()
        prefills = Prefills(context, None if context.positions.any() else self.prefix_cache)
        context.reserve(max(ends))
        for row, (ids, end) in enumerate(zip(input_ids.cpu().numpy().astype(np.int64), ends, strict=True)):
            prefills.add(row, ids[:end])
        last: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        while len(prefills):
            pieces = prefills.next_pieces(self.options.prefill_tokens)
            output, residual = self.run_pieces(pieces, prefills.selection(pieces))
            prefills.note(pieces)
            last |= {piece.prompt.row: (output[i], residual[i]) for i, piece in enumerate(pieces) if piece.is_last}
        output, residual = map(torch.stack, zip(*(last[row] for row in range(rows)), strict=True))
        return self._logits(output, residual, gather_logits)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, context: Sequences, gather_logits: bool = True) -> torch.Tensor:
        """Take one more token of every sequence.

        Args:
            token_ids: [B] or [B, 1].
            context: of B sequences.
            gather_logits: as in prefill.

        Returns:
            [B, V] logits of the token after.
        """
        ids = token_ids.unsqueeze(1) if token_ids.dim() == 1 else token_ids
        self._check_ids(ids)
        if ids.shape[1] != 1:
            raise ValueError(f"decode: expected one token a row, [B] or [B, 1], found {list(token_ids.shape)}")
        self._check_batch(ids.shape[0], context)
        context.reserve(1)
        with self._freeing(context):
            logits = self._decode.run(send(ids, self.device), context)
        context.advance(1)
        return self._whole_logits(logits, gather_logits)

    @torch.inference_mode()
    def score(self, input_ids: torch.Tensor, targets: torch.Tensor, context: Sequences) -> torch.Tensor:
        """How likely each target is after its input and all before it; the context goes on by the inputs.

        Args:
            input_ids: [B, L] ids.
            targets: [B, L] ids, the tokens that came next.
            context: of B sequences.

        Returns:
            [B, L] log-probabilities in nats, the same on every rank.
        """
        self._check_ids(input_ids)
        self._check_ids(targets)
        if targets.shape != input_ids.shape:
            raise ValueError(f"targets: expected shape {list(input_ids.shape)}, found {list(targets.shape)}")
        self._check_batch(input_ids.shape[0], context)
        context.reserve(input_ids.shape[1])
        output, residual = self._run(input_ids.to(self.device), context, None)
        context.advance(input_ids.shape[1])
        logits = self._logits(output, residual, gather=False)
        return log_probabilities(logits, targets.to(self.device), self.head)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> torch.Tensor:
        """Prompts and what follows them, as transformers returns it.

        Args:
            input_ids: [B, L] ids.
            attention_mask: [B, L], 0 where a token is padding, at either side. Without it the model's padding id
                counts as padding at the ends of a row, unless that id also ends a text.
            max_new_tokens: how many tokens at most.
            do_sample: sample; otherwise the likeliest token is taken.
            eos_token_id: ids that end a row; None takes the model's own, an empty list takes none.
            temperature, top_k, top_p, seed: as Sampling has them, used where `do_sample` is set.

        Returns:
            [B, L + new] ids; rows that ended early are filled with the model's padding id.
        """
        self._check_ids(input_ids)
        ends = self.eos_token_ids if eos_token_id is None else _ids(eos_token_id)
        padding = self.module.generation_config.pad_token_id
        if attention_mask is None:
            attention_mask = mask_of_padding(input_ids, padding, ends)
        packed, lengths = left_aligned(input_ids, attention_mask)
        sampling = Sampling(temperature=temperature if do_sample else 0.0, top_k=top_k, top_p=top_p, seed=seed)
        steps = stream(
            self,
            packed,
            lengths=lengths,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_ids=ends,
        )
        new = torch.stack(list(steps), dim=1)
        if padding is None:
            padding = ends[0] if ends else 0
        return torch.cat([input_ids, new.masked_fill(new < 0, padding).to(input_ids.device)], dim=1)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, by the model's generation config."""
        return _ids(self.module.generation_config.eos_token_id)

    def close(self) -> None:
        """Let go of what the ranks share, and of what the prefix cache wrote."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        self.reduction.close()

    @torch.inference_mode()
    def run_pieces(self, pieces: Sequence[Piece], context: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the next pieces of prompts: what `Stack.run` gives at the last token of each, [pieces, D] both.

        Args:
            pieces: one a sequence of the context, of any lengths.
            context: their rows.
        """
        ids = [piece.ids for piece in pieces]
        lengths = torch.tensor([piece.numel() for piece in ids], device="cpu")
        context.reserve(lengths)
        if (lengths == lengths[0]).all():
            output, residual = self._run(send(torch.stack(ids), self.device), context, None)
            last = slice(None), -1
        else:
            ends = lengths.cumsum(0)
            cu_seqlens = send(torch.cat([ends.new_zeros(1), ends]).to(torch.int32), self.device)
            output, residual = self._run(send(torch.cat(ids).unsqueeze(0), self.device), context, cu_seqlens)
            last = 0, send(ends - 1, self.device)
        context.advance(lengths)
        return output[last], residual[last]

    def local_logits(self, output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[B, V/T] logits of this rank's ids, of what `run_pieces` gives."""
        return self._logits(output, residual, gather=False)

    def run(
        self,
        requests: Iterable[Request | None],
        *,
        tokenizer=None,
        order: str = "completion",
        on_token: Callable[[Id, int], None] | None = None,
    ) -> ContinuousBatch:
        """Answer requests, `batch_size` of them at once; each joins as soon as a slot is free.

        Arguments and errors are those of ContinuousBatch, which is an iterator over Answers and can cancel requests.
        """
        return ContinuousBatch(self, requests, tokenizer=tokenizer, order=order, on_token=on_token)

    def _make_prefix_cache(self) -> PrefixCache | None:
        if not self.memory.prefix_cache_bytes:
            return None
        spill = self.reduction.together(lambda: second_tier(self.options.prefix_cache_spill, self.memory.spill_bytes))
        return PrefixCache(
            budget_bytes=self.memory.prefix_cache_bytes,
            stride=self.options.prefix_cache_stride,
            turn_token_ids=self.eos_token_ids,
            second_tier=spill,
            all_agree=lambda mine: all(self.reduction.exchange(mine)),
        )

    def _step(self, ids: torch.Tensor, context: Sequences) -> torch.Tensor:
        """[B, 1] ids -> [B, V/T], this rank's logits behind them."""
        output, residual = self.stack.run(self.stack.embed(ids), context.layer)
        return self.head.local_logits(self.stack.normed(output[:, 0], residual[:, 0]))

    def _run(
        self, ids: torch.Tensor, context: Sequences, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._freeing(context):
            return self.stack.run(self.stack.embed(ids), context.layer, cu_seqlens)

    @contextmanager
    def _freeing(self, context: Sequences) -> Iterator[None]:
        try:
            with self._backend():
                yield
        except BaseException:
            context.free()  # some layers have gone on and others have not: nobody shall continue from that
            raise

    def _logits(self, output: torch.Tensor, residual: torch.Tensor, gather: bool) -> torch.Tensor:
        with self._backend():
            normed = self.stack.normed(output, residual)
        return self._whole_logits(self.head.local_logits(normed), gather)

    def _whole_logits(self, logits: torch.Tensor, gather: bool) -> torch.Tensor:
        if gather:
            logits = self.head.gather(logits)
        logits = logits.to(torch.promote_types(self.dtype, torch.float32))
        return logits if self.plan.logits_multiplier == 1.0 else logits * self.plan.logits_multiplier

    def _backend(self):
        kernels = self.options.kernels
        return nullcontext() if kernels == "auto" else ssm_kernels.use_backend(kernels)

    def _check_ids(self, ids: torch.Tensor) -> None:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: expected integers of shape [B, L], found {ids.dtype} {list(ids.shape)}")
        if not ids.numel():
            raise ValueError(f"input_ids: expected at least one token a prompt, found shape {list(ids.shape)}")
        self.stack.embedding.check(ids)

    def _check_batch(self, rows: int, context: Sequences) -> None:
        context.check_alive()
        if context.batch_size != rows:
            raise ValueError(f"expected {context.batch_size} rows, as the context has, found {rows}")


def _check_lengths(lengths, rows: int, width: int) -> torch.Tensor:
    lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex():
        raise ValueError(f"lengths: expected integers, found {lengths.dtype}")
    lengths = lengths.to(torch.int64)
    if tuple(lengths.shape) != (rows,):
        raise ValueError(f"lengths: expected one a row, [{rows}], found {list(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > width:
        raise ValueError(f"lengths: expected 1..{width} tokens a row, found {lengths.tolist()}")
    return lengths


def _ids(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
