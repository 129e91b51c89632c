"""2-d convolution with a block-sparse weight and a fused epilogue: schema, shape function, reference and backends (own).

x [N, C, H, W] float32, W [O, kh*kw, C] packed (formats.py) -> y [N, O, P, Q] float32; groups are part of the packed weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import triton_kernels
from ..formats import PackedWeight
from .backend import (
    LIBRARY,
    Backend,
    check_input,
    choose,
    dense_weight,
    finish,
    new_output,
    quantize_input,
    refuse_cpu,
    refuse_nothing,
)
from .cuda import FLOATS, on_cuda, refuse_cuda

SCHEMA = (
    "block_conv2d(Tensor x, Tensor[] weight, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "float x_scale, int x_zero, str activation, float slope) -> Tensor"
)
LIBRARY.define(SCHEMA)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@torch.library.register_fake("sparsegan::block_conv2d")
def _fake(
    x: Tensor,
    weight: list[Tensor],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    x_scale: float,
    x_zero: int,
    activation: str,
    slope: float,
) -> Tensor:
    size = [
        output_size(s, k, st, p, d)
        for s, k, st, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    return new_output(x, x.shape[0], weight[6].shape[0], *size)


def reference(
    x: Tensor,
    weight: list[Tensor],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    x_scale: float,
    x_zero: int,
    activation: str,
    slope: float,
) -> Tensor:
    values, scale, bias = weight[0], weight[5], weight[6]
    kh, kw = kernel_size
    dense = dense_weight(weight, x.shape[1], kh * kw).permute(0, 2, 1).reshape(-1, x.shape[1], kh, kw)
    q = quantize_input(x, values, x_scale, x_zero)
    acc = F.conv2d(q, dense, stride=stride, padding=padding, dilation=dilation)
    return finish(acc, scale, bias, activation, slope, dim=1)


BACKENDS = (
    Backend("cpu", refuse_cpu, torch.ops.sparsegan.block_conv2d),
    Backend("cuda", refuse_cuda, on_cuda("conv2d", torch.ops.sparsegan.block_conv2d), FLOATS),
    Backend("triton", triton_kernels.refuse, on_cuda("conv2d", triton_kernels.block_conv2d), FLOATS),
    Backend("reference", refuse_nothing, reference),
)


def block_conv2d(
    x: Tensor,
    packed: PackedWeight,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    x_scale: float = 1.0,
    x_zero: int = 0,
    activation: str = "none",
    slope: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """act(conv2d(x, W) * scale + bias).

    x: float32 [N, C, H, W] of any strides; float16 and bfloat16 on CUDA.
    packed: the weight [O, kh*kw, C], taps in raster order, groups expanded.
    x_scale, x_zero: int8 only, x = (q - x_zero) * x_scale; padding counts as real 0. activation: one of `backend.ACTIVATIONS`.
    Returns the dtype of x, [N, O, P, Q]: contiguous, or channels_last on CUDA.
    Raises TypeError, ValueError for a wrong x, BackendError.
    """
    chosen = choose("block_conv2d", BACKENDS, x, packed, backend)
    check_input("block_conv2d", x, 4, packed.in_channels, chosen)
    for size, k, p, d in zip(x.shape[2:], kernel_size, padding, dilation, strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"block_conv2d: x has shape {tuple(x.shape)}, too small for a {kernel_size[0]}x{kernel_size[1]} kernel"
                f" with padding {tuple(padding)} and dilation {tuple(dilation)}"
            )
    return chosen.run(
        x, packed.tensors(), kernel_size, stride, padding, dilation, x_scale, x_zero, activation, slope
    )
