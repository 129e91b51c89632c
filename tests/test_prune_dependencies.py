"""Groups of channels: that all which belongs together moves together, and that nothing is guessed."""

import copy
import functools

import pytest
import torch
from channel_cases import CASES, KINDS, Random, case, double, images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsegan.models import UNetGenerator, cyclegan_generator, dcgan_generator, seeded
from sparsegan.models.residual import ResidualGenerator
from sparsegan.models.stylegan2 import StyleGAN2Generator
from sparsegan.models.vae import vae_decoder
from sparsegan.patterns import BlockPattern
from sparsegan.prune import prune
from sparsegan.prune.dependencies import ChannelGroup, channel_groups

MODELS = {
    "dcgan": (lambda: dcgan_generator(8, (16, 8)), torch.randn(2, 8, 1, 1)),
    "vae": (lambda: vae_decoder(4, 8, 4, (8, 4)), torch.randn(2, 4)),
    "residual": (lambda: ResidualGenerator(8, 4, (2, 2, 1)), torch.randn(2, 8)),
    "u-net": (lambda: UNetGenerator(4, 3), torch.randn(2, 3, 8, 8)),
    "cyclegan": (lambda: cyclegan_generator(4, 1), torch.randn(2, 3, 16, 16)),
    "stylegan2": (lambda: StyleGAN2Generator(8, 8, 64, 8, 2), torch.randn(2, 8)),
}


def model_case(name: str) -> tuple[nn.Module, tuple[torch.Tensor]]:
    if name in CASES:
        return case(name)
    build, x = MODELS[name]
    model = double(seeded(build, 0))
    if isinstance(model, StyleGAN2Generator):
        model.refresh()  # in float64, too
    return model, (x.double(),)


def shuffle(model: nn.Module, groups: list[ChannelGroup], seed: int = 0) -> int:
    """Permute every free group at random, in place; how many were free."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    free = [group for group in groups if not group.fixed and group.size > 1]
    for group in free:
        order = torch.randperm(group.size, generator=generator)
        for axis in group.axes:
            tensor = tensors[axis.parameter]
            index = torch.arange(tensor.shape[axis.dim])
            index[axis.positions] = axis.positions[order]
            tensor.copy_(tensor.index_select(axis.dim, index))
    return len(free)


def assert_same(model: nn.Module, want: torch.Tensor, inputs: tuple) -> None:
    assert (model(*inputs) - want).abs().max() <= 1e-9 * want.abs().max()


@functools.cache
def groups_of(name: str) -> list[ChannelGroup]:
    return channel_groups(*model_case(name))


def by_layer(groups: list[ChannelGroup]) -> dict[str, list[ChannelGroup]]:
    found: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        for axis in group.producers:
            found.setdefault(axis.layer, []).append(group)
    return found


@pytest.mark.parametrize("name", [*CASES, *MODELS])
def test_permuting_every_group_leaves_the_function(name):
    model, inputs = model_case(name)
    want, before = model(*inputs), copy.deepcopy(model.state_dict())
    assert shuffle(model, groups_of(name)) > 0
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert_same(model, want, inputs)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), min_size=2, max_size=7))
def test_permuting_every_group_leaves_the_function_of_any_graph(steps):
    model, inputs = double(seeded(lambda: Random(steps), 0)), (images(),)
    want = model(*inputs)
    shuffle(model, channel_groups(model, inputs))
    assert_same(model, want, inputs)


@pytest.mark.parametrize("name", [*MODELS])
def test_all_but_inputs_and_outputs_is_free(name):
    groups = groups_of(name)
    ends = {"", "an input of the model", "an output of the model"}
    assert {group.fixed for group in groups if group.producers or not group.fixed} <= ends
    assert not any(group.unprunable for group in groups)


def test_what_is_one_channel_is_in_one_group():
    groups = by_layer(groups_of("residual"))
    (skip,) = groups["blocks.0.skip"]
    assert groups["blocks.0.conv2"] == [skip]  # they are added
    assert {axis.layer for axis in skip.consumers} == {"blocks.1.conv1", "blocks.1.skip"}
    assert {axis.parameter for axis in skip.others} == {
        *(f"blocks.1.norm1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        "blocks.0.skip.bias",
        "blocks.0.conv2.bias",
    }
    # 16 features of the linear layer are one channel of the map.
    (first,) = groups["linear"]
    assert torch.equal(first.producers[0].positions, torch.arange(8 * 16).view(8, 16))
    # A concatenation: both maps keep their own order, at their own columns.
    groups = by_layer(groups_of("u-net"))
    (down,), (up,) = groups["down.0"], groups["up.1.1"]
    columns = [axis.positions.view(-1) for axis in (down.consumers[1], up.consumers[0])]
    assert [axis.layer for axis in (down.consumers[1], up.consumers[0])] == ["up.2.1"] * 2
    assert torch.equal(torch.cat(columns), torch.arange(8))


def test_groups_of_a_group_norm_stay_apart_and_equally_wide():
    parts = by_layer(groups_of("up"))["up"]
    assert [part.size for part in parts] == [2] * 4  # of 8 channels, 4 outputs each for the pixel shuffle
    assert len({part.family for part in parts}) == 1 and not any(part.exact for part in parts)
    assert torch.equal(parts[1].producers[0].positions, torch.arange(8, 16).view(2, 4))


def test_what_is_cut_apart_is_not_exchanged_nor_removed():
    groups = by_layer(groups_of("cut"))
    # Half of `first` goes left, half right; one of the left channels is used alone and lies in no group of several.
    assert sorted(group.size for group in groups["first"]) == [1, 5, 6]
    assert all("cut into parts" in group.unprunable or group.fixed for group in groups["first"])
    # The mean reads half of what `left` and `right` make, so the halves stay apart.
    assert [group.size for group in groups["left"]] == [4, 4] and not any(g.fixed for g in groups["left"])
    assert all(group.unprunable for group in groups["left"])


def test_what_is_not_understood_is_fixed_with_the_reason():
    groups = by_layer(groups_of("unknown"))
    assert all("cumsum is not understood" in group.fixed for group in groups["first"])
    assert [group.fixed for group in groups["hidden"]] == [""]
    groups = by_layer(groups_of("shared"))
    # Its weight is not a layer's alone, so nothing is known of what it reads and writes.
    assert "used" not in groups and all(group.fixed for group in groups["between"])
    assert not any(group.fixed for group in groups["twice"]) and "alias" not in groups


def test_demodulation_reads_what_the_convolution_reads():
    groups = groups_of("stylegan2")
    (read,), (written,) = (by_layer(groups)[f"conv.{layer}"] for layer in ("affine", "conv"))
    assert [(axis.parameter, axis.dim) for axis in read.readers] == [("conv.energy", 1)]
    assert [(axis.parameter, axis.dim) for axis in read.others if axis.dim] == [("constant", 1)]
    assert ("conv.energy", 0) in [(axis.parameter, axis.dim) for axis in written.others]


@pytest.mark.parametrize("name", ["plain", "batched", "summed"])
def test_only_matrices_that_do_nothing_but_multiply_have_channels(name):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 3)
            self.table = nn.Parameter(torch.randn(*((2, 6, 6) if name == "batched" else (6, 6))))

        def forward(self, x):
            x = self.first(x)
            table = self.table + self.table.sum() if name == "summed" else self.table
            return self.last((x @ table).reshape(-1, 6))

    model = Product()
    groups = by_layer(channel_groups(model, (torch.randn(2, 3),)))
    assert bool(groups["first"][0].fixed) == (name != "plain")
    if name == "plain":
        assert [axis.dim for axis in groups["first"][0].readers] == [0]


def test_the_model_is_left_as_it_was():
    model, inputs = case("up")
    model.train()
    before = copy.deepcopy(model.state_dict())
    channel_groups(model, inputs)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_masked_models_are_refused():
    model, inputs = model_case("dcgan")
    prune(model, BlockPattern(4, 4), 0.5, "l2", inputs, layers=["3"])
    with pytest.raises(ValueError, match=r"'3' is masked: .*make_permanent"):
        channel_groups(model, inputs)


def test_a_model_that_cannot_be_traced_is_refused():
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="cannot trace Branches"):
        channel_groups(Branches(3, 3), (torch.ones(1, 3),))


def test_diffusers_decoder():
    diffusers = pytest.importorskip("diffusers")

    def build() -> nn.Module:
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).decoder

    model, inputs = double(seeded(build, 0)), (images(4),)
    want = model(*inputs)
    assert shuffle(model, channel_groups(model, inputs)) >= 4
    assert_same(model, want, inputs)
