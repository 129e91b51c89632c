"""Small models in whose channels everything happens that happens in generators, and what must hold of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegan.models import seeded


class Up(nn.Module):
    """Linear, view, transposed convolution, group norm, pixel shuffle, depthwise, layer norm, concatenation, skip."""

    def __init__(self, norm_groups: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 8 * 16)
        self.up = nn.ConvTranspose2d(8, 32, 4, 2, 1)
        self.norm = nn.GroupNorm(norm_groups, 32)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.slope = nn.PReLU(8)
        self.layer_norm = nn.LayerNorm(8)
        self.wide = nn.ConvTranspose2d(8, 16, 3, padding=1, groups=8)
        self.last = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).view(len(z), -1, 4, 4)
        x = F.pixel_shuffle(F.silu(self.norm(self.up(x))), 2)
        y = self.slope(self.depthwise(x))
        x = self.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return torch.tanh(self.last(torch.cat([x, self.wide(y + x)], 1)))


class Gated(nn.Module):
    """Squeeze and excitation, learnt constants, noise for all channels, a residual of its own width, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(12, 8), nn.Linear(8, 12)
        self.scale = nn.Parameter(torch.ones(1, 12, 1, 1))
        self.place = nn.Parameter(torch.zeros(12, 4, 4))
        self.register_buffer("noise", torch.randn(1, 1, 4, 4))
        self.same = nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect")
        self.norm = nn.InstanceNorm2d(12)
        self.flat = nn.Linear(12 * 16, 10)
        self.last = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale + self.place + self.noise
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        x = x + F.relu(self.norm(self.same(x)))
        return self.last(F.leaky_relu(self.flat(F.avg_pool2d(x.flip(3), 1).flatten(1)), 0.1))


class Cut(nn.Module):
    """Halves that go separate ways, one channel taken out, a mean over half of the channels, others shifted by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.left, self.right = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)
        self.norm = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        x = F.relu(self.left(a)) + torch.sigmoid(self.right(b)) + a[:, 2:3]
        x = x * torch.rsqrt(x[:, :4].square().mean(1, keepdim=True) + 1e-3)
        return self.last(self.norm(x).roll(1, 1))


class Written(nn.Module):
    """The width of the map is written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.hidden, self.last = nn.Linear(4, 8 * 4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.last(F.relu(self.hidden(self.linear(z).view(-1, 8, 2, 2))))


class Unknown(nn.Module):
    """An operation across channels that nothing knows how to permute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(torch.cumsum(self.first(x), 1)))


class Shared(nn.Module):
    """One layer called twice, its weight also under another name, and a weight that is used outside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.alias = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.alias.weight = self.twice.weight
        self.between, self.used, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.alias(self.twice(F.relu(self.twice(self.first(x)))))))
        return self.last(F.relu(self.used(x) * self.used.weight.square().sum((1, 2, 3))[:, None, None]))


KINDS = (
    "conv",
    "transposed",
    "batch",
    "group",
    "instance",
    "depthwise",
    "grouped",
    "linear",
    "cat",
    "add",
    "gate",
    "flip",
)


def step(kind: str, width: int, other: int) -> tuple[nn.Module, int]:
    """The layer of a step and the width that it makes."""
    match kind:
        case "conv":
            return nn.Conv2d(width, 12, 3, padding=1), 12
        case "transposed":
            return nn.ConvTranspose2d(width, 8, 3, padding=1), 8
        case "batch":
            return nn.BatchNorm2d(width), width
        case "group":
            return nn.GroupNorm(4, width), width
        case "instance":
            return nn.InstanceNorm2d(width, affine=True), width
        case "depthwise":
            return nn.Conv2d(width, 2 * width, 3, padding=1, groups=width), 2 * width
        case "grouped":
            return nn.Conv2d(width, 8, 1, groups=4), 8
        case "linear":
            return nn.Linear(width, width), width
        case "add":
            return nn.Conv2d(other, width, 1), width
        case "cat":
            return nn.Identity(), width + other
        case "gate":
            return nn.Identity(), width // 2
    return nn.Identity(), width


class Random(nn.Module):
    """A chain of steps, (kind, number of an earlier map): "cat" and "add" read that map too."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.steps: list[tuple[str, int]] = []
        self.layers = nn.ModuleList()
        widths = [8]
        for kind, number in steps:
            earlier = number % len(widths)
            if (kind == "gate" and widths[-1] % 8) or (kind in ("cat", "depthwise") and widths[-1] > 24):
                kind = "conv"
            layer, width = step(kind, widths[-1], widths[earlier])
            self.steps.append((kind, earlier))
            self.layers.append(layer)
            widths.append(width)
        self.last = nn.Conv2d(widths[-1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for (kind, earlier), layer in zip(self.steps, self.layers, strict=True):
            x, other = maps[-1], maps[earlier]
            if kind == "cat":
                x = torch.cat([x, other], 1)
            elif kind == "add":
                x = x + layer(other)
            elif kind == "linear":
                x = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            elif kind == "gate":
                a, b = x.chunk(2, 1)
                x = a * b.sigmoid()
            elif kind == "flip":
                x = F.leaky_relu(x, 0.2).flip(1)
            else:
                x = F.relu(layer(x))
            maps.append(x)
        return self.last(maps[-1])


def double(model: nn.Module) -> nn.Module:
    """In float64, where sums in another order differ by next to nothing."""
    return model.double().eval().requires_grad_(False)


def images(channels: int = 3, side: int = 4, n: int = 2) -> Tensor:
    return torch.randn(
        n, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def latents(length: int, n: int = 2) -> Tensor:
    return torch.randn(n, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CASES = {
    "up": (lambda: Up(), latents(5)),
    "up, one norm group": (lambda: Up(1), latents(5)),
    "gated": (Gated, images()),
    "cut": (Cut, images()),
    "written": (Written, latents(4)),
    "unknown": (Unknown, images()),
    "shared": (Shared, images()),
}


def case(name: str) -> tuple[nn.Module, tuple[Tensor]]:
    build, x = CASES[name]
    return double(seeded(build, 0)), (x,)
