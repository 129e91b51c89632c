"""One engine under several threads: the same numbers whoever runs it, and no memory kept from run to run."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from sparsegan import ops
from sparsegan.formats import pack
from sparsegan.ops.program import Act, Engine, Norm, Program, Slot, Step, Store
from sparsegan.patterns import weight_view
from sparsegan.quantize import quantize_weight

CALLERS, RUNS = 4, 200
KEPT = 1 << 15  # bytes that Python and torch may come to hold meanwhile; the slots of one run take more


@pytest.fixture
def engine():
    """A program with enough work for threads: int8 to f32, sums that a norm reads, a residual."""
    if ops.extension_error():
        pytest.skip(ops.extension_error())
    first, second = nn.Conv2d(16, 40, 3), nn.Conv2d(40, 24, 3)
    values, scale = quantize_weight(weight_view(first).detach())
    pad = {"kernel_size": (3, 3), "padding": (1, 1)}
    steps = (
        Step("pointwise", ~0, (Store(0),)),
        Step("conv2d", 0, (Store(1),), pack(values, torch.int8, None, scale * 0.03, first.bias), **pad),
        Step(
            "conv2d", 1, (Store(2),), pack(weight_view(second).detach(), bias=second.bias), stats=True, **pad
        ),
        Step("pointwise", 2, (Store(~0),), norm=Norm(4, 1e-5), act=Act("silu"), residual=2),
    )
    slots = (Slot(16, "u8", 0.03, 120), Slot(40, "f32", padding_mode="reflect"), Slot(24, "f32"))
    return Engine(Program(slots, steps, inputs=1, outputs=1), "cpu")


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_do_not_change_the_numbers(engine):
    images = [torch.randn(n, 16, 20, 27) for n in (1, 2, 5)]
    torch.set_num_threads(1)
    wanted = [engine.run([x])[0] for x in images]
    start = Barrier(CALLERS)

    def call(caller):
        torch.set_num_threads(1 + caller % 3)  # holds for the thread that sets it
        start.wait()
        order = [(caller + k) % len(images) for k in range(12)]
        return [(i, engine.run([images[i]])[0]) for i in order]

    with ThreadPoolExecutor(CALLERS) as pool:
        for results in pool.map(call, range(CALLERS)):
            assert all(torch.equal(y, wanted[i]) for i, y in results)


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def held():
    """Bytes that were allocated and not freed, in all of the process."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("needs mallinfo2, of glibc 2.33")
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


@pytest.mark.parametrize("shapes", [1, 12])  # 12: more than the plans that are remembered
def test_runs_keep_no_memory(engine, shapes):
    images = [torch.randn(1, 16, 12 + i, 19) for i in range(shapes)]
    torch.set_num_threads(2)

    def run(count):
        for i in range(count):
            engine.run([images[i % shapes]])
        return held()

    assert engine.bytes(images[:1]) > 2 * KEPT
    before = run(5 * shapes)
    assert run(RUNS) - before < KEPT
