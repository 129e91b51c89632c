"""Without Triton, or with one too old or broken: one clear reason, and everything else works. In processes of their own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
import sys, types
{before}
import torch
import sparsegan
from sparsegan import ops, triton_kernels
from sparsegan.formats import pack

print(triton_kernels.describe())
x, packed = torch.ones(3, 8), pack(torch.ones(8, 1, 8))
y = ops.block_linear(x, packed)
assert torch.equal(y, torch.full((3, 8), 8.0))
try:
    triton_kernels.autotune(True)
except RuntimeError as error:
    assert str(error) == triton_kernels.describe()
else:
    raise SystemExit("autotune did nothing and said nothing")
try:
    ops.block_linear(x, packed, backend="triton")
except sparsegan.BackendError as error:
    print(error)
else:
    raise SystemExit("an explicit choice fell back")
"""
CASES = {
    "absent": ("sys.modules['triton'] = None", "triton is not installed (pip install triton)"),
    "too old": (
        "old = types.ModuleType('triton'); old.__version__ = '2.1.0'; old.__spec__ = types.SimpleNamespace()\n"
        "sys.modules['triton'] = old",
        "triton 2.1.0 is too old, wanted 3.7 or later",
    ),
    "broken": (
        "broken = types.ModuleType('triton'); broken.__version__ = '3.7.1'; broken.__spec__ = types.SimpleNamespace()\n"
        "sys.modules['triton'] = broken",
        "triton does not load: ",
    ),
}


@pytest.mark.parametrize(("before", "said"), CASES.values(), ids=CASES)
def test_one_clear_reason(before, said):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM).format(before=before)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith(said)
    assert "\n".join(rest).startswith("block_linear: no backend 'triton' can run this input")
    assert any(line.strip().startswith(f"triton: {said}") for line in rest), rest
