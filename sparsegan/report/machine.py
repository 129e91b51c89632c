"""On what something was measured."""

from __future__ import annotations

import platform

import torch

from sparsegan import ops
from sparsegan.latency import cpu_name, package_version


def machine_facts() -> dict[str, str | int | None]:
    """CPU, instruction set, threads and versions; nothing that tells whose machine it is."""
    return {
        "cpu": cpu_name(),
        "isa": ops.isa(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsegan": package_version(),
    }
