"""Pruning while training: masks that tighten or wander between the steps of any optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from sparsegan.patterns import BlockPattern, NMPattern, Pattern, PrunableLayer, weight_view
from sparsegan.prune import allocate as budgets
from sparsegan.prune.masks import Mask, find_mask, mask_groups, maskable_parameter
from sparsegan.prune.trace import Inputs, eval_mode

Groups: TypeAlias = dict[str, Tensor]
"""``layer name -> one value a group``, shaped as `Pattern.group_sums` returns"""

DEFAULT_PATTERN = BlockPattern(4, 4)
# How often masks change on the way, unless a number of steps is given.
_EVENTS = 20


class Sparsifier:
    """Prunes ``model`` while ``optimiser`` trains it, in place; called after every step of the optimiser.

    Masks are buffers of the model from construction on, so build it before the first step, before a copy for averaged weights and
    before `DistributedDataParallel`. What is masked is zero, and so is all that the optimiser remembers of it, of a weight that
    comes back too: state of the shape of the weight follows the mask. `make_permanent` leaves plain zeros at the end.

    pattern:   which weights are zeroed together.
    sparsity:  share of the multiply-adds to remove, as for `prune`, every pruned layer to the same density; None means 0.75, or
               what an N:M pattern fixes.
    steps:     of the optimiser in all.
    kind:      "cubic", from dense to sparse: the groups with the least Σw² go, at time t the share 1 - (1 - t)³ of ``sparsity``
               (Zhu and Gupta 2017, arXiv:1710.01878, equation 1). N:M goes by way of M-1:M and so on.
               "threshold": each time the groups whose root mean square weight is below ``threshold`` go, but never more than
               ``sparsity`` in all. Magnitude pruning of single weights, done with groups (own).
               "rigl", sparse throughout: groups are drawn at random, and each time the share regrow / 2 · (1 + cos πt) of those
               that are kept, the ones with the least Σw², make room for those where Σ(∂L/∂w)² is largest, which start at zero
               (Evci et al. 2020, arXiv:1911.11134, section 3, with groups for weights). Masks from before do not count.
    every:     steps between two such events; None makes 20 events.
    until:     share of the steps, in (0, 1], after which masks stay; up to there t runs from 0 to 1.
    threshold: of kind "threshold", in units of the weights that the layer computes with.
    layers, example_inputs: see `prune`. Without inputs each weight counts as one multiply-add.
    seed:      of the groups that "rigl" draws.

    A weight under spectral norm is masked before it is normed: the norm of what is left is 1, and masked weights get no gradient
    by way of the norm.

    "rigl" needs the gradient of weights that are masked. In the step before an event the masks let it through to the ``.grad`` of
    the parameter, so that it is averaged over processes, scaled and accumulated like any other; the event undoes what the
    optimiser makes of it. So call this before ``zero_grad``. Where the norm of all gradients is clipped, they count in that step.

    In several processes the masks are equal as long as the weights, gradients and arguments are; nothing is sent.

    To go on in another process, build this with the same arguments, load the states of the model, the optimiser and this
    (`load_state_dict`): then the rest is what it would have been. A training that can go back to an earlier state keeps a new one
    whenever the masks have changed, or old masks come back.

    Raises TypeError or ValueError for arguments that make no sense, layers that ``optimiser`` does not train, and what `prune`
    raises for layers and sparsity (BudgetError); nothing is masked then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: Optimizer,
        pattern: Pattern = DEFAULT_PATTERN,
        sparsity: float | None = None,
        *,
        steps: int,
        kind: str = "cubic",
        every: int | None = None,
        until: float = 0.75,
        regrow: float = 0.3,
        threshold: float | None = None,
        layers: Sequence[str] | None = None,
        example_inputs: Inputs | None = None,
        seed: int = 0,
    ) -> None:
        kinds: dict[str, Callable[[int], Groups]] = {
            "cubic": self._cubic,
            "threshold": self._below_threshold,
            "rigl": self._regrown,
        }
        if isinstance(model, DataParallel | DistributedDataParallel):
            raise TypeError(f"give the model itself and wrap it in {type(model).__name__} afterwards")
        if not isinstance(pattern, Pattern):
            raise TypeError(f"pattern must be a Pattern such as BlockPattern(4, 4), got {pattern!r}")
        if kind not in kinds:
            raise ValueError(f"unknown kind {kind!r}; there are: {', '.join(kinds)}")
        if not 0 < until <= 1 or not 0 < regrow <= 1:
            raise ValueError(f"until and regrow are shares, in (0, 1]; got until={until} and regrow={regrow}")
        if (kind == "threshold") != (threshold is not None) or not (threshold is None or threshold > 0):
            raise ValueError(
                f'kind "threshold" needs a threshold above 0, and no other takes one; got {threshold}'
            )
        if kind == "threshold" and isinstance(pattern, NMPattern):
            raise ValueError(f'{pattern} says how many weights go: take kind "cubic" or "rigl"')
        self._until = until * steps
        self._every = max(1, int(self._until) // _EVENTS) if every is None else every
        if not 1 <= self._every <= self._until:
            raise ValueError(
                f"masks would never change: every {self._every} steps, until {until:g} of {steps} steps"
            )
        self.last_step = int(self._until) // self._every * self._every
        """The step of the last event."""
        self._pattern, self._regrow, self._threshold = pattern, regrow, threshold or 0.0
        self._sparsity = budgets.checked_sparsity(pattern, sparsity)
        self._grows, self._wanted = kind == "rigl", kinds[kind]
        self._model, self._optimiser = model, optimiser
        self._step, self._begun = 0, False

        with eval_mode(model), torch.no_grad():
            self._target = budgets.choose_layers(model, example_inputs, layers)
            chosen = self._target.layers
            self._weights = {name: maskable_parameter(name, layer) for name, layer in chosen.items()}
            trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
            for name, weight in self._weights.items():
                if id(weight) not in trained:
                    raise ValueError(
                        f"this optimiser does not train the weight of layer {name!r}: give the one that does, "
                        "or name the layers to prune with layers=[...]"
                    )
            # The number of weights in each group: fewer at a ragged edge.
            self._sizes = {
                name: pattern.group_sums(torch.ones(weight_view(layer).shape, dtype=torch.float64))
                for name, layer in chosen.items()
            }
            noise = torch.Generator().manual_seed(seed)
            drawn = {
                name: torch.rand(size.shape, generator=noise) * size for name, size in self._sizes.items()
            }
            kept = self._within(
                drawn, self._sparsity
            )  # of every kind, to raise now for what cannot be reached
            # The number of weights that full sparsity leaves in a layer.
            self._room = {name: float(self._sizes[name][groups].sum()) for name, groups in kept.items()}
            if not self._grows:
                kept = {name: torch.ones_like(groups) for name, groups in kept.items()}
            self._set_masks(kept)
        self._see_dense_gradients()

    def sparsity(self) -> float:
        """The share of the multiply-adds that is gone now: of the whole model, or of the named layers."""
        layers, positions, macs = self._target
        gone = sum(positions[name] * int((~_mask(layer).mask).sum()) for name, layer in layers.items())
        return gone / sum(macs.values())

    def state_dict(self) -> dict[str, int]:
        """The number of steps done, under "step"; all else is in the model and the optimiser."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after ``state["step"]`` steps; the states of the model and the optimiser are loaded by themselves."""
        self._step, self._begun = int(state["step"]), False
        self._see_dense_gradients()

    @torch.no_grad()
    def __call__(self, step: int) -> bool:
        """Change the masks if it is time to; returns whether they have changed.

        step: the number of steps done, from 1. When a call was left out, of a step that was undone, the next one makes up for it.

        Raises ValueError for a step that does not follow, RuntimeError when "rigl" finds no gradients, FloatingPointError for
        weights that are not finite; nothing has changed then. Gradients that are not finite (a gradient scaler skips such a step)
        leave the masks of "rigl" as they are.
        """
        if step <= self._step or not (self._begun or step == self._step + 1):
            raise ValueError(
                f"step {step} does not follow step {self._step}: count the steps done from 1, and when a training "
                'goes on, call load_state_dict({"step": steps done}) first'
            )
        changed = False
        if self._is_event(self._step, step):
            with eval_mode(self._model):  # in training mode spectral norm changes whenever a weight is read
                changed = self._set_masks(self._wanted(step))
        self._step, self._begun = step, True
        self._see_dense_gradients()
        return changed

    def _is_event(self, before: int, step: int) -> bool:
        return min(step, self.last_step) // self._every > before // self._every

    def _see_dense_gradients(self) -> None:
        for layer in self._target.layers.values():
            _mask(layer).dense_gradient = self._grows and self._is_event(self._step, self._step + 1)

    # ---- which groups to keep

    def _cubic(self, step: int) -> Groups:
        left = 1 - min(step, self.last_step) / self.last_step
        return self._still(self._within(self._magnitudes(), self._sparsity * (1 - left**3)))

    def _below_threshold(self, step: int) -> Groups:
        sums = self._magnitudes()
        best = self._within(sums, self._sparsity)
        above = {name: sums[name] >= self._threshold**2 * self._sizes[name] for name in sums}
        return self._still({name: best[name] | above[name] for name in sums})

    def _regrown(self, step: int) -> Groups:
        sums, growth = self._magnitudes(), {}
        for name, weight in self._weights.items():
            if weight.grad is None:
                raise RuntimeError(
                    f"layer {name!r} has no gradient: call this after the step, before zero_grad"
                )
            growth[name] = self._squares(self._target.layers[name], weight.grad)
        kept = {name: self._kept(name) for name in sums}
        if not all(bool(groups.isfinite().all()) for groups in growth.values()):
            return kept
        share = self._regrow / 2 * (1 + math.cos(math.pi * min(step / self._until, 1)))
        for name, groups in kept.items():
            weakest = (
                (sums[name] / self._sizes[name])
                .masked_fill(~groups, torch.inf)
                .flatten()
                .argsort(stable=True)
            )
            stays = groups.flatten()
            stays[weakest[: int(share * int(groups.sum()))]] = False
            groups = stays.view_as(groups)
            priorities = (growth[name] / self._sizes[name]).masked_fill(groups, torch.inf)
            if isinstance(self._pattern, NMPattern):
                kept[name] = self._pattern.best(priorities)
            else:
                ranked, costs = {name: priorities.flatten()}, {name: self._sizes[name].flatten()}
                kept[name] = budgets.keep_best(ranked, costs, self._room[name])[name].view_as(groups)
        return kept

    def _within(self, sums: Groups, sparsity: float) -> Groups:
        """The groups with the highest sums, the same density in every layer, so that ``sparsity`` is reached."""
        if not isinstance(self._pattern, NMPattern):
            return budgets.keep_within_budget(self._pattern, self._target, sums, sparsity, budgets.uniform)
        m = self._pattern.m
        n = math.ceil(m * (1 - sparsity) - 1e-9)
        return {
            name: NMPattern(n, m).best(s) if n < m else torch.ones_like(s).bool() for name, s in sums.items()
        }

    def _still(self, kept: Groups) -> Groups:
        """Those of ``kept`` that are kept now: none comes back."""
        return {name: groups & self._kept(name) for name, groups in kept.items()}

    def _magnitudes(self) -> Groups:
        """Σw² of each group, float64 on the CPU; -1 for those that are masked, to be the last to be kept."""
        sums = {}
        for name, layer in self._target.layers.items():
            sums[name] = self._squares(layer).masked_fill(~self._kept(name), -1)
            if not bool(sums[name].isfinite().all()):
                raise FloatingPointError(f"the weight of layer {name!r} holds NaN or infinite values")
        return sums

    def _squares(self, layer: PrunableLayer, weight: Tensor | None = None) -> Tensor:
        return self._pattern.group_sums(weight_view(layer, weight).cpu().double().square())

    # ---- masks

    def _kept(self, name: str) -> Tensor:
        layer = self._target.layers[name]
        return self._pattern.group_sums(weight_view(layer, _mask(layer).mask).cpu().double()) > 0

    def _set_masks(self, kept: Groups) -> bool:
        changed = False
        for name, layer in self._target.layers.items():
            present = find_mask(layer)
            before = None if present is None else present.mask.clone()
            mask_groups(layer, self._pattern, kept[name], grow=self._grows)
            mask = _mask(layer).mask
            stays = mask if before is None else mask & before
            weight = self._weights[name]
            for tensor in (weight, *self._optimiser.state.get(weight, {}).values()):
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                    tensor.masked_fill_(~stays, 0)
            changed |= before is None or not torch.equal(mask, before)
        return changed


def _mask(layer: PrunableLayer) -> Mask:
    mask = find_mask(layer)
    if mask is None:
        raise RuntimeError("a mask is gone: make_permanent comes after the last step")
    return mask
