"""From dense to fast in one call: what comes out, that it is repeatable, and what is left alone."""

import importlib
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsegan import training
from sparsegan.compress import Compressed, Plan, compress, sweep
from sparsegan.layers import SparseProgram
from sparsegan.patterns import BlockPattern, weight_view
from sparsegan.prune import sparsity_report
from sparsegan.prune.allocate import BudgetError
from sparsegan.prune.losses import Balanced, l1_plus_l2
from sparsegan.prune.trace import count_macs
from sparsegan.quantize import calibrate
from sparsegan.report import layer_results, layer_table, mean_psnr

compress_module = importlib.import_module("sparsegan.compress")  # the package has a function of that name

pytestmark = pytest.mark.usefixtures("quick")


def generator() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.ConvTranspose2d(8, 32, 4, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 32, 4, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 3, 4, 2, 1),
            nn.Tanh(),
        )
        for module in model:
            if hasattr(module, "weight"):
                nn.init.normal_(module.weight, 0.0, 0.2)
    return model.eval().requires_grad_(False)


def latents(n: int, source: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(n, 8, 1, 1, generator=source),)


UNSEEN = latents(32, torch.Generator().manual_seed(1234))


def run(**settings: object) -> Compressed:
    return compress(
        generator(),
        latents,
        **{"sparsity": 0.5, "steps": 3, "method": "blocks", "perceptual": None, **settings},
    )


@pytest.fixture(scope="module")
def result(quick: None) -> Compressed:
    return run()


def test_gives_a_swapped_and_a_pruned_model(result: Compressed):
    assert any(isinstance(module, SparseProgram) for module in result.model.modules())
    assert mean_psnr(result.model(*UNSEEN), result.pruned(*UNSEEN)) > 25  # int8 alone
    report = sparsity_report(result.pruned, UNSEEN)
    assert 1 - sum(r.macs_kept for r in report) / sum(r.macs_dense for r in report) >= 0.5
    assert not any(parametrize.is_parametrized(module) for module in result.pruned.modules())
    assert BlockPattern(4, 4).respected_by(weight_view(result.pruned[3]) != 0)
    assert torch.equal(result.masks["3"], result.pruned[3].weight != 0) and not result.masks["3"].all()
    assert len(result.history) == 3 and result.seconds > 0


def test_distillation_brings_the_images_back():
    teacher = generator()(*UNSEEN)
    psnr = [mean_psnr(run(steps=steps).pruned(*UNSEEN), teacher) for steps in (1, 40)]
    assert psnr[1] > psnr[0] + 1


def test_the_dense_model_and_the_random_state_stay():
    model = generator()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    state = torch.get_rng_state()
    compress(model, latents, sparsity=0.5, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_is_repeatable(result: Compressed):
    again, other = run(), run(seed=1)
    weights = [[*each.pruned.state_dict().values()] for each in (result, again, other)]
    assert result.history == again.history != other.history
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_pattern_and_dtype_are_obeyed():
    result = run(pattern=BlockPattern(8, 4), dtype="f32", steps=0)
    assert BlockPattern(8, 4).respected_by(weight_view(result.pruned[3]) != 0)
    assert result.history == []
    torch.testing.assert_close(result.model(*UNSEEN), result.pruned(*UNSEEN), rtol=1e-4, atol=1e-4)


def test_tells_how_far_it_is():
    calls = []
    run(progress=lambda *call: calls.append(call))
    assert calls == [
        ("prune", 0, 1),
        ("prune", 1, 1),
        ("distil", 0, 3),
        ("distil", 1, 3),
        ("distil", 2, 3),
        ("distil", 3, 3),
        ("swap", 0, 1),
        ("swap", 1, 1),
    ]


def test_refuses_training_mode_and_negative_steps():
    with pytest.raises(ValueError, match="training mode"):
        compress(generator().train(), latents)
    with pytest.raises(ValueError, match="steps"):
        run(steps=-1)


# ------------------------------------------------------------------ methods, budgets, results


@pytest.mark.parametrize("method", ["blocks", "channels", "both"])
def test_every_method_removes_what_was_asked(method: str):
    result = run(method=method, sparsity=0.6)
    assert result.plan.method == method
    assert result.report["removed"] >= 0.6 - 1e-6
    assert bool(result.plan.widths) == (method != "blocks")
    assert (result.plan.sparsity is None) == (method == "channels")
    assert result.pruned(*UNSEEN).shape == generator()(*UNSEEN).shape
    assert mean_psnr(result.model(*UNSEEN), result.pruned(*UNSEEN)) > 25


def test_auto_takes_what_is_nearest_to_the_dense_model():
    result = run(method="auto", sparsity=0.6)
    tried = result.report["distance after a short training"]
    assert set(tried) == {"blocks", "channels", "both"}
    assert result.plan.method == min(tried, key=tried.get)


def test_permuted_blocks_keep_more():
    settings = {"method": "blocks", "pattern": BlockPattern(16, 16), "steps": 0, "sparsity": 0.4}
    teacher = generator()(*UNSEEN)
    plain, permuted = (run(permute=permute, **settings).pruned(*UNSEEN) for permute in (False, True))
    assert mean_psnr(permuted, teacher) > mean_psnr(plain, teacher)


def test_a_speed_is_reached_by_measuring(monkeypatch: pytest.MonkeyPatch):
    """With a clock that counts kept weights, the plan must end where the clock says."""

    def speed(job, swapped):
        return 10 / (0.1 + job.kept)

    def swapped(job, pruned):
        weights = [layer.weight for layer in pruned.modules() if isinstance(layer, nn.ConvTranspose2d)]
        job.kept = float(sum(w.count_nonzero() for w in weights)) / sum(
            layer.weight.numel() for layer in generator().modules() if isinstance(layer, nn.ConvTranspose2d)
        )
        return pruned

    job = compress_module._Job
    monkeypatch.setattr(job, "speed", speed)
    monkeypatch.setattr(job, "swapped", swapped)
    result = run(sparsity=None, speedup=16.0, method="blocks", steps=0)
    assert result.report["speedup"] == pytest.approx(16.0, rel=0.1)
    assert 0.2 < result.report["removed"] < 0.9
    assert run(sparsity=None, speedup=9.0, method="auto", steps=0).plan.method == "nothing removed"
    with pytest.raises(ValueError, match=r"1000.* cannot be reached with blocks, at most \d+"):
        run(sparsity=None, speedup=1000.0, method="blocks", steps=0)
    # Of two ways that reach it, the one that the images like better.
    for better, by_latency in ((0.0, True), (2.0, False)):
        with monkeypatch.context() as patch:
            patch.setattr(
                job, "_by_latency", lambda _, share: Plan("blocks", "4x4", by_layer={"3": 0.9 * share})
            )
            patch.setattr(job, "_tried", lambda _, plan, better=better: better if plan.by_layer else 1.0)
            result = run(sparsity=None, speedup=11.5, method="blocks", steps=0)
        assert bool(result.plan.by_layer) == by_latency
        assert result.report["distance after a short training"] == {
            "blocks": 1.0,
            "blocks by latency": better,
        }
        assert result.report["speedup"] == pytest.approx(11.5, rel=0.1)
    # What one way cannot remove, the other may.
    with monkeypatch.context() as patch:
        patch.setattr(job, "_by_latency", lambda _, share: Plan("blocks", "4x4", by_layer={"3": 0.9 * share}))
        patch.setattr(job, "_plan", raise_budget)
        result = run(sparsity=None, speedup=11.5, method="blocks", steps=0)
        assert result.plan.by_layer and result.report["distance after a short training"] == {}
        patch.setattr(job, "_by_latency", raise_budget)
        with pytest.raises(BudgetError):
            run(sparsity=None, speedup=11.5, method="blocks", steps=0)


def raise_budget(*_: object) -> Plan:
    raise BudgetError("no more can go")


def mean_colours(images: Tensor) -> Tensor:
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def raise_at_the_second_call(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(9))

    def wrapped(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == 1:
            raise ValueError("something else")
        return function(*arguments, **settings)

    return wrapped


def test_sparsity_rises_until_kid_is_passed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compress_module, "_KID_SAMPLES", 200)
    loose = run(sparsity=None, max_kid=1e6, method="blocks", steps=0, extractor=mean_colours)
    found = loose.report["KID x1000 by sparsity"]
    assert (
        loose.plan.sparsity == 0.7 and len(found) == 3
    )  # more than 0.72 the layers that stay dense do not allow
    limit = (found["0.6"] + found["0.7"]) / 2
    tight = run(sparsity=None, max_kid=limit, method="blocks", steps=0, extractor=mean_colours)
    assert tight.plan.sparsity == 0.6 and list(tight.report["KID x1000 by sparsity"])[-1] == "0.7"
    # What goes wrong on the way is no sign that no more can go.
    train = raise_at_the_second_call(compress_module._Job.train)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="something else"):
        patch.setattr(compress_module._Job, "train", train)
        run(sparsity=None, max_kid=1e6, method="blocks", steps=0, extractor=mean_colours)
    with pytest.raises(ValueError, match="with 50% of the operations removed it is"):
        run(sparsity=None, max_kid=1e-9, method="blocks", steps=0, extractor=mean_colours)


def test_the_result_is_one_object_that_can_be_saved(tmp_path: Path, result: Compressed):
    both = run(method="both", sparsity=0.65)
    both.save(tmp_path)
    again = Compressed.load(tmp_path, generator(), latents)
    assert (again.plan, again.settings, again.report, again.history) == (
        both.plan,
        both.settings,
        both.report,
        both.history,
    )
    assert torch.equal(again.pruned(*UNSEEN), both.pruned(*UNSEEN))
    assert torch.equal(again.model(*UNSEEN), both.model(*UNSEEN))
    assert all(torch.equal(mask, again.masks[name]) for name, mask in both.masks.items())
    for name, damage in (
        ("pruned.safetensors", b"x" * 9),
        ("compressed.json", b'{"plan": {}}'),
        ("compressed.json", b"["),
    ):
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(ValueError, match="does not hold a compressed model of this one"):
            Compressed.load(tmp_path, generator(), latents)


class Stubborn(nn.Module):
    """A class of its own, which no graph is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = generator()

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z)
        return images if float(images.detach().sum()) < 1e9 else images / 2


def test_a_model_that_no_file_can_describe_is_swapped_again(tmp_path: Path):
    settings: dict[str, Any] = {"sparsity": 0.5, "steps": 2, "method": "blocks", "perceptual": None}
    with pytest.warns(UserWarning, match="is swapped again when it is loaded"):
        made = compress(Stubborn().eval(), latents, folder=tmp_path, **settings)
    assert isinstance(made.model, Stubborn) and not (tmp_path / "swapped.safetensors").exists()
    again = Compressed.load(tmp_path, Stubborn().eval(), latents)
    assert torch.equal(again.pruned(*UNSEEN), made.pruned(*UNSEEN)) and again.report == made.report
    assert mean_psnr(again.model(*UNSEEN), made.pruned(*UNSEEN)) > 25


def test_a_swapped_file_that_is_gone_is_missed(tmp_path: Path, result: Compressed):
    result.save(tmp_path)
    (tmp_path / "swapped.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        Compressed.load(tmp_path, generator(), latents)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [5, 39])  # while it learns, and while it finishes with int8 rounding
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    settings = {"method": "blocks", "steps": 40, "perceptual": None}
    whole = run(**settings)
    steps = []

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "distil" and done == at:
            raise Killed

    with pytest.raises(Killed):
        run(folder=tmp_path, progress=kill, **settings)

    def count(stage: str, done: int, total: int) -> None:
        if stage == "distil" and done:
            steps.append(done)

    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        run(folder=tmp_path, **(settings | {"sparsity": 0.4}))
    resumed = run(folder=tmp_path, progress=count, **settings)
    assert steps == list(range(at + 1, 41))
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.pruned.state_dict().values(), whole.pruned.state_dict().values(), strict=True)
    )
    assert run(folder=tmp_path, **settings).history == whole.history  # done already: nothing is trained
    with pytest.raises(ValueError, match="holds the result of other settings"):
        run(folder=tmp_path, **(settings | {"sparsity": 0.4}))


def test_a_sweep_marks_what_nothing_beats(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compress_module, "_KID_SAMPLES", 200)
    monkeypatch.setattr(compress_module._Job, "speed", lambda job, swapped: 5.0)
    points, results = sweep(
        generator(), latents, [0.3, 0.6], extractor=mean_colours, method="blocks", steps=0, perceptual=None
    )
    assert [point.sparsity for point in points] == [0.3, 0.6] and len(results) == 2
    assert points[0].kid < points[1].kid and points[0].psnr > points[1].psnr
    assert [point.pareto for point in points] == [True, False]  # as fast, and worse


def test_example_inputs_do_instead_of_a_sampler():
    inputs = latents(4, torch.Generator().manual_seed(5))
    result = compress(generator(), inputs, sparsity=0.5, steps=2, method="blocks", perceptual=None)
    assert len(result.history) == 2


def test_pixels_come_first_and_then_the_perceptual_distance():
    seen: list[int] = []

    def distance(image: Tensor, target: Tensor) -> Tensor:
        seen.append(len(image))
        return (image - target).square().mean()

    run(steps=8, perceptual=distance)
    assert seen == [16, 16]
    plain, texture = (run(steps=8, perceptual=perceptual) for perceptual in (None, "texture"))
    assert plain.history[:6] == texture.history[:6] and plain.history[6:] != texture.history[6:]


@pytest.fixture
def nothing_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_module, "extractors", lambda: {"vgg16": "not fetched"})
    monkeypatch.setattr(Balanced.__init__, "__defaults__", (1.0, 0))  # the adversary counts at once


def test_what_was_fetched_follows_the_pixels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compress_module, "extractors", lambda: {"vgg16": None})
    asked: list[str] = []
    monkeypatch.setattr(compress_module, "lpips", lambda name, shift: asked.append(name) or l1_plus_l2)
    run(steps=8, perceptual="auto")
    assert asked == ["vgg16"]


# What long is, and how much has to be left for an adversary and for textures, of half.
@pytest.mark.parametrize(
    ("long", "judged", "textured", "follows"),
    [
        (8, 0.48, 0.9, "adversary"),
        (8, 0.52, 0.48, "texture"),
        (9, 0.1, 0.48, "texture"),
        (9, 0.1, 0.52, None),
    ],
)
def test_where_nothing_is_fetched_length_and_what_is_left_decide(
    long: int,
    judged: float,
    textured: float,
    follows: str | None,
    nothing_fetched: None,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(compress_module, "_ADVERSARY_STEPS", long)
    monkeypatch.setattr(compress_module, "_ADVERSARY_LEFT", judged)
    monkeypatch.setattr(compress_module, "_TEXTURED_LEFT", textured)
    found = run(steps=8, sparsity=0.5, perceptual="auto").history
    assert found == run(steps=8, sparsity=0.5, perceptual=follows).history
    assert found != run(steps=8, sparsity=0.5, perceptual="texture" if follows is None else None).history


@pytest.mark.parametrize("method", ["blocks", "channels", "both"])
def test_what_is_left_is_what_was_not_removed(
    method: str, nothing_fetched: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compress_module, "_ADVERSARY_STEPS", 1)
    job, seen = compress_module._Job, []
    left = job.left
    monkeypatch.setattr(job, "left", lambda self, *what: seen.append(left(self, *what)) or seen[-1])
    result = run(method=method, sparsity=0.6, steps=1, perceptual="auto")
    assert seen[-1] == pytest.approx(1 - result.report["removed"], abs=0.02)


def test_what_is_left_counts_each_layer_by_its_own_sparsity(quick: None):
    job = compress_module._Job(
        generator(), latents, BlockPattern(4, 4), "l1", "one-shot", False, "int8", 0, None, None
    )
    macs = count_macs(generator(), UNSEEN)
    left = job.left(generator(), Plan("blocks", "4x4", by_layer={"3": 0.5}))
    assert left == pytest.approx(1 - 0.5 * macs["3"] / sum(macs.values()))


def test_each_training_has_an_adversary_of_its_own(nothing_fetched: None, monkeypatch: pytest.MonkeyPatch):
    alone = run(steps=12, perceptual="adversary").history
    assert alone != run(steps=12, perceptual="texture").history
    # The second of two trainings in one call is as if it were the first.
    monkeypatch.setattr(compress_module, "_KID_SAMPLES", 200)
    monkeypatch.setattr(compress_module, "_LEVELS", (0.4, 0.5))
    second = run(sparsity=None, max_kid=1e6, steps=12, perceptual="adversary", extractor=mean_colours)
    assert second.plan.sparsity == 0.5 and second.history == alone


def test_an_adversary_plays_for_few_steps(nothing_fetched: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compress_module, "_ADVERSARY_PHASE", 6)
    monkeypatch.setattr(compress_module, "_ADVERSARY_FINISH", 1)
    trainings: list[tuple[int, float, float]] = []

    def recover(model: nn.Module, *args: Any, loss: Any, **settings: Any) -> list[float]:
        trainings.append((args[2], loss[-1].share, loss[-1].lr))
        return [0.0] * int(args[2])

    monkeypatch.setattr(compress_module, "recover", recover)
    run(steps=60, perceptual="adversary")
    assert trainings == [(59, 0.1, 2e-4), (1, 1.0, 2e-4)]


def test_an_adversary_wants_square_images():
    def oblong() -> nn.Sequential:
        return nn.Sequential(generator(), nn.AvgPool2d((1, 2))).eval()

    settings = {"sparsity": 0.5, "steps": 2, "method": "blocks"}
    with pytest.raises(
        ValueError,
        match=r"square images of 16 pixels or more, the model gives \[2, 3, 16, 8\]",
    ):
        compress(oblong(), latents, perceptual="adversary", **settings)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("give one budget", {"speedup": 2.0}),
        ("speedup must be a positive number", {"sparsity": None, "speedup": -1.0}),
        ("max_kid must be a positive number", {"sparsity": None, "max_kid": math.nan}),
        ("unknown method 'prune'; there are: auto, blocks, channels, both", {"method": "prune"}),
        ('perceptual is "auto", "vgg16", "texture", "adversary"', {"perceptual": "vgg19"}),
        ("one-shot, cubic, iterative", {"schedule": "linear", "method": "blocks", "perceptual": None}),
    ],
)
def test_arguments_that_make_no_sense(message: str, settings: dict[str, object]):
    with pytest.raises(ValueError, match=message):
        run(**settings)


def test_latents_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"does not take the inputs \[\[2, 7, 1, 1\]\]"):
        compress(generator(), lambda n, g: (torch.randn(n, 7, 1, 1, generator=g),), steps=0)


def test_a_broken_model():
    broken = generator()
    broken[0].weight[0] = torch.nan
    with pytest.raises(ValueError, match="images hold NaN"):
        compress(broken, latents, steps=0)


def test_a_narrower_layer_has_no_psnr_of_its_own():
    narrow = run(method="channels", steps=0)
    rows = {row.name: row for row in layer_results(generator(), narrow.pruned, narrow.model, UNSEEN)}
    assert math.isnan(rows["0"].psnr) and rows["6"].psnr > 10
    console = Console(width=120, file=io.StringIO())
    console.print(layer_table("small", list(rows.values())))
    shown = console.file.getvalue()
    assert "nan" not in shown and "–" in shown


def test_outliers_do_not_widen_the_ranges_of_training_and_of_the_swap(monkeypatch: pytest.MonkeyPatch):
    found: dict[str, Any] = {}

    def spy(name: str) -> None:
        original = getattr(compress_module, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            found[name] = arguments
            return original(*arguments, **settings)

        monkeypatch.setattr(compress_module, name, call)

    spy("quantization_aware")
    spy("swap_to_sparse")
    run(method="blocks", steps=40, perceptual=None)
    (_, ranges), (pruned, config, *_) = found["quantization_aware"], found["swap_to_sparse"]
    extremes = calibrate(pruned, config.calibration, list(ranges))
    narrower = [
        high - low < 0.97 * (extremes[name][1] - extremes[name][0]) for name, (low, high) in ranges.items()
    ]
    assert any(narrower) and config.percentile == compress_module._PERCENTILE < 100
