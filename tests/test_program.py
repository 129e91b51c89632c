"""Programs: every runner gives what plain torch modules (f32) or the sparse layers one by one (int8) give."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import running_on
from program_cases import assert_agree, programs
from torch import nn

from sparsegan import ops
from sparsegan.formats import pack, tap_order
from sparsegan.layers import SparseConv2d, SparseConvTranspose2d, SparseLinear
from sparsegan.ops.program import (
    Act,
    Affine,
    Engine,
    Norm,
    Program,
    Slot,
    Step,
    Store,
    output_shapes,
    reference,
    validate,
)
from sparsegan.patterns import weight_view
from sparsegan.quantize import quantize_weight

# What runs programs: name -> (program, inputs) -> outputs.
RUNNERS = {"reference": reference, "cpu": lambda program, inputs: Engine(program, "cpu").run(inputs)}
ISAS = ops.available_isas() or ["reference"]
FORMATS = {"u8": torch.int8, "bf16": torch.bfloat16, "f32": torch.float32}
U8 = {"format": "u8", "scale": 0.03, "zero": 120}


@pytest.fixture(params=RUNNERS)
def run(request, uninitialised_is_nan):
    def check_and_run(program, *inputs):
        validate(program)
        return RUNNERS[request.param](program, list(inputs))

    return check_and_run


def gemm(layer, x, *stores, slot=None, **fields):
    """A step from a dense layer; slot: the u8 slot x, for int8."""
    view, geometry = weight_view(layer).detach(), {}
    names = {nn.Linear: (), nn.Conv2d: ("kernel_size", "stride", "padding", "dilation")}.get(
        type(layer), ("kernel_size", "stride", "padding", "output_padding", "dilation")
    )
    geometry = {name: getattr(layer, name) for name in names}
    if isinstance(layer, nn.ConvTranspose2d):
        view = view[:, tap_order(layer.kernel_size, layer.stride, layer.padding, layer.dilation)]
    dtype, scale = FORMATS[slot.format] if slot else torch.float32, None
    if dtype == torch.int8:
        view, scale = quantize_weight(view)
        scale *= slot.scale
    groups = getattr(layer, "groups", 1)
    kind = {nn.Linear: "linear", nn.Conv2d: "conv2d"}.get(type(layer), "conv_transpose2d")
    weight = pack(view, dtype, None, scale, layer.bias, groups)
    return Step(kind, x, stores, weight, **geometry, **fields)


def entry(slot, **fields):
    return Step("pointwise", ~0, (Store(slot),), **fields)


def f32(*channels, **fields):
    return tuple(Slot(c, "f32", **fields) for c in channels)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@torch.no_grad()
def test_residual_block(run):
    a, b, x = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), torch.randn(2, 6, 7, 9)
    steps = (
        entry(0),
        gemm(a, 0, Store(1), act=Act("relu")),
        gemm(b, 1, Store(~0), residual=0, post_act=Act("leaky_relu", 0.2)),
    )
    (y,) = run(Program(f32(6, 6), steps, 1, 1), x)
    close(y, F.leaky_relu(b(F.relu(a(x))) + x, 0.2))


@torch.no_grad()
def test_concatenation_and_several_outputs(run):
    a, b, c = nn.Conv2d(5, 4, 3, 1, 1), nn.Conv2d(5, 6, 1), nn.Conv2d(10, 3, 4, 2, 1)
    x = torch.randn(2, 5, 8, 8)
    steps = (
        entry(0),
        entry(1),
        gemm(a, 0, Store(2), Store(~1)),
        gemm(b, 1, Store(2, 4)),
        gemm(c, 2, Store(~0)),
    )
    y, z = run(Program(f32(5, 5, 10), steps, 1, 2), x)
    close(y, c(torch.cat([a(x), b(x)], 1)))
    close(z, a(x))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_normalisation(run, groups, size):
    conv, norm = nn.Conv2d(4, 6, 3, 1, 1), nn.GroupNorm(groups, 6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, *size)
    affine = Affine(norm.weight.detach(), norm.bias.detach())
    steps = (
        entry(0),
        gemm(conv, 0, Store(1), stats=True),
        Step("pointwise", 1, (Store(~0),), norm=Norm(groups, norm.eps, affine), act=Act("silu"), residual=1),
    )
    (y,) = run(Program(f32(4, 6), steps, 1, 1), x)
    v = conv(x)
    wanted = F.silu(norm(v)) + v
    if math.prod(size) * 6 // groups > 1:
        return close(y, wanted)
    # A group of one value has no variance: the rounding of v * gain - mean * gain is multiplied by 1 / sqrt(eps).
    rounding = 4 * torch.finfo(torch.float32).eps * v.abs().max() * norm.weight.abs().max() / norm.eps**0.5
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5 + float(rounding))


@torch.no_grad()
def test_modulated_convolution_with_noise(run):
    conv = nn.Conv2d(4, 6, 3, 1, 1)
    x, s, d = torch.randn(2, 4, 5, 5), torch.randn(2, 4), torch.randn(2, 6)
    noise = torch.randn(1, 1, 5, 5)
    steps = (
        Step("pointwise", ~0, (Store(0, modulation=1),)),
        gemm(conv, 0, Store(~0), demodulation=2, residual=~3, post_act=Act("leaky_relu", 0.2)),
    )
    (y,) = run(Program(f32(4), steps, 4, 1), x, s, d, noise)
    plain = F.conv2d(x * s[:, :, None, None], conv.weight, padding=1) * d[:, :, None, None]
    close(y, F.leaky_relu(plain + conv.bias[:, None, None] + noise, 0.2))


@torch.no_grad()
def test_linear_then_view_then_transposed_convolution(run):
    fc, up, z = nn.Linear(7, 4 * 3 * 2), nn.ConvTranspose2d(4, 5, 4, 2, 1), torch.randn(3, 7)
    steps = (
        entry(0),
        gemm(fc, 0, Store(1), Store(~1), act=Act("gelu")),
        Step("pointwise", 1, (Store(2),), view=(4, 3, 2)),
        gemm(up, 2, Store(~0), act=Act("tanh")),
    )
    y, h = run(Program(f32(7, 24, 4), steps, 1, 2, (False, True)), z)
    close(h, F.gelu(fc(z)))
    close(y, torch.tanh(up(F.gelu(fc(z)).view(3, 4, 3, 2))))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_modes(run, mode):
    conv, x = nn.Conv2d(3, 5, 5, 1, 2, padding_mode=mode), torch.randn(2, 3, 6, 4)
    slots = f32(3, padding_mode=mode)
    (y,) = run(Program(slots, (entry(0), gemm(conv, 0, Store(~0))), 1, 1), x)
    close(y, conv(x))


@torch.no_grad()
def test_pixel_shuffle_upsampling_and_store_affine(run):
    x, a, b = torch.randn(2, 8, 3, 5), torch.randn(2), torch.randn(2)
    steps = (
        Step("pointwise", ~0, (Store(0),), shuffle=2),
        Step("pointwise", 0, (Store(~0, affine=Affine(a, b), act=Act("sigmoid")),), upsample=3),
        Step("pointwise", ~1, (Store(~1),), residual=0, residual_upsample=2),
    )
    y = torch.randn(2, 2, 12, 20)
    up, added = run(Program(f32(2), steps, 2, 2), x, y)
    shuffled = F.pixel_shuffle(x, 2)
    close(up, torch.sigmoid(F.interpolate(shuffled, scale_factor=3.0) * a[:, None, None] + b[:, None, None]))
    close(added, y + F.interpolate(shuffled, scale_factor=2.0))


def int8_conv(layer, slot, activation):
    """The sparse layer that quantises its input as `slot` does."""
    low, high = -slot.zero * slot.scale, (255 - slot.zero) * slot.scale
    kind = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}.get(type(layer), SparseConvTranspose2d)
    sparse = kind.from_dense(
        layer, dtype=torch.int8, x_range=(low, high), activation=activation, slope=0.25, backend="reference"
    )
    assert math.isclose(sparse.x_scale, slot.scale) and sparse.x_zero == slot.zero
    sparse.scale *= slot.scale / sparse.x_scale
    sparse.x_scale = slot.scale
    return sparse


@torch.no_grad()
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_int8_chain_is_the_layers_one_by_one(run, activation):
    layers = [
        nn.Conv2d(5, 9, 3, 1, 1),
        nn.ConvTranspose2d(9, 6, 4, 2, 1),
        nn.Conv2d(6, 3, (3, 1), (2, 1), (0, 1)),
    ]
    x, act = torch.randn(2, 5, 6, 7), Act(activation, 0.25)
    slots = (Slot(5, **U8), Slot(9, "u8", 0.01, 90), Slot(6, "u8", 0.015, 128))
    wanted = x
    for layer, slot in zip(layers, slots, strict=True):
        wanted = int8_conv(layer, slot, activation)(wanted)
    targets = (1, 2, ~0)
    steps = [
        gemm(layer, i, Store(target), slot=slots[i], act=act)
        for i, (layer, target) in enumerate(zip(layers, targets, strict=True))
    ]
    (y,) = run(Program(slots, (entry(0), *steps), 1, 1), x)
    assert torch.equal(y, wanted)


@torch.no_grad()
def test_int8_residuals_read_what_was_stored(run):
    conv, x = nn.Conv2d(4, 4, 3, 1, 1), torch.randn(2, 4, 6, 6)
    slots = (Slot(4, **U8), Slot(4, "bf16"))
    convolved = int8_conv(conv, slots[0], "none")(x)
    q = (x * torch.tensor(1 / 0.03)).round().clamp(-120, 135)
    for residual, kept in (
        (0, (q.double() * torch.tensor(0.03).double()).float()),
        (1, x.bfloat16().float()),
    ):
        steps = (
            Step("pointwise", ~0, (Store(0), Store(1))),
            gemm(conv, 0, Store(~0), slot=slots[0], residual=residual, post_act=Act("relu")),
        )
        (y,) = run(Program(slots, steps, 1, 1), x)
        assert torch.equal(y, torch.relu(convolved + kept))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_prescaled_weights_give_steps(run, activation):
    a, b = nn.Conv2d(4, 8, 3, 1, 1), nn.Conv2d(8, 3, 1)
    slots = (Slot(4, **U8), Slot(8, "u8", 2.0**-6, 100))  # a power of two: scaling rounds nothing
    x, act = torch.randn(2, 4, 6, 6), Act(activation, 0.25)
    plain = gemm(a, 0, Store(1), slot=slots[0], act=act)
    weight = dataclasses.replace(plain.weight, scale=plain.weight.scale * 64, bias=plain.weight.bias * 64)
    scaled = dataclasses.replace(plain, weight=weight, prescaled=True)
    last = gemm(b, 1, Store(~0), slot=slots[1])
    (y,), (z,) = (run(Program(slots, (entry(0), step, last), 1, 1), x) for step in (plain, scaled))
    assert torch.equal(y, z)


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e12])
def test_steps_too_large_for_an_integer_saturate(run, scale, residual):
    """2^31 and more become the highest step, as below it, however the epilogue is computed."""
    conv, last = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 3, 1)
    slots = (Slot(8, **U8), Slot(8, "u8", 2.0**-6, 100))
    plain = gemm(conv, 0, Store(1), slot=slots[0], residual=0 if residual else None)
    weight = dataclasses.replace(plain.weight, scale=plain.weight.scale * scale)
    step = dataclasses.replace(plain, weight=weight, prescaled=not residual)
    program = Program(slots, (entry(0), step, gemm(last, 1, Store(~0), slot=slots[1])), 1, 1)
    (y,), (wanted,) = run(program, torch.ones(1, 8, 4, 40)), reference(program, [torch.ones(1, 8, 4, 40)])
    assert torch.equal(y, wanted)


@torch.no_grad()
def test_large_negative_slopes_saturate(run):
    conv, last = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 3, 1)
    slots = (Slot(8, **U8), Slot(8, "u8", 2.0**-6, 0))
    plain = gemm(conv, 0, Store(1), slot=slots[0], act=Act("leaky_relu", -1e9))
    step = dataclasses.replace(plain, prescaled=True)
    program = Program(slots, (entry(0), step, gemm(last, 1, Store(~0), slot=slots[1])), 1, 1)
    x = torch.randn(1, 8, 4, 40)
    (y,), (wanted,) = run(program, x), reference(program, [x])
    assert torch.equal(y, wanted)


@torch.no_grad()
def test_padding_channels_have_no_residual(run):
    """A NaN that an earlier call left in memory does not come back in the padding half of a bfloat16 pair."""

    def program(channels):
        slots = (Slot(channels, **U8), *(Slot(channels, format) for format in ("f32", "bf16")))
        conv, last = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, 3, 3, 1, 1)
        steps = (
            Step("pointwise", ~0, (Store(0), Store(1))),
            gemm(conv, 0, Store(2), slot=slots[0], residual=1),
            gemm(last, 2, Store(~0), slot=slots[2]),
        )
        return Program(slots, steps, 1, 1)

    run(program(8), torch.full((1, 8, 8, 8), torch.nan))
    (y,) = run(program(5), torch.randn(1, 5, 8, 8))
    assert y.isfinite().all()


@torch.no_grad()
@pytest.mark.skipif(bool(ops.extension_error()), reason=str(ops.extension_error()))
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("post", ["none", "relu"])
@pytest.mark.parametrize("kind", ["conv", "upsampled"])
def test_residual_blocks_of_wide_maps(isa, post, kind):
    """Maps whose vectors lie in one row each, where the residual is added before the sums leave the registers."""
    if kind == "conv":
        layer, x = nn.Conv2d(10, 10, 3, 1, 1), torch.randn(2, 10, 5, 44)
    else:  # each phase of the transposed convolution adds the same pixel
        layer, x = nn.ConvTranspose2d(10, 10, 4, 2, 1), torch.randn(2, 10, 5, 36)
    slots = (Slot(10, **U8), Slot(10, "u8", 0.02, 90))
    step = gemm(layer, 0, Store(1), slot=slots[0], residual=0, post_act=Act(post))
    if kind == "upsampled":
        step = dataclasses.replace(step, residual_upsample=2)
    last = gemm(nn.Conv2d(10, 3, 3, 1, 1), 1, Store(~0), slot=slots[1])
    program = Program(slots, (entry(0), step, last), 1, 1)
    (wanted,) = reference(program, [x])
    with running_on(isa):
        (y,) = Engine(program, "cpu").run([x])
    assert torch.equal(y, wanted)


@torch.no_grad()
def test_nan_becomes_the_lowest_step(run):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.1]).view(1, 4, 1, 1)
    (y,) = run(Program((Slot(4, **U8),), (entry(0), Step("pointwise", 0, (Store(~0),))), 1, 1), x)
    wanted = torch.tensor([-120.0, 135, -120, 3]).double() * torch.tensor(0.03).double()
    assert torch.equal(y.flatten(), wanted.float())


VALID = Program(
    (Slot(4, **U8), Slot(8, "u8"), Slot(4, "f32")),
    (
        Step("pointwise", ~0, (Store(0), Store(2)), stats=True),
        gemm(nn.Conv2d(4, 4, 3, 1, 1), 0, Store(1), slot=Slot(4, **U8)),
        Step("pointwise", 2, (Store(1, 4),), norm=Norm(2, 1e-5)),
        gemm(nn.Conv2d(8, 3, 1), 1, Store(~0), slot=Slot(8, "u8")),
    ),
    inputs=1,
    outputs=1,
)


def changed(i=None, store=None, slot=None, **fields):
    """VALID with fields of step i (of its first store), or of a slot, replaced."""
    if slot is not None:
        slots = list(VALID.slots)
        slots[slot] = dataclasses.replace(slots[slot], **fields)
        return dataclasses.replace(VALID, slots=tuple(slots))
    steps = list(VALID.steps)
    if store is not None:
        fields = {"stores": (dataclasses.replace(steps[i].stores[0], **store), *steps[i].stores[1:])}
    steps[i] = dataclasses.replace(steps[i], **fields)
    return dataclasses.replace(VALID, steps=tuple(steps))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (changed(0, x=~3), "read one of 1 inputs, got 3"),
        (changed(1, x=7), "read one of 3 slots, got 7"),
        (changed(1, x=1), "read slots after all their channels are written"),
        (changed(3, store={"slot": 9}), "store in a slot, got 9"),
        (changed(2, store={"channel": 0}), "not write channels of slot 1 again"),
        (changed(2, store={"channel": 6}), "store in 8 channels, got 6..9"),
        (changed(1, store={"channel": 2}), "begin at a multiple of 4, got 2"),
        (changed(3, store={"slot": 0}), "not write channels of slot 0 again"),
        (changed(3, store={"slot": ~1}), "store each of 1 outputs"),
        (changed(3, act=Act("swish")), "have an activation of none, relu"),
        (changed(3, act=Act("leaky_relu", math.inf)), "have a finite slope"),
        (changed(3, store={"affine": Affine(torch.ones(2), torch.ones(3))}), "affine scale of 3 numbers"),
        (changed(3, store={"affine": Affine(torch.ones(3), torch.ones(3).double())}), "float32 affine bias"),
        (changed(3, store={"modulation": 1}), "modulate by an input, got 1"),
        (changed(3, demodulation=1), "demodulate by an input, got 1"),
        (changed(3, residual=0), "add a residual of 3 channels or 1, got 4"),
        (changed(3, residual_upsample=3), "residual_upsample 1 or 2"),
        (changed(3, kernel_size=(3, 3)), "have a kernel of 1 taps, got 3x3"),
        (changed(3, stride=(0, 1)), "have a stride of two whole numbers"),
        (changed(3, output_padding=(1, 1)), "have no output_padding, it is conv2d"),
        (changed(3, view=(3, 1, 1)), "have no view"),
        (changed(3, stores=()), "store its result"),
        (changed(3, stores=(Store(~0),) * 5), "store at most 4 times, got 5"),
        (changed(0, stats=False), "normalise a slot that one step with stats"),
        (changed(2, norm=Norm(3, 1e-5)), "groups that divide 4, got 3"),
        (changed(2, norm=Norm(2, 1e-5, Affine(torch.ones(2), torch.ones(2)))), "affine scale of 4 numbers"),
        (changed(2, upsample=2, shuffle=2, norm=None), "not upsample and shuffle at once"),
        (changed(2, norm=None, shuffle=3), "shuffle channels by 3"),
        (changed(2, norm=None, x=0, view=(4, 1, 1)), "view an input or an f32 slot"),
        (changed(0, prescaled=True), "nothing between a prescaled weight"),
        (changed(slot=0, format="f32"), "read a u8 slot with its weights, got f32"),
        (changed(slot=0, channels=5), "store in 4 channels, got 0..4"),
        (changed(3, x=0), "read 8 channels, slot 0 has 4"),
        (changed(slot=0, zero=256), "have a zero in 0..255"),
        (changed(slot=0, scale=1e-40), "a positive float32 scale"),
        (changed(slot=0, padding_mode="wrap"), "be padded by"),
        (dataclasses.replace(VALID, outputs=2), r"all be stored, \[1\]"),
        (dataclasses.replace(VALID, rows=(True, True)), "name all 1 outputs"),
    ],
)  # fmt: skip
def test_what_native_code_relies_on_is_checked(program, message):
    with pytest.raises(ValueError, match=message):
        validate(program)


def test_a_valid_program_passes():
    validate(VALID)


@settings(max_examples=80, deadline=None)
@given(case=programs(exact=True), runner=st.sampled_from(ISAS))
def test_random_int8_programs_are_exact(case, runner):
    compare(*case, runner)


@settings(max_examples=80, deadline=None)
@given(case=programs(), runner=st.sampled_from(ISAS))
def test_random_programs(case, runner):
    compare(*case, runner)


def compare(program, inputs, runner):
    validate(program)
    wanted = reference(program, inputs)
    with running_on(runner) as backend:
        got = Engine(program, backend).run(inputs)
    assert_agree(program, got, wanted)


@torch.no_grad()
@pytest.mark.parametrize(("height", "density"), [(8, 1.0), (4, 0.25), (16, 0.25), (32, 0.25), (8, 0.05)])
@pytest.mark.parametrize(
    ("kind", "channels", "size", "batch", "geometry"),
    [
        # vectors one above the other, many tiles a task
        (nn.Conv2d, (64, 40), (33, 48), 2, {"kernel_size": 3, "padding": 1}),
        (nn.Conv2d, (64, 64), (3, 16), 1, {"kernel_size": (2, 1), "padding": (0, 0)}),
        # vectors beyond the ends of rows
        (nn.Conv2d, (24, 104), (4, 5), 3, {"kernel_size": 3, "padding": 1}),
        (nn.Conv2d, (128, 72), (1, 19), 1, {"kernel_size": 1}),
        (nn.Conv2d, (68, 48), (19, 37), 1, {"kernel_size": (5, 2), "stride": 2, "dilation": (1, 2)}),
        (nn.ConvTranspose2d, (64, 80), (9, 16), 2, {"kernel_size": 4, "stride": 2, "padding": 1}),
    ],
)
def test_many_channels_in_blocks_of_any_height(kind, channels, size, batch, geometry, height, density):
    layer = kind(*channels, **geometry)
    view = weight_view(layer)
    keep = torch.rand(-(-channels[1] // height), view.shape[1], -(-channels[0] // 4)) < density
    # in place: the view shares the layer's storage
    view *= keep.repeat_interleave(height, 0)[: channels[1]].repeat_interleave(4, 2)[..., : channels[0]]
    slots = (Slot(channels[0], **U8), Slot(channels[1], "u8", 0.01, 90))
    convolution = gemm(layer, 0, Store(1), Store(~0), slot=slots[0], act=Act("leaky_relu", 0.2))
    steps = (entry(0), convolution, Step("pointwise", 1, (Store(~1),), residual=1))
    program, x = Program(slots, steps, 1, 2), [torch.randn(batch, channels[0], *size)]
    wanted = reference(program, x)
    for runner in ISAS:
        with running_on(runner) as backend:
            assert_agree(program, Engine(program, backend).run(x), wanted)


@pytest.mark.skipif(ops.extension_error() is not None, reason="there is nothing native to free")
def test_an_engine_that_goes_while_torch_traces_leaves_no_trace():
    program = Program(f32(4), (entry(0), gemm(nn.Conv2d(4, 4, 1), 0, Store(~0))), 1, 1)

    class Drops(nn.Module):
        def forward(self, x):
            engines.clear()
            return x + 1

    engines = [Engine(program, "cpu")]
    handle = engines[0].handle
    graph = torch.export.export(Drops(), (torch.ones(2),), strict=False).graph
    assert not any("program_free" in str(node.target) for node in graph.nodes)
    with pytest.raises(RuntimeError):
        torch.ops.sparsegan.program_run(handle, [torch.ones(1, 4, 2, 2)])


@pytest.mark.parametrize("image", [(5, 7), (8, 8)])
def test_shapes_are_known_without_running(image):
    up = nn.ConvTranspose2d(8, 3, 4, 2, 1)
    steps = (
        entry(0),
        gemm(nn.Conv2d(4, 8, 3, 2, 1), 0, Store(1)),
        Step("pointwise", 1, (Store(2),), upsample=3),
        gemm(up, 2, Store(~0)),
        Step("pointwise", 1, (Store(~1),), shuffle=2),
        Step("pointwise", ~1, (Store(~2),), view=(2, 3, 1)),
    )
    program = Program(f32(4, 8, 8), steps, 2, 3, (False, False, False))
    inputs = [torch.randn(2, 4, *image), torch.randn(2, 6)]
    wanted = [tuple(y.shape) for y in reference(program, inputs)]
    assert output_shapes(program, [tuple(x.shape) for x in inputs]) == wanted
    rows = Program(f32(4), (entry(0), gemm(nn.Linear(4, 5), 0, Store(~0))), 1, 1, (True,))
    assert output_shapes(rows, [(7, 4)]) == [(7, 5)]


def test_a_copy_of_an_engine_is_one_of_its_own():
    program = Program(f32(4), (entry(0), gemm(nn.Conv2d(4, 4, 1), 0, Store(~0))), 1, 1)
    engine, x = Engine(program), [torch.randn(1, 4, 2, 2)]
    other, y = copy.deepcopy(engine), engine.run(x)[0]
    del engine
    assert torch.equal(other.run(x)[0], y)
