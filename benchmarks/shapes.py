"""The layers and models that are timed, each layer named after the model that it stands in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegan.models import dcgan_generator, load_faces, load_model


@dataclass(frozen=True)
class LayerShape:
    """A layer as it stands in a model, BatchNorm folded in: so it has a bias.

    size: height and width of its input (1 for linear layers). relu: whether one follows.
    """

    model: str
    layer: str
    kind: Literal["linear", "conv2d", "conv_transpose2d"]
    inputs: int
    outputs: int
    size: int = 1
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    relu: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.layer}"

    @property
    def description(self) -> str:
        if self.kind == "linear":
            return f"linear {self.inputs}→{self.outputs}"
        kind = "conv" if self.kind == "conv2d" else "transposed conv"
        stride = f" /{self.stride}" if self.stride > 1 else ""
        window, channels = f"{self.kernel}x{self.kernel}{stride}", f"{self.inputs}→{self.outputs}"
        return f"{kind} {window} {channels} at {self.size}x{self.size}"

    def build(self, copies: int = 1) -> nn.Sequential:
        """The dense layer with seeded weights, and its ReLU; `copies` of them in a row, each with its own."""
        modules: list[nn.Module] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(copies):
                if self.kind == "linear":
                    modules.append(nn.Linear(self.inputs, self.outputs))
                elif self.kind == "conv2d":
                    window = (self.kernel, self.stride, self.padding)
                    modules.append(nn.Conv2d(self.inputs, self.outputs, *window))
                else:
                    window = (self.kernel, self.stride, self.padding)
                    modules.append(nn.ConvTranspose2d(self.inputs, self.outputs, *window))
                modules += [nn.ReLU()] * self.relu
        return nn.Sequential(*modules).eval().requires_grad_(False)

    def input(self, batch: int) -> Tensor:
        """Seeded input; not negative, as it would be after a ReLU."""
        shape = (batch, self.inputs) if self.kind == "linear" else (batch, self.inputs, self.size, self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu()


def _dcgan(model: str, layer: str, inputs: int, outputs: int, size: int) -> LayerShape:
    """One of the 4x4 transposed convolutions that double the image."""
    return LayerShape(model, layer, "conv_transpose2d", inputs, outputs, size, 4, 2, 1, relu=outputs > 4)


# The layer that the targets are about.
REFERENCE_LAYER = LayerShape(
    "SD VAE decoder", "up_blocks.2.resnets.1.conv1", "conv2d", 256, 256, 32, 3, 1, 1, relu=True
)

LAYERS = (
    REFERENCE_LAYER,
    LayerShape("SD VAE decoder", "mid_block.resnets.0.conv1", "conv2d", 512, 512, 32, 3, 1, 1),
    LayerShape("SD VAE decoder", "up_blocks.3.resnets.1.conv1", "conv2d", 128, 128, 128, 3, 1, 1),
    LayerShape("TAESD decoder", "layers.3.conv.0", "conv2d", 64, 64, 64, 3, 1, 1, relu=True),
    LayerShape("TAESD decoder", "layers.13.conv.0", "conv2d", 64, 64, 256, 3, 1, 1, relu=True),
    LayerShape("face DCGAN", "main.0", "conv_transpose2d", 100, 512, 1, 4, 1, 0, relu=True),
    _dcgan("face DCGAN", "main.3", 512, 256, 4),
    _dcgan("face DCGAN", "main.6", 256, 128, 8),
    _dcgan("face DCGAN", "main.9", 128, 64, 16),
    _dcgan("face DCGAN", "main.12", 64, 3, 32),
    _dcgan("DCGAN-64", "conv1", 1024, 512, 4),
    _dcgan("DCGAN-64", "conv2", 512, 256, 8),
    _dcgan("DCGAN-64", "conv3", 256, 128, 16),
    LayerShape("VAE", "decoder.0", "linear", 16, 3072, relu=True),
    _dcgan("VAE", "decoder.3", 192, 128, 4),
    _dcgan("VAE", "decoder.6", 128, 64, 8),
    _dcgan("VAE", "decoder.9", 64, 64, 16),
    LayerShape("VAE", "decoder.12", "conv2d", 64, 1, 32, 3, 1, 1),
    LayerShape("residual GAN", "blocks.2.conv1", "conv2d", 256, 256, 16, 3, 1, 1),
    LayerShape("residual GAN", "blocks.2.skip", "conv2d", 256, 256, 16, 1, 1, 0),
    LayerShape("MLP GAN", "net.2", "linear", 1024, 1024, relu=True),
)


class _UpBlock(nn.Module):
    """The residual block of the SNGAN generator (Miyato et al. 2018, arXiv:1802.05957, appendix B.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x)), scale_factor=2.0)
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        shortcut: Tensor = self.skip(F.interpolate(x, scale_factor=2.0))
        return h + shortcut


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.Linear(128, 4 * 4 * 256),
        nn.Unflatten(1, (256, 4, 4)),
        *(_UpBlock(256) for _ in range(3)),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Conv2d(256, 3, 3, padding=1),
        nn.Tanh(),
    )


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)


@dataclass(frozen=True)
class BenchModel:
    """A whole model. note: what one should know about its weights."""

    model: nn.Module
    latent_shape: tuple[int, ...]
    note: str

    def inputs(self, batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, *self.latent_shape, generator=torch.Generator().manual_seed(batch)),)


MODEL_NAMES = ("face DCGAN", "DCGAN-64", "DCGAN-32", "VAE", "residual GAN")


def build_model(name: str) -> BenchModel:
    """The model called `name`, one of MODEL_NAMES."""
    match name:
        case "face DCGAN":
            try:
                return BenchModel(load_faces(), (100, 1, 1), "trained")
            except (RuntimeError, ValueError, OSError):
                random = _seeded(lambda: dcgan_generator(100, (512, 256, 128, 64), 3))
                return BenchModel(
                    random, (100, 1, 1), "random weights, the trained ones could not be fetched"
                )
        case "DCGAN-64":
            random = _seeded(lambda: dcgan_generator(100, (1024, 512, 256, 128), 3))
            return BenchModel(random, (100, 1, 1), "random weights")
        case "DCGAN-32" | "VAE":
            shipped = load_model("dcgan" if name == "DCGAN-32" else "vae")
            return BenchModel(shipped.model, shipped.latent_shape, "trained")
        case "residual GAN":
            return BenchModel(_seeded(_residual), (128,), "random weights")
    raise ValueError(f"no model is called {name!r}; there are {', '.join(MODEL_NAMES)}")
