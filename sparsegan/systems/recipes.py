"""The recipes: for each system what is built, how it is trained, and what is served in the end.

All sizes are those of a small end that two cores reach in minutes; `Settings` scales them up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsegan.metrics import TextureDistance
from sparsegan.models import (
    VAE,
    ConditionalGenerator,
    RecurrentDecoder,
    RecurrentEncoder,
    UNetGenerator,
    conv_discriminator,
    cyclegan_generator,
    load_model,
    mlp_generator,
    patch_discriminator,
    stem_generator,
    vae_decoder,
    vae_encoder,
)
from sparsegan.models.recurrent import Cell
from sparsegan.patterns import BlockPattern, Pattern
from sparsegan.prune import group_lasso, make_permanent, recover
from sparsegan.prune.distill import Phase, SampleInputs
from sparsegan.prune.during import Sparsifier
from sparsegan.prune.losses import Loss, l1, l1_plus_l2
from sparsegan.prune.trace import Inputs
from sparsegan.train.data import Images
from sparsegan.train.gan import Gan, latents, latents_and_labels, pairs
from sparsegan.train.loop import After, Progress, Task, Trained, at_rest, initialised, run
from sparsegan.train.tasks import TASKS
from sparsegan.train.vae import Vae
from sparsegan.training import fast_training, fingerprint

DISTANCES: dict[str, Callable[[], Loss]] = {
    "l1": lambda: l1,
    "l2": lambda: lambda image, target: (image - target).square().mean(),
    "l1+l2": lambda: l1_plus_l2,
    "texture": TextureDistance,
}


@dataclass(frozen=True)
class Settings:
    """What scales and changes a recipe.

    steps:    of training. batch: samples a step, of all processes together. width: factor of all channels.
    channels: of the images, 1 or 3. loss: of GANs, see `train.losses`. spectral: normalise the discriminator.
    beta:     weight of the KL term of VAEs. cell: of the recurrent one, "gru" or "lstm".
    sparsity, pattern: of what is pruned, while training or after it.
    prune:    how zeros come while training: "cubic", "threshold" or "rigl"; threshold: of the second.
    lasso:    weight of the group lasso. distance: that a student minimises, a name of `DISTANCES`.
    """

    steps: int
    batch: int = 64
    width: float = 1.0
    channels: int = 1
    loss: str = "hinge"
    spectral: bool = True
    beta: float = 1.0
    cell: Cell = "gru"
    sparsity: float = 0.75
    pattern: Pattern = field(default_factory=lambda: BlockPattern(4, 4))
    prune: str = "cubic"
    threshold: float | None = None
    lasso: float = 1e-5
    distance: str = "l1+l2"
    seed: int = 0


@dataclass
class System:
    """train:    trains, from a state file if there is one.
    generator: what is trained, its zeros held by masks if it has any.
    finish:   what is served of it, at rest, its zeros plain.
    inputs:   draws its inputs: latents, with labels, or images to be changed.
    examples: after training, inputs that belong to held-out images, and these: what is reconstructed or translated.
    sparse:   whether zeros came while training. latent: whether inputs are latents, so that images are drawn rather than changed.
    """

    train: Callable[[Path | None, Progress | None], Trained]
    generator: nn.Module
    finish: Callable[[], nn.Module]
    inputs: SampleInputs
    examples: Callable[[], tuple[Inputs, Tensor]] | None = None
    sparse: bool = False
    latent: bool = True


Build: TypeAlias = Callable[[Images, Images, Settings], System]


@dataclass(frozen=True)
class Recipe:
    """what: one sentence. build: makes the system of training images, held-out images and settings. side: of the images.

    options: of `Settings`, those that this system has beside the ones that all have. compress_steps: of the distillation that
    follows pruning, where the generator was not pruned while it was trained.
    """

    what: str
    build: Build
    settings: Settings
    side: int = 28
    options: tuple[str, ...] = ()
    compress_steps: int = 400


def _scaled(settings: Settings, *widths: int) -> list[int]:
    return [max(8, round(width * settings.width / 8) * 8) for width in widths]


def _seeded(build: Callable[[], nn.Module], seed: int, like: Tensor) -> nn.Module:
    """A module with weights from ``seed``, on the device of ``like``."""
    return initialised(build, seed).to(like.device)


def _trainer(
    task: Task, settings: Settings, images: Images, after: Sequence[After] = ()
) -> Callable[[Path | None, Progress | None], Trained]:
    return lambda state, progress: run(
        task,
        settings.steps,
        seed=settings.seed,
        settings=(settings, fingerprint((), images.images)),
        after=after,
        fast=True,
        state=state,
        progress=progress,
    )


# ------------------------------------------------------------------ generators from latents


def _discriminator(images: Tensor, settings: Settings, classes: int | None = None) -> nn.Module:
    build = partial(
        conv_discriminator,
        settings.channels,
        _scaled(settings, 64, 128),
        side=images.shape[-1],
        spectral=settings.spectral,
        classes=classes,
    )
    return _seeded(build, settings.seed + 1, images)


def _latent_gan(
    images: Images,
    settings: Settings,
    generator: Callable[[], nn.Module],
    latent: int,
    regulariser: Callable[[nn.Module], Tensor] | None = None,
    sparse: bool = False,
) -> System:
    def sparsify(model: nn.Module, optimiser: Optimizer, inputs: Inputs) -> Sparsifier:
        return Sparsifier(
            model,
            optimiser,
            settings.pattern,
            settings.sparsity,
            steps=settings.steps,
            kind=settings.prune,
            threshold=settings.threshold,
            example_inputs=inputs,
            seed=settings.seed,
        )

    task = Gan(
        _seeded(generator, settings.seed, images.images),
        _discriminator(images.images, settings),
        latents(images.images, (latent,), settings.batch),
        loss=settings.loss,
        regulariser=regulariser,
        sparsify=sparsify if sparse else None,
    )
    return System(
        _trainer(task, settings, images, task.after),
        task.generator,
        lambda: make_permanent(task.finished(settings.seed)),
        lambda n, rng: (torch.randn(n, latent, generator=rng),),
        sparse=sparse,
    )


def _mlp_gan(widths: Sequence[int], images: Images, held: Images, settings: Settings) -> System:
    shape = tuple(images.images.shape[1:])
    build = partial(mlp_generator, 100, _scaled(settings, *widths), image_shape=shape, norm=True)
    return _latent_gan(images, settings, build, 100)


def _dcgan(images: Images, held: Images, settings: Settings, **more: object) -> System:
    stem, *widths = _scaled(settings, 256, 128, 64)
    side = images.images.shape[-1]
    build = partial(stem_generator, 100, stem, side, widths, settings.channels)
    return _latent_gan(images, settings, build, 100, **more)  # type: ignore[arg-type]


def _dcgan_sparse(images: Images, held: Images, settings: Settings) -> System:
    return _dcgan(images, held, settings, sparse=True)


def _dcgan_lasso(images: Images, held: Images, settings: Settings) -> System:
    def penalty(generator: nn.Module) -> Tensor:
        return settings.lasso * group_lasso(generator, settings.pattern)

    return _dcgan(images, held, settings, regulariser=penalty)


def _conditional_gan(images: Images, held: Images, settings: Settings) -> System:
    if images.labels is None:
        raise ValueError(
            f"{images.name} has no labels: a conditional GAN needs them, a folder for each class, say"
        )
    classes, labels, latent = int(images.labels.max()) + 1, images.labels, 100
    stem, *widths = _scaled(settings, 256, 128, 64)
    side = images.images.shape[-1]
    generator = partial(ConditionalGenerator, classes, latent, 32, stem, side, widths, settings.channels)
    task = Gan(
        _seeded(generator, settings.seed, images.images),
        _discriminator(images.images, settings, classes),
        latents_and_labels(images.images, labels, latent, settings.batch),
        loss=settings.loss,
    )

    def inputs(n: int, rng: torch.Generator) -> Inputs:
        return torch.randn(n, latent, generator=rng), torch.randint(classes, (n,), generator=rng)

    return System(
        _trainer(task, settings, images), task.generator, lambda: task.finished(settings.seed), inputs
    )


# ------------------------------------------------------------------ auto-encoders


def _vae(
    encoder: Callable[[], nn.Module],
    decoder: Callable[[], nn.Module],
    latent: int,
    images: Images,
    held: Images,
    settings: Settings,
) -> System:
    build = partial(_seeded, lambda: VAE(encoder(), decoder(), latent), settings.seed)
    model = cast(VAE, build(images.images))
    task = Vae(model, images.images, batch=settings.batch, beta=settings.beta)

    def finish() -> nn.Module:
        at_rest(model.cpu())
        return model.decoder

    def examples() -> tuple[Inputs, Tensor]:
        with torch.no_grad():
            return (model.encode(held.images)[0],), held.images

    return System(
        _trainer(task, settings, images),
        model.decoder,
        finish,
        lambda n, rng: (torch.randn(n, latent, generator=rng),),
        examples,
    )


def _vae_mlp(images: Images, held: Images, settings: Settings) -> System:
    shape, latent = tuple(images.images.shape[1:]), 16
    encoder = partial(vae_encoder, latent, shape[-1], _scaled(settings, 32, 64), 5, settings.channels)
    decoder = partial(mlp_generator, latent, _scaled(settings, 512, 512), image_shape=shape)
    return _vae(encoder, decoder, latent, images, held, settings)


def _vae_conv(images: Images, held: Images, settings: Settings) -> System:
    side, latent = images.images.shape[-1], 16
    encoder = partial(vae_encoder, latent, side, _scaled(settings, 32, 64, 128), 5, settings.channels)
    stem, *widths = _scaled(settings, 192, 128, 64, 64)
    decoder = partial(vae_decoder, latent, stem, side // 8, widths, settings.channels)
    return _vae(encoder, decoder, latent, images, held, settings)


def _vae_recurrent(images: Images, held: Images, settings: Settings) -> System:
    channels, height, width = images.images.shape[1:]
    latent, (hidden,) = 16, _scaled(settings, 512)
    encoder = partial(RecurrentEncoder, latent, channels * width, hidden, settings.cell)
    decoder = partial(RecurrentDecoder, latent, (channels, height, width), hidden, settings.cell)
    return _vae(encoder, decoder, latent, images, held, settings)


# ------------------------------------------------------------------ images from images


def _translation(
    kind: str,
    generator: Callable[[Settings], Callable[[], nn.Module]],
    images: Images,
    held: Images,
    settings: Settings,
) -> System:
    change = TASKS[kind]
    given, wanted = change(images.images), images.images
    task = Gan(
        _seeded(generator(settings), settings.seed, given),
        _seeded(
            lambda: _PairDiscriminator(2 * settings.channels, _scaled(settings, 32)[0]),
            settings.seed + 1,
            given,
        ),
        pairs(given, wanted, settings.batch),
        loss="lsgan",
        rates=(5e-4, 2e-4),
        pixel_weight=100.0,
    )

    def inputs(n: int, rng: torch.Generator) -> Inputs:
        return (given[torch.randint(len(given), (n,), generator=rng)].cpu(),)

    return System(
        _trainer(task, settings, images),
        task.generator,
        lambda: task.finished(settings.seed),
        inputs,
        lambda: ((change(held.images),), held.images),
        latent=False,
    )


class _PairDiscriminator(nn.Module):
    """A patch discriminator of an image and what it was made from."""

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        self.body = patch_discriminator(image_channels, channels, levels=2)

    def forward(self, image: Tensor, given: Tensor) -> Tensor:
        scores: Tensor = self.body(torch.cat([given, image], 1))
        return scores


def _unet(settings: Settings) -> Callable[[], nn.Module]:
    return partial(UNetGenerator, _scaled(settings, 32)[0], 5, settings.channels)


def _resnet(settings: Settings) -> Callable[[], nn.Module]:
    return partial(cyclegan_generator, _scaled(settings, 32)[0], 4, settings.channels)


# ------------------------------------------------------------------ distillation


def _student(images: Images, held: Images, settings: Settings) -> System:
    """Half of the channels and one layer less than the shipped DCGAN, which teaches it on random latents alone."""
    teacher = load_model("dcgan")
    stem, *widths = _scaled(settings, 128, 64, 64)
    build = partial(stem_generator, teacher.latent_shape[0], stem, 32, widths)
    body = _seeded(build, settings.seed, held.images)
    student = nn.Sequential(nn.Flatten(), *cast(nn.Sequential, body))
    if settings.distance not in DISTANCES:
        raise ValueError(f"no distance is called {settings.distance!r}; there are {', '.join(DISTANCES)}")
    # Norms stay as they begin, scale and shift alone: the student learns in eval mode, as `recover` does.
    loss = DISTANCES[settings.distance]()
    phases = [Phase(1.0, loss, settings.batch)]
    if settings.distance == "texture":  # which finds no picture by itself
        phases = [Phase(0.5, l1_plus_l2, settings.batch), Phase(0.5, loss, settings.batch)]

    def train(state: Path | None, progress: Progress | None) -> Trained:
        start = time.monotonic()
        with fast_training():
            history = recover(
                student,
                teacher.model,
                teacher.sample_inputs,
                settings.steps,
                lr=5e-4,  # four times as much drives it into the ends of tanh, where nothing is learnt
                seed=settings.seed,
                loss=phases,
                progress=progress,
                state=state,
            )
        return Trained(history, seconds=time.monotonic() - start)

    def finish() -> nn.Module:
        at_rest(student)
        return student

    def examples() -> tuple[Inputs, Tensor]:
        z = teacher.sample_inputs(256, torch.Generator().manual_seed(settings.seed + 2**32))
        with torch.no_grad():
            return z, teacher.model(*z)

    return System(train, student, finish, teacher.sample_inputs, examples)


_BASE = Settings(steps=1500)
_OF_GANS = ("channels", "loss", "spectral")
_OF_VAES = ("channels", "beta")
# Layers without shared weights need longer, and their steps are short: after 400, KID of the MLP GAN is 2229, after 3000 667.
_MLP_STEPS = 3000

RECIPES = {
    "mlp-gan": Recipe(
        "MLP generator 100-1024-1024-1024-784 against a discriminator of strided 5x5 convolutions",
        partial(_mlp_gan, (1024, 1024, 1024)),
        _BASE,
        options=_OF_GANS,
        compress_steps=_MLP_STEPS,
    ),
    "mlp-gan-small": Recipe(
        "MLP generator 100-128-128-784 against the same discriminator",
        partial(_mlp_gan, (128, 128)),
        _BASE,
        options=_OF_GANS,
        compress_steps=_MLP_STEPS,
    ),
    "dcgan": Recipe(
        "DCGAN: a 7x7x256 stem and transposed 5x5 convolutions, BatchNorm, against strided convolutions",
        _dcgan,
        _BASE,
        options=_OF_GANS,
    ),
    "dcgan-sparse": Recipe(
        "the same, generator and discriminator pruned while they train (cubic schedule)",
        _dcgan_sparse,
        _BASE,
        options=(*_OF_GANS, "prune", "threshold"),
    ),
    "dcgan-rigl": Recipe(
        "the same, sparse from the first step, with blocks that are dropped and grown (RigL)",
        _dcgan_sparse,
        replace(_BASE, prune="rigl"),
        options=(*_OF_GANS, "prune", "threshold"),
    ),
    "dcgan-lasso": Recipe(
        "the DCGAN, trained with a group lasso on blocks, then pruned",
        _dcgan_lasso,
        _BASE,
        options=(*_OF_GANS, "lasso"),
    ),
    "conditional-gan": Recipe(
        "GAN that is told the class; projection discriminator",
        _conditional_gan,
        _BASE,
        side=32,
        options=_OF_GANS,
    ),
    "vae-mlp": Recipe(
        "VAE: 5x5 strided convolutions to mean and log-variance, MLP decoder 16-512-512-784",
        _vae_mlp,
        _BASE,
        options=_OF_VAES,
        compress_steps=_MLP_STEPS,
    ),
    "vae-conv": Recipe(
        "VAE with a convolutional decoder",
        _vae_conv,
        _BASE,
        side=32,
        options=_OF_VAES,
        compress_steps=1000,
    ),
    "vae-recurrent": Recipe(
        "VAE that reads and writes rows: GRU (or LSTM) encoder and decoder",
        _vae_recurrent,
        replace(_BASE, steps=1000),
        options=(*_OF_VAES, "cell"),
        compress_steps=1000,
    ),
    "super-resolve": Recipe(
        "pix2pix: a U-Net that makes images sharp that were a quarter of the size",
        partial(_translation, "super-resolve", _unet),
        replace(_BASE, steps=600, batch=16),
        side=32,
        options=("channels",),
    ),
    "deblur": Recipe(
        "residual generator (CycleGAN's) that undoes a Gaussian blur",
        partial(_translation, "deblur", _resnet),
        replace(_BASE, steps=600, batch=16),
        side=32,
        options=("channels",),
    ),
    "colourise": Recipe(
        "pix2pix: a U-Net that colours grey images",
        partial(_translation, "colourise", _unet),
        replace(_BASE, steps=600, batch=16, channels=3),
        side=64,
    ),
    "student": Recipe(
        "the shipped DCGAN taught to a generator with half of the channels and one layer less",
        _student,
        replace(_BASE, steps=1000),
        side=32,
        options=("distance",),
        compress_steps=1000,
    ),
}
