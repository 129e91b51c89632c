"""How many groups each layer may keep: a budget shared out over the layers.

In multiply-adds: a rule turns the scores of a layer's groups into priorities that can be compared between layers;
`keep_best` then keeps the highest of all layers until the budget is spent.

In any cost that was measured, such as milliseconds: `sensitivity` tells what pruning one layer alone to some density
does to the image, and `least_damage` chooses a density for each layer.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsegan.patterns import NMPattern, Pattern, PrunableLayer, weight_view
from sparsegan.prune import importance as scoring
from sparsegan.prune.importance import Importance
from sparsegan.prune.masks import adopt_torch_mask, mask_groups
from sparsegan.prune.trace import Inputs, eval_mode, image_of, prunable_layers, trace

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(scores, multiply-adds) -> priorities``, each of one layer, one value a group, float64 ``[groups]``"""

# Layers that together hold at most this share of the multiply-adds stay dense: nothing is gained there,
# and in a generator they are the first layers, which hold everything the image will be.
SMALL_SHARE = 0.02


def uniform(scores: Tensor, macs: Tensor) -> Tensor:
    """Every layer to the same density: the priority is the rank, as a share of the layer's cost."""
    order = (scores / macs).argsort(descending=True, stable=True)
    priorities = torch.empty_like(scores)
    priorities[order] = -macs[order].cumsum(0) / macs.sum()
    return priorities


def damage(scores: Tensor, macs: Tensor) -> Tensor:
    """Groups compete across layers by score per multiply-add."""
    return scores / macs


RULES: dict[str, Rule] = {"uniform": uniform, "damage": damage}


def keep_best(
    priorities: Mapping[str, Tensor], macs: Mapping[str, Tensor], budget: float
) -> dict[str, Tensor]:
    """Which groups to keep (bool ``[groups]`` by layer) within ``budget`` multiply-adds over all layers.

    The best group of each layer goes first: a layer with nothing left would cut the image off from everything
    before it. The caller sees to it that the budget holds those. Ties go to the earlier layer and group.
    """
    ranked = []
    for name in priorities:
        first = priorities[name].clone()
        first[first.argmax()] = torch.inf
        ranked.append(first)
    order = torch.cat(ranked).argsort(descending=True, stable=True)
    spent = torch.cat(list(macs.values()))[order].cumsum(0)
    kept = torch.empty(len(order), dtype=torch.bool)
    kept[order] = spent <= budget * (1 + 1e-9)
    return dict(zip(priorities, kept.split([len(p) for p in priorities.values()]), strict=True))


class BudgetError(ValueError):
    """A budget that cannot be met, however much goes: the text says what can be reached."""


def smallest_layers(macs: Mapping[str, int]) -> set[str]:
    """The smallest layers that together hold at most `SMALL_SHARE` of the multiply-adds."""
    small, held = set(), 0
    for name in sorted(macs, key=lambda name: macs[name]):
        held += macs[name]
        if held > SMALL_SHARE * sum(macs.values()):
            break
        small.add(name)
    return small


DEFAULT_SPARSITY = 0.75


def checked_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    """The share to remove: the default for None, what an N:M pattern fixes; else ValueError unless in [0, 1)."""
    if isinstance(pattern, NMPattern):
        fixed = 1 - pattern.n / pattern.m
        if sparsity is not None and not math.isclose(sparsity, fixed):
            raise ValueError(
                f"a {pattern} pattern removes {fixed:.4g} of each layer, not {sparsity}; leave sparsity out"
            )
        return fixed
    if sparsity is None:
        return DEFAULT_SPARSITY
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of multiply-adds to remove, in [0, 1); got {sparsity}")
    return sparsity


class Target(NamedTuple):
    """What is to be pruned."""

    layers: dict[str, PrunableLayer]
    """Those that lose weights."""
    positions: dict[str, int]
    """How often each weight of a layer is multiplied."""
    macs: dict[str, int]
    """The multiply-adds of the layers that a sparsity is a share of."""


def choose_layers(model: nn.Module, example_inputs: Inputs | None, layers: Sequence[str] | None) -> Target:
    """The layers of ``model`` to prune, ready for masks; see `prune` for both arguments and what is raised.

    Named layers are all that is counted; by default that is the whole model.
    """
    candidates = prunable_layers(model)
    positions, touches_image = trace(model, example_inputs)
    macs = {name: positions[name] * weight_view(layer).numel() for name, layer in candidates.items()}
    if layers is None:
        chosen = _default_layers(model, candidates, touches_image | smallest_layers(macs))
    else:
        chosen = named_layers(candidates, layers)
        for name in chosen:
            if macs[name] == 0:
                raise ValueError(f"layer {name!r} is never called with these example_inputs")
        macs = {name: macs[name] for name in chosen}
    for name, layer in chosen.items():
        check_weight(name, layer)
        adopt_torch_mask(layer)
    return Target(chosen, positions, macs)


def _default_layers(
    model: nn.Module, candidates: dict[str, PrunableLayer], spared: set[str]
) -> dict[str, PrunableLayer]:
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no Linear, Conv2d or ConvTranspose2d to prune")
    chosen = {name: layer for name, layer in candidates.items() if name not in spared}
    if not chosen:
        raise ValueError(
            f"every layer ({', '.join(candidates)}) touches the image or is under 2 % of the "
            "multiply-adds, and such layers stay dense by default; name those to prune with layers=[...]"
        )
    return chosen


def named_layers(candidates: dict[str, PrunableLayer], layers: Sequence[str]) -> dict[str, PrunableLayer]:
    """Those of ``candidates`` that ``layers`` names; ValueError for none and for a name that is not there."""
    wanted = [layers] if isinstance(layers, str) else list(layers)
    if not wanted:
        raise ValueError("layers is empty; name the layers to prune, or leave it out for the default")
    for name in wanted:
        if name not in candidates:
            known = difflib.get_close_matches(name, candidates, n=3) or list(candidates)[:8]
            raise ValueError(f"there is no layer {name!r} to prune; there are: {', '.join(known)}")
    return {name: layer for name, layer in candidates.items() if name in wanted}


def check_weight(name: str, layer: PrunableLayer) -> None:
    """Raises ValueError unless the weight of ``layer`` can be masked and is finite."""
    own = "weight" in layer._parameters or hasattr(layer, "weight_mask")
    if not own and not parametrize.is_parametrized(layer, "weight"):
        raise ValueError(
            f"the weight of layer {name!r} is not a parameter (weight_norm or spectral_norm as a forward "
            "hook?); remove that first, with torch.nn.utils.remove_weight_norm or remove_spectral_norm"
        )
    with eval_mode(layer):  # in training mode spectral norm changes whenever a weight is read
        finite = bool(weight_view(layer).isfinite().all())
    if not finite:
        raise ValueError(f"the weight of layer {name!r} holds NaN or infinite values; repair it first")


def keep_within_budget(
    pattern: Pattern, target: Target, sums: Mapping[str, Tensor], sparsity: float, rule: Rule
) -> dict[str, Tensor]:
    """Which groups to keep, bool by layer and shaped as ``sums``, so that ``sparsity`` of all ``target.macs`` go.

    sums: the score of each group. Raises BudgetError when so much cannot go.
    """
    chosen, positions, macs = target
    costs = {}
    for name, layer in chosen.items():
        ones = torch.ones(weight_view(layer).shape, dtype=torch.float64)
        costs[name] = pattern.group_sums(ones).flatten() * positions[name]
    priorities = {name: rule(sums[name].flatten(), costs[name]) for name in chosen}

    total = sum(macs.values())
    spared = {name: macs[name] for name in macs if name not in chosen and macs[name]}
    budget = (1 - sparsity) * total - sum(spared.values())
    least = sum(float(costs[name][priorities[name].argmax()]) for name in chosen)
    if budget < least * (1 - 1e-9):
        reachable = 1 - (sum(spared.values()) + least) / total
        raise BudgetError(
            f"sparsity {sparsity:.4g} cannot be reached, at most {reachable:.4g}: each pruned layer keeps "
            f"one {pattern} group, and dense stay: {', '.join(spared) or 'none'}; "
            "ask for less, or name layers=[...]"
        )
    kept = keep_best(priorities, costs, budget)
    return {name: kept[name].view_as(sums[name]) for name in chosen}


Table: TypeAlias = dict[str, dict[float, float]]
"""``layer name -> density -> damage``"""
Features: TypeAlias = Callable[[Tensor], Tensor]
"""``image [N, C, H, W] -> features [N, ...]``, whose squared distance is the damage"""

DENSITIES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)


def sensitivity(
    model: nn.Module,
    pattern: Pattern,
    inputs: Inputs,
    densities: Sequence[float] = DENSITIES,
    importance: str | Importance = "obd",
    layers: Sequence[str] | None = None,
    features: Features | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """The damage to the image when one layer alone is pruned to some density; ``model`` is not changed.

    inputs:     of one call: the samples that damage is the mean of; 16 or more.
    densities:  shares of a layer's groups to keep, in (0, 1]; at least one group is.
    importance: see `prune`; every layer keeps its groups of the highest score.
    layers:     names; None is all that run, those that touch the image and the smallest among them.
    features:   what of the image is compared, such as those of a trained network; None: its pixels.
    progress:   called with (layers done, layers in all).

    Returns for each layer and density the mean squared error, 0 at density 1. Raises ValueError for densities out of
    range and unknown layers, and what `prune` raises for importance. Method: the scan of Han et al. 2015
    (arXiv:1506.02626, section 5, figure 6), with the model's own image as the reference.
    """
    if not densities or not all(0 < density <= 1 for density in densities):
        raise ValueError(f"densities are shares of a layer to keep, in (0, 1]; got {list(densities)}")
    known, positions = prunable_layers(model), trace(model, inputs).positions
    names = [name for name in known if positions[name]] if layers is None else list(layers)
    if unknown := [name for name in names if not positions.get(name)]:
        raise ValueError(f"there is no layer {unknown[0]!r} that these inputs reach")
    chosen = {name: known[name] for name in names}
    generator = torch.Generator().manual_seed(seed)
    score = scoring.resolve(importance, model, chosen, pattern, inputs, generator)
    see = features or (lambda image: image)

    def seen(model: nn.Module) -> Tensor:
        with eval_mode(model), torch.no_grad():
            return see(image_of(model(*inputs))).double()

    wanted, table = seen(model), {}
    for done, (name, layer) in enumerate(chosen.items()):
        view = weight_view(layer).detach()
        sums = pattern.group_sums(score(name, layer, view).double())
        order = sums.flatten().argsort(descending=True, stable=True)
        pruned, row = copy.deepcopy(model), {}
        for density in sorted(set(densities), reverse=True):  # each a part of the one before
            kept = torch.zeros_like(sums, dtype=torch.bool)
            kept.view(-1)[order[: max(round(density * len(order)), 1)]] = True
            mask_groups(prunable_layers(pruned)[name], pattern, kept)
            row[density] = float((seen(pruned) - wanted).square().mean())
        table[name] = row
        if progress is not None:
            progress(done + 1, len(chosen))
    return table


# So many ways to prune the layers so far are kept apart; beyond that, of those whose costs are within a
# FRONT-th of the budget the least damaging stays.
FRONT = 4096


def least_damage(
    damage: Mapping[str, Mapping[float, float]], cost: Mapping[str, Mapping[float, float]], budget: float
) -> dict[str, float]:
    """A density for each layer so that costs add up to ``budget`` at most, and damage to as little as can be.

    damage: by layer and density, such as `sensitivity` returns: the damage of several layers is taken for the sum of
        theirs.
    cost:   of the same layers and densities: milliseconds (`latency`), multiply-adds; need not fall with the density.

    Returns the densities; ``{name: 1 - density}`` is the sparsity that `prune` takes. Raises BudgetError when
    even the cheapest way costs more, ValueError for tables that do not match, and for costs below zero or NaN.

    The multiple-choice knapsack problem, by dynamic programming over the undominated pairs of (cost, damage): exact
    while there are at most `FRONT` of these; beyond that they are thinned, which never exceeds the budget.
    """
    if set(damage) != set(cost) or not damage:
        raise ValueError(f"damage and cost are of the same layers, got {sorted(damage)} and {sorted(cost)}")
    for name, row in damage.items():
        if set(row) != set(cost[name]) or not row:
            raise ValueError(
                f"layer {name!r}: damage and cost are at the same densities, got {sorted(row)} and {sorted(cost[name])}"
            )
        if not all(value >= 0 for value in (*row.values(), *cost[name].values())):
            raise ValueError(
                f"layer {name!r}: damage and costs are numbers >= 0, got {dict(row)} and {dict(cost[name])}"
            )
    least = sum(min(row.values()) for row in cost.values())
    if not least <= budget * (1 + 1e-9):
        raise BudgetError(f"a budget of {budget:.4g} cannot be met: the cheapest densities cost {least:.4g}")
    # Undominated ways to prune the layers so far, in order of their cost: cost, damage, and the densities chosen.
    front: list[tuple[float, float, tuple[float, ...]]] = [(0.0, 0.0, ())]
    room = budget * (1 + 1e-9) - least  # what is left when every layer takes its cheapest density
    for name, row in damage.items():
        cheapest = min(cost[name].values())
        ways = sorted(
            (spent + cost[name][density] - cheapest, harm + more, (*chosen, density))
            for spent, harm, chosen in front
            for density, more in row.items()
            if spent + cost[name][density] - cheapest <= room
        )
        front = [ways[0]]
        for way in ways[1:]:
            if way[1] < front[-1][1]:
                front.append(way)
        if len(front) > FRONT:
            # Damage falls along the front, so that the last of each bin is the least damaging.
            bins = {int(way[0] / room * FRONT): way for way in front}
            front = list(dict.fromkeys([front[0], *bins.values()]))
    return dict(zip(damage, front[-1][2], strict=True))
