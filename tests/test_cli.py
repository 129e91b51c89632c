"""The command line: what it prints and writes, and that errors are one clear line."""

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from sparsegan import cli
from sparsegan.checkpoint import load, save

pytestmark = pytest.mark.usefixtures("quick")

COMMANDS = ("demo", "compress", "sweep", "generate", "bench", "info")


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object) -> Any:
    """What a command prints with --json: nothing else, and no Infinity or NaN, which only Python takes for JSON."""
    return json.loads(run(*arguments, "--json").stdout, parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def saved(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "small.safetensors"
    run("compress", "dcgan", "--steps", 1, "--method", "blocks", "--perceptual", "none", "--out", path)
    return path


def test_help_lists_the_commands():
    shown = run("--help").output
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str):
    shown = run(command, "--help").output
    assert "--json" in shown


def test_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "sparsegan", "generate", "nosuch.file"], capture_output=True, text=True
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("sparsegan: ") and result.stderr.count("\n") == 1


def test_info():
    shown = run("info").output
    for part in ("torch", torch.__version__, "block_conv2d", "reference: available", "GMAC/s"):
        assert part in shown
    facts = run_json("info")
    assert set(facts) == {"machine", "extension", "isas", "cuda", "triton", "backends", "dot_peak_gmacs"}
    assert set(facts["backends"]) == {
        "block_linear",
        "block_conv2d",
        "block_conv_transpose2d",
        "program",
    }


def test_info_tells_why_the_kernels_are_missing(monkeypatch: pytest.MonkeyPatch):
    reason = "sparsegan._C is not built: planted"
    monkeypatch.setattr("sparsegan.ops.backend._EXTENSION_ERROR", reason)
    facts = run_json("info")
    assert facts["extension"] == reason and facts["isas"] == [] and facts["dot_peak_gmacs"]["int8"] == 0
    assert reason in facts["backends"]["block_conv2d"]["cpu"]
    assert facts["backends"]["block_conv2d"]["reference"] == "available"
    assert "no extension" in run("info").output


def test_compress_writes_a_model(saved: Path):
    model = load(saved)
    assert model(torch.zeros(1, 64, 1, 1)).shape == (1, 1, 32, 32)


def test_compress_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # without --out, the file is written where one is
    facts = run_json(
        "compress", "vae", "--steps", 0, "--method", "blocks", "--pattern", "8x4", "--sparsity", 0.25
    )
    path = tmp_path / "vae-sparse.safetensors"
    assert facts["model"] == "vae" and facts["file"] == path.name
    assert facts["file_bytes"] == path.stat().st_size < facts["dense_bytes"]
    assert "8x4" in {layer["pattern"] for layer in facts["layers"]}
    assert facts["layers"][0]["psnr"] is None  # not pruned, no difference: infinite
    assert facts["psnr"] > 13


def test_sweep_shows_quality_against_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.import_module("sparsegan.compress"), "_KID_SAMPLES", 100)
    options = ["--sparsities", "0.3,0.6", "--steps", 0, "--method", "blocks", "--extractor", "clothing"]
    facts = run_json("sweep", "dcgan", *options, "--out", tmp_path)
    near, far = facts["points"]
    assert near["sparsity"] == 0.3 and near["kid"] < far["kid"] and near["psnr"] > far["psnr"]
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 300
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 2
    # A second time nothing is compressed again, and the choice is by the budget.
    limit = (near["kid"] + far["kid"]) / 2
    shown = run("sweep", "dcgan", *options, "--out", tmp_path, "--max-kid", limit).output
    assert "sparsity 0.3" in shown and "Pareto" in shown
    assert (
        "such as 0.5,0.75" in run("sweep", "dcgan", "--sparsities", "half", "--out", tmp_path, code=1).output
    )
    assert (
        "no model is within KID"
        in run("sweep", "dcgan", *options, "--out", tmp_path, "--max-kid", -99, code=1).output
    )


def test_generate_draws_by_seed(saved: Path, tmp_path: Path):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.png"
        run("generate", saved, "--out", path, "--count", 6, "--seed", seed)
        with Image.open(path) as picture:
            pictures.append(picture.tobytes())
            assert picture.width >= 3 * 64 and picture.height >= 2 * 64
    assert pictures[0] == pictures[1] != pictures[2]


def test_generate_json(saved: Path, tmp_path: Path):
    path = tmp_path / "x.png"
    facts = run_json("generate", saved, "--out", path, "--count", 2)
    assert facts == {"file": str(path), "images": [2, 1, 32, 32], "seed": 0}


@pytest.mark.parametrize(
    ("first", "shape"),
    [(torch.nn.Linear(5, 16), (5,)), (torch.nn.ConvTranspose2d(7, 1, 4), (7, 1, 1))],
)
def test_latents_are_those_of_the_first_layer(first: torch.nn.Module, shape: tuple[int, ...]):
    (latents,) = cli._latents(torch.nn.Sequential(first))(3, torch.Generator())
    assert latents.shape == (3, *shape)


def test_bench_of_a_saved_model(saved: Path):
    facts = run_json("bench", saved, "--seconds", 0)
    assert [speed["batch"] for speed in facts["speeds"]] == [1, 16]
    assert all(speed["speedup"] == speed["dense_ms"] / speed["sparse_ms"] for speed in facts["speeds"])
    assert facts["kernel_error"] < 1e-3


def test_bench_of_a_shipped_model():
    shown = run("bench", "dcgan", "--seconds", 0).output
    assert "against torch eager float32" in shown and "whole model" in shown


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "run_demo", partial(cli.run_demo, seconds=0.0))
    facts = run_json("demo", "--model", "vae", "--steps", 1, "--out", tmp_path)
    assert [model["name"] for model in facts["models"]] == ["vae"]
    assert (tmp_path / "vae.png").is_file() and json.loads((tmp_path / "demo.json").read_text()) == facts


class TestErrors:
    """Exit code 1 and one line on standard error."""

    def line(self, *arguments: object) -> str:
        result = run(*arguments, code=1)
        assert result.stdout == ""
        assert result.stderr.startswith("sparsegan: ") and result.stderr.count("\n") == 1
        return result.stderr

    def test_unknown_model(self):
        assert "dcgan, vae, faces" in self.line("compress", "nosuch")
        assert "dcgan, vae, faces" in self.line("demo", "--model", "nosuch")
        assert "neither a file nor one of" in self.line("bench", "nosuch")

    def test_settings_that_make_no_sense(self, tmp_path: Path):
        out = tmp_path / "x.safetensors"
        assert "2:4" in self.line("compress", "dcgan", "--pattern", "round", "--out", out)
        assert "[0, 1)" in self.line("bench", "dcgan", "--sparsity", 1.5)
        assert "cannot be reached" in self.line("bench", "dcgan", "--sparsity", 0.999)
        assert not out.exists()

    def test_no_folder_to_write_to(self, saved: Path, tmp_path: Path):
        assert "no folder" in self.line("compress", "dcgan", "--out", tmp_path / "no" / "x")
        assert "no folder" in self.line("generate", saved, "--out", tmp_path / "no" / "x.png")

    def test_files_that_are_no_models(self, tmp_path: Path):
        text, foreign = tmp_path / "a.txt", tmp_path / "b.safetensors"
        text.write_text("hello, this is a text")
        save_file({"x": torch.zeros(3)}, foreign)
        assert "a.txt" in self.line("generate", text)
        assert "b.safetensors" in self.line("generate", foreign)
        assert "nosuch" in self.line("generate", tmp_path / "nosuch")

    def test_a_truncated_model(self, saved: Path, tmp_path: Path):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(saved.read_bytes()[:-100])
        assert "cut.safetensors" in self.line("bench", path)

    def test_a_model_that_makes_no_images(self, tmp_path: Path):
        path = tmp_path / "m.safetensors"
        save(torch.nn.Sequential(torch.nn.Linear(3, 2)).eval(), path)
        assert "images" in self.line("generate", path, "--out", tmp_path / "x.png")

    def test_a_model_without_layers(self, tmp_path: Path):
        path = tmp_path / "m.safetensors"
        save(torch.nn.Sequential(torch.nn.ReLU()).eval(), path)
        assert "no layer that takes latents" in self.line("generate", path, "--out", tmp_path / "x.png")
