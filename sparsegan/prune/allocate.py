"""How many groups each layer may keep: budgets in multiply-adds, shared out over the layers.

A rule turns the scores of a layer's groups into priorities that can be compared between layers; `keep_best`
then keeps the highest of all layers until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

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


def smallest_layers(macs: Mapping[str, int]) -> set[str]:
    """The smallest layers that together hold at most `SMALL_SHARE` of the multiply-adds."""
    small, held = set(), 0
    for name in sorted(macs, key=lambda name: macs[name]):
        held += macs[name]
        if held > SMALL_SHARE * sum(macs.values()):
            break
        small.add(name)
    return small
