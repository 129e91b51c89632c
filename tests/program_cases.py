"""Random small programs with inputs for them, and how closely two runners must agree on one."""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from op_cases import blocked_view, packed_weight

from sparsegan.ops import ACTIVATIONS
from sparsegan.ops.block_conv2d import output_size
from sparsegan.ops.block_conv_transpose2d import output_size as transposed_size
from sparsegan.ops.program import MAX_STORES, Act, Affine, Norm, Program, Slot, Step, Store
from sparsegan.quantize import quantize_weight

DTYPES = {"u8": torch.int8, "bf16": torch.bfloat16, "f32": torch.float32}
ALIGNMENT = {"u8": 4, "bf16": 2, "f32": 1}
RECTIFIERS = ("none", "relu", "leaky_relu")


def is_exact(program):
    """Whether the contract fixes every bit: whole sums, no transcendental function, no statistics."""
    acts = [a.name for s in program.steps for a in (s.act, s.post_act, *(store.act for store in s.stores))]
    whole = all(step.weight is None or step.weight.values.dtype == torch.int8 for step in program.steps)
    return whole and set(acts) <= set(RECTIFIERS) and not any(step.norm for step in program.steps)


def assert_agree(program, got, wanted):
    """Equal where the program is exact; else up to rounding, and to steps of the slots where there are coarse ones."""
    assert len(got) == len(wanted)
    tolerance = 1e-4 if all(slot.format == "f32" for slot in program.slots) else 0.1
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        if is_exact(program):
            assert torch.equal(a, b)
        else:
            assert (a - b).norm() <= tolerance * (b.norm() + math.sqrt(b.numel()) / 4)


class Builder:
    """Steps that store what is read of them, each time it is read."""

    def __init__(self, draw, formats, acts):
        self.draw, self.formats, self.acts = draw, formats, acts
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        self.slots, self.steps, self.stores, self.inputs = [], [], [], []
        self.values = []  # of each step: channels, height, width
        self.outputs = 0
        self.batch = draw(st.integers(1, 3))

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def chance(self, percent):
        return self.draw(st.integers(0, 99)) < percent

    def input(self, *shape):
        self.inputs.append(self.normal(*shape))
        return len(self.inputs) - 1

    def act(self):
        return Act(self.draw(st.sampled_from(self.acts)), 0.25)

    def add(self, value, **fields):
        self.steps.append(fields)
        self.stores.append([])
        self.values.append(value)

    def store(self, step, slot, start=0, plain=False):
        channels = self.values[step][0]
        affine = act = modulation = None
        if not plain:
            affine = Affine(self.normal(channels), self.normal(channels)) if self.chance(20) else None
            act = self.act() if self.chance(30) else None
            modulation = self.input(self.batch, channels) if self.chance(15) else None
        self.stores[step].append(Store(slot, start, affine, act or Act(), modulation))

    def slot(self, steps, format, plain=False, **fields):
        """A slot for the results of these steps, side by side."""
        if format == "u8":
            fields |= {
                "scale": self.draw(st.sampled_from((0.03, 0.05))),
                "zero": self.draw(st.sampled_from((0, 90, 128))),
            }
        self.slots.append(Slot(sum(self.values[step][0] for step in steps), format, **fields))
        start = 0
        for step in steps:
            self.store(step, len(self.slots) - 1, start, plain)
            start += self.values[step][0]
        return len(self.slots) - 1

    def readable(self):
        """Steps that may store once more, and still give an output."""
        return [i for i, stores in enumerate(self.stores) if len(stores) < MAX_STORES - 1]

    def sources(self, format):
        """One step, or two of the same size that may stand side by side."""
        first = self.draw(st.sampled_from(self.readable()))
        fits = [i for i in self.readable() if self.values[i][1:] == self.values[first][1:] and i != first]
        if fits and self.values[first][0] % ALIGNMENT[format] == 0 and self.chance(30):
            return [first, self.draw(st.sampled_from(fits))]
        return [first]

    def residual(self, channels, height, width):
        kinds = {}
        for i in self.readable():
            value = self.values[i]
            for up in (1, 2):
                if value[0] in (1, channels) and (value[1] * up, value[2] * up) == (height, width):
                    kinds[i] = up
        if kinds and self.chance(70):
            step = self.draw(st.sampled_from(sorted(kinds)))
            slot = self.slot([step], self.draw(st.sampled_from(("u8", "bf16", "f32"))))
            return {"residual": slot, "residual_upsample": kinds[step]}
        images, wide = self.draw(st.sampled_from((1, self.batch))), self.draw(st.sampled_from((1, channels)))
        return {"residual": ~self.input(images, wide, height, width)}

    def epilogue(self, value):
        fields = {"act": self.act()} if self.chance(60) else {}
        if self.chance(35):
            fields |= self.residual(*value)
        return fields | ({"post_act": self.act()} if self.chance(20) else {})

    def gemm(self):
        format = self.draw(st.sampled_from(self.formats))
        steps = self.sources(format)
        channels, (height, width) = sum(self.values[i][0] for i in steps), self.values[steps[0]][1:]
        kinds = ["conv2d", "conv_transpose2d"] + ["linear"] * (height == width == 1)
        kind = self.draw(st.sampled_from(kinds))
        geometry, size, mode = self.geometry(kind, height, width)
        outputs = self.draw(st.integers(1, 12))
        kernel = geometry.get("kernel_size", (1, 1))
        view = blocked_view(
            outputs, kernel[0] * kernel[1], channels, 0.6, self.draw(st.integers(0, 99)), False
        )
        slot = self.slot(steps, format, padding_mode=mode)
        scale = None
        if format == "u8":
            view, scale = quantize_weight(view)
            scale *= self.slots[slot].scale
        full = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | geometry
        height = self.draw(st.sampled_from((4, 8)))
        bias = self.normal(outputs) / 4
        weight = packed_weight(kind, view.float(), full, DTYPES[format], height, scale, bias)
        fields = {"kind": kind, "x": slot, "weight": weight, **geometry}
        if self.chance(15):
            fields["demodulation"] = self.input(self.batch, outputs)
        self.add((outputs, *size), **fields, **self.epilogue((outputs, *size)))

    def geometry(self, kind, height, width):
        """A window that gives at least one pixel; (fields, size of the result, padding mode of the slot)."""
        pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
        kernel, stride, dilation = self.draw(pairs), self.draw(pairs), (self.draw(st.integers(1, 2)),) * 2
        stride = (min(stride[0], 3), min(stride[1], 3))
        padding = (self.draw(st.integers(0, kernel[0] - 1)), self.draw(st.integers(0, kernel[1] - 1)))
        fields = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        if kind == "linear":
            return {}, (1, 1), "zeros"
        axes = list(zip((height, width), kernel, stride, padding, dilation, strict=True))
        if kind == "conv2d":
            size = tuple(output_size(*axis) for axis in axes)
            mode = self.draw(st.sampled_from(("zeros", "reflect", "replicate")))
            if mode == "reflect" and not (padding[0] < height > 1 and padding[1] < width > 1):
                mode = "zeros"
            if all(s + 2 * p >= d * (k - 1) + 1 for s, k, _, p, d in axes):
                return fields, size, mode
        else:
            extra = tuple(self.draw(st.integers(0, max(s, d) - 1)) for _, _, s, _, d in axes)
            size = tuple(
                transposed_size(s, k, st_, p, e, d) for (s, k, st_, p, d), e in zip(axes, extra, strict=True)
            )
            if all(1 <= n <= 40 for n in size):
                return {**fields, "output_padding": extra}, size, "zeros"
        return {"kernel_size": (1, 1)}, (height, width), "zeros"

    def pointwise(self):
        step = self.draw(st.sampled_from(self.readable()))
        channels, height, width = self.values[step]
        choices = ["copy"] + ["upsample"] * (height * width <= 100) + ["shuffle"] * (channels % 4 == 0)
        choices += ["view"] + ["norm"] * (is_float(self.formats) or self.acts != RECTIFIERS)
        choice = self.draw(st.sampled_from(choices))
        value, fields = (channels, height, width), {}
        format = self.draw(st.sampled_from(("u8", "bf16", "f32")))
        if choice == "upsample":
            fields["upsample"] = factor = self.draw(st.integers(2, 3))
            value = (channels, height * factor, width * factor)
        elif choice == "shuffle":
            value, fields = (channels // 4, height * 2, width * 2), {"shuffle": 2}
        elif choice == "view":
            format = "f32"
            value = self.draw(st.sampled_from(((channels * height * width, 1, 1), (channels, width, height))))
            fields["view"] = value
        elif choice == "norm":
            format = self.draw(st.sampled_from(("bf16", "f32")))
            groups = self.draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
            eps = 1e-5 if channels // groups * height * width >= 8 else 0.1
            affine = Affine(self.normal(channels), self.normal(channels)) if self.chance(60) else None
            fields["norm"] = Norm(groups, eps, affine)
            self.steps[step]["stats"] = True
        slot = self.slot([step], format, plain=choice == "norm")
        self.add(value, kind="pointwise", x=slot, **fields, **self.epilogue(value))

    def program(self):
        used = {i for i, stores in enumerate(self.stores) if stores}
        rows = []
        for i, value in enumerate(self.values):
            if i not in used or self.chance(15):
                self.store(i, ~self.outputs)
                self.outputs += 1
                rows.append(value[1:] == (1, 1) and self.chance(50))
        steps = tuple(
            self.prescaled(Step(**fields, stores=tuple(stores)))
            for fields, stores in zip(self.steps, self.stores, strict=True)
        )
        return Program(tuple(self.slots), steps, len(self.inputs), self.outputs, tuple(rows)), self.inputs

    def prescaled(self, step):
        store = step.stores[0]
        alone = len(step.stores) == 1 and store.slot >= 0 and store == Store(store.slot, store.channel)
        bare = (
            step.residual is None and step.demodulation is None and not step.stats and step.post_act == Act()
        )
        if not (
            alone
            and bare
            and step.weight
            and step.act.name in RECTIFIERS
            and self.slots[store.slot].format == "u8"
        ):
            return step
        inverse = torch.tensor(1 / self.slots[store.slot].scale)
        scale, bias = step.weight.scale * inverse, step.weight.bias * inverse
        return dataclasses.replace(
            step, weight=dataclasses.replace(step.weight, scale=scale, bias=bias), prescaled=True
        )


def is_float(formats):
    return tuple(formats) != ("u8",)


@st.composite
def programs(draw, exact=False):
    """(program, inputs): up to six steps with branches. exact: `is_exact` holds."""
    formats = (
        ("u8",) if exact else draw(st.sampled_from((("u8",), ("bf16",), ("f32",), ("u8", "bf16", "f32"))))
    )
    acts = RECTIFIERS if exact else ACTIVATIONS
    builder = Builder(draw, formats, acts)
    size = draw(st.sampled_from(((1, 1), (1, 1), (3, 5), (4, 4), (2, 17), (7, 20))))
    channels = draw(st.integers(1, 10))
    flat = size == (1, 1) and draw(st.booleans())
    first = builder.input(builder.batch, channels, *(() if flat else size))
    builder.add((channels, *size), kind="pointwise", x=~first)
    for _ in range(draw(st.integers(1, 6))):
        if builder.chance(65):
            builder.gemm()
        else:
            builder.pointwise()
    return builder.program()
