"""The fixtures of the benchmarks, their JSON, and the tables at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.report import row_table, target_table, targets
from benchmarks.timing import Row
from sparsegan.report import machine_facts

ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsegan benchmarks")
    group.addoption("--row-seconds", type=float, default=1.0, help="seconds to time each row, about")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out, which saves minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """All rows of this run so far; add yours."""
    return request.config.stash[ROWS]


@pytest.fixture
def row_seconds(request: pytest.FixtureRequest) -> float:
    seconds: float = request.config.getoption("--row-seconds")
    return seconds


@pytest.fixture
def with_compile(request: pytest.FixtureRequest) -> bool:
    return not request.config.getoption("--no-compile")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name
    machine_info["sparsegan"] = machine_facts()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every single round
    rows = config.stash[ROWS]
    output_json["targets"] = [vars(target) | {"verdict": target.verdict} for target in targets(rows)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    console = Console(file=terminalreporter._tw._file, width=None if terminalreporter.isatty else 200)
    console.print()
    console.print(" · ".join(f"{name} {value}" for name, value in machine_facts().items()))
    for title, shown in (
        ("layers", [row for row in rows if row.layer]),
        ("whole models", [row for row in rows if not row.layer]),
    ):
        if shown:
            console.print(row_table(title, shown))
    console.print(target_table(targets(rows)))
