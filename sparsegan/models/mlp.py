"""The generator of the first GAN, without convolutions (Goodfellow et al. 2014, arXiv:1406.2661, section 5)."""

import math
from collections.abc import Sequence

from torch import nn


def mlp_generator(
    latent: int = 100,
    width: int | Sequence[int] = 1024,
    pixels: int = 784,
    image_shape: Sequence[int] | None = None,
    norm: bool = False,
) -> nn.Sequential:
    """Generator from z [N, latent] to images in [-1, 1]; as good as the decoder of a VAE.

    width: of three hidden layers, or of each hidden layer in turn, such as (128, 128). The images are flat,
    [N, pixels], or with `image_shape`, such as (1, 28, 28), [N, *image_shape], whatever `pixels` is. norm: BatchNorm before
    each activation, without which an adversary easily brings a generator to one and the same image.
    """
    layers: list[nn.Module] = []
    features = latent
    for hidden in (width,) * 3 if isinstance(width, int) else width:
        layers += [
            nn.Linear(features, hidden),
            *([nn.BatchNorm1d(hidden)] if norm else []),
            nn.LeakyReLU(0.2),
        ]
        features = hidden
    if image_shape is None:
        return nn.Sequential(*layers, nn.Linear(features, pixels), nn.Tanh())
    last = nn.Linear(features, math.prod(image_shape))
    return nn.Sequential(*layers, last, nn.Tanh(), nn.Unflatten(1, tuple(image_shape)))
