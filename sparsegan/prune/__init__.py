"""Pruning: from a trained generator to the same one with structured zeros, still dense and trainable."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsegan.patterns import (
    BlockPattern,
    NMPattern,
    Pattern,
    PrunableLayer,
    from_weight_view,
    weight_view,
)
from sparsegan.prune import allocate as budgets
from sparsegan.prune import importance as scoring
from sparsegan.prune.allocate import least_damage, sensitivity
from sparsegan.prune.distill import recover
from sparsegan.prune.importance import GradientImportance, Importance, gradient_importance
from sparsegan.prune.masks import adopt_torch_mask, make_permanent, set_mask
from sparsegan.prune.reconstruct import Fit, correct_bias, reconstruct, weight_parameter
from sparsegan.prune.trace import (
    Inputs,
    LayerSparsity,
    count_macs,
    prunable_layers,
    sparsity_report,
    trace,
)

__all__ = [
    "Fit",
    "GradientImportance",
    "LayerSparsity",
    "correct_bias",
    "count_macs",
    "gradient_importance",
    "least_damage",
    "make_permanent",
    "prune",
    "reconstruct",
    "recover",
    "sensitivity",
    "sparsity_report",
]

DEFAULT_PATTERN = BlockPattern(4, 4)
DEFAULT_SPARSITY = 0.75
# "obs" removes the blocks in so many rounds, each with what the ones before left.
OBS_ROUNDS = 2


def prune(
    model: nn.Module,
    pattern: Pattern = DEFAULT_PATTERN,
    sparsity: float | Mapping[str, float] | None = None,
    importance: str | Importance = "obd",
    example_inputs: Inputs | None = None,
    allocate: str = "uniform",
    layers: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> nn.Module:
    """Zero the least important groups of weights of ``model``; in place, returns ``model``.

    The zeros are held by a parametrization and survive further training; `make_permanent` leaves
    plain zeros. Layers already pruned, here or by `torch.nn.utils.prune`, keep their zeros, so
    pruning again goes further.

    pattern: which weights are zeroed together.
    sparsity: share of the multiply-adds to remove, in [0, 1), of the whole model or of the named
        ``layers`` alone; at least that is removed, and less than one group more. None means 0.75.
        An N:M pattern fixes it at 1 - N/M of each pruned layer: None or that value.
        A mapping says for each layer what share of its own to remove; the other layers stay as they are.
    importance: "obd", "taylor", "wanda", "obs", "l1", "l2", "random" (the functions in `importance`; the first
        four need ``example_inputs``), or a callable ``(layer name, layer, weight view [O, T, C]) -> scores [O, T, C]``;
        the higher are kept. "obs" removes in `OBS_ROUNDS` rounds, and after each fits the kept weights of the pruned
        layers to what the model computed before (`reconstruct`); the others leave the kept weights as they were.
    example_inputs: the tuple of positional inputs of one call. Scores that run the model draw new latents in their
        shape (`importance.draw_inputs`). Without them each weight counts as one multiply-add.
    allocate: "uniform", every pruned layer to the same density; "damage", groups compete across layers
        by score per multiply-add, which needs a score that means the same in every layer, as "obd" does.
    layers: names of the layers to prune. None means all but those that touch the image (1 to 4
        channels) and the smallest, together under 2 % of the multiply-adds: they cost little and
        damage much.
    seed: of every random draw; the global generator is left alone.

    Raises TypeError or ValueError for arguments that make no sense, NaN or infinite weights, a model
    without a layer to prune, and a sparsity that the pruned layers cannot give (BudgetError); the weights are then
    as they were.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern such as BlockPattern(4, 4), got {pattern!r}")
    per_layer = isinstance(sparsity, Mapping)
    if isinstance(sparsity, Mapping):
        if layers is not None:
            raise ValueError("sparsity by layer names the layers to prune: leave layers out")
        shares = {name: _checked_sparsity(pattern, share) for name, share in sparsity.items()}
        layers = list(shares)
    else:
        shares = {"": _checked_sparsity(pattern, sparsity)}
    if allocate not in budgets.RULES:
        raise ValueError(f"unknown allocate {allocate!r}; there are: {', '.join(budgets.RULES)}")

    candidates = prunable_layers(model)
    positions, touches_image = trace(model, example_inputs)
    macs = {name: positions[name] * weight_view(layer).numel() for name, layer in candidates.items()}
    if layers is None:
        chosen = _default_layers(model, candidates, touches_image | budgets.smallest_layers(macs))
    else:
        chosen = _named_layers(candidates, macs, layers)
        macs = {name: macs[name] for name in chosen}
    for name, layer in chosen.items():
        _check_weight(name, layer)
        adopt_torch_mask(layer)

    def keep(sums: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """The groups to keep when the share ``progress`` of the way is done, each step by the same factor."""
        if isinstance(pattern, NMPattern):
            return {name: pattern.best(scores) for name, scores in sums.items()}
        kept: dict[str, Tensor] = {}
        for group, share in shares.items():
            among = {group: chosen[group]} if per_layer else chosen
            counted = {group: macs[group]} if per_layer else macs
            kept |= _keep_within_budget(
                pattern, among, sums, positions, counted, 1 - (1 - share) ** progress, budgets.RULES[allocate]
            )
        return kept

    generator = torch.Generator().manual_seed(seed)
    fitted = importance == "obs"
    if fitted:
        for name, layer in chosen.items():
            weight_parameter(name, layer)
    rounds = OBS_ROUNDS if fitted and not isinstance(pattern, NMPattern) else 1
    teacher = copy.deepcopy(model) if fitted else model
    for done in range(1, rounds + 1):
        score = scoring.resolve(importance, model, chosen, pattern, example_inputs, generator)
        sums = {
            name: pattern.group_sums(_checked_scores(name, layer, score)) for name, layer in chosen.items()
        }
        keep(sums, 1.0)  # which raises for what cannot be reached, before anything is changed
        for name, kept in keep(sums, done / rounds).items():
            view = weight_view(chosen[name])
            mask = pattern.expand(kept, tuple(view.shape))
            set_mask(chosen[name], from_weight_view(chosen[name], mask).to(view.device))
        if fitted:
            assert example_inputs is not None
            batches = scoring.calibration_batches(example_inputs, generator)
            reconstruct(model, teacher, batches, list(chosen))
    return model


def _checked_sparsity(pattern: Pattern, sparsity: float | None) -> float:
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


def _named_layers(
    candidates: dict[str, PrunableLayer], macs: dict[str, int], layers: Sequence[str]
) -> dict[str, PrunableLayer]:
    wanted = [layers] if isinstance(layers, str) else list(layers)
    if not wanted:
        raise ValueError("layers is empty; name the layers to prune, or leave it out for the default")
    for name in wanted:
        if name not in candidates:
            known = difflib.get_close_matches(name, candidates, n=3) or list(candidates)[:8]
            raise ValueError(f"there is no layer {name!r} to prune; there are: {', '.join(known)}")
        if macs[name] == 0:
            raise ValueError(f"layer {name!r} is never called with these example_inputs")
    return {name: layer for name, layer in candidates.items() if name in wanted}


def _check_weight(name: str, layer: PrunableLayer) -> None:
    own = "weight" in layer._parameters or hasattr(layer, "weight_mask")
    if not own and not parametrize.is_parametrized(layer, "weight"):
        raise ValueError(
            f"the weight of layer {name!r} is not a parameter (weight_norm or spectral_norm as a forward "
            "hook?); remove that first, with torch.nn.utils.remove_weight_norm or remove_spectral_norm"
        )
    if not bool(weight_view(layer).isfinite().all()):
        raise ValueError(f"the weight of layer {name!r} holds NaN or infinite values; repair it first")


def _checked_scores(name: str, layer: PrunableLayer, score: Importance) -> Tensor:
    """The scores of ``layer``, in float64 on the CPU: sums of thousands of them are compared."""
    view = weight_view(layer).detach()
    scores = score(name, layer, view)
    if scores.shape != view.shape:
        raise ValueError(
            f"layer {name!r}: importance must give one score a weight, {tuple(view.shape)}; "
            f"got {tuple(scores.shape)}"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError(f"layer {name!r}: importance gave NaN or infinite scores")
    return scores.detach().cpu().double()


def _keep_within_budget(
    pattern: Pattern,
    chosen: dict[str, PrunableLayer],
    sums: dict[str, Tensor],
    positions: dict[str, int],
    macs: dict[str, int],
    sparsity: float,
    rule: budgets.Rule,
) -> dict[str, Tensor]:
    """Which groups to keep so that ``sparsity`` of all multiply-adds in ``macs`` go, by layer."""
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
        raise budgets.BudgetError(
            f"sparsity {sparsity:.4g} cannot be reached, at most {reachable:.4g}: each pruned layer keeps "
            f"one {pattern} group, and dense stay: {', '.join(spared) or 'none'}; "
            "ask for less, or name layers=[...]"
        )
    kept = budgets.keep_best(priorities, costs, budget)
    return {name: kept[name].view_as(sums[name]) for name in chosen}
