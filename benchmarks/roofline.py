"""How near generators come to what this machine could do: a lower bound of their time from operations, bytes and ceilings.

    python -m benchmarks.roofline [NAME ...] [--density 1 0.25 0.1] [--block 8 4]

A step of a program takes at least as long as

    operations: the kept multiply-adds on the vector unit and what turns their sums into stored values on the same ports, or all
                multiply-adds of the layer on the matrix unit where there is one, whichever is quicker. Ceilings: the dot
                product of the vector unit alone; that of the matrix unit with the loads of tiles that four sums in registers
                need (two tiles of each operand for four products; weights from L2).
    bytes:      what it reads and stores, at the speed of copying as many bytes, and its packed weight.

and a generator at least as long as its steps together. Activations and residuals, packing and calls are not in the bound.
Ceilings are measured before each generator; all is int8, and nothing outside of programs is counted or timed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.generators import GENERATORS, prune_uniformly
from sparsegan import ops
from sparsegan.graph import capture, lower, observe
from sparsegan.layers import SparseProgram
from sparsegan.ops.program import Program, step_shapes

BYTES = {"u8": 1, "bf16": 2, "f32": 4}
# Instructions for a vector of sums: to float and scale; and for u8 to integers and, four vectors at once, to bytes (3 packs, 1 to
# put them in order). Each takes the place of a dot product, four multiply-adds for each value.
EPILOGUE = {"u8": 4 * (2 + 1 + 4 / 4), "bf16": 4 * 2, "f32": 4 * 2}
SECONDS = 3.0


@dataclass(frozen=True)
class Ceilings:
    """vector, matrix: giga multiply-adds a second, int8 (matrix: 0 where there is none); copies: bytes -> bytes a second."""

    vector: float
    matrix: float
    copies: dict[int, float]

    def seconds(self, size: int) -> float:
        """Least time to move `size` bytes, read and written ones together."""
        nearest = min(self.copies, key=lambda known: abs(math.log(known / max(size, 1))))
        return size / self.copies[nearest]


def measure() -> Ceilings:
    """The ceilings of this machine, now; about half a second."""
    isas = ops.available_isas()
    matrix = ops.dot_peak(torch.int8, loads=True) if isas[0] == "avx512_amx" else 0.0
    ops.set_isa(isas[1] if matrix else None)
    try:
        vector = ops.dot_peak(torch.int8)
    finally:
        ops.set_isa(None)
    copies = {}
    for size in (1 << n for n in range(16, 27, 2)):
        source, target = torch.ones(size // 2, dtype=torch.uint8), torch.ones(size // 2, dtype=torch.uint8)
        copies[size] = size / best_time(partial(target.copy_, source), 0.05)
    return Ceilings(vector, matrix, copies)


def best_time(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the quickest of some calls."""
    call()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def least_time(program: Program, inputs: list[tuple[int, ...]], ceilings: Ceilings) -> tuple[float, int, int]:
    """(seconds, multiply-adds of the dense layers, of the kept blocks): the bound of the module text."""
    total, all_dense, all_kept = 0.0, 0, 0
    for step, (read, made) in zip(program.steps, step_shapes(program, inputs), strict=True):
        formats = [
            program.slots[s].format if s >= 0 else "f32" for s in (step.x, *(t.slot for t in step.stores))
        ]
        size = math.prod(read) * BYTES[formats[0]] + sum(math.prod(made) * BYTES[f] for f in formats[1:])
        if step.residual is not None:
            held = program.slots[step.residual].format if step.residual >= 0 else "f32"
            size += math.prod(made) // step.residual_upsample**2 * BYTES[held]
        operations = 0.0
        if (w := step.weight) is not None:
            n, _, h, w_out = made
            # Each weight meets each pixel of the input (transposed) or the output once.
            pixels = n * (math.prod(read[2:]) if step.kind == "conv_transpose2d" else h * w_out)
            dense = w.out_channels * w.in_channels * w.taps * pixels
            kept = w.values.numel() * pixels
            size += w.values.numel()
            epilogue = EPILOGUE[formats[1]] * math.prod(made)
            operations = (
                min(
                    (kept + epilogue) / ceilings.vector,
                    dense / ceilings.matrix if ceilings.matrix else math.inf,
                )
                / 1e9
            )
            all_dense, all_kept = all_dense + dense, all_kept + kept
        total += max(operations, ceilings.seconds(size))
    return total, all_dense, all_kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=list(GENERATORS), metavar="NAME", help=f"of {', '.join(GENERATORS)}"
    )
    parser.add_argument("--density", nargs="+", type=float, default=[1.0, 0.25, 0.1])
    parser.add_argument("--block", nargs=2, type=int, default=[8, 4], help="output x input channels")
    options = parser.parse_args()
    print(
        "| generator | density | vector, matrix unit, GMAC/s | bound, ms | measured, ms | share | dense-equivalent GMAC/s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.names:
        for density in options.density:
            generator = GENERATORS[name]
            model, x = generator.build(), generator.inputs(1)
            if density < 1:
                prune_uniformly(model, density, tuple(options.block))
            with torch.no_grad():
                captured = capture(model, x)
                lowered = lower(captured, observe(captured, [x]), default="int8", residual="u8").model
                bound, measured, dense = 0.0, 0.0, 0
                ceilings = measure()
                for part in lowered.modules():
                    if not isinstance(part, SparseProgram):
                        continue
                    seen: list[tuple[torch.Tensor, ...]] = []
                    handle = part.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs))
                    lowered(*x)
                    handle.remove()
                    least, part_dense, _ = least_time(
                        part.program, [tuple(t.shape) for t in seen[0]], ceilings
                    )
                    bound, dense = bound + least, dense + part_dense
                    measured += best_time(partial(part, *seen[0]), SECONDS)
            print(
                f"| {generator.title} | {density:g} | {ceilings.vector:.0f}, {ceilings.matrix:.0f} | {bound * 1e3:.3g} "
                f"| {measured * 1e3:.3g} | {bound / measured:.0%} | {dense / measured / 1e9:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
