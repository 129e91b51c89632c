"""Single layers, float32 in and out, and a chain of the layer that the targets are about."""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
from torch import Tensor, nn

from benchmarks.shapes import LAYERS, REFERENCE_LAYER, LayerShape
from benchmarks.timing import DTYPES, Call, Row, check_outputs, rivals_of, time_in_turn
from sparsegan.graph import Lowered, capture, lower, observe
from sparsegan.layers import SPARSE_TYPES, SparseLayer
from sparsegan.patterns import PRUNABLE_TYPES, BlockPattern
from sparsegan.prune import count_macs, make_permanent, prune

SPARSITIES = (0.0, 0.75, 0.9)
BLOCKS = (BlockPattern(8, 4), BlockPattern(4, 4))
CHAIN = 4

# Each shape in both number formats; the layer of the targets with both blocks.
VARIANTS = [
    (shape, dtype, sparsity, block)
    for shape in LAYERS
    for dtype in DTYPES
    for block in (BLOCKS if shape is REFERENCE_LAYER else BLOCKS[:1])
    for sparsity in SPARSITIES
]


@pytest.mark.parametrize(
    ("shape", "dtype", "sparsity", "block"), VARIANTS, ids=lambda value: str(value).replace(" ", "-")
)
def test_layer(
    shape: LayerShape,
    dtype: str,
    sparsity: float,
    block: BlockPattern,
    benchmark: Any,
    rows: list[Row],
    row_seconds: float,
    with_compile: bool,
) -> None:
    x, dense = shape.input(1), shape.build()
    pruned = prune_all(dense, x, sparsity, block)
    (layer,) = sparse_layers(pruned, x, dtype, block)
    kernel_error, dense_error = check_outputs(layer, pruned, x, dtype)
    timed = time_in_turn(benchmark, lambda: layer(x), _rivals(shape, 1, with_compile), dtype, row_seconds)
    if timed is None:
        return
    ms, peak = timed
    macs = sum(count_macs(dense, (x,)).values())
    row = Row(
        model=shape.model,
        layer=shape.layer,
        what=shape.description,
        batch=1,
        dtype=dtype,
        sparsity=sparsity,
        pattern=str(block),
        macs_dense=macs,
        macs_executed=macs * layer.density,
        peak_gmacs=peak,
        kernel_error=kernel_error,
        dense_error=dense_error,
        ms=ms,
    )
    benchmark.extra_info.update(row.to_json())
    rows.append(row)


@pytest.mark.parametrize("sparsity", SPARSITIES[:2])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_chain(
    block: BlockPattern,
    sparsity: float,
    benchmark: Any,
    rows: list[Row],
    row_seconds: float,
    with_compile: bool,
) -> None:
    """Four of the layer in one program; the first one alone beside it tells what a further one takes."""
    shape = REFERENCE_LAYER
    x, dense = shape.input(1), shape.build(CHAIN)
    pruned = prune_all(dense, x, sparsity, block)
    chain, first = program_of(pruned, x), program_of(pruned[: len(pruned) // CHAIN], x)
    kernel_error, dense_error = check_outputs(chain.model, pruned, x, "int8")
    rivals = {**_rivals(shape, CHAIN, with_compile), "first layer": lambda: first.model(x)}
    timed = time_in_turn(benchmark, lambda: chain.model(x), rivals, "int8", row_seconds)
    if timed is None:
        return
    ms, peak = timed
    macs = count_macs(dense, (x,)).values()
    executed = [count * layer.density for count, layer in zip(macs, chain.layers, strict=True)]
    row = Row(
        model=shape.model,
        layer=shape.layer,
        what=f"chain of {CHAIN}",
        batch=1,
        dtype="int8",
        sparsity=sparsity,
        pattern=str(block),
        macs_dense=sum(macs),
        macs_executed=sum(executed),
        peak_gmacs=peak,
        kernel_error=kernel_error,
        dense_error=dense_error,
        ms=ms,
        steady_ms=(ms["sparsegan"] - ms["first layer"]) / (CHAIN - 1),
        steady_macs=sum(executed[1:]) / (CHAIN - 1),
    )
    benchmark.extra_info.update(row.to_json())
    rows.append(row)


@lru_cache(maxsize=1)  # rows of one shape follow each other, and compiling takes seconds
def _rivals(shape: LayerShape, copies: int, with_compile: bool) -> dict[str, Call]:
    return rivals_of(shape.build(copies), shape.input(1), with_compile)


def prune_all(dense: nn.Sequential, x: Tensor, sparsity: float, block: BlockPattern) -> nn.Sequential:
    """A copy in which every layer has lost the share `sparsity` of its blocks, those of the smallest norm."""
    pruned = copy.deepcopy(dense)
    for name in count_macs(dense, (x,)):
        prune(pruned, block, sparsity, "l2", layers=[name])
    make_permanent(pruned)
    return pruned.requires_grad_(False)


def program_of(pruned: nn.Module, x: Tensor) -> Lowered:
    """`pruned` as one int8 program."""
    captured = capture(pruned.eval(), (x,))  # a part of a model in eval mode is not
    return lower(captured, observe(captured, [x]), default="int8", residual="u8")


def sparse_layers(pruned: nn.Sequential, x: Tensor, dtype: str, block: BlockPattern) -> list[SparseLayer]:
    """The sparse layers of a row of (layer, optional ReLU); their int8 ranges are those of `x` on its way."""
    layers: list[SparseLayer] = []
    for module, after in pairwise([*pruned, nn.Identity()]):
        if isinstance(module, PRUNABLE_TYPES):
            low, high = x.aminmax()
            layers.append(
                SPARSE_TYPES[type(module)].from_dense(
                    module,
                    dtype=DTYPES[dtype],
                    block=(block.bo, block.bk),
                    x_range=(low.item(), high.item()),
                    activation="relu" if isinstance(after, nn.ReLU) else "none",
                )
            )
        x = module(x)
    return layers
