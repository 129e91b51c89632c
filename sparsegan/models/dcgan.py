"""The DCGAN generator (Radford et al. 2016, arXiv:1511.06434, section 3)."""

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
