"""A captured model with programs as JSON and tensors, and back: nothing in it is code, nothing is trusted.

The graph is a list of nodes. Each calls a program of this file or one of the ATen operators below, all of which
compute new tensors from tensors and numbers.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from keyword import iskeyword
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, fx
from torch.fx.graph import _PyTreeInfo
from torch.utils._pytree import tree_flatten, tree_unflatten

from sparsegan.formats import FIELDS, PackedWeight, from_dict, narrowed, widened
from sparsegan.graph import ARITHMETIC, CheckInputs, Expression, PlainCodeGen, lookup
from sparsegan.layers import SparseProgram
from sparsegan.ops.program import Program, tensors

_NAMES = """
    abs add addcmul addmm amax amin adaptive_avg_pool2d arange avg_pool2d baddbmm batch_norm bitwise_not bmm cat celu chunk
    clamp clamp_max clamp_min clone concat constant_pad_nd contiguous conv1d conv2d conv_transpose1d
    conv_transpose2d cos cumsum detach div einsum elu eq exp expand expand_as eye flatten floor_divide full
    full_like gather ge gelu group_norm gt hardsigmoid hardswish hardtanh index index_select instance_norm
    layer_norm le leaky_relu lerp linear linspace log logical_and logical_not logical_or lt masked_fill matmul
    max_pool2d maximum mean minimum mish mm movedim mul narrow ne neg new_full new_ones new_zeros ones ones_like
    pad permute pixel_shuffle pixel_unshuffle pow prelu rand rand_like randn randn_like reciprocal
    reflection_pad2d relu relu6 remainder repeat repeat_interleave replication_pad2d reshape roll rsqrt rsub
    scalar_tensor scaled_dot_product_attention select selu sigmoid silu sin slice softmax softplus split
    split_with_sizes sqrt square squeeze stack std sub sum sym_size t tanh to _to_copy transpose tril triu
    unbind unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d
    _upsample_nearest_exact2d _softmax _unsafe_view var view where zeros zeros_like
"""
_OPERATORS = frozenset(_NAMES.split())
# What sizes are computed with, and rows of tables looked up.
_PYTHON: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg")
} | {"lookup": lookup}
_PATH = re.compile(r"(?!__)\w+(\.(?!__)\w+)*", re.ASCII)
_KINDS_OF_TORCH = (torch.dtype, torch.layout, torch.memory_format)


def describe_graph(model: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON of `model` and its tensors by name. Raises ValueError for what cannot be saved."""
    held: dict[str, Tensor] = {}
    programs, nodes = {}, []
    names: dict[int, str] = {}
    check: dict[str, Any] = {"wanted": [], "equations": []}
    for node in sorted(model.graph.nodes, key=lambda node: node.op != "placeholder"):
        entry: dict[str, Any] = {"name": node.name}
        match node.op:
            case "placeholder":
                entry["op"] = "input"
            case "get_attr":
                target = str(node.target)
                held[target] = operator.attrgetter(target)(model)
                entry |= {"op": "tensor", "tensor": target}
            case "call_module":
                module = model.get_submodule(str(node.target))
                if isinstance(module, CheckInputs):
                    check = {"wanted": _plain(module.wanted), "equations": _plain(module.equations)}
                    continue
                if not isinstance(module, SparseProgram):
                    raise ValueError(
                        f"a graph that calls a {type(module).__name__}, {node.target}, cannot be saved"
                    )
                if node.target not in programs:
                    programs[str(node.target)] = _describe_program(
                        str(node.target), module.program, held, names
                    )
                entry |= {"op": "program", "program": node.target, "args": _plain(node.args)}
            case "call_function":
                entry |= {
                    "op": _name_of(node.target),
                    "args": _plain(node.args),
                    "kwargs": _plain(node.kwargs),
                }
            case "output":
                entry |= {"op": "output", "args": _plain(node.args)}
        nodes.append(entry)
    info = model.graph._codegen.pytree_info  # type: ignore[attr-defined]
    positional, keywords = tree_unflatten(range(info.in_spec.num_leaves), info.in_spec)
    if keywords:
        raise ValueError("a graph that takes keyword arguments cannot be saved")
    returned = tree_unflatten(range(info.out_spec.num_leaves), info.out_spec)
    return {
        "type": "Graph",
        "takes": _describe_tree(positional),
        "returns": _describe_tree(returned),
        "check": check,
        "programs": programs,
        "nodes": nodes,
    }, held


def build_graph(
    spec: Mapping[str, Any], take: Callable[[str], Tensor], backend: str | None
) -> fx.GraphModule:
    """The model that `describe_graph` described; `take` gives each tensor by its name.

    Raises ValueError, or an error of Python's own, for what is not such a description.
    """
    take = cache(take)  # what several share is there once
    take_wide = cache(partial(_take_wide, take))
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    root: dict[str, Any] = {"check_inputs": _read_check(spec["check"])}
    for name, program in spec["programs"].items():
        _check_path(name)
        root[name] = SparseProgram(_read(Program, program, partial(_take_from, take_wide, name)), backend)
    inputs: list[fx.Node] = []
    output = None
    for entry in spec["nodes"]:
        name, op = entry["name"], entry["op"]
        if name in made:
            raise ValueError(f"there are two nodes {name!r}")
        if output is not None or (op == "input" and len(made) > len(inputs)):
            raise ValueError("inputs come first in a graph, and the output last")
        if op == "input":
            inputs.append(graph.placeholder(f"input_{len(inputs)}"))
            made[name] = inputs[-1]
            continue
        if len(made) == len(inputs):
            graph.call_module("check_inputs", tuple(inputs))
        args = _read_value(entry.get("args", []), made)
        if op == "tensor":
            target = entry["tensor"]
            _check_path(target)
            if target not in root:
                root[target] = take(target)
            made[name] = graph.get_attr(target)
        elif op == "program":
            if not isinstance(root.get(entry["program"]), SparseProgram):
                raise ValueError(f"there is no program {entry['program']!r}")
            made[name] = graph.call_module(entry["program"], tuple(args))
        elif op == "output":
            (results,) = args
            output = graph.output(results)
        else:
            made[name] = graph.call_function(_operator(op), tuple(args), _read_value(entry["kwargs"], made))
    if output is None or not isinstance(output.args[0], list | tuple):
        raise ValueError("the graph has no output")
    takes, returns = _read_tree(spec["takes"], len(inputs)), _read_tree(spec["returns"], len(output.args[0]))
    if not isinstance(takes, tuple):
        raise ValueError("a model takes a tuple of inputs")
    info = _PyTreeInfo(
        [f"x{k}" for k in range(len(takes))], tree_flatten((takes, {}))[1], tree_flatten(returns)[1]
    )
    graph.set_codegen(PlainCodeGen(info))
    graph.lint()
    return fx.GraphModule(root, graph)


def _take_from(take: Callable[[str], Tensor], program: str, name: str) -> Tensor:
    return take(name[1:] if name.startswith("/") else f"{program}.{name}")


def _take_wide(take: Callable[[str], Tensor], name: str) -> Tensor:
    return widened(_field(name), take(name))


def _field(name: str) -> str:
    """ "values" of "program_2.step3_values"."""
    return name.rpartition(".")[2].partition("_")[2]


def _name_of(target: Any) -> str:
    """An operator as it stands in a file: "aten.add.Tensor", or "mul" of Python's own."""
    for name, function in _PYTHON.items():
        if target is function:
            return name
    known = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    if not known or target.overloadpacket.__name__ not in _OPERATORS:
        raise ValueError(f"a graph that calls {target} cannot be saved")
    return f"aten.{target.overloadpacket.__name__}.{target._overloadname}"


def _operator(name: str) -> Callable[..., Any]:
    if name in _PYTHON:
        return _PYTHON[name]
    namespace, packet, overload = name.split(".")
    if namespace != "aten" or packet not in _OPERATORS:
        raise ValueError(f"{name!r} is not an operator that files may name")
    _check_path(overload)
    found = getattr(getattr(torch.ops.aten, packet), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"{name!r} is no operator")
    return found


def _plain(value: Any) -> Any:
    """Arguments of a node as JSON; nodes, number formats and devices are dicts of one entry."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {"keywords": {key: _plain(part) for key, part in value.items()}}
    if isinstance(value, _KINDS_OF_TORCH):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    raise ValueError(f"a graph with an argument of type {type(value).__name__}, {value}, cannot be saved")


def _read_value(value: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read_value(part, made) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "keywords":
        if not all(key.isidentifier() and not iskeyword(key) for key in content):
            raise ValueError(f"{', '.join(content)} are not the names of arguments")
        return {key: _read_value(part, made) for key, part in content.items()}
    if kind == "torch":
        _check_path(content)
        found = getattr(torch, content)
        if isinstance(found, _KINDS_OF_TORCH):
            return found
    if kind == "device" and content == "cpu":
        return torch.device("cpu")
    raise ValueError(f"{value} is no argument")


def _check_path(path: Any) -> None:
    """torch.fx writes the paths of attributes into source code."""
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not the path of an attribute")


def _describe_tree(tree: Any) -> Any:
    """Lists, tuples and dicts with text keys around leaves, which are numbered."""
    if type(tree) is int:
        return tree
    if type(tree) in (list, tuple):
        return [type(tree).__name__, [_describe_tree(part) for part in tree]]
    if type(tree) is dict and all(type(key) is str for key in tree):
        return ["dict", [[key, _describe_tree(part)] for key, part in tree.items()]]
    raise ValueError(
        f"a model that takes or returns a {type(tree).__name__} cannot be saved: a file must load without your "
        "code; tuples, lists and dicts can"
    )


def _read_tree(spec: Any, leaves: int) -> Any:
    def read(part: Any) -> Any:
        if type(part) is int:
            return part
        kind, content = part
        if kind == "dict":
            return {str(key): read(value) for key, value in content}
        return {"list": list, "tuple": tuple}[kind](read(value) for value in content)

    tree = read(spec)
    if tree_flatten(tree)[0] != list(range(leaves)):
        raise ValueError(f"the leaves of {spec} are not numbered from 0 to {leaves - 1}")
    return tree


def _read_check(spec: Mapping[str, Any]) -> CheckInputs:
    wanted = [tuple(shape) if isinstance(shape, list) else shape for shape in spec["wanted"]]
    for size in (size for shape in wanted if isinstance(shape, tuple) for size in shape):
        if type(size) not in (int, str):
            raise ValueError(f"{size!r} is not the size of an input")
    sizes = {size for shape in wanted if isinstance(shape, tuple) for size in shape if isinstance(size, str)}

    def read(formula: Any) -> Expression:
        if type(formula) is int or (type(formula) is str and formula in sizes):
            return formula
        function, *operands = formula
        if function not in ARITHMETIC or not operands or isinstance(formula, str):
            raise ValueError(f"{formula} is not a formula of the sizes of inputs")
        return (function, *map(read, operands))

    return CheckInputs(wanted, [(read(left), read(right)) for left, right in spec["equations"]])


def _describe_program(name: str, program: Program, held: dict[str, Tensor], names: dict[int, str]) -> Any:
    """The fields of a program; its tensors, by the names that `program.tensors` gives them, go to `held`.

    names: of all tensors of the programs before this one, by id. What it shares with one of them is held once, under the name
    that it has there: "/program_0.step1_values".
    """
    own: dict[int, str] = {}
    for key, tensor in tensors(program).items():
        full = f"{name}.{key}"
        if id(tensor) not in names:
            names[id(tensor)] = full
            held[full] = narrowed(_field(full), tensor)
        if names[id(tensor)] == full:
            own[id(tensor)] = key

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return own.get(id(value), f"/{names[id(value)]}")
        if is_dataclass(value):
            return {part.name: describe(getattr(value, part.name)) for part in fields(value)}
        return [describe(part) for part in value] if isinstance(value, tuple) else value

    return describe(program)


def _read(kind: Any, value: Any, take: Callable[[str], Tensor]) -> Any:
    """`value` of JSON as what the annotation `kind` says; ValueError where it is something else."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _read(other, value, take)
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(k, part, take) for k, part in zip(kinds, value, strict=True))
    if origin is Literal and type(value) is str and value in arguments:
        return value
    if kind is Tensor and type(value) is str:
        return take(value)
    if kind is PackedWeight:
        weight = {field: take(value[field]) for field in FIELDS}
        return from_dict(weight, value["in_channels"], value["taps"])
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if value.keys() != hints.keys():
            raise ValueError(f"a {kind.__name__} has {', '.join(hints)}; got {', '.join(map(str, value))}")
        return kind(**{name: _read(hints[name], part, take) for name, part in value.items()})
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    raise ValueError(f"{value!r} is not {kind}")
