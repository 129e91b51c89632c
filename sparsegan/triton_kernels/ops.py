"""The Triton kernels as ops on packed maps: library sparsegan_triton, with the schemas of sparsegan/ops/cuda.py (own).

    x [N, C, H, W] ──quantize_pack──> [N, H, W, pitch] ──gather_gemm──> [N, P, Q, pitch] ──group_norm_act──> [N, P, Q, pitch]

`triton_op` keeps the launches visible to torch.compile. Nothing here waits for the device or looks at the contents of a tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..formats import ACTIVATIONS
from .configs import CONFIGS, TILES, default, device_of
from .gather_gemm import gather_gemm_kernel
from .group_norm import chunk_statistics_kernel, group_statistics_kernel, normalize_kernel
from .layers import INPUTS, PITCH_BYTES
from .quantize import quantize_kernel

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAPS = (torch.uint8, *FLOATS)

MAX_TAPS = 128  # the sums of all taps of a tile's channels are in registers at once
MAX_EXTENT = 1 << 20  # see `place` in gather_gemm.py

# Tiles of the kernels that only pass data through: 8 values a thread, two channels-last sectors or more a pixel.
TILE_M, TILE_C, TILE_WARPS = 32, 64, 8
CHUNK = 128  # pixels of one entry of the statistics
PAIRS = 1024  # entries that group_statistics adds up at a time

# By architecture and block_o; filled by `autotune`, empty: the defaults.
_tuned: dict[tuple[int, int], Any] = {}


def autotune(on: bool) -> None:
    """Whether each new shape of a gather-GEMM is measured on the GPU first, in the tiles of `configs.TILES`.

    Takes effect for calls from now on, in all threads; a compiled model keeps what it was compiled with.
    """
    _tuned.clear()
    if on:
        key = [
            "batch",
            "height",
            "width",
            "rows",
            "IN_BLOCKS",
            "KERNEL_H",
            "KERNEL_W",
            "BLOCK_K",
            "TRANSPOSED",
        ]
        for architecture, block_o in itertools.product(TILES, CONFIGS):
            choices = [
                triton.Config({"BLOCK_M": c.block_m}, num_warps=c.warps, num_stages=c.stages)
                for c in TILES[architecture][block_o]
            ]
            _tuned[architecture, block_o] = triton.autotune(choices, key)(gather_gemm_kernel)


def _need(ok: bool, op: str, text: str) -> None:
    if not ok:
        raise ValueError(f"{op}: {text}")


def _check_sizes(op: str, name: str, shape: Sequence[int]) -> None:
    _need(
        math.prod(shape) < 2**31,
        op,
        f"{name} {list(shape)} has 2^31 elements or more: use a smaller batch or image",
    )


def _check_map(t: Tensor, channels: int, op: str, name: str) -> None:
    _need(
        t.dim() == 4 and t.is_contiguous(),
        op,
        f"{name} has shape {list(t.shape)}, wanted a contiguous [N, H, W, pitch]",
    )
    _need(t.dtype in MAPS, op, f"{name} is {t.dtype}, wanted one of {MAPS}")
    _need(t.shape[3] >= channels, op, f"{name} has {t.shape[3]} channels a pixel, wanted at least {channels}")
    _check_sizes(op, name, t.shape)


def _new_map(x: Tensor, shape: list[int], channels: int, dtype: torch.dtype, op: str) -> Tensor:
    """A map to be written; what stays unwritten in a float one must not be NaN for those that read it."""
    unit = PITCH_BYTES // dtype.itemsize
    _need(dtype in MAPS, op, f"dtype is {dtype}, wanted one of {MAPS}")
    _need(
        shape[3] >= channels and shape[3] % unit == 0,
        op,
        f"pitch is {shape[3]}, wanted >= {channels}, a multiple of {unit}",
    )
    _check_sizes(op, "the output", shape)
    whole = shape[3] == channels or dtype == torch.uint8
    return x.new_empty(shape, dtype=dtype) if whole else x.new_zeros(shape, dtype=dtype)


def _inverse(scale: float, op: str, name: str) -> float:
    _need(
        scale > 0 and math.isfinite(scale) and 1.0 / scale < 3e38,
        op,
        f"{name} is {scale}, wanted a positive number",
    )
    return 1.0 / scale


def _activation(name: str, op: str) -> int:
    _need(name in ACTIVATIONS, op, f"activation is {name!r}, wanted one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


@triton_op("sparsegan_triton::quantize_pack", mutates_args={})
def quantize_pack(x: Tensor, dtype: torch.dtype, pitch: int, scale: float, zero: int) -> Tensor:
    """x [N, C, H, W] or [N, C], f32, f16 or bf16, any strides -> map [N, H, W, pitch] of dtype uint8, float16 or bfloat16."""
    op = "quantize_pack"
    _need(x.dim() in (2, 4), op, f"x has shape {list(x.shape)}, wanted [N, C, H, W] or [N, C]")
    _need(x.dtype in FLOATS, op, f"x is {x.dtype}, wanted one of {FLOATS}")
    _need(
        dtype in INPUTS.values(), op, f"dtype is {dtype}, wanted torch.uint8, torch.float16 or torch.bfloat16"
    )
    n, c, h, w = (*x.shape, 1, 1)[:4]
    strides = (*x.stride(), 0, 0)[:4]
    _check_sizes(op, "x", x.shape)
    y = _new_map(x, [n, h, w, pitch], c, dtype, op)
    inverse = _inverse(scale, op, "scale") if dtype == torch.uint8 else 1.0
    if y.numel() > 0:
        grid = (triton.cdiv(n * h * w, TILE_M) * triton.cdiv(pitch, TILE_C),)
        wrap_triton(quantize_kernel)[grid](
            x, y, n, c, h, w, *strides, pitch, inverse, zero, BLOCK_M=TILE_M, BLOCK_C=TILE_C, num_warps=TILE_WARPS
        )  # fmt: skip
    return y


def output_size(size: int, transposed: bool, k: int, s: int, p: int, extra: int, d: int) -> int:
    """Output pixels along one axis; less than 1: none."""
    reach = d * (k - 1) + 1
    return (size - 1) * s - 2 * p + reach + extra if transposed else (size + 2 * p - reach) // s + 1


@triton_op("sparsegan_triton::gather_gemm", mutates_args={})
def gather_gemm(
    x: Tensor,
    in_channels: int,
    weight: Sequence[Tensor],
    transposed: bool,
    window: Sequence[int],
    activation: str,
    slope: float,
    residual: Tensor | None,
    residual_scale: float,
    residual_zero: int,
    post_activation: str,
    post_slope: float,
    dtype: torch.dtype,
    pitch: int,
    y_scale: float,
    y_zero: int,
) -> Tensor:
    """post_act(act(layer(x)) + residual) as a map [N, P, Q, pitch] of dtype.

    x: map of u8 for int8 weights, else of the type of the weight, whose pitch holds whole blocks. weight: the tensors of a
    packed weight with its zero_sums and pad (`sparsegan.ops.cuda.validated`). window: kernel_size, stride, padding,
    output_padding and dilation, two numbers each. residual: map of the shape of the result, whose u8 stand for
    (q - residual_zero) * residual_scale. y_scale, y_zero: the same of a u8 result.
    """
    op = "gather_gemm"
    _need(
        len(weight) == 9,
        op,
        f"weight holds {len(weight)} tensors, wanted a packed weight, not 2:4, with zero_sums and pad",
    )
    values, cols, tap_ptr, row_channels, tap_sums, scale, bias, _, pad = weight
    _need(
        values.dtype in INPUTS and x.dtype == INPUTS[values.dtype],
        op,
        f"x is {x.dtype}, the weight {values.dtype}",
    )
    block_o, block_k = values.shape[1:]
    least = 32 if values.dtype == torch.int8 else 16
    _need(
        block_o in CONFIGS and block_k in (least, 2 * least, 4 * least),
        op,
        f"no kernel for blocks of {block_o}x{block_k}",
    )
    in_blocks = triton.cdiv(in_channels, block_k)
    _check_map(x, in_blocks * block_k, op, "x")
    _need(len(window) == 10, op, f"window has {len(window)} values, wanted 10")
    kh, kw, sh, sw, ph, pw, eh, ew, dh, dw = window
    _need(kh * kw <= MAX_TAPS, op, f"a {kh}x{kw} kernel has more than {MAX_TAPS} positions")
    n, h, w, x_stride = x.shape
    p, q = output_size(h, transposed, kh, sh, ph, eh, dh), output_size(w, transposed, kw, sw, pw, ew, dw)
    _need(p > 0 and q > 0, op, f"images of {h}x{w} leave no output pixel")
    _need(
        max(h, w, p, q) + 256 < MAX_EXTENT,
        op,
        f"images of {max(h, w, p, q)} pixels along an axis are too large",
    )
    out_channels, rows = scale.shape[0], row_channels.shape[0] // block_o
    _need(tap_ptr.shape[0] == rows * kh * kw + 1, op, f"the weight is not of a {kh}x{kw} kernel")
    y = _new_map(x, [n, p, q, pitch], out_channels, dtype, op)
    if residual is not None:
        _check_map(residual, out_channels, op, "residual")
        _need(
            residual.shape[:3] == y.shape[:3],
            op,
            f"residual is {list(residual.shape)}, the output {list(y.shape)}",
        )
    inverse = _inverse(y_scale, op, "y_scale") if dtype == torch.uint8 else 1.0
    if y.numel() == 0:
        return y

    phases = sh * sw if transposed else 1
    largest = n * triton.cdiv(p, sh) * triton.cdiv(q, sw) if transposed else n * p * q

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (rows * phases * triton.cdiv(largest, meta["BLOCK_M"]),)

    arguments = (
        x, pad, values, cols, tap_ptr, row_channels, tap_sums, scale, bias, y if residual is None else residual, y,
        n, h, w, x_stride, rows, p, q, pitch if residual is None else residual.shape[3], pitch,
        slope, residual_scale, residual_zero, post_slope, inverse, y_zero,
    )  # fmt: skip
    constants = {
        "IN_BLOCKS": in_blocks,
        "TRANSPOSED": transposed,
        "KERNEL_H": kh,
        "KERNEL_W": kw,
        "STRIDE_H": sh,
        "STRIDE_W": sw,
        "PADDING_H": ph,
        "PADDING_W": pw,
        "DILATION_H": dh,
        "DILATION_W": dw,
        "PERIOD_H": sh // math.gcd(sh, dh),
        "PERIOD_W": sw // math.gcd(sw, dw),
        "ACTIVATION": _activation(activation, op),
        "POST_ACTIVATION": _activation(post_activation, op),
        "RESIDUAL": residual is not None,
        "TAPS_POWER": triton.next_power_of_2(kh * kw),
        "BLOCK_O": block_o,
        "BLOCK_K": block_k,
    }
    device = device_of(x)
    if tuned := _tuned.get((device.architecture, block_o)):
        wrap_triton(tuned)[grid](*arguments, **constants)
    else:
        config = default(block_o, largest, rows * phases, device)
        wrap_triton(gather_gemm_kernel)[grid](
            *arguments, **constants, BLOCK_M=config.block_m, num_warps=config.warps, num_stages=config.stages
        )
    return y


@triton_op("sparsegan_triton::group_norm_act", mutates_args={})
def group_norm_act(
    x: Tensor,
    channels: int,
    groups: int,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero: int,
    activation: str,
    slope: float,
    dtype: torch.dtype,
    pitch: int,
    y_scale: float,
    y_zero: int,
) -> Tensor:
    """act(group_norm(x) * weight + bias) of a map of any type as a map [N, H, W, pitch] of dtype; weight, bias: f32 [C]."""
    op = "group_norm_act"
    _check_map(x, channels, op, "x")
    _need(
        groups > 0 and channels % groups == 0,
        op,
        f"groups is {groups}, wanted a divisor of the {channels} channels",
    )
    _need(eps >= 0 and math.isfinite(eps), op, f"eps is {eps}, wanted a number >= 0")
    for name, t in (("weight", weight), ("bias", bias)):
        good = t is None or (t.dtype == torch.float32 and t.shape == (channels,) and t.is_contiguous())
        _need(good, op, f"{name} must be a contiguous float32 [{channels}]")
    n, h, w, x_stride = x.shape
    y = _new_map(x, [n, h, w, pitch], channels, dtype, op)
    inverse = _inverse(y_scale, op, "y_scale") if dtype == torch.uint8 else 1.0
    act = _activation(activation, op)
    if y.numel() == 0:
        return y
    pixels = h * w
    chunks = triton.cdiv(pixels, CHUNK)
    of_chunks = x.new_empty([n, chunks, 2, channels], dtype=torch.float32)
    of_groups = x.new_empty([n, groups, 2], dtype=torch.float32)
    wrap_triton(chunk_statistics_kernel)[(n * chunks * triton.cdiv(channels, TILE_C),)](
        x, of_chunks, pixels, channels, x_stride, chunks, x_scale, x_zero, BLOCK_M=CHUNK, BLOCK_C=TILE_C, num_warps=TILE_WARPS
    )  # fmt: skip
    wrap_triton(group_statistics_kernel)[(n * groups,)](
        of_chunks, of_groups, pixels, channels, groups, chunks, eps, CHUNK=CHUNK, BLOCK_N=PAIRS, num_warps=4
    )
    wrap_triton(normalize_kernel)[(n * triton.cdiv(pixels, TILE_M) * triton.cdiv(pitch, TILE_C),)](
        x, of_groups, of_groups if weight is None else weight, of_groups if bias is None else bias, y,
        n, pixels, channels, groups, x_stride, pitch, x_scale, x_zero, slope, inverse, y_zero,
        WEIGHT=weight is not None, BIAS=bias is not None, ACTIVATION=act, BLOCK_M=TILE_M, BLOCK_C=TILE_C, num_warps=TILE_WARPS,
    )  # fmt: skip
    return y
