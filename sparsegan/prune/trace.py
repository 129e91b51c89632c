"""Running a model to see what it does: the multiply-adds of each layer, and which layers touch the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sparsegan.patterns import PRUNABLE_TYPES, PrunableLayer, detect_pattern, weight_view

Inputs: TypeAlias = tuple[Any, ...]
"""The positional inputs of one call of a model, the first dimension of each tensor being the batch."""

IMAGE_CHANNELS = range(1, 5)


def prunable_layers(model: nn.Module) -> dict[str, PrunableLayer]:
    """The Linear, Conv2d and ConvTranspose2d layers of ``model`` by name, in order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE_TYPES)}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def image_of(output: Any) -> Tensor:
    """The image a model returned: its output or the first tensor in a tuple, list or dict; else TypeError."""
    values = output.values() if isinstance(output, dict) else output
    if isinstance(values, Tensor):
        return values
    if isinstance(output, dict | tuple | list):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(f"the model must return a tensor, or hold one in a tuple; got {type(output).__name__}")


def check_inputs(example_inputs: Any) -> int:
    """The batch size of ``example_inputs``; TypeError or ValueError unless a tuple of filled tensors."""
    if not isinstance(example_inputs, tuple):
        raise TypeError(
            "example_inputs is the tuple of the model's positional inputs, (z,) for one tensor z; "
            f"got {type(example_inputs).__name__}"
        )
    tensors = [x for x in example_inputs if isinstance(x, Tensor) and x.ndim > 0]
    if not tensors or tensors[0].numel() == 0:
        raise ValueError("example_inputs must hold at least one tensor with at least one sample in it")
    return tensors[0].shape[0]


class Trace(NamedTuple):
    """What one call of a model executed, by layer name."""

    positions: dict[str, int]
    """How often each weight of the layer is multiplied, so multiply-adds = positions x number of weights."""
    touches_image: set[str]
    """The convolutions that read or write images of 1 to 4 channels."""


def trace(model: nn.Module, example_inputs: Inputs | None) -> Trace:
    """Run ``model`` once, in eval mode, on ``example_inputs``.

    Without inputs every position count is 1 (one multiply-add a weight) and only convolutions of 1 to 4
    channels are known to touch the image; with them, also a first or last convolution that reads or writes
    it whole, of any number of channels. A transposed convolution is counted on its input positions, before its border
    is cropped.
    """
    layers = prunable_layers(model)
    touches_image = {
        name
        for name, layer in layers.items()
        if not isinstance(layer, nn.Linear)
        and (layer.in_channels in IMAGE_CHANNELS or layer.out_channels in IMAGE_CHANNELS)
    }
    if example_inputs is None:
        return Trace(dict.fromkeys(layers, 1), touches_image)

    check_inputs(example_inputs)
    positions = dict.fromkeys(layers, 0)
    calls: list[tuple[str, int, int]] = []  # layer, elements in, elements out

    def record(name: str, layer: PrunableLayer, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            positions[name] += y.numel() // layer.out_features
        elif isinstance(layer, nn.Conv2d):
            positions[name] += y.numel() // layer.out_channels
        else:
            positions[name] += x.numel() // layer.in_channels
        calls.append((name, x.numel(), y.numel()))

    hooks = [
        layer.register_forward_hook(lambda layer, args, y, name=name: record(name, layer, args[0], y))
        for name, layer in layers.items()
    ]
    try:
        with eval_mode(model), torch.no_grad():
            output = image_of(model(*example_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    if calls:
        (first, read, _), (last, _, written) = calls[0], calls[-1]
        if any(is_image(x) and x.numel() == read for x in example_inputs):
            touches_image.add(first)
        if is_image(output) and output.numel() == written:
            touches_image.add(last)
        # A linear layer makes each pixel by itself: most of the work of an MLP, and no more delicate than its other layers.
        touches_image -= {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    return Trace(positions, touches_image)


def is_image(x: Any) -> bool:
    """Whether ``x`` is a batch of images ``[N, 1..4, H, W]`` rather than of latents ``[N, C, 1, 1]``."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in IMAGE_CHANNELS and x[0, 0].numel() > 1


def count_macs(model: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """The dense multiply-adds of each Linear, Conv2d and ConvTranspose2d in ``model(*example_inputs)``.

    Inputs holding one sample give the cost of one image. Zeros are counted like other weights.
    """
    positions = trace(model, example_inputs).positions
    return {name: positions[name] * layer.weight.numel() for name, layer in prunable_layers(model).items()}


class LayerSparsity(NamedTuple):
    """One row of `sparsity_report`."""

    name: str
    kind: str
    """"Linear", "Conv2d" or "ConvTranspose2d"."""
    pattern: str
    """The coarsest known pattern of the zeros; "dense" without zeros."""
    density: float
    """Share of the weights that are not zero."""
    macs_dense: int
    macs_kept: int
    """Multiply-adds that are left when those with a zero weight are skipped."""


def sparsity_report(model: nn.Module, example_inputs: Inputs) -> list[LayerSparsity]:
    """The zeros of each Linear, Conv2d and ConvTranspose2d of ``model``, however they came about."""
    positions = trace(model, example_inputs).positions
    rows = []
    for name, layer in prunable_layers(model).items():
        view = weight_view(layer).detach()
        nonzero = int(view.count_nonzero())
        kind = next(kind.__name__ for kind in PRUNABLE_TYPES if isinstance(layer, kind))
        rows.append(
            LayerSparsity(
                name=name,
                kind=kind,
                pattern=str(detect_pattern(view) or "dense"),
                density=nonzero / view.numel(),
                macs_dense=positions[name] * view.numel(),
                macs_kept=positions[name] * nonzero,
            )
        )
    return rows
