"""What the kernels do to one value: activations, and rounding to the u8 of the activations and back (own).

The rules are those of the CPU and CUDA C++ kernels (csrc/cuda/elementwise.cuh), so that no, ReLU and leaky ReLU activations
give the same integers everywhere; the others differ in the last digits. A product that must be rounded before it is added to
something is written fma(a, b, 0), which no compiler fuses with what follows.
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, which has no types that mypy knows.

import triton
import triton.language as tl

# In the order of sparsegan.formats.ACTIVATIONS.
NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
TANH = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
SILU = tl.constexpr(5)
GELU = tl.constexpr(6)

# Adding and taking off 1.5 * 2^23 rounds a float32 of less than 2^22 to a whole number, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def activate(v, slope, ACTIVATION: tl.constexpr):
    """float32 of any shape. slope: of the leaky ReLU. NaN stays NaN."""
    if ACTIVATION == RELU:
        v = tl.where(v < 0, 0.0, v)
    if ACTIVATION == LEAKY_RELU:
        v = tl.where(v > 0, v, v * slope)
    if ACTIVATION == TANH:
        # (1 - e) / (1 + e) with e = exp(-2|v|) has no digits left near 0, where the series does.
        square = v * v
        series = v * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * -0.053968254)))
        e = tl.exp(-2.0 * tl.abs(v))
        size = (1.0 - e) / (1.0 + e)
        v = tl.where(tl.abs(v) < 0.1, series, tl.where(v < 0, -size, size))
    if ACTIVATION == SIGMOID:
        v = 1.0 / (1.0 + tl.exp(-v))
    if ACTIVATION == SILU:
        # Where exp would overflow; the result is 0 but for 1e-36.
        clamped = tl.where(v < -88.0, -88.0, v)
        v = clamped / (1.0 + tl.exp(-clamped))
    if ACTIVATION == GELU:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.70710678))
    return v


@triton.jit
def quantize_u8(v, inverse_scale, zero):
    """clamp(round(v * inverse_scale) + zero, 0, 255) as int32; NaN gives 0."""
    steps = tl.fma(v, tl.full(v.shape, 0.0, tl.float32) + inverse_scale, tl.full(v.shape, 0.0, tl.float32))
    steps = tl.where(steps > -1024.0, steps, -1024.0)
    steps = tl.where(steps < 1024.0, steps, 1024.0)
    q = ((steps + ROUNDER) - ROUNDER).to(tl.int32) + zero
    return tl.minimum(tl.maximum(q, 0), 255)


@triton.jit
def dequantize(q, scale, zero):
    """What stored values of any type stand for, as float32: (q - zero) * scale of u8, floats as they are."""
    v = q.to(tl.float32)
    if q.dtype == tl.uint8:
        v = (q.to(tl.int32) - zero).to(tl.float32)
        v = tl.fma(v, tl.full(v.shape, 0.0, tl.float32) + scale, tl.full(v.shape, 0.0, tl.float32))
    return v


@triton.jit
def convert(v, inverse_scale, zero, dtype: tl.constexpr):
    """float32 v as it is stored: rounded to u8 by quantize_u8, or to a float type."""
    if dtype == tl.uint8:  # noqa: SIM108
        stored = quantize_u8(v, inverse_scale, zero).to(tl.uint8)
    else:
        stored = v.to(dtype)
    return stored
