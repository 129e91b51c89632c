"""The whole generators that are compared with what a user would run instead, and how they are pruned for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsegan.models import (
    ResidualGenerator,
    StyleGAN2Generator,
    UNetGenerator,
    cyclegan_generator,
    dcgan_generator,
    mlp_generator,
    seeded,
    vae_decoder,
)
from sparsegan.patterns import PRUNABLE_TYPES, BlockPattern, from_weight_view, weight_view

# Layers with fewer channels on one side touch the image or are depthwise filters: nothing to gain, much to lose.
_LEAST_CHANNELS = 16


class MissingPackageError(ImportError):
    """A generator is built by a package that is not installed."""


@dataclass(frozen=True)
class Generator:
    """A generator with seeded random weights, which are as fast as trained ones.

    shape: of one input, without the batch. image: the input is an image in [-1, 1], not a latent. batches: to be
    timed. calibrations: batches that the int8 contestants see, fewer where one takes seconds.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    image: bool = False
    batches: tuple[int, ...] = (1,)
    calibrations: int = 16

    def inputs(self, batch: int, seed: int = 0) -> tuple[Tensor]:
        """Seeded positional inputs, float32 [batch, *shape]: standard normal latents or uniform images."""
        generator = torch.Generator().manual_seed(seed)
        if self.image:
            return (torch.rand(batch, *self.shape, generator=generator) * 2 - 1,)
        return (torch.randn(batch, *self.shape, generator=generator),)


def _dcgan(width: int) -> nn.Module:
    widths = (8 * width, 4 * width, 2 * width, width)
    return seeded(lambda: dcgan_generator(100, widths, image_channels=3), 1)


def _vae() -> nn.Module:
    return seeded(lambda: vae_decoder(128, 256, 8, (128, 64, 32), image_channels=3), 3)


def _stylegan2(resolution: int) -> nn.Module:
    return seeded(lambda: StyleGAN2Generator(resolution), 7)


def _taesd() -> nn.Module:
    """The decoder of the tiny autoencoder for Stable Diffusion, as diffusers has it."""
    try:
        from diffusers import AutoencoderTiny
    except ImportError as error:
        raise MissingPackageError(
            f"the TAESD decoder is built by diffusers: pip install diffusers ({error})"
        ) from error
    tiny: Any = AutoencoderTiny  # its configuration makes the attributes
    return seeded(lambda: tiny().decoder, 8)


def _stable_diffusion() -> nn.Module:
    """What turns latents into images in Stable Diffusion 1.5: vae/config.json of its checkpoint, in diffusers."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise MissingPackageError(
            f"the SD decoder is built by diffusers: pip install diffusers ({error})"
        ) from error

    def build() -> nn.Module:
        vae: Any = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            act_fn="silu",
            latent_channels=4,
            norm_num_groups=32,
            sample_size=512,
        )
        return nn.Sequential(vae.post_quant_conv, vae.decoder)

    return seeded(build, 9)


_IMAGE = (3, 256, 256)

GENERATORS = {
    generator.name: generator
    for generator in (
        Generator("mlp", "MLP GAN", partial(seeded, mlp_generator, 2), (100,), batches=(1, 16)),
        Generator("dcgan", "DCGAN-64 ngf 64", partial(_dcgan, 64), (100, 1, 1), batches=(1, 16)),
        Generator("dcgan-wide", "DCGAN-64 ngf 128", partial(_dcgan, 128), (100, 1, 1), batches=(1, 16)),
        Generator("vae", "conv VAE decoder", _vae, (128,), batches=(1, 16)),
        Generator(
            "residual", "residual GAN 128", partial(seeded, ResidualGenerator, 4), (128,), calibrations=4
        ),
        Generator(
            "cyclegan", "CycleGAN 256", partial(seeded, cyclegan_generator, 5), _IMAGE, True, calibrations=2
        ),
        Generator(
            "unet", "pix2pix U-Net 256", partial(seeded, UNetGenerator, 6), _IMAGE, True, calibrations=4
        ),
        Generator("stylegan2-128", "StyleGAN2 128", partial(_stylegan2, 128), (512,)),
        Generator("stylegan2-256", "StyleGAN2 256", partial(_stylegan2, 256), (512,)),
        Generator("taesd", "TAESD decoder 512", _taesd, (4, 64, 64), calibrations=2),
        Generator("sd-256", "SD VAE decoder 256", _stable_diffusion, (4, 32, 32), calibrations=1),
        Generator("sd-512", "SD VAE decoder 512", _stable_diffusion, (4, 64, 64), calibrations=1),
    )
}


@torch.no_grad()
def prune_uniformly(model: nn.Module, density: float, block: tuple[int, int] = (8, 4)) -> nn.Module:
    """Keep the share `density` of the blocks of every layer with 16 or more channels on both sides.

    In place, as zeros; returns `model`. The blocks with the largest L2 norm stay, the earlier of equal ones, and at
    least one of each layer. block: output x input channels. Depthwise filters and layers that touch the image
    have too few channels. Unlike `sparsegan.prune` this spares no layer for being small: it is for measuring speed.
    Raises ValueError for a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is the share of blocks to keep, in (0, 1]; got {density}")
    pattern = BlockPattern(*block)
    for layer in model.modules():
        if isinstance(layer, PRUNABLE_TYPES) and _is_wide(view := weight_view(layer)):
            norms = pattern.group_sums(view.double().square())
            order = norms.flatten().argsort(descending=True, stable=True)
            kept = torch.zeros_like(norms, dtype=torch.bool)
            kept.flatten()[order[: max(1, round(density * len(order)))]] = True
            layer.weight.copy_(from_weight_view(layer, view * pattern.expand(kept, tuple(view.shape))))
    if isinstance(model, StyleGAN2Generator):
        model.refresh()
    return model


def _is_wide(view: Tensor) -> bool:
    outputs, _, inputs = view.shape
    return min(outputs, inputs) >= _LEAST_CHANNELS
