"""The checks of the CUDA kernels find what was planted in them: for each bug of planted_bugs.py, each check that must see it.

A copy of csrc/cuda with one line changed is compiled, for few tiles, and put to the check; the true source passes the same.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from emulator.build import CHECKS, CUDA, HERE, SANITIZERS, unavailable
from emulator.build import run as run_checks
from planted_bugs import BUGS, Bug
from ptx import PtxError, device
from ptx.device import KERNELS, Device, Library
from ptx.layers import Layer, run

EMULATED = {"emulator": "none", "threads": "thread", "addresses": "address"}  # the sanitizer of a check
BANK_CONFLICTS = 1.05

# (type, 2:4, block): what the emulator's check gets to choose from, both sizes of tiles
BLOCKS = [
    ("Uint8", False, 32, 32),
    ("Uint8", False, 16, 32),
    ("Float16", False, 16, 16),
    ("Uint8", True, 32, 64),
    ("Float16", True, 32, 32),
]
TYPES = {"u8": "Uint8", "f16": "Float16", "bf16": "BFloat16"}


def block_of(layer: Layer) -> tuple[str, bool, int, int]:
    return TYPES[layer.kind], layer.two_four, *layer.block


def copy(folder: Path, blocks: list, bug: Bug | None) -> Path:
    """The CUDA sources in `folder`, with the bug, and only the tiles of these blocks. Returns where they are."""
    place = folder / "csrc" / "cuda"
    shutil.copytree(CUDA, place)
    shutil.copy(CUDA.parent / "packed.h", place.parent)
    rows = re.compile(r"^ *\{Type::k(\w+), (true|false), (\d+), (\d+),.*\n", re.M)
    names = [f"{kind}, {str(two_four).lower()}, {o}, {k}" for kind, two_four, o, k in blocks]
    kept = []

    def narrow(row: re.Match) -> str:
        wanted = ", ".join(row.groups()) in names
        kept.append(wanted)
        return row[0] if wanted else ""

    tiles = place / "tile.h"
    tiles.write_text(rows.sub(narrow, tiles.read_text()))
    assert sum(kept) == 2 * len(blocks), f"tile.h: {sum(kept)} of {len(kept)} rows are those of {names}"
    if bug is not None:
        file = place / bug.file
        old = re.compile(r"\s+".join(re.escape(word) for word in bug.old.split()))  # however lines are broken
        text, times = old.subn(lambda _: bug.new, file.read_text())
        assert times == 1, f"{bug.file} has it {times} times, wanted is once: {bug.old}"
        file.write_text(text)
    return place


class Laboratory:
    """Builds and runs the checks, several at a time, in the order they are asked for. What they say of the source is None if
    they find nothing wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self.setup = device.build_script()
        self.cuda = self.setup.find_cuda()
        self.begun: dict[tuple, Future] = {}
        self.probed: dict[str, str | None] = {}
        self.interpreted: dict[tuple[Bug | None, Layer], str | None] = {}

    def missing(self, check: str) -> str | None:
        """Why a check cannot be made here."""
        if check not in EMULATED:
            return self.cuda.missing
        if check not in self.probed:
            self.probed[check] = unavailable(self.folder, EMULATED[check])
        return self.probed[check]

    def new_folder(self, *names: str) -> Path:
        place = self.folder / re.sub(r"\W+", "-", " ".join(names))
        place.mkdir()
        return place

    def once(self, function: Callable, *arguments) -> Future:
        """function(*arguments), begun at the first call. It may wait for what was begun before it."""
        key = function.__name__, *arguments
        if key not in self.begun:
            self.begun[key] = self.pool.submit(function, *arguments)
        return self.begun[key]

    def begin(self, check: str, bug: Bug | None, of: Bug) -> Future:
        """What `check` says of the sources with `bug` (None: as they are), as far as bug `of` concerns it.

        Of the interpreter it is the library to run, which has to be done by the caller.
        """
        if check in EMULATED:
            self.once(self.objects, check)
            return self.once(self.emulate, check, of.kernel, bug)
        if check == "ptxas":
            return self.once(self.assemble, bug, block_of(of.layer))
        return self.once(self.library, bug, block_of(of.layer))

    def objects(self, check: str) -> dict[str, Path]:
        """Object files of the true kernels and of the emulator's driver, by their stems."""
        folder = self.new_folder(check, "objects")
        sources = copy(folder, BLOCKS, None)
        here = [sources / f"{name}.cu" for name in KERNELS] + [HERE / f"{name}.cpp" for name in CHECKS]
        for source in here:
            self.compile(check, sources, source, folder / f"{source.stem}.o")
        return {source.stem: folder / f"{source.stem}.o" for source in here}

    def compile(self, check: str, sources: Path, source: Path, made: Path) -> None:
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", *SANITIZERS[EMULATED[check]]]
        call(["g++", *flags, "-x", "c++", f"-I{sources}", f"-I{HERE}", "-c", source, "-o", made])

    def emulate(self, check: str, kernel: str, bug: Bug | None) -> str | None:
        folder = self.new_folder(check, kernel, bug.name if bug else "true")
        objects = dict(self.once(self.objects, check).result())
        if bug:
            sources = copy(folder, BLOCKS, bug)
            objects[kernel] = folder / f"{kernel}.o"
            self.compile(check, sources, sources / f"{kernel}.cu", objects[kernel])
        program = folder / "main"
        call(["g++", *SANITIZERS[EMULATED[check]], *objects.values(), "-o", program])
        small = [] if check == "emulator" and kernel != "gather_gemm" else ["--small"]
        outcome = run_checks(program, *small, kernel)
        program.unlink()
        return None if outcome.found_by == "ok" else f"{outcome.found_by}: {outcome.output}"

    def library(self, bug: Bug | None, block: tuple[str, bool, int, int]) -> Library:
        folder = self.new_folder("ptx", bug.name if bug else f"true {block}")
        sources = copy(folder, [block], bug)
        for name in set(KERNELS) - {"gather_gemm"}:
            (sources / f"{name}.cu").unlink()
        return Library(sources, folder / "kept")

    def assemble(self, bug: Bug | None, block: tuple[str, bool, int, int]) -> str | None:
        folder = self.new_folder("ptxas", bug.name if bug else "true")
        sources = copy(folder, [block], bug)
        command = [
            self.cuda.nvcc,
            *self.setup.CUDA_FLAGS,
            "-arch=sm_80",
            "-Xptxas=-v",
            f"-I{sources}",
            "-cubin",
        ]
        said = call([*command, sources / "gather_gemm.cu", "-o", folder / "made"]).stderr
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
        assert spilled, said
        return f"spills {max(spilled)} bytes" if any(spilled) else None


def call(command: list, check: bool = True, **options) -> subprocess.CompletedProcess:
    command = ["nice", *(str(c) for c in command)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600, **options)
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done


def interpret(library: Library, layer: Layer) -> str | None:
    """What the interpreter says of a layer: a mistake, wrong results, bank conflicts, or nothing."""
    machine = Device(library)
    try:
        y, wanted = run(layer, machine)
    except (PtxError, AssertionError) as error:
        return str(error)
    if wrong := int((y != wanted).sum()):
        return f"{wrong} of {y.size} differ"
    (cost,) = [cost for name, cost in machine.costs.items() if "gather_gemm_kernel" in name]
    conflicts = cost.figures(cost.main_loop()).bank_conflicts
    return f"bank conflicts: {conflicts:.2f}" if conflicts > BANK_CONFLICTS else None


PAIRS = [pytest.param(bug, check, id=f"{bug.name}: {check}") for bug in BUGS for check in bug.caught]


@pytest.fixture(scope="module")
def laboratory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Laboratory]:
    lab = Laboratory(tmp_path_factory.mktemp("planted"))
    wanted = [
        i.callspec.params for i in request.session.items if getattr(i, "function", None) is test_bug_is_caught
    ]
    for source in (False, True):  # the true sources first
        for item in wanted:
            bug, check = item["bug"], item["check"]
            if not lab.missing(check):
                lab.begin(check, bug if source else None, bug)
    yield lab
    lab.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("bug", "check"), PAIRS)
def test_bug_is_caught(laboratory: Laboratory, bug: Bug, check: str) -> None:
    if reason := laboratory.missing(check):
        pytest.skip(reason)

    def says(planted: Bug | None) -> str | None:
        said = laboratory.begin(check, planted, bug).result()
        if check != "interpreter":
            return said
        key = planted, bug.layer
        if key not in laboratory.interpreted:
            laboratory.interpreted[key] = interpret(said, bug.layer)
        return laboratory.interpreted[key]

    assert says(None) is None, "the source as it is fails the check"
    said = says(bug)
    assert said is not None, "not caught"
    assert re.search(bug.caught[check], said, re.S), f"caught, but for another reason: {said[-3000:]}"


def test_every_check_is_needed() -> None:
    """Each finds bugs, all sorts of which are there; the names are distinct, as folders too."""
    assert {check for bug in BUGS for check in bug.caught} == {*EMULATED, "interpreter", "ptxas"}
    assert len({re.sub(r"\W+", "-", bug.name) for bug in BUGS}) == len(BUGS)
    alone = {
        check: [b.name for b in BUGS if list(b.caught) == [check]]
        for check in ("interpreter", "threads", "ptxas")
    }
    assert all(alone.values())
