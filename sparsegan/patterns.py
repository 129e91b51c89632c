"""Which weights may be zero together: hardware-friendly mask patterns, and the view of a weight they act on.

Every layer that can be pruned is a gather-GEMM, so its weight is seen as ``[O, T, C]``: output channel, tap
(kernel position in raster order; one for a linear layer), input channel within the group. Blocks lie in the
(O, C) plane of one tap, because that is what a kernel loads at one offset.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PrunableLayer: TypeAlias = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
PRUNABLE_TYPES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class Pattern(ABC):
    """A way of dividing a weight view ``[O, T, C]`` into groups that are kept or zeroed as one."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `parse_pattern` reads back."""

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def group_sums(self, scores: Tensor) -> Tensor:
        """Sum of ``scores [O, T, C]`` over each group; the shape of the result is the pattern's own."""

    @abstractmethod
    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Spread ``kept`` (bool or of another dtype, shaped as `group_sums` returns) over a weight view: ``[O, T, C]``.

        Raises ValueError when ``kept`` is not one value per group of ``shape``.
        """

    def respected_by(self, nonzero: Tensor) -> bool:
        """Whether the zeros of ``nonzero`` (bool ``[O, T, C]``) are whole groups of this pattern, but for stray ones."""
        kept = self.expand(self.group_sums(nonzero) > 0, tuple(nonzero.shape))
        return int((kept & ~nonzero).sum()) <= STRAY_ZEROS * int(kept.sum())

    def _check_groups(self, kept: Tensor, expected: tuple[int, ...], shape: tuple[int, ...]) -> None:
        if tuple(kept.shape) != expected:
            raise ValueError(
                f"pattern {self}: a weight view of shape {tuple(shape)} has groups of shape {expected}, "
                f"got kept of shape {tuple(kept.shape)}"
            )


# Weights that were rounded (float16, int8) hold a few exact zeros that nobody pruned.
STRAY_ZEROS = 0.005


@dataclass(frozen=True)
class BlockPattern(Pattern):
    """Blocks of ``bo`` output channels x ``bk`` input channels at one tap; smaller at a ragged edge.

    Groups: ``[ceil(O / bo), T, ceil(C / bk)]``. Raises ValueError unless both sizes are at least 1.
    """

    bo: int
    bk: int

    def __post_init__(self) -> None:
        if self.bo < 1 or self.bk < 1:
            raise ValueError(f"a block needs at least 1x1 channels, got {self.bo}x{self.bk}")

    @property
    def name(self) -> str:
        return f"{self.bo}x{self.bk}"

    def group_sums(self, scores: Tensor) -> Tensor:
        o, _, c = scores.shape
        padded = F.pad(scores, (0, -c % self.bk, 0, 0, 0, -o % self.bo))
        return padded.unflatten(2, (-1, self.bk)).unflatten(0, (-1, self.bo)).sum((1, 4))

    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        o, t, c = shape
        self._check_groups(kept, (-(-o // self.bo), t, -(-c // self.bk)), shape)
        rows = kept.repeat_interleave(self.bo, 0)[:o]
        return rows.repeat_interleave(self.bk, 2)[:, :, :c].contiguous()


@dataclass(frozen=True)
class ChannelPattern(Pattern):
    """Whole output channels, all taps and inputs. Groups: ``[O]``."""

    @property
    def name(self) -> str:
        return "channel"

    def group_sums(self, scores: Tensor) -> Tensor:
        return scores.sum((1, 2))

    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        self._check_groups(kept, (shape[0],), shape)
        return kept[:, None, None].expand(*shape).contiguous()


@dataclass(frozen=True)
class NMPattern(Pattern):
    """``n`` weights kept of every ``m`` consecutive input channels; a shorter last run too.

    Each weight is its own group, ``[O, T, C]``, but they are not free: `best` makes the only choice there is.
    Raises ValueError unless 1 <= n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"an N:M pattern needs 1 <= N < M, got {self.n}:{self.m}")

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def group_sums(self, scores: Tensor) -> Tensor:
        return scores

    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        self._check_groups(kept, tuple(shape), shape)
        return kept

    def best(self, scores: Tensor) -> Tensor:
        """Bool ``[O, T, C]``: the ``n`` highest of every ``m`` scores, the earlier channel on a tie."""
        c = scores.shape[2]
        runs = F.pad(scores.double(), (0, -c % self.m), value=-torch.inf).unflatten(2, (-1, self.m))
        order = runs.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order[..., : self.n], True)
        return kept.flatten(2)[:, :, :c].contiguous()

    def respected_by(self, nonzero: Tensor) -> bool:
        runs = F.pad(nonzero, (0, -nonzero.shape[2] % self.m)).unflatten(2, (-1, self.m))
        return bool((runs.sum(-1) <= self.n).all())


def parse_pattern(text: str) -> Pattern:
    """The pattern called ``"4x4"`` (output x input channels), ``"channel"`` or ``"2:4"``; else ValueError."""
    name = text.strip().lower()
    if name == "channel":
        return ChannelPattern()
    if match := re.fullmatch(r"(\d+)x(\d+)", name, re.ASCII):
        return BlockPattern(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+):(\d+)", name, re.ASCII):
        return NMPattern(int(match[1]), int(match[2]))
    raise ValueError(f"unknown pattern {text!r}: write '4x4' (a block), 'channel' or '2:4' (N:M)")


# The finest blocks that run at full speed. CPU: a lane holds the 4 (u8) or 2 (bf16) input channels of one dot
# instruction, and 8 output channels reuse each loaded pixel enough to hide the loads. CUDA: a tensor core wants a
# slice of the sum 32 wide to be present or absent as a whole, and 32 output channels reuse each gathered pixel.
_FASTEST: dict[tuple[str, torch.dtype], Pattern] = {
    ("cpu", torch.int8): BlockPattern(8, 4),
    ("cpu", torch.bfloat16): BlockPattern(8, 4),
    ("cpu", torch.float32): BlockPattern(8, 4),
    ("cuda", torch.int8): BlockPattern(32, 32),
    ("cuda", torch.float16): BlockPattern(32, 32),
    ("cuda", torch.bfloat16): BlockPattern(32, 32),
}


def pattern_for(device: str | torch.device, dtype: torch.dtype = torch.int8) -> Pattern:
    """The finest pattern to prune with for full speed on ``device`` with ``dtype`` weights.

    For CUDA it is a prediction: no GPU was there to measure on. Raises ValueError for a device and dtype without
    kernels, RuntimeError for a device that torch does not know.
    """
    kind = torch.device(device).type
    if (pattern := _FASTEST.get((kind, dtype))) is None:
        known = ", ".join(f"{d} {t}" for d, t in _FASTEST)
        raise ValueError(f"no pattern for {kind} {dtype}; there are patterns for: {known}")
    return pattern


# Coarsest first: the first one respected is the one that tells a kernel most.
_KNOWN: tuple[Pattern, ...] = (
    ChannelPattern(),
    *(BlockPattern(*size) for size in ((32, 32), (16, 16), (8, 8), (16, 4), (8, 4), (4, 4), (4, 1), (1, 4))),
    NMPattern(1, 4),
    NMPattern(2, 4),
    BlockPattern(1, 1),
)


def detect_pattern(view: Tensor) -> Pattern | None:
    """The coarsest known pattern whose groups the zeros of ``view [O, T, C]`` fill; None for a dense weight.

    Zeros in no order are the pattern 1x1; up to `STRAY_ZEROS` of the weights may be zero by chance.
    """
    nonzero = view != 0
    if int((~nonzero).sum()) <= STRAY_ZEROS * nonzero.numel():
        return None
    return next(pattern for pattern in _KNOWN if pattern.respected_by(nonzero))


def effective_weight(layer: PrunableLayer) -> Tensor:
    """The weight ``layer`` computes with, shaped as ``layer.weight``; parametrizations and pruning applied.

    `torch.nn.utils.prune` refreshes ``layer.weight`` only in the forward pass, so its mask is applied here.
    """
    mask = getattr(layer, "weight_mask", None)
    return layer.weight if mask is None else layer.get_parameter("weight_orig") * mask


def weight_view(layer: PrunableLayer, weight: Tensor | None = None) -> Tensor:
    """The weight of ``layer`` as ``[O, T, C / groups]``; may share its storage.

    ``weight``: any tensor in ``layer.weight``'s shape (a mask, a gradient); None means `effective_weight`.
    With groups, output channel o reads the input channels of its group, ``o // (O / groups)``.
    Raises TypeError for a layer of another type.
    """
    _check_type(layer)
    weight = effective_weight(layer) if weight is None else weight
    if isinstance(layer, nn.Linear):
        return weight.unsqueeze(1)
    if isinstance(layer, nn.Conv2d):
        return weight.flatten(2).transpose(1, 2)
    # A transposed convolution is stored [C, O / groups, kh, kw], its groups along the *input* channels.
    return weight.flatten(2).unflatten(0, (layer.groups, -1)).permute(0, 2, 3, 1).flatten(0, 1)


def from_weight_view(layer: PrunableLayer, view: Tensor) -> Tensor:
    """The inverse of `weight_view`: ``view [O, T, C / groups]`` in the shape of ``layer.weight``, contiguous.

    Raises ValueError when ``view`` has another shape, TypeError for a layer of another type.
    """
    _check_type(layer)
    if isinstance(layer, nn.Linear):
        expected = (layer.out_features, 1, layer.in_features)
    else:
        kh, kw = layer.kernel_size
        expected = (layer.out_channels, kh * kw, layer.in_channels // layer.groups)
    if tuple(view.shape) != expected:
        raise ValueError(f"the weight view of {layer} has shape {expected}, got {tuple(view.shape)}")
    if isinstance(layer, nn.Linear):
        return view.squeeze(1).contiguous()
    if isinstance(layer, nn.Conv2d):
        weight = view.transpose(1, 2)
    else:
        weight = view.unflatten(0, (layer.groups, -1)).permute(0, 3, 1, 2).flatten(0, 1)
    return weight.unflatten(2, (kh, kw)).contiguous()


def _check_type(layer: nn.Module) -> None:
    if not isinstance(layer, PRUNABLE_TYPES):
        names = ", ".join(kind.__name__ for kind in PRUNABLE_TYPES)
        raise TypeError(f"a weight view needs one of {names}; got {type(layer).__name__}")
