"""Instructions that touch memory or other lanes, and those that steer: loads, stores, copies, barriers, shuffles, branches."""

from __future__ import annotations

import numpy as np

from .arithmetic import predicate, store
from .machine import (
    DTYPES,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WARP,
    WINDOW_MASK,
    Machine,
    Run,
    instruction,
)
from .memory import bank_waves, sectors
from .parse import SIZES, Immediate, Instruction, Pair, PtxError, Vector

# An access of several spaces by one instruction: (lanes, addresses) -> words [n, size / 4], or the same with words to store.


def _load(
    m: Machine, space: str, lane: np.ndarray, address: np.ndarray, size: int, at: int, strong: bool
) -> np.ndarray:
    if space == "global":
        _count_sectors(m, at, address, lane, size)
        return m.memory.load(address, size, lane, m, strong)
    if space == "shared":
        _count_waves(m, at, address, lane, size)
        return m.shared.load(address, size, lane, m)
    data, offset, limit = _private(m, space, lane, address)
    _private_bounds(address, size, limit, space)
    word = min(size, 4)
    return data[offset[:, None] + np.arange(size)].view(f"u{word}")


def _store(m: Machine, space: str, lane, address, values: np.ndarray, at: int, strong: bool) -> None:
    size = values.shape[1] * values.itemsize
    if space == "global":
        _count_sectors(m, at, address, lane, size)
        m.memory.store(address, values, lane, m, strong)
    elif space == "shared":
        _count_waves(m, at, address, lane, size)
        m.shared.store(address, values, lane, m)
    elif space == "local":
        data, offset, limit = _private(m, space, lane, address)
        _private_bounds(address, size, limit, space)
        data[offset[:, None] + np.arange(size)] = np.ascontiguousarray(values).view(np.uint8)
    else:
        raise PtxError(f"writes to .{space}")


def _private(
    m: Machine, space: str, lane: np.ndarray, address: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    offset = address.astype(np.int64) & WINDOW_MASK
    if space == "param":
        return m.params, offset, m.params.size
    return m.local, offset + lane * m.local_size, m.local_size


def _private_bounds(address: np.ndarray, size: int, limit: int, space: str) -> None:
    offset = address.astype(np.int64) & WINDOW_MASK
    if (offset % size).any() or (offset + size > limit).any():
        raise PtxError(f"misaligned or out of bounds: {size} bytes of {limit} of .{space}")


def _count_waves(m: Machine, at: int, address: np.ndarray, lane: np.ndarray, size: int) -> None:
    waves, phases = bank_waves(address, lane, size)
    m.cost.waves[at] += waves
    m.cost.phases[at] += phases


def _count_sectors(m: Machine, at: int, address: np.ndarray, lane: np.ndarray, size: int) -> None:
    moved, wanted = sectors(address, lane, size)
    m.cost.sectors[at] += moved
    m.cost.wanted[at] += wanted


def _spaces(space: str | None, address: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(space, which of the accesses, addresses in it) of a generic access."""
    if space is not None:
        return [("global" if space == "const" else space, np.arange(address.size), address)]
    found = []
    window = address & ~np.uint64(WINDOW_MASK)
    for name, base in (
        ("global", 0),
        ("shared", SHARED_WINDOW),
        ("local", LOCAL_WINDOW),
        ("param", PARAM_WINDOW),
    ):
        which = np.flatnonzero(window == base)
        if which.size:
            found.append((name, which, address[which] - np.uint64(base)))
    if sum(which.size for _, which, _ in found) != address.size:
        raise PtxError("a generic address of no space")
    return found


def _strong(ins: Instruction) -> bool:
    return any(ins.has(x) for x in ("volatile", "relaxed", "acquire", "release"))


@instruction("ld", "ldu")
def load(m: Machine, ins: Instruction) -> Run:
    kind, at, space, strong = ins.type, len(m.code), ins.space, _strong(ins)
    each, count = SIZES[kind], ins.vector
    to = ins.operands[0].parts if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
    if len(to) != count:
        raise PtxError(f"{len(to)} registers for {count} values")
    address = m.address(ins.operands[1])
    # a narrow value is extended by its sign into the whole register
    targets = []
    for operand in to:
        wide = max(each, SIZES[getattr(operand, "kind", kind)])
        sort = kind[0] if kind[0] == "s" else "u"
        targets.append(m.target(operand, f"{sort}{8 * wide}"))
    narrow = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{each}")

    def run(active: np.ndarray) -> None:
        lane = np.flatnonzero(active)
        where = address()[lane]
        for name, which, inside in _spaces(space, where):
            words = _load(m, name, lane[which], inside, each * count, at, strong)
            values = np.ascontiguousarray(words).view(narrow)
            for i, target in enumerate(targets):
                target[lane[which]] = values[:, i]

    return run


@instruction("st")
def save(m: Machine, ins: Instruction) -> Run:
    kind, at, space, strong = ins.type, len(m.code), ins.space, _strong(ins)
    each, count = SIZES[kind], ins.vector
    source = ins.operands[1].parts if isinstance(ins.operands[1], Vector) else (ins.operands[1],)
    if len(source) != count:
        raise PtxError(f"{len(source)} registers for {count} values")
    address = m.address(ins.operands[0])
    views = [m.value(operand, f"u{8 * each}") for operand in source]
    word = f"u{min(4, each * count)}"

    def run(active: np.ndarray) -> None:
        lane = np.flatnonzero(active)
        values = np.empty((lane.size, count), f"u{each}")
        for i, view in enumerate(views):
            values[:, i] = view[lane] if view.ndim else view
        words = values.view(word)
        for name, which, inside in _spaces(space, address()[lane]):
            _store(m, name, lane[which], inside, words[which], at, strong)

    return run


@instruction("atom", "red")
def atomic(m: Machine, ins: Instruction) -> Run:
    """One lane after the other, in their order."""
    kind, at = ins.type, len(m.code)
    name = next(
        x for x in ins.modifiers if x in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc")
    )
    returns = ins.opcode == "atom"
    target = m.target(ins.operands[0], kind) if returns else None
    place, *rest = ins.operands[1:] if returns else ins.operands
    address = m.address(place)
    sources = [m.value(o, kind) for o in rest]
    numpy = {"add": np.add, "min": np.minimum, "max": np.maximum}
    numpy |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    size, dtype = SIZES[kind], DTYPES[kind]
    if kind in ("bf16", "bf16x2", "f16x2") or name == "inc":
        raise PtxError("this atomic is not supported")

    def run(active: np.ndarray) -> None:
        lanes = np.flatnonzero(active)
        where = address()
        for lane in lanes:
            me = np.array([lane])
            ((name_of_space, _, inside),) = _spaces(ins.space, where[me])
            if name_of_space == "global":
                words = m.memory.load(inside, size, me, m, strong=True)
                _count_sectors(m, at, inside, me, size)
            else:
                words = _load(m, name_of_space, me, inside, size, at, True)
            old = np.ascontiguousarray(words).view(dtype)[0]
            operands = [s[me] if s.ndim else np.array([s], dtype) for s in sources]
            if name == "exch":
                new = operands[0]
            elif name == "cas":
                new = operands[1] if old == operands[0] else old
            else:
                new = numpy[name](old, operands[0])
            values = np.ascontiguousarray(new.astype(dtype)).reshape(1, 1).view(words.dtype)
            if name_of_space == "global":
                m.memory.store(inside, values, me, m, strong=True)
            else:
                _store(m, name_of_space, me, inside, values, at, True)
            if target is not None:
                target[lane] = old[0]

    return run


# cp.async


@instruction("cp")
def copy(m: Machine, ins: Instruction) -> Run:
    if not ins.has("async") or ins.has("bulk") or ins.has("mbarrier"):
        raise PtxError("unknown instruction")
    at = len(m.code)
    if ins.has("commit_group"):

        def commit(active: np.ndarray) -> None:
            m.committed[active] += 1

        return commit
    if ins.has("wait_group") or ins.has("wait_all"):
        keep = ins.operands[0].bits if ins.operands else -1

        def wait(active: np.ndarray) -> None:  # wait_all takes what is not committed too
            m.shared.land(np.where(active, m.committed - keep, -1), m)

        return wait
    size = ins.operands[2].bits
    to, source = m.address(ins.operands[0]), m.address(ins.operands[1])
    if ins.has("cg") and size != 16:
        raise PtxError(f"cp.async.cg copies 16 bytes, not {size}")
    last = ins.operands[3] if len(ins.operands) > 3 else Immediate(size)
    predicated = getattr(last, "kind", "") == "pred"  # ignore-src
    taken = m.value(last, "pred" if predicated else "u32")

    def run(active: np.ndarray) -> None:
        lane = np.flatnonzero(active)
        destination, address = to()[lane], source()[lane]
        many = np.broadcast_to(taken, m.lanes)[lane]
        many = np.where(many, 0, size) if predicated else many.astype(np.int64)
        if (many > size).any():
            raise PtxError(f"cp.async of {int(many.max())} of {size} bytes")
        if ((many != 0) & (many != size)).any():
            raise PtxError("cp.async of a part of its bytes is not supported")
        if (address % np.uint64(size)).any():
            raise PtxError(f"misaligned: cp.async of {size} bytes from {int(address[0]):#x}")
        values = np.zeros((lane.size, size // 4), np.uint32)  # what is not copied is zero
        real = np.flatnonzero(many)
        if real.size:
            _count_sectors(m, at, address[real], lane[real], size)
            values[real] = m.memory.load(address[real], size, lane[real], m)
        _count_waves(m, at, destination, lane, size)
        m.shared.copy(destination, values, lane, m.committed[lane], m)

    return run


# Branches and barriers


@instruction("bra")
def branch(m: Machine, ins: Instruction) -> Run:
    target = m.kernel.labels[ins.operands[0].name]
    return lambda active: m.split(target, active)


@instruction("ret", "exit")
def leave(m: Machine, ins: Instruction) -> Run:
    return m.leave


@instruction("trap")
def trap(m: Machine, ins: Instruction) -> Run:
    def run(active: np.ndarray) -> None:
        raise PtxError("the kernel gives up (trap)")

    return run


@instruction("bar", "barrier")
def barrier(m: Machine, ins: Instruction) -> Run:
    if ins.has("warp"):
        mask = m.value(ins.operands[0], "b32")

        def sync_warp(active: np.ndarray) -> None:
            _members(m, active, mask)
            m.stamp[active] += 1

        return sync_warp
    if not ins.has("sync") or len(ins.operands) > 1 or getattr(ins.operands[0], "bits", 0) != 0:
        raise PtxError("only the whole block's barrier 0 is supported")
    return m.barrier


def _members(m: Machine, active: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[warps, 32] of the lanes named by the mask operand of a .sync instruction; all must be here, and all here be named."""
    here = active.reshape(-1, WARP)
    named = np.broadcast_to(mask, m.lanes).reshape(-1, WARP)
    some = here.any(1)
    first = here.argmax(1)
    word = named[np.arange(len(here)), first]
    if (here & (named != word[:, None])).any():
        raise PtxError("lanes of a warp name different members")
    wanted = word[:, None] >> np.arange(WARP, dtype=np.uint32) & 1 != 0
    wanted &= m.live.reshape(-1, WARP) & some[:, None]
    if (wanted != here).any():
        at = int(np.flatnonzero((wanted != here).any(1))[0])
        raise PtxError(f"a warp's {int(wanted[at].sum())} members are named, {int(here[at].sum())} are here")
    return wanted


@instruction("membar", "fence")
def fence(m: Machine, ins: Instruction) -> Run:
    return lambda active: None


# Lanes talking


@instruction("shfl")
def shuffle(m: Machine, ins: Instruction) -> Run:
    mode = next(x for x in ins.modifiers if x in ("up", "down", "bfly", "idx"))
    first, valid = ins.operands[0], None
    if isinstance(first, Pair):
        first, valid = first.first, m.target(first.second, "pred")
    target = m.target(first, "b32")
    value, b, c, mask = (m.value(o, "b32") for o in ins.operands[1:5])
    lane = m.lane % WARP

    def run(active: np.ndarray) -> None:
        members = _members(m, active, mask).ravel()
        by, clamp, segment = (
            np.broadcast_to(x, m.lanes).astype(np.int64) for x in (b & 31, c & 31, c >> 8 & 31)
        )
        top = lane & segment | clamp & ~segment
        bottom = lane & segment
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": bottom | by & ~segment}[mode]
        inside = source >= top if mode == "up" else source <= top
        source = np.where(inside, source, lane)
        absolute = m.lane - lane + source
        if (active & ~members[absolute]).any():
            raise PtxError("shfl reads a lane that does not take part")
        store(target, np.broadcast_to(value, m.lanes)[absolute], active)
        if valid is not None:
            store(valid, inside, active)

    return run


@instruction("vote", "activemask", "redux", "match")
def vote(m: Machine, ins: Instruction) -> Run:
    if ins.opcode == "match":
        raise PtxError("unknown instruction")
    if ins.opcode == "activemask":
        target = m.target(ins.operands[0], "b32")
        return lambda active: store(target, np.repeat(_ballot(active), WARP), active)
    mask = m.value(ins.operands[2], "b32")
    if ins.opcode == "redux":
        target, x = m.target(ins.operands[0], ins.type), m.value(ins.operands[1], ins.type)
        name = ins.modifiers[1]
        numpy = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
        }
        numpy["xor"] = np.bitwise_xor
        neutral = {
            "min": np.iinfo(x.dtype).max,
            "max": np.iinfo(x.dtype).min,
            "and": np.iinfo(x.dtype).max,
        }.get(name, 0)
        if name == "and" and x.dtype.kind == "i":
            neutral = -1

        def reduce(active: np.ndarray) -> None:
            members = _members(m, active, mask)
            rows = np.where(members, np.broadcast_to(x, m.lanes).reshape(-1, WARP), x.dtype.type(neutral))
            store(target, np.repeat(numpy[name].reduce(rows, axis=1, dtype=x.dtype), WARP), active)

        return reduce
    holds = predicate(m, ins.operands[1])
    mode = next(x for x in ins.modifiers if x in ("ballot", "any", "all", "uni"))
    target = m.target(ins.operands[0], "b32" if mode == "ballot" else "pred")

    def run(active: np.ndarray) -> None:
        members = _members(m, active, mask)
        votes = holds().reshape(-1, WARP) & members
        result = {
            "ballot": lambda: _ballot(votes.ravel()),
            "any": lambda: votes.any(1),
            "all": lambda: (votes == members).all(1),
            "uni": lambda: (votes == members).all(1) | ~votes.any(1),
        }[mode]()
        store(target, np.repeat(result, WARP), active)

    return run


def _ballot(lanes: np.ndarray) -> np.ndarray:
    bits = lanes.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
    return bits.sum(1, dtype=np.uint64).astype(np.uint32)
