"""The ops: one file a stem with schema, shape function, reference and backends; the kernels are in csrc/."""

from .backend import (
    ACTIVATIONS,
    BackendError,
    available_isas,
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
    "available_isas",
    "block_conv2d",
    "block_conv_transpose2d",
    "block_linear",
    "default_backend",
    "dot_peak",
    "extension_error",
    "isa",
    "set_isa",
]
