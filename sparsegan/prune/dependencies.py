"""Which channels of which layers are one and the same, and so have to be reordered or removed together.

The model is captured by torch.export and its graph executed on *labels*: every element of every tensor carries a whole
number instead of a value, elements of one channel the same. A convolution gives its output channels fresh labels;
operations that only move data are run on the labels as they are, so a concatenation, a view or a pixel shuffle needs
no rule of its own; an addition ties the labels of its operands. Tied labels are one channel at the end. What is not
understood freezes the labels that it touches, with the reason. Method: own.
"""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsegan.prune.masks import find_mask
from sparsegan.prune.trace import Inputs, check_inputs, eval_mode, prunable_layers


@dataclass(frozen=True)
class Axis:
    """Where the channels of a group lie in one parameter or buffer.

    parameter: its name in the model. dim: the dimension that runs over channels.
    positions: int64 [size, repeats], of each member; a channel of a 4x4 map that a linear layer makes has 16.
    """

    parameter: str
    dim: int
    positions: Tensor

    @property
    def layer(self) -> str:
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that may take each other's place.

    producers, consumers: axes of the weights of layers that write and that read them. readers: of other matrices
    that they are multiplied by, such as the energies of StyleGAN2's demodulation. others: biases, parameters and
    statistics of norms, depthwise convolutions, constants. Members have the same order in all axes.
    fixed: why these channels can be neither reordered nor removed; empty if they can.
    unprunable: why they can be reordered but not removed.
    family: groups of the same family have to stay equally wide, as the groups of a group norm do.
    exact: whether removing some leaves the others as they are; not so within a layer norm or a group norm.
    """

    size: int
    producers: tuple[Axis, ...]
    consumers: tuple[Axis, ...]
    readers: tuple[Axis, ...]
    others: tuple[Axis, ...]
    fixed: str
    unprunable: str
    family: int
    exact: bool

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.producers, *self.consumers, *self.readers, *self.others)


def channel_groups(model: nn.Module, example_inputs: Inputs) -> list[ChannelGroup]:
    """The groups of channels of ``model``, in the order of the graph; the model is left as it is.

    Every channel that a Linear, Conv2d or ConvTranspose2d reads or writes is in one group. Channels are apart when
    something tells them apart: half of them are read by another layer, or they lie in different groups of a group
    norm. Inputs and outputs of the model are fixed, and so is what touches an operation that is not understood.

    Raises ValueError for a model that holds masks of `prune` (their zeros belong to places, not to channels) or that
    torch.export cannot capture, and what `check_inputs` raises.
    """
    check_inputs(example_inputs)
    layers = prunable_layers(model)
    for name, layer in layers.items():
        if find_mask(layer) is not None or hasattr(layer, "weight_mask"):
            raise ValueError(
                f"the weight of layer {name!r} is masked: reorder or remove channels before pruning blocks, "
                "or make the zeros permanent first (sparsegan.prune.make_permanent)"
            )
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in named:
        first.setdefault(id(tensor), name)
    canonical = {n: first[id(t)] for n, t in named}
    return _Labels(_exported(model, example_inputs), canonical, {f"{n}.weight" for n in layers}).groups()


def _exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    batch = check_inputs(inputs)
    one = tuple(x[:1] if isinstance(x, Tensor) and x.ndim and x.shape[0] == batch else x for x in inputs)
    try:
        with eval_mode(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            return torch.export.export(model, one, strict=False).run_decompositions({})
    except Exception as error:  # torch.export raises whatever tracing came upon
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"torch.export cannot trace {type(model).__name__}: {reason}") from error


Role: TypeAlias = Literal["producer", "consumer", "reader", "other"]
ROLES: tuple[Role, ...] = ("producer", "consumer", "reader", "other")

# Names of ATen operations; of those that multiply by a matrix, the argument that is it.
_PRODUCTS = {"matmul": "other", "mm": "mat2"}
_GEMMS = dict.fromkeys(("linear", "conv2d", "conv_transpose2d"), "weight") | _PRODUCTS
_INPUTS = ("input", "self")  # of those
_TRANSPOSES = {"t", "numpy_T", "permute", "transpose"}  # of matrices
_COPIES = {"_to_copy", "to", "clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy"}
_MOVES = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "expand",
    "repeat",
    "permute",
    "transpose",
}
_MOVES |= {"t", "unsqueeze", "squeeze", "cat", "stack", "flip", "pixel_shuffle", "pixel_unshuffle"}
# Positions or numbers of channels are written in these, and mean others when the tensor is narrower.
_CUTS = {
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "narrow",
    "roll",
    "channel_shuffle",
}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm"}
# Each channel by itself, dimension 1; `upsample_*` too.
_SPATIAL = {"avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "pad", "constant_pad_nd"}
_SPATIAL |= {"reflection_pad2d", "replication_pad2d"}
_BY_CHANNEL = {"batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "prelu"}


class _Labels:
    """Executes an exported graph on labels.

    A label is an index; tied labels become one channel at the end. Values are int64 tensors in the shape of the
    real ones, mostly expanded from one small tensor, so that they take no memory.
    """

    def __init__(
        self, exported: torch.export.ExportedProgram, canonical: Mapping[str, str], weights: Set[str]
    ) -> None:
        self.of_layers = weights
        self.count = 0
        self.ties: list[Tensor] = []  # [pairs, 2]
        self.frozen: list[tuple[Tensor, str]] = []
        self.unprunable: list[tuple[Tensor, str]] = []
        self.together: list[Tensor] = []  # labels that something reads without regard to their order
        self.equal: list[list[Tensor]] = []  # the same, in parts that have to stay of the same size
        self.inexact: list[Tensor] = []
        self.weights: dict[tuple[str, int], tuple[Role, Tensor]] = {}  # by parameter and dimension
        self.constants: dict[str, Tensor] = {}

        signature = exported.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.values: dict[fx.Node, Any] = {}
        self.matrices: dict[fx.Node, str] = {}  # nodes that are multiplied by, and nothing else
        self.transposed: set[fx.Node] = set()
        placeholders = exported.graph.find_nodes(op="placeholder")
        stored = {node: canonical[names[node.name]] for node in placeholders if node.name in names}
        computed_with = {
            name
            for node, name in stored.items()
            if not all(_gemm_weight(user) is node for user in node.users)
        }
        for node in placeholders:
            value = node.meta["val"]
            if (name := stored.get(node)) is not None and name not in computed_with:
                self.matrices[node] = name
            elif name is not None:
                if name not in self.constants:
                    self.constants[name] = self.fresh(*value.shape)
                self.values[node] = self.constants[name]
            else:
                self.values[node] = self._opaque(value, "an input of the model")
        for node in exported.graph.nodes:
            if node.op == "output":
                for read in node.all_input_nodes:
                    self.freeze(self.values.get(read), "an output of the model")
            elif node.op == "call_function":
                self.values[node] = self._call(node)

    # ---- labels

    def fresh(self, *shape: int) -> Tensor:
        labels = torch.arange(self.count, self.count + torch.Size(shape).numel()).view(shape)
        self.count += labels.numel()
        return labels

    def tie(self, a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(a, b)
        for d in range(a.dim()):
            if a.stride(d) == 0 and b.stride(d) == 0 and a.shape[d] > 1:
                a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        pairs = torch.stack([a.flatten(), b.flatten()], 1)
        self.ties.append(pairs[pairs[:, 0] != pairs[:, 1]].unique(dim=0))

    def freeze(self, value: Any, reason: str) -> None:
        for labels in _tensors(value):
            self.frozen.append((_compact(labels).unique(), reason))

    def channels(self, labels: Tensor, dim: int) -> Tensor:
        """One label for each index of ``dim``: all that share the index are tied. ``[size of dim]``"""
        rows = _compact(labels.movedim(dim, 0), keep=0).reshape(labels.shape[dim], -1)
        self.tie(rows[:, :1], rows)
        return rows[:, 0]

    # ---- nodes

    def _opaque(self, value: Any, reason: str) -> Any:
        """Labels for ``value`` (a fake tensor, or several), of which nothing is known."""
        label = self.fresh()
        self.freeze(label, reason)
        return tree_map_only(Tensor, lambda x: label.expand(x.shape), value)

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return self.values[source][index]  # type: ignore[index]
        if (source := _gemm_weight(node)) in self.matrices and _packet(node) in _TRANSPOSES:
            self.matrices[node] = self.matrices[source]
            self.transposed.add(node)
            return None
        # Labels instead of nodes; the weight of a layer has none of its own, so that it stays a node.
        read = fx.node.map_arg(_arguments(node), lambda n: n if n in self.matrices else self.values.get(n))
        if (rule := self._rule(_packet(node), read, getattr(node.target, "tags", ()))) is not None:
            return rule(node, read)
        return self._unknown(node, read)

    def _unknown(self, node: fx.Node, read: dict[str, Any]) -> Any:
        reason = f"the operation {_packet(node)} is not understood{_place(node)}"
        self.freeze(read, reason)
        return self._opaque(node.meta.get("val"), reason)

    def _rule(
        self, name: str, read: dict[str, Any], tags: Sequence[torch.Tag]
    ) -> Callable[[fx.Node, dict[str, Any]], Any] | None:
        if name in _GEMMS:
            return self._gemm if isinstance(read[_GEMMS[name]], fx.Node) else None
        if name in _MOVES | _CUTS and "dtype" not in read:
            return self._move
        if name in _COPIES:
            return lambda node, read: _tensors(read)[0]
        if name in _REDUCTIONS:
            return self._reduce
        if name in _SPATIAL or name.startswith("upsample_"):
            return self._spatial
        if name in _BY_CHANNEL:
            return self._by_channel
        if name in ("group_norm", "layer_norm"):
            return self._group_norm if name == "group_norm" else self._layer_norm
        return self._pointwise if torch.Tag.pointwise in tags else None

    def _gemm(self, node: fx.Node, read: dict[str, Any]) -> Tensor:
        kind, matrix = _packet(node), read[_GEMMS[_packet(node)]]
        name, x = self.matrices[matrix], next(read[i] for i in _INPUTS if i in read)
        shape = node.meta["val"].shape
        dim = len(shape) - (3 if kind.startswith("conv") else 1)
        inputs, groups = self.channels(x, dim), read.get("groups", 1)
        if groups == 1:
            # A transposed matrix has its outputs first in store, as linear layers have.
            first = kind in ("linear", "conv2d") or matrix in self.transposed
            out, into = (0, 1) if first else (1, 0)
            of_layer = name in self.of_layers
            written = self._axis(name, out, shape[dim], "producer" if of_layer else "other")
            self.tie(self._axis(name, into, len(inputs), "consumer" if of_layer else "reader"), inputs)
        elif groups == len(inputs):  # depthwise: each channel makes some of its own
            own = self._axis(name, 0, matrix.meta["val"].shape[0], "other")
            written = own.repeat_interleave(shape[dim] // len(own))
            self.tie(written, inputs.repeat_interleave(shape[dim] // groups))
        else:
            written = self.fresh(shape[dim])
            self.freeze((inputs, written), f"a convolution in {groups} groups{_place(node)}")
        if read.get("bias") is not None:
            self.tie(read["bias"], written)
        return _along(written, dim, shape)

    def _axis(self, parameter: str, dim: int, size: int, role: Role) -> Tensor:
        if (parameter, dim) not in self.weights:
            self.weights[parameter, dim] = role, self.fresh(size)
        return self.weights[parameter, dim][1]

    def _move(self, node: fx.Node, read: dict[str, Any]) -> Any:
        name, x = _packet(node), _tensors(read)[0]
        if name in _CUTS:
            dims = 1 if name == "channel_shuffle" else read.get("dim", read.get("dims", 0))
            if _varying(x) & {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}:
                self.unprunable.append(
                    (_compact(x).unique(), f"they are cut into parts ({name}){_place(node)}")
                )
        if name in ("view", "_unsafe_view"):
            return x.reshape(read["size"])
        return node.target(**read)  # type: ignore[operator]

    def _reduce(self, node: fx.Node, read: dict[str, Any]) -> Tensor:
        x, shape = _tensors(read)[0], node.meta["val"].shape
        dims = read.get("dim")
        dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))]
        if not _varying(x) & set(dims):
            for d in sorted(dims, reverse=True):
                x = x.narrow(d, 0, 1) if read.get("keepdim") else x.select(d, 0)
            return x.expand(shape)
        parts = _compact(x).movedim(dims, list(range(-len(dims), 0)))
        parts = parts.reshape(-1, parts.shape[-len(dims) :].numel()).unique(dim=0)
        self.together += list(parts)
        self.unprunable.append((parts.unique(), f"{_packet(node)} is taken over them{_place(node)}"))
        return self._opaque(node.meta["val"], f"{_packet(node)} over channels{_place(node)}")

    def _spatial(self, node: fx.Node, read: dict[str, Any]) -> Tensor:
        x, shape = _tensors(read)[0], node.meta["val"].shape
        if x.dim() < 3 or x.shape[:2] != shape[:2]:
            unknown: Tensor = self._unknown(node, read)
            return unknown
        return _along(self.channels(x, 1), 1, shape)

    def _by_channel(self, node: fx.Node, read: dict[str, Any]) -> Any:
        """Batch norm, instance norm and PReLU: a parameter for each channel, dimension 1."""
        x, *parameters = _tensors(read)
        labels = self.channels(x, 1)
        for parameter in parameters:
            if parameter.numel() == 1 != len(labels):
                self.freeze(parameter, "one for all channels")
            else:
                self.tie(parameter, labels)
        out = _along(labels, 1, x.shape)
        return (out, None, None) if isinstance(node.meta["val"], tuple | list) else out

    def _group_norm(self, node: fx.Node, read: dict[str, Any]) -> Tensor:
        labels = self.channels(read["input"], 1)
        for parameter in _tensors((read["weight"], read["bias"])):
            self.tie(parameter, labels)
        if (groups := read["num_groups"]) < len(labels):
            self.equal.append(list(labels.view(groups, -1)))
            self.inexact.append(labels)
        return _along(labels, 1, read["input"].shape)

    def _layer_norm(self, node: fx.Node, read: dict[str, Any]) -> Tensor:
        x, dims = read["input"], len(read["normalized_shape"])
        for parameter in _tensors((read["weight"], read["bias"])):
            self.tie(parameter, x)
        parts = _compact(x).reshape(-1, _compact(x).shape[-dims:].numel()).unique(dim=0)
        self.together += list(parts)
        self.inexact.append(parts.unique())
        return x

    def _pointwise(self, node: fx.Node, read: dict[str, Any]) -> Tensor:
        return reduce(self._combined, _tensors(read)).expand(node.meta["val"].shape)

    def _combined(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of an operation on ``a`` and ``b``, broadcast."""
        dims = max(a.dim(), b.dim())
        a, b = (x.reshape((1,) * (dims - x.dim()) + tuple(x.shape)) if x.dim() < dims else x for x in (a, b))
        for one, other in ((a, b), (b, a)):
            varying = _varying(one)
            # The other is the same for every channel, like noise that is added to all of them: it has to stay.
            if varying and all(other.shape[d] == 1 for d in varying):
                self.freeze(other, "one value for several channels")
                return one.expand(torch.broadcast_shapes(a.shape, b.shape))
        self.tie(a, b)
        return a.expand(torch.broadcast_shapes(a.shape, b.shape))

    # ---- what came out

    def groups(self) -> list[ChannelGroup]:
        channel = _components(self.count, torch.cat([*self.ties, torch.empty(0, 2, dtype=torch.int64)]))
        fixed, unprunable = _reasons(self.frozen, channel), _reasons(self.unprunable, channel)
        axes = self._axes(channel, fixed)
        inexact = {c for labels in self.inexact for c in channel[labels].tolist()}

        # Channels that lie equally often in the same places may take each other's place.
        places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        unordered = [*self.together, *(part for parts in self.equal for part in parts)]
        for k, labels in enumerate([*(labels for *_, labels in axes), *unordered]):
            found, times = channel[labels].unique(return_counts=True)
            for c, n in zip(found.tolist(), times.tolist(), strict=True):
                places[c].append((k, n))
        members: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for c in sorted(places):
            members[tuple(places[c]), fixed.get(c), unprunable.get(c), c in inexact].append(c)
        orbits = list(members.values())
        orbit_of = torch.full((self.count,), -1)
        for k, orbit in enumerate(orbits):
            orbit_of[torch.tensor(orbit)] = k
        family = self._families(channel, orbit_of, unprunable)

        lying: list[dict[Role, list[Axis]]] = [{role: [] for role in ROLES} for _ in orbits]
        for parameter, dim, role, labels in axes:
            channels = channel[labels]
            ids, order = orbit_of[channels], channels.argsort(stable=True)
            for k in ids.unique().tolist():
                positions = order[ids[order] == k].view(len(orbits[k]), -1)
                lying[k][role].append(Axis(parameter, dim, positions))
        groups = []
        for k, orbit in enumerate(orbits):
            weights = lying[k]["producer"] + lying[k]["consumer"]
            if not weights:
                continue
            order = weights[0].positions[:, 0].argsort()
            producers, consumers, readers, others = (
                tuple(Axis(axis.parameter, axis.dim, axis.positions[order]) for axis in lying[k][role])
                for role in ROLES
            )
            one = orbit[0]
            groups.append(
                ChannelGroup(
                    size=len(orbit),
                    producers=producers,
                    consumers=consumers,
                    readers=readers,
                    others=others,
                    fixed=fixed.get(one, ""),
                    unprunable=unprunable.get(one, ""),
                    family=family[k],
                    exact=one not in inexact,
                )
            )
        return groups

    def _axes(self, channel: Tensor, fixed: dict[int, str]) -> list[tuple[str, int, Role, Tensor]]:
        """Parameter, dimension, role and labels of all that has to change with the channels."""
        axes = [(name, dim, role, labels) for (name, dim), (role, labels) in self.weights.items()]
        for name, labels in self.constants.items():
            free = [c for c in channel[labels].unique().tolist() if c not in fixed]
            varying = _varying(channel[labels])
            if len(varying) > 1:
                fixed.update(dict.fromkeys(free, f"{name} has channels along several dimensions"))
            elif free and labels.dim():
                dim = varying.pop() if varying else 0
                axes.append((name, dim, "other", labels.movedim(dim, 0).reshape(labels.shape[dim], -1)[:, 0]))
        return axes

    def _families(self, channel: Tensor, orbit_of: Tensor, unprunable: dict[int, str]) -> list[int]:
        """The family of each orbit: those that a group norm wants equally wide."""
        family = list(range(int(orbit_of.max()) + 1))
        for parts in self.equal:
            counts = [orbit_of[channel[part]].unique(return_counts=True) for part in parts]
            sizes = {tuple(sorted(times.tolist())) for _, times in counts}
            if len(sizes) > 1:
                reason = "they lie unevenly in the groups of a group norm"
                unprunable.update(dict.fromkeys(channel[torch.cat(parts)].tolist(), reason))
                continue
            by_size = [orbits[times.argsort(stable=True)].tolist() for orbits, times in counts]
            for alike in zip(*by_size, strict=True):
                ids = {family[k] for k in alike}
                family = [min(ids) if f in ids else f for f in family]
        return family


def _components(count: int, ties: Tensor) -> Tensor:
    """The lowest label that each of ``count`` labels is tied to."""
    lowest = torch.arange(count)
    while True:
        lower = lowest.clone()
        for one, other in (ties.unbind(1), ties.flip(1).unbind(1)):
            lower.scatter_reduce_(0, one, lowest[other], "amin")
            # Roots too, so that a long chain takes few rounds.
            lower.scatter_reduce_(0, lowest[one], lowest[other], "amin")
        lower = lower[lower]
        if torch.equal(lower, lowest):
            return lowest
        lowest = lower


def _reasons(events: Sequence[tuple[Tensor, str]], channel: Tensor) -> dict[int, str]:
    """The first reason given for any label of a channel."""
    return {c: reason for labels, reason in reversed(events) for c in channel[labels].view(-1).tolist()}


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _compact(labels: Tensor, keep: int = -1) -> Tensor:
    """``labels`` without the repetitions that take no memory, but for those along dimension ``keep``."""
    for d in range(labels.dim()):
        if labels.stride(d) == 0 and d != keep and labels.shape[d] > 1:
            labels = labels.narrow(d, 0, 1)
    return labels


def _varying(labels: Tensor) -> set[int]:
    """The dimensions along which labels differ."""
    labels = _compact(labels)
    sizes = enumerate(labels.shape)
    return {d for d, n in sizes if n > 1 and bool((labels != labels.narrow(d, 0, 1)).any())}


def _along(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """``labels`` [size of ``dim``] as a tensor of ``shape``."""
    return labels.view(-1, *[1] * (len(shape) - dim - 1)).expand(shape)


def _packet(node: fx.Node) -> str:
    """ "relu" for torch.ops.aten.relu.default."""
    return str(getattr(getattr(node.target, "overloadpacket", node.target), "__name__", node.target))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, in the order of the schema, with their defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(k): value for k, value in enumerate(node.args)}, **node.kwargs}
    schema = node.target._schema.arguments
    given = {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _gemm_weight(node: fx.Node) -> fx.Node | None:
    """The matrix that ``node`` multiplies by and reads nowhere else, or transposes for nodes that do."""
    name = _packet(node)
    if name in _TRANSPOSES:
        transpose: Any = node.target
        matrix = node.all_input_nodes[0]
        if matrix.meta["val"].dim() != 2 or transpose(torch.empty(2, 3), *node.args[1:]).shape != (3, 2):
            return None
        return matrix if node.users and all(_gemm_weight(user) is node for user in node.users) else None
    if name not in _GEMMS:
        return None
    matrix = _arguments(node)[_GEMMS[name]]
    one = node.args.count(matrix) == 1 and (name not in _PRODUCTS or matrix.meta["val"].dim() == 2)
    return matrix if one else None


def _place(node: fx.Node) -> str:
    """Where in the model the node is, for people."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return f", in {path}" if path else ""
