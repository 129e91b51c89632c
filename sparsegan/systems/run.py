"""Run a recipe: train, compress, compare before and after, and leave files that can be served."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegan import parallel
from sparsegan.checkpoint import load, save
from sparsegan.compress import compress
from sparsegan.files import write_atomically
from sparsegan.metrics import (
    extractors,
    features,
    inception_score,
    kid,
    load_backbone,
    precision_recall,
    ssim,
)
from sparsegan.metrics.backbones import ClothingClassifier
from sparsegan.prune import prune, sparsity_report
from sparsegan.prune.distill import SampleInputs
from sparsegan.prune.trace import image_of
from sparsegan.report import check_kernels, finite, image_grid, mean_psnr, measure_speed, model_bytes
from sparsegan.swap import SwapConfig, swap_to_sparse
from sparsegan.systems.recipes import RECIPES, Settings, System
from sparsegan.train.data import Images, load_images
from sparsegan.training import fingerprint

Stage: TypeAlias = Callable[[str, int, int], None]
"""``(stage, steps done, steps in all)``, the stage being "train" or one of `compress`"""

_HELD_OUT, _SAMPLES, _SHOWN, _BETWEEN, _TIMED_SECONDS = 2000, 2000, 16, 8, 2.0
# Far from the seeds of training: these latents are new to the model.
_EVALUATION = 2**35
_CALIBRATION = 64
# Fewer images say nothing about the distribution that they are from.
_FEWEST = 10


def run_system(
    name: str,
    out: Path,
    settings: Settings | None = None,
    *,
    data: Path | None = None,
    compress_steps: int | None = None,
    device: torch.device | str = "cpu",
    progress: Stage | None = None,
) -> dict[str, Any]:
    """Train the recipe called ``name``, make it fast, and measure it before and after.

    data:           a folder of pictures, idx files or an npz file, see `load_images`; None takes Fashion-MNIST where it is
                    installed.
    compress_steps: of the distillation that follows pruning, None for the recipe's own number; a recipe that prunes while it
                    trains has none.
    device:         that trains from images; all else, distillation too, is done on the CPU, which the fast model is for.
    out:            gets `model.safetensors` (the fast model, for `sparsegan generate` and `load`), `dense.safetensors`,
                    `samples.png`, `interpolation.png` for latents, `report.json`, and what is needed to go on after a kill.

    Under `torchrun` all processes train, distil and evaluate together; the first one measures times and writes files.

    Returns what report.json holds. Raises ValueError for another name and settings that do not fit, what `load_images`, `run` and
    `compress` raise.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    settings = recipe.settings if settings is None else settings
    compress_steps = recipe.compress_steps if compress_steps is None else compress_steps
    images, held = split(load_images(data, recipe.side, settings.channels), settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    system = recipe.build(_on(images, device), held, settings)
    if not system.sparse:  # what cannot be pruned is known before it is trained
        trial = copy.deepcopy(system.generator).cpu()
        prune(trial, settings.pattern, settings.sparsity, "l2", example_inputs=_inputs(system, 1))

    trained = system.train(out / "training.safetensors", _shown(progress, settings.steps))
    dense = system.finish().cpu()
    fast = _made_fast(system, dense, settings, out, compress_steps, progress)

    left = sparsity_report(fast.pruned, _inputs(system, 1))
    report: dict[str, Any] = {
        "recipe": name,
        "what": recipe.what,
        "data": images.name,
        "settings": asdict(settings) | {"pattern": str(settings.pattern)},
        "compress_steps": 0 if system.sparse else compress_steps,
        "train_minutes": trained.seconds / 60,
        "compress_minutes": fast.seconds / 60,
        "first_loss": trained.history[0],
        "last_loss": sum(trained.history[-20:]) / len(trained.history[-20:]),
        "undone": trained.events,
        "removed": 1 - sum(row.macs_kept for row in left) / sum(row.macs_dense for row in left),
        "before": judge(system, dense, held),
        "after": judge(system, fast.swapped, held),
    }
    if parallel.rank() == 0:
        report |= _measured(system, dense, fast.swapped, out)
        _draw(system, dense, fast.swapped, out)
        write_atomically(out / "report.json", json.dumps(finite(report), indent=1).encode())
    return report


def split(images: Images, seed: int) -> tuple[Images, Images]:
    """Training images and held-out ones: at most `_HELD_OUT`, a tenth of a small set, chosen by ``seed``."""
    count = len(images.images)
    held = min(_HELD_OUT, max(1, count // 10))
    if count < 2:
        raise ValueError(
            f"{images.name} holds {count} images: training needs some, and one at least to compare with"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def part(chosen: Tensor) -> Images:
        labels = None if images.labels is None else images.labels[chosen]
        return Images(images.images[chosen], labels, images.name)

    return part(order[held:]), part(order[:held])


def _on(images: Images, device: torch.device | str) -> Images:
    labels = None if images.labels is None else images.labels.to(device)
    return replace(images, images=images.images.to(device), labels=labels)


class _Fast(NamedTuple):
    """pruned: dense float32 with plain zeros. swapped: what is served. seconds: that it took."""

    pruned: nn.Module
    swapped: nn.Module
    seconds: float


def _made_fast(
    system: System, dense: nn.Module, settings: Settings, out: Path, steps: int, progress: Stage | None
) -> _Fast:
    if system.sparse:
        start = time.perf_counter()
        config = SwapConfig(calibration=[_inputs(system, _CALIBRATION, settings.seed + i) for i in range(4)])
        swapped = parallel.from_first(lambda: swap_to_sparse(dense, config, _inputs(system, 1)))
        return _Fast(dense, swapped, time.perf_counter() - start)
    compressed = compress(
        dense,
        system.inputs,
        sparsity=settings.sparsity,
        pattern=settings.pattern,
        method="blocks",
        perceptual=None,
        steps=steps,
        seed=settings.seed,
        # What is kept of the work on one dense model is no part of that on another.
        folder=out / f"compressed-{fingerprint((), *dense.state_dict().values())[:8]}",
        progress=progress,
    )
    return _Fast(compressed.pruned, compressed.model, compressed.seconds)


def _inputs(system: System, n: int, seed: int = _EVALUATION) -> tuple[Any, ...]:
    return system.inputs(n, torch.Generator().manual_seed(seed))


def _shown(progress: Stage | None, steps: int) -> Callable[[int, float], None] | None:
    return None if progress is None else lambda done, loss: progress("train", done, steps)


# ------------------------------------------------------------------ before and after


def judge(system: System, model: nn.Module, held: Images) -> dict[str, float]:
    """How good the images of ``model`` are.

    "psnr" (dB) and "ssim" of what it makes of the examples. For latents "kid" (x1000), "precision" and "recall" of `_SAMPLES`
    images against the held-out ones, if those are `_FEWEST` or more, by features of the shipped classifier of clothing for grey
    images, of EfficientNet-lite0 for coloured ones where it has been fetched; "inception_score" with the classifier, for
    clothing. Processes share the work.
    """
    found: dict[str, float] = {}
    if system.examples is not None:
        inputs, wanted = system.examples()
        made = images_of(model, inputs)
        found |= {"psnr": mean_psnr(made, wanted), "ssim": ssim(made, wanted).mean().item()}
    grey = held.images.shape[1] == 1
    extractor = "clothing" if grey else "efficientnet-lite0"
    if not system.latent or len(held.images) < _FEWEST or extractors()[extractor] is not None:
        return found
    samples = images_of(model, _inputs(system, _SAMPLES))
    wanted_features, sample_features = (features(_framed(x), extractor) for x in (held.images, samples))
    found["kid"] = kid(sample_features, wanted_features)
    found["precision"], found["recall"] = precision_recall(sample_features, wanted_features)
    if grey and held.name == "Fashion-MNIST":
        classifier = cast(ClothingClassifier, load_backbone("clothing"))
        with torch.no_grad():
            logits = torch.cat([classifier.logits(part) for part in _framed(samples).split(200)])
        found["inception_score"] = inception_score(logits.softmax(1))
    return found


def images_of(model: nn.Module, inputs: tuple[Any, ...], batch: int = 100) -> Tensor:
    """What ``model`` makes of inputs [N, ...], a batch at a time; each process makes its share of a batch."""
    made = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), batch):
            part = tuple(x[start : start + batch] for x in inputs)
            shared = len(part[0]) % parallel.world() == 0
            images = image_of(model(*(map(parallel.share, part) if shared else part))).float()
            made.append(parallel.gather(images) if shared else images)
    return torch.cat(made)


def _framed(images: Tensor) -> Tensor:
    """Images of 28x28 in the frame of two black pixels that the classifier was trained with."""
    return F.pad(images, (2, 2, 2, 2), value=-1.0) if images.shape[-1] == 28 else images


def _measured(system: System, dense: nn.Module, swapped: nn.Module, out: Path) -> dict[str, Any]:
    """Sizes, times and the error of the kernels; the model is saved, and the saved one must make the same images."""
    inputs = _inputs(system, 16)
    error = check_kernels(swapped, tuple(x[:4] for x in inputs))
    path = out / "model.safetensors"
    save(swapped, path)
    state = {name: t.detach().contiguous().clone() for name, t in dense.state_dict().items()}
    write_atomically(out / "dense.safetensors", save_tensors(state))
    with torch.no_grad():
        if not torch.equal(load(out / "model.safetensors")(*inputs), swapped(*inputs)):
            raise RuntimeError(
                f"{out / 'model.safetensors'} gives other images than the model that was saved"
            )
        fidelity = mean_psnr(image_of(swapped(*inputs)), image_of(dense(*inputs)))
    speeds = measure_speed(dense, swapped, system.inputs, seconds=_TIMED_SECONDS)
    return {
        "kernel_error": error,
        "psnr_to_dense": fidelity,
        "dense_bytes": model_bytes(dense),
        "file_bytes": path.stat().st_size,
        "speeds": [vars(speed) | {"speedup": speed.speedup} for speed in speeds],
    }


def _draw(system: System, dense: nn.Module, swapped: nn.Module, out: Path) -> None:
    rows: list[tuple[str, Tensor]] = []
    count, inputs = _SHOWN, _inputs(system, _SHOWN)
    if system.examples is not None:
        given, wanted = system.examples()
        count = min(_SHOWN, len(wanted))
        inputs = tuple(x[:count] for x in given)
        rows = (
            [("wanted", wanted[:count])]
            if system.latent
            else [("given", inputs[0]), ("wanted", wanted[:count])]
        )
    with torch.no_grad():
        rows += [("dense", image_of(dense(*inputs))), ("fast", image_of(swapped(*inputs)))]
        if system.latent and system.examples is not None:
            rows.append(("drawn", image_of(swapped(*_inputs(system, count)))))
    image_grid(rows, count).save(out / "samples.png")
    if system.latent:
        ways = interpolation(swapped, system.inputs, 4, _BETWEEN)
        image_grid([("", ways)], _BETWEEN).save(out / "interpolation.png")


def interpolation(model: nn.Module, inputs: SampleInputs, lines: int, columns: int, seed: int = 0) -> Tensor:
    """Images [lines * columns, C, H, W] on ``lines`` ways from one latent to another in ``columns`` steps, along a sphere.

    Latents are the floating-point inputs [N, ...]; others, such as labels, stay those of the start. Raises ValueError for
    columns < 2. Spherical interpolation: Shoemake 1985, section 3.3; White 2016, arXiv:1609.04468.
    """
    if columns < 2:
        raise ValueError(f"an interpolation needs 2 columns or more, got {columns}")
    rng = torch.Generator().manual_seed(seed)
    starts, ends = inputs(lines, rng), inputs(lines, rng)
    times = torch.linspace(0, 1, columns)

    def between(a: Tensor, b: Tensor) -> Tensor:
        if not a.is_floating_point():
            return a.repeat_interleave(columns, 0)
        shape = (lines, 1, *[1] * (a.dim() - 1))
        cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-0.9999, 0.9999)
        angle = cosine.arccos().view(shape)
        t = times.view(1, columns, *[1] * (a.dim() - 1))
        way = ((1 - t) * angle).sin() * a[:, None] + (t * angle).sin() * b[:, None]
        return (way / angle.sin()).flatten(0, 1)

    with torch.no_grad():
        return image_of(model(*map(between, starts, ends)))
