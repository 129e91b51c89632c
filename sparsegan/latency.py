"""How long each layer takes on this machine, by density: measured from its packed kernel inside a program, and kept (own).

A layer's time is that of its step, from packed activations to packed activations, as it stands in the program that
`swap_to_sparse` would make of the model: with what is fused into it, and upsampling merged with it. It is the time
that several such steps add to a program of one. Whole models at a few densities then say how much of
that time a step takes in its place, and what everything else takes:

    ms of the model = fixed + factor * sum of the layers' ms

Times are the shortest of many, taken in turn, so that what else the machine does matters little.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegan import ops
from sparsegan.files import write_atomically
from sparsegan.graph import Lowered, capture, lower, observe
from sparsegan.layers import SparseProgram
from sparsegan.lowering import NumberFormat
from sparsegan.ops.program import Program, Slot, Step, Store, step_shapes
from sparsegan.patterns import PRUNABLE_TYPES, Pattern, PrunableLayer, from_weight_view, weight_view
from sparsegan.swap.dense import dense_copy

DENSITIES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
# So many steps at most are added to a program to see what one takes; fewer where their weights would not stay in
# caches that they do stay in when the model runs.
_ADDED, _ADDED_BYTES = 4, 1 << 21
# Seconds for the densities of one step together, and for the whole models.
STEP_SECONDS, MODEL_SECONDS = 1.0, 3.0


@dataclass(frozen=True)
class Latencies:
    """What `measure` found; milliseconds of one call of the model with inputs as they were measured.

    layers: by layer and density, of the layer by itself. Layers that are not in a program are part of `fixed`.
    fixed:  of all else: packing, calls, steps without weights, layers that stay torch.
    factor: times a layer by itself, it takes that long in the model.
    error:  largest deviation of `predict` from the whole models that were measured, as a share of their time.
    """

    layers: dict[str, dict[float, float]]
    fixed: float
    factor: float
    error: float

    def layer(self, name: str, density: float) -> float:
        """ms of a layer in the model, straight lines between the densities measured; below the lowest, as there.

        Raises ValueError for a layer that is not in the table and a density outside [0, 1].
        """
        if name not in self.layers:
            raise ValueError(f"no latencies of a layer {name!r}; there are: {', '.join(self.layers)}")
        if not 0 <= density <= 1:
            raise ValueError(f"density is the share of a layer that is kept, in [0, 1]; got {density}")
        known = sorted(self.layers[name].items())
        place = bisect_left([d for d, _ in known], density)
        if place == 0 or place == len(known):
            return self.factor * known[min(place, len(known) - 1)][1]
        (low, a), (high, b) = known[place - 1 : place + 1]
        return self.factor * (a + (b - a) * (density - low) / (high - low))

    def predict(self, model: nn.Module | Mapping[str, float]) -> float:
        """ms of a model of the same structure with the zeros it has; or by density of each layer, the others dense."""
        kept = densities(model) if isinstance(model, nn.Module) else model
        if unknown := [name for name in kept if name not in self.layers and not isinstance(model, nn.Module)]:
            raise ValueError(f"no latencies of a layer {unknown[0]!r}; there are: {', '.join(self.layers)}")
        return self.fixed + sum(self.layer(name, kept.get(name, 1.0)) for name in self.layers)

    def costs(self, at: Sequence[float]) -> dict[str, dict[float, float]]:
        """ms of each layer at the densities ``at``: the costs for `prune.least_damage`, whose budget is
        then the ms of the model minus `fixed`."""
        return {name: {density: self.layer(name, density) for density in at} for name in self.layers}


def densities(model: nn.Module) -> dict[str, float]:
    """The share of weights that are not zero, of each Linear, Conv2d and ConvTranspose2d."""
    return {
        name: int(view.count_nonzero()) / view.numel()
        for name, layer in _layers(model).items()
        if (view := weight_view(layer).detach()).numel()
    }


def measure(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    pattern: Pattern,
    at: Sequence[float] = DENSITIES,
    formats: Mapping[str, NumberFormat] | None = None,
    *,
    cache: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Latencies:
    """Time every layer of ``model`` at each density, its zeros in groups of ``pattern`` at random places.

    model:    in eval mode, on the CPU; not changed. Narrower models are measured like any other.
    example_inputs: of the call that is to be timed: their batch and image sizes are those of the times.
    at:       densities, in (0, 1]; at least one group of a layer is kept.
    formats:  number format of layers that shall not be int8, see `graph.lower`.
    cache:    folder of the table, which is kept by machine and shape of the layer, so that only what is new is
              measured; None: sparsegan in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).
    seed:     of where the zeros are.
    progress: called with (steps timed, steps in all).

    Raises ValueError for densities out of range, CaptureError for a model that cannot become programs. A table that cannot be
    read is made anew, with a warning; one that cannot be written is not kept, with a warning.
    """
    if len(set(at)) < 2 or not all(0 < density <= 1 for density in at):
        raise ValueError(f"densities are two or more shares of a layer to keep, in (0, 1]; got {list(at)}")
    at = sorted(set(at), reverse=True)
    table = _Table(_default_cache() if cache is None else Path(cache), pattern)
    with torch.no_grad():
        dense = dense_copy(model, example_inputs).model
        captured = capture(dense, example_inputs)
        ranges = observe(captured, [example_inputs])
        weights = {name: layer.weight.detach().clone() for name, layer in _layers(dense).items()}

        def lowered(density: float) -> Lowered:
            generator = torch.Generator().manual_seed(seed)
            for name, layer in _layers(dense).items():
                kept = _random_mask(layer, pattern, density, generator)
                layer.weight.copy_(weights[name] * kept)
            return lower(captured, ranges, formats, "int8", residual="u8")

        # Nearly all of the time is that of the kernels, so that three whole models tell fixed from factor.
        models = {density: lowered(density) for density in {at[0], at[len(at) // 2], at[-1]}}
        steps = _steps(models[at[0]], example_inputs, dense)
        missing = sorted({d for step in steps for d in at if table.get(step.key, d) is None} - set(models))
        models_of = dict(models) | {density: lowered(density) for density in missing}
        programs = {density: _steps(model, example_inputs, dense) for density, model in models_of.items()}
        for done, step in enumerate(steps):
            new = {d: programs[d][done] for d in at if table.get(step.key, d) is None}
            if new:
                table.put(step.key, _step_times(new))
            if progress is not None:
                progress(done + 1, len(steps))
        whole = _shortest(
            {d: partial(model.model, *example_inputs) for d, model in models.items()}, MODEL_SECONDS
        )
    layers: dict[str, dict[float, float]] = {}
    for step in steps:  # a layer that is called twice has two
        row = layers.setdefault(step.step.name, dict.fromkeys(at, 0.0))
        for density in at:
            row[density] += table.get(step.key, density) or 0.0
    return _fitted(layers, whole)


def model_ms(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    formats: Mapping[str, NumberFormat] | None = None,
    seconds: float = MODEL_SECONDS,
) -> float:
    """ms of ``model`` with the zeros it has, as programs: what `Latencies.predict` predicts, measured now.

    Quick, as nothing is trained or judged: to correct a budget by before anything is. Arguments and errors as of `measure`.
    """
    with torch.no_grad():
        dense = dense_copy(model, example_inputs).model
        captured = capture(dense, example_inputs)
        lowered = lower(captured, observe(captured, [example_inputs]), formats, "int8", residual="u8")
        return _shortest({"": partial(lowered.model, *example_inputs)}, seconds)[""]


def _fitted(layers: dict[str, dict[float, float]], whole: Mapping[float, float]) -> Latencies:
    """fixed >= 0 and factor by least squares over the relative errors of the whole models."""
    sums = {density: sum(row[density] for row in layers.values()) for density in whole}
    rows = torch.tensor([[1 / ms, sums[d] / ms] for d, ms in whole.items()], dtype=torch.float64)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    fixed, factor = torch.linalg.lstsq(rows, ones, driver="gelsd").solution.flatten().tolist()
    if fixed < 0 or factor <= 0:
        fixed, factor = 0.0, float(torch.linalg.lstsq(rows[:, 1:], ones).solution)
    error = max(abs(fixed + factor * sums[d] - ms) / ms for d, ms in whole.items())
    return Latencies(layers, fixed, factor, error)


def _layers(model: nn.Module) -> dict[str, PrunableLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PRUNABLE_TYPES)}


def _random_mask(
    layer: PrunableLayer, pattern: Pattern, density: float, generator: torch.Generator
) -> Tensor:
    shape = tuple(weight_view(layer).shape)
    order = pattern.group_sums(torch.rand(shape, generator=generator))
    kept = torch.zeros_like(order, dtype=torch.bool)
    best = order.flatten().argsort(descending=True)[: max(1, round(density * order.numel()))]
    kept.view(-1)[best] = True
    return from_weight_view(layer, pattern.expand(kept, shape))


@dataclass(frozen=True)
class _PlacedStep:
    """A step with weights: what it reads in the model (slot and [N, C, H, W]), where it stores (None: an output), and the
    shape of the layer's own weights [O, T, C], which have the zeros; those of the step may be merged from them."""

    step: Step
    slot: Slot
    stores: tuple[Slot | None, ...]
    read: tuple[int, ...]
    weights: tuple[int, ...]

    @property
    def key(self) -> str:
        """All that its time depends on, but for its zeros."""
        assert self.step.weight is not None
        step, weight = self.step, self.step.weight
        parts = [
            f"{step.kind} {weight.in_channels}->{weight.out_channels} {weight.values.dtype}",
            f"from weights {'x'.join(map(str, self.weights))}",
            f"on {'x'.join(map(str, self.read))} {self.slot.format} {self.slot.padding_mode}",
            f"kernel {step.kernel_size} stride {step.stride} padding {step.padding} {step.output_padding}",
            f"dilation {step.dilation} act {step.act.name} {step.post_act.name}",
            "into "
            + " ".join(
                f"{slot.format if slot else 'f32'} {store.act.name} {store.affine is not None}"
                for store, slot in zip(step.stores, self.stores, strict=True)
            ),
        ]
        return ", ".join(parts)

    @property
    def bytes(self) -> int:
        """Of its packed weights."""
        assert self.step.weight is not None
        return self.step.weight.values.numel() * self.step.weight.values.element_size()

    def program(self, copies: int) -> SparseProgram:
        """A program of ``copies`` of the step, which read the same and each write slots of their own.

        What it reads besides x (residual, modulation) is left out: that is the same at all densities.
        """
        assert self.step.weight is not None
        slots, steps, outputs = [self.slot], [Step("pointwise", ~0, (Store(0),))], 1
        for _ in range(copies):
            stores = []
            for store, slot in zip(self.step.stores, self.stores, strict=True):
                if slot is None:
                    index, outputs = ~outputs, outputs + 1
                else:
                    index = len(slots)
                    slots.append(replace(slot, channels=self.step.weight.out_channels))
                stores.append(replace(store, slot=index, channel=0, modulation=None))
            plain = replace(self.step, x=0, demodulation=None, residual=None, stats=False)
            steps.append(replace(plain, stores=tuple(stores)))
        # A program has an output: the first pixels' worth of what is read, the same for any number of copies.
        steps.append(Step("pointwise", 0, (Store(~0),)))
        return SparseProgram(Program(tuple(slots), tuple(steps), 1, outputs))


def _steps(lowered: Lowered, inputs: tuple[Any, ...], model: nn.Module) -> list[_PlacedStep]:
    """The steps with weights of all programs, in order; model: what was lowered."""
    names = {layer: name for name, layer in _layers(model).items()}  # one for a layer that has several
    placed: list[_PlacedStep] = []

    def see(part: SparseProgram, args: tuple[Tensor, ...]) -> None:
        program = part.program
        shapes = step_shapes(program, [tuple(x.shape) for x in args])
        for step, (read, _) in zip(program.steps, shapes, strict=True):
            if step.weight is not None:
                stores = tuple(program.slots[s.slot] if s.slot >= 0 else None for s in step.stores)
                layer = model.get_submodule(step.name)
                assert isinstance(layer, PRUNABLE_TYPES)
                named, view = replace(step, name=names[layer]), weight_view(layer)
                placed.append(_PlacedStep(named, program.slots[step.x], stores, read, tuple(view.shape)))

    hooks = [part.register_forward_pre_hook(see) for part in lowered.programs]
    try:
        lowered.model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return placed


def _step_times(steps: Mapping[float, _PlacedStep]) -> dict[float, float]:
    """ms of a step at each density: what some more of it add to a program of one."""
    x = torch.rand(next(iter(steps.values())).read, generator=torch.Generator().manual_seed(0))
    added = {density: min(max(_ADDED_BYTES // step.bytes, 1), _ADDED) for density, step in steps.items()}
    runs = {
        (density, more): partial(step.program(1 + more), x)
        for density, step in steps.items()
        for more in (0, added[density])
    }
    ms = _shortest(runs, STEP_SECONDS)
    # A step as short as the clock's noise still takes some time.
    return {density: max(ms[density, more] - ms[density, 0], 1e-4) / more for density, more in added.items()}


def _shortest(runs: Mapping[Any, Callable[[], object]], seconds: float) -> dict[Any, float]:
    """ms of the quickest call of each, in turn, for about so many seconds; each is called five times or more."""
    best = dict.fromkeys(runs, math.inf)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        for name, run in runs.items():
            run()  # to warm up: the others were in the caches
            start = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
        rounds += 1
    return best


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsegan"


class _Table:
    """Times of steps on this machine, as a JSON file: machine -> step -> density -> ms."""

    def __init__(self, folder: Path, pattern: Pattern) -> None:
        self._pattern = pattern
        machine = (
            f"{cpu_name()}, {ops.isa()}, {torch.get_num_threads()} threads, sparsegan {package_version()}"
        )
        name = hashlib.sha256(machine.encode()).hexdigest()[:16]
        self._path = folder / f"latency-{name}.json"
        self._machine = machine
        self._steps: dict[str, dict[str, float]] = self._read()

    def get(self, step: str, density: float) -> float | None:
        return self._steps.get(self._row(step), {}).get(f"{density:g}")

    def put(self, step: str, times: Mapping[float, float]) -> None:
        row = self._steps.setdefault(self._row(step), {})
        row.update({f"{density:g}": ms for density, ms in times.items()})
        self._write()

    def _row(self, step: str) -> str:
        return f"{step}, zeros {self._pattern}"

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            steps = found["steps"]
            if found["machine"] != self._machine or not all(
                isinstance(ms, float) and 0 < ms < math.inf for row in steps.values() for ms in row.values()
            ):
                raise ValueError("it holds something else than times of this machine")
            return steps
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"the table of latencies {self._path} cannot be read, so it is made anew: {error}",
                stacklevel=4,
            )
            return {}

    def _write(self) -> None:
        text = json.dumps({"machine": self._machine, "steps": self._steps}, indent=1, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, text.encode())
        except OSError as error:
            warnings.warn(f"the table of latencies cannot be kept in {self._path}: {error}", stacklevel=4)


def cpu_name() -> str:
    """Which CPU this is."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")),
        platform.machine(),
    )


def package_version() -> str:
    """Version of the installed package."""
    try:
        return metadata.version("sparsegan")
    except metadata.PackageNotFoundError:
        return "run from its folder, not installed"
