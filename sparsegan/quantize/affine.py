"""Integer parameters as the kernels take them: symmetric weights per output channel, affine u8 activations per tensor.

Jacob et al. 2018 (arXiv:1712.05877), section 2.1, with the weights symmetric: without a zero point an absent
block is exactly zero.
"""

from torch import Tensor

from sparsegan.quantize.low_bit import affine_params, symmetric


def quantize_weight(view: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round a weight [O, T, C] for int8 kernels, each output channel to its own scale: weight ~ integers * scale.

    bits: 8 or 4. Returns the integers, int8 [O, T, C] in -127..127 or -7..7, and the scales, float32 [O]; see `symmetric`.
    Raises ValueError for NaN or infinite weights, and for other bits.
    """
    check_weight_bits(bits)
    return symmetric(view, bits)


def check_weight_bits(bits: int) -> None:
    """Raise ValueError unless bits is 8, or 4: the same kernels, half the bytes in files."""
    if bits not in (8, 4):
        raise ValueError(f"weight_bits of int8 layers must be 8 or 4, got {bits!r}")


def activation_params(lo: float, hi: float) -> tuple[float, int]:
    """Scale and zero point of u8 activations in lo..hi: value ~ (q - zero) * scale with q in 0..255; see `affine_params`.

    Raises ValueError when a bound is not finite or lo > hi.
    """
    return affine_params(lo, hi, 8)
