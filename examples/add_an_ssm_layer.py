"""SSM layers in a Megatron model of your own: the code of add_an_ssm_layer.md, as it runs.

torchrun --nproc-per-node 2 examples/add_an_ssm_layer.py
"""

from __future__ import annotations

import os

from deepspeed_inference.command_line.quiet import quiet

quiet()

import torch
from megatron.core import parallel_state
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_ssm.config import Mamba1Config
from megatron_ssm.hybrid.without_gpu import run_without_gpu
from megatron_ssm.specs import hybrid_stack_spec, mamba2_of

PATTERN = "M-M*-M"  # mixer, feed-forward, mixer, attention, …


def existing_config(ranks: int) -> TransformerConfig:
    """What an existing hybrid model has: nothing in it is ours."""
    return TransformerConfig(
        num_layers=len(PATTERN),
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=256,
        mamba_state_dim=16,
        mamba_head_dim=32,
        mamba_num_groups=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks,
        use_cpu_initialization=not torch.cuda.is_available(),
    )


def main() -> None:
    if "RANK" not in os.environ:
        raise SystemExit("expected a launcher: torchrun --nproc-per-node 2 examples/add_an_ssm_layer.py")
    ranks, is_gpu = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if is_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_gpu else torch.device("cpu")
    run_without_gpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    config = existing_config(ranks)

    # Before: mamba_stack_spec of megatron-core, which needs mamba-ssm and TransformerEngine.
    same_mixer = hybrid_stack_spec(mamba2_of(config))
    # Or another kind of mixer in the same places.
    selective = Mamba1Config(hidden_size=128, inner_size=256, state_size=16, conv_width=4, dt_rank=8)
    mamba1 = hybrid_stack_spec(selective)

    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0)).to(device)
    for name, spec in (("Mamba-2", same_mixer), ("Mamba-1", mamba1)):
        torch.manual_seed(0)
        model = MambaModel(
            config,
            spec,
            vocab_size=256,
            max_sequence_length=64,
            hybrid_override_pattern=PATTERN,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ).to(device)
        loss = model(ids[:, :-1], None, None, labels=ids[:, 1:]).mean()
        loss.backward()
        count = sum(parameter.numel() for parameter in model.parameters())
        if torch.distributed.get_rank() == 0:
            print(f"{name}: {count:,} parameters on each of {ranks} ranks, loss {loss.item():.4f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
