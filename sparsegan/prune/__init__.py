"""Pruning: from a trained generator to the same one with structured zeros, still dense and trainable."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsegan.patterns import BlockPattern, NMPattern, Pattern, PrunableLayer, weight_view
from sparsegan.prune import allocate as budgets
from sparsegan.prune import importance as scoring
from sparsegan.prune.allocate import least_damage, sensitivity
from sparsegan.prune.distill import recover
from sparsegan.prune.during import Sparsifier
from sparsegan.prune.importance import GradientImportance, Importance, gradient_importance
from sparsegan.prune.masks import make_permanent, mask_groups
from sparsegan.prune.parameters import (
    ThresholdChoice,
    ThresholdTrial,
    choose_threshold,
    group_lasso,
    l1_penalty,
    l2_penalty,
    prune_below,
    prune_layers,
    prune_neurons,
    prune_random_rows,
    shrink_groups,
)
from sparsegan.prune.reconstruct import Fit, correct_bias, reconstruct, weight_parameter
from sparsegan.prune.trace import Inputs, LayerSparsity, count_macs, sparsity_report

__all__ = [
    "Fit",
    "GradientImportance",
    "LayerSparsity",
    "Sparsifier",
    "ThresholdChoice",
    "ThresholdTrial",
    "choose_threshold",
    "correct_bias",
    "count_macs",
    "gradient_importance",
    "group_lasso",
    "l1_penalty",
    "l2_penalty",
    "least_damage",
    "make_permanent",
    "prune",
    "prune_below",
    "prune_layers",
    "prune_neurons",
    "prune_random_rows",
    "reconstruct",
    "recover",
    "sensitivity",
    "shrink_groups",
    "sparsity_report",
]

DEFAULT_PATTERN = BlockPattern(4, 4)
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
    if isinstance(sparsity, Mapping):
        if layers is not None:
            raise ValueError("sparsity by layer names the layers to prune: leave layers out")
        shares = {name: budgets.checked_sparsity(pattern, share) for name, share in sparsity.items()}
        layers = list(shares)
    else:
        shares = {"": budgets.checked_sparsity(pattern, sparsity)}
    if allocate not in budgets.RULES:
        raise ValueError(f"unknown allocate {allocate!r}; there are: {', '.join(budgets.RULES)}")

    everything = chosen, positions, macs = budgets.choose_layers(model, example_inputs, layers)

    def keep(sums: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """The groups to keep when the share ``progress`` of the way is done, each step by the same factor."""
        if isinstance(pattern, NMPattern):
            return {name: pattern.best(scores) for name, scores in sums.items()}
        kept: dict[str, Tensor] = {}
        for group, share in shares.items():
            target = everything
            if group:  # a layer with a share of its own
                target = budgets.Target({group: chosen[group]}, positions, {group: macs[group]})
            share_now = 1 - (1 - share) ** progress
            kept |= budgets.keep_within_budget(pattern, target, sums, share_now, budgets.RULES[allocate])
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
            mask_groups(chosen[name], pattern, kept)
        if fitted:
            assert example_inputs is not None
            batches = scoring.calibration_batches(example_inputs, generator)
            reconstruct(model, teacher, batches, list(chosen))
    return model


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
