"""Random weights that stand in for trained ones: the same for the same seed, with activations of a sane size."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

_M = TypeVar("_M", bound=nn.Module)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)


def seeded(build: Callable[[], _M], seed: int) -> _M:
    """The model that `build` makes, with seeded weights, in eval mode; no parameter requires a gradient.

    Linear and (transposed) convolutional layers keep the scale of their input (He et al. 2015,
    arXiv:1502.01852, eq. 10). Statistics and scales of normalisation are far from 0 and 1, as training leaves
    them, and parameters of other modules are moved a little, so that nothing can be left out unnoticed.
    Layers whose weight requires no gradient are fixed filters and stay. The global generator is left alone.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                if module.weight.requires_grad:
                    module.weight.normal_(0.0, (2 / _fan_in(module)) ** 0.5)
            elif isinstance(module, _NORMS):
                _set_norm(module)
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if callable(
            refresh := getattr(model, "refresh", None)
        ):  # it keeps something computed from its weights
            refresh()
    return model.eval().requires_grad_(False)


def _fan_in(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> int:
    """How many products an output is the sum of."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return layer.weight[0].numel()
    # Each output position sees every stride-th tap of the kernel.
    taps = max(1, layer.weight[0, 0].numel() // (layer.stride[0] * layer.stride[1]))
    return layer.in_channels // layer.groups * taps


def _set_norm(norm: nn.Module) -> None:
    if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
        if norm.running_mean is not None:
            norm.running_mean.normal_(0.0, 0.3)
        if norm.running_var is not None:
            norm.running_var.uniform_(0.5, 2.0)
    for name, parameter in norm.named_parameters(recurse=False):
        if name == "weight":
            parameter.uniform_(0.6, 1.4)
        else:
            parameter.normal_(0.0, 0.2)
