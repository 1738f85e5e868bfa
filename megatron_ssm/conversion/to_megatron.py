"""A Megatron checkpoint, in either format, written from the tensors of the Megatron form.

release/                             the tensors
hugging_face/                        what lay beside the weights, for the way back
latest_checkpointed_iteration.txt    "release", as Megatron-LM calls weights that no training of its own made
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_ssm.checkpoint.journal import JOURNAL
from megatron_ssm.checkpoint.legacy_writer import LegacyWriter
from megatron_ssm.checkpoint.megatron_arguments import megatron_arguments
from megatron_ssm.checkpoint.megatron_directory import MegatronWriter
from megatron_ssm.checkpoint.torch_dist_writer import TorchDistWriter
from megatron_ssm.conversion.companions import FOLDER, copy_companions
from megatron_ssm.conversion.options import Conversion
from megatron_ssm.hybrid.form import MegatronTensor
from megatron_ssm.plan import ModelPlan

RELEASE = "release"
LATEST = "latest_checkpointed_iteration.txt"
_VERSION = 3.0  # of the packing of queries, keys and values


class MegatronTarget:
    """A Megatron checkpoint to be written.

    Args:
        directory: to write in; what is already there is gone on with.
        options: tensor and pipeline parallel size and format.
        tensors: of the Megatron form, vocabularies padded.
        dtypes: to write them in, by name.
    """

    def __init__(
        self,
        directory: Path,
        options: Conversion,
        tensors: Mapping[str, MegatronTensor],
        dtypes: Mapping[str, torch.dtype],
    ):
        self._directory, self._options = directory, options
        writer = {"torch_dist": TorchDistWriter, "legacy": LegacyWriter}[options.format]
        release = directory / RELEASE
        self._writer: MegatronWriter | None = None  # None: nothing is left to write
        if not _is_complete(release):
            self._writer = writer(
                release,
                tensors,
                dtypes,
                tensor_parallel_size=options.tensor_parallel_size,
                pipeline_parallel_size=options.pipeline_parallel_size,
            )

    def is_written(self, tensor: MegatronTensor) -> bool:
        """Whether the tensor is in the checkpoint."""
        return self._writer is None or self._writer.is_written(tensor.name)

    def write(self, tensor: MegatronTensor, whole: torch.Tensor) -> None:
        """Write one tensor, whose memory must stay as it is until the next one is written.

        Raises:
            OSError: it cannot be written.
        """
        self._writer.write(tensor.name, whole)

    def finish(self, plan: ModelPlan, beside: Path, dtype: torch.dtype) -> None:
        """Write what is no tensor.

        Args:
            plan: of the model.
            beside: where its Hugging Face config lies.
            dtype: that most of its values have.
        """
        options = self._options
        arguments = megatron_arguments(
            plan,
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            padded_vocab_size=options.padded_vocab_size(plan.vocab_size),
            params_dtype=dtype,
        )
        if self._writer is not None:
            self._writer.finish({"args": arguments, "checkpoint_version": _VERSION, "iteration": 0})
        copy_companions(beside, self._directory / FOLDER)
        (self._directory / LATEST).write_text(RELEASE)

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def _is_complete(release: Path) -> bool:
    # A writer keeps its journal until everything else is in its place.
    return any(release.glob("*")) and not any(release.glob(f"{JOURNAL}*"))
