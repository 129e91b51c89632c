"""The weight view and the mask patterns, against loops over single weights."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparsegan.patterns import (
    BlockPattern,
    ChannelPattern,
    NMPattern,
    detect_pattern,
    effective_weight,
    from_weight_view,
    parse_pattern,
    pattern_for,
    weight_view,
)

LAYERS = [
    nn.Linear(10, 7),
    nn.Conv2d(3, 5, (3, 2)),
    nn.Conv2d(6, 9, (2, 3), groups=3),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.ConvTranspose2d(5, 3, (2, 3)),
    nn.ConvTranspose2d(6, 9, (3, 2), groups=3),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_view_puts_each_weight_where_its_output_tap_and_input_are(layer):
    view = weight_view(layer)
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        assert torch.equal(view[:, 0], weight)
        return
    out, inner = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    kh, kw = layer.kernel_size
    assert view.shape == (layer.out_channels, kh * kw, inner)
    for o, c, y, x in itertools.product(range(layer.out_channels), range(inner), range(kh), range(kw)):
        # A transposed convolution is stored [C, O / groups, kh, kw].
        row, column = (o, c) if isinstance(layer, nn.Conv2d) else (o // out * inner + c, o % out)
        assert view[o, y * kw + x, c] == weight[row, column, y, x]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_from_weight_view_is_the_inverse(layer):
    back = from_weight_view(layer, weight_view(layer))
    assert torch.equal(back, layer.weight) and back.is_contiguous()


def test_view_of_another_tensor_and_errors():
    layer = nn.ConvTranspose2d(4, 6, 2)
    other = torch.randint(0, 2, layer.weight.shape, dtype=torch.bool)
    assert torch.equal(from_weight_view(layer, weight_view(layer, other)), other)
    with pytest.raises(ValueError, match=r"\(6, 4, 4\), got \(4, 4, 6\)"):
        from_weight_view(layer, torch.zeros(4, 4, 6))
    for broken in (weight_view, lambda layer: from_weight_view(layer, torch.zeros(1, 1, 1))):
        with pytest.raises(TypeError, match="Linear, Conv2d, ConvTranspose2d; got BatchNorm2d"):
            broken(nn.BatchNorm2d(3))


def test_effective_weight_follows_torch_pruning_and_parametrizations():
    layer = nn.Linear(8, 8)
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(2)  # layer.weight is stale until the next forward pass
    assert torch.equal(effective_weight(layer), layer.weight_orig * layer.weight_mask)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = nn.Linear(8, 8)
    weight = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Double())
    assert torch.equal(weight_view(layer)[:, 0], 2 * weight)


shapes = st.tuples(st.integers(1, 13), st.integers(1, 4), st.integers(1, 13))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_block_groups(shape, bo, bk, seed):
    pattern = BlockPattern(bo, bk)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 100, shape, generator=generator)
    sums = pattern.group_sums(scores)
    kept = torch.rand(sums.shape, generator=generator) < 0.5
    mask = pattern.expand(kept, shape)
    for r, t, k in itertools.product(*map(range, sums.shape)):
        block = (slice(r * bo, (r + 1) * bo), t, slice(k * bk, (k + 1) * bk))
        assert sums[r, t, k] == scores[block].sum()
        assert bool((mask[block] == kept[r, t, k]).all())
    assert sums.sum() == scores.sum() and mask.shape == shape
    assert pattern.respected_by(mask)


def test_channel_groups():
    scores = torch.arange(24.0).reshape(4, 3, 2)
    pattern = ChannelPattern()
    assert pattern.group_sums(scores).tolist() == [15, 51, 87, 123]
    mask = pattern.expand(torch.tensor([True, False, False, True]), (4, 3, 2))
    assert mask.sum((1, 2)).tolist() == [6, 0, 0, 6]


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_nm_keeps_the_best_n_of_every_run(shape, n, extra, seed):
    m = n + extra
    pattern = NMPattern(n, m)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kept = pattern.expand(pattern.best(pattern.group_sums(scores)), shape)
    for start in range(0, shape[2], m):
        run, chosen = scores[:, :, start : start + m], kept[:, :, start : start + m]
        count = min(n, run.shape[2])
        assert bool((chosen.sum(-1) == count).all())
        assert torch.equal(run[chosen].view(*shape[:2], count).sort(-1)[0], run.topk(count)[0].sort(-1)[0])
    assert pattern.respected_by(kept)


def test_nm_prefers_the_earlier_channel_on_a_tie():
    assert NMPattern(2, 4).best(torch.zeros(1, 1, 6)).tolist() == [[[True, True, False, False, True, True]]]


@pytest.mark.parametrize("pattern", [BlockPattern(4, 4), ChannelPattern(), NMPattern(2, 4)], ids=str)
def test_expand_refuses_groups_of_another_shape(pattern):
    with pytest.raises(ValueError, match="got kept of shape"):
        pattern.expand(torch.ones(3, 1, 3, dtype=torch.bool), (8, 1, 8))


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("4x4", BlockPattern(4, 4)),
        ("8x4", BlockPattern(8, 4)),
        (" 32X16 ", BlockPattern(32, 16)),
        ("channel", ChannelPattern()),
        ("2:4", NMPattern(2, 4)),
    ],
)
def test_parse_pattern(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern and pattern.name == str(pattern)


@pytest.mark.parametrize("text", ["", "4", "4x", "4x4x4", "4*4", "0x4", "4x-4", "4:2", "2:2", "0:4", "²x4"])
def test_parse_pattern_refuses(text):
    with pytest.raises(ValueError):
        parse_pattern(text)


def test_pattern_for():
    assert pattern_for("cpu", torch.int8) == BlockPattern(8, 4)
    assert pattern_for(torch.device("cuda", 1), torch.bfloat16) == BlockPattern(32, 32)
    with pytest.raises(ValueError, match=r"no pattern for cpu torch.float64.*cpu torch.int8"):
        pattern_for("cpu", torch.float64)


@pytest.mark.parametrize(
    "name", ["32x32", "16x16", "8x8", "16x4", "8x4", "4x4", "4x1", "1x4", "1x1", "channel"]
)
def test_detect_finds_the_coarsest_pattern(name):
    generator = torch.Generator().manual_seed(0)
    pattern = parse_pattern(name)
    view = torch.randn(70, 4, 66, generator=generator)
    kept = torch.rand(pattern.group_sums(view).shape, generator=generator) < 0.6
    kept.view(-1)[:2] = torch.tensor([True, False])
    assert detect_pattern(view * pattern.expand(kept, tuple(view.shape))) == pattern


def test_detect_nm_dense_and_all_zero():
    view = torch.randn(9, 4, 18, generator=torch.Generator().manual_seed(0))
    for pattern in (NMPattern(1, 4), NMPattern(2, 4)):
        assert detect_pattern(view * pattern.best(view)) == pattern
    assert detect_pattern(view) is None
    assert detect_pattern(torch.zeros(4, 1, 4)) == ChannelPattern()


def test_stray_zeros_do_not_hide_a_pattern():
    g = torch.Generator().manual_seed(0)
    view = torch.randn(64, 9, 64, generator=g)
    stray = torch.rand(view.shape, generator=g) < 0.002
    assert detect_pattern(view.masked_fill(stray, 0)) is None
    kept = torch.rand(16, 9, 16, generator=g) < 0.3
    blocks = view * kept.repeat_interleave(4, 0).repeat_interleave(4, 2)
    assert detect_pattern(blocks.masked_fill(stray, 0)) == BlockPattern(4, 4)
    many = torch.rand(view.shape, generator=g) < 0.1
    assert str(detect_pattern(blocks.masked_fill(many, 0))) == "1x1"
