"""Layers one by one: each is swapped by itself, wherever that makes it faster.

The way for models that cannot be captured as a graph, or without data to check a graph with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsegan import ops
from sparsegan.formats import blocks_for
from sparsegan.fuse import FollowingActivation, following_activations
from sparsegan.layers import SPARSE_TYPES, SparseLayer, unsupported_reason
from sparsegan.patterns import PRUNABLE_TYPES, BlockPattern, Pattern, PrunableLayer
from sparsegan.quantize import calibrate
from sparsegan.swap.config import DTYPES, Request
from sparsegan.swap.dense import copied, has_hooks, with_submodule
from sparsegan.swap.explanation import LayerRow, kept_row, sparse_row, weight_name
from sparsegan.swap.race import race

# Seconds that timing a layer may take; one round is always run.
LAYER_BUDGET = 0.4

# Without inputs to time the kernels on: the largest density at which they beat dense float32 for any shape.
RULE_DENSITY = 0.5

# These read the weights of their parts instead of calling them.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def swap_layers(
    dense: nn.Module, fused: bool, request: Request, excluded: Mapping[str, str]
) -> tuple[nn.Module, list[LayerRow]]:
    """A copy of `dense` with sparse layers, and a row for each of its layers.

    fused:    whether activations may become part of the layers before them.
    excluded: layers that shall stay, with the reason.
    """
    layers = _survey(dense, excluded)
    if request.inputs is not None:
        _refuse_unreached(dense, layers, request.inputs)
    ranges = {}
    if DTYPES[request.dtype] == torch.int8:
        names = [layer.name for layer in layers if layer.open]
        if request.percentile is None:
            ranges = calibrate(dense, request.batches, names)
        else:
            ranges = calibrate(dense, request.batches, names, "percentile", request.percentile)
    activations = following_activations(dense) if fused else {}
    for layer in layers:
        if layer.open:
            layer.build(request, ranges.get(layer.name), activations.get(layer.name))
    if request.inputs is None:
        _decide_by_rule(layers, request)
    else:
        _decide_by_timing(dense, layers, request.inputs, request.min_speedup)
    return _swapped(dense, layers), [layer.row() for layer in layers]


@dataclass
class _Layer:
    """A layer of the dense copy on its way to a decision. `why` is set once it is out of the question."""

    name: str
    module: PrunableLayer
    why: str = ""
    sparse: SparseLayer | None = None
    activation: FollowingActivation | None = None
    swap: bool = False
    before_ms: float | None = None
    after_ms: float | None = None

    @property
    def open(self) -> bool:
        return not self.why

    def build(
        self, request: Request, x_range: tuple[float, float] | None, activation: FollowingActivation | None
    ) -> None:
        """Make the sparse counterpart, or note why there is none."""
        device = self.module.weight.device
        try:
            self.sparse = SPARSE_TYPES[type(self.module)].from_dense(
                self.module,
                dtype=DTYPES[request.dtype],
                block=_block(request.pattern, device, DTYPES[request.dtype]),
                x_range=x_range,
                weight_bits=4 if request.dtype == "int4" else 8,
                activation=activation.activation if activation else "none",
                slope=activation.slope if activation else 0.0,
                backend=request.backend,
            )
            self.activation = activation
        except ValueError as error:  # sizes that the format cannot hold
            self.why = str(error)
            return
        # On the CPU there is always something; a backend that was named says itself what it refuses.
        if device.type == "cuda" and (request.backend or ops.default_backend()) is None:
            choice = ops.explain(
                f"block_{self.sparse.KIND}", torch.empty(0, device=device), self.sparse.packed
            )
            if choice.chosen is None:
                self.why, self.sparse = "; ".join(map(str.strip, str(choice).splitlines()[1:])), None

    def row(self) -> LayerRow:
        if self.sparse is None:
            return kept_row(self.name, self.module, self.why)
        dtype = weight_name(self.sparse.packed)
        row = sparse_row(self.name, self.module, self.why, self.sparse.density, dtype, self.swap)
        return replace(row, before_ms=self.before_ms, after_ms=self.after_ms)

    @property
    def dense_steps(self) -> list[nn.Module]:
        """What the sparse layer stands for."""
        return [self.module, self.activation.module] if self.activation else [self.module]

    def settle(self, swap: bool, why: str) -> None:
        self.swap, self.why = swap, why


def _block(pattern: Pattern | None, device: torch.device, dtype: torch.dtype) -> tuple[int, int] | None:
    """The packed block of a pattern that the kernels have; None lets each layer choose."""
    known = blocks_for(device, dtype)
    return next(
        (b for b in known if isinstance(pattern, BlockPattern) and b == (pattern.bo, pattern.bk)), None
    )


def _survey(model: nn.Module, excluded: Mapping[str, str]) -> list[_Layer]:
    """Every layer of a kind that can be sparse, with the reason why this one cannot, if there is one."""
    layers = [
        _Layer(name, module) for name, module in model.named_modules() if isinstance(module, PRUNABLE_TYPES)
    ]
    read = {
        id(part)
        for parent in model.modules()
        if isinstance(parent, _READS_WEIGHTS)
        for part in parent.modules()
    }
    for layer in layers:
        module = layer.module
        if layer.name in excluded:
            layer.why = excluded[layer.name]
        elif type(module) not in PRUNABLE_TYPES or "forward" in vars(module):
            layer.why = "its forward is not that of the plain layer"
        elif has_hooks(module):
            layer.why = "it has forward hooks"
        elif id(module) in read:
            layer.why = "the module that holds it reads its weight"
        elif reason := unsupported_reason(module):
            layer.why = reason
    return layers


@contextmanager
def _hooked(
    layers: Iterable[_Layer], hook: Callable[[_Layer, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """`hook(layer, args, kwargs)` is called before each call of one of the layers."""

    def before(layer: _Layer) -> Callable[..., None]:
        return lambda module, args, kwargs: hook(layer, args, kwargs)

    handles = [layer.module.register_forward_pre_hook(before(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_unreached(model: nn.Module, layers: list[_Layer], inputs: tuple[Any, ...]) -> None:
    """Note the layers that `inputs` do not reach, and those that are called with more than their input."""
    reached = set()

    def see(layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.add(layer.name)
        if len(args) != 1 or kwargs:
            layer.why = "it is called with more than its input"

    with _hooked([layer for layer in layers if layer.open], see):
        model(*inputs)
    for layer in layers:
        if layer.open and layer.name not in reached:
            layer.why = "the example inputs do not reach it"


def _decide_by_rule(layers: list[_Layer], request: Request) -> None:
    slow = None  # why the reference backend would run, though nobody asked for it
    if request.backend is None:
        named = ops.default_backend() == "reference"
        slow = "SPARSEGAN_BACKEND names it" if named else ops.extension_error()
    for layer in layers:
        if layer.sparse is None:
            continue
        density = layer.sparse.density
        if request.min_speedup == 0:
            layer.settle(True, "min_speedup is 0")
        elif slow:
            layer.settle(False, f"the reference backend is slower than dense, and {slow}")
        else:
            sign = "<=" if density <= RULE_DENSITY else ">"
            layer.settle(density <= RULE_DENSITY, f"rule: density {density:.2f} {sign} {RULE_DENSITY}")


def _decide_by_timing(
    model: nn.Module, layers: list[_Layer], inputs: tuple[Any, ...], min_speedup: float
) -> None:
    """Time every layer both ways on what reaches it, while the model runs."""

    def see(layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.sparse is None or layer.before_ms is not None:
            return  # called again: timed the first time
        x, sparse = args[0], layer.sparse
        before, after = race(
            [lambda: _through(layer.dense_steps, x), lambda: sparse.forward(x)], LAYER_BUDGET
        )
        layer.before_ms, layer.after_ms = before, after
        gains = before >= min_speedup * after
        times = f"{before / after:.2f} times as fast"
        layer.settle(gains, times if gains else f"would be {times}")

    with _hooked([layer for layer in layers if layer.open], see):
        model(*inputs)


def _through(steps: Sequence[nn.Module], x: Tensor) -> Tensor:
    for step in steps:
        x = step.forward(x)  # not the call, which would run the hooks that time it
    return x


def _swapped(model: nn.Module, layers: list[_Layer]) -> nn.Module:
    """A copy of the model with the decisions carried out. Names stay."""
    result = copied(model, share=True)
    for layer in layers:
        if layer.swap and layer.sparse is not None:
            result = with_submodule(result, layer.name, layer.sparse)
            if layer.activation:
                result.set_submodule(layer.activation.name, nn.Identity())
    return result
