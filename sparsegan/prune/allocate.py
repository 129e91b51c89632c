"""How many groups each layer may keep: a budget shared out over the layers.

In multiply-adds: a rule turns the scores of a layer's groups into priorities that can be compared between layers;
`keep_best` then keeps the highest of all layers until the budget is spent.

In any cost that was measured, such as milliseconds: `sensitivity` tells what pruning one layer alone to some density
does to the image, and `least_damage` chooses a density for each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sparsegan.patterns import Pattern, from_weight_view, weight_view
from sparsegan.prune import importance as scoring
from sparsegan.prune.importance import Importance
from sparsegan.prune.masks import set_mask
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
            mask = from_weight_view(layer, pattern.expand(kept, tuple(view.shape)))
            set_mask(pruned.get_submodule(name), mask)  # type: ignore[arg-type]
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
