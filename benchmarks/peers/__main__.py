"""Runs the contests, each in a process of its own, and keeps what they gave in benchmarks/results/ after each."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.generators import GENERATORS, Generator
from benchmarks.peers import report
from benchmarks.peers.contestants import CONTESTANTS, THREADS
from sparsegan.report import machine_facts

RESULTS = Path(__file__).parent.parent / "results"

PACKAGES = ("openvino", "nncf", "onnxruntime", "torchao", "diffusers")

# Seconds after which a contest is stopped from outside: native code that hangs cannot be stopped from inside.
_LIMIT = 2400

# These make the BLAS of torch and numpy slower or faster than a user has it.
_UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--models", help=f"some of {','.join(GENERATORS)}")
    parser.add_argument("--contestants", help=f"some of {','.join(CONTESTANTS)}")
    parser.add_argument(
        "--quick", action="store_true", help="less time for building and timing: rough numbers"
    )
    parser.add_argument("--add", action="store_true", help="keep the other rows of the last run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into")
    options = parser.parse_args(arguments)
    models = _chosen(parser, "--models", options.models, list(GENERATORS))
    contestants = _chosen(parser, "--contestants", options.contestants, list(CONTESTANTS))

    torch.set_num_threads(THREADS)
    options.results.mkdir(parents=True, exist_ok=True)
    rows: list[report.Row] = []
    if options.add and (path := options.results / "peers.json").is_file():
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    results = {"machine": machine_facts() | _versions(), "rows": rows}
    for generator in map(GENERATORS.__getitem__, models):
        for batch in generator.batches:
            log = options.results / f"peers-{generator.name}-{batch}.log"
            print(f"{generator.title}, batch {batch} (log: {log.name})", flush=True)
            row = measure(generator, batch, contestants, options.quick, log)
            put(rows, row)
            write(results, options.results)
            print(_line(row), flush=True)
    return 0


def _chosen(parser: argparse.ArgumentParser, option: str, value: str | None, known: list[str]) -> list[str]:
    names = known if value is None else value.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def measure(
    generator: Generator, batch: int, contestants: Sequence[str], quick: bool, log: Path
) -> report.Row:
    """The row of one contest. A contestant that takes the process down is noted, and left out of another try."""
    skip: dict[str, str] = {}
    with TemporaryDirectory() as name, log.open("w", encoding="utf-8") as output:
        folder = Path(name)
        while True:
            command = [sys.executable, "-m", "benchmarks.peers.contest", generator.name, str(batch), name]
            command += ["--contestants", ",".join(contestants), "--skip", json.dumps(skip)]
            end = _run([*command, "--quick"] if quick else command, output)
            if (folder / "row.json").is_file():
                row: report.Row = json.loads((folder / "row.json").read_text())
                return row
            culprit = (folder / "now").read_text() if (folder / "now").is_file() else ""
            if not culprit or culprit in skip:
                row = {"model": generator.name, "title": generator.title, "batch": batch, "contestants": {}}
                return row | {"failed": f"{end}{f' at {culprit}' if culprit else ''}, see {log.name}"}
            skip[culprit] = end


def _run(command: Sequence[str], output: Any) -> str:
    """Run a contest to its end, and say how it ended."""
    # CI: openvino and nncf report nothing about this run to their makers.
    environment = {key: value for key, value in os.environ.items() if key not in _UNSET} | {"CI": "true"}
    root = Path(__file__).parent.parent.parent
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=root, start_new_session=True
    )
    try:
        code = process.wait(_LIMIT)
    except subprocess.TimeoutExpired:
        return f"hung for {_LIMIT} s"
    finally:  # also when this program is interrupted; the compiler of torch has processes of its own
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return (
        f"the process was ended by {signal.Signals(-code).name}"
        if code < 0
        else f"it ended with exit code {code}"
    )


def put(rows: list[report.Row], row: report.Row) -> None:
    """Put a row in the place of the one for the same model and batch, or at the end."""
    for index, other in enumerate(rows):
        if (other["model"], other["batch"]) == (row["model"], row["batch"]):
            rows[index] = row
            return
    rows.append(row)


def write(results: dict[str, Any], folder: Path) -> None:
    """peers.json, peers.md, and peers.png if matplotlib is there."""
    text = json.dumps(results | {"means": report.means(results["rows"])}, indent=1)
    (folder / "peers.json").write_text(text, encoding="utf-8")
    (folder / "peers.md").write_text(report.markdown(results), encoding="utf-8")
    try:
        report.chart(results, folder / "peers.png")
    except ImportError as error:
        print(f"without a chart: {error}")


def _line(row: report.Row) -> str:
    peer = report.best_peer(row)
    ours = [(name, report.ratio(row, name, peer)) for name in report.variants([row])]
    shown = ", ".join(f"{name} {'–' if value is None else f'{value:.2f}'}" for name, value in ours)
    return f"  best peer {peer}; times faster: {shown}" if peer else f"  {row.get('failed', 'no valid peer')}"


if __name__ == "__main__":
    sys.exit(main())
