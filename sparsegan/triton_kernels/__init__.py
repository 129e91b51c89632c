"""The ops as Triton kernels, for CUDA devices (own).

Importing this needs no Triton. `unavailable` looks for it, registers `torch.ops.sparsegan_triton` and says what is missing.
Tested with Triton 3.7.1 beside torch 2.13.0, tried with 3.9.0, on machines without a GPU; never run on hardware.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..formats import BLOCKS, PackedWeight
from .layers import block_conv2d, block_conv_transpose2d, block_linear

__all__ = [
    "autotune",
    "block_conv2d",
    "block_conv_transpose2d",
    "block_linear",
    "describe",
    "refuse",
    "unavailable",
]

OLDEST = (3, 7)  # older ones were not tried
OLDEST_CAPABILITY = (8, 0)


@cache
def _load() -> tuple[str | None, str | None]:
    """Register the ops. Returns (version of Triton, why there are none)."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed (pip install triton)"
    version = None
    try:
        version = str(importlib.import_module("triton").__version__)
        if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST:
            return version, f"triton {version} is too old, wanted {'.'.join(map(str, OLDEST))} or later"
        importlib.import_module(".ops", __name__)
    except Exception as error:  # a broken installation shall not take the other backends along
        return version, f"triton does not load: {type(error).__name__}: {error}"
    return version, None


def _constant(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """torch.compiler.assume_constant_result, which would import Dynamo now: called once, while a model is traced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def unavailable() -> str | None:
    """Why the Triton kernels cannot be used in this process, whatever the device, or None."""
    return _load()[1]


def describe() -> str:
    """One line for people: the version of Triton, or why there are no Triton kernels."""
    version, reason = _load()
    return reason or f"triton {version}"


@_constant
def _refuse_device(index: int) -> str | None:
    if not torch.cuda.is_available():
        return None  # a fake tensor: there is nothing to run, only to trace
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    return (
        f"cuda:{index} has compute capability {'.'.join(map(str, capability))}, the kernels need 8.0 or later"
    )


def refuse(x: Tensor, weight: PackedWeight | None) -> str | None:
    """Why the Triton kernels cannot take x and the weight (None: of whatever kind), or None."""
    if reason := unavailable():
        return reason
    if x.device.type != "cuda":
        return f"x is on {x.device}, the kernels run on CUDA devices"
    if reason := _refuse_device(x.device.index or 0):
        return reason
    if weight is None:
        return None
    if weight.values.device != x.device:
        return f"x is on {x.device}, the weight on {weight.values.device}"
    if weight.metadata is not None:
        return "the weight is 2:4 packed, which only the CUDA C++ kernels take"
    known = BLOCKS["cuda"].get(weight.values.dtype, {})
    if weight.block not in known:
        dtype = str(weight.values.dtype).removeprefix("torch.")
        wanted = ", ".join(f"{bo}x{bk}" for bo, bk in known) or "int8, float16 or bfloat16"
        return f"the weight has {dtype} blocks of {weight.block[0]}x{weight.block[1]}, wanted {wanted}"
    return None


def autotune(on: bool) -> None:
    """Whether every new shape is measured on the GPU in each tile of `configs.TILES` before it runs; else a default is taken.

    Raises RuntimeError without Triton.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    importlib.import_module(".ops", __name__).autotune(on)
