"""Number formats of few bits against hand-computed examples, 4-bit weights through layers, programs and files, and the table."""

import copy
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparsegan import checkpoint
from sparsegan.checkpoint import load, save
from sparsegan.formats import from_dict, has_four_bits, narrowed, pack_nibbles, unpack, unpack_nibbles
from sparsegan.fuse import fold_batch_norm
from sparsegan.graph import CaptureError, capture, lower
from sparsegan.layers import SparseConv2d, SparseLayer, SparseLinear, SparseProgram, pack_weight
from sparsegan.patterns import BlockPattern, from_weight_view, weight_view
from sparsegan.prune import make_permanent, prune
from sparsegan.quantize import Scheme, quantize_weight, quantized_copy
from sparsegan.quantize.aware import quantization_aware
from sparsegan.quantize.low_bit import affine, fixed_point, symmetric
from sparsegan.report import SCHEMES, compare_formats
from sparsegan.swap import SwapConfig, exchange, explain, single, swap_to_sparse


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ the formats


def test_fixed_point_by_hand():
    # 2^3 = 8: 0.3 * 8 = 2.4, -0.9 * 8 = -7.2, 0.0625 * 8 = 0.5 (to even), 1.5 * 8 = 12 and -1.2 * 8 = -9.6 (saturated).
    w = torch.tensor([0.3, -0.9, 0.0625, 1.5, -1.2])
    integers, scale = fixed_point(w, 3, 4)
    assert integers.tolist() == [2, -7, 0, 7, -8] and scale == 0.125 and integers.dtype == torch.int32
    assert fixed_point(w, 3)[0].tolist() == [2, -7, 0, 12, -10]  # 8 bits are enough
    assert fixed_point(torch.tensor([700.0, 2.1]), -1, 8)[0].tolist() == [127, 1]
    assert fixed_point(torch.tensor([1e30]), 0, 32)[0].tolist() == [2**31 - 1]


def test_affine_by_hand():
    # -1..2 in 15 steps of 0.2; -1 / 0.2 puts zero at 5; 0.5 / 0.2 = 2.5 rounds to even, 1.31 / 0.2 = 6.55.
    integers, scale, zero = affine(torch.tensor([[-1.0, 0.0, 0.5], [1.31, 2.0, -0.31]]), 4)
    assert scale == pytest.approx(0.2) and zero == 5
    assert integers.tolist() == [[0, 5, 7], [12, 15, 3]] and integers.dtype == torch.uint8
    # The range is widened to hold 0, so that it stays exact.
    integers, scale, zero = affine(torch.tensor([1.0, 2.0, 3.0]), 2)
    assert (integers.tolist(), scale, zero) == ([1, 2, 3], 1.0, 0)


def test_symmetric_by_hand():
    # 4 bits: largest 7. Channel 0: 1.4 / 7 = 0.2; 0.5 / 0.2 = 2.5 to even, -0.31 / 0.2 = -1.55. Channel 1: zeros.
    view = torch.tensor([[[1.4, 0.5, -0.31]], [[0.0, 0.0, 0.0]], [[-21.0, 3.1, 4.6]]])
    integers, scale = symmetric(view, 4)
    assert integers.tolist() == [[[7, 2, -2]], [[0, 0, 0]], [[-7, 1, 2]]] and integers.dtype == torch.int8
    assert scale.tolist() == pytest.approx([0.2, 1.0, 3.0])
    assert symmetric(view, 6)[0].abs().amax((1, 2)).tolist() == [31, 0, 31]


def test_symmetric_of_8_bits_is_what_the_kernels_take():
    view = torch.randn(5, 9, 7, generator=seeded())
    for bits in (8, 4):
        pairs = zip(symmetric(view, bits), quantize_weight(view, bits), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(quantize_weight(view)[0], symmetric(view, 8)[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme}-{scheme.bits}")
def test_rounding_moves_a_weight_by_half_a_step_and_zero_not_at_all(scheme):
    view = torch.randn(6, 4, 8, generator=seeded()) * torch.tensor([0.01, 0.1, 1, 1, 3, 0])[:, None, None]
    view[:, :, ::3] = 0
    rounded = scheme.rounded(view)
    reach = (view.max() - view.min()) if scheme.kind == "affine" else 2 * view.abs().max()
    # Powers of two: the step is less than twice as large as it must be.
    step = reach / (2**scheme.bits - 2) * (2 if scheme.kind == "fixed" else 1)
    assert rounded.dtype == torch.float32 and (rounded[view == 0] == 0).all()
    assert ((rounded - view).abs() <= 0.5001 * step).all() and not torch.equal(rounded, view)
    assert (rounded * 1e4).round().unique().numel() <= 2**scheme.bits * (
        6 if scheme.kind == "symmetric" else 1
    )


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda w: fixed_point(w, 127), r"p, the fraction bits, must lie in -126..126, got 127"),
        (lambda w: fixed_point(w, 3, 33), r"bits must lie in 2..32, got 33"),
        (lambda w: affine(w, 9), r"bits must lie in 2..8, got 9"),
        (lambda w: symmetric(w, 1), r"bits must lie in 2..8, got 1"),
        (lambda w: quantize_weight(w, 6), "must be 8 or 4, got 6"),
        (lambda w: Scheme("log", 4), "one of fixed, affine, symmetric, got 'log'"),
        (lambda w: Scheme("affine", 4, p=3), "p is of the kind 'fixed' only"),
        (lambda w: fixed_point(w * math.nan, 3), "NaN or infinite"),
        (lambda w: affine(w * math.inf, 4), "NaN or infinite"),
        (lambda w: symmetric(w * math.nan, 4), "NaN or infinite"),
    ],
)
def test_what_makes_no_sense(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.ones(2, 1, 2))


# ------------------------------------------------------------------ models


def generator():
    """Linear, transposed convolution, norm, grouped convolution; half of the blocks of one layer are zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 64),
            nn.LeakyReLU(0.1),
            nn.Unflatten(1, (4, 4, 4)),
            nn.ConvTranspose2d(4, 8, 4, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, padding=1, groups=2),
            nn.Tanh(),
        ).eval()
        model[4].running_var.uniform_(0.5, 2.0)
        model[4].running_mean.normal_()
    kept = (torch.arange(16) % 2).bool().repeat_interleave(4)[:, None, None]
    model[0].weight.data = from_weight_view(model[0], weight_view(model[0]).detach() * kept)
    return model


Z = (torch.randn(8, 6, generator=seeded(1)),)


def test_a_quantized_copy_rounds_weights_and_nothing_else():
    model, scheme = generator(), Scheme("symmetric", 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded = quantized_copy(model, scheme)
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(model.state_dict()[name], before[name])
        layer = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and not isinstance(layer, nn.BatchNorm2d):
            integers, scale = symmetric(weight_view(layer), 4)
            wanted = from_weight_view(layer, integers * scale[:, None, None])
            assert torch.equal(tensor, wanted) and not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])


def test_what_cannot_be_copied_rounded():
    masked = generator()
    prune(masked, BlockPattern(4, 2), 0.5, "l1", layers=["6"])
    with pytest.raises(ValueError, match=r"layer '6' is computed from a mask.*make that permanent"):
        quantized_copy(masked, Scheme("affine", 4))
    spoilt = generator()
    spoilt[3].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="layer '3': cannot quantise"):
        quantized_copy(spoilt, Scheme("affine", 4))


def test_training_with_rounding_to_4_bits_is_what_4_bit_layers_compute():
    layer, x = nn.Linear(8, 6), torch.rand(5, 8, generator=seeded())
    sparse = SparseLinear.from_dense(
        layer, dtype=torch.int8, x_range=(0.0, 1.0), weight_bits=4, backend="reference"
    )
    with torch.no_grad(), quantization_aware(nn.Sequential(layer), {"0": (0.0, 1.0)}, weight_bits=4):
        got = layer(x)
    torch.testing.assert_close(got, sparse(x))
    model = nn.Sequential(layer)
    with (
        pytest.raises(ValueError, match="must be 8 or 4, got 5"),
        quantization_aware(model, {"0": (0, 1)}, 5),
    ):
        pass
    assert not layer._forward_pre_hooks


# ------------------------------------------------------------------ 4 bits in layers, programs and files


def test_nibbles_by_hand():
    integers = torch.tensor([[1, -1], [7, -7], [0, 3]], dtype=torch.int8)
    nibbles = pack_nibbles(integers)
    assert nibbles.flatten().tolist() == [0xF1, 0x97, 0x30] and nibbles.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(nibbles), integers)
    every = torch.arange(-7, 8, dtype=torch.int8).repeat(15, 1)
    pairs = torch.stack([every, every.T], -1)
    assert torch.equal(unpack_nibbles(pack_nibbles(pairs)), pairs)
    with pytest.raises(ValueError, match=r"must lie in -7..7, got -8"):
        unpack_nibbles(torch.tensor([0x18], dtype=torch.uint8))


def test_only_what_fits_is_narrowed():
    for extreme in (-128, -8, 8, 127):
        wide = torch.tensor([[[1, extreme]]], dtype=torch.int8)
        assert narrowed("values", wide) is wide
    odd, floats = torch.ones(1, 4, 3, dtype=torch.int8), torch.ones(1, 4, 4)
    assert narrowed("values", odd) is odd and narrowed("values", floats) is floats
    bias = torch.ones(4, dtype=torch.int8)
    assert narrowed("bias", bias) is bias
    assert narrowed("cols", torch.tensor([2**15])).dtype == torch.int64
    assert narrowed("cols", torch.tensor([2**15 - 1])).dtype == torch.int16


@pytest.mark.parametrize("empty", [False, True])
def test_a_narrowed_weight_comes_back(empty):
    view = torch.randn(9, 4, 6, generator=seeded()) * (not empty)
    packed = pack_weight(view, None, torch.int8, weight_bits=4)
    assert has_four_bits(packed) == (not empty)
    tensors = {
        field: narrowed(field, getattr(packed, field))
        for field in ("values", "cols", "tap_ptr", "row_channels", "tap_sums", "scale", "bias")
    }
    assert tensors["values"].nbytes * 2 == packed.values.nbytes
    again = from_dict(tensors, packed.in_channels, packed.taps)
    assert again.values.dtype == torch.int8 and torch.equal(again.values, packed.values)
    assert torch.equal(unpack(again), symmetric(view, 4)[0])
    assert not has_four_bits(pack_weight(view, None, torch.int8))


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_4_bit_layer_computes_with_its_rounded_weights(backend):
    layer = nn.Conv2d(8, 6, 3, padding=1)
    x = (
        torch.randint(0, 256, (2, 8, 5, 5), generator=seeded()) / 256
    )  # steps of u8: only the weights are rounded
    sparse = SparseConv2d.from_dense(
        layer, dtype=torch.int8, x_range=(0.0, 255 / 256), weight_bits=4, backend=backend
    )
    wanted = quantized_copy(layer, Scheme("symmetric", 4))(x)
    torch.testing.assert_close(sparse(x), wanted, rtol=1e-4, atol=1e-4)
    assert (sparse(x) - layer(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="weight_bits=4 is for int8 layers"):
        SparseConv2d.from_dense(layer, weight_bits=4)


FOUR = SwapConfig(weight_bits=4, min_speedup=0, backend="reference")


@pytest.fixture(scope="module", params=["programs", "one by one"])
def swapped(request):
    """A swapped model, and which way it was swapped. Captured once: that takes seconds."""

    def no_graph(*_):
        raise CaptureError("not now")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "LAYER_BUDGET", 0.0)
        patch.setattr(exchange, "MODEL_BUDGET", 0.0)
        patch.setattr(
            "sparsegan.swap.programs.quantisation_errors", lambda *_: pytest.fail("a layer was to fall")
        )
        if request.param == "one by one":
            patch.setattr(exchange, "swap_programs", no_graph)
        return swap_to_sparse(generator(), FOUR, Z), request.param


def integers_of(model):
    layers = [module.values for module in model.modules() if isinstance(module, SparseLayer)]
    programs = [module.program for module in model.modules() if isinstance(module, SparseProgram)]
    return layers + [step.weight.values for program in programs for step in program.steps if step.weight]


@torch.no_grad()
def test_a_model_of_4_bits_is_saved_in_half_the_bytes(swapped, tmp_path):
    model, (swapped, way) = generator(), swapped
    integers = integers_of(swapped)
    assert len(integers) == 3 and all(int(i.abs().max()) == 7 and i.dtype == torch.int8 for i in integers)
    explanation = explain(swapped)
    # No layer fell to bf16, though there are not the 40 dB that int8 must have.
    assert [row.dtype for row in explanation.rows] == ["int4"] * 3 and 10 < explanation.psnr < 40
    said = "less than the 40 dB of min_psnr, as weights of 4 bits were asked for"
    assert (said in str(explanation)) == (way == "programs")
    # Norms are folded first, so that the integers are those of the folded weights.
    row = next(r for r in compare_formats(model, Z) if (r.scheme, r.bits) == ("symmetric", 4))
    assert abs(row.psnr - explanation.psnr) < 1.5  # int8 activations are the rest

    save(swapped, tmp_path / "four")
    again = load(tmp_path / "four", backend="reference")
    assert torch.equal(again(*Z), swapped(*Z)) and str(explain(again)) == str(explanation)
    assert all(torch.equal(a, b) for a, b in zip(integers_of(again), integers, strict=True))
    del again.swap_explanation  # what a layer is can be told without it
    assert [row.dtype for row in explain(again).rows] == ["int4"] * 3

    held = load_file(tmp_path / "four")
    values = [tensor for name, tensor in held.items() if name.endswith("values")]
    assert {tensor.dtype for tensor in values} == {torch.uint8}
    stored = sum(tensor.nbytes for tensor in values)
    assert stored * 2 == sum(i.nbytes for i in integers)
    # What the table says is what the file holds.
    assert row.weight_bytes == stored + sum(4 * len(weight_view(model[i])) for i in (0, 3, 6))


@pytest.mark.parametrize(
    "config, inputs, match",
    [
        (SwapConfig(weight_bits=6), Z, "must be 8 or 4, got 6"),
        (SwapConfig("bf16", weight_bits=4), Z, "the number format would be 'bf16'"),
        (SwapConfig(weight_bits=4), None, "would be 'f32': take dtype='int8', which needs example_inputs"),
        (SwapConfig("int4"), Z, "dtype must be 'auto', 'int8', 'f16', 'bf16', 'f32', got 'int4'"),
    ],
)
def test_configs_that_make_no_sense(config, inputs, match):
    with pytest.raises(ValueError, match=match):
        swap_to_sparse(generator(), config, inputs)


def forge(path, edit):
    """Change the tensors of a file and write a fitting checksum."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    held = load_file(path)
    name = next(name for name in held if name.endswith("values") and held[name].numel())
    held[name] = edit(held[name]).contiguous()
    save_file(held, path, {**metadata, "sha256": checkpoint._digest(metadata["content"], held)})


HOSTILE = {
    "a block too many": (lambda t: torch.cat([t, t[:1]]), r"tap_ptr must run from 0 to the number of blocks"),
    "a block too few": (lambda t: t[1:], r"tap_ptr must run from 0 to the number of blocks"),
    "a row too few": (lambda t: t[:, 1:], r"row_channels must have \d+ entries, got \d+"),
    "bytes without a shape": (lambda t: t.flatten(), r"values must have 3 dimension\(s\), got shape"),
    "no bytes": (lambda t: t[:, :, :0], r"blocks of at least one weight"),
    "a -8": (lambda t: t & 0xF0 | 8, r"must lie in -7..7, got -8"),
    "another type": (lambda t: t.short(), r"values must be torch.int8 or .*, got torch.int16"),
}


@pytest.mark.parametrize("edit, match", HOSTILE.values(), ids=HOSTILE)
def test_hostile_4_bit_files(swapped, tmp_path, edit, match):
    path = tmp_path / "m"
    save(swapped[0], path)
    forge(path, lambda t: t)
    load(path)
    forge(path, edit)
    with pytest.raises(ValueError, match=match):
        load(path)


def test_a_buffer_that_is_named_like_columns_is_left_as_it_is(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("my_cols", torch.full((8,), 0.25))
            self.register_buffer("my_values", torch.ones(8, dtype=torch.int8))

        def forward(self, x):
            return torch.cumsum(self.layer(x), 1) + self.my_cols * self.my_values

    model, x = Shifted().eval(), torch.randn(4, 8, generator=seeded())
    graph = lower(capture(model, (x,)), backend="reference").model
    assert any(isinstance(module, SparseProgram) for module in graph.modules())
    save(graph, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", backend="reference")(x), graph(x))


# ------------------------------------------------------------------ the table


def test_the_table_of_formats():
    model = generator()
    rows = compare_formats(model, Z)
    first, *rest = rows
    assert (first.scheme, first.bits, first.weight_error, first.psnr) == ("float32", 32, 0.0, math.inf)
    # Packed blocks of 4x4 or 8x4: half of 64 x 8, 8 x 16 x 4, and of the grouped one 4 x 9 x 8 (in blocks across both groups).
    assert first.weight_bytes == 4 * (32 * 8 + 8 * 16 * 4 + 4 * 9 * 8)
    assert [(row.scheme, row.bits) for row in rest] == [(str(s), s.bits) for s in SCHEMES]
    for kind in ("fixed", "affine", "symmetric"):
        eight, six, four = (row for row in rest if row.scheme == kind)
        assert 0 < eight.weight_error < six.weight_error / 2 < four.weight_error / 4
        assert eight.psnr > six.psnr + 3 > four.psnr + 6
        assert eight.weight_bytes > six.weight_bytes > four.weight_bytes
    best = min((row for row in rest if row.bits == 4), key=lambda row: row.weight_error)
    assert best.scheme == "symmetric"

    hand = compare_formats(model, Z, [Scheme("fixed", 4, p=3)])[1]
    assert hand.scheme == "fixed 2^-3" and hand.weight_bytes == first.weight_bytes // 8 + 3


def test_the_weight_error_of_the_table_by_hand():
    layer = nn.Linear(4, 4, bias=False).eval()
    layer.weight.data = torch.tensor([[1.0, 0.25, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    x = torch.eye(4)[:2]
    _, row = compare_formats(nn.Sequential(layer).eval(), (x,), [Scheme("fixed", 3, p=1)])
    # 0.25 * 2 = 0.5 rounds to 0, all else is exact: one error of 0.25 beside a power of 4 + 1/16.
    assert row.weight_error == pytest.approx(0.25 / math.sqrt(4.0625))
    # It reaches one of 8 outputs, whose range is 0..1.
    assert row.psnr == pytest.approx(10 * math.log10(1 / (0.0625 / 8)))
    assert row.weight_bytes == 16 * 3 // 8 + 1


def test_the_table_is_of_folded_norms_and_permanent_masks():
    masked, schemes = generator(), [Scheme("affine", 6)]
    prune(masked, BlockPattern(4, 2), 0.5, "l1", layers=["6"])
    plain = make_permanent(copy.deepcopy(masked))
    folded = copy.deepcopy(plain)
    assert fold_batch_norm(folded)
    rows = [compare_formats(model, Z, schemes) for model in (masked, plain, folded)]
    assert rows[0] == rows[1] == rows[2]


def test_models_without_a_table():
    with pytest.raises(ValueError, match="no Linear, Conv2d or ConvTranspose2d"):
        compare_formats(nn.Tanh().eval(), Z)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        compare_formats(generator().train(), Z)
