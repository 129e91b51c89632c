"""Inputs and expectations for the tests of the ops. The expectation never touches packed weights or the reference backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import emulated
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from sparsegan import formats, ops
from sparsegan.formats import PackedWeight, pack, tap_order

DTYPES = formats.DTYPES
OPS = {
    "linear": ops.block_linear,
    "conv2d": ops.block_conv2d,
    "conv_transpose2d": ops.block_conv_transpose2d,
}
Pair = tuple[int, int]

# Backends for property tests, which draw one: every instruction set of this machine, the reference and CUDA.
CUDA = ["cuda_emulated", *([] if ops.cuda.unavailable() else ["cuda"])]
RUNNERS = st.sampled_from(["reference", *ops.available_isas(), *CUDA])
CPU_RUNNERS = st.sampled_from(["reference", *ops.available_isas()])


@contextmanager
def running_on(runner: str) -> Iterator[str]:
    """The `backend` argument for a member of RUNNERS, with its instruction set forced meanwhile."""
    if runner == "cuda_emulated":
        with emulated.registered() as name:
            yield name
    elif runner in ("reference", "cuda"):
        yield runner
    else:
        ops.set_isa(runner)
        try:
            yield "cpu"
        finally:
            ops.set_isa(None)


def blocks(backend: str, dtype: torch.dtype) -> list[Pair]:
    """The blocks that a backend takes, for weights of `dtype`; skips the test where there are none."""
    if backend == "reference":
        return [(4, 4), (8, 4), (16, 32)]
    known = formats.BLOCKS["cuda" if backend in CUDA else "cpu"].get(dtype, {})
    if not known or (backend == "cpu" and dtype == torch.float16):
        pytest.skip(f"{backend} has no kernels for {dtype} weights")
    return list(known)


def number_formats(backend: str) -> list[torch.dtype]:
    """Number formats of the weights that a backend takes."""
    if backend == "reference":
        return list(DTYPES)
    return [t for t in DTYPES if t != (torch.float32 if backend in CUDA else torch.float16)]


def a_float(backend: str) -> torch.dtype:
    """The most exact of them."""
    return torch.float16 if backend in CUDA else torch.float32


def placed(x: Tensor, backend: str) -> Tensor:
    """x on the device of the backend."""
    return x.cuda() if backend == "cuda" else x


def run(kind: str, x: Tensor, packed: PackedWeight, backend: str, **settings: Any) -> Tensor:
    """The op on the device of the backend; the result on the CPU."""
    x = placed(x, backend)
    return OPS[kind](x, packed.to(x.device), backend=backend, **settings).cpu()


def blocked_view(o: int, t: int, c: int, density: float, seed: int, integers: bool) -> Tensor:
    """A weight view [O, T, C] with 4x4 blocks of zeros; small whole numbers, or normal values."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, (o, t, c), generator=g).float()
    if not integers:
        values = torch.randn(o, t, c, generator=g) / math.sqrt(t * c)
    keep = torch.rand(-(-o // 4), t, -(-c // 4), generator=g) < density
    return values * keep.repeat_interleave(4, 0)[:o].repeat_interleave(4, 2)[:, :, :c]


def inputs(shape: tuple[int, ...], seed: int, integers: bool) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return torch.randint(-5, 6, shape, generator=g).float() if integers else torch.randn(shape, generator=g)


def quantized(x: Tensor, x_scale: float, x_zero: int) -> Tensor:
    """(q - x_zero) as float64, from the definition of the affine u8 format."""
    q = torch.round(x * torch.tensor(1.0 / x_scale, dtype=torch.float32)) + x_zero
    return q.clamp(0, 255).double() - x_zero


def activate(y: Tensor, activation: str, slope: float) -> Tensor:
    return {
        "none": lambda: y,
        "relu": lambda: F.relu(y),
        "leaky_relu": lambda: F.leaky_relu(y, slope),
        "tanh": lambda: torch.tanh(y),
        "sigmoid": lambda: torch.sigmoid(y),
        "silu": lambda: F.silu(y),
        "gelu": lambda: F.gelu(y),
    }[activation]()


def dense_op(kind: str, x: Tensor, view: Tensor, geometry: dict[str, Pair], groups: int = 1) -> Tensor:
    """The layer on dense weights with taps in raster order, in the dtype of x."""
    view = view.to(x.dtype)
    if kind == "linear":
        return x @ view[:, 0].T
    kh, kw = geometry["kernel_size"]
    rest = {k: v for k, v in geometry.items() if k != "kernel_size"}
    o, _, c = view.shape
    if kind == "conv2d":
        return F.conv2d(x, view.permute(0, 2, 1).reshape(o, c, kh, kw), groups=groups, **rest)
    weight = view.reshape(groups, o // groups, kh * kw, c).permute(0, 3, 1, 2)
    return F.conv_transpose2d(x, weight.reshape(groups * c, o // groups, kh, kw), groups=groups, **rest)


def positions(kind: str, view: Tensor, geometry: dict[str, Pair]) -> Tensor:
    """The view with its taps in the order that `pack` wants."""
    if kind != "conv_transpose2d":
        return view
    return view[:, tap_order(*(geometry[n] for n in ("kernel_size", "stride", "padding", "dilation")))]


def packed_weight(
    kind: str,
    view: Tensor,
    geometry: dict[str, Pair],
    dtype: torch.dtype,
    block: int | Pair = 8,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
) -> PackedWeight:
    """block: (BO, BK), or the BO of a block of the CPU."""
    size = (block, 4) if isinstance(block, int) else block
    return pack(positions(kind, view, geometry), dtype, size, scale, bias, groups)


def rounding_bound(kind: str, x: Tensor, view: Tensor, geometry: dict[str, Pair], exact: Tensor) -> Tensor:
    """4 eps sqrt(K) sqrt(x^2 * W^2) + eps |exact|: how far float32 sums of K products may be off (own, probabilistic)."""
    eps = torch.finfo(torch.float32).eps
    k = view.shape[1] * view.shape[2]
    energy = dense_op(kind, x.double() ** 2, view.double() ** 2, geometry)
    return 4 * eps * math.sqrt(k) * energy.sqrt() + 4 * eps * exact.abs() + 1e-30
