"""What the CUDA kernels could reach on GPUs that nobody here has: a prediction from public figures, never run on hardware.

    python -m benchmarks.gpu_roofline            prints the tables of docs/gpu.md
    python -m benchmarks.gpu_roofline --write    writes them into it

Five things bound a kernel: its tensor instructions, the issue of all instructions, the bandwidth of shared memory, that of
the second-level cache (L2) and that of DRAM. The predicted time is the longest of the five, as if they overlapped
perfectly. What a tile does comes from the kernels: sizes from csrc/cuda/tile.h, instructions of the main loop from the
machine code (tests/cuda_kernels.json).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks.shapes import LayerShape

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
TILES = ROOT / "csrc" / "cuda" / "tile.h"
MACHINE_CODE = ROOT / "tests" / "cuda_kernels.json"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
NOTE = "*A prediction from public figures; never run on hardware.*"


# ---- public figures ----


@dataclass(frozen=True)
class Gpu:
    """Peaks are dense, without 2:4, with 32-bit sums; tera-operations a second, a multiply-add is two."""

    name: str
    arch: str  # of its machine code
    multiprocessors: int
    clock: float  # GHz, with which the vendor computes the peaks
    int8: float
    f16: float
    dram: float  # TB/s, rated
    l2: float  # TB/s, reached when reading: estimates
    mma_sync: float  # share of the peak that mma.sync can reach: estimates below 1

    def macs(self, int8: bool) -> float:
        """Multiply-adds of one multiprocessor in one cycle, at the peak."""
        return (self.int8 if int8 else self.f16) * 1e3 / 2 / (self.multiprocessors * self.clock)


# Multiprocessors, clock, peaks and DRAM are the vendor's: "A100 Tensor Core GPU Architecture" white paper and the A100 80 GB
# data sheet; "Ada GPU Architecture" white paper, appendix (f16 with f32 sums runs at half rate on GeForce); "H100 Tensor Core
# GPU Architecture" white paper and data sheet; HGX B200 data sheet, which gives peaks with sparsity, twice the dense ones; its
# 148 multiprocessors are what the device reports, and its clock follows from its peak.
#
# L2: no vendor says what is reached. A100: 5120 bytes a clock, 7.2 TB/s, are the white paper's limit; 60 to 65 % of it is
# assumed. RTX 4090 and H100 PCIe: about 5 and 5.6 TB/s in the measurements of Chips and Cheese (2022, 2023); H100 SXM is scaled
# from that by its multiprocessors. B200: no figure known here; taken as fast as DRAM, which is a lower bound.
#
# mma.sync: on A100 and RTX 4090 it is the only instruction. On H100 it reaches 60 to 65 % of what wgmma does (Luo et al. 2024,
# "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", arXiv:2402.13499). B200: a guess, that
# a multiprocessor does as many mma.sync a clock as H100's, which is half as large a share of twice the peak. It fits what
# FlashAttention-2, which uses mma.sync, was reported to do there: 310 to 380 TFLOP/s (Dao-AILab/flash-attention, issue 1589).
GPUS = (
    Gpu("A100 SXM 80 GB", "80", 108, 1.41, 624, 312, 2.039, 4.5, 1.0),
    Gpu("RTX 4090", "89", 128, 2.52, 660.6, 165.2, 1.008, 5.0, 1.0),
    Gpu("H100 SXM", "90", 132, 1.83, 1979, 989.4, 3.35, 6.5, 0.62),
    Gpu("B200", "100", 148, 1.856, 4500, 2250, 8.0, 8.0, 0.31),
)

# What dense cuDNN and cuBLAS reach of their peak, for maps of any size: kind to them where maps are small.
RIVAL_SHARE = 0.75
SHARED_BYTES = 128  # that a multiprocessor's shared memory moves in a cycle, on all of the four

# Instructions outside the main loop, estimates: of a warp before it; of a thread for one output (scale, activation, rounding).
PROLOGUE_SLOTS, EPILOGUE_SLOTS = 300, 10
# And of a thread for one element: the loop of group_norm_sums<u8> has 133 for 16 on sm_80; the others are estimates.
NORM_SLOTS, QUANTIZE_SLOTS = 8 + 10, 20


# ---- tiles ----


@dataclass(frozen=True)
class Tile:
    """A row of kTiles in tile.h, see there. A stage is 64 bytes along k of every pixel and output channel."""

    form: str  # Int8, Float16, ...: the name of the format in the kernel's template
    two_four: bool
    block_o: int
    block_k: int
    pixels: int
    warps_o: int

    @property
    def int8(self) -> bool:
        return self.form == "Int8"

    @property
    def name(self) -> str:
        kind = {"Int8": "int8", "Float16": "f16", "BrainFloat16": "bf16"}[self.form]
        return f"{kind}{' 2:4' * self.two_four} {self.block_o}x{self.block_k}"

    @property
    def block_bytes(self) -> int:
        """Along k, of one pixel."""
        return self.block_k * (1 if self.int8 else 2)

    @property
    def stage_blocks(self) -> int:
        return constants()["kStageBytes"] // self.block_bytes

    @property
    def weight_bytes(self) -> int:
        """Of a kept block, with the metadata of 2:4."""
        if not self.two_four:
            return self.block_o * self.block_bytes
        return self.block_o * self.block_bytes // 2 + self.block_o * (8 if self.int8 else 4)

    @property
    def gathered_bytes(self) -> int:
        """Of the pixels of a CTA, for one kept block."""
        return self.pixels * self.block_bytes

    @property
    def block_macs(self) -> int:
        """That the tensor cores do for a kept block; with 2:4 half of the dense ones."""
        return self.block_o * self.pixels * self.block_k // (2 if self.two_four else 1)

    @property
    def stage_bytes(self) -> int:
        return self.stage_blocks * (self.gathered_bytes + self.weight_bytes)

    @property
    def fragments(self) -> tuple[int, int]:
        """Of a warp: along the output channels and along the pixels."""
        return self.block_o // self.warps_o // 16, self.pixels // (4 // self.warps_o) // 8

    @property
    def mma(self) -> int:
        """Of a warp in a stage."""
        o, p = self.fragments
        return o * p if self.two_four else 2 * o * p

    @property
    def shared_cycles(self) -> float:
        """Of a CTA in a stage: what cp.async writes, and what four warps read with ldmatrix, without bank conflicts."""
        o, p = self.fragments
        waves = 4 * (o + p) + o if self.two_four else 4 * (2 * o + p)
        return self.stage_bytes / SHARED_BYTES + 4 * waves

    def slots(self, arch: str) -> float:
        """Instructions that a warp issues for a stage, by the machine code of the main loop."""
        place = machine_code()["about"]["architectures"].index(arch)
        form = self.form + "TwoFour" * self.two_four
        name = f"gather_gemm_kernel<{form}, {self.block_o}, {self.block_k}, {self.pixels}>"
        row = machine_code()["kernels"][name]
        return float(row["loop"][place] / row["mma"][place] * self.mma)


@cache
def machine_code() -> dict[str, Any]:
    """Figures of the machine code, by kernel; lists have one entry for each architecture."""
    return dict(json.loads(MACHINE_CODE.read_text()))


@cache
def constants() -> dict[str, int]:
    """The plain integers of tile.h."""
    found = re.findall(r"\b(k\w+) = (\d+)\s*[,;]", TILES.read_text())
    return {name: int(value) for name, value in found}


@cache
def tiles() -> tuple[Tile, ...]:
    """The table of tile.h."""
    row = r"^\s*\{Type::k(\w+), (\w+), (\d+), (\d+), (\d+), (\d+), (\d+), \{"
    forms = {"Uint8": "Int8", "Float16": "Float16", "BFloat16": "BrainFloat16"}
    found = tuple(
        Tile(forms[kind], two_four == "true", int(o), int(k), int(pixels), int(warps))
        for kind, two_four, o, k, pixels, warps, _ in re.findall(row, TILES.read_text(), re.M)
    )
    if not found:
        raise ValueError(f"{TILES} has no rows of tiles that this script can read")
    return found


def kernels() -> list[Tile]:
    """One for each kernel of the tables, with its large tile; bf16 is as f16."""
    return [tile for tile in tiles() if tile.pixels == 128 and tile.form != "BrainFloat16"]


# ---- a layer ----


@dataclass(frozen=True)
class Work:
    """A layer at some batch size; a convolution has one phase, a transposed one as many as its stride has positions."""

    layer: LayerShape
    batch: int

    @property
    def phases(self) -> int:
        return self.layer.stride**2 if self.layer.kind == "conv_transpose2d" else 1

    @property
    def taps(self) -> int:
        """Of a phase."""
        if self.layer.kernel**2 % self.phases:
            raise ValueError(f"{self.layer}: phases of different sizes are not modelled")
        return self.layer.kernel**2 // self.phases

    @property
    def pixels(self) -> int:
        """Of a phase, all images."""
        shape = self.layer
        if shape.kind == "conv_transpose2d":
            size = ((shape.size - 1) * shape.stride - 2 * shape.padding + shape.kernel) // shape.stride
        else:
            size = (shape.size + 2 * shape.padding - shape.kernel) // shape.stride + 1
        return self.batch * size**2

    @property
    def macs(self) -> int:
        """Dense."""
        return self.phases * self.pixels * self.taps * self.layer.inputs * self.layer.outputs

    def bytes_of(self, element: int, density: float = 1.0) -> float:
        """That pass through DRAM if each thing does once: input, kept weights, output."""
        shape = self.layer
        maps = self.batch * shape.size**2 * shape.inputs + self.phases * self.pixels * shape.outputs
        return element * (maps + density * shape.inputs * shape.outputs * shape.kernel**2)


def choose_tile(tile: Tile, work: Work, multiprocessors: int) -> tuple[Tile, int]:
    """The tile of the same kernel that tile.h takes, and the number of its CTAs (choose_tile, cta_count)."""
    rows = ceil(work.layer.outputs / tile.block_o)
    small = rows * work.phases * ceil(work.pixels / 128) < 2 * multiprocessors
    pixels = 64 if small else 128
    same = (tile.form, tile.two_four, tile.block_o, tile.block_k, pixels)
    chosen = next(t for t in tiles() if (t.form, t.two_four, t.block_o, t.block_k, t.pixels) == same)
    return chosen, rows * work.phases * ceil(work.pixels / pixels)


def choose_splits(tile: Tile, ctas: int, kept: float, multiprocessors: int) -> int:
    """Into how many ranges the blocks of a row are cut (choose_splits in tile.h). kept: blocks of a row and phase."""
    if tile.pixels != 64 or ctas >= multiprocessors:
        return 1
    k = constants()
    most = int(kept * tile.block_bytes) // (k["kSplitStages"] * k["kStageBytes"])
    return max(1, min(ceil(2 * multiprocessors / ctas), most, k["kMostSplits"]))


def bounds(gpu: Gpu, tile: Tile, work: Work, density: float) -> dict[str, float]:
    """Microseconds by what bounds them, of a layer with u8 (int8) or f16 in and out."""
    element = 1 if tile.int8 else 2
    tile, ctas = choose_tile(tile, work, gpu.multiprocessors)
    kept = density * work.taps * ceil(work.layer.inputs / tile.block_k)
    splits = choose_splits(tile, ctas, kept, gpu.multiprocessors)
    stages = ceil(kept / tile.stage_blocks)
    range_stages = ceil(stages / splits)
    busiest = ceil(ctas * splits / gpu.multiprocessors)  # CTAs that one multiprocessor has to do
    outputs = tile.pixels * tile.block_o

    stage_macs = tile.stage_blocks * tile.block_macs
    cycles = {
        "tensor": range_stages * stage_macs / (gpu.macs(tile.int8) * gpu.mma_sync),
        "issue": range_stages * tile.slots(gpu.arch) + PROLOGUE_SLOTS + outputs * EPILOGUE_SLOTS / 128,
        "shared": range_stages * tile.shared_cycles + 2 * 4 * outputs / SHARED_BYTES,
    }
    times = {name: busiest * n / (gpu.clock * 1e3) for name, n in cycles.items()}

    stored = outputs * element
    if stored // tile.pixels < 32:  # half a sector a pixel
        stored *= 2
    parts = 2 * 4 * splits * outputs if splits > 1 else 0  # written to the workspace and read
    times["L2"] = ctas * (stages * tile.stage_bytes + stored + parts) / (gpu.l2 * 1e6)
    dense = work.bytes_of(element, 0.0)
    weights = work.phases * ceil(work.layer.outputs / tile.block_o) * kept * (tile.weight_bytes + 4)
    times["DRAM"] = (dense + weights) / (gpu.dram * 1e6)
    return times


def predicted(gpu: Gpu, tile: Tile, work: Work, density: float) -> tuple[float, str]:
    """Microseconds, and what bounds them."""
    times = bounds(gpu, tile, work, density)
    name = max(times, key=lambda bound: times[bound])
    return times[name], name


def rival(gpu: Gpu, work: Work, int8: bool) -> float:
    """Microseconds of a dense library."""
    compute = 2 * work.macs / ((gpu.int8 if int8 else gpu.f16) * RIVAL_SHARE * 1e6)
    return max(compute, work.bytes_of(1 if int8 else 2) / (gpu.dram * 1e6))


def break_even(gpu: Gpu, tile: Tile, work: Work, int8: bool) -> int:
    """The largest share of kept blocks, in percent, at which the kernel is as fast as the dense library; 0: at none."""
    limit = rival(gpu, work, int8)
    return next((p for p in range(100, 0, -1) if predicted(gpu, tile, work, p / 100)[0] <= limit), 0)


# ---- the main loop alone ----


def loop_shares(gpu: Gpu, tile: Tile) -> dict[str, float]:
    """Share of the dense peak that each bound allows the main loop on maps that fill the GPU; 2:4 counts the products it does."""
    macs = tile.stage_blocks * tile.block_macs
    cycles = {
        "tensor": macs / (gpu.macs(tile.int8) * gpu.mma_sync),
        "issue": tile.slots(gpu.arch),
        "shared": tile.shared_cycles,
        "L2": tile.stage_bytes * gpu.multiprocessors * gpu.clock / (gpu.l2 * 1e3),
    }
    return {name: macs / gpu.macs(tile.int8) / n for name, n in cycles.items()}


def loop_break_even(gpu: Gpu, tile: Tile, int8: bool) -> float:
    """Share of kept blocks at which the main loop takes as long as the dense library; above 1: faster with all of them."""
    speed = (
        min(loop_shares(gpu, tile).values())
        * (gpu.int8 if tile.int8 else gpu.f16)
        * (2 if tile.two_four else 1)
    )
    return speed / ((gpu.int8 if int8 else gpu.f16) * RIVAL_SHARE)


# ---- tables ----

SHAPES = (
    Work(LayerShape("CycleGAN", "residual blocks", "conv2d", 256, 256, 64, 3, 1, 1), 1),
    Work(LayerShape("SD VAE decoder", "mid block", "conv2d", 512, 512, 64, 3, 1, 1), 1),
    Work(LayerShape("SD VAE decoder", "last blocks", "conv2d", 128, 128, 512, 3, 1, 1), 1),
    Work(LayerShape("DCGAN-64", "second layer", "conv_transpose2d", 512, 256, 8, 4, 2, 1), 1),
    Work(LayerShape("MLP GAN", "hidden layer", "linear", 1024, 1024), 64),
)
DENSITY = 0.25


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield NOTE
    yield ""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(row) + " |"
    yield ""


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def threshold(share: float) -> str:
    return f"all ({share:.1f}x)" if share >= 1 else percent(share)


def microseconds(time: float) -> str:
    return f"{time:.0f}" if time >= 100 else f"{time:.1f}" if time >= 10 else f"{time:.2f}"


def gpu_table() -> Iterator[str]:
    head = [
        "GPU",
        "SMs",
        "GHz",
        "int8, TOP/s",
        "f16, TFLOP/s",
        "of it by mma.sync",
        "DRAM, TB/s",
        "L2, TB/s (estimate)",
    ]
    rows = []
    for g in GPUS:
        share = (
            "all"
            if g.mma_sync == 1
            else f"{percent(g.mma_sync)} ({'a guess' if g.name == 'B200' else 'estimate'})"
        )
        rows.append(
            [
                g.name,
                str(g.multiprocessors),
                f"{g.clock:.2f}",
                f"{g.int8:.0f}",
                f"{g.f16:.0f}",
                share,
                f"{g.dram:.2f}",
                f"{g.l2:.1f}",
            ]
        )
    yield from table(head, rows)


def kernel_table() -> Iterator[str]:
    head = ["kernel", "multiply-adds", "gathered, bytes", "weights, bytes", "multiply-adds a byte"]
    head += ["mma share, sm_80"]
    rows = []
    for t in kernels():
        ratio = t.block_macs / (t.gathered_bytes + t.weight_bytes)
        share = t.mma / t.slots("80")
        rows.append(
            [
                t.name,
                str(t.block_macs),
                str(t.gathered_bytes),
                str(t.weight_bytes),
                f"{ratio:.1f}",
                percent(share),
            ]
        )
    yield from table(head, rows)


def loop_table() -> Iterator[str]:
    rows = []
    for tile in kernels():
        row = [tile.name]
        for gpu in GPUS:
            shares = loop_shares(gpu, tile)
            name = min(shares, key=lambda bound: shares[bound])
            row.append(f"{percent(shares[name])} {name}")
        rows.append(row)
    yield from table(["kernel", *(g.name for g in GPUS)], rows)


def break_even_table() -> Iterator[str]:
    rows = [
        [
            t.name,
            *(" / ".join(threshold(loop_break_even(g, t, int8)) for int8 in (False, True)) for g in GPUS),
        ]
        for t in kernels()
    ]
    yield from table(["kernel", *(g.name for g in GPUS)], rows)


def layer_table(work: Work) -> Iterator[str]:
    rows = [
        [f"dense {name}, library", *(microseconds(rival(g, work, int8)) for g in GPUS)]
        for name, int8 in (("f16", False), ("int8", True))
    ]
    for tile in kernels():
        row = [tile.name]
        for gpu in GPUS:
            time, bound = predicted(gpu, tile, work, DENSITY)
            limits = "/".join(str(break_even(gpu, tile, work, int8)) for int8 in (False, True))
            row.append(f"{microseconds(time)} {bound}; {limits} %")
        rows.append(row)
    yield from table(["µs", *(g.name for g in GPUS)], rows)


def elementwise_table() -> Iterator[str]:
    rows = []
    for size, channels in ((64, 256), (64, 512), (512, 128)):
        n = size**2 * channels
        # Bytes an element: normalisation reads x twice, and finds nothing of it in L2 the second time.
        for name, slots, moved in (
            ("quantise f32 to u8", QUANTIZE_SLOTS, 4 + 1),
            ("norm u8 to u8", NORM_SLOTS, 2 * 1 + 1),
            ("norm f16 to u8", NORM_SLOTS, 2 * 2 + 1),
        ):
            row = [f"{name}, {channels} at {size}x{size}", f"{n * moved / 1e6:.1f}"]
            for g in GPUS:
                times = {
                    "DRAM": n * moved / (g.dram * 1e6),
                    "issue": n * slots / 128 / (g.multiprocessors * g.clock * 1e3),
                }
                bound = max(times, key=lambda b: times[b])
                row.append(f"{microseconds(times[bound])} {bound}")
            rows.append(row)
    yield from table(["µs", "MB", *(g.name for g in GPUS)], rows)


def tables() -> str:
    """What stands between the markers of the page."""
    lines = ["### Public figures", "", *gpu_table()]
    lines += [
        "### What a kernel does for one kept block",
        "",
        "Of a CTA with 128 pixels. bf16 is as f16.",
        "",
        *kernel_table(),
    ]
    lines += [
        "### The main loop: share of the dense peak, and what bounds it",
        "",
        "Of the rated dense peak of the format, on maps that fill the GPU. 2:4 counts the products that it does, half of "
        "the dense ones.",
        "",
        *loop_table(),
        "### Break-even density of the main loop",
        "",
        f"Share of kept blocks below which the kernel is faster than dense f16 / dense int8 at {percent(RIVAL_SHARE)} of "
        'their peak. "all": even with every block kept, by that factor.',
        "",
        *break_even_table(),
    ]
    for work in SHAPES:
        lines += [
            f"### {work.layer.model}, {work.layer.layer}: {work.layer.description}, batch {work.batch}",
            "",
            f"{work.macs / 1e9:.3g} billion multiply-adds when dense; input, weights and output are "
            f"{work.bytes_of(1) / 1e6:.3g} MB in int8. Microseconds with {percent(DENSITY)} of the blocks kept and what bounds "
            "them; then the break-even densities against dense f16/dense int8, in percent (100: with every block kept; "
            "0: never).",
            "",
            *layer_table(work),
        ]
    lines += ["### Quantisation and group normalisation", "", *elementwise_table()]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the tables of now between its markers. Raises ValueError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        PAGE.write_text(page(PAGE.read_text()))
    elif not arguments:
        print(tables())
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
