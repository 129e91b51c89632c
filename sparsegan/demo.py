"""The main job: trained generators made fast, checked, timed and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sparsegan.checkpoint import load, save
from sparsegan.compress import Compressed, compress
from sparsegan.compress import Progress as StageProgress
from sparsegan.metrics import ssim
from sparsegan.models import LoadedModel, load_model
from sparsegan.patterns import Pattern
from sparsegan.prune import sparsity_report
from sparsegan.report import (
    ModelResult,
    check_kernels,
    image_grid,
    layer_results,
    layer_table,
    machine_facts,
    mean_psnr,
    measure_speed,
    model_bytes,
    model_table,
)

DEFAULT_MODELS = ("dcgan", "vae")

# Of distillation: what fits, with the rest, in about a minute a model on two cores.
DEFAULT_STEPS = {"dcgan": 1000, "vae": 1000, "faces": 600}

IMAGES, COLUMNS = 24, 12
_EVALUATED = 256  # latents that quality is averaged over
_CHECKED = 4  # samples that the kernels are checked on: the reference is slow


def run_demo(
    names: Sequence[str],
    out: Path,
    *,
    pattern: Pattern,
    sparsity: float = 0.75,
    steps: int | None = None,
    seed: int = 0,
    seconds: float = 3.0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compress each of the models called `names`, check, time and show it.

    out:     folder for `{name}.png` (dense and compressed images of the same latents), `{name}.safetensors`
             (the swapped model) and `demo.json`.
    steps:   of distillation; None takes those of `DEFAULT_STEPS`.
    seconds: to time each model at each batch size.
    console: where tables and progress bars go; None keeps quiet.

    Returns what demo.json holds. Raises what `load_model` and `compress` raise, WrongKernelError when the
    kernels do not agree with the reference, RuntimeError when the saved model does not come back the same.
    """
    console = console or Console(quiet=True)
    loaded = [load_model(name) for name in names]
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for model in loaded:
        with stage_bars(console, model.name) as show:
            compressed = compress(
                model.model,
                model.sample_inputs,
                pattern=pattern,
                sparsity=sparsity,
                method="blocks",
                perceptual=None,
                steps=DEFAULT_STEPS[model.name] if steps is None else steps,
                seed=seed,
                progress=show,
            )
        result = evaluate(model, compressed, out, seconds)
        console.print(layer_table(model.name, result.layers))
        results.append(result)
    report = {
        "machine": machine_facts(),
        "settings": {"pattern": str(pattern), "sparsity": sparsity, "seed": seed},
        "models": [result.to_json() for result in results],
    }
    text = json.dumps(report, indent=2, allow_nan=False)
    (out / "demo.json").write_text(text + "\n", encoding="utf-8")
    console.print(model_table(results))
    for result in results:
        console.print(
            f"{result.name}: int8 against the same weights in float32 {result.psnr_swapped:.1f} dB; "
            f"kernels differ from the reference by {result.kernel_error:.1g}; "
            f"saved ({result.file_bytes / 1000:.0f} kB) and loaded again it gives the same images"
        )
    names_written = ", ".join(f"{name}.png" for name in names)
    console.print(f"look at {names_written} in {out}; all numbers are in {out / 'demo.json'}")
    return report


def evaluate(model: LoadedModel, compressed: Compressed, out: Path, seconds: float) -> ModelResult:
    """Check, save, measure and draw one compressed model; files go to `out`. See `run_demo`."""
    dense, pruned, swapped = model.model, compressed.pruned, compressed.model
    # The seed is far from those of training and calibration: these latents are new to the model.
    inputs = model.sample_inputs(_EVALUATED, torch.Generator().manual_seed(2**32 + 1))
    kernel_error = check_kernels(swapped, tuple(x[:_CHECKED] for x in inputs))
    path = out / f"{model.name}.safetensors"
    save(swapped, path)
    with torch.no_grad():
        images, before_int8, after = dense(*inputs), pruned(*inputs), swapped(*inputs)
        _check_reloaded(path, inputs, after)
    sparsities = sparsity_report(pruned, tuple(x[:1] for x in inputs))
    removed = 1 - sum(row.macs_kept for row in sparsities) / sum(row.macs_dense for row in sparsities)
    rows = [("dense", images[:IMAGES]), (f"{removed:.0%} removed, int8", after[:IMAGES])]
    image_grid(rows, COLUMNS, scale=max(1, 64 // images.shape[-1])).save(out / f"{model.name}.png")
    return ModelResult(
        name=model.name,
        removed=removed,
        steps=len(compressed.history),
        compress_seconds=compressed.seconds,
        dense_bytes=model_bytes(dense),
        sparse_bytes=model_bytes(swapped),
        file_bytes=path.stat().st_size,
        psnr=mean_psnr(after, images),
        ssim=ssim(after, images).mean().item(),
        psnr_pruned=mean_psnr(before_int8, images),
        psnr_swapped=mean_psnr(after, before_int8),
        kernel_error=kernel_error,
        speeds=measure_speed(dense, swapped, model.sample_inputs, seconds=seconds),
        layers=layer_results(dense, pruned, swapped, inputs),
    )


@contextmanager
def stage_bars(console: Console, name: str) -> Iterator[StageProgress]:
    """Progress bars for the stages of `compress`, as its `progress` callback."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{name}: {stage}", total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def _check_reloaded(path: Path, inputs: tuple[torch.Tensor, ...], images: torch.Tensor) -> None:
    if not torch.equal(load(path)(*inputs), images):
        raise RuntimeError(f"the model loaded from {path} gives other images than the one that was saved")
