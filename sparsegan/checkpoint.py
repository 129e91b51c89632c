"""Save a swapped model in one safetensors file and load it again: no pickle, no user code, nothing trusted.

The tensors stand under their names in state_dict; the metadata holds the tree of modules, or the graph, as JSON, and a
SHA-256 of tree and tensors, against damage (not forgery: whoever can write a file can write its checksum).
Because loading must not need the user's classes, a model can be saved when it is built of the modules below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, fx, nn

from sparsegan.files import write_atomically
from sparsegan.formats import FIELDS, from_dict, narrowed
from sparsegan.graph_file import build_graph, describe_graph
from sparsegan.layers import SPARSE_TYPES, SparseLayer, SparseProgram
from sparsegan.ops import BackendError, cuda
from sparsegan.swap import Explanation, LayerRow

FORMAT, VERSION = "sparsegan", "3"
_READABLE = ("1", "2", VERSION)  # 1 has no graphs; in 2, programs share no tensors

_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")

# The modules of torch.nn that can be saved, each with the arguments that make it again: attributes of the
# same name; `bias` is saved as whether there is one.
_DENSE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv2d: (*_CONVOLUTION, "bias"),
    nn.ConvTranspose2d: (*_CONVOLUTION, "output_padding", "bias"),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.InstanceNorm2d: _BATCH_NORM,
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.PReLU: ("num_parameters",),
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.SiLU: ("inplace",),
    nn.Hardswish: ("inplace",),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.GELU: ("approximate",),
    nn.Softplus: ("beta", "threshold"),
    nn.Tanh: (),
    nn.Sigmoid: (),
    nn.Identity: (),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
    nn.UpsamplingNearest2d: ("size", "scale_factor"),
    nn.PixelShuffle: ("upscale_factor",),
    nn.ReflectionPad2d: ("padding",),
    nn.ReplicationPad2d: ("padding",),
    nn.ZeroPad2d: ("padding",),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AdaptiveAvgPool2d: ("output_size",),
}
_DENSE_BY_NAME = {kind.__name__: kind for kind in _DENSE}
_SPARSE_BY_NAME = {kind.__name__: kind for kind in SPARSE_TYPES.values()}
# What hostile JSON makes constructors and look-ups raise.
_NONSENSE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def save(model: nn.Module, path: str | Path) -> None:
    """Write `model` to one safetensors file that `load` reads back.

    It must be a graph as `swap_to_sparse` makes it, or be built of nn.Sequential, sparse layers and the modules of
    torch.nn that generators use. Raises ValueError, naming the module or the operator, for any other and for one
    with forward hooks; OSError when there is no room, and what was there before is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    content: dict[str, Any] = {"model": _describe("", model, tensors)}
    explanation = getattr(model, "swap_explanation", None)
    if isinstance(explanation, Explanation):
        content["explanation"] = asdict(explanation)
    text = json.dumps(content)
    metadata = {"format": FORMAT, "version": VERSION, "content": text, "sha256": _digest(text, tensors)}
    # save_file would make a file that only its owner may read.
    write_atomically(Path(path), save_tensors(tensors, metadata))


def load(path: str | Path, backend: str | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """The model that `save` wrote, in eval mode.

    backend: name of the backend of the sparse layers; None takes the first that can.
    device:  where to put it. Weights are packed anew for the blocks that the kernels there take.

    Raises BackendError when nothing can run on that device; ValueError for a model whose zeros do not fit its blocks
    (the text says which pattern to prune with), for one of programs, which run on the CPU only, and for a file that
    is truncated, altered, of another version or not ours, or that describes what a kernel must not be given;
    FileNotFoundError when there is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not one that sparsegan.save wrote")
            if metadata.get("version") not in _READABLE:
                came, known = metadata.get("version"), ", ".join(_READABLE)
                raise ValueError(f"{path} has format version {came}, this sparsegan reads {known}: update it")
            # Cloned: the tensors of an open file lie where they fall in memory, unaligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    text = metadata.get("content", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise ValueError(f"{path} is damaged: its checksum does not match its content")
    try:
        content = json.loads(text)
        model = _build(content["model"], "", tensors, backend)
        if tensors:
            raise ValueError(f"tensors that belong to no module: {', '.join(tensors)}")
        if "explanation" in content:
            model.swap_explanation = _explanation(content["explanation"])  # type: ignore[assignment]
    except _NONSENSE as error:
        raise ValueError(f"{path} describes no model that can be loaded: {error}") from error
    model.eval().requires_grad_(False)
    return model if torch.device(device).type == "cpu" else _moved(model, torch.device(device))


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"cannot load on {device}: {cuda.unavailable() or 'torch sees no CUDA device'}")
    _fit(model, device.type)
    return model.to(device)


def _fit(model: nn.Module, device: str) -> None:
    """Pack the sparse layers for the kernels of a device. Raises ValueError, naming the layer, for one that does not fit."""
    for name, module in model.named_modules():
        if isinstance(module, SparseProgram):
            raise ValueError(
                f"the model has programs, which run on the CPU only: for {device}, swap with SwapConfig(programs=False)"
            )
        if isinstance(module, SparseLayer):
            try:
                module.repack(device)
            except ValueError as error:
                raise ValueError(f"layer {name or '(the model)'} does not fit {device}: {error}") from None


def _describe(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The JSON of a module; its tensors are added to `tensors`."""
    where = f"the module {name or '(the model itself)'} of type {type(module).__name__}"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(f"{where} has forward hooks or a forward of its own, which cannot be saved")
    if type(module).forward is nn.Sequential.forward:
        children = [
            (child, _describe(f"{name}.{child}" if name else child, part, tensors))
            for child, part in module._modules.items()
            if part is not None
        ]
        return {"type": "Sequential", "children": children}
    if isinstance(module, fx.GraphModule):
        graph, held = describe_graph(module)
        for key, tensor in held.items():
            tensors[f"{name}.{key}" if name else key] = tensor.detach().cpu().contiguous().clone()
        return graph
    sparse = module if isinstance(module, SparseLayer) and type(module).__name__ in _SPARSE_BY_NAME else None
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    for key, tensor in own.items():
        kept = tensor if sparse is None else narrowed(key, tensor)
        tensors[f"{name}.{key}" if name else key] = kept.detach().cpu().contiguous().clone()
    if sparse is not None:
        sizes = {"in_channels": sparse.in_channels, "taps": sparse.taps}
        return {"type": type(module).__name__, "settings": sparse.settings(), **sizes}
    if type(module) not in _DENSE:
        raise ValueError(
            f"{where} cannot be saved: a file must load without your code. Save the nn.Sequential inside "
            f"your model, with masks made permanent. Known are {', '.join(sorted(_DENSE_BY_NAME))}"
        )
    settings = {key: getattr(module, key) for key in _DENSE[type(module)]}
    if "bias" in settings:
        settings["bias"] = module.bias is not None
    return {"type": type(module).__name__, "settings": settings}


def _build(spec: Mapping[str, Any], name: str, tensors: dict[str, Tensor], backend: str | None) -> nn.Module:
    """The module that `spec` describes; the tensors it takes are removed from `tensors`."""
    kind = spec["type"]
    if kind == "Sequential":
        parts = [
            (child, _build(part, f"{name}.{child}" if name else child, tensors, backend))
            for child, part in spec["children"]
        ]
        sequential = nn.Sequential()
        for child, part in parts:
            sequential.add_module(child, part)
        return sequential

    def take(key: str) -> Tensor:
        full = f"{name}.{key}" if name else key
        if full not in tensors:
            raise ValueError(f"the tensor {full} is missing")
        return tensors.pop(full)

    if kind == "Graph":
        return build_graph(spec, take, backend)
    settings = {key: _tupled(value) for key, value in spec["settings"].items()}
    if kind in _SPARSE_BY_NAME:
        halved = f"{name}.metadata" if name else "metadata"
        weight = {field: take(field) for field in (*FIELDS, *(["metadata"] if halved in tensors else []))}
        packed = from_dict(weight, spec["in_channels"], spec["taps"])
        return _SPARSE_BY_NAME[kind](packed, backend=backend, **settings)
    if kind not in _DENSE_BY_NAME:
        raise ValueError(f"unknown module type {kind!r}")
    allowed = _DENSE[_DENSE_BY_NAME[kind]]
    if set(settings) != set(allowed):
        raise ValueError(
            f"{kind} takes {', '.join(allowed) or 'nothing'}, got {', '.join(settings) or 'nothing'}"
        )
    # On the meta device nothing is allocated, whatever sizes the file claims; the shapes are then those that
    # the tensors must have.
    with torch.device("meta"):
        module = _DENSE_BY_NAME[kind](**settings)
    module.requires_grad_(False)
    state = {key: take(key) for key in module.state_dict()}
    for key, wanted in module.state_dict().items():
        if state[key].is_floating_point() != wanted.is_floating_point():
            raise ValueError(f"{name}.{key} is {state[key].dtype}, wanted a type like {wanted.dtype}")
    module.load_state_dict(state, assign=True)
    return module


def _explanation(fields: Mapping[str, Any]) -> Explanation:
    rows = tuple(LayerRow(**row) for row in fields["rows"])
    explanation = Explanation(**{**fields, "rows": rows})
    str(explanation)  # what cannot be printed is not one of ours
    return explanation


def _tupled(value: Any) -> Any:
    """JSON has lists where torch.nn has tuples."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
