"""Fashion-MNIST from the idx files of a folder; nothing is fetched."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_FILES = {"train": "train-{}-ubyte", "test": "t10k-{}-ubyte"}
_UINT8 = 0x08


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
