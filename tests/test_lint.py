"""`make lint`, as tests: the linters that are installed must have nothing to say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [str(p) for p in sorted(ROOT.glob("csrc/**/*")) if p.suffix in (".cpp", ".h", ".cu", ".cuh")]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["clang-format", "--dry-run", "--Werror", *SOURCES],
        ["mypy"],
    ],
    ids=["ruff", "ruff format", "clang-format", "mypy"],
)
def test_linter_is_content(command):
    program = shutil.which(command[0], path=str(Path(sys.executable).parent)) or shutil.which(command[0])
    if not program:
        pytest.skip(f"{command[0]} is not installed: pip install 'sparsegan[dev]'")
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
