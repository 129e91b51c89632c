"""The StyleGAN2 generator (Karras et al. 2020, arXiv:1912.04958, fig. 2c and 7b), for inference.

Modulation scales the input of an ordinary convolution and demodulation its output, which is the same as scaling
the weights of each image (section 2.2), so that every layer is a plain module that can be pruned and quantised.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _smooth(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """Make a depthwise 4x4 layer the fixed low-pass filter that goes with doubling the side."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4  # sums to 2: three of four pixels it reads are zeros
    layer.weight.requires_grad_(False).copy_(torch.outer(taps, taps))
    return layer


class _StyledConv(nn.Module):
    """x [N or 1, inputs, H, W] and w [N, latent] to [N, outputs, size, size]; `up` doubles the side."""

    energy: Tensor
    noise: Tensor

    def __init__(self, inputs: int, outputs: int, size: int, latent: int, up: bool) -> None:
        super().__init__()
        self.affine = nn.Linear(latent, inputs)
        nn.init.ones_(self.affine.bias)
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        self.blur: nn.Module
        if up:
            self.conv = nn.ConvTranspose2d(inputs, outputs, 3, 2, bias=False)
            self.blur = _smooth(nn.Conv2d(outputs, outputs, 4, padding=1, groups=outputs, bias=False))
        else:
            self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            self.blur = nn.Identity()
        self.register_buffer("noise", torch.randn(1, 1, size, size))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(1, outputs, 1, 1))
        self.register_buffer("energy", torch.empty(outputs, inputs))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        energy = self.conv.weight.square().sum((2, 3))
        self.energy.copy_(energy.T if isinstance(self.conv, nn.ConvTranspose2d) else energy)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w)
        demodulation = torch.rsqrt(style.square() @ self.energy.T + 1e-8)
        x = self.conv(x * style[:, :, None, None]) * demodulation[:, :, None, None]
        x = self.blur(x) + self.noise * self.noise_strength + self.bias
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


class _ToRGB(nn.Module):
    """x [N, inputs, H, W] and w [N, latent] to an image [N, 3, H, W]: modulated, not demodulated."""

    def __init__(self, inputs: int, latent: int) -> None:
        super().__init__()
        self.affine = nn.Linear(latent, inputs)
        nn.init.ones_(self.affine.bias)
        self.conv = nn.Conv2d(inputs, 3, 1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w)
        image: Tensor = self.conv(x * style[:, :, None, None])
        return image


class _Block(nn.Module):
    """Doubles the side of the map and of the image."""

    def __init__(self, inputs: int, outputs: int, size: int, latent: int) -> None:
        super().__init__()
        self.up = _StyledConv(inputs, outputs, size, latent, up=True)
        self.conv = _StyledConv(outputs, outputs, size, latent, up=False)
        self.to_rgb = _ToRGB(outputs, latent)
        self.upsample = _smooth(nn.ConvTranspose2d(3, 3, 4, 2, 1, groups=3, bias=False))

    def forward(self, x: Tensor, image: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(self.up(x, w), w)
        return x, self.upsample(image) + self.to_rgb(x, w)


class StyleGAN2Generator(nn.Module):
    """Generator from z [N, latent] to images [N, 3, resolution, resolution], not bounded.

    resolution: a power of two from 8 on. channels: of the map with side S, channels / S but at most max_channels;
    the default is 512 up to 32x32, 256 at 64x64, and so on. Mapping network of `mapping` layers, no truncation,
    one w for all layers; the noise is drawn when the model is built and stays, so images depend on z alone.

    Demodulation reads the squared weights from buffers: call `refresh` after changing weights, as by pruning.
    Raises ValueError for another resolution.
    """

    def __init__(
        self,
        resolution: int = 256,
        latent: int = 512,
        channels: int = 16384,
        max_channels: int = 512,
        mapping: int = 8,
    ) -> None:
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution is a power of two from 8 on, got {resolution}")
        sizes = [2**power for power in range(2, resolution.bit_length())]
        width = {size: min(channels // size, max_channels) for size in sizes}
        layers = (layer for _ in range(mapping) for layer in (nn.Linear(latent, latent), nn.LeakyReLU(0.2)))
        self.mapping = nn.Sequential(*layers)
        self.constant = nn.Parameter(torch.randn(1, width[4], 4, 4))
        self.conv = _StyledConv(width[4], width[4], 4, latent, up=False)
        self.to_rgb = _ToRGB(width[4], latent)
        self.blocks = nn.ModuleList(_Block(width[size // 2], width[size], size, latent) for size in sizes[1:])

    def refresh(self) -> None:
        """Recompute what demodulation knows of the weights."""
        for module in self.modules():
            if isinstance(module, _StyledConv):
                module.refresh()

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))
        x = self.conv(self.constant, w)
        image: Tensor = self.to_rgb(x, w)
        for block in self.blocks:
            x, image = block(x, image, w)
        return image
