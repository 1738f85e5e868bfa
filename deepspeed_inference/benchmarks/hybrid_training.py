"""Measures a training step of a hybrid model in Megatron: two tensor-parallel ranks of one thread against one of one.

A step is forward, backward, clipping, AdamW over fp32 main parameters, and rounding them into the bf16 model. The sums
over the ranks go through shared memory, by the same call that installs a quantized reduction.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from deepspeed_inference.benchmarks.benchmarking import interleaved, on_ranks, ratio

ROWS, LENGTH, VOCABULARY = 8, 512, 1024
WANTED = 1.5
M, A, F = "linear_attention", "full_attention", "mlp"
# Width, layers: the example's, and one whose products are larger.
SHAPES = {"256 wide": (256, [M, F, M, A, M, F]), "768 wide": (768, [M, F, M, A, M, F])}


def over_ranks(rounds: int) -> dict:
    """By shape: tokens a second of both layouts, the speed-up, and the largest difference of their losses."""
    return {name: _measured(shape, rounds) for name, shape in SHAPES.items()}


def _measured(shape: tuple, rounds: int) -> dict:
    seconds, losses = on_ranks(_time_layouts, 2, shape, rounds)[0]
    tokens = ROWS * LENGTH
    return {
        "one_rank_tokens_per_second": tokens / statistics.median(seconds["one"]),
        "two_ranks_tokens_per_second": tokens / statistics.median(seconds["two"]),
        "speedup": ratio(seconds["one"], seconds["two"]),
        "wanted": WANTED,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["one"], losses["two"], strict=True)),
    }


def _time_layouts(shape: tuple, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    import torch.distributed as dist

    from megatron_ssm.collectives import make_reduction

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    two = _step(shape, dist.group.WORLD, alone)
    one = _step(shape, alone, alone)
    sleep = make_reduction(dist.group.WORLD, "cpu", kind="torch").barrier  # does not spin
    losses: dict[str, list[float]] = {"one": [], "two": []}

    def one_rank() -> None:
        if dist.get_rank() == 0:
            losses["one"].append(one())
        sleep()

    def two_ranks() -> None:
        losses["two"].append(two())
        sleep()

    seconds = interleaved({"one": one_rank, "two": two_ranks}, rounds)
    dist.destroy_process_group()
    return seconds, losses


def _step(shape: tuple, tensor_parallel, alone) -> Callable[[], float]:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ssm.collectives import make_reduction, replace_reduction
    from megatron_ssm.hybrid.gradients import clip_gradients, finish_gradients
    from megatron_ssm.hybrid.main_parameters import MainParameters
    from megatron_ssm.hybrid.without_gpu import run_without_gpu

    run_without_gpu()
    by_name = dict.fromkeys(("tp", "tp_cp", "expt_tp", "tp_ep", "tp_ep_pp", "mp"), tensor_parallel)
    by_name |= dict.fromkeys(("pp", "cp", "ep", "dp", "dp_cp", "expt_dp", "tp_dp_cp", "embd", "pos_embd"), alone)
    groups = ProcessGroupCollection(**by_name)
    model = _model(shape, groups)
    if tensor_parallel.size() > 1:
        replace_reduction(model, make_reduction(tensor_parallel, "cpu"))
    main = MainParameters(model)
    optimizer = torch.optim.AdamW(main.parameters, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)

    def step() -> float:
        # megatron-core's loss asks for the one group of the process; here are two models that differ in it.
        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = groups.tp
        loss = model(ids[:, :-1], None, None, labels=ids[:, 1:]).mean()
        loss.backward()
        finish_gradients(model)
        main.take_gradients()
        clip_gradients(main.parameters, 1.0, groups)
        optimizer.step()
        optimizer.zero_grad()
        main.update_model()
        return loss.item()

    return step


def _model(shape: tuple, groups):
    from transformers import NemotronHConfig

    from megatron_ssm.families import family_of
    from megatron_ssm.hybrid.model import make_model

    width, layers = shape
    config = NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        layers_block_type=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=3 * width,
        mamba_num_heads=2 * width // 64,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=2,
        architectures=["NemotronHForCausalLM"],
    )
    torch.manual_seed(0)
    return make_model(family_of(config), config, groups, vocabulary_rows=VOCABULARY, params_dtype=torch.bfloat16)
