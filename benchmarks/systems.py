"""Every recipe of `sparsegan train` to its small end, and what came of it: writes docs/systems.md and its pictures.

    python -m benchmarks.systems             trains what is not there yet, prints the page
    python -m benchmarks.systems --write     writes it, too
    python -m benchmarks.systems --rows ...  these recipes only; --losses ... these losses of the DCGAN

Runs are kept in benchmarks/results/systems, so that one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from sparsegan.checkpoint import save
from sparsegan.models import load_model
from sparsegan.patterns import BlockPattern
from sparsegan.prune import (
    choose_threshold,
    make_permanent,
    prune,
    prune_below,
    prune_neurons,
    prune_random_rows,
    sparsity_report,
)
from sparsegan.report import compare_formats, machine_facts, mean_psnr
from sparsegan.swap import SwapConfig, swap_to_sparse
from sparsegan.systems import RECIPES, run_system
from sparsegan.train.losses import LOSSES

ROOT = Path(__file__).parent.parent
PAGE, PICTURES = ROOT / "docs" / "systems.md", ROOT / "docs" / "images"
RESULTS = Path(__file__).parent / "results" / "systems"
LOSS_STEPS = 400
_LOSSES_HEADING = f"""## Losses of GANs

The same DCGAN, {LOSS_STEPS} steps each; spectral normalisation but for the Wasserstein losses.
"""


def made(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """The report of a recipe with some settings changed; from disk, if it was run before."""
    path = folder / "report.json"
    if not path.exists():
        start = time.monotonic()
        steps = 0 if changes else None  # what only trains is not distilled after it
        run_system(name, folder, replace(RECIPES[name].settings, **changes), compress_steps=steps)
        print(f"{folder.name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def systems_table(reports: dict[str, dict[str, Any]]) -> Iterable[str]:
    yield "| recipe | what it is | minutes | KID x1000 | IS | PSNR, dB | kB | x eager, batch 1 | batch 16 |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, report in reports.items():
        before, after = report["before"], report["after"]

        def both(key: str, digits: str, before: Any = before, after: Any = after) -> str:
            return f"{before[key]:{digits}} → {after[key]:{digits}}" if key in before else "–"

        cells = [
            f"[{name}](#{name})",
            RECIPES[name].what,
            f"{report['train_minutes'] + report['compress_minutes']:.1f}",
            both("kid", ".0f"),
            both("inception_score", ".1f"),
            both("psnr", ".1f"),
            f"{report['dense_bytes'] / 1000:.0f} → {report['file_bytes'] / 1000:.0f}",
            *(f"{speed['speedup']:.1f}" for speed in report["speeds"]),
        ]
        yield f"| {' | '.join(cells)} |"


def losses_table(reports: dict[str, dict[str, Any]]) -> Iterable[str]:
    yield "| loss | KID x1000 | precision | recall | minutes | undone |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, report in reports.items():
        before = report["before"]
        yield (
            f"| {name} | {before['kid']:.0f} | {before['precision']:.2f} | {before['recall']:.2f} | "
            f"{report['train_minutes']:.1f} | {len(report['undone'])} |"
        )


def formats_table(model: nn.Module, inputs: tuple[Any, ...]) -> Iterable[str]:
    yield "| weights as | bits | error of the weights | PSNR of the images, dB | kB |"
    yield "| --- | --- | --- | --- | --- |"
    for row in compare_formats(model, inputs):
        yield (
            f"| {row.scheme} | {row.bits} | {row.weight_error:.2%} | {row.psnr:.1f} | {row.weight_bytes / 1000:.0f} |"
        )


def parameters_table(model: nn.Module, inputs: tuple[Any, ...]) -> Iterable[str]:
    """Ways to prune parameters, without training after it; PSNR to the dense model."""
    ways = {
        "single weights below 0.02": prune_below(copy.deepcopy(model), 0.02),
        "4x4 blocks by magnitude": prune(copy.deepcopy(model), BlockPattern(4, 4), 0.25, "l1", inputs),
        "4x4 blocks by second order": prune(copy.deepcopy(model), BlockPattern(4, 4), 0.25, "obd", inputs),
        "random rows": prune_random_rows(copy.deepcopy(model), 0.25, seed=0),
        "neurons by mean gradient": prune_neurons(copy.deepcopy(model), 0.25, inputs),
    }
    yield "| what goes | share of the operations | PSNR, dB |"
    yield "| --- | --- | --- |"
    for name, pruned in ways.items():
        rows = sparsity_report(make_permanent(pruned), inputs)
        gone = 1 - sum(row.macs_kept for row in rows) / sum(row.macs_dense for row in rows)
        yield f"| {name} | {gone:.0%} | {_fidelity(pruned, model, inputs):.1f} |"


def thresholds_table(model: nn.Module, inputs: tuple[Any, ...]) -> Iterable[str]:
    """How large a threshold on weights may be when the mean squared error on validation latents must stay below 0.01."""

    def error(pruned: nn.Module) -> float:
        with torch.no_grad():
            return (pruned(*inputs) - model(*inputs)).square().mean().item()

    choice = choose_threshold(model, [0.0025 * 2**i for i in range(6)], error, tolerance=0.01)
    yield "| threshold | weights below it | mean squared error | |"
    yield "| --- | --- | --- | --- |"
    for trial in choice.trials:
        chosen = "chosen" if trial.threshold == choice.threshold else ""
        yield f"| {trial.threshold:g} | {trial.sparsity:.0%} | {trial.score:.4f} | {chosen} |"


def four_bits(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    pruned = make_permanent(prune(copy.deepcopy(model), BlockPattern(8, 4), 0.75, "obd", inputs))
    sizes = []
    for bits in (8, 4):
        swapped = swap_to_sparse(pruned, SwapConfig(weight_bits=bits), inputs)
        path = RESULTS / f"{bits}-bit.safetensors"
        save(swapped, path)
        sizes.append(
            f"{path.stat().st_size / 1000:.0f} kB with {bits} bits ({_fidelity(swapped, pruned, inputs):.1f} dB)"
        )
    return (
        f"Stored packed, two weights in a byte, and run by the int8 kernels (`SwapConfig(weight_bits=4)`), the model pruned to a "
        f"quarter in 8x4 blocks takes {' and '.join(sizes)} to the same zeros in float32."
    )


def _fidelity(model: nn.Module, wanted: nn.Module, inputs: tuple[Any, ...]) -> float:
    with torch.no_grad():
        return mean_psnr(model(*inputs), wanted(*inputs))


def render(reports: dict[str, dict[str, Any]], losses: dict[str, dict[str, Any]]) -> str:
    """The page, in Markdown."""
    shipped = load_model("dcgan")
    inputs = shipped.sample_inputs(64, torch.Generator().manual_seed(1))
    data = next(iter(reports.values()))["data"]
    lines = [
        f"""# Systems

Written by `python -m benchmarks.systems --write` (`make systems`). Each row is `sparsegan train RECIPE`: trained on {data}
(coloured shapes for "colourise") to its small end, pruned to a quarter of the operations in 4x4 blocks, distilled from
its dense self where it was not pruned while training, quantised to int8 and swapped. Arrows go from the trained dense model
to the fast one. KID x1000 and Inception score are by the features of the shipped classifier of clothing (2,000 samples against
2,000 held-out images): compare them within this page only. PSNR of VAEs is of held-out reconstructions, of image-to-image systems
to the image wanted, of the student to its teacher. Times are ratios to torch eager float32, in turn, on
{machine_facts()["cpu"]}, {torch.get_num_threads()} threads.
""",
        *systems_table(reports),
        "",
        *([_LOSSES_HEADING, *losses_table(losses)] if losses else []),
        "\n## Number formats of weights\n\nThe shipped DCGAN, dense, without training.\n",
        *formats_table(shipped.model, inputs),
        "",
        four_bits(shipped.model, inputs),
        "\n## Ways to prune parameters\n\nThe same model, a quarter or so removed, no training after it.\n",
        *parameters_table(shipped.model, inputs),
        "\n## Choosing a threshold\n\n`choose_threshold`: the largest that costs at most 0.01 of mean squared error.\n",
        *thresholds_table(shipped.model, inputs),
    ]
    for name, report in reports.items():
        distilled = f", then {report['compress_steps']} of distillation" if report["compress_steps"] else ""
        lines += [
            "",
            f"## {name}",
            "",
            f"{RECIPES[name].what}. `sparsegan train {name}`, {report['settings']['steps']} steps{distilled}.",
            "",
            f"![{name}](images/system-{name}.png)",
        ]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/systems.md and its pictures")
    parser.add_argument("--rows", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--losses", nargs="*", choices=LOSSES, default=list(LOSSES), metavar="LOSS")
    options = parser.parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    reports = {name: made(name, RESULTS / name) for name in options.rows}
    losses = {
        loss: made(
            "dcgan", RESULTS / f"loss-{loss}", loss=loss, steps=LOSS_STEPS, spectral="wgan" not in loss
        )
        for loss in options.losses
    }
    page = render(reports, losses)
    print(page)
    if options.write:
        PAGE.write_text(page)
        for name in reports:
            picture = Image.open(RESULTS / name / "samples.png").convert("RGB")
            picture.quantize(64).save(PICTURES / f"system-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
