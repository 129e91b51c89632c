"""Number formats for weights, of any few bits: fixed point, affine and symmetric; and models rounded by them.

The kernels take symmetric weights of 8 or 4 bits; the others are here to be compared with, see `report.compare_formats`.
All round half to even, as `torch.round` does.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sparsegan.patterns import PRUNABLE_TYPES, from_weight_view, weight_view

# Ranges this narrow are constants up to rounding, and their scale would have no finite float32 reciprocal.
_DEGENERATE = 1e-30

_MOST_BITS = 8  # of integers with a scale that follows the weights
_MOST_FRACTION = 126  # beyond, 2^-p is no normal float32

_Kind = Literal["fixed", "affine", "symmetric"]


def fixed_point(w: Tensor, p: int, bits: int = 8) -> tuple[Tensor, float]:
    """Round to fixed point with p fraction bits: q = clamp(round(w * 2^p), -2^(bits-1), 2^(bits-1) - 1), w ~ q * 2^-p.

    w: of any shape. p: -126..126. bits: width of the integers with their sign, 2..32; what does not fit is saturated. With
    p = bits - 1 the range is [-1, 1), the format Q0.p of signal processors (standard).

    Returns the integers, int32, shaped as w, and the scale 2^-p. Raises ValueError for NaN or infinite weights, and for
    other p and bits.
    """
    _check(w, bits, 32)
    if not -_MOST_FRACTION <= p <= _MOST_FRACTION:
        raise ValueError(f"p, the fraction bits, must lie in -{_MOST_FRACTION}..{_MOST_FRACTION}, got {p}")
    limit = 2 ** (bits - 1)
    return (w.detach().double() * 2.0**p).round().clamp(-limit, limit - 1).to(torch.int32), 2.0**-p


def affine(w: Tensor, bits: int) -> tuple[Tensor, float, int]:
    """Round affinely between the extremes: q = clamp(round(w / scale) + zero, 0, 2^bits - 1), w ~ (q - zero) * scale.

    scale = (max - min) / (2^bits - 1), zero = round(-min / scale), one each for all of w; see `affine_params`. Zero weights
    stay exactly zero. w: of any shape, not empty. bits: 2..8.

    Returns the integers, uint8, shaped as w, scale and zero. Raises ValueError for NaN or infinite weights, and other bits.
    Jacob et al. 2018 (arXiv:1712.05877), sections 2.1 and 3.
    """
    _check(w, bits)
    low, high = (bound.item() for bound in w.detach().aminmax())
    scale, zero = affine_params(low, high, bits)
    integers = (w.detach().double() / scale).round() + zero
    return integers.clamp(0, 2**bits - 1).to(torch.uint8), scale, zero


def affine_params(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of values in low..high: value ~ (q - zero) * scale with q in 0..2^bits - 1.

    The range is widened to hold 0, and 0 is exact, because padding and pruned weights are. Values that never
    change (all zero) get scale 1. Raises ValueError when a bound is not finite or low > high.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"a range needs finite bounds lo <= hi, got lo={low}, hi={high}")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    if scale < _DEGENERATE:
        return 1.0, 0
    return scale, round(-low / scale)


def symmetric(view: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a weight [O, T, C] symmetrically, each output channel to its own scale: q = round(w / scale), w ~ q * scale.

    scale = max|w of the channel| / (2^(bits-1) - 1); without a zero point an absent block is exactly zero. bits: 2..8.

    Returns the integers, int8 [O, T, C] in -(2^(bits-1) - 1)..2^(bits-1) - 1, and the scales, float32 [O], 1 for a channel of
    zeros. Raises ValueError for NaN or infinite weights, and other bits. Krishnamoorthi 2018 (arXiv:1806.08342), section 2.2.
    """
    _check(view, bits)
    limit = 2 ** (bits - 1) - 1
    view = view.detach().float()
    scale = view.abs().amax((1, 2)) / limit
    scale[scale < _DEGENERATE] = 1.0
    return (view / scale[:, None, None]).round().clamp(-limit, limit).to(torch.int8), scale


@dataclass(frozen=True)
class Scheme:
    """One of the number formats above.

    kind: "fixed" (`fixed_point`), "affine", one scale and zero point a layer, or "symmetric", one scale a channel.
    bits: of an integer. p: fraction bits, of "fixed" only; None takes for each layer the most with which nothing is saturated
    (dynamic fixed point, Courbariaux et al. 2014, arXiv:1412.7024, section 4). str() is a name for tables.

    Raises ValueError for an unknown kind, and for p where the scale follows the weights.
    """

    kind: _Kind
    bits: int
    p: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(_Kind):
            raise ValueError(
                f"the kind of a scheme is one of {', '.join(get_args(_Kind))}, got {self.kind!r}"
            )
        if self.p is not None and self.kind != "fixed":
            raise ValueError(f"p is of the kind 'fixed' only: the scale of {self.kind!r} follows the weights")

    def __str__(self) -> str:
        return self.kind if self.p is None else f"{self.kind} 2^-{self.p}"

    def rounded(self, view: Tensor) -> Tensor:
        """What is left of a weight [O, T, C], float32. Errors: see the functions above."""
        if self.kind == "fixed":
            p = _largest_p(view, self.bits) if self.p is None else self.p
            integers, step = fixed_point(view, p, self.bits)
            return integers.float() * step
        if self.kind == "affine":
            integers, step, zero = affine(view, self.bits)
            return (integers.int() - zero) * step
        integers, scale = symmetric(view, self.bits)
        return integers * scale[:, None, None]

    def nbytes(self, weights: int, channels: int) -> int:
        """Bytes of a layer's integers, without gaps, and of what they are scaled with (float32 scales, bytes for p and zero)."""
        scales = {"fixed": 1, "affine": 4 + 1, "symmetric": 4 * channels}
        return -(-weights * self.bits // 8) + scales[self.kind]


def quantized_copy(model: nn.Module, scheme: Scheme) -> nn.Module:
    """A copy of `model` whose Linear, Conv2d and ConvTranspose2d have weights rounded by `scheme`, computed with in float.

    Biases, norms and activations are as they were. Raises ValueError, naming the layer, for a weight that a parametrization or
    torch.nn.utils.prune makes anew, and for one that holds NaN or infinite values.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, PRUNABLE_TYPES)]
    for name in names:
        if "weight" not in model.get_submodule(name)._parameters:
            raise ValueError(
                f"the weight of layer {name!r} is computed from a mask or another parametrization, so that it cannot be "
                "rounded in place: make that permanent first (sparsegan.make_permanent)"
            )
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            layer = result.get_submodule(name)
            assert isinstance(layer, PRUNABLE_TYPES)
            try:
                rounded = scheme.rounded(weight_view(layer))
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            layer.weight.copy_(from_weight_view(layer, rounded))
    return result


def _largest_p(w: Tensor, bits: int) -> int:
    """Most fraction bits with which the largest weight still fits."""
    largest = w.abs().max().item()
    if not 0 < largest < math.inf:
        return 0
    p = math.floor(math.log2((2 ** (bits - 1) - 1) / largest))
    return min(max(p, -_MOST_FRACTION), _MOST_FRACTION)


def _check(w: Tensor, bits: int, most: int = _MOST_BITS) -> None:
    if not 2 <= bits <= most:
        raise ValueError(f"bits must lie in 2..{most}, got {bits}")
    if not w.isfinite().all():
        raise ValueError("cannot quantise a weight that holds NaN or infinite values")
