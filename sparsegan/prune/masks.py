"""Zeros that stay zero: a mask held by a parametrization of the layer's weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import _SpectralNorm

from sparsegan.patterns import Pattern, PrunableLayer, from_weight_view, weight_view
from sparsegan.prune.trace import eval_mode


class Mask(nn.Module):
    """Zero the weights where ``mask`` (bool buffer, shaped as the weight) is False.

    The original is masked at every use, so no optimiser, momentum or weight decay can bring a zero back.
    """

    mask: Tensor
    dense_gradient = False
    """Whether the original gets the gradient that it had without the mask, to see which zeros are worth bringing back."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        # `where` rather than a product: a masked original that became inf or NaN must still give zero.
        masked = torch.where(self.mask, weight, 0.0)
        # The sum is `masked` to the last bit: w + 0 or w - w.
        return weight + (masked - weight).detach() if self.dense_gradient else masked


def find_mask(layer: nn.Module) -> Mask | None:
    """The `Mask` on the weight of ``layer``, if it has one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((m for m in layer.parametrizations["weight"] if isinstance(m, Mask)), None)  # type: ignore


def set_mask(layer: PrunableLayer, mask: Tensor, *, grow: bool = False) -> None:
    """Mask the weight of ``layer`` by ``mask`` (bool, shaped as the weight).

    What was masked stays masked, unless ``grow``. A mask goes before spectral norm: that divides by the norm of the
    weights which are left, so that theirs is 1, and what is masked gets no gradient through the norm either. It goes
    after any other parametrization, which may not leave zeros as they are.
    """
    if (present := find_mask(layer)) is not None:
        present.mask.copy_(mask if grow else present.mask & mask)
        return
    with eval_mode(layer):  # reading the weight in training mode is a step of spectral norm's power iteration
        parametrize.register_parametrization(layer, "weight", Mask(mask))
    held = layer.get_submodule("parametrizations.weight")
    assert isinstance(held, parametrize.ParametrizationList)
    others = list(held)[:-1]
    if others and all(isinstance(other, _SpectralNorm) for other in others):
        held.insert(0, held.pop(-1))


def mask_groups(layer: PrunableLayer, pattern: Pattern, kept: Tensor, *, grow: bool = False) -> None:
    """`set_mask` by groups of ``pattern``: ``kept`` (bool) is shaped as its `group_sums`."""
    with eval_mode(layer), torch.no_grad():
        view = weight_view(layer)
    mask = from_weight_view(layer, pattern.expand(kept, tuple(view.shape)))
    set_mask(layer, mask.to(view.device), grow=grow)


def maskable_parameter(name: str, layer: PrunableLayer) -> nn.Parameter:
    """The parameter whose zeros are those of the weight of ``layer``: the weight, or what spectral norm is taken of.

    Raises ValueError when another parametrization computes the weight.
    """
    if not parametrize.is_parametrized(layer, "weight"):
        return layer.get_parameter("weight")
    held = layer.get_submodule("parametrizations.weight")
    assert isinstance(held, parametrize.ParametrizationList)
    if others := [type(one).__name__ for one in held if not isinstance(one, Mask | _SpectralNorm)]:
        raise ValueError(
            f"the weight of layer {name!r} is computed by {others[0]}, whose zeros are not those of a parameter: remove "
            "that first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    return held.get_parameter("original")


def adopt_torch_mask(layer: PrunableLayer) -> None:
    """Turn a mask of `torch.nn.utils.prune` on the weight into a `Mask`: one mechanism holds all zeros."""
    if (mask := getattr(layer, "weight_mask", None)) is not None:
        torch_prune.remove(layer, "weight")
        set_mask(layer, mask.bool())


def make_permanent(model: nn.Module) -> nn.Module:
    """Replace every masked weight by a plain parameter holding its zeros; in place, returns ``model``."""
    for layer in list(model.modules()):
        if find_mask(layer) is not None:
            # Copies share the class that torch made for the layer and now takes apart: this one gets its own.
            kind = type(layer)
            layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model
