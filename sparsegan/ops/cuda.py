"""The CUDA side of the ops: when the kernels can run, what is made of a weight beforehand, and chains that stay packed (own).

    x [N, C, H, W] ──quantize_pack──> Map ──gather_gemm──> Map ──group_norm_act──> Map ──dense()──> [N, C, H, W]

A layer op on a CUDA tensor is the first two of these in one call. A *map* is a tensor [N, H, W, pitch], channels last, of u8,
f16, bf16 or f32; its first `channels` channels count, the others are finite.

The kernels run on torch's current stream and never wait for it, so what they are given is checked before, once a weight
(`validated`), and every op can be captured in a CUDA graph. `csrc/cuda/ops_cuda.cpp` is the other side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..formats import BLOCKS, TWO_FOUR_BLOCKS, PackedWeight, from_tensors, tap_phases, validate
from .backend import LIBRARY, extension_error

Pair = tuple[int, int]
Kind = Literal["linear", "conv2d", "conv_transpose2d"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (8, 0)  # compute capability

SCHEMAS = (
    "quantize_pack(Tensor x, ScalarType dtype, int pitch, float scale, int zero) -> Tensor",
    "gather_gemm(Tensor x, int in_channels, Tensor[] weight, bool transposed, int[] window, "
    "str activation, float slope, Tensor? residual, float residual_scale, int residual_zero, "
    "str post_activation, float post_slope, ScalarType dtype, int pitch, float y_scale, int y_zero) -> Tensor",
    "group_norm_act(Tensor x, int channels, int groups, float eps, Tensor? weight, Tensor? bias, float x_scale, int x_zero, "
    "str activation, float slope, ScalarType dtype, int pitch, float y_scale, int y_zero) -> Tensor",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)


@torch.library.register_fake("sparsegan::quantize_pack")
def _fake_quantize_pack(x: Tensor, dtype: torch.dtype, pitch: int, scale: float, zero: int) -> Tensor:
    height, width = x.shape[2:] if x.dim() == 4 else (1, 1)
    return x.new_empty((x.shape[0], height, width, pitch), dtype=dtype)


@torch.library.register_fake("sparsegan::gather_gemm")
def _fake_gather_gemm(
    x: Tensor,
    in_channels: int,
    weight: list[Tensor],
    transposed: bool,
    window: list[int],
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
    size = []
    for axis in (0, 1):
        kernel, stride, padding, extra, dilation = window[axis::2]
        reach = dilation * (kernel - 1) + 1
        if transposed:
            size.append((x.shape[1 + axis] - 1) * stride - 2 * padding + reach + extra)
        else:
            size.append((x.shape[1 + axis] + 2 * padding - reach) // stride + 1)
    return x.new_empty((x.shape[0], *size, pitch), dtype=dtype)


@torch.library.register_fake("sparsegan::group_norm_act")
def _fake_group_norm_act(
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
    return x.new_empty((*x.shape[:3], pitch), dtype=dtype)


def architectures() -> list[str]:
    """What the kernels were compiled for, such as "80", "90"; empty where the extension has no CUDA kernels."""
    return [] if extension_error() else torch.ops.sparsegan.cuda_architectures().split()


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compiler.assume_constant_result does, without the import of the compiler, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def unavailable() -> str | None:
    """Why no CUDA kernel can run in this process, or None."""
    return extension_error() or _no_device()


@cache
def _no_device() -> str | None:
    if error := torch.ops.sparsegan.cuda_error():
        return error
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None


def devices() -> list[str]:
    """The CUDA devices that torch sees, for people."""
    if unavailable():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors"
        + ("" if (p.major, p.minor) >= OLDEST else ": too old, the kernels need 8.0")
        for p in found
    ]


def refuse_cuda(x: Tensor, weight: PackedWeight | None) -> str | None:
    """Why the CUDA kernels cannot take x and the weight, or None."""
    if reason := unavailable():
        return reason
    if x.device.type != "cuda":
        return f"x is on {x.device}, the kernels run on CUDA devices"
    if reason := _too_old(x.device.index or 0):
        return reason
    return None if weight is None else refuse_weight(weight, x)


@_constant
def _too_old(index: int) -> str | None:
    if (capability := torch.cuda.get_device_capability(index)) >= OLDEST:
        return None
    return (
        f"cuda:{index} has compute capability {'.'.join(map(str, capability))}, the kernels need 8.0 or later"
    )


def refuse_weight(weight: PackedWeight, x: Tensor | None = None) -> str | None:
    """Why the CUDA kernels do not take such a weight, wherever it is, or not together with x; or None."""
    if x is not None and weight.values.device != x.device:
        return f"x is on {x.device}, the weight on {weight.values.device}"
    return refuse_block(weight.values.dtype, weight.block, weight.metadata is not None)


def refuse_block(dtype: torch.dtype, block: Pair, two_four: bool = False) -> str | None:
    """Why the CUDA kernels do not take weights of such blocks, or None."""
    table = TWO_FOUR_BLOCKS if two_four else BLOCKS["cuda"]
    if dtype not in table:
        return f"the weight is {_name(dtype)}, the kernels take {', '.join(map(_name, table))}"
    if block not in table[dtype]:
        known = ", ".join(f"{bo}x{bk}" for bo, bk in table[dtype])
        kind = "2:4 blocks" if two_four else "blocks"
        return (
            f"the weight has {_name(dtype)} {kind} of {block[0]}x{block[1]}, none of {known}: "
            f"prune with pattern_for('cuda', {dtype})"
        )
    return None


def phase_taps(kind: Kind, geometry: Mapping[str, Pair]) -> list[int]:
    """How many taps each output phase sums, in packed order; only transposed convolutions have more than one phase."""
    if kind != "conv_transpose2d":
        return [math.prod(geometry.get("kernel_size", (1, 1)))]
    names = ("kernel_size", "stride", "padding", "dilation")
    phases = tap_phases(*(geometry.get(name, (0, 0) if name == "padding" else (1, 1)) for name in names))
    return [phases.count(i) for i in range(math.prod(geometry.get("stride", (1, 1))))]


def validated(weight: PackedWeight, taps: Sequence[int], x_zero: int) -> PackedWeight:
    """The weight, checked (`formats.validate`), with the constants that the kernels want beside it:

    zero_sums: int32 [phases, O], x_zero times the sum of the weights over the taps of each phase; int8 only, else [0].
    pad:       [ceil(C / BK) * BK] of what x is packed to: a pixel of what stands around an image, x_zero or 0. Its length
               tells the op how many channels x must have.

    taps: see `phase_taps`. Waits for the device, so that it is done once and not in each call.
    """
    validate(weight)
    return with_constants(weight, taps, x_zero)


def with_constants(weight: PackedWeight, taps: Sequence[int], x_zero: int) -> PackedWeight:
    """As `validated`, but nothing is checked: for fake tensors, which hold no numbers and which no kernel reads."""
    values, (_, bk) = weight.values, weight.block
    pixel = -(-weight.in_channels // bk) * bk
    if values.dtype == torch.int8:
        sums = [part.sum(1) for part in weight.tap_sums.split(list(taps), 1)]
        zero_sums = (torch.stack(sums) * x_zero).to(torch.int32)
        pad = torch.full((pixel,), x_zero, dtype=torch.uint8, device=values.device)
    else:
        zero_sums = torch.zeros(0, dtype=torch.int32, device=values.device)
        pad = torch.zeros(pixel, dtype=values.dtype, device=values.device)
    return replace(weight, constants=(zero_sums, pad))


def on_cuda(kind: Kind, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer op for `Backend.run`: it validates a weight that does not come validated."""
    names = {
        "linear": (),
        "conv2d": ("kernel_size", "stride", "padding", "dilation"),
        "conv_transpose2d": ("kernel_size", "stride", "padding", "output_padding", "dilation"),
    }[kind]

    def run(x: Tensor, weight: list[Tensor], *rest: Any) -> Tensor:
        if len(weight) < 9:  # no constants
            taps = phase_taps(kind, dict(zip(names, rest, strict=False)))
            packed = from_tensors(weight, x.shape[1], sum(taps))
            weight = validated(packed, taps, x_zero=rest[-3]).tensors()
        return op(x, weight, *rest)

    return run


@dataclass(frozen=True)
class Map:
    """Packed activations.

    data:        [N, H, W, pitch], contiguous, uint8, float16, bfloat16 or float32; pitch >= channels.
    scale, zero: of uint8, a value is (q - zero) * scale.
    """

    data: Tensor
    channels: int
    scale: float = 1.0
    zero: int = 0

    def dense(self) -> Tensor:
        """The values, [N, C, H, W]: float32 of uint8, else of the same number format, sharing memory."""
        values = self.data[..., : self.channels].permute(0, 3, 1, 2)
        if values.dtype != torch.uint8:
            return values
        return (values.to(torch.int32) - self.zero).float() * self.scale


@dataclass(frozen=True)
class Numbers:
    """Of a map to be made: dtype and, of uint8, what its steps stand for. multiple: of channels in a pixel, at least
    the BK of the blocks that read it."""

    dtype: torch.dtype
    scale: float = 1.0
    zero: int = 0
    multiple: int = 64

    def pitch(self, channels: int) -> int:
        return -(-channels // self.multiple) * self.multiple


def quantize_pack(x: Tensor, numbers: Numbers, library: Any = torch.ops.sparsegan) -> Map:
    """x [N, C, H, W] or [N, C] (H = W = 1) of any strides, float32, float16 or bfloat16, as a map of these numbers.

    library: where the kernels are. Raises RuntimeError for what they do not take, as the other two do.
    """
    pitch = numbers.pitch(x.shape[1])
    data = library.quantize_pack(x, numbers.dtype, pitch, numbers.scale, numbers.zero)
    return Map(data, x.shape[1], numbers.scale, numbers.zero)


def gather_gemm(
    x: Map,
    weight: PackedWeight,
    kind: Kind,
    geometry: Mapping[str, Pair],
    numbers: Numbers,
    *,
    activation: str = "none",
    slope: float = 0.0,
    residual: Map | None = None,
    post_activation: str = "none",
    post_slope: float = 0.0,
    library: Any = torch.ops.sparsegan,
) -> Map:
    """post_activation(activation(layer(x)) + residual), stored in `numbers`.

    x: of uint8 for int8 weights, else of the weight's number format. weight: `validated` for this kind, geometry and
    x.zero; its scale holds x.scale. geometry: as the layer op has it. residual: of the shape of the result.
    """
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation")
    window = [n for name in names for n in geometry.get(name, (0, 0) if "padding" in name else (1, 1))]
    held = residual or Map(x.data, 0)
    data = library.gather_gemm(
        x.data,
        x.channels,
        weight.tensors(),
        kind == "conv_transpose2d",
        window,
        activation,
        slope,
        residual.data if residual else None,
        held.scale,
        held.zero,
        post_activation,
        post_slope,
        numbers.dtype,
        numbers.pitch(weight.out_channels),
        numbers.scale,
        numbers.zero,
    )
    return Map(data, weight.out_channels, numbers.scale, numbers.zero)


def group_norm_act(
    x: Map,
    groups: int,
    numbers: Numbers,
    *,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    library: Any = torch.ops.sparsegan,
) -> Map:
    """activation(group_norm(x) * weight + bias), stored in `numbers`; instance norm has as many groups as channels.

    weight, bias: float32 [C] or None: 1 and 0.
    """
    data = library.group_norm_act(
        x.data,
        x.channels,
        groups,
        eps,
        weight,
        bias,
        x.scale,
        x.zero,
        activation,
        slope,
        numbers.dtype,
        numbers.pitch(x.channels),
        numbers.scale,
        numbers.zero,
    )
    return Map(data, x.channels, numbers.scale, numbers.zero)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
