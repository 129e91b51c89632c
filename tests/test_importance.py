"""Importance: that each score is the number its formula says."""

import copy
import math

import pytest
import torch
from test_prune import Z, generator, masks, removed, weights
from torch import nn

from sparsegan.patterns import BlockPattern, ChannelPattern, NMPattern, weight_view
from sparsegan.prune import gradient_importance, prune
from sparsegan.prune import importance as scoring
from sparsegan.prune.importance import obd, obs, output_sensitivity, taylor, wanda


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return layer


class Twice(nn.Module):
    """[N, C] to [N, 2 C]: each channel beside itself."""

    def forward(self, x):
        return x.repeat_interleave(2, 1)


def scores_of(score, name, layer):
    return score(name, layer, weight_view(layer).detach())


def test_taylor_sees_that_the_weights_of_a_group_undo_one_another(monkeypatch):
    monkeypatch.setattr(scoring, "OBD_DRAWS", 400)
    # Both inputs of a group are the same number z ~ N(0, 1), so the group does (w1 + w2) z: it is worth (w1 + w2)²
    # a sample, of which there are 8, and diagonal OBD says w1² + w2².
    layer = linear([[1.0, -1.0, 1.0, 2.0]])
    model = nn.Sequential(Twice(), layer)
    pattern = BlockPattern(1, 2)
    groups = [
        pattern.group_sums(scores_of(score, "1", layer)).flatten() / 8
        for score in (
            taylor(model, {"1": layer}, pattern, (torch.zeros(1, 2),), noise()),
            obd(model, {"1": layer}, (torch.zeros(1, 2),), noise()),
        )
    ]
    assert groups[0].tolist() == pytest.approx([0, 9], rel=0.3, abs=1e-6)
    assert groups[1].tolist() == pytest.approx([2, 5], rel=0.3)
    model, layer = model.eval(), layer.requires_grad_(False)
    single = taylor(model, {"1": layer}, BlockPattern(1, 1), (torch.zeros(1, 2),), noise())
    assert torch.allclose(scores_of(single, "1", layer).flatten() / 8, torch.tensor([1.0, 1, 1, 4]), rtol=0.3)


def test_gradient_importance_by_hand():
    # y = 1 h0 + 3 h1 + 0 h2 for each draw, so the channels' gradients are as 1 : 3 : 0.
    first, last = nn.Linear(4, 3, bias=False), linear([[1.0, -3.0, 0.0]])
    model = nn.Sequential(first, last)
    found = gradient_importance(model, {"0": first, "1": last}, (torch.zeros(1, 4),), noise())
    layer, channels = found["0"]
    assert channels.tolist() == pytest.approx([channels[0].item(), 3 * channels[0].item(), 0])
    assert layer == pytest.approx(channels.mean().item())
    # ∂(y·v)/∂w = sum over 8 samples of v z: of variance 8, so |.| is sqrt(8) sqrt(2 / pi) on average.
    assert channels[0].item() == pytest.approx(math.sqrt(16 / math.pi), rel=0.2)


def test_output_sensitivity_by_hand():
    first, last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[1.0, -3, 0], [2, 0, 0]])[:, :, None, None])
    model = nn.Sequential(first, nn.Identity(), last).requires_grad_(False)
    found = output_sensitivity(model, {"0": first}, (torch.zeros(8, 2, 4, 4),), noise())
    assert found["0"].tolist() == pytest.approx([5, 9, 0], rel=0.1)
    inside = nn.Sequential(first, nn.ReLU(inplace=True), last)
    halved = output_sensitivity(inside, {"0": first}, (torch.randn(8, 2, 4, 4),), noise())
    assert 0 < halved["0"][1] < 9


def test_wanda_is_magnitude_times_the_norm_of_what_each_tap_reads():
    image = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)  # samples are repeated: 64 draws of 8
    layer = nn.Conv2d(2, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(-2)
    # Not latents, by the fourth input: those would be drawn anew.
    layer2 = nn.Sequential(nn.AvgPool2d(2), layer)
    scores = scores_of(wanda(layer2, (image.expand(1, 2, 2, 2),), noise()), "1", layer)[0] / math.sqrt(512)
    assert scores[4].tolist() == pytest.approx([6, 8])
    assert not bool(scores[[0, 1, 2, 3, 5, 6, 7, 8]].any())  # only the padding is read there
    transposed = nn.ConvTranspose2d(2, 1, 4, 2, 1, bias=False)
    with torch.no_grad():
        transposed.weight.fill_(1)
    model = nn.Sequential(nn.AvgPool2d(2), transposed)
    scores = scores_of(wanda(model, (image.expand(1, 2, 2, 2),), noise()), "1", transposed)[0] / math.sqrt(
        512
    )
    inner = [5, 6, 9, 10]  # one pixel becomes 2x2: the other taps write what padding cuts off
    assert scores[inner].tolist() == [pytest.approx([3, 4])] * 4
    assert scores.count_nonzero() == 8


def test_wanda_of_groups():
    layer = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)
    image = torch.arange(1.0, 5.0).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    scores = scores_of(wanda(nn.Sequential(layer), (image,), noise()), "0", layer) / math.sqrt(4 * 512)
    assert scores[:, 0].tolist() == [pytest.approx([1, 2])] * 2 + [pytest.approx([3, 4])] * 2


def test_obs_lets_an_input_go_that_another_can_stand_in_for():
    # Inputs 0 and 1 are the same number: the other weight takes over, though both are large.
    layer = linear([[3.0, 3.0, 1.0, 0.0]])
    model = nn.Sequential(Twice(), layer)
    score = obs(model, {"1": layer}, BlockPattern(1, 1), (torch.zeros(1, 2),), noise())
    scores = scores_of(score, "1", layer).flatten()
    assert scores[0] < 0.1 * 9 * 8 and scores[0] == pytest.approx(scores[1].item(), rel=0.01)
    pair = obs(model, {"1": layer}, BlockPattern(1, 2), (torch.zeros(1, 2),), noise())
    assert scores_of(pair, "1", layer).flatten()[:2].sum() == pytest.approx(36 * 8, rel=0.15)


def test_obs_fits_what_is_kept(monkeypatch):
    monkeypatch.setattr(scoring, "CALIBRATION_DRAWS", 16)
    z = (torch.randn(64, 16, 1, 1, generator=noise(5)),)
    dense, errors = generator(0), {}
    for importance in ("obd", "obs"):
        model = prune(copy.deepcopy(dense), BlockPattern(4, 4), 0.6, importance, Z)
        assert removed(model, Z) >= 0.6 - 1e-9
        assert all(BlockPattern(4, 4).respected_by(mask) for mask in masks_as_views(model))
        with torch.no_grad():
            errors[importance] = (model(*z) - dense(*z)).square().mean().item()
    assert errors["obs"] < 0.7 * errors["obd"]
    assert torch.equal(
        weights(model)["0"], weights(dense)["0"]
    )  # layers that are not pruned stay as they are
    assert torch.equal(weights(model)["8"], weights(dense)["8"])


def masks_as_views(model):
    return [weight_view(model.get_submodule(name)) != 0 for name in ("3", "6")]


@pytest.mark.parametrize("importance", ["taylor", "wanda", "obs"])
@pytest.mark.parametrize("pattern", [ChannelPattern(), NMPattern(2, 4), BlockPattern(3, 5)], ids=str)
def test_every_importance_serves_every_pattern(importance, pattern, monkeypatch):
    monkeypatch.setattr(scoring, "CALIBRATION_DRAWS", 2)
    monkeypatch.setattr(scoring, "OBD_DRAWS", 2)
    sparsity = None if isinstance(pattern, NMPattern) else 0.5
    model = nn.Sequential(nn.ConvTranspose2d(16, 8, 3, 2), nn.ReLU(True), nn.Conv2d(8, 8, 3)).eval()
    state = torch.random.get_rng_state()
    prune(model, pattern, sparsity, importance, Z, layers=["0", "2"])
    assert torch.equal(state, torch.random.get_rng_state())
    for name in ("0", "2"):
        assert pattern.respected_by(weight_view(model.get_submodule(name)) != 0)
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Conv2d))


def test_seed_decides(monkeypatch):
    monkeypatch.setattr(scoring, "CALIBRATION_DRAWS", 2)
    monkeypatch.setattr(scoring, "OBD_DRAWS", 2)
    for importance in ("taylor", "obs"):
        one, same, other = (
            masks(prune(generator(0), importance=importance, example_inputs=Z, seed=seed))
            for seed in (1, 1, 2)
        )
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("importance", ["taylor", "wanda", "obs"])
def test_what_runs_the_model_needs_inputs(importance):
    with pytest.raises(ValueError, match=f'"{importance}" needs example_inputs'):
        prune(generator(0), importance=importance)


def test_obs_that_cannot_reach_the_sparsity_changes_nothing(monkeypatch):
    monkeypatch.setattr(scoring, "CALIBRATION_DRAWS", 2)
    monkeypatch.setattr(scoring, "OBD_DRAWS", 2)
    model = generator(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be reached"):
        prune(model, sparsity=0.97, importance="obs", example_inputs=Z)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[n], t) for n, t in after.items())
