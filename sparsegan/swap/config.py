"""What the user wants of a swap, checked, with the data there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparsegan.patterns import Pattern, parse_pattern
from sparsegan.quantize.affine import check_weight_bits

Wanted = Literal["auto", "int8", "f16", "bf16", "f32"]
Dtype = Literal["int8", "int4", "f16", "bf16", "f32"]  # "int4": int8 with weights of 4 bits
DTYPES: dict[Dtype, torch.dtype] = {
    "int8": torch.int8,
    "int4": torch.int8,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
}


@dataclass(frozen=True)
class SwapConfig:
    """How `swap_to_sparse` chooses.

    dtype:       "int8", "bf16" or "f32" (CPU only) or "f16" (CUDA only); "auto" is int8 when there is data to calibrate
                 with, else f32, on CUDA f16.
    min_psnr:    dB that an int8 model must keep, with the calibration batches, against the float32 model with
                 the same zeros, over the range of its outputs; where it does not, layers fall to bf16 until it
                 does. None accepts whatever int8 gives. Layers that are swapped one by one are not measured.
    backend:     name of the backend to use; None takes the first that can.
    pattern:     the pattern that the zeros follow, such as "8x4"; a layer whose zeros do not follow it stays
                 dense. None detects it.
    min_speedup: the model is swapped when it becomes at least this many times as fast; 0 swaps whatever can be.
    calibration: batches for the int8 ranges, a tuple of positional inputs each; None takes example_inputs.
    percentile:  the int8 ranges leave out the (100 - percentile) % furthest out on each side, see
                 `quantize.calibrate`; None keeps the extremes.
    layers:      names of the layers to consider; None considers all.
    programs:    whether the whole model may become programs, which run on the CPU only. False swaps layers one by one,
                 so that the model can be moved to CUDA later.
    weight_bits: of the weights of int8 layers: 8, or 4, integers in -7..7, which run as fast and take half the bytes in files.
                 Who asks for 4 gets 4: no layer falls to bf16 then, whatever min_psnr is; `explain` tells the PSNR.
    """

    dtype: Wanted = "auto"
    min_psnr: float | None = 40.0
    backend: str | None = None
    pattern: str | Pattern | None = None
    min_speedup: float = 1.0
    calibration: Sequence[tuple[Any, ...]] | None = None
    percentile: float | None = None
    layers: Sequence[str] | None = None
    programs: bool = True
    weight_bits: Literal[8, 4] = 8

    def __post_init__(self) -> None:
        if self.calibration is not None:  # a generator would be used up by the first swap
            object.__setattr__(self, "calibration", tuple(self.calibration))


@dataclass(frozen=True)
class Request:
    """A config with the choices made that are left to us.

    inputs:  to time on; None: there are none, and no batches either.
    batches: to calibrate with and to judge the numbers by.
    no_programs: why the model cannot become programs, or None.
    """

    dtype: Dtype
    min_psnr: float | None
    backend: str | None
    pattern: Pattern | None
    min_speedup: float
    percentile: float | None
    layers: Sequence[str] | None
    inputs: tuple[Any, ...] | None
    batches: Sequence[tuple[Any, ...]]
    no_programs: str | None


def resolve(config: SwapConfig, example_inputs: tuple[Any, ...] | None, on_cuda: bool = False) -> Request:
    """on_cuda: where the model is. Raises ValueError and TypeError for what makes no sense; see `swap_to_sparse`."""
    if not config.min_speedup >= 0:
        raise ValueError(f"min_speedup must be a number >= 0, got {config.min_speedup}")
    if config.min_psnr is not None and math.isnan(config.min_psnr):
        raise ValueError("min_psnr must be a number of dB, or None; got nan")
    batches = _batches(config, example_inputs)
    pattern = parse_pattern(config.pattern) if isinstance(config.pattern, str) else config.pattern
    return Request(
        dtype=(dtype := _dtype(config, bool(batches), on_cuda)),
        min_psnr=config.min_psnr,
        backend=config.backend,
        pattern=pattern,
        min_speedup=config.min_speedup,
        percentile=config.percentile,
        layers=config.layers,
        inputs=example_inputs if example_inputs is not None else batches[0] if batches else None,
        batches=batches,
        no_programs=_no_programs(config, dtype, on_cuda),
    )


def _no_programs(config: SwapConfig, dtype: Dtype, on_cuda: bool) -> str | None:
    if on_cuda:
        return "programs for whole models run on the CPU only"
    if dtype == "f16":
        return "programs have no float16"
    return None if config.programs else "SwapConfig.programs is False"


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


def _dtype(config: SwapConfig, data: bool, on_cuda: bool) -> Dtype:
    if config.dtype not in get_args(Wanted):
        raise ValueError(f"dtype must be {', '.join(map(repr, get_args(Wanted)))}, got {config.dtype!r}")
    check_weight_bits(config.weight_bits)
    dtype: Dtype = config.dtype if config.dtype != "auto" else "int8" if data else "f16" if on_cuda else "f32"
    if config.dtype == "int8" and not data:
        raise ValueError("int8 needs data to calibrate with: give example_inputs or SwapConfig.calibration")
    if config.weight_bits == 8:
        return dtype
    if dtype != "int8":
        raise ValueError(
            f"weight_bits=4 is for int8 layers, and the number format would be {dtype!r}: take dtype='int8', which needs "
            "example_inputs or SwapConfig.calibration"
        )
    return "int4"
