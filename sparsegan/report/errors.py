"""Where the error of a compressed model comes from: the zeros, the number formats, or the kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsegan.metrics import psnr
from sparsegan.report.results import with_reference_backend


class ErrorSplit(NamedTuple):
    """What each step of compression changed, as PSNR in dB over all images together; +inf where nothing differs."""

    pruning: float
    quantisation: float
    kernels: float


def error_split(
    dense: nn.Module, pruned: nn.Module, swapped: nn.Module, inputs: tuple[Any, ...]
) -> ErrorSplit:
    """Compare the images [N, C, H, W] in [-1, 1] after each step of compression with those before it, at the same inputs.

    dense, pruned: float32 models. swapped: what `swap_to_sparse` made of `pruned`. The first error is that of `pruned` against
    `dense`; the second that of `swapped` on the reference backend, which computes its number formats plainly, against `pruned`;
    the third that of its own kernels against the reference backend. Raises ValueError when a model does not give images, gives
    another shape than the one before, or NaN.
    """
    models = {
        "dense": dense,
        "pruned": pruned,
        "reference": with_reference_backend(swapped),
        "swapped": swapped,
    }
    with torch.no_grad():
        images = {name: model(*inputs) for name, model in models.items()}
    for name, found in images.items():
        if not isinstance(found, Tensor) or found.dim() != 4 or not found.isfinite().all():
            raise ValueError(
                f"the {name} model should give images [N, C, H, W] without NaN or infinite values"
            )
    # As one image: a mean over images is infinite as soon as one of them is equal.
    together = [found.flatten(0, 1)[None] for found in images.values()]
    return ErrorSplit(*(psnr(after, before).item() for before, after in pairwise(together)))
