"""The Triton kernels under TRITON_INTERPRET=1, in a process of their own (triton_interpreted.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsegan import triton_kernels


def test_under_the_interpreter_of_triton():
    if reason := triton_kernels.unavailable():
        pytest.skip(reason)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "triton_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
