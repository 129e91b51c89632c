"""Zeros that stay zero: a mask held by a parametrization of the layer's weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparsegan.patterns import PrunableLayer


class Mask(nn.Module):
    """Zero the weights where ``mask`` (bool buffer, shaped as the weight) is False.

    The original is masked at every use, so no optimiser, momentum or weight decay can bring a zero back.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        # `where` rather than a product: a masked original that became inf or NaN must still give zero.
        return torch.where(self.mask, weight, 0.0)


def find_mask(layer: nn.Module) -> Mask | None:
    """The `Mask` on the weight of ``layer``, if it has one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((m for m in layer.parametrizations["weight"] if isinstance(m, Mask)), None)  # type: ignore


def set_mask(layer: PrunableLayer, mask: Tensor) -> None:
    """Mask the weight of ``layer`` by ``mask`` (bool, shaped as the weight); what was masked stays masked."""
    if (present := find_mask(layer)) is not None:
        present.mask &= mask
    else:
        parametrize.register_parametrization(layer, "weight", Mask(mask))


def adopt_torch_mask(layer: PrunableLayer) -> None:
    """Turn a mask of `torch.nn.utils.prune` on the weight into a `Mask`: one mechanism holds all zeros."""
    if (mask := getattr(layer, "weight_mask", None)) is not None:
        torch_prune.remove(layer, "weight")
        set_mask(layer, mask.bool())


def make_permanent(model: nn.Module) -> nn.Module:
    """Replace every masked weight by a plain parameter holding its zeros; in place, returns ``model``."""
    for layer in list(model.modules()):
        if find_mask(layer) is not None:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model
