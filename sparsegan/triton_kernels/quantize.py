"""Packing: x [N, C, H, W] of any strides to channels-last u8, f16 or bf16, one program a tile of pixels and channels (own).

    y[n, h, w, c] = clamp(round(x[n, c, h, w] / scale) + zero), or x in 16 bits; channels that x lacks get the zero point, or 0.

The tile is read along the pixels, which are neighbours in memory in a contiguous x, and written along the channels; the
transposition between goes through shared memory.
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, which has no types that mypy knows.

import triton
import triton.language as tl

from .elementwise import convert


@triton.jit
def quantize_kernel(
    x_ptr,  # [batch, channels, height, width] f32, f16 or bf16
    y_ptr,  # [batch, height, width, y_stride] u8, f16 or bf16
    batch,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    y_stride,
    inverse_scale,
    zero,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(y_stride, BLOCK_C)
    offs_c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = pid // tiles_c * BLOCK_M + tl.arange(0, BLOCK_M)
    real_m = offs_m < batch * height * width
    line = offs_m // width
    image = line // height
    pixel = image.to(tl.int64) * stride_n + (line - image * height).to(tl.int64) * stride_h
    pixel += (offs_m - line * width).to(tl.int64) * stride_w
    x = tl.load(
        x_ptr + pixel[:, None] + (offs_c.to(tl.int64) * stride_c)[None, :],
        mask=real_m[:, None] & (offs_c < channels)[None, :],
        other=0.0,
    )
    y = convert(x.to(tl.float32), inverse_scale, zero, y_ptr.dtype.element_ty)
    tl.store(
        y_ptr + offs_m[:, None] * y_stride + offs_c[None, :],
        y,
        mask=real_m[:, None] & (offs_c < y_stride)[None, :],
    )
