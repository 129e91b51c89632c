"""Runs all benchmarks and keeps their JSON in benchmarks/results/; arguments are passed on to pytest."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """The exit code of pytest. Missed targets are printed, they are no failures; wrong numbers are."""
    options = ["-q", "--benchmark-columns=median,iqr,rounds", "-Wignore::DeprecationWarning"]
    if not any(argument.startswith("--benchmark-json") for argument in arguments):
        results = HERE / "results"
        results.mkdir(exist_ok=True)
        options.append(f"--benchmark-json={results / f'{datetime.now():%Y-%m-%d-%H%M%S}.json'}")
    files = [str(path) for path in sorted(HERE.glob("bench_*.py"))]
    return int(pytest.main([*files, *options, *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
