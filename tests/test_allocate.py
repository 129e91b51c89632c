"""Budgets: the scan, the allocation against all there are, and that `prune` carries it out."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune import Z, generator, masks, weights
from torch import nn

from sparsegan.patterns import BlockPattern, NMPattern, weight_view
from sparsegan.prune import allocate, least_damage, prune, sensitivity, sparsity_report
from sparsegan.prune import importance as scoring
from sparsegan.prune.trace import count_macs

NUMBERS = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10))


@st.composite
def tables(draw):
    damage, cost = {}, {}
    for layer in range(draw(st.integers(1, 4))):
        at = [1.0, 0.5, 0.25, 0.1][: draw(st.integers(1, 4))]
        damage[str(layer)] = {density: draw(NUMBERS) for density in at}
        cost[str(layer)] = {density: draw(NUMBERS) for density in at}
    return damage, cost


def of(table, chosen):
    return sum(table[name][density] for name, density in chosen.items())


def best_damage(damage, cost, budget):
    ways = (dict(zip(damage, way, strict=True)) for way in itertools.product(*damage.values()))
    return min(of(damage, way) for way in ways if of(cost, way) <= budget * (1 + 1e-9))


@settings(max_examples=200, deadline=None)
@given(tables(), st.floats(0, 1))
def test_no_other_choice_is_less_damaging(both, share):
    damage, cost = both
    least, most = (sum(f(row.values()) for row in cost.values()) for f in (min, max))
    budget = least + share * (most - least)
    chosen = least_damage(damage, cost, budget)
    assert of(cost, chosen) <= budget * (1 + 1e-6) + 1e-12
    assert of(damage, chosen) == pytest.approx(best_damage(damage, cost, budget))


@settings(max_examples=100, deadline=None)
@given(tables(), st.one_of(st.just(0.0), st.floats(0, 0.3)))
def test_thinning_never_loses_the_cheapest_way(both, share):
    damage, cost = both
    least, most = (sum(f(row.values()) for row in cost.values()) for f in (min, max))
    budget = least + share * (most - least)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "FRONT", 1)
        assert of(cost, least_damage(damage, cost, budget)) <= budget * (1 + 1e-6) + 1e-12


def test_thinning_stays_within_the_budget_and_near_the_best(monkeypatch):
    noise = torch.Generator().manual_seed(0)
    at = [1.0, 0.75, 0.5, 0.35, 0.25]
    cost = {
        str(n): dict(zip(at, torch.rand(5, generator=noise).cumsum(0).flip(0).tolist(), strict=True))
        for n in range(6)
    }
    damage = {
        str(n): dict(zip(at, torch.rand(5, generator=noise).cumsum(0).tolist(), strict=True))
        for n in range(6)
    }
    budget = 0.6 * sum(row[1.0] for row in cost.values())
    monkeypatch.setattr(allocate, "FRONT", 100)
    chosen = least_damage(damage, cost, budget)
    assert of(cost, chosen) <= budget
    assert of(damage, chosen) <= 1.05 * best_damage(damage, cost, budget)


def test_many_layers_are_no_trouble():
    noise = torch.Generator().manual_seed(0)
    at = [1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1]
    cost = {str(n): {d: d * (1 + n % 7) for d in at} for n in range(60)}
    damage = {str(n): {d: float(torch.rand(1, generator=noise)) * (1 - d) for d in at} for n in range(60)}
    budget = 0.4 * sum(row[1.0] for row in cost.values())
    chosen = least_damage(damage, cost, budget)
    uniform = sum(row[0.35] for row in damage.values())
    assert of(cost, chosen) <= budget * (1 + 1e-9) and of(damage, chosen) < 0.8 * uniform


@pytest.mark.parametrize(
    "message, damage, cost, budget",
    [
        ("budget of 1 cannot be met: the cheapest densities cost 3", {"a": {1.0: 0.0}}, {"a": {1.0: 3.0}}, 1),
        ("of the same layers", {"a": {1.0: 0.0}}, {"b": {1.0: 3.0}}, 1),
        ("of the same layers", {}, {}, 1),
        ("'a': damage and cost are at the same densities", {"a": {1.0: 0.0}}, {"a": {0.5: 3.0}}, 1),
        ("numbers >= 0", {"a": {1.0: math.nan}}, {"a": {1.0: 3.0}}, 9),
        ("numbers >= 0", {"a": {1.0: 0.0}}, {"a": {1.0: -3.0}}, 9),
        ("cannot be met", {"a": {1.0: 0.0}}, {"a": {1.0: 3.0}}, math.nan),
    ],
)
def test_bad_tables(message, damage, cost, budget):
    with pytest.raises(ValueError, match=message):
        least_damage(damage, cost, budget)


# ---- the scan


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(scoring, "OBD_DRAWS", 4)


def latents(n: int) -> tuple[torch.Tensor]:
    return (torch.randn(n, 16, 1, 1, generator=torch.Generator().manual_seed(7)),)


def test_sensitivity_is_what_pruning_one_layer_does():
    model, inputs = generator(0), latents(8)
    before, done = weights(model), []
    table = sensitivity(
        model, BlockPattern(4, 4), inputs, (0.25, 1.0, 0.5), "l1", progress=lambda *n: done.append(n)
    )
    assert list(table) == ["0", "3", "6", "8"] and done[-1] == (4, 4)
    for row in table.values():
        assert list(row) == [1.0, 0.5, 0.25] and row[1.0] == 0 and 0 < row[0.5] < row[0.25]
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())
    one = prune(copy.deepcopy(model), BlockPattern(4, 4), 0.5, "l1", layers=["6"])
    with torch.no_grad():
        assert (one(*inputs) - model(*inputs)).square().mean().item() == pytest.approx(
            table["6"][0.5], rel=1e-4
        )


def test_sensitivity_of_features():
    model, inputs = generator(0), latents(8)
    pixels = sensitivity(model, BlockPattern(4, 4), inputs, (0.5,), "l1", ["3"])
    doubled = sensitivity(model, BlockPattern(4, 4), inputs, (0.5,), "l1", ["3"], lambda image: 2 * image)
    assert doubled["3"][0.5] == pytest.approx(4 * pixels["3"][0.5], rel=1e-5) and list(pixels) == ["3"]


def test_bad_scans():
    for densities in ((), (0.0,), (1.5,)):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            sensitivity(generator(0), BlockPattern(4, 4), Z, densities)
    with pytest.raises(ValueError, match="no layer '1'"):
        sensitivity(generator(0), BlockPattern(4, 4), Z, layers=["1"])
    with pytest.raises(ValueError, match="unknown importance 'best'"):
        sensitivity(generator(0), BlockPattern(4, 4), Z, importance="best")


# ---- carried out


def test_prune_takes_a_share_for_each_layer():
    model = prune(generator(0), BlockPattern(4, 4), {"0": 0.25, "6": 0.75}, "l1", Z)
    assert {row.name: row.density for row in sparsity_report(model, Z)} == {
        "0": 0.75,
        "3": 1,
        "6": 0.25,
        "8": 1,
    }
    nothing = prune(generator(0), BlockPattern(4, 4), {"3": 0.0}, "l1")
    assert bool(masks(nothing)["3"].all())
    prune(generator(0), NMPattern(2, 4), {"3": 0.5}, "l1")


def test_each_layer_by_itself_keeps_its_best_groups():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    one = prune(copy.deepcopy(model), BlockPattern(4, 4), {"0": 0.5, "1": 0.25}, "l1", allocate="damage")
    scores = BlockPattern(4, 4).group_sums(weight_view(model[1]).abs())
    kept = BlockPattern(4, 4).group_sums(weight_view(one[1]) != 0) > 0
    assert kept.sum() == 3 and not bool(kept.flatten()[scores.argmin()])


def test_a_budget_from_the_scan_to_the_zeros():
    dense, inputs = generator(0), latents(16)
    table = sensitivity(dense, BlockPattern(4, 4), inputs)
    macs = count_macs(dense, Z)
    cost = {name: {density: density * macs[name] for density in row} for name, row in table.items()}
    budget = 0.5 * sum(macs.values())
    chosen = least_damage(table, cost, budget)
    assert chosen["0"] == 1.0  # under 1 % of the operations, and all that the image will be: no rule says so
    model = prune(copy.deepcopy(dense), sparsity={n: 1 - d for n, d in chosen.items()}, example_inputs=Z)
    assert sum(row.macs_kept for row in sparsity_report(model, Z)) <= budget
    even = prune(copy.deepcopy(dense), sparsity=dict.fromkeys(table, 0.5), example_inputs=Z)
    with torch.no_grad():
        errors = [(m(*inputs) - dense(*inputs)).square().mean() for m in (model, even)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("leave layers out", {"sparsity": {"3": 0.5}, "layers": ["3"]}),
        ("layers is empty", {"sparsity": {}}),
        ("no layer '33'", {"sparsity": {"33": 0.5}}),
        (r"in \[0, 1\); got 1.5", {"sparsity": {"3": 1.5}}),
        ("2:4 pattern removes 0.5", {"sparsity": {"3": 0.75}, "pattern": NMPattern(2, 4)}),
        ("cannot be reached, at most", {"sparsity": {"0": 0.1, "3": 0.9999}}),
    ],
)
def test_bad_shares(message, arguments):
    model = generator(0)
    with pytest.raises(ValueError, match=message):
        prune(model, importance="l1", **arguments)
    assert all(bool(mask.all()) for mask in masks(model).values())
