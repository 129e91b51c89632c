"""Each recipe, a few steps of it: it learns, it becomes fast, and leaves files that are served."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sparsegan.checkpoint import load
from sparsegan.cli import app
from sparsegan.layers import SparseLayer, SparseProgram
from sparsegan.systems import RECIPES, interpolation, run_system
from sparsegan.systems.run import split
from sparsegan.train.data import Images, draw_shapes
from sparsegan.train.tasks import TASKS

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


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_and_becomes_fast(name: str, pictures: Path, tmp_path: Path):
    # A small recurrent decoder is faster layer by layer, and then has no graph that could be saved.
    width = 1.0 if name == "vae-recurrent" else 0.5
    settings = replace(RECIPES[name].settings, steps=24, batch=8, width=width)
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
    assert (samples[1] - samples[0]).abs().mean() > 0.02  # what is served is a moving average: it follows slowly
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
    assert "no recipe is called 'gan'" in run("train", "gan", code=1)
    assert "bce, lsgan" in run("train", "dcgan", "--out", tmp_path / "x", *small, "--loss", "x", code=1)
    assert "no labels" in run(
        "train", "conditional-gan", "--out", tmp_path / "y", *small[2:], "--data", pictures / "3", code=1
    )


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
