"""The ops in plain PyTorch, with the public signatures: what every other backend is compared with."""

from ssm_kernels.reference.causal_conv1d import causal_conv1d, causal_conv1d_update
from ssm_kernels.reference.linear import linear
from ssm_kernels.reference.rms_norm import rms_norm
from ssm_kernels.reference.selective_scan import selective_scan, selective_state_update

__all__ = ["causal_conv1d", "causal_conv1d_update", "linear", "rms_norm", "selective_scan", "selective_state_update"]
