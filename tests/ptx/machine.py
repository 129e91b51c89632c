"""Runs a kernel: every instruction once for all threads of several blocks side by side, as numpy operations.

A *lane* is one thread of one of the blocks. Lanes that took different branches form groups, each with its own place in
the code; the group furthest back runs first, and groups that meet become one again. Warps are 32 lanes; a block whose
number of threads is no multiple of 32 is padded with lanes that never run.

Instructions are bound before they run: each becomes a function of the mask of active lanes, with its registers, as
views of the right type, inside (see arithmetic.py, access.py and tensor.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .cost import Cost
from .memory import GlobalMemory, SharedMemory
from .parse import (
    SIZES,
    Immediate,
    Instruction,
    Kernel,
    Not,
    Operand,
    PtxError,
    Register,
    Sink,
    Special,
    Symbol,
)

WARP = 32
MOST_TURNS = 100_000  # stretches of code between branches, until a kernel counts as endless
# Generic addresses: device pointers are host addresses, which stay below these windows.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 56, 1 << 57, 1 << 58
WINDOW_MASK = SHARED_WINDOW - 1

# numpy's view of a register. bf16 has no type of numpy's own and stays bits.
DTYPES = {
    "pred": np.dtype(bool),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
}
DTYPES |= {f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}
DTYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
DTYPES |= {f"{k}{bits}": np.dtype(f"u{bits // 8}") for k in "bu" for bits in (8, 16, 32, 64)}

Run = Callable[[np.ndarray], None]
Binder = Callable[["Machine", Instruction], Run]
BINDERS: dict[str, Binder] = {}


def instruction(*opcodes: str) -> Callable[[Binder], Binder]:
    """The decorated function binds these opcodes: (machine, instruction) -> function of the active lanes."""

    def register(binder: Binder) -> Binder:
        BINDERS.update(dict.fromkeys(opcodes, binder))
        return binder

    return register


class Machine:
    """Some blocks of one launch, in lockstep."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        params: bytes,
        dynamic_shared: int,
        memory: GlobalMemory,
        blocks: int,
        cost: Cost,
    ):
        threads = int(np.prod(block))
        self.kernel, self.grid, self.block, self.memory, self.cost = kernel, grid, block, memory, cost
        self.params = np.frombuffer(params, np.uint8)
        self.blocks = blocks
        self.threads_per_block = threads
        self.lanes_per_block = -(-threads // WARP) * WARP
        lanes = self.lanes = blocks * self.lanes_per_block
        self.lane = np.arange(lanes)
        self.local_block = self.lane // self.lanes_per_block
        self.in_block = self.lane % self.lanes_per_block  # number of the thread in its block
        self.real = self.in_block < threads

        self.place_variables(dynamic_shared)
        # what a generic address has more than one of the space
        self.cvta_offset = {
            "shared": SHARED_WINDOW,
            "local": LOCAL_WINDOW,
            "param": 0,
            "global": 0,
            "const": 0,
        }

        self.registers = {kind: np.zeros((n, lanes), DTYPES[kind]) for kind, n in kernel.registers.items()}
        self.scratch = np.zeros(lanes, np.uint64)
        self.special = self.special_registers(dynamic_shared)

        # The clock of the races (memory.py)
        self.thread = np.zeros(lanes, np.int32)
        self.stamp = np.zeros(lanes, np.int64)
        self.committed = np.zeros(lanes, np.int64)  # cp.async groups of each lane
        self.code: list[Run] = []
        for ins in kernel.code:
            self.code.append(self.bind(ins))

    # Binding

    def bind(self, ins: Instruction) -> Run:
        binder = BINDERS.get(ins.opcode)
        try:
            if binder is None:
                raise PtxError("unknown instruction")
            return binder(self, ins)
        except (PtxError, KeyError, ValueError, StopIteration, IndexError, AttributeError) as error:
            reason = error if isinstance(error, PtxError) else f"not understood ({error!r})"
            raise PtxError(f"{self.where(ins)}: {reason}") from error

    def where(self, ins: Instruction) -> str:
        source = f" ({ins.source})" if ins.source else ""
        return f"{self.kernel.name}, PTX line {ins.line}{source}: `{ins.text}`"

    def value(self, operand: Operand, kind: str) -> np.ndarray:
        """The operand seen as PTX type `kind`: a live view of [lanes], or a constant."""
        dtype = DTYPES[kind]
        match operand:
            case Register():
                row = self.registers[operand.kind][operand.row]
                if operand.kind == "pred" or kind == "pred":
                    if operand.kind != kind:
                        raise PtxError(f"{operand.name} is {operand.kind}, wanted {kind}")
                    return row
                if row.itemsize < dtype.itemsize:
                    raise PtxError(f"{operand.name} is {operand.kind}, too narrow for {kind}")
                return row.view(dtype)[:: row.itemsize // dtype.itemsize]
            case Immediate():
                if kind == "pred":
                    return np.bool_(operand.bits)
                raw = (operand.bits % (1 << 8 * dtype.itemsize)).to_bytes(dtype.itemsize, "little")
                return np.frombuffer(raw, dtype)[0]
            case Special():
                row = self.special[operand.name]
                return row.view(dtype)[:: row.itemsize // dtype.itemsize]
            case Symbol():
                return self.value(Immediate(self.symbols[operand.name]), kind)
            case Not():
                raise PtxError("a negated predicate is not expected here")
        raise PtxError(f"operand {operand} is not expected here")

    def target(self, operand: Operand, kind: str) -> np.ndarray:
        """Where a result of PTX type `kind` goes: a view of the register's low bytes."""
        if isinstance(operand, Sink):
            return self.scratch.view(DTYPES[kind])[:: 8 // DTYPES[kind].itemsize]
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} cannot take a result")
        return self.value(operand, kind)

    def address(self, operand: Operand) -> Callable[[], np.ndarray]:
        """[lanes] uint64 of an address operand, computed when called."""
        base, offset = operand.base, np.int64(operand.offset)
        if not isinstance(base, Register):
            constant = self.symbols[base.name] if isinstance(base, Symbol) else base.bits
            everywhere = np.full(self.lanes, constant + operand.offset, np.uint64)
            return lambda: everywhere
        row = self.value(base, base.kind)
        if row.itemsize == 4:
            return lambda: (row.astype(np.int64) + offset).view(np.uint64)
        return lambda: (row.view(np.int64) + offset).view(np.uint64)

    def place_variables(self, dynamic_shared: int) -> None:
        """Addresses of the kernel's variables and parameters, and the shared and local memory they need."""
        self.symbols = {name: PARAM_WINDOW + at for name, (at, _) in self.kernel.params.items()}
        ends = {"shared": 0, "local": 0}
        ordered = sorted(
            self.kernel.variables.items(), key=lambda item: item[1].extern
        )  # dynamic memory comes last
        for name, variable in ordered:
            if variable.space in ends:
                start = -(-ends[variable.space] // variable.align) * variable.align
                self.symbols[name] = start
                if not variable.extern:
                    ends[variable.space] = start + variable.size
                elif variable.space == "shared":
                    ends["shared"] = start
            else:
                data = np.frombuffer(variable.data or bytes(variable.size), np.uint8)
                place = self.memory.put(data, name, read_only=variable.space == "const")
                self.symbols[name] = place.ctypes.data
        sizes = [_access_size(i) for i in self.kernel.code if i.space == "shared"]
        self.shared = SharedMemory(
            self.blocks, ends["shared"] + dynamic_shared, min(filter(None, sizes), default=4)
        )
        self.local_size = -(-ends["local"] // 16) * 16
        self.local = np.zeros(self.lanes * self.local_size, np.uint8)

    def special_registers(self, dynamic_shared: int) -> dict[str, np.ndarray]:
        x, y, _ = self.block
        inside = {"x": self.in_block % x, "y": self.in_block // x % y, "z": self.in_block // (x * y)}
        lane = self.lane % WARP
        everywhere = {
            "%dynamic_smem_size": dynamic_shared,
            "%nwarpid": self.lanes_per_block // WARP,
            "%smid": 0,
        }
        everywhere |= {f"%ntid.{d}": n for d, n in zip("xyz", self.block, strict=True)}
        everywhere |= {f"%nctaid.{d}": n for d, n in zip("xyz", self.grid, strict=True)}
        special = {name: np.full(self.lanes, n, np.int64) for name, n in everywhere.items()}
        special |= {f"%tid.{d}": inside[d] for d in "xyz"}
        special |= {f"%ctaid.{d}": np.zeros(self.lanes, np.int64) for d in "xyz"}
        special |= {"%laneid": lane, "%warpid": self.in_block // WARP}
        one = np.int64(1)
        special |= {"%lanemask_eq": one << lane, "%lanemask_lt": (one << lane) - 1}
        special |= {"%lanemask_le": (one << lane + 1) - 1}
        special |= {
            "%lanemask_gt": 0xFFFFFFFF ^ special["%lanemask_le"],
            "%lanemask_ge": 0xFFFFFFFF ^ special["%lanemask_lt"],
        }
        return special

    # Running

    def start(self, numbers: Sequence[int], seed: int) -> None:
        """Run the blocks of these numbers (in the grid, x fastest) to their end."""
        here = np.asarray(numbers)
        present = np.repeat(np.arange(self.blocks) < len(here), self.lanes_per_block)
        block = np.zeros(self.blocks, np.int64)
        block[: len(here)] = here
        block = block[self.local_block]
        gx, gy, _ = self.grid
        # in place: bound instructions hold views of these
        self.special["%ctaid.x"][:] = block % gx
        self.special["%ctaid.y"][:] = block // gx % gy
        self.special["%ctaid.z"][:] = block // (gx * gy)
        self.thread[:] = block * self.threads_per_block + self.in_block + 1
        self.stamp[:] = self.memory.launches << 40
        self.committed[:] = 0
        self.shared.clear(seed)
        for rows in self.registers.values():  # garbage, so that what was never set shows
            rows.view(np.uint8)[...] = 0xA5 if rows.dtype != bool else 1
        self.live = self.real & present
        self.waiting: dict[int, np.ndarray] = {}
        self.groups = {0: self.live.copy()}
        with np.errstate(all="ignore"):
            for _ in range(MOST_TURNS):
                if self.groups:
                    self.run_group()
                elif self.waiting:
                    raise PtxError(
                        f"{self.kernel.name}: a barrier that some threads of the block never reach"
                    )
                else:
                    return
        raise PtxError(f"{self.kernel.name}: does not come to an end")

    def run_group(self) -> None:
        """Run the group of lanes furthest back until it branches apart, ends, waits or catches up with another."""
        code, instructions, issued = self.code, self.kernel.code, self.cost.issued
        self.pc = min(self.groups)
        self.group = self.groups.pop(self.pc)
        ahead = min(self.groups, default=len(code))
        warps = int(self.group.reshape(-1, WARP).any(1).sum())
        while self.pc < ahead:
            at = self.pc
            ins = instructions[at]
            self.pc = at + 1
            active = self.group
            if ins.guard is not None:
                holds = self.registers["pred"][ins.guard.row]
                active = active & (~holds if ins.negated else holds)
            issued[at] += warps
            if ins.guard is None or active.any():
                try:
                    code[at](active)
                except PtxError as error:
                    raise PtxError(f"{self.where(ins)}: {error}") from None
                if self.group is None:
                    return
        if self.pc >= len(code):
            raise PtxError(f"{self.kernel.name}: runs past its last instruction")
        self.join(self.pc, self.group)

    def join(self, at: int, lanes: np.ndarray) -> None:
        self.groups[at] = self.groups[at] | lanes if at in self.groups else lanes

    def split(self, at: int, lanes: np.ndarray) -> None:
        """`lanes` of the running group go on at `at`; the others, if any, behind the current instruction."""
        rest = self.group & ~lanes
        self.join(at, lanes)
        if rest.any():
            self.join(self.pc, rest)
        self.group = None

    def leave(self, lanes: np.ndarray) -> None:
        self.live &= ~lanes
        rest = self.group & ~lanes
        if rest.any():
            self.join(self.pc, rest)
        self.group = None

    def barrier(self, lanes: np.ndarray) -> None:
        """bar.sync: lanes wait until all of their block do."""
        self.full_warps(lanes, "a divergent barrier", whole=False)
        rest = self.group & ~lanes
        if rest.any():
            self.join(self.pc, rest)
        self.group = None
        self.waiting[self.pc] = self.waiting.get(self.pc, False) | lanes
        arrived = np.logical_or.reduce(list(self.waiting.values())).reshape(self.blocks, -1).sum(1)
        complete = np.repeat(arrived == self.threads_per_block, self.lanes_per_block)
        if complete.any():
            for at, lanes in list(self.waiting.items()):
                released = lanes & complete
                self.waiting[at] = lanes & ~complete
                self.stamp[released] = (self.stamp[released] >> 20) + 1 << 20
                if released.any():
                    self.join(at, released)
            self.waiting = {at: lanes for at, lanes in self.waiting.items() if lanes.any()}

    def full_warps(self, active: np.ndarray, problem: str, whole: bool = True) -> np.ndarray:
        """Numbers of the active warps. All 32 lanes must be active, or all that have not left when not `whole`."""
        warps = active.reshape(-1, WARP)
        some = warps.any(1)
        wanted = True if whole else self.live.reshape(-1, WARP)
        partial = some & (warps != wanted).any(1)
        if partial.any():
            here = int(warps[np.flatnonzero(partial)[0]].sum())
            raise PtxError(f"{problem}: {here} of the lanes of a warp are here")
        return np.flatnonzero(some)


def _access_size(ins: Instruction) -> int | None:
    """Bytes of one lane's access."""
    if ins.opcode == "ldmatrix":
        return 16
    if ins.opcode == "cp":
        return ins.operands[2].bits if ins.has("async") and len(ins.operands) > 2 else None
    return SIZES[ins.type] * ins.vector if ins.opcode in ("ld", "st", "atom", "red") else None


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    params: bytes,
    memory: GlobalMemory,
    dynamic_shared: int = 0,
    seed: int = 0,
    lanes: int = 2048,
) -> Cost:
    """Run every block of a grid, as many at a time as make up `lanes`, in an order by `seed`. Returns what it cost.

    params: the block of parameters as the kernel declares it, see `pack_params`.
    Raises PtxError, with the PTX line and the source line, for what the kernel does wrong.
    """
    grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
    threads, total = int(np.prod(block)), int(np.prod(grid))
    if kernel.threads is not None and threads > kernel.threads:
        raise PtxError(f"{kernel.name}: launched with {threads} threads, compiled for {kernel.threads}")
    if not 1 <= threads <= 1024 or total < 1:
        raise PtxError(f"{kernel.name}: cannot launch {grid} blocks of {block} threads")
    if len(params) != kernel.param_bytes:
        raise PtxError(f"{kernel.name}: {len(params)} bytes of parameters, wanted {kernel.param_bytes}")
    sizes = [_access_size(i) for i in kernel.code if i.space in ("global", None)]
    memory.begin_launch(min(filter(None, sizes), default=4))
    cost = Cost(kernel)
    together = max(1, min(total, lanes // threads))
    machine = Machine(kernel, grid, block, params, dynamic_shared, memory, together, cost)
    order = np.random.default_rng(seed).permutation(total).tolist()
    for first in range(0, total, together):
        machine.start(order[first : first + together], seed)
    return cost


def pack_params(kernel: Kernel, *values: int | float | np.ndarray | bytes) -> bytes:
    """The block of parameters: arrays on the device become their addresses, bytes are taken as they are."""
    if len(values) != len(kernel.params):
        raise PtxError(f"{kernel.name} takes {len(kernel.params)} parameters, got {len(values)}")
    raw = bytearray(kernel.param_bytes)
    for value, (at, size) in zip(values, kernel.params.values(), strict=True):
        if isinstance(value, np.ndarray):
            value = int(value.ctypes.data)
        if isinstance(value, float):
            value = np.float32(value).tobytes()
        if isinstance(value, int):
            value = (value % (1 << 8 * size)).to_bytes(size, "little")
        raw[at : at + size] = value
    return bytes(raw)
