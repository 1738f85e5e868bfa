"""Communication between ranks: the one seam (`reduction`), its implementations, and the process groups below them."""

from megatron_ssm.collectives.factory import make_reduction
from megatron_ssm.collectives.groups import ParallelGroups, init_groups
from megatron_ssm.collectives.reduction import (
    EMBEDDING,
    NORM_SUMS,
    OUT_PROJ,
    X_PROJ,
    Handle,
    Reduction,
    ReductionError,
    Site,
    Traffic,
)

__all__ = [
    "EMBEDDING",
    "NORM_SUMS",
    "OUT_PROJ",
    "X_PROJ",
    "Handle",
    "ParallelGroups",
    "Reduction",
    "ReductionError",
    "Site",
    "Traffic",
    "init_groups",
    "make_reduction",
]
