"""Layers that compute with a packed weight: drop-in, for inference.

Each holds plain buffers (the tensors of a `formats.PackedWeight`), so that state_dict, copies and
torch.compile treat it like any module. Batch normalisation belongs folded into the weight before (`fuse.py`);
the activation that follows is part of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily

from sparsegan import formats, ops
from sparsegan.formats import FIELDS, PackedWeight
from sparsegan.ops.program import Engine, Program, with_tensors
from sparsegan.ops.program import tensors as program_tensors
from sparsegan.patterns import (
    PRUNABLE_TYPES,
    NMPattern,
    PrunableLayer,
    detect_pattern,
    pattern_for,
    weight_view,
)
from sparsegan.quantize import activation_params, quantize_weight

Pair = tuple[int, int]

# No real layer has a kernel, stride or padding this large; the bound keeps all coordinates far from overflow.
_LARGEST_EXTENT = 65535

_MOST_TAPS, _MOST_PHASES = 128, 16  # of the CUDA kernels: csrc/cuda/launch.h

# A weight is packed anew for the blocks of another device unless that makes it this many times as dense.
_MOST_DENSER = 1.25


def unsupported_reason(layer: nn.Module) -> str | None:
    """Why `layer` has no sparse counterpart, for the user to read; None when it has one."""
    if not isinstance(layer, PRUNABLE_TYPES):
        return f"{type(layer).__name__} is not Linear, Conv2d or ConvTranspose2d"
    device = layer.weight.device
    dtypes = ops.cuda.FLOATS if device.type == "cuda" else (torch.float32,)
    if layer.weight.dtype not in dtypes:
        return f"weights are {layer.weight.dtype}, the kernels take {' or '.join(map(str, dtypes))}"
    if device.type not in formats.BLOCKS:
        return f"weights are on {device}, the kernels run on the CPU and on CUDA devices"
    if layer.weight.numel() == 0:
        return "it has no weights"
    if not isinstance(layer, nn.Linear):
        if layer.padding_mode != "zeros":
            return f"padding_mode {layer.padding_mode!r} is not 'zeros'"
        if layer.padding == "same" and any(d * (k - 1) % 2 for d, k in _extents(layer)):
            return "padding 'same' pads one side more than the other"
        if device.type == "cuda" and math.prod(layer.kernel_size) > _MOST_TAPS:
            return f"a kernel of {layer.kernel_size} has more than {_MOST_TAPS} positions"
        if device.type == "cuda" and layer.transposed and math.prod(layer.stride) > _MOST_PHASES:
            return f"a stride of {layer.stride} gives more than {_MOST_PHASES} output phases"
    if not weight_view(layer).isfinite().all():
        return "the weight holds NaN or infinite values"
    if layer.bias is not None and not layer.bias.isfinite().all():
        return "the bias holds NaN or infinite values"
    return None


def pack_weight(
    view: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    block: Pair | None = None,
    x_scale: float = 1.0,
    order: Sequence[int] | None = None,
    groups: int = 1,
    device: str = "cpu",
    weight_bits: int = 8,
) -> PackedWeight:
    """Pack a dense weight [O, T, C / groups], taps in raster order, quantised first if dtype is torch.int8.

    bias: [O] or None. x_scale: int8 only, of the input. order: raster indices of the taps in packed order
    (`formats.tap_order`), for a transposed convolution. weight_bits: int8 only, see `quantize_weight`. block, groups, device,
    errors: see `formats.pack`.
    """
    scale = None
    if dtype == torch.int8:
        view, scale = quantize_weight(view, weight_bits)
        scale *= x_scale
    view = view if order is None else view[:, order]
    return _best_packed(view, dtype, block, scale, bias, groups, device)


def _best_packed(
    view: Tensor,
    dtype: torch.dtype,
    block: Pair | None,
    scale: Tensor | None,
    bias: Tensor | None,
    groups: int,
    device: str,
) -> PackedWeight:
    """As `formats.pack`; on CUDA as a 2:4 weight, where its zeros allow that and it leaves out more."""
    packed = formats.pack(view, dtype, block, scale, bias, groups, device)
    if device == "cuda" and block is None and NMPattern(2, 4).respected_by(formats.unpack(packed) != 0):
        halved = formats.pack_two_four(view, dtype, None, scale, bias, groups)
        packed = min(packed, halved, key=formats.density)
    return packed


class _Packed(nn.Module):
    """A module whose buffers keep their number format: .half() on a whole model moves them, but must not round them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self


class SparseLayer(_Packed):
    """What the three layers have in common; use those.

    packed:      the weight.
    geometry:    one (height, width) pair for every name in GEOMETRY.
    groups, pattern: of the dense layer, only for display: the packed weight has groups expanded.
    x_scale, x_zero: int8 only; u8 input q stands for (q - x_zero) * x_scale.
    activation:  one of ops.ACTIVATIONS; slope is that of "leaky_relu".
    backend:     name of a backend; None takes the first that can.

    Raises ValueError when these do not fit together.
    """

    GEOMETRY: ClassVar[tuple[str, ...]] = ()
    KIND: ClassVar[Literal["linear", "conv2d", "conv_transpose2d"]]
    DENSE: ClassVar[type[PrunableLayer]]
    _OP: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        packed: PackedWeight,
        *,
        groups: int = 1,
        pattern: str = "dense",
        x_scale: float = 1.0,
        x_zero: int = 0,
        activation: str = "none",
        slope: float = 0.0,
        backend: str | None = None,
        **geometry: Pair,
    ) -> None:
        super().__init__()
        _check_settings(packed, groups, x_scale, x_zero, activation, slope)
        _check_geometry(type(self).__name__, self.GEOMETRY, geometry, packed.taps)
        for field in (*FIELDS, "metadata"):
            self.register_buffer(field, getattr(packed, field))
        self.in_channels = packed.in_channels
        self.out_channels = packed.out_channels
        self.taps = packed.taps
        self.geometry = {name: (geometry[name][0], geometry[name][1]) for name in self.GEOMETRY}
        self.groups = groups
        self.pattern = pattern
        self.x_scale = x_scale
        self.x_zero = x_zero
        self.activation = activation
        self.slope = slope
        self.backend = backend
        self._constants: tuple[Tensor, ...] = ()
        self._weight_changed()

    @classmethod
    def from_dense(
        cls,
        layer: PrunableLayer,
        *,
        dtype: torch.dtype = torch.float32,
        block: Pair | None = None,
        x_range: tuple[float, float] | None = None,
        weight_bits: int = 8,
        activation: str = "none",
        slope: float = 0.0,
        backend: str | None = None,
    ) -> Self:
        """The sparse counterpart of a dense layer: its zero blocks are left out.

        dtype:      torch.float32, torch.bfloat16 or torch.int8, of the weights as they are computed with.
        block:      (BO, BK) of the packed weight; None takes the one with the least work.
        x_range:    (lo, hi) of the values that enter the layer, from `quantize.calibrate`; needed for int8.
        weight_bits: 8, or 4 with int8: integers in -7..7, which the same kernels take and files hold in half the bytes.
        activation, slope, backend: see the class.

        Raises TypeError for a layer of another kind; ValueError for one that `unsupported_reason` names, int8
        without x_range, weight_bits that are not 8 or 4 or without int8, and what `formats.pack` refuses.
        """
        if not isinstance(layer, cls.DENSE):
            raise TypeError(f"{cls.__name__} replaces {cls.DENSE.__name__}, got {type(layer).__name__}")
        if reason := unsupported_reason(layer):
            raise ValueError(f"{cls.__name__} cannot replace {layer}: {reason}")
        view = weight_view(layer).detach().float()
        pattern = detect_pattern(view)
        geometry = {name: _geometry(layer, name) for name in cls.GEOMETRY}
        order = None
        if isinstance(layer, nn.ConvTranspose2d):
            names = ("kernel_size", "stride", "padding", "dilation")
            order = formats.tap_order(*(geometry[name] for name in names))
        x_scale, x_zero = 1.0, 0
        if dtype != torch.int8 and weight_bits != 8:
            raise ValueError(f"weight_bits={weight_bits} is for int8 layers, this one is to be {dtype}")
        if dtype == torch.int8:
            if x_range is None:
                raise ValueError(
                    "an int8 layer needs x_range, the (lo, hi) of its input: see quantize.calibrate"
                )
            x_scale, x_zero = activation_params(*x_range)
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        device = layer.weight.device
        return cls(
            pack_weight(view, layer.bias, dtype, block, x_scale, order, groups, device.type, weight_bits),
            groups=groups,
            pattern=str(pattern or "dense"),
            x_scale=x_scale,
            x_zero=x_zero,
            activation=activation,
            slope=slope,
            backend=backend,
            **geometry,
        ).to(device)

    @property
    def packed(self) -> PackedWeight:
        """The weight as the ops take it; shares the buffers."""
        # Straight from the dict: nn.Module's attribute look-up costs microseconds, which small layers notice.
        tensors = cast(dict[str, Tensor], self._buffers)
        weight = {field: tensors[field] for field in FIELDS}
        return PackedWeight(
            **weight,
            in_channels=self.in_channels,
            taps=self.taps,
            metadata=tensors["metadata"],
            constants=self._constants,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return cast(Tensor, self.values).dtype

    @property
    def density(self) -> float:
        """Share of the dense layer's multiply-adds that is executed."""
        return min(1.0, formats.density(self.packed) * self.groups)

    def repack(self, device: str) -> None:
        """Pack the weight anew in blocks that the kernels of `device` ("cpu" or "cuda") take, if it is not; it stays where it is.

        `to` does it by itself. Raises ValueError for a number format that the CUDA kernels do not take, and where they
        would execute much more of the dense layer than is executed now, because its zeros are finer than their blocks.
        """
        packed = self.packed
        blocks = formats.blocks_for(device, self.dtype)
        refused = ops.cuda.refuse_weight(packed)
        if refused is None if device == "cuda" else packed.metadata is None and packed.block in blocks:
            return
        if not blocks:
            raise ValueError(refused)
        new = _best_packed(
            formats.unpack(packed).cpu(), self.dtype, None, packed.scale, packed.bias, 1, device
        )
        now, then = formats.density(packed), formats.density(new)
        if device == "cuda" and then > _MOST_DENSER * now:
            raise ValueError(
                f"its zeros, pattern {self.pattern}, do not fill blocks of the CUDA kernels: {then:.0%} of the dense layer "
                f"would be executed in place of {now:.0%}; prune with pattern_for('cuda', {self.dtype}), "
                f"{pattern_for(device, self.dtype)}"
            )
        for field in (*FIELDS, "metadata"):
            tensor = getattr(new, field)
            setattr(self, field, None if tensor is None else tensor.to(packed.values.device))
        self._weight_changed()

    def _weight_changed(self) -> None:
        """Make again what the CUDA kernels derive from the weight."""
        packed = self.packed
        if packed.values.is_cuda and not ops.cuda.refuse_weight(packed):
            taps = ops.cuda.phase_taps(self.KIND, self.geometry)
            make = ops.cuda.with_constants if is_fake(packed.values) else ops.cuda.validated
            self._constants = make(packed, taps, self.x_zero).constants
        else:
            self._constants = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = cast(Tensor, self.bias)
        before, now = bias.device.type, fn(bias).device.type
        if now != before and {now, before} <= set(formats.BLOCKS) and not is_fake(bias):
            # Before the move, which makes fake tensors under a FakeTensorMode: those hold no numbers to pack.
            with unset_fake_temporarily(), suppress(ValueError):  # the call then says what does not fit
                self.repack(now)
        super()._apply(fn, recurse)
        self._weight_changed()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._weight_changed()

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that, with `packed`, make this layer again, except the backend."""
        names = ("groups", "pattern", "x_scale", "x_zero", "activation", "slope")
        return {name: getattr(self, name) for name in names} | self.geometry

    def forward(self, x: Tensor) -> Tensor:
        """x: as the dense layer takes it, float32; on CUDA float16 and bfloat16 too, and the result is of that type.

        Raises RuntimeError when x requires a gradient.
        """
        _check_inference(self, x)
        if self.GEOMETRY and x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return self._OP(
            x,
            self.packed,
            **self.geometry,
            x_scale=self.x_scale,
            x_zero=self.x_zero,
            activation=self.activation,
            slope=self.slope,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}"]
        parts += [f"{name}={pair}" for name, pair in self.geometry.items()]
        parts += [f"groups={self.groups}"] * (self.groups > 1)
        parts += [f"pattern={self.pattern}, density={self.density:.2f}"]
        parts += [f"dtype={str(self.dtype).removeprefix('torch.')}"]
        parts += [f"activation={self.activation}"] * (self.activation != "none")
        return ", ".join(parts)


class SparseLinear(SparseLayer):
    """nn.Linear with a packed weight: x [..., C] to [..., O]."""

    KIND = "linear"
    DENSE = nn.Linear
    _OP = staticmethod(ops.block_linear)


class SparseConv2d(SparseLayer):
    """nn.Conv2d with a packed weight: x [N, C, H, W] or [C, H, W]."""

    KIND = "conv2d"
    DENSE = nn.Conv2d
    _OP = staticmethod(ops.block_conv2d)
    GEOMETRY = ("kernel_size", "stride", "padding", "dilation")


class SparseConvTranspose2d(SparseLayer):
    """nn.ConvTranspose2d with a packed weight: x [N, C, H, W] or [C, H, W]. It takes no output_size."""

    KIND = "conv_transpose2d"
    DENSE = nn.ConvTranspose2d
    _OP = staticmethod(ops.block_conv_transpose2d)
    GEOMETRY = ("kernel_size", "stride", "padding", "output_padding", "dilation")


class SparseProgram(_Packed):
    """Steps of a generator that run in one native call (`ops.program`); made by `graph.lower`.

    The tensors of the program are buffers, named as `program.tensors` names them. Raises ValueError for a
    program that `program.validate` refuses.
    """

    def __init__(self, program: Program, backend: str | None = None) -> None:
        super().__init__()
        for name, tensor in program_tensors(program).items():
            self.register_buffer(name, tensor)
        self._engine = Engine(program, backend)

    @property
    def program(self) -> Program:
        """The program as the buffers have it now."""
        return self._engine.program

    @property
    def backend(self) -> str | None:
        """Name of the backend that runs it; None takes the first that can."""
        return self._engine.backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self._engine = Engine(self.program, name)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: float32 [N, C, H, W] or [N, C], as the program takes them. Returns its outputs, float32.

        Raises RuntimeError when an input requires a gradient, ValueError or RuntimeError for inputs that do not fit.
        """
        for x in inputs:
            _check_inference(self, x)
        return tuple(self._engine.run(inputs))

    def bytes(self, *inputs: Tensor) -> int:
        """Bytes that activations take between steps, at their peak, for such inputs; 0 on the reference backend."""
        return self._engine.bytes(inputs)

    def _tensors_changed(self) -> None:
        self._engine = Engine(
            with_tensors(self.program, cast(dict[str, Tensor], self._buffers)), self.backend
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._tensors_changed()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._tensors_changed()

    def extra_repr(self) -> str:
        program = self.program
        layers = sum(step.weight is not None for step in program.steps)
        steps = f"{len(program.steps)} steps ({layers} layers)"
        return f"{program.inputs} inputs, {steps}, {program.outputs} outputs"


SPARSE_TYPES: dict[type[PrunableLayer], type[SparseLayer]] = {
    layer.DENSE: layer for layer in (SparseLinear, SparseConv2d, SparseConvTranspose2d)
}


def _extents(layer: nn.Conv2d | nn.ConvTranspose2d) -> list[Pair]:
    """(dilation, kernel size) for height and width."""
    return list(zip(layer.dilation, layer.kernel_size, strict=True))


def _geometry(layer: PrunableLayer, name: str) -> Pair:
    pair = getattr(layer, name)
    if pair == "valid":
        return 0, 0
    if pair == "same":
        (dh, kh), (dw, kw) = _extents(cast(nn.Conv2d, layer))
        return dh * (kh - 1) // 2, dw * (kw - 1) // 2
    return pair[0], pair[1]


def _check_inference(module: nn.Module, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(module).__name__} is for inference and has no gradient, but its input requires one: "
            "call the model under torch.no_grad(), and train the dense model instead"
        )


def _check_settings(
    packed: PackedWeight, groups: int, x_scale: float, x_zero: int, activation: str, slope: float
) -> None:
    if groups < 1 or packed.out_channels % groups or packed.in_channels % groups:
        channels = f"{packed.in_channels} input and {packed.out_channels} output channels"
        raise ValueError(f"groups must divide the {channels}, got {groups}")
    # The kernels multiply by the reciprocal, in float32.
    if not (math.isfinite(x_scale) and x_scale > 0 and 1 / x_scale <= torch.finfo(torch.float32).max):
        raise ValueError(f"x_scale must be a positive float32 number, got {x_scale}")
    if not 0 <= x_zero <= 255:
        raise ValueError(f"x_zero must be a u8 value, 0..255, got {x_zero}")
    if activation not in ops.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ops.ACTIVATIONS)}, got {activation!r}")
    if not math.isfinite(slope):
        raise ValueError(f"slope must be finite, got {slope}")


def _check_geometry(layer: str, names: tuple[str, ...], geometry: dict[str, Pair], taps: int) -> None:
    if set(geometry) != set(names):
        wanted = ", ".join(names) or "no geometry"
        raise ValueError(f"{layer} takes {wanted}, got {', '.join(geometry) or 'none'}")
    for name, pair in geometry.items():
        least = 0 if "padding" in name else 1
        if len(pair) != 2 or not all(type(n) is int and least <= n <= _LARGEST_EXTENT for n in pair):
            raise ValueError(f"{name} must be two whole numbers in {least}..{_LARGEST_EXTENT}, got {pair}")
    if "output_padding" in geometry:
        steps = zip(geometry["output_padding"], geometry["stride"], geometry["dilation"], strict=True)
        if any(extra >= max(stride, dilation) for extra, stride, dilation in steps):
            raise ValueError("output_padding must be smaller than the stride or the dilation")
    if taps != math.prod(geometry.get("kernel_size", (1, 1))):
        raise ValueError(
            f"the packed weight has {taps} taps, kernel_size is {geometry.get('kernel_size', (1, 1))}"
        )
