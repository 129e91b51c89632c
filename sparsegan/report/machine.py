"""On what something was measured."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

from sparsegan import ops


def machine_facts() -> dict[str, str | int | None]:
    """CPU, instruction set, threads and versions; nothing that tells whose machine it is."""
    return {
        "cpu": _cpu_name(),
        "isa": ops.isa(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsegan": _version(),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version() -> str:
    try:
        return metadata.version("sparsegan")
    except metadata.PackageNotFoundError:
        return "run from its folder, not installed"
