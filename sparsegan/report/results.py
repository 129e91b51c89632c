"""Measuring a compressed model: what it costs, and how near it comes to the dense one.

Three errors are kept apart: that of pruning (pruned float32 against dense), of int8 (swapped against pruned)
and of the kernels (against the reference backend, same packed weights). The last comes before any time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsegan.formats import nbytes, tap_order, unpack
from sparsegan.fuse import with_weight
from sparsegan.layers import SparseChain, SparseLayer
from sparsegan.metrics import psnr
from sparsegan.patterns import PRUNABLE_TYPES, PrunableLayer, from_weight_view
from sparsegan.prune.distill import SampleInputs
from sparsegan.swap import explain, race

# Largest difference between kernels and reference, relative to the largest output. int8 sums are exact, which
# leaves the rounding of float32 sums and of tanh; bfloat16 activations are rounded again in every layer.
_KERNEL_TOLERANCE = {torch.int8: 1e-3, torch.float32: 1e-3, torch.bfloat16: 3e-2}

_ACTIVATION_MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


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

    Times are of the layer alone, as measured when it was swapped (batch 1). psnr compares the output of the
    pruned layer with that of the dense one at the same latents, over the range of the dense one, in dB.
    """

    name: str
    kind: str
    swapped: bool
    why: str
    pattern: str
    density: float
    dtype: str
    dense_ms: float | None
    sparse_ms: float | None
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
    kernel_error:     largest difference to the reference backend, relative to the largest output.
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
    """Run `model` with its own backend and with the reference one: the largest difference of the outputs.

    Relative to the largest output of the reference. Raises WrongKernelError when that is more than rounding.
    """
    sparse = [module for module in model.modules() if isinstance(module, SparseLayer)]
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, SparseLayer):
            module.backend = "reference"
    with torch.no_grad():
        got, wanted = model(*inputs).double(), reference(*inputs).double()
    error = (got - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-30)
    limit = max((_KERNEL_TOLERANCE[layer.dtype] for layer in sparse), default=0.0)
    if not error <= limit:  # NaN is wrong too
        raise WrongKernelError(
            f"the kernels differ from the reference by {error:.2g} of the largest output (rounding is "
            f"at most {limit:.2g}), and no speed is reported for wrong numbers. Please report this; "
            "SPARSEGAN_BACKEND=reference works meanwhile, slowly"
        )
    return error


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
    packed = iter([module.packed for module in swapped.modules() if isinstance(module, SparseLayer)])
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
                dense_ms=row.before_ms,
                sparse_ms=row.after_ms,
                dense_bytes=dense_bytes,
                sparse_bytes=nbytes(next(packed)) if row.swapped else dense_bytes,
                psnr=_psnr_over_range(got[row.name], wanted[row.name]),
            )
        )
    return results


def dense_counterpart(model: nn.Module) -> nn.Module:
    """A copy of a swapped model with plain torch.nn layers in place of the sparse ones: what it has to beat.

    The weights are those the sparse layers stand for (int8 ones dequantised), zeros included; inputs and
    activations are float32.
    """
    return _densified(copy.deepcopy(model))


def _densified(module: nn.Module) -> nn.Module:
    if isinstance(module, SparseLayer):
        return _dense_layer(module)
    for name, child in module.named_children():
        setattr(module, name, _densified(child))
    return nn.Sequential(*module.children()) if isinstance(module, SparseChain) else module


def _dense_layer(layer: SparseLayer) -> nn.Sequential:
    """The dense layer, and its activation."""
    packed, geometry, groups = layer.packed, layer.geometry, layer.groups
    weight_scale = packed.scale / layer.x_scale if layer.dtype == torch.int8 else packed.scale
    view = unpack(packed).float() * weight_scale[:, None, None]
    # Groups are packed as a block-diagonal weight; the diagonal is what the dense layer holds.
    grouped = view.unflatten(2, (groups, -1)).unflatten(0, (groups, -1))
    view = grouped.diagonal(dim1=0, dim2=3).movedim(-1, 0).flatten(0, 1)
    if layer.DENSE is nn.ConvTranspose2d:
        order = tap_order(*(geometry[name] for name in ("kernel_size", "stride", "padding", "dilation")))
        view = view[:, torch.tensor(order).argsort()]
    settings: dict[str, Any] = dict(geometry) if layer.DENSE is nn.Linear else {**geometry, "groups": groups}
    template = layer.DENSE(layer.in_channels, layer.out_channels, device="meta", **settings).eval()
    dense = cast(nn.Module, with_weight(template, from_weight_view(template, view), packed.bias))
    if layer.activation == "none":
        return nn.Sequential(dense)
    if layer.activation == "leaky_relu":
        return nn.Sequential(dense, nn.LeakyReLU(layer.slope))
    return nn.Sequential(dense, _ACTIVATION_MODULES[layer.activation]())


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
    low, high = wanted.aminmax()
    return (10 * torch.log10((high - low) ** 2 / (got - wanted).square().mean())).item()
