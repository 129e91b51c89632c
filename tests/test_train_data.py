"""Images from folders, npz and idx files and drawn ones; tasks made of images."""

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparsegan.train import data
from sparsegan.train.data import Images, draw_shapes, load_fashion_mnist, load_images
from sparsegan.train.tasks import TASKS, colourise, deblur, super_resolve

LUMA = torch.tensor([0.299, 0.587, 0.114])


def _picture(path: Path, pixels: np.ndarray | None = None, colour: tuple[int, ...] = (0, 0, 0)) -> Path:
    path.parent.mkdir(exist_ok=True)
    picture = Image.new("RGB", (8, 8), colour) if pixels is None else Image.fromarray(pixels)
    picture.save(path)
    return path


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _idx(path: Path, pixels: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
    path.write_bytes(bytes([0, 0, 8, pixels.ndim]) + sizes + pixels.tobytes())


def _check(found: Images, n: int, channels: int, side: int) -> None:
    assert found.images.shape == (n, channels, side, side)
    assert found.images.dtype == torch.float32
    assert found.images.is_contiguous()
    assert found.images.min() >= -1 and found.images.max() <= 1
    if found.labels is not None:
        assert found.labels.shape == (n,)
        assert found.labels.dtype == torch.int64


# Folders of pictures.


def test_pictures_come_in_order_of_their_names(tmp_path: Path) -> None:
    for name, red in (("b.png", 100), ("a.JPG", 200), ("c.jpeg", 0)):
        _picture(tmp_path / name, colour=(red, 0, 0))
    (tmp_path / "notes.txt").write_text("not a picture")
    found = load_images(tmp_path, 8, 3)
    _check(found, 3, 3, 8)
    assert found.labels is None
    assert found.name == tmp_path.name
    red = (found.images[:, 0].mean((1, 2)) + 1) * 127.5
    torch.testing.assert_close(red, torch.tensor([200.0, 100.0, 0.0]), rtol=0, atol=3)


def test_pixels_are_exact_where_nothing_is_resized(tmp_path: Path) -> None:
    pixels = _random(8, 8, 3)
    _picture(tmp_path / "a.png", pixels)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(load_images(tmp_path, 8, 3).images, wanted)
    grey = (wanted * LUMA[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(load_images(tmp_path, 8, 1).images, grey)


@pytest.mark.parametrize("wide", [True, False])
def test_the_middle_is_cut_out_and_resized(tmp_path: Path, wide: bool) -> None:
    pixels = np.zeros((8, 20), np.uint8)
    pixels[:, 6:10], pixels[:, 10:14] = 50, 250
    _picture(tmp_path / "a.png", pixels if wide else pixels.T)
    image = (load_images(tmp_path, 4, 1).images[0, 0] + 1) * 127.5
    image = image if wide else image.T
    torch.testing.assert_close(image[:, 0], torch.full((4,), 50.0), rtol=0, atol=30)
    torch.testing.assert_close(image[:, 3], torch.full((4,), 250.0), rtol=0, atol=30)
    assert image.mean() == pytest.approx(150, abs=2)  # nothing of the black sides


def test_resizing_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::3] = 255
    _picture(tmp_path / "a.png", stripes)
    assert (load_images(tmp_path, 8, 1).images + 1 / 3).abs().max() < 0.2


def test_folders_are_classes(tmp_path: Path) -> None:
    for kind, name in (("dog", "1.png"), ("cat", "2.png"), ("dog", "0.png"), ("cat", "deep/3.png")):
        (tmp_path / kind).mkdir(exist_ok=True)
        _picture(tmp_path / kind / name)
    assert load_images(tmp_path, 8, 1).labels.tolist() == [0, 0, 1, 1]
    _picture(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"beside them, such as loose\.png"):
        load_images(tmp_path, 8, 1)


def test_pictures_are_seen_as_they_are_meant(tmp_path: Path) -> None:
    """Turned as their EXIF says; palettes resolved."""
    picture = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 1).repeat(16, 0))
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    image = load_images(tmp_path, 16, 1).images[0, 0]
    assert image[:, 0].mean() > 0.9 > -0.9 > image[:, 15].mean()
    Image.new("RGB", (4, 4), (255, 0, 0)).convert("P").save(tmp_path / "a.png")
    assert load_images(tmp_path, 4, 3).images[0, :, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("damage", ["cut", "text", "deep"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    _picture(tmp_path / "fine.png")
    path = _picture(tmp_path / "broken.png", _random(64, 64, 3))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "text":
        path.write_text("not a picture")
    else:
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture"):
        load_images(tmp_path, 8, 1)


def test_folders_without_pictures_and_missing_ones_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no pictures in"):
        load_images(tmp_path, 8, 1)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there: name a folder"):
        load_images(tmp_path / "nowhere", 8, 1)


@pytest.mark.parametrize(("side", "channels"), [(8, 2), (0, 1)])
def test_other_channels_and_sides_are_refused(side: int, channels: int) -> None:
    with pytest.raises(ValueError, match=f"got {channels} and {side}"):
        load_images(None, side, channels)


# Arrays.


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 1), (5, 1, 8, 8), (5, 8, 8, 3), (5, 3, 8, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_holds_images_in_any_order_of_axes(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    pixels = _random(*shape)
    np.savez(tmp_path / "some.npz", images=pixels, labels=np.array([0, 1, 2, 1, 9], np.uint8))
    found = load_images(tmp_path / "some.npz", 8, channels)
    _check(found, 5, channels, 8)
    assert found.name == "some"
    assert found.labels.tolist() == [0, 1, 2, 1, 9]
    wanted = torch.from_numpy(pixels) / 127.5 - 1
    wanted = wanted[:, None] if len(shape) == 3 else wanted.permute(0, 3, 1, 2) if shape[3] < 8 else wanted
    if wanted.shape[1] > channels:
        wanted = (wanted * LUMA[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(found.images, wanted.expand(5, channels, 8, 8))


def test_many_images_are_as_few(tmp_path: Path) -> None:
    pixels = _random(1500, 6, 6)
    np.savez(tmp_path / "a.npz", images=pixels)
    found = load_images(tmp_path / "a.npz", 6, 1)
    assert found.labels is None
    assert torch.equal(found.images[:, 0], torch.from_numpy(pixels) / 127.5 - 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.float32)}, "float32, wanted uint8"),
        ({"images": np.full((2, 4, 4), math.nan)}, "float64, wanted uint8"),
        ({"images": np.array([[[None]]])}, "not an npz file of plain arrays: Object arrays"),
        ({"images": _random(2, 4)}, r"it holds \[2, 4\]"),
        ({"images": _random(2, 4, 4, 2)}, r"it holds \[2, 4, 4, 2\]"),
        ({"images": _random(0, 4, 4)}, r"it holds \[0, 1, 4, 4\]"),
        ({"pictures": _random(2, 4, 4)}, "no array 'images', only pictures"),
        ({"images": _random(2, 4, 4), "labels": np.array([0.0, math.nan])}, "float64"),
        ({"images": _random(2, 4, 4), "labels": np.array([0, 1, 2])}, "one for each of 2 images"),
        ({"images": _random(2, 4, 4), "labels": np.array([0, -1])}, "from 0 on"),
    ],
)
def test_npz_of_other_things_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "a.npz", 8, 1)


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("unpickled",)


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a zip",
        pickle.dumps(_Hostile()),
        _npz({"images": _random(9, 8, 8)})[:-40],
        _npz({"images": _random(9, 8, 8)}).replace(b"images.npy", b"\xff" * 10),
        bytes(b ^ (255 if 150 <= i < 250 else 0) for i, b in enumerate(_npz({"images": _random(9, 8, 8)}))),
    ],
)
def test_damaged_npz_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz"):
        load_images(tmp_path / "a.npz", 8, 1)


def test_an_array_file_under_the_name_of_npz_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, _random(2, 4, 4))
    with pytest.raises(ValueError, match="not an npz file"):
        load_images(tmp_path / "a.npz", 8, 1)


# idx files.


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    _idx(tmp_path / "train-images-idx3-ubyte", _random(6, 28, 28))
    _idx(tmp_path / "train-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))
    _idx(tmp_path / "t10k-images-idx3-ubyte", _random(2, 28, 28))
    return tmp_path


@pytest.mark.parametrize("whole_folder", [True, False])
def test_idx_files_are_read_with_their_labels(idx_folder: Path, whole_folder: bool) -> None:
    source = idx_folder if whole_folder else idx_folder / "train-images-idx3-ubyte"
    found = load_images(source, 28, 1)
    _check(found, 6, 1, 28)
    assert torch.equal(found.images[:, 0], torch.from_numpy(_random(6, 28, 28)) / 127.5 - 1)
    assert found.labels.tolist() == list(range(6))
    torch.testing.assert_close(load_images(source, 32, 1).images, load_fashion_mnist("train", idx_folder))
    _check(load_images(source, 14, 3), 6, 3, 14)


def test_idx_labels_must_be_those_of_the_images(idx_folder: Path) -> None:
    assert load_images(idx_folder / "t10k-images-idx3-ubyte", 28, 1).labels is None
    _idx(idx_folder / "train-labels-idx1-ubyte", np.arange(5, dtype=np.uint8))
    with pytest.raises(ValueError, match="one for each of 6 images"):
        load_images(idx_folder, 28, 1)
    with pytest.raises(ValueError, match=r"it holds \[5\]"):
        load_images(idx_folder / "train-labels-idx1-ubyte", 28, 1)


def test_without_a_source_it_is_fashion_mnist_or_shapes(
    idx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DEFAULT_FOLDER", idx_folder)
    assert load_images(None, 28, 1).name == "Fashion-MNIST"
    assert len(load_images(None, 28, 1).images) == 6
    assert load_images(None, 8, 3).name == "shapes"  # there is no colour in clothing
    monkeypatch.setattr(data, "DEFAULT_FOLDER", idx_folder / "nowhere")
    assert load_images(None, 8, 1).name == "shapes"


# Drawn shapes.


def test_shapes_are_the_same_each_time_and_differ_from_each_other() -> None:
    state = torch.get_rng_state()
    first = draw_shapes(16, 3, 200)
    assert torch.equal(torch.get_rng_state(), state)
    _check(first, 200, 3, 16)
    assert torch.equal(first.images, draw_shapes(16, 3, 200).images)
    assert first.labels.tolist() == [k % 10 for k in range(200)]
    assert len(first.images.flatten(1).unique(dim=0)) == 200
    assert first.images.std(0).mean() > 0.2
    grey = draw_shapes(16, 1, 200).images
    torch.testing.assert_close(grey, (first.images * LUMA[:, None, None]).sum(1, keepdim=True))
    assert len(draw_shapes(8, 1).images) >= 2000


def test_shapes_show_their_class() -> None:
    """In grey, where colour does not tell: the nearest of the first images has the same label."""
    shapes = draw_shapes(16, 1, 2000)
    x, labels = shapes.images.flatten(1), shapes.labels
    nearest = torch.cdist(x[1500:], x[:1500]).argmin(1)
    assert (labels[:1500][nearest] == labels[1500:]).float().mean() > 0.6  # by chance 0.1


def test_shapes_are_whole() -> None:
    images = draw_shapes(32, 1, 500).images[:, 0]
    edge = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    assert (edge > 0).float().mean() < 0.02
    assert (images.amax((1, 2)) - images.amin((1, 2)) > 0.5).all()


# Tasks.


@pytest.mark.parametrize("name", TASKS)
def test_tasks_keep_shape_and_range_and_take_something_away(name: str) -> None:
    images = draw_shapes(32, 3, 40).images
    given = TASKS[name](images)
    assert given.shape == images.shape
    assert given.abs().max() <= 1 + 1e-6
    assert 0.001 < (given - images).square().mean() < images.square().mean()
    torch.testing.assert_close(TASKS[name](images[:3]), given[:3])


def test_colourise_gives_grey_of_the_same_brightness() -> None:
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    grey = colourise(images)
    assert torch.equal(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(
        grey[1, 1, 2, 3], 0.299 * images[1, 0, 2, 3] + 0.587 * images[1, 1, 2, 3] + 0.114 * images[1, 2, 2, 3]
    )
    with pytest.raises(ValueError, match="3 channels, got 1"):
        colourise(torch.zeros(1, 1, 4, 4))


def test_super_resolve_keeps_the_means_of_4x4() -> None:
    images = torch.randn(1, 1, 12, 12)
    given = super_resolve(images)
    centre = given[0, 0, 4:8, 4:8]
    small = images[0, 0].unflatten(0, (3, 4)).unflatten(2, (3, 4)).mean((1, 3))
    # Bilinear: at 3/8 of a small pixel from its middle, 5/8 of it and 3/8 of the next, both ways.
    near = torch.tensor([3 / 8, 5 / 8, 0])
    assert centre[0, 0].item() == pytest.approx((near @ small @ near).item(), abs=1e-5)
    with pytest.raises(ValueError, match="divide by 4, got 10x12"):
        super_resolve(torch.zeros(1, 1, 10, 12))


def test_deblur_is_a_gaussian_of_that_width() -> None:
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1
    spread = deblur(point, sigma=2.0)[0, 0]
    assert spread.sum().item() == pytest.approx(1)
    at = torch.arange(33.0) - 16
    for axis in (0, 1):
        assert (spread.sum(axis) * at.square()).sum().sqrt().item() == pytest.approx(2, rel=0.03)
        assert (spread.sum(axis) * at).sum().item() == pytest.approx(0, abs=1e-5)
    assert spread[16, 18] / spread[16, 16] == pytest.approx(math.exp(-0.5), abs=1e-4)
    torch.testing.assert_close(deblur(torch.ones(1, 3, 8, 8)), torch.ones(1, 3, 8, 8))  # the edge goes on


def test_noise_is_drawn_from_its_own_generator() -> None:
    def noisy(seed: int) -> Tensor:
        return deblur(torch.zeros(1, 1, 64, 64), noise=0.1, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert noisy(1).std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy(1), noisy(1)) and not torch.equal(noisy(1), noisy(2))
    assert torch.equal(torch.get_rng_state(), state)
