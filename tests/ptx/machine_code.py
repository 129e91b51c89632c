"""The machine code (SASS) of the kernels for every architecture: instructions, registers, and how many blocks fit on a
multiprocessor. Nothing is run.

    PYTHONPATH=tests python -m ptx.machine_code    writes tests/cuda_kernels.json, with which test_cuda_static.py compares
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .cost import loops_of
from .device import CUDA, KERNELS, ROOT, build_script, content_hash

TABLE = ROOT / "tests" / "cuda_kernels.json"


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: the table of compute capabilities in the CUDA programming guide."""

    shared: int  # bytes for all blocks
    threads: int
    blocks: int
    block_shared: int  # bytes for one block
    registers: int = 65536


LIMITS = {
    "80": Limits(164 << 10, 2048, 32, 163 << 10),
    "86": Limits(100 << 10, 1536, 16, 99 << 10),
    "89": Limits(100 << 10, 1536, 24, 99 << 10),
    "90": Limits(228 << 10, 2048, 32, 227 << 10),
    "100": Limits(228 << 10, 2048, 32, 227 << 10),
    "120": Limits(100 << 10, 1536, 24, 99 << 10),
}
RESERVED = 1 << 10  # bytes of shared memory that the system takes of every block


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared: int) -> int:
    """Registers come in 256 for a warp, from one of four equal files; shared memory in 128 bytes."""
    limits, warps = LIMITS[arch], -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = limits.registers // 4 // per_warp * 4 // warps
    by_shared = limits.shared // (-(-shared // 128) * 128 + RESERVED) if shared <= limits.block_shared else 0
    return min(by_registers, by_shared, limits.threads // (warps * 32), limits.blocks)


@dataclass
class Code:
    """One kernel on one architecture."""

    registers: int
    stack: int
    local: int
    shared: int  # static
    opcodes: list[str]  # "IMMA.16832.S8.U8"
    guarded: list[bool]
    targets: list[int | None]  # of branches: place in the list

    def main_loop(self) -> list[int]:
        """The innermost loop with most (above half) of the tensor core instructions; places of its instructions."""
        flow = []
        for op, guarded, target in zip(self.opcodes, self.guarded, self.targets, strict=True):
            flow.append((guarded or op.split(".")[0] not in ("BRA", "EXIT", "RET"), target))
        loops = [sorted(loop) for loop in loops_of(flow)]
        counts = [sum(is_mma(self.opcodes[i]) for i in loop) for loop in loops]
        half = max(counts, default=0) / 2
        return min((loop for loop, n in zip(loops, counts, strict=True) if n > half), key=len, default=[])


def is_mma(opcode: str) -> bool:
    return opcode.startswith(("IMMA", "HMMA"))


def tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm, from PATH or from their packages of PyPI."""
    packages = sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/cu*/bin/{name}"), reverse=True)
    return shutil.which(name) or (str(packages[0]) if packages else None)


def missing() -> str | None:
    """Why machine code cannot be made or read here."""
    if reason := build_script().find_cuda().missing:
        return reason
    if not all(tool(name) for name in ("cuobjdump", "nvdisasm")):
        return "needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return None


def objects() -> dict[str, Path]:
    """The object files of the kernels, for all architectures: those that setup.py keeps, or compiled now where they are old."""
    setup = build_script()
    cuda = setup.find_cuda()
    command = [cuda.nvcc, *setup.CUDA_FLAGS, *cuda.code]
    found = {}
    for name in KERNELS:
        source = f"csrc/cuda/{name}.cu"
        with contextlib.chdir(ROOT):
            built = setup.OBJECTS / f"{source}.o"
            if not setup._up_to_date(built, source, command):
                built = ROOT / "build" / "ptx" / f"{name}-{content_hash(CUDA, command)}.o"
                if not built.exists():
                    built.parent.mkdir(parents=True, exist_ok=True)
                    partial = built.with_suffix(".part")
                    subprocess.run([*command, "--threads", "0", "-c", source, "-o", str(partial)], check=True)
                    partial.rename(built)
        found[name] = built
    return found


def read(built: Path, arch: str) -> dict[str, Code]:
    """The kernels of an object file by their name in C++, without namespaces."""

    def dump(what: str) -> str:
        command = [tool("cuobjdump"), what, "-arch", f"sm_{arch}", str(built)]
        path = f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"
        return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": path}).stdout

    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump("-res-usage")
    )
    parts = re.split(r"^\s+Function : (\S+)$", dump("-sass"), flags=re.M)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    names = short_names([name for name, *_ in usage])
    kernels = {}
    for name, registers, stack, shared, local in usage:
        lines = re.findall(
            r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", bodies[name], re.M
        )
        places = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
        targets = []
        for _, _, opcode, operands in lines:
            to = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.split(".")[0] == "BRA" else None
            targets.append(places[int(to[1], 16)] if to else None)
        kernels[names[name]] = Code(
            int(registers),
            int(stack),
            int(local),
            int(shared) % RESERVED,  # newer architectures count what the system reserves
            [opcode for _, _, opcode, _ in lines],
            # a second predicate among the operands is a condition as well
            [bool(guard) or bool(re.match(r"\s*!?U?P\d", operands)) for _, guard, _, operands in lines],
            targets,
        )
    return kernels


def short_names(mangled: list[str]) -> dict[str, str]:
    """gather_gemm_kernel<Int8, 64, 32, 128>, quantize_kernel<float, u8, 0>, ..."""
    plain = subprocess.run(
        ["c++filt", *mangled], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = {}
    for name, text in zip(mangled, plain, strict=True):
        text = re.sub(
            r"^void |sparsegan::cuda::|\(Read\)", "", re.sub(r"\(sparsegan::cuda::Read\)", "", text)
        )
        text = text[: text.rindex(">(") + 1] if ">(" in text else text.partition("(")[0]
        short[name] = re.sub(r"GatherTile<(.*?)>\s*", r"\1", text).replace("unsigned char", "u8").strip()
    return short


def host_facts(folder: Path) -> dict:
    """What tiles.cpp prints: the rows of tile.h, and the dynamic shared memory of the other kernels."""
    program = folder / "tiles"
    source = Path(__file__).with_name("tiles.cpp")
    includes = [f"-I{CUDA}", f"-I{ROOT / 'tests' / 'emulator'}"]
    subprocess.run(["g++", "-std=c++20", *includes, str(source), "-o", str(program)], check=True)
    return json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


FORMATS = {
    (0, 0): "Int8",
    (1, 0): "Float16",
    (2, 0): "BrainFloat16",
    (0, 1): "Int8TwoFour",
    (1, 1): "Float16TwoFour",
}
FORMATS[2, 1] = "BrainFloat16TwoFour"


def tile_name(tile: dict) -> str:
    form = FORMATS[tile["type"], tile["two_four"]]
    return f"gather_gemm_kernel<{form}, {tile['block_o']}, {tile['block_k']}, {tile['pixels']}>"


def dynamic_shared(name: str, facts: dict) -> int:
    """Bytes that the launcher of the kernel of this name asks for."""
    sizes = {tile_name(tile): tile["shared"] for tile in facts["tiles"]}
    if name in sizes:
        return sizes[name]
    if name.startswith("quantize_kernel"):
        return facts["quantize"]
    if name.startswith("group_norm_sums"):
        return facts["sums_u8" if "u8" in name else "sums_32" if "float" in name else "sums_16"]
    if name.startswith("group_norm_merge"):
        return facts["merge"]
    if name.startswith(("add_splits_kernel", "group_norm_apply")):
        return 0
    raise KeyError(f"{name}: what shared memory does its launcher ask for?")


def table(codes: dict[str, dict[str, Code]], facts: dict) -> dict:
    """codes: by architecture and kernel. Rows of lists, one entry for each architecture."""
    threads = {tile_name(tile): tile["threads"] for tile in facts["tiles"]}
    rows: dict[str, dict] = {}
    for name in sorted(next(iter(codes.values()))):
        kernels = [codes[arch][name] for arch in codes]
        shared = dynamic_shared(name, facts)
        row: dict = {"shared": shared, "registers": [k.registers for k in kernels]}
        row["blocks"] = [
            blocks_per_multiprocessor(arch, threads.get(name, 128), k.registers, shared + k.shared)
            for arch, k in zip(codes, kernels, strict=True)
        ]
        loops = [(k, k.main_loop()) for k in kernels]
        if any(loop for _, loop in loops):
            row["loop"] = [len(loop) for _, loop in loops]
            row["mma"] = [sum(is_mma(k.opcodes[i]) for i in loop) for k, loop in loops]
        rows[name] = row
    return rows


def nvcc_version(nvcc: str) -> str:
    return re.search(
        r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )[1]


def write(rows: dict, codes: dict, path: Path = TABLE) -> None:
    """One line a kernel."""
    about = {"nvcc": nvcc_version(build_script().find_cuda().nvcc), "architectures": list(codes)}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    path.write_text(f'{{\n  "about": {json.dumps(about)},\n  "kernels": {{\n{lines}\n  }}\n}}\n')


def read_all() -> dict[str, dict[str, Code]]:
    built = objects()
    codes: dict[str, dict[str, Code]] = {}
    for arch in build_script().find_cuda().archs:
        codes[arch] = {}
        for path in built.values():
            codes[arch] |= read(path, arch)
    return codes


if __name__ == "__main__":
    import tempfile

    if reason := missing():
        raise SystemExit(reason)
    codes = read_all()
    with tempfile.TemporaryDirectory() as folder:
        write(table(codes, host_facts(Path(folder))), codes)
    print(f"wrote {TABLE}")
