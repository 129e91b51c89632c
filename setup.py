"""Builds `sparsegan._C` on the LibTorch stable ABI: one file for every torch from 2.10 on.

Each CPU instruction set is one source compiled with its own flags; which of them runs is decided at run time. Without a
compiler the package installs all the same and runs on its reference backend.
"""

import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
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


class BuildExtension(build_ext):
    """Compiles the sources side by side, each with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        x86 = platform.machine() in ("x86_64", "AMD64")

        def compile_one(source: str) -> list[str]:
            isa = next((flags for end, flags in ISA_FLAGS.items() if source.endswith(end)), [])
            if isa and not (x86 and self.compiler_takes(isa)):
                isa = []  # the file then compiles to "not available"
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=self.compiler.include_dirs,
                extra_postargs=[*COMPILE_FLAGS, *(f"-isystem{p}" for p in include_paths()), *isa],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for part in pool.map(compile_one, ext.sources) for o in part]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=library_paths(),
            extra_postargs=["-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"],
            build_temp=self.build_temp,
            target_lang="c++",
        )

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


sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp"))
headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.h"))
setup(
    ext_modules=[
        Extension(
            "sparsegan._C", sources, depends=headers, language="c++", py_limited_api=True, optional=True
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
