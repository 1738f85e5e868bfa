"""Communication between ranks: the one seam (`reduction`), its implementations, and the process groups below them."""

from megatron_ssm.collectives.factory import make_quantized_reduction, make_reduction
from megatron_ssm.collectives.groups import ParallelGroups, init_groups
from megatron_ssm.collectives.hook import replace_reduction
from megatron_ssm.collectives.reduction import (
    DOWN_PROJ,
    EMBEDDING,
    NORM_SUMS,
    O_PROJ,
    OUT_PROJ,
    X_PROJ,
    Handle,
    Reduction,
    ReductionError,
    Site,
    Traffic,
)

__all__ = [
    "DOWN_PROJ",
    "EMBEDDING",
    "NORM_SUMS",
    "OUT_PROJ",
    "O_PROJ",
    "X_PROJ",
    "Handle",
    "ParallelGroups",
    "Reduction",
    "ReductionError",
    "Site",
    "Traffic",
    "init_groups",
    "make_quantized_reduction",
    "make_reduction",
    "replace_reduction",
]
