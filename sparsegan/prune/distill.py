"""Data-free distillation: the dense model teaches the pruned one on random inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel

from sparsegan import parallel
from sparsegan.prune.losses import ADVERSARIAL_BETAS, Loss, l1_plus_l2
from sparsegan.prune.trace import Inputs, eval_mode, image_of
from sparsegan.training import TrainingState

SampleInputs: TypeAlias = Callable[[int, torch.Generator], Inputs]
"""``(number of samples, generator) -> positional inputs of the model``"""
Tighten: TypeAlias = Callable[[int], bool]
"""``steps done -> whether the masks were changed``; called before each step"""

CHECKPOINT_EVERY = 25
# Gradients change with every prune and every phase: second moments that remember 100 steps follow them.
_BETAS = (0.9, 0.99)
# Of a phase with a constant rate, the steps whose weights make up the average.
_AVERAGED = 100


class Phase(NamedTuple):
    """A stretch of training: ``share`` of the steps, with its own loss and number of samples a step.

    lr: a constant learning rate, for the last phase alone; its result is the average of the weights over about its last
        100 steps. An adversary wants both: at a falling rate it gets ahead of the model and spoils the images.
    """

    share: float
    loss: Loss
    batch: int
    lr: float | None = None


def recover(
    model: nn.Module,
    teacher: nn.Module,
    sample_inputs: SampleInputs,
    steps: int,
    batch: int = 48,
    lr: float = 1e-3,
    seed: int = 0,
    loss: str | Loss | Sequence[Phase] = "l1+l2",
    progress: Callable[[int, float], None] | None = None,
    *,
    tighten: Tighten | None = None,
    state: Path | None = None,
) -> list[float]:
    """Train ``model`` in place to give the same images as ``teacher``; returns the loss of each step.

    Adam with its learning rate falling from ``lr`` to zero along a cosine (but see `Phase`), ``batch`` samples a step. Both
    models run in eval mode: norm statistics stay the teacher's, because channels that lost most of their
    inputs have tiny variances, and re-estimating them makes training unstable. Zeros held by a mask stay.
    Under ``torch.autocast("cpu", torch.bfloat16)`` a step takes about 0.6 of the time on CPUs with bfloat16
    instructions.

    sample_inputs: called with the number of samples and a generator seeded with ``seed``.
    loss: "l1+l2", a callable of the two batches of images, or phases that follow each other, whose shares add up to 1. A loss
        with a method ``update(image, target)``, such as `losses.Adversarial`, learns after every step.
    progress: called with (steps done, loss) after every step.
    tighten: prunes ``model`` further on the way, for a gradual schedule.
    state: a file that holds the training so far, written about three times a minute and as the last step is done. Where it is
        there already, training goes on from it; the result is the same as without the interruption.

    Started by `torchrun`, the processes share each batch and average gradients; a loss that looks at a batch as a whole (the mean
    of its features) sees the share of its process.

    A step whose loss is not finite is undone: weights and optimiser go back to the last good state, the
    learning rate is halved, and training goes on. Raises ValueError for bad arguments, a model without
    trainable parameters and a ``state`` of another run, RuntimeError when the loss is not finite from the start, OSError when
    ``state`` cannot be written (what was written before is still there). Method: own.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"recover needs steps >= 1 and batch >= 1, got steps={steps}, batch={batch}")
    if not 0 < lr < math.inf:
        raise ValueError(f"recover needs a positive learning rate, got lr={lr}")
    phases = _phases(loss, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")

    optimiser = Adam(parameters, lr=lr, betas=_BETAS)
    average = None if phases[-1].lr is None else AveragedModel(model, avg_fn=_averaged)
    training = _state(model, average, optimiser, phases, steps, lr, seed)
    falling = steps * sum(phase.share for phase in phases if phase.lr is None)
    if state is not None:
        training.resume(state)
    with ready(model), ready(teacher), torch.enable_grad():
        shared = parallel.wrapped(model)
        training.keep()
        while training.step < steps:
            step = training.step
            if tighten is not None and tighten(step):
                training.keep()
            phase = _phase_at(phases, step, steps)
            inputs = _share(sample_inputs(phase.batch, training.generator), phase.batch)
            with torch.no_grad():
                target = image_of(teacher(*inputs)).float()
            image = image_of(shared(*inputs)).float()
            value = parallel.mean(phase.loss(image, target))
            training.history.append(value.item())
            if math.isfinite(training.history[-1]):
                # The loss vouches for the weights it was computed with, so they are kept before they change.
                if step % CHECKPOINT_EVERY == 0:
                    training.keep()
                wanted = phase.lr or lr * 0.5 * (1 + math.cos(math.pi * step / falling))
                for group in optimiser.param_groups:
                    group["lr"] = training.rate * wanted
                    group["betas"] = ADVERSARIAL_BETAS if _learns(phase.loss) else _BETAS
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
                if average is not None and phase.lr is not None:
                    average.update_parameters(model)
                if hasattr(phase.loss, "update"):
                    phase.loss.update(image.detach(), target)
            elif any(map(math.isfinite, training.history)):
                training.roll_back()
            else:
                raise RuntimeError(
                    f"the loss is {training.history[-1]} at the first step: look for NaN in the images of both models"
                )
            # Autocast keeps casts of the weights until its context is left, which may be after training.
            torch.clear_autocast_cache()
            training.step += 1
            if state is not None and math.isfinite(training.history[-1]) and parallel.rank() == 0:
                training.save(state, at_once=training.step == steps)
            if progress is not None:
                progress(training.step, training.history[-1])
        optimiser.zero_grad()
        if not all(bool(p.isfinite().all()) for p in parameters):
            training.roll_back()
        if average is not None and average.n_averaged:  # which a last phase of no steps has not
            # Not its buffers: masks may have changed since it was made.
            for parameter, mean in zip(model.parameters(), average.module.parameters(), strict=True):
                parameter.data.copy_(mean)
    return training.history


def _share(inputs: Inputs, batch: int) -> Inputs:
    """This process's part of the samples; what is not one value a sample is for all."""
    return tuple(
        parallel.share(x) if isinstance(x, Tensor) and x.ndim and len(x) == batch else x for x in inputs
    )


def _phases(loss: str | Loss | Sequence[Phase], batch: int) -> list[Phase]:
    if isinstance(loss, Sequence) and not isinstance(loss, str):
        phases = [Phase(*phase) for phase in loss]
        if not math.isclose(sum(phase.share for phase in phases), 1) or any(p.batch < 1 for p in phases):
            raise ValueError(f"the shares of the phases must add up to 1, and batches be >= 1: {phases}")
        if any(phase.lr is not None for phase in phases[:-1]):
            raise ValueError(f"only the last phase can have a rate of its own: {phases}")
        if phases[-1].lr is not None and not 0 < phases[-1].lr < math.inf:
            raise ValueError(f"a phase needs a positive rate, or None: {phases}")
        return phases
    if not callable(loss) and loss != "l1+l2":
        raise ValueError(f'loss is "l1+l2" or a callable (image, target) -> scalar, or phases; got {loss!r}')
    return [Phase(1.0, loss if callable(loss) else l1_plus_l2, batch)]


def _averaged(mean: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    return mean.lerp(new, max(1 / _AVERAGED, 1 / (int(count) + 1)))


def _state(
    model: nn.Module,
    average: nn.Module | None,
    optimiser: Adam,
    phases: Sequence[Phase],
    steps: int,
    lr: float,
    seed: int,
) -> TrainingState:
    """Losses that learn (an adversary) are part of the state, with their optimisers; a perceptual distance stays as it is."""
    losses = [phase.loss for phase in phases if isinstance(phase.loss, nn.Module)]
    learners = {f"loss {i}": loss for i, loss in enumerate(losses) if hasattr(loss, "update")}
    optimisers: list[Any] = [
        m.optimiser for loss in learners.values() for m in loss.modules() if hasattr(m, "optimiser")
    ]
    settings = (steps, lr, seed, [(phase.share, phase.batch, phase.lr) for phase in phases])
    generator = torch.Generator().manual_seed(seed)
    followers = {} if average is None else {"average": average}
    modules = {"model": model, **followers, **learners}
    return TrainingState(modules, [optimiser, *optimisers], generator, settings)


def _learns(loss: Loss) -> bool:
    # not by `update`, which `Weighted` has whatever its parts are
    return isinstance(loss, nn.Module) and any(hasattr(m, "optimiser") for m in loss.modules())


def _phase_at(phases: Sequence[Phase], progress: float, steps: int) -> Phase:
    done = 0.0
    for phase in phases:
        done += phase.share
        if progress < round(done * steps):
            return phase
    return phases[-1]


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """Eval mode, and convolution weights stored channels-last, which trains faster; undone afterwards."""
    tensors = [
        t for t in itertools.chain(model.parameters(), model.buffers()) if t.ndim == 4 and t.is_contiguous()
    ]
    for t in tensors:
        t.data = t.data.contiguous(memory_format=torch.channels_last)
    try:
        with eval_mode(model):
            yield
    finally:
        for t in tensors:
            t.data = t.data.contiguous()
