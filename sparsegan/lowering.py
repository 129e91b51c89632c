"""From a region of a model's graph to a `Program`: what is fused into which step, and which slots there are.

A region is a list of *operations* on maps [N, C, H, W], in order, each with the names of what it reads. It is
gone through once; every name becomes a `Value`, which says how to get it: from a step (a `_Draft`) through what its
store can still do (affine, activation, modulation). An operation is absorbed by the step before it if nothing
else reads that, or by the store, or it begins a new step. Nearest upsampling waits as long as it can: pointwise
operations and 1x1 convolutions commute with it, other convolutions are merged with it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsegan.formats import PackedWeight, tap_order
from sparsegan.layers import pack_weight
from sparsegan.ops.program import (
    MAX_STORES,
    Act,
    Affine,
    Norm,
    PaddingMode,
    Pair,
    Program,
    Slot,
    SlotFormat,
    Step,
    Store,
)
from sparsegan.quantize import activation_params

# "int4": int8 with weights of 4 bits, in -7..7.
NumberFormat = Literal["int8", "int4", "bf16", "f32"]
DTYPES = {"int8": torch.int8, "int4": torch.int8, "bf16": torch.bfloat16, "f32": torch.float32}
_SLOTS: dict[NumberFormat, SlotFormat] = {"int8": "u8", "int4": "u8", "bf16": "bf16", "f32": "f32"}
_ALIGNMENT = {"u8": 4, "bf16": 2, "f32": 1}
_NONE = Act()
# Packed weights, for inputs of scale 1, by what they were made from: layer, number format, digest of weight, bias and window.
PackedBefore: TypeAlias = dict[tuple[str, str, bytes], PackedWeight]


class RefusedError(ValueError):
    """`operation` cannot be part of a program; `reason` says why, for people."""

    def __init__(self, operation: str, reason: str) -> None:
        super().__init__(f"{operation}: {reason}")
        self.operation, self.reason = operation, reason


@dataclass(frozen=True, eq=False, kw_only=True)
class Operation:
    """name: of the value it computes; operands: names of what it reads; layer: path of the module it is from."""

    name: str
    operands: tuple[str, ...]
    layer: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Gemm(Operation):
    """weight: [O, T, C / groups], taps in raster order; bias: [O]."""

    kind: Literal["linear", "conv2d", "conv_transpose2d"]
    weight: Tensor
    bias: Tensor
    groups: int = 1
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(Operation):
    """x * scale + bias; float64 [C] or [1]."""

    scale: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Activation(Operation):
    act: Act


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Operation):
    """The second operand may have one channel; `constant` says that it has one image for all."""

    constant: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Operation):
    """Along the channels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Upsample(Operation):
    """Nearest, by a whole factor."""

    factor: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Shuffle(Operation):
    """Pixel shuffle."""

    factor: int


@dataclass(frozen=True, eq=False, kw_only=True)
class View(Operation):
    """The elements as [N, *view]; None: the same map, whatever torch calls its shape."""

    view: tuple[int, int, int] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Pad(Operation):
    """The same on both sides; read by convolutions only."""

    mode: PaddingMode
    padding: Pair


@dataclass(frozen=True, eq=False, kw_only=True)
class Normalise(Operation):
    """Group normalisation; weight, bias: [C]."""

    groups: int
    eps: float
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Modulate(Operation):
    """The first operand times the second, an input of the region [N, C], channel by channel."""


@dataclass(eq=False)
class _Draft:
    """A step that is being put together; its fields are those of `Step`. x: a str is an input of the region."""

    x: Value | str
    channels: int
    name: str
    gemm: Gemm | None = None
    view: tuple[int, int, int] | None = None
    upsample: int = 1
    shuffle: int = 1
    norm: Normalise | None = None
    demodulation: str | None = None
    act: Act = _NONE
    residual: Value | None = None
    residual_upsample: int = 1
    post_act: Act = _NONE
    stats: bool = False

    @property
    def untouched_input(self) -> str | None:
        """The input of the region that this step only hands on, if it is one."""
        plain = self.act == self.post_act == _NONE and self.residual is None and self.view is None
        whole = plain and self.upsample == self.shuffle == 1
        return self.x if whole and isinstance(self.x, str) else None

    @property
    def direct_input(self) -> str | None:
        """The input of the region that this step reads without a slot between."""
        if isinstance(self.x, str):
            return self.x
        return None if self.gemm or self.norm else self.x.untouched_input

    @property
    def reads(self) -> list[Value]:
        """What this step reads from slots."""
        values = [] if self.direct_input is not None else [self.x]
        if self.residual is not None and self.residual.untouched_input is None:
            values.append(self.residual)
        return [value for value in values if isinstance(value, Value)]

    def absorb_scale(self, scale: Tensor, bias: Tensor) -> bool:
        """Take over x * scale + bias after all that this step does, if its weight or normalisation can."""
        source = self.gemm or self.norm
        if source is None or self.post_act != _NONE:
            return False
        if self.act != _NONE:
            # Rectifiers commute with positive factors.
            rectifier = self.act.name in ("relu", "leaky_relu") and self.residual is None
            if not (rectifier and bool((scale > 0).all()) and not bias.any()):
                return False
        if self.residual is not None and bool((scale != 1).any()):
            return False
        shift = source.bias.double() * scale + bias
        if self.gemm is not None:
            weight = self.gemm.weight.double() * scale[:, None, None]
            self.gemm = replace(self.gemm, weight=weight, bias=shift)
        elif self.norm is not None:
            self.norm = replace(self.norm, weight=self.norm.weight.double() * scale, bias=shift)
        return True

    def absorb_act(self, act: Act) -> bool:
        if self.post_act != _NONE:
            return False
        if self.act == _NONE and self.residual is None:
            self.act = act
        else:
            self.post_act = act
        return True

    def absorb_demodulation(self, name: str) -> bool:
        bare = self.act == self.post_act == _NONE and self.residual is None and self.demodulation is None
        if self.gemm is None or not bare or bool(self.gemm.bias.any()):
            return False
        self.demodulation = name
        return True


@dataclass(frozen=True, eq=False)
class _Part:
    """What a store makes of the result of a step; affine: float64 scale and bias [C]."""

    draft: _Draft
    affine: tuple[Tensor, Tensor] | None = None
    act: Act = _NONE
    modulation: str | None = None

    @property
    def bare(self) -> bool:
        return self.affine is None and self.act == _NONE and self.modulation is None

    def scaled(self, scale: Tensor, bias: Tensor) -> _Part:
        if self.affine is None:
            return replace(self, affine=(scale, bias))
        before_scale, before_bias = self.affine
        return replace(self, affine=(before_scale * scale, before_bias * scale + bias))


@dataclass(frozen=True, eq=False)
class Value:
    """How to get what an operation computes.

    parts:  side by side along the channels.
    name:   of the value whose calibrated range this has.
    shared: something else reads the step as it is, so that nothing more may be absorbed by it.
    up:     nearest upsampling that is still to be done. pad: what the convolution that reads it has to pad.
    """

    parts: tuple[_Part, ...]
    name: str
    shared: bool
    up: int = 1
    pad: Pad | None = None

    @property
    def channels(self) -> int:
        return sum(part.draft.channels for part in self.parts)

    @property
    def starts(self) -> list[int]:
        """First channel of each part."""
        return list(accumulate((part.draft.channels for part in self.parts[:-1]), initial=0))

    @property
    def bare(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].bare

    @property
    def host(self) -> _Draft | None:
        """The step that may absorb what comes next."""
        return self.parts[0].draft if self.bare and not self.shared and self.pad is None else None

    @property
    def untouched_input(self) -> str | None:
        return self.parts[0].draft.untouched_input if self.bare and self.up == 1 else None

    def aligned(self, format: SlotFormat) -> bool:
        return all(start % _ALIGNMENT[format] == 0 for start in self.starts)


class Lowering:
    """A region, fused into steps; `program` packs the weights and lays out the slots.

    operations: in order. inputs: channels of every region input by name. outputs: names of values, and whether
    the output is [N, C] instead of [N, C, H, W]. format_of: number format of a layer.
    Raises RefusedError for an operation that must stay outside.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        inputs: Mapping[str, int],
        outputs: Sequence[tuple[str, bool]],
        format_of: Callable[[str], NumberFormat],
    ) -> None:
        self._format_of = format_of
        self._readers = Counter(operand for operation in operations for operand in operation.operands)
        self._readers.update(name for name, _ in outputs)
        self._values = {
            name: Value((_Part(_Draft(name, channels, name)),), name, self._readers[name] > 1)
            for name, channels in inputs.items()
        }
        self._outputs = outputs
        for operation in operations:
            operands = [self._values[name] for name in operation.operands]
            if any(value.pad for value in operands) and not isinstance(operation, Gemm):
                raise RefusedError(operation.name, "padding is part of a convolution only")
            self._values[operation.name] = self._lower(operation, *operands)
        self._results = [self._single(self._upsampled(self._values[name])) for name, _ in outputs]

    def program(
        self,
        ranges: Mapping[str, tuple[float, float]],
        residual: Literal["bf16", "u8"],
        packed: PackedBefore | None = None,
    ) -> tuple[Program, list[str]]:
        """The program, and the names of its inputs in order.

        ranges: (lo, hi) of what int8 layers read, by value name. residual: format in which int8 programs keep
        what is added later; "u8" takes the slot of a convolution that reads the same value, if there is one.
        packed: weights that need not be packed again; new ones are added.
        Raises RefusedError for a weight that cannot be packed, ValueError for a missing range.
        """
        rows = [rows for _, rows in self._outputs]
        packed = {} if packed is None else packed
        return _Layout(self._results, rows, self._format_of, ranges, residual, packed).build()

    def _lower(self, operation: Operation, x: Value, *others: Value) -> Value:
        name, shared = operation.name, self._readers[operation.name] > 1
        match operation:
            case Gemm():
                return self._gemm(operation, x, shared)
            case Scale():
                count = x.channels
                scaled = self._scale(x, operation.scale.expand(count), operation.bias.expand(count))
                return replace(scaled, name=name, shared=shared)
            case Activation():
                return replace(self._activate(x, operation.act), name=name, shared=shared)
            case Add():
                return replace(self._add(operation, x, *others), name=name, shared=shared)
            case Concat():
                values = [x, *others]
                if len({value.up for value in values}) > 1:
                    values = [self._upsampled(value) for value in values]
                parts = tuple(part for value in values for part in value.parts)
                return Value(parts, name, True, values[0].up)
            case Upsample():
                return replace(x, up=x.up * operation.factor, shared=x.shared or shared)
            case Shuffle():
                x = self._upsampled(x)
                draft = _Draft(
                    x, x.channels // operation.factor**2, operation.layer, shuffle=operation.factor
                )
                return Value((_Part(draft),), name, shared)
            case View():
                if operation.view is None:
                    return replace(x, shared=x.shared or shared)
                x = self._upsampled(x)
                draft = _Draft(x, operation.view[0], operation.layer, view=operation.view)
                return Value((_Part(draft),), name, shared)
            case Pad():
                return replace(x, pad=operation, shared=True)
            case Normalise():
                if not x.bare:
                    x = self._copied(x)
                x.parts[0].draft.stats = True
                draft = _Draft(replace(x, up=1), x.channels, operation.layer, norm=operation)
                return Value((_Part(draft),), name, shared, x.up)
            case Modulate():
                return replace(self._modulate(x, others[0], name), name=name, shared=shared)
        raise AssertionError(f"no rule for {type(operation).__name__}")

    def _gemm(self, gemm: Gemm, x: Value, shared: bool) -> Value:
        if x.pad is not None:
            gemm = replace(
                gemm, padding=(gemm.padding[0] + x.pad.padding[0], gemm.padding[1] + x.pad.padding[1])
            )
        zeros = x.pad is None or x.pad.mode == "zeros"
        point = gemm.kernel_size == (1, 1) and gemm.stride == (1, 1) and gemm.padding == (0, 0)
        up = 1
        if x.up > 1 and point and gemm.kind == "conv2d":
            up = x.up
        elif x.up > 1:
            merged = merge_upsampling(gemm, x.up) if zeros else None
            if merged is not None:
                gemm = merged
            else:
                x = replace(self._upsampled(replace(x, pad=None)), pad=x.pad)
        if not x.aligned(_SLOTS[self._format_of(gemm.layer)]):
            x = replace(self._copied(x), pad=x.pad)
        draft = _Draft(replace(x, up=1), gemm.weight.shape[0], gemm.layer, gemm)
        return Value((_Part(draft),), gemm.name, shared, up)

    def _scale(self, x: Value, scale: Tensor, bias: Tensor) -> Value:
        if x.host is not None and x.host.absorb_scale(scale, bias):
            return x
        if any(part.act != _NONE or part.modulation for part in x.parts):
            return self._scale(self._copied(x), scale, bias)
        ends = [*x.starts[1:], x.channels]
        spans = list(zip(x.starts, ends, strict=True))
        parts = (p.scaled(scale[a:b], bias[a:b]) for p, (a, b) in zip(x.parts, spans, strict=True))
        return replace(x, parts=tuple(parts))

    def _activate(self, x: Value, act: Act) -> Value:
        if x.host is not None and x.host.absorb_act(act):
            return x
        if any(part.act != _NONE or part.modulation for part in x.parts):
            return self._activate(self._copied(x), act)
        return replace(x, parts=tuple(replace(part, act=act) for part in x.parts))

    def _add(self, add: Add, x: Value, other: Value) -> Value:
        if add.constant and other.untouched_input is None:
            raise RefusedError(
                add.name, "what has one image for a whole batch is not an input of the program"
            )
        candidates = [(x, other)]
        if other.channels == x.channels and not add.constant:
            candidates.append((other, x))
        # The step of a weight first, then the one that is nearer: what it adds is usually there already.
        candidates.sort(key=lambda pair: pair[0].host is not None and pair[0].host.gemm is not None)
        for host, residual in reversed(candidates):
            if self._take_residual(host, residual):
                return host
        host = self._upsampled(x) if x.up > other.up else self._copied(x)
        if not self._take_residual(host, other):
            host = self._upsampled(host)
            taken = self._take_residual(host, self._upsampled(other))
            assert taken
        return host

    def _take_residual(self, host: Value, residual: Value) -> bool:
        draft = host.host
        factor = residual.up // host.up
        if draft is None or draft.residual is not None or draft.post_act != _NONE or factor not in (1, 2):
            return False
        draft.residual, draft.residual_upsample = replace(residual, up=1), factor
        return True

    def _modulate(self, x: Value, by: Value, name: str) -> Value:
        style = by.untouched_input
        if style is None:
            raise RefusedError(name, "what modulates it is not an input of the program")
        if x.host is not None and x.host.absorb_demodulation(style):
            return x
        if len(x.parts) > 1 or x.parts[0].modulation is not None:
            x = self._copied(x)
        return replace(x, parts=(replace(x.parts[0], modulation=style),))

    def _copied(self, x: Value) -> Value:
        """A step of its own for what the stores were to do."""
        draft = _Draft(replace(x, up=1), x.channels, x.parts[0].draft.name)
        return Value((_Part(draft),), x.name, False, x.up)

    def _upsampled(self, x: Value) -> Value:
        """A step that does the upsampling that was still to be done, if any."""
        if x.up == 1:
            return x
        draft = _Draft(replace(x, up=1), x.channels, x.parts[0].draft.name, upsample=x.up)
        return Value((_Part(draft),), x.name, False)

    def _single(self, x: Value) -> Value:
        return x if len(x.parts) == 1 else self._copied(x)


def merge_upsampling(gemm: Gemm, factor: int) -> Gemm | None:
    """Nearest upsampling followed by a convolution, as one transposed convolution; None where there is none.

    Upsampling by s spreads each pixel over s x s, which is a convolution with ones; so is a k x k convolution
    of stride 1 with the flipped kernel. Together: kernel flip(w) * ones, k + s - 1 taps wide, stride s,
    padding k - 1 - p. None also if the weight has so few blocks that merging, which joins neighbouring taps, makes more
    work than it saves.
    """
    (kh, kw), (ph, pw) = gemm.kernel_size, gemm.padding
    plain = gemm.kind == "conv2d" and gemm.stride == gemm.dilation == (1, 1)
    if not plain or ph > kh - 1 or pw > kw - 1:
        return None
    kernel = gemm.weight.double().transpose(1, 2).unflatten(2, (kh, kw))  # [O, C / groups, kh, kw]
    ones = torch.ones(1, 1, factor, factor, dtype=torch.float64)
    flat = kernel.flip(2, 3).flatten(0, 1)[:, None]
    spread = F.conv2d(flat, ones, padding=factor - 1).unflatten(0, kernel.shape[:2])[:, :, 0]
    merged = spread.flatten(2).transpose(1, 2).contiguous()
    # A tap of the merged kernel runs once for each small pixel, one of the plain kernel once for each large one.
    if _blocks(merged) > _blocks(gemm.weight) * factor**2:
        return None
    return replace(
        gemm,
        kind="conv_transpose2d",
        weight=merged,
        kernel_size=(kh + factor - 1, kw + factor - 1),
        stride=(factor, factor),
        padding=(kh - 1 - ph, kw - 1 - pw),
    )


def _blocks(view: Tensor) -> int:
    """Blocks of 8 x 4 channels that are not all zero."""
    padded = F.pad((view != 0).double(), (0, -view.shape[2] % 4, 0, 0, 0, -view.shape[0] % 8))
    return int((padded.unflatten(2, (-1, 4)).unflatten(0, (-1, 8)).sum((1, 4)) > 0).sum())


class _Layout:
    """Slots for what the steps read, and the program. Slots of convolutions come first: others may share them."""

    def __init__(
        self,
        results: Sequence[Value],
        rows: Sequence[bool],
        format_of: Callable[[str], NumberFormat],
        ranges: Mapping[str, tuple[float, float]],
        residual: Literal["bf16", "u8"],
        packed: PackedBefore,
    ) -> None:
        self._results, self._rows, self._packed = results, rows, packed
        self._format_of, self._ranges, self._residual = format_of, ranges, residual
        self._slots: list[Slot] = []
        self._stores: dict[_Draft, list[Store]] = defaultdict(list)
        self._windows: dict[tuple, int] = {}
        self._of_value: dict[tuple[_Part, ...], dict[SlotFormat, int]] = defaultdict(dict)
        self._inputs: dict[str, int] = {}
        self._order = _in_order(results)
        formats = {format_of(draft.gemm.layer) for draft in self._order if draft.gemm is not None}
        self._wide: SlotFormat = "f32" if formats <= {"f32"} else "bf16"

    def build(self) -> tuple[Program, list[str]]:
        read = {draft: self._gemm_slot(draft, draft.gemm) for draft in self._order if draft.gemm is not None}
        added: dict[_Draft, int] = {}
        for draft in self._order:
            if draft.gemm is None:
                read[draft] = self._pointwise_slot(draft)
            if draft.residual is not None:
                added[draft] = self._residual_slot(draft.residual)
        for k, value in enumerate(self._results):
            self._store(value, ~k)
        steps = [step for draft in self._order for step in self._steps(draft, read[draft], added.get(draft))]
        program = Program(
            tuple(self._slots), tuple(steps), len(self._inputs), len(self._results), tuple(self._rows)
        )
        return program, list(self._inputs)

    def _input(self, name: str) -> int:
        return self._inputs.setdefault(name, len(self._inputs))

    def _gemm_slot(self, draft: _Draft, gemm: Gemm) -> int:
        value = draft.x
        assert isinstance(value, Value)
        format, mode = _SLOTS[self._format_of(gemm.layer)], value.pad.mode if value.pad else "zeros"
        scale, zero = 1.0, 0
        if format == "u8":
            if value.name not in self._ranges:
                raise ValueError(
                    f"int8 layer {gemm.layer!r} reads {value.name!r}, of which no range is known"
                )
            scale, zero = activation_params(*self._ranges[value.name])
        window = (gemm.kind, gemm.kernel_size, gemm.stride, gemm.padding, gemm.output_padding, gemm.dilation)
        key = (value.parts, format, scale, zero, mode, *window)
        if key not in self._windows:
            self._windows[key] = self._new_slot(value, Slot(value.channels, format, scale, zero, mode))
        return self._windows[key]

    def _pointwise_slot(self, draft: _Draft) -> int:
        if draft.direct_input is not None:
            return ~self._input(draft.direct_input)
        assert isinstance(draft.x, Value)
        return self._wide_slot(draft.x, exact=draft.view is not None)

    def _residual_slot(self, value: Value) -> int:
        if value.untouched_input is not None:
            return ~self._input(value.untouched_input)
        if self._residual == "u8" and "u8" in self._of_value[value.parts]:
            return self._of_value[value.parts]["u8"]
        return self._wide_slot(value)

    def _wide_slot(self, value: Value, exact: bool = False) -> int:
        """A slot that holds more than 8 bits; exact: float32, as it also must be where lanes would be split."""
        wide: SlotFormat = "f32" if exact or not value.aligned(self._wide) else self._wide
        slots = self._of_value[value.parts]
        if "f32" in slots:
            return slots["f32"]
        return slots[wide] if wide in slots else self._new_slot(value, Slot(value.channels, wide))

    def _new_slot(self, value: Value, slot: Slot) -> int:
        self._slots.append(slot)
        index = len(self._slots) - 1
        self._of_value[value.parts].setdefault(slot.format, index)
        self._store(value, index)
        return index

    def _store(self, value: Value, slot: int) -> None:
        for part, start in zip(value.parts, value.starts, strict=True):
            affine = None
            if part.affine is not None:
                affine = Affine(*(tensor.float().contiguous() for tensor in part.affine))
            modulation = None if part.modulation is None else self._input(part.modulation)
            self._stores[part.draft].append(Store(slot, start, affine, part.act, modulation))

    def _steps(self, draft: _Draft, x: int, residual: int | None) -> list[Step]:
        """The step of a draft; a pointwise one is done again for what it cannot store at once."""
        stores = self._stores[draft]
        if draft.gemm is not None and len(stores) > MAX_STORES:
            raise RefusedError(draft.gemm.name, f"its result is needed in more than {MAX_STORES} forms")
        parts = [tuple(stores[i : i + MAX_STORES]) for i in range(0, len(stores), MAX_STORES)]
        return [self._step(draft, x, residual, part) for part in parts]

    def _step(self, draft: _Draft, x: int, residual: int | None, stores: tuple[Store, ...]) -> Step:
        step = Step(
            "pointwise",
            x,
            stores,
            view=draft.view,
            upsample=draft.upsample,
            shuffle=draft.shuffle,
            act=draft.act,
            residual=residual,
            residual_upsample=draft.residual_upsample,
            post_act=draft.post_act,
            stats=draft.stats,
            name=draft.name,
        )
        if draft.norm is not None:
            affine = Affine(draft.norm.weight.float().contiguous(), draft.norm.bias.float().contiguous())
            return replace(step, norm=Norm(draft.norm.groups, draft.norm.eps, affine))
        if draft.gemm is None:
            return step
        gemm = draft.gemm
        weight = self._weight(gemm, self._slots[x].scale)
        step = replace(
            step,
            kind=gemm.kind,
            weight=weight,
            kernel_size=gemm.kernel_size,
            stride=gemm.stride,
            padding=gemm.padding,
            output_padding=gemm.output_padding,
            dilation=gemm.dilation,
            demodulation=None if draft.demodulation is None else self._input(draft.demodulation),
        )
        return self._prescaled(step, weight)

    def _weight(self, gemm: Gemm, x_scale: float) -> PackedWeight:
        """The packed weight of a layer. Raises RefusedError for one that cannot be packed.

        A layer that is called again, as in a recurrent network, shares the tensors of its first call, which lie in files once.
        Layers that happen to be equal do not: other weights may be loaded into one of them.
        """
        format = self._format_of(gemm.layer)
        window = (gemm.kernel_size, gemm.stride, gemm.padding, gemm.dilation)
        digest = hashlib.sha256(repr((gemm.kind, gemm.groups, gemm.weight.shape, window)).encode())
        for tensor in (gemm.weight, gemm.bias):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        key = (gemm.layer, format, digest.digest())
        if key not in self._packed:
            order = tap_order(*window) if gemm.kind == "conv_transpose2d" else None
            try:
                self._packed[key] = pack_weight(
                    gemm.weight,
                    gemm.bias,
                    DTYPES[format],
                    order=order,
                    groups=gemm.groups,
                    weight_bits=4 if format == "int4" else 8,
                )
            except ValueError as error:
                raise RefusedError(gemm.name, str(error)) from error
        packed = self._packed[key]
        if DTYPES[format] != torch.int8:
            return packed
        scale = packed.scale * torch.tensor(x_scale, dtype=torch.float32)
        if not bool(scale.isfinite().all()):
            raise RefusedError(gemm.name, f"the scale of its results, {scale.max():g}, is not finite")
        return replace(packed, scale=scale)

    def _prescaled(self, step: Step, weight: PackedWeight) -> Step:
        """The step with the scale of the only slot it stores in folded into its weight, where that is the same."""
        store = step.stores[0]
        alone = len(step.stores) == 1 and store == Store(store.slot, store.channel) and store.slot >= 0
        linear = step.act.name in ("none", "relu", "leaky_relu") and step.post_act == _NONE
        bare = step.residual is None and step.demodulation is None and not step.stats
        if not (alone and linear and bare and self._slots[store.slot].format == "u8"):
            return step
        inverse = torch.tensor(1.0 / self._slots[store.slot].scale, dtype=torch.float32)
        weight = replace(weight, scale=weight.scale * inverse, bias=weight.bias * inverse)
        return replace(step, weight=weight, prescaled=True)


def _in_order(results: Sequence[Value]) -> list[_Draft]:
    """The steps that the results need, each after those that it reads."""
    order: list[_Draft] = []
    seen: set[_Draft] = set()
    stack = [(part.draft, False) for value in reversed(results) for part in value.parts]
    while stack:
        draft, ready = stack.pop()
        if ready:
            order.append(draft)
        elif draft not in seen:
            seen.add(draft)
            stack.append((draft, True))
            stack += [(part.draft, False) for value in draft.reads for part in value.parts]
    return order
