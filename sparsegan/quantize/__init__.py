"""int8: per-channel weights and static activation ranges from calibration data."""

from sparsegan.quantize.affine import activation_params, quantize_weight
from sparsegan.quantize.observe import calibrate

__all__ = ["activation_params", "calibrate", "quantize_weight"]
