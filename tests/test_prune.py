"""Pruning: that the zeros are where they should be, as many as asked for, and stay."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from sparsegan.patterns import BlockPattern, ChannelPattern, NMPattern, detect_pattern, weight_view
from sparsegan.prune import LayerSparsity, count_macs, make_permanent, prune, sparsity_report
from sparsegan.prune.allocate import keep_best
from sparsegan.prune.importance import draw_inputs, obd
from sparsegan.prune.trace import trace

Z = (torch.zeros(1, 16, 1, 1),)


def generator(seed: int) -> nn.Sequential:
    """A small DCGAN, [N, 16, 1, 1] to [N, 3, 16, 16]; the first layer is under 1 % of the operations."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.ConvTranspose2d(16, 32, 4, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 64, 4, 2, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(True),
            nn.Conv2d(64, 32, 3, padding=1),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 3, 4, 2, 1),
            nn.Tanh(),
        )
    return model.eval()


def removed(model, inputs) -> float:
    rows = sparsity_report(model, inputs)
    return 1 - sum(row.macs_kept for row in rows) / sum(row.macs_dense for row in rows)


def masks(model) -> dict[str, torch.Tensor]:
    return {name: weight != 0 for name, weight in weights(model).items()}


def weights(model) -> dict[str, torch.Tensor]:
    return {
        name: layer.weight.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    }


# ---- how much, and where


def test_count_macs():
    assert count_macs(generator(0), Z) == {
        "0": 16 * 32 * 16,
        "3": 32 * 64 * 16 * 16,
        "6": 64 * 32 * 9 * 64,
        "8": 32 * 3 * 16 * 64,
    }
    grouped = nn.Sequential(nn.Conv2d(6, 9, 3, 2, groups=3), nn.Flatten(), nn.Linear(36, 5))
    assert count_macs(grouped, (torch.zeros(2, 6, 5, 5),)) == {"0": 2 * 9 * 2 * 9 * 4, "2": 2 * 36 * 5}


def test_a_layer_called_twice_counts_twice():
    shared = nn.Linear(8, 8)
    assert count_macs(nn.Sequential(shared, nn.ReLU(), shared), (torch.zeros(1, 8),)) == {"0": 128}


@pytest.mark.parametrize("pattern", [BlockPattern(4, 4), BlockPattern(8, 1), ChannelPattern()], ids=str)
@pytest.mark.parametrize("allocate", ["uniform", "damage"])
@pytest.mark.parametrize("importance", ["obd", "l1", "l2", "random"])
def test_sparsity_is_reached_in_the_pattern(pattern, allocate, importance):
    model = prune(generator(0), pattern, 0.6, importance, Z, allocate)
    rows = {row.name: row for row in sparsity_report(model, Z)}
    biggest_group = 64 * 9 * 64 if pattern == ChannelPattern() else 64 * 32
    assert 0.6 - 1e-9 <= removed(model, Z) < 0.6 + biggest_group / sum(r.macs_dense for r in rows.values())
    assert rows["0"].pattern == rows["8"].pattern == "dense"
    for name in ("3", "6"):
        assert pattern.respected_by(weight_view(model.get_submodule(name)) != 0)
    if allocate == "uniform" and isinstance(pattern, BlockPattern):
        assert rows["3"].density == pytest.approx(rows["6"].density, abs=0.01)


def test_report_rows():
    model = prune(generator(0), BlockPattern(4, 4), 0.5, "l1", layers=["3"])
    assert sparsity_report(model, Z)[:2] == [
        LayerSparsity("0", "ConvTranspose2d", "dense", 1.0, 8192, 8192),
        LayerSparsity("3", "ConvTranspose2d", "4x4", 0.5, 524288, 262144),
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 3),
    st.sampled_from([BlockPattern(4, 4), BlockPattern(3, 2), NMPattern(2, 4), ChannelPattern()]),
    st.sampled_from(["linear", "conv", "transposed"]),
)
def test_ragged_channels_and_groups(inner, outer, groups, pattern, kind):
    if kind == "linear":
        layer = nn.Linear(inner, outer)
    else:
        make = nn.Conv2d if kind == "conv" else nn.ConvTranspose2d
        layer = make(inner * groups, outer * groups, (2, 3), groups=groups)
    sparsity = 0.5 if isinstance(pattern, NMPattern) else 0.0
    model = prune(nn.Sequential(layer), pattern, sparsity, "l1", layers=["0"])
    nonzero = weight_view(model[0]) != 0
    assert pattern.respected_by(nonzero)
    if not sparsity:
        assert bool(nonzero.all())


@pytest.mark.parametrize("channels", [(3, 100), (100, 3), (5, 7)])
def test_ragged_layer_keeps_its_share(channels):
    layer = nn.Conv2d(*channels, 3)
    prune(nn.Sequential(layer), BlockPattern(4, 4), 0.5, "l2", layers=["0"])
    density = weight_view(layer).count_nonzero().item() / layer.weight.numel()
    assert 0.5 - 16 / layer.weight.numel() <= density <= 0.5
    assert BlockPattern(4, 4).respected_by(weight_view(layer) != 0)


def test_the_best_groups_are_kept():
    layer = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(64.0).reshape(8, 8) + 1)
    prune(nn.Sequential(layer), BlockPattern(4, 4), 0.5, "l1")
    kept = BlockPattern(4, 4).group_sums(weight_view(layer) != 0)[:, 0]
    assert kept.tolist() == [[0, 0], [16, 16]]


def test_damage_takes_from_the_layer_that_matters_less():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[1].weight.mul_(0.01)
    prune(model, BlockPattern(4, 4), 0.5, "l2", allocate="damage")
    # The first layer is half of all, but one group of the second is left, so that something passes.
    assert [layer.weight.count_nonzero().item() for layer in model] == [1024 - 16, 16]


def test_damage_counts_what_a_weight_costs():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=4))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1)
    inputs = (torch.zeros(1, 8, 15, 15),)
    prune(model, BlockPattern(4, 4), 0.5, "l1", inputs, allocate="damage")
    assert model[0].weight.count_nonzero() < 300 and bool(model[1].weight.all())


def test_small_and_image_layers_stay_dense():
    model = nn.Sequential(
        nn.Linear(4, 16), nn.Linear(16, 256), nn.Linear(256, 784), nn.Unflatten(1, (1, 28, 28))
    )
    assert trace(model, (torch.zeros(1, 4),)).touches_image == set()  # most of the work of an MLP
    prune(model, sparsity=0.01, importance="l1", example_inputs=(torch.zeros(1, 4),), allocate="uniform")
    assert [detect_pattern(weight_view(model[i])) is None for i in range(3)] == [True, False, False]
    shuffled = nn.Sequential(
        nn.PixelUnshuffle(4), nn.Conv2d(48, 16, 1), nn.Conv2d(16, 48, 1), nn.PixelShuffle(4)
    )
    assert trace(shuffled, (torch.zeros(1, 3, 8, 8),)).touches_image == {"1", "2"}
    assert trace(shuffled, None).touches_image == set()
    convolutions = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3))
    assert trace(convolutions, None).touches_image == {"0", "2"}


def test_many_equal_layers_are_not_all_small():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(100)))
    prune(model, importance="l1", sparsity=0.7)
    dense = sum(detect_pattern(weight_view(layer)) is None for layer in model)
    assert dense <= 2  # 1 % each, but together, and not each for itself, they have to be under 2 %


def test_named_layers_and_their_share():
    model = prune(generator(0), sparsity=0.75, importance="l1", example_inputs=Z, layers=["0", "8"])
    assert [detect_pattern(weight_view(model[i])) is None for i in (0, 3, 6, 8)] == [False, True, True, False]
    macs, kept = ([getattr(row, f) for row in sparsity_report(model, Z)] for f in ("macs_dense", "macs_kept"))
    assert kept[0] + kept[3] == pytest.approx(0.25 * (macs[0] + macs[3]), abs=16 * 64)
    one = prune(generator(0), sparsity=0.5, importance="l1", layers="6")
    assert [detect_pattern(weight_view(one[i])) is None for i in (0, 3, 6, 8)] == [True, True, False, True]


def test_nm_fixes_the_sparsity():
    model = prune(generator(0), NMPattern(2, 4), importance="l1")
    assert weight_view(model[3]).count_nonzero() * 2 == model[3].weight.numel()
    prune(generator(0), NMPattern(1, 4), 0.75, "l1")
    with pytest.raises(ValueError, match=r"2:4 pattern removes 0.5 of each layer, not 0.75"):
        prune(generator(0), NMPattern(2, 4), 0.75, "l1")


def test_unreachable_sparsity_names_what_can_be_reached():
    with pytest.raises(ValueError, match=r"at most 0\.9.*one 4x4 group, and dense stay: 0, 8") as error:
        prune(generator(0), sparsity=0.95, importance="l1", example_inputs=Z)
    most = float(str(error.value).split("at most ")[1].split(":")[0])
    model = prune(generator(0), sparsity=math.floor(most * 1000) / 1000, importance="l1", example_inputs=Z)
    assert removed(model, Z) >= most - 2e-3


def test_sparsity_zero_keeps_all():
    model = prune(generator(0), sparsity=0.0, importance="l1")
    assert all(bool(mask.all()) for mask in masks(model).values())


def test_keep_best_spends_the_budget_and_spares_one_of_each():
    priorities = {"a": torch.tensor([5.0, 4.0, 3.0]).double(), "b": torch.tensor([0.0, 1.0]).double()}
    macs = {name: torch.full_like(p, 2.0) for name, p in priorities.items()}
    kept = keep_best(priorities, macs, 7.0)
    assert kept["a"].tolist() == [True, True, False] and kept["b"].tolist() == [False, True]


# ---- importance


def test_obd_is_the_curvature_of_a_linear_model():
    # y = W diag(s) x with x ~ N(0, 1): E[(d(y.v)/dw_oc)^2] = batch * s_c^2.
    class Scale(nn.Module):
        def forward(self, x):
            return x * torch.tensor([1.0, 2.0, 4.0, 0.0])

    layer = nn.Linear(4, 200, bias=False)
    noise = torch.Generator().manual_seed(0)
    score = obd(nn.Sequential(Scale(), layer), {"1": layer}, (torch.zeros(1, 4),), noise)
    view = weight_view(layer).detach()
    seen = (score("1", layer, view) / view.square())[:, 0].mean(0) / 8
    assert seen[:3].tolist() == pytest.approx([1, 4, 16], rel=0.15)
    assert seen[3] == 0


def test_obd_sees_that_a_big_weight_has_no_effect():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight[:4] *= 100
        model[1].weight[:, :4] = 0
    kept = {}
    for importance in ("l1", "obd"):
        pruned = copy.deepcopy(model)
        prune(pruned, BlockPattern(4, 8), 0.5, importance, (torch.zeros(1, 8),), layers=["0"])
        kept[importance] = pruned[0].weight.abs().sum(1) > 0
    assert kept["l1"].tolist() == [True] * 4 + [False] * 4
    assert kept["obd"].tolist() == [False] * 4 + [True] * 4


def test_draw_inputs():
    noise = torch.Generator().manual_seed(0)
    label, image = torch.arange(3), torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    example = (torch.zeros(3, 5), torch.zeros(3, 6, 1, 1), label, image, torch.tensor(0.5), "mode")
    z, w, labels, images, scalar, mode = draw_inputs(example, 3, 1, noise)
    assert z.shape == (8, 5) and w.shape == (8, 6, 1, 1)
    assert 0.5 < z.std() < 1.5 and not torch.equal(z, w[:, :5, 0, 0])
    assert labels.tolist() == [2, 0, 1, 2, 0, 1, 2, 0]  # the second draw goes on where the first one stopped
    assert torch.equal(images[:, 0, 0, 0], labels.float()) and scalar == 0.5 and mode == "mode"


def test_callable_importance_gets_name_layer_and_view():
    calls = []

    def first_channels(name, layer, view):
        calls.append((name, type(layer), tuple(view.shape)))
        return -torch.arange(view.shape[0], dtype=torch.float32)[:, None, None].expand_as(view)

    layer = nn.Conv2d(8, 8, 3)
    prune(nn.Sequential(layer), ChannelPattern(), 0.5, first_channels)
    assert calls == [("0", nn.Conv2d, (8, 9, 8))]
    assert (layer.weight != 0).flatten(1).all(1).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("importance", ["obd", "random"])
def test_seed_decides_and_the_global_generator_is_left_alone(importance):
    state = torch.random.get_rng_state()
    one, same, other = (
        masks(prune(generator(0), importance=importance, example_inputs=Z, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(state, torch.random.get_rng_state())


def test_modes_gradients_and_statistics_are_left_as_they_were():
    model = generator(0)
    model[1].train()
    model[3].weight.requires_grad_(False)
    statistics = model[1].running_mean.clone()
    prune(model, example_inputs=Z)
    assert [module.training for module in model[:3]] == [False, True, False]
    assert not model[3].parametrizations.weight.original.requires_grad
    assert model[6].parametrizations.weight.original.grad is None
    assert torch.equal(statistics, model[1].running_mean)


def test_works_under_no_grad():
    with torch.no_grad():
        model = prune(generator(0), example_inputs=Z)
    assert removed(model, Z) >= 0.75


def test_models_that_return_more_than_the_image():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = generator(0)

        def forward(self, z):
            return {"loss": None, "image": self.body(z)}

    assert removed(prune(Two(), example_inputs=Z), Z) >= 0.75


# ---- zeros stay


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
)
def test_zeros_survive_training(make):
    model = prune(generator(0), importance="l1").train()
    before = masks(model)
    optimiser = make(model.parameters())
    noise = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randn(4, 16, 1, 1, generator=noise)).square().sum().backward()
        optimiser.step()
    with torch.no_grad():  # whatever else is done to the parameters
        for parameter in model.parameters():
            parameter.add_(1.0)
    model[3].parametrizations.weight.original.data[~before["3"]] = torch.nan
    after = masks(model)
    assert all(not bool((after[name] & ~before[name]).any()) for name in before)


def test_make_permanent():
    model = generator(0)
    keys = list(model.state_dict())
    prune(model, importance="l1")
    z = torch.randn(2, 16, 1, 1, generator=torch.Generator().manual_seed(0))
    image, before = model(z), weights(model)
    assert make_permanent(model) is model
    assert sorted(model.state_dict()) == sorted(keys)
    assert all(isinstance(model[i].weight, nn.Parameter) for i in (0, 3, 6, 8))
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())
    assert torch.equal(image, model(z))
    make_permanent(model)  # nothing left to do


def test_pruning_again_goes_further():
    model = prune(generator(0), sparsity=0.4, importance="l1", example_inputs=Z)
    before = masks(model)
    prune(model, sparsity=0.7, importance="random", example_inputs=Z)
    assert removed(model, Z) >= 0.7
    assert all(not bool((after & ~before[name]).any()) for name, after in masks(model).items())
    assert len(model[3].parametrizations.weight) == 1


def test_torch_pruned_models():
    model = generator(0)
    torch_prune.l1_unstructured(model[3], "weight", amount=0.3)
    assert sparsity_report(model, Z)[1].density == pytest.approx(0.7, abs=1e-3)
    gone = model[3].weight_mask == 0
    prune(model, sparsity=0.6, importance="obd", example_inputs=Z)
    assert removed(model, Z) >= 0.6
    with torch.no_grad():
        model[3].parametrizations.weight.original.add_(1.0)
    assert not bool(model[3].weight[gone].any())


def test_other_parametrizations_stay():
    model = generator(0)
    parametrizations.spectral_norm(model[6])
    prune(model, example_inputs=Z)
    assert removed(model, Z) >= 0.75
    assert len(model[6].parametrizations.weight) == 2


def test_pruned_models_can_be_copied_and_moved():
    model = prune(generator(0), importance="l1")
    twin = copy.deepcopy(model).to(torch.float64)
    assert all(torch.equal(mask, masks(twin)[name]) for name, mask in masks(model).items())
    fresh = prune(generator(1), importance="random")
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(mask, masks(fresh)[name]) for name, mask in masks(model).items())


# ---- bad input


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 75, math.nan])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"in \[0, 1\); got"):
        prune(generator(0), sparsity=sparsity, importance="l1")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    model = generator(0)
    with torch.no_grad():
        model[6].weight[0, 0, 0, 0] = value
    before = weights(model)
    with pytest.raises(ValueError, match="weight of layer '6' holds NaN or infinite"):
        prune(model, importance="l1")
    assert all(torch.equal(before[n], w) for n, w in weights(model).items() if n != "6")


def test_layers_of_zeros():
    model = generator(0)
    with torch.no_grad():
        model[3].weight.zero_()
    for allocate in ("uniform", "damage"):
        pruned = prune(copy.deepcopy(model), example_inputs=Z, allocate=allocate)
        assert not bool(pruned[3].weight.any()) and removed(pruned, Z) >= 0.75


def test_nothing_to_prune():
    with pytest.raises(ValueError, match="Sequential has no Linear, Conv2d or ConvTranspose2d"):
        prune(nn.Sequential(nn.ReLU()), importance="l1")
    with pytest.raises(ValueError, match=r"every layer \(0\) touches the image.*layers=\["):
        prune(nn.Sequential(nn.Conv2d(3, 8, 3)), importance="l1")


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "pattern must be a Pattern", {"pattern": "4x4"}),
        (
            ValueError,
            "unknown importance 'magnitude'; there are: obd, taylor, obs, wanda, l1",
            {"importance": "magnitude"},
        ),
        (ValueError, "unknown allocate 'global'; there are: uniform, damage", {"allocate": "global"}),
        (ValueError, "no layer '33' to prune; there are: 3", {"layers": ["33"]}),
        (ValueError, "no layer '1' to prune", {"layers": ["1"]}),
        (ValueError, "layers is empty", {"layers": []}),
        (ValueError, "needs example_inputs", {"importance": "obd"}),
        (TypeError, "tuple of the model's positional inputs", {"example_inputs": Z[0]}),
        (ValueError, "at least one sample", {"example_inputs": (torch.zeros(0, 16, 1, 1),)}),
        (ValueError, "at least one tensor", {"example_inputs": ()}),
        (ValueError, r"score a weight, \(32, 16, 16\); got \(1,\)", {"importance": lambda *a: torch.ones(1)}),
        (ValueError, "NaN or infinite scores", {"importance": lambda name, layer, view: view / 0}),
    ],
)
def test_bad_arguments(error, message, arguments):
    model = generator(0)
    before = weights(model)
    with pytest.raises(error, match=message):
        prune(model, **{"importance": "l1", **arguments})
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())


def test_a_layer_that_is_never_called():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    x = (torch.zeros(1, 16),)
    with pytest.raises(ValueError, match="'idle' is never called"):
        prune(Idle(), importance="l1", example_inputs=x, layers=["idle"])
    model = prune(Idle(), example_inputs=x)
    assert bool(model.idle.weight.all()) and model.used.weight.count_nonzero() == 64


def test_a_model_that_calls_none_of_its_layers():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight)

    with pytest.raises(ValueError, match=r"every layer \(layer\)"):
        prune(Functional(), example_inputs=(torch.zeros(1, 16),))


def test_old_style_weight_norm():
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match=r"'0' is not a parameter.*remove_spectral_norm"):
        prune(model, importance="l1")


def test_output_without_a_tensor():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return "image"

    with pytest.raises(TypeError, match=r"must return a tensor.*got str"):
        prune(Text(), example_inputs=(torch.zeros(1, 16),))
