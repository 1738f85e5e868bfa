"""The ops in plain PyTorch, with the public signatures: what every other backend is compared with."""

from ssm_kernels.reference.causal_conv1d import causal_conv1d, causal_conv1d_update
from ssm_kernels.reference.gated_rms_norm import gated_product, gated_rms_norm
from ssm_kernels.reference.linear import linear
from ssm_kernels.reference.quantize import dequantize_sum, quantize, quantize_sum
from ssm_kernels.reference.rms_norm import rms_norm
from ssm_kernels.reference.scale_rows import scale_rows
from ssm_kernels.reference.selective_scan import selective_scan, selective_state_update
from ssm_kernels.reference.ssd_scan import ssd_scan, ssd_state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "dequantize_sum",
    "gated_product",
    "gated_rms_norm",
    "linear",
    "quantize",
    "quantize_sum",
    "rms_norm",
    "scale_rows",
    "selective_scan",
    "selective_state_update",
    "ssd_scan",
    "ssd_state_update",
]
