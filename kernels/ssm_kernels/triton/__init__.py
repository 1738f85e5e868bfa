"""Kernels for GPUs, in Triton: a module for each op file, with its kernels and, under each, what launches it."""

import os

from ssm_kernels import optional

# Products and sums are contracted, as they are by every C compiler; Triton asks for a decision.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if optional.triton_interprets():
    from ssm_kernels.triton.interpreting import correct_interpreter

    correct_interpreter()
