"""The import rule of CONTRIBUTING.md: the prune branch and the run branch never meet below compress.py."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparsegan"

GROUND = {"patterns", "formats", "files"}
TRAINING = {"files", "parallel", "training"}
RUN = {"quantize", "ops", "layers", "fuse", "lowering", "graph", "graph_file", "swap", "checkpoint"}
# room: what it may import from the package, besides itself
ALLOWED = {
    "files": set(),
    "patterns": set(),
    "formats": set(),
    "parallel": set(),
    "training": {"files"},
    "prune": GROUND | TRAINING,
    "quantize": GROUND,
    "triton_kernels": GROUND,
    "ops": GROUND | {"triton_kernels"},
    "layers": GROUND | {"quantize", "ops"},
    "fuse": GROUND,
    "lowering": GROUND | {"quantize", "ops", "layers"},
    "graph": GROUND | {"quantize", "ops", "layers", "lowering"},
    "graph_file": GROUND | {"ops", "layers", "graph"},
    "swap": GROUND | RUN,
    "latency": GROUND | {"ops", "layers", "lowering", "graph", "swap"},
    "checkpoint": GROUND | RUN,
    "fetch": set(),
    "models": {"fetch"},
    "metrics": {"fetch"},
    "train": TRAINING | {"models", "metrics", "prune", "patterns"},
}
# These put the branches together, and may import everything.
TOP = {"__init__", "__main__", "cli", "compress", "demo", "report", "systems"}


def rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports."""
    parts = ("sparsegan", *path.relative_to(PACKAGE).with_suffix("").parts)
    package = parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] + [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("sparsegan.")}
    existing = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    return found & existing


FILES = sorted(p for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_what_its_room_may(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in TOP:
        return
    assert room in ALLOWED, f"{room} is not in the table of rooms: say what it may import"
    assert rooms(path) <= ALLOWED[room] | {room}


def test_the_package_never_imports_benchmarks_or_tests():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("benchmarks", "tests") for name in names), path


def test_the_rule_notices_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr("test_imports.PACKAGE", tmp_path)
    for name in ("prune", "swap", "ops", "fuse"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text(
        "import sparsegan.prune\nfrom sparsegan import swap\nfrom ..ops import x\ndef f():\n    from .. import fuse\n"
    )
    assert rooms(tmp_path / "models" / "__init__.py") == {"prune", "swap", "ops", "fuse"}
