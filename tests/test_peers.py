"""The comparison with peers: a wrong peer never counts, nothing crashes a run, ratios are right. No peer is needed."""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.generators import GENERATORS, Generator, MissingPackageError, prune_uniformly
from benchmarks.peers import __main__ as command
from benchmarks.peers import contest, report
from benchmarks.peers.contestants import CONTESTANTS, Call, Case, Contender, Contestant, NotApplicableError
from sparsegan.models import StyleGAN2Generator, seeded
from sparsegan.patterns import BlockPattern, detect_pattern, weight_view

# The generators.


@pytest.mark.parametrize("name", ["mlp", "dcgan", "vae"])
def test_small_generators_are_built(name: str):
    generator = GENERATORS[name]
    assert generator.batches == (1, 16)
    (x,) = generator.inputs(2)
    images = generator.build()(x)
    assert images.shape == (2, 784) if name == "mlp" else (2, 3, 64, 64)
    assert torch.equal(x, generator.inputs(2)[0]) and not torch.equal(x, generator.inputs(2, seed=1)[0])


def test_all_generators_are_there():
    assert list(GENERATORS) == [generator.name for generator in GENERATORS.values()]
    assert len(GENERATORS) == 12
    (image,) = GENERATORS["unet"].inputs(1)
    assert image.shape == (1, 3, 256, 256) and -1 <= image.min() < -0.9 and 0.9 < image.max() <= 1


@pytest.mark.parametrize("name", ["taesd", "sd-256"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingPackageError, match="pip install diffusers"):
        GENERATORS[name].build()


def test_taesd_is_that_of_diffusers():
    pytest.importorskip("diffusers")
    model = GENERATORS["taesd"].build()
    assert model(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)


class TestPruning:
    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(16, 32),
            nn.Conv2d(32, 16, 3),
            nn.ConvTranspose2d(16, 64, 4),
            nn.Conv2d(64, 64, 3, groups=64),
            nn.Conv2d(64, 3, 3),
        )

    @pytest.mark.parametrize("density", [0.25, 0.1])
    @pytest.mark.parametrize("block", [(8, 4), (4, 4)])
    def test_every_wide_layer_has_the_density(self, density: float, block: tuple[int, int]):
        model = self.model()
        wide, untouched = model[:3], [layer.weight.clone() for layer in model[3:]]
        assert prune_uniformly(model, density, block) is model
        for layer in wide:
            kept = BlockPattern(*block).group_sums(weight_view(layer) != 0) > 0
            assert int(kept.sum()) == max(1, round(density * kept.numel()))
            assert str(detect_pattern(weight_view(layer))) == f"{block[0]}x{block[1]}"
        assert all(torch.equal(layer.weight, old) for layer, old in zip(model[3:], untouched, strict=True))

    def test_the_largest_blocks_stay_and_of_equal_ones_the_earlier(self):
        layer = nn.Linear(16, 16)
        layer.weight.data.fill_(1.0)
        layer.weight.data[8:, 12:] *= 2
        prune_uniformly(nn.Sequential(layer), 0.25)
        assert bool((layer.weight[8:, 12:] == 2).all() and (layer.weight[:8, :4] == 1).all())
        assert int(layer.weight.count_nonzero()) == 2 * 32

    def test_demodulation_follows(self):
        model = prune_uniformly(seeded(lambda: StyleGAN2Generator(8, 16, 256, 32, 1), 1), 0.25)
        layer = model.conv
        torch.testing.assert_close(layer.energy, layer.conv.weight.square().sum((2, 3)))

    @pytest.mark.parametrize("density", [0.0, 1.5])
    def test_impossible_density(self, density: float):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            prune_uniformly(self.model(), density)


# The contest.


def tiny() -> Generator:
    return Generator(
        "tiny",
        "tiny GAN",
        lambda: seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), 1),
        (16,),
        calibrations=2,
    )


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tiny(), 3, tmp_path)


def contestant(prepare: Callable[[Case], Call], name: str = "peer") -> Contestant:
    return Contestant(name, lambda case: Contender(prepare(case), case.reference))


def refuse(error: Exception) -> Callable[[Case], Call]:
    def prepare(case: Case) -> Call:
        raise error

    return prepare


def test_compare_knows_wrong_from_rounded():
    reference = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert contest.compare(reference.clone(), reference) == (0.0, math.inf)
    error, psnr = contest.compare(reference + 0.1, reference)
    assert error == pytest.approx(0.1) and psnr == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-3)
    assert contest.compare((reference + 0.1).numpy(), reference)[0] == pytest.approx(0.1)
    assert contest.compare(reference.bfloat16(), reference)[0] == 0.0
    for wrong in (reference[:2], reference * math.nan):
        assert contest.compare(wrong, reference) == (math.inf, -math.inf)


@pytest.mark.parametrize(("factor", "state"), [(1.2, "valid"), (1.3, "not valid"), (math.nan, "not valid")])
def test_a_wrong_output_is_not_valid(case: Case, factor: float, state: str):
    entry, call = contest.enter(contestant(lambda case: lambda: case.model(case.x) * factor), case, 10.0)
    assert entry["state"] == state
    assert call is not None  # timed all the same, and listed
    assert state == "valid" or "0.25 allowed" in entry["reason"]


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (NotApplicableError("the same as eager"), "left out", "the same as eager"),
        (ImportError("No module named 'peer'\nand more"), "failed", "ImportError: No module named 'peer'"),
        (OSError("no /a/folder/x.so, and/or"), "failed", "OSError: no .../x.so, and/or"),
        (RuntimeError(), "failed", "RuntimeError: "),
    ],
)
def test_what_cannot_be_built_is_listed_with_its_reason(
    case: Case, error: Exception, state: str, reason: str
):
    entry, call = contest.enter(contestant(refuse(error)), case, 10.0)
    assert (entry["state"], entry["reason"], call) == (state, reason, None)


def test_what_takes_too_long_is_listed(case: Case):
    def prepare(case: Case) -> Call:
        with suppress(Exception):  # as packages do that try another way then
            time.sleep(5)
        return lambda: case.reference

    entry, call = contest.enter(contestant(prepare), case, 0.05)
    assert entry["state"] == "failed" and "longer than" in entry["reason"] and call is None
    assert entry["build_s"] < 2


def test_nobody_always_follows_the_same_one():
    names = ["a", "b", "c"]
    orders = [contest.rotated(names, number) for number in range(6)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names)
    follows = {pair for order in orders for pair in pairwise(order)}
    assert len(follows) == 6
    assert [contest.rotated(["a", "b"], number)[0] for number in range(4)] == ["a", "b", "b", "a"]
    assert contest.rotated([], 3) == []


def test_contestants_take_turns_and_those_that_break_drop_out():
    calls: list[str] = []

    def breaks() -> None:
        calls.append("b")
        if calls.count("b") > 4:
            raise RuntimeError("broken")

    contenders: dict[str, Call] = {"a": lambda: calls.append("a"), "b": breaks}
    peaks: list[int] = []
    rounds, failed = contest.take_turns(contenders, 0.0, 0.0, 3, lambda: peaks.append(1))
    assert len(rounds["a"]) == 3 == len(peaks) and "b" not in rounds
    assert failed == {"b": "RuntimeError: broken"}
    assert calls == list("aabb" + "bbaa" + "baa")


@pytest.fixture
def row(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> report.Row:
    """A real contest of those contestants that need nothing but torch, with one that crashed before."""
    monkeypatch.setattr("sparsegan.swap.single.LAYER_BUDGET", 0.0)
    monkeypatch.setattr("sparsegan.swap.exchange.MODEL_BUDGET", 0.0)
    monkeypatch.setattr(contest, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(contest, "TURN_SECONDS", 0.0)
    names = ("eager", "eager channels_last", "eager bf16", "sparsegan 1 8x4", "sparsegan 0.25 8x4", "compile")
    chosen = [CONTESTANTS[name] for name in names]
    with torch.no_grad():
        return contest.contest(
            case, chosen, {"compile": "the process was ended by SIGSEGV"}, False, tmp_path / "now"
        )


def test_a_contest_gives_a_row(row: report.Row, tmp_path: Path):
    entries = row["contestants"]
    assert {name: entry["state"] for name, entry in entries.items()} == {
        "eager": "valid",
        "eager channels_last": "left out",
        "eager bf16": "valid",
        "sparsegan 1 8x4": "valid",
        "sparsegan 0.25 8x4": "valid",
        "compile": "failed",
    }
    assert entries["eager"]["error"] == 0 and 0 < entries["eager bf16"]["error"] < 0.05
    sparse = entries["sparsegan 0.25 8x4"]
    assert sparse["macs_dense"] == 3 * 2 * 16 * 32 and sparse["density"] == 0.25 and sparse["block"] == (8, 4)
    assert sparse["kernel_error"] < 1e-3
    assert all(len(entries[name]["rounds_ms"]) == contest.LEAST_ROUNDS for name in report.timed(row))
    assert (tmp_path / "now").read_text() == ""
    json.dumps(row)


def test_a_wrong_kernel_is_not_valid(case: Case, monkeypatch: pytest.MonkeyPatch):
    def wrong(*_: object) -> float:
        raise contest.WrongKernelError("the kernels differ")

    monkeypatch.setattr(contest, "check_kernels", wrong)
    sparse = Contestant(
        "ours", lambda case: Contender(lambda: case.reference, case.reference, {}, case.model), 1.0
    )
    entry, call = contest.enter(sparse, case, 10.0)
    assert entry["state"] == "not valid" and "differ" in entry["reason"] and call is None


# The report.


def a_row(batch: int = 1, title: str = "toy GAN", **ms: float) -> report.Row:
    """Peers a, b, ... by keyword; "b" is never valid. Ours are ours_1 and ours_25."""
    entries: dict[str, dict[str, Any]] = {}
    for name, value in ms.items():
        entries[name] = {"state": "valid", "reason": None, "ms": value, "error": 0.01, "density": None}
        if name.startswith("ours"):
            entries[name] |= {"density": int(name[5:]) / 100, "block": (8, 4), "macs_executed": 1e9}
    if "b" in entries:
        entries["b"] |= {"state": "not valid", "reason": "off by 0.9", "error": 0.9}
    entries["gone"] = {"state": "failed", "reason": "ImportError: no", "density": None}
    return {"model": title, "title": title, "batch": batch, "peak_gmacs": 1000.0, "contestants": entries}


ROW = a_row(eager=8.0, a=4.0, b=0.1, ours_100=5.0, ours_25=2.0)


def test_the_best_peer_is_valid_and_not_ours():
    assert report.best_peer(ROW) == "a"
    assert report.best_peer(a_row(b=1.0, ours_25=1.0)) is None
    assert report.ratio(ROW, "ours_25", "a") == 2.0 and report.ratio(ROW, "ours_25", "eager") == 4.0
    assert report.ratio(ROW, "ours_25", "b") is None and report.ratio(ROW, "gone", "a") is None


def test_means_are_geometric_and_of_batch_one():
    rows = [
        ROW,
        a_row(eager=8.0, a=16.0, ours_100=4.0, ours_25=1.0),
        a_row(batch=16, eager=8.0, ours_100=8e9, ours_25=8e9),
    ]
    first, second = report.means(rows)
    assert first["variant"] == "ours_100" and first["models"] == 2 and first["wins"] == 1
    assert first["x_best_peer"] == pytest.approx((0.8 * 2.0) ** 0.5)
    assert second["wins"] == 2 and second["x_best_peer"] == pytest.approx((2.0 * 8.0) ** 0.5)
    assert second["x_eager"] == pytest.approx((4.0 * 8.0) ** 0.5)
    (nothing,) = report.means([a_row(ours_25=1.0)])
    assert nothing["models"] == 0 and nothing["x_best_peer"] is None


def test_markdown_says_what_loses_and_what_is_wrong():
    failed = {"model": "x", "title": "big", "batch": 1, "contestants": {}, "failed": "hung"}
    text = report.markdown({"machine": {"cpu": "fast"}, "rows": [ROW, a_row(batch=16), failed]})
    assert "| toy GAN | 1 | ours_100 | 5 | a | 4 | 0.80 (loses) | 1.60 | 1 | 20% |" in text
    assert "| toy GAN | 1 | ours_25 | 2 | a | 4 | 2.00 | 4.00 | 1 | 50% |" in text
    assert "toy GAN, batch 1, b: not valid: off by 0.9" in text
    assert "toy GAN, batch 1, gone: failed: ImportError: no" in text
    assert "big, batch 1: hung" in text
    times = next(line for line in text.splitlines() if line.startswith("| toy GAN | 1 | 8 |"))
    assert "(0.1)" in times, "the time of a wrong one is in brackets"


def test_chart_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    report.chart({"rows": [ROW, a_row(batch=16)]}, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


# The command.


def test_a_contestant_that_crashes_the_process_is_left_out_of_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tries: list[dict[str, str]] = []

    def run(arguments: list[str], output: StringIO) -> str:
        folder, skip = Path(arguments[5]), json.loads(arguments[arguments.index("--skip") + 1])
        tries.append(skip)
        for name in ("compile", "OpenVINO"):
            if name not in skip:
                (folder / "now").write_text(name)
                return "the process was ended by SIGSEGV"
        (folder / "row.json").write_text(json.dumps(ROW))
        return "it ended with exit code 0"

    monkeypatch.setattr(command, "_run", run)
    assert command.measure(tiny(), 1, ["eager"], False, tmp_path / "log") == json.loads(json.dumps(ROW))
    assert [list(skip) for skip in tries] == [[], ["compile"], ["compile", "OpenVINO"]]


def test_a_contest_that_cannot_even_start_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "_run", lambda *_: "it ended with exit code 1")
    row = command.measure(tiny(), 1, ["eager"], False, tmp_path / "log")
    assert row["contestants"] == {} and row["failed"] == "it ended with exit code 1, see log"
    assert report.best_peer(row) is None


def test_contests_run_without_what_would_distort_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    program = "import os; raise SystemExit(7 if 'OPENBLAS_CORETYPE' in os.environ else 0)"
    with (tmp_path / "log").open("w") as output:
        assert command._run([sys.executable, "-c", program], output) == "it ended with exit code 0"
        killed = "import os; os.kill(os.getpid(), 9)"
        assert command._run([sys.executable, "-c", killed], output) == "the process was ended by SIGKILL"
        monkeypatch.setattr(command, "_LIMIT", 0.2)
        assert "hung" in command._run([sys.executable, "-c", "import time; time.sleep(9)"], output)


def test_results_are_kept_after_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(generator: Generator, batch: int, *_: object) -> report.Row:
        if (generator.name, batch) == ("vae", 16):
            raise KeyboardInterrupt
        return a_row(batch, generator.name, eager=8.0, ours_25=2.0)

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(report, "chart", lambda *_: None)
    folder = ["--results", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        command.main(["--models", "mlp,vae", *folder])
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert [(row["model"], row["batch"]) for row in rows] == [("mlp", 1), ("mlp", 16), ("vae", 1)]
    assert command.main(["--models", "unet", "--add", *folder]) == 0
    results = json.loads((tmp_path / "peers.json").read_text())
    assert len(results["rows"]) == 4 and results["means"][0]["models"] == 3
    assert results["machine"]["threads"] == 2
    assert "unet" in (tmp_path / "peers.md").read_text()
    with pytest.raises(SystemExit):
        command.main(["--models", "nosuch", *folder])


def test_contestants_are_known_by_name():
    assert list(CONTESTANTS) == [contestant.name for contestant in CONTESTANTS.values()]
    ours = [(c.density, c.block) for c in CONTESTANTS.values() if c.density]
    assert ours == [
        (1.0, (8, 4)),
        (0.25, (8, 4)),
        (0.1, (8, 4)),
        (0.25, (4, 4)),
        (0.25, (16, 4)),
        (0.1, (16, 4)),
        (0.25, None),
        (0.1, None),
    ]


def test_narrower_layers_are_compared_with_themselves(case: Case):
    case.generator = replace(
        case.generator,
        build=lambda: seeded(lambda: nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), 1),
    )
    with torch.no_grad():
        contender = CONTESTANTS["sparsegan 0.25 channels"].build(case)
    assert contender.facts["macs_dense"] == 3 * 2 * 16 * 64
    assert contender.facts["macs_executed"] == contender.facts["macs_dense"] / 4
    error, _ = contest.compare(contender.call(), contender.reference)
    assert error < 0.15 < contest.compare(contender.call(), case.reference)[0]


def test_each_package_is_missed_by_its_own_contestants_only(case: Case, monkeypatch: pytest.MonkeyPatch):
    for package in ("openvino", "nncf", "onnxruntime", "onnx", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    with torch.no_grad():
        for name in ("OpenVINO", "OpenVINO int8", "torch int8"):
            entry, call = contest.enter(CONTESTANTS[name], case, 20.0)
            assert entry["state"] == "failed" and "Error" in entry["reason"] and call is None
        assert contest.enter(CONTESTANTS["eager"], case, 20.0)[0]["state"] == "valid"


def test_peak_growth_sees_what_a_call_needs():
    kept: list[Tensor] = []
    growth = contest.peak_growth(lambda: kept.append(torch.ones(2**27)))  # more than the heap holds free
    assert growth is None or growth > 2**28
