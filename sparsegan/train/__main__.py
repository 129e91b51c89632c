"""`python -m sparsegan.train gan|vae|clothing --out DIR`: train, measure, write weights, card and grid."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from sparsegan.metrics import density_coverage, psnr, ssim
from sparsegan.train.artifacts import save_card, save_grid, save_weights
from sparsegan.train.clothing import train_clothing
from sparsegan.train.data import load_fashion_mnist, load_labels
from sparsegan.train.gan import LATENT, train_gan
from sparsegan.train.vae import fit_prior, train_vae

app = typer.Typer(add_completion=False, help="Train what sparsegan ships, on Fashion-MNIST.")

Out = Annotated[Path, typer.Option(help="Folder for the weights, the card and the sample grid.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder of the idx files; by default of Debian's dataset-fashion-mnist.")
]
Steps = Annotated[int, typer.Option(min=1, help="Training steps.")]
Seed = Annotated[int, typer.Option(help="Seed of the weights, the batches and the latents.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads. More are faster and round differently.")]

# Both sets of the density and coverage figures: their distances are a matrix of this size squared.
_COMPARED = 2000

# Images in a row of the grids.
_SHOWN = 16


@contextmanager
def _progress_bar(name: str, steps: int, loss_name: str) -> Iterator[Callable[[int, float], None]]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=steps, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss_name} {loss:.4f}")


@contextmanager
def _reported() -> Iterator[None]:
    """Data that is missing or damaged ends the command with the reason."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _images(data: Path | None) -> tuple[Tensor, Tensor]:
    """Training images and the first test images that the figures compare with."""
    with _reported():
        train_images, test_images = (
            load_fashion_mnist("train", data),
            load_fashion_mnist("test", data)[:_COMPARED],
        )
        if len(test_images) < _SHOWN:
            raise ValueError(f"the test set should hold {_SHOWN} images or more, it holds {len(test_images)}")
        return train_images, test_images


def _labelled(split: Literal["train", "test"], data: Path | None) -> tuple[Tensor, Tensor]:
    with _reported():
        images, labels = load_fashion_mnist(split, data), load_labels(split, data)
        if len(images) != len(labels):
            raise ValueError(f"the {split} set has {len(images)} images and {len(labels)} labels")
        return images, labels


def _settings(steps: int, seed: int, seconds: float, model: nn.Module) -> dict[str, object]:
    return {
        "steps": steps,
        "seed": seed,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, stored as float16",
        "trained with": f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}",
        "time": f"{seconds / 60:.1f} minutes",
    }


def _likeness(samples: Tensor, test: Tensor) -> dict[str, str]:
    density, coverage = density_coverage(samples, test)
    return {
        f"density among {len(test):,} test images, pixels, k = 5 (ideal 1, noise 0)": f"{density:.2f}",
        f"coverage of {len(test):,} test images (ideal 1, noise 0)": f"{coverage:.2f}",
    }


@app.command()
def gan(out: Out, data: Data = None, steps: Steps = 3000, seed: Seed = 0, threads: Threads = 1) -> None:
    """Train the DCGAN generator: writes dcgan.safetensors, dcgan.md and dcgan.png."""
    train_images, test_images = _images(data)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    start = time.perf_counter()
    with _progress_bar("dcgan", steps, "discriminator loss") as progress:
        generator = train_gan(train_images, steps=steps, seed=seed, progress=progress)
    seconds = time.perf_counter() - start

    latents = torch.randn(_COMPARED, LATENT, 1, 1, generator=torch.Generator().manual_seed(seed))
    samples = generator(latents)
    save_weights(generator, out / "dcgan.safetensors")
    save_grid(samples[: 4 * _SHOWN], out / "dcgan.png", columns=_SHOWN)
    save_card(
        out / "dcgan.md",
        title="dcgan: a generator of 32x32 pictures of clothing",
        what="A DCGAN generator, z [N, 64, 1, 1] standard normal to images [N, 1, 32, 32] in [-1, 1]. "
        "The picture shows samples, not chosen.",
        command=f"python -m sparsegan.train gan --out DIR --steps {steps} --seed {seed} --threads {threads}",
        settings=_settings(steps, seed, seconds, generator),
        figures=_likeness(samples, test_images),
    )
    typer.echo(f"wrote {out / 'dcgan.safetensors'}, dcgan.md and dcgan.png")


@app.command()
def vae(out: Out, data: Data = None, steps: Steps = 2000, seed: Seed = 0, threads: Threads = 1) -> None:
    """Train the convolutional VAE: writes vae.safetensors, vae.md and vae.png."""
    train_images, test_images = _images(data)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    start = time.perf_counter()
    with _progress_bar("vae", steps, "mean squared error") as progress:
        model = train_vae(train_images, steps=steps, seed=seed, progress=progress)
    prior_steps = 4 * steps  # still a tenth of the time: a step of the prior touches no image
    with _progress_bar("prior", prior_steps, "energy distance") as progress:
        fit_prior(model, train_images, steps=prior_steps, seed=seed, progress=progress)
    seconds = time.perf_counter() - start

    latents = torch.randn(_COMPARED, model.latent, generator=torch.Generator().manual_seed(seed))
    samples = model.generator()(latents)
    reconstructions = model(test_images)
    save_weights(model, out / "vae.safetensors")
    shown = torch.cat([test_images[:_SHOWN], reconstructions[:_SHOWN], samples[: 2 * _SHOWN]])
    save_grid(shown, out / "vae.png", columns=_SHOWN)
    save_card(
        out / "vae.md",
        title="vae: a variational auto-encoder of 32x32 pictures of clothing",
        what=f"A convolutional VAE, images [N, 1, 32, 32] in [-1, 1] to codes z [N, {model.latent}] "
        "and back. The picture shows, from the top: a row of test images, their reconstructions, "
        "and two rows of samples of the prior, not chosen.",
        command=f"python -m sparsegan.train vae --out DIR --steps {steps} --seed {seed} --threads {threads}",
        settings=_settings(steps, seed, seconds, model),
        figures={
            "reconstruction of test images, PSNR": f"{psnr(reconstructions, test_images).mean():.1f} dB",
            "reconstruction of test images, SSIM": f"{ssim(reconstructions, test_images).mean():.3f}",
            **_likeness(samples, test_images),
        },
    )
    typer.echo(f"wrote {out / 'vae.safetensors'}, vae.md and vae.png")


@app.command()
def clothing(out: Out, data: Data = None, steps: Steps = 2000, seed: Seed = 0, threads: Threads = 1) -> None:
    """Train the classifier whose features measure images: writes clothing.safetensors and clothing.md."""
    (images, labels), (test_images, test_labels) = _labelled("train", data), _labelled("test", data)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    start = time.perf_counter()
    with _progress_bar("clothing", steps, "cross-entropy") as progress:
        model = train_clothing(images, labels, steps=steps, seed=seed, progress=progress)
    seconds = time.perf_counter() - start

    guesses = torch.cat([model.logits(batch).argmax(1) for batch in test_images.split(500)])
    save_weights(model, out / "clothing.safetensors")
    save_card(
        out / "clothing.md",
        title="clothing: a classifier of 32x32 pictures of clothing, for its features",
        what="A small convolutional network, images [N, 1, 32, 32] in [-1, 1] to ten kinds of clothing. Its features "
        "stand in, for measuring and as a perceptual distance, where no network trained on photographs is at hand.",
        command=f"python -m sparsegan.train clothing --out DIR --steps {steps} --seed {seed} --threads {threads}",
        settings=_settings(steps, seed, seconds, model),
        figures={
            f"right guesses, {len(test_labels):,} test images": f"{(guesses == test_labels).float().mean():.1%}"
        },
    )
    typer.echo(f"wrote {out / 'clothing.safetensors'} and clothing.md")


if __name__ == "__main__":
    app()
