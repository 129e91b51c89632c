"""Measuring a compressed model: what it costs, and how near it comes to the dense one.

Three errors are kept apart: that of pruning (pruned float32 against dense), of int8 (swapped against pruned)
and of the kernels (against the reference backend, same packed weights). The last comes before any time.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsegan.formats import nbytes
from sparsegan.layers import SparseLayer, SparseProgram
from sparsegan.metrics import psnr
from sparsegan.patterns import PRUNABLE_TYPES, PrunableLayer
from sparsegan.prune.distill import SampleInputs
from sparsegan.swap import explain, race

# Largest difference between kernels and reference, relative to the largest output. int8 sums are exact, which
# leaves the rounding of float32 sums and of tanh. Where what differs by that is rounded again, to bfloat16 or to a
# step of int8, it may differ by such a step. The differences of several such places are independent and add in squares:
# from `_FEW` of them on the limit grows by their square root.
_EXACT, _ROUNDED_AGAIN = 1e-3, 3e-2
_FEW = 8
# Some networks go further: with random weights each of 30 normalisations carries on and widens what the one before did.
# That shows in the reference alone: its inputs are moved by this share, far less than a step of int8, and kernels may differ
# as much as its outputs then do, and half as much again, as they round otherwise in every layer. Nothing can be told of
# kernels beyond `_TOO_FAR`.
_NUDGE, _MARGIN, _TOO_FAR = 1e-4, 1.5, 0.25
_EXACT_ACTIVATIONS = ("none", "relu", "leaky_relu")


class WrongKernelError(RuntimeError):
    """Kernels gave other numbers than the reference backend."""


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of one call at a batch size, dense and sparse taking turns."""

    batch: int
    dense_ms: float
    sparse_ms: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.sparse_ms


@dataclass(frozen=True)
class LayerResult:
    """One layer.

    psnr compares the output of the pruned layer with that of the dense one at the same latents, over the range of the
    dense one, in dB; NaN for a layer that became narrower.
    """

    name: str
    kind: str
    swapped: bool
    why: str
    pattern: str
    density: float
    dtype: str
    dense_bytes: int
    sparse_bytes: int
    psnr: float


@dataclass(frozen=True)
class ModelResult:
    """A whole model.

    removed:          share of the multiply-adds whose weight is zero.
    compress_seconds: pruning, distilling and swapping together.
    psnr (dB), ssim:  the swapped model's images against the dense ones at the same latents, mean.
    psnr_pruned:      the same for the pruned float32 model, before int8.
    psnr_swapped:     the swapped model against the pruned float32 one: the error of int8 alone.
                      A PSNR is +inf when nothing differs.
    kernel_error:     difference to the reference backend, see `check_kernels`.
    """

    name: str
    removed: float
    steps: int
    compress_seconds: float
    dense_bytes: int
    sparse_bytes: int
    file_bytes: int
    psnr: float
    ssim: float
    psnr_pruned: float
    psnr_swapped: float
    kernel_error: float
    speeds: list[Speed]
    layers: list[LayerResult]

    def to_json(self) -> dict[str, Any]:
        """Everything, and the speed-ups, as JSON types; see `finite`."""
        fields = asdict(self)
        for speed, entry in zip(self.speeds, fields["speeds"], strict=True):
            entry["speedup"] = speed.speedup
        return cast(dict[str, Any], finite(fields))


def finite(value: Any) -> Any:
    """`value`, of dicts, lists and plain values, with None for numbers that JSON does not have: the PSNR of equal images."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_kernels(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Run `model` with its own backend and with the reference one: the difference of the outputs.

    The largest one, relative to the largest output of the reference. Where a program rounds what it computed inexactly
    (normalisation, tanh), one step more or less is carried on by every layer after it: there it is the root mean
    square, relative to that of the reference. Raises WrongKernelError when that is more than rounding, and more than
    what next to nothing in the inputs does to the reference.
    """
    reference = with_reference_backend(model)
    with torch.no_grad():
        got, wanted = model(*inputs).double(), reference(*inputs).double()
    rounded_again = sum(map(_rounded_again, model.modules()))
    limit = _ROUNDED_AGAIN * max(rounded_again / _FEW, 1) ** 0.5 if rounded_again else _EXACT
    if limit > _EXACT:
        error = _distance(got, wanted)
        if not error <= limit:
            moved = [x * (1 + _NUDGE) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
            with torch.no_grad():
                limit = max(limit, min(_MARGIN * _distance(reference(*moved).double(), wanted), _TOO_FAR))
    else:
        error = (got - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-30)
    if not error <= limit:  # NaN is wrong too
        raise WrongKernelError(
            f"the kernels differ from the reference by {error:.2g} of its outputs (rounding is "
            f"at most {limit:.2g}), and no speed is reported for wrong numbers. Please report this; "
            "SPARSEGAN_BACKEND=reference works meanwhile, slowly"
        )
    return error


def _distance(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative to that of ``wanted``."""
    return ((got - wanted).square().mean() / wanted.square().mean().clamp_min(1e-60)).sqrt().item()


def with_reference_backend(model: nn.Module) -> nn.Module:
    """A copy of a swapped model that runs on the reference backend."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch 2.13 has one about itself when a graph is copied
        reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, SparseLayer | SparseProgram):
            module.backend = "reference"
    return reference


def _rounded_again(module: nn.Module) -> int:
    """How many times a layer or program rounds what it computed inexactly."""
    if isinstance(module, SparseLayer):
        return int(module.dtype == torch.bfloat16)
    if not isinstance(module, SparseProgram):
        return 0
    slots = module.program.slots
    count = 0
    for step in module.program.steps:
        bf16 = step.weight is not None and step.weight.values.dtype == torch.bfloat16
        acts = [step.act, step.post_act, *(store.act for store in step.stores)]
        inexact = step.norm is not None or any(act.name not in _EXACT_ACTIVATIONS for act in acts)
        narrow = any(store.slot >= 0 and slots[store.slot].format != "f32" for store in step.stores)
        count += bf16 or (inexact and narrow)
    return count


def measure_speed(
    dense: nn.Module,
    sparse: nn.Module,
    sample_inputs: SampleInputs,
    batches: Sequence[int] = (1, 16),
    seconds: float = 3.0,
) -> list[Speed]:
    """Time both models in turn, about `seconds` for each batch size; `check_kernels` comes first."""
    speeds = []
    with torch.no_grad():
        for batch in batches:
            inputs = sample_inputs(batch, torch.Generator().manual_seed(batch))
            speeds.append(Speed(batch, *race([partial(dense, *inputs), partial(sparse, *inputs)], seconds)))
    return speeds


def mean_psnr(images: Tensor, reference: Tensor) -> float:
    """PSNR in dB of images [N, C, H, W] in [-1, 1], mean over the batch; +inf when all are equal."""
    return psnr(images, reference).mean().item()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def layer_results(
    dense: nn.Module, pruned: nn.Module, swapped: nn.Module, inputs: tuple[Any, ...]
) -> list[LayerResult]:
    """One row for every Linear, Conv2d and ConvTranspose2d.

    dense, pruned: models of the same structure. swapped: what `swap_to_sparse` made of `pruned`.
    """
    sizes = _packed_bytes(swapped)
    wanted, got = _layer_outputs(dense, inputs), _layer_outputs(pruned, inputs)
    results = []
    for row in explain(swapped).rows:
        dense_bytes = model_bytes(pruned.get_submodule(row.name))
        results.append(
            LayerResult(
                name=row.name,
                kind=row.kind,
                swapped=row.swapped,
                why=row.why,
                pattern=row.pattern,
                density=row.density,
                dtype=row.dtype,
                dense_bytes=dense_bytes,
                sparse_bytes=sizes[row.name] if row.swapped else dense_bytes,
                psnr=_psnr_over_range(got[row.name], wanted[row.name]),
            )
        )
    return results


def _packed_bytes(model: nn.Module) -> Counter[str]:
    """Bytes of the packed weights by the name of the layer, which a program may use more than once."""
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            sizes[name] += nbytes(module.packed)
        elif isinstance(module, SparseProgram):
            for step in module.program.steps:
                sizes[step.name] += nbytes(step.weight) if step.weight else 0
    return sizes


def _layer_outputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """What each layer gives in one run. Copied, because activations may work in place."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: outputs.update({name: output.clone()})

    layers: dict[str, PrunableLayer] = {
        name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE_TYPES)
    }
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _psnr_over_range(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:  # a narrower layer: its channels have no counterparts
        return math.nan
    low, high = wanted.aminmax()
    return (10 * torch.log10((high - low) ** 2 / (got - wanted).square().mean())).item()
