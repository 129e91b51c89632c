"""GroupNorm, activation and rounding to u8, f16 or bf16, on channels-last maps (own).

    y = act((x - mean) / sqrt(var + eps) * weight + bias), mean and var over the pixels and channels of a group of an image

    x [N, pixels, C]   1. chunk_statistics: mean and sum of squared deviations of each channel in each chunk of BLOCK_M pixels
                       2. group_statistics: from these, mean and 1 / sqrt(var + eps) of each group, by the formula of Chan et al.
                       3. normalize: the rest, in one pass over x

No sum of squares of x itself is ever formed: with a mean far from 0 it would leave no digits of the variance. The order of all
sums is fixed. groups == C is instance normalisation.
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, which has no types that mypy knows.

import triton
import triton.language as tl

from .elementwise import activate, convert, dequantize


@triton.jit
def chunk_statistics_kernel(
    x_ptr,  # [batch, pixels, x_stride] u8, f16, bf16 or f32
    chunks_ptr,  # [batch, chunks, 2, channels] f32: means, then sums of squared deviations
    pixels,
    channels,
    x_stride,
    chunks,
    x_scale,
    x_zero,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(channels, BLOCK_C)
    offs_c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // tiles_c
    chunk = pid % chunks
    image = pid // chunks
    offs_m = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    real = (offs_m < pixels)[:, None] & (offs_c < channels)[None, :]
    x = tl.load(x_ptr + (image * pixels + offs_m)[:, None] * x_stride + offs_c[None, :], mask=real, other=0)
    v = dequantize(x, x_scale, x_zero)
    count = tl.minimum(pixels - chunk * BLOCK_M, BLOCK_M).to(tl.float32)
    mean = tl.sum(tl.where(real, v, 0.0), 0) / count
    deviation = tl.where(real, v - mean[None, :], 0.0)
    to = chunks_ptr + (image * chunks + chunk) * 2 * channels + offs_c
    tl.store(to, mean, mask=offs_c < channels)
    tl.store(to + channels, tl.sum(deviation * deviation, 0), mask=offs_c < channels)


@triton.jit
def group_statistics_kernel(
    chunks_ptr,  # [batch, chunks, 2, channels] f32
    groups_ptr,  # [batch, groups, 2] f32: mean and 1 / sqrt(var + eps)
    pixels,
    channels,
    groups,
    chunks,
    eps,
    CHUNK: tl.constexpr,  # BLOCK_M of chunk_statistics
    BLOCK_N: tl.constexpr,  # pairs of chunk and channel at a time
):
    group = tl.program_id(0)  # image * groups + group
    image = group // groups
    size = channels // groups
    first_channel = (group - image * groups) * size
    total = chunks * size
    offs = tl.arange(0, BLOCK_N)
    area = (pixels * size).to(tl.float32)

    weighted = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, total, BLOCK_N):
        chunk = (start + offs) // size
        real = start + offs < total
        from_ptrs = (
            chunks_ptr
            + (image * chunks + chunk) * 2 * channels
            + first_channel
            + (start + offs - chunk * size)
        )
        count = tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.float32)
        weighted += tl.where(real, tl.load(from_ptrs, mask=real, other=0.0) * count, 0.0)
    mean = tl.sum(weighted, 0) / area

    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, total, BLOCK_N):
        chunk = (start + offs) // size
        real = start + offs < total
        from_ptrs = (
            chunks_ptr
            + (image * chunks + chunk) * 2 * channels
            + first_channel
            + (start + offs - chunk * size)
        )
        count = tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.float32)
        away = tl.load(from_ptrs, mask=real, other=0.0) - mean
        inner = tl.load(from_ptrs + channels, mask=real, other=0.0)
        squares += tl.where(real, inner + count * away * away, 0.0)
    variance = tl.sum(squares, 0) / area
    tl.store(groups_ptr + group * 2, mean)
    tl.store(groups_ptr + group * 2 + 1, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def normalize_kernel(
    x_ptr,  # [batch, pixels, x_stride] u8, f16, bf16 or f32
    groups_ptr,  # [batch, groups, 2] f32
    weight_ptr,  # [channels] f32, or anything
    bias_ptr,  # [channels] f32, or anything
    y_ptr,  # [batch, pixels, y_stride] u8, f16, bf16 or f32
    batch,
    pixels,
    channels,
    groups,
    x_stride,
    y_stride,
    x_scale,
    x_zero,
    slope,
    y_inverse_scale,
    y_zero,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(y_stride, BLOCK_C)
    offs_c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // tiles_c
    tiles_m = tl.cdiv(pixels, BLOCK_M)  # a tile lies in one image
    image = pid // tiles_m
    offs_m = (pid - image * tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_m = offs_m < pixels
    real_c = offs_c < channels
    x = tl.load(
        x_ptr + (image * pixels + offs_m)[:, None] * x_stride + offs_c[None, :],
        mask=real_m[:, None] & (offs_c < x_stride)[None, :],
        other=0,
    )
    statistics = groups_ptr + (image * groups + offs_c // (channels // groups)) * 2
    mean = tl.load(statistics, mask=real_c, other=0.0)
    factor = tl.load(statistics + 1, mask=real_c, other=0.0)
    if WEIGHT:
        factor *= tl.load(weight_ptr + offs_c, mask=real_c, other=0.0)
    v = (dequantize(x, x_scale, x_zero) - mean[None, :]) * factor[None, :]
    if BIAS:
        v += tl.load(bias_ptr + offs_c, mask=real_c, other=0.0)[None, :]
    v = tl.where(real_c[None, :], activate(v, slope, ACTIVATION), 0.0)
    y = convert(v, y_inverse_scale, y_zero, y_ptr.dtype.element_ty)
    tl.store(
        y_ptr + (image * pixels + offs_m)[:, None] * y_stride + offs_c[None, :],
        y,
        mask=real_m[:, None] & (offs_c < y_stride)[None, :],
    )
