"""Train a variational auto-encoder: first encoder and decoder, then the prior on the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from sparsegan import parallel
from sparsegan.models.vae import ConvVAE
from sparsegan.train.loop import Progress, Task, at_rest, descend, draw_indices, initialised, run
from sparsegan.training import full


class _Codes(Protocol):
    """What is trained here: images to mean and log-variance of the codes, codes to images."""

    decoder: nn.Module

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


class Vae(Task):
    """Encoder and decoder by the evidence lower bound, the KL term times `beta` (Higgins et al. 2017, beta-VAE, equation 4).

    The negative log-likelihood is that of a Gaussian whose variance is the best one for the batch, pixels / 2 * log(mse)
    (sigma-VAE: Rybkin et al. 2021, arXiv:2006.13202), which balances it with the KL term. Codes are drawn by
    reparameterisation, mean + exp(log-variance / 2) * noise (Kingma and Welling 2014, arXiv:1312.6114, section 2.4). Adam,
    cosine to zero. The loss shown is the mean squared error.

    model: has `encode` and `decoder`, as `ConvVAE`. images: [N, C, H, W] in [-1, 1].
    """

    def __init__(
        self, model: nn.Module, images: Tensor, *, batch: int = 64, beta: float = 5.0, lr: float = 2e-3
    ) -> None:
        self.model, self.images, self.batch, self.beta = model.train(), images, batch, beta
        self.modules = {"vae": model}
        self.optimisers = [torch.optim.Adam(model.parameters(), lr=lr)]
        self._shared = parallel.wrapped(_Bound(model))

    def step(self, rng: torch.Generator) -> Tensor:
        images = self.images[draw_indices(len(self.images), self.batch, rng)]
        mse, kl = map(parallel.mean, self._shared(images, rng))
        loss = images[0].numel() / 2 * mse.log() + self.beta * kl
        descend(loss, self.optimisers[0])
        # Not finite if any part of the loss was not.
        return mse.detach() + 0 * loss.detach()


class _Bound(nn.Module):
    """Mean squared error and KL divergence of a batch: one forward call, which is what gradients are averaged over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        vae = cast(_Codes, self.model)
        mean, log_variance = map(full, vae.encode(images))
        noise = torch.randn(len(mean) * parallel.world(), *mean.shape[1:], generator=rng)
        z = mean + torch.exp(0.5 * log_variance) * parallel.share(noise).to(mean)
        mse = (full(vae.decoder(z)) - images).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return mse, kl


def train_vae(
    images: Tensor,
    *,
    steps: int,
    batch: int = 64,
    beta: float = 5.0,
    seed: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
) -> ConvVAE:
    """Train the shipped VAE on images [N, 1, 32, 32] in [-1, 1] and return it in eval mode, its prior still untrained.

    Same seed, same thread count, same machine: same weights. Raises what `run` raises.
    """
    vae = initialised(ConvVAE, seed)
    run(
        Vae(vae, images, batch=batch, beta=beta),
        steps,
        seed=seed,
        settings=(batch, beta),
        state=state,
        progress=progress,
    )
    at_rest(vae)
    return vae


class _Prior(Task):
    """A network from standard normal noise to codes: the energy distance 2 E|x - y| - E|x - x'| - E|y - y'| of a batch of either.

    Szekely and Rizzo 2013, "Energy statistics", section 2: zero only for equal distributions, without an adversary.
    """

    def __init__(self, prior: nn.Module, mean: Tensor, deviation: Tensor, batch: int) -> None:
        self.prior, self.mean, self.deviation = prior.train().requires_grad_(True), mean, deviation
        self.batch = batch
        self.modules = {"prior": prior}
        self.optimisers = [torch.optim.Adam(prior.parameters(), lr=2e-3)]

    def step(self, rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.mean), (self.batch,), generator=rng)
        noise = torch.randn(2, self.batch, self.mean.shape[1], generator=rng)
        real, fake = self.mean[chosen] + self.deviation[chosen] * noise[0], self.prior(noise[1])
        loss = 2 * torch.cdist(real, fake).mean() - torch.pdist(real).mean() - torch.pdist(fake).mean()
        descend(loss, self.optimisers[0])
        return loss.detach()


def fit_prior(
    vae: nn.Module,
    images: Tensor,
    *,
    steps: int,
    batch: int = 512,
    seed: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Train vae.prior, in place, to map a standard normal to the distribution of the codes of images.

    Every process does the same: a step touches no image, and the distance looks at a batch as a whole. Adam, cosine to zero.
    Raises what `run` raises.
    """
    with torch.no_grad():
        encode = cast(_Codes, vae).encode
        codes = [torch.cat(part) for part in zip(*map(encode, images.split(batch)), strict=True)]
    prior = cast(nn.Module, vae.prior)
    task = _Prior(prior, codes[0], torch.exp(0.5 * codes[1]), batch)
    run(task, steps, seed=seed, settings=batch, state=state, progress=progress)
    at_rest(prior)
