"""Closed-form repair: that each layer's problem is the right one, and that its solution is the best there is."""

import copy
import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune import generator
from torch import nn
from torch.nn.utils import parametrizations

from sparsegan.patterns import BlockPattern, weight_view
from sparsegan.prune import correct_bias, make_permanent, prune, reconstruct
from sparsegan.prune.reconstruct import Fit, _solved, block_errors, moments

module = import_module("sparsegan.prune.reconstruct")  # the package has a function of that name


@pytest.fixture
def undamped(monkeypatch):
    monkeypatch.setattr(module, "DAMPING", 1e-7)


def latents(n: int, size: int = 16, seed: int = 0) -> tuple[torch.Tensor]:
    return (torch.randn(n, size, 1, 1, generator=torch.Generator().manual_seed(seed)),)


def view_of(layer: nn.Module) -> torch.Tensor:
    return weight_view(layer).detach().double()


LAYERS = [
    (lambda: nn.Linear(6, 5), (40, 6)),
    (lambda: nn.Linear(6, 5, bias=False), (8, 5, 6)),
    (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2, dilation=2), (8, 4, 9, 8)),
    (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"), (4, 4, 9, 8)),
    (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 4, 5, 5)),
    (lambda: nn.ConvTranspose2d(8, 6, 4), (300, 8, 1, 1)),
    (lambda: nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2), (8, 4, 5, 6)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, dilation=2), (8, 4, 5, 6)),
    (lambda: nn.ConvTranspose2d(4, 6, (2, 3), (3, 1), (0, 1)), (8, 4, 5, 6)),
    (lambda: nn.ConvTranspose2d(4, 6, 1, 2, output_padding=1), (8, 4, 5, 6)),
]


@pytest.mark.parametrize("make, shape", LAYERS, ids=lambda x: str(x()) if callable(x) else "")
def test_the_problem_of_a_layer_has_its_weights_as_the_solution(make, shape, undamped):
    layer = make()
    x = torch.randn(shape)
    sums = moments(layer, [(x[:3], layer(x[:3]).detach()), (x[3:], layer(x[3:]).detach())])
    view = view_of(layer)
    bias = view.new_zeros(len(view)) if layer.bias is None else layer.bias.detach().double()
    found = _solved(torch.zeros_like(view), bias, torch.ones_like(view, dtype=torch.bool), sums)
    assert (found - view).abs().max() < 1e-3 * view.abs().max()


def test_a_transposed_convolution_has_a_problem_for_each_phase():
    layer = nn.ConvTranspose2d(4, 6, 4, 2, 1)
    x = torch.randn(2, 4, 5, 5)
    sums = moments(layer, [(x, layer(x).detach())])
    assert sorted(m.taps for m in sums) == [(0, 2, 8, 10), (1, 3, 9, 11), (4, 6, 12, 14), (5, 7, 13, 15)]
    assert {m.count for m in sums} == {2 * 5 * 5} and {m.gram.shape for m in sums} == {(1, 16, 16)}


def test_the_fit_is_least_squares_over_the_kept_weights(undamped):
    x, y, layer = torch.randn(50, 6).double(), torch.randn(50, 4).double(), nn.Linear(6, 4, bias=False)
    kept = torch.tensor([[1, 1, 0, 0, 1, 1]] * 2 + [[0, 0, 1, 1, 0, 0]] * 2, dtype=torch.bool)[:, None]
    sums = moments(layer, [(x.float(), y.float())])
    found = _solved(view_of(layer), torch.zeros(4).double(), kept, sums)
    for row in range(4):
        columns = kept[row, 0].nonzero()[:, 0]
        best = torch.linalg.lstsq(x[:, columns], y[:, row]).solution
        assert torch.allclose(found[row, 0, columns], best, atol=1e-4)
    assert not bool(found[~kept].any())


def test_few_samples_leave_the_weights_near_where_they_were():
    layer = nn.Linear(8, 2, bias=False)
    x = torch.zeros(1, 8)
    x[0, 0] = 1
    sums = moments(layer, [(x, torch.full((1, 2), 5.0))])
    found = _solved(view_of(layer), torch.zeros(2).double(), torch.ones(2, 1, 8, dtype=torch.bool), sums)
    assert torch.allclose(found[:, :, 1:], view_of(layer)[:, :, 1:])
    assert found[:, 0, 0].tolist() == pytest.approx([5, 5], rel=0.02)


def test_block_errors_by_hand():
    # H = [[1, r], [r, 1]]: alone, a weight costs w² (1 - r²), because the other one steps in; both cost w H w.
    r, w = 0.6, torch.tensor([[[2.0, 1.0]]]).double()
    x = torch.tensor([[1.0, r], [0.0, math.sqrt(1 - r * r)]])
    layer = nn.Linear(2, 1, bias=False)
    everything = torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DAMPING", 1e-9)
        sums = moments(layer, [(x, torch.zeros(2, 1))])
        assert block_errors(w, everything, sums, 1).flatten().tolist() == pytest.approx(
            [4 * 0.64, 0.64], rel=1e-4
        )
        assert block_errors(w, everything, sums, 2).sum().item() == pytest.approx(4 + 1 + 4 * r, rel=1e-4)
        one = torch.tensor([[[True, False]]])
        assert block_errors(w, one, sums, 1).flatten().tolist() == pytest.approx([4, 0], abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.sampled_from([5, 6, 7]), st.booleans())
def test_block_errors_are_what_the_best_fit_without_the_block_loses(seed, width, channels, transposed):
    noise = torch.Generator().manual_seed(seed)
    layer = nn.ConvTranspose2d(channels, 3, 3, 2) if transposed else nn.Conv2d(channels, 3, 2)
    x = torch.randn(6, channels, 6, 6, generator=noise) + 0.5
    view = torch.randn(weight_view(layer).shape, generator=noise).double()
    kept = torch.ones_like(view, dtype=torch.bool)
    kept[:, :, :width] = False  # some are gone before
    view = view * kept
    zeros = torch.zeros(3).double()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "DAMPING", 1e-6)
        layer.weight.copy_(module.from_weight_view(layer, view))
        layer.bias.zero_()
        sums = moments(layer, [(x, layer(x))])
        power = sum(m.power.sum() for m in sums)
        pattern = BlockPattern(3, width)
        scores = pattern.group_sums(block_errors(view, kept, sums, width))
        for tap, block in [(0, 1), (view.shape[1] - 1, scores.shape[2] - 1)]:
            without = kept.clone()
            without[:, tap, block * width : (block + 1) * width] = False
            lost = module._error(_solved(view, zeros, without, sums), zeros, sums) * power
            assert scores[0, tap, block].item() == pytest.approx(
                float(lost), rel=0.02, abs=1e-4 * float(power)
            )


@pytest.mark.parametrize("permanent", [False, True])
def test_reconstruct_repairs_the_image_and_keeps_the_zeros(permanent):
    teacher = generator(0)
    model = prune(copy.deepcopy(teacher), BlockPattern(4, 4), 0.5, "l1", latents(1))
    if permanent:
        make_permanent(model)
    pruned = copy.deepcopy(model)
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    model[1].train()
    fits = reconstruct(model, teacher, [latents(64, seed=1), latents(64, seed=2)])
    assert list(fits) == ["3", "6", "8"]  # nothing is wrong before the third
    assert all(fit.after < 0.6 * fit.before for fit in list(fits.values())[:2])
    z = latents(32, seed=3)[0]
    model.eval()
    error, before = ((m(z) - teacher(z)).square().mean() for m in (model, pruned))
    assert error < 0.5 * before
    for name in ("3", "6"):
        zeros = weight_view(pruned.get_submodule(name)) == 0
        assert not bool(weight_view(model.get_submodule(name))[zeros].any())
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.state_dict().items())
    assert torch.equal(model[0].weight, teacher[0].weight)


def test_layers_repair_what_those_before_them_left_wrong():
    teacher = generator(0)
    model = prune(copy.deepcopy(teacher), BlockPattern(4, 4), 0.6, "l1", latents(1), layers=["3"])
    fits = reconstruct(model, teacher, [latents(64)], layers=["6"])
    assert list(fits) == ["6"] and fits["6"].after < 0.7 * fits["6"].before


def test_modes_and_progress():
    teacher, done = generator(0), []
    model = prune(copy.deepcopy(teacher), importance="l1", example_inputs=latents(1))
    model[4].train()
    reconstruct(model, teacher, [latents(8)], progress=lambda *step: done.append(step))
    assert [m.training for m in model[:6]] == [False] * 4 + [True, False]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_correct_bias_gives_each_channel_its_mean():
    teacher = generator(0)
    model = prune(copy.deepcopy(teacher), BlockPattern(4, 4), 0.5, "l1", latents(1))
    kept = model[6].weight.detach().clone()
    batches = [latents(32), latents(32, seed=1)]
    fits = correct_bias(model, teacher, batches)
    assert all(fit.after < fit.before for fit in fits.values()) and list(fits) == ["3", "6", "8"]
    assert torch.equal(model[6].weight, kept)
    z = torch.cat([batch[0] for batch in batches])
    for end in (5, 7, 9):  # after the BatchNorm of "3", after "6" and after "8", which have biases
        got, wanted = (m[:end](z).mean((0, 2, 3)) for m in (model, teacher))
        assert torch.allclose(got, wanted, atol=1e-5)


def test_a_norm_after_something_in_place_is_left_alone():
    teacher = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True), nn.BatchNorm1d(4)).eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[0].weight[0] = 0
    correct_bias(model, teacher, [(torch.randn(16, 4),)])
    assert torch.equal(model[2].running_mean, teacher[2].running_mean)


def test_a_layer_that_is_called_twice(undamped):
    shared = nn.Linear(4, 4)
    teacher = nn.Sequential(shared, nn.ReLU(), shared)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[0].weight.add_(0.1)
    fits = reconstruct(model, teacher, [(torch.randn(64, 4),)])
    assert fits["0"] == Fit(pytest.approx(fits["0"].before), pytest.approx(fits["0"].after))
    # The second call sees what the first one did wrong before the fit, so one pass is not all.
    assert fits["0"].after < 0.5 * fits["0"].before


def test_bad_arguments():
    teacher = generator(0)
    model = prune(copy.deepcopy(teacher), importance="l1", example_inputs=latents(1))
    with pytest.raises(ValueError, match="no batches"):
        reconstruct(model, teacher, [])
    with pytest.raises(ValueError, match="no layer '99'"):
        reconstruct(model, teacher, [latents(2)], layers=["99"])
    with pytest.raises(ValueError, match="NaN or infinite values enter or leave layer '0'"):
        reconstruct(model, teacher, [(torch.full((2, 16, 1, 1), math.nan),)])
    parametrizations.spectral_norm(model[6])
    with pytest.raises(ValueError, match="layer '6' is computed by a parametrization besides its mask"):
        reconstruct(model, teacher, [latents(2)])
