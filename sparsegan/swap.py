"""Exchange the layers of a pruned model for sparse ones, wherever that makes the model faster."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._pytree import tree_leaves

from sparsegan import ops
from sparsegan.formats import BK, EFFICIENCY
from sparsegan.fuse import (
    FollowingActivation,
    fold_batch_norm,
    following_activations,
    straight_runs,
    with_weight,
)
from sparsegan.layers import SPARSE_TYPES, SparseChain, SparseLayer, chainable, unsupported_reason
from sparsegan.patterns import (
    PRUNABLE_TYPES,
    BlockPattern,
    Pattern,
    PrunableLayer,
    detect_pattern,
    effective_weight,
    parse_pattern,
    weight_view,
)
from sparsegan.quantize import calibrate

DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "f32": torch.float32}

# Seconds that timing a layer or a chain may take, and the whole model; one round is always run.
LAYER_BUDGET, MODEL_BUDGET = 0.4, 1.0
_MOST_ROUNDS = 100

# Without inputs to time the kernels on: the largest density at which they beat dense float32 for any shape.
RULE_DENSITY = 0.5

# What the kernels leave out is at least this large; above this density it is not worth a word.
_SMALLEST_BLOCK, _HARDLY_LESS = BlockPattern(min(EFFICIENCY), BK), 0.98

# Relative error that rounding cannot explain.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.int8: 0.5}

# These read the weights of their parts instead of calling them.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class SwapConfig:
    """How `swap_to_sparse` chooses.

    dtype:       "int8", "bf16" or "f32"; "auto" is int8 when there is data to calibrate with, else f32.
    backend:     name of the backend to use; None takes the first that can.
    pattern:     the pattern that the zeros follow, such as "8x4"; a layer whose zeros do not follow it stays
                 dense. None detects it.
    min_speedup: a layer is swapped when it becomes at least this many times as fast; 0 swaps whatever can be.
    calibration: batches for the int8 ranges, a tuple of positional inputs each; None takes example_inputs.
    percentile:  the int8 ranges leave out the (100 - percentile) % furthest out on each side, see
                 `quantize.calibrate`; None keeps the extremes.
    layers:      names of the layers to consider; None considers all.
    """

    dtype: Literal["auto", "int8", "bf16", "f32"] = "auto"
    backend: str | None = None
    pattern: str | Pattern | None = None
    min_speedup: float = 1.0
    calibration: Sequence[tuple[Any, ...]] | None = None
    percentile: float | None = None
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None:  # a generator would be used up by the first swap
            object.__setattr__(self, "calibration", tuple(self.calibration))


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer.

    density: share of the dense layer's multiply-adds that its sparse counterpart executes; of a layer that has
             none, share of the weights that are not zero.
    before_ms, after_ms: medians on the example inputs; None: it was not timed.
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
    """

    rows: tuple[LayerRow, ...]
    summary: str
    before_ms: float | None = None
    after_ms: float | None = None

    def __str__(self) -> str:
        head = ("layer", "kind", "", "pattern", "density", "dtype", "before ms", "after ms", "why")
        cells = [head] + [
            (
                row.name or "(model)",
                row.kind,
                "swapped" if row.swapped else "kept",
                row.pattern,
                f"{row.density:.2f}",
                row.dtype,
                _ms(row.before_ms),
                _ms(row.after_ms),
                row.why,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([*lines, self.summary])


def swap_to_sparse(
    model: nn.Module, config: SwapConfig | None = None, example_inputs: tuple[Any, ...] | None = None
) -> nn.Module:
    """A copy of `model` in which every layer that gains from it is sparse; `explain` tells which, and why.

    model:          in eval mode, on the CPU; it is not changed. Any zeros will do, whoever made them.
    config:         see SwapConfig.
    example_inputs: positional inputs of the model. With them (else the first calibration batch) every layer
                    is timed both ways on the data that reaches it, chains of layers too, and in the end
                    the whole model, so that the result is never slower. Without data the rule is: a layer is
                    swapped when its density is at most 0.5, if the compiled kernels are there.

    BatchNorm is folded into the layers and activations become part of swapped layers; nn.Identity stands in
    their places. What cannot be sparse stays dense, and the copy is for inference: no parameter requires a
    gradient. With f32 the outputs are those of `model` up to rounding.

    Raises ValueError for a model in training mode, int8 without data, unknown layers, empty inputs and NaN
    activations; TypeError for inputs that are not a tuple; BackendError when a named backend refuses.
    """
    config = config or SwapConfig()
    batches = _batches(config, example_inputs)
    inputs = example_inputs if example_inputs is not None else batches[0] if batches else None
    dtype = _dtype(config, bool(batches))
    pattern = parse_pattern(config.pattern) if isinstance(config.pattern, str) else config.pattern
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model has parameters on the meta device, without data: load its weights first")
    if not config.min_speedup >= 0:
        raise ValueError(f"min_speedup must be a number >= 0, got {config.min_speedup}")

    with torch.no_grad(), _global_rng_untouched():
        dense, fused = _dense_copy(model, inputs)
        layers = _survey(dense, config.layers, pattern)
        if inputs is not None:
            _refuse_unreached(dense, layers, inputs)
        ranges = {}
        if dtype == torch.int8:
            names = [layer.name for layer in layers if layer.open]
            if config.percentile is None:
                ranges = calibrate(dense, batches, names)
            else:
                ranges = calibrate(dense, batches, names, "percentile", config.percentile)
        activations = following_activations(dense) if fused else {}
        for layer in layers:
            if layer.open:
                layer.build(
                    dtype, pattern, ranges.get(layer.name), activations.get(layer.name), config.backend
                )
        chains = _chains(dense, layers) if fused else []
        if inputs is None:
            _decide_by_rule(layers, config)
        else:
            _decide_by_timing(dense, layers, chains, inputs, config.min_speedup)
        swapped = _swapped(dense, layers, chains)
        whole_ms = None
        if inputs is not None and any(layer.swap for layer in layers):
            whole_ms = _whole_model_ms(model, dense, swapped, inputs)
            if problem := _problem(dense, swapped, inputs, dtype, whole_ms, config.min_speedup):
                swapped = dense
                for layer in layers:
                    if layer.swap:
                        layer.settle(False, problem)
    swapped.swap_explanation = _explanation(layers, whole_ms)  # type: ignore[assignment]
    return swapped


def explain(model: nn.Module) -> Explanation:
    """What `swap_to_sparse` made of each layer of `model`, and why; print it for a table.

    For a model that did not come from swap_to_sparse (a loaded one keeps its explanation), it tells which
    layers are sparse.
    """
    explanation = getattr(model, "swap_explanation", None)
    if isinstance(explanation, Explanation):
        return explanation
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            dtype = str(module.dtype).removeprefix("torch.")
            kind = module.DENSE.__name__
            rows.append(LayerRow(name, kind, True, "it is sparse", module.pattern, module.density, dtype))
        elif isinstance(module, PRUNABLE_TYPES):
            rows.append(_Layer(name, module, why="it is dense").row())
    return Explanation(tuple(rows), "not swapped by swap_to_sparse in this session")


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
        self,
        dtype: torch.dtype,
        pattern: Pattern | None,
        x_range: tuple[float, float] | None,
        activation: FollowingActivation | None,
        backend: str | None,
    ) -> None:
        """Make the sparse counterpart, or note why there is none."""
        block = None
        if isinstance(pattern, BlockPattern) and pattern.bo in EFFICIENCY and pattern.bk == BK:
            block = (pattern.bo, pattern.bk)
        try:
            self.sparse = SPARSE_TYPES[type(self.module)].from_dense(
                self.module,
                dtype=dtype,
                block=block,
                x_range=x_range,
                activation=activation.activation if activation else "none",
                slope=activation.slope if activation else 0.0,
                backend=backend,
            )
            self.activation = activation
        except ValueError as error:  # sizes that the format cannot hold
            self.why = str(error)

    def row(self) -> LayerRow:
        view = weight_view(self.module)
        zeros = detect_pattern(view)
        density = self.sparse.density if self.sparse else (view != 0).double().mean().item()
        dtype = self.sparse.dtype if self.sparse and self.swap else view.dtype
        return LayerRow(
            name=self.name,
            kind=type(self.module).__name__,
            swapped=self.swap,
            why=self.why + self.note(view, zeros),
            pattern=str(zeros or "dense"),
            density=density,
            dtype=str(dtype).removeprefix("torch."),
            before_ms=self.before_ms,
            after_ms=self.after_ms,
        )

    def note(self, view: Tensor, zeros: Pattern | None) -> str:
        """What to say when there are zeros, and hardly one of them lies in a block that the kernels leave out."""
        if zeros is None or self.sparse is None or self.sparse.density < _HARDLY_LESS:
            return ""
        kept = _SMALLEST_BLOCK.group_sums(view != 0) > 0
        if kept.double().mean() < _HARDLY_LESS:  # they do, but padded rows outweigh them
            return ""
        few = "no" if kept.all() else "almost no"
        return f"; {few} zero {_SMALLEST_BLOCK} blocks: {zeros} zeros save nothing on a CPU"

    @property
    def dense_steps(self) -> list[nn.Module]:
        """What the sparse layer stands for."""
        return [self.module, self.activation.module] if self.activation else [self.module]

    def settle(self, swap: bool, why: str) -> None:
        self.swap, self.why = swap, why


def _batches(config: SwapConfig, example_inputs: tuple[Any, ...] | None) -> list[tuple[Any, ...]]:
    """The calibration batches; example_inputs when there are no others."""
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        came = type(example_inputs).__name__
        raise TypeError(f"example_inputs is a tuple of positional inputs, such as (z,), got {came}")
    batches = [] if example_inputs is None else [example_inputs]
    if config.calibration is not None:
        batches = [batch if isinstance(batch, tuple) else (batch,) for batch in config.calibration]
        if not batches:
            raise ValueError("SwapConfig.calibration holds no batches: give at least one, or None")
    for value in example_inputs or ():
        if isinstance(value, Tensor) and value.numel() == 0:
            raise ValueError(
                f"example_inputs hold an empty tensor, shape {tuple(value.shape)}: nothing to time"
            )
    return batches


def _dtype(config: SwapConfig, data: bool) -> torch.dtype:
    if config.dtype == "auto":
        return torch.int8 if data else torch.float32
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, DTYPES))}, got {config.dtype!r}")
    if config.dtype == "int8" and not data:
        raise ValueError("int8 needs data to calibrate with: give example_inputs or SwapConfig.calibration")
    return DTYPES[config.dtype]


@contextmanager
def _global_rng_untouched() -> Iterator[None]:
    """Models that draw noise draw the same noise in each such block, and the user's random state stays."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _copy(model: nn.Module, share: bool) -> nn.Module:
    """A deep copy; with `share` the tensors are those of `model`."""
    memo: dict[int, object] = {}
    for module in model.modules():
        shared = [*module._parameters.values(), *module._buffers.values()] if share else []
        memo |= {id(tensor): tensor for tensor in shared}
        # torch.nn.utils.prune and weight_norm leave a product that is no leaf, which deepcopy refuses.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    return copy.deepcopy(model, memo)


def _dense_copy(model: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[nn.Module, bool]:
    """The rival to beat: masks made permanent, BatchNorm folded. False when folding changed the outputs.

    Then something looks between the modules of an nn.Sequential, and nothing in the model is fused.
    """
    plain = _copy(model, share=False).requires_grad_(False)
    for name, module in plain.named_modules():
        if isinstance(module, PRUNABLE_TYPES) and _is_masked(module):
            plain = _with_submodule(plain, name, _unmasked(module))
    folded = _copy(plain, share=True)
    if not fold_batch_norm(folded) or inputs is None:
        return folded, True
    if _agree(_outputs(folded, inputs), _outputs(plain, inputs), _TOLERANCE[torch.float32]):
        return folded, True
    return plain, False


def _is_masked(layer: PrunableLayer) -> bool:
    """Whether the layer is plain but for a parametrization or torch.nn.utils.prune."""
    if parametrize.is_parametrized(layer):
        return type(layer).__bases__[0] in PRUNABLE_TYPES and not _has_hooks(layer)
    hooks = layer._forward_pre_hooks.values()
    pruned = bool(hooks) and all(isinstance(hook, BasePruningMethod) for hook in hooks)
    return pruned and type(layer) in PRUNABLE_TYPES and not layer._forward_hooks


def _unmasked(layer: PrunableLayer) -> PrunableLayer:
    mask = getattr(layer, "bias_mask", None)
    bias = layer.bias if mask is None else layer.get_parameter("bias_orig") * mask
    return with_weight(layer, effective_weight(layer), bias)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _with_submodule(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` wherever the one called `name` stands. Returns the model, which may be that one itself."""
    if not name:
        return module
    old = model.get_submodule(name)
    for place, other in list(model.named_modules(remove_duplicate=False)):
        if other is old:
            model.set_submodule(place, module)
    return model


def _survey(model: nn.Module, names: Sequence[str] | None, pattern: Pattern | None) -> list[_Layer]:
    """Every layer of a kind that can be sparse, with the reason why this one cannot, if there is one."""
    layers = [
        _Layer(name, module) for name, module in model.named_modules() if isinstance(module, PRUNABLE_TYPES)
    ]
    known = [layer.name for layer in layers]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(
            f"no Linear, Conv2d or ConvTranspose2d is named {', '.join(unknown)}; there are: {known}"
        )
    read = {
        id(part)
        for parent in model.modules()
        if isinstance(parent, _READS_WEIGHTS)
        for part in parent.modules()
    }
    for layer in layers:
        module = layer.module
        if names is not None and layer.name not in names:
            layer.why = "not among the layers to consider"
        elif type(module) not in PRUNABLE_TYPES or "forward" in vars(module):
            layer.why = "its forward is not that of the plain layer"
        elif _has_hooks(module):
            layer.why = "it has forward hooks"
        elif id(module) in read:
            layer.why = "the module that holds it reads its weight"
        elif reason := unsupported_reason(module):
            layer.why = reason
        elif pattern and not pattern.respected_by(weight_view(module) != 0):
            layer.why = f"its zeros do not follow {pattern}"
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


def _chains(model: nn.Module, layers: list[_Layer]) -> list[list[_Layer]]:
    """Sparse layers that follow each other with nothing between that stays."""
    by_name = {layer.name: layer for layer in layers if layer.open}
    chains: list[list[_Layer]] = []
    for run in straight_runs(model):
        chain: list[_Layer] = []
        for name in run:
            layer = by_name.get(name)
            if layer is not None:
                if not (chain and chainable(_sparse(chain[-1]), _sparse(layer))):
                    chains.append(chain := [])
                chain.append(layer)
            elif not isinstance(model.get_submodule(name), nn.Identity) and not (
                chain and chain[-1].activation and chain[-1].activation.name == name
            ):
                chain = []
    return [chain for chain in chains if len(chain) > 1]


def _sparse(layer: _Layer) -> SparseLayer:
    assert layer.sparse is not None
    return layer.sparse


def _decide_by_rule(layers: list[_Layer], config: SwapConfig) -> None:
    slow = None  # why the reference backend would run, though the config does not ask for it
    if config.backend is None:
        named = ops.default_backend() == "reference"
        slow = "SPARSEGAN_BACKEND names it" if named else ops.extension_error()
    for layer in layers:
        if not layer.open:
            continue
        density = _sparse(layer).density
        if config.min_speedup == 0:
            layer.settle(True, "min_speedup is 0")
        elif slow:
            layer.settle(False, f"the reference backend is slower than dense, and {slow}")
        else:
            sign = "<=" if density <= RULE_DENSITY else ">"
            layer.settle(density <= RULE_DENSITY, f"rule: density {density:.2f} {sign} {RULE_DENSITY}")


def _decide_by_timing(
    model: nn.Module,
    layers: list[_Layer],
    chains: list[list[_Layer]],
    inputs: tuple[Any, ...],
    min_speedup: float,
) -> None:
    """Time every layer, and every chain as a whole, both ways on what reaches it, while the model runs."""
    chain_from = {chain[0].name: chain for chain in chains}
    chain_ms: dict[str, list[float]] = {}

    def see(layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.before_ms is not None:
            return  # called again: timed the first time
        x = args[0]
        layer.before_ms, layer.after_ms = race(
            [lambda: _through(layer.dense_steps, x), lambda: _sparse(layer).forward(x)], LAYER_BUDGET
        )
        if chain := chain_from.get(layer.name):
            steps = [step for part in chain for step in part.dense_steps]
            sparse = SparseChain(*map(_sparse, chain))
            chain_ms[layer.name] = race([lambda: _through(steps, x), lambda: sparse.forward(x)], LAYER_BUDGET)

    candidates = [layer for layer in layers if layer.open]
    with _hooked(candidates, see):
        model(*inputs)

    for layer in candidates:
        before, after = _times(layer)
        gains = before >= min_speedup * after
        times = f"{before / after:.2f} times as fast"
        layer.settle(gains, times if gains else f"would be {times}")
    for chain in chains:
        # Layers that would not gain alone may gain together, because nothing is converted between them.
        together, chained = chain_ms[chain[0].name]
        apart = sum(_times(layer)[1 if layer.swap else 0] for layer in chain)
        if chained <= apart and together >= min_speedup * chained:
            for layer in chain:
                layer.settle(True, f"a chain of {len(chain)}, {together / chained:.2f} times as fast")


def _times(layer: _Layer) -> tuple[float, float]:
    assert layer.before_ms is not None and layer.after_ms is not None
    return layer.before_ms, layer.after_ms


def _through(steps: Sequence[nn.Module], x: Tensor) -> Tensor:
    for step in steps:
        x = step.forward(x)  # not the call, which would run the hooks that time it
    return x


def race(runners: Sequence[Callable[[], object]], budget: float) -> list[float]:
    """Median milliseconds of each runner. They take turns, so that what else the machine does hits all alike.

    budget: seconds to spend at most, after a first round to warm up and a second to learn how long one takes.
    """

    def once(runner: Callable[[], object]) -> float:
        start = time.perf_counter()
        runner()
        return (time.perf_counter() - start) * 1e3

    for runner in runners:
        runner()
    samples = [[once(runner)] for runner in runners]
    rounds = int(budget * 1e3 / max(sum(sample[0] for sample in samples), 1e-3))
    for _ in range(min(rounds, _MOST_ROUNDS)):
        for runner, sample in zip(runners, samples, strict=True):
            sample.append(once(runner))
    return [median(sample) for sample in samples]


def _swapped(model: nn.Module, layers: list[_Layer], chains: list[list[_Layer]]) -> nn.Module:
    """A copy of the model with the decisions carried out. Names stay; a chain has that of its first layer."""
    result = _copy(model, share=True)
    for layer in layers:
        if layer.swap:
            result = _with_submodule(result, layer.name, _sparse(layer))
            if layer.activation:
                result.set_submodule(layer.activation.name, nn.Identity())
    for chain in chains:
        for swap, group in groupby(chain, key=lambda layer: layer.swap):
            first, *rest = group
            if swap and rest:
                sparse = SparseChain(_sparse(first), *map(_sparse, rest))
                result.set_submodule(first.name, sparse)
                for layer in rest:
                    result.set_submodule(layer.name, nn.Identity())
    return result


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with _global_rng_untouched():
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def _agree(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    """Whether the tensors are the same up to a relative error, over all of them together."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in wanted]:
        return False
    pairs = [(a.double(), b.double()) for a, b in zip(got, wanted, strict=True)]
    error = sum((a - b).square().sum().item() for a, b in pairs)
    return error <= tolerance**2 * sum(b.square().sum().item() for _, b in pairs)


def _whole_model_ms(
    model: nn.Module, dense: nn.Module, swapped: nn.Module, inputs: tuple[Any, ...]
) -> tuple[float, float]:
    """Milliseconds of the faster of the model and its folded copy, and of the swapped one."""
    before, folded, after = race([partial(each, *inputs) for each in (model, dense, swapped)], MODEL_BUDGET)
    return min(before, folded), after


def _problem(
    dense: nn.Module,
    swapped: nn.Module,
    inputs: tuple[Any, ...],
    dtype: torch.dtype,
    whole_ms: tuple[float, float],
    min_speedup: float,
) -> str | None:
    """Why the whole swap has to be undone, or None."""
    if not _agree(_outputs(swapped, inputs), _outputs(dense, inputs), _TOLERANCE[dtype]):
        return "undone: the outputs of the swapped model were far from the dense ones"
    before, after = whole_ms
    if before < min_speedup * after:
        return f"undone: the whole model took {after:.2f} ms, dense {before:.2f} ms"
    return None


def _explanation(layers: list[_Layer], whole_ms: tuple[float, float] | None) -> Explanation:
    swapped = sum(layer.swap for layer in layers)
    summary = f"{swapped} of {len(layers)} layers swapped"
    if not layers:
        summary = "no Linear, Conv2d or ConvTranspose2d to swap"
    rows = tuple(layer.row() for layer in layers)
    if whole_ms is None:
        return Explanation(rows, summary)
    before, after = whole_ms
    state = "swapped" if swapped else "before that was undone"
    summary += (
        f"; whole model {before:.3f} ms dense, {after:.3f} ms {state}: {before / after:.2f} times as fast"
    )
    return Explanation(rows, summary, before, after)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
