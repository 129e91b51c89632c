"""Builds `sparsegan._C` on the LibTorch stable ABI: one file for every torch from 2.10 on.

Each CPU instruction set is one source compiled with its own flags; which of them runs is decided at run time. Where nvcc is
found, the CUDA kernels come along, whether or not torch itself was built for CUDA: they know nothing of torch, and loading
them needs neither a driver nor a device. Without a compiler the package installs all the same and runs on its reference
backend; without nvcc it installs without CUDA, and `sparsegan info` says why.

Environment: SPARSEGAN_CUDA_ARCHS="80 90" compiles for these architectures only, "none" leaves CUDA out.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
# Kept between installations, so that only what changed is compiled again.
OBJECTS = ROOT / "build" / "objects"
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
# Compiler flags by the end of the file name; files not named here run on every CPU of the architecture.
ISA_FLAGS = {
    "_avx2.cpp": AVX2,
    "_avx2_vnni.cpp": [*AVX2, "-mavxvnni"],
    "_avx512_vnni.cpp": AVX512,
    "_avx512_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8"],
}
COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    # Where a multiplication and an addition are rounded as one is written in the kernels, the same on every instruction set.
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # GCC warns of its own AVX-512 headers
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]

# A100, RTX 30, RTX 40, H100, B200, RTX 50. Later ones compile the PTX of the last when the kernels are loaded.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
CUDA_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",  # as -ffp-contract=off above
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
]
# Linked in whole and hidden: torch may bring another CUDA runtime.
CUDA_LIBRARIES = ["-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]


@dataclass(frozen=True)
class Cuda:
    """nvcc, where its headers and libraries lie, and the architectures to compile for; or the reason why there is none."""

    nvcc: str = ""
    include: str = ""
    libraries: str = ""
    archs: tuple[str, ...] = ()
    missing: str = ""

    @property
    def code(self) -> list[str]:
        last = self.archs[-1]
        targets = [
            *(f"arch=compute_{a},code=sm_{a}" for a in self.archs),
            f"arch=compute_{last},code=compute_{last}",
        ]
        return [f"-gencode={target}" for target in targets]


def find_cuda() -> Cuda:
    """CUDA from PATH, from /usr/local/cuda, or from the packages nvidia-cuda-nvcc and nvidia-cuda-runtime of PyPI."""
    wanted = (os.environ.get("SPARSEGAN_CUDA_ARCHS") or " ".join(CUDA_ARCHS)).replace(";", " ").split()
    if wanted == ["none"]:
        return Cuda(missing="it was built with SPARSEGAN_CUDA_ARCHS=none")
    in_path = shutil.which("nvcc")
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    candidates = [
        *([Path(in_path)] if in_path else []),
        Path("/usr/local/cuda/bin/nvcc"),
        *packages,
    ]
    nvcc = next((str(path) for path in candidates if path.exists()), None)
    if nvcc is None:
        return Cuda(
            missing="nvcc was not found in PATH or /usr/local/cuda (pip install nvidia-cuda-nvcc brings it)"
        )
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cu"
        probe.write_text("__global__ void probe() {}\nint main() { probe<<<1, 1>>>(); }\n")
        # nvcc may be a script that calls another: it says itself where it lives
        plan = subprocess.run([nvcc, "--dryrun", str(probe)], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", plan.stderr, re.MULTILINE)
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        archs = tuple(arch for arch in wanted if f"compute_{arch}" in known)
        if top is None or not archs:
            return Cuda(missing=f"{nvcc} compiles for none of the architectures {', '.join(wanted)}")
        home = Path(top[1].strip())
        places = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        library = next((str(place) for place in places if (place / "libcudart_static.a").exists()), None)
        include = next(
            (
                str(p)
                for p in (home / "include", *home.glob("targets/*/include"))
                if (p / "cuda_runtime.h").exists()
            ),
            None,
        )
        if library is None or include is None:
            return Cuda(
                missing=f"{home} has nvcc but no CUDA runtime (pip install nvidia-cuda-runtime brings it)"
            )
        cuda = Cuda(nvcc, include, library, archs)
        command = [
            nvcc,
            *CUDA_FLAGS,
            f"-arch=sm_{archs[0]}",
            "-c",
            str(probe),
            "-o",
            str(probe.with_suffix(".o")),
        ]
        tried = subprocess.run(command, capture_output=True, text=True)
        if tried.returncode:
            problem = next(
                (line for line in tried.stderr.splitlines() if "error" in line), tried.stderr[:200]
            )
            return Cuda(missing=f"{nvcc} does not compile here: {problem.strip()}")
    return cuda


class BuildExtension(build_ext):
    """Compiles the sources side by side, each with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        x86 = platform.machine() in ("x86_64", "AMD64")
        cuda = find_cuda()
        if cuda.missing:
            about = f"-DSPARSEGAN_NO_CUDA={_quoted(cuda.missing)}"
        else:
            about = f"-DSPARSEGAN_CUDA_ARCHITECTURES={_quoted(' '.join(cuda.archs))}"
        print(f"CUDA: {cuda.missing or f'{cuda.nvcc} for {chr(32).join(cuda.archs)}'}")

        def compile_one(source: str) -> str:
            if source.endswith(".cu"):
                return self.compile_cuda(source, cuda)
            isa = next((flags for end, flags in ISA_FLAGS.items() if source.endswith(end)), [])
            if isa and not (x86 and self.compiler_takes(isa)):
                isa = []  # the file then compiles to "not available"
            flags = [*COMPILE_FLAGS, *(f"-isystem{p}" for p in include_paths()), *isa]
            if source.endswith("module.cpp"):
                flags.append(about)
            if source.startswith("csrc/cuda"):
                flags.append(f"-isystem{cuda.include}")
            return self.compile_cpp(source, flags)

        sources = [s for s in ext.sources if not (cuda.missing and s.startswith("csrc/cuda"))]
        sources.sort(key=lambda source: not source.endswith(".cu"))  # what takes longest comes first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=[*library_paths(), *([] if cuda.missing else [cuda.libraries])],
            extra_postargs=[
                "-Wl,--no-as-needed",
                "-ltorch_cpu",
                "-ltorch",
                *([] if cuda.missing else CUDA_LIBRARIES),
            ],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def compile_cpp(self, source: str, flags: list[str]) -> str:
        """The object file of a C++ source."""
        (made,) = self.compiler.object_filenames([source], output_dir=str(OBJECTS))
        command = [*map(str, self.compiler.compiler_so), *self.compiler.include_dirs, *flags]
        if self.force or not _up_to_date(Path(made), source, command):
            flags = [*flags, "-MMD", "-MF", f"{made}.d"]
            self.compiler.compile([source], output_dir=str(OBJECTS), extra_postargs=flags)
            _finished(Path(made), command)
        return made

    def compile_cuda(self, source: str, cuda: Cuda) -> str:
        """The object file of a CUDA source, with machine code for every architecture."""
        made = OBJECTS / f"{source}.o"
        made.parent.mkdir(parents=True, exist_ok=True)
        command = [cuda.nvcc, *CUDA_FLAGS, *cuda.code]
        if self.force or not _up_to_date(made, source, command):
            extra = ["--threads", "0", "-MMD", "-MF", f"{made}.d", "-c", source, "-o", str(made)]
            print(" ".join([*command, *extra]))
            if subprocess.run([*command, *extra]).returncode:
                raise CompileError(
                    f"nvcc could not compile {source}; SPARSEGAN_CUDA_ARCHS=none leaves CUDA out"
                )
            _finished(made, command)
        return str(made)

    def compiler_takes(self, flags: list[str]) -> bool:
        """Whether the compiler knows these flags: older ones lack the newest instruction sets."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("int main() {}\n")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True


def _up_to_date(made: Path, source: str, command: list[str]) -> bool:
    """Whether `made` came from this command and is newer than the source and every header of ours that it read."""
    notes, rule = Path(f"{made}.command"), Path(f"{made}.d")
    if not (made.exists() and notes.exists() and rule.exists()) or notes.read_text() != "\n".join(command):
        return False
    read = re.sub(r"\\\n", " ", rule.read_text()).partition(":")[2].split()
    ours = [Path(file) for file in {source, *read} if not Path(file).is_absolute()]
    return all(file.exists() and file.stat().st_mtime < made.stat().st_mtime for file in ours)


def _finished(made: Path, command: list[str]) -> None:
    Path(f"{made}.command").write_text("\n".join(command))


def _quoted(text: str) -> str:
    """As a C string literal."""
    return '"' + re.sub(r"\s+", " ", text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _below(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("**/*") if p.suffix in suffixes)


setup(
    ext_modules=[
        Extension(
            "sparsegan._C",
            _below("csrc", ".cpp", ".cu"),
            depends=_below("csrc", ".h", ".cuh"),
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
