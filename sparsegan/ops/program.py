"""A program: the steps of a whole generator, run in one native call (own).

    inputs (float32) ──> step ──> slots ──> step ──> ... ──> outputs (float32)

A *slot* is a tensor that stays packed between steps, as u8, bf16 or f32 lanes. A *step* computes one tensor
v [N, C, H, W] (linear layers: H = W = 1) in float32 and stores it in slots, once for each way it is read:

    v = source * scale + bias        gather-GEMM: scale, bias of the packed weight (times the demodulation);
                                     pointwise: the normalisation, or nothing
    v = act(v) + residual            both optional
    v = post_act(v)
    each store: w = store_act(v * affine.scale + affine.bias) * modulation, rounded to the slot's format

The reference below says what the numbers are: int8 is exact up to the rounding of transcendental activations
and of normalisation statistics.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import formats
from ..formats import PackedWeight, tap_order
from .backend import (
    ACTIVATIONS,
    LIBRARY,
    Backend,
    activate,
    choose,
    default_backend,
    dense_weight,
    extension_error,
    refuse_cpu,
    refuse_nothing,
)
from .block_conv2d import output_size as conv2d_size
from .block_conv_transpose2d import output_size as conv_transpose2d_size

LIBRARY.define("program_create(Tensor[] tensors, int[] numbers, float[] reals) -> int")
LIBRARY.define("program_run(int handle, Tensor[] inputs) -> Tensor[]")
LIBRARY.define("program_bytes(int handle, Tensor[] inputs) -> int")
LIBRARY.define("program_free(int handle) -> ()")

SlotFormat = Literal["u8", "bf16", "f32"]
StepKind = Literal["linear", "conv2d", "conv_transpose2d", "pointwise"]
PaddingMode = Literal["zeros", "reflect", "replicate"]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Slot:
    """A tensor between steps.

    channels:     of the whole slot; steps may each store a part (concatenation).
    format:       "u8": value = (q - zero) * scale; "bf16"; "f32".
    padding_mode: what stands around the image, for the gather-GEMM steps that read it. All of these must have
                  the same kind, window and padding, and the number format of their weight must be that of the slot.
    """

    channels: int
    format: SlotFormat
    scale: float = 1.0
    zero: int = 0
    padding_mode: PaddingMode = "zeros"


@dataclass(frozen=True)
class Act:
    """name: one of ACTIVATIONS; slope: that of "leaky_relu"."""

    name: str = "none"
    slope: float = 0.0


@dataclass(frozen=True)
class Affine:
    """scale, bias: float32 [C]."""

    scale: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Store:
    """Where the result of a step goes.

    slot:       index of the slot, or ~k for output k (float32, contiguous; [N, C] when `flat` outputs say so).
    channel:    first channel in the slot; a multiple of 4 (u8) or 2 (bf16).
    affine:     applied first; its length is the number of channels that the step computes.
    act:        applied next.
    modulation: input [N, C] that multiplies last; None: nothing.
    """

    slot: int
    channel: int = 0
    affine: Affine | None = None
    act: Act = Act()
    modulation: int | None = None


@dataclass(frozen=True)
class Norm:
    """Group normalisation (Wu and He 2018, arXiv:1803.08494) of the source; instance norm: groups = channels.

    The step that made the source (the only one: no concatenation) has `stats` set. affine: None is (1, 0).
    Statistics are over the step's v before rounding; the variance is biased.
    """

    groups: int
    eps: float
    affine: Affine | None = None


@dataclass(frozen=True)
class Step:
    """One tensor computed; see the module text.

    x:          slot index, or ~k for input k (pointwise only; float32 [N, C, H, W] or [N, C], any strides).
    weight:     of a gather-GEMM; its dtype is the number format of the slot x (int8: "u8").
    view:       pointwise: x, an input or an f32 slot, is read as [N, *view] (its elements in NCHW order).
    upsample:   pointwise: each pixel is read this many times in both directions (nearest).
    shuffle:    pointwise: pixel shuffle by this factor (Shi et al. 2016, arXiv:1609.05158, section 3.2).
    norm:       pointwise.
    demodulation: input [N, C] that multiplies the scale of a gather-GEMM.
    residual:   slot index or ~k for an input, added to v. With one channel it is added to all of them; with
                N = 1 (inputs only) to all images.
    residual_upsample: 2 reads each pixel of the residual twice in both directions.
    stats:      sum and sum of squares of v (after post_act) per image and channel are kept for a Norm.
    prescaled:  scale and bias of the weight are already in steps of the only store's u8 slot, and so is v: the
                store rounds without multiplying. Only a gather-GEMM with act none, relu or leaky_relu and nothing
                else between the weight and the slot.
    """

    kind: StepKind
    x: int
    stores: tuple[Store, ...]
    weight: PackedWeight | None = None
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    view: tuple[int, int, int] | None = None
    upsample: int = 1
    shuffle: int = 1
    norm: Norm | None = None
    demodulation: int | None = None
    act: Act = Act()
    residual: int | None = None
    residual_upsample: int = 1
    post_act: Act = Act()
    stats: bool = False
    prescaled: bool = False
    name: str = ""  # of the module it came from, for reports


@dataclass(frozen=True)
class Program:
    """slots, steps in order; inputs, outputs: how many. rows: output k is [N, C] instead of [N, C, H, W]."""

    slots: tuple[Slot, ...]
    steps: tuple[Step, ...]
    inputs: int
    outputs: int
    rows: tuple[bool, ...] = field(default=())


def tensors(program: Program) -> dict[str, Tensor]:
    """Every tensor of `program` by a name that says where it stands, such as "step3_values"; for saving."""
    named: dict[str, Tensor] = {}

    def see(name: str, tensor: Tensor) -> Tensor:
        named[name] = tensor
        return tensor

    _map_tensors(program, see)
    return named


def with_tensors(program: Program, named: Mapping[str, Tensor]) -> Program:
    """`program` with other tensors, by the names of `tensors`."""
    return _map_tensors(program, lambda name, _: named[name])


def _map_tensors(program: Program, change: Callable[[str, Tensor], Tensor]) -> Program:
    def affine(name: str, affine: Affine | None) -> Affine | None:
        if affine is None:
            return None
        return Affine(change(f"{name}_scale", affine.scale), change(f"{name}_bias", affine.bias))

    steps = []
    for i, step in enumerate(program.steps):
        if step.weight is not None:
            named = {f: change(f"step{i}_{f}", t) for f, t in formats.as_dict(step.weight).items()}
            step = replace(step, weight=replace(step.weight, **named))  # type: ignore[arg-type]
        if step.norm is not None:
            step = replace(step, norm=replace(step.norm, affine=affine(f"step{i}_norm", step.norm.affine)))
        stores = (
            replace(store, affine=affine(f"step{i}_store{j}", store.affine))
            for j, store in enumerate(step.stores)
        )
        steps.append(replace(step, stores=tuple(stores)))
    return replace(program, steps=tuple(steps))


def reference(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What `program` computes, by plain torch: exact sums in float64, then float32 rounded where the kernels round.

    inputs: float32 [N, C, H, W] or [N, C], any strides. Returns float32 [N, C, H, W] or, for `rows`, [N, C].
    Raises ValueError for inputs that do not fit the program. The program itself is taken as `validate` wants it.
    """
    if len(inputs) != program.inputs:
        raise ValueError(f"the program takes {program.inputs} input(s), got {len(inputs)}")
    for k, tensor in enumerate(inputs):
        if tensor.dtype != torch.float32 or tensor.dim() not in (2, 4):
            came = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"input {k} is {came}, wanted torch.float32 [N, C] or [N, C, H, W]")
    # Values of slots: for u8 the whole numbers q - zero in float64, else float32 numbers that the format can hold.
    slots: dict[int, dict[int, Tensor]] = {}
    outputs: dict[int, Tensor] = {}
    moments: dict[int, Tensor] = {}

    def lanes(index: int) -> Tensor:
        parts = slots[index]
        return torch.cat([parts[channel] for channel in sorted(parts)], 1)

    def source(index: int) -> Tensor:
        """A slot or an input as float32 [N, C, H, W]."""
        if index < 0:
            tensor = inputs[~index]
            return tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        slot, values = program.slots[index], lanes(index)
        return (values * _f32(slot.scale)).float() if slot.format == "u8" else values

    for step in program.steps:
        if step.weight is not None:
            v = _gather_gemm(step, program.slots[step.x], lanes(step.x), inputs)
        else:
            v = _rearranged(step, source(step.x))
            if step.norm is not None:
                scale, bias = _normalisation(step.norm, moments[step.x])
                v = _fma(v, scale[:, :, None, None], bias[:, :, None, None])
        v = activate(v, step.act.name, step.act.slope)
        if step.residual is not None:
            r = _upsampled(source(step.residual), step.residual_upsample)
            if any(a != b and a != 1 for a, b in zip(r.shape[:2], v.shape[:2], strict=True)) or (
                r.shape[2:] != v.shape[2:]
            ):
                raise ValueError(
                    f"step {step.name!r}: cannot add a residual {tuple(r.shape)} to {tuple(v.shape)}"
                )
            v = v + r
        v = activate(v, step.post_act.name, step.post_act.slope)
        for store in step.stores:
            w = v
            if store.affine is not None:
                w = _fma(w, store.affine.scale[:, None, None], store.affine.bias[:, None, None])
            w = activate(w, store.act.name, store.act.slope)
            if store.modulation is not None:
                w = w * inputs[store.modulation][:, :, None, None]
            if store.slot < 0:
                rows = bool(program.rows) and program.rows[~store.slot]
                outputs[~store.slot] = (w.flatten(1) if rows else w).contiguous()
                continue
            slot = program.slots[store.slot]
            slots.setdefault(store.slot, {})[store.channel] = _stored(w, slot, step.prescaled)
            if step.stats:
                moments[store.slot] = torch.stack([v.double().mean((2, 3)), v.double().square().mean((2, 3))])
    return [outputs[k] for k in range(program.outputs)]


def _f32(number: float) -> Tensor:
    """The nearest float32, in float64: products and sums with it are rounded afterwards."""
    return torch.tensor(number, dtype=torch.float32).double()


def _fma(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x * scale + bias in float32, rounded once."""
    return (x.double() * scale.double() + bias.double()).float()


def _gather_gemm(step: Step, slot: Slot, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The sums of a gather-GEMM step times scale, plus bias: float32 [N, O, H, W]."""
    assert step.weight is not None
    kh, kw = step.kernel_size
    ph, pw = step.padding
    if slot.padding_mode != "zeros":
        x, ph, pw = F.pad(x, (pw, pw, ph, ph), mode=slot.padding_mode), 0, 0
    positions = dense_weight(step.weight.tensors(), x.shape[1], kh * kw)  # [O, T, C]
    if step.kind == "conv_transpose2d":
        raster = torch.empty_like(positions)
        raster[:, tap_order(step.kernel_size, step.stride, step.padding, step.dilation)] = positions
        dense = raster.permute(2, 0, 1).unflatten(2, (kh, kw))
        acc = F.conv_transpose2d(
            x.double(), dense, None, step.stride, (ph, pw), step.output_padding, dilation=step.dilation
        )
    else:
        dense = positions.permute(0, 2, 1).unflatten(2, (kh, kw))
        acc = F.conv2d(x.double(), dense, None, step.stride, (ph, pw), step.dilation)
    scale = step.weight.scale[None]
    if step.demodulation is not None:
        scale = scale * inputs[step.demodulation]
    return _fma(acc.float(), scale[:, :, None, None], step.weight.bias[:, None, None])


def _rearranged(step: Step, x: Tensor) -> Tensor:
    if step.view is not None:
        if x[0].numel() != math.prod(step.view):
            raise ValueError(f"step {step.name!r}: cannot read {tuple(x.shape)} as [N, *{step.view}]")
        x = x.reshape(-1, *step.view)
    return _upsampled(F.pixel_shuffle(x, step.shuffle), step.upsample)


def _upsampled(x: Tensor, factor: int) -> Tensor:
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3) if factor > 1 else x


def _normalisation(norm: Norm, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and bias [N, C] in float32, from mean and mean square, float64 [2, N, C]."""
    channels = moments.shape[2]
    mean, square = (
        moments.unflatten(2, (norm.groups, -1)).mean(3).repeat_interleave(channels // norm.groups, 2)
    )
    scale = ((square - mean * mean).clamp(min=0) + norm.eps).rsqrt()
    bias = -mean * scale
    if norm.affine is not None:
        scale, bias = scale * norm.affine.scale, bias * norm.affine.scale + norm.affine.bias
    return scale.float(), bias.float()


def _stored(w: Tensor, slot: Slot, prescaled: bool) -> Tensor:
    """w rounded to the format of the slot; for u8: q - zero."""
    if slot.format == "f32":
        return w
    if slot.format == "bf16":
        return w.bfloat16().float()
    steps = w if prescaled else w * _f32(1.0 / slot.scale).float()
    steps = torch.nan_to_num(steps, nan=-slot.zero, posinf=255.0, neginf=-255.0)
    return torch.round(steps.clamp(-slot.zero, 255 - slot.zero)).double()


# The first channel of a store: lanes are not split between steps.
_ALIGNMENT = {"u8": 4, "bf16": 2, "f32": 1}
_WEIGHTS = {torch.int8: "u8", torch.bfloat16: "bf16", torch.float32: "f32"}
MAX_STORES = 4  # of one step
_HOMOGENEOUS = ("none", "relu", "leaky_relu")
_LARGEST_EXTENT = 65535


def step_channels(program: Program) -> list[int | None]:
    """Channels of what each step computes; None where only an input at run time says it.

    A step that reads an input fills each slot up to the next step's part, or to the end.
    """
    starts: dict[int, list[int]] = {}
    for step in program.steps:
        for store in step.stores:
            starts.setdefault(store.slot, []).append(store.channel)

    def channels(step: Step) -> int | None:
        if step.weight is not None:
            return step.weight.out_channels
        if step.view is not None:
            return step.view[0] // step.shuffle**2
        if step.x >= 0:
            return program.slots[step.x].channels // step.shuffle**2
        for store in step.stores:
            if store.slot >= 0:
                end = program.slots[store.slot].channels
                return min([c for c in starts[store.slot] if c > store.channel], default=end) - store.channel
            if store.affine is not None:
                return store.affine.scale.shape[0]
        return None

    return [channels(step) for step in program.steps]


def validate(program: Program) -> None:
    """Raise ValueError, naming the slot or step, unless native code can follow `program` once shapes are known."""

    def need(ok: bool, where: str, wanted: str) -> None:
        if not ok:
            raise ValueError(f"program: {where} must {wanted}")

    def is_input(index: int | None) -> bool:
        return index is not None and 0 <= index < program.inputs

    def check_act(act: Act, where: str) -> None:
        need(
            act.name in ACTIVATIONS,
            where,
            f"have an activation of {', '.join(ACTIVATIONS)}, got {act.name!r}",
        )
        need(math.isfinite(act.slope), where, f"have a finite slope, got {act.slope}")

    def check_affine(affine: Affine | None, channels: int | None, where: str) -> None:
        for name in ("scale", "bias") if affine is not None else ():
            tensor = getattr(affine, name)
            length = tensor.shape[0] if channels is None and tensor.dim() else channels
            good = tensor.dtype == torch.float32 and tensor.shape == (length,) and tensor.is_contiguous()
            came = f"{tensor.dtype} {tuple(tensor.shape)}"
            need(good, where, f"have a contiguous float32 affine {name} of {length} numbers, got {came}")
            need(bool(tensor.isfinite().all()), where, f"have a finite affine {name}")

    need(program.inputs >= 1 and program.outputs >= 1, "it", "have inputs and outputs")
    need(len(program.rows) in (0, program.outputs), "rows", f"be empty or name all {program.outputs} outputs")
    for i, slot in enumerate(program.slots):
        where = f"slot {i}"
        need(
            type(slot.channels) is int and 0 < slot.channels < 2**31,
            where,
            f"have channels, got {slot.channels}",
        )
        need(slot.format in _ALIGNMENT, where, f"be u8, bf16 or f32, got {slot.format!r}")
        modes = ("zeros", "reflect", "replicate")
        need(slot.padding_mode in modes, where, f"be padded by {', '.join(modes)}, got {slot.padding_mode!r}")
        largest = torch.finfo(torch.float32).max
        positive = math.isfinite(slot.scale) and 1 / largest <= slot.scale <= largest
        need(positive, where, f"have a positive float32 scale with a reciprocal, got {slot.scale}")
        need(
            type(slot.zero) is int and 0 <= slot.zero <= 255, where, f"have a zero in 0..255, got {slot.zero}"
        )

    channels = step_channels(program)
    written: dict[int, dict[int, int]] = {}  # slot -> first channel -> end
    makers: dict[int, list[tuple[Step, Store]]] = {}
    readers: dict[int, tuple] = {}  # slot -> geometry of the gather-GEMM steps

    def check_read(index: int, where: str) -> None:
        if index < 0:
            return need(is_input(~index), where, f"read one of {program.inputs} inputs, got {~index}")
        need(index < len(program.slots), where, f"read one of {len(program.slots)} slots, got {index}")
        parts = sorted(written.get(index, {}).items())
        ends = [0, *(end for _, end in parts)]
        whole = [start for start, _ in parts] == ends[:-1] and ends[-1] == program.slots[index].channels
        need(whole, where, f"read slots after all their channels are written: slot {index} has {parts}")

    for i, (step, wide) in enumerate(zip(program.steps, channels, strict=True)):
        where = f"step {i} ({step.name or step.kind})"
        check_read(step.x, where)
        _check_window(step, where, need)
        if step.kind != "pointwise":
            need(step.x >= 0 and step.weight is not None, where, "read a slot with a weight")
            assert step.weight is not None
            slot = program.slots[step.x]
            formats.validate(step.weight)
            format, wanted = _WEIGHTS.get(step.weight.values.dtype), step.weight.in_channels
            known = format is not None and step.weight.metadata is None
            need(
                known,
                where,
                f"have int8, bfloat16 or float32 weights, not 2:4; got {step.weight.values.dtype}",
            )
            need(slot.format == format, where, f"read a {format} slot with its weights, got {slot.format}")
            need(slot.channels == wanted, where, f"read {wanted} channels, slot {step.x} has {slot.channels}")
            taps, (kh, kw) = step.weight.taps, step.kernel_size
            need(taps == kh * kw, where, f"have a kernel of {taps} taps, got {kh}x{kw}")
            zeros = slot.padding_mode == "zeros" or step.kind == "conv2d"
            need(zeros, where, f"read a slot padded by zeros, got {slot.padding_mode}")
            window = (
                step.kind,
                step.kernel_size,
                step.stride,
                step.padding,
                step.output_padding,
                step.dilation,
            )
            same = readers.setdefault(step.x, window) == window
            need(same, where, f"read slot {step.x} with the window of its other readers, {readers[step.x]}")
            none = step.demodulation is None
            need(
                none or is_input(step.demodulation), where, f"demodulate by an input, got {step.demodulation}"
            )
        elif step.norm is not None:
            need(step.x >= 0, where, "normalise a slot")
            maker, store = makers[step.x][0]
            plain = store.affine is None and store.act.name == "none" and store.modulation is None
            single = len(makers[step.x]) == 1 and maker.stats and plain
            need(single, where, "normalise a slot that one step with stats stored as it is")
            groups, total = step.norm.groups, program.slots[step.x].channels
            need(groups > 0 and total % groups == 0, where, f"have groups that divide {total}, got {groups}")
            need(0 <= step.norm.eps < math.inf, where, f"have an eps >= 0, got {step.norm.eps}")
            need(step.view is None and step.shuffle == 1, where, "not view or shuffle what it normalises")
            check_affine(step.norm.affine, total, where)
        if step.kind == "pointwise":
            viewed = step.view is None or step.x < 0 or program.slots[step.x].format == "f32"
            need(viewed, where, "view an input or an f32 slot")
            read = step.view[0] if step.view else program.slots[step.x].channels if step.x >= 0 else None
            shuffles = read is None or read % step.shuffle**2 == 0
            need(shuffles, where, f"shuffle channels by {step.shuffle} that it divides twice, got {read}")
        if step.residual is not None:
            check_read(step.residual, where)
            if step.residual >= 0 and wide is not None:
                came = program.slots[step.residual].channels
                need(came in (1, wide), where, f"add a residual of {wide} channels or 1, got {came}")
        need(
            step.residual_upsample in (1, 2),
            where,
            f"have residual_upsample 1 or 2, got {step.residual_upsample}",
        )
        check_act(step.act, where)
        check_act(step.post_act, where)
        need(len(step.stores) > 0, where, "store its result")
        need(
            len(step.stores) <= MAX_STORES, where, f"store at most {MAX_STORES} times, got {len(step.stores)}"
        )
        for store in step.stores:
            check_affine(store.affine, wide, where)
            check_act(store.act, where)
            none = store.modulation is None
            need(none or is_input(store.modulation), where, f"modulate by an input, got {store.modulation}")
            makers.setdefault(store.slot, []).append((step, store))
            if store.slot < 0:
                last = ~store.slot < program.outputs and len(makers[store.slot]) == 1 and store.channel == 0
                need(
                    last, where, f"store each of {program.outputs} outputs once and whole, got {~store.slot}"
                )
                continue
            need(store.slot < len(program.slots), where, f"store in a slot, got {store.slot}")
            slot, part = program.slots[store.slot], written.setdefault(store.slot, {})
            assert wide is not None
            end = store.channel + wide
            fits = store.channel >= 0 and end <= slot.channels
            need(fits, where, f"store in {slot.channels} channels, got {store.channel}..{end - 1}")
            unit = _ALIGNMENT[slot.format]
            need(store.channel % unit == 0, where, f"begin at a multiple of {unit}, got {store.channel}")
            free = all(end <= a or b <= store.channel for a, b in part.items())
            need(free and store.slot not in readers, where, f"not write channels of slot {store.slot} again")
            part[store.channel] = end
        if step.prescaled:
            store = step.stores[0]
            plain = store.affine is None and store.act.name == "none" and store.modulation is None
            only = len(step.stores) == 1 and store.slot >= 0 and program.slots[store.slot].format == "u8"
            free = step.residual is None and step.post_act.name == "none" and not step.stats
            bare = step.kind != "pointwise" and step.demodulation is None and step.act.name in _HOMOGENEOUS
            need(
                plain and only and free and bare,
                where,
                "have nothing between a prescaled weight and its u8 slot",
            )
    missing = [k for k in range(program.outputs) if ~k not in makers]
    need(not missing, "outputs", f"all be stored, {missing} are not")


def _check_window(step: Step, where: str, need: Callable[[bool, str, str], None]) -> None:
    """The geometry of a step, and that it has no field of another kind."""
    kinds = ("linear", "conv2d", "conv_transpose2d", "pointwise")
    need(step.kind in kinds, where, f"be one of {', '.join(kinds)}, got {step.kind!r}")
    for name in ("kernel_size", "stride", "padding", "output_padding", "dilation"):
        pair, least = getattr(step, name), 0 if "padding" in name else 1
        good = len(pair) == 2 and all(type(n) is int and least <= n <= _LARGEST_EXTENT for n in pair)
        need(good, where, f"have a {name} of two whole numbers in {least}..{_LARGEST_EXTENT}, got {pair}")
        used = step.kind == "conv_transpose2d" or (step.kind == "conv2d" and name != "output_padding")
        need(used or pair == (least, least), where, f"have no {name}, it is {step.kind}")
    extras = zip(step.output_padding, step.stride, step.dilation, strict=True)
    small = all(extra < max(stride, dilation) for extra, stride, dilation in extras)
    need(small, where, "have an output_padding smaller than the stride or the dilation")
    for name in ("upsample", "shuffle"):
        need(type(getattr(step, name)) is int and getattr(step, name) >= 1, where, f"have {name} >= 1")
    if step.kind != "pointwise":
        plain = step.view is None and step.upsample == step.shuffle == 1 and step.norm is None
        need(plain, where, f"have no view, upsample, shuffle or norm, it is {step.kind}")
        return
    need(step.weight is None and step.demodulation is None, where, "have no weight, it is pointwise")
    need(step.upsample == 1 or step.shuffle == 1, where, "not upsample and shuffle at once")
    if step.view is not None:
        good = len(step.view) == 3 and all(type(n) is int and n >= 1 for n in step.view)
        need(good, where, f"have a view of three sizes, got {step.view}")


def step_shapes(
    program: Program, inputs: Sequence[tuple[int, ...]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """[N, C, H, W] of what each step reads and computes, for inputs of these shapes, whose sizes may be symbolic."""
    sizes: dict[int, tuple[int, ...]] = {~k: (*shape, 1, 1)[:4] for k, shape in enumerate(inputs)}
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for step in program.steps:
        n, c, h, w = sizes[step.x]
        if step.weight is not None:
            c = step.weight.out_channels
            windows = zip((h, w), step.kernel_size, step.stride, step.padding, step.dilation, strict=True)
            if step.kind == "conv2d":
                h, w = (conv2d_size(*window) for window in windows)
            elif step.kind == "conv_transpose2d":
                h, w = (
                    conv_transpose2d_size(*window[:-1], extra, window[-1])
                    for window, extra in zip(windows, step.output_padding, strict=True)
                )
        else:
            if step.view is not None:
                c, h, w = step.view
            c, h, w = c // step.shuffle**2, h * step.shuffle * step.upsample, w * step.shuffle * step.upsample
        shapes.append((sizes[step.x], (n, c, h, w)))
        for store in step.stores:
            whole = program.slots[store.slot].channels if store.slot >= 0 else c
            sizes[store.slot] = (n, whole, h, w)
    return shapes


def output_shapes(program: Program, inputs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes of the outputs for inputs of these shapes, sizes of which may be symbolic; of a valid program."""
    rows = program.rows or (False,) * program.outputs
    shapes: dict[int, tuple[int, ...]] = {}
    for step, (_, shape) in zip(program.steps, step_shapes(program, inputs), strict=True):
        shapes |= {~store.slot: shape for store in step.stores if store.slot < 0}
    return [shapes[k][: 2 if rows[k] else 4] for k in range(program.outputs)]


_FORMATS = {"u8": 0, "bf16": 1, "f32": 2}  # in the order of csrc/packed.h
_KINDS = {"linear": 0, "conv2d": 1, "conv_transpose2d": 2, "pointwise": 3}
_PADDING_MODES = {"zeros": 0, "reflect": 1, "replicate": 2}


def encode(program: Program) -> tuple[list[Tensor], list[int], list[float]]:
    """The program as the extension reads it (class Reader in csrc/cpu/run_program.cpp): tensors, whole numbers and reals,
    each in the order in which they are read."""
    tensors: list[Tensor] = []
    reals: list[float] = []
    numbers = [program.inputs, program.outputs, len(program.slots), len(program.steps)]
    numbers += [int(rows) for rows in program.rows] or [0] * program.outputs

    def put_act(act: Act) -> None:
        reals.append(act.slope)
        numbers.append(ACTIVATIONS.index(act.name))

    def put_affine(affine: Affine) -> None:
        tensors.extend((affine.scale, affine.bias))

    for slot in program.slots:
        padding = _PADDING_MODES[slot.padding_mode]
        numbers.extend((slot.channels, _FORMATS[slot.format], slot.zero, padding))
        reals.append(slot.scale)
    for step in program.steps:
        numbers.extend((_KINDS[step.kind], step.x, int(step.prescaled)))
        if step.weight is not None:
            for pair in (step.kernel_size, step.stride, step.padding, step.output_padding, step.dilation):
                numbers.extend(pair)
            tensors.extend(step.weight.tensors())
            numbers.append(-1 if step.demodulation is None else step.demodulation)
        else:
            numbers.extend(step.view or (0, 0, 0))
            numbers.extend((step.upsample, step.shuffle, step.norm.groups if step.norm else 0))
            if step.norm:
                reals.append(step.norm.eps)
                numbers.append(int(step.norm.affine is not None))
                if step.norm.affine:
                    put_affine(step.norm.affine)
        put_act(step.act)
        numbers.append(int(step.residual is not None))
        if step.residual is not None:
            numbers.extend((step.residual, step.residual_upsample))
        put_act(step.post_act)
        numbers.extend((int(step.stats), len(step.stores)))
        for store in step.stores:
            modulation = -1 if store.modulation is None else store.modulation
            numbers.extend((store.slot, store.channel, modulation))
            put_act(store.act)
            numbers.append(len(store.affine.scale) if store.affine else 0)
            if store.affine:
                put_affine(store.affine)
    return tensors, numbers, reals


class Engine:
    """A program ready to run. Safe to call from several threads at once.

    Where the kernels are to run it, it keeps a copy of the weights in native memory: what is written into the
    program's tensors later does not reach it. A copy of an engine has a native program of its own.
    Raises ValueError for a program that `validate` refuses; `run` raises BackendError when a named backend cannot.
    """

    def __init__(self, program: Program, backend: str | None = None) -> None:
        validate(program)
        self.program = program
        self.backend = backend
        self._handle: int | None = None
        if (backend or default_backend() or "cpu") == "cpu" and extension_error() is None:
            # Not at the first run, because that may be one that torch.compile or torch.export traces.
            self._create()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, float32, contiguous, for float32 inputs [N, C, H, W] or [N, C]. Raises RuntimeError for others."""
        return choose("program", BACKENDS, inputs[0], None, self.backend).run(self, inputs)

    def bytes(self, inputs: Sequence[Tensor]) -> int:
        """Bytes that activations take between steps, at their peak, for inputs of these shapes; 0 on the reference."""
        if choose("program", BACKENDS, inputs[0], None, self.backend).name != "cpu":
            return 0
        return torch.ops.sparsegan.program_bytes(self.handle, list(inputs))

    @property
    def handle(self) -> int:
        """Number of the native program."""
        if self._handle is None:
            self._create()
        assert self._handle is not None
        return self._handle

    def _create(self) -> None:
        self._handle = torch.ops.sparsegan.program_create(*encode(self.program))
        _PROGRAMS[self._handle] = self.program
        weakref.finalize(self, _free, self._handle)

    def __reduce__(self) -> tuple:
        return Engine, (self.program, self.backend)


_PROGRAMS: dict[int, Program] = {}  # those that have a native one, by its handle: for the shape function


def _free(handle: int) -> None:
    del _PROGRAMS[handle]
    # The garbage collector may come by while torch traces something, which must not take this for a part of it.
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        torch.ops.sparsegan.program_free(handle)


@torch.library.register_fake("sparsegan::program_run")
def _fake(handle: int, inputs: list[Tensor]) -> list[Tensor]:
    shapes = output_shapes(_PROGRAMS[int(handle)], [tuple(x.shape) for x in inputs])
    return [inputs[0].new_empty(shape) for shape in shapes]


def _run_native(engine: Engine, inputs: Sequence[Tensor]) -> list[Tensor]:
    return torch.ops.sparsegan.program_run(engine.handle, list(inputs))


def _run_reference(engine: Engine, inputs: Sequence[Tensor]) -> list[Tensor]:
    return reference(engine.program, inputs)


BACKENDS = (
    Backend("cpu", refuse_cpu, _run_native),
    Backend("reference", refuse_nothing, _run_reference),
)
