"""Every Triton kernel and tile compiled for every architecture: registers, spills, shared memory and machine instructions."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import triton_offline
from triton_cases import DENSE
from triton_offline import ARCHITECTURES, RECORDED, Resources, record

from sparsegan.triton_kernels.configs import SHARED_LIMITS

# What a tensor core instruction is called in the machine code: first of mma.sync, then of wgmma and tcgen05.
INTEGER, FLOAT = ("IMMA", "IGMMA", "UTCIMMA"), ("HMMA", "HGMMA", "UTCHMMA")
COPIES = ("LDGSTS",)


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, int], Resources]:
    """By (name in RECORDED, architecture); two processes, since each compiles for itself."""
    wanted = [(name, architecture) for name in RECORDED for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return dict(zip(wanted, pool.map(record, wanted, chunksize=len(ARCHITECTURES)), strict=True))


def test_everything_is_recorded():
    names = " ".join(RECORDED)
    for dtype, block in DENSE:
        assert f"{str(dtype)[6:]} {block[0]}x{block[1]}" in names
    assert len(RECORDED) == len(set(RECORDED))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(resources, architecture):
    for (name, compiled_for), found in resources.items():
        if compiled_for == architecture:
            assert found.spilled == 0, (name, found)
            assert found.shared <= SHARED_LIMITS[architecture], (name, found)
            # Eight warps or more, so that some compute while others wait.
            assert found.blocks(architecture) * found.threads >= 256, (name, found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_instructions(resources, architecture):
    """Tensor cores multiply, and the gathered tiles are copied to shared memory while they do."""
    for (name, compiled_for), found in resources.items():
        if compiled_for != architecture or not name.startswith("gather_gemm"):
            continue
        known = INTEGER if "int8" in name else FLOAT
        assert any(found.instructions.get(word) for word in known), (name, found.instructions)
        assert all(found.instructions.get(word) for word in COPIES), (name, found.instructions)
        assert not set(found.instructions) & {"IDP", "IDP4A"}, name


def test_the_asynchronous_tensor_cores_are_used_where_there_are_some(resources):
    """wgmma on sm_90, for tiles that fill one."""
    found = resources["gather_gemm int8 64x32 128/4/3 3x3", 90]
    assert found.instructions.get("IGMMA"), found.instructions


def test_the_check_notices_spills_and_missing_tensor_cores():
    """The same kernel with too few registers, and a sum of products that no tensor core can do."""
    launch = RECORDED["gather_gemm int8 64x32 128/4/3 3x3"]()
    starved = triton_offline.compile_offline(launch.kernel, launch.arguments, 80, 4, 3, maxnreg=40)
    assert starved.resources.spilled > 0
    assert starved.resources.registers <= 40
