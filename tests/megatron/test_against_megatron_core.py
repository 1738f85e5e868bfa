"""megatron-core's own Mamba-2 mixer and ours: the same parameters by the same names, the same output.

Its module wants triton, mamba-ssm and a GPU; elsewhere the names are compared with those that its source makes.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from megatron_ssm.checkpoint.chunks import chunks
from megatron_ssm.config import Mamba2Config
from megatron_ssm.families import tables

CONFIG = Mamba2Config(hidden_size=64, heads=4, head_size=32, groups=2, state_size=16, conv_width=4)


def _method(name: str) -> str:
    """The source of a method of MambaMixer."""
    source = Path(importlib.util.find_spec("megatron.core.ssm.mamba_mixer").origin).read_text()
    mixer = source[source.index("class MambaMixer(") :]
    method = mixer[mixer.index(f"    def {name}(") :]
    return method[: method.index("\n    def ", 1)] if "\n    def " in method else method


def test_our_table_has_the_names_that_megatron_cores_mixer_makes():
    made = re.findall(r"self\.(\w+) = (?:nn\.Parameter|nn\.Conv1d|build_module|ExtendedRMSNorm)", _method("__init__"))
    assert {name.split(".")[0] for name in tables.parameters(CONFIG)} == set(made)


def test_our_chunks_have_the_keys_that_megatron_core_splits_into():
    theirs = [
        re.findall(r'"(\w+)"', names) for names in re.findall(r"\[(\"[zx]\".*?)\]", _method("sharded_state_dict"))
    ]
    table = tables.parameters(CONFIG)
    ours = [
        [chunk.key.rpartition(".")[2] for chunk in chunks(name, table[name], 0, 2)]
        for name in ("in_proj.weight", "conv1d.weight")
    ]
    assert ours == theirs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="megatron-core's mixer wants a GPU")
def test_same_output_from_the_same_weights(tmp_path):
    pytest.importorskip("mamba_ssm", reason="megatron-core's mixer wants mamba-ssm")
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm import mamba_mixer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_ssm.hybrid.mixer import HybridMamba2Mixer

    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=CONFIG.hidden_size,
            num_attention_heads=1,
            mamba_state_dim=CONFIG.state_size,
            mamba_head_dim=CONFIG.head_size,
            mamba_num_groups=CONFIG.groups,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        linears = mamba_mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
        place = {"d_model": CONFIG.hidden_size, "layer_number": 1, "pg_collection": groups}
        theirs = mamba_mixer.MambaMixer(config, linears, **place).cuda()
        ours = HybridMamba2Mixer(config, CONFIG, **place).cuda()
        missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert not missing and all(name.endswith("_extra_state") for name in unexpected)
        hidden = torch.randn(100, 2, CONFIG.hidden_size, device="cuda", requires_grad=True)
        expected, found = theirs(hidden)[0], ours(hidden)[0]
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
