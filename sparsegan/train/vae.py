"""Train the convolutional VAE: first encoder and decoder, then the prior on the codes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsegan.models.vae import ConvVAE


def train_vae(
    images: Tensor,
    *,
    steps: int,
    batch: int = 64,
    beta: float = 5.0,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> ConvVAE:
    """Train a VAE on images [N, 1, 32, 32] in [-1, 1] and return it in eval mode, its prior still untrained.

    The negative log-likelihood is that of a Gaussian whose variance is the best one for the batch, pixels / 2
    * log(mse) (sigma-VAE: Rybkin et al. 2021, arXiv:2006.13202), which balances it with the KL term; `beta`
    multiplies the KL term, since much of it goes at no cost in reconstruction. Adam, cosine to zero. Same
    seed, same thread count, same machine: same weights. `progress` gets the step and the mean squared error
    after each step. Raises FloatingPointError when the loss is no longer finite.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers initialise themselves from the global generator
        torch.manual_seed(seed)
        vae = ConvVAE()
    pixels = images[0].numel()
    optimiser = torch.optim.Adam(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    for step in range(1, steps + 1):
        batch_images = images[torch.randint(len(images), (batch,), generator=rng)]
        mean, log_variance = vae.encode(batch_images)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=rng)
        mse = (vae.decoder(z) - batch_images).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        loss = pixels / 2 * mse.log() + beta * kl
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the VAE's loss is {loss.item()} at step {step}; try another seed")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step, mse.item())
    return vae.eval().requires_grad_(False)


def fit_prior(
    vae: ConvVAE,
    images: Tensor,
    *,
    steps: int,
    batch: int = 512,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train vae.prior, in place, to map a standard normal to the distribution of the codes of images.

    Loss: the energy distance 2 E|x - y| - E|x - x'| - E|y - y'| between a batch of either (Szekely and Rizzo
    2013, "Energy statistics", section 2), zero only for equal distributions; no adversary. Adam, cosine to
    zero. `progress` gets the step and the loss after each step. Raises FloatingPointError when the loss is no
    longer finite.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        codes = [torch.cat(part) for part in zip(*map(vae.encode, images.split(batch)), strict=True)]
    mean, deviation = codes[0], torch.exp(0.5 * codes[1])
    prior = vae.prior.train().requires_grad_(True)
    optimiser = torch.optim.Adam(prior.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    for step in range(1, steps + 1):
        chosen = torch.randint(len(mean), (batch,), generator=rng)
        noise = torch.randn(2, batch, vae.latent, generator=rng)
        real, fake = mean[chosen] + deviation[chosen] * noise[0], prior(noise[1])
        loss = 2 * torch.cdist(real, fake).mean() - torch.pdist(real).mean() - torch.pdist(fake).mean()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the prior's loss is {loss.item()} at step {step}; try another seed")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step, loss.item())
    prior.eval().requires_grad_(False)
