"""Images to train on, from folders of pictures, npz and idx files, or drawn; nothing is fetched."""

import gzip
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_FILES = {"train": "train-{}-ubyte", "test": "t10k-{}-ubyte"}
_UINT8 = 0x08
_PICTURES = (".png", ".jpg", ".jpeg")
_DRAWN = 4000


@dataclass(frozen=True)
class Images:
    """images: [N, C, S, S] float32 in [-1, 1]. labels: the class of each, [N] int64 from 0, if known. name: for people."""

    images: Tensor
    labels: Tensor | None
    name: str


def load_images(source: Path | None, side: int, channels: int) -> Images:
    """The images of `source`, all of them in memory, as squares of `side` pixels and `channels` 1 (grey) or 3 (colour).

    source: a folder of pictures (PNG, JPEG), in the order of their names; the folders in it, if there are, are the
    classes. Or an npz file with `images` uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] and, if known, whole-number `labels`
    [N]. Or an idx file of images, or a folder of idx files as MNIST has them, of which the training images are taken with
    their labels. None: Fashion-MNIST where it is installed, if grey is wanted, as it has no colours; else `draw_shapes`.

    What is not square is cut to its middle, then resized (bilinear, with antialiasing); but 28x28 idx images become 32x32
    by a black frame, as in `load_fashion_mnist`. Grey is 0.299 R + 0.587 G + 0.114 B.

    Raises FileNotFoundError where nothing is, ValueError for what cannot be read, named, and for other channels.
    """
    if channels not in (1, 3) or side < 1:
        raise ValueError(f"images have 1 or 3 channels and a side of 1 or more, got {channels} and {side}")
    if source is None:
        if channels == 3 or not DEFAULT_FOLDER.is_dir():
            return draw_shapes(side, channels)
        return Images(*_read_idx_images(DEFAULT_FOLDER, side, channels), "Fashion-MNIST")
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"{source} is not there: name a folder of pictures, an npz or an idx file, or a folder of idx files"
        )
    if source.suffix == ".npz":
        return Images(*_read_npz(source, side, channels), source.stem)
    if source.is_file() or any(source.glob("*-idx?-ubyte*")):
        return Images(*_read_idx_images(source, side, channels), source.stem)
    return Images(*_read_pictures(source, side, channels), source.name)


def draw_shapes(side: int, channels: int, n: int = _DRAWN) -> Images:
    """`n` images of ten kinds of shapes on dark ground, always the same; labels from 0 to 9 in turn.

    Disc, ring, square, frame, triangle, cross, diamond, bars, half disc, two dots: of random place, size, tilt and
    brightness, and of a colour that the kind decides but for a little.
    """
    rng = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=rng)

    labels = torch.arange(n) % 10
    # Coordinates in the shape's own system, where it reaches from about -1 to 1.
    ticks = (2 * torch.arange(side) + 1) / side - 1
    size, tilt = uniform(0.4, 0.7), uniform(-0.35, 0.35)
    dx, dy = ticks[None, None, :] - uniform(-0.25, 0.25), ticks[None, :, None] - uniform(-0.25, 0.25)
    x = (dx * tilt.cos() + dy * tilt.sin()) / size
    y = (dy * tilt.cos() - dx * tilt.sin()) / size
    radius, box = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
    # Distances to the edge, negative inside.
    edges = [
        radius - 1,
        (radius - 0.75).abs() - 0.25,
        box - 0.85,
        (box - 0.7).abs() - 0.2,
        torch.maximum(y - 0.7, 0.9 * x.abs() - 0.45 * (y + 1.3)),
        torch.maximum(torch.minimum(x.abs(), y.abs()) - 0.3, box - 1),
        (x.abs() + y.abs() - 1) * 0.7,
        torch.maximum((y.abs() - 0.55).abs() - 0.25, x.abs() - 1),
        torch.maximum(radius - 1, y),
        ((x.abs() - 0.55).square() + y.square()).sqrt() - 0.42,
    ]
    edge = torch.empty(n, side, side)
    for kind, distance in enumerate(edges):
        edge[kind::10] = distance[kind::10]
    inside = (0.5 - edge * size * side / 2).clamp(0, 1)[:, None]

    hue = (labels[:, None, None] / 10 + uniform(-0.03, 0.03)) * 2 * math.pi
    phase = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
    colour = (0.65 + 0.35 * torch.cos(hue - phase)) * uniform(0.75, 1.0)  # [N, 1, 3]
    ground = uniform(0.0, 0.15)[:, None]
    images = ground + (colour[:, 0, :, None, None] - ground) * inside
    return Images(_with_channels(images * 2 - 1, channels), labels, "shapes")


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, plain or gzipped (`.gz`), as a uint8 tensor.

    Format: two zero bytes, element type, number of dimensions, each dimension as big-endian uint32, then the
    data. Raises ValueError when the file is not such a file or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); install or copy it again") from error
    if len(raw) < 4 or raw[:3] != bytes([0, 0, _UINT8]):
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it starts with {raw[:4].hex(' ')!r}")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path} has {len(raw) - start} bytes of data, its shape {shape} wants {math.prod(shape)}"
        )
    # bytearray: torch wants to own writable memory.
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).reshape(shape)


def load_fashion_mnist(split: Literal["train", "test"], folder: Path | None = None) -> Tensor:
    """Images [N, 1, 32, 32] float32 in [-1, 1]: the 28x28 originals with a black frame of two pixels.

    `folder` holds the idx files (`train-images-idx3-ubyte`, `t10k-images-idx3-ubyte`, gzipped or not); by
    default where Debian's dataset-fashion-mnist puts them. Raises FileNotFoundError when the file is not
    there, ValueError when it does not hold 28x28 images.
    """
    path = _find(_FILES[split].format("images-idx3"), folder)
    pixels = read_idx(path)
    if pixels.dim() != 3 or pixels.shape[1:] != (28, 28) or len(pixels) == 0:
        raise ValueError(f"{path} should hold images [N, 28, 28] with N > 0, it holds {list(pixels.shape)}")
    return F.pad(pixels.float().unsqueeze(1) / 127.5 - 1, (2, 2, 2, 2), value=-1.0)


def load_labels(split: Literal["train", "test"], folder: Path | None = None) -> Tensor:
    """Which of ten kinds of clothing each image of `load_fashion_mnist` shows, [N] int64 from 0 to 9; errors as there."""
    path = _find(_FILES[split].format("labels-idx1"), folder)
    labels = read_idx(path)
    if labels.dim() != 1 or len(labels) == 0 or labels.max() > 9:
        raise ValueError(
            f"{path} should hold labels [N] from 0 to 9 with N > 0, it holds {list(labels.shape)}"
        )
    return labels.long()


def _find(name: str, folder: Path | None) -> Path:
    folder = DEFAULT_FOLDER if folder is None else Path(folder)
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no Fashion-MNIST in {folder}: neither {name}.gz nor {name} is there. "
            "Install the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), "
            "or give a folder that holds the idx files with --data."
        )
    return path


def _read_pictures(folder: Path, side: int, channels: int) -> tuple[Tensor, Tensor | None]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _PICTURES and p.is_file())
    if not paths:
        raise FileNotFoundError(f"no pictures in {folder}: there is no file {', '.join(_PICTURES)} in it")
    kinds = [path.relative_to(folder).parts[:-1] for path in paths]
    classes = sorted({kind[0] for kind in kinds if kind})
    if classes and not all(kinds):
        loose = paths[kinds.index(())]
        raise ValueError(
            f"{folder} has pictures both in folders, which are classes, and beside them, such as {loose.name}: "
            "move them into a folder"
        )
    images = torch.cat([_squares(_read_picture(path), side, channels) for path in paths])
    return images, torch.tensor([classes.index(kind[0]) for kind in kinds]) if classes else None


def _read_picture(path: Path) -> Tensor:
    """A picture as it is meant to be seen, uint8 [1, 3, H, W]."""
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                raise ValueError(f"its pixels are {picture.mode!r}, not of 8 bits")
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    # Pillow raises SyntaxError for broken PNG chunks.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}; replace or remove it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _read_npz(path: Path, side: int, channels: int) -> tuple[Tensor, Tensor | None]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with file:
            names = list(file.files)
            arrays = {name: file[name] for name in ("images", "labels") if name in names}
    except (
        OSError,
        EOFError,
        ValueError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
        MemoryError,
    ) as error:
        raise ValueError(f"{path} is not an npz file of plain arrays: {error}") from error
    if "images" not in arrays:
        raise ValueError(f"{path} has no array 'images', only {', '.join(names) or 'nothing'}")
    pixels, labels = arrays["images"], arrays.get("labels")
    if pixels.dtype != np.uint8:
        raise ValueError(f"'images' of {path} are {pixels.dtype}, wanted uint8 from 0 to 255")
    images = _squares(_channels_first(torch.from_numpy(pixels), path), side, channels)
    return images, None if labels is None else _checked_labels(labels, len(images), path)


def _checked_labels(labels: np.ndarray, n: int, path: Path) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (n,) or labels.min() < 0:
        raise ValueError(
            f"the labels of {path} should be whole numbers from 0 on, one for each of {n} images; "
            f"they are {labels.dtype} {list(labels.shape)}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _read_idx_images(source: Path, side: int, channels: int) -> tuple[Tensor, Tensor | None]:
    if source.is_dir():
        source = _find(_FILES["train"].format("images-idx3"), source)
    pixels = _channels_first(read_idx(source), source)
    if side == 32 and pixels.shape[2:] == (28, 28):
        pixels = F.pad(pixels, (2, 2, 2, 2))
    images = _squares(pixels, side, channels)
    beside = source.with_name(source.name.replace("images-idx3", "labels-idx1"))
    found = beside != source and beside.is_file()
    return images, _checked_labels(read_idx(beside).numpy(), len(images), beside) if found else None


def _channels_first(pixels: Tensor, path: Path) -> Tensor:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] as [N, C, H, W]; ValueError for anything else, and for nothing."""
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    elif pixels.dim() == 4 and pixels.shape[3] in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.dim() != 4 or pixels.shape[1] not in (1, 3) or pixels.numel() == 0:
        raise ValueError(
            f"{path} should hold images [N, H, W], [N, H, W, C] or [N, C, H, W] of 1 or 3 channels, N > 0; "
            f"it holds {list(pixels.shape)}"
        )
    return pixels


def _squares(pixels: Tensor, side: int, channels: int) -> Tensor:
    """uint8 [N, 1 or 3, H, W] as float32 [N, channels, side, side] in [-1, 1]: the middle, resized."""
    height, width = pixels.shape[2:]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    parts = []
    for part in pixels[:, :, top : top + size, left : left + size].split(
        1024
    ):  # as floats they take much room
        images = part.float() / 127.5 - 1
        if size != side:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True).clamp(-1, 1)
        parts.append(_with_channels(images, channels))
    return torch.cat(parts).contiguous()


def _with_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    return (images * images.new_tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
