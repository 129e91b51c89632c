"""A swapped model made dense again: what it has to beat when the model that it was made from is not at hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsegan.formats import tap_order, unpack
from sparsegan.fuse import with_weight
from sparsegan.layers import SparseLayer, SparseProgram
from sparsegan.ops.program import Act, Program, Step
from sparsegan.patterns import from_weight_view

_ACTIVATION_MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}


def dense_counterpart(model: nn.Module) -> nn.Module:
    """A copy of a swapped model with torch's dense operations in place of the sparse ones: what it has to beat.

    The weights are those the sparse layers stand for (int8 ones dequantised), zeros included; inputs and
    activations are float32. What a program has fused (batch normalisation, upsampling) stays fused.
    """
    return _densified(copy.deepcopy(model))


def _densified(module: nn.Module) -> nn.Module:
    if isinstance(module, SparseLayer):
        return _dense_layer(module)
    if isinstance(module, SparseProgram):
        return DenseProgram(module.program)
    for name, child in module.named_children():
        setattr(module, name, _densified(child))
    return module


def _dense_layer(layer: SparseLayer) -> nn.Sequential:
    """The dense layer, and its activation."""
    packed, geometry, groups = layer.packed, layer.geometry, layer.groups
    weight_scale = packed.scale / layer.x_scale if layer.dtype == torch.int8 else packed.scale
    view = _grouped(unpack(packed).float() * weight_scale[:, None, None], groups)
    if layer.DENSE is nn.ConvTranspose2d:
        view = _in_raster_order(view, geometry)
    settings: dict[str, Any] = dict(geometry) if layer.DENSE is nn.Linear else {**geometry, "groups": groups}
    template = layer.DENSE(layer.in_channels, layer.out_channels, device="meta", **settings).eval()
    dense = cast(nn.Module, with_weight(template, from_weight_view(template, view), packed.bias))
    if layer.activation == "none":
        return nn.Sequential(dense)
    if layer.activation == "leaky_relu":
        return nn.Sequential(dense, nn.LeakyReLU(layer.slope))
    return nn.Sequential(dense, _ACTIVATION_MODULES[layer.activation]())


def _grouped(view: Tensor, groups: int) -> Tensor:
    """[O, T, C] as [O, T, C / groups]: groups are packed as a block-diagonal weight, the dense layer holds the diagonal."""
    grouped = view.unflatten(2, (groups, -1)).unflatten(0, (groups, -1))
    return grouped.diagonal(dim1=0, dim2=3).movedim(-1, 0).flatten(0, 1)


def _in_raster_order(view: Tensor, geometry: dict[str, tuple[int, int]]) -> Tensor:
    order = tap_order(*(geometry[name] for name in ("kernel_size", "stride", "padding", "dilation")))
    return view[:, torch.tensor(order).argsort()]


class DenseProgram(nn.Module):
    """A program (`ops.program`) step by step in torch, float32 throughout."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program
        self._groups: dict[int, int] = {}
        for i, step in enumerate(program.steps):
            if step.weight is not None:
                weight, bias, self._groups[i] = _dense_weight(program, step)
                self.register_buffer(f"weight{i}", weight)
                self.register_buffer(f"bias{i}", bias)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        parts: dict[int, dict[int, Tensor]] = {
            ~k: {0: x if x.dim() == 4 else x[:, :, None, None]} for k, x in enumerate(inputs)
        }
        outputs: dict[int, Tensor] = {}

        def read(index: int) -> Tensor:
            found = parts[index]
            return torch.cat([found[c] for c in sorted(found)], 1) if len(found) > 1 else found[min(found)]

        for i, step in enumerate(self._program.steps):
            v = self._gemm(i, step, read(step.x), inputs) if step.weight else _pointwise(step, read(step.x))
            v = _activated(v, step.act)
            if step.residual is not None:
                r = read(step.residual)
                v = v + (F.interpolate(r, scale_factor=2.0) if step.residual_upsample == 2 else r)
            v = _activated(v, step.post_act)
            for store in step.stores:
                w = v
                if store.affine is not None:
                    w = w * store.affine.scale[:, None, None] + store.affine.bias[:, None, None]
                w = _activated(w, store.act)
                if store.modulation is not None:
                    w = w * inputs[store.modulation][:, :, None, None]
                if store.slot >= 0:
                    parts.setdefault(store.slot, {})[store.channel] = w
                else:
                    rows = bool(self._program.rows) and self._program.rows[~store.slot]
                    outputs[~store.slot] = w.flatten(1) if rows else w
        return tuple(outputs[k] for k in range(self._program.outputs))

    def _gemm(self, i: int, step: Step, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        weight, bias, groups = getattr(self, f"weight{i}"), getattr(self, f"bias{i}"), self._groups[i]
        late = None if step.demodulation is None else inputs[step.demodulation][:, :, None, None]
        now = bias if late is None else None
        padding, mode = step.padding, self._program.slots[step.x].padding_mode
        if mode != "zeros":
            (ph, pw), padding = padding, (0, 0)
            x = F.pad(x, (pw, pw, ph, ph), mode=mode)
        if step.kind == "conv_transpose2d":
            y = F.conv_transpose2d(
                x, weight, now, step.stride, padding, step.output_padding, groups, step.dilation
            )
        else:
            y = F.conv2d(x, weight, now, step.stride, padding, step.dilation, groups)
        return y if late is None else y * late + bias[:, None, None]


def _dense_weight(program: Program, step: Step) -> tuple[Tensor, Tensor, int]:
    """Weight as torch takes it, bias, and the number of groups."""
    assert step.weight is not None
    packed, slot = step.weight, program.slots[step.x]
    after = program.slots[step.stores[0].slot].scale if step.prescaled else 1.0
    scale = packed.scale * after / (slot.scale if slot.format == "u8" else 1.0)
    view = unpack(packed).float() * scale[:, None, None]
    groups = _groups(view)
    view = _grouped(view, groups)
    kh, kw = step.kernel_size
    if step.kind != "conv_transpose2d":
        return view.transpose(1, 2).unflatten(2, (kh, kw)).contiguous(), packed.bias * after, groups
    window = {name: getattr(step, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    raster = _in_raster_order(view, window).unflatten(0, (groups, -1))  # [G, O / G, T, C / G]
    weight = raster.permute(0, 3, 1, 2).flatten(0, 1).unflatten(2, (kh, kw)).contiguous()
    return weight, packed.bias * after, groups


def _groups(view: Tensor) -> int:
    """The most groups that a weight [O, T, C] falls into: it is zero between them."""
    used = (view != 0).any(1)
    outputs, channels = used.shape
    most = math.gcd(outputs, channels)
    for groups in range(most, 1, -1):
        if most % groups == 0:
            blocks = used.unflatten(1, (groups, -1)).any(2).unflatten(0, (groups, -1)).any(1)
            if not (blocks & ~torch.eye(groups, dtype=torch.bool)).any():
                return groups
    return 1


def _pointwise(step: Step, x: Tensor) -> Tensor:
    if step.view is not None:
        x = x.reshape(-1, *step.view)
    if step.shuffle > 1:
        x = F.pixel_shuffle(x, step.shuffle)
    if step.upsample > 1:
        x = F.interpolate(x, scale_factor=float(step.upsample))
    if step.norm is not None:
        affine = step.norm.affine
        weight, bias = (affine.scale, affine.bias) if affine else (None, None)
        x = F.group_norm(x, step.norm.groups, weight, bias, step.norm.eps)
    return x


def _activated(x: Tensor, act: Act) -> Tensor:
    return F.leaky_relu(x, act.slope) if act.name == "leaky_relu" else _ACTIVATIONS[act.name](x)
