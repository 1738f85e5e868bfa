"""Packaging: three import packages from one repository (see ARCHITECTURE in README.md).

`kernels/` is a plain folder, never a package: a module importable as `kernels` would be picked up by
transformers, which probes for one of that name. Presets and the demo model travel as package data.
"""

from pathlib import Path

from setuptools import setup

setup(
    name="megatron-ssm",
    version="0.1.0",
    description="Tensor-parallel selective state-space language models on Megatron-core and DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "ssm_kernels",
        "ssm_kernels.reference",
        "ssm_kernels.cpu",
        "ssm_kernels.triton",
        "ssm_kernels.gpu_check",
        "ssm_kernels.mamba_ssm",
        "megatron_ssm",
        "megatron_ssm.families",
        "megatron_ssm.mixers",
        "megatron_ssm.collectives",
        "megatron_ssm.checkpoint",
        "megatron_ssm.conversion",
        "megatron_ssm.hybrid",
        "deepspeed_inference",
        "deepspeed_inference.state",
        "deepspeed_inference.batching",
        "deepspeed_inference.command_line",
        "deepspeed_inference.benchmarks",
        "deepspeed_inference.benchmarks.grid",
        "deepspeed_inference.benchmarks.peers",
        "deepspeed_inference.benchmarks.scaling",
        "deepspeed_inference.demo_training",
        "deepspeed_inference.presets",
        "deepspeed_inference.demo",
    ],
    package_dir={
        "ssm_kernels": "kernels/ssm_kernels",
        "deepspeed_inference.presets": "configs",
        "deepspeed_inference.demo": "checkpoints/demo",
    },
    package_data={
        "ssm_kernels": ["csrc/*.cpp", "csrc/*.h"],
        "megatron_ssm.collectives": ["csrc/*.cpp"],
        "deepspeed_inference.presets": ["*.yaml", "benchmarks/*.yaml"],
        "deepspeed_inference.demo": ["*.json", "*.safetensors", "*.md"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy",
        "transformers>=5.17",
        "megatron-core>=0.16",
        "deepspeed>=0.19",
        "einops",
        "safetensors",
        "filelock",
        "pyyaml",
        "tqdm",
        "psutil",
    ],
    extras_require={
        "test": ["pytest", "hypothesis", "matplotlib", "scipy", "ruff", "setuptools>=70", "triton>=3.6"],
        "gpu": ["triton>=3.6"],
        "tools": ["matplotlib", "scipy"],
    },
    entry_points={"console_scripts": ["megatron-ssm-infer=deepspeed_inference.command_line.cli:main"]},
)
