"""Generators that turn an image into another one: of CycleGAN and of pix2pix."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _ResnetBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.body(x)
        return x + changed


def cyclegan_generator(channels: int = 64, blocks: int = 9, image_channels: int = 3) -> nn.Sequential:
    """Generator from images [N, image_channels, S, S] to such images, both in [-1, 1]; S is a multiple of 4.

    The "resnet_9blocks" of Zhu et al. 2017, arXiv:1703.10593, section 7.2: down to a quarter of the side,
    residual blocks there, up again; instance normalisation and reflection padding throughout.
    """
    layers: list[nn.Module] = [
        nn.ReflectionPad2d(3),
        nn.Conv2d(image_channels, channels, 7),
        nn.InstanceNorm2d(channels),
        nn.ReLU(),
    ]
    for width in (channels, 2 * channels):
        layers += [nn.Conv2d(width, 2 * width, 3, 2, 1), nn.InstanceNorm2d(2 * width), nn.ReLU()]
    layers += [_ResnetBlock(4 * channels) for _ in range(blocks)]
    for width in (4 * channels, 2 * channels):
        up = nn.ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1)
        layers += [up, nn.InstanceNorm2d(width // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(channels, image_channels, 7), nn.Tanh())


class UNetGenerator(nn.Module):
    """Generator from images [N, image_channels, S, S] to such images, both in [-1, 1]; S divides by 2 ** levels.

    The U-Net of pix2pix (Isola et al. 2017, arXiv:1611.07004, section 6.1.1) with batch normalisation, the
    innermost map of 1x1 at S = 2 ** levels. Its dropout is left out: it does nothing in eval mode.
    """

    def __init__(self, channels: int = 64, levels: int = 8, image_channels: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(levels)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inputs = image_channels
        for level, width in enumerate(widths):
            normed = 0 < level < levels - 1
            conv = nn.Conv2d(inputs, width, 4, 2, 1, bias=not normed)
            self.down.append(nn.Sequential(conv, nn.BatchNorm2d(width)) if normed else conv)
            inputs = width
        for level in reversed(range(1, levels)):
            # All but the innermost read the map of their own level beside the one from below.
            inputs = widths[level] if level == levels - 1 else 2 * widths[level]
            up = nn.ConvTranspose2d(inputs, widths[level - 1], 4, 2, 1, bias=False)
            self.up.append(nn.Sequential(nn.ReLU(), up, nn.BatchNorm2d(widths[level - 1])))
        last = nn.ConvTranspose2d(2 * channels, image_channels, 4, 2, 1)
        self.up.append(nn.Sequential(nn.ReLU(), last, nn.Tanh()))

    def forward(self, image: Tensor) -> Tensor:
        first, *inner = self.down
        x = first(image)
        maps = [x]
        for step in inner:
            x = step(F.leaky_relu(x, 0.2))
            maps.append(x)
        innermost, *outer = self.up
        x = innermost(maps.pop())
        for step in outer:
            x = step(torch.cat([maps.pop(), x], 1))
        return x
