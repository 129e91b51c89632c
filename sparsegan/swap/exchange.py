"""The exchange: candidates are tried, the best way first, until one is right and not slower than the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsegan.graph import CaptureError
from sparsegan.patterns import PRUNABLE_TYPES, weight_view
from sparsegan.swap.config import Request, SwapConfig, resolve
from sparsegan.swap.dense import Dense, Judge, Quality, dense_copy, global_rng_untouched
from sparsegan.swap.explanation import Explanation, LayerRow, kept_row
from sparsegan.swap.programs import Programs, swap_programs
from sparsegan.swap.race import race
from sparsegan.swap.single import swap_layers

# Seconds that timing the whole model may take; two rounds are always run.
MODEL_BUDGET = 1.0

# Relative error that rounding cannot explain.
_TOLERANCE = {"f32": 1e-3, "f16": 0.02, "bf16": 0.1, "int8": 0.5, "int4": 1.0}


def swap_to_sparse(
    model: nn.Module, config: SwapConfig | None = None, example_inputs: tuple[Any, ...] | None = None
) -> nn.Module:
    """A copy of `model` that computes with sparse layers where it gains from them; `explain` tells which, and why.

    model:          in eval mode, on the CPU or on CUDA; it is not changed. Any zeros will do, whoever made them.
    config:         see SwapConfig.
    example_inputs: positional inputs of the model. With them (else the first calibration batch) the model is
                    captured as a graph, what programs can do of it runs in native calls, and the whole is timed
                    against the dense model, so that the result is never slower. A model that cannot be captured
                    has its layers timed and swapped one by one, and so has one on CUDA. Without data the rule is:
                    a layer is swapped when its density is at most 0.5, if the compiled kernels are there.

    The copy is an fx.GraphModule, or of the model's own class where layers were swapped one by one or none was. It
    is for inference: no parameter requires a gradient. With f32 the outputs are those of `model` up to rounding.

    Raises ValueError for a model in training mode, int8 without data, unknown layers, empty inputs and NaN
    activations; TypeError for inputs that are not a tuple; BackendError when a named backend refuses.
    """
    on_cuda = any(parameter.is_cuda for parameter in model.parameters())
    request = resolve(config or SwapConfig(), example_inputs, on_cuda)
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model has parameters on the meta device, without data: load its weights first")
    with torch.no_grad(), global_rng_untouched():
        dense = dense_copy(model, request.inputs)
        excluded = _excluded(dense.model, request)
        swapped, explanation = _chosen(model, dense, request, excluded)
    swapped.swap_explanation = explanation  # type: ignore[assignment]
    return swapped


@dataclass(frozen=True)
class _Candidate:
    """A swapped model. way: what it is, after the number of layers; remarks: what else is to be said of it."""

    model: nn.Module
    rows: list[LayerRow]
    way: str
    remarks: tuple[str, ...]
    quality: Quality | None
    programs: Programs | None = None


def _excluded(model: nn.Module, request: Request) -> dict[str, str]:
    """The layers that the user does not want, with the reason."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE_TYPES)}
    if unknown := [name for name in request.layers or () if name not in layers]:
        known = list(layers)
        raise ValueError(
            f"no Linear, Conv2d or ConvTranspose2d is named {', '.join(unknown)}; there are: {known}"
        )
    excluded = {}
    for name, layer in layers.items():
        if request.layers is not None and name not in request.layers:
            excluded[name] = "not among the layers to consider"
        elif request.pattern and not request.pattern.respected_by(weight_view(layer) != 0):
            excluded[name] = f"its zeros do not follow {request.pattern}"
    return excluded


def _chosen(
    model: nn.Module, dense: Dense, request: Request, excluded: Mapping[str, str]
) -> tuple[nn.Module, Explanation]:
    """The first candidate that is right and fast enough, or the dense copy."""
    rows = [
        kept_row(name, module, excluded.get(name, ""))
        for name, module in dense.model.named_modules()
        if isinstance(module, PRUNABLE_TYPES)
    ]
    if not rows:
        return dense.model, Explanation((), "no Linear, Conv2d or ConvTranspose2d to swap")
    explanation = Explanation(tuple(rows), f"0 of {len(rows)} layers swapped")
    for candidate in _candidates(dense, request, excluded):
        if not any(row.swapped for row in candidate.rows) or request.inputs is None:
            return candidate.model, _explained(candidate, None)
        problem, times = None, None
        assert candidate.quality is not None
        if not candidate.quality.error <= _TOLERANCE[request.dtype]:
            problem = "undone: the outputs of the swapped model were far from the dense ones"
        else:
            rivals = [model, *([dense.model] if dense.changed else [])]
            runners = [partial(each, *request.inputs) for each in (*rivals, candidate.model)]
            *before, after = race(runners, MODEL_BUDGET)
            times = min(before), after
            if times[0] >= request.min_speedup * after:
                return candidate.model, _explained(candidate, times)
            problem = f"undone: the whole model took {after:.2f} ms, dense {times[0]:.2f} ms"
        explanation = _explained(_undone(candidate, dense, problem), times)
    return dense.model, explanation


def _candidates(dense: Dense, request: Request, excluded: Mapping[str, str]) -> Iterator[_Candidate]:
    """What is worth trying, best first; each is made when it is asked for."""
    if request.inputs is None:
        remarks = (f"one by one: {request.no_programs}",) if request.no_programs else ()
        yield _Candidate(*swap_layers(dense.model, dense.fused, request, excluded), "", remarks, None)
        return
    judge = Judge(dense.model, request.inputs, request.batches)
    try:
        if request.no_programs:
            raise CaptureError(request.no_programs)
        for whole in swap_programs(dense.model, request, excluded, judge):
            count = "one program" if whole.programs == 1 else f"{whole.programs} programs"
            notes = (whole.note,) if whole.note else ()
            yield _Candidate(whole.model, whole.rows, f", in {count}", notes, whole.quality, whole)
        remarks = ("one by one, as programs for the whole model were not faster",)
    except CaptureError as error:
        remarks = (f"one by one: {error}",)
    swapped, rows = swap_layers(dense.model, dense.fused, request, excluded)
    yield _Candidate(swapped, rows, "", remarks, judge.quality(swapped))


def _undone(candidate: _Candidate, dense: Dense, problem: str) -> _Candidate:
    rows = []
    for row in candidate.rows:
        if row.swapped:
            module = dense.model.get_submodule(row.name)
            assert isinstance(module, PRUNABLE_TYPES)
            kept = kept_row(row.name, module, problem)
            row = replace(kept, density=row.density, before_ms=row.before_ms, after_ms=row.after_ms)
        rows.append(row)
    return replace(candidate, rows=rows, way="", programs=None)


def _explained(candidate: _Candidate, times: tuple[float, float] | None) -> Explanation:
    swapped = sum(row.swapped for row in candidate.rows)
    summary = f"{swapped} of {len(candidate.rows)} layers swapped{candidate.way}"
    if times is not None:
        before, after = times
        state = "swapped" if swapped else "before that was undone"
        ratio = f"{before / after:.2f} times as fast"
        summary += f"; whole model {before:.3f} ms dense, {after:.3f} ms {state}: {ratio}"
    psnr = candidate.quality.psnr if candidate.quality else None
    lines = [summary]
    if psnr is not None:
        lines.append(f"PSNR to the dense float32 model {psnr:.1f} dB")
    whole = candidate.programs
    if whole is not None:
        lines[-1] += (
            f"; activations {whole.peak_bytes / 1e6:.2f} MB, in eager {whole.eager_bytes / 1e6:.2f} MB"
        )
    before_ms, after_ms = times or (None, None)
    return Explanation(
        tuple(candidate.rows),
        "\n".join([*lines, *candidate.remarks]),
        before_ms,
        after_ms,
        whole.programs if whole else 0,
        psnr,
        whole.peak_bytes if whole else None,
        whole.eager_bytes if whole else None,
    )
