"""Discriminators: images to scores, higher for images that look real; no sigmoid, which is part of the loss."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sparsegan.models.conditional import ClassEmbedding


def _normed(layer: nn.Module, spectral: bool) -> nn.Module:
    """The layer, with its weight divided by its largest singular value (Miyato et al. 2018, arXiv:1802.05957)."""
    return spectral_norm(layer) if spectral else layer


def conv_discriminator(
    image_channels: int = 1,
    widths: Sequence[int] = (64, 128),
    kernel: int = 5,
    side: int = 28,
    spectral: bool = False,
    classes: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """Discriminator from images [N, image_channels, side, side] to scores [N, 1].

    A convolution of stride 2 for each of `widths`, with LeakyReLU(0.2), then a linear layer. kernel: odd, so that a
    side becomes its half, rounded up. spectral: spectral normalisation of every layer. dropout: behind each
    activation. With `classes` it is a `ProjectionDiscriminator`, of images and labels [N] int64; else an nn.Sequential.

    Raises ValueError for an even kernel.
    """
    if kernel % 2 == 0:
        raise ValueError(f"kernel is an odd number, got {kernel}")
    layers: list[nn.Module] = []
    channels = image_channels
    for width in widths:
        layers += [
            _normed(nn.Conv2d(channels, width, kernel, 2, kernel // 2), spectral),
            nn.LeakyReLU(0.2),
            *([nn.Dropout(dropout)] if dropout else []),
        ]
        channels, side = width, (side + 1) // 2
    score = nn.Sequential(nn.Flatten(), _normed(nn.Linear(channels * side * side, 1), spectral))
    if classes is None:
        return nn.Sequential(*layers, *score)
    embedding = _normed(ClassEmbedding(classes, channels), spectral)
    return ProjectionDiscriminator(nn.Sequential(*layers), score, embedding)


class ProjectionDiscriminator(nn.Module):
    """Discriminator from images [N, C, S, S] and labels [N] int64 to scores [N, 1].

    score(f(x)) + <embedding of the label, sum of f(x) over its pixels>: Miyato and Koyama 2018, arXiv:1802.05637,
    equation 3 and figure 14. features: f, images to maps; score: maps to [N, 1]; embedding: labels to
    [N, channels of the maps].
    """

    def __init__(self, features: nn.Module, score: nn.Module, embedding: nn.Module) -> None:
        super().__init__()
        self.features, self.score, self.embedding = features, score, embedding

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        maps = self.features(images)
        projection = (self.embedding(labels) * maps.sum((2, 3))).sum(1, keepdim=True)
        score: Tensor = self.score(maps) + projection
        return score


def mlp_discriminator(
    image_shape: Sequence[int] = (1, 28, 28), widths: Sequence[int] = (1024, 1024), spectral: bool = False
) -> nn.Sequential:
    """Discriminator from images [N, *image_shape] to scores [N, 1]: hidden layers of `widths`, LeakyReLU(0.2)."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(image_shape)
    for width in widths:
        layers += [_normed(nn.Linear(features, width), spectral), nn.LeakyReLU(0.2)]
        features = width
    return nn.Sequential(*layers, _normed(nn.Linear(features, 1), spectral))


def patch_discriminator(image_channels: int = 6, channels: int = 64, levels: int = 3) -> nn.Sequential:
    """Discriminator from pairs [N, image_channels, S, S] to scores [N, 1, s, s], each of one patch of the pair.

    The pair is what was given and what was made of it, one behind the other along the channels, so that image_channels is
    the sum of theirs. The "PatchGAN" of pix2pix (Isola et al. 2017, arXiv:1611.07004, section 6.1.2): `levels`
    4x4 convolutions of stride 2 and two of stride 1. A score sees 16, 34 or 70 pixels each way with 1, 2 or 3
    levels; s = S / 2 ** levels - 2.
    """
    layers: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
    inputs = channels
    for level in range(1, levels + 1):
        width, stride = channels * min(2**level, 8), 2 if level < levels else 1
        layers += [
            nn.Conv2d(inputs, width, 4, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
        ]
        inputs = width
    return nn.Sequential(*layers, nn.Conv2d(inputs, 1, 4, 1, 1))
