"""Channel permutation: the function stays, the blocks get heavier, and what was hidden is found."""

import copy

import pytest
import torch
from channel_cases import CASES
from test_prune_dependencies import MODELS, model_case
from torch import nn

from sparsegan.models import seeded
from sparsegan.models.dcgan import dcgan_generator
from sparsegan.patterns import BlockPattern, NMPattern, weight_view
from sparsegan.prune import prune
from sparsegan.prune.permute import permute_channels
from sparsegan.prune.trace import prunable_layers


@pytest.mark.parametrize("name", [*CASES, *MODELS])
def test_function_stays_and_no_layer_loses(name):
    model, inputs = model_case(name)
    want, weights = model(*inputs), copy.deepcopy(model.state_dict())
    layers = [
        n for n, layer in prunable_layers(model).items() if getattr(layer, "groups", 1) == 1 and n != "alias"
    ]
    report = permute_channels(model, BlockPattern(2, 2), inputs, importance="l2", layers=layers)
    assert (model(*inputs) - want).abs().max() <= 1e-9 * want.abs().max()
    assert report.after >= report.before and set(report.layers) == set(layers)
    assert report.after > report.before or name in ("unknown", "cut")
    moved = any(not torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert moved == (report.after > report.before)


def hidden_blocks(pattern: BlockPattern, seed: int) -> nn.Sequential:
    """Layers of heavy and light blocks of weights, half of each, whose channels were shuffled."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Conv2d(32, 32, 1, bias=False) for _ in range(4)))
    order = torch.arange(32)
    for layer in model:
        heavy = torch.rand(32 // pattern.bo, 1, 32 // pattern.bk, generator=generator)
        heavy = pattern.expand(heavy >= heavy.median(), (32, 1, 32))
        view = torch.where(heavy, 1.0, 0.01) * (1 + torch.rand(32, 1, 32, generator=generator))
        after = torch.randperm(32, generator=generator) if layer is not model[-1] else torch.arange(32)
        layer.weight.data = view[after][:, :, order].permute(0, 2, 1)[..., None].contiguous()
        order = after
    return model


@pytest.mark.parametrize("size", [(4, 4), (8, 4), (4, 8)], ids=str)
def test_hidden_blocks_are_found(size):
    pattern = BlockPattern(*size)
    model = hidden_blocks(pattern, 0)
    inputs = (torch.randn(1, 32, 2, 2),)
    # The channels of inputs and outputs stay, so the layers between hold what can be gained.
    report = permute_channels(model, pattern, inputs, 0.5, importance="l2", layers=["0", "1", "2", "3"])
    assert report.before < 0.8 and report.after > 0.93, report
    assert set(report.refused) == {"3"}


def test_pruning_then_keeps_what_the_report_says():
    pattern = BlockPattern(4, 4)
    model = seeded(lambda: dcgan_generator(16, (32, 32, 16)), 0)
    inputs = (torch.randn(1, 16, 1, 1),)
    with torch.no_grad():
        for layer in prunable_layers(model).values():
            layer.weight *= torch.rand(layer.weight.shape[:2])[:, :, None, None] ** 4
    report = permute_channels(model, pattern, inputs, 0.75, importance="l2")
    assert report.after > report.before + 0.05
    for name, (_, after) in report.layers.items():
        layer = prunable_layers(model)[name]
        total = weight_view(layer).square().sum()
        pruned = prune(copy.deepcopy(model), pattern, 0.75, "l2", layers=[name])
        kept = weight_view(pruned.get_submodule(name)).square().sum()
        assert kept / total == pytest.approx(after, abs=1e-5)


def test_obd_is_deterministic():
    inputs = (torch.randn(1, 16, 1, 1),)
    models = [seeded(lambda: dcgan_generator(16, (16, 16)), 0) for _ in range(2)]
    reports = [permute_channels(model, BlockPattern(4, 4), inputs, seed=3) for model in models]
    assert reports[0] == reports[1] and reports[0].after > reports[0].before
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_wrong_group_is_undone(monkeypatch):
    """As if the dependencies had been misunderstood: the reader of a channel is forgotten."""
    from importlib import import_module

    permute = import_module("sparsegan.prune.permute")
    groups = permute.channel_groups

    def forgetful(*args):
        return [type(g)(**{**g.__dict__, "consumers": ()}) for g in groups(*args)]

    monkeypatch.setattr(permute, "channel_groups", forgetful)
    model, inputs = model_case("dcgan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"would change its output by .*left as it was"):
        permute_channels(model, BlockPattern(2, 2), inputs, importance="l2", layers=["0", "3"])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_bad_arguments_are_refused():
    model, inputs = model_case("dcgan")
    block = BlockPattern(2, 2)
    with pytest.raises(TypeError, match="a BlockPattern such as 32x32; got NMPattern"):
        permute_channels(model, NMPattern(2, 4), inputs)
    for arguments, message in (
        ({"sparsity": 1.0}, r"in \(0, 1\); got 1.0"),
        ({"importance": "l3"}, "unknown importance 'l3'"),
        ({"layers": ["1"]}, "no layer '1' that the model calls; there are: 0, 3, 6"),
        ({"layers": []}, "no layer to prune"),
    ):
        with pytest.raises(ValueError, match=message):
            permute_channels(model, block, inputs, **{"importance": "l2", **arguments})
