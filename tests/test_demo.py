"""The main job on the shipped models, with few steps: every file, every number, every check."""

import json
import os
import platform
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from sparsegan import demo
from sparsegan.checkpoint import load
from sparsegan.models import load_model
from sparsegan.patterns import BlockPattern
from sparsegan.report import WrongKernelError, mean_psnr

BLOCK = BlockPattern(4, 4)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def finished(quick: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    out = tmp_path_factory.mktemp("demo")
    console = Console(width=100, color_system=None, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    names = ["dcgan", "vae"]
    # At half the work a few steps bring the images back, at a quarter they do not.
    report = demo.run_demo(names, out, pattern=BLOCK, sparsity=0.5, steps=6, seconds=0.0, console=console)
    return out, report, console.export_text()


def test_writes_what_it_reports(finished: tuple[Path, dict, str]):
    out, report, _ = finished
    assert json.loads((out / "demo.json").read_text(), parse_constant=pytest.fail) == report
    assert [model["name"] for model in report["models"]] == ["dcgan", "vae"]
    assert report["settings"] == {"pattern": "4x4", "sparsity": 0.5, "seed": 0}


def test_removes_what_was_asked_for(finished: tuple[Path, dict, str]):
    for model in finished[1]["models"]:
        assert 0.5 <= model["removed"] < 0.51
        assert model["steps"] == 6


def test_images_are_those_of_their_latents_even_with_few_steps(finished: tuple[Path, dict, str]):
    for model in finished[1]["models"]:
        loaded, swapped = load_model(model["name"]), load(finished[0] / f"{model['name']}.safetensors")
        inputs = loaded.sample_inputs(64, torch.Generator().manual_seed(5))
        with torch.no_grad():
            dense, images = loaded.model(*inputs), swapped(*inputs)
        assert mean_psnr(images, dense) > mean_psnr(images, dense.roll(1, 0)) + 4
        assert model["psnr"] == pytest.approx(mean_psnr(images, dense), abs=1)  # other latents
        assert model["psnr_swapped"] > 30  # int8 alone
        assert model["kernel_error"] < 1e-3


def test_the_saved_model_is_small_and_works(finished: tuple[Path, dict, str]):
    out, report, _ = finished
    for model in report["models"]:
        path = out / f"{model['name']}.safetensors"
        assert path.stat().st_size == model["file_bytes"] < 0.25 * model["dense_bytes"]
        loaded = load_model(model["name"])
        inputs = loaded.sample_inputs(2, torch.Generator().manual_seed(5))
        assert load(path)(*inputs).shape == (2, *loaded.image_shape)


def test_draws_dense_and_compressed_images(finished: tuple[Path, dict, str]):
    for name in ("dcgan", "vae"):
        with Image.open(finished[0] / f"{name}.png") as picture:
            assert picture.mode == "L"
            assert picture.width > demo.COLUMNS * 64 and picture.height > 4 * 64


def test_times_both_batch_sizes(finished: tuple[Path, dict, str]):
    for model in finished[1]["models"]:
        assert [speed["batch"] for speed in model["speeds"]] == [1, 16]
        assert all(speed["dense_ms"] > 0 and speed["sparse_ms"] > 0 for speed in model["speeds"])


def test_prints_tables(finished: tuple[Path, dict, str]):
    shown = finished[2]
    for part in ("dcgan: layer by layer", "vae: layer by layer", "whole models", "demo.json"):
        assert part in shown


def test_tells_no_names_or_places(finished: tuple[Path, dict, str]):
    written = (finished[0] / "demo.json").read_text()
    assert f'"{platform.node()}"' not in written and os.getcwd() not in written


def test_no_speed_for_wrong_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> float:
        raise WrongKernelError("planted")

    monkeypatch.setattr(demo, "check_kernels", refuse)
    monkeypatch.setattr(demo, "measure_speed", lambda *args, **kwargs: pytest.fail("timed a wrong kernel"))
    with pytest.raises(WrongKernelError):
        demo.run_demo(["dcgan"], tmp_path, pattern=BLOCK, steps=0)
    assert not (tmp_path / "demo.json").exists()


def test_notices_a_model_that_does_not_come_back_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def altered(path: Path) -> torch.nn.Module:
        return torch.nn.Sequential(load(path), torch.nn.Tanh())

    monkeypatch.setattr(demo, "load", altered)
    with pytest.raises(RuntimeError, match="other images"):
        demo.run_demo(["dcgan"], tmp_path, pattern=BLOCK, steps=0)


def test_unknown_model(tmp_path: Path):
    with pytest.raises(ValueError, match="dcgan, vae, faces"):
        demo.run_demo(["nosuch"], tmp_path / "out", pattern=BLOCK)
    assert not (tmp_path / "out").exists()
