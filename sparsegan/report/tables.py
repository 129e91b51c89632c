"""Tables for the terminal (rich), 80 characters wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from sparsegan.report.results import LayerResult, ModelResult, Speed

_SPEED = ("batch", "ms\ndense", "ms\nnow", "speed\nup")
_SIZE = ("kB\ndense", "kB\nnow")


def layer_table(name: str, layers: Sequence[LayerResult]) -> Table:
    """One row a layer of the model called `name`."""
    table = _table(f"{name}: layer by layer", ("layer", "kind", "now"), ("den-\nsity", *_SIZE, "PSNR\ndB"))
    for layer in layers:
        table.add_row(
            layer.name or "(model)",
            layer.kind,
            _now(layer),
            f"{layer.density:.2f}",
            _kilobytes(layer.dense_bytes),
            _kilobytes(layer.sparse_bytes),
            "–" if math.isnan(layer.psnr) else f"{layer.psnr:.1f}",
        )
    notes = ["PSNR: of the output of each layer, pruned against dense, float32"]
    notes += [f"{layer.name or '(model)'} stays: {layer.why}" for layer in layers if not layer.swapped]
    table.caption = "\n".join(notes)
    return table


def model_table(results: Sequence[ModelResult]) -> Table:
    """One row for each model and batch size."""
    table = _table("whole models", ("model",), ("removed", *_SPEED, *_SIZE, "PSNR\ndB", "SSIM"))
    for result in results:
        sizes = _kilobytes(result.dense_bytes), _kilobytes(result.sparse_bytes)
        once = [*sizes, f"{result.psnr:.1f}", f"{result.ssim:.3f}"]
        for index, speed in enumerate(result.speeds):
            first = index == 0
            table.add_row(
                result.name if first else "",
                f"{result.removed:.0%}" if first else "",
                str(speed.batch),
                *_times(speed),
                *(once if first else [""] * len(once)),
            )
    table.caption = "against the dense float32 model in torch eager, in turn; PSNR and SSIM to its images"
    return table


def speed_table(speeds: Sequence[Speed]) -> Table:
    """One row for each batch size."""
    table = _table(None, (), _SPEED)
    for speed in speeds:
        table.add_row(str(speed.batch), *_times(speed))
    return table


def sweep_table(name: str, points: Sequence[Any], methods: Sequence[str]) -> Table:
    """One row a `SweepPoint` of the model called `name`, with the method that was chosen for it."""
    table = _table(
        f"{name}: quality against speed",
        ("method", "Pareto front"),
        ("removed", "speed\nup", "KID\nx1000", "PSNR\ndB"),
    )
    for point, method in zip(points, methods, strict=True):
        table.add_row(
            method,
            "yes" if point.pareto else "no",
            f"{point.sparsity:.0%}",
            f"{_short(point.speedup, 2)}x",
            f"{point.kid:.2f}",
            f"{point.psnr:.1f}",
        )
    return table


def _now(layer: LayerResult) -> str:
    if not layer.swapped:
        return "as it was"
    return layer.dtype if layer.pattern == "dense" else f"{layer.dtype} {layer.pattern}"


def _table(title: str | None, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(
        *words,
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for head in numbers:
        table.add_column(head, justify="right")
    return table


def _times(speed: Speed) -> tuple[str, str, str]:
    """Milliseconds and the speed-up."""
    return _short(speed.dense_ms), _short(speed.sparse_ms), f"{_short(speed.speedup, 2)}x"


def _short(number: float, digits: int = 3) -> str:
    """At most `digits` decimals, fewer for large numbers."""
    return f"{number:.{max(digits - len(f'{number:.0f}') + 1, 0)}f}"


def _kilobytes(count: int) -> str:
    return f"{count / 1000:.0f}"


def system_table(report: dict[str, Any]) -> Table:
    """What `systems.run_system` returned: before and after in two lines."""
    table = _table(report["recipe"], ("model",), ("kB", "ms\nbatch 1", "ms\nbatch 16", *_JUDGED))
    speeds = report.get("speeds", [])
    for state, size, time in (
        ("before", "dense_bytes", "dense_ms"),
        ("after", "file_bytes", "sparse_ms"),
    ):
        times = [f"{speed[time]:.3g}" for speed in speeds] or ["–", "–"]
        judged = [report[state].get(name) for name in _JUDGED.values()]
        table.add_row(
            state,
            _kilobytes(report[size]) if size in report else "–",
            *times,
            *("–" if value is None else f"{value:.3g}" for value in judged),
        )
    minutes = (
        f"{report['train_minutes']:.1f} minutes of training, {report['compress_minutes']:.1f} of compression"
    )
    table.caption = f"{report['removed']:.0%} of the operations removed; {minutes}"
    return table


_JUDGED = {
    "KID\nx1000": "kid",
    "preci-\nsion": "precision",
    "recall": "recall",
    "IS": "inception_score",
    "PSNR\ndB": "psnr",
    "SSIM": "ssim",
}
