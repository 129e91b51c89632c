"""Each recipe, a few steps of it: it learns, it becomes fast, and leaves files that are served."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from sparsegan.checkpoint import load
from sparsegan.cli import app
from sparsegan.layers import SparseLayer, SparseProgram
from sparsegan.systems import RECIPES, interpolation, recipes, run_system
from sparsegan.systems.run import _on, split
from sparsegan.train import gan
from sparsegan.train.data import Images, draw_shapes
from sparsegan.train.loop import Task
from sparsegan.train.tasks import TASKS
from sparsegan.train.vae import Vae

systems = importlib.import_module("sparsegan.systems.run")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of coloured shapes, one of each class in turn."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes = draw_shapes(32, 3, 120)
    assert shapes.labels is not None
    pixels = ((shapes.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, (image, label) in enumerate(zip(pixels, shapes.labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{i:03}.png")
    return folder


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "_SAMPLES", 200)
    monkeypatch.setattr(systems, "_TIMED_SECONDS", 0.05)
    # Models this small may well be as fast in eager, on a busy machine at least: what was swapped wins.
    monkeypatch.setattr(
        "sparsegan.swap.exchange.race", lambda runners, budget: [2.0] * (len(runners) - 1) + [1.0]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_and_becomes_fast(name: str, pictures: Path, tmp_path: Path):
    settings = replace(RECIPES[name].settings, steps=24, batch=8, width=0.5)
    stages: list[tuple[str, int]] = []

    def show(stage: str, done: int, total: int) -> None:
        stages.append((stage, done))

    report = run_system(name, tmp_path, settings, data=pictures, compress_steps=4, progress=show)
    assert json.loads((tmp_path / "report.json").read_text())["recipe"] == name
    assert report["removed"] == pytest.approx(0.75, abs=0.03) and not report["undone"]
    # What it learns to reconstruct or imitate is nearer at the end; a GAN's losses say nothing about that.
    if "psnr" in report["before"]:
        assert report["last_loss"] < report["first_loss"] and report["before"]["psnr"] > 5
    if "kid" in report["before"]:
        assert all(math.isfinite(report[state]["kid"]) for state in ("before", "after"))
    pictures_of_latents = {"interpolation.png"} if name not in TASKS else set()
    assert {path.name for path in tmp_path.glob("*.png")} == {"samples.png"} | pictures_of_latents
    model = load(tmp_path / "model.safetensors")
    assert any(isinstance(module, SparseLayer | SparseProgram) for module in model.modules())
    if name in TASKS:
        refused = CliRunner().invoke(app, ["generate", str(tmp_path / "model.safetensors")])
        assert refused.exit_code == 1 and "changes images" in refused.output
    if name == "vae-mlp":  # it goes on where it was: nothing is trained again
        before = len(stages)
        run_system(name, tmp_path, settings, data=pictures, compress_steps=4, progress=show)
        assert not any(stage in ("train", "distil") and done for stage, done in stages[before:])


@pytest.mark.parametrize("name", ["mlp-gan-small", "vae-mlp"])
def test_training_changes_the_samples(name: str, pictures: Path, tmp_path: Path):
    reports, samples = [], []
    for steps in (1, 100):
        settings = replace(RECIPES[name].settings, steps=steps, batch=16, width=0.5)
        reports.append(run_system(name, tmp_path / str(steps), settings, data=pictures, compress_steps=0))
        model = load(tmp_path / str(steps) / "model.safetensors")
        latent = 100 if name == "mlp-gan-small" else 16
        samples.append(model(torch.randn(64, latent, generator=torch.Generator().manual_seed(1))))
    assert (
        samples[1] - samples[0]
    ).abs().mean() > 0.02  # what is served is a moving average: it follows slowly
    if name == "vae-mlp":
        assert reports[1]["before"]["kid"] < reports[0]["before"]["kid"]


def test_the_command_trains_and_the_model_is_served(pictures: Path, tmp_path: Path):
    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.stdout if "--json" in arguments else result.output

    small = ("--data", pictures, "--steps", 3, "--batch", 8, "--width", 0.5, "--compress-steps", 2)
    shown = run("train", "conditional-gan", "--out", tmp_path / "c", *small)
    assert "before" in shown and "after" in shown and "of the operations removed" in shown
    model, picture = tmp_path / "c" / "model.safetensors", tmp_path / "x.png"
    run("generate", model, "--out", picture, "--count", 4, "--label", 3)
    assert Image.open(picture).size[0] > 32
    assert "label" in run("generate", model, "--out", picture, "--count", 4, "--label", 99, code=1)
    run("generate", model, "--out", picture, "--count", 2, "--interpolate", 5)
    assert Image.open(picture).size[0] > 2 * Image.open(picture).size[1]
    report = json.loads(
        run("train", "dcgan-sparse", "--out", tmp_path / "s", *small, "--loss", "lsgan", "--json")
    )
    assert report["settings"]["loss"] == "lsgan" and report["settings"]["prune"] == "cubic"
    wrong = run("train", "vae-mlp", "--out", tmp_path / "x", *small, "--loss", "bce", code=1)
    assert "vae-mlp has no --loss; its own options are --channels, --beta" in wrong
    assert "no recipe is called 'gan'" in run("train", "gan", code=1)
    assert "bce, lsgan" in run("train", "dcgan", "--out", tmp_path / "x", *small, "--loss", "x", code=1)
    assert "no labels" in run(
        "train", "conditional-gan", "--out", tmp_path / "y", *small[2:], "--data", pictures / "3", code=1
    )


def command(data: Path, out: Path, *more: object) -> list[str]:
    small = ("--batch", 8, "--width", 0.5, "--compress-steps", 4)
    return [str(word) for word in ("train", "vae-mlp", "--data", data, "--out", out, *small, *more)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def test_a_killed_command_goes_on(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the other process has
    try:
        steps, state = 80, tmp_path / "killed" / "training.safetensors"
        often = "from sparsegan import cli, training; training.SAVE_SECONDS = 0; cli.main()"
        arguments = command(pictures, tmp_path / "killed", "--steps", steps)
        process = subprocess.Popen([sys.executable, "-c", often, *arguments], env=environment())
        end = time.monotonic() + 120
        while not state.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
        process.wait()
        with safe_open(state, framework="pt") as file:
            done = json.loads(file.metadata()["facts"])["step"]
        assert 0 < done < steps
        taken: list[int] = []
        step = Vae.step
        monkeypatch.setattr(Vae, "step", lambda task, rng: (taken.append(1), step(task, rng))[1])
        for out in ("killed", "whole"):
            result = CliRunner().invoke(app, command(pictures, tmp_path / out, "--steps", steps))
            assert result.exit_code == 0, result.output
        assert len(taken) == steps - done + steps
        killed, whole = (load_file(tmp_path / out / "dense.safetensors") for out in ("killed", "whole"))
        assert all(torch.equal(killed[name], value) for name, value in whole.items())
    finally:
        torch.set_num_threads(threads)


def test_two_processes_train_the_system_of_one(pictures: Path, tmp_path: Path):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sparsegan"]
    two = [sys.executable, *start, *command(pictures, tmp_path / "two", "--steps", 6, "--json")]
    done = subprocess.run(two, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == json.loads((tmp_path / "two" / "report.json").read_text())
    assert done.stderr.count("of the operations removed") == 1, "one process tells what came of it"
    assert "FutureWarning" not in done.stderr
    assert CliRunner().invoke(app, command(pictures, tmp_path / "one", "--steps", 6)).exit_code == 0
    one, two = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("one", "two"))
    for name in ("psnr", "ssim"):  # the others are of 200 samples here, of all there
        assert two["before"][name] == pytest.approx(one["before"][name], rel=0.02), name
    weights = [load_file(tmp_path / out / "dense.safetensors") for out in ("one", "two")]
    for name, value in weights[0].items():
        # Adam makes steps of up to 2e-3 of small differences in bfloat16; `test_parallel` compares in float64.
        assert (weights[1][name] - value).abs().mean() < 2e-4, name
    assert two["removed"] == pytest.approx(one["removed"])


def test_only_the_first_process_swaps(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Where others run at the same time, a race between layers has no winner worth the name.
    asked: list[object] = []
    monkeypatch.setattr("sparsegan.parallel.from_first", lambda make: (asked.append(make), make())[1])
    for name in ("vae-mlp", "dcgan-sparse"):
        settings = replace(RECIPES[name].settings, steps=4, batch=4, width=0.5)
        run_system(name, tmp_path / name, settings, data=pictures, compress_steps=0)
    assert len(asked) == 2


def test_few_images(pictures: Path, tmp_path: Path):
    settings = replace(RECIPES["vae-mlp"].settings, steps=2, batch=4, width=0.5)
    few = tmp_path / "few"
    few.mkdir()
    for i, path in enumerate(sorted((pictures / "3").glob("*.png"))[:2]):
        Image.open(path).save(few / f"{i}.png")
    report = run_system("vae-mlp", tmp_path / "out", settings, data=few, compress_steps=0)
    assert "psnr" in report["before"] and "kid" not in report["before"]


def test_what_cannot_be_pruned_is_not_trained(pictures: Path, tmp_path: Path):
    settings = replace(RECIPES["vae-mlp"].settings, steps=2, batch=4, width=0.5, sparsity=1.5)
    with pytest.raises(ValueError, match=r"in \[0, 1\); got 1.5"):
        run_system("vae-mlp", tmp_path, settings, data=pictures)
    assert not (tmp_path / "training.safetensors").exists()


def test_another_run_takes_nothing_from_the_one_before(pictures: Path, tmp_path: Path):
    settings = replace(RECIPES["vae-mlp"].settings, steps=3, batch=8, width=0.5)
    first = run_system("vae-mlp", tmp_path, settings, data=pictures, compress_steps=2)
    again = run_system("vae-mlp", tmp_path, settings, data=pictures, compress_steps=2)
    with safe_open(tmp_path / "training.safetensors", framework="pt") as file:
        trained = json.loads(file.metadata()["facts"])["seconds"]
    assert again["train_minutes"] * 60 >= trained > 0  # those of the first run count
    assert again["compress_minutes"] == first["compress_minutes"]
    with pytest.raises(ValueError, match="other weights, settings or images"):
        run_system("vae-mlp", tmp_path, settings, data=pictures / "3", compress_steps=2)
    (tmp_path / "training.safetensors").unlink()  # as that error says
    other = run_system("vae-mlp", tmp_path, settings, data=pictures / "3", compress_steps=2)
    clean = run_system("vae-mlp", tmp_path / "new", settings, data=pictures / "3", compress_steps=2)
    assert other["after"]["psnr"] == pytest.approx(clean["after"]["psnr"], abs=1e-3)
    assert other["after"]["psnr"] != pytest.approx(first["after"]["psnr"], abs=1e-2)


def test_a_training_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object, **__: object) -> None:
        raise FloatingPointError("training does not hold")

    monkeypatch.setattr("sparsegan.cli.run_system", fails)
    result = CliRunner().invoke(app, ["train", "vae-mlp"])
    assert result.exit_code == 1 and "sparsegan: training does not hold" in result.output


class One(float):
    def clamp_min(self, least: float) -> float:
        return self


@pytest.mark.parametrize(
    "name", ["mlp-gan", "dcgan-lasso", "vae-mlp", "vae-recurrent", "deblur", "colourise"]
)
def test_a_step_stays_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch):
    # "meta" knows shapes and devices, no values: the step fails where it mixes devices, and these two would ask for a value.
    monkeypatch.setattr(gan, "_variation", lambda images: One(1))
    monkeypatch.setattr(gan.AveragedModel, "update_parameters", lambda *_: None)
    recipe, tasks = RECIPES[name], []
    monkeypatch.setattr(recipes, "_trainer", lambda task, *_: tasks.append(task))
    settings = replace(recipe.settings, batch=4, width=0.25)
    images = draw_shapes(recipe.side, settings.channels, 8)
    system = recipe.build(_on(images, "meta"), images, settings)
    (task,) = tasks
    assert isinstance(task, Task) and task.step(torch.Generator()).device.type == "meta"
    assert {p.device.type for module in task.modules.values() for p in module.parameters()} == {"meta"}
    assert {p.device.type for p in system.generator.parameters()} == {"meta"}


def test_held_out_images_are_not_trained_on():
    images = Images(torch.arange(50.0).view(50, 1, 1, 1), torch.arange(50), "numbers")
    train, held = split(images, seed=0)
    assert len(held.images) == 5 and len(train.images) == 45
    assert torch.equal(train.images.flatten().long(), train.labels)
    assert sorted([*train.images.flatten().tolist(), *held.images.flatten().tolist()]) == list(range(50))
    with pytest.raises(ValueError, match="holds 1 image"):
        split(Images(images.images[:1], None, "numbers"), 0)


def test_interpolation_goes_along_the_sphere_and_keeps_labels():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append((z, labels))
            return z.view(-1, 1, 2, 2)

    def inputs(n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(n, 4, generator=rng)
        return z / z.norm(dim=1, keepdim=True), torch.arange(n)

    assert interpolation(Spy(), inputs, 3, 5).shape == (15, 1, 2, 2)
    ((z, labels),) = seen
    rng = torch.Generator().manual_seed(0)
    starts, ends = inputs(3, rng)[0], inputs(3, rng)[0]
    ways = z.view(3, 5, 4)
    torch.testing.assert_close(ways[:, 0], starts)
    torch.testing.assert_close(ways[:, -1], ends)
    torch.testing.assert_close(ways.norm(dim=2), torch.ones(3, 5))
    angles = (ways[:, 1:] * ways[:, :-1]).sum(2).arccos()
    torch.testing.assert_close(angles, angles.mean(1, keepdim=True).expand(3, 4), atol=1e-3, rtol=1e-3)
    assert torch.equal(labels, torch.arange(3).repeat_interleave(5))
    with pytest.raises(ValueError, match="2 columns"):
        interpolation(Spy(), inputs, 3, 1)
