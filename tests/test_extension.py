"""What makes one build load under every torch: the extension asks torch for nothing but its stable C interface."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sparsegan
from sparsegan import ops


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


def test_kernels_of_one_instruction_set_stay_inside_their_file(symbols):
    # A template that two files instantiate is merged by the linker: the AVX-512 copy would run on every CPU.
    exported = [name for kind, name in symbols if kind in "TWVu" and "sparsegan" in name]
    assert not [name for name in exported if "Simd" in name or "compute_tile" in name]


def test_version_is_known():
    assert re.match(r"\d+\.\d+", __import__("importlib.metadata").metadata.version("sparsegan"))
    assert Path(sparsegan.__file__).name == "__init__.py"
