"""Integer parameters: symmetric int8 weights per output channel, affine u8 activations per tensor.

Jacob et al. 2018 (arXiv:1712.05877), section 2.1, with the weights symmetric: without a zero point an absent
block is exactly zero.
"""

import math

import torch
from torch import Tensor

# Ranges this narrow are constants up to rounding, and their scale would have no finite float32 reciprocal.
_DEGENERATE = 1e-30


def quantize_weight(view: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [O, T, C] to int8, each output channel to its own scale: weight ~ integers * scale.

    Returns the integers, int8 [O, T, C] in -127..127, and the scales, float32 [O]: max|weight| / 127, or 1
    for a channel of zeros. Raises ValueError for NaN or infinite weights.
    """
    if not view.isfinite().all():
        raise ValueError("cannot quantise a weight that holds NaN or infinite values")
    view = view.detach().float()
    scale = view.abs().amax((1, 2)) / 127
    scale[scale < _DEGENERATE] = 1.0
    return (view / scale[:, None, None]).round().clamp(-127, 127).to(torch.int8), scale


def activation_params(lo: float, hi: float) -> tuple[float, int]:
    """Scale and zero point of u8 activations in lo..hi: value ~ (q - zero) * scale with q in 0..255.

    The range is widened to hold 0, and 0 is exact, because padding and pruned weights are. Values that never
    change (all zero) get scale 1. Raises ValueError when a bound is not finite or lo > hi.
    """
    if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
        raise ValueError(f"an activation range needs finite bounds lo <= hi, got lo={lo}, hi={hi}")
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / 255
    if scale < _DEGENERATE:
        return 1.0, 0
    return scale, round(-lo / scale)
