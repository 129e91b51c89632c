"""Launches the real launchers of csrc/cuda, with runtime.cpp as their CUDA runtime and the interpreter as its device.

So the host code that chooses tiles, fills parameters and starts kernels is tested with the kernels; Python only fills in
the structs of launch.h, whose layout is read from that header.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np

from .cost import Cost
from .machine import launch
from .memory import GlobalMemory
from .parse import Module, PtxError

ROOT = Path(__file__).parent.parent.parent
CUDA = ROOT / "csrc" / "cuda"
KERNELS = ("gather_gemm", "quantize", "group_norm")  # each a .cu with a launcher


@functools.cache
def build_script() -> ModuleType:
    """setup.py without its last step: how it finds nvcc (asked once), and the flags it compiles with."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.Expr) and "setup(" in ast.unparse(n)[:6])]
    module = ModuleType("sparsegan_setup")
    module.__file__ = str(ROOT / "setup.py")
    sys.modules[module.__name__] = module  # its dataclasses look for it there
    exec(compile(tree, "setup.py", "exec"), module.__dict__)
    module.find_cuda = functools.cache(module.find_cuda)
    return module


def content_hash(sources: Path, more: list) -> str:
    """Of all CUDA sources in a folder, and of what else goes into their compilation."""
    digest = hashlib.sha256(repr(more).encode())
    for path in [*sorted(sources.glob("*.cu*")), *sorted(sources.glob("*.h")), sources.parent / "packed.h"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# Structs of launch.h

FIELD_TYPES = {
    "int16_t": ctypes.c_int16,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}


def read_structs(header: str) -> tuple[dict[str, type[ctypes.Structure]], dict[str, int]]:
    """The structs of launch.h as ctypes, with the defaults they have there, and its enumerators and integer constants.

    The size of every struct is compared with what the compiler says (Library).
    """
    text = re.sub(r"//[^\n]*", "", header)
    numbers = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    enums = set()
    for name, members in re.findall(r"enum class (\w+) \{([^}]*)\}", text):
        enums.add(name)
        numbers |= {f"{name}::{m.strip()}": i for i, m in enumerate(members.split(","))}
    structs: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.S):
        fields, defaults = [], {}
        for statement in filter(None, (s.strip() for s in body.split(";"))):
            kind, rest = re.match(r"(?:const\s+)?([\w:]+)\s*(.*)", statement, re.S).groups()
            for declared in re.split(r",(?![^{]*\})", rest):
                star, field, dims, value = re.match(
                    r"\s*(\*?)\s*(\w+)\s*(?:\[(\w+)\])?\s*(?:=\s*(.*))?$", declared, re.S
                ).groups()
                enum = kind.split("::")[-1] in enums
                made = (
                    ctypes.c_void_p
                    if star
                    else ctypes.c_int32
                    if enum
                    else FIELD_TYPES.get(kind) or structs[kind]
                )
                fields.append((field, made * (numbers.get(dims) or int(dims)) if dims else made))
                if value and value not in ("nullptr", "{}") and not dims:
                    defaults[field] = (
                        numbers[value]
                        if value in numbers
                        else float(value)
                        if kind == "float"
                        else int(value)
                    )
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields, "DEFAULTS": defaults})
    return structs, numbers


class Library:
    """The launchers, compiled for the host with `runtime.cpp`, and the PTX of their kernels.

    Compiling takes some ten seconds; what came of it is kept in the folder `kept` by the contents of all that went in.
    Raises FileNotFoundError with the reason when there is no nvcc.
    """

    def __init__(self, sources: Path = CUDA, kept: Path = ROOT / "build" / "ptx"):
        setup = build_script()
        cuda = setup.find_cuda()
        if cuda.missing:
            raise FileNotFoundError(cuda.missing)
        here = [source for name in KERNELS if (source := sources / f"{name}.cu").exists()]
        commands = {
            source.stem: [
                cuda.nvcc,
                *setup.CUDA_FLAGS,
                "-arch=compute_80",
                "-lineinfo",
                f"-I{sources}",
                "-c",
                str(source),
            ]
            for source in here
        }
        runtime = Path(__file__).with_name("runtime.cpp")
        self.folder = kept / content_hash(sources, [*commands.values(), runtime.read_text()])
        if not self.folder.exists():
            with tempfile.TemporaryDirectory(dir=_made(self.folder.parent)) as folder:
                made = Path(folder) / "made"
                made.mkdir()
                self.compile(made, commands, [f"-I{sources}", str(runtime)])
                made.rename(self.folder)
        modules = [Module((self.folder / f"{name}.ptx").read_text()) for name in commands]
        self.kernels = {name: module for module in modules for name in module.entries}
        self.ran: set[str] = set()
        self.host = ctypes.CDLL(str(self.folder / "launchers.so"))
        # launch.h takes the activations from packed.h
        header = (sources.parent / "packed.h").read_text() + (sources / "launch.h").read_text()
        header = header[header.index("enum class Activation") :]
        self.structs, self.numbers = read_structs(
            re.sub(r"struct (PackedWeight|Layer) \{.*?\n\};", "", header, flags=re.S)
        )
        for name, struct in (
            ("gather_gemm", "GatherGemm"),
            ("quantize", "Quantize"),
            ("group_norm", "GroupNorm"),
        ):
            size = getattr(self.host, f"size_of_{name}")()
            if size != ctypes.sizeof(self.structs[struct]):
                raise PtxError(
                    f"{struct}: read as {ctypes.sizeof(self.structs[struct])} bytes, the compiler says {size}"
                )
        self.signature = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_uint),
            ctypes.POINTER(ctypes.c_uint),
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_size_t,
        )

    @staticmethod
    def compile(folder: Path, commands: dict[str, list[str]], host: list[str]) -> None:
        def compile_one(name: str) -> str:
            made, kept = folder / f"{name}.o", folder / f"{name}.kept"
            kept.mkdir()
            _call([*commands[name], "-o", str(made), "--keep", "--keep-dir", str(kept)])
            (kept / f"{name}.ptx").rename(folder / f"{name}.ptx")
            shutil.rmtree(kept)
            return str(made)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, commands))
        defines = [f"-DHAS_{name}" for name in commands]
        library = ["-shared", "-o", str(folder / "launchers.so")]
        _call(["g++", "-std=c++20", "-O1", "-fPIC", *defines, *host, *objects, *library])


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


class Device:
    """A device with its own memory. After a call, `costs` holds what each kernel cost, by its name."""

    def __init__(self, library: Library, size: int = 1 << 24, seed: int = 0):
        self.library, self.memory, self.seed = library, GlobalMemory(size), seed
        self.costs: dict[str, Cost] = {}
        self.launches: list[
            tuple[str, tuple[int, ...], tuple[int, ...], int]
        ] = []  # kernel, grid, block, shared bytes
        self.problem: Exception | None = None
        self.callback = library.signature(self.run)

    def run(self, name: bytes, grid, block, arguments, shared: int) -> int:
        try:
            kernel = self.library.kernels[name.decode()].kernel(name.decode())
            self.library.ran.add(kernel.name)
            params = bytearray(kernel.param_bytes)
            for i, (at, size) in enumerate(kernel.params.values()):
                params[at : at + size] = ctypes.string_at(arguments[i], size)
            shape = tuple(grid[:3]), tuple(block[:3])
            self.launches.append((kernel.name, *shape, shared))
            cost = launch(kernel, *shape, bytes(params), self.memory, shared, self.seed)
            if kernel.name in self.costs:
                self.costs[kernel.name].add(cost)
            else:
                self.costs[kernel.name] = cost
        except Exception as problem:  # an exception cannot pass through the C++ in between
            self.problem = problem
            return 1
        return 0

    def struct(self, struct: str, **fields) -> ctypes.Structure:
        """A struct of launch.h: arrays stand for pointers, names like "kUint8" for enumerators of the field's type."""
        made = self.library.structs[struct]
        call = made()
        for name, value in (made.DEFAULTS | fields).items():
            if isinstance(value, np.ndarray):
                value = value.ctypes.data
            elif isinstance(value, (list, tuple)):
                for i, each in enumerate(value):
                    getattr(call, name)[i] = each
                continue
            setattr(call, name, value)
        return call

    def call(self, function: str, *arguments) -> str | None:
        """What the launcher answers. Raises PtxError for a mistake of a kernel."""
        self.library.host.set_run(self.callback)
        run = getattr(self.library.host, function)
        run.restype = ctypes.c_char_p
        self.problem = None
        answer = run(*(ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments))
        if self.problem is not None:
            raise self.problem
        return answer.decode() if answer else None
