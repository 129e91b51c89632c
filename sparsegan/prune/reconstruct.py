"""Closed-form repair: each layer's kept weights fitted to what the dense model computes, without gradients.

A layer is linear in its weights, so the weights that best give the dense model's outputs on the inputs that the
pruned model really sees solve a least-squares problem. There is one for each *phase* of the output: a Linear
layer or a convolution has one, a transposed convolution one for each residue of the output pixel by the stride, which
reads only the taps that meet it (4 of 16 for a 4x4 kernel with stride 2: that keeps the problems small).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from sparsegan.patterns import PRUNABLE_TYPES, PrunableLayer, from_weight_view, weight_view
from sparsegan.prune.masks import adopt_torch_mask, find_mask
from sparsegan.prune.trace import Inputs, eval_mode, prunable_layers

# Share of the mean square of a layer's inputs that is added to the diagonal of their Gram matrix (the value of
# SparseGPT): the fit is drawn towards the present weights where the calibration inputs say little.
DAMPING = 0.01
# A layer whose output is this near the dense model's, as a share of its power, is left alone: rounding is as large.
EXACT = 1e-6


class Fit(NamedTuple):
    """How far a layer's output is from the dense model's, before and after the fit: share of the squared output."""

    before: float
    after: float


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Inputs],
    layers: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Fit]:
    """Fit the kept weights and the biases of ``model`` to the outputs of ``teacher``'s layers; in place, no gradients.

    Layer after layer in the order in which they run, minimising ||y - W x||² + λ ||W - W_before||²: y what the
    dense layer computes from the dense model's activations, x what this layer gets from the layers fitted so
    far, so that each repairs what those before it left wrong, too. Zeros stay: weights under a mask, and without a
    mask those that are zero. Block rows that share their zeros are solved together. What is left of the mean of each
    output channel goes into the bias, or the running mean of the BatchNorm that follows.

    For models too large to train where they are pruned; training, `recover`, can go on from the result.

    model:    pruned; one module in its structure for each of teacher's, by name.
    teacher:  the dense model.
    batches:  positional inputs of the models. As many output pixels a layer as it has inputs times taps, times
              four or more, should be in them; few serve the late, large maps.
    layers:   names; None is all that run. Dense ones after a pruned one gain, too.
    progress: called with (layers done, layers in all).

    Returns a `Fit` for each layer that was changed. Raises ValueError without batches, for an unknown layer, NaN among the
    activations, or a weight with parametrizations besides the mask. Method: He, Zhang and Sun 2017 (Channel Pruning,
    section 3.1, reconstruction), with phases, block supports and the pull towards the weights as they were our own.
    """
    return _fit(model, teacher, batches, layers, progress, weights=True)


def correct_bias(
    model: nn.Module, teacher: nn.Module, batches: Sequence[Inputs], layers: Sequence[str] | None = None
) -> dict[str, Fit]:
    """Give each output channel of each layer of ``model`` the mean it has in ``teacher``; in place.

    The simplest form of `reconstruct`: the shift goes into the bias or into the running mean of the BatchNorm that
    follows; a layer with neither is left as it is. It is for small errors, such as those of rounding: where half of the
    blocks are gone, right means of channels that are otherwise wrong can make the image worse. Arguments, result and
    errors as there. Method: Nagel et al. 2019 (arXiv:1906.04721, section 4.2), with the means measured.
    """
    return _fit(model, teacher, batches, layers, None, weights=False)


def _fit(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Inputs],
    layers: Sequence[str] | None,
    progress: Callable[[int, int], None] | None,
    weights: bool,
) -> dict[str, Fit]:
    if not batches:
        raise ValueError("there are no batches to fit the layers to: give at least one tuple of inputs")
    known = prunable_layers(model)
    if layers is not None and (unknown := set(layers) - set(known)):
        raise ValueError(f"there is no layer {', '.join(sorted(map(repr, unknown)))} in the model")
    fits = {}
    with eval_mode(model), eval_mode(teacher), torch.no_grad():
        norms = _following_norms(model, batches[0])
        chosen = [name for name in norms if layers is None or name in layers]
        if weights:
            for name in chosen:
                adopt_torch_mask(known[name])
                weight_parameter(name, known[name])
        for done, name in enumerate(chosen):
            layer, norm = known[name], norms[name]
            pairs = zip(
                watched_calls(model, name, batches), watched_calls(teacher, name, batches), strict=True
            )
            sums = moments(layer, ((x, y) for (x, _), (_, y) in pairs))
            if not all(bool(m.gram.isfinite().all() & m.cross.isfinite().all()) for m in sums):
                raise ValueError(f"NaN or infinite values enter or leave layer {name!r}")
            view = weight_view(layer).double()
            bias = view.new_zeros(len(view)) if layer.bias is None else layer.bias.double()
            before = _error(view, bias, sums)
            if before > EXACT:
                if weights:
                    view = _solved(view, bias, kept_weights(layer), sums)
                    weight_parameter(name, layer).copy_(from_weight_view(layer, view))
                shift = _mean_error(view, bias, sums)
                if layer.bias is not None:
                    layer.bias.add_(shift)
                    bias = bias + shift
                elif norm is not None and norm.running_mean is not None:
                    norm.running_mean.sub_(shift)
                    bias = bias + shift
                fits[name] = Fit(before, _error(view, bias, sums))
            if progress is not None:
                progress(done + 1, len(chosen))
    return fits


def _following_norms(model: nn.Module, inputs: Inputs) -> dict[str, _BatchNorm | None]:
    """The layers in the order in which they run, each with the BatchNorm that takes what it makes."""
    found: dict[str, _BatchNorm | None] = {}
    made: dict[int, tuple[str, Tensor, int]] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not isinstance(module, _BatchNorm):
            found.setdefault(name, None)
            made[id(y)] = (name, y, y._version)
        elif (source := made.get(id(args[0]))) is not None and source[1]._version == source[2]:
            found[source[0]] = module  # and nothing was done in place between the two

    hooks = [
        module.register_forward_hook(lambda module, args, y, name=name: see(name, module, args, y))
        for name, module in model.named_modules()
        if isinstance(module, (*PRUNABLE_TYPES, _BatchNorm))
    ]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _SeenEnoughError(Exception):
    """What comes after the watched layer need not run."""


def watched_calls(model: nn.Module, name: str, batches: Iterable[Inputs]) -> Iterator[tuple[Tensor, Tensor]]:
    """What goes into and comes out of layer ``name`` at each of its calls, while ``model`` runs in eval mode."""
    calls = None  # of one run, which ends after the last
    seen: list[tuple[Tensor, Tensor]] = []

    def see(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        # Copies, because what comes next may work in place.
        seen.append((args[0].clone(), y.clone()))
        if len(seen) == calls:
            raise _SeenEnoughError

    for inputs in batches:
        hook = model.get_submodule(name).register_forward_hook(see)
        try:
            with eval_mode(model), torch.no_grad():
                model(*inputs)
        except _SeenEnoughError:
            pass
        finally:
            hook.remove()
        yield from seen
        calls = len(seen)
        seen.clear()


def kept_weights(layer: PrunableLayer) -> Tensor:
    """Which weights are kept, bool ``[O, T, C]``."""
    mask = find_mask(layer)
    return weight_view(layer) != 0 if mask is None else weight_view(layer, mask.mask)


def weight_parameter(name: str, layer: PrunableLayer) -> Tensor:
    """The parameter that holds the weight of ``layer``."""
    if not parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    held = layer.get_submodule("parametrizations.weight")
    assert isinstance(held, parametrize.ParametrizationList)
    if len(held) > 1 or find_mask(layer) is None:
        raise ValueError(
            f"the weight of layer {name!r} is computed by a parametrization besides its mask, so it cannot be set; "
            "remove that first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    return held.get_parameter("original")


@dataclass(frozen=True)
class Phase:
    """Output pixels of a layer that are one linear map of the same taps.

    taps:   which taps meet these pixels, in raster order.
    pixels: rows and columns of the output.
    reads:  for each tap, rows and columns of the padded input that it multiplies.
    """

    taps: tuple[int, ...]
    pixels: tuple[slice, slice]
    reads: tuple[tuple[slice, slice], ...]


def phases(layer: PrunableLayer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, list[Phase]]:
    """The padded input ``[N, C, H, W]``, the output ``[N, O, H, W]`` and its phases, for one call of ``layer``."""
    if isinstance(layer, nn.Linear):
        one = (slice(0, 1), slice(0, 1))
        x, y = (t.reshape(-1, t.shape[-1], 1, 1) for t in (x, y))
        return x, y, [Phase((0,), one, (one,))]
    x, y = (t[None] if t.dim() == 3 else t for t in (x, y))
    sizes, strides, dilations = y.shape[2:], layer.stride, layer.dilation
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        axes = [_axis(*axis) for axis in zip(sizes, layer.kernel_size, strides, dilations, strict=True)]
    else:
        extents = zip(layer.kernel_size, dilations, layer.output_padding, strict=True)
        margins = [d * (k - 1) + extra for k, d, extra in extents]
        x = F.pad(x, (margins[1], margins[1], margins[0], margins[0]))
        axes = [
            _transposed_axis(*axis)
            for axis in zip(sizes, layer.kernel_size, strides, dilations, layer.padding, margins, strict=True)
        ]
    found = []
    for (rows, high), (columns, wide) in itertools.product(*axes):
        pairs = list(itertools.product(high, wide))
        if pairs:
            taps = tuple(i * layer.kernel_size[1] + j for i, j in pairs)
            found.append(Phase(taps, (rows, columns), tuple((high[i], wide[j]) for i, j in pairs)))
    return x, y, found


# For each phase along one axis: the output positions, and what each tap reads for them.
_Axis: TypeAlias = list[tuple[slice, dict[int, slice]]]


def _axis(size: int, kernel: int, stride: int, dilation: int) -> _Axis:
    reach = stride * (size - 1) + 1
    return [(slice(0, size), {k: slice(k * dilation, k * dilation + reach, stride) for k in range(kernel)})]


def _transposed_axis(size: int, kernel: int, stride: int, dilation: int, padding: int, margin: int) -> _Axis:
    axis: _Axis = []
    for first in range(min(stride, size)):
        count = len(range(first, size, stride))
        reads = {}
        for k in range(kernel):
            start, rest = divmod(first + padding - k * dilation, stride)
            if rest == 0:
                reads[k] = slice(margin + start, margin + start + count)
        axis.append((slice(first, None, stride), reads))
    return axis


@dataclass
class Moments:
    """Sums over the pixels of one phase, float64; G: groups of the layer, K: its taps x inputs of a group.

    gram:   ``[G, K, K]``, of the patches that were read with themselves; inputs: ``[G, K]``, of the patches.
    cross:  ``[G, K, O / G]``, of these patches with the wanted outputs.
    wanted: ``[O]``, of the wanted outputs; power: of their squares, ``[O]``; count: pixels.
    """

    taps: tuple[int, ...]
    gram: Tensor
    inputs: Tensor
    cross: Tensor
    wanted: Tensor
    power: Tensor
    count: int

    def add(self, other: Moments) -> None:
        for name in ("gram", "inputs", "cross", "wanted", "power", "count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def rows(self, view: Tensor) -> Tensor:
        """The weights ``[O, T, C / G]`` of this phase as ``[G, O / G, K]``."""
        return view[:, list(self.taps)].flatten(1).unflatten(0, (len(self.gram), -1))


def moments(layer: PrunableLayer, calls: Iterable[tuple[Tensor, Tensor]]) -> list[Moments]:
    """The moments of each phase of ``layer``; calls: what goes in, and what is wanted to come out."""
    groups = getattr(layer, "groups", 1)
    sums: dict[tuple[int, ...], Moments] = {}
    for read, made in calls:
        x, y, found = phases(layer, read, made)
        for phase in found:
            patches = torch.stack([x[..., rows, columns] for rows, columns in phase.reads], 1)
            patches = patches.unflatten(2, (groups, -1)).permute(2, 1, 3, 0, 4, 5)  # [G, T, C / G, N, h, w]
            patches = patches.flatten(3).flatten(1, 2).float()
            wanted = y[..., phase.pixels[0], phase.pixels[1]].transpose(0, 1).flatten(1).float()
            new = Moments(
                phase.taps,
                (patches @ patches.mT).double(),
                patches.double().sum(2),
                (patches @ wanted.unflatten(0, (groups, -1)).mT).double(),
                wanted.double().sum(1),
                wanted.double().square().sum(1),
                patches.shape[2],
            )
            if phase.taps in sums:
                sums[phase.taps].add(new)
            else:
                sums[phase.taps] = new
    return list(sums.values())


def _error(view: Tensor, bias: Tensor, sums: list[Moments]) -> float:
    """||y - W x - b||² as a share of ||y||²."""
    error = power = 0.0
    for m in sums:
        rows = m.rows(view)
        squares = m.power.sum() - 2 * (rows.mT * m.cross).sum() + ((rows @ m.gram) * rows).sum()
        means = m.wanted - (rows @ m.inputs[..., None]).flatten()
        error += float(squares - 2 * (bias * means).sum() + m.count * bias.square().sum())
        power += float(m.power.sum())
    return max(error, 0.0) / power if power else 0.0


def _mean_error(view: Tensor, bias: Tensor, sums: list[Moments]) -> Tensor:
    """The mean of y - W x - b over all pixels, ``[O]``."""
    totals = [m.wanted - (m.rows(view) @ m.inputs[..., None]).flatten() for m in sums]
    return torch.stack(totals).sum(0) / sum(m.count for m in sums) - bias


def _solved(view: Tensor, bias: Tensor, kept: Tensor, sums: list[Moments]) -> Tensor:
    """The weights that fit best, zero where ``kept`` says so; ``[O, T, C / G]``, float64."""
    fitted = view.clone()
    for m in sums:
        rows, supports = m.rows(view).clone(), m.rows(kept)
        targets = m.cross.mT - bias.unflatten(0, (len(rows), -1))[..., None] * m.inputs[:, None]
        for group in range(len(rows)):
            gram, damping = _damped(m.gram[group])
            for members, columns in _alike(supports[group]):
                factor = torch.linalg.cholesky(gram[columns[:, None], columns])
                target = targets[group, members][:, columns] + damping * rows[group, members][:, columns]
                rows[group, members[:, None], columns] = torch.cholesky_solve(target.mT, factor).mT
        fitted[:, list(m.taps)] = rows.flatten(0, 1).unflatten(1, (len(m.taps), -1))
    return torch.where(kept, fitted, 0.0)


def _damped(gram: Tensor) -> tuple[Tensor, float]:
    """The Gram matrix with `DAMPING` on its diagonal, and how much that is; 1 where nothing was read."""
    damping = DAMPING * float(gram.diagonal().mean()) or 1.0
    return gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), damping


def _alike(supports: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ``supports`` (bool ``[R, K]``) that are equal: their indices, and those of the columns they keep."""
    distinct, which = supports.unique(dim=0, return_inverse=True)
    for i, support in enumerate(distinct):
        if bool(support.any()):
            yield (which == i).nonzero()[:, 0], support.nonzero()[:, 0]


def block_errors(view: Tensor, kept: Tensor, sums: list[Moments], width: int) -> Tensor:
    """What removing a block would add to the squared error of each output, the rest then fitted again.

    view, kept: ``[O, T, C / G]``, float64 and bool. width: input channels of a block. Returns ``[O, T, C / G]``,
    whose sum over a block of any number of output channels is their tr(W_Q (H⁻¹_QQ)⁻¹ W_Qᵀ), Q the block's columns,
    H the damped Gram matrix of the kept columns: Optimal Brain Surgeon (Hassibi and Stork 1993, eq. 5) for blocks
    (Frantar and Alistarh 2022, arXiv:2208.11580, section 4, group-OBS). Weights that are gone score 0.
    """
    errors = torch.zeros_like(view)
    for m in sums:
        rows, supports = m.rows(view), m.rows(kept)
        scores, taps = torch.zeros_like(rows), len(m.taps)
        for group in range(len(rows)):
            gram = _damped(m.gram[group])[0].float()  # precise enough to rank blocks
            for members, columns in _alike(supports[group]):
                inverse = torch.eye(len(gram), device=gram.device)
                factor = torch.linalg.cholesky(gram[columns[:, None], columns])
                inverse[columns[:, None], columns] = torch.cholesky_inverse(factor)
                blocks = torch.linalg.inv(_diagonal_blocks(inverse, taps, width).double())
                weights = (rows[group, members] * supports[group, members]).unflatten(1, (taps, -1))
                channels = weights.shape[2]
                weights = F.pad(weights, (0, -channels % width)).unflatten(2, (-1, width))
                products = weights * torch.einsum("tbij,rtbj->rtbi", blocks, weights)
                scores[group, members] = products.flatten(2)[..., :channels].flatten(1)
        errors[:, list(m.taps)] = scores.flatten(0, 1).unflatten(1, (taps, -1))
    return errors


def _diagonal_blocks(matrix: Tensor, taps: int, width: int) -> Tensor:
    """The blocks of ``width`` channels of one tap on the diagonal of ``matrix [T C, T C]``: ``[T, blocks, width, width]``.

    A ragged last block is filled up by the identity.
    """
    square = (
        matrix.unflatten(0, (taps, -1)).unflatten(2, (taps, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )
    channels = square.shape[1]
    missing = -channels % width
    square = F.pad(square, (0, missing, 0, missing))
    square.diagonal(dim1=1, dim2=2)[:, channels:] = 1
    blocks = square.unflatten(1, (-1, width)).unflatten(3, (-1, width))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
