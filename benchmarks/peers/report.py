"""What the rows of a run say: ratios to the best peer, tables, a chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Entry = dict[str, Any]


def timed(row: Row) -> dict[str, Entry]:
    """The contestants of a row that are valid and have a time, by name."""
    return {
        name: entry
        for name, entry in row["contestants"].items()
        if entry["state"] == "valid" and entry.get("ms")
    }


def is_ours(entry: Entry) -> bool:
    return entry.get("density") is not None


def best_peer(row: Row) -> str | None:
    """The name of the fastest valid contestant that is not ours; None when there is none."""
    peers = {name: entry["ms"] for name, entry in timed(row).items() if not is_ours(entry)}
    return min(peers, key=peers.__getitem__, default=None)


def ratio(row: Row, ours: str, rival: str | None) -> float | None:
    """How many times faster `ours` is than `rival`; None unless both are valid and timed."""
    entries = timed(row)
    if rival is None or rival not in entries or ours not in entries:
        return None
    quotient: float = entries[rival]["ms"] / entries[ours]["ms"]
    return quotient


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def variants(rows: Sequence[Row]) -> list[str]:
    """The names of our contestants, in the order in which they appear."""
    return list(dict.fromkeys(n for row in rows for n, e in row["contestants"].items() if is_ours(e)))


def means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each of our variants at batch 1: the geometric means, how many models, how many of them it wins."""
    found = []
    for name in variants(rows):
        single = [row for row in rows if row["batch"] == 1]
        best = [value for row in single if (value := ratio(row, name, best_peer(row))) is not None]
        eager = [value for row in single if (value := ratio(row, name, "eager")) is not None]
        found.append(
            {
                "variant": name,
                "models": len(best),
                "wins": sum(value > 1 for value in best),
                "x_best_peer": geometric_mean(best),
                "x_eager": geometric_mean(eager),
            }
        )
    return found


def markdown(results: dict[str, Any]) -> str:
    """All of a run, for people. results: as peers.json holds them."""
    rows = results["rows"]
    parts = [
        "# Beside what a user would run instead",
        " · ".join(f"{name} {value}" for name, value in results["machine"].items()),
        "Random weights; contestants in turn, medians over rounds. The best peer is the fastest other contestant with "
        "a right output, whatever its precision; it always runs the dense model. Carry ratios to other machines, not "
        "milliseconds.",
        "## Geometric means at batch 1",
        _means_table(rows),
        "## Every model",
        _ratio_table(rows),
        "## Milliseconds",
        _contestant_table(rows, _milliseconds),
        "## Error against the same weights in float32",
        "In percent of the root mean square of the output.",
        _contestant_table(rows, _percent),
    ]
    if notes := _notes(rows):
        parts += ["## Not valid, not built, left out", notes]
    return "\n\n".join(parts) + "\n"


def _means_table(rows: Sequence[Row]) -> str:
    head = ("ours", "models", "faster than the best peer", "x best peer", "x eager")
    lines = [
        (
            mean["variant"],
            str(mean["models"]),
            f"{mean['wins']} of {mean['models']}",
            _number(mean["x_best_peer"]),
            _number(mean["x_eager"]),
        )
        for mean in means(rows)
    ]
    return _table(head, lines)


def _ratio_table(rows: Sequence[Row]) -> str:
    head = ("model", "batch", "ours", "ms", "best peer", "its ms", "x best peer", "x eager")
    lines = []
    for row in rows:
        entries, peer = timed(row), best_peer(row)
        for name in variants([row]):
            against = ratio(row, name, peer)
            loses = " (loses)" if against is not None and against <= 1 else ""
            lines.append(
                (
                    row["title"],
                    str(row["batch"]),
                    name.removeprefix("sparsegan "),
                    _milliseconds(entries.get(name, {})),
                    peer or "–",
                    _milliseconds(entries.get(peer or "", {})),
                    _number(against) + loses,
                    _number(ratio(row, name, "eager")),
                    *_work(row, entries.get(name, {})),
                )
            )
    return _table((*head, "executed GMAC", "of the dot peak"), lines)


def _work(row: Row, entry: Entry) -> tuple[str, str]:
    executed, peak = entry.get("macs_executed"), row.get("peak_gmacs")
    if not executed or not peak:
        return "–", "–"
    return f"{executed / 1e9:.3g}", f"{executed / entry['ms'] / 1e6 / peak:.0%}"


def _contestant_table(rows: Sequence[Row], cell: Callable[[Entry], str]) -> str:
    """One column a contestant. In brackets: it runs, but its output is wrong."""
    names = list(dict.fromkeys(name for row in rows for name in row["contestants"]))

    def shown(entry: Entry | None) -> str:
        text = cell(entry or {})
        return text if text == "–" or (entry or {}).get("state") == "valid" else f"({text})"

    lines = [
        (row["title"], str(row["batch"]), *(shown(row["contestants"].get(name)) for name in names))
        for row in rows
    ]
    return _table(("model", "batch", *names), lines)


def _notes(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        where = f"{row['title']}, batch {row['batch']}"
        if row.get("failed"):
            lines.append(f"* {where}: {row['failed']}")
        for name, entry in row["contestants"].items():
            if entry["state"] != "valid":
                lines.append(f"* {where}, {name}: {entry['state']}: {entry['reason']}")
            elif entry.get("kernel_check"):
                lines.append(
                    f"* {where}, {name}: check against the reference kernels {entry['kernel_check']}"
                )
        if (others := row.get("others_share") or 0.0) > 0.05:
            lines.append(f"* {where}: other programs took {others:.0%} of the processor while it was timed")
    return "\n".join(lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ruler, *lines))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _milliseconds(entry: Entry) -> str:
    ms = entry.get("ms")
    return "–" if not ms else f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _percent(entry: Entry) -> str:
    return "–" if entry.get("error") is None else f"{entry['error']:.2%}".removesuffix("%")


def chart(results: dict[str, Any], path: Path) -> None:
    """Write a bar chart of the ratios to the best peer as PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = results["rows"]
    names = variants(rows)
    figure = Figure(figsize=(max(8, 2 + 0.7 * len(rows)), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        heights = [(ratio(row, name, best_peer(row)) or math.nan) - 1 for row in rows]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(rows))]
        axes.bar(places, heights, width, bottom=1.0, label=name)  # up: faster; down: slower
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("times faster than the best peer")
    labels = [f"{row['title']}, batch {row['batch']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=40, ha="right")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(axis="y", alpha=0.3)
    if names:
        figure.legend(loc="outside upper center", ncols=len(names))
    figure.savefig(path, dpi=120)
