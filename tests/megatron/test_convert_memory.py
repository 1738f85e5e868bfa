"""Memory of a conversion: that of a few tensors, however many there are."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from transformers import JambaConfig

from megatron_ssm.checkpoint import save_safetensors
from megatron_ssm.families import family_of
from megatron_ssm.hybrid.form import megatron_tensors

MB = 10**6
# About 290 MB, of which the largest tensor (gate and up together) has 20 MB.
CONFIG = JambaConfig(
    vocab_size=5000,
    hidden_size=1024,
    intermediate_size=2500,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=4,
    num_experts=1,
    attn_layer_period=3,
    attn_layer_offset=1,
    architectures=["JambaForCausalLM"],
)

CONVERT = """
import json, sys
from pathlib import Path
from megatron_ssm.conversion.convert import convert, plan_conversion
from megatron_ssm.conversion.options import Conversion

def peak():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])

source, folder = map(Path, sys.argv[1:3])
sizes = {"tensor_parallel_size": 2}
plan_conversion(Conversion(source="hf", target="megatron", load=source, save=folder / "none")).close()  # imports
peaks = {}
for name, options in {
    "dist": dict(source="hf", target="megatron", load=source, format="torch_dist", **sizes),
    "legacy": dict(source="megatron", target="megatron", load=folder / "dist", format="legacy", **sizes),
    "hf": dict(source="megatron", target="hf", load=folder / "legacy"),
    "dist-4": dict(source="hf", target="megatron", load=folder / "hf", tensor_parallel_size=4),
}.items():
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far counts no more
    before = peak()
    convert(Conversion(save=folder / name, **options))
    peaks[name] = (peak() - before) * 1024
print(json.dumps(peaks))
"""


def test_it_takes_the_memory_of_a_few_tensors(tmp_path):
    family = family_of(CONFIG)
    CONFIG.save_pretrained(tmp_path / "source")
    table = family.parameters(CONFIG)
    values = torch.randn(max(torch.Size(layout.shape).numel() for layout in table.values()))
    tensors = {name: values[: torch.Size(layout.shape).numel()].view(layout.shape) for name, layout in table.items()}
    save_safetensors(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "source" / "model.safetensors"
    )
    shapes = [tensor.layout.shape for tensor in megatron_tensors(family, CONFIG).values()]
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes)
    assert 20 * MB < largest < 21 * MB and (tmp_path / "source" / "model.safetensors").stat().st_size > 280 * MB
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "source"), str(tmp_path)]
    run = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    taken = json.loads(run.stdout)
    assert all(peak < 2 * largest + 100 * MB for peak in taken.values()), taken
