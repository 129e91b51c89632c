"""Channel permutation: the function stays, the blocks get heavier, and what was hidden is found."""

import copy

import pytest
import torch
from channel_cases import CASES
from test_prune_dependencies import MODELS, model_case
from torch import nn

from sparsegan.models import seeded
from sparsegan.models.dcgan import dcgan_generator
from sparsegan.patterns import BlockPattern, NMPattern, from_weight_view, weight_view
from sparsegan.prune import make_permanent, prune
from sparsegan.prune.permute import permute_channels
from sparsegan.prune.trace import prunable_layers


def by_magnitude(name, layer, view):
    return view.square()


def uneven(model: nn.Module) -> nn.Module:
    """``model`` with layers that write half of their channels, here and there, with little weight."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in prunable_layers(model).values():
            view = weight_view(layer)
            light = torch.randperm(len(view), generator=generator)[: len(view) // 2]
            view[light] *= 0.1
            layer.weight.copy_(from_weight_view(layer, view))
    return model


def dcgan() -> nn.Module:
    return uneven(seeded(lambda: dcgan_generator(16, (32, 32, 16)), 0))


@pytest.mark.parametrize("name", [*CASES, *MODELS])
def test_function_stays(name):
    model, inputs = model_case(name)
    uneven(model)
    want, weights = model(*inputs), copy.deepcopy(model.state_dict())
    layers = [n for n, layer in prunable_layers(model).items() if getattr(layer, "groups", 1) == 1]
    report = permute_channels(model, BlockPattern(2, 2), inputs, importance=by_magnitude, layers=layers)
    assert (model(*inputs) - want).abs().max() <= 1e-9 * want.abs().max()
    assert report.after >= report.before and set(report.layers) == set(layers)
    moved = any(not torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert moved == (report.after > report.before)
    assert moved or name.startswith("up")  # whose channels have many rows each, light and heavy


@pytest.mark.parametrize("importance", ["obd", lambda name, layer, view: view.square()], ids=["obd", "l2"])
def test_light_channels_are_gathered(importance):
    model, inputs = dcgan(), (torch.randn(1, 16, 1, 1),)
    report = permute_channels(model, BlockPattern(8, 8), inputs, 0.5, importance=importance)
    assert 1 - report.after < (1 - report.before) / 2
    assert set(report.layers) == {"3", "6"} and report.refused == {"9": "an output of the model"}
    if importance != "obd":  # for the image, what the norm makes of a light channel counts too
        norms = weight_view(model[3]).square().sum((1, 2))
        assert norms[:16].min() > norms[16:].max()


def test_blocks_that_are_there_are_not_torn():
    model, inputs = seeded(lambda: dcgan_generator(16, (32, 32, 16)), 0), (torch.randn(1, 16, 1, 1),)
    make_permanent(prune(model, BlockPattern(8, 8), 0.5, "l2", layers=["3", "6"]))
    before = copy.deepcopy(model.state_dict())
    report = permute_channels(
        model, BlockPattern(8, 8), inputs, 0.5, importance=by_magnitude, layers=["3", "6"]
    )
    assert report.before == report.after == pytest.approx(1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_pruning_then_keeps_what_the_report_says():
    pattern, inputs, model = BlockPattern(4, 4), (torch.randn(1, 16, 1, 1),), dcgan()
    report = permute_channels(model, pattern, inputs, 0.75, importance=by_magnitude)
    for name, (_, after) in report.layers.items():
        total = weight_view(prunable_layers(model)[name]).square().sum()
        pruned = prune(copy.deepcopy(model), pattern, 0.75, "l2", layers=[name])
        kept = weight_view(pruned.get_submodule(name)).square().sum()
        assert kept / total == pytest.approx(after, abs=1e-5)


def test_obd_is_deterministic():
    inputs = (torch.randn(1, 16, 1, 1),)
    models = [dcgan(), dcgan()]
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
    model, inputs = dcgan(), (torch.randn(1, 16, 1, 1),)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"would change its output by .*left as it was"):
        permute_channels(model, BlockPattern(2, 2), inputs, importance=by_magnitude, layers=["0", "3"])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_bad_arguments_are_refused():
    model, inputs = model_case("dcgan")
    block = BlockPattern(2, 2)
    with pytest.raises(TypeError, match="a BlockPattern such as 32x32; got NMPattern"):
        permute_channels(model, NMPattern(2, 4), inputs)
    for arguments, message in (
        ({"sparsity": 1.0}, r"in \(0, 1\); got 1.0"),
        ({"importance": "l3"}, "a callable, got 'l3'"),
        ({"layers": ["1"]}, "layers are some of 0, 3, 6; got 1"),
        ({"layers": []}, "got none"),
    ):
        with pytest.raises(ValueError, match=message):
            permute_channels(model, block, inputs, **{"importance": by_magnitude, **arguments})
