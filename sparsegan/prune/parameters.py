"""The classical ways to prune parameters: by threshold, at random, by a penalty in training, by the gradient.

Each is one formula. In all of them w are the weights that the layers compute with (masks and spectral norm applied), without
biases, and ``layers`` names the Linear, Conv2d and ConvTranspose2d layers meant. Zeros are held by masks, as those of `prune`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsegan.patterns import (
    BlockPattern,
    ChannelPattern,
    Pattern,
    PrunableLayer,
    from_weight_view,
    weight_view,
)
from sparsegan.prune.allocate import check_weight, named_layers
from sparsegan.prune.importance import gradient_importance
from sparsegan.prune.masks import adopt_torch_mask, mask_groups
from sparsegan.prune.reconstruct import weight_parameter
from sparsegan.prune.trace import Inputs, eval_mode, prunable_layers, trace

SINGLE_WEIGHTS = BlockPattern(1, 1)

# ---- by threshold


def prune_below(
    model: nn.Module,
    threshold: float,
    pattern: Pattern = SINGLE_WEIGHTS,
    layers: Sequence[str] | None = None,
) -> nn.Module:
    """Zero each weight with |w| < ``threshold``; in place, returns ``model``.

    With groups of several weights those go whose root mean square is below: sqrt(Σw² / |g|) < ``threshold``. An N:M pattern
    counts as single weights. Nothing keeps a layer from losing all of them. layers: None means every layer.

    Raises ValueError for a negative or NaN threshold, unknown layers and weights that are not finite.
    Source: Han et al. 2015, arXiv:1506.02626, section 3.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is a magnitude, at least 0; got {threshold}")
    for layer in _maskable(model, layers).values():
        with eval_mode(layer), torch.no_grad():
            squares = weight_view(layer).double().square()
        means = pattern.group_sums(squares) / pattern.group_sums(torch.ones_like(squares))
        mask_groups(layer, pattern, means.sqrt() >= threshold)
    return model


class ThresholdTrial(NamedTuple):
    """A row of the table of `choose_threshold`."""

    threshold: float
    sparsity: float
    """Share of the weights that are zero, in all Linear, Conv2d and ConvTranspose2d layers."""
    score: float


class ThresholdChoice(NamedTuple):
    """What `choose_threshold` returns."""

    threshold: float
    trials: list[ThresholdTrial]
    """By threshold; the first is the model as it came, at 0."""


def choose_threshold(
    model: nn.Module,
    thresholds: Sequence[float],
    score: Callable[[nn.Module], float],
    tolerance: float,
    pattern: Pattern = SINGLE_WEIGHTS,
    layers: Sequence[str] | None = None,
) -> ThresholdChoice:
    """The largest of ``thresholds`` at which `prune_below` costs little: max {t : score(t) - score(0) <= ``tolerance``}.

    score: of a copy of the model on validation data, the lower the better: a loss, a distance such as KID. Negate others.
    tolerance: in units of the score, at least 0.

    Returns 0 when no threshold will do; a score that is NaN will not. ``model`` is left as it was. Raises ValueError for a
    negative tolerance, a score of the unpruned model that is not finite, and what `prune_below` raises.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is how much worse the score may get, at least 0; got {tolerance}")
    trials = []
    for threshold in sorted({0.0, *thresholds}):
        pruned = prune_below(copy.deepcopy(model), threshold, pattern, layers)
        trials.append(ThresholdTrial(threshold, _sparsity(pruned), float(score(pruned))))
    if not math.isfinite(dense := trials[0].score):
        raise ValueError(f"the score of the unpruned model is {dense}: nothing can be compared with that")
    chosen = max(trial.threshold for trial in trials if trial.score - dense <= tolerance)
    return ThresholdChoice(chosen, trials)


def _sparsity(model: nn.Module) -> float:
    with torch.no_grad():
        zeros = [view == 0 for view in _views(model, None)]
    return sum(int(zero.sum()) for zero in zeros) / sum(zero.numel() for zero in zeros)


# ---- penalties, for the loss of a training


def l1_penalty(model: nn.Module, layers: Sequence[str] | None = None) -> Tensor:
    """Σ|w| over all weights of ``layers`` (None: every layer): a scalar to add to the loss, times a strength.

    Source: the lasso, Tibshirani 1996, equation 1 in its Lagrangian form.
    """
    return _total(view.abs().sum() for view in _views(model, layers))


def l2_penalty(model: nn.Module, layers: Sequence[str] | None = None) -> Tensor:
    """Σw² over all weights of ``layers`` (None: every layer): a scalar to add to the loss, times a strength.

    Source: ridge regression, Hoerl and Kennard 1970; its gradient is weight decay.
    """
    return _total(view.square().sum() for view in _views(model, layers))


def group_lasso(model: nn.Module, pattern: Pattern, layers: Sequence[str] | None = None) -> Tensor:
    """Σ over groups g of sqrt(|g|) · ||w_g||₂: a scalar to add to the loss, times a strength.

    |g| is the number of weights in the group, fewer at a ragged edge. Where a group is zero its gradient is taken as zero. By
    gradient steps groups come close to zero, by `shrink_groups` they get there. layers: None means every layer.

    Source: Yuan and Lin 2006, equation 2.1 with K = |g| I; for networks Wen et al. 2016, arXiv:1608.03665, section 3.1.
    """

    def of_layer(view: Tensor) -> Tensor:
        squares = pattern.group_sums(view.square())
        sizes = pattern.group_sums(torch.ones_like(view))
        # The root has no gradient at zero.
        some = squares > 0
        return (torch.where(some, sizes * squares, 1.0).sqrt() * some).sum()

    return _total(of_layer(view) for view in _views(model, layers))


@torch.no_grad()
def shrink_groups(
    model: nn.Module, pattern: Pattern, amount: float, layers: Sequence[str] | None = None
) -> None:
    """The proximal step of ``amount`` · `group_lasso`, in place: w_g ← max(0, 1 - amount · sqrt(|g|) / ||w_g||₂) · w_g.

    After each optimiser step, with ``amount`` = learning rate x strength and the penalty left out of the loss, it gives groups
    that are exactly zero, and that may come back. layers: None means every layer.

    Raises ValueError for a negative amount and layers whose weight is computed by a parametrization besides a mask (to scale the
    weight under spectral norm changes nothing). Source: block soft thresholding, Parikh and Boyd 2014, section 6.5.
    """
    if not amount >= 0:
        raise ValueError(f"amount is learning rate x strength, at least 0; got {amount}")
    chosen = _chosen(model, layers)
    parameters = {name: weight_parameter(name, layer) for name, layer in chosen.items()}
    for name, layer in chosen.items():
        view = weight_view(layer)
        norms = pattern.group_sums(view.square()).sqrt()
        sizes = pattern.group_sums(torch.ones_like(view))
        factors = torch.where(norms > 0, 1 - amount * sizes.sqrt() / norms, 0.0).clamp(min=0)
        spread = pattern.expand(factors, tuple(view.shape))
        parameters[name].mul_(from_weight_view(layer, spread))


# ---- rows, neurons and layers


def prune_random_rows(
    model: nn.Module, share: float, layers: Sequence[str] | None = None, *, seed: int = 0
) -> nn.Module:
    """Zero ⌊``share`` · O⌋ of the O rows of each layer, drawn uniformly; in place, returns ``model``.

    A row is an output channel: all taps and inputs. The control that any other choice of neurons must beat. Rows that are masked
    already are the first to count; biases stay.
    layers: None means every layer but the last, whose rows are the outputs of the model.

    Raises ValueError for a share outside of [0, 1), unknown layers and weights that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = _maskable(model, _hidden(model, layers))
    rows = {name: len(weight_view(layer)) for name, layer in chosen.items()}
    _keep_best_rows(chosen, {name: torch.rand(n, generator=generator) for name, n in rows.items()}, share)
    return model


def prune_neurons(
    model: nn.Module,
    share: float,
    example_inputs: Inputs,
    layers: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> nn.Module:
    """Zero the rows of the ⌊``share`` · O⌋ least important of the O neurons of each layer; in place, returns ``model``.

    The importance of neuron o is the mean over its weights of E|∂(y·v)/∂w_o|: `gradient_importance`, in random draws like
    ``example_inputs``. A neuron is an output channel: all taps and inputs; its bias stays, so that it goes on as a constant.
    Rows that are masked already are the first to count. layers: None means every layer but the last, whose neurons are the
    outputs of the model.

    Raises ValueError for a share outside of [0, 1), unknown layers and weights that are not finite, and what `prune` raises for
    ``example_inputs``.
    """
    chosen = _maskable(model, _hidden(model, layers))
    generator = torch.Generator().manual_seed(seed)
    found = gradient_importance(model, chosen, example_inputs, generator)
    _keep_best_rows(chosen, {name: importance.channels for name, importance in found.items()}, share)
    return model


def prune_layers(
    model: nn.Module,
    count: int,
    example_inputs: Inputs,
    layers: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> nn.Module:
    """Replace the ``count`` least important layers by `nn.Identity`; in place, returns ``model``.

    The importance of a layer is the mean over its weights of E|∂(y·v)/∂w|: `gradient_importance`, in random draws like
    ``example_inputs``. Only what gives the shape that it gets can go, and only where it is an entry of an `nn.Sequential`, which
    calls it with one tensor; norms and activations around it stay.

    layers: names of those that may go: layers, or whole blocks that hold some, such as residual ones, whose importance is the
        mean over all weights in them. None means all Linear, Conv2d and ConvTranspose2d layers that can.

    Raises ValueError for a named layer that cannot go, with the reason, when there are fewer than ``count``, and what `prune`
    raises for ``example_inputs``.
    """
    same = _shape_keeping(model, example_inputs)
    if layers is None:
        names = [name for name in prunable_layers(model) if not _cannot_go(model, name, same)]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if reason := _cannot_go(model, name, same):
                raise ValueError(f"{name!r} cannot be removed as a whole: {reason}")
    if not 0 <= count <= len(names):
        raise ValueError(
            f"{count} layers cannot go: those that can are {', '.join(names) or 'none'}; a layer has to keep the "
            "shape and be an entry of an nn.Sequential"
        )
    inside = {name: _inside(model, name) for name in names}
    measured = {name: layer for held in inside.values() for name, layer in held.items()}
    found = gradient_importance(model, measured, example_inputs, torch.Generator().manual_seed(seed))

    def importance(name: str) -> float:
        sizes = {one: weight_view(layer).numel() for one, layer in inside[name].items()}
        return sum(found[one].layer * size for one, size in sizes.items()) / sum(sizes.values())

    for name in sorted(names, key=importance)[:count]:
        parent, _, entry = name.rpartition(".")
        setattr(model.get_submodule(parent), entry, nn.Identity())
    return model


def _keep_best_rows(chosen: dict[str, PrunableLayer], scores: dict[str, Tensor], share: float) -> None:
    """Mask the ``share`` of the rows of each layer with the least scores ``[O]``, which are not negative."""
    if not 0 <= share < 1:
        raise ValueError(f"share is of the rows of each layer, in [0, 1); got {share}")
    for name, layer in chosen.items():
        with eval_mode(layer), torch.no_grad():
            gone = (weight_view(layer) == 0).flatten(1).all(1).cpu()
        order = scores[name].cpu().masked_fill(gone, -1).argsort(stable=True)
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[order[: math.floor(share * len(order))]] = False
        mask_groups(layer, ChannelPattern(), kept)


def _shape_keeping(model: nn.Module, inputs: Inputs) -> set[str]:
    """The modules that are called with one tensor and give one of the same shape, each time."""
    keeps: dict[str, bool] = {}

    def see(name: str, args: tuple[Any, ...], y: object) -> None:
        same = (
            len(args) == 1
            and isinstance(args[0], Tensor)
            and isinstance(y, Tensor)
            and args[0].shape == y.shape
        )
        keeps[name] = keeps.get(name, True) and same

    hooks = [
        module.register_forward_hook(lambda module, args, y, name=name: see(name, args, y))
        for name, module in model.named_modules()
    ]
    try:
        trace(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, same in keeps.items() if same}


def _cannot_go(model: nn.Module, name: str, same: set[str]) -> str:
    """Why the module ``name`` cannot be replaced by the identity; empty if it can."""
    if name not in dict(model.named_modules()):
        return "there is no module of that name"
    if not _inside(model, name):
        return "it holds no Linear, Conv2d or ConvTranspose2d"
    parent = model.get_submodule(name.rpartition(".")[0])
    if not name or not isinstance(parent, nn.Sequential):
        return f"it is not an entry of an nn.Sequential, and what {type(parent).__name__} does with it is unknown"
    if name not in same:
        return "it does not give the shape that it gets, or is never called with these example_inputs"
    return ""


def _inside(model: nn.Module, name: str) -> dict[str, PrunableLayer]:
    """The layers that the module ``name`` is or holds."""
    known = prunable_layers(model)
    return {one: layer for one, layer in known.items() if one == name or one.startswith(f"{name}.")}


# ---- layers and weights


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> dict[str, PrunableLayer]:
    candidates = prunable_layers(model)
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no Linear, Conv2d or ConvTranspose2d")
    return candidates if layers is None else named_layers(candidates, layers)


def _hidden(model: nn.Module, layers: Sequence[str] | None) -> Sequence[str]:
    if layers is not None:
        return layers
    if not (names := list(_chosen(model, None))[:-1]):
        raise ValueError(
            "the only layer makes the outputs of the model; name it with layers=[...] to prune it all the same"
        )
    return names


def _maskable(model: nn.Module, layers: Sequence[str] | None) -> dict[str, PrunableLayer]:
    chosen = _chosen(model, layers)
    for name, layer in chosen.items():
        check_weight(name, layer)
        adopt_torch_mask(layer)
    return chosen


def _views(model: nn.Module, layers: Sequence[str] | None) -> Iterator[Tensor]:
    """The weights ``[O, T, C]`` that layers compute with, differentiable."""
    for layer in _chosen(model, layers).values():
        with eval_mode(layer):  # in training mode spectral norm changes whenever a weight is read
            view = weight_view(layer)
        yield view


def _total(values: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
