"""The dense model that a swap starts from and has to beat: a copy, masks made permanent, BatchNorm folded."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._pytree import tree_leaves

from sparsegan.fuse import fold_batch_norm, with_weight
from sparsegan.patterns import PRUNABLE_TYPES, PrunableLayer, effective_weight

# Relative error that rounding in float32 cannot explain.
_ROUNDING = 1e-3

_JUDGED = 4  # batches that outputs are compared on


@dataclass(frozen=True)
class Dense:
    """A copy of the model.

    changed: it is not the model as it was given, so that it may be faster than that.
    fused:   False where folding changed the outputs: something looks between the modules of an nn.Sequential.
    """

    model: nn.Module
    changed: bool
    fused: bool


def dense_copy(model: nn.Module, inputs: tuple[Any, ...] | None) -> Dense:
    """`model` with masks made permanent and, where the outputs stay, BatchNorm folded; without gradients."""
    plain, masked = copied(model, share=False).requires_grad_(False), False
    for name, module in plain.named_modules():
        if isinstance(module, PRUNABLE_TYPES) and _is_masked(module):
            plain, masked = with_submodule(plain, name, _unmasked(module)), True
    folded = copied(plain, share=True)
    if not fold_batch_norm(folded):
        return Dense(folded, masked, True)
    if inputs is None or relative_error(outputs(folded, inputs), outputs(plain, inputs)) <= _ROUNDING:
        return Dense(folded, True, True)
    return Dense(plain, masked, False)


def copied(model: nn.Module, share: bool) -> nn.Module:
    """A deep copy; with `share` the tensors are those of `model`."""
    memo: dict[int, object] = {}
    for module in model.modules():
        shared = [*module._parameters.values(), *module._buffers.values()] if share else []
        memo |= {id(tensor): tensor for tensor in shared}
        # torch.nn.utils.prune and weight_norm leave a product that is no leaf, which deepcopy refuses.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    return copy.deepcopy(model, memo)


def with_submodule(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` wherever the one called `name` stands. Returns the model, which may be that one itself."""
    if not name:
        return module
    old = model.get_submodule(name)
    for place, other in list(model.named_modules(remove_duplicate=False)):
        if other is old:
            model.set_submodule(place, module)
    return model


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def global_rng_untouched() -> Iterator[None]:
    """Models that draw noise draw the same noise in each such block, and the user's random state stays."""
    state = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that `model` returns, in order, always with the same noise."""
    with global_rng_untouched():
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Root of the power of the error over that of what is wanted, all tensors together; inf for other shapes."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in wanted]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(got, wanted, strict=True)]
    error = sum((a - b).square().sum().item() for a, b in pairs)
    power = sum(b.square().sum().item() for _, b in pairs)
    return 0.0 if error == 0 else (error / power) ** 0.5 if power else float("inf")


@dataclass(frozen=True)
class Quality:
    """How near a model comes to another: error (see `relative_error`), and PSNR in dB.

    The peak of the PSNR is the range of the other model's output; of several outputs the worst counts.
    """

    error: float
    psnr: float


class Judge:
    """Holds the outputs of a dense model, to compare others with.

    inputs: for the error. batches: for the PSNR, the first few; they may hold outliers that int8 leaves out.
    """

    def __init__(self, dense: nn.Module, inputs: tuple[Any, ...], batches: Sequence[tuple[Any, ...]]) -> None:
        self._batches = [batch for batch in batches[:_JUDGED] if batch is not inputs]
        self._measured = len(self._batches) < len(batches[:_JUDGED])  # whether the inputs count for the PSNR
        self._batches.append(inputs)
        self._wanted = [outputs(dense, batch) for batch in self._batches]

    def quality(self, model: nn.Module) -> Quality:
        got = [outputs(model, batch) for batch in self._batches]
        error = relative_error(got[-1], self._wanted[-1])
        if math.isinf(error):
            return Quality(error, -math.inf)
        end = len(got) if self._measured else len(got) - 1
        pairs = zip(zip(*got[:end], strict=True), zip(*self._wanted[:end], strict=True), strict=True)
        return Quality(error, min((_psnr(*pair) for pair in pairs), default=math.inf))


def _psnr(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Of one output, for all batches together."""
    a, b = (torch.cat([x.double().flatten() for x in tensors]) for tensors in (got, wanted))
    noise, low, high = (a - b).square().mean().item(), b.min().item(), b.max().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10((high - low) ** 2 / noise) if high > low else -math.inf


def _is_masked(layer: PrunableLayer) -> bool:
    """Whether the layer is plain but for a parametrization or torch.nn.utils.prune."""
    if parametrize.is_parametrized(layer):
        return type(layer).__bases__[0] in PRUNABLE_TYPES and not has_hooks(layer)
    hooks = layer._forward_pre_hooks.values()
    pruned = bool(hooks) and all(isinstance(hook, BasePruningMethod) for hook in hooks)
    return pruned and type(layer) in PRUNABLE_TYPES and not layer._forward_hooks


def _unmasked(layer: PrunableLayer) -> PrunableLayer:
    mask = getattr(layer, "bias_mask", None)
    bias = layer.bias if mask is None else layer.get_parameter("bias_orig") * mask
    return with_weight(layer, effective_weight(layer), bias)
