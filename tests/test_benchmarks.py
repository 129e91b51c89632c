"""The benchmarks: a wrong kernel gets no speed, ratios and targets are computed right, the JSON is kept."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import bench_layers, bench_models, quality, roofline, shapes
from benchmarks.report import row_table, target_table, targets
from benchmarks.roofline import Ceilings, least_time
from benchmarks.timing import Row, WrongOutputError, check_outputs, rivals_of, time_in_turn
from sparsegan import ops
from sparsegan.formats import pack
from sparsegan.layers import SparseConv2d
from sparsegan.ops.program import Program, Slot, Step, Store
from sparsegan.patterns import BlockPattern, detect_pattern, weight_view
from sparsegan.prune import count_macs
from sparsegan.report import WrongKernelError
from sparsegan.swap import exchange, single

SMALL = shapes.LayerShape("toy", "conv", "conv2d", 8, 16, 6, 3, 1, 1, relu=True)
BLOCK = BlockPattern(8, 4)


class FakeBenchmark:
    """What `time_in_turn` uses of pytest-benchmark's fixture; every call takes two milliseconds."""

    def __init__(self) -> None:
        self.stats: dict[str, float] | None = None
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, target: Callable[[], object], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()
        self.rounds, self.stats = rounds, {"median": 2e-3}


def measure(rows: list[Row], benchmark: FakeBenchmark, dtype: str = "int8") -> None:
    bench_layers.test_layer(SMALL, dtype, 0.75, BLOCK, benchmark, rows, 0.0, False)


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], everywhere: bool) -> None:
    right = SparseConv2d._OP

    def wrong(*args: Any, backend: str | None = None, **kwargs: Any) -> Tensor:
        y = right(*args, backend=backend, **kwargs)
        return change(y) if everywhere or backend != "reference" else y

    monkeypatch.setattr(SparseConv2d, "_OP", staticmethod(wrong))


@pytest.mark.parametrize("dtype", ["int8", "f32"])
def test_a_right_layer_gives_a_row(dtype: str):
    rows: list[Row] = []
    benchmark = FakeBenchmark()
    measure(rows, benchmark, dtype)
    (row,) = rows
    assert row.macs_dense == 16 * 8 * 9 * 36 and row.macs_executed / row.macs_dense == pytest.approx(
        0.25, abs=0.02
    )
    assert row.ms["sparsegan"] == 2.0 and set(row.ms) == {"sparsegan", "eager", "channels_last"}
    assert benchmark.rounds >= 5
    assert json.loads(json.dumps(benchmark.extra_info))["speedup"]["eager"] == row.speedup("eager")


@pytest.mark.parametrize("dtype", ["int8", "f32"])
def test_a_wrong_kernel_gives_no_row(dtype: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, lambda y: y * 1.01, everywhere=False)
    rows: list[Row] = []
    benchmark = FakeBenchmark()
    with pytest.raises(WrongKernelError):
        measure(rows, benchmark, dtype)
    assert rows == [] and benchmark.rounds == 0 and benchmark.extra_info == {}


@pytest.mark.parametrize("dtype", ["int8", "f32"])
def test_a_kernel_as_wrong_as_its_reference_gives_no_row(dtype: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, lambda y: y.roll(1, dims=1), everywhere=True)
    rows: list[Row] = []
    with pytest.raises(WrongOutputError):
        measure(rows, FakeBenchmark(), dtype)
    assert rows == []


def test_a_wrong_model_gives_no_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        bench_models, "swap_to_sparse", lambda pruned, *_: nn.Sequential(pruned, nn.Sigmoid())
    )
    rows: list[Row] = []
    with pytest.raises(WrongOutputError):
        bench_models.test_model("VAE", 1, "f32", 0.75, FakeBenchmark(), rows, 0.0, False)
    assert rows == []


def test_a_right_model_gives_a_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(single, "LAYER_BUDGET", 0.0)
    monkeypatch.setattr(exchange, "MODEL_BUDGET", 0.0)
    rows: list[Row] = []
    bench_models.test_model("VAE", 1, "int8", 0.75, FakeBenchmark(), rows, 0.0, False)
    (row,) = rows
    assert row.layer == "" and row.batch == 1 and row.macs_executed <= row.macs_dense
    assert row.what.startswith("trained; ") and row.what.endswith(" layers swapped")


def test_chain_tells_what_a_further_layer_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_layers, "REFERENCE_LAYER", replace(SMALL, inputs=16))
    rows: list[Row] = []
    bench_layers.test_chain(BLOCK, 0.75, FakeBenchmark(), rows, 0.0, False)
    (row,) = rows
    assert row.steady_ms == pytest.approx((2.0 - row.ms["first layer"]) / 3)
    assert row.macs_dense == 4 * 16 * 16 * 9 * 36
    assert row.steady_macs == pytest.approx(16 * 16 * 9 * 36 / 4, rel=0.05)


def test_nothing_is_reported_when_benchmarks_are_disabled():
    class Disabled(FakeBenchmark):
        def pedantic(self, target: Callable[[], object], setup: Callable[[], None], rounds: int) -> None:
            setup()

    rows: list[Row] = []
    measure(rows, Disabled())
    assert rows == []


def test_contenders_take_turns():
    calls: list[str] = []
    benchmark = FakeBenchmark()
    rivals = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    time_in_turn(benchmark, lambda: calls.append("ours"), rivals, "int8", 0.0)
    once = ["a", "a", "b", "b", "ours", "ours"]
    assert calls == once * (2 + benchmark.rounds)


def test_check_outputs_lets_int8_round():
    x, dense = SMALL.input(1), SMALL.build()
    (layer,) = bench_layers.sparse_layers(dense, x, "int8", BLOCK)
    kernel_error, dense_error = check_outputs(layer, dense, x, "int8")
    assert kernel_error < 1e-3 and 0 < dense_error < 0.05


def test_rivals_compute_the_same():
    x, dense = SMALL.input(2), SMALL.build()
    rivals = rivals_of(dense, x, with_compile=False)
    assert list(rivals) == ["eager", "channels_last"]
    torch.testing.assert_close(rivals["eager"](), rivals["channels_last"]())
    assert list(rivals_of(nn.Linear(3, 3), torch.ones(1, 3), with_compile=False)) == ["eager"]


@pytest.mark.parametrize("shape", shapes.LAYERS, ids=str)
def test_every_shape_can_be_built(shape: shapes.LayerShape):
    if shape.inputs * shape.outputs * shape.size**2 > 2**26:
        pytest.skip("large")
    dense, x = shape.build(), shape.input(1)
    assert dense(x).shape[1] == shape.outputs
    pruned = bench_layers.prune_all(dense, x, 0.75, BLOCK)
    assert detect_pattern(weight_view(pruned[0])) is not None
    assert sum(count_macs(dense, (x,)).values()) > 0


def test_random_weights_are_said_to_be_random(monkeypatch: pytest.MonkeyPatch):
    def offline() -> nn.Sequential:
        raise RuntimeError("no network")

    monkeypatch.setattr(shapes, "load_faces", offline)
    built = shapes.build_model("face DCGAN")
    assert "random weights" in built.note
    assert built.model(*built.inputs(1)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="face DCGAN, DCGAN-64"):
        shapes.build_model("nosuch")


def test_the_residual_model_makes_images():
    built = shapes.build_model("residual GAN")
    with torch.no_grad():
        assert built.model(*built.inputs(2)).shape == (2, 3, 32, 32)


def a_row(**fields: Any) -> Row:
    reference = shapes.REFERENCE_LAYER
    row = Row(
        model=reference.model,
        layer=reference.layer,
        what=reference.description,
        batch=1,
        dtype="int8",
        sparsity=0.0,
        pattern="8x4",
        macs_dense=4_000_000_000,
        macs_executed=1_000_000_000,
        peak_gmacs=1000.0,
        kernel_error=0.0,
        dense_error=0.0,
        ms={"sparsegan": 2.0, "eager": 8.0},
    )
    return replace(row, **fields)


class TestReport:
    def test_figures(self):
        row = a_row()
        assert row.executed_gmacs == 500 and row.dense_equivalent_gmacs == 2000 and row.peak_share == 0.5
        assert row.speedup("eager") == 4.0 and row.speedup("compile") is None
        assert row.steady_peak_share is None
        steady = a_row(steady_ms=1.0, steady_macs=9e8)
        assert steady.steady_peak_share == pytest.approx(0.9)
        assert a_row(peak_gmacs=0.0).peak_share == 0.0

    def verdicts(self, rows: list[Row]) -> dict[str, str]:
        return {target.text: target.verdict for target in targets(rows)}

    def test_nothing_measured(self):
        assert set(self.verdicts([]).values()) == {"not measured"}

    def test_best_block_counts(self):
        key = "3x3 256→256 at 32x32, int8, density 1.00: share of the peak, float in and out"
        slow, fast = a_row(), a_row(pattern="4x4", ms={"sparsegan": 1.2, "eager": 8.0})
        assert self.verdicts([slow])[key] == "NOT MET"
        assert self.verdicts([slow, fast])[key] == "met"
        (target,) = [target for target in targets([slow, fast]) if target.text == key]
        assert "4x4" in target.source and target.value == pytest.approx(0.8333, abs=1e-3)
        assert self.verdicts([replace(fast, sparsity=0.75)])[key] == "not measured"

    def test_faces(self):
        faces = a_row(model="face DCGAN", layer="", sparsity=0.75, ms={"sparsegan": 1.0, "eager": 9.0})
        verdicts = self.verdicts([faces, replace(faces, batch=16)])
        assert verdicts["face DCGAN, int8, 75 % removed, batch 1: times eager float32"] == "NOT MET"
        assert verdicts["face DCGAN, int8, 75 % removed, batch 16: times eager float32"] == "met"

    def test_the_slowest_dense_row_counts(self):
        key = "density 1.00, int8: the slowest of all rows, times eager float32"
        slow = a_row(model="toy", layer="x", ms={"sparsegan": 2.0, "eager": 1.8})
        assert self.verdicts([a_row()])[key] == "met"
        assert self.verdicts([a_row(), slow])[key] == "NOT MET"
        assert self.verdicts([a_row(), replace(slow, sparsity=0.75)])[key] == "met"

    def test_tables(self):
        console = Console(width=220, color_system=None)
        with console.capture() as capture:
            console.print(row_table("layers", [a_row(steady_ms=1.0, steady_macs=9e8)]))
            console.print(target_table(targets([a_row()])))
        shown = capture.get()
        for part in ("SD VAE decoder", "4.00", "50%", "90%", "NOT MET", "not measured"):
            assert part in shown


def test_a_run_keeps_its_json(tmp_path: Path):
    """The real thing, as `make bench` runs it, on the smallest layer."""
    path = tmp_path / "bench.json"
    options = ["-k", "main.12 and int8", "--no-compile", "--row-seconds=0", f"--benchmark-json={path}"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "face DCGAN main.12" in result.stdout and "targets" in result.stdout
    written = json.loads(path.read_text())
    assert len(written["benchmarks"]) == 3 and len(written["targets"]) > 5
    assert all(entry["extra_info"]["executed_gmacs"] > 0 for entry in written["benchmarks"])
    assert "data" not in written["benchmarks"][0]["stats"]
    assert f'"{platform.node()}"' not in path.read_text() and os.getcwd() not in path.read_text()


def test_the_bound_of_a_program_by_hand():
    view = torch.zeros(8, 9, 64, dtype=torch.int8)
    view[:, :3] = 1  # a third of the blocks
    conv = Step("conv2d", 0, (Store(~0),), pack(view, torch.int8, (8, 4)), kernel_size=(3, 3), padding=(1, 1))
    program = Program((Slot(64, "u8", 0.1),), (Step("pointwise", ~0, (Store(0),)), conv), 1, 1)
    shape = (2, 64, 5, 5)
    dense, kept, pixels = 8 * 9 * 64, 8 * 3 * 64, 2 * 5 * 5
    copies = {1: 1e30}
    vector = least_time(program, [shape], Ceilings(vector=1.0, matrix=2.0, copies=copies))
    epilogue = 8 * 2 * 4  # of the 8 sums of a pixel: to float and scale, each as long as four multiply-adds
    assert vector == pytest.approx(((kept + epilogue) * pixels / 1e9, dense * pixels, kept * pixels))
    matrix = least_time(program, [shape], Ceilings(vector=1.0, matrix=9.0, copies=copies))
    assert matrix[0] == pytest.approx(dense * pixels / 9e9)
    bytes_only = least_time(program, [shape], Ceilings(vector=1e30, matrix=0.0, copies={1000: 1e3}))
    moved = 64 * pixels * (4 + 1) + 64 * pixels + 8 * pixels * 4 + kept
    assert bytes_only[0] == pytest.approx(moved / 1e3)


@pytest.mark.skipif(ops.extension_error() is not None, reason=str(ops.extension_error()))
def test_ceilings_are_measured():
    ceilings = roofline.measure()
    assert ceilings.vector > 1 and (ceilings.matrix > 0) == (ops.available_isas()[0] == "avx512_amx")
    assert all(rate > 0 for rate in ceilings.copies.values())
    assert ops.isa() == ops.available_isas()[0] or "SPARSEGAN_ISA" in os.environ


def test_the_quality_page_has_a_line_for_each_row_and_a_point_for_each_that_was_compressed():
    facts = {"removed": 0.5, "kid": 12.3, "kid of scaled features": 1.2, "precision": 0.8, "recall": 0.7}
    facts |= {"psnr": 30.0, "ssim": 0.9, "ms": 0.5, "steps": 1600, "minutes": 2.0}
    found = {"dense": facts | {"ms": 4.0, "psnr": 99.0}, "dense int8": facts | {"ms": 1.0}}
    found |= {"blocks 4x4, 50 %": facts, "blocks 4x4, 75 %": facts | {"ms": 0.25, "kid": 50.0}}
    lines = quality.render(found).splitlines()
    assert (
        "| blocks 4x4, 50 % | 50% | 12 | 1.20 | 0.80 | 0.70 | 30.0 | 0.900 | 0.500 | 8.0 | 2.00 | 1600 | 2.0 |"
        in lines
    )
    assert "| dense | 50% | 12 | 1.20 | 0.80 | 0.70 | – | 0.900 | 4.000 | 1.0 | 0.25 | 1600 | 2.0 |" in lines
    assert quality.families(found) == {"blocks 4x4": [(8.0, 12.3), (16.0, 50.0)]}
    assert all(row.model in ("eager", "int8", "magnitude", "compress") for row in quality.ROWS.values())
