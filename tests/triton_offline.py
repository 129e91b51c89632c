"""Triton kernels without a GPU: compiled for an architecture, taken apart, and run as PTX by ptx/.

`Launcher` stands in for `wrap_triton` in the ops: what would be launched on a device is specialised to its arguments as Triton's
launcher does it, compiled for sm_80 and interpreted. So the host code is tested along with the kernels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ptx import Cost, GlobalMemory, Module, launch, pack_params
from ptx.machine_code import blocks_per_multiprocessor
from ptx.parse import Kernel
from torch import Tensor

from sparsegan import triton_kernels

if reason := triton_kernels.unavailable():
    pytest.skip(reason, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton_cases import DENSE, Case, as_map

from sparsegan.ops import cuda
from sparsegan.ops.cuda import Numbers
from sparsegan.triton_kernels import ops
from sparsegan.triton_kernels.configs import CONFIGS, Config

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TYPES = {
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
OPTIONS = {"num_warps", "num_stages"}


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor, and the machine instructions in it by their first word."""

    registers: int  # of a thread
    spilled: int  # bytes of local memory of a thread
    shared: int  # bytes of a block
    threads: int  # of a block
    loop: int  # instructions of a block's warps for a turn of the main loop, 0 where nothing is multiplied
    instructions: dict[str, int]

    def blocks(self, architecture: int) -> int:
        """How many of them a multiprocessor holds at once."""
        return blocks_per_multiprocessor(str(architecture), self.threads, self.registers, self.shared)


@dataclass(eq=False)
class Compiled:
    """A kernel for one architecture. `arguments`: names of those that remain at run time, in order."""

    made: CompiledKernel
    arguments: list[str]
    warps: int

    @cached_property
    def ptx(self) -> str:
        return self.made.asm["ptx"]

    @cached_property
    def sass(self) -> str:
        return _tool("nvdisasm", self.made.asm["cubin"], "-c", "-ndf")  # code only, which is quicker

    @cached_property
    def kernel(self) -> Kernel:
        return Module(self.ptx).kernel()

    @cached_property
    def resources(self) -> Resources:
        usage = _tool("cuobjdump", self.made.asm["cubin"], "-res-usage")
        counts: dict[str, int] = {}
        for word in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", self.sass, re.M):
            counts[word] = counts.get(word, 0) + 1
        registers, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "LOCAL"))  # type: ignore[index]
        spilled = local + 4 * (counts.get("STL", 0) + counts.get("LDL", 0))
        loop = self.warps * len(self.main_loop)
        return Resources(registers, spilled, self.made.metadata.shared, 32 * self.warps, loop, counts)

    @cached_property
    def main_loop(self) -> list[str]:
        """Machine instructions, by their first word, of the innermost loop that holds tensor core instructions."""
        lines = re.findall(
            r"^(\.L\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)([^;]*);", self.sass, re.M
        )
        places = {label: at for at, (label, _, _) in enumerate(lines) if label}
        loops = []
        for at, (_, word, operands) in enumerate(lines):
            target = re.search(r"`\((\.L\w+)\)", operands) if word == "BRA" else None
            if target and places.get(target[1], at) < at:
                body = [other for _, other, _ in lines[places[target[1]] : at + 1] if other]
                if any("MMA" in other for other in body):
                    loops.append(body)
        return min(loops, key=len, default=[])


def _tool(name: str, cubin: bytes, *options: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def compile_offline(
    kernel: Any, arguments: dict[str, Any], architecture: int, warps: int, stages: int = 3, **options: int
) -> Compiled:
    """Compile for an architecture, specialised to arguments by name as when it is launched: tensors, numbers, constants."""
    signature, constants, hints = [], [], []
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, Tensor):
            signature.append((name, "*" + TYPES[value.dtype]))
            aligned = value.data_ptr() % 16 == 0
        else:
            signature.append((name, "fp32" if isinstance(value, float) else "i32"))
            aligned = type(value) is int and value % 16 == 0
        if aligned:
            hints.append(index)
    return _compile(
        kernel, tuple(signature), tuple(constants), tuple(hints), architecture, warps, stages, **options
    )


@cache
def _compile(
    kernel: Any,
    signature: tuple,
    constants: tuple,
    hints: tuple,
    architecture: int,
    warps: int,
    stages: int,
    **options: int,
) -> Compiled:
    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs=dict(constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in hints},
    )
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(
        source, target=target, options={"num_warps": warps, "num_stages": stages, **options}
    )
    return Compiled(made, [name for name, kind in signature if kind != "constexpr"], warps)


@dataclass
class Launch:
    """One launch of a kernel, run or not."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    cost: Cost | None = None

    def compiled(self, architecture: int) -> Compiled:
        return compile_offline(self.kernel, self.arguments, architecture, self.warps, self.stages)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass
class Launcher:
    """Stands in for `wrap_triton`. written: names of the arguments that a kernel writes. edit: PTX -> PTX, to plant a bug."""

    run: bool = True
    written: tuple[str, ...] = ("y_ptr", "chunks_ptr", "groups_ptr")
    edit: Callable[[str], str] | None = None
    launches: list[Launch] = field(default_factory=list)

    def __call__(self, kernel: Any) -> Any:
        return _Ready(self, kernel)

    def execute(self, done: Launch) -> None:
        made = done.compiled(80)
        kernel = Module(self.edit(made.ptx)).kernel() if self.edit else made.kernel
        needed = sum(
            t.untyped_storage().nbytes() + 1024 for t in done.arguments.values() if isinstance(t, Tensor)
        )
        memory = GlobalMemory(-(-needed // 4096) * 4096)
        places: dict[int, np.ndarray] = {}
        values: list[Any] = []
        for name in made.arguments:
            value = done.arguments[name]
            if isinstance(value, Tensor):
                if value.data_ptr() not in places:
                    places[value.data_ptr()] = self.place(memory, name, value, done)
                value = places[value.data_ptr()]
            values.append(value)
        scratch = [0] * (len(kernel.params) - len(values))  # Triton's own, unused here
        params = pack_params(kernel, *values, *scratch)
        done.cost = launch(
            kernel, done.grid, (32 * made.warps,), params, memory, dynamic_shared=made.made.metadata.shared
        )
        for name, value in done.arguments.items():
            if isinstance(value, Tensor) and name in self.outputs(done):
                view = places[value.data_ptr()]
                target = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()
                # What the kernel left alone keeps what it had.
                np.copyto(target, view.view(np.uint8), where=np.repeat(memory.written(view), view.itemsize))

    def outputs(self, done: Launch) -> set[str]:
        """Arguments that this kernel writes: statistics are an output once and then an input."""
        reads = {"group_statistics_kernel": {"chunks_ptr"}, "normalize_kernel": {"groups_ptr"}}.get(
            done.name, set()
        )
        return set(self.written) - reads

    def place(self, memory: GlobalMemory, name: str, value: Tensor, done: Launch) -> np.ndarray:
        """The memory of a tensor on the device, from its first element on."""
        kind = torch.int16 if value.dtype == torch.bfloat16 else value.dtype
        whole = torch.empty(0, dtype=kind).set_(value.untyped_storage()).numpy()
        same = {
            n for n, v in done.arguments.items() if isinstance(v, Tensor) and v.data_ptr() == value.data_ptr()
        }
        if same & self.outputs(done):
            assert value.storage_offset() == 0
            return memory.empty(whole.shape, whole.dtype, name)
        return memory.put(whole, name)[value.storage_offset() :]


@dataclass
class _Ready:
    launcher: Launcher
    kernel: Any

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def start(*positional: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in OPTIONS & set(named)}
            names = [p.name for p in self.kernel.params]
            arguments = {**dict(zip(names, positional, strict=False)), **named}
            size = grid(arguments) if callable(grid) else grid
            done = Launch(
                self.kernel, tuple(size), arguments, options.get("num_warps", 4), options.get("num_stages", 3)
            )
            self.launcher.launches.append(done)
            if self.launcher.run:
                self.launcher.execute(done)

        return start


@contextmanager
def launching(**settings: Any) -> Iterator[Launcher]:
    """The ops of `sparsegan.triton_kernels` run on CPU tensors, by a `Launcher` with these settings."""
    launcher = Launcher(**settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "wrap_triton", launcher)
        yield launcher


# ---- Everything that the ops may launch, for the tests of compiled kernels ----


def _gather_gemm(case: Case, config: Config) -> Launch:
    with launching(run=False) as launcher, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "default", lambda *_: config)
        case.run(torch.ops.sparsegan_triton)
    return launcher.launches[-1]


def _group_norm(came: torch.dtype, out: torch.dtype, index: int) -> Launch:
    with launching(run=False) as launcher:
        x = as_map(torch.zeros(2, 64, 16, 16), Numbers(came))
        weight = torch.ones(64)
        cuda.group_norm_act(
            x,
            8,
            Numbers(out),
            weight=weight,
            bias=weight,
            activation="silu",
            library=torch.ops.sparsegan_triton,
        )
    return launcher.launches[index]


def _quantize(out: torch.dtype) -> Launch:
    with launching(run=False) as launcher:
        cuda.quantize_pack(torch.zeros(2, 64, 16, 16), Numbers(out), torch.ops.sparsegan_triton)
    return launcher.launches[-1]


def _recorded() -> dict[str, Callable[[], Launch]]:
    """Every block in every tile, as the layers that take most of it; bf16, whose code differs from f16's by a word, and the
    smallest tiles as one of them; the other kernels in the types that matter."""
    found: dict[str, Callable[[], Launch]] = {}
    layers = {
        "4x4 transposed": Case("conv_transpose2d", kernel_size=(4, 4), stride=(2, 2), activation="relu"),
        "3x3 + residual": Case(activation="silu"),
    }
    for dtype, block in DENSE:
        for config in CONFIGS[block[0]][: 1 if dtype == torch.bfloat16 else None]:
            few = dtype == torch.bfloat16 or config.block_m == 64
            for layer, case in list(layers.items())[: 1 if few else None]:
                out = torch.uint8 if dtype == torch.int8 else dtype
                case = replace(
                    case,
                    dtype=dtype,
                    block=block,
                    out=out,
                    residual=out if "residual" in layer else None,
                    size=(1, 2 * block[1], 4, 4),
                    outputs=2 * block[0],
                    density=1.0,
                )
                tile = "/".join(map(str, config))
                name = f"gather_gemm {str(dtype)[6:]} {block[0]}x{block[1]} {tile} {layer}"
                found[name] = partial(_gather_gemm, case, config)
    for index, name in enumerate(("chunk_statistics", "group_statistics", "normalize")):
        found[f"{name} u8"] = partial(_group_norm, torch.uint8, torch.uint8, index)
    found["normalize f16"] = partial(_group_norm, torch.float16, torch.float16, 2)
    found["quantize u8"] = partial(_quantize, torch.uint8)
    found["quantize f16"] = partial(_quantize, torch.float16)
    return found


RECORDED = _recorded()


def tile_of(name: str) -> tuple[int, Config] | None:
    """(block_o, tile) of a gather-GEMM in RECORDED, None for the other kernels."""
    found = re.match(r"gather_gemm \w+ (\d+)x\d+ (\d+)/(\d+)/(\d+) ", name)
    return (int(found[1]), Config(*map(int, found.groups()[1:]))) if found else None


def record(what: tuple[str, int]) -> Resources:
    """Compile RECORDED[name] for an architecture."""
    name, architecture = what
    return RECORDED[name]().compiled(architecture).resources
