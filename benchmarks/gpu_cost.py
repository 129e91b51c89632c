"""CUDA C++ against Triton by what can be known without a GPU: writes docs/cuda-and-triton.md.

    python -m benchmarks.gpu_cost            prints the page
    python -m benchmarks.gpu_cost --write    writes it

Counted exactly, by the PTX interpreter of tests/ptx on sm_80 PTX: warp instructions, shared-memory waves, memory sectors.
Read from the machine code of every architecture: registers, shared memory, how many blocks fit, instructions of the main loop.
Modelled: what is slower, issuing these instructions or the tensor cores. Nothing is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from ptx.cost import Cost  # noqa: E402
from ptx.device import Device, Library  # noqa: E402
from ptx.layers import Layer, expected, make, numbers, rounded, run  # noqa: E402
from ptx.machine_code import TABLE  # noqa: E402
from triton_offline import ARCHITECTURES, Launch, launching  # noqa: E402

from sparsegan.ops import cuda  # noqa: E402
from sparsegan.ops.cuda import Map, Numbers  # noqa: E402
from sparsegan.triton_kernels import describe, ops  # noqa: E402
from sparsegan.triton_kernels.configs import TILES  # noqa: E402

PAGE = ROOT / "docs" / "cuda-and-triton.md"
TYPES = {"u8": torch.uint8, "f16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"u8": "Int8", "f16": "Float16", "bf16": "BrainFloat16"}

# Multiply-adds a clock of one quarter of a multiprocessor with int8 operands, half of that with f16 and bf16: by mma.sync, and by
# the architecture's newest instruction (wgmma, tcgen05). From the dense peaks that NVIDIA states, divided by multiprocessors and
# clock; that mma.sync reaches half of it on sm_90 and a quarter on sm_100 is assumed.
RATES = {80: (512, 512), 86: (256, 256), 89: (256, 256), 90: (512, 1024), 100: (512, 2048), 120: (256, 256)}
MMA = {"u8": 16 * 8 * 32, "f16": 16 * 8 * 16, "bf16": 16 * 8 * 16}  # multiply-adds of an mma.sync
WIDE = ("IGMMA", "HGMMA", "UTCIMMA", "UTCHMMA", "UTCQMMA")

BASE = Layer(size=(16, 16), channels=(128, 128), density=0.5, y="u8", y_scale=256.0, y_zero=100)
OPS = {
    "convolution 3x3, int8, blocks 64x32": replace(BASE, block=(64, 32)),
    "convolution 3x3, int8, blocks 32x32": replace(BASE, block=(32, 32)),
    "convolution 3x3, int8, blocks 16x32": replace(BASE, block=(16, 32)),
    "convolution 3x3, f16, blocks 64x16": replace(BASE, kind="f16", block=(64, 16), y="f16"),
    "convolution 3x3, f16, blocks 32x32": replace(BASE, kind="f16", block=(32, 32), y="f16"),
    "transposed convolution 4x4 by 2, int8, blocks 64x32": replace(
        BASE, block=(64, 32), kernel=(4, 4), stride=(2, 2), transposed=True, size=(12, 12)
    ),
    "linear, int8, blocks 64x32": replace(
        BASE, block=(64, 32), kernel=(1, 1), padding=(0, 0), size=(1, 1), batch=256, channels=(512, 128)
    ),
}


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel on one architecture."""

    tile: str  # pixels/warps
    registers: int
    blocks: int  # that fit on a multiprocessor
    slots: float  # instructions that a warp issues for the multiply-adds of one mma.sync
    wide: bool  # wgmma or tcgen05

    def cycles(self, architecture: int, kind: str) -> tuple[float, str]:
        """Of a quarter of a multiprocessor for the multiply-adds of one mma.sync, and what takes them."""
        rate = RATES[architecture][self.wide] / (1 if kind == "u8" else 2)
        tensor = MMA[kind] / rate
        return max((tensor, "tensor cores"), (self.slots, "issue"))


def by_triton(layer: Layer) -> Launch:
    """The layer run in the interpreter, in the tile that sm_80 takes for a large map; its result is checked first."""
    data = make(layer)
    n, (h, w), (inputs, outputs) = layer.batch, layer.size, layer.channels
    kind = TYPES[layer.kind]
    pitch = -(-inputs // layer.block[1]) * layer.block[1]
    x = torch.zeros(n, h, w, pitch, dtype=torch.float64)
    x[..., :inputs] = torch.from_numpy(data.x) + (layer.x_zero if layer.kind == "u8" else 0)
    seen = Map(x.to(kind), inputs, 1.0, layer.x_zero)
    name: Any = "conv_transpose2d" if layer.transposed else "conv2d"
    names = ("kernel", "stride", "padding", "dilation")
    geometry = {("kernel_size" if key == "kernel" else key): getattr(layer, key) for key in names}
    packed = cuda.validated(data.packed, cuda.phase_taps(name, geometry), layer.x_zero)
    made = Numbers(TYPES[layer.y], layer.y_scale, layer.y_zero)
    large = TILES[80][layer.block[0]][0]
    with launching() as launcher, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "default", lambda *_: large)
        y = cuda.gather_gemm(seen, packed, name, geometry, made, library=torch.ops.sparsegan_triton)
    got = numbers(y.data[..., :outputs].contiguous().numpy(), layer.y).astype(np.float64)
    if not np.array_equal(got, rounded(layer, expected(layer, data))):
        raise SystemExit(f"Triton computes {layer} wrong")
    return launcher.launches[-1]


def by_cuda(layer: Layer, library: Library) -> tuple[str, Cost]:
    """(kernel, cost) of the layer run in the interpreter; its result is checked first."""
    device = Device(library)
    got, wanted = run(replace(layer, multiprocessors=1), device)
    if not np.array_equal(got, wanted):
        raise SystemExit(f"CUDA C++ computes {layer} wrong")
    ((name, cost),) = device.costs.items()
    return name, cost


def other_ops(library: Library) -> list[tuple[str, str, list[Cost]]]:
    """(op, by whom, cost of each launch) of packing and of group normalisation with SiLU, of 64 channels at 32 x 32."""
    x = torch.randn(1, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    q = (x.permute(0, 2, 3, 1) * 20 + 100).round().clamp(0, 255).to(torch.uint8).contiguous()
    made = Numbers(torch.uint8, 0.05, 100)
    found = []
    with launching() as launcher:
        packed = cuda.quantize_pack(x, made, torch.ops.sparsegan_triton).data
        done = len(launcher.launches)
        normal = cuda.group_norm_act(
            Map(q, 64, 0.05, 100), 8, made, activation="silu", library=torch.ops.sparsegan_triton
        )
    costs = [launch.cost for launch in launcher.launches if launch.cost is not None]

    device = Device(library)
    put, types = device.memory.put, library.numbers
    shape = {"batch": 1, "height": 32, "width": 32, "channels": 64}
    stored = {"y_type": types["Type::kUint8"], "y_stride": 64, "y_inverse_scale": 20.0, "y_zero": 100}
    y = device.memory.empty((1, 32, 32, 64), np.uint8, "y")
    call = {
        "x": put(x.numpy(), "x"),
        "x_type": types["Type::kFloat32"],
        "x_strides": list(x.stride()),
        **shape,
        "y": y,
    }
    call |= {"y_type": stored["y_type"], "y_stride": 64, "inverse_scale": 20.0, "zero": 100}
    problem = device.call("run_quantize", device.struct("Quantize", **call))
    if problem or not np.array_equal(y, packed.numpy()):
        raise SystemExit(f"packing: {problem or 'CUDA C++ and Triton differ'}")
    found += [
        ("packing f32 to u8", "C++", list(device.costs.values())),
        ("packing f32 to u8", "Triton", costs[:done]),
    ]

    device.costs.clear()
    y = device.memory.empty((1, 32, 32, 64), np.uint8, "y")
    call = {
        "x": put(q.numpy(), "x"),
        "x_type": types["Type::kUint8"],
        "x_stride": 64,
        "x_scale": 0.05,
        "x_zero": 100,
    }
    call |= {**shape, "groups": 8, "eps": 1e-5, "act": types["Activation::kSilu"], "y": y, **stored}
    size = library.host.group_norm_bytes
    size.restype = ctypes.c_int64
    wanted = size(ctypes.byref(device.struct("GroupNorm", **call)))
    call |= {"workspace": device.memory.empty(wanted // 4, np.int32, "workspace"), "workspace_bytes": wanted}
    problem = device.call("run_group_norm", device.struct("GroupNorm", **call))
    if problem or np.abs(y.astype(int) - normal.data.numpy().astype(int)).max() > 1:
        raise SystemExit(f"group norm: {problem or 'CUDA C++ and Triton differ'}")
    title = "group norm, SiLU, u8 to u8"
    return [*found, (title, "C++", list(device.costs.values())), (title, "Triton", costs[done:])]


def triton_loop(launch: Launch, kind: str, architecture: int) -> Loop:
    """Of the launch in the tile that the architecture takes for a large map."""
    tile = TILES[architecture][launch.arguments["BLOCK_O"]][0]
    arguments, turn = launch.arguments | {"BLOCK_M": tile.block_m}, 2  # blocks a turn of the loop
    launch = replace(launch, arguments=arguments, warps=tile.warps, stages=tile.stages)
    made = launch.compiled(architecture)
    products = turn * arguments["BLOCK_M"] * arguments["BLOCK_O"] * arguments["BLOCK_K"] / MMA[kind]
    wide = any(made.resources.instructions.get(word) for word in WIDE)
    slots = len(made.main_loop) * launch.warps / products
    name = f"{tile.block_m}/{tile.warps}"
    return Loop(name, made.resources.registers, made.resources.blocks(architecture), slots, wide)


def cuda_loop(layer: Layer, pixels: int, architecture: int) -> Loop:
    table = json.loads(TABLE.read_text())
    at = table["about"]["architectures"].index(str(architecture))
    row = table["kernels"][
        f"gather_gemm_kernel<{FORMATS[layer.kind]}, {layer.block[0]}, {layer.block[1]}, {pixels}>"
    ]
    slots = row["loop"][at] / row["mma"][at]
    return Loop(f"{pixels}/4", row["registers"][at], row["blocks"][at], slots, False)


def counted(name: str, cost: Cost) -> str:
    whole, loop = cost.figures(), cost.figures(cost.main_loop())
    mma = whole.instructions["mma"]
    return (
        f"| {name} | {whole.total:,} | {whole.total / mma:.1f} | {loop.total / max(1, loop.instructions['mma']):.1f} "
        f"| {loop.bank_conflicts:.2f} | {whole.bank_conflicts:.2f} | {whole.sectors:,} | {whole.sector_overhead:.2f} |"
    )


HEAD = """\
# CUDA C++ and Triton, compared without a GPU

Written by `python -m benchmarks.gpu_cost --write`; do not edit.

**A model; never run on hardware.** No machine that builds or tests this project has a GPU, so there is no time on this page.
What stands here was counted: by an interpreter that executes the PTX of both kernels (for sm_80, on the same layer and data,
after each result was compared with the definition of the layer), and in the machine code for each architecture.

Triton's tiles are those that an architecture takes for large maps; smaller maps take smaller ones, so that each multiprocessor
has two blocks to run. `sparsegan/triton_kernels/configs.py` has the table and says why, a test derives it from the machine
code, and on a GPU `sparsegan.triton_kernels.autotune(True)` measures instead.

Made with {nvcc} and {triton}.

## Which one dispatch takes

CUDA C++ wherever the extension has kernels for the device and the weight; Triton where it has none (an installation without
nvcc), and when asked for with `backend="triton"`. On sm_80, 86, 89 and 120, and with int8 on sm_100, both compile to `mma.sync`,
and the C++ kernels issue fewer instructions for the same products. They alone take 2:4 weights, and cut the sums of small maps
into parts. On sm_90 (and with f16 and bf16 on sm_100) Triton compiles to `wgmma` (`tcgen05`), which the C++ kernels do not use;
where the model then says "Triton", dispatch does not follow it: a model that nobody has measured is no reason to prefer
other code. Measure, and choose with `backend=` or `SPARSEGAN_BACKEND`.

Modelled cycles that a quarter of a multiprocessor takes for the products of one `mma.sync`, C++ : Triton, and which is less. Two
things count, and the larger is taken: instructions to issue, one a cycle, and the tensor core's own time. Left out are
latency, caches and memory. A tie goes to the one that issues less.

| |{architectures}
|---{rules}
{verdicts}

## The counts
"""
OF_A_LAYER = """
### {title}

{batch} x {height} x {width} pixels, {inputs} to {outputs} channels, half of the blocks.

| PTX, sm_80 | warp instructions | for an mma | in the main loop | its bank conflicts | all bank conflicts | sectors | overhead |
|---|---|---|---|---|---|---|---|
{counts}

| machine code | pixels/warps | registers | blocks a multiprocessor | loop instructions for an mma | modelled cycles for an mma |
|---|---|---|---|---|---|
{loops}
"""
OTHERS = """
### Ops without products

64 channels at 32 x 32. Dispatch takes them from the backend of the layers around them.

| sm_80 PTX | launches | warp instructions | bank conflicts | sectors | overhead |
|---|---|---|---|---|---|
{rows}
"""


def page() -> str:
    library = Library()
    verdicts, details = [], []
    for title, layer in OPS.items():
        launch = by_triton(layer)
        assert launch.cost is not None
        kernel, cost = by_cuda(layer, library)
        pixels = int(re.search(rf"ELi{layer.block[0]}ELi{layer.block[1]}ELi(\d+)E", kernel)[1])  # type: ignore[index]
        row, loops = [title], []
        for architecture in ARCHITECTURES:
            c = cuda_loop(layer, pixels, architecture)
            t = triton_loop(launch, layer.kind, architecture)
            for name, loop in (("C++", c), ("Triton", t)):
                instruction = ("wgmma" if architecture == 90 else "tcgen05") if loop.wide else "mma.sync"
                slow, why = loop.cycles(architecture, layer.kind)
                figures = (
                    f"{loop.tile} | {loop.registers} | {loop.blocks} | {loop.slots:.1f} | {slow:.1f}: {why}"
                )
                loops.append(f"| sm_{architecture} {name}, {instruction} | {figures} |")
            of_c, of_t = (loop.cycles(architecture, layer.kind)[0] for loop in (c, t))
            better = "C++" if (of_c, c.slots) <= (of_t, t.slots) else "Triton"
            row.append(f"{better} {of_c:.1f} : {of_t:.1f}")
        verdicts.append("| " + " | ".join(row) + " |")
        details.append(
            OF_A_LAYER.format(
                title=title.capitalize(),
                batch=layer.batch,
                height=layer.size[0],
                width=layer.size[1],
                inputs=layer.channels[0],
                outputs=layer.channels[1],
                counts="\n".join([counted("C++", cost), counted("Triton", launch.cost)]),
                loops="\n".join(loops),
            )
        )
    rows = []
    for title, name, costs in other_ops(library):
        every = [cost.figures() for cost in costs]
        sectors, wanted = sum(f.sectors for f in every), sum(f.wanted for f in every)
        conflicts = sum(f.waves for f in every) / max(1, sum(f.phases for f in every))
        total = sum(f.total for f in every)
        overhead = 32 * sectors / wanted
        figures = f"{len(costs)} | {total:,} | {conflicts:.2f} | {sectors:,} | {overhead:.2f}"
        rows.append(f"| {title}, {name} | {figures} |")
    details.append(OTHERS.format(rows="\n".join(rows)))
    head = HEAD.format(
        nvcc=f"nvcc {json.loads(TABLE.read_text())['about']['nvcc']}",
        triton=describe(),
        architectures="".join(f" sm_{architecture} |" for architecture in ARCHITECTURES),
        rules="|---" * len(ARCHITECTURES) + "|",
        verdicts="\n".join(verdicts),
    )
    return head + "".join(details)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    if parser.parse_args().write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())
        print(f"wrote {PAGE.relative_to(ROOT)}")
    else:
        print(page())


if __name__ == "__main__":
    main()
