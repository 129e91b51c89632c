"""Fold BatchNorm into the layer before it, and find the activation after a layer.

Both look only where the module tree proves the flow of data: inside nn.Sequential, at any depth. A module
that stands in two places or has forward hooks has consumers that the tree does not show: it is left alone.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import Tensor, nn

from sparsegan.patterns import PRUNABLE_TYPES, PrunableLayer, from_weight_view, weight_view

_NORM_OF: dict[type[nn.Module], type[nn.BatchNorm1d] | type[nn.BatchNorm2d]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
}

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


class FollowingActivation(NamedTuple):
    """An activation module that is the only consumer of a layer's output."""

    name: str
    module: nn.Module
    activation: str
    slope: float


def straight_runs(model: nn.Module) -> list[list[str]]:
    """Names of modules that run one straight after the other, each feeding the next and nothing else.

    Nested nn.Sequential are walked as one; whatever else has children breaks the run, and so does a module
    that stands in several places or has forward hooks.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    runs: list[list[str]] = []

    def visit(name: str, module: nn.Module, inline: bool) -> None:
        sequential = type(module).forward is nn.Sequential.forward
        children = [(child, part) for child, part in module._modules.items() if part is not None]
        watched = module._forward_hooks or module._forward_pre_hooks
        opaque = bool(not inline or uses[id(module)] > 1 or watched or (children and not sequential))
        if opaque:
            runs.append([])
        elif not children and not sequential:
            runs[-1].append(name)
        for child, part in children:
            visit(f"{name}.{child}" if name else child, part, sequential)
        if opaque:
            runs.append([])

    visit("", model, inline=False)
    return [run for run in runs if run]


def fold_batch_norm(model: nn.Module) -> list[tuple[str, str]]:
    """Fold every BatchNorm that directly follows a Linear, Conv2d or ConvTranspose2d into it, in place.

    The running statistics are used, so a norm in training mode or without statistics stays. nn.Identity
    takes the place of a folded norm, so that the other modules keep their names. A BatchNorm1d is taken to
    normalise the features of a Linear, as it does for inputs [N, C]. Zero weights stay zero.

    Returns the pairs (layer, norm) that were folded.
    """
    folded = []
    for run in straight_runs(model):
        before = ""
        for name in run:
            module = model.get_submodule(name)
            if isinstance(module, nn.Identity):
                continue
            layer = model.get_submodule(before) if before else None
            if (
                isinstance(layer, PRUNABLE_TYPES)
                and isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
                and _foldable(layer, module)
            ):
                model.set_submodule(before, _folded(layer, module))
                model.set_submodule(name, nn.Identity())
                folded.append((before, name))
            else:
                before = name
    return folded


def following_activations(model: nn.Module) -> dict[str, FollowingActivation]:
    """For each Linear, Conv2d or ConvTranspose2d directly followed by an activation the kernels know: which.

    Known are ReLU, LeakyReLU, Tanh and Sigmoid; an nn.Identity between is looked through.
    """
    found = {}
    for run in straight_runs(model):
        before = ""
        for name in run:
            module = model.get_submodule(name)
            if isinstance(module, nn.Identity):
                continue
            activation = _ACTIVATIONS.get(type(module))
            if activation and before and isinstance(model.get_submodule(before), PRUNABLE_TYPES):
                slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0
                found[before] = FollowingActivation(name, module, activation, slope)
            before = name
    return found


def with_weight(layer: PrunableLayer, weight: Tensor, bias: Tensor | None) -> PrunableLayer:
    """A plain layer of the same geometry with these weights: no parametrization, masks or hooks."""
    kind = next(kind for kind in PRUNABLE_TYPES if isinstance(layer, kind))
    settings: dict[str, object] = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    names = ["in_features", "out_features"]
    if not isinstance(layer, nn.Linear):
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
        names += ["padding_mode"] + ["output_padding"] * isinstance(layer, nn.ConvTranspose2d)
    plain = kind(**{name: getattr(layer, name) for name in names}, **settings)  # type: ignore[arg-type]
    plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return plain.train(layer.training)


def _foldable(layer: PrunableLayer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    return (
        type(norm) is _NORM_OF.get(type(layer))
        and not norm.training
        and norm.running_mean is not None
        and norm.num_features == weight_view(layer).shape[0]
    )


def _folded(layer: PrunableLayer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> PrunableLayer:
    """norm(layer(x)) as one layer; computed in float64, so that only the results are rounded."""
    view = weight_view(layer)
    assert norm.running_mean is not None and norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias
    if norm.affine:
        gain = gain * norm.weight
    shift = shift * gain
    if norm.affine:
        shift = shift + norm.bias
    scaled = (view * gain[:, None, None]).to(view.dtype)
    return with_weight(layer, from_weight_view(layer, scaled), shift.to(view.dtype))
