"""Train a generator against a discriminator: from latents, of a class, or from images to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel

from sparsegan import parallel
from sparsegan.models.dcgan import dcgan_generator
from sparsegan.train.loop import After, Progress, Task, at_rest, descend, draw_indices, initialised, run
from sparsegan.train.losses import adversarial_loss, gradient_penalty
from sparsegan.training import full

LATENT = 64

# Generated images that differ less than this from each other, relative to real ones, are all the same one. So are those of a
# generator that has just begun: only one whose images differed more before has collapsed.
_COLLAPSED, _ALIVE = 0.1, 0.3
_MEASURED_BATCHES = 30


class Batch(NamedTuple):
    """inputs: of the generator. real: images [N, C, H, W]. context: what the discriminator sees beside an image."""

    inputs: tuple[Tensor, ...]
    real: Tensor
    context: tuple[Tensor, ...] = ()


Draw: TypeAlias = Callable[[torch.Generator], Batch]
Sparsify: TypeAlias = Callable[[nn.Module, torch.optim.Optimizer, tuple[Tensor, ...]], After]


class Gan(Task):
    """A generator and a discriminator that learn in turn, and the moving average of the generator.

    draw:         a batch, this process's share of it.
    loss:         a name of `losses.LOSSES`.
    rates:        of generator and discriminator; the second learns faster (two time-scale rule: Heusel et al. 2017,
                  arXiv:1706.08500). Constant for half of the steps, then linear to zero. Adam, beta1 0.5 (DCGAN), 0 for the
                  Wasserstein losses, whose papers ask for no momentum.
    average:      share of the new weights in the moving average at each step (Yazici et al. 2019, arXiv:1806.04498).
    pixel_weight: of the mean absolute error to the real image, where the generator's inputs determine it (pix2pix: Isola et al.
                  2017, arXiv:1611.07004, equation 3).
    regulariser:  of the generator, added to its loss.
    sparsify:     makes what prunes a model while its optimiser trains it, of both and example inputs. `after` has them, for
                  `run`.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        draw: Draw,
        *,
        loss: str = "hinge",
        rates: tuple[float, float] = (2e-4, 4e-4),
        average: float = 0.005,
        pixel_weight: float = 0.0,
        regulariser: Callable[[nn.Module], Tensor] | None = None,
        sparsify: Sparsify | None = None,
    ) -> None:
        self.generator, self.discriminator, self.draw = generator.train(), discriminator.train(), draw
        self.loss, self.pixel_weight, self.regulariser = adversarial_loss(loss), pixel_weight, regulariser
        beta = 0.0 if "wgan" in loss else 0.5
        self.optimisers = [
            torch.optim.Adam(model.parameters(), lr=rate, betas=(beta, 0.99))
            for model, rate in zip((generator, discriminator), rates, strict=True)
        ]
        self.after: list[After] = []
        if sparsify is not None:
            batch = draw(torch.Generator())
            examples = batch.inputs, (batch.real, *batch.context)
            models = zip((generator, discriminator), self.optimisers, examples, strict=True)
            self.after = [sparsify(*one) for one in models]
        # From here on the masks are part of what is copied and wrapped.
        self.average = AveragedModel(generator, avg_fn=lambda mean, new, _: torch.lerp(mean, new, average))
        self.modules = {"generator": generator, "discriminator": discriminator, "average": self.average}
        self._shared_generator, self._shared_discriminator = map(parallel.wrapped, (generator, discriminator))
        self._variation = self._most = 0.0

    def rate(self, progress: float) -> float:
        return min(1.0, 2 * (1 - progress))

    def step(self, rng: torch.Generator) -> Tensor:
        g_optimiser, d_optimiser = self.optimisers
        for _ in range(self.loss.critic_steps - 1):
            batch = self.draw(rng)
            with torch.no_grad():
                fake = full(self.generator(*batch.inputs))
            self._discriminate(batch, fake, rng, d_optimiser)
        batch = self.draw(rng)
        fake = full(self._shared_generator(*batch.inputs))
        d_loss = self._discriminate(batch, fake.detach(), rng, d_optimiser)

        self.discriminator.requires_grad_(False)
        g_loss = self.loss.generator(full(self.discriminator(fake, *batch.context)))
        if self.pixel_weight:
            g_loss = g_loss + self.pixel_weight * (fake - batch.real).abs().mean()
        if self.regulariser is not None:
            g_loss = g_loss + self.regulariser(self.generator)
        descend(g_loss, g_optimiser)
        self.discriminator.requires_grad_(True)

        self.average.update_parameters(self.generator)
        with torch.no_grad():
            self._variation = float(_variation(fake) / _variation(batch.real).clamp_min(1e-6))
            self._most = max(self._most, self._variation)
        return parallel.mean(d_loss.detach())

    def _discriminate(
        self, batch: Batch, fake: Tensor, rng: torch.Generator, optimiser: torch.optim.Optimizer
    ) -> Tensor:
        discriminator = self._shared_discriminator
        twice = tuple(torch.cat([x, x]) for x in batch.context)
        scores = full(discriminator(torch.cat([batch.real, fake]), *twice))
        loss = self.loss.discriminator(*scores.chunk(2))
        if self.loss.penalty:
            mix = parallel.share(torch.rand(len(fake) * parallel.world(), 1, 1, 1, generator=rng)).to(fake)
            penalty = gradient_penalty(discriminator, batch.real, fake, batch.context, mix)
            loss = loss + self.loss.penalty * penalty
        descend(loss, optimiser)
        if self.loss.clip is not None:
            with torch.no_grad():
                for parameter in self.discriminator.parameters():
                    parameter.clamp_(-self.loss.clip, self.loss.clip)
        return loss

    def trouble(self) -> str | None:
        """Mode collapse: whatever goes in, one image comes out, while the real ones differ."""
        variation, most = parallel.mean(torch.tensor([self._variation, self._most])).tolist()
        if variation < _COLLAPSED and most > _ALIVE:
            return (
                f"the generator has collapsed: its images vary {variation:.2f} times as much as the real ones"
            )
        return None

    def finished(self, seed: int) -> nn.Module:
        """The moving average of the generator, its normalisation statistics measured anew, at rest."""
        rng = torch.Generator().manual_seed(seed)
        return self.measured([self.draw(rng).inputs for _ in range(_MEASURED_BATCHES)])

    def measured(self, batches: Sequence[tuple[Tensor, ...]]) -> nn.Module:
        """The same, on these inputs."""
        model = self.average.module
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean of all batches
        with parallel.shared_norms(model.train()), torch.no_grad():
            for inputs in batches if norms else []:
                model(*inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        at_rest(model)
        return cast(nn.Module, model)


def _variation(images: Tensor) -> Tensor:
    """Standard deviation over the batch, mean over pixels."""
    return images.std(0).mean() if len(images) > 1 else images.new_ones(())


def latents(images: Tensor, latent_shape: tuple[int, ...], batch: int) -> Draw:
    """Batches of real images and of standard normal z [N, *latent_shape]."""

    def one(rng: torch.Generator) -> Batch:
        real = images[draw_indices(len(images), batch, rng)]
        z = parallel.share(torch.randn(batch, *latent_shape, generator=rng))
        return Batch((z.to(real),), real)

    return one


def latents_and_labels(images: Tensor, labels: Tensor, latent: int, batch: int) -> Draw:
    """The same with classes: generator and discriminator see labels int64 [N], those of the real images."""

    def one(rng: torch.Generator) -> Batch:
        chosen = draw_indices(len(images), batch, rng)
        z = parallel.share(torch.randn(batch, latent, generator=rng)).to(images)
        return Batch((z, labels[chosen]), images[chosen], (labels[chosen],))

    return one


def pairs(inputs: Tensor, images: Tensor, batch: int) -> Draw:
    """Images to make others of, both [N, C, H, W]; the discriminator sees the input beside the image."""

    def one(rng: torch.Generator) -> Batch:
        chosen = draw_indices(len(images), batch, rng)
        return Batch((inputs[chosen],), images[chosen], (inputs[chosen],))

    return one


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
    state: Path | None = None,
    progress: Progress | None = None,
) -> nn.Sequential:
    """Train the shipped DCGAN generator on images [N, 1, 32, 32] in [-1, 1] and return it in eval mode.

    Hinge loss, a spectrally normalised discriminator, `Gan` for the rest. Same seed, same thread count, same machine: same
    weights. Raises what `run` raises.
    """
    generator, discriminator = initialised(lambda: (dcgan_generator(LATENT), _discriminator()), seed)
    task = Gan(generator, discriminator, latents(images, (LATENT, 1, 1), batch))
    trained = run(task, steps, seed=seed, settings=batch, state=state, progress=progress)
    z = [(torch.randn(batch, LATENT, 1, 1, generator=trained.rng),) for _ in range(_MEASURED_BATCHES)]
    return cast(nn.Sequential, task.measured(z))
