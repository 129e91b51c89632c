"""Layers that follow each other directly, in one native call: schema, shape function, reference and backends (own).

Between the layers the activations stay packed and, for int8, quantised; the numbers are those of the layers one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..formats import FIELDS, PackedWeight
from . import block_conv2d, block_conv_transpose2d, block_linear
from .backend import ACTIVATIONS, LIBRARY, Backend, check_input, choose, refuse_cpu, refuse_nothing

LIBRARY.define("block_chain(Tensor x, Tensor[] weights, int[] geometry, float[] scales) -> Tensor")

KINDS = ("linear", "conv2d", "conv_transpose2d")  # in the order of csrc/cpu/block_chain.cpp
GEOMETRY_FIELDS = 13
SCALE_FIELDS = 2


@dataclass(frozen=True)
class ChainLayer:
    """One layer of a chain, with the arguments of its op; `output_padding` counts only for conv_transpose2d."""

    kind: Literal["linear", "conv2d", "conv_transpose2d"]
    packed: PackedWeight
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    x_scale: float = 1.0
    x_zero: int = 0
    activation: str = "none"
    slope: float = 0.0

    def geometry(self) -> list[int]:
        """The whole numbers of the layer, in the order of csrc/cpu/block_chain.cpp."""
        return [
            KINDS.index(self.kind),
            *self.kernel_size,
            *self.stride,
            *self.padding,
            *self.output_padding,
            *self.dilation,
            self.x_zero,
            ACTIVATIONS.index(self.activation),
        ]


def _split(weights: list[Tensor], geometry: list[int], scales: list[float]) -> list[tuple]:
    """(kind, weight tensors, geometry, scales) of each layer."""
    return [
        (
            KINDS[geometry[i * GEOMETRY_FIELDS]],
            weights[i * len(FIELDS) : (i + 1) * len(FIELDS)],
            geometry[i * GEOMETRY_FIELDS : (i + 1) * GEOMETRY_FIELDS],
            scales[i * SCALE_FIELDS : (i + 1) * SCALE_FIELDS],
        )
        for i in range(len(scales) // SCALE_FIELDS)
    ]


@torch.library.register_fake("sparsegan::block_chain")
def _fake(x: Tensor, weights: list[Tensor], geometry: list[int], scales: list[float]) -> Tensor:
    size = list(x.shape[2:])
    for kind, weight, g, _ in _split(weights, geometry, scales):
        channels = weight[-1].shape[0]
        kernel, stride, padding, output_padding, dilation = (g[i : i + 2] for i in range(1, 11, 2))
        if kind == "conv2d":
            axes = zip(size, kernel, stride, padding, dilation, strict=True)
            size = [block_conv2d.output_size(*axis) for axis in axes]
        elif kind == "conv_transpose2d":
            padded_axes = zip(size, kernel, stride, padding, output_padding, dilation, strict=True)
            size = [block_conv_transpose2d.output_size(*axis) for axis in padded_axes]
    return x.new_empty(x.shape[0], channels, *size)


def reference(x: Tensor, weights: list[Tensor], geometry: list[int], scales: list[float]) -> Tensor:
    for kind, weight, g, (x_scale, slope) in _split(weights, geometry, scales):
        kernel, stride, padding, output_padding, dilation = (g[i : i + 2] for i in range(1, 11, 2))
        last = (x_scale, g[11], ACTIVATIONS[g[12]], slope)
        if kind == "linear":
            x = block_linear.reference(x, weight, *last)
        elif kind == "conv2d":
            x = block_conv2d.reference(x, weight, kernel, stride, padding, dilation, *last)
        else:
            window = (kernel, stride, padding, output_padding, dilation)
            x = block_conv_transpose2d.reference(x, weight, *window, *last)
    return x


BACKENDS = (
    Backend("cpu", refuse_cpu, torch.ops.sparsegan.block_chain),
    Backend("reference", refuse_nothing, reference),
)


class Chain:
    """Layers that were found to fit each other, with the arguments of the op that do not change from call to call.

    Raises ValueError for layers that cannot stand in one chain.
    """

    def __init__(self, layers: Sequence[ChainLayer]) -> None:
        if not layers:
            raise ValueError("block_chain: no layers")
        self.linear = layers[0].kind == "linear"
        for before, layer in pairwise(layers):
            if (layer.kind == "linear") != self.linear:
                raise ValueError("block_chain: linear layers and convolutions cannot stand in one chain")
            if layer.packed.in_channels != before.packed.out_channels:
                came, wanted = before.packed.out_channels, layer.packed.in_channels
                raise ValueError(f"block_chain: a layer gives {came} channels, the next takes {wanted}")
        self.in_channels = layers[0].packed.in_channels
        self.geometry = [number for layer in layers for number in layer.geometry()]
        self.scales = [number for layer in layers for number in (layer.x_scale, layer.slope)]

    def run(self, x: Tensor, weights: list[Tensor], backend: str | None = None) -> Tensor:
        """The chain on x; weights are the tensors of all layers in the order of `PackedWeight.tensors`."""
        check_input("block_chain", x, 2 if self.linear else 4, self.in_channels)
        rows = x.reshape(-1, x.shape[-1]) if self.linear else x
        run = choose("block_chain", BACKENDS, x, backend).run
        y = run(rows, weights, self.geometry, self.scales)
        return y.view(*x.shape[:-1], y.shape[-1]) if self.linear else y


def block_chain(x: Tensor, layers: Sequence[ChainLayer], backend: str | None = None) -> Tensor:
    """Apply `layers` in turn, as their own ops would, without leaving the packed layout between them.

    x: float32 [N, C, H, W] (convolutions) or [..., C] (linear layers; the two kinds do not mix), any strides.
    Returns float32 [N, O, P, Q] or [..., O]. Raises TypeError, ValueError for a wrong x or chain, BackendError.
    """
    return Chain(layers).run(x, [tensor for layer in layers for tensor in layer.packed.tensors()], backend)
