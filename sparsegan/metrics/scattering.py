"""A distance of images that needs no trained network: how much of which texture there is, and where."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsegan.metrics.perceptual import feature_shift

_ORIENTATIONS, _SCALES, _SMALLEST = 6, 4, 8
# Morlet wavelets of 7x7 pixels: Gaussian of 1.6 pixels, 2.7 across, under a wave of 2 radians a pixel.
_SIZE, _SIGMA, _SLANT, _FREQUENCY = 7, 1.6, 0.6, 2.0
# RGB to brightness and two colour differences.
_YUV = ((0.299, 0.587, 0.114), (-0.147, -0.289, 0.436), (0.615, -0.515, -0.1))
_ROUND_OFF = 1e-6  # under the root: a modulus has no gradient at zero


class Scattering(nn.Module):
    """Images [N, 1 or 3, H, W] in [-1, 1] to maps of the moduli of wavelet coefficients, first and second order.

    Bruna and Mallat 2013, arXiv:1203.1513, section 2: |x * psi| averaged over 2x2 pixels, for Morlet wavelets of 6 orientations
    at up to 4 scales (each half the size of the one before, down to 8 pixels) of brightness and colours, and the same again of
    the moduli of brightness one scale up; at last the image that is left. A modulus does not tell where in a wave a pixel lies,
    so that texture that is a little elsewhere counts as the same texture, where a difference of pixels would rather have none.
    """

    def __init__(self) -> None:
        super().__init__()
        offset = torch.arange(_SIZE) - _SIZE // 2
        y, x = torch.meshgrid(offset, offset, indexing="ij")
        waves = []
        for step in range(_ORIENTATIONS):
            angle = math.pi * step / _ORIENTATIONS
            along, across = (
                x * math.cos(angle) + y * math.sin(angle),
                y * math.cos(angle) - x * math.sin(angle),
            )
            envelope = torch.exp(-(along.square() + (_SLANT * across).square()) / (2 * _SIGMA**2))
            wave = torch.exp(1j * _FREQUENCY * along)
            wave = envelope * (wave - (envelope * wave).sum() / envelope.sum())  # of mean zero
            wave = wave / wave.abs().sum()
            waves += [wave.real, wave.imag]
        self.register_buffer("waves", torch.stack(waves), persistent=False)
        self.register_buffer("yuv", torch.tensor(_YUV), persistent=False)

    waves: Tensor
    yuv: Tensor

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.shape[1] == 3:
            images = torch.einsum("oc,nchw->nohw", self.yuv, images.float())
        maps = []
        for scale in range(_SCALES):
            if min(images.shape[2:]) < _SMALLEST:
                break
            moduli = self._moduli(images)
            maps.append(F.avg_pool2d(moduli, 2))
            brightness = maps[-1][:, :_ORIENTATIONS]
            if scale < _SCALES - 1 and min(brightness.shape[2:]) >= _SMALLEST:
                maps.append(F.avg_pool2d(self._moduli(brightness), 2))
            images = F.avg_pool2d(images, 2)
        return [*maps, images]

    def _moduli(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C * orientations, H, W]."""
        channels, margin = x.shape[1], _SIZE // 2
        # One dense convolution with zeros between channels: several times as fast as a grouped one.
        weight = x.new_zeros(channels, len(self.waves), channels, _SIZE, _SIZE)
        weight[range(channels), :, range(channels)] = self.waves.to(x.dtype)
        x = F.pad(x.contiguous(memory_format=torch.channels_last), [margin] * 4, mode="reflect")
        parts = F.conv2d(x, weight.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return parts.float().square().unflatten(1, (-1, 2)).sum(2).add(_ROUND_OFF).sqrt()


class TextureDistance(nn.Module):
    """Mean absolute difference of the `Scattering` of two batches of images, each map by its own mean; a loss (own).

    shift: weight of `feature_shift`.
    """

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.scattering, self.shift = Scattering(), shift

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """image, target: [N, 1 or 3, H, W] in [-1, 1]; a scalar."""
        with torch.no_grad():
            wanted = self.scattering(target)
        found = self.scattering(image)
        parts = [
            (a - b).abs().mean() / b.abs().mean().clamp_min(1e-6) for a, b in zip(found, wanted, strict=True)
        ]
        return torch.stack(parts).mean() + self.shift * feature_shift(found, wanted)
