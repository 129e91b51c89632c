"""Generators of transposed convolutions: the DCGAN (Radford et al. 2016, arXiv:1511.06434, section 3) and one with a stem."""

from collections.abc import Sequence

from torch import nn


def dcgan_generator(
    latent: int = 64, widths: Sequence[int] = (256, 128, 128), image_channels: int = 1
) -> nn.Sequential:
    """Generator from z [N, latent, 1, 1] to images [N, image_channels, S, S] in [-1, 1].

    The first 4x4 transposed convolution makes a 4x4 map; each later one doubles the side: S = 4 * 2 **
    len(widths). The defaults are the architecture of the shipped "dcgan" weights (32x32 images). A plain
    nn.Sequential, so that it can be fused, swapped and saved without any class of ours.
    """
    layers: list[nn.Module] = []
    channels, stride, padding = latent, 1, 0
    for width in widths:
        # No bias: the normalisation that follows would take it away again.
        layers += [
            nn.ConvTranspose2d(channels, width, 4, stride, padding, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels, stride, padding = width, 2, 1
    layers += [nn.ConvTranspose2d(channels, image_channels, 4, stride, padding, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


def stem_generator(
    latent: int = 100,
    stem: int = 256,
    side: int = 28,
    widths: Sequence[int] = (128, 64),
    image_channels: int = 1,
) -> nn.Sequential:
    """Generator from z [N, latent] to images [N, image_channels, side, side] in [-1, 1].

    A linear layer makes the stem, a map of `stem` channels; 5x5 transposed convolutions follow, the first at the
    stem's side and each later one doubling it, so that `side` divides by 2 ** len(widths). The defaults have a
    7x7x256 stem and 256 -> 128 -> 64 -> 1 channels: the generator of TensorFlow's DCGAN tutorial, with the
    slopes of Radford et al. 2016. Raises ValueError for another side.
    """
    start, rest = divmod(side, 2 ** len(widths))
    if rest or not start:
        raise ValueError(f"side divides by {2 ** len(widths)}, which {len(widths)} widths need; got {side}")
    layers: list[nn.Module] = [
        nn.Linear(latent, stem * start * start, bias=False),
        nn.BatchNorm1d(stem * start * start),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Unflatten(1, (stem, start, start)),
    ]
    channels, stride = stem, 1
    for width in widths:
        layers += [
            nn.ConvTranspose2d(channels, width, 5, stride, 2, output_padding=stride - 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        channels, stride = width, 2
    last = nn.ConvTranspose2d(channels, image_channels, 5, stride, 2, output_padding=stride - 1)
    return nn.Sequential(*layers, last, nn.Tanh())
