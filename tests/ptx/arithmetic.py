"""What instructions compute, memory apart. Results are those of the hardware, except `.approx` (here correctly rounded)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .machine import DTYPES, Machine, Run, instruction
from .parse import SIZES, Immediate, Instruction, Not, Pair, PtxError, Sink, Vector

HALVES = {"f16x2": "f16", "bf16x2": "bf16"}

# Rounding. A result is computed with at least twice the digits it needs, rounded there to odd (the last digit is set
# when anything was lost), and then to the type wanted: the same as rounding once.


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd."""
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    step = np.where((lost > 0) == (total > 0), 1, -1)
    fix = (lost != 0) & np.isfinite(total) & (bits & 1 == 0)
    return np.where(fix, bits + step, bits).view(np.float64)


def to_bf16(x: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Bits of x (float64 or float32) rounded to bfloat16, to nearest even or towards zero."""
    wide = np.atleast_1d(np.asarray(x, np.float64))
    single = wide.astype(np.float32)
    bits = single.view(np.uint32)
    # to odd in float32 first: towards zero, and the last bit set when something was lost
    over = np.abs(single.astype(np.float64)) > np.abs(wide)
    bits = np.where(over, bits - 1, bits)
    bits = np.where(
        bits.astype(np.uint32).view(np.float32).astype(np.float64) != wide, bits | 1, bits
    ).astype(np.uint32)
    up = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + (bits >> 16 & 1)
    result = ((bits + up) >> 16).astype(np.uint16)
    result = np.where(np.isnan(wide), np.uint16(0x7FFF), result)
    return result.reshape(np.shape(x))


def directed(x: np.ndarray, mode: str) -> np.ndarray:
    """float64 x (rounded to odd) as float32, towards zero (rz), minus (rm) or plus infinity (rp)."""
    near = np.atleast_1d(x).astype(np.float32)
    wide = near.astype(np.float64)
    if mode == "rz":
        wrong, toward = np.abs(wide) > np.abs(x), np.float32(0)
    else:
        wrong, toward = (wide > x, np.float32(-np.inf)) if mode == "rm" else (wide < x, np.float32(np.inf))
    return np.where(wrong & np.isfinite(x), np.nextafter(near, toward), near)


def rounding(ins: Instruction, compute: Callable) -> Callable:
    """`compute`, whose result is float64 rounded to odd, with the rounding that the instruction names."""
    mode = next((x for x in ins.modifiers if x in ("rz", "rm", "rp")), None)
    if mode is None:
        return compute
    if ins.type != "f32":
        raise PtxError(f"rounding .{mode} of {ins.type}")
    return lambda *operands: directed(compute(*operands), mode)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def flush(x: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 become zero."""
    tiny = np.abs(x) < np.float32(2**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x)


def store(target: np.ndarray, result: np.ndarray, active: np.ndarray) -> None:
    np.copyto(target, result, where=active, casting="unsafe")


Getter = Callable[[], np.ndarray]


def reader(m: Machine, operand, kind: str, ftz: bool = False) -> Getter:
    """Function giving the operand as numbers: bf16 as float32."""
    view = m.value(operand, kind)
    if kind == "bf16":
        return lambda: from_bf16(view)
    if ftz and kind == "f32":
        return lambda: flush(view)
    return lambda: view


def writer(m: Machine, operand, kind: str, ftz: bool = False, saturate: bool = False) -> Callable:
    target = m.target(operand, kind)

    def write(result: np.ndarray, active: np.ndarray) -> None:
        if saturate:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1))
        if kind == "bf16":
            result = to_bf16(result)
        elif kind == "f32" and ftz:
            result = flush(np.asarray(result, np.float32))
        store(target, result, active)

    return write


def lanewise(m: Machine, ins: Instruction, kind: str, compute: Callable) -> Run:
    """target = compute(sources), all of one type; pairs of halves are computed one after the other."""
    halves = HALVES.get(kind)
    if halves:
        runs = []
        for half in range(2):
            views = [_half(m, operand, kind, half) for operand in ins.operands]
            runs.append(_half_run(views, halves, compute))
        return lambda active: [run(active) for run in runs] and None
    ftz, saturate = ins.has("ftz"), ins.has("sat")
    write = writer(m, ins.operands[0], kind, ftz, saturate)
    sources = [reader(m, operand, kind, ftz) for operand in ins.operands[1:]]
    return lambda active: write(compute(*(get() for get in sources)), active)


def _half(m: Machine, operand, kind: str, half: int):
    if isinstance(operand, Immediate):
        return np.uint16(operand.bits >> 16 * half & 0xFFFF)
    return (
        m.value(operand, kind).view(np.uint16)[half::2]
        if not isinstance(operand, Sink)
        else np.zeros(m.lanes, np.uint16)
    )


def _half_run(views: list, kind: str, compute: Callable) -> Run:
    def numbers(view):
        return from_bf16(view) if kind == "bf16" else view.view(np.float16)

    def run(active: np.ndarray) -> None:
        result = compute(*(numbers(v) for v in views[1:]))
        bits = to_bf16(result) if kind == "bf16" else np.asarray(result).astype(np.float16).view(np.uint16)
        store(views[0], bits, active)

    return run


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind[:2] == "bf"


# Moves


@instruction("mov")
def mov(m: Machine, ins: Instruction) -> Run:
    kind, (to, source) = ins.type, ins.operands
    if isinstance(source, Vector):  # pack
        part = f"b{8 * SIZES[kind] // len(source.parts)}"
        target = m.target(to, kind).view(DTYPES[part])
        views = [(target[i :: len(source.parts)], m.value(p, part)) for i, p in enumerate(source.parts)]
    elif isinstance(to, Vector):  # unpack
        part = f"b{8 * SIZES[kind] // len(to.parts)}"
        whole = m.value(source, kind)
        whole = np.full(m.lanes, whole) if whole.ndim == 0 else whole
        pieces = whole.view(DTYPES[part])
        views = [(m.target(p, part), pieces[i :: len(to.parts)]) for i, p in enumerate(to.parts)]
    else:
        views = [(m.target(to, kind), m.value(source, kind))]

    def run(active: np.ndarray) -> None:
        for target, view in [(target, np.copy(view)) for target, view in views]:
            store(target, view, active)

    return run


@instruction("cvta")
def cvta(m: Machine, ins: Instruction) -> Run:
    base = np.uint64(m.cvta_offset[ins.space])
    target, source = m.target(ins.operands[0], "u64"), m.value(ins.operands[1], "u64")
    if ins.has("to"):
        return lambda active: store(target, source - base, active)
    return lambda active: store(target, source + base, active)


@instruction("isspacep")
def isspacep(m: Machine, ins: Instruction) -> Run:
    base = m.cvta_offset[ins.space]
    target, source = m.target(ins.operands[0], "pred"), m.value(ins.operands[1], "u64")
    top = np.uint64(56)
    if base:
        return lambda active: store(target, source >> top == np.uint64(base >> 56), active)
    return lambda active: store(target, source >> top == 0, active)


@instruction("cvt")
def cvt(m: Machine, ins: Instruction) -> Run:
    to, source = ins.types[-2:]
    if to in HALVES:  # cvt.rn.f16x2.f32 d, high, low
        part, target = HALVES[to], m.target(ins.operands[0], to)
        views = [
            (target.view(np.uint16)[1 - i :: 2], reader(m, o, source))
            for i, o in enumerate(ins.operands[1:3])
        ]
        relu = ins.has("relu")

        def pack(active: np.ndarray) -> None:
            for half, get in [(half, np.copy(get())) for half, get in views]:
                x = np.where(get > 0, get, np.where(np.isnan(get), get, 0)) if relu else get
                bits = to_bf16(x) if part == "bf16" else x.astype(np.float16).view(np.uint16)
                store(half, bits, active)

        return pack
    ftz, saturate = ins.has("ftz"), ins.has("sat")
    get = reader(m, ins.operands[1], source, ftz)
    rounding = next(
        (x for x in ins.modifiers if x in ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")), ""
    )
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    if is_float(source) and is_float(to):
        write = writer(m, ins.operands[0], to, ftz, saturate)
        if rounding in whole:
            return lambda active: write(whole[rounding](get()), active)
        if rounding == "rz" and to == "bf16":
            target = m.target(ins.operands[0], to)
            return lambda active: store(target, to_bf16(get(), toward_zero=True), active)
        if rounding in ("rz", "rm", "rp", "rna") and SIZES[to] < SIZES[source]:
            raise PtxError(f"rounding .{rounding}")
        return lambda active: write(np.asarray(get()).astype(np.float64), active)
    if is_float(source):
        target = m.target(ins.operands[0], to)
        limits = np.iinfo(DTYPES[to])
        step = whole[rounding]

        def to_integer(active: np.ndarray) -> None:  # clamps; NaN becomes 0
            x = step(np.asarray(get(), np.float64))
            fits = (x >= limits.min) & (x < float(limits.max) + 1)
            low = np.where(x < 0, limits.min, limits.max)
            result = np.where(fits, np.where(fits, x, 0).astype(DTYPES[to]), low.astype(DTYPES[to]))
            store(target, np.where(np.isnan(x), 0, result), active)

        return to_integer
    if is_float(to):
        if rounding not in ("rn", ""):
            raise PtxError(f"rounding .{rounding}")
        write = writer(m, ins.operands[0], to)
        if to == "f32":  # numpy rounds a 64-bit integer once
            return lambda active: write(np.asarray(get()).astype(np.float32), active)
        return lambda active: write(np.asarray(get()).astype(np.float64), active)
    # Integers widen by their own sign into the whole register.
    register = ins.operands[0]
    wide = max(SIZES[to], SIZES[getattr(register, "kind", to)]) * 8
    target = m.target(register, f"{to[0]}{wide}")
    limits = np.iinfo(DTYPES[to])

    def convert(active: np.ndarray) -> None:
        x = np.asarray(get())
        if saturate:
            x = np.clip(
                x.astype(object) if x.dtype == np.uint64 else x.astype(np.int64), limits.min, limits.max
            )
        store(target, x.astype(DTYPES[to]).astype(target.dtype), active)

    return convert


# Integers and floats


@instruction("add", "sub")
def add(m: Machine, ins: Instruction) -> Run:
    kind, sign = ins.type, -1 if ins.opcode == "sub" else 1
    if ins.has("cc"):
        raise PtxError("carries are not supported")
    if kind in ("f64",) or not is_float(kind):
        numpy = np.subtract if sign < 0 else np.add
        if ins.has("sat") and kind == "s32":
            write = writer(m, ins.operands[0], kind)
            a, b = (reader(m, o, kind) for o in ins.operands[1:])
            limit = np.iinfo(np.int32)
            return lambda active: write(
                np.clip(numpy(a().astype(np.int64), b()), limit.min, limit.max), active
            )
        return lanewise(m, ins, kind, numpy)

    def total(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = np.atleast_1d(np.asarray(a, np.float64)), np.atleast_1d(np.asarray(b, np.float64))
        return odd_sum(a, sign * b)

    return lanewise(m, ins, kind, rounding(ins, total))


@instruction("mul")
def mul(m: Machine, ins: Instruction) -> Run:
    kind = ins.type
    if is_float(kind):
        product = rounding(ins, lambda a, b: np.asarray(a, np.float64) * np.asarray(b, np.float64))
        return lanewise(m, ins, kind, product)
    if ins.has("wide"):
        return _wide(m, ins, kind, lambda a, b: a * b, 2)
    if ins.has("hi"):
        if SIZES[kind] == 8:
            return lanewise(m, ins, kind, _high64)
        wide = np.int64 if kind[0] == "s" else np.uint64
        shift = wide(8 * SIZES[kind])
        return lanewise(m, ins, kind, lambda a, b: np.asarray(a, wide) * np.asarray(b, wide) >> shift)
    return lanewise(m, ins, kind, np.multiply)


def _high64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product = np.asarray(a).astype(object) * np.asarray(b).astype(object) >> 64
    return (
        np.asarray(product & (1 << 64) - 1)
        .astype(np.uint64)
        .view(np.asarray(a).dtype if np.ndim(a) else np.uint64)
    )


def _wide(m: Machine, ins: Instruction, kind: str, compute: Callable, narrow: int) -> Run:
    wide = f"{kind[0]}{16 * SIZES[kind]}"
    target = m.target(ins.operands[0], wide)
    sources = [m.value(o, kind if i < narrow else wide) for i, o in enumerate(ins.operands[1:])]
    dtype = DTYPES[wide]
    return lambda active: store(target, compute(*(np.asarray(s, dtype) for s in sources)), active)


@instruction("mad", "fma")
def mad(m: Machine, ins: Instruction) -> Run:
    kind = ins.type
    if is_float(kind):
        if kind == "f64":
            raise PtxError("fma of float64")

        def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            product = np.asarray(a, np.float64) * np.asarray(b, np.float64)  # exact
            return odd_sum(np.atleast_1d(product), np.atleast_1d(np.asarray(c, np.float64)))

        if ins.has("relu"):
            return lanewise(m, ins, kind, lambda a, b, c: np.maximum(fused(a, b, c), 0))
        return lanewise(m, ins, kind, rounding(ins, fused))
    if ins.has("cc") or ins.has("sat"):
        raise PtxError("carries and saturation are not supported")
    if ins.has("wide"):
        return _wide(m, ins, kind, lambda a, b, c: a * b + c, 2)
    if ins.has("hi"):
        raise PtxError("mad.hi is not supported")
    return lanewise(m, ins, kind, lambda a, b, c: a * b + c)


@instruction("div", "rem")
def div(m: Machine, ins: Instruction) -> Run:
    kind = ins.type
    if is_float(kind):
        return lanewise(m, ins, kind, lambda a, b: np.asarray(a, np.float64) / np.asarray(b, np.float64))

    def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # towards zero
        b = np.where(np.asarray(b) == 0, np.asarray(b).dtype.type(1), b)
        remainder = np.fmod(a, b)
        return remainder if ins.opcode == "rem" else (a - remainder) // b

    return lanewise(m, ins, kind, divide)


@instruction("min", "max")
def extreme(m: Machine, ins: Instruction) -> Run:
    kind, low = ins.type, ins.opcode == "min"
    if not is_float(kind):
        return lanewise(m, ins, kind, np.minimum if low else np.maximum)
    if ins.has("NaN"):
        return lanewise(m, ins, kind, np.minimum if low else np.maximum)
    return lanewise(m, ins, kind, np.fmin if low else np.fmax)


@instruction(
    "abs", "neg", "not", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", "popc", "clz", "brev"
)
def unary(m: Machine, ins: Instruction) -> Run:
    kind = ins.type

    def wide(compute: Callable) -> Callable:
        return lambda x: compute(np.asarray(x, np.float64))

    signed = HALVES.get(kind, kind)
    computed = {
        "abs": np.abs,
        "neg": np.negative,
        "not": np.invert,
        "sqrt": wide(np.sqrt),
        "rsqrt": wide(lambda x: 1 / np.sqrt(x)),
        "rcp": wide(lambda x: 1 / x),
        "ex2": wide(np.exp2),
        "lg2": wide(np.log2),
        "sin": wide(np.sin),
        "cos": wide(np.cos),
        "tanh": wide(np.tanh),
    }
    if ins.opcode in computed:
        if ins.opcode == "neg" and signed[0] in "ub" and signed != "bf16":
            raise PtxError("neg of an unsigned number")
        return lanewise(m, ins, kind, computed[ins.opcode])
    target, x = m.target(ins.operands[0], "u32"), m.value(ins.operands[1], f"u{8 * SIZES[kind]}")
    bits = 8 * SIZES[kind]
    if ins.opcode == "popc":
        return lambda active: store(target, np.bitwise_count(x), active)
    places = np.arange(bits, dtype=np.uint64)

    def digits() -> np.ndarray:  # [lanes, bits], lowest first
        return np.atleast_1d(x).astype(np.uint64)[:, None] >> places & np.uint64(1)

    if ins.opcode == "clz":
        return lambda active: store(target, np.where(x == 0, bits, digits()[:, ::-1].argmax(1)), active)
    whole = m.target(ins.operands[0], kind)
    return lambda active: store(whole, (digits() << places[::-1]).sum(1, dtype=np.uint64), active)


@instruction("and", "or", "xor")
def bitwise(m: Machine, ins: Instruction) -> Run:
    numpy = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.opcode]
    return lanewise(m, ins, ins.type, numpy)


@instruction("lop3")
def lop3(m: Machine, ins: Instruction) -> Run:
    table = ins.operands[4].bits
    target = m.target(ins.operands[0], "b32")
    sources = [m.value(o, "b32") for o in ins.operands[1:4]]

    def run(active: np.ndarray) -> None:
        result = np.zeros(m.lanes, np.uint32)
        for row in range(8):
            if table >> row & 1:  # row = a * 4 + b * 2 + c
                term = [s if row >> 2 - i & 1 else ~s for i, s in enumerate(sources)]
                result |= term[0] & term[1] & term[2]
        store(target, result, active)

    return run


@instruction("shl", "shr")
def shift(m: Machine, ins: Instruction) -> Run:
    kind, bits = ins.type, 8 * SIZES[ins.type]
    target, x = m.target(ins.operands[0], kind), m.value(ins.operands[1], kind)
    count = m.value(ins.operands[2], "u32")
    unit = DTYPES[kind].type
    if ins.opcode == "shr" and kind[0] == "s":
        return lambda active: store(target, x >> np.minimum(count, bits - 1).astype(unit), active)
    move = np.left_shift if ins.opcode == "shl" else np.right_shift

    def run(active: np.ndarray) -> None:  # by the width or more: nothing is left
        moved = move(x, np.minimum(count, bits - 1).astype(unit))
        store(target, np.where(count >= bits, unit(0), moved), active)

    return run


@instruction("shf")
def funnel(m: Machine, ins: Instruction) -> Run:
    target = m.target(ins.operands[0], "b32")
    low, high, count = (m.value(o, "u32") for o in ins.operands[1:4])
    left, wrap = ins.has("l"), ins.has("wrap")

    def run(active: np.ndarray) -> None:
        n = (count & 31 if wrap else np.minimum(count, 32)).astype(np.uint64)
        both = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
        store(target, (both << n) >> np.uint64(32) if left else both >> n, active)

    return run


@instruction("bfe", "bfi", "bfind", "fns", "szext", "bmsk")
def bit_field(m: Machine, ins: Instruction) -> Run:
    kind, bits = ins.type, 8 * SIZES[ins.type]
    if ins.opcode not in ("bfe", "bfi"):
        raise PtxError("unknown instruction")
    target = m.target(ins.operands[0], kind)
    *values, start, length = ins.operands[1:]
    values = [m.value(o, kind) for o in values]
    start, length = m.value(start, "u32"), m.value(length, "u32")

    def run(active: np.ndarray) -> None:
        first = np.asarray(start & 0xFF).astype(object)
        count = np.asarray(length & 0xFF).astype(object)
        mask = (1 << np.minimum(count, bits)) - 1
        a = np.asarray(values[0]).astype(object)
        if ins.opcode == "bfi":
            b = np.asarray(values[1]).astype(object)
            result = b & ~(mask << first) | (a & mask) << first
        elif kind[0] == "s":  # beyond the top the sign goes on
            result = a >> first & mask
            sign = a >> np.minimum(np.maximum(first + count - 1, 0), bits - 1) & 1
            result = np.where((count > 0) & (sign == 1).astype(bool), result | ~mask, result)
        else:
            result = a >> first & mask
        wrapped = np.asarray(result & (1 << bits) - 1).astype(np.uint64)
        store(target, wrapped.astype(f"u{bits // 8}").view(target.dtype), active)

    return run


@instruction("prmt")
def prmt(m: Machine, ins: Instruction) -> Run:
    modes = [x for x in ins.modifiers if x in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")]
    if modes:
        raise PtxError(f"prmt.{modes[0]} is not supported")
    target = m.target(ins.operands[0], "b32")
    a, b, selector = (m.value(o, "b32") for o in ins.operands[1:4])

    def run(active: np.ndarray) -> None:
        both = np.stack([np.broadcast_to(v, m.lanes) for v in (a, b)], 1)
        source = np.ascontiguousarray(both).view(np.uint8)  # [lanes, 8]
        pick = np.broadcast_to(selector, m.lanes)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
        value = np.take_along_axis(source, (pick & 7).astype(np.int64), 1)
        sign = np.where(value & 128, 255, 0)  # bit 3 of the selector copies the sign of the byte
        result = np.where(pick & 8, sign, value).astype(np.uint8)
        store(target, np.ascontiguousarray(result).view(np.uint32)[:, 0], active)

    return run


@instruction("dp4a")
def dp4a(m: Machine, ins: Instruction) -> Run:
    first, second = ins.types[-2:]
    kind = "s32" if "s32" in (first, second) else "u32"
    target = m.target(ins.operands[0], kind)
    a, b, c = (m.value(o, k) for o, k in zip(ins.operands[1:4], (first, second, kind), strict=True))

    def run(active: np.ndarray) -> None:
        total = np.asarray(c).astype(np.int64)
        for i in range(4):
            total = total + _byte(a, i) * _byte(b, i)
        store(target, total, active)

    return run


def _byte(x: np.ndarray, i: int) -> np.ndarray:
    narrow = np.int8 if x.dtype == np.int32 else np.uint8
    return (x >> x.dtype.type(8 * i)).astype(narrow).astype(np.int64)


# Comparisons and choices

ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@instruction("setp")
def setp(m: Machine, ins: Instruction) -> Run:
    kind, name = ins.type, ins.modifiers[0]
    name = UNSIGNED.get(name, name)
    join = next((x for x in ins.modifiers[1:] if x in ("and", "or", "xor")), None)
    a, b = (reader(m, o, kind, ins.has("ftz")) for o in ins.operands[1:3])
    floats = is_float(kind)

    def compare() -> np.ndarray:
        x, y = a(), b()
        if name == "num":
            return ~(np.isnan(x) | np.isnan(y))
        if name == "nan":
            return np.isnan(x) | np.isnan(y)
        if floats and len(name) == 3:  # ltu: or unordered
            return ORDERED[name[:2]](x, y) | np.isnan(x) | np.isnan(y)
        result = ORDERED[name](x, y)
        return result & ~(np.isnan(x) | np.isnan(y)) if floats and name == "ne" else result

    first, second = ins.operands[0], None
    if isinstance(first, Pair):
        first, second = first.first, first.second
    targets = [(m.target(first, "pred"), False)] + ([(m.target(second, "pred"), True)] if second else [])
    other = predicate(m, ins.operands[3]) if join else None
    logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, None: lambda x, _: x}[join]

    def run(active: np.ndarray) -> None:
        result, joined = compare(), other() if other else None
        for target, inverse in targets:
            store(target, logic(~result if inverse else result, joined), active)

    return run


def predicate(m: Machine, operand) -> Getter:
    if isinstance(operand, Not):
        row = m.value(operand.operand, "pred")
        return lambda: ~row
    row = m.value(operand, "pred")
    return lambda: row


@instruction("selp")
def selp(m: Machine, ins: Instruction) -> Run:
    kind = ins.type
    target, a, b = m.target(ins.operands[0], kind), *(m.value(o, kind) for o in ins.operands[1:3])
    choose = predicate(m, ins.operands[3])
    return lambda active: store(target, np.where(choose(), a, b), active)


@instruction("slct")
def slct(m: Machine, ins: Instruction) -> Run:
    kind, test = ins.types[-2:]
    target, a, b = m.target(ins.operands[0], kind), *(m.value(o, kind) for o in ins.operands[1:3])
    x = m.value(ins.operands[3], test)
    return lambda active: store(target, np.where(x >= 0, a, b), active)


@instruction("copysign")
def copysign(m: Machine, ins: Instruction) -> Run:
    return lanewise(m, ins, ins.type, lambda sign, magnitude: np.copysign(magnitude, sign))


@instruction("testp")
def testp(m: Machine, ins: Instruction) -> Run:
    test = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan}[ins.modifiers[0]]
    target, x = m.target(ins.operands[0], "pred"), m.value(ins.operands[1], ins.type)
    return lambda active: store(target, test(x), active)
