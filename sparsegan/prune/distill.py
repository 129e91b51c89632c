"""Data-free distillation: the dense model teaches the pruned one on random inputs."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparsegan.prune.trace import Inputs, eval_mode, image_of

SampleInputs: TypeAlias = Callable[[int, torch.Generator], Inputs]
"""``(number of samples, generator) -> positional inputs of the model``"""
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(image of the model, image of the teacher) -> scalar``, both images float32"""

CHECKPOINT_EVERY = 25


def l1_plus_l2(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error: sharp edges from the first, no large errors by the second."""
    error = image - target
    return error.abs().mean() + error.square().mean()


def recover(
    model: nn.Module,
    teacher: nn.Module,
    sample_inputs: SampleInputs,
    steps: int,
    batch: int = 48,
    lr: float = 1e-3,
    seed: int = 0,
    loss: str | Loss = "l1+l2",
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` in place to give the same images as ``teacher``; returns the loss of each step.

    Adam with its learning rate falling from ``lr`` to zero along a cosine, ``batch`` samples a step. Both
    models run in eval mode: norm statistics stay the teacher's, because channels that lost most of their
    inputs have tiny variances, and re-estimating them makes training unstable. Zeros held by a mask stay.
    Under ``torch.autocast("cpu", torch.bfloat16)`` a step takes about 0.6 of the time on CPUs with bfloat16
    instructions.

    sample_inputs: called with ``batch`` and a generator seeded with ``seed``.
    loss: "l1+l2", or a callable of the two batches of images.
    progress: called with (steps done, loss) after every step.

    A step whose loss is not finite is undone: weights and optimiser go back to the last good state, the
    learning rate is halved, and training goes on. Raises ValueError for bad arguments and a model without
    trainable parameters, RuntimeError when the loss is not finite from the start. Method: own.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"recover needs steps >= 1 and batch >= 1, got steps={steps}, batch={batch}")
    if not 0 < lr < math.inf:
        raise ValueError(f"recover needs a positive learning rate, got lr={lr}")
    if not callable(loss) and loss != "l1+l2":
        raise ValueError(f'loss is "l1+l2" or a callable (image, target) -> scalar, got {loss!r}')
    loss_fn = loss if callable(loss) else l1_plus_l2
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")

    with ready(model), ready(teacher), torch.enable_grad():
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(parameters, lr=lr)
        history: list[float] = []
        good = _snapshot(parameters, optimiser)
        for step in range(steps):
            inputs = sample_inputs(batch, generator)
            with torch.no_grad():
                target = image_of(teacher(*inputs)).float()
            value = loss_fn(image_of(model(*inputs)).float(), target)
            history.append(value.item())
            if math.isfinite(history[-1]):
                # The loss vouches for the weights it was computed with, so they are saved before they change.
                if step % CHECKPOINT_EVERY == 0:
                    good = _snapshot(parameters, optimiser)
                optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
            elif any(map(math.isfinite, history)):
                _restore(parameters, optimiser, good)
                lr *= 0.5
            else:
                raise RuntimeError(
                    f"the loss is {history[-1]} at the first step: look for NaN in the images of both models"
                )
            # Autocast keeps casts of the weights until its context is left, which may be after training.
            torch.clear_autocast_cache()
            if progress is not None:
                progress(step + 1, history[-1])
        optimiser.zero_grad()
        if not all(bool(p.isfinite().all()) for p in parameters):
            _restore(parameters, optimiser, good)
    return history


Snapshot: TypeAlias = tuple[list[Tensor], dict[str, Any]]


def _snapshot(parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> Snapshot:
    return [p.detach().clone() for p in parameters], copy.deepcopy(optimiser.state_dict())


def _restore(parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    weights, state = snapshot
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    optimiser.load_state_dict(copy.deepcopy(state))


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
