"""Which code runs an op: a table of backends an op, the choice between them, and the extension they come from.

The order of choice: the explicit argument, then `SPARSEGAN_BACKEND`, then the first backend that does not refuse. A backend
that was named never falls back to another: the error lists every backend and why it refused. The slow reference serves
unasked only where there are no kernels at all, because the extension is not built.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import ACTIVATIONS, PackedWeight, from_tensors, unpack

# The schemas of all ops live in Python, next to their reference; the extension adds implementations.
LIBRARY = torch.library.Library("sparsegan", "DEF")
LIBRARY.define("set_isa(str name) -> ()")
LIBRARY.define("isa() -> str")
LIBRARY.define("available_isas() -> str")
LIBRARY.define("dot_peak(ScalarType dtype, bool loads) -> float")
LIBRARY.define("cuda_architectures() -> str")
LIBRARY.define("cuda_error() -> str")

try:
    importlib.import_module("sparsegan._C")
    _EXTENSION_ERROR: str | None = None
except ImportError as error:
    _EXTENSION_ERROR = f"sparsegan._C is not built or does not load: {error}"

_ENVIRONMENT = os.environ.get("SPARSEGAN_BACKEND") or None


class BackendError(RuntimeError):
    """The wanted backend, or every backend, refuses an input."""


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    name:   what users call it.
    refuse: given x and the weight (None: of whatever kind), says why this backend cannot run them, or None.
    run:    the op, with the arguments of its schema.
    inputs: number formats that x may have.
    """

    name: str
    refuse: Callable[[Tensor, PackedWeight | None], str | None]
    run: Callable[..., Any]
    inputs: tuple[torch.dtype, ...] = (torch.float32,)


def refuse_cpu(x: Tensor, weight: PackedWeight | None) -> str | None:
    """Why the C++ kernels cannot take x and the weight, or None."""
    if _EXTENSION_ERROR is not None:
        return f"{_EXTENSION_ERROR} (install a C++ compiler and reinstall sparsegan)"
    if x.device.type != "cpu":
        return f"x is on {x.device}, the kernels run on the CPU"
    if weight is not None and weight.values.dtype == torch.float16:
        return "the weight is float16, the kernels take int8, bfloat16 and float32"
    if weight is not None and weight.metadata is not None:
        return "the weight is 2:4 packed, which only the CUDA kernels take"
    return None


def refuse_nothing(x: Tensor, weight: PackedWeight | None) -> str | None:
    return None


@dataclass(frozen=True)
class Choice:
    """What the rules above make of an input.

    chosen:  name of the backend that runs it; None: none does.
    reasons: for every backend of the op, why it cannot run it, or None.
    """

    op: str
    chosen: str | None
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = (f"  {name}: {reason or 'available'}" for name, reason in self.reasons.items())
        return "\n".join([f"{self.op}: {self.chosen or 'no backend'}", *lines])


def choice(
    op: str, table: Sequence[Backend], x: Tensor, weight: PackedWeight | None, requested: str | None = None
) -> Choice:
    """What `choose` would do, and why; nothing is run."""
    name = requested or _ENVIRONMENT
    reasons = {backend.name: backend.refuse(x, weight) for backend in table}
    chosen = next((b.name for b in table if _serves(b, name) and reasons[b.name] is None), None)
    return Choice(op, chosen, reasons)


def choose(
    op: str, table: Sequence[Backend], x: Tensor, weight: PackedWeight | None, requested: str | None
) -> Backend:
    """The backend that runs `op` on x. Raises BackendError as the module text says."""
    name = requested or _ENVIRONMENT
    for backend in table:
        if _serves(backend, name) and backend.refuse(x, weight) is None:
            if name is None and _EXTENSION_ERROR and not torch.compiler.is_compiling():
                # Python shows the same warning once.
                warnings.warn(f"running on the slow {backend.name} backend: {_EXTENSION_ERROR}", stacklevel=3)
            return backend
    _, *reasons = str(choice(op, table, x, weight, requested)).splitlines()
    wanted = f"no backend {name!r}" if name else "no backend"
    raise BackendError("\n".join([f"{op}: {wanted} can run this input", *reasons]))


def _serves(backend: Backend, name: str | None) -> bool:
    """Whether the backend is asked: by its name, or because none was named."""
    return backend.name == name if name else backend.name != "reference" or _EXTENSION_ERROR is not None


def default_backend() -> str | None:
    """The backend that `SPARSEGAN_BACKEND` names for all ops, or None."""
    return _ENVIRONMENT


def extension_error() -> str | None:
    """Why the C++ extension is missing, or None when it is loaded."""
    return _EXTENSION_ERROR


def available_isas() -> list[str]:
    """Instruction sets that this build has and this CPU runs, best first; empty without the extension."""
    return [] if _EXTENSION_ERROR else torch.ops.sparsegan.available_isas().split()


def isa() -> str | None:
    """The instruction set in use; None without the extension. Raises RuntimeError when SPARSEGAN_ISA is wrong."""
    return None if _EXTENSION_ERROR else torch.ops.sparsegan.isa()


def set_isa(name: str | None) -> None:
    """Force an instruction set of `available_isas()` in the whole process; None returns to the default.

    Raises RuntimeError for a name this machine does not have, or without the extension.
    """
    if _EXTENSION_ERROR:
        raise RuntimeError(_EXTENSION_ERROR)
    torch.ops.sparsegan.set_isa(name or "")


def dot_peak(dtype: torch.dtype = torch.int8, loads: bool = False) -> float:
    """Giga multiply-adds a second that the dot-product instruction of `dtype` reaches on all threads from registers.

    The ceiling of the kernels, measured now (about 10 ms); 0.0 without the extension. dtype: int8, bfloat16 or float32.
    loads: on AMX int8, with the loads of tiles that four sums in registers need, weights from L2; elsewhere no difference.
    """
    return 0.0 if _EXTENSION_ERROR else torch.ops.sparsegan.dot_peak(dtype, loads)


def check_input(op: str, x: Tensor, dims: int, in_channels: int, backend: Backend) -> None:
    """Raise ValueError or TypeError unless x has a dtype of the backend, `dims` dimensions and the weight's channels."""
    if x.dtype not in backend.inputs:
        wanted = " or ".join(map(str, backend.inputs))
        raise TypeError(f"{op}: x is {x.dtype}, wanted {wanted}; call x.float()")
    layout = "[N, C, H, W]" if dims == 4 else "[..., C]"
    if (dims == 4 and x.dim() != 4) or x.dim() < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, wanted {layout}")
    channels = x.shape[1] if dims == 4 else x.shape[-1]
    if channels != in_channels:
        raise ValueError(
            f"{op}: x has {channels} channels (shape {tuple(x.shape)}), the weight takes {in_channels}"
        )


def quantize_input(x: Tensor, values: Tensor, x_scale: float, x_zero: int) -> Tensor:
    """x as the kernels see it, in float64: for int8 whole numbers with the zero point already taken off."""
    if values.dtype == torch.int8:
        inverse = torch.tensor(1.0 / x_scale, dtype=torch.float32, device=x.device)
        steps = torch.nan_to_num(x * inverse, nan=-float(x_zero), posinf=255.0, neginf=-255.0)
        return torch.round(steps.clamp(-float(x_zero), 255.0 - float(x_zero))).double()
    return x.to(values.dtype).double()


def finish(acc: Tensor, scale: Tensor, bias: Tensor, activation: str, slope: float, dim: int) -> Tensor:
    """act(acc * scale + bias) in float32, rounded once as the kernels do; the channels of acc are dimension `dim`."""
    shape = [-1 if i == dim else 1 for i in range(acc.dim())]
    y = (acc.float().double() * scale.double().view(shape) + bias.double().view(shape)).float().contiguous()
    return activate(y, activation, slope)


def activate(y: Tensor, activation: str, slope: float) -> Tensor:
    """One of ACTIVATIONS on float32 y; slope is that of leaky_relu. gelu is the exact one, by erf."""
    match activation:
        case "none":
            return y
        case "relu":
            return torch.relu(y)
        case "leaky_relu":
            return torch.where(y > 0, y, y * torch.tensor(slope, dtype=torch.float32))
        case "tanh":
            return torch.tanh(y)
        case "sigmoid":
            return torch.sigmoid(y)
        case "silu":
            return F.silu(y)
        case "gelu":
            return F.gelu(y)
    raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")


def dense_weight(weight: Sequence[Tensor], in_channels: int, taps: int) -> Tensor:
    """The packed weight as float64 [O, T, C], taps in position order."""
    return unpack(from_tensors(weight, in_channels, taps)).double()


def new_output(x: Tensor, *shape: int) -> Tensor:
    """For shape functions: what an op returns on the device of x; images are channels_last on CUDA."""
    images = len(shape) == 4 and x.device.type == "cuda"
    return x.new_empty(shape).to(memory_format=torch.channels_last) if images else x.new_empty(shape)
