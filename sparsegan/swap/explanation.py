"""What became of a model and its layers, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsegan.formats import PackedWeight, density, has_four_bits
from sparsegan.layers import SparseLayer, SparseProgram
from sparsegan.patterns import (
    PRUNABLE_TYPES,
    BlockPattern,
    Pattern,
    PrunableLayer,
    detect_pattern,
    weight_view,
)

# What the kernels leave out is at least this large; above this density it is not worth a word.
_SMALLEST = {"cpu": BlockPattern(4, 4), "cuda": BlockPattern(16, 32)}
_HARDLY_LESS = 0.98


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer.

    density: share of the dense layer's multiply-adds that its sparse counterpart executes; of a layer that has
             none, share of the weights that are not zero.
    dtype:   of the weights; "int4" are int8 weights of 4 bits.
    before_ms, after_ms: medians on the example inputs, of layers that were swapped one by one; None: not timed.
    """

    name: str
    kind: str
    swapped: bool
    why: str
    pattern: str
    density: float
    dtype: str
    before_ms: float | None = None
    after_ms: float | None = None


@dataclass(frozen=True)
class Explanation:
    """One row a layer, and the whole model; str() is a table for people.

    before_ms, after_ms: of the whole model, dense and swapped; also when the swap was undone. None: not timed.
    programs:    native calls that the model makes in place of its layers; 0: layers one by one, or none.
    psnr:        dB that quantisation left, see `SwapConfig.min_psnr`; None: not measured.
    peak_bytes:  that activations take inside the programs, at their peak, for the example inputs.
    eager_bytes: that they take in eager mode: of all tensors that live at the same time.
    """

    rows: tuple[LayerRow, ...]
    summary: str
    before_ms: float | None = None
    after_ms: float | None = None
    programs: int = 0
    psnr: float | None = None
    peak_bytes: int | None = None
    eager_bytes: int | None = None

    def __str__(self) -> str:
        timed = any(row.before_ms is not None for row in self.rows)
        head = ["layer", "kind", "", "pattern", "density", "dtype"]
        cells = [[*head, *(["before ms", "after ms"] if timed else []), "why"]]
        for row in self.rows:
            state = "swapped" if row.swapped else "kept"
            line = [row.name or "(model)", row.kind, state, row.pattern, f"{row.density:.2f}", row.dtype]
            times = [_ms(row.before_ms), _ms(row.after_ms)] if timed else []
            cells.append([*line, *times, row.why])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([*lines, self.summary])


def explain(model: nn.Module) -> Explanation:
    """What `swap_to_sparse` made of each layer of `model`, and why; print it for a table.

    For a model that did not come from swap_to_sparse (a loaded one keeps its explanation), it tells which
    layers are sparse.
    """
    explanation = getattr(model, "swap_explanation", None)
    if isinstance(explanation, Explanation):
        return explanation
    rows, programs = [], 0
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            kind = module.DENSE.__name__
            dtype = weight_name(module.packed)
            rows.append(LayerRow(name, kind, True, "it is sparse", module.pattern, module.density, dtype))
        elif isinstance(module, SparseProgram):
            for step in module.program.steps:
                if step.weight is not None:
                    dtype, share = weight_name(step.weight), density(step.weight)
                    why = f"in program {programs}"
                    rows.append(LayerRow(step.name, step.kind, True, why, "-", share, dtype))
            programs += 1
        elif isinstance(module, PRUNABLE_TYPES):
            rows.append(kept_row(name, module, "it is dense"))
    return Explanation(tuple(rows), "not swapped by swap_to_sparse in this session", programs=programs)


def kept_row(name: str, layer: PrunableLayer, why: str) -> LayerRow:
    """The row of a layer that stays as it is."""
    view = weight_view(layer)
    share, zeros = (view != 0).double().mean().item(), str(detect_pattern(view) or "dense")
    return LayerRow(name, type(layer).__name__, False, why, zeros, share, dtype_name(view.dtype))


def sparse_row(
    name: str, layer: PrunableLayer, why: str, share: float, dtype: str, swapped: bool = True
) -> LayerRow:
    """The row of a dense layer that has a sparse counterpart. share, dtype: of that."""
    view = weight_view(layer)
    zeros = detect_pattern(view)
    why += _useless_zeros(view, zeros, share)
    pattern, kind = str(zeros or "dense"), type(layer).__name__
    return LayerRow(name, kind, swapped, why, pattern, share, dtype if swapped else dtype_name(view.dtype))


def _useless_zeros(view: Tensor, zeros: Pattern | None, share: float) -> str:
    """What to say when there are zeros, and hardly one of them lies in a block that the kernels leave out."""
    if zeros is None or share < _HARDLY_LESS:
        return ""
    device = "cuda" if view.device.type == "cuda" else "cpu"
    kept = _SMALLEST[device].group_sums(view != 0) > 0
    if kept.double().mean() < _HARDLY_LESS:  # they do, but padded rows outweigh them
        return ""
    few, processor = "no" if kept.all() else "almost no", "GPU" if device == "cuda" else "CPU"
    return f"; {few} zero {_SMALLEST[device]} blocks: {zeros} zeros save nothing on a {processor}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weight_name(packed: PackedWeight) -> str:
    return "int4" if has_four_bits(packed) else dtype_name(packed.values.dtype)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
