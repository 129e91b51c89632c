"""What all trainings share: where one is, to go on as if nothing had happened or back from a bad step; and in which precision."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsegan.files import write_atomically

SAVE_SECONDS = 20.0
_FORMAT = "sparsegan training 1"


class TrainingState:
    """The modules, optimisers and random numbers of a training, what came of it so far, and a factor of its learning rates.

    modules:    whose state is kept, by a name for each. optimisers: of any number of them.
    settings:   what makes another run of it, with the weights at the start: anything with a `repr`.
    generator:  of the random numbers that the training draws.
    step, rate, history: steps done; a factor that is halved when training goes astray; the loss of each step.
    events, seconds: what went wrong and was undone; the time it took, of all processes that one after the other went on with it.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimisers: Sequence[Optimizer],
        generator: torch.Generator,
        settings: object,
    ) -> None:
        self.modules, self.optimisers, self.generator = dict(modules), list(optimisers), generator
        self.settings = settings
        self.step, self.rate = 0, 1.0
        self.history: list[float] = []
        self.events: list[str] = []
        self._earlier, self._start = 0.0, time.monotonic()
        self._fingerprint: str | None = None
        self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._start

    def keep(self) -> None:
        """Take this as the last good state, in memory."""
        self._good = copy.deepcopy(
            (
                {name: module.state_dict() for name, module in self.modules.items()},
                [optimiser.state_dict() for optimiser in self.optimisers],
            )
        )

    def roll_back(self) -> None:
        """Go back to the weights and the optimisers of the last `keep`, and halve the learning rates. Steps done stay done."""
        modules, optimisers = copy.deepcopy(self._good)
        for name, module in self.modules.items():
            module.load_state_dict(modules[name])
        for optimiser, state in zip(self.optimisers, optimisers, strict=True):
            optimiser.load_state_dict(state)
        self.rate *= 0.5

    def save(self, path: Path, *, at_once: bool) -> None:
        """Write everything to ``path``, if the last time was `SAVE_SECONDS` ago or ``at_once``.

        Raises OSError, see `write_atomically`.
        """
        if not at_once and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        tensors = {"generator": self.generator.get_state()}
        for key, module in self.modules.items():
            tensors |= {f"module.{key}.{name}": value for name, value in module.state_dict().items()}
        for i, optimiser in enumerate(self.optimisers):
            for j, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{j}.{name}": value for name, value in moments.items()}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        facts = {"step": self.step, "rate": self.rate, "history": self.history}
        facts |= {"events": self.events, "seconds": self.seconds}
        metadata = {"format": _FORMAT, "run": self._run(), "facts": json.dumps(facts)}
        write_atomically(path, save_tensors(tensors, metadata))
        self._saved = time.monotonic()

    def resume(self, path: Path) -> None:
        """Go on from ``path``, if it is there; called before the first step.

        Raises ValueError for a damaged file and for one of another run.
        """
        run = self._run()
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to start anew") from error
        if metadata.get("format") != _FORMAT or metadata.get("run") != run:
            raise ValueError(
                f"{path} belongs to another run (other weights, settings or images): delete it, or name another folder"
            )
        try:
            facts = json.loads(metadata["facts"])
            self.step, self.rate = int(facts["step"]), float(facts["rate"])
            self.history = [float(value) for value in facts["history"]]
            self.events, self._earlier = [str(event) for event in facts["events"]], float(facts["seconds"])
            with torch.no_grad():
                for key, module in self.modules.items():
                    module.load_state_dict(_under(f"module.{key}.", tensors))
            for i, optimiser in enumerate(self.optimisers):
                state: dict[str, Any] = optimiser.state_dict()
                for name, value in _under(f"optimiser.{i}.", tensors).items():
                    number, moment = name.split(".")
                    state["state"].setdefault(int(number), {})[moment] = value
                optimiser.load_state_dict(state)
            self.generator.set_state(tensors["generator"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} does not hold what it should ({error}): delete it to start anew"
            ) from error

    def _run(self) -> str:
        """Which run this is: its settings, and the weights that it starts with; so first asked for before they change."""
        if self._fingerprint is None:
            tensors = [value for module in self.modules.values() for value in module.state_dict().values()]
            self._fingerprint = fingerprint(self.settings, *tensors)
        return self._fingerprint


def fingerprint(settings: object, *tensors: Tensor) -> str:
    """SHA-256 of the `repr` of ``settings`` and of the bytes of ``tensors``, in hexadecimal."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def fast_training() -> torch.autocast | nullcontext[None]:
    """bfloat16 autocast where the CPU has a matrix unit for it; elsewhere it is slower than float32.

    It keeps casts of the weights until it is left: call ``torch.clear_autocast_cache()`` whenever they have changed.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch 2.10 does not have it
    if capabilities is not None and capabilities().get("amx_bf16"):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def full(x: Tensor) -> Tensor:
    """``x`` in float32 where autocast has made it bfloat16: losses and their logarithms want more digits."""
    return x.float() if x.dtype == torch.bfloat16 else x
