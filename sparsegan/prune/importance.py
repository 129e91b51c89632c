"""How much each weight matters: scores ``[O, T, C]`` in the weight view, higher is worth keeping.

A group of weights is worth the sum of its scores. Where the weights of a group act together ("taylor", "obs"), the
scores are shares of what the whole group is worth, so that these need the pattern.

Gradients are those of y·v: y the image that the model makes of random latents, v standard normal noise. The squared
error to the dense model, or any distance to it, has no gradient at the dense model itself; E[(∂(y·v)/∂w)²] is the
squared length of ∂y/∂w, which is half of that error's curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsegan.patterns import BlockPattern, Pattern, PrunableLayer, weight_view
from sparsegan.prune.reconstruct import block_errors, kept_weights, moments, watched_calls
from sparsegan.prune.trace import Inputs, check_inputs, eval_mode, image_of

Importance: TypeAlias = Callable[[str, PrunableLayer, Tensor], Tensor]
"""``(layer name, layer, weight view [O, T, C]) -> scores [O, T, C]``"""

IMPORTANCES = ("obd", "taylor", "obs", "wanda", "l1", "l2", "random")

OBD_DRAWS = 40
OBD_BATCH = 8
# Batches of `OBD_BATCH` samples whose activations are looked at.
CALIBRATION_DRAWS = 64


def resolve(
    importance: str | Importance,
    model: nn.Module,
    layers: Mapping[str, PrunableLayer],
    pattern: Pattern,
    example_inputs: Inputs | None,
    generator: torch.Generator,
) -> Importance:
    """The importance called ``importance``; a callable is returned as it is. Raises ValueError, see `prune`."""
    if not isinstance(importance, str):
        return importance
    match importance:
        case "l1":
            return l1
        case "l2":
            return l2
        case "random":
            return random(generator)
    if importance not in IMPORTANCES:
        raise ValueError(
            f"unknown importance {importance!r}; there are: {', '.join(IMPORTANCES)}, or give a callable"
        )
    if example_inputs is None:
        raise ValueError(f'importance "{importance}" needs example_inputs, the tuple of the model\'s inputs')
    match importance:
        case "obd":
            return obd(model, layers, example_inputs, generator)
        case "taylor":
            return taylor(model, layers, pattern, example_inputs, generator)
        case "obs":
            return obs(model, layers, pattern, example_inputs, generator)
    return wanda(model, example_inputs, generator)


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
    layers: Mapping[str, PrunableLayer],
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
    sums = {name: torch.zeros_like(weight_view(layer)) for name, layer in layers.items()}
    for gradients in _gradients(model, layers, example_inputs, generator):
        for name, gradient in gradients.items():
            sums[name] += gradient.square()
    return lambda name, layer, view: view.float().square() * sums[name] / OBD_DRAWS


def taylor(
    model: nn.Module,
    layers: Mapping[str, PrunableLayer],
    pattern: Pattern,
    example_inputs: Inputs,
    generator: torch.Generator,
) -> Importance:
    """Gradient x weight: the squared first-order change of the image without a group, E[(Σ w · ∂(y·v)/∂w)²].

    The sum runs over the weights of the group (Molchanov et al. 2019, arXiv:1906.10771, equation 8), of which each
    gets the share w · ∂(y·v)/∂w of it in each draw; shares may be negative. Unlike in "obd", weights of a group
    that undo one another count as such. Draws are those of `obd`, the projection y·v is own.
    """
    sums = {name: torch.zeros_like(weight_view(layer)) for name, layer in layers.items()}
    for gradients in _gradients(model, layers, example_inputs, generator):
        for name, gradient in gradients.items():
            change = gradient * weight_view(layers[name]).detach()
            sums[name] += change * pattern.expand(pattern.group_sums(change), tuple(change.shape))
    return lambda name, layer, view: sums[name] / OBD_DRAWS


class GradientImportance(NamedTuple):
    """Of one layer: E|∂(y·v)/∂w|, the mean over all its weights, and over those of each output channel ``[O]``."""

    layer: float
    channels: Tensor


def gradient_importance(
    model: nn.Module,
    layers: Mapping[str, PrunableLayer],
    example_inputs: Inputs,
    generator: torch.Generator,
) -> dict[str, GradientImportance]:
    """How much the image hangs on whole layers and on their output channels: mean |gradient| of their weights.

    Of output channel o: mean over taps t and inputs c of E|∂(y·v)/∂w_otc|; of the layer: the mean over its channels.
    Draws are those of `obd`, over which |·| is averaged. To rank channels within a layer; across layers
    the scale of the weights and the number of pixels that each meets come in, too. Own.
    """
    sums = {name: torch.zeros_like(weight_view(layer)) for name, layer in layers.items()}
    for gradients in _gradients(model, layers, example_inputs, generator):
        for name, gradient in gradients.items():
            sums[name] += gradient.abs()
    means = {name: (total / OBD_DRAWS).mean((1, 2)) for name, total in sums.items()}
    return {name: GradientImportance(float(mean.mean()), mean) for name, mean in means.items()}


def wanda(model: nn.Module, example_inputs: Inputs, generator: torch.Generator) -> Importance:
    """Magnitude times the norm of what the weight multiplies, |w| · ||x||₂ (Sun et al. 2023, arXiv:2306.11695, eq. 1).

    x: all input values that meet the weight at its tap, over `CALIBRATION_DRAWS` batches of `draw_inputs`; a tap that
    reads the padding at the border has fewer.
    """
    batches = calibration_batches(example_inputs, generator)

    def score(name: str, layer: PrunableLayer, view: Tensor) -> Tensor:
        squares = view.new_zeros(view.shape)
        for m in moments(layer, watched_calls(model, name, batches)):
            seen = m.gram.diagonal(dim1=1, dim2=2).unflatten(1, (len(m.taps), -1))  # [G, T, C / G]
            squares[:, list(m.taps)] = seen.repeat_interleave(len(view) // len(seen), 0).to(view)
        return view.abs() * squares.sqrt()

    return score


def obs(
    model: nn.Module,
    layers: Mapping[str, PrunableLayer],
    pattern: Pattern,
    example_inputs: Inputs,
    generator: torch.Generator,
) -> Importance:
    """Second-order damage of whole blocks, the layer's other weights fitted again: `reconstruct.block_errors`.

    The squared error of each output channel counts by what the image makes of it, E[(∂(y·v)/∂h)²], h the channel's
    pixels (own). Blocks are those of a `BlockPattern`, single weights for other patterns. Activations and
    gradients come from `draw_inputs`.
    """
    weights = output_sensitivity(model, layers, example_inputs, generator)
    batches = calibration_batches(example_inputs, generator)
    width = pattern.bk if isinstance(pattern, BlockPattern) else 1

    def score(name: str, layer: PrunableLayer, view: Tensor) -> Tensor:
        sums = moments(layer, watched_calls(model, name, batches))
        errors = block_errors(view.double(), kept_weights(layer), sums, width)
        return errors * weights[name][:, None, None] / len(batches)

    return score


def output_sensitivity(
    model: nn.Module,
    layers: Mapping[str, PrunableLayer],
    example_inputs: Inputs,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """E[(∂(y·v)/∂h)²] for each output channel of each layer, float64 ``[O]``: mean over samples and pixels h.

    What a squared error of one at a pixel of the layer's output adds to that of the image. Own.
    """
    outputs: dict[str, list[Tensor]] = {}

    def see(name: str, y: Tensor) -> Tensor:
        y = y if y.requires_grad else y.requires_grad_(True)
        outputs.setdefault(name, []).append(y)
        # What comes next may work in place, and must not do so on what the gradient is asked for.
        return y.clone()

    hooks = [
        layer.register_forward_hook(lambda layer, args, y, name=name: see(name, y))
        for name, layer in layers.items()
    ]
    sums = {name: torch.zeros(len(weight_view(layer)), dtype=torch.float64) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)
    batch = check_inputs(example_inputs)
    try:
        with eval_mode(model), torch.enable_grad():
            for draw in range(OBD_DRAWS):
                outputs.clear()
                image = image_of(model(*draw_inputs(example_inputs, batch, draw, generator)))
                v = torch.randn(image.shape, generator=generator).to(image)
                made = [(name, y) for name, ys in outputs.items() for y in ys]
                gradients = torch.autograd.grad(image, [y for _, y in made], v, allow_unused=True)
                for (name, y), gradient in zip(made, gradients, strict=True):
                    dim = y.dim() - 1 if isinstance(layers[name], nn.Linear) else y.dim() - 3
                    counts[name] += y.numel() // y.shape[dim]
                    if gradient is not None:
                        sums[name] += gradient.transpose(dim, 0).flatten(1).double().square().sum(1).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums[name] / max(counts[name], 1) for name in layers}


def _gradients(
    model: nn.Module,
    layers: Mapping[str, PrunableLayer],
    example_inputs: Inputs,
    generator: torch.Generator,
) -> Iterator[dict[str, Tensor]]:
    """∂(y·v)/∂w as weight views, float32 ``[O, T, C]``, for each of `OBD_DRAWS` draws of inputs and v."""
    batch = check_inputs(example_inputs)
    frozen = [p for layer in layers.values() for p in layer.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with eval_mode(model):
            for draw in range(OBD_DRAWS):
                inputs = draw_inputs(example_inputs, batch, draw, generator)
                # `cached` makes a parametrized weight one tensor, so that the gradient can be asked for it.
                with parametrize.cached(), torch.enable_grad():
                    weights = [layer.weight for layer in layers.values()]
                    image = image_of(model(*inputs))
                    v = torch.randn(image.shape, generator=generator).to(image)
                    gradients = torch.autograd.grad(image, weights, v, allow_unused=True)
                yield {
                    name: weight_view(layers[name], gradient).float()
                    for name, gradient in zip(layers, gradients, strict=True)
                    if gradient is not None
                }
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def calibration_batches(example_inputs: Inputs, generator: torch.Generator) -> list[Inputs]:
    """`CALIBRATION_DRAWS` batches of `draw_inputs`."""
    batch = check_inputs(example_inputs)
    return [draw_inputs(example_inputs, batch, draw, generator) for draw in range(CALIBRATION_DRAWS)]


def draw_inputs(
    example_inputs: Inputs, batch: int, draw: int, generator: torch.Generator, count: int = OBD_BATCH
) -> Inputs:
    """Inputs of ``count`` samples like ``example_inputs``, which hold ``batch`` samples.

    Floating-point vectors, ``[N, L]`` or ``[N, L, 1, 1]``, are taken for latents and drawn anew from the
    standard normal distribution. Other tensors of the batch (images, labels, time steps) give their own
    samples, in turn over the draws; anything else is passed on as it is.
    """
    rows = torch.arange(draw * count, (draw + 1) * count) % batch

    def one(x: object) -> object:
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] != batch:
            return x
        if x.is_floating_point() and x.ndim >= 2 and x[0].numel() == x.shape[1]:
            return torch.randn((count, *x.shape[1:]), generator=generator).to(x)
        return x[rows.to(x.device)]

    return tuple(one(x) for x in example_inputs)
