"""What a kernel costs by a simple model: instructions by class, bank conflicts, sectors of global memory.

The counts are of warps: an instruction that all 32 lanes of a warp run counts once, and so does one that only some run.
They are exact for the PTX; the machine code may hold fewer instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .parse import SIZES, Instruction, Kernel


def class_of(ins: Instruction) -> str:
    """mma, ldmatrix, cp.async, global, shared, local, branch, sync, convert, float or integer."""
    opcode = ins.opcode
    if opcode in ("mma", "ldmatrix"):
        return opcode
    if opcode == "cp":
        return "cp.async" if ins.types or len(ins.operands) > 2 else "sync"
    if opcode in ("ld", "ldu", "st", "atom", "red"):
        return {"const": "local", "param": "local", None: "global"}.get(ins.space, ins.space)
    if opcode in ("bra", "ret", "exit", "brx"):
        return "branch"
    if opcode in ("bar", "barrier", "membar", "fence", "shfl", "vote", "activemask", "match", "redux"):
        return "sync"
    if opcode in ("mov", "cvt", "cvta", "selp", "setp"):
        return "convert"
    kind = next((k for k in reversed(ins.modifiers) if k in SIZES), "b32")
    return "float" if kind[0] == "f" or kind[:2] == "bf" else "integer"


@dataclass
class Figures:
    """Sums over some instructions."""

    instructions: dict[str, int]  # by class
    waves: int  # of shared memory
    phases: int  # the least waves possible
    sectors: int  # of 32 bytes, of global memory
    wanted: int  # bytes of global memory asked for

    @property
    def total(self) -> int:
        return sum(self.instructions.values())

    @property
    def bank_conflicts(self) -> float:
        """1 is free of conflicts."""
        return self.waves / self.phases if self.phases else 1.0

    @property
    def sector_overhead(self) -> float:
        """Bytes moved for each byte asked for; 1 is best."""
        return 32 * self.sectors / self.wanted if self.wanted else 1.0

    @property
    def mma_share(self) -> float:
        return self.instructions.get("mma", 0) / max(1, self.total)

    def __str__(self) -> str:
        classes = ", ".join(
            f"{name} {n}" for name, n in sorted(self.instructions.items(), key=lambda i: -i[1])
        )
        return (
            f"{self.total} warp instructions ({classes}); mma share {self.mma_share:.3f}, "
            f"bank conflicts {self.bank_conflicts:.3f}, sector overhead {self.sector_overhead:.3f}"
        )


class Cost:
    """Counters of every instruction of a kernel."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        n = len(kernel.code)
        self.issued, self.waves, self.phases, self.sectors, self.wanted = (
            np.zeros(n, np.int64) for _ in range(5)
        )

    def add(self, other: Cost) -> None:
        """Add another launch of the same kernel."""
        for name in ("issued", "waves", "phases", "sectors", "wanted"):
            getattr(self, name)[:] += getattr(other, name)

    def figures(self, within: Sequence[int] | None = None, spaces: tuple[str, ...] = ()) -> Figures:
        """Over the whole kernel or some places in it; `spaces` restricts it to classes of instructions."""
        code = self.kernel.code
        within = within if within is not None else range(len(code))
        chosen = [i for i in within if not spaces or class_of(code[i]) in spaces]
        classes: dict[str, int] = {}
        for i in chosen:
            if self.issued[i]:
                name = class_of(code[i])
                classes[name] = classes.get(name, 0) + int(self.issued[i])
        sums = (int(x[chosen].sum()) for x in (self.waves, self.phases, self.sectors, self.wanted))
        return Figures(classes, *sums)

    def main_loop(self) -> list[int]:
        """Places in the code of the innermost loop that runs most (above half) of the mma instructions."""
        mma = np.array([ins.opcode == "mma" for ins in self.kernel.code])
        loops = [sorted(loop) for loop in natural_loops(self.kernel)]
        executed = [int((self.issued * mma)[loop].sum()) for loop in loops]
        if not any(executed):
            raise ValueError(f"{self.kernel.name}: no loop runs an mma instruction")
        half = max(executed) / 2
        return min((loop for loop, n in zip(loops, executed, strict=True) if n > half), key=len)

    def hot_spots(self, count: int = 10) -> list[str]:
        """The instructions with the most waste in memory accesses, worst first."""
        waste = (self.waves - self.phases) + (self.sectors - self.wanted / 32)
        order = np.argsort(-waste)[:count]
        lines = []
        for i in order:
            if waste[i] > 0:
                ins = self.kernel.code[i]
                what = f"{self.waves[i]} waves for {self.phases[i]}" if self.phases[i] else ""
                what = what or f"{self.sectors[i]} sectors for {self.wanted[i]} bytes"
                lines.append(f"{ins.source or f'PTX line {ins.line}'}: {what}: {ins.text}")
        return lines


def natural_loops(kernel: Kernel) -> list[set[int]]:
    """The loops of a kernel, as sets of places in its code."""
    flow = []
    for ins in kernel.code:
        target = kernel.labels[ins.operands[0].name] if ins.opcode == "bra" else None
        flow.append((ins.opcode not in ("ret", "exit", "bra") or ins.guard is not None, target))
    return loops_of(flow)


def loops_of(flow: Sequence[tuple[bool, int | None]]) -> list[set[int]]:
    """Natural loops of a code: for every target of a branch back, it and all that comes to the branch without passing it.

    flow: for every instruction whether the next one may follow it, and where it may branch to.
    """
    before: list[list[int]] = [[] for _ in flow]
    back = []
    for at, (follows, target) in enumerate(flow):
        if follows and at + 1 < len(flow):
            before[at + 1].append(at)
        if target is not None:
            before[target].append(at)
            if target <= at:
                back.append((at, target))
    loops: dict[int, set[int]] = {}
    for branch, target in back:
        loop = loops.setdefault(target, {target})  # branches to one target are one loop
        open_ends = [branch]
        while open_ends:
            at = open_ends.pop()
            if at not in loop:
                loop.add(at)
                open_ends += before[at]
    return list(loops.values())
