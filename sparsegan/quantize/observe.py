"""Static activation ranges: run calibration batches and watch what enters each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

# What is told of a value that was computed: its name and itself.
See: TypeAlias = Callable[[str, Tensor], None]

# Bins of the percentile histogram: 64 to each of the 256 levels that the range is cut into afterwards.
_BINS = 64 * 256


def calibrate(
    model: nn.Module,
    batches: Iterable[tuple[Any, ...] | Tensor],
    layers: Sequence[str],
    method: Literal["minmax", "percentile"] = "minmax",
    percentile: float = 99.99,
) -> dict[str, tuple[float, float]]:
    """The range (lo, hi) of the values that enter each of the named layers.

    batches:    positional inputs of the model, a tuple each (or the tensor when there is only one).
    method:     "minmax", the extremes; "percentile" leaves out the (100 - percentile) % furthest out on each
                side, and runs the batches a second time for a histogram between the extremes.

    Raises ValueError for a model in training mode, an unknown layer, no data, a layer that the batches never
    reach or whose input is NaN or infinite, and an unknown method or percentile.
    """
    if model.training:
        raise ValueError("calibration needs the model as it will be used: call model.eval() first")
    known = dict(model.named_modules(remove_duplicate=False))
    if unknown := [name for name in layers if name not in known]:
        raise ValueError(f"the model has no layer named {', '.join(map(repr, unknown))}")
    runs = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not runs:
        raise ValueError("no calibration data: give at least one batch")
    watched = {name: known[name] for name in layers}

    def run(see: See) -> None:
        _run(model, runs, watched, see)

    return observed_ranges(run, layers, method, percentile)


def observed_ranges(
    run: Callable[[See], None],
    names: Sequence[str],
    method: Literal["minmax", "percentile"],
    percentile: float,
) -> dict[str, tuple[float, float]]:
    """The ranges of named values: `run(see)` computes them all and calls `see(name, value)` for each.

    method, percentile and errors: see `calibrate`.
    """
    if method not in ("minmax", "percentile"):
        raise ValueError(f"method must be 'minmax' or 'percentile', got {method!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must lie in (50, 100], got {percentile}")
    ranges: dict[str, tuple[float, float]] = {}

    def widen(name: str, x: Tensor) -> None:
        low, high = (bound.item() for bound in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"the input of layer {name!r} holds NaN or infinite values during calibration")
        before = ranges.get(name, (low, high))
        ranges[name] = min(before[0], low), max(before[1], high)

    run(widen)
    if missed := [name for name in names if name not in ranges]:
        raise ValueError(f"no calibration data reached the layer {', '.join(map(repr, missed))}")
    if method == "minmax":
        return ranges

    counts = {name: torch.zeros(_BINS, dtype=torch.float64) for name in names}

    def count(name: str, x: Tensor) -> None:
        low, high = ranges[name]
        if low < high:
            counts[name] += torch.histc(x.float().cpu(), _BINS, low, high)

    run(count)
    return {name: _cut(counts[name], *ranges[name], 1 - percentile / 100) for name in names}


def _run(
    model: nn.Module,
    runs: Sequence[tuple[Any, ...]],
    layers: Mapping[str, nn.Module],
    see: See,
) -> None:
    """Run the batches; `see(name, input)` is called whenever something enters one of the layers."""

    def hook(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.numel():
            see(name, x)

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: hook(name, args, kwargs), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            for run in runs:
                model(*run)
    finally:
        for handle in handles:
            handle.remove()


def _cut(counts: Tensor, low: float, high: float, tail: float) -> tuple[float, float]:
    """Drop bins from each end of low..high while no more than the share `tail` of the values goes."""
    allowed = counts.sum() * tail
    below, above = (int((end.cumsum(0) <= allowed).sum()) for end in (counts, counts.flip(0)))
    width = (high - low) / len(counts)
    return low + below * width, high - above * width
