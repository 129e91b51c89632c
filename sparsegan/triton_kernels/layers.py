"""The layer ops on CUDA tensors, by the ops of this package: arguments and results of sparsegan::block_linear and so on (own).

    x [N, C, H, W] ──quantize_pack──> [N, H, W, pitch] ──gather_gemm──> [N, P, Q, pitch], returned as [N, O, P, Q]

weight: the tensors of a packed weight with its constants, from `sparsegan.ops.cuda.validated`. Importing this needs no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What an input is packed to, by the type of the weight.
INPUTS = {torch.int8: torch.uint8, torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}
PITCH_BYTES = 16  # pixels of a map begin at multiples of this


def _layer(
    x: Tensor,
    weight: Sequence[Tensor],
    transposed: bool,
    window: list[int],
    x_scale: float,
    x_zero: int,
    activation: str,
    slope: float,
) -> Tensor:
    library = torch.ops.sparsegan_triton
    values, channels, out_channels = weight[0], x.shape[1], weight[5].shape[0]
    block_k, unit = values.shape[2], PITCH_BYTES // x.element_size()
    packed = library.quantize_pack(
        x, INPUTS[values.dtype], -(-channels // block_k) * block_k, x_scale, x_zero
    )
    pitch = -(-out_channels // unit) * unit
    y = library.gather_gemm(
        packed, channels, weight, transposed, window, activation, slope, None, 1.0, 0, "none", 0.0, x.dtype, pitch, 1.0, 0
    )  # fmt: skip
    return y.narrow(3, 0, out_channels).permute(0, 3, 1, 2)


def block_linear(
    x: Tensor, weight: Sequence[Tensor], x_scale: float, x_zero: int, activation: str, slope: float
) -> Tensor:
    """x [M, C] -> [M, O] of the type of x."""
    window = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    return _layer(x, weight, False, window, x_scale, x_zero, activation, slope).flatten(1)


def block_conv2d(
    x: Tensor,
    weight: Sequence[Tensor],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    x_scale: float,
    x_zero: int,
    activation: str,
    slope: float,
) -> Tensor:
    """x [N, C, H, W] -> [N, O, P, Q] of the type of x, channels last."""
    window = [*kernel_size, *stride, *padding, 0, 0, *dilation]
    return _layer(x, weight, False, window, x_scale, x_zero, activation, slope)


def block_conv_transpose2d(
    x: Tensor,
    weight: Sequence[Tensor],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    x_scale: float,
    x_zero: int,
    activation: str,
    slope: float,
) -> Tensor:
    """x [N, C, H, W] -> [N, O, P, Q] of the type of x, channels last."""
    window = [*kernel_size, *stride, *padding, *output_padding, *dilation]
    return _layer(x, weight, True, window, x_scale, x_zero, activation, slope)
