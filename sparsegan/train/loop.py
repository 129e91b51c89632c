"""One loop for everything that is trained on data: it resumes, undoes what went wrong, and tells how far it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsegan import parallel
from sparsegan.training import TrainingState, fast_training

_T = TypeVar("_T")
Progress: TypeAlias = Callable[[int, float], None]
"""``(steps done, loss)``, called after each step"""
After: TypeAlias = Callable[[int], bool]
"""``steps done -> whether the models were changed``, called after each step: what prunes, say.

Where a training goes on, its ``load_state_dict`` is told the steps done.
"""

CHECK_EVERY = 50
_ROLL_BACKS = 4


class Task(ABC):
    """What is trained, and how one step of it is made.

    modules:    all that has a state, by name; those that learn and those that follow them (a moving average).
    optimisers: whose rates `run` sets to their first value times `rate`.
    """

    modules: dict[str, nn.Module]
    optimisers: list[Optimizer]

    @abstractmethod
    def step(self, rng: torch.Generator) -> Tensor:
        """One step of the optimisers on a batch that ``rng`` chooses; a loss to show, the same in all processes."""

    def rate(self, progress: float) -> float:
        """Factor of the learning rates when this share of the steps is done: here a cosine to zero."""
        return 0.5 * (1 + math.cos(math.pi * progress))

    def trouble(self) -> str | None:
        """Why the training has collapsed, if it has; asked every `CHECK_EVERY` steps."""
        return None


@dataclass
class Trained:
    """history: the loss of each step. rng: where its random numbers go on. events: what went wrong and was undone.

    seconds: that it took, those before a kill as well.
    """

    history: list[float]
    rng: torch.Generator = field(default_factory=torch.Generator)
    events: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run(
    task: Task,
    steps: int,
    *,
    seed: int,
    settings: object = None,
    after: Sequence[After] = (),
    fast: bool = False,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train ``task`` for ``steps`` steps, all random numbers from ``seed``.

    settings: with seed and steps, what tells this run from others. fast: compute in bfloat16 where that is quicker.
    state: a file that holds the training so far, see `TrainingState`; where it is there, training goes on from it.

    Where a loss is not finite or the task finds itself in trouble, everything goes back to the last good state, the rates are
    halved, and training goes on. Raises FloatingPointError when that helps no more, or the first loss is not finite; ValueError
    for a ``state`` of another run.
    """
    if steps < 1:
        raise ValueError(f"training needs steps >= 1, got {steps}")
    training = TrainingState(
        task.modules, task.optimisers, torch.Generator().manual_seed(seed), (seed, steps, settings)
    )
    if state is not None:
        training.resume(state)
    for follow in after:
        if hasattr(follow, "load_state_dict"):
            follow.load_state_dict({"step": training.step})
    first_rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in task.optimisers]
    events = training.events
    training.keep()
    precision = fast_training() if fast else nullcontext()
    with parallel.shared_norms(*task.modules.values()), torch.enable_grad(), precision:
        while training.step < steps:
            factor = training.rate * task.rate(training.step / steps)
            for optimiser, rates in zip(task.optimisers, first_rates, strict=True):
                for group, rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            loss = task.step(training.generator).item()
            training.step += 1
            training.history.append(loss)
            trouble = None if math.isfinite(loss) else f"the loss is {loss}"
            checked = training.step % CHECK_EVERY == 0
            if trouble is None and checked:
                trouble = task.trouble() if _finite(task.modules) else "weights are not finite"
            if trouble is not None:
                events.append(f"{trouble} at step {training.step}")
                if len(training.history) == 1 or len(events) > _ROLL_BACKS:
                    raise FloatingPointError(
                        f"training does not hold: {'; '.join(events)}; look at the data, or try another seed or loss"
                    )
                training.roll_back()
            else:
                changed = [follow(training.step) for follow in after]
                if checked or any(changed):  # old masks would come back with old weights
                    training.keep()
                if state is not None and parallel.rank() == 0:
                    training.save(state, at_once=training.step == steps)
            if progress is not None:
                progress(training.step, loss)
    return Trained(training.history, training.generator, events, training.seconds)


def _finite(modules: dict[str, nn.Module]) -> bool:
    return all(bool(p.isfinite().all()) for module in modules.values() for p in module.parameters())


def draw_indices(n: int, batch: int, rng: torch.Generator) -> Tensor:
    """Which of ``n`` samples the next ``batch`` holds: this process's share of indices int64 [batch]."""
    return parallel.share(torch.randint(n, (batch,), generator=rng))


def initialised(build: Callable[[], _T], seed: int) -> _T:
    """What ``build`` makes of layers, which take their first weights from torch's global generator: here from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def descend(loss: Tensor, optimiser: Optimizer) -> None:
    """One step down the gradient of ``loss``."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    torch.clear_autocast_cache()  # which holds casts of the weights as they were


def at_rest(model: nn.Module) -> None:
    """Eval mode, and no parameter takes a gradient."""
    model.eval().requires_grad_(False)
