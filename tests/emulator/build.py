"""Compiles the checks of the emulated CUDA kernels and runs them.

    checks = Checks(folder, "thread")            # compiled once: main.cpp, check_*.cpp
    program = checks.program()                   # linked with the kernels of csrc/cuda, or of a copy of it
    outcome = run(program, "--small", "quantize")

A directory of kernels is csrc/cuda or a copy of it, beside which packed.h lies (`kernels.parent / "packed.h"`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
CUDA = HERE.parent.parent / "csrc" / "cuda"
KERNELS = ("gather_gemm", "group_norm", "quantize")  # the one that takes longest to compile first
CHECKS = ("check_gather_gemm", "check_group_norm", "check_quantize", "main")

FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
]
SANITIZERS = {
    "none": [],
    # Left out is what takes long to compile: checks inline instead of by a call, and those of what asan sees anyway.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size,vptr,return,pointer-overflow",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}
# Exit codes of a program: those of main.cpp, and one for each sanitizer.
CODES = {
    0: "ok",
    1: "wrong result",
    2: "emulator fault",
    3: "command line",
    42: "address sanitizer",
    43: "thread sanitizer",
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "exitcode=42",
    "UBSAN_OPTIONS": "exitcode=42:print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=43:halt_on_error=1",
}


class CompileError(RuntimeError):
    """What the compiler said."""


@dataclass(frozen=True)
class Outcome:
    """found_by: one of CODES, or "signal N"."""

    found_by: str
    output: str


def run(program: Path, *arguments: str, timeout: float = 600) -> Outcome:
    """Run a compiled program. A sanitizer's report is in the output and ends it at once."""
    done = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env={**os.environ, **ENVIRONMENT},
    )
    found_by = CODES.get(done.returncode, f"signal {-done.returncode}")
    return Outcome(found_by, done.stdout + done.stderr)


def unavailable(folder: Path, sanitizer: str = "none") -> str | None:
    """Why programs cannot be built and run with this sanitizer here, or None. folder: an existing one."""
    if not shutil.which("g++"):
        return "needs g++"
    probe = folder / f"probe_{sanitizer}"
    probe.with_suffix(".cpp").write_text("int main() {}\n")
    try:
        _compile(SANITIZERS[sanitizer], [str(probe.with_suffix(".cpp"))], probe)
    except CompileError:
        return f"g++ has no -fsanitize={sanitizer}"
    if subprocess.run([probe], capture_output=True).returncode:
        return f"programs with -fsanitize={sanitizer} do not run here"
    return None


@dataclass
class Checks:
    """The checks compiled with one sanitizer (a key of SANITIZERS) into `folder`, which exists."""

    folder: Path
    sanitizer: str = "none"
    _objects: dict[Path, Path] = field(default_factory=dict)

    def objects(self, sources: list[Path], cuda: Path = CUDA) -> list[Path]:
        """Compile what is not compiled yet, two at a time. Raises CompileError with what the compiler said."""

        def compile_one(number: int, source: Path) -> Path:
            target = self.folder / f"{number}_{source.stem}_{self.sanitizer}.o"
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            includes = [f"-I{cuda}", f"-I{HERE}"]
            _compile([*FLAGS, *SANITIZERS[self.sanitizer], *includes, *language], ["-c", str(source)], target)
            return target

        missing = [source for source in sources if source not in self._objects]
        with ThreadPoolExecutor(2) as pool:
            jobs = {
                source: pool.submit(compile_one, len(self._objects) + i, source)
                for i, source in enumerate(missing)
            }
        self._objects.update({source: job.result() for source, job in jobs.items()})
        return [self._objects[source] for source in sources]

    def link(self, objects: list[Path], name: str) -> Path:
        program = self.folder / f"{name}_{self.sanitizer}"
        _compile(SANITIZERS[self.sanitizer], [str(o) for o in objects], program)
        return program

    def program(self, cuda: Path = CUDA, changed: tuple[str, ...] = KERNELS) -> Path:
        """The checks linked with kernels: those named in `changed` from the directory cuda, others from csrc/cuda."""
        sources = [(cuda if stem in changed else CUDA) / f"{stem}.cu" for stem in KERNELS]
        kernels, checks = sources, [HERE / f"{stem}.cpp" for stem in CHECKS]
        if cuda == CUDA:
            return self.link(self.objects(kernels + checks), "checks")
        own = [source for source in kernels if source.parent == cuda]
        common = [source for source in kernels if source.parent != cuda]
        return self.link(
            self.objects(common + checks) + self.objects(own, cuda), f"checks_{cuda.parent.parent.name}"
        )


def _compile(flags: list[str], arguments: list[str], target: Path) -> None:
    made = subprocess.run(["g++", *flags, *arguments, "-o", str(target)], capture_output=True, text=True)
    if made.returncode:
        raise CompileError(made.stderr)
