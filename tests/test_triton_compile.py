"""Every Triton kernel and tile compiled for every architecture: registers, spills, shared memory and machine instructions."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import triton_offline
from triton_cases import DENSE
from triton_offline import ARCHITECTURES, RECORDED, Resources, record, tile_of

from sparsegan.triton_kernels.configs import CONFIGS, SHARED_LIMITS, TILES, Device, default

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


def fits(found: Resources, architecture: int) -> bool:
    """What configs.TILES wants of a tile: no spills; two blocks and eight warps, so that some compute while others wait."""
    blocks = found.blocks(architecture)
    return found.spilled == 0 and blocks >= 2 and blocks * found.threads >= 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(resources, architecture):
    for (name, compiled_for), found in resources.items():
        tile = tile_of(name)
        if compiled_for == architecture and (tile is None or tile[1] in TILES[architecture][tile[0]]):
            assert found.shared <= SHARED_LIMITS[architecture], (name, found)
            assert fits(found, architecture), (name, found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_of_an_architecture(resources, architecture):
    """The table holds the tiles that fit in the order it claims: most pixels, then fewest instructions for as many products."""
    for block_o, listed in TILES[architecture].items():
        loops = {}
        for tile in CONFIGS[block_o]:
            kernels = [resources[name, architecture] for name in RECORDED if tile_of(name) == (block_o, tile)]
            assert len(kernels) >= 2
            if all(fits(kernel, architecture) for kernel in kernels):
                loops[tile] = max(kernel.loop for kernel in kernels)
        assert listed == tuple(sorted(loops, key=lambda tile: (-tile.block_m, loops[tile])))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_tile(architecture):
    """The architecture's best; on smaller maps the best that leaves each multiprocessor two blocks and is not half empty."""
    device = Device(architecture, 112)
    for block_o, tiles in TILES[architecture].items():
        assert default(block_o, 10**6, 7, device) == tiles[0]
        for tile in tiles:
            first = next(other for other in tiles if other.block_m == tile.block_m)
            assert default(block_o, 32 * tile.block_m, 7, device) == first
            assert default(block_o, tile.block_m // 2 + 1, 224, device) == first
        assert default(block_o, 32 * 64, 6, device) == default(block_o, 1, 1000, device) == tiles[-1]
    assert default(16, 32 * 128, 7, Device(architecture, 56)) == TILES[architecture][16][0]


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
    found = resources["gather_gemm int8 64x32 128/4/3 3x3 + residual", 90]
    assert found.instructions.get("IGMMA"), found.instructions


def test_the_check_notices_spills_and_missing_tensor_cores():
    """The same kernel with too few registers, and a sum of products that no tensor core can do."""
    launch = RECORDED["gather_gemm int8 64x32 128/4/3 3x3 + residual"]()
    starved = triton_offline.compile_offline(launch.kernel, launch.arguments, 80, 4, 3, maxnreg=40)
    assert starved.resources.spilled > 0
    assert starved.resources.registers <= 40
