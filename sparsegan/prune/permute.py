"""Channel permutation: the same function, with its channels in an order that gathers heavy weights in blocks.

Output channels of a layer and input channels of the layers that read them have one order in common. Channels are sorted
by importance first, which gathers most. Then two steps alternate, as in k-means: for a given order the best blocks are the
heaviest ones, and for given blocks the best order is an assignment problem. Permuting channels for structured zeros is
Pool and Yu's idea (2021, "Channel Permutations for N:M Sparsity", NeurIPS); this search is own.
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

ROUNDS = 8


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
    seed: of the random draws of "obd"; the search itself is deterministic.

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
    start, before = blocks.scores, blocks.kept()
    found = [([torch.arange(group.size) for group in free], before)]
    for sort in (True, False):
        blocks.scores = dict(start)
        found.append((_search(blocks, free, sort), blocks.kept()))
    orders, after = max(found, key=lambda pair: sum(pair[1].values()))

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
    totals = {name: float(scores.sum()) for name, scores in start.items()}
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
        return {name: float((s * self._best(s)).sum()) for name, s in sums.items()}

    def _best(self, sums: Tensor) -> Tensor:
        best = torch.zeros_like(sums)
        best.view(-1)[sums.flatten().topk(max(1, round(self.density * sums.numel()))).indices] = 1
        return best

    def axes(self, group: ChannelGroup) -> Iterator[tuple[Axis, bool]]:
        """Where the channels of ``group`` lie in these layers; whether as outputs."""
        for axes, out in ((group.producers, True), (group.consumers, False)):
            yield from ((axis, out) for axis in axes if axis.layer in self.scores)

    def importance(self, group: ChannelGroup) -> Tensor:
        """Of each member: [size]."""
        total = torch.zeros(group.size, dtype=torch.float64)
        for axis, out in self.axes(group):
            total += self.scores[axis.layer].sum((1, 2) if out else (0, 1))[axis.positions].sum(1)
        return total

    def by_place(self, group: ChannelGroup) -> Tensor:
        """What of member i would be kept in the place of member k, with the blocks that are best now: [i, k]."""
        total = torch.zeros(group.size, group.size, dtype=torch.float64)
        for axis, out in self.axes(group):
            scores = self.scores[axis.layer]
            best = self._best(self.pattern.group_sums(scores))
            if not out:
                scores, best = scores.permute(2, 1, 0), best.permute(2, 1, 0)
            one, across = (self.pattern.bo, self.pattern.bk)[:: 1 if out else -1]
            profiles = BlockPattern(1, across).group_sums(scores).flatten(1)[axis.positions]
            wanted = best.flatten(1)[axis.positions // one]
            total += torch.einsum("irf,krf->ik", profiles, wanted)
        return total

    def reorder(self, group: ChannelGroup, order: Tensor) -> None:
        for axis, out in self.axes(group):
            scores, dim = self.scores[axis.layer], 0 if out else 2
            self.scores[axis.layer] = scores.index_select(dim, _index(axis, order, scores.shape[dim]))


def _search(blocks: _Blocks, groups: Sequence[ChannelGroup], sort: bool) -> list[Tensor]:
    """Reorder ``blocks`` as well as can be found; the orders, member ``order[k]`` of a group in the place of k."""
    orders = [torch.arange(group.size) for group in groups]
    if sort:
        orders = [blocks.importance(group).argsort(descending=True, stable=True) for group in groups]
        for group, order in zip(groups, orders, strict=True):
            blocks.reorder(group, order)
    best = sum(blocks.kept().values())
    for _ in range(ROUNDS):
        last = best
        for k, group in enumerate(groups):
            order, saved = _assignment(blocks.by_place(group)), dict(blocks.scores)
            blocks.reorder(group, order)
            # A layer that reads what it writes is moved along both sides at once, and may get worse.
            if (kept := sum(blocks.kept().values())) > best:
                best, orders[k] = kept, orders[k][order]
            else:
                blocks.scores = saved
        if best <= last * (1 + 1e-4):
            break
    return orders


def _assignment(by_place: Tensor) -> Tensor:
    """The member that takes each place, such that no exchange of two gains any more: int64 [size]."""
    there, places = by_place.T.clone(), torch.arange(len(by_place))  # [place, place of the member now]
    order, least = places, 1e-9 * by_place.abs().max()
    while True:
        own = there.diagonal()
        gain, partner = (there + there.T - own - own[:, None]).max(1)
        exchanged = (partner[partner] == places) & (gain > least)
        if not exchanged.any():
            return order
        swap = torch.where(exchanged, partner, places)
        order, there = order[swap], there[:, swap]


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
