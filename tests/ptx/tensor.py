"""Tensor core instructions: mma, mma.sp, ldmatrix. Layouts are those of the PTX manual, written as index tables.

Every lane holds elements of A, B and C in 32-bit registers. With g = lane / 4 and t = lane % 4, and e elements in a
register (2 of f16, 4 of s8), register r of

    A (16 x K)   holds row g + 8 * (r % 2),  columns e * t + 4 * e * (r / 2) and the e - 1 after it
    B (K x 8)    holds column g,             rows    e * t + 4 * e * r       and the e - 1 after it
    C (16 x 8)   holds row g + 8 * (r / 2),  column  2 * t + r % 2           (one element)

A sparse A holds two of every four columns, so that its registers are those of a dense A of K / 2 columns; which two,
say 4 bits of metadata for every group of four: the places of the first and of the second, the lower bits first.
"""

from __future__ import annotations

import numpy as np

from .access import _count_waves
from .arithmetic import from_bf16
from .machine import WARP, Machine, Run, instruction
from .parse import Instruction, PtxError, Vector

LANE = np.arange(WARP)
G, T = LANE // 4, LANE % 4

# shape and type of A -> (K, elements in a register)
DENSE = {
    ("m16n8k32", "s8"): (32, 4),
    ("m16n8k32", "u8"): (32, 4),
    ("m16n8k16", "s8"): (16, 4),
    ("m16n8k16", "u8"): (16, 4),
}
DENSE |= {
    ("m16n8k16", "f16"): (16, 2),
    ("m16n8k16", "bf16"): (16, 2),
    ("m16n8k8", "f16"): (8, 2),
    ("m16n8k8", "bf16"): (8, 2),
}
SPARSE = {
    ("m16n8k64", "s8"): (64, 4),
    ("m16n8k64", "u8"): (64, 4),
    ("m16n8k32", "f16"): (32, 2),
    ("m16n8k32", "bf16"): (32, 2),
}


def a_places(columns: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of A, each [32 lanes, registers, elements]."""
    r, e = np.arange(columns // each // 2)[None, :, None], np.arange(each)
    g, t = G[:, None, None], T[:, None, None]
    return np.broadcast_arrays(g + 8 * (r % 2), each * t + 4 * each * (r // 2) + e)


def b_places(rows: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of B, each [32 lanes, registers, elements]."""
    r, e = np.arange(rows // each // 4)[None, :, None], np.arange(each)
    return np.broadcast_arrays(each * T[:, None, None] + 4 * each * r + e, G[:, None, None])


def c_places() -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of C and D, each [32 lanes, 4 registers]."""
    r = np.arange(4)
    return np.broadcast_arrays(G[:, None] + 8 * (r // 2), 2 * T[:, None] + r % 2)


def metadata_places(kind: str, selector: int) -> np.ndarray:
    """[16 rows, K / 4 groups, 2] -> (lane, lowest bit) of the 4 bits of every group of columns.

    8-bit types use all lanes: lane 4g + t has all 32 bits for row g + 8 * (t % 2), columns from 32 * (t / 2).
    16-bit types use the lanes with t / 2 = selector: lane 4g + t has columns from 16 * (t % 2), in its lower half for row
    g and in its upper half for row g + 8.
    """
    row, group = np.mgrid[:16, : 16 if kind in ("s8", "u8") else 8]
    if kind in ("s8", "u8"):
        if selector != 0:
            raise PtxError(f"sparsity selector {selector}, wanted 0")
        lane = row % 8 * 4 + row // 8 + group // 8 * 2
        return np.stack([lane, group % 8 * 4], -1)
    if selector not in (0, 1):
        raise PtxError(f"sparsity selector {selector}, wanted 0 or 1")
    lane = row % 8 * 4 + group // 4 + 2 * selector
    return np.stack([lane, group % 4 * 4 + row // 8 * 16], -1)


@instruction("mma")
def mma(m: Machine, ins: Instruction) -> Run:
    shape = next(x for x in ins.modifiers if x[0] == "m" and "n8k" in x)
    sparse = any(x.startswith("sp") for x in ins.modifiers)
    to, a_kind, b_kind, from_ = ins.types
    if not (ins.has("row") and ins.has("col")) or to != from_ or to not in ("s32", "f32"):
        raise PtxError("mma of these types or orders is not supported")
    k, each = (SPARSE if sparse else DENSE)[shape, a_kind]
    held = k // 2 if sparse else k  # columns of A that the registers hold
    targets = [m.target(o, to) for o in ins.operands[0].parts]
    a, b = ([m.value(o, "b32") for o in operand.parts] for operand in ins.operands[1:3])
    c = [m.value(o, to) for o in ins.operands[3].parts]
    a_at, b_at, c_at = a_places(held, each), b_places(k, each), c_places()
    if [len(a), len(b), len(c)] != [a_at[0].shape[1], b_at[0].shape[1], 4]:
        raise PtxError(f"{len(a)}, {len(b)} and {len(c)} registers")
    integers, saturate = to == "s32", ins.has("satfinite")
    if sparse:
        metadata, places = m.value(ins.operands[4], "b32"), metadata_places(a_kind, ins.operands[5].bits)
        ordered = ins.has("sp::ordered_metadata")

    def matrix(views, places, kind, size, warps) -> np.ndarray:
        """[warps, *size] float64 of the registers of those warps."""
        words = np.stack([np.broadcast_to(v, m.lanes).reshape(-1, WARP)[warps] for v in views], -1)
        words = np.ascontiguousarray(words)
        if kind == "bf16":
            numbers = from_bf16(words.view(np.uint16))
        else:
            numbers = words.view({"s8": np.int8, "u8": np.uint8, "f16": np.float16}[kind])
        whole = np.zeros((len(warps), *size))
        whole[:, *places] = numbers.reshape(len(warps), *places[0].shape)
        return whole

    def expand(compressed: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """[warps, 16, K] of the columns held, by the metadata."""
        words = np.broadcast_to(metadata, m.lanes).reshape(-1, WARP)[warps]
        bits = words[:, places[..., 0]] >> places[..., 1].astype(np.uint32)
        first, second = (bits & 3).astype(np.int64), (bits >> 2 & 3).astype(np.int64)
        wrong = first >= second if ordered else first == second
        if wrong.any():
            raise PtxError("metadata names one column twice, or the later one first")
        dense = np.zeros((len(warps), 16, k))
        groups = np.arange(k // 4) * 4
        index = np.arange(len(warps))[:, None, None], np.arange(16)[:, None]
        dense[*index, groups + first] = compressed[:, :, 0::2]
        dense[*index, groups + second] = compressed[:, :, 1::2]
        return dense

    def run(active: np.ndarray) -> None:
        warps = m.full_warps(active, "mma by a part of a warp")
        left = matrix(a, a_at, a_kind, (16, held), warps)
        if sparse:
            left = expand(left, warps)
        product = left @ matrix(b, b_at, b_kind, (k, 8), warps)
        lanes = (warps[:, None] * WARP + LANE).ravel()
        for r in range(4):
            old = np.broadcast_to(c[r], m.lanes)[lanes].astype(np.float64)
            total = product[:, c_at[0][:, r], c_at[1][:, r]].ravel() + old
            if saturate:
                total = np.clip(total, -(2.0**31), 2.0**31 - 1)
            sums[r] = total.astype(np.int64).astype(np.int32) if integers else total.astype(np.float32)
        for r, target in enumerate(targets):
            target[lanes] = sums[r]

    sums: list = [None] * 4
    return run


@instruction("ldmatrix")
def ldmatrix(m: Machine, ins: Instruction) -> Run:
    count = next(int(x[1:]) for x in ins.modifiers if x in ("x1", "x2", "x4"))
    if not ins.has("m8n8") or not ins.has("b16"):
        raise PtxError("only m8n8.b16 is supported")
    at, transposed = len(m.code), ins.has("trans")
    to = ins.operands[0].parts if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
    targets = [m.target(o, "b32") for o in to]
    address = m.address(ins.operands[1])
    generic = ins.space is None

    def run(active: np.ndarray) -> None:
        warps = m.full_warps(active, "ldmatrix by a part of a warp")
        # lane 8 i + j gives the address of row j of matrix i
        giving = (warps[:, None] * WARP + np.arange(8 * count)).ravel()
        where = address()[giving]
        if generic:
            where = where - np.uint64(m.cvta_offset["shared"])
        _count_waves(m, at, where, giving, 16)
        rows = m.shared.load(where, 16, giving, m)  # 4 words of 4 bytes
        tiles = np.ascontiguousarray(rows).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            tiles = tiles.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(tiles).view(np.uint32).reshape(len(warps), count, WARP)
        lanes = (warps[:, None] * WARP + LANE).ravel()
        for i, target in enumerate(targets):
            target[lanes] = words[:, i].ravel()

    return run
