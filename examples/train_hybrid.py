"""Train a small hybrid in Megatron: Mamba-2, attention and feed-forward layers, on the source of Python's library.

    torchrun --nproc-per-node 2 examples/train_hybrid.py --save out/hybrid

The ranks share the model by tensor parallelism (`--tensor-parallel-size` fewer of them makes data-parallel replicas).
Stopped in the middle, the same command goes on from the last checkpoint, at any number of ranks. See train_hybrid.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet

quiet()

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from tqdm import tqdm
from transformers import NemotronHConfig

from deepspeed_inference.demo_training.corpus import END, byte_stream, corpus_files
from deepspeed_inference.demo_training.export import byte_tokenizer
from megatron_ssm.checkpoint.megatron_directory import TRACKER
from megatron_ssm.families import family_of
from megatron_ssm.hybrid.distributed_checkpoint import HUGGING_FACE, load_checkpoint, save_checkpoint
from megatron_ssm.hybrid.gradients import clip_gradients, finish_gradients
from megatron_ssm.hybrid.main_parameters import MainParameters
from megatron_ssm.hybrid.model import make_model
from megatron_ssm.hybrid.without_gpu import run_without_gpu

# What the model is, as a Hugging Face config: it is written beside the checkpoints, and conversion reads it.
MODEL = NemotronHConfig(
    vocab_size=END + 1,
    hidden_size=256,
    layers_block_type=["linear_attention", "mlp", "linear_attention", "full_attention", "linear_attention", "mlp"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=768,
    mamba_num_heads=16,
    mamba_head_dim=32,
    ssm_state_size=32,
    n_groups=2,
    conv_kernel=4,
    rescale_prenorm_residual=False,  # it belongs to transformers' own initial values
    bos_token_id=END,
    eos_token_id=END,
    pad_token_id=END,
    architectures=["NemotronHForCausalLM"],
    dtype="bfloat16",
)
VOCABULARY_ROWS = 512  # the same at any number of ranks, so that they all train the same model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=Path("out/hybrid"), help="the checkpoints (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="in all (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="windows a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="bytes a window (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--tensor-parallel-size", type=int, help="default: all ranks")
    parser.add_argument("--sequence-parallel", action="store_true", help="each rank keeps its part of the sequence")
    arguments = parser.parse_args()
    try:
        train(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"train_hybrid.py: error: {error}\n")
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def train(arguments: argparse.Namespace) -> None:
    """Train from the last checkpoint on, or from the beginning."""
    device, groups = start(arguments)
    family = family_of(MODEL)
    torch.manual_seed(arguments.seed)
    model = make_model(
        family,
        MODEL,
        groups,
        vocabulary_rows=VOCABULARY_ROWS,
        params_dtype=torch.bfloat16,
        sequence_parallel=arguments.sequence_parallel,
    ).to(device)
    main_parameters = MainParameters(model)
    optimizer = torch.optim.AdamW(main_parameters.parameters, betas=(0.9, 0.95), weight_decay=0.1)
    first = 0
    if (arguments.save / TRACKER).is_file():
        first = load_checkpoint(model, arguments.save, optimizer, main_parameters)
    elif groups.tp.rank() == groups.dp.rank() == 0:
        byte_tokenizer().save_pretrained(arguments.save / HUGGING_FACE)  # conversion takes it along

    files, _ = corpus_files(arguments.seed)
    data = byte_stream(files)
    is_first = torch.distributed.get_rank() == 0
    steps = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, unit="step", disable=not is_first)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate(step, arguments.steps)
        ids = windows(data, arguments, step, groups.dp.rank()).to(device)
        loss = model(ids[:, :-1], None, None, labels=ids[:, 1:]).mean()
        loss.backward()
        finish_gradients(model)
        main_parameters.take_gradients()
        clip_gradients(main_parameters.parameters, 1.0, groups)
        optimizer.step()
        optimizer.zero_grad()
        main_parameters.update_model()
        steps.set_postfix_str(f"{loss.item() / math.log(2):.3f} bits a byte")
        if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
            save_checkpoint(model, family, MODEL, arguments.save, step + 1, optimizer, main_parameters)
    if is_first and first < arguments.steps:
        print(f"{arguments.save}: step {arguments.steps}, {loss.item() / math.log(2):.3f} bits a byte in the last step")
    elif is_first:
        print(f"{arguments.save}: at step {first} already; --steps {arguments.steps} leaves nothing to do")


def start(arguments: argparse.Namespace) -> tuple[torch.device, ProcessGroupCollection]:
    """The device of this rank, and Megatron's process groups."""
    if "RANK" not in os.environ:
        raise ValueError("expected a launcher: torchrun --nproc-per-node 2 examples/train_hybrid.py …")
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    run_without_gpu()
    torch.distributed.init_process_group("nccl" if is_gpu else "gloo")
    ranks = torch.distributed.get_world_size()
    tensor_parallel_size = ranks if arguments.tensor_parallel_size is None else arguments.tensor_parallel_size
    if tensor_parallel_size < 1 or ranks % tensor_parallel_size:
        raise ValueError(
            f"--tensor-parallel-size: expected a divisor of the {ranks} ranks, found {tensor_parallel_size}"
        )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    return device, ProcessGroupCollection.use_mpu_process_groups()


def windows(data: torch.Tensor, arguments: argparse.Namespace, step: int, replica: int) -> torch.Tensor:
    """[rows, length + 1] int64, what a replica reads in a step, whatever ran before it."""
    generator = torch.Generator().manual_seed((arguments.seed * 1_000_003 + step) * 1_000 + replica)
    starts = torch.randint(0, len(data) - arguments.length, (arguments.rows, 1), generator=generator)
    return data[starts + torch.arange(arguments.length + 1)].long()


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: up over 20 steps, down in a line over the second half."""
    return min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)


if __name__ == "__main__":
    sys.exit(main())
