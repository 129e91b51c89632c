"""What makes one build load under every torch: the extension asks torch for nothing but its stable C interface."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sparsegan
from sparsegan import ops

ROOT = Path(__file__).parent.parent


@pytest.fixture
def symbols():
    if ops.extension_error():
        pytest.skip(ops.extension_error())
    if not shutil.which("nm"):
        pytest.skip("nm is not installed (binutils)")
    import sparsegan._C as extension

    out = subprocess.run(["nm", "-D", extension.__file__], capture_output=True, text=True, check=True).stdout
    return [line.split()[-2:] for line in out.splitlines()]


def test_only_the_stable_interface_of_torch_is_used(symbols):
    undefined = [name.split("@")[0] for kind, name in symbols if kind == "U"]
    from_torch = [name for name in undefined if re.search(r"torch|c10|_ZN2at|caffe", name)]
    assert from_torch, "the extension no longer calls torch at all?"
    mangled = [name for name in from_torch if name.startswith("_Z")]
    assert not mangled, f"C++ symbols of torch change from release to release: {mangled}"


def test_kernels_leave_nothing_for_the_linker_to_merge(tmp_path):
    """A template that two files instantiate is merged when linking: the AVX copy would then run on every CPU."""
    if not shutil.which("g++") or not shutil.which("nm") or platform.machine() != "x86_64":
        pytest.skip("needs g++ and nm on x86-64")
    source = ROOT / "csrc" / "cpu" / "gather_gemm_avx2.cpp"
    flags = ["-std=c++20", "-O3", "-mavx2", "-mfma", "-fPIC"]
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(tmp_path / "kernels.o")], check=True)
    symbols = subprocess.run(
        ["nm", str(tmp_path / "kernels.o")], capture_output=True, text=True, check=True
    ).stdout
    kinds = [line.split()[-2:] for line in symbols.splitlines()]
    assert [name for kind, name in kinds if kind == "T"] == ["_ZN9sparsegan12avx2_kernelsEv"]
    assert not [name for kind, name in kinds if kind in "WVu"]


def test_version_is_known():
    assert re.match(r"\d+\.\d+", __import__("importlib.metadata").metadata.version("sparsegan"))
    assert Path(sparsegan.__file__).name == "__init__.py"
