"""How much each weight matters: scores ``[O, T, C]`` in the weight view, higher is worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsegan.patterns import PrunableLayer, weight_view
from sparsegan.prune.trace import Inputs, check_inputs, eval_mode, image_of

Importance: TypeAlias = Callable[[str, PrunableLayer, Tensor], Tensor]
"""``(layer name, layer, weight view [O, T, C]) -> scores [O, T, C]``"""

OBD_DRAWS = 40
OBD_BATCH = 8


def l1(name: str, layer: PrunableLayer, view: Tensor) -> Tensor:
    """The magnitude of each weight."""
    return view.abs()


def l2(name: str, layer: PrunableLayer, view: Tensor) -> Tensor:
    """The square of each weight, so that a group's score is its squared norm."""
    return view.square()


def random(generator: torch.Generator) -> Importance:
    """Uniform scores: the control that any other score must beat."""
    return lambda name, layer, view: torch.rand(view.shape, generator=generator).to(view.device)


def obd(
    model: nn.Module,
    layers: dict[str, PrunableLayer],
    example_inputs: Inputs,
    generator: torch.Generator,
) -> Importance:
    """Diagonal second-order damage, w² · E[(∂(y·v)/∂w)²]: y the model's image, v standard normal.

    With the squared error to the model's own image as the loss, the expectation is the diagonal of the
    Hessian (the Gauss-Newton form is exact where the error is zero), estimated by projecting the image on
    random v. The score is the damage of Optimal Brain Damage (LeCun, Denker and Solla 1989, section 2), up
    to a factor; the projection is own. Inputs come from `draw_inputs`; the model runs in eval mode, on its
    norm statistics.
    """
    batch = check_inputs(example_inputs)
    weights = [layer.weight for layer in layers.values()]
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in zip(layers, weights, strict=True)}
    frozen = [p for layer in layers.values() for p in layer.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with eval_mode(model), torch.enable_grad():
            for draw in range(OBD_DRAWS):
                inputs = draw_inputs(example_inputs, batch, draw, generator)
                # `cached` makes a parametrized weight one tensor, so that the gradient can be asked for it.
                with parametrize.cached():
                    weights = [layer.weight for layer in layers.values()]
                    image = image_of(model(*inputs))
                    v = torch.randn(image.shape, generator=generator).to(image)
                    gradients = torch.autograd.grad(image, weights, v, allow_unused=True)
                for name, gradient in zip(layers, gradients, strict=True):
                    if gradient is not None:
                        sums[name] += gradient.float().square()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return lambda name, layer, view: view.float().square() * weight_view(layer, sums[name]) / OBD_DRAWS


def draw_inputs(example_inputs: Inputs, batch: int, draw: int, generator: torch.Generator) -> Inputs:
    """Inputs of `OBD_BATCH` samples like ``example_inputs``, which hold ``batch`` samples.

    Floating-point vectors, ``[N, L]`` or ``[N, L, 1, 1]``, are taken for latents and drawn anew from the
    standard normal distribution. Other tensors of the batch (images, labels, time steps) give their own
    samples, in turn over the draws; anything else is passed on as it is.
    """
    rows = torch.arange(draw * OBD_BATCH, (draw + 1) * OBD_BATCH) % batch

    def one(x: object) -> object:
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] != batch:
            return x
        if x.is_floating_point() and x.ndim >= 2 and x[0].numel() == x.shape[1]:
            return torch.randn((OBD_BATCH, *x.shape[1:]), generator=generator).to(x)
        return x[rows.to(x.device)]

    return tuple(one(x) for x in example_inputs)
