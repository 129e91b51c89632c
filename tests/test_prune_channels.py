"""Channel pruning: the narrower copy computes what it should, is as small as asked, and was worth refitting."""

import copy
import warnings

import pytest
import torch
from channel_cases import KINDS, Random, case, double, images
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune_dependencies import model_case
from torch import nn

from sparsegan.models import seeded
from sparsegan.models.dcgan import dcgan_generator
from sparsegan.models.stylegan2 import StyleGAN2Generator
from sparsegan.patterns import from_weight_view, weight_view
from sparsegan.prune import count_macs
from sparsegan.prune.channels import gate_scores, prune_channels
from sparsegan.prune.dependencies import channel_groups
from sparsegan.prune.trace import prunable_layers


def by_magnitude(name, layer, view):
    return view.square()


def zeroed(model, small):
    """``model`` with zeros in the columns of weights that ``small`` has not, found by their values."""
    model = copy.deepcopy(model)
    for name, layer in prunable_layers(model).items():
        wide, narrow = weight_view(layer), weight_view(small.get_submodule(name))
        if wide.shape[2] != narrow.shape[2]:
            stays = torch.isin(wide, narrow).flatten(0, 1).any(0)
            assert stays.sum() == narrow.shape[2]
            layer.weight.data = from_weight_view(layer, wide * stays)
    if isinstance(model, StyleGAN2Generator):
        model.refresh()
    return model


@pytest.mark.parametrize(
    "name", ["gated", "shared", "written", "dcgan", "vae", "residual", "u-net", "cyclegan", "stylegan2"]
)
def test_without_refit_removed_channels_are_zeros_where_they_are_read(name):
    model, inputs = model_case(name)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a norm that was not told its width warns
        small = prune_channels(model, inputs, 0.3, importance=by_magnitude, align=2, refit=False)
        got = small(*inputs)
    want = zeroed(model, small)(*inputs)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), min_size=2, max_size=6))
def test_any_graph_stays_whole(steps):
    # Another layer in front, so that there is always something to remove.
    model = double(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), Random(steps)), 0))
    # `prune_channels` itself compares the copy with the model, where nothing is normalised over channels.
    small = prune_channels(model, (images(),), 0.02, align=2, importance=by_magnitude, refit=False)
    assert small(images()).isfinite().all() and small(images()).shape == model(images()).shape


def test_group_norm_keeps_its_groups_equally_wide():
    model, inputs = case("up")
    small = prune_channels(model, inputs, widths={"up": 16, "linear": 64}, importance=by_magnitude)
    assert (small.norm.num_groups, small.norm.num_channels, small.up.out_channels) == (4, 16, 16)
    assert (small.linear.out_features, small.up.in_channels) == (64, 4)
    assert (small.depthwise.groups, small.slope.num_parameters, small.last.in_channels) == (4, 4, 12)
    assert (small.wide.groups, small.wide.in_channels, small.wide.out_channels) == (4, 4, 8)
    assert small.layer_norm.normalized_shape == (4,)
    assert small(*inputs).shape == model(*inputs).shape
    # Of each quarter of the rows, a norm group, half are left.
    old = weight_view(model.up).flatten(1)
    small = prune_channels(model, inputs, widths={"up": 16}, importance=by_magnitude, refit=False)
    left = [(row == old).all(1).nonzero().item() for row in weight_view(small.up).flatten(1)]
    assert left == sorted(left) and [row // 8 for row in left] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


@pytest.mark.parametrize("allocate", ["uniform", "damage"])
@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_removes_what_was_asked_for_in_multiples(sparsity, allocate):
    model = seeded(lambda: dcgan_generator(16, (64, 64, 32)), 0)
    inputs = (torch.randn(1, 16, 1, 1),)
    small = prune_channels(
        model, inputs, sparsity, importance=by_magnitude, allocate=allocate, align=4, refit=False
    )
    share = sum(count_macs(small, inputs).values()) / sum(count_macs(model, inputs).values())
    assert 1 - sparsity - 0.1 < share <= 1 - sparsity
    widths = [layer.out_channels for layer in prunable_layers(small).values()][:-1]
    assert all(width % 4 == 0 for width in widths) and len(set(widths)) > 1
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


def test_widths_are_multiples_across_the_groups_of_a_norm():
    model, inputs = case("up")
    small = prune_channels(model, inputs, 0.5, importance=by_magnitude, align=4, refit=False)
    assert small.depthwise.in_channels == 4 and small.norm.num_groups == 4  # of 8, two in each group


def test_diffusers_decoder_of_stable_diffusion():
    diffusers = pytest.importorskip("diffusers")

    def build() -> nn.Module:
        return diffusers.AutoencoderKL(
            up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 32), norm_num_groups=4
        ).decoder

    model, inputs = seeded(build, 0), (torch.randn(1, 4, 4, 4),)
    small = prune_channels(model, inputs, 0.6, importance=by_magnitude, align=8, refit=False)
    assert small.conv_in.out_channels < 32 and small.up_blocks[0].upsamplers[0].conv.in_channels < 32
    assert small(*inputs).shape == model(*inputs).shape
    assert sum(count_macs(small, inputs).values()) <= 0.4 * sum(count_macs(model, inputs).values())


def test_the_least_important_channels_go():
    model = seeded(lambda: dcgan_generator(8, (8, 8)), 0)
    inputs = (torch.randn(4, 8, 1, 1),)
    with torch.no_grad():
        model[3].weight[[1, 4, 6, 7]] *= 1e-4  # hardly read
    small = prune_channels(model, inputs, widths={"0": 4}, refit=False)
    assert torch.equal(small[0].weight, model[0].weight[:, [0, 2, 3, 5]])
    assert torch.equal(small[1].running_var, model[1].running_var[[0, 2, 3, 5]])


def test_gate_scores_are_the_squared_change_of_the_image():
    """Of a model that is linear in every gate, so that the first order is all there is."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)).double()
    inputs = (images(n=8),)
    groups = channel_groups(model, inputs)
    (group,) = (group for group in groups if not group.fixed)
    (scores,) = gate_scores(model, [group], inputs, torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, exact = model(*inputs), []
        for channel in range(6):
            without = copy.deepcopy(model)
            without[1].weight[:, channel] = 0
            exact.append((without(*inputs) - whole).square().sum((1, 2, 3)).mean())
    assert torch.allclose(scores, torch.stack(exact), rtol=0.35)  # 320 draws of v


def test_refit_brings_back_what_the_other_channels_know():
    model = seeded(lambda: dcgan_generator(8, (16, 16), 3), 0)
    inputs = (torch.randn(2, 8, 1, 1),)
    with torch.no_grad():  # each channel twice: half of them can go for nothing
        for conv, norm in ((0, 1), (3, 4)):
            model[conv].weight[:, 8:] = model[conv].weight[:, :8].flip(1)
            for parameter in model[norm].state_dict().values():
                if parameter.dim():
                    parameter[8:] = parameter[:8].flip(0)
    z = (torch.randn(64, 8, 1, 1, generator=torch.Generator().manual_seed(3)),)

    def the_last(name, layer, view):
        return torch.ones_like(view).cumsum(0) + torch.ones_like(view).cumsum(2)

    plain, refitted = (
        prune_channels(model, inputs, widths={"0": 8, "3": 8}, importance=the_last, refit=refit)
        for refit in (False, True)
    )
    want = model(*z)
    error = [(small(*z) - want).square().mean() / want.square().mean() for small in (plain, refitted)]
    assert error[0] > 0.1 and error[1] < 1e-3


def test_widths_written_in_the_code_are_left_alone():
    model, inputs = case("written")
    small = prune_channels(model, inputs, 0.3, importance=by_magnitude)
    assert small.linear.out_features == 32 and small.hidden.out_channels == 4
    with pytest.raises(ValueError, match="'linear' cannot be removed: their number is written in the code"):
        prune_channels(model, inputs, widths={"linear": 16})


def test_bad_arguments_are_refused():
    model, inputs = model_case("u-net")
    for arguments, message in (
        ({}, "either sparsity"),
        ({"sparsity": 0.5, "widths": {"down.0": 2}}, "either sparsity"),
        ({"sparsity": 1.0}, r"in \[0, 1\); got 1.0"),
        ({"sparsity": 0.999}, "at most 0.87"),
        ({"sparsity": 0.5, "align": 0}, "align is at least 1"),
        ({"sparsity": 0.5, "importance": "l3"}, "got 'l3'"),
        ({"sparsity": 0.5, "layers": ["down.O"]}, "there is no layer 'down.O'; there are: down.2, down.0"),
        ({"widths": {"up.1.1": 5}}, "'up.1.1' cannot have 5 output channels: it has 4"),
        ({"widths": {"up.1.1": 0}}, "cannot have 0"),
        ({"widths": {"up.2.1": 2}}, "'up.2.1' cannot be removed: an output of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_channels(model, inputs, **{"importance": by_magnitude, "align": 1, **arguments})
    model, inputs = case("cut")
    with pytest.raises(ValueError, match=r"'first' cannot be removed: they are cut into parts \(chunk|split"):
        prune_channels(model, inputs, widths={"first": 6})
