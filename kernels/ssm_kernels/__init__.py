"""How the recurrences of selective state-space models are computed. Knows nothing of ranks.

Public ops, all token-major and differentiable unless they update a state in place; each has a plain PyTorch twin of the
same signature in `ssm_kernels.reference`. `dispatch` chooses the backend. `quantize` and the two sums are for wires
between ranks, whose formats are in `ssm_kernels.codecs`, and carry no gradient.
"""

from ssm_kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from ssm_kernels.dispatch import backend_report, use_backend
from ssm_kernels.gated_rms_norm import gated_product, gated_rms_norm
from ssm_kernels.linear import linear
from ssm_kernels.quantize import dequantize_sum, quantize, quantize_sum
from ssm_kernels.rms_norm import rms_norm
from ssm_kernels.scale_rows import scale_rows
from ssm_kernels.selective_scan import selective_scan, selective_state_update
from ssm_kernels.ssd_scan import ssd_scan, ssd_state_update

__all__ = [
    "backend_report",
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
    "use_backend",
]
