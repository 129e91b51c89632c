"""The trainer on tiny data sets that the tests write themselves; no data needs to be installed."""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from sparsegan.metrics.backbones import ClothingClassifier
from sparsegan.models import ConvVAE, dcgan_generator
from sparsegan.train import (
    fit_prior,
    load_fashion_mnist,
    load_labels,
    train_clothing,
    train_gan,
    train_vae,
)
from sparsegan.train.__main__ import app
from sparsegan.train.artifacts import save_grid, save_weights
from sparsegan.train.data import read_idx


def _write_idx(path: Path, images: Tensor) -> None:
    header = bytes([0, 0, 8, images.dim()]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
    content = header + images.numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _rectangles(n: int, seed: int) -> Tensor:
    """uint8 [n, 28, 28]: a bright rectangle each, of random size, in the middle."""
    half = torch.randint(3, 13, (n, 2), generator=torch.Generator().manual_seed(seed))
    distance = (torch.arange(28) - 13.5).abs()
    inside = (distance[None, :, None] < half[:, :1, None]) & (distance[None, None, :] < half[:, 1:, None])
    return inside.to(torch.uint8) * 230


def _labels(n: int, seed: int) -> Tensor:
    """uint8 [n]: 1 where the rectangle of the same seed is wide, else 0."""
    images = _rectangles(n, seed)
    return (images[:, 14].sum(1) > images[:, :, 14].sum(1)).to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    _write_idx(folder / "train-images-idx3-ubyte.gz", _rectangles(128, seed=0))
    _write_idx(folder / "t10k-images-idx3-ubyte", _rectangles(32, seed=1))
    _write_idx(folder / "train-labels-idx1-ubyte.gz", _labels(128, seed=0))
    _write_idx(folder / "t10k-labels-idx1-ubyte", _labels(32, seed=1))
    return folder


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    """The command sets the number of threads of its process, which here is that of every test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# Data.


def test_images_are_scaled_and_framed_in_black(folder: Path) -> None:
    pixels = _rectangles(128, seed=0)
    images = load_fashion_mnist("train", folder)
    assert images.shape == (128, 1, 32, 32)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0, 2:30, 2:30], pixels / 127.5 - 1)
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:30, 2:30] = False
    assert (images[:, 0, frame] == -1).all()


def test_plain_and_gzipped_files_are_both_found(folder: Path) -> None:
    assert len(load_fashion_mnist("train", folder)) == 128
    assert len(load_fashion_mnist("test", folder)) == 32


def test_labels_belong_to_the_images(folder: Path) -> None:
    labels = load_labels("train", folder)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, _labels(128, seed=0).long())
    assert len(load_labels("test", folder)) == 32


@pytest.mark.parametrize("labels", [torch.tensor([3, 10]), torch.zeros(2, 3)])
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: Tensor) -> None:
    _write_idx(tmp_path / "train-labels-idx1-ubyte", labels.to(torch.uint8))
    with pytest.raises(ValueError, match="labels"):
        load_labels("train", tmp_path)


def test_missing_data_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist[\s\S]*--data"):
        load_fashion_mnist("train", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"", "not an idx file"),
        ("a", b"\x89PNG" + bytes(20), "not an idx file"),
        ("a", bytes([0, 0, 13, 1, 0, 0, 0, 1]) + bytes(4), "not an idx file"),  # float32 elements
        ("a", bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(8), "has 8 bytes"),
        ("a", bytes([0, 0, 8, 3, 0, 0]), "bytes of data"),
        ("a.gz", b"not gzip", "gzip"),
        ("a.gz", gzip.compress(bytes(1000))[:-9], "gzip"),
        ("a.gz", gzip.compress(bytes(1000))[:10] + b"\xff" * 20, "gzip"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    _write_idx(tmp_path / "train-images-idx3-ubyte", torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="28, 28"):
        load_fashion_mnist("train", tmp_path)


# Training.


def _train(kind: str, images: Tensor, seed: int, steps: int = 2, progress=None) -> torch.nn.Module:
    if kind == "clothing":
        labels = torch.arange(len(images)) % 10
        return train_clothing(images, labels, steps=steps, batch=8, seed=seed, progress=progress)
    train = train_gan if kind == "gan" else train_vae
    return train(images, steps=steps, batch=8, seed=seed, progress=progress)


@pytest.mark.parametrize("kind", ["gan", "vae", "clothing"])
def test_training_depends_on_the_seed_and_on_nothing_else(kind: str, folder: Path) -> None:
    images = load_fashion_mnist("train", folder)
    state = torch.get_rng_state()
    first = _train(kind, images, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "training moved the user's random numbers"
    torch.rand(5)
    again = _train(kind, images, seed=3).state_dict()
    other = _train(kind, images, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", ["gan", "vae", "clothing"])
def test_training_reports_each_step_and_returns_a_model_at_rest(kind: str, folder: Path) -> None:
    steps = []
    model = _train(kind, load_fashion_mnist("train", folder), 0, 3, lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3]
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("kind", ["gan", "vae", "clothing"])
def test_training_stops_at_the_first_loss_that_is_not_finite(kind: str) -> None:
    with pytest.raises(FloatingPointError, match="at step 1"):
        _train(kind, torch.full((8, 1, 32, 32), float("nan")), 0)


def test_vae_learns_to_reconstruct(folder: Path) -> None:
    images, unseen = load_fashion_mnist("train", folder), load_fashion_mnist("test", folder)
    model = train_vae(images, steps=40, batch=16, seed=0)
    error = (model(unseen) - unseen).square().mean()
    assert error < 0.5 * (images.mean(0) - unseen).square().mean(), "no better than the mean image"


def test_classifier_learns_to_tell_kinds_apart(folder: Path) -> None:
    images, labels = load_fashion_mnist("train", folder), load_labels("train", folder)
    model = train_clothing(images, labels, steps=40, batch=32, seed=0)
    unseen, wanted = load_fashion_mnist("test", folder), load_labels("test", folder)
    assert (model.logits(unseen).argmax(1) == wanted).float().mean() > 0.8


def _energy_distance(x: Tensor, y: Tensor) -> Tensor:
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def test_prior_learns_more_than_mean_and_variance() -> None:
    """Four clusters of codes, at +-2 in two dimensions: the prior comes nearer than a fitted Gaussian."""
    rng = torch.Generator().manual_seed(0)
    means = torch.randint(2, (256, 2), generator=rng) * 4.0 - 2

    class Clusters(ConvVAE):
        def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return means[: len(images)], torch.full((len(images), 2), -4.0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = Clusters(latent=2)
    fit_prior(vae, torch.zeros(256, 1, 32, 32), steps=300, batch=256, seed=0)
    noise = torch.randn(1000, 2, generator=rng)
    gaussian = means.mean(0) + means.std(0) * noise
    assert _energy_distance(vae.prior(noise), means) < 0.5 * _energy_distance(gaussian, means)


def test_prior_stops_at_the_first_loss_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="at step 1"):
        fit_prior(ConvVAE().eval(), torch.full((8, 1, 32, 32), float("nan")), steps=2, batch=8)


def test_gan_moves_towards_the_data() -> None:
    """Generators that saw only bright or only dark images make brighter or darker ones."""
    z = torch.randn(16, 64, 1, 1, generator=torch.Generator().manual_seed(0))
    bright, dark = (
        train_gan(torch.full((8, 1, 32, 32), value), steps=12, batch=8, seed=0)(z).mean()
        for value in (0.9, -0.9)
    )
    assert bright > dark + 0.02


# What a run leaves behind.


def test_weights_are_stored_small_and_read_back(tmp_path: Path) -> None:
    model = dcgan_generator(8, (16, 8), 1)
    model[1].running_var.fill_(1e6)  # beyond float16
    save_weights(model, tmp_path / "w.safetensors")
    state = load_file(tmp_path / "w.safetensors")
    assert {name for name, t in state.items() if t.dtype == torch.float16} == {
        "0.weight",
        "3.weight",
        "6.weight",
    }
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-5)


def test_grid_places_images_row_by_row(tmp_path: Path) -> None:
    from PIL import Image

    images = torch.linspace(-1, 1, 6).reshape(6, 1, 1, 1).expand(6, 1, 4, 5)
    save_grid(images, tmp_path / "g.png", columns=3)
    picture = Image.open(tmp_path / "g.png")
    assert picture.size == (15, 8)
    assert [picture.getpixel((5 * (i % 3) + 2, 4 * (i // 3) + 2)) for i in range(6)] == [
        0,
        51,
        102,
        153,
        204,
        255,
    ]

    red = torch.tensor([1.0, -1, -1]).reshape(3, 1, 1).expand(3, 4, 4)
    save_grid(torch.stack([torch.ones(3, 4, 4), red]), tmp_path / "c.png", columns=2)
    assert Image.open(tmp_path / "c.png").getpixel((6, 1)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(5, 1, 4, 4), (0, 1, 4, 4), (4, 2, 4, 4)])
def test_grid_refuses_what_does_not_fill_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        save_grid(torch.zeros(shape), tmp_path / "g.png", columns=2)


@pytest.mark.parametrize(("command", "stem"), [("gan", "dcgan"), ("vae", "vae")])
def test_one_command_writes_weights_card_and_grid(
    command: str, stem: str, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "folder"
    arguments = [command, "--out", str(out), "--data", str(folder), "--steps", "2", "--seed", "5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == [f"{stem}.md", f"{stem}.png", f"{stem}.safetensors"]
    model = dcgan_generator() if command == "gan" else ConvVAE()
    model.load_state_dict(load_file(out / f"{stem}.safetensors"))
    card = (out / f"{stem}.md").read_text(encoding="utf-8")
    assert f"python -m sparsegan.train {command} --out DIR --steps 2 --seed 5 --threads 1" in card
    assert "MIT" in card
    assert f"({stem}.png)" in card


def test_the_classifier_is_written_with_a_card_that_says_how_often_it_is_right(
    folder: Path, tmp_path: Path
) -> None:
    arguments = ["clothing", "--out", str(tmp_path), "--data", str(folder), "--steps", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clothing.md", "clothing.safetensors"]
    ClothingClassifier().load_state_dict(load_file(tmp_path / "clothing.safetensors"))
    card = (tmp_path / "clothing.md").read_text(encoding="utf-8")
    assert "python -m sparsegan.train clothing --out DIR --steps 2 --seed 0 --threads 1" in card
    assert re.search(r"32 test images \| \d+\.\d% \|", card)
    assert "png" not in card


def test_command_refuses_labels_that_do_not_match(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    _write_idx(tmp_path / "t10k-labels-idx1-ubyte", _labels(31, seed=1))
    result = CliRunner().invoke(app, ["clothing", "--out", str(tmp_path / "out"), "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "32 images and 31 labels" in result.output


def test_command_without_data_fails_with_the_reason(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["gan", "--out", str(tmp_path / "out"), "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert re.search("dataset-fashion-mnist", result.output)
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_test_set_too_small_to_show(tmp_path: Path) -> None:
    _write_idx(tmp_path / "train-images-idx3-ubyte", _rectangles(8, seed=0))
    _write_idx(tmp_path / "t10k-images-idx3-ubyte", _rectangles(3, seed=0))
    result = CliRunner().invoke(app, ["vae", "--out", str(tmp_path / "out"), "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "16 images or more" in result.output
