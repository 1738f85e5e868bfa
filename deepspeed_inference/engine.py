"""The engine: a Hugging Face model cut over the ranks, with DeepSpeed's InferenceEngine underneath.

`init_inference` injects our modules and returns it. `prefill` and `decode` run our own short loop over the injected
blocks; Hugging Face's forward and generate stay available over the same modules as `engine.module`.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

import torch
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.engine import InferenceEngine
from tqdm import tqdm
from transformers import PreTrainedModel

import ssm_kernels
from deepspeed_inference import policy
from deepspeed_inference.config import InferenceConfig, read_preset
from deepspeed_inference.context import SSMInferenceContext
from deepspeed_inference.generate import stream
from deepspeed_inference.packing import Packing
from deepspeed_inference.placement import Placement
from deepspeed_inference.pretrained import empty_model, model_directory, read_config
from deepspeed_inference.sampling import Sampling
from megatron_ssm.checkpoint import ModuleSource, SafetensorsSource
from megatron_ssm.collectives import ParallelGroups, Reduction
from megatron_ssm.families import Family, family_of


@torch.inference_mode(False)  # parameters are ordinary tensors, wherever the caller makes the engine
def init_inference(
    model: str | Path | PreTrainedModel | None = None,
    config: InferenceConfig | dict | str | Path | None = None,
    **keywords,
) -> SSMInferenceEngine:
    """Cut a model over the ranks that were launched and return the engine that runs it.

    Args:
        model: a checkpoint directory, a hub id, or a Hugging Face model, whose modules are then replaced in place.
        config: an InferenceConfig, its options, or a YAML preset; `keywords` go over it.
        keywords: fields of InferenceConfig, for example `tensor_parallel={"tp_size": 2}, dtype=torch.float32`.

    Raises:
        ValueError: on every rank, whatever is wrong with the options, the model or its checkpoint.
    """
    options = _options(model, config, keywords)
    place = Placement.of(options)
    reduction = place.reduction
    error = None
    try:
        module, family, source, dtype = _open(model if isinstance(model, PreTrainedModel) else options.model, options)
    except ValueError as failure:
        error = failure
    reduction.agree(error)
    show = options.progress and place.is_first

    def progress(names):
        return tqdm(names, desc="loading", unit=" tensors", disable=None if show else True, leave=False)

    policy.inject(module, family, source, reduction=reduction, dtype=dtype, device=place.device, progress=progress)
    source.close()
    return SSMInferenceEngine(
        module, family, reduction=reduction, groups=place.groups, dtype=dtype, kernels=options.kernels
    )


class SSMInferenceEngine(InferenceEngine):
    """Runs an injected model. Call it as the Hugging Face model: `engine(input_ids).logits`.

    Args:
        model: the injected model.
        family: its family.
        reduction: the ranks that share it.
        groups: where this rank stands among all.
        dtype: the model runs in.
        kernels: the backend of ssm_kernels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        *,
        reduction: Reduction,
        groups: ParallelGroups,
        dtype: torch.dtype,
        kernels: str = "auto",
    ):
        # DeepSpeed is told of one rank and to leave the model where it is: it is cut already, and lies on its device.
        known = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
        super().__init__(model, DeepSpeedInferenceConfig(dtype=known, keep_module_on_host=True))
        del self.generate  # the base class puts its own over ours
        self.mp_group = reduction.group
        self.family = family
        self.ssm = family.ssm_config(model.config)
        self.reduction = reduction
        self.groups = groups
        self.dtype = dtype
        self._kernels = kernels
        self.head = policy.head_module(model, family)
        self._embedding = policy.embedding_module(model, family)
        self._norm = policy.norm_module(model, family)
        self._blocks = policy.blocks(model)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.head.weight.device

    def new_context(self, batch_size: int = 1) -> SSMInferenceContext:
        """The state of `batch_size` empty sequences."""
        return SSMInferenceContext(
            self.family,
            self.ssm,
            num_layers=len(self._blocks),
            batch_size=batch_size,
            ranks=self.reduction.size,
            dtype=self.dtype,
            device=self.device,
        )

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
        context: SSMInferenceContext,
        lengths: torch.Tensor | None = None,
        gather_logits: bool = True,
    ) -> torch.Tensor:
        """Take prompts, or more of them, into the context. Its state is where they continue from.

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
        packing = None
        if lengths is not None:
            lengths = _check_lengths(lengths, rows, width)
            if (lengths < width).any():
                packing = Packing.from_lengths(lengths.to(self.device), width)
        ids = input_ids.to(self.device)
        if packing is None:
            output, residual = self._run(ids, context, None)
            output, residual = output[:, -1], residual[:, -1]
        else:
            output, residual = self._run(packing.pack(ids), context, packing.cu_seqlens)
            output, residual = packing.last(output), packing.last(residual)
        context.advance(width if lengths is None else lengths)
        return self._logits(output, residual, gather_logits)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, context: SSMInferenceContext, gather_logits: bool = True) -> torch.Tensor:
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
        output, residual = self._run(ids.to(self.device), context, None)
        context.advance(1)
        return self._logits(output[:, 0], residual[:, 0], gather_logits)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Collection[int] | None = None,
    ) -> torch.Tensor:
        """Prompts and what follows them, as transformers returns it.

        Args:
            input_ids: [B, L] ids.
            attention_mask: [B, L], 0 where a token is padding, at either side. Without it the model's padding id
                counts as padding at the ends of a row, unless that id also ends a text, as in transformers.
            max_new_tokens: how many tokens at most.
            do_sample: sample; otherwise the likeliest token is taken.
            temperature, top_k, top_p, seed: as Sampling has them, used where `do_sample` is set.
            eos_token_id: ids that end a row; None takes the model's own, an empty list takes none.

        Returns:
            [B, L + new] ids; rows that ended early are filled with the model's padding id.
        """
        self._check_ids(input_ids)
        ends = self.eos_token_ids if eos_token_id is None else _id_set(eos_token_id)
        if attention_mask is None:
            attention_mask = _mask_of_padding(input_ids, self.module.generation_config.pad_token_id, ends)
        packed, lengths = _left_aligned(input_ids, attention_mask)
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
        return torch.cat([input_ids, new.masked_fill(new < 0, self._padding_id(ends)).to(input_ids.device)], dim=1)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a text, by the model's generation config."""
        return _id_set(self.module.generation_config.eos_token_id)

    def close(self) -> None:
        """Let go of what the ranks share."""
        self.reduction.close()

    def _run(
        self, ids: torch.Tensor, context: SSMInferenceContext, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self._embedding(ids), None
        with self._backend():
            for index, block in enumerate(self._blocks):
                hidden, residual = block.step(hidden, residual, context.layer(index), cu_seqlens)
        return hidden, residual

    def _logits(self, output: torch.Tensor, residual: torch.Tensor, gather: bool) -> torch.Tensor:
        with self._backend():
            normed, _ = self._norm.add(output, residual, residual.dtype)
        logits = self.head.local_logits(normed)
        if gather:
            logits = self.head.gather(logits)
        return logits.to(torch.promote_types(self.dtype, torch.float32))

    def _backend(self):
        return nullcontext() if self._kernels == "auto" else ssm_kernels.use_backend(self._kernels)

    def _check_ids(self, ids: torch.Tensor) -> None:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: expected integers of shape [B, L], found {ids.dtype} {list(ids.shape)}")
        if not ids.numel():
            raise ValueError(f"input_ids: expected at least one token a prompt, found shape {list(ids.shape)}")
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= self.head.vocab_size:
            found = low if low < 0 else high
            raise ValueError(f"input_ids: expected ids in 0..{self.head.vocab_size - 1}, found {found}")

    def _check_batch(self, rows: int, context: SSMInferenceContext) -> None:
        if context.batch_size != rows:
            raise ValueError(f"expected {context.batch_size} rows, as the context has, found {rows}")

    def _padding_id(self, ends: Collection[int]) -> int:
        chosen = self.module.generation_config.pad_token_id
        return chosen if chosen is not None else min(ends, default=0)


def _options(model, config, keywords: dict) -> InferenceConfig:
    if isinstance(config, InferenceConfig):
        base = {name: getattr(config, name) for name in config.__dataclass_fields__}
    elif isinstance(config, (str, Path)):
        base = read_preset(config)
    else:
        base = dict(config or {})
    base |= keywords
    if model is not None and not isinstance(model, PreTrainedModel):
        base["model"] = str(model)
    return InferenceConfig.from_dict(base)


def _open(model, options: InferenceConfig):
    if isinstance(model, PreTrainedModel):
        family, source = family_of(model.config), ModuleSource(model)
        return model.eval(), family, source, options.dtype or model.dtype
    directory = model_directory(model)
    config, family = read_config(directory)
    source = SafetensorsSource(directory, family.renames)
    dtype = options.dtype or getattr(config, "dtype", None) or torch.float32
    return empty_model(config, family, directory), family, source, dtype


def _check_lengths(lengths, rows: int, width: int) -> torch.Tensor:
    lengths = torch.as_tensor(lengths, dtype=torch.int64).cpu()
    if tuple(lengths.shape) != (rows,):
        raise ValueError(f"lengths: expected one a row, [{rows}], found {list(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > width:
        raise ValueError(f"lengths: expected 1..{width} tokens a row, found {lengths.tolist()}")
    return lengths


def _left_aligned(ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    if mask is None or bool(mask.all()):
        return ids, None
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(ids.shape)}, found {list(mask.shape)}")
    order = mask.bool().logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.bool().sum(dim=1)


def _mask_of_padding(ids: torch.Tensor, padding: int | None, ends: Collection[int]) -> torch.Tensor | None:
    if padding is None or padding in ends:
        return None
    real = ids != padding
    before = real.cummax(dim=1).values
    after = real.flip(1).cummax(dim=1).values.flip(1)
    mask = before & after
    return mask if mask.any(dim=1).all() else None  # a row of nothing but padding is taken at its word


def _id_set(ids: int | Collection[int] | None) -> frozenset[int]:
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
