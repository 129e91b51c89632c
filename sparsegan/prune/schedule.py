"""When the zeros come during recovery: at once, gradually, or in rounds that start over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from sparsegan.prune.masks import find_mask
from sparsegan.prune.trace import prunable_layers

SCHEDULES = ("one-shot", "cubic", "iterative")

# Pruning is over when this share of the steps is done: what is left needs the rest to recover.
_LAST = 0.5
_CUBIC_EVENTS = 10
_ROUNDS = 3


class Schedule:
    """Prunes a model in stages while it recovers; `recover` calls it before each step, as its ``tighten``.

    kind: "one-shot", all before the first step; "cubic", a share 1 - (1 - t)^3 of the final sparsity at time t (Zhu and Gupta
        2017, arXiv:1710.01878, section 3), ten times until half of the steps are done; "iterative", the same share in each of
        three rounds, and after each the weights start over from where they were at first (rewinding: Renda et al. 2020,
        arXiv:2003.02389, section 2).
    prune_to: prunes the model so that this share of the final sparsity is reached, 1 at the end; what is zero stays zero.

    The first stage is pruned at construction. Raises ValueError for another kind.
    """

    def __init__(self, kind: str, model: nn.Module, prune_to: Callable[[float], object], steps: int) -> None:
        if kind not in SCHEDULES:
            raise ValueError(f"unknown schedule {kind!r}; there are: {', '.join(SCHEDULES)}")
        self._model, self._prune_to = model, prune_to
        stages = _stages(kind) if steps else [(0.0, 1.0)]
        self._stages = {round(time * _LAST * steps): share for time, share in stages}
        self._start = (
            {name: weight.detach().clone() for name, weight in _weights(model).items()}
            if kind == "iterative"
            else None
        )
        prune_to(self._stages[0])

    def __call__(self, step: int) -> bool:
        """Prune if it is time to; whether the model has changed."""
        if step == 0 or step not in self._stages:
            return False
        self._prune_to(self._stages[step])
        if self._start is not None:
            for name, weight in _weights(self._model).items():
                with torch.no_grad():
                    weight.copy_(self._start[name])
        return True


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters under the masks, which keep what a mask hides, and those of layers without one."""
    return {
        name: layer.weight if find_mask(layer) is None else layer.parametrizations.weight.original  # type: ignore
        for name, layer in prunable_layers(model).items()
    }


def _stages(kind: str) -> Sequence[tuple[float, float]]:
    """(time, share of the final sparsity), time running from 0 to 1."""
    match kind:
        case "one-shot":
            return [(0.0, 1.0)]
        case "cubic":
            times = [event / _CUBIC_EVENTS for event in range(_CUBIC_EVENTS + 1)]
            return [(time, 1 - (1 - max(time, 1 / _CUBIC_EVENTS)) ** 3) for time in times]
    return [(i / (_ROUNDS - 1), (i + 1) / _ROUNDS) for i in range(_ROUNDS)]
