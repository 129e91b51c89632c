"""The tables at the end of a benchmark run, and the targets, met or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.shapes import REFERENCE_LAYER
from benchmarks.timing import Row

RIVALS = ("eager", "channels_last", "compile")


@dataclass(frozen=True)
class Target:
    """Something that this project wants to reach. value is None when the rows for it were not measured."""

    text: str
    wanted: float
    value: float | None
    source: str

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value >= self.wanted else "NOT MET"


def targets(rows: Sequence[Row]) -> list[Target]:
    """All targets against `rows`; where several rows would do, the best one counts, and is named."""
    layer = [row for row in rows if (row.model, row.layer) == (REFERENCE_LAYER.model, REFERENCE_LAYER.layer)]
    single = [row for row in layer if row.what == REFERENCE_LAYER.description]
    chained = [row for row in rows if row.steady_ms is not None]
    faces = [row for row in rows if row.model == "face DCGAN" and not row.layer]

    found = []
    for sparsity, share in ((0.0, 0.80), (0.75, 0.75)):
        density = f"{1 - sparsity:.2f}"
        wants = _only(dtype="int8", sparsity=sparsity)
        text = f"3x3 256→256 at 32x32, int8, density {density}: share of the peak"
        alone, inside = filter(wants, single), filter(wants, chained)
        found.append(_best(f"{text}, float in and out", share, alone, lambda row: row.peak_share))
        found.append(_best(f"{text}, in a chain", share, inside, lambda row: row.steady_peak_share))
    for batch, ratio in ((1, 10.0), (16, 6.0)):
        wants = _only(dtype="int8", sparsity=0.75, batch=batch)
        text = f"face DCGAN, int8, 75 % removed, batch {batch}: times eager float32"
        found.append(_best(text, ratio, filter(wants, faces), lambda r: r.speedup("eager")))
    wants = _only(dtype="f32", sparsity=0.75)
    text = "3x3 256→256 at 32x32, f32, density 0.25: times eager float32"
    found.append(_best(text, 2.0, filter(wants, single), lambda r: r.speedup("eager")))
    dense = list(filter(_only(dtype="int8", sparsity=0.0), rows))
    slowest = min(dense, key=lambda row: row.speedup("eager") or 0.0, default=None)
    found.append(
        Target(
            "density 1.00, int8: the slowest of all rows, times eager float32",
            1.0,
            slowest.speedup("eager") if slowest else None,
            _name(slowest) if slowest else "",
        )
    )
    return found


def row_table(title: str, rows: Sequence[Row]) -> Table:
    """One line a row: milliseconds, times faster than each rival, GMAC/s, share of the peak."""
    table = Table("", "what", title=title, title_justify="left", caption_justify="left")
    against = (f"x {rival}" for rival in RIVALS)
    for head in ("batch", "type", "density", "ms", *against, "GMAC/s", "dense-eq.", "of peak", "in chain"):
        table.add_column(head, justify="right")
    before: tuple[str, str] | None = None
    for row in rows:
        names = (f"{row.model} {row.layer}".strip(), row.what)
        steady = row.steady_peak_share
        table.add_row(
            *(names if names != before else ("", "")),
            str(row.batch),
            f"{row.dtype} {row.pattern}",
            f"{row.macs_executed / row.macs_dense:.2f}",
            f"{row.ms['sparsegan']:.3f}",
            *(_cell(row.speedup(rival)) for rival in RIVALS),
            f"{row.executed_gmacs:.0f}",
            f"{row.dense_equivalent_gmacs:.0f}",
            f"{row.peak_share:.0%}",
            "" if steady is None else f"{steady:.0%}",
        )
        before = names
    table.caption = (
        "x: times faster than the dense model in torch; GMAC/s executed; dense-eq.: as if nothing were left "
        "out; in chain: share of the peak of a further layer, packed input and output"
    )
    return table


def target_table(found: Sequence[Target]) -> Table:
    table = Table("target", title="targets", title_justify="left")
    for head in ("wanted", "reached", "verdict"):
        table.add_column(head, justify="right")
    table.add_column("row")
    for target in found:
        reached = "-" if target.value is None else f"{target.value:.2f}"
        style = "green" if target.verdict == "met" else "red" if target.value is not None else "dim"
        verdict = f"[{style}]{target.verdict}[/]"
        table.add_row(target.text, f"{target.wanted:.2f}", reached, verdict, target.source)
    return table


def _only(**fields: object) -> Callable[[Row], bool]:
    return lambda row: all(getattr(row, name) == value for name, value in fields.items())


def _best(text: str, wanted: float, rows: filter[Row], value: Callable[[Row], float | None]) -> Target:
    scored = [(score, _name(row)) for row in rows if (score := value(row)) is not None]
    best, source = max(scored, default=(None, ""))
    return Target(text, wanted, best, source)


def _name(row: Row) -> str:
    return f"{row.model} {row.layer} {row.pattern}, batch {row.batch}".replace("  ", " ")


def _cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
