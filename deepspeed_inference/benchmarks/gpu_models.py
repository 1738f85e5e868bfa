"""Whole models on one GPU, with random weights in bf16: prefill and decode, of one rank of several too.

Models are stacks and heads as the engine has them, without DeepSpeed around. A rank of T is timed alone: its process
group has T ranks, but says nothing to the others, so that the time is that of its own work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, FalconMambaConfig, MambaConfig, PretrainedConfig

from deepspeed_inference.captured_decode import CapturedDecode
from deepspeed_inference.model_memory import ModelMemory
from deepspeed_inference.state.context import SSMInferenceContext
from megatron_ssm.collectives import Reduction
from megatron_ssm.collectives.torch_reduction import LocalReduction, TorchReduction
from megatron_ssm.families import family_of, tables
from megatron_ssm.linear import VocabParallelHead
from megatron_ssm.stack import Stack
from ssm_kernels.gpu_check.machine import Machine
from ssm_kernels.gpu_check.report import Row, Rows
from ssm_kernels.gpu_check.timing import Timer

BF16 = torch.bfloat16
RANKS = (1, 2, 4, 8)
THEIR_PROMPT = 256  # transformers without mamba-ssm goes through a prompt token by token, in Python


@dataclass(frozen=True)
class Sizes:
    """What is run; small in a dry run."""

    models: dict[str, PretrainedConfig]
    largest: str  # the model whose goals are checked
    prompt: int
    long_prompt: int
    piece: int  # tokens of a prompt that run at once
    batch: int
    steps: int

    @classmethod
    def of(cls, small: bool) -> Sizes:
        if small:
            tiny = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4)
            return cls({"tiny": tiny}, "tiny", 4, 8, 4, 2, 2)
        models = {
            "130M": MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280),
            "2.8B": MambaConfig(hidden_size=2560, num_hidden_layers=64, vocab_size=50280),
            "7B": FalconMambaConfig(hidden_size=4096, num_hidden_layers=64, vocab_size=65024, intermediate_size=8192),
        }
        return cls(models, "2.8B", 16384, 220_000, 8192, 64, 32)


class Model:
    """One rank of a model with random weights.

    Args:
        config: of transformers.
        reduction: the ranks.
        device: where it lies.
    """

    @torch.inference_mode(False)  # ordinary tensors, whose versions are counted
    @torch.no_grad()
    def __init__(self, config: PretrainedConfig, reduction: Reduction, device: torch.device):
        family = family_of(config)
        self.plan, self.device, self._ranks = family.plan(config), device, reduction.size
        with torch.device("meta"):
            self.stack = Stack(self.plan, family, reduction=reduction, dtype=BF16)
            self.head = VocabParallelHead(tables.vocabulary(self.plan), reduction=reduction, dtype=BF16)
        for part in (self.stack, self.head):
            part.to_empty(device=device)
            part.requires_grad_(False)
            for parameter in part.parameters():
                parameter.normal_(0.0, 0.02)
        # What each token is multiplied with, and what a step reads: the table of the embedding is only looked into.
        lookup = self.stack.embedding.weight.nbytes
        self.nbytes = sum(p.nbytes for part in (self.stack, self.head) for p in part.parameters()) - lookup
        self.products = self.nbytes // BF16.itemsize

    def context(self, batch: int) -> SSMInferenceContext:
        """Of empty sequences."""
        return SSMInferenceContext(self.plan, batch_size=batch, ranks=self._ranks, dtype=BF16, device=self.device)

    def prefill(self, ids: Tensor, context: SSMInferenceContext, at_once: int) -> Tensor:
        """[B, V/T] behind prompts [B, L], of which so many tokens run at once."""
        for piece in ids.split(at_once, dim=1):
            output, residual = self.stack.run(self.stack.embed(piece), context.layer)
            context.advance(piece.shape[1])
        return self.head.local_logits(self.stack.normed(output[:, -1], residual[:, -1]))

    def step(self, ids: Tensor, states) -> Tensor:
        """[B, V/T] behind one more token [B, 1]."""
        output, residual = self.stack.run(self.stack.embed(ids), states.layer)
        return self.head.local_logits(self.stack.normed(output[:, 0], residual[:, 0]))

    def decoder(self, batch: int, captured: bool) -> Callable[[], Tensor]:
        """A decode step of so many sequences, as it is served."""
        context, ids = self.context(batch), torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        steps = CapturedDecode(ModelMemory(self.stack, self.head), self.step, captured)

        def run() -> Tensor:
            result = steps.run(ids, context)
            if captured and steps.refusal:
                raise RuntimeError(f"the step is not captured: {steps.refusal}")
            return result

        return run

    def ids(self, length: int, batch: int = 1) -> Tensor:
        """Random ones."""
        return torch.randint(0, self.plan.vocab_size, (batch, length), device=self.device)


@contextmanager
def rank_of(size: int) -> Iterator[Reduction]:
    """The reduction of the first of so many ranks, whose others are not there."""
    if size == 1:
        yield LocalReduction()
        return
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield TorchReduction(dist.group.WORLD, reason="timed alone")
    finally:
        dist.destroy_process_group()


def run(rows: Rows, machine: Machine, timer: Timer, small: bool) -> None:
    """All rows of models."""
    sizes, device = Sizes.of(small), timer.device
    with torch.inference_mode():
        for name, config in sizes.models.items():
            with rank_of(1) as reduction:
                model = Model(config, reduction, device)
            _decodes(rows, machine, timer, name, model, sizes, small)
            _prefills(rows, machine, timer, name, model, sizes)
            del model
        for ranks in RANKS[:2] if small else RANKS:
            _share(rows, machine, timer, sizes, ranks)
        for name in [name for name in sizes.models if name != "7B"]:
            length = 8 if small else THEIR_PROMPT
            row = Row(part="models", name=f"{name}, transformers", size=f"prefill of {length}, decode, batch 1")
            rows.add(row, lambda row, name=name, length=length: _theirs(row, timer, sizes.models[name], length))


def _decodes(rows, machine, timer, name: str, model: Model, sizes: Sizes, small: bool) -> None:
    by_batch: dict[int, float] = {}
    for batch in (1, sizes.batch):
        for captured in (False, True):
            if captured and small:
                continue  # a graph needs a GPU
            row = Row(
                part="models", name=f"{name}, decode {'captured' if captured else 'eager'}", size=f"batch {batch}"
            )

            def fill(row: Row, batch=batch, captured=captured) -> None:
                row.seconds = timer.seconds(model.decoder(batch, captured))
                state = 2 * model.context(batch).nbytes()
                row.floor = machine.floor(nbytes=model.nbytes + state, flops=2 * batch * model.products)
                row.values["tokens/s"] = batch / row.median
                if captured:
                    by_batch[batch] = batch / row.median
                if name == sizes.largest and captured and batch == 1:
                    row.wants("within 1.3 × of weights over bandwidth", row.times_floor <= 1.3)
                if name == sizes.largest and captured and batch > 1 and 1 in by_batch:
                    gain = by_batch[batch] / by_batch[1]
                    row.values["of batch 1"] = gain
                    row.wants("25 × the tokens of batch 1", gain >= 25)

            rows.add(row, fill)


def _prefills(rows, machine, timer, name: str, model: Model, sizes: Sizes) -> None:
    row = Row(part="models", name=f"{name}, prefill", size=f"{sizes.prompt} tokens")

    def fill(row: Row) -> None:
        ids, context = model.ids(sizes.prompt), model.context(1)
        row.seconds = timer.seconds(lambda: model.prefill(ids, context, sizes.piece))
        flops = 2 * sizes.prompt * model.products
        row.floor = machine.floor(flops=flops)
        share = flops / row.median / machine.products
        row.values |= {"tokens/s": sizes.prompt / row.median, "of the product rate": share}
        if name == sizes.largest:
            row.wants("45 % of the product rate", share >= 0.45)

    rows.add(row, fill)
    if name != sizes.largest:
        return
    row = Row(part="models", name=f"{name}, long prefill", size=f"{sizes.long_prompt} tokens")

    def fill_long(row: Row) -> None:
        peaks = []
        for length in (sizes.piece, sizes.long_prompt):
            ids, context = model.ids(length), model.context(1)
            before = _allocated(timer.device, reset=True)
            seconds = timer.seconds(lambda ids=ids, context=context: model.prefill(ids, context, sizes.piece))[:1]
            peaks.append(_allocated(timer.device) - before)
            row.values["state, MB"] = context.nbytes() / 1e6
        row.seconds = seconds
        row.values |= {"peak beyond weights, MB": peaks[1] / 1e6, f"that of {sizes.piece} tokens, MB": peaks[0] / 1e6}
        row.wants("state memory that does not grow", peaks[1] <= 1.05 * peaks[0] + 2**20)

    rows.add(row, fill_long)


def _share(rows, machine, timer, sizes: Sizes, ranks: int) -> None:
    """What one of so many ranks computes, without the others."""
    row = Row(
        part="models",
        name=f"{sizes.largest}, one rank of {ranks} alone",
        size=f"prefill of {min(2048, sizes.prompt)}; decode",
    )

    def fill(row: Row) -> None:
        with rank_of(ranks) as reduction:
            model = Model(sizes.models[sizes.largest], reduction, timer.device)
            ids, context = model.ids(min(2048, sizes.prompt)), model.context(1)
            row.seconds = timer.seconds(lambda: model.prefill(ids, context, sizes.piece))
            row.floor = machine.floor(flops=2 * ids.numel() * model.products)
            row.values["decode, ms"] = 1e3 * timer.median(model.decoder(1, captured=timer.device.type == "cuda"))
            row.values["weights over bandwidth, ms"] = 1e3 * model.nbytes / machine.copy

    rows.add(row, fill)


def _theirs(row: Row, timer: Timer, config: PretrainedConfig, length: int) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=BF16).to(timer.device).eval()
    ids = torch.randint(0, config.vocab_size, (1, length), device=timer.device)
    few = Timer(timer.device, rounds=2)
    row.seconds = few.seconds(lambda: model(ids, use_cache=True))
    cache = model(ids, use_cache=True)
    key = "cache_params" if getattr(cache, "cache_params", None) is not None else "past_key_values"
    past, token = {key: getattr(cache, key), "use_cache": True}, ids[:, -1:]
    row.values["tokens/s"] = ids.numel() / row.median
    row.values["decode, ms"] = 1e3 * few.median(lambda: model(token, **past))


def _allocated(device: torch.device, reset: bool = False) -> int:
    """The most bytes that were allocated on a GPU since they were last reset; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)
