"""Data-free distillation: the dense model teaches the pruned one on random inputs."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from sparsegan.files import write_atomically
from sparsegan.prune.losses import Loss, l1_plus_l2
from sparsegan.prune.trace import Inputs, eval_mode, image_of

SampleInputs: TypeAlias = Callable[[int, torch.Generator], Inputs]
"""``(number of samples, generator) -> positional inputs of the model``"""
Tighten: TypeAlias = Callable[[int], bool]
"""``steps done -> whether the masks were changed``; called before each step"""

CHECKPOINT_EVERY = 25
SAVE_SECONDS = 20.0
_FORMAT = "sparsegan recovery 1"


class Phase(NamedTuple):
    """A stretch of training: ``share`` of the steps, with its own loss and number of samples a step."""

    share: float
    loss: Loss
    batch: int


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

    Adam with its learning rate falling from ``lr`` to zero along a cosine, ``batch`` samples a step. Both
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

    with ready(model), ready(teacher), torch.enable_grad():
        run = _Run(model, parameters, phases, steps, lr, seed)
        if state is not None:
            run.resume(state)
        good = run.snapshot()
        while run.step < steps:
            if tighten is not None and tighten(run.step):
                good = run.snapshot()
            phase = run.phase()
            inputs = sample_inputs(phase.batch, run.generator)
            with torch.no_grad():
                target = image_of(teacher(*inputs)).float()
            image = image_of(model(*inputs)).float()
            value = phase.loss(image, target)
            run.history.append(value.item())
            if math.isfinite(run.history[-1]):
                # The loss vouches for the weights it was computed with, so they are saved before they change.
                if run.step % CHECKPOINT_EVERY == 0:
                    good = run.snapshot()
                run.descend(value)
                if hasattr(phase.loss, "update"):
                    phase.loss.update(image.detach(), target)
            elif any(map(math.isfinite, run.history)):
                run.restore(good)
                run.lr *= 0.5
            else:
                raise RuntimeError(
                    f"the loss is {run.history[-1]} at the first step: look for NaN in the images of both models"
                )
            # Autocast keeps casts of the weights until its context is left, which may be after training.
            torch.clear_autocast_cache()
            run.step += 1
            if state is not None and math.isfinite(run.history[-1]):
                run.save(state, at_once=run.step == steps)
            if progress is not None:
                progress(run.step, run.history[-1])
        run.optimiser.zero_grad()
        if not all(bool(p.isfinite().all()) for p in parameters):
            run.restore(good)
    return run.history


def _phases(loss: str | Loss | Sequence[Phase], batch: int) -> list[Phase]:
    if isinstance(loss, Sequence) and not isinstance(loss, str):
        phases = [Phase(*phase) for phase in loss]
        if not math.isclose(sum(phase.share for phase in phases), 1) or any(p.batch < 1 for p in phases):
            raise ValueError(f"the shares of the phases must add up to 1, and batches be >= 1: {phases}")
        return phases
    if not callable(loss) and loss != "l1+l2":
        raise ValueError(f'loss is "l1+l2" or a callable (image, target) -> scalar, or phases; got {loss!r}')
    return [Phase(1.0, loss if callable(loss) else l1_plus_l2, batch)]


Snapshot: TypeAlias = tuple[list[Tensor], dict[str, Any]]


class _Run:
    """Where a training is: all that a later process needs to go on as if nothing had happened."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        phases: list[Phase],
        steps: int,
        lr: float,
        seed: int,
    ) -> None:
        self.model, self.parameters, self.phases, self.steps, self.lr = model, parameters, phases, steps, lr
        self.generator = torch.Generator().manual_seed(seed)
        # Gradients change with every prune and every phase: second moments that remember 100 steps follow them.
        self.optimiser = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
        self.history: list[float] = []
        self.step = 0
        self.saved = time.monotonic()
        # Losses that learn (an adversary) are part of the state, with their optimisers.
        self.learners = nn.ModuleList(phase.loss for phase in phases if isinstance(phase.loss, nn.Module))
        self.optimisers = [self.optimiser]
        self.optimisers += [m.optimiser for m in self.learners.modules() if hasattr(m, "optimiser")]  # type: ignore[misc]
        self.settings = (steps, lr, seed, [(phase.share, phase.batch) for phase in phases])

    @cached_property
    def fingerprint(self) -> str:
        """Which run this is: its settings, and the weights that it starts with, so asked for before they change."""
        digest = hashlib.sha256(repr(self.settings).encode())
        for parameter in self.parameters:
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def phase(self) -> Phase:
        done = 0.0
        for phase in self.phases:
            done += phase.share
            if self.step < round(done * self.steps):
                return phase
        return self.phases[-1]

    def descend(self, value: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.optimiser.zero_grad()
        value.backward()
        self.optimiser.step()

    def snapshot(self) -> Snapshot:
        return [p.detach().clone() for p in self.parameters], copy.deepcopy(self.optimiser.state_dict())

    def restore(self, snapshot: Snapshot) -> None:
        weights, state = snapshot
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        self.optimiser.load_state_dict(copy.deepcopy(state))

    def save(self, path: Path, at_once: bool) -> None:
        """Write everything to ``path``, if it was last written long enough ago; another file takes its name when it is whole."""
        if not at_once and time.monotonic() - self.saved < SAVE_SECONDS:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for i, optimiser in enumerate(self.optimisers):
            for j, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{j}.{name}": value for name, value in moments.items()}
        for i, learner in enumerate(self.learners):
            if hasattr(learner, "update"):  # a perceptual distance stays as it is
                tensors |= {f"learner.{i}.{name}": value for name, value in learner.state_dict().items()}
        tensors["generator"] = self.generator.get_state()
        tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        facts = {"step": self.step, "lr": self.lr, "history": self.history}
        metadata = {"format": _FORMAT, "run": self.fingerprint, "facts": json.dumps(facts)}
        write_atomically(path, save_tensors(tensors, metadata))
        self.saved = time.monotonic()

    def resume(self, path: Path) -> None:
        """Go on from ``path``, if it is there; called before the first step."""
        fingerprint = self.fingerprint
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to start anew") from error
        if metadata.get("format") != _FORMAT or metadata.get("run") != fingerprint:
            raise ValueError(
                f"{path} belongs to another run (other weights, steps, rate, seed or phases): delete it, or name another folder"
            )
        try:
            facts = json.loads(metadata["facts"])
            self.step, self.lr = int(facts["step"]), float(facts["lr"])
            self.history = [float(value) for value in facts["history"]]
            with torch.no_grad():
                self.model.load_state_dict(_under("model.", tensors))
                for i, learner in enumerate(self.learners):
                    if hasattr(learner, "update"):
                        learner.load_state_dict(_under(f"learner.{i}.", tensors))
            for i, optimiser in enumerate(self.optimisers):
                state = optimiser.state_dict()
                for name, value in _under(f"optimiser.{i}.", tensors).items():
                    number, moment = name.split(".")
                    state["state"].setdefault(int(number), {})[moment] = value
                optimiser.load_state_dict(state)
            self.generator.set_state(tensors["generator"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} does not hold what it should ({error}): delete it to start anew"
            ) from error


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


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
