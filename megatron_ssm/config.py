"""SSMConfig: the dimensions and options of one mixer, whatever framework or checkpoint they came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SSMConfig:
    """One Mamba-1 mixer (Gu & Dao 2023, section 3). Letters are those used for shapes everywhere.

    Raises:
        ValueError: a dimension is not positive, or an option has an unknown value.
    """

    hidden_size: int  # D
    inner_size: int  # I
    state_size: int  # N
    conv_width: int  # K
    dt_rank: int  # R
    projection_bias: bool = False  # in_proj and out_proj
    conv_bias: bool = True
    activation: str = "silu"  # after the convolution
    norm_eps: float = 1e-5  # of the RMSNorm before the mixer
    residual_in_fp32: bool = True
    normalize_dt_b_c: bool = False  # weightless RMSNorm on dt, B and C (Falcon-Mamba)
    dt_b_c_norm_eps: float = 1e-6

    def __post_init__(self):
        for name in ("hidden_size", "inner_size", "state_size", "dt_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"SSMConfig.{name}: expected a positive integer, found {value!r}")
        if not isinstance(self.conv_width, int) or self.conv_width < 2:
            raise ValueError(f"SSMConfig.conv_width: expected an integer of at least 2, found {self.conv_width!r}")
        if self.activation != "silu":
            raise ValueError(f"SSMConfig.activation: expected 'silu', found {self.activation!r}")
        for name in ("norm_eps", "dt_b_c_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SSMConfig.{name}: expected a positive number, found {getattr(self, name)!r}")
