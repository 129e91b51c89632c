"""The native engine under the sanitizers: random programs (native/program_fuzz.cpp), valid ones and hostile ones."""

import ast
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsegan import ops

ROOT = Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"
FUZZ = ROOT / "tests" / "native" / "program_fuzz.cpp"
FLAGS = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-Wno-psabi", "-pthread", f"-I{CPU}"]
# Its tiles are emulated, so that every CPU with AVX512-VNNI runs it, and sanitizers see what tiles read.
MATRIX_UNIT, NATIVE_TILES = "avx512_amx", ("-mavx512bf16", "-mamx-tile", "-mamx-int8")
SANITIZERS = {
    # What takes long to compile is left out: checks inline instead of by a call, and those of what asan sees anyway.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}


def isa_flags():
    """ISA_FLAGS of setup.py, which cannot be imported without building something."""
    names = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("AVX2", "AVX512", "ISA_FLAGS"):
            exec(ast.unparse(node), names)
    return names["ISA_FLAGS"]


def build(folder, sanitizer, isas):
    """The fuzzer with these instruction sets; without its flags, the file of another compiles to nothing."""
    flags = [*FLAGS, *SANITIZERS[sanitizer]]

    def compiler(*arguments):
        return subprocess.run(["g++", *flags, *arguments], capture_output=True, text=True)

    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    if (
        compiler(str(probe), "-o", str(folder / "probe")).returncode
        or subprocess.run(folder / "probe").returncode
    ):
        pytest.skip(f"g++ has no -fsanitize={sanitizer} that runs here")

    flags_of = isa_flags()  # once, since Python 3.11 cannot parse in two threads at a time

    def compile_one(source):
        wanted = [
            flag
            for end, flags in flags_of.items()
            if source.name.endswith(end) and end[1:-4] in isas
            for flag in flags
        ]
        if MATRIX_UNIT in isas:
            wanted = [flag for flag in wanted if flag not in NATIVE_TILES] + ["-DSPARSEGAN_EMULATED_TILES"]
        made = compiler(*wanted, "-c", str(source), "-o", str(folder / f"{source.stem}.o"))
        assert made.returncode == 0, made.stderr
        return str(folder / f"{source.stem}.o")

    # the kernels take longest, so they come first
    sources = [
        *CPU.glob("gather_gemm_*.cpp"),
        CPU / "program.cpp",
        CPU / "memory.cpp",
        FUZZ,
        CPU / "plan.cpp",
        CPU / "isa.cpp",
    ]
    sources.sort(key=lambda source: source.stem.removeprefix("gather_gemm_") not in (*isas, "portable"))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    fuzz = folder / "fuzz"
    linked = compiler(*objects, "-o", str(fuzz))
    assert linked.returncode == 0, linked.stderr
    return fuzz


@pytest.fixture(scope="module", params=SANITIZERS)
def fuzz(request, tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    if ops.extension_error():
        pytest.skip(ops.extension_error())
    # The thread sanitizer sees what threads share; which instructions compute it makes no difference.
    isas = ops.available_isas()[:1] if request.param == "address" else []
    if isas and "avx512_vnni" in ops.available_isas():
        isas = [MATRIX_UNIT, "avx512_vnni"]
    path = build(tmp_path_factory.mktemp(request.param), request.param, isas)

    def run(*arguments):
        done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
        assert all(isa in done.stdout for isa in (*isas, "portable"))
        return done.stdout

    run.sanitizer = request.param
    return run


def test_random_programs(fuzz):
    summary = fuzz("valid", 0, 40 if fuzz.sanitizer == "address" else 10)
    assert " 0 parallel steps" not in summary, "no step had enough work for threads"


def test_hostile_programs(fuzz):
    if fuzz.sanitizer != "address":
        pytest.skip("a hostile program may well race with itself")
    fuzz("hostile", 0, 30)
