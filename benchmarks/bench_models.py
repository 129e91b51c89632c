"""Whole models as `swap_to_sparse` makes them, so that what does not gain stays dense."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest

from benchmarks.shapes import MODEL_NAMES, BenchModel, build_model
from benchmarks.timing import DTYPES, Call, Row, check_outputs, rivals_of, time_in_turn
from sparsegan.patterns import BlockPattern
from sparsegan.prune import count_macs, make_permanent, prune
from sparsegan.swap import SwapConfig, explain, swap_to_sparse

BATCHES = (1, 16)
SPARSITIES = (0.0, 0.75, 0.9)
BLOCK = BlockPattern(8, 4)

VARIANTS = [
    (name, batch, dtype, sparsity)
    for name in MODEL_NAMES
    for batch in BATCHES
    for dtype in DTYPES
    for sparsity in SPARSITIES
]


@pytest.mark.parametrize(
    ("name", "batch", "dtype", "sparsity"), VARIANTS, ids=lambda value: str(value).replace(" ", "-")
)
def test_model(
    name: str,
    batch: int,
    dtype: str,
    sparsity: float,
    benchmark: Any,
    rows: list[Row],
    row_seconds: float,
    with_compile: bool,
) -> None:
    built = _model(name)
    inputs = built.inputs(batch)
    pruned = copy.deepcopy(built.model)
    if sparsity:
        make_permanent(prune(pruned, BLOCK, sparsity, "l2", example_inputs=inputs))
    sparse = swap_to_sparse(pruned, SwapConfig(dtype), inputs)  # type: ignore[arg-type]
    kernel_error, dense_error = check_outputs(sparse, pruned, inputs[0], dtype)
    timed = time_in_turn(
        benchmark, lambda: sparse(*inputs), _rivals(name, batch, with_compile), dtype, row_seconds
    )
    if timed is None:
        return
    ms, peak = timed
    macs, layers = count_macs(built.model, inputs), explain(sparse).rows
    swapped = sum(layer.swapped for layer in layers)
    row = Row(
        model=name,
        layer="",
        what=f"{built.note}; {swapped} of {len(layers)} layers swapped",
        batch=batch,
        dtype=dtype,
        sparsity=sparsity,
        pattern=str(BLOCK),
        macs_dense=sum(macs.values()),
        macs_executed=sum(macs[r.name] * (r.density if r.swapped else 1.0) for r in layers),
        peak_gmacs=peak,
        kernel_error=kernel_error,
        dense_error=dense_error,
        ms=ms,
    )
    benchmark.extra_info.update(row.to_json())
    rows.append(row)


@lru_cache(maxsize=1)
def _model(name: str) -> BenchModel:
    return build_model(name)


@lru_cache(maxsize=1)  # rows of one model and batch follow each other, and compiling takes seconds
def _rivals(name: str, batch: int, with_compile: bool) -> dict[str, Call]:
    built = _model(name)
    return rivals_of(built.model, built.inputs(batch)[0], with_compile)
