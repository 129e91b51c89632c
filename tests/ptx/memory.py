"""Memory that watches: bounds, alignment, bytes never written, copies in flight, and races.

A race is found by stamps, not by luck: every access leaves who made it and when, in barriers passed. Two threads that
touch a byte, one of them writing, must be of one block with a __syncthreads between them, or of one warp with at least
a __syncwarp. So one run in any order of threads finds what any other order would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .parse import PtxError

SECTOR = 32  # bytes that global memory moves at a time
BANKS = 32  # of shared memory, each 4 bytes wide

# Who reads a byte besides the one named: nobody, others of the warp, of the block, of other blocks.
_ALONE, _WARP, _BLOCK, _GRID = range(4)


class Clock(Protocol):
    """What a race needs to know of the lanes; a lane is a thread of one of the blocks that run together."""

    thread: np.ndarray  # int32 [lanes]: number in the whole grid, from 1
    stamp: np.ndarray  # int64 [lanes]: launch << 40 | barriers passed by the block << 20 | by the warp
    local_block: np.ndarray  # [lanes]: which of the blocks that run together
    threads_per_block: int


class Races:
    """Last writer and readers of every grain (the smallest access the kernel makes) of a memory."""

    def __init__(self, grains: int):
        self.writer = np.zeros(grains, np.int32)
        self.written = np.zeros(grains, np.int64)
        self.reader = np.zeros(grains, np.int32)
        self.read_at = np.zeros(grains, np.int64)
        self.spread = np.zeros(grains, np.int8)

    def forget(self) -> None:
        self.writer[:] = 0
        self.reader[:] = 0

    def read(self, index: np.ndarray, lane: np.ndarray, clock: Clock) -> str | None:
        """Note that lane[i] reads the grains index[i, :]; what it races with, or None."""
        index, lane = index.ravel(), np.repeat(lane, index.shape[1])
        me, now = clock.thread[lane], clock.stamp[lane]
        problem = self._conflict("written", self.writer[index], self.written[index], me, now, clock)
        # Earlier readers count until a barrier divides them from all that may come.
        who, when, spread = self.reader[index], self.read_at[index], self.spread[index]
        distance = _distance(who, me, clock)
        past = (who == 0) | (when >> 40 != now >> 40)
        past |= (distance < _GRID) & (spread < _GRID) & (when >> 20 != now >> 20)
        past |= (distance < _BLOCK) & (spread < _BLOCK) & (when != now)
        spread = np.where(past, _ALONE, np.maximum(spread, distance)).astype(np.int8)
        self.reader[index], self.read_at[index], self.spread[index] = me, now, spread
        last = self.reader[index]
        several = np.flatnonzero(last != me)  # lanes that read one grain together
        if several.size:
            apart = np.maximum(_distance(last[several], me[several], clock), spread[several])
            np.maximum.at(self.spread, index[several], apart.astype(np.int8))
        return problem

    def write(self, index: np.ndarray, lane: np.ndarray, clock: Clock) -> str | None:
        """Note that lane[i] writes the grains index[i, :]; what it races with, or None."""
        index, lane = index.ravel(), np.repeat(lane, index.shape[1])
        me, now = clock.thread[lane], clock.stamp[lane]
        problem = self._conflict("written", self.writer[index], self.written[index], me, now, clock)
        who, when, spread = self.reader[index], self.read_at[index], self.spread[index]
        problem = problem or self._conflict("read", who, when, me, now, clock, spread)
        self.writer[index], self.written[index] = me, now
        # what others have written in this very instruction
        return problem or self._conflict("written", self.writer[index], now, me, now, clock)

    @staticmethod
    def _conflict(done, who, when, me, now, clock: Clock, spread=_ALONE) -> str | None:
        """The first of the accesses by `me` at `now` that no barrier divides from those by `who` at `when`."""
        distance = np.maximum(_distance(who, me, clock), spread)
        bad = (who != 0) & (when >> 40 == now >> 40) & (distance > _ALONE)
        # A barrier of the block orders what its threads did, one of the warp what its lanes did.
        bad &= (distance == _GRID) | (when >> 20 == now >> 20)
        bad &= (distance > _WARP) | (when == now)
        if not bad.any():
            return None
        at = int(np.flatnonzero(bad)[0])
        other, mine = int(who[at]) - 1, int(me[at]) - 1
        names = [
            f"thread {t % clock.threads_per_block} of block {t // clock.threads_per_block}"
            for t in (mine, other)
        ]
        if mine == other:
            names[1] = "another thread"
        between = "other blocks, in one launch" if distance[at] == _GRID else "no barrier in between"
        return f"a race: {names[0]} meets what {names[1]} has {done} ({between})"


def _distance(a: np.ndarray, b: np.ndarray, clock: Clock) -> np.ndarray:
    """_ALONE for one and the same thread, _WARP for two of one warp, and so on; threads count from 1."""
    per_block = clock.threads_per_block
    a, b = a - 1, b - 1
    block = a // per_block == b // per_block
    warp = block & (a % per_block // 32 == b % per_block // 32)
    return np.where(a == b, _ALONE, np.where(warp, _WARP, np.where(block, _BLOCK, _GRID)))


@dataclass
class Allocation:
    name: str
    start: int  # offset into the arena
    size: int
    read_only: bool


class GlobalMemory:
    """An arena of host memory; device pointers are its real addresses, so that host code can pass them on.

    Every allocation is followed by a gap that belongs to nobody: an access beyond the end is an error.
    """

    GAP = 256
    ALLOCATED, WRITTEN, READ_ONLY = 1, 2, 4

    def __init__(self, size: int = 1 << 23):
        raw = np.empty(size + 512, np.uint8)
        skip = -raw.ctypes.data % 512
        self.data = raw[skip : skip + size]
        self.base = self.data.ctypes.data
        self.flags = np.zeros(size, np.uint8)
        self.allocations: list[Allocation] = []
        self.top = self.GAP
        self.launches = 0
        self.grain = 0

    def put(self, array: np.ndarray, name: str, read_only: bool = True, skew: int = 0) -> np.ndarray:
        """A copy of `array` on the device, as a view of the arena. `skew` bytes are added to a 256-byte aligned start."""
        place = self.reserve(array.shape, array.dtype, name, read_only, skew)
        place[...] = array
        self.mark(place, self.WRITTEN)
        return place

    def empty(
        self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike, name: str, skew: int = 0
    ) -> np.ndarray:
        """Room that the kernel must write before anyone reads it; holds garbage (NaN as a float)."""
        place = self.reserve(shape, np.dtype(dtype), name, False, skew)
        place.view(np.uint8)[...] = 0xFF
        return place

    def reserve(self, shape, dtype: np.dtype, name: str, read_only: bool, skew: int) -> np.ndarray:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        start = -(-self.top // 256) * 256 + skew
        if start + size + self.GAP > self.data.size:
            raise MemoryError(f"the arena of {self.data.size} bytes is full")
        self.top = start + size + self.GAP
        self.allocations.append(Allocation(name, start, size, read_only))
        self.flags[start : start + size] = self.ALLOCATED | (self.READ_ONLY if read_only else 0)
        return self.data[start : start + size].view(dtype).reshape(shape)

    def mark(self, place: np.ndarray, flag: int) -> None:
        start = place.ctypes.data - self.base
        self.flags[start : start + place.nbytes] |= flag

    def written(self, place: np.ndarray) -> np.ndarray:
        """Which elements of `place` a kernel (or the host) has written in full."""
        start = place.ctypes.data - self.base
        flags = self.flags[start : start + place.nbytes].reshape(*place.shape, place.itemsize)
        return ((flags & self.WRITTEN) != 0).all(-1)

    def name_of(self, address: int) -> str:
        offset = int(address) - self.base
        near = min(
            self.allocations,
            key=lambda a: max(a.start - offset, offset - a.start - a.size + 1, 0),
            default=None,
        )
        if near is None:
            return f"address {address:#x}"
        inside = offset - near.start
        return f"byte {inside} of {near.name} ({near.size} bytes)"

    def begin_launch(self, grain: int) -> int:
        """Stamps of earlier launches no longer count. Returns the number of this one."""
        self.launches += 1
        if grain != self.grain:
            self.grain = grain
            self.races = Races(self.data.size // grain)
        return self.launches

    # Accesses: address uint64 [n], lane [n] -> values [n, size / 4 or 1] of unsigned words of min(size, 4) bytes.

    def load(
        self, address: np.ndarray, size: int, lane: np.ndarray, clock: Clock, strong: bool = False
    ) -> np.ndarray:
        offset, flags = self._check(address, size, "read")
        if not (flags & self.WRITTEN).all():
            at = int(np.flatnonzero(~((flags & self.WRITTEN) != 0).all(1))[0])
            raise PtxError(f"reads memory never written: {self.name_of(address[at])}")
        watched = (flags[:, 0] & self.READ_ONLY) == 0
        if not strong and watched.any():
            index = _expand(offset[watched], size, self.grain)
            if problem := self.races.read(index, lane[watched], clock):
                raise PtxError(f"{problem}, at {self.name_of(address[watched][0])}")
        return _gather(self.data, offset, size)

    def store(
        self, address: np.ndarray, values: np.ndarray, lane: np.ndarray, clock: Clock, strong=False
    ) -> None:
        address, values, lane = _once(address, values, lane, clock)
        size = values.shape[1] * values.itemsize
        offset, flags = self._check(address, size, "written")
        if (flags & self.READ_ONLY).any():
            at = int(np.flatnonzero((flags & self.READ_ONLY).any(1))[0])
            raise PtxError(f"writes to an input: {self.name_of(address[at])}")
        if not strong and (problem := self.races.write(_expand(offset, size, self.grain), lane, clock)):
            raise PtxError(f"{problem}, at {self.name_of(address[0])}")
        _scatter(self.data, offset, values)
        _scatter(
            self.flags,
            offset,
            np.full_like(values, 0).view(np.uint8) | np.uint8(self.ALLOCATED | self.WRITTEN),
        )

    def _check(self, address: np.ndarray, size: int, done: str) -> tuple[np.ndarray, np.ndarray]:
        if (address % np.uint64(size)).any():
            at = int(np.flatnonzero(address % np.uint64(size))[0])
            raise PtxError(f"misaligned: {size} bytes {done} at {self.name_of(address[at])}")
        offset = address.astype(np.int64) - self.base
        inside = (offset >= 0) & (offset + size <= self.data.size)
        flags = _gather(self.flags, np.where(inside, offset, 0), size).view(np.uint8)
        good = inside & ((flags & self.ALLOCATED) != 0).all(1)
        if not good.all():
            at = int(np.flatnonzero(~good)[0])
            raise PtxError(f"out of bounds: {size} bytes {done} at {self.name_of(address[at])}")
        return offset, flags


class SharedMemory:
    """The shared memory of the blocks that run together, one after the other in one array; starts as garbage."""

    def __init__(self, blocks: int, size: int, grain: int):
        self.size = -(-size // 128) * 128
        self.wanted = size
        self.grain = grain
        self.data = np.zeros(blocks * self.size, np.uint8)
        self.written = np.zeros(blocks * self.size // grain, bool)
        self.flying = np.zeros(blocks * self.size // grain, np.int16)  # cp.async under way to it
        self.races = Races(blocks * self.size // grain)
        self.copies: list[_Copies] = []

    def clear(self, seed: int) -> None:
        self.data[:] = np.random.default_rng(seed).integers(0, 256, self.data.size, np.uint8)
        self.written[:] = False
        self.flying[:] = 0
        self.races.forget()
        self.copies.clear()

    def load(self, address: np.ndarray, size: int, lane: np.ndarray, clock: Clock) -> np.ndarray:
        offset = self._place(address, size, lane, clock)
        index = _expand(offset, size, self.grain)
        if self.flying[index].any():
            raise PtxError(
                f"reads shared memory while a cp.async to it is in flight{_at(address, self.flying[index])}"
            )
        if not self.written[index].all():
            raise PtxError(f"reads shared memory never written{_at(address, ~self.written[index])}")
        if problem := self.races.read(index, lane, clock):
            raise PtxError(f"{problem}, in shared memory")
        return _gather(self.data, offset, size)

    def store(self, address: np.ndarray, values: np.ndarray, lane: np.ndarray, clock: Clock) -> None:
        address, values, lane = _once(address, values, lane, clock)
        offset, index = self._claim(address, values.shape[1] * values.itemsize, lane, clock)
        self.written[index] = True
        _scatter(self.data, offset, values)

    def _claim(self, address, size, lane, clock) -> tuple[np.ndarray, np.ndarray]:
        offset = self._place(address, size, lane, clock)
        index = _expand(offset, size, self.grain)
        if self.flying[index].any():
            raise PtxError(
                f"writes shared memory while a cp.async to it is in flight{_at(address, self.flying[index])}"
            )
        if problem := self.races.write(index, lane, clock):
            raise PtxError(f"{problem}, in shared memory")
        return offset, index

    def _place(self, address: np.ndarray, size: int, lane: np.ndarray, clock: Clock) -> np.ndarray:
        address = address.astype(np.int64)
        if (address % size).any():
            raise PtxError(f"misaligned: {size} bytes{_at(address, address % size)}")
        outside = (address < 0) | (address + size > self.wanted)
        if outside.any():
            raise PtxError(
                f"out of bounds: {size} bytes{_at(address, outside)} of {self.wanted} shared bytes"
            )
        return clock.local_block[lane] * self.size + address

    # cp.async: bytes are in flight from the copy to the wait of the same thread, and cannot be touched until then.

    def copy(
        self, address: np.ndarray, values: np.ndarray, lane: np.ndarray, group: np.ndarray, clock: Clock
    ) -> None:
        offset, index = self._claim(address, values.shape[1] * values.itemsize, lane, clock)
        self.flying[index] += 1
        self.written[index] = True
        self.copies.append(_Copies(lane, group, offset, index, values))

    def land(self, before: np.ndarray, clock: Clock) -> None:
        """Finish the copies of lane l in groups below before[l]."""
        rest = []
        for copies in self.copies:
            done = copies.group < before[copies.lane]
            if done.any():
                lane, index = copies.lane[done], copies.index[done]
                self.flying[index] -= 1
                if problem := self.races.write(index, lane, clock):
                    raise PtxError(f"{problem}, in shared memory, as a cp.async lands")
                _scatter(self.data, copies.offset[done], copies.values[done])
                copies = _Copies(*(x[~done] for x in vars(copies).values()))
            if copies.lane.size:
                rest.append(copies)
        self.copies = rest


@dataclass
class _Copies:
    lane: np.ndarray
    group: np.ndarray
    offset: np.ndarray
    index: np.ndarray
    values: np.ndarray


def _at(address: np.ndarray, bad: np.ndarray) -> str:
    bad = bad.reshape(len(address), -1).any(1)
    return f" at offset {int(address[np.flatnonzero(bad)[0]])}"


def _once(address: np.ndarray, values: np.ndarray, lane: np.ndarray, clock: Clock) -> tuple[np.ndarray, ...]:
    """The stores of one instruction without those that a lane of the same block makes as well, with the same value."""
    key = np.stack([clock.local_block[lane], address.astype(np.int64)], 1)
    _, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
    if first.size == lane.size:
        return address, values, lane
    earlier = first[inverse.reshape(-1)]
    stays = (values != values[earlier]).any(1) | (earlier == np.arange(lane.size))
    return address[stays], values[stays], lane[stays]


def _expand(offset: np.ndarray, size: int, grain: int) -> np.ndarray:
    """Grains [n, size / grain] of accesses of `size` bytes at `offset`."""
    return (offset // grain)[:, None] + np.arange(max(1, size // grain))


def _gather(data: np.ndarray, offset: np.ndarray, size: int) -> np.ndarray:
    """[n, words] of the unsigned words of min(size, 4) bytes at `offset`, which must be aligned to the size."""
    word = min(size, 4)
    return data.view(f"u{word}").reshape(-1, size // word)[offset // size]


def _scatter(data: np.ndarray, offset: np.ndarray, values: np.ndarray) -> None:
    size = values.shape[1] * values.itemsize
    data.view(values.dtype).reshape(-1, values.shape[1])[offset // size] = values


# The cost model. A warp's access is served in phases (32 lanes of up to 4 bytes, 16 of 8, 8 of 16); a phase takes as many
# waves as the busiest bank holds different words.


def bank_waves(address: np.ndarray, lane: np.ndarray, size: int) -> tuple[int, int]:
    """(waves, phases) of the accesses of `size` bytes by these lanes, all in one instruction."""
    words = max(1, size // 4)
    phase = lane // (BANKS // words)
    word = (address.astype(np.int64) // 4)[:, None] + np.arange(words)
    key = np.unique((phase[:, None] << 32) + word)  # the same word twice is one access
    bank = (key >> 32) * BANKS + key % BANKS
    first, inverse = np.unique(key >> 32, return_inverse=True)
    counts = np.zeros((first.size, BANKS), np.int64)
    np.add.at(counts, (inverse, bank % BANKS), 1)
    return int(counts.max(1).sum()), int(first.size)


def sectors(address: np.ndarray, lane: np.ndarray, size: int) -> tuple[int, int]:
    """(sectors moved, bytes wanted) by these lanes in one instruction; each warp pays for itself."""
    address = address.astype(np.int64) - int(address.min() // SECTOR * SECTOR)
    warp = lane.astype(np.int64) // 32 << 40
    touched = np.unique(np.concatenate([warp + address // SECTOR, warp + (address + size - 1) // SECTOR]))
    return int(touched.size), int(np.unique(warp + address).size * size)
