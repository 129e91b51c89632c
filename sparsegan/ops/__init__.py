"""The ops: one file a stem with schema, shape function, reference and backends; the kernels are in csrc/."""

import importlib

from torch import Tensor

from ..formats import PackedWeight
from . import cuda
from .backend import (
    ACTIVATIONS,
    BackendError,
    Choice,
    available_isas,
    choice,
    default_backend,
    dot_peak,
    extension_error,
    isa,
    set_isa,
)
from .block_conv2d import block_conv2d
from .block_conv_transpose2d import block_conv_transpose2d
from .block_linear import block_linear

__all__ = [
    "ACTIVATIONS",
    "BackendError",
    "Choice",
    "available_isas",
    "block_conv2d",
    "block_conv_transpose2d",
    "block_linear",
    "cuda",
    "default_backend",
    "dot_peak",
    "explain",
    "extension_error",
    "isa",
    "set_isa",
]


def explain(op: str, x: Tensor, packed: PackedWeight | None = None, backend: str | None = None) -> Choice:
    """Which backend would run `op` ("block_linear", "block_conv2d", ...), and why the others would not; print it.

    packed: the weight, None: of whatever kind. backend: as the op has it.
    """
    # By import, because this package has functions of the same names as its modules.
    table = importlib.import_module(f".{op}", __name__).BACKENDS
    return choice(op, table, x, packed, backend)
