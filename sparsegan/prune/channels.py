"""Channel pruning: layers become narrower, and the smaller model is an ordinary dense one."""

from __future__ import annotations

import copy
import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparsegan.patterns import PrunableLayer, from_weight_view, weight_view
from sparsegan.prune import allocate as budgets
from sparsegan.prune import importance as scoring
from sparsegan.prune.dependencies import ChannelGroup, channel_groups
from sparsegan.prune.importance import Importance, draw_inputs
from sparsegan.prune.trace import Inputs, check_inputs, eval_mode, image_of, prunable_layers, trace

# Refitting a layer draws inputs until there are this many samples for each of its input channels.
REFIT_SAMPLES = 8
REFIT_DRAWS = range(16, 65)
REFIT_RIDGE = 1e-2

Kept: TypeAlias = Mapping[int, Tensor]
"""Members that stay (int64, ascending), by index of the group; other groups stay whole."""


def prune_channels(
    model: nn.Module,
    example_inputs: Inputs,
    sparsity: float | None = None,
    *,
    widths: Mapping[str, int] | None = None,
    importance: str | Importance = "obd",
    allocate: str = "uniform",
    align: int = 4,
    layers: Sequence[str] | None = None,
    refit: bool = True,
    seed: int = 0,
) -> nn.Module:
    """A copy of ``model`` with fewer channels: same inputs and outputs, plain narrower layers.

    Channels that are one and the same (through skips, concatenations, norms, views: see `dependencies`) go together.
    Layer norms and group norms then see fewer channels, so what is left of those changes too; elsewhere the copy
    without ``refit`` computes what the model would if removed channels were zero where they are read.

    example_inputs: the tuple of positional inputs of one call; see `importance.draw_inputs`.
    sparsity: share of the multiply-adds of the whole model to remove, in [0, 1); at least that, as far as whole
        multiples of ``align`` allow.
    widths: instead of ``sparsity``, the number of output channels of layers by name.
    importance: of channels. "obd", the second-order damage to the image of removing one (`gate_scores`), or a
        callable as for `prune`, whose scores are summed over the weights that write and that read a channel.
    allocate: "uniform", every group of channels to the same share, or "damage", by score per multiply-add.
    align: widths are multiples of it. Groups of a group norm stay equally wide, and keep one channel each at least.
    layers: names of the layers whose output channels may go; None means all that can.
    refit: fit the layers that read removed channels to their old outputs, by least squares over the channels that
        are left (ThiNet, Luo et al. 2017, arXiv:1707.06342, section 3.3, with all taps of a kernel sharing one map
        from old channels to new ones). Worth several dB where no training follows, and nothing after a few
        hundred steps of `recover`.
    seed: of every random draw.

    Raises ValueError for arguments that make no sense, layers that cannot be narrowed (with the reason), a sparsity
    that cannot be reached, and what `channel_groups` raises; RuntimeError if the narrower copy does not compute
    what it should, which a view with a width written in can bring about.
    """
    if (sparsity is None) == (widths is None):
        raise ValueError("give either sparsity, the share of multiply-adds to remove, or widths by layer")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of multiply-adds to remove, in [0, 1); got {sparsity}")
    if align < 1 or allocate not in budgets.RULES:
        raise ValueError(
            f"align is at least 1 and allocate one of {', '.join(budgets.RULES)}; got {align}, {allocate!r}"
        )
    generator = torch.Generator().manual_seed(seed)
    groups = channel_groups(model, example_inputs)
    wanted = None if widths is None else list(widths)
    families = _free_families(model, groups, example_inputs, layers if wanted is None else wanted)
    scores = channel_scores(model, groups, example_inputs, importance, generator)
    if widths is not None:
        counts = _given_counts(model, groups, families, widths)
    else:
        assert sparsity is not None
        counts = _counts(model, groups, families, scores, example_inputs, sparsity, allocate, align)
    kept = {
        k: scores[k].topk(count).indices.sort().values
        for ids, count in zip(families, counts, strict=True)
        for k in ids
        if count < groups[k].size
    }
    small = _narrowed(model, groups, kept, example_inputs)
    if reason := _difference(model, small, groups, kept, example_inputs):
        raise RuntimeError(f"the narrower copy of {type(model).__name__} is wrong: {reason}")
    if refit:
        _refit(model, small, groups, kept, example_inputs, generator)
    return small


def channel_scores(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    example_inputs: Inputs,
    importance: str | Importance,
    generator: torch.Generator,
) -> list[Tensor]:
    """How much each channel matters: float64 [size] for each group.

    importance: "obd" for `gate_scores`, or a callable whose scores are summed over the weights that write and that
    read a channel. Raises ValueError for another name.
    """
    if importance == "obd":
        return gate_scores(model, groups, example_inputs, generator)
    if isinstance(importance, str):
        raise ValueError(f'importance of channels is "obd" or a callable, got {importance!r}')
    layers = prunable_layers(model)
    by_weight = {name: importance(name, layer, weight_view(layer).detach()) for name, layer in layers.items()}
    scores = []
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for axes, dims in ((group.producers, (1, 2)), (group.consumers, (0, 1))):
            for axis in axes:
                total += by_weight[axis.layer].double().cpu().sum(dims)[axis.positions].sum(1)
        scores.append(total)
    return scores


def gate_scores(
    model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Inputs, generator: torch.Generator
) -> list[Tensor]:
    """The damage of removing each channel, E[(∂(y·v)/∂g)²]: float64 [size] for each group.

    y is the model's image, v standard normal, and g a factor of one on the channel wherever it is read. Setting g to
    zero changes y by −∂y/∂g to first order, so the expectation is the squared error: second order in g, as in Optimal
    Brain Damage, but of the channel as a whole, with all that its weights do together. Method: own.
    """
    batch = check_inputs(example_inputs)
    readers = {axis.layer for group in groups for axis in group.consumers}
    gates: list[tuple[str, Tensor]] = []

    def gated(name: str, layer: PrunableLayer, x: Tensor) -> Tensor:
        shape = [x.shape[0], *[1] * (x.dim() - 1)]
        shape[_channel_dim(layer)] = x.shape[_channel_dim(layer)]
        gate = torch.ones(shape, device=x.device, dtype=x.dtype, requires_grad=True)
        gates.append((name, gate))
        return x * gate

    sums = [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    if not readers:
        return sums
    with _before(model, readers, gated), eval_mode(model), torch.enable_grad():
        for draw in range(scoring.OBD_DRAWS):
            gates.clear()
            image = image_of(model(*draw_inputs(example_inputs, batch, draw, generator)))
            v = torch.randn(image.shape, generator=generator).to(image)
            gradients = torch.autograd.grad(image, [g for _, g in gates], v, materialize_grads=True)
            by_layer: defaultdict[str, Tensor | float] = defaultdict(float)
            for (name, _), gradient in zip(gates, gradients, strict=True):
                by_layer[name] += gradient.flatten(1).double().cpu()
            for total, group in zip(sums, groups, strict=True):
                read = [by_layer[axis.layer][:, axis.positions].sum(2) for axis in group.consumers]  # type: ignore[index]
                if read:
                    total += torch.stack(read).sum(0).square().mean(0)
    return [total / scoring.OBD_DRAWS for total in sums]


# ------------------------------------------------------------------ which, and how many


def _free_families(
    model: nn.Module, groups: Sequence[ChannelGroup], inputs: Inputs, layers: Sequence[str] | None
) -> list[list[int]]:
    """Indices of groups that can become narrower, those together that have to stay equally wide."""
    by_family: defaultdict[int, list[int]] = defaultdict(list)
    for k, group in enumerate(groups):
        by_family[group.family].append(k)
    why = {f: _why_not([groups[k] for k in ids]) for f, ids in by_family.items()}
    # The code of the model may have widths written in. Where nothing is normalised over channels, numbers tell.
    for exact in (True, False):
        fitting = [f for f in why if not why[f] and all(groups[k].exact for k in by_family[f]) == exact]
        if fitting and _trial(model, groups, [k for f in fitting for k in by_family[f]], inputs):
            why.update({f: _trial(model, groups, by_family[f], inputs) for f in fitting})
    reasons = dict.fromkeys(prunable_layers(model), "the model does not call it, or not as a layer")
    written = {f: {axis.layer for k in ids for axis in groups[k].producers} for f, ids in by_family.items()}
    for f in why:
        reasons.update(dict.fromkeys(written[f], why[f]))
    free = [by_family[f] for f in why if not why[f] and (layers is None or written[f] & set(layers))]
    for name in layers or ():
        if name not in reasons:
            known = difflib.get_close_matches(name, reasons, n=3) or list(reasons)[:8]
            raise ValueError(f"there is no layer {name!r}; there are: {', '.join(known)}")
        if reasons[name]:
            raise ValueError(f"the output channels of layer {name!r} cannot be removed: {reasons[name]}")
    if not free:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no channels of {type(model).__name__} can be removed. {listed}")
    return free


def _why_not(family: Sequence[ChannelGroup]) -> str:
    """Why the groups of a family cannot become narrower; empty if they can."""
    if reason := next((g.fixed or g.unprunable for g in family if g.fixed or g.unprunable), ""):
        return reason
    if not all(group.producers and group.consumers for group in family):
        return "no layer reads them" if any(group.producers for group in family) else "no layer writes them"
    if len({group.size for group in family}) > 1:
        return "they lie unevenly in the groups of a group norm"
    return "" if family[0].size > 1 else "there is one alone"


def _trial(model: nn.Module, groups: Sequence[ChannelGroup], ids: Sequence[int], inputs: Inputs) -> str:
    """What goes wrong when these groups lose half of their members; empty if nothing does."""
    half = {k: torch.arange(groups[k].size // 2) for k in ids}
    try:
        reason = _difference(model, _narrowed(model, groups, half, inputs), groups, half, inputs)
    except Exception as error:  # the model's own code fails, in its own way
        reason = str(error).partition("\n")[0] or type(error).__name__
    return reason and f"their number is written in the code of the model, it seems: {reason}"


def _given_counts(
    model: nn.Module, groups: Sequence[ChannelGroup], families: list[list[int]], widths: Mapping[str, int]
) -> list[int]:
    """How many members of each group in a family stay, from numbers of output channels by layer."""
    counts = [groups[ids[0]].size for ids in families]
    asked: dict[int, tuple[str, int]] = {}
    for name, width in widths.items():
        views = [
            (f, k, axis)
            for f, ids in enumerate(families)
            for k in ids
            for axis in groups[k].producers
            if axis.layer == name
        ]
        total = sum(axis.positions.numel() for _, _, axis in views)
        held = len(weight_view(prunable_layers(model)[name]))
        for f, k, _ in views:
            count, rest = divmod(width * groups[k].size, total)
            if total != held or rest or not 1 <= count <= groups[k].size:
                raise ValueError(
                    f"layer {name!r} cannot have {width} output channels: it has {held}, of which {total} can go, "
                    f"in groups of {groups[k].size} that stay in proportion"
                )
            if asked.setdefault(f, (name, count))[1] != count:
                raise ValueError(
                    f"layers {asked[f][0]!r} and {name!r} share channels and need the same width"
                )
            counts[f] = count
    return counts


def _counts(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    families: list[list[int]],
    scores: Sequence[Tensor],
    inputs: Inputs,
    sparsity: float,
    allocate: str,
    align: int,
) -> list[int]:
    """How many members of each group in a family stay within the budget of multiply-adds."""
    positions, _ = trace(model, inputs)
    dense = {name: positions[name] * layer.weight.numel() for name, layer in prunable_layers(model).items()}
    sizes = [groups[ids[0]].size for ids in families]

    def macs(counts: Sequence[int]) -> float:
        """Of the model with ``counts`` members of the groups of each family left."""
        gone: defaultdict[tuple[str, int], float] = defaultdict(float)
        for ids, size, count in zip(families, sizes, counts, strict=True):
            for k in ids:
                for axis in groups[k].axes:
                    length = _tensor(model, axis.parameter).shape[axis.dim]
                    gone[axis.parameter, axis.dim] += (1 - count / size) * axis.positions.numel() / length
        total = 0.0
        for name, cost in dense.items():
            total += cost * (1 - gone[f"{name}.weight", 0]) * (1 - gone[f"{name}.weight", 1])
        return total

    steps = []  # of members: the groups of a family that lie in one tensor make up its width together
    for ids in families:
        lying = Counter((axis.parameter, axis.dim) for k in ids for axis in groups[k].axes)
        steps.append(align // math.gcd(align, *lying.values()))

    def rounded(count: int, size: int, step: int) -> int:
        return min(size, max(1, round(count / step)) * step)

    full, budget = macs(sizes), (1 - sparsity) * sum(dense.values())
    ranked = []  # priorities of a family, those of the best member first
    for f, (ids, size) in enumerate(zip(families, sizes, strict=True)):
        score = torch.stack([scores[k].sort(descending=True).values for k in ids]).sum(0)
        cost = full - macs([n - (g == f) for g, n in enumerate(sizes)])
        ranked.append(budgets.RULES[allocate](score, torch.full((size,), cost, dtype=torch.float64)))
    thresholds = torch.cat([torch.tensor([-torch.inf]), *ranked, torch.tensor([torch.inf])]).unique()

    def counts_at(threshold: Tensor) -> list[int]:
        counts = ((p >= threshold).sum() for p in ranked)
        return [rounded(int(count), n, step) for count, n, step in zip(counts, sizes, steps, strict=True)]

    low, high = 0, len(thresholds) - 1
    if macs(counts_at(thresholds[high])) > budget * (1 + 1e-9):
        reachable = 1 - macs(counts_at(thresholds[high])) / sum(dense.values())
        raise budgets.BudgetError(
            f"sparsity {sparsity:.4g} cannot be reached by removing channels, at most {reachable:.4g}: every "
            f"layer keeps {align}, and what touches the inputs and outputs stays; ask for less, or add blocks"
        )
    while low < high:
        middle = (low + high) // 2
        if macs(counts_at(thresholds[middle])) <= budget * (1 + 1e-9):
            high = middle
        else:
            low = middle + 1
    return counts_at(thresholds[low])


# ------------------------------------------------------------------ the narrower model


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), attribute)
    return tensor


def _staying(model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept) -> dict[tuple[str, int], Tensor]:
    """Which indices stay (bool) of each parameter and dimension that loses some."""
    masks: dict[tuple[str, int], Tensor] = {}
    for k, members in kept.items():
        for axis in groups[k].axes:
            length = _tensor(model, axis.parameter).shape[axis.dim]
            mask = masks.setdefault((axis.parameter, axis.dim), torch.ones(length, dtype=torch.bool))
            mask[axis.positions] = False
            mask[axis.positions[members]] = True
    return masks


def _narrowed(model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, inputs: Inputs) -> nn.Module:
    small = copy.deepcopy(model)
    for (name, dim), mask in _staying(model, groups, kept).items():
        tensor = _tensor(small, name)
        tensor.grad = None
        tensor.data = tensor.data.index_select(dim, mask.nonzero().view(-1).to(tensor.device))
    handles = [module.register_forward_pre_hook(_adapt) for module in small.modules()]
    try:
        with eval_mode(small), torch.no_grad():
            small(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return small


def _adapt(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Set what ``module`` knows of its widths, before it runs, as its weight and its input have them."""
    x = args[0] if args else None
    if not isinstance(x, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        if module.groups == module.in_channels:
            module.groups = x.shape[-3]
        first, second = module.weight.shape[:2]
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = first, second * module.groups
        else:
            module.in_channels, module.out_channels = first, second * module.groups
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(x.shape[-len(module.normalized_shape) :])
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = x.shape[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = x.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif type(module).__name__ in ("Upsample2D", "Downsample2D") and hasattr(module, "channels"):
        module.__dict__["channels"] = x.shape[1]  # of diffusers, which compares it with its input
    elif isinstance(module, nn.Unflatten):
        # Channels come first; that they do shows when the copy is compared with the model.
        sizes = torch.Size(module.unflattened_size)
        assert isinstance(module.dim, int)
        module.unflattened_size = (x.shape[module.dim] // sizes[1:].numel(), *sizes[1:])


def _difference(
    model: nn.Module, small: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, inputs: Inputs
) -> str:
    """What ``small`` does other than ``model`` with removed channels set to zero where they are read; empty if right."""
    zeroed = copy.deepcopy(model)
    masks = _staying(model, [*groups], kept)
    with torch.no_grad(), eval_mode(zeroed), eval_mode(small):
        for axis in {(a.parameter, a.dim) for k in kept for a in (*groups[k].consumers, *groups[k].readers)}:
            weight = _tensor(zeroed, axis[0])
            shape = [1] * weight.dim()
            shape[axis[1]] = -1
            weight.data = weight * masks[axis].view(shape).to(weight)
        want, got = image_of(zeroed(*inputs)), image_of(small(*inputs))
    if want.shape != got.shape:
        return f"its output is {tuple(got.shape)}, not {tuple(want.shape)}"
    error, size = (want - got).abs().max().item(), want.abs().max().item()
    if all(groups[k].exact for k in kept) and not error <= torch.finfo(got.dtype).eps ** 0.5 * size:
        return f"its output is off by {error:.3g}, of at most {size:.3g}"
    return ""


def _refit(
    model: nn.Module,
    small: nn.Module,
    groups: Sequence[ChannelGroup],
    kept: Kept,
    example_inputs: Inputs,
    generator: torch.Generator,
) -> None:
    """Fit the layers of ``small`` that lost inputs to what they put out in ``model``, in place, first to last.

    x ≈ A x', from the channels x' that are left, as they come out of the layers fitted before, to all channels x of
    the dense model, at the same pixel; then W' = W A. No bias: what is constant in x the others can make, and at the
    border of an image too. The ridge pulls A to plain removal.
    """
    batch = check_inputs(example_inputs)
    wide, narrow = prunable_layers(model), prunable_layers(small)
    masks = _staying(model, groups, kept)
    rows = {a.layer: (a.parameter, a.dim) for k in kept for a in groups[k].producers}
    columns = {a.layer: (a.parameter, a.dim) for k in kept for a in groups[k].consumers}
    for name in _call_order(model, columns, example_inputs):
        stays = masks[columns[name]]
        size = len(stays)
        seen: dict[bool, list[Tensor]] = {}

        def see(_: str, layer: PrunableLayer, x: Tensor) -> None:
            at_last = x.detach().movedim(_channel_dim(layer), -1).flatten(0, -2)
            seen[layer is narrow[name]].append(at_last.cpu().double())  # noqa: B023

        samples = 0
        across = torch.zeros(size, int(stays.sum()), dtype=torch.float64)
        within = torch.zeros(across.shape[1], across.shape[1], dtype=torch.float64)
        for draw in range(REFIT_DRAWS.stop):
            if draw >= REFIT_DRAWS.start and samples >= REFIT_SAMPLES * size:
                break
            seen = {False: [], True: []}
            inputs = draw_inputs(example_inputs, batch, draw, generator)
            for one in (model, small):
                with torch.no_grad(), eval_mode(one), _before(one, [name], see):
                    one(*inputs)
            x, left = torch.cat(seen[False]), torch.cat(seen[True])
            across += x.T @ left
            within += left.T @ left
            samples += len(x)
        ridge = REFIT_RIDGE * within.diagonal().mean().clamp(min=1e-30)
        removal = torch.eye(size, dtype=torch.float64)[:, stays]
        eye = torch.eye(len(within), dtype=torch.float64)
        fit = torch.linalg.solve(within + ridge * eye, across + ridge * removal, left=False)
        view = weight_view(wide[name]).detach().cpu().double()
        if name in rows:
            view = view[masks[rows[name]]]
        layer = narrow[name]
        layer.weight.data = from_weight_view(layer, view @ fit).to(layer.weight)


def _call_order(model: nn.Module, names: Iterable[str], inputs: Inputs) -> list[str]:
    called: dict[str, None] = {}
    with (
        _before(model, names, lambda name, layer, x: called.setdefault(name)),
        eval_mode(model),
        torch.no_grad(),
    ):
        model(*inputs)
    return list(called)


def _channel_dim(layer: PrunableLayer) -> int:
    return -1 if isinstance(layer, nn.Linear) else -3


@contextmanager
def _before(
    model: nn.Module, names: Iterable[str], see: Callable[[str, PrunableLayer, Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls ``see(name, layer, input)`` before each of the named layers runs; what it returns replaces the input."""

    def hook(name: str) -> Callable[[Any, tuple[Tensor, ...]], Tensor | None]:
        return lambda layer, args: see(name, layer, args[0])

    layers = prunable_layers(model)
    handles = [layers[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
