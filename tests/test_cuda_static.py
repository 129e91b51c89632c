"""The machine code of the CUDA kernels on every architecture, read and not run: what is in it, what is not, how many blocks fit.

The figures stand in cuda_kernels.json; `PYTHONPATH=tests python -m ptx.machine_code` writes it anew.
"""

import json
import subprocess
from collections import Counter

import pytest
from ptx.machine_code import (
    FORMATS,
    LIMITS,
    TABLE,
    blocks_per_multiprocessor,
    build_script,
    host_facts,
    is_mma,
    missing,
    nvcc_version,
    read,
    read_all,
    table,
    tile_name,
)

# Which entry of Tile::resident speaks of an architecture: shared memory of 100 KiB, or more.
KIND = {"86": 0, "89": 0, "120": 0, "80": 1, "90": 1, "100": 1}
# Where main_loop_slots holds; later architectures address constants and shared memory in other ways.
HELD = ("80", "86", "89")
INSTRUCTIONS = {
    "Int8": "IMMA.16832.S8.U8",
    "Float16": "HMMA.16816.F32",
    "BrainFloat16": "HMMA.16816.F32.BF16",
    "Int8TwoFour": "IMMA.SP.16864.S8.U8",
    "Float16TwoFour": "HMMA.SP.16832.F32",
    "BrainFloat16TwoFour": "HMMA.SP.16832.F32.BF16",
}


@pytest.fixture(scope="module")
def codes():
    if reason := missing():
        pytest.skip(reason)
    return read_all()


@pytest.fixture(scope="module")
def facts(codes, tmp_path_factory):
    return host_facts(tmp_path_factory.mktemp("facts"))


def all_kernels(codes):
    return [(arch, name, code) for arch, kernels in codes.items() for name, code in kernels.items()]


def test_every_architecture_has_every_kernel(codes, facts):
    assert list(codes) == list(build_script().CUDA_ARCHS)
    names = {arch: sorted(kernels) for arch, kernels in codes.items()}
    assert all(found == names["80"] for found in names.values())
    assert {tile_name(tile) for tile in facts["tiles"]} == {
        n for n in names["80"] if n.startswith("gather_gemm")
    }
    for stem in ("add_splits_kernel", "quantize_kernel", "group_norm_sums_kernel", "group_norm_apply_kernel"):
        assert any(name.startswith(stem) for name in names["80"]), stem


def test_nothing_spills(codes):
    """No stack, no local memory: registers hold everything, and no array is indexed by what is not known when compiling."""
    bad = [
        f"{name} on sm_{arch}: stack {c.stack}, local {c.local}"
        for arch, name, c in all_kernels(codes)
        if c.stack or c.local
    ]
    for arch, name, code in all_kernels(codes):
        used = sorted({op for op in code.opcodes if op.split(".")[0] in ("LDL", "STL")})
        if used:
            bad.append(f"{name} on sm_{arch}: {', '.join(used)}")
    assert not bad, "\n".join(bad)


def test_main_loops_use_the_tensor_cores(codes):
    """Tensor core instructions of the right type, fed by ldmatrix and by copies that pass the first-level cache and registers."""
    for arch, name, code in all_kernels(codes):
        if not name.startswith("gather_gemm"):
            assert not any(is_mma(op) for op in code.opcodes), name
            continue
        wanted = INSTRUCTIONS[name.split("<")[1].split(",")[0]]
        assert {op for op in code.opcodes if is_mma(op)} == {wanted}, f"{name} on sm_{arch}"
        loop = Counter(code.opcodes[i].split(".")[0] for i in code.main_loop())
        assert loop["LDSM"] > 0, f"{name} on sm_{arch}: {loop}"
        assert loop["BAR"] > 0, f"{name} on sm_{arch}: {loop}"
        # the copies may stand behind a branch out of the loop's straight line, but are part of it
        assert loop["LDGSTS"] > 0, f"{name} on sm_{arch}: {loop}"
        assert "LDGSTS.E.BYPASS.128" in code.opcodes
        slow = {op for op in code.opcodes if op.startswith(("I2F", "F2I", "MUFU"))} & {
            code.opcodes[i] for i in code.main_loop()
        }
        assert not slow, f"{name} on sm_{arch}: {slow}"


def test_main_loops_are_as_short_as_derived(codes, facts):
    """Instructions for each mma, at most those that tile.h counts for a dense kernel (main_loop_slots)."""
    long = []
    for tile in facts["tiles"]:
        for arch in HELD:
            code = codes[arch][tile_name(tile)]
            loop = code.main_loop()
            mma = sum(is_mma(code.opcodes[i]) for i in loop)
            if len(loop) * tile["mma"] > mma * tile["slots"]:
                stage = (
                    f"{len(loop) * tile['mma'] / mma:.1f} instructions a stage, derived are {tile['slots']}"
                )
                classes = Counter(code.opcodes[i].split(".")[0] for i in loop).most_common()
                long.append(f"{tile_name(tile)} on sm_{arch}: {stage}; the loop has {classes}")
    assert not long, "\n".join(long)


def test_blocks_on_a_multiprocessor(codes, facts):
    """As many as tile.h means: by shared memory and by registers."""
    rows = table(codes, facts)
    few = []
    for tile in facts["tiles"]:
        row = rows[tile_name(tile)]
        for arch, blocks in zip(codes, row["blocks"], strict=True):
            wanted = tile["resident"][KIND[arch]]
            if blocks < wanted:
                few.append(f"{tile_name(tile)} on sm_{arch}: {blocks} blocks, meant are {wanted}")
    assert not few, "\n".join(few)


def test_figures_are_those_of_the_table(codes, facts):
    stored = json.loads(TABLE.read_text())
    about = stored["about"]
    version = nvcc_version(build_script().find_cuda().nvcc)
    if version != about["nvcc"]:
        pytest.skip(f"the table is of nvcc {about['nvcc']}, here is {version}")
    assert about["architectures"] == list(codes)
    now = table(codes, facts)
    assert set(now) == set(stored["kernels"])
    changed = [
        f"{name}: {row}, the table has {stored['kernels'][name]}"
        for name, row in now.items()
        if row != stored["kernels"][name]
    ]
    assert not changed, "\n".join([*changed, "PYTHONPATH=tests python -m ptx.machine_code writes the table"])


# Of the CUDA occupancy calculator: (architecture, threads, registers, shared bytes) -> blocks.
@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("80", 128, 32, 0, 16),  # 2048 threads
        ("80", 128, 128, 0, 4),  # 65536 registers
        ("80", 128, 129, 0, 3),  # given out in eights
        ("80", 128, 255, 0, 2),
        ("80", 256, 64, 48 << 10, 3),
        ("80", 128, 32, 163 << 10, 1),
        ("80", 128, 32, 164 << 10, 0),
        ("86", 128, 32, 0, 12),
        ("86", 32, 32, 0, 16),  # 16 blocks
        ("89", 32, 32, 0, 24),
        ("86", 128, 32, 33 << 10, 2),  # 34 with what the system takes
        ("90", 128, 32, 56 << 10, 4),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks):
    assert blocks_per_multiprocessor(arch, threads, registers, shared) == blocks


def test_limits_name_the_architectures_of_setup():
    assert set(LIMITS) == set(KIND) == set(build_script().CUDA_ARCHS)
    assert set(FORMATS.values()) == set(INSTRUCTIONS)


LOCAL_ARRAY = """
__global__ void reads_by_index(int* values, int n) {
  int held[64];
  for (int i = 0; i < 64; i++) held[i * n & 63] = values[i];
  values[threadIdx.x] = held[values[threadIdx.x] & 63];
}
"""


def test_local_memory_is_seen(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    (tmp_path / "local.cu").write_text(LOCAL_ARRAY)
    nvcc = build_script().find_cuda().nvcc
    subprocess.run([nvcc, "-arch=sm_80", "-c", "local.cu", "-o", "local.o"], cwd=tmp_path, check=True)
    (code,) = read(tmp_path / "local.o", "80").values()
    assert code.stack >= 256
    assert {"LDL", "STL"} <= {op.split(".")[0] for op in code.opcodes}
    assert not code.main_loop()
