"""y = act(x W^T * scale + bias) with a block-sparse W: schema, shape function, reference and backends (own).

x [M, C] float32, W [O, 1, C] packed (formats.py) -> y [M, O] float32.
"""

from __future__ import annotations

import torch
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

SCHEMA = "block_linear(Tensor x, Tensor[] weight, float x_scale, int x_zero, str activation, float slope) -> Tensor"
LIBRARY.define(SCHEMA)


@torch.library.register_fake("sparsegan::block_linear")
def _fake(
    x: Tensor, weight: list[Tensor], x_scale: float, x_zero: int, activation: str, slope: float
) -> Tensor:
    return new_output(x, x.shape[0], weight[6].shape[0])


def reference(
    x: Tensor, weight: list[Tensor], x_scale: float, x_zero: int, activation: str, slope: float
) -> Tensor:
    values, scale, bias = weight[0], weight[5], weight[6]
    dense = dense_weight(weight, x.shape[1], taps=1)[:, 0]
    acc = quantize_input(x, values, x_scale, x_zero) @ dense.T
    return finish(acc, scale, bias, activation, slope, dim=1)


BACKENDS = (
    Backend("cpu", refuse_cpu, torch.ops.sparsegan.block_linear),
    Backend("cuda", refuse_cuda, on_cuda("linear", torch.ops.sparsegan.block_linear), FLOATS),
    Backend("triton", triton_kernels.refuse, on_cuda("linear", triton_kernels.block_linear), FLOATS),
    Backend("reference", refuse_nothing, reference),
)


def block_linear(
    x: Tensor,
    packed: PackedWeight,
    *,
    x_scale: float = 1.0,
    x_zero: int = 0,
    activation: str = "none",
    slope: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """act(x W^T * scale + bias).

    x: float32 [..., C] of any strides; float16 and bfloat16 on CUDA.
    packed: the weight [O, 1, C]. x_scale, x_zero: int8 only, x = (q - x_zero) * x_scale.
    activation: one of `backend.ACTIVATIONS`; slope is that of leaky_relu.
    Returns the dtype of x, [..., O].
    Raises TypeError, ValueError for a wrong x, BackendError.
    """
    chosen = choose("block_linear", BACKENDS, x, packed, backend)
    check_input("block_linear", x, 2, packed.in_channels, chosen)
    rows = x.reshape(-1, x.shape[-1])
    y = chosen.run(rows, packed.tensors(), x_scale, x_zero, activation, slope)
    return y.view(*x.shape[:-1], packed.out_channels)
