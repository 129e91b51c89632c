"""int8: per-channel weights and static activation ranges from calibration data."""

from sparsegan.quantize.affine import activation_params, quantize_weight
from sparsegan.quantize.observe import calibrate, observed_ranges

__all__ = ["activation_params", "calibrate", "observed_ranges", "quantize_weight"]
