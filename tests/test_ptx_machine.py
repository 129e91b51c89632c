"""The PTX interpreter itself (tests/ptx): instructions, fragments, mistakes it must find, figures it must give. Needs no nvcc."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import Cost, GlobalMemory, Module, PtxError, launch, pack_params
from ptx.cost import natural_loops
from ptx.memory import bank_waves, sectors
from ptx.tensor import a_places, b_places, c_places, metadata_places
from torch.sparse import _semi_structured_conversions as cutlass

GEMM = (Path(__file__).parent / "ptx" / "gemm.ptx").read_text()

REGISTERS = """
    .reg .pred %p<20>;
    .reg .b16 %h<20>;
    .reg .b32 %r<60>;
    .reg .f32 %f<40>;
    .reg .b64 %rd<40>;
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd10, %r0, 4;
"""


def kernel(body, params=2, shared=0):
    """A kernel of pointers p0, p1, ... in %rd0, %rd1, ...; %r0 is the thread and %rd10 four times it."""
    names = ", ".join(f".param .u64 p{i}" for i in range(params))
    loads = "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(params))
    room = f".shared .align 16 .b8 room[{shared}];\n" if shared else ""
    head = ".version 9.0\n.target sm_80\n.address_size 64\n"
    return Module(f"{head}{room}.visible .entry k({names})\n{{{REGISTERS}{loads}{body}\nret;\n}}\n").kernel(
        "k"
    )


def run(body, *arrays, threads=32, grid=1, shared=0, out=np.uint32, count=None, seed=0):
    """What a kernel stores to its last pointer, an array of one element a thread or of `count`; inputs come before it."""
    made = kernel(body, len(arrays) + 1, shared)
    memory = GlobalMemory(1 << 20)
    inputs = [memory.put(np.asarray(a), f"input {i}") for i, a in enumerate(arrays)]
    y = memory.empty(threads * grid if count is None else count, out, "y")
    cost = launch(made, (grid,), (threads,), pack_params(made, *inputs, y), memory, seed=seed)
    return y, cost, memory


def mistake(body, *arrays, **options):
    """The error that a kernel provokes."""
    with pytest.raises(PtxError) as caught:
        run(body, *arrays, **options)
    return str(caught.value)


# ---- instructions ----


def lanes(operation, *arrays, out=np.uint32):
    """One instruction on one element of each array a thread; the text names %x, %y, %z and the result %d."""
    kinds = {"f": ("%f", "f32"), "u": ("%r", "u32"), "i": ("%r", "u32")}
    loads, text = "", operation
    for i, (name, array) in enumerate(zip(("%x", "%y", "%z"), arrays, strict=False)):
        prefix, kind = kinds[array.dtype.kind]
        register = f"{prefix}{10 + i}"
        loads += f"add.u64 %rd{20 + i}, %rd{i}, %rd10;\nld.global.{kind} {register}, [%rd{20 + i}];\n"
        text = text.replace(name, register)
    result = "%f1" if np.dtype(out).kind == "f" else "%r1"
    kind = "f32" if np.dtype(out).kind == "f" else "b32"
    text = text.replace("%d", result)
    body = f"{loads}{text}\nadd.u64 %rd30, %rd{len(arrays)}, %rd10;\nst.global.{kind} [%rd30], {result};"
    return run(body, *arrays, threads=len(arrays[0]), out=out)[0]


random = np.random.default_rng(0)
WORDS = random.integers(0, 1 << 32, (3, 256), np.uint64).astype(np.uint32)
SMALL = random.integers(0, 40, 256).astype(np.uint32)
SIGNED = [row.view(np.int32).tolist() for row in WORDS]
UNSIGNED = [row.tolist() for row in WORDS]


def bit_field(a, start, length, signed):
    """bfe by its definition in the manual, bit by bit."""
    sign = 0
    if signed and length:
        sign = a >> min(start + length - 1, 31) & 1
    return sum((a >> i + start & 1 if i < length and i + start < 32 else sign) << i for i in range(32))


INTEGER_CASES = {
    "mad.lo.s32 %d, %x, %y, %z;": lambda i: SIGNED[0][i] * SIGNED[1][i] + SIGNED[2][i],
    "mul.hi.s32 %d, %x, %y;": lambda i: SIGNED[0][i] * SIGNED[1][i] >> 32,
    "mul.hi.u32 %d, %x, %y;": lambda i: UNSIGNED[0][i] * UNSIGNED[1][i] >> 32,
    "div.s32 %d, %x, %y;": lambda i: int(Fraction(SIGNED[0][i], SIGNED[1][i])),
    "rem.s32 %d, %x, %y;": lambda i: SIGNED[0][i] - SIGNED[1][i] * int(Fraction(SIGNED[0][i], SIGNED[1][i])),
    "min.s32 %d, %x, %y;": lambda i: min(SIGNED[0][i], SIGNED[1][i]),
    "max.u32 %d, %x, %y;": lambda i: max(UNSIGNED[0][i], UNSIGNED[1][i]),
    "shl.b32 %d, %x, 7;": lambda i: UNSIGNED[0][i] << 7,
    "shr.s32 %d, %x, 35;": lambda i: SIGNED[0][i] >> 31,
    "shr.u32 %d, %x, 32;": lambda i: 0,
    "shf.l.wrap.b32 %d, %x, %y, 5;": lambda i: (UNSIGNED[1][i] << 32 | UNSIGNED[0][i]) << 5 >> 32,
    "shf.r.clamp.b32 %d, %x, %y, 40;": lambda i: UNSIGNED[1][i],
    "lop3.b32 %d, %x, %y, %z, 0xCA;": lambda i: (
        UNSIGNED[0][i] & UNSIGNED[1][i] | ~UNSIGNED[0][i] & UNSIGNED[2][i]
    ),
    "lop3.b32 %d, %x, %y, %z, 0x96;": lambda i: UNSIGNED[0][i] ^ UNSIGNED[1][i] ^ UNSIGNED[2][i],
    "bfe.u32 %d, %x, 5, 9;": lambda i: bit_field(UNSIGNED[0][i], 5, 9, False),
    "bfe.s32 %d, %x, 5, 9;": lambda i: bit_field(UNSIGNED[0][i], 5, 9, True),
    "bfe.s32 %d, %x, 28, 9;": lambda i: bit_field(UNSIGNED[0][i], 28, 9, True),
    "bfi.b32 %d, %x, %y, 3, 10;": lambda i: UNSIGNED[1][i] & ~(1023 << 3) | (UNSIGNED[0][i] & 1023) << 3,
    "popc.b32 %d, %x;": lambda i: UNSIGNED[0][i].bit_count(),
    "clz.b32 %d, %x;": lambda i: 32 - UNSIGNED[0][i].bit_length(),
    "brev.b32 %d, %x;": lambda i: int(f"{UNSIGNED[0][i]:032b}"[::-1], 2),
    "dp4a.s32.u32 %d, %x, %y, %z;": lambda i: (
        SIGNED[2][i]
        + sum(
            int(WORDS[0].view(np.int8)[4 * i + j]) * int(WORDS[1].view(np.uint8)[4 * i + j]) for j in range(4)
        )
    ),
    "prmt.b32 %d, %x, %y, 0x7410;": lambda i: int.from_bytes(
        bytes((UNSIGNED[1][i] << 32 | UNSIGNED[0][i]) >> 8 * j & 255 for j in (0, 1, 4, 7)), "little"
    ),
    "prmt.b32 %d, %x, %y, 0x888B;": lambda i: sum(
        (255 if UNSIGNED[0][i] >> 8 * (j & 7) + 7 & 1 else 0) << 8 * k for k, j in enumerate((0xB, 8, 8, 8))
    ),
    "{ .reg .b64 wide; mul.wide.s32 wide, %x, %y; { .reg .b32 wide2; mov.b64 {%d, wide2}, wide; mov.u32 %d, wide2; } }": (
        lambda i: SIGNED[0][i] * SIGNED[1][i] >> 32
    ),
    "{ .reg .b16 low, high; mov.b32 {low, high}, %x; mov.b32 %d, {high, low}; }": lambda i: (
        UNSIGNED[0][i] << 16 | UNSIGNED[0][i] >> 16
    ),
    "cvt.sat.u8.s32 %d, %x;": lambda i: min(max(SIGNED[0][i], 0), 255),
    "cvt.s32.s8 %d, %x;": lambda i: int(WORDS[0].view(np.int8)[4 * i]),
    "setp.lo.u32 %p1, %x, %y; selp.b32 %d, 1, 2, %p1;": lambda i: 1 if UNSIGNED[0][i] < UNSIGNED[1][i] else 2,
    "setp.lt.s32 %p1|%p2, %x, %y; setp.gt.and.s32 %p3, %z, 0, !%p2; selp.b32 %d, 1, 2, %p3;": lambda i: (
        1 if SIGNED[2][i] > 0 and SIGNED[0][i] < SIGNED[1][i] else 2
    ),
}


@pytest.mark.parametrize("operation", INTEGER_CASES)
def test_integers(operation):
    names = [n for n in ("%x", "%y", "%z") if n in operation]
    got = lanes(operation, *WORDS[: len(names)])
    assert [int(g) for g in got] == [INTEGER_CASES[operation](i) % 2**32 for i in range(256)]


def nearest(exact, dtype=np.float32):
    """Whether each of (number, exact Fraction) is the nearest that the type has, ties to even."""
    for got, wanted in exact:
        neighbours = np.nextafter(got, dtype(-np.inf)), np.nextafter(got, dtype(np.inf))
        error = abs(Fraction(float(got)) - wanted)
        for other in neighbours:
            away = abs(Fraction(float(other)) - wanted)
            even = int(got.view({4: np.int32, 2: np.int16}[got.itemsize])) % 2 == 0
            if away < error or (away == error and not even):
                return False
    return True


# Cancelling, tiny and widely different operands are where rounding twice shows.
FLOATS = [
    (random.normal(size=4096) * 2.0 ** random.integers(-30, 30, 4096)).astype(np.float32) for _ in range(2)
]
FLOATS.append(np.where(random.random(4096) < 0.5, -(FLOATS[0] * FLOATS[1]), FLOATS[0]).astype(np.float32))


@pytest.mark.parametrize(
    "operation", ["fma.rn.f32 %d, %x, %y, %z;", "add.f32 %d, %x, %z;", "mul.f32 %d, %x, %y;"]
)
def test_floats_round_once(operation):
    exact = {
        "fma": lambda a, b, c: a * b + c,
        "add": lambda a, _, c: a + c,
        "mul": lambda a, b, _: a * b,
    }[operation[:3]]
    for i in range(0, 4096, 1024):
        part = [f[i : i + 1024] for f in FLOATS]
        got = (
            lanes(operation, *part, out=np.float32)
            if "%z" in operation
            else lanes(operation, *part[:2], out=np.float32)
        )
        wanted = [exact(*(Fraction(float(v)) for v in values)) for values in zip(*part, strict=True)]
        assert nearest(list(zip(got, wanted, strict=True)))


def test_rounding_that_double_precision_gets_wrong():
    # a * b + c lies half way between two floats but for 2^-60: a sum rounded to double first goes the wrong way.
    a, b, c = (np.array([v], np.float32) for v in (1 + 2**-12, 1 + 2**-12, 2**-60))
    exact = Fraction(float(a[0])) ** 2 + Fraction(2) ** -60
    assert nearest([(lanes("fma.rn.f32 %d, %x, %y, %z;", a, b, c, out=np.float32)[0], exact)])
    assert lanes("fma.rm.f32 %d, %x, %y, %z;", a, b, -c, out=np.float32)[0] <= exact


def test_bfloat16_and_half():
    x = np.concatenate([FLOATS[0], np.array([0, -0.0, np.inf, -np.inf, 3.39e38, 1e-40], np.float32)])[-1000:]
    got = lanes("{ .reg .b16 h; cvt.rn.bf16.f32 h, %x; mov.b32 %d, {h, h}; }", x)
    assert np.array_equal(
        got & 0xFFFF, torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    )
    got = lanes("{ .reg .b16 h; cvt.rn.f16.f32 h, %x; cvt.f32.f16 %d, h; }", x, out=np.float32)
    assert np.array_equal(got, torch.from_numpy(x).half().float().numpy())
    a, b = random.normal(size=(2, 256)).astype(np.float16)
    c = np.where(random.random(256) < 0.5, -(a * b), random.normal(size=256) / 1000).astype(np.float16)
    pairs = [np.stack([v, v[::-1]], 1).reshape(-1).view(np.uint32) for v in (a, b, c)]
    got = lanes("fma.rn.f16x2 %d, %x, %y, %z;", *pairs).view(np.float16)[0::2]
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert nearest(list(zip(got, exact, strict=True)), np.float16)


def words(*values):
    return np.array(values, np.float32).view(np.uint32)


@pytest.mark.parametrize(
    ("operation", "values", "wanted"),
    [
        ("cvt.rni.s32.f32 %d, %x;", [0.5, 1.5, -2.5, 3e9, -3e9, np.nan], [0, 2, -2, 2**31 - 1, -(2**31), 0]),
        ("cvt.rzi.u32.f32 %d, %x;", [1.9, -1.0, 5e9], [1, 0, 2**32 - 1]),
        ("{ .reg .f32 t; cvt.rni.f32.f32 t, %x; mov.b32 %d, t; }", [2.5, -0.4], words(2, -0.0)),
        ("{ .reg .f32 t; max.f32 t, %x, 0f00000000; mov.b32 %d, t; }", [-1, np.nan, 2], words(0, 0, 2)),
        ("{ .reg .f32 t; ex2.approx.ftz.f32 t, %x; mov.b32 %d, t; }", [3, -200], words(8, 0)),
        ("setp.ltu.f32 %p1, %x, 0f00000000; selp.b32 %d, 1, 0, %p1;", [-1, 1, np.nan], [1, 0, 1]),
        ("setp.lt.f32 %p1, %x, 0f00000000; selp.b32 %d, 1, 0, %p1;", [-1, 1, np.nan], [1, 0, 0]),
    ],
)
def test_conversions(operation, values, wanted):
    assert [int(g) for g in lanes(operation, np.array(values, np.float32))] == [
        int(w) % 2**32 for w in wanted
    ]


def test_branches_come_together_again():
    body = """
        mov.u32 %r1, 0;
        mov.u32 %r2, 0;
    LOOP:
        setp.gt.u32 %p1, %r2, %r0;
        @%p1 bra DONE;
        add.u32 %r1, %r1, %r2;
        add.u32 %r2, %r2, 1;
        bra LOOP;
    DONE:
        and.b32 %r3, %r0, 1;
        setp.eq.u32 %p2, %r3, 0;
        @%p2 bra EVEN;
        add.u32 %r1, %r1, 1000;
    EVEN:
        add.u64 %rd11, %rd0, %rd10;
        st.global.u32 [%rd11], %r1;
    """
    got, cost, _ = run(body, threads=64)
    assert [int(g) for g in got] == [t * (t + 1) // 2 + (1000 if t % 2 else 0) for t in range(64)]
    code = cost.kernel.code
    stores = [i for i, ins in enumerate(code) if ins.opcode == "st"]
    assert [int(cost.issued[i]) for i in stores] == [2], "the lanes of a warp store together"
    (loop,) = natural_loops(cost.kernel)
    assert {code[i].opcode for i in loop} == {"setp", "bra", "add"}
    assert len(loop) == 5


def test_shuffles_and_votes():
    def shuffle(operation):
        body = f"mov.u32 %r5, %r0; {operation} add.u64 %rd11, %rd0, %rd10; st.global.u32 [%rd11], %r1;"
        return [int(v) for v in run(body)[0]]

    lane = range(32)
    assert shuffle("shfl.sync.bfly.b32 %r1, %r5, 5, 31, -1;") == [i ^ 5 for i in lane]
    assert shuffle("shfl.sync.idx.b32 %r1, %r5, 3, 0x181f, -1;") == [i // 8 * 8 + 3 for i in lane]
    assert shuffle("shfl.sync.up.b32 %r1, %r5, 2, 0, -1;") == [max(i - 2, i if i < 2 else 0) for i in lane]
    assert shuffle("shfl.sync.down.b32 %r1|%p1, %r5, 4, 31, -1;") == [i + 4 if i < 28 else i for i in lane]
    vote = "and.b32 %r2, %r0, 3; setp.eq.u32 %p1, %r2, 0; vote.sync.ballot.b32 %r1, %p1, -1;"
    assert shuffle(vote) == [0x11111111] * 32
    assert shuffle("redux.sync.add.s32 %r1, %r5, -1;") == [496] * 32
    half = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"
    assert "32 members are named, 16 are here" in mistake(half)


def test_parameters_and_arrays():
    text = """
    .version 9.0
    .target sm_80
    .address_size 64
    .const .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 0, 0, 0};
    .visible .entry k(.param .u64 y, .param .align 8 .b8 s[16], .param .u32 n)
    {
        .local .align 16 .b8 depot[16];
        .reg .b32 %r<9>; .reg .b64 %rd<19>;
        ld.param.u64 %rd1, [y];
        cvta.to.global.u64 %rd1, %rd1;
        mov.b64 %rd2, s;
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd3, %r1, 4;
        add.u64 %rd4, %rd2, %rd3;
        ld.param.u32 %r2, [%rd4+8];
        mov.u64 %rd5, depot;
        add.u64 %rd6, %rd5, %rd3;
        st.local.u32 [%rd6], %r2;
        cvta.local.u64 %rd7, %rd6;
        ld.u32 %r3, [%rd7];
        mov.u64 %rd8, table;
        add.u64 %rd8, %rd8, %rd3;
        ld.const.u32 %r4, [%rd8];
        ld.param.u32 %r5, [n];
        mad.lo.u32 %r6, %r3, %r5, %r4;
        add.u64 %rd9, %rd1, %rd3;
        st.global.u32 [%rd9], %r6;
        ret;
    }
    """
    made, memory = Module(text).kernel(), GlobalMemory(1 << 16)
    assert made.params == {"y": (0, 8), "s": (8, 16), "n": (24, 4)}
    y = memory.empty(2, np.uint32, "y")
    launch(made, (1,), (2,), pack_params(made, y, np.arange(4, dtype=np.uint32).tobytes(), 10), memory)
    assert y.tolist() == [21, 32]
    with pytest.raises(PtxError, match="misaligned or out of bounds: 4 bytes of 28"):
        launch(made, (1,), (20,), pack_params(made, y, bytes(16), 10), memory)


def test_atomics():
    body = "mov.u32 %r1, 3; atom.global.add.u32 %r2, [%rd0], %r1; add.u64 %rd11, %rd1, %rd10; st.global.u32 [%rd11], %r2;"
    made, memory = kernel(body), GlobalMemory(1 << 20)
    total, y = memory.put(np.zeros(1, np.uint32), "total", read_only=False), memory.empty(64, np.uint32, "y")
    launch(made, (1,), (64,), pack_params(made, total, y), memory)
    assert total[0] == 192
    assert sorted(y.tolist()) == [3 * i for i in range(64)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.u32 %r1, %r2;", r"line \d+: `frobnicate.u32 %r1, %r2`: unknown instruction"),
        ("add.u32 %r1, %q2, 1;", "unknown name '%q2'"),
        ("tex.2d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%rd0];", "tex"),
        ("mma.sync.aligned.m8n8k4.row.col.f16.f16.f16.f16 {%r1}, {%r2}, {%r3}, {%r4};", "mma"),
        ("add.cc.u32 %r1, %r2, 1;", "carries"),
        ("ld.global.u32 %h1, [%rd0];", "%h1 is b16, too narrow"),
    ],
)
def test_what_it_cannot_read_is_named(body, message):
    assert re.search(message, mistake(body))


# ---- tensor cores ----


def fragment_elements(name, shape):
    """(row, column) of element i of a lane, as the manual's formulas for `shape` give them; [lanes, elements]."""
    lane = np.arange(32)[:, None]
    group, place = lane >> 2, lane % 4
    if shape == "m16n8k32 s8":
        i = np.arange({"a": 16, "b": 8, "c": 4}[name])
        if name == "a":
            row = np.where((i < 4) | ((i >= 8) & (i < 12)), group, group + 8)
            return row, place * 4 + (i & 3) + np.where(i < 8, 0, 16)
        if name == "b":
            return place * 4 + (i & 3) + np.where(i < 4, 0, 16), group + 0 * i
    else:  # m16n8k16 f16
        i = np.arange({"a": 8, "b": 4, "c": 4}[name])
        if name == "a":
            row = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
            return row, place * 2 + (i & 1) + np.where(i < 4, 0, 8)
        if name == "b":
            return place * 2 + (i & 1) + np.where(i < 2, 0, 8), group + 0 * i
    return np.where(i < 2, group, group + 8) + 0 * place, place * 2 + (i & 1)


@pytest.mark.parametrize(("shape", "columns", "each"), [("m16n8k32 s8", 32, 4), ("m16n8k16 f16", 16, 2)])
def test_fragments_are_those_of_the_manual(shape, columns, each):
    for name, (row, column) in {
        "a": a_places(columns, each),
        "b": b_places(columns, each),
        "c": c_places(),
    }.items():
        manual_row, manual_column = fragment_elements(name, shape)
        assert np.array_equal(row.reshape(32, -1), manual_row)
        assert np.array_equal(column.reshape(32, -1), manual_column)


def mma(text, a, b, c, metadata=None, out=np.int32):
    """Run one mma on fragments of words: a [32, 4], b [32, 2 or 4], c [32, 4]."""
    words = [a, b, c] + ([metadata] if metadata is not None else [])
    words = [np.ascontiguousarray(w).view(np.uint32) for w in words]
    body, names = "mul.wide.u32 %rd11, %r0, 4;\n", []
    register = 10
    for i, array in enumerate(words):
        n = array.shape[1]
        body += f"mul.lo.u64 %rd12, %rd11, {n}; add.u64 %rd13, %rd{i}, %rd12;\n"
        names.append([f"%r{register + j}" for j in range(n)])
        body += "".join(f"ld.global.u32 {name}, [%rd13+{4 * j}];\n" for j, name in enumerate(names[-1]))
        register += n
    vectors = ["{" + ", ".join(group) + "}" for group in names]
    tail = f", {names[3][0]}, {text.split()[1]}" if metadata is not None else ""
    body += f"{text.split()[0]} {vectors[2]}, {vectors[0]}, {vectors[1]}, {vectors[2]}{tail};\n"
    body += f"mul.lo.u64 %rd12, %rd11, 4; add.u64 %rd13, %rd{len(words)}, %rd12;\nst.global.v4.u32 [%rd13], {vectors[2]};"
    return run(body, *words, out=out, count=128)[0].reshape(32, 4)


def place_c(d):
    row, column = c_places()
    whole = np.zeros((16, 8), d.dtype)
    whole[row, column] = d
    return whole


@pytest.mark.parametrize("kind", ["s8", "f16", "bf16"])
def test_mma(kind):
    k = 32 if kind == "s8" else 16
    shape = "m16n8k32 s8" if kind == "s8" else "m16n8k16 f16"
    if kind == "s8":
        a, b = random.integers(-128, 128, (16, k)), random.integers(0, 256, (k, 8))
        store_a, store_b = a.astype(np.int8), b.astype(np.uint8)
        c = random.integers(-(2**20), 2**20, (16, 8)).astype(np.int32)
        text = "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32"
    else:
        a, b = random.integers(-20, 20, (16, k)), random.integers(-20, 20, (k, 8))
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
        store_a, store_b = (torch.from_numpy(v).to(dtype).view(torch.int16).numpy() for v in (a, b))
        c = random.integers(-99, 99, (16, 8)).astype(np.float32)
        text = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    fragments = [
        np.ascontiguousarray(m[fragment_elements(n, shape)])
        for n, m in (("a", store_a), ("b", store_b), ("c", c))
    ]
    d = mma(text, *fragments, out=c.dtype)
    assert np.array_equal(place_c(d), (a @ b + c).astype(c.dtype))
    # a signed operand read as unsigned, or the other way round, is another result
    if kind == "s8":
        d = mma(text.replace("s8.u8", "s8.s8"), *fragments)
        assert np.array_equal(place_c(d), a @ b.astype(np.uint8).view(np.int8).astype(int) + c)


@pytest.mark.parametrize(("kind", "selector"), [("s8", 0), ("f16", 0), ("f16", 1), ("bf16", 0)])
def test_sparse_mma_against_the_packing_of_cutlass(kind, selector):
    """PyTorch holds CUTLASS's order of the metadata, in which word l goes to lane l: a source of its own for the layout."""
    rows, k = (
        (16, 64) if kind == "s8" else (32, 32)
    )  # with 16 bits, one word serves two selectors: rows 0-15 and 16-31
    dense = random.integers(1, 20, (rows, k)) * random.choice([-1, 1], (rows, k))
    keep = random.random((rows, k // 4, 4)).argsort(-1) < 2
    dense = dense * keep.reshape(rows, k)
    dtype = {"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    compressed, metadata = cutlass.sparse_semi_structured_from_dense_cutlass(
        torch.from_numpy(dense).to(dtype)
    )
    words = metadata.contiguous().view(-1).numpy().view(np.uint32).reshape(32, 1)
    compressed = (compressed if kind == "s8" else compressed.view(torch.int16)).numpy()
    compressed = compressed[16 * selector : 16 * selector + 16]
    dense = dense[16 * selector : 16 * selector + 16]
    each = 4 if kind == "s8" else 2
    a = np.ascontiguousarray(compressed[a_places(k // 2, each)].reshape(32, -1))
    b = random.integers(0, 256, (k, 8)) if kind == "s8" else random.integers(-20, 20, (k, 8))
    stored = b.astype(np.uint8) if kind == "s8" else torch.from_numpy(b).to(dtype).view(torch.int16).numpy()
    fragment = np.ascontiguousarray(stored[b_places(k, each)].reshape(32, -1))
    c = np.zeros((32, 4), np.int32 if kind == "s8" else np.float32)
    types = "s32.s8.u8.s32" if kind == "s8" else f"f32.{kind}.{kind}.f32"
    shape = "m16n8k64" if kind == "s8" else "m16n8k32"
    text = f"mma.sp::ordered_metadata.sync.aligned.{shape}.row.col.{types} {selector}"
    d = mma(text, a, fragment, c, words, out=c.dtype)
    assert np.array_equal(place_c(d), (dense @ b).astype(c.dtype))
    assert metadata_places(kind, selector).shape == (16, k // 4, 2)
    with pytest.raises(PtxError, match="metadata names one column twice"):
        mma(text, a, fragment, c, np.zeros_like(words), out=c.dtype)


def test_ldmatrix():
    body = """
        mul.wide.u32 %rd11, %r0, 16;
        add.u64 %rd12, %rd0, %rd11;
        ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd12];
        mov.u32 %r1, room;
        mad.lo.u32 %r2, %r0, 16, %r1;
        st.shared.v4.u32 [%r2], {%r10, %r11, %r12, %r13};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r2];
        ldmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 {%r24, %r25}, [%r2];
        mul.wide.u32 %rd13, %r0, 24;
        add.u64 %rd14, %rd1, %rd13;
        st.global.v2.u32 [%rd14], {%r20, %r21};
        st.global.v2.u32 [%rd14+8], {%r22, %r23};
        st.global.v2.u32 [%rd14+16], {%r24, %r25};
    """
    x = random.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    got = run(body, x, shared=512, count=192)[0].reshape(32, 6).view(np.uint16).reshape(32, 6, 2)
    lane = np.arange(32)
    for i in range(4):
        for j in range(2):
            assert np.array_equal(got[:, i, j], x[i, lane // 4, lane % 4 * 2 + j])
            if i < 2:
                assert np.array_equal(got[:, 4 + i, j], x[i, lane % 4 * 2 + j, lane // 4])


# ---- mistakes ----

STORE = "add.u64 %rd11, %rd0, %rd10; st.global.u32 [%rd11], %r0;"
SHARED = "mov.u32 %r1, room; mad.lo.u32 %r2, %r0, 4, %r1;"  # %r2: four bytes for each thread

WRITE, READ, WRITE_AGAIN = (
    "st.shared.u32 [%r2], %r0;",
    "ld.shared.u32 %r3, [%r4];",
    "st.shared.u32 [%r2], %r3;",
)
NEXT_WARP, NEXT_LANE = "xor.b32 %r4, %r2, 128;", "xor.b32 %r4, %r2, 4;"
BLOCK, WARP = "bar.sync 0;", "bar.warp.sync -1;"

MISTAKES = {
    "beyond the end": (
        STORE.replace("[%rd11]", "[%rd11+4]"),
        {},
        "out of bounds: 4 bytes written at byte 128 of y",
    ),
    "before the start": (STORE.replace("[%rd11]", "[%rd11+-4]"), {}, "out of bounds"),
    "misaligned": (STORE.replace("[%rd11]", "[%rd11+2]"), {}, "misaligned: 4 bytes written"),
    "never written": ("ld.global.u32 %r1, [%rd0];", {}, "reads memory never written: byte 0 of y"),
    "shared never written": (
        SHARED + "ld.shared.u32 %r3, [%r2];",
        {"shared": 128},
        "shared memory never written at offset 0",
    ),
    "beyond shared memory": (
        SHARED + "st.shared.u32 [%r2+4], %r0;",
        {"shared": 128},
        "4 bytes at offset 128 of 128 shared bytes",
    ),
    "no barrier": (
        SHARED + WRITE + NEXT_WARP + READ,
        {"shared": 256, "threads": 64},
        "a race: thread 0 of block 0 meets what thread 32 of block 0 has written (no barrier in between)",
    ),
    "no barrier in a warp": (
        SHARED + WRITE + NEXT_LANE + READ,
        {"shared": 128},
        "a race: thread 0 of block 0 meets what thread 1",
    ),
    "a warp's barrier for two warps": (
        SHARED + WRITE + WARP + NEXT_WARP + READ,
        {"shared": 256, "threads": 64},
        "a race",
    ),
    "written over what is still read": (
        SHARED + WRITE + BLOCK + NEXT_WARP + READ + WRITE_AGAIN,
        {"shared": 256, "threads": 64},
        "a race: thread 0 of block 0 meets what thread 32 of block 0 has read",
    ),
    "two write one byte": (
        "st.global.u8 [%rd0], %r0;",
        {},
        "a race: thread 0 of block 0 meets what thread 31 of block 0",
    ),
    "two blocks write one byte": (STORE, {"grid": 2, "count": 64}, "other blocks, in one launch"),
    "a barrier for some": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra L; bar.sync 0; L:" + STORE,
        {"threads": 64},
        "a barrier that some threads of the block never reach",
    ),
    "a barrier in a branch": (
        "setp.lt.u32 %p1, %r0, 16; @%p1 bra L; bar.sync 0; L:" + STORE,
        {},
        "a divergent barrier: 16 of",
    ),
    "mma by half a warp": (
        "setp.lt.u32 %p1, %r0, 16; @%p1 mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, "
        "{%r9,%r10}, {%r1,%r2,%r3,%r4};",
        {},
        "mma by a part of a warp: 16 of",
    ),
    "an endless loop": ("L: bra L;", {}, "does not come to an end"),
    "trap": ("trap;", {}, "gives up"),
    "an endless parameter": ("ld.param.u64 %rd1, [p0+8];", {}, "of .param"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name):
    body, options, message = MISTAKES[name]
    assert message in mistake(body, **options)


RIGHT = {
    "barriers between": [WRITE, BLOCK, NEXT_WARP, READ, BLOCK, WRITE_AGAIN],
    "a warp's barriers": [WRITE, WARP, NEXT_LANE, READ, WARP, WRITE_AGAIN],
    "all store one value": ["mov.u32 %r3, 7; st.shared.u32 [room], %r3;"],
    "all read one word": [WRITE, BLOCK, "ld.shared.u32 %r3, [room];", BLOCK, WRITE_AGAIN],
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_are_not_blamed(name):
    place = "mov.u32 %r9, %ctaid.x; mad.lo.u32 %r9, %r9, 64, %r0; mul.wide.u32 %rd11, %r9, 4; add.u64 %rd11, %rd0, %rd11;"
    run(SHARED + "".join(RIGHT[name]) + place + "st.global.u32 [%rd11], %r0;", threads=64, grid=5, shared=256)


def test_all_read_then_one_writes():
    # everyone reads what thread 0 wrote before the barrier; its writing again races with them, in its own warp and beyond
    body = (
        SHARED
        + WRITE
        + BLOCK
        + "ld.shared.u32 %r3, [room]; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [room], %r3;"
    )
    assert "a race: thread 0 of block 0 meets what" in mistake(body, threads=64, shared=256)
    assert "a race: thread 0 of block 0 meets what" in mistake(body, threads=32, shared=256)


def test_inputs_cannot_be_written():
    assert "writes to an input: byte 0 of input 0" in mistake(
        "st.global.u32 [%rd0], %r0;", np.zeros(4, np.uint32)
    )


COPY = SHARED + "mul.wide.u32 %rd12, %r0, 16; add.u64 %rd13, %rd0, %rd12; mad.lo.u32 %r2, %r0, 16, %r1; "
COPY += (
    "setp.lt.u32 %p1, %r0, 16; selp.b32 %r5, 16, 0, %p1; cp.async.cg.shared.global [%r2], [%rd13], 16, %r5;"
)
AFTER = "ld.shared.u32 %r6, [%r2+4]; add.u64 %rd11, %rd1, %rd10; st.global.u32 [%rd11], %r6;"


def test_cp_async():
    x = np.arange(128, dtype=np.uint32)
    for wait in ("cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"):
        got = run(COPY + wait + AFTER, x, shared=512)[0]
        assert got.tolist() == [4 * i + 1 if i < 16 else 0 for i in range(32)], (
            "the rest is filled with zeros"
        )
    flying = "while a cp.async to it is in flight"
    assert flying in mistake(COPY + AFTER, x, shared=512)
    assert flying in mistake(COPY + "cp.async.wait_group 0;" + AFTER, x, shared=512), (
        "not committed, not waited for"
    )
    later = "cp.async.commit_group;"
    assert flying in mistake(COPY + later + "cp.async.wait_group 1;" + AFTER, x, shared=512)
    run(COPY + later + later + "cp.async.wait_group 1;" + AFTER, x, shared=512)
    assert flying in mistake(COPY + "st.shared.u32 [%r2], %r0;", x, shared=512)
    # the copy of another thread needs a barrier after its wait
    other = COPY + later + "cp.async.wait_group 0; xor.b32 %r2, %r2, 16;" + AFTER
    assert "a race" in mistake(other, x, shared=512)
    run(other.replace("wait_group 0;", "wait_group 0; bar.sync 0;"), x, shared=512)
    assert "out of bounds" in mistake(COPY + later, x[:60], shared=512)


# ---- figures ----


def test_bank_conflicts():
    lane = np.arange(32)
    assert bank_waves(lane * 4, lane, 4) == (1, 1)
    assert bank_waves(lane * 0, lane, 4) == (1, 1), "one word for all"
    assert bank_waves(lane * 8, lane, 4) == (2, 1)
    assert bank_waves(lane * 128, lane, 4) == (32, 1)
    assert bank_waves(lane, lane, 1) == (1, 1)
    assert bank_waves(lane * 16, lane, 16) == (4, 4)
    assert bank_waves(lane * 64, lane, 16) == (16, 4), "rows of 64 bytes: four of eight meet"
    assert bank_waves(lane * 80, lane, 16) == (4, 4)
    assert bank_waves(lane * 8, lane, 8) == (2, 2)
    both = np.arange(64)
    assert bank_waves(both % 32 * 4, both, 4) == (2, 2), "two warps do not disturb each other"
    some = lane[::2]
    assert bank_waves(some * 4, some, 4) == (1, 1)


def test_sectors():
    lane = np.arange(32)
    assert sectors(lane * 4, lane, 4) == (4, 128)
    assert sectors(lane * 4 + 16, lane, 4) == (5, 128)
    assert sectors(lane * 64, lane, 4) == (32, 128)
    assert sectors(lane * 0, lane, 4) == (1, 4)
    assert sectors(lane * 16, lane, 16) == (16, 512)


def test_costs_of_a_kernel():
    body = (
        SHARED
        + "st.shared.u32 [%r2], %r0; st.shared.u32 [%r2+128], %r0; bar.sync 0; mad.lo.u32 %r4, %r0, 8, %r1;"
    )
    _, cost, _ = run(body + "ld.shared.u32 %r3, [%r4];" + STORE, shared=256)
    whole = cost.figures()
    assert whole.instructions["shared"] == 3
    assert (whole.waves, whole.phases) == (4, 3)
    assert whole.bank_conflicts == 4 / 3
    assert (whole.sectors, whole.wanted, whole.sector_overhead) == (4, 128, 1.0)
    assert cost.figures(spaces=("global",)).total == 1
    assert "2 waves for 1" in cost.hot_spots()[0]
    with pytest.raises(ValueError, match="no loop"):
        cost.main_loop()


# ---- a whole kernel ----


def gemm(text, m=40, n=36, k=128, seed=0) -> tuple[bool, Cost]:
    made, memory = Module(text).kernel("gemm"), GlobalMemory(1 << 20)
    numbers = np.random.default_rng(seed)
    a, b = numbers.integers(-128, 128, (m, k), np.int8), numbers.integers(0, 256, (n, k), np.uint8)
    y = memory.empty((m, n), np.int32, "y")
    params = pack_params(made, memory.put(a, "a"), memory.put(b, "b"), y, m, n, k)
    cost = launch(made, (-(-n // 32), -(-m // 32)), (64,), params, memory, 3 * 64 * 48, seed)
    return np.array_equal(y, a.astype(int) @ b.T.astype(int)) and memory.written(y).all(), cost


@pytest.mark.parametrize(("m", "n", "k"), [(32, 32, 32), (40, 36, 128), (1, 70, 256)])
def test_gemm(m, n, k):
    right, cost = gemm(GEMM, m, n, k)
    assert right
    if k > 32:
        loop = cost.figures(cost.main_loop())
        blocks = -(-m // 32) * -(-n // 32)
        assert loop.instructions["mma"] == 2 * 4 * blocks * k // 32
        assert loop.instructions["ldmatrix"] == 2 * 3 * blocks * k // 32
        assert cost.figures(spaces=("ldmatrix",)).bank_conflicts == 1


def replaced(old, new, count=1):
    assert GEMM.count(old) >= 1, old
    return GEMM.replace(old, new, count)


# One change to the PTX each, as an error in the source would bring; what finds it.
MUTANTS = {
    "no barrier": (replaced("bar.sync", "// bar.sync"), "race"),
    "a barrier for half of the block": (replaced("bar.sync", "@%p3 bar.sync"), "barrier|race|flight"),
    "waits for one copy less": (replaced("wait_group 1", "wait_group 2"), "in flight"),
    "does not wait": (replaced("cp.async.wait_group", "// cp.async.wait_group"), "in flight"),
    "copies to the wrong place": (replaced("global [%r94]", "global [%r94+16]"), "race|flight|never"),
    "misaligned copy": (replaced("global [%r94]", "global [%r94+8]"), "misaligned"),
    "copies beyond the end": (replaced("[%r165], [%rd15]", "[%r165], [%rd15+4096]"), "out of bounds|wrong"),
    "sign of the activations": (GEMM.replace("s32.s8.u8.s32", "s32.s8.s8.s32"), "wrong"),
    "sign of the weights": (GEMM.replace("s32.s8.u8.s32", "s32.u8.u8.s32"), "wrong"),
    "order of the operands": (
        replaced("%r181, %r182, %r183}, {%r185", "%r182, %r181, %r183}, {%r185"),
        "wrong",
    ),
    "the other half of b": (replaced("{%r187, %r188}", "{%r188, %r187}"), "wrong"),
    "result off by one": (replaced("[%rd2+32]", "[%rd2+28]"), "race|wrong"),
    "no edge mask": (
        replaced("setp.ge.s32 \t%p15, %r66, %r76", "setp.ge.s32 \t%p15, %r66, 99999"),
        "wrong|race|out of bounds",
    ),
    "ldmatrix of a wrong row": (replaced("[%r184]", "[%r184+48]"), "wrong|race|flight|never"),
    "ldmatrix beyond the stages": (replaced("[%r194]", "[%r194+9216]"), "out of bounds"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_found(name):
    text, finds = MUTANTS[name]
    assert text != GEMM
    try:
        found = "right" if gemm(text)[0] else "wrong"
    except PtxError as error:
        found = str(error)
    assert re.search(finds, found), found
