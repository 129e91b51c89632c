"""What each number format of the weights costs in quality and saves in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsegan.formats import pack
from sparsegan.patterns import PRUNABLE_TYPES, PrunableLayer, weight_view
from sparsegan.quantize import Scheme, quantized_copy
from sparsegan.swap.dense import Judge, dense_copy, relative_error

# Each kind with 8, 6 and 4 bits.
SCHEMES = tuple(Scheme(kind, bits) for kind in ("fixed", "affine", "symmetric") for bits in (8, 6, 4))


@dataclass(frozen=True)
class FormatResult:
    """Weights of all layers in one number format, everything else in float32.

    scheme:       "float32", or the kind of a `Scheme`, with p where that is fixed. bits: of a weight.
    weight_error: root mean square of what rounding changes in the weights, relative to that of the weights.
    psnr:         dB of the outputs to those in float32, over their range; of several outputs the worst. +inf: equal.
    weight_bytes: of the weights in blocks that are not all zero, without gaps, and of their scales. Where blocks lie takes the
                  same in all formats and is left out. Files hold 8 and 4 symmetric bits so; 6 would need 8 there.
    """

    scheme: str
    bits: int
    weight_error: float
    psnr: float
    weight_bytes: int


def compare_formats(
    model: nn.Module, inputs: tuple[Any, ...], schemes: Sequence[Scheme] = SCHEMES
) -> list[FormatResult]:
    """The error and size of each scheme for the Linear, Conv2d and ConvTranspose2d of `model`, float32 first.

    model: in eval mode; it is not changed. Batch norms are folded into the weights before, as `swap_to_sparse` does, and
    masks made permanent. inputs: positional, of the model. Raises ValueError for a model in training mode or without such
    layers, and for weights that hold NaN or infinite values.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    with torch.no_grad():
        dense = dense_copy(model, inputs).model
        layers = _layers(dense)
        if not layers:
            raise ValueError(
                "the model has no Linear, Conv2d or ConvTranspose2d whose formats could be compared"
            )
        wanted = [weight_view(layer) for layer in layers]
        judge = Judge(dense, inputs, [inputs])
        whole = sum(4 * _values(layer) for layer in layers)
        results = [FormatResult("float32", 32, 0.0, float("inf"), whole)]
        for scheme in schemes:
            rounded = quantized_copy(dense, scheme)
            got = _layers(rounded)
            error = relative_error([weight_view(layer) for layer in got], wanted)
            sizes = (scheme.nbytes(_values(layer), len(weight_view(layer))) for layer in got)
            psnr = judge.quality(rounded).psnr
            results.append(FormatResult(str(scheme), scheme.bits, error, psnr, sum(sizes)))
    return results


def _layers(model: nn.Module) -> list[PrunableLayer]:
    return [cast(PrunableLayer, module) for module in model.modules() if isinstance(module, PRUNABLE_TYPES)]


def _values(layer: PrunableLayer) -> int:
    """Weights in the blocks that are kept, zeros among them included."""
    view: Tensor = weight_view(layer).float()
    return pack(view, groups=1 if isinstance(layer, nn.Linear) else layer.groups).values.numel()
