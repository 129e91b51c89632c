"""The CUDA kernels on the host, as a backend `cuda_emulated` on CPU tensors: csrc/cuda/ compiled by g++ with emulator/emu.h.

The very sources that nvcc compiles, bindings included; one fibre for every CUDA thread.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from sparsegan.formats import PackedWeight
from sparsegan.ops import cuda
from sparsegan.ops.backend import Backend

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "cuda" / "ops_cuda.cpp"]
HEADERS = ("csrc", "csrc/cuda", "tests/emulator")
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-w",
    "-DSPARSEGAN_EMULATED",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{ROOT / 'csrc' / 'cuda'}",
    f"-I{ROOT / 'tests' / 'emulator'}",
]
NAME = "cuda_emulated"
KINDS = {"linear": "block_linear", "conv2d": "block_conv2d", "conv_transpose2d": "block_conv_transpose2d"}


@cache
def library() -> Any:
    """torch.ops.sparsegan_emulated, built at the first call; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++")
    made = _build(compiler)
    definitions = torch.library.Library("sparsegan_emulated", "DEF")
    for kind in KINDS.values():
        definitions.define(_op_module(kind).SCHEMA)
    for schema in (*cuda.SCHEMAS, "set_device(int architecture, int multiprocessors) -> ()"):
        definitions.define(schema)
    library.kept = definitions  # type: ignore[attr-defined]  # the definitions go when it goes
    torch.ops.load_library(str(made))
    return torch.ops.sparsegan_emulated


def _build(compiler: str) -> Path:
    """The shared object. What was built before of the same sources, headers and flags is taken as it is."""
    kept = _folder()
    headers = [path for place in HEADERS for path in sorted((ROOT / place).glob("*.*h"))]
    common = " ".join([*FLAGS, torch.__version__]).encode() + b"".join(path.read_bytes() for path in headers)

    def once(stem: str, suffix: str, content: bytes, command: list[str]) -> Path:
        made = kept / f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=kept) as folder:  # nobody shall find half a file
                built = Path(folder) / made.name
                done = subprocess.run([compiler, *command, "-o", str(built)], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                built.replace(made)
        return made

    def compile_one(source: Path) -> Path:
        torch_headers = [f"-isystem{path}" for path in include_paths()] if source.suffix == ".cpp" else []
        command = [*FLAGS, *torch_headers, "-x", "c++", "-c", str(source)]
        return once(source.name, ".o", common + source.read_bytes(), command)

    with ThreadPoolExecutor(2) as pool:
        objects = [str(made) for made in pool.map(compile_one, SOURCES)]
    places = [f"-L{path}" for path in library_paths()]
    libraries = ["-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"]
    return once("emulated", ".so", " ".join(objects).encode(), ["-shared", *objects, *places, *libraries])


def _folder() -> Path:
    """Where it is kept from one run of the tests to the next."""
    for place in (ROOT / "build" / "emulated", Path(tempfile.gettempdir()) / "sparsegan-emulated"):
        try:
            place.mkdir(parents=True, exist_ok=True)
            return place
        except OSError:
            continue
    raise OSError("no folder to build the emulated kernels in")


def _op_module(name: str) -> Any:
    """By import, because the package has functions of the same names as its modules."""
    return import_module(f"sparsegan.ops.{name}")


def refuse_emulated(x: Tensor, weight: PackedWeight | None) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, the emulated kernels run on the CPU"
    return None if weight is None else cuda.refuse_weight(weight, x)


@contextmanager
def registered(multiprocessors: int = 4) -> Iterator[str]:
    """The backend stands in the table of each layer op; its name."""
    ops = library()
    ops.set_device(80, multiprocessors)
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in KINDS.items():
            module = _op_module(name)
            run = cuda.on_cuda(kind, getattr(ops, name))  # type: ignore[arg-type]
            row = Backend(NAME, refuse_emulated, run, cuda.FLOATS)
            patch.setattr(module, "BACKENDS", (*module.BACKENDS, row))
        yield NAME
