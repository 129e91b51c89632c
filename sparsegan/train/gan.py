"""Train the DCGAN generator against a spectrally normalised discriminator, with the hinge loss."""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, update_bn

from sparsegan.models.dcgan import dcgan_generator

LATENT = 64


def _discriminator() -> nn.Sequential:
    """Images [N, 1, 32, 32] to scores [N, 1, 1, 1]; after Miyato et al. 2018, arXiv:1802.05957."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (64, 128, 128):
        layers += [spectral_norm(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.1)]
        channels = width
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, 4)))


def train_gan(
    images: Tensor,
    *,
    steps: int,
    batch: int = 64,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Sequential:
    """Train a generator on images [N, 1, 32, 32] in [-1, 1] and return it in eval mode.

    Hinge loss (Lim and Ye 2017, arXiv:1705.02894), Adam with beta1 0.5 (DCGAN), the discriminator learning
    twice as fast (two time-scale rule: Heusel et al. 2017, arXiv:1706.08500), both rates constant for half of
    the steps, then linear to zero. What is returned is the moving average of the generator's weights (Yazici
    et al. 2019, arXiv:1806.04498) with its normalisation statistics measured anew. Same seed, same thread
    count, same machine: same weights. `progress` gets the step and the discriminator's loss after each step.
    Raises FloatingPointError when a loss is no longer finite.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers initialise themselves from the global generator
        torch.manual_seed(seed)
        generator, discriminator = dcgan_generator(LATENT), _discriminator()
    average = AveragedModel(generator, avg_fn=lambda mean, new, _: torch.lerp(mean, new, 0.005))
    g_optimiser = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.99))
    d_optimiser = torch.optim.Adam(discriminator.parameters(), lr=4e-4, betas=(0.5, 0.99))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, 2 * (1 - step / steps)))
        for optimiser in (g_optimiser, d_optimiser)
    ]

    def latents() -> Tensor:
        return torch.randn(batch, LATENT, 1, 1, generator=rng)

    for step in range(1, steps + 1):
        real = images[torch.randint(len(images), (batch,), generator=rng)]
        fake = generator(latents())

        real_scores, fake_scores = discriminator(torch.cat([real, fake.detach()])).chunk(2)
        d_loss = (1 - real_scores).relu().mean() + (1 + fake_scores).relu().mean()
        d_optimiser.zero_grad()
        d_loss.backward()
        d_optimiser.step()

        g_loss = -discriminator(fake).mean()
        g_optimiser.zero_grad()
        g_loss.backward(inputs=list(generator.parameters()))  # leaves the discriminator's gradients alone
        g_optimiser.step()

        average.update_parameters(generator)
        for schedule in schedules:
            schedule.step()
        loss = d_loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the discriminator's loss is {loss} at step {step}; try another seed")
        if progress is not None:
            progress(step, loss)

    update_bn([latents() for _ in range(30)], average)
    return cast(nn.Sequential, average.module).eval().requires_grad_(False)
