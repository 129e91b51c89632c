"""int8 and fewer bits: weights per channel, static activation ranges from calibration data, formats to compare with."""

from sparsegan.quantize.affine import activation_params, quantize_weight
from sparsegan.quantize.low_bit import Scheme, quantized_copy
from sparsegan.quantize.observe import calibrate, observed_ranges

__all__ = [
    "Scheme",
    "activation_params",
    "calibrate",
    "observed_ranges",
    "quantize_weight",
    "quantized_copy",
]
