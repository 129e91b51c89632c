"""Layers on a CUDA device against what else runs there: `make gpu-bench`. No GPU was there to run it on when it was written.

Rivals: torch in float16 channels_last (cuDNN, cuBLAS), the same under torch.compile, and our own kernels with every block kept
(dense int8 and float16). Each contender is checked against the exact result first; a wrong one is not timed. Every contender is
captured in a CUDA graph and replayed in turn with the others, after a buffer larger than the L2 cache was overwritten.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsegan.formats import density, pack, pack_two_four, tap_order
from sparsegan.ops import cuda
from sparsegan.ops.cuda import Kind, Map, Numbers
from sparsegan.patterns import NMPattern

Pair = tuple[int, int]
UP = {
    "kernel_size": (4, 4),
    "stride": (2, 2),
    "padding": (1, 1),
    "output_padding": (0, 0),
    "dilation": (1, 1),
}
CONV = {"kernel_size": (3, 3), "padding": (1, 1)}
DENSITIES = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Shape:
    """name: the model and layer it is from; x: [N, C, H, W]."""

    name: str
    kind: Kind
    x: tuple[int, int, int, int]
    out_channels: int
    geometry: dict[str, Pair]


SHAPES = [
    Shape("DCGAN 4x4 to 8x8", "conv_transpose2d", (16, 512, 4, 4), 256, UP),
    Shape("DCGAN 16x16 to 32x32", "conv_transpose2d", (16, 128, 16, 16), 64, UP),
    Shape("StyleGAN2 8x8, batch 1", "conv2d", (1, 512, 8, 8), 512, CONV),
    Shape("StyleGAN2 64x64", "conv2d", (4, 512, 64, 64), 512, CONV),
    Shape("VAE decoder 64x64", "conv2d", (4, 512, 64, 64), 512, CONV),
    Shape("VAE decoder 256x256", "conv2d", (1, 256, 256, 256), 256, CONV),
    Shape("image translation 64x64", "conv2d", (1, 256, 64, 64), 256, CONV),
    Shape("mapping network", "linear", (64, 512, 1, 1), 512, {}),
]


@dataclass(frozen=True)
class Row:
    """Times are medians; a speed-up is over torch in float16. gmacs: executed multiply-adds a second, in 10^9."""

    shape: str
    contender: str
    density: float
    milliseconds: float
    speedup: float
    gmacs: float


@dataclass
class Contender:
    """call: runs it, on tensors that stay where they are; output: its result as float32 NCHW."""

    name: str
    density: float
    call: Callable[[], object]
    output: Callable[[], Tensor]
    wanted: Tensor
    tolerance: float


def weight_of(shape: Shape, share: float, two_four: bool, block: Pair) -> Tensor:
    """Whole numbers [O, T, C], `share` of the blocks kept, taps in raster order."""
    generator = torch.Generator().manual_seed(0)
    taps = math.prod(shape.geometry.get("kernel_size", (1, 1)))
    o, c = shape.out_channels, shape.x[1]
    view = torch.randint(-4, 5, (o, taps, c), generator=generator).float()
    keep = torch.rand(-(-o // block[0]), taps, -(-c // block[1]), generator=generator) < share
    view *= keep.repeat_interleave(block[0], 0)[:o].repeat_interleave(block[1], 2)[:, :, :c]
    if two_four:
        view *= NMPattern(2, 4).best(torch.rand(view.shape, generator=generator))
    return view


def dense_layer(shape: Shape, view: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The layer in torch, from and to [N, C, H, W] channels_last."""
    o, _, c = view.shape
    kh, kw = shape.geometry.get("kernel_size", (1, 1))
    rest = {name: pair for name, pair in shape.geometry.items() if name != "kernel_size"}
    if shape.kind == "linear":
        weight = view[:, 0].to(dtype)
        return lambda x: F.linear(x.flatten(1), weight)[:, :, None, None]
    if shape.kind == "conv2d":
        weight = view.permute(0, 2, 1).reshape(o, c, kh, kw)
    else:
        weight = view.permute(2, 0, 1).reshape(c, o, kh, kw)
    weight = weight.to(dtype=dtype).contiguous(memory_format=torch.channels_last)
    function: Callable[..., Tensor] = F.conv2d if shape.kind == "conv2d" else F.conv_transpose2d
    return lambda x: function(x, weight, **rest)


def ours(shape: Shape, x: Tensor, dtype: torch.dtype, share: float, two_four: bool) -> Contender:
    """The gather-GEMM alone, from a packed map to a packed map: what a chain of layers runs."""
    block = (64, 64 if dtype == torch.int8 else 32) if two_four else (64, 32 if dtype == torch.int8 else 16)
    view = weight_of(shape, share, two_four, block)
    positions = view
    if shape.kind == "conv_transpose2d":
        names = ("kernel_size", "stride", "padding", "dilation")
        positions = view[:, tap_order(*(shape.geometry[name] for name in names))]
    packed = (pack_two_four if two_four else pack)(positions, dtype, block).to(x.device)
    zero = 8 if dtype == torch.int8 else 0
    weight = cuda.validated(packed, cuda.phase_taps(shape.kind, shape.geometry), zero)
    came = Numbers(torch.uint8, 1.0, zero) if dtype == torch.int8 else Numbers(dtype)
    exact = dense_layer(shape, view.to(x.device), torch.float64)(x.double())
    # int8 leaves as int8: what the next layer reads
    made = (
        Numbers(torch.uint8, exact.abs().max().item() / 127, 128) if dtype == torch.int8 else Numbers(dtype)
    )
    held = cuda.quantize_pack(x, came)
    result: list[Map] = []

    def call() -> None:
        result[:] = [cuda.gather_gemm(held, weight, shape.kind, shape.geometry, made)]

    name = f"{'int8' if dtype == torch.int8 else 'f16'} {'2:4 ' if two_four else ''}{block[0]}x{block[1]}"
    tolerance = 0.51 * made.scale if dtype == torch.int8 else 2e-3 * exact.abs().max().item()
    return Contender(name, density(packed), call, lambda: result[0].dense().float(), exact.float(), tolerance)


def rival(shape: Shape, x: Tensor, compiled: bool) -> Contender:
    view = weight_of(shape, 1.0, False, (64, 32)).to(x.device)
    layer = dense_layer(shape, view, torch.float16)
    run = torch.compile(layer, mode="max-autotune-no-cudagraphs") if compiled else layer
    held = x.half().contiguous(memory_format=torch.channels_last)
    result: list[Tensor] = []

    def call() -> None:
        result[:] = [run(held)]

    exact = dense_layer(shape, view, torch.float64)(x.double()).float()
    name = "torch.compile f16" if compiled else "torch f16"
    return Contender(name, 1.0, call, lambda: result[0].float(), exact, 2e-3 * exact.abs().max().item())


def check(contender: Contender) -> str | None:
    """What is wrong with its result, or None."""
    contender.call()
    torch.cuda.synchronize()
    worst = (contender.output() - contender.wanted).abs().max().item()
    return None if worst <= contender.tolerance else f"off by {worst:.3g}, allowed {contender.tolerance:.3g}"


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The call as a graph, warmed up on a side stream as capture wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def time_in_turn(contenders: list[Contender], rounds: int) -> list[float]:
    """Median milliseconds of each, one replay a round, the L2 cache overwritten before each."""
    graphs = [captured(contender.call) for contender in contenders]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(4 * getattr(properties, "L2_cache_size", 64 << 20), dtype=torch.uint8, device="cuda")
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, sample in zip(graphs, samples, strict=True):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            sample.append(start.elapsed_time(end))
    return [median(sample) for sample in samples]


def bench(shape: Shape, rounds: int) -> list[Row]:
    x = torch.randint(-5, 6, shape.x, generator=torch.Generator().manual_seed(1)).float().cuda()
    contenders = [rival(shape, x, compiled=False), rival(shape, x, compiled=True)]
    for dtype in (torch.int8, torch.float16):
        contenders += [ours(shape, x, dtype, share, two_four=False) for share in DENSITIES]
        contenders.append(ours(shape, x, dtype, 1.0, two_four=True))
    right = []
    for contender in contenders:
        if problem := check(contender):
            print(
                f"{shape.name}: {contender.name} at density {contender.density:.3f} is WRONG, not timed: {problem}"
            )
        else:
            right.append(contender)
    times = time_in_turn(right, rounds)
    base = next((t for c, t in zip(right, times, strict=True) if c.name == "torch f16"), math.nan)
    pixels = shape.x[0] * shape.x[2] * shape.x[3] if shape.kind != "conv2d" else right[0].wanted[:, 0].numel()
    macs = pixels * shape.x[1] * shape.out_channels * math.prod(shape.geometry.get("kernel_size", (1, 1)))
    return [
        Row(shape.name, c.name, c.density, ms, base / ms, macs * c.density / ms / 1e6)
        for c, ms in zip(right, times, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON after the table")
    arguments = parser.parse_args()
    if reason := cuda.unavailable():
        print(
            f"make gpu-bench: {reason}; these kernels were never run on hardware here, and nothing is timed"
        )
        return 1
    print(
        f"measured on {'; '.join(cuda.devices())}, torch {torch.__version__}: here 'never run on hardware' is no longer true"
    )
    rows: list[Row] = []
    with torch.no_grad():
        for shape in SHAPES:
            if arguments.only in shape.name:
                rows += bench(shape, arguments.rounds)
    print(f"{'shape':26} {'contender':20} {'density':>7} {'ms':>8} {'x f16':>7} {'GMAC/s':>9}")
    for row in rows:
        print(
            f"{row.shape:26} {row.contender:20} {row.density:7.3f} {row.milliseconds:8.4f} {row.speedup:7.2f} {row.gmacs:9.0f}"
        )
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
