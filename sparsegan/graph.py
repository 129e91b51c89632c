"""Whole models: captured as a graph, cut into regions that are programs, and the rest, which stays torch.

    model ──torch.export──> graph ──> operations, regions ──lowering──> programs
                                   └> the rest of the graph         ──> one fx.GraphModule with both

A node of the graph that programs know becomes an `Operation`; any other keeps its torch op, with a reason. Regions are
*levels*: a value that crosses between torch and a program, or that modulates a feature map, is ready one level
before what reads it. So regions never wait for each other in a circle, and what modulates is an input.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from sparsegan.formats import density
from sparsegan.layers import SparseProgram
from sparsegan.lowering import (
    Activation,
    Add,
    Concat,
    Gemm,
    Lowering,
    Modulate,
    Normalise,
    NumberFormat,
    Operation,
    PackedBefore,
    Pad,
    RefusedError,
    Scale,
    Shuffle,
    Upsample,
    View,
)
from sparsegan.ops.program import Act, Program
from sparsegan.patterns import PRUNABLE_TYPES
from sparsegan.quantize import activation_params, observed_ranges

_ATEN = torch.ops.aten


class CaptureError(ValueError):
    """The model cannot be captured as a graph; the message says why, for people."""


@dataclass(frozen=True)
class Captured:
    """A model as a graph, in eval mode.

    module: takes and returns what the model does. Parameters are shared with the model.
    layers: names and types of the model's Linear, Conv2d and ConvTranspose2d.
    packed: weights as they were packed before, so that lowering the model again is quick.
    """

    module: fx.GraphModule
    layers: Mapping[str, str]
    packed: PackedBefore = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class LoweredLayer:
    """What became of one layer. format: of its weights. density: executed share of the dense multiply-adds."""

    name: str
    kind: str
    in_program: bool
    why: str
    format: str
    density: float


@dataclass(frozen=True)
class Lowered:
    """model: as the captured one, with a `SparseProgram` for each region. layers: a row for each of the model's."""

    model: fx.GraphModule
    layers: tuple[LoweredLayer, ...]

    @property
    def programs(self) -> list[SparseProgram]:
        return [module for module in self.model.modules() if isinstance(module, SparseProgram)]


def capture(model: nn.Module, example_inputs: tuple[Any, ...]) -> Captured:
    """The graph of `model`, which is not changed.

    example_inputs: positional. Their first dimension, and height and width of images, may vary later if the
    model allows that; else the graph is for inputs of these shapes, and says so when it is called with others.

    Raises CaptureError for a model in training mode and for one that torch.export cannot trace.
    """
    if model.training:
        raise CaptureError("the model is in training mode: call model.eval() first")
    two = _two_images(example_inputs)
    failure: Exception | None = None
    for inputs, free in ((two, (0, 2, 3)), (two, (0,)), (example_inputs, ())):
        try:
            module = _exported(model, inputs, free)
            _normalise(module)
        except Exception as error:  # torch.export raises whatever tracing came upon
            failure = error
            continue
        if free == (0, 2, 3) and not _sizes_are_known(module):
            continue
        layers = {
            name: type(layer).__name__
            for name, layer in model.named_modules()
            if isinstance(layer, PRUNABLE_TYPES)
        }
        return Captured(module, layers)
    reason = next((line for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
    raise CaptureError(f"torch.export cannot trace {type(model).__name__}: {reason}") from failure


def observe(
    captured: Captured,
    batches: Iterable[tuple[Any, ...] | Tensor],
    method: Literal["minmax", "percentile"] = "minmax",
    percentile: float = 99.99,
) -> dict[str, tuple[float, float]]:
    """The range (lo, hi) of every value that an int8 layer may read, by name of the graph's node.

    batches: positional inputs of the model, a tuple each (or the tensor when there is only one). method,
    percentile: see `quantize.calibrate`. Raises ValueError for no data and for NaN or infinite values.
    """
    runs = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not runs:
        raise ValueError("no calibration data: give at least one batch")
    operations, _ = _operations(captured.module, {})
    names = {_range_name(operations, gemm) for gemm in operations.values() if isinstance(gemm, Gemm)}

    def run(see: Callable[[str, Tensor], None]) -> None:
        with torch.no_grad():
            for inputs in runs:
                _Watch(captured.module, names, see).run(*inputs)

    return observed_ranges(run, sorted(names), method, percentile)


def output_layers(captured: Captured) -> list[str]:
    """The layers that make the outputs: no other layer stands between them and one of those."""
    found: list[str] = []
    stack = list(captured.module.graph.find_nodes(op="output"))
    seen = set(stack)
    while stack:
        node = stack.pop()
        if _packet(node) in _GEMMS:
            found.append(_layer(node))
            continue
        stack += [read for read in node.all_input_nodes if read not in seen]
        seen.update(node.all_input_nodes)
    return [name for name in captured.layers if name in found]


def quantisation_errors(
    captured: Captured, inputs: tuple[Any, ...], ranges: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """What int8 alone does to each layer: the power of its error relative to that of the layer's output.

    Everything else stays float32. ranges: from `observe`. Of a layer that is called twice, the worse call.
    """
    operations, _ = _operations(captured.module, {})
    gemms = {node: op for node, op in operations.items() if isinstance(op, Gemm)}
    errors: dict[str, float] = {}

    def see(node: fx.Node, arguments: tuple[Any, ...], wanted: Tensor) -> None:
        scale, zero = activation_params(*ranges[_range_name(operations, gemms[node])])
        x, weight, *rest = arguments
        x = ((x / scale).round().clamp(-zero, 255 - zero)) * scale
        dims = (1, 0) if _packet(node) == "conv_transpose2d" else (0, 1)
        step = weight.abs().amax([d for d in range(weight.dim()) if d != dims[0]], keepdim=True) / 127
        rounded = (weight / step.clamp(min=1e-30)).round() * step
        assert callable(node.target)
        noise = (node.target(x, rounded, *rest) - wanted).double().square().sum()
        share = (noise / wanted.double().square().sum().clamp(min=1e-30)).item()
        name = gemms[node].layer
        errors[name] = max(errors.get(name, 0.0), share)

    with torch.no_grad():
        _Inspect(captured.module, set(gemms), see).run(*inputs)
    return errors


def eager_bytes(captured: Captured, inputs: tuple[Any, ...]) -> int:
    """Bytes of all activations that live at the same time, at their peak, when torch runs the graph op by op.

    Inputs, parameters and what an op needs inside do not count. The inputs are not computed with.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        run = _Memory(captured.module)
        run.run(*tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, inputs))
    return run.peak


def lower(
    captured: Captured,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    formats: Mapping[str, NumberFormat] | None = None,
    default: NumberFormat = "f32",
    refused: Mapping[str, str] | None = None,
    residual: Literal["bf16", "u8"] = "bf16",
    backend: str | None = None,
) -> Lowered:
    """The captured model with programs for all that can be one; it shares the other parameters.

    ranges:   from `observe`; needed for int8 layers.
    formats:  number format of layers by name; default: of the others.
    refused:  layers that shall stay torch, each with the reason that the table will give.
    residual: how int8 programs keep what is added later, see `Lowering.program`.
    backend:  name of the backend that runs the programs; None takes the first that can.

    Raises ValueError for an int8 layer without a range.
    """
    formats, refused = dict(formats or {}), dict(refused or {})

    def format_of(layer: str) -> NumberFormat:
        return formats.get(layer, default)

    operations, reasons = _operations(captured.module, refused)
    # Copies, in which calls of a layer share memory but no two models do: who loads other weights into one changes only that.
    packed = {key: weight.clone() for key, weight in captured.packed.items()}
    while True:
        levels = _levels(captured.module.graph, operations, reasons)
        regions = _regions(operations, levels)
        try:
            programs = {
                place: _program(nodes, operations, format_of, ranges or {}, residual, packed)
                for place, nodes in regions.items()
            }
            break
        except RefusedError as error:
            node = next(node for node in operations if node.name == error.operation)
            del operations[node]
            reasons[node] = error.reason
    captured.packed.update({key: packed[key].clone() for key in packed.keys() - captured.packed.keys()})
    model = _assembled(captured.module, levels, regions, programs, backend)
    return Lowered(model, _table(captured, operations, reasons, format_of, [*programs.values()]))


def _two_images(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, twice if they hold one image: export takes a size of one for a constant."""
    sizes = {x.shape[0] for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()}
    if sizes != {1}:
        return inputs
    return tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x, inputs)


def _exported(model: nn.Module, inputs: tuple[Any, ...], free: Sequence[int]) -> fx.GraphModule:
    """The graph of the model, without in-place operations but with convolutions and norms as they are.

    free: dimensions of the inputs whose size may vary, 2 and 3 for images only.
    """

    def dims(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor):
            return None
        return {d: Dim.AUTO for d in free[: None if x.dim() == 4 else 1] if d < x.dim() and x.shape[d] > 1}

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own making
        exported = torch.export.export(model, inputs, dynamic_shapes=tree_map(dims, inputs), strict=False)
        module = exported.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _sizes_are_known(module: fx.GraphModule) -> bool:
    """Whether channels are, where layers read them: they depend on the size of the image behind nn.Flatten."""
    layers = [node for node in module.graph.nodes if _packet(node) in _GEMMS]
    read = [node.args[0] for node in layers]
    return all(len(_shape(node)) not in (2, 4) or isinstance(_shape(node)[1], int) for node in read)


# ------------------------------------------------------------------ the graph, made simple


# Of sizes that may vary: a whole number, the name of a size, or (operator, two or more expressions).
Expression: TypeAlias = int | str | tuple["Expression", ...]
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


class CheckInputs(nn.Module):
    """Refuses inputs of other shapes than the model was captured for.

    wanted: shapes, with a name for each size that may vary; the value itself of what is no tensor.
    equations: pairs of expressions that must be equal.
    """

    _is_impure = True  # for fx: not dead code, though it returns nothing

    def __init__(
        self, wanted: Sequence[Any], equations: Sequence[tuple[Expression, Expression]] = ()
    ) -> None:
        super().__init__()
        self.wanted, self.equations = tuple(wanted), tuple(equations)
        self._accepted: set[tuple[Any, ...]] = set()

    def forward(self, *inputs: Any) -> None:
        came = tuple([x.shape if isinstance(x, Tensor) else x for x in inputs])  # in every call
        traced = torch.compiler.is_compiling()  # then sizes may be symbols
        if not traced and came in self._accepted:
            return
        sizes: dict[str, int] = {}
        for k, (x, wanted) in enumerate(zip(came, self.wanted, strict=True)):
            if not isinstance(wanted, tuple) or not isinstance(x, tuple) or len(x) != len(wanted):
                same = x is wanted or (not isinstance(wanted, tuple) and x == wanted)
            else:
                # A name stands for any size, the same wherever it stands.
                named = zip(x, wanted, strict=True)
                same = all(n == (sizes.setdefault(w, n) if isinstance(w, str) else w) for n, w in named)
            if not same:
                raise ValueError(
                    f"input {k} is {_written(x)}, this model was captured for {_written(wanted)}; {_AGAIN}"
                )
        for left, right in self.equations:
            if _value(left, sizes) != _value(right, sizes):
                shapes = ", ".join(map(_written, came))
                needs = f"{_formula(left)} = {_formula(right)}"
                raise ValueError(f"inputs of {shapes} do not fit the model, which needs {needs}; {_AGAIN}")
        if not traced:
            self._accepted.add(came)


class PlainCodeGen(_PyTreeCodeGen):
    """Code that hands tensors in and out as they are, where they are not nested in other arguments or results.

    torch's own looks for them with pytrees in every call, which takes longer than the layers of a small model.
    """

    def gen_fn_def(self, *args: Any, **kwargs: Any) -> str:
        text = super().gen_fn_def(*args, **kwargs)
        positional, keywords = tree_unflatten(range(self._spec("in").num_leaves), self._spec("in"))
        if keywords or any(isinstance(place, tuple | list | dict) for place in positional):
            return text
        return re.sub(
            r"fx_pytree\.tree_flatten_spec\(\(?\[(.*?)\](, \{\}\))?, self\._in_spec\)", r"(\1,)", text
        )

    def generate_output(self, *args: Any, **kwargs: Any) -> str:
        text = super().generate_output(*args, **kwargs)
        if not self._spec("out").is_leaf():
            return text
        return re.sub(
            r"return pytree\.tree_unflatten\((.*), self\._out_spec\)", r"return \1[0]", text, flags=re.DOTALL
        )

    def _spec(self, side: str) -> Any:
        return getattr(self.pytree_info, f"{side}_spec")


def _value(expression: Expression, sizes: Mapping[str, int]) -> int:
    if isinstance(expression, tuple):
        function, *operands = expression
        return reduce(ARITHMETIC[str(function)], [_value(operand, sizes) for operand in operands])
    return sizes[expression] if isinstance(expression, str) else expression


def _formula(expression: Expression) -> str:
    if isinstance(expression, tuple):
        function, *operands = expression
        return "(" + f" {function} ".join(map(_formula, operands)) + ")"
    return str(expression)


_AGAIN = "capture it again with such inputs as the example"


def _written(wanted: Any) -> str:
    return f"shape ({', '.join(map(str, wanted))})" if isinstance(wanted, tuple) else repr(wanted)


def _normalise(module: fx.GraphModule) -> None:
    """Fold constants and drop what does nothing, in place."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(placeholders[-1].next if placeholders else None):
        check = CheckInputs([_expected(node) for node in placeholders], _equations(placeholders))
        module.add_submodule("check_inputs", check)
        graph.call_module("check_inputs", tuple(placeholders))
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _packet(node) in _ASSERTIONS:
            graph.erase_node(node)
        elif (
            node.target is operator.getitem
            and _packet(node.args[0]) == "_native_batch_norm_legit_no_training"
        ):
            _merge_batch_norm(graph, node)
        elif (value := _constant_value(module, node)) is not None:
            name = f"constant_{node.name}"
            module.register_buffer(name, value)
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            constant.meta["val"] = value
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _ATEN.embedding.default:
            node.target, node.args, node.kwargs = lookup, node.args[:2], {}  # the rest is for training
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


_ASSERTIONS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
_COPIES = {
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh_copy",
    "dropout",
    "feature_dropout",
    "to",
    "_to_copy",
}
_SAME_IF_SHAPE_IS = {"slice", "expand", "view", "reshape", "_unsafe_view"}


def lookup(weight: Tensor, indices: Tensor) -> Tensor:
    """Rows of weight [K, L], for indices of whole numbers; IndexError for an index that is not from 0 to K - 1."""
    try:
        return torch.embedding(weight, indices)
    except IndexError:  # not looked for before: that would cost two passes over the indices
        low, high = (int(n) for n in indices.aminmax())
        raise IndexError(
            f"labels are whole numbers from 0 to {len(weight) - 1}, got some from {low} to {high}"
        ) from None


def _expected(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    return tuple(n if isinstance(n, int) else str(n) for n in _shape(node))


def _equations(placeholders: Sequence[fx.Node]) -> list[tuple[Expression, Expression]]:
    """What export assumed of the sizes that may vary. It also assumes that none is 1, which is not needed."""
    sizes = [size for node in placeholders for size in _shape(node) if isinstance(size, torch.SymInt)]
    known = sizes[0].node.shape_env if sizes else None
    guards = [known.replace(guard.expr) for guard in known.guards] if known else []
    pairs = [guard.args for guard in guards if isinstance(guard, sympy.Eq)]
    named = {str(size) for size in sizes}
    return [(_expression(left, named), _expression(right, named)) for left, right in pairs]


def _expression(formula: Any, named: set[str]) -> Expression:
    """A formula of sympy; ValueError for one that is not made of whole numbers, names of sizes and arithmetic."""
    if formula.is_Integer:
        return int(formula)
    if formula.is_Symbol and str(formula) in named:
        return str(formula)
    functions = {"Add": "+", "Mul": "*", "FloorDiv": "//", "Mod": "%", "PythonMod": "%"}
    function = functions.get(type(formula).__name__)
    if function is None:
        raise ValueError(f"it depends on the sizes of its inputs by {formula}")
    return (function, *(_expression(part, named) for part in formula.args))


def _packet(node: Any) -> str:
    """The name of the ATen operator that a node calls, without its overload; "" for any other node."""
    target = node.target if isinstance(node, fx.Node) else None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target.overloadpacket.__name__


def _merge_batch_norm(graph: fx.Graph, item: fx.Node) -> None:
    """Batch norm comes as (values, two empty tensors): make it the plain operator again."""
    norm = item.args[0]
    assert isinstance(norm, fx.Node)
    x, weight, bias, mean, variance, momentum, eps = norm.args
    with graph.inserting_before(item):
        arguments = (x, weight, bias, mean, variance, False, momentum, eps, False)
        plain = graph.call_function(_ATEN.batch_norm.default, arguments)
    plain.meta = item.meta
    item.replace_all_uses_with(plain)
    graph.erase_node(item)


def _constant_value(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The value of a node that depends on parameters and buffers only."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return None
    if _is_random(node) or any(argument.op != "get_attr" for argument in node.all_input_nodes):
        return None
    arguments, keywords = fx.node.map_arg((node.args, node.kwargs), lambda n: _attribute(module, n))
    with torch.no_grad():
        # Contiguous as from a file: a matrix product rounds differently for other strides.
        return node.target(*arguments, **keywords).contiguous()


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    return operator.attrgetter(str(node.target))(module).detach()


def _does_nothing(node: fx.Node) -> bool:
    before, after = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (node.args[0], node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    name = _packet(node)
    if name in ("dropout", "feature_dropout"):
        return node.args[2] is False
    return name in _COPIES or (name in _SAME_IF_SHAPE_IS and _same_shape(before.shape, after.shape))


def _same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


# ------------------------------------------------------------------ nodes as operations


_MAPS = "programs have float32 [N, C, H, W] and [N, C] on the CPU"


def _operations(
    module: fx.GraphModule, refused: Mapping[str, str]
) -> tuple[dict[fx.Node, Operation], dict[fx.Node, str]]:
    """What programs can do of the graph, and why they cannot do the rest."""
    operations: dict[fx.Node, Operation] = {}
    reasons: dict[fx.Node, str] = {}
    by_name = {node.name: node for node in module.graph.nodes}
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        layer = _layer(node)
        rule = _RULES.get(_packet(node))
        if layer in refused and _packet(node) in _GEMMS:
            reasons[node] = refused[layer]
        elif rule is None:
            reasons[node] = f"programs have no operation for {node.target}"
        else:
            try:
                if not _is_map(node):
                    raise _UnfitError(f"it computes {_shape_text(node)}, {_MAPS}")
                operation = rule(_Call(module, node, layer))
            except _UnfitError as error:
                reasons[node] = str(error)
                continue
            read = [by_name[name] for name in operation.operands]
            if odd := [_shape_text(n) for n in read if not _is_map(n)]:
                reasons[node] = f"it reads {odd[0]}, {_MAPS}"
            else:
                operations[node] = operation
    return operations, reasons


class _UnfitError(Exception):
    """Why a node is not an operation of programs."""


class _Call:
    """A node with its arguments by name, defaults filled in."""

    def __init__(self, module: fx.GraphModule, node: fx.Node, layer: str) -> None:
        self.module, self.node, self.layer = module, node, layer
        assert isinstance(node.target, torch._ops.OpOverload)
        schema = node.target._schema.arguments
        self.arguments: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.arguments |= dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def constant(self, name: str) -> Tensor | None:
        """An argument that does not depend on the inputs; None if it does, or is None."""
        value = self.arguments.get(name)
        if isinstance(value, fx.Node):
            return _attribute(self.module, value) if value.op == "get_attr" else None
        return torch.tensor(float(value)) if isinstance(value, int | float) else None

    def pair(self, name: str) -> tuple[int, int]:
        value = list(self[name])
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])

    def make(self, operation: type[Operation], /, *operands: fx.Node, **fields: Any) -> Operation:
        names = tuple(operand.name for operand in operands)
        return operation(name=self.node.name, operands=names, layer=self.layer, **fields)

    def per_channel(self, value: Tensor, x: fx.Node) -> Tensor:
        """A constant that is one number, or one for each channel of x, as float64 [1] or [C]."""
        if not _is_map(x):
            raise _UnfitError(f"it reads {_shape_text(x)}, {_MAPS}")
        rank, channels = len(_shape(x)), _shape(x)[1]
        spread = (1,) * (rank - 2)
        if value.numel() != 1 and tuple(value.shape) not in ((channels, *spread), (1, channels, *spread)):
            raise _UnfitError(f"a constant of shape {tuple(value.shape)} is not one number for each channel")
        if not value.isfinite().all():
            raise _UnfitError("a constant holds NaN or infinite values")
        return value.double().flatten()


def _scale(call: _Call, x: fx.Node, scale: Tensor | float, bias: Tensor | float) -> Operation:
    if not _same_shape(_shape(x), _shape(call.node)):
        raise _UnfitError("a constant changes the shape")
    scale, bias = (torch.as_tensor(t, dtype=torch.float64).reshape(-1) for t in (scale, bias))
    if bool((scale == 1).all()) and not bias.any():
        return call.make(View, x, view=None)
    channels = max(len(scale), len(bias))
    return call.make(Scale, x, scale=scale.expand(channels), bias=bias.expand(channels))


def _mul(call: _Call) -> Operation:
    x, y = call["self"], call["other"]
    for a, name in ((x, "other"), (y, "self")):
        value = call.constant(name)
        if value is not None and isinstance(a, fx.Node):
            return _scale(call, a, call.per_channel(value, a), 0.0)
    for a, b in ((x, y), (y, x)):
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and len(_shape(a)) == 4 and _is_style(b, a):
            if not _same_shape(_shape(a), _shape(call.node)):
                raise _UnfitError("it modulates one map for a whole batch")
            return call.make(Modulate, a, _vector(b))
    raise _UnfitError("a product of two maps is not an operation of programs")


def _div(call: _Call) -> Operation:
    value = call.constant("other")
    if value is None or call.arguments.get("rounding_mode") is not None:
        raise _UnfitError("a quotient of two maps is not an operation of programs")
    return _scale(call, call["self"], 1.0 / call.per_channel(value, call["self"]), 0.0)


def _add(call: _Call) -> Operation:
    x, y, alpha = call["self"], call["other"], call["alpha"]
    if alpha != 1:
        raise _UnfitError(f"alpha is {alpha}, not 1")
    for a, name in ((x, "other"), (y, "self")):
        value = call.constant(name)
        if value is None or not isinstance(a, fx.Node):
            continue
        try:
            return _scale(call, a, 1.0, call.per_channel(value, a))
        except _UnfitError:
            continue  # perhaps noise: a map of its own
    for a, b in ((x, y), (y, x)):
        whole = isinstance(a, fx.Node) and isinstance(b, fx.Node) and _is_map(a) and _is_map(b)
        if not whole or not _same_shape(_shape(a), _shape(call.node)) or len(_shape(a)) != len(_shape(b)):
            continue
        one_image = statically_known_true(_shape(b)[0] == 1) and not statically_known_true(_shape(a)[0] == 1)
        images = one_image or _same_shape(_shape(a)[:1], _shape(b)[:1])
        if images and _shape(b)[1] in (1, _shape(a)[1]) and _same_shape(_shape(a)[2:], _shape(b)[2:]):
            return call.make(Add, a, b, constant=one_image)
    raise _UnfitError("it adds tensors of shapes that programs do not broadcast")


def _sub(call: _Call) -> Operation:
    value = call.constant("other")
    if value is None or call["alpha"] != 1:
        raise _UnfitError("a difference of two maps is not an operation of programs")
    return _scale(call, call["self"], 1.0, -call.per_channel(value, call["self"]))


def _rsub(call: _Call) -> Operation:
    value = call.constant("other")
    if value is None or call["alpha"] != 1:
        raise _UnfitError("a difference of two maps is not an operation of programs")
    return _scale(call, call["self"], -1.0, call.per_channel(value, call["self"]))


def _neg(call: _Call) -> Operation:
    return _scale(call, call["self"], -1.0, 0.0)


def _batch_norm(call: _Call) -> Operation:
    x = call["input"]
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    if (
        call.arguments.get("training")
        or call.arguments.get("use_input_stats")
        or mean is None
        or variance is None
    ):
        raise _UnfitError(
            "batch normalisation with the statistics of the batch is not an operation of programs"
        )
    scale = (variance.double() + call["eps"]).rsqrt()
    weight, bias = _norm_affine(call, len(mean))
    scale = scale * weight
    return _scale(call, x, scale, bias - mean.double() * scale)


def _norm_affine(call: _Call, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a normalisation, float64 [C]."""
    plain = {"weight": torch.ones, "bias": torch.zeros}
    pair = []
    for name, default in plain.items():
        value = call.constant(name)
        if value is None and call[name] is not None:
            raise _UnfitError(f"its {name} is computed from the inputs")
        pair.append(default(channels) if value is None else value)
    if any(t.shape != (channels,) or not t.isfinite().all() for t in pair):
        raise _UnfitError("its scale and bias are not one finite number for each channel")
    return pair[0].double(), pair[1].double()


def _normalise_groups(call: _Call) -> Operation:
    x = call["input"]
    channels = _shape(x)[1]
    groups = channels if _packet(call.node) == "instance_norm" else call.arguments.get("num_groups", 1)
    if _packet(call.node) == "instance_norm" and not call["use_input_stats"]:
        return _batch_norm(call)
    if _packet(call.node) == "layer_norm" and not _same_shape(_shape(x)[1:], call["normalized_shape"]):
        raise _UnfitError("layer normalisation of less than a whole image is not an operation of programs")
    weight, bias = _norm_affine(call, channels)
    return call.make(Normalise, x, groups=groups, eps=call["eps"], weight=weight, bias=bias)


def _activation(call: _Call) -> Operation:
    name = _packet(call.node)
    act = Act(name)
    if name == "leaky_relu":
        act = Act(name, float(call["negative_slope"]))
    elif name == "prelu":
        slope = call.constant("weight")
        if slope is None or slope.numel() != 1:
            raise _UnfitError("a PReLU with a slope for each channel is not an operation of programs")
        act = Act("leaky_relu", slope.item())
    elif name == "gelu" and call["approximate"] != "none":
        raise _UnfitError(f"GELU with approximate={call['approximate']!r} is not an operation of programs")
    x = call["input"] if "input" in call.arguments else call["self"]
    return call.make(Activation, x, act=act)


def _gemm(call: _Call) -> Operation:
    kind = _packet(call.node)
    weight, bias = call.constant("weight"), call.constant("bias")
    if weight is None or (bias is None and call["bias"] is not None):
        raise _UnfitError("its weight is computed from the inputs")
    if weight.dtype != torch.float32:
        raise _UnfitError(f"weights are {weight.dtype}, programs take torch.float32")
    for part, value in (("weight", weight), ("bias", bias)):
        if value is not None and not value.isfinite().all():
            raise _UnfitError(f"the {part} holds NaN or infinite values")
    if weight.numel() == 0:
        raise _UnfitError("it has no weights")
    fields: dict[str, Any] = {}
    if kind == "linear":
        view = weight[:, None]
    else:
        fields = {n: call.pair(n) for n in ("stride", "dilation", "output_padding") if n in call.arguments}
        fields |= {"kernel_size": (weight.shape[2], weight.shape[3]), "groups": call["groups"]}
        if call["padding"] in ("same", "valid"):
            spans = [d * (k - 1) for d, k in zip(fields["dilation"], fields["kernel_size"], strict=True)]
            if call["padding"] == "same" and any(span % 2 for span in spans):
                raise _UnfitError("padding 'same' pads one side more than the other")
            fields["padding"] = (0, 0) if call["padding"] == "valid" else (spans[0] // 2, spans[1] // 2)
        else:
            fields["padding"] = call.pair("padding")
        view = weight.flatten(2).transpose(1, 2)
        if kind == "conv_transpose2d":
            # Stored [C, O / groups, kh, kw], its groups along the input channels.
            view = weight.flatten(2).unflatten(0, (call["groups"], -1)).permute(0, 2, 3, 1).flatten(0, 1)
    bias = torch.zeros(len(view)) if bias is None else bias.clone()
    return call.make(Gemm, call["input"], kind=kind, weight=view, bias=bias, **fields)


def _cat(call: _Call) -> Operation:
    rank = len(_shape(call.node))
    if call["dim"] not in (1, 1 - rank):
        raise _UnfitError("it joins tensors along another dimension than the channels")
    return call.make(Concat, *call["tensors"])


def _upsample(call: _Call) -> Operation:
    x = call["input"] if "input" in call.arguments else call["self"]
    before, after = _shape(x)[2:], _shape(call.node)[2:]
    for factor in range(2, 17):
        if _same_shape([n * factor for n in before], after):
            return call.make(Upsample, x, factor=factor)
    raise _UnfitError("nearest upsampling by other than one whole factor is not an operation of programs")


def _shuffle(call: _Call) -> Operation:
    return call.make(Shuffle, call["self"], factor=call["upscale_factor"])


def _view(call: _Call) -> Operation:
    x = call["self"]
    before, after = _shape(x), _shape(call.node)
    if not _same_shape(before[:1], after[:1]):
        raise _UnfitError("it mixes images of the batch")
    if _same_shape([*before, 1, 1][:4], [*after, 1, 1][:4]):
        return call.make(View, x, view=None)
    if not all(isinstance(n, int) for n in after[1:]):
        raise _UnfitError("it views a map of varying size as another shape")
    return call.make(View, x, view=(*after[1:], 1, 1)[:3])


def _pad(call: _Call) -> Operation:
    name = _packet(call.node)
    mode = {
        "reflection_pad2d": "reflect",
        "replication_pad2d": "replicate",
        "constant_pad_nd": "constant",
    }.get(name)
    mode = mode or call["mode"]
    if mode not in ("constant", "reflect", "replicate") or call.arguments.get("value"):
        raise _UnfitError(f"padding by mode {mode!r} or by other than 0 is not an operation of programs")
    sides = call["pad"] if "pad" in call.arguments else call["padding"]
    if len(sides) != 4 or sides[0] != sides[1] or sides[2] != sides[3] or min(sides) < 0:
        raise _UnfitError("it pads one side more than the other")
    for user in call.node.users:
        free = mode == "constant" or _Call(call.module, user, "")["padding"] in ([0, 0], "valid")
        if _packet(user) != "conv2d" or not free:
            raise _UnfitError("what it pads is not read by convolutions alone")
    mode = "zeros" if mode == "constant" else mode
    return call.make(Pad, call["self"], mode=mode, padding=(sides[2], sides[0]))


_GEMMS = ("linear", "conv2d", "conv_transpose2d")
_RULES: dict[str, Callable[[_Call], Operation]] = {
    "mul": _mul,
    "div": _div,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "neg": _neg,
    "batch_norm": _batch_norm,
    "cat": _cat,
    "concat": _cat,
    "pixel_shuffle": _shuffle,
    **dict.fromkeys(_GEMMS, _gemm),
    **dict.fromkeys(("group_norm", "instance_norm", "layer_norm"), _normalise_groups),
    **dict.fromkeys(("relu", "leaky_relu", "prelu", "tanh", "sigmoid", "silu", "gelu"), _activation),
    **dict.fromkeys(("upsample_nearest2d", "_upsample_nearest_exact2d"), _upsample),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), _view
    ),
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
}


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """Whole numbers, and torch.SymInt where the size may vary."""
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, Tensor) else ()
    known = (n.node.maybe_as_int() if isinstance(n, torch.SymInt) else n for n in shape)
    return tuple(n if k is None else k for n, k in zip(shape, known, strict=True))


def _shape_text(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return f"an operand that is no tensor, {value!r}"
    return f"a tensor {value.dtype} [{', '.join(map(str, value.shape))}]"


def _is_map(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
        return False
    return value.dim() in (2, 4) and isinstance(_shape(node)[1], int)


def _is_style(style: fx.Node, x: fx.Node) -> bool:
    """Whether `style` is one number for each image and channel of the map x."""
    shape = _shape(style)
    pixels = _same_shape(shape[2:], (1, 1)) and not _same_shape(_shape(x)[2:], (1, 1))
    return len(shape) == 4 and pixels and shape[1] == _shape(x)[1]


def _vector(style: fx.Node) -> fx.Node:
    """The [N, C] that `style`, [N, C, 1, 1], is a view of; or `style`."""
    node = style
    while _packet(node) in ("unsqueeze", "view", "reshape", "slice") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if _same_shape(_shape(node), _shape(style)[:2]):
            return node
    return style


def _layer(node: fx.Node) -> str:
    """Path of the module that a node is from; a second call of a module has the path of the first."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


# ------------------------------------------------------------------ regions

# Of a region: its level and batch size.
_Place: TypeAlias = tuple[int, str]


def _levels(
    graph: fx.Graph, operations: dict[fx.Node, Operation], reasons: dict[fx.Node, str]
) -> dict[fx.Node, int]:
    """The level of every node; operations that are not worth a program leave `operations` for `reasons`."""
    by_name = {node.name: node for node in graph.nodes}
    while True:
        levels: dict[fx.Node, int] = {}
        drawn = 0  # random numbers stay in their order
        for node in graph.nodes:
            operation = operations.get(node)
            level = 0
            if operation is not None:
                for k, name in enumerate(operation.operands):
                    read = by_name[name]
                    modulates = k == 1 and isinstance(operation, Modulate)
                    crosses = read not in operations or modulates or _batch(read) != _batch(node)
                    level = max(level, levels[read] + crosses)
            else:
                level = max((levels[read] + (read in operations) for read in node.all_input_nodes), default=0)
                if _is_random(node):
                    drawn = level = max(level, drawn)
            levels[node] = level
        idle = _idle(operations, levels)
        if not idle:
            return levels
        for node, reason in idle.items():
            del operations[node]
            reasons[node] = reason


def _idle(operations: Mapping[fx.Node, Operation], levels: Mapping[fx.Node, int]) -> dict[fx.Node, str]:
    """Operations that torch does as well: views at the end of a region, and parts of it without any layer."""
    idle = {}
    for node, operation in operations.items():
        inside = [user for user in node.users if user in operations and levels[user] == levels[node]]
        if isinstance(operation, View) and not inside:
            idle[node] = "a view at the end of a program is free in torch"
        elif isinstance(operation, Pad) and len(inside) < len(node.users):
            idle[node] = "what it pads is not read by convolutions alone"
    part: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while part.setdefault(node, node) is not node:
            node = part[node]
        return node

    for node in operations:
        for read in node.all_input_nodes:
            if read in operations and levels[read] == levels[node]:
                part[root(node)] = root(read)
    useful = {root(node) for node, operation in operations.items() if isinstance(operation, Gemm)}
    return idle | {
        node: "no layer of a program is near it" for node in operations if root(node) not in useful
    }


def _regions(
    operations: Mapping[fx.Node, Operation], levels: Mapping[fx.Node, int]
) -> dict[_Place, list[fx.Node]]:
    """The operations of each level and batch size, in order: a program has one batch size for all that it computes."""
    regions = defaultdict(list)
    for node in levels:
        if node in operations:
            regions[levels[node], _batch(node)].append(node)
    return dict(sorted(regions.items()))


def _batch(node: fx.Node) -> str:
    """The batch size of a map, perhaps a formula."""
    return str(_shape(node)[0])


@dataclass(frozen=True)
class _Region:
    """A program and the nodes that it takes and gives. vectors: inputs that are [N, C] for the program."""

    program: Program
    inputs: tuple[str, ...]
    vectors: frozenset[str]
    outputs: tuple[fx.Node, ...]


def _program(
    nodes: Sequence[fx.Node],
    operations: Mapping[fx.Node, Operation],
    format_of: Callable[[str], NumberFormat],
    ranges: Mapping[str, tuple[float, float]],
    residual: Literal["bf16", "u8"],
    packed: PackedBefore,
) -> _Region:
    inside = {node.name for node in nodes}
    steps = [operations[node] for node in nodes]
    by_name = {node.name: node for node in nodes[0].graph.nodes}
    channels = {
        name: _shape(by_name[name])[1]
        for operation in steps
        for name in operation.operands
        if name not in inside
    }
    outputs = tuple(node for node in nodes if any(user.name not in inside for user in node.users))
    rows = [(node.name, len(_shape(node)) == 2) for node in outputs]
    program, inputs = Lowering(steps, channels, rows, format_of).program(ranges, residual, packed)
    vectors = {operation.operands[1] for operation in steps if isinstance(operation, Modulate)}
    return _Region(program, tuple(inputs), frozenset(vectors), outputs)


def _assembled(
    module: fx.GraphModule,
    levels: Mapping[fx.Node, int],
    regions: Mapping[_Place, Sequence[fx.Node]],
    programs: Mapping[_Place, _Region],
    backend: str | None,
) -> fx.GraphModule:
    """The graph with a call of a SparseProgram for each region."""
    graph = fx.Graph()
    root: dict[str, Any] = {}
    made: dict[str, fx.Node] = {}
    held = {node for nodes in regions.values() for node in nodes}
    by_name = {node.name: node for node in module.graph.nodes}
    for level in range(max(levels.values()) + 1):
        for node in module.graph.nodes:
            if levels[node] == level and node not in held and node.op != "output":
                made[node.name] = graph.node_copy(node, lambda read: made[read.name])
        for k, (place, region) in enumerate(programs.items()):
            if place[0] != level:
                continue
            root[f"program_{k}"] = SparseProgram(region.program, backend)
            arguments = []
            for read in region.inputs:
                argument = made[read]
                if read in region.vectors and len(_shape(by_name[read])) == 4:
                    argument = graph.call_function(_ATEN.flatten.using_ints, (argument, 1))
                arguments.append(argument)
            results = graph.call_module(f"program_{k}", tuple(arguments))
            for i, node in enumerate(region.outputs):
                made[node.name] = graph.call_function(operator.getitem, (results, i))
    output = next(iter(module.graph.find_nodes(op="output")))
    graph.node_copy(output, lambda read: made[read.name])
    for node in reversed(graph.nodes):
        if not node.users and node.op in ("get_attr", "call_function") and not _is_random(node):
            graph.erase_node(node)
    graph.set_codegen(PlainCodeGen(module.graph._codegen.pytree_info))  # type: ignore[attr-defined]
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in root:
            value = operator.attrgetter(node.target)(module)
            if isinstance(value, nn.Parameter):
                value = nn.Parameter(value.detach(), requires_grad=False)
            root[node.target] = value
    return fx.GraphModule(root, graph, type(module).__name__)


def _table(
    captured: Captured,
    operations: Mapping[fx.Node, Operation],
    reasons: Mapping[fx.Node, str],
    format_of: Callable[[str], NumberFormat],
    regions: Sequence[_Region],
) -> tuple[LoweredLayer, ...]:
    used = {operation.layer for operation in operations.values() if isinstance(operation, Gemm)}
    why = {_layer(node): reason for node, reason in reasons.items() if _packet(node) in _GEMMS}
    kept = {
        step.name: (k, density(step.weight))
        for k, region in enumerate(regions)
        for step in region.program.steps
        if step.weight is not None
    }
    groups = {
        operation.layer: operation.groups for operation in operations.values() if isinstance(operation, Gemm)
    }
    rows = []
    for name, kind in captured.layers.items():
        if name in used and name not in why and name in kept:
            k, share = kept[name]
            share = min(1.0, share * groups[name])
            rows.append(LoweredLayer(name, kind, True, f"in program {k}", format_of(name), share))
        else:
            reason = why.get(name, "the outputs do not depend on it")
            rows.append(LoweredLayer(name, kind, False, reason, "f32", 1.0))
    return tuple(rows)


# ------------------------------------------------------------------ calibration


class _Watch(fx.Interpreter):
    """Runs a graph and tells `see` of the values of some nodes."""

    def __init__(self, module: fx.GraphModule, names: set[str], see: Callable[[str, Tensor], None]) -> None:
        super().__init__(module)
        self._names, self._see = names, see

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self._see(n.name, value)
        return value


class _Inspect(fx.Interpreter):
    """Runs a graph and tells `see` of some nodes: their arguments and what they gave."""

    def __init__(
        self,
        module: fx.GraphModule,
        nodes: set[fx.Node],
        see: Callable[[fx.Node, tuple[Any, ...], Tensor], None],
    ) -> None:
        super().__init__(module)
        self._nodes, self._see = nodes, see

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            self._see(n, self.fetch_args_kwargs_from_env(n)[0], value)
        return value


class _Memory(fx.Interpreter):
    """Runs a graph and keeps count of the bytes of the activations that are still needed."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.peak = 0
        self._others: set[int] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("placeholder", "get_attr"):
            self._others.update(storage for storage, _ in _storages(value))
        held = dict(pair for kept in (*self.env.values(), value) for pair in _storages(kept))
        self.peak = max(self.peak, sum(size for storage, size in held.items() if storage not in self._others))
        return value


def _storages(value: Any) -> list[tuple[int, int]]:
    """What tensors lie in, which views share, and how many bytes that has."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [(t.untyped_storage()._cdata, t.untyped_storage().nbytes()) for t in tensors]


def _range_name(operations: Mapping[fx.Node, Operation], gemm: Gemm) -> str:
    """The value whose range is that of what `gemm` reads: padding and upsampling add nothing to it but 0."""
    by_name = {operation.name: operation for operation in operations.values()}
    name = gemm.operands[0]
    while isinstance(operation := by_name.get(name), Pad | Upsample | View):
        if isinstance(operation, View) and operation.view is not None:
            break
        name = operation.operands[0]
    return name
