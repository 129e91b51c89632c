"""Channel permutation: the same function, with its channels in an order that gathers heavy weights in blocks.

Output channels of a layer and input channels of the layers that read them have one order in common. It is found by
exchanging two channels at a time, as in Pool and Yu (2021, "Channel Permutations for N:M Sparsity", NeurIPS, section 3), each
with the partner that gains most. How much the best blocks hold is, for the score of the worst of them as a threshold t, a
sum over blocks of max(score - t, 0), so that only the blocks of the two channels count; this form is own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsegan.patterns import BlockPattern, Pattern, weight_view
from sparsegan.prune import allocate as budgets
from sparsegan.prune import importance as scoring
from sparsegan.prune.dependencies import Axis, ChannelGroup, channel_groups
from sparsegan.prune.importance import Importance
from sparsegan.prune.trace import Inputs, eval_mode, image_of, prunable_layers, trace

ROUNDS = 5


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
    importance: Literal["obd", "l1", "l2"] | Importance = "obd",
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> PermutationReport:
    """Reorder the channels of ``model`` so that ``pattern`` keeps more of the importance; in place.

    The function of the model stays, but for the rounding of sums in another order. Do it before `prune`. Weights that
    other models share move with it.

    pattern: a `BlockPattern`; rows and columns of blocks count alike.
    sparsity: share of the blocks of each layer that will go, in (0, 1).
    importance: as for `prune`.
    layers: names of the layers whose blocks count; None means those that `prune` would choose.
    seed: of the random draws of "obd"; the search draws nothing.

    Raises TypeError for another pattern, ValueError for bad arguments and what `channel_groups` raises, RuntimeError
    when the function of the model would change; the model is then as it was.
    """
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"channels are permuted for blocks, a BlockPattern such as 32x32; got {pattern!r}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity is the share of blocks that will go, in (0, 1); got {sparsity}")
    groups = channel_groups(model, example_inputs)
    free = [group for group in groups if not group.fixed and group.size > 1]
    blocks = _Blocks(pattern, 1 - sparsity, _scores(model, example_inputs, importance, layers, seed))
    totals = {name: float(scores.sum()) for name, scores in blocks.scores.items()}
    before = blocks.kept()
    orders = _search(blocks, free)
    after = blocks.kept()

    with torch.no_grad(), eval_mode(model):
        want = image_of(model(*example_inputs))
        _reorder(model, free, orders)
        error = (image_of(model(*example_inputs)) - want).abs().max()
        # Sums in another order differ by less than that. `not <=` rather than `>`: a NaN is wrong too.
        if not error <= torch.finfo(want.dtype).eps ** 0.5 * want.abs().max():
            _reorder(model, free, [order.argsort() for order in orders])
            raise RuntimeError(
                f"permuting the channels of {type(model).__name__} would change its output by {error:.3g}; "
                "it is left as it was"
            )
    whole = max(sum(totals.values()), 1e-300)
    return PermutationReport(
        pattern,
        sparsity,
        {name: (before[name] / (total or 1), after[name] / (total or 1)) for name, total in totals.items()},
        sum(before.values()) / whole,
        sum(after.values()) / whole,
        {axis.layer: group.fixed for group in groups if group.fixed for axis in group.producers},
    )


def _scores(
    model: nn.Module,
    inputs: Inputs,
    importance: str | Importance,
    layers: Sequence[str] | None,
    seed: int,
) -> dict[str, Tensor]:
    """Scores [O, T, C] of the layers whose blocks count."""
    candidates = prunable_layers(model)
    positions, touches_image = trace(model, inputs)
    if layers is None:
        macs = {name: positions[name] * layer.weight.numel() for name, layer in candidates.items()}
        spared = touches_image | budgets.smallest_layers(macs)
        layers = [name for name in candidates if name not in spared]
    if unknown := [name for name in layers if not positions.get(name)]:
        raise ValueError(
            f"there is no layer {unknown[0]!r} that the model calls; there are: {', '.join(candidates)}"
        )
    chosen = {name: candidates[name] for name in layers}
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no layer to prune in blocks; name some with layers=[...]"
        )
    score: Importance
    if importance == "obd":
        score = scoring.obd(model, chosen, inputs, torch.Generator().manual_seed(seed))
    elif isinstance(importance, str):
        if importance not in ("l1", "l2"):
            raise ValueError(
                f'unknown importance {importance!r}; there are "obd", "l1", "l2", or give a callable'
            )
        score = getattr(scoring, importance)
    else:
        score = importance
    return {n: score(n, layer, weight_view(layer).detach()).cpu().double() for n, layer in chosen.items()}


@dataclass
class _Blocks:
    """Scores [O, T, C] of layers, in the order of channels tried at the moment, and the blocks they make."""

    pattern: BlockPattern
    density: float
    scores: dict[str, Tensor]

    def kept(self) -> dict[str, float]:
        """The importance of the best blocks of each layer."""
        sums = {name: self.pattern.group_sums(scores) for name, scores in self.scores.items()}
        return {name: float(self._best(blocks).sum()) for name, blocks in sums.items()}

    def _best(self, sums: Tensor) -> Tensor:
        return sums.flatten().topk(max(1, round(self.density * sums.numel()))).values

    def axes(self, group: ChannelGroup) -> Iterator[tuple[Axis, bool]]:
        """Where the channels of ``group`` lie in these layers; whether as outputs."""
        for axes, out in ((group.producers, True), (group.consumers, False)):
            yield from ((axis, out) for axis in axes if axis.layer in self.scores)

    def exchanges(self, group: ChannelGroup) -> Tensor:
        """A better order for ``group``: member ``order[k]`` in the place of k, int64 [size]."""
        sides = []
        for axis, out in self.axes(group):
            scores = self.scores[axis.layer]
            sums = self.pattern.group_sums(scores)
            least = self._best(sums)[-1]
            if not out:
                scores, sums = scores.permute(2, 1, 0), sums.permute(2, 1, 0)
            along, across = (self.pattern.bo, self.pattern.bk)[:: 1 if out else -1]
            lines = axis.positions // along
            # Where one channel fills several blocks, those move as they are.
            if bool((lines == lines[:, :1]).all()):
                members = BlockPattern(1, across).group_sums(scores).flatten(1)[axis.positions].sum(1)
                sides.append((members.float(), lines[:, 0], (sums - least).flatten(1).float()))
        order = torch.arange(group.size)
        if not sides:
            return order
        noise = 1e-7 * sum(float(members.sum()) for members, _, _ in sides)
        for k in range(group.size):
            gain = torch.zeros(group.size)
            for members, line, excess in sides:
                change, now = members - members[k], excess.relu().sum(1)
                here = (excess[line[k]] + change).relu_().sum(1) - now[line[k]]
                there = (excess[line] - change).relu_().sum(1) - now[line]
                gain += torch.where(line == line[k], 0.0, here + there)
            partner = int(gain.argmax())
            if gain[partner] > noise:
                pair, swapped = [k, partner], [partner, k]
                order[pair] = order[swapped]
                for members, line, excess in sides:
                    change = members[partner] - members[k]
                    excess[line[k]] += change
                    excess[line[partner]] -= change
                    members[pair] = members[swapped]
        return order

    def reorder(self, group: ChannelGroup, order: Tensor) -> None:
        for axis, out in self.axes(group):
            scores, dim = self.scores[axis.layer], 0 if out else 2
            self.scores[axis.layer] = scores.index_select(dim, _index(axis, order, scores.shape[dim]))


def _search(blocks: _Blocks, groups: Sequence[ChannelGroup]) -> list[Tensor]:
    """Reorder ``blocks`` as well as can be found; the orders, member ``order[k]`` of a group in the place of k."""
    orders = [torch.arange(group.size) for group in groups]
    best = sum(blocks.kept().values())
    for _ in range(ROUNDS):
        last = best
        for k, group in enumerate(groups):
            order, saved = blocks.exchanges(group), dict(blocks.scores)
            blocks.reorder(group, order)
            # The threshold moves with the blocks, and a layer that reads what it writes changes on both sides at once.
            if (kept := sum(blocks.kept().values())) > best:
                best, orders[k] = kept, orders[k][order]
            else:
                blocks.scores = saved
        if best <= last * (1 + 1e-3):
            break
    return orders


def _index(axis: Axis, order: Tensor, length: int) -> Tensor:
    """For `index_select` along ``axis``: member ``order[k]`` takes the place of member k."""
    index = torch.arange(length)
    index[axis.positions] = axis.positions[order]
    return index


def _reorder(model: nn.Module, groups: Sequence[ChannelGroup], orders: Sequence[Tensor]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group, order in zip(groups, orders, strict=True):
        for axis in group.axes:
            tensor = tensors[axis.parameter]
            index = _index(axis, order, tensor.shape[axis.dim]).to(tensor.device)
            tensor.copy_(tensor.index_select(axis.dim, index))
