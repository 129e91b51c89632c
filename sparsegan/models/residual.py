"""A residual upsampling generator: BigGAN (Brock et al. 2019, arXiv:1809.11096, fig. 15) without its classes."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _UpBlock(nn.Module):
    """[N, inputs, H, W] to [N, outputs, 2 H, 2 W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2.0))
        h = self.conv2(F.relu(self.norm2(h)))
        # The mean, not the sum: then the activations keep their size through any number of blocks.
        shortcut: Tensor = self.skip(F.interpolate(x, scale_factor=2.0))
        return h * 0.5 + shortcut * 0.5


class ResidualGenerator(nn.Module):
    """Generator from z [N, latent] to images [N, 3, S, S] in [-1, 1].

    A linear layer makes a 4x4 map of channels * multipliers[0]; each further multiplier is a residual block
    that doubles the side: S = 4 * 2 ** (len(multipliers) - 1). The defaults are the widths of BigGAN at 128x128.
    """

    def __init__(
        self, latent: int = 128, channels: int = 64, multipliers: Sequence[int] = (16, 16, 8, 4, 2, 1)
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        self.linear = nn.Linear(latent, widths[0] * 4 * 4)
        self.unflatten = nn.Unflatten(1, (widths[0], 4, 4))
        self.blocks = nn.Sequential(*(_UpBlock(*pair) for pair in pairwise(widths)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_rgb = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.blocks(self.unflatten(self.linear(z)))
        return torch.tanh(self.to_rgb(F.relu(self.norm(x))))
