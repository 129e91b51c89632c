"""Whole models as programs: the same numbers as the model, in as few steps as there should be."""

import copy
import io
import math
from collections import namedtuple
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

from sparsegan.graph import CaptureError, capture, lower, observe
from sparsegan.layers import SparseProgram
from sparsegan.lowering import Gemm, merge_upsampling
from sparsegan.models.dcgan import dcgan_generator
from sparsegan.models.residual import ResidualGenerator
from sparsegan.models.seeded import seeded
from sparsegan.models.stylegan2 import StyleGAN2Generator
from sparsegan.models.translation import UNetGenerator, cyclegan_generator
from sparsegan.models.vae import vae_decoder
from sparsegan.ops.program import validate


class TinyBlock(nn.Module):
    """relu(convolutions(x) + x), as in the tiny autoencoder of diffusers."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + x)


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


def tiny_decoder(channels=8):
    up = [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
    layers = [Clamp(), nn.Conv2d(4, channels, 3, padding=1), nn.ReLU(), TinyBlock(channels), *up]
    return nn.Sequential(*layers, TinyBlock(channels), nn.Conv2d(channels, 3, 3, padding=1))


class NormBlock(nn.Module):
    """Group normalisation and SiLU before each convolution, a shortcut beside them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.dropout = nn.Dropout()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.shortcut(x) + h) / 1.0


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        tokens = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + tokens.transpose(1, 2).reshape(x.shape)


def attention_decoder(channels=8):
    blocks = [NormBlock(channels, channels), Attention(channels), NormBlock(channels, 2 * channels)]
    return nn.Sequential(nn.Conv2d(4, channels, 3, padding=1), *blocks, nn.Conv2d(2 * channels, 3, 1))


def pixel_shuffle_net():
    layers = [
        nn.Conv2d(3, 12, 3, padding=1),
        nn.PReLU(),
        nn.PixelShuffle(2),
        nn.Conv2d(3, 3, 5, 1, 2),
        nn.GELU(),
    ]
    return nn.Sequential(*layers)


Case = namedtuple("Case", "build inputs other steps floor")
# steps: of each program, (layers, pointwise steps). other: inputs of another shape; None: only the captured shape.
CASES = {
    "dcgan": Case(
        lambda: dcgan_generator(16, (16, 8, 8)),
        lambda: (torch.randn(1, 16, 1, 1),), lambda: (torch.randn(3, 16, 1, 1),), [(4, 1)], 35,
    ),
    "vae": Case(
        lambda: vae_decoder(8, 12, 4, (8, 8)),
        lambda: (torch.randn(2, 8),), lambda: (torch.randn(3, 8),), [(4, 2)], 35,  # packing, the view
    ),
    "residual": Case(
        lambda: ResidualGenerator(8, 4, (4, 2, 1)),
        lambda: (torch.randn(2, 8),), lambda: (torch.randn(3, 8),), [(8, 2)], 35,
    ),
    "cyclegan": Case(
        lambda: cyclegan_generator(4, 1),
        lambda: (torch.randn(1, 3, 16, 16),), lambda: (torch.randn(2, 3, 24, 16),), [(8, 8)], 25,
    ),
    "unet": Case(
        lambda: UNetGenerator(4, 3),
        lambda: (torch.randn(1, 3, 16, 16),), lambda: (torch.randn(2, 3, 24, 32),), [(6, 1)], 30,
    ),
    "tiny": Case(
        tiny_decoder,
        lambda: (torch.randn(1, 4, 6, 6),), lambda: (torch.randn(2, 4, 5, 7),), [(7, 2)], 30,  # tanh, times 3
    ),
    "attention": Case(
        attention_decoder,
        lambda: (torch.randn(1, 4, 6, 6),), lambda: (torch.randn(2, 4, 5, 7),), [(3, 4), (4, 3)], 30,
    ),
    "stylegan2": Case(
        lambda: StyleGAN2Generator(8, 8, 64, 8, 2),
        lambda: (torch.randn(1, 8),), lambda: (torch.randn(3, 8),), [(7, 1), (7, 1)], 30,
    ),
    "pixel_shuffle": Case(
        pixel_shuffle_net,
        lambda: (torch.randn(1, 3, 5, 5),), lambda: (torch.randn(2, 3, 4, 6),), [(2, 2)], 30,
    ),
}  # fmt: skip


@cache
def prepared(name):
    """The model of a case, inputs, and its captured graph."""
    case = CASES[name]
    torch.manual_seed(0)
    model, inputs = seeded(case.build, 0), case.inputs()
    return model, inputs, capture(model, inputs)


def run(lowered, *inputs):
    for module in lowered.programs:
        validate(module.program)
    return lowered.model(*inputs)


def assert_close(got, wanted, tolerance=1e-4):
    got, wanted = tree_leaves(got), tree_leaves(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm(), f"off by {(a - b).norm() / b.norm():.2g}"


def psnr(got, wanted):
    error = (got - wanted).square().mean().sqrt()
    return 20 * math.log10((wanted.max() - wanted.min()) / error)


def steps(lowered):
    """(layers, pointwise steps) of each program."""
    kinds = [[step.kind != "pointwise" for step in m.program.steps] for m in lowered.programs]
    return [(sum(layers), len(layers) - sum(layers)) for layers in kinds]


def through(model, *inputs, **settings):
    """The model lowered on the reference, checked against the model itself. int8 layers are observed on the inputs."""
    model = model.eval().requires_grad_(False)
    captured = capture(model, inputs)
    ranges = observe(captured, [inputs])
    lowered = lower(captured, ranges, backend="reference", **settings)
    assert_close(run(lowered, *inputs), model(*inputs), 0.1 if "int8" in str(settings) else 1e-4)
    return lowered


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_models_are_the_same_in_float32(name):
    model, inputs, captured = prepared(name)
    lowered = lower(captured, backend="reference")
    assert steps(lowered) == CASES[name].steps
    assert_close(run(lowered, *inputs), model(*inputs))
    other = CASES[name].other()
    assert_close(run(lowered, *other), model(*other))


@torch.no_grad()
@pytest.mark.parametrize("residual", ["bf16", "u8"])
@pytest.mark.parametrize("name", CASES)
def test_models_are_close_in_int8(name, residual):
    model, inputs, captured = prepared(name)
    ranges = observe(captured, [inputs])
    lowered = lower(captured, ranges, default="int8", residual=residual, backend="reference")
    assert steps(lowered) == CASES[name].steps
    assert psnr(run(lowered, *inputs), model(*inputs)) > CASES[name].floor
    if name == "tiny":
        shared = [slot.format for slot in lowered.programs[0].program.slots].count("bf16")
        assert shared == (1 if residual == "u8" else 3)  # tanh(x / 3) stays


@torch.no_grad()
def test_bf16():
    model, inputs, captured = prepared("unet")
    assert psnr(run(lower(captured, default="bf16", backend="reference"), *inputs), model(*inputs)) > 35


def test_no_upsampling_and_no_copy_is_left():
    for name in ("residual", "tiny", "stylegan2"):
        lowered = lower(prepared(name)[2], backend="reference")
        assert all(step.upsample == 1 for m in lowered.programs for step in m.program.steps)
    merged = [s for s in lower(prepared("tiny")[2]).programs[0].program.steps if s.kind == "conv_transpose2d"]
    assert [(s.kernel_size, s.stride, s.padding) for s in merged] == [((4, 4), (2, 2), (1, 1))]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    ("kernel", "padding"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (5, 2), (4, 1)]
)
def test_upsampling_merges_exactly(kernel, padding, factor, groups):
    x, weight = torch.randn(2, 4, 3, 5).double(), torch.randn(6, 4 // groups, kernel, kernel).double()
    wanted = F.conv2d(
        x.repeat_interleave(factor, 2).repeat_interleave(factor, 3), weight, padding=padding, groups=groups
    )
    view = weight.flatten(2).transpose(1, 2)
    gemm = Gemm(
        name="y", operands=("x",), layer="", kind="conv2d", weight=view, bias=torch.zeros(6), groups=groups,
        kernel_size=(kernel, kernel), padding=(padding, padding),
    )  # fmt: skip
    merged = merge_upsampling(gemm, factor)
    taps = (
        merged.weight.unflatten(0, (groups, -1))
        .permute(0, 3, 1, 2)
        .flatten(0, 1)
        .unflatten(2, merged.kernel_size)
    )
    got = F.conv_transpose2d(x, taps, stride=merged.stride, padding=merged.padding, groups=groups)
    torch.testing.assert_close(got, wanted)


def test_upsampling_stays_where_merging_makes_work():
    view = torch.zeros(8, 9, 4)
    view[:, 0] = 1  # one tap of nine; spread over four by merging, as much as before
    gemm = Gemm(
        name="y", operands=("x",), layer="", kind="conv2d", weight=view, bias=torch.zeros(8),
        kernel_size=(3, 3), padding=(1, 1),
    )  # fmt: skip
    assert merge_upsampling(gemm, 2) is not None
    assert merge_upsampling(replace(gemm, stride=(2, 2)), 2) is None
    assert merge_upsampling(replace(gemm, dilation=(2, 2)), 2) is None
    assert merge_upsampling(replace(gemm, padding=(3, 1)), 2) is None


@torch.no_grad()
def test_upsampling_that_does_not_merge():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stride, self.point = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)
            self.mirror, self.plain = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = F.interpolate(x, scale_factor=2)
            mirrored = self.mirror(F.pad(x, (1, 1, 1, 1), "reflect"))
            return self.stride(x), mirrored, self.point(x), x + self.plain(self.point(x))

    lowered = through(Model(), torch.randn(2, 4, 5, 6))
    assert len(lowered.programs) == 1


@torch.no_grad()
@pytest.mark.parametrize("format", ["f32", "int8"])
@pytest.mark.parametrize("widths", [(4, 8), (3, 5), (6, 1)])
def test_concatenation_wherever_channels_lie(widths, format):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(4, width, 3, padding=1) for width in widths)
            self.c = nn.Conv2d(sum(widths), 3, 1)
            self.scale = nn.BatchNorm2d(sum(widths))

        def forward(self, x):
            joined = torch.cat([F.relu(self.a(x)), self.b(x)], 1)
            return self.c(F.leaky_relu(self.scale(joined), 0.1)) + self.c(joined)

    lowered = through(seeded(Model, 0), torch.randn(2, 4, 5, 5), default=format)
    if widths == (4, 8):
        assert steps(lowered) == [(4, 1)]


@torch.no_grad()
def test_number_formats_mix():
    model, inputs, captured = prepared("dcgan")
    ranges = observe(captured, [inputs])
    lowered = lower(captured, ranges, {"3": "bf16", "9": "f32"}, default="int8", backend="reference")
    assert [slot.format for slot in lowered.programs[0].program.slots] == ["u8", "bf16", "u8", "f32"]
    assert [layer.format for layer in lowered.layers] == ["int8", "bf16", "int8", "f32"]
    assert psnr(run(lowered, *inputs), model(*inputs)) > 35
    with pytest.raises(ValueError, match="no range is known"):
        lower(captured, default="int8")


@torch.no_grad()
def test_sparse_blocks_are_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
    model[0].weight.view(2, 8, 2, 4, 9)[:, :, 1] = 0
    lowered = through(model, torch.randn(1, 8, 5, 5))
    assert [(layer.in_program, layer.density) for layer in lowered.layers] == [(True, 0.5), (True, 1.0)]


class Everything(nn.Module):
    """Operations in orders that the shipped models do not have."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(9))
        self.register_buffer("noise", torch.randn(1, 1, 5, 6))
        self.register_buffer("gain", torch.randn(4, 1, 1))

    def forward(self, x, skip):
        c = self.conv
        a = c[0](x)
        b = c[1](F.relu(a) * 2 + 1) * 0.5 + a * 0.25  # a read as it is, activated and scaled
        d = torch.sigmoid(c[2](b) + self.noise) + skip  # two residuals
        e = c[3](torch.tanh(d) * self.gain - 1) + c[4](d) + c[5](b)
        f = F.instance_norm(torch.cat([e, x], 1))[:, 2:6]
        g = c[6](F.gelu(F.group_norm(F.relu(e + e), 2)))
        h = c[7](F.silu(F.leaky_relu(g, 0.3)))
        i = c[8](-h) - 3
        return {"i": i, "f": f, "g": (g, d)}


@torch.no_grad()
@pytest.mark.parametrize("format", ["f32", "int8"])
def test_unusual_orders(format):
    torch.manual_seed(0)
    lowered = through(Everything(), torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6), default=format)
    assert all(layer.in_program for layer in lowered.layers)


@torch.no_grad()
def test_a_value_that_is_needed_in_many_forms():
    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.branches = nn.ModuleList(nn.Conv2d(4, 3, k, padding=k // 2) for k in (1, 3, 5, 7, 9))

        def forward(self, x):
            h = self.first(x)
            return sum(branch(h) for branch in self.branches) + sum(
                branch(x.tile(1, 2, 1, 1)[:, :4]) for branch in self.branches
            )

    lowered = through(Inception(), torch.randn(2, 3, 5, 6))
    assert lowered.layers[0].why == "its result is needed in more than 4 forms"
    assert all(layer.in_program for layer in lowered.layers[1:])


@torch.no_grad()
def test_modulation_from_the_features_themselves():
    class Excite(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
            self.squeeze = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.b(x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True))))

    lowered = through(Excite(), torch.randn(2, 4, 5, 6))
    assert all(layer.in_program for layer in lowered.layers)


@torch.no_grad()
def test_views_between_vectors_and_maps():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 18),
        nn.Unflatten(1, (2, 3, 3)), nn.LayerNorm([2, 3, 3], elementwise_affine=False), nn.Conv2d(2, 3, 3, padding=1),
        nn.Flatten(),
    )  # fmt: skip
    lowered = through(model, torch.randn(2, 3, 5, 5))
    assert steps(lowered) == [(4, 5)]  # packing, two views, two norms; the last view is free in torch


@torch.no_grad()
def test_modules_called_twice_and_weights_that_are_computed():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    normed = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    lowered = through(
        nn.Sequential(conv, nn.BatchNorm2d(4), normed, nn.ReLU(), conv), torch.randn(2, 4, 5, 5)
    )
    assert steps(lowered) == [(3, 1)]
    assert [layer.in_program for layer in lowered.layers] == [True, True]


@torch.no_grad()
def test_noise_is_drawn_in_the_same_order():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            for conv in self.convs:
                x = conv(x) + torch.randn(x.shape[0], 1, x.shape[2], x.shape[3])
            return x

    model, x = Noisy().eval(), torch.randn(2, 3, 5, 5)
    lowered = lower(capture(model, (x,)), backend="reference")
    assert steps(lowered) == [(3, 1)]
    torch.manual_seed(3)
    wanted = model(x)
    torch.manual_seed(3)
    assert_close(run(lowered, x), wanted)


def test_the_table_says_why():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.tokens, self.unused, self.chosen = nn.Linear(4, 4), nn.Linear(2, 2), nn.Conv2d(4, 4, 1)
            nn.init.constant_(self.bad.weight, math.nan)

        def forward(self, x):
            x = self.chosen(self.bad(self.good(x)))
            return self.tokens(x.flatten(2).transpose(1, 2))

    lowered = lower(capture(Model().eval(), (torch.randn(1, 3, 6, 6),)), refused={"chosen": "I said so"})
    rows = {layer.name: layer for layer in lowered.layers}
    assert rows["good"].in_program and rows["good"].why == "in program 0"
    assert "the weight holds NaN" in rows["bad"].why
    assert "it computes a tensor torch.float32 [" in rows["tokens"].why
    assert rows["unused"].why == "the outputs do not depend on it"
    assert rows["chosen"].why == "I said so"
    assert [row.in_program for row in lowered.layers] == [True, False, False, False, False]


def test_a_weight_that_depends_on_the_input_stays_torch():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Linear(2, 1)

        def forward(self, x, s):
            return F.conv2d(x, self.conv.weight * self.scale(s).mean())

    model, inputs = Hyper().eval(), (torch.randn(2, 3, 6, 6), torch.randn(2, 2))
    lowered = lower(capture(model, inputs))
    assert_close(run(lowered, *inputs), model(*inputs))
    assert [layer.in_program for layer in lowered.layers] == [False, True]


def test_models_that_cannot_be_captured():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="training mode"):
        capture(nn.Conv2d(3, 3, 3), (torch.randn(1, 3, 8, 8),))
    with pytest.raises(CaptureError, match="cannot trace Branches"):
        capture(Branches().eval(), (torch.randn(1, 3, 8, 8),))


@torch.no_grad()
def test_other_shapes_than_captured_are_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, flag):
            return self.conv(x).view(4, 4, 64) if flag else x

    x = torch.randn(4, 3, 10, 10)
    lowered = lower(capture(Fixed().eval(), (x, True)))
    assert lowered.model(x, True).shape == (4, 4, 64)
    assert lowered.model(torch.randn(4, 3, 6, 18), True).shape == (4, 4, 64)
    shapes = ((2, 3, 10, 10), (4, 2, 10, 10), (4, 3, 10, 11), (4, 3, 10))
    for wrong in (*((torch.randn(shape), True) for shape in shapes), (x, False)):
        with pytest.raises(ValueError, match="capture it again with such inputs"):
            lowered.model(*wrong)


def test_the_model_is_left_alone():
    model, x = dcgan_generator(4, (8,)).eval(), torch.randn(1, 4, 1, 1)
    before = copy.deepcopy(model.state_dict())
    lowered = lower(capture(model, (x,)), backend="reference")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    y = lowered.model(x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(lowered.model(x), y)


def test_observing_leaves_out_the_tails_and_refuses_nan():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    x = torch.randn(2, 3, 32, 32)
    captured = capture(model, (x,))
    extremes, inner = observe(captured, [x, (2 * x,)]), observe(captured, [x, (2 * x,)], "percentile", 99)
    assert len(extremes) == 2
    for name, (low, high) in extremes.items():
        assert low <= inner[name][0] and inner[name][1] < high
    with pytest.raises(ValueError, match="NaN or infinite"):
        observe(captured, [torch.full((2, 3, 4, 4), math.nan)])
    with pytest.raises(ValueError, match="no calibration data"):
        observe(captured, [])


@torch.no_grad()
def test_a_program_is_a_module_like_any_other():
    _, inputs, captured = prepared("tiny")
    model = lower(captured, observe(captured, [inputs]), default="int8", backend="reference").model
    y = model(*inputs)
    assert torch.equal(copy.deepcopy(model)(*inputs), y)
    module = next(m for m in model.modules() if isinstance(m, SparseProgram))
    assert {tensor.dtype for tensor in module.buffers()} >= {torch.int8, torch.float32}
    assert torch.equal(copy.deepcopy(module).half()(*inputs)[0], module(*inputs)[0])
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(*inputs)[0], module(*inputs)[0])
    state = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items() if "bias" in name}
    loaded.load_state_dict(module.state_dict() | state)
    assert not torch.equal(loaded(*inputs)[0], module(*inputs)[0])
    with torch.enable_grad(), pytest.raises(RuntimeError, match="is for inference"):
        module(inputs[0].clone().requires_grad_())


@torch.no_grad()
@pytest.mark.parametrize("which", ["tiny", "kl"])
def test_diffusers_decoders(which):
    diffusers = pytest.importorskip("diffusers")
    if which == "tiny":
        channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        kind, settings = (
            diffusers.AutoencoderTiny,
            {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        )
        settings |= channels
    else:
        kind, settings = diffusers.AutoencoderKL, {"block_out_channels": (8, 16), "norm_num_groups": 4}
        settings["down_block_types"] = ("DownEncoderBlock2D",) * 2
        settings["up_block_types"] = ("UpDecoderBlock2D",) * 2

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = kind(**settings)

        def forward(self, z):
            return self.vae.decode(z)

    model, z = seeded(Decoder, 0), torch.randn(1, 4, 8, 8)
    captured = capture(model, (z,))
    lowered = lower(captured, backend="reference")
    got = run(lowered, z)
    assert type(got).__name__ == "DecoderOutput"
    assert_close(got.sample, model(z).sample)
    decoder = [row for row in lowered.layers if ".decoder." in row.name and row.kind == "Conv2d"]
    assert decoder and all(row.in_program for row in decoder)
    assert len(lowered.programs) == (1 if which == "tiny" else 2)
