"""Distances between images as a network that recognises images sees them: to train against, and to measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegan.metrics.backbones import load_lpips

# Elements of a map that are worked on at a time: they stay in the processor's cache from one operation to the next.
_AT_ONCE = 1 << 18
_SMALLEST_NORM = 1e-10


class FeatureDistance(nn.Module):
    """Distance of two batches of images: squared differences of feature vectors of length 1, as in LPIPS.

    Zhang et al. 2018, arXiv:1801.03924, equation 1: at each place of each map, both vectors of features are divided by their
    lengths; the squares of their differences, weighted by channel, are averaged over places and added over channels and maps.
    A loss `(image, target) -> scalar`, and with `distances` a metric. The network's weights are frozen, and nothing of the
    target is kept for the backward pass. Under `torch.autocast` features are bfloat16; lengths and differences stay float32.

    features: images to a list of maps [N, C, h, w], such as a `Backbone` or a network of one's own; it should be in eval mode.
    weights:  for each map those of its channels, [C]; without any, all are 1.
    shift:    weight of `feature_shift` in the loss.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Sequence[Tensor]],
        weights: Sequence[Tensor] | None = None,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.features, self.shift = features, shift
        if isinstance(features, nn.Module):
            features.requires_grad_(False)
        self.weights = (
            None
            if weights is None
            else nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)
        )

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """The mean over the batch, a scalar; image, target: [N, 1 or 3, H, W] in [-1, 1]."""
        found, wanted = self._maps(image, target)
        value = self._distances(found, wanted).mean()
        return value + self.shift * feature_shift(found, wanted) if self.shift else value

    def distances(self, image: Tensor, target: Tensor) -> Tensor:
        """That of each image, [N] float32, without the shift."""
        return self._distances(*self._maps(image, target))

    def _maps(self, image: Tensor, target: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if image.shape != target.shape:
            raise ValueError(
                f"image and target should be of one shape, they are {list(image.shape)} and {list(target.shape)}"
            )
        with torch.no_grad():
            wanted = self.features(target)
        return self.features(image), wanted

    def _distances(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        weights = self.weights or [None] * len(found)
        parts = [_UnitDistance.apply(*maps) for maps in zip(found, wanted, weights, strict=True)]
        return torch.stack(parts).sum(0)


def feature_shift(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """How far the mean of the features over a batch has moved, |mean(f) - mean(w)|^2 / var(w), added over maps; a scalar.

    found, wanted: maps [N, C, h, w] of images and of what they should be, averaged over places. What sets of images are judged by
    is where their features lie: a small difference that is the same in all images counts for more there than in a distance
    image by image (own).
    """
    parts = []
    for f, w in zip(found, wanted, strict=True):
        f, w = (maps.mean((2, 3), dtype=torch.float32) for maps in (f, w))
        parts.append((f.mean(0) - w.mean(0)).square().sum() / w.var(0, correction=0).sum().clamp_min(1e-6))
    return torch.stack(parts).sum()


def lpips(backbone: str = "vgg16", cache: Path | None = None, shift: float = 0.0) -> FeatureDistance:
    """LPIPS 0.1 (Zhang et al. 2018, arXiv:1801.03924) on "vgg16" or "alexnet", fetched with pip where they are not in the cache.

    shift: see `FeatureDistance`. Images below 32 pixels are enlarged to that first. Raises ValueError for another name, and
    what `fetch` raises.
    """
    return FeatureDistance(*load_lpips(backbone, cache), shift)


class _UnitDistance(torch.autograd.Function):
    """maps x, y [N, C, h, w], weights [C] -> distances [N]; differentiable once, in x.

    The gradient is computed together with the value, a few images at a time: a backward pass of the same formula in torch's
    operations takes several times as long, all of it waiting for memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        places = x.shape[2] * x.shape[3]
        values = x.new_empty(len(x), dtype=torch.float32)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        step = max(1, _AT_ONCE // x[0].numel())
        for i in range(0, len(x), step):
            unit, inverse = _unit(x[i : i + step])
            difference = unit - _unit(y[i : i + step])[0]
            weighted = difference if weight is None else difference * weight
            values[i : i + step] = (difference * weighted).sum((1, 2)).div_(places)
            if gradient is not None:
                # Of 2 * weighted / places what changes the direction of x, not its length.
                along = (unit * weighted).sum(2, keepdim=True)
                part = torch.addcmul(weighted, unit, along, value=-1).mul_(inverse * (2 / places))
                gradient[i : i + step] = part.unflatten(1, x.shape[2:]).movedim(3, 1)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype)[:, None, None, None], None, None


def _unit(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [N, places, C] of length 1, or 0 where there is nothing, and what they were multiplied with, [N, places, 1]."""
    vectors = maps.movedim(1, 3).flatten(1, 2).float()
    norm = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
    inverse = norm.reciprocal().masked_fill_(norm <= _SMALLEST_NORM, 0)
    return vectors * inverse, inverse
