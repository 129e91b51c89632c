"""The whole model as a graph: what layers and the operations between them can be programs, in mixed numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, cast

from torch import nn

from sparsegan.graph import (
    Captured,
    CaptureError,
    Lowered,
    capture,
    eager_bytes,
    lower,
    observe,
    output_layers,
    quantisation_errors,
)
from sparsegan.layers import SparseProgram
from sparsegan.lowering import DTYPES, NumberFormat
from sparsegan.patterns import PRUNABLE_TYPES
from sparsegan.swap.config import Request
from sparsegan.swap.dense import Judge, Quality, has_hooks
from sparsegan.swap.explanation import LayerRow, dtype_name, kept_row, sparse_row
from sparsegan.swap.single import RULE_DENSITY

_INTEGERS = ("int8", "int4")


@dataclass(frozen=True)
class Programs:
    """A model with programs in it. note: on its numbers, for people; peak_bytes, eager_bytes: see Explanation."""

    model: nn.Module
    rows: list[LayerRow]
    quality: Quality
    note: str
    programs: int
    peak_bytes: int
    eager_bytes: int


def swap_programs(
    dense: nn.Module, request: Request, excluded: Mapping[str, str], judge: Judge
) -> Iterator[Programs]:
    """The model with as much of it in programs as can be; then, if asked on, with its dense layers left to torch.

    Raises CaptureError where there is no graph, or nothing in it for a program.
    """
    assert request.inputs is not None
    hooked = [name or "(model)" for name, module in dense.named_modules() if has_hooks(module)]
    if hooked:
        raise CaptureError(f"{', '.join(hooked)} has forward hooks, which a graph would not run")
    task = _Task(capture(dense, request.inputs), request, judge)
    first = task.mixed(excluded)
    if not first.lowered.programs:
        reasons = "; ".join(dict.fromkeys(layer.why for layer in first.lowered.layers))
        raise CaptureError(f"no layer can be in a program: {reasons}")
    yield task.finished(dense, first)
    # int8 beats float32 at any density; other numbers only where something is left out.
    full = [
        layer.name
        for layer in first.lowered.layers
        if layer.in_program and layer.format not in _INTEGERS and layer.density > RULE_DENSITY
    ]
    some = any(layer.in_program and layer.name not in full for layer in first.lowered.layers)
    if full and some:
        why = f"density above {RULE_DENSITY}: the model was slower with it in a program"
        yield task.finished(dense, task.mixed({**excluded, **dict.fromkeys(full, why)}))


@dataclass(frozen=True)
class _Mixed:
    """whys: of layers that are not in the format that was asked for."""

    lowered: Lowered
    quality: Quality
    whys: Mapping[str, str]
    note: str


class _Task:
    """A captured model on its way to programs."""

    def __init__(self, captured: Captured, request: Request, judge: Judge) -> None:
        assert request.inputs is not None
        self._captured, self._request, self._judge = captured, request, judge
        self._inputs: tuple[Any, ...] = request.inputs
        self._ranges: dict[str, tuple[float, float]] = {}
        if request.dtype in _INTEGERS:
            if request.percentile is None:
                self._ranges = observe(captured, request.batches)
            else:
                self._ranges = observe(captured, request.batches, "percentile", request.percentile)

    def mixed(self, refused: Mapping[str, str]) -> _Mixed:
        """int8 for as many layers as the wanted PSNR allows; any other format, weights of 4 bits too, for all."""
        wanted = self._request.min_psnr
        best = self._lowered(refused, [], "u8")
        if self._request.dtype == "int4" and wanted is not None and best.quality.psnr < wanted:
            note = f"less than the {wanted:g} dB of min_psnr, as weights of 4 bits were asked for"
            return replace(best, note=note)
        if self._request.dtype != "int8" or wanted is None or best.quality.psnr >= wanted:
            return best
        best = max(best, self._lowered(refused, [], "bf16"), key=_psnr)
        if best.quality.psnr >= wanted:
            return best
        all_int8 = best.quality.psnr
        order, count, growth = *self._worst_first(best.lowered, wanted - all_int8), 1
        while True:
            mixed = self._lowered(refused, order[:count], "bf16", all_int8)
            if mixed.quality.psnr >= wanted:
                return mixed
            best = max(best, mixed, key=_psnr)
            if count >= len(order):
                note = f"less than the {wanted:g} dB wanted, which bf16 does not reach either"
                return replace(best, note=note)
            count, growth = count + growth, 2 * growth

    def finished(self, dense: nn.Module, mixed: _Mixed) -> Programs:
        rows = []
        for layer in mixed.lowered.layers:
            module = dense.get_submodule(layer.name)
            assert isinstance(module, PRUNABLE_TYPES)
            if layer.in_program:
                why = layer.why + mixed.whys.get(layer.name, "")
                dtype = "int4" if layer.format == "int4" else dtype_name(DTYPES[layer.format])
                rows.append(sparse_row(layer.name, module, why, layer.density, dtype))
            else:
                rows.append(kept_row(layer.name, module, layer.why))
        return Programs(
            mixed.lowered.model,
            rows,
            mixed.quality,
            mixed.note,
            len(mixed.lowered.programs),
            _packed_bytes(mixed.lowered, self._inputs),
            eager_bytes(self._captured, self._inputs),
        )

    def _lowered(
        self,
        refused: Mapping[str, str],
        fallen: list[str],
        residual: Literal["u8", "bf16"],
        all_int8: float | None = None,
    ) -> _Mixed:
        """fallen: layers in bf16 in place of the wanted format. all_int8: the PSNR without any."""
        formats: dict[str, NumberFormat] = dict.fromkeys(fallen, "bf16")
        lowered = lower(
            self._captured,
            self._ranges,
            formats,
            cast(NumberFormat, self._request.dtype),  # f16 has no programs
            dict(refused),
            residual,
            self._request.backend,
        )
        why = "" if all_int8 is None else f"; bf16, as the model has {all_int8:.1f} dB in int8"
        return _Mixed(lowered, self._judge.quality(lowered.model), dict.fromkeys(fallen, why), "")

    def _worst_first(self, lowered: Lowered, missing: float) -> tuple[list[str], int]:
        """Layers of programs in the order in which they fall to bf16, and how many fall first.

        First those that make the outputs: nothing after them averages their errors out, and they are small.
        missing: dB. As many fall first as must, if the errors of the layers simply add up in the output.
        """
        errors = quantisation_errors(self._captured, self._inputs, self._ranges)
        names = [layer.name for layer in lowered.layers if layer.in_program]
        last = [name for name in output_layers(self._captured) if name in names]
        others = sorted((n for n in names if n not in last), key=lambda n: -errors.get(n, 0.0))
        order = [*last, *others]
        allowed = 10 ** (-missing / 10) * sum(errors.get(name, 0.0) for name in order)
        left = list(accumulate(errors.get(name, 0.0) for name in reversed(order)))[::-1]
        return order, max(len(last), sum(error > allowed for error in left), 1)


def _psnr(mixed: _Mixed) -> float:
    return -math.inf if math.isnan(mixed.quality.psnr) else mixed.quality.psnr


def _packed_bytes(lowered: Lowered, inputs: tuple[Any, ...]) -> int:
    """Bytes of activations in all programs, for these inputs."""
    total = 0

    def see(program: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total
        assert isinstance(program, SparseProgram)
        total += program.bytes(*args)

    handles = [program.register_forward_pre_hook(see) for program in lowered.programs]
    try:
        lowered.model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total
