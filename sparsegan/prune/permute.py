"""Channel permutation: the same function, with its channels in an order that gathers heavy weights in blocks.

Output channels of a layer and input channels of the layers that read them have one order in common: from the channel whose
loss would do most damage to the one whose loss would do least. Blocks of light channels then lie together, on both sides.

That is the whole method, own. Exchanging channels further, until the best blocks hold as much importance as can be found
(Pool and Yu 2021, "Channel Permutations for N:M Sparsity", NeurIPS), was tried: by the diagonal second order they hold
more, and the images are worse, for it knows nothing of what the weights of a channel do together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsegan.patterns import BlockPattern, Pattern, weight_view
from sparsegan.prune import allocate as budgets
from sparsegan.prune import importance as scoring
from sparsegan.prune.channels import channel_scores
from sparsegan.prune.dependencies import Axis, ChannelGroup, channel_groups
from sparsegan.prune.importance import Importance
from sparsegan.prune.trace import Inputs, eval_mode, image_of, prunable_layers, trace


@dataclass(frozen=True)
class PermutationReport:
    """What a permutation gains: shares of the importance that the best blocks hold, at equal density in each layer.

    layers: by name, (before, after). before, after: of all those layers together.
    refused: by layer, why its output channels kept their order.
    """

    pattern: Pattern
    sparsity: float
    layers: dict[str, tuple[float, float]]
    before: float
    after: float
    refused: dict[str, str]


def permute_channels(
    model: nn.Module,
    pattern: Pattern,
    example_inputs: Inputs,
    sparsity: float = 0.5,
    *,
    importance: str | Importance = "obd",
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> PermutationReport:
    """Reorder the channels of ``model`` so that ``pattern`` finds light blocks; in place, for `prune` to follow.

    The function of the model stays, but for the rounding of sums in another order. If the best blocks held no more
    than before, as in a model that has its zeros in blocks already, the order stays too. Weights that other models
    share move with it.

    pattern: a `BlockPattern`. sparsity: share of the blocks of each layer that will go, in (0, 1).
    importance: of channels, see `channel_scores`, and of the weights for the report: "obd" or a callable.
    layers: names of the layers whose blocks the report counts; None means those that `prune` would choose.
    seed: of every random draw.

    Raises TypeError for another pattern, ValueError for bad arguments and what `channel_groups` raises, RuntimeError
    when the function of the model would change; the model is then as it was.
    """
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"channels are permuted for blocks, a BlockPattern such as 32x32; got {pattern!r}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity is the share of blocks that will go, in (0, 1); got {sparsity}")
    names = _block_layers(model, example_inputs) if layers is None else list(layers)
    candidates = prunable_layers(model)
    if not names or not set(names) <= set(candidates):
        raise ValueError(f"layers are some of {', '.join(candidates)}; got {', '.join(names) or 'none'}")

    groups = channel_groups(model, example_inputs)
    free = [group for group in groups if not group.fixed and group.size > 1]
    generator = torch.Generator().manual_seed(seed)
    by_channel = channel_scores(model, free, example_inputs, importance, generator)
    orders = [scores.argsort(descending=True, stable=True) for scores in by_channel]
    chosen = {name: candidates[name] for name in names}
    score = (
        scoring.obd(model, chosen, example_inputs, generator) if isinstance(importance, str) else importance
    )
    scores = {n: score(n, layer, weight_view(layer).detach()).cpu().double() for n, layer in chosen.items()}
    before = {name: _held(pattern, 1 - sparsity, s) for name, s in scores.items()}
    moved = _moved(scores, free, orders)
    after = {name: _held(pattern, 1 - sparsity, s) for name, s in moved.items()}
    if sum(after.values()) > sum(before.values()):
        _permute(model, free, orders, example_inputs)
    else:
        after = before

    totals = {name: float(s.sum()) for name, s in scores.items()}
    whole = sum(totals.values())
    return PermutationReport(
        pattern,
        sparsity,
        {name: (before[name] / totals[name], after[name] / totals[name]) for name in names},
        sum(before.values()) / whole,
        sum(after.values()) / whole,
        {axis.layer: group.fixed for group in groups if group.fixed for axis in group.producers},
    )


def _block_layers(model: nn.Module, inputs: Inputs) -> list[str]:
    positions, touches_image = trace(model, inputs)
    macs = {name: positions[name] * layer.weight.numel() for name, layer in prunable_layers(model).items()}
    spared = touches_image | budgets.smallest_layers(macs)
    return [name for name in macs if name not in spared]


def _held(pattern: BlockPattern, density: float, scores: Tensor) -> float:
    """The importance of the best blocks of a layer."""
    sums = pattern.group_sums(scores).flatten()
    return float(sums.topk(max(1, round(density * len(sums)))).values.sum())


def _index(axis: Axis, order: Tensor, length: int) -> Tensor:
    """For `index_select` along ``axis``: member ``order[k]`` takes the place of member k."""
    index = torch.arange(length)
    index[axis.positions] = axis.positions[order]
    return index


def _moved(
    scores: dict[str, Tensor], groups: Sequence[ChannelGroup], orders: Sequence[Tensor]
) -> dict[str, Tensor]:
    """``scores`` [O, T, C] by layer as they will be after the permutation."""
    moved = dict(scores)
    for group, order in zip(groups, orders, strict=True):
        for axes, dim in ((group.producers, 0), (group.consumers, 2)):
            for axis in axes:
                if axis.layer in moved:
                    view = moved[axis.layer]
                    moved[axis.layer] = view.index_select(dim, _index(axis, order, view.shape[dim]))
    return moved


@torch.no_grad()
def _permute(
    model: nn.Module, groups: Sequence[ChannelGroup], orders: Sequence[Tensor], inputs: Inputs
) -> None:
    """Reorder ``model`` in place; undo it and raise RuntimeError if its output changes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    axes = [(axis, order) for group, order in zip(groups, orders, strict=True) for axis in group.axes]
    saved = {axis.parameter: tensors[axis.parameter].clone() for axis, _ in axes}
    with eval_mode(model):
        want = image_of(model(*inputs))
        for axis, order in axes:
            tensor = tensors[axis.parameter]
            index = _index(axis, order, tensor.shape[axis.dim]).to(tensor.device)
            tensor.copy_(tensor.index_select(axis.dim, index))
        error = (image_of(model(*inputs)) - want).abs().max()
    # Sums in another order differ by less than that. `not <=` rather than `>`: a NaN is wrong too.
    if not error <= torch.finfo(want.dtype).eps ** 0.5 * want.abs().max():
        for name, value in saved.items():
            tensors[name].copy_(value)
        raise RuntimeError(
            f"permuting the channels of {type(model).__name__} would change its output by {error:.3g}; "
            "it is left as it was"
        )
