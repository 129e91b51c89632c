"""Training with the rounding of int8 in it, so that the weights learn to bear what the kernels will do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsegan.patterns import PRUNABLE_TYPES, from_weight_view, weight_view
from sparsegan.quantize.affine import activation_params, check_weight_bits, quantize_weight


class _RoundedWeight(nn.Module):
    """The weight as the kernels hold it: `quantize_weight` and back, gradients straight through.

    A norm folded into the layer later multiplies weight and scale of an output channel alike, so that the integers stay these.
    """

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: not a child of its own parametrization
        self._bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        layer: Any = self._layer[0]
        integers, scale = quantize_weight(weight_view(layer, weight), self._bits)
        rounded = from_weight_view(layer, integers * scale[:, None, None])
        return weight + (rounded - weight).detach()


@contextmanager
def quantization_aware(
    model: nn.Module, ranges: Mapping[str, tuple[float, float]], weight_bits: int = 8
) -> Iterator[None]:
    """Within this context the layers of ``model`` compute with int8 weights and u8 inputs, in float; trainable.

    ranges: (lo, hi) of what enters a layer, by name of a Linear, Conv2d or ConvTranspose2d; `calibrate` gives them. Other
        layers are left as they are. Inputs beyond the range are cut off, and have no gradient there.
    weight_bits: 8 or 4, as `SwapConfig.weight_bits` will be.

    The arithmetic is that of the kernels (`quantize_weight`, `activation_params`; sums in float32 rather than integers).
    Under `torch.autocast` what was rounded to int8 is rounded to bfloat16 besides, which the kernels do not do.
    Gradients pass rounding unchanged: Jacob et al. 2018 (arXiv:1712.05877), section 3; the straight-through estimator.
    Raises ValueError for an unknown layer or one of another type, and other weight_bits.
    """
    check_weight_bits(weight_bits)
    known = dict(model.named_modules())
    for name in ranges:
        if not isinstance(known.get(name), PRUNABLE_TYPES):
            raise ValueError(f"{name!r} is no Linear, Conv2d or ConvTranspose2d of the model")
    hooks = [known[name].register_forward_pre_hook(_rounding(*bounds)) for name, bounds in ranges.items()]
    layers = [known[name] for name in ranges]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _RoundedWeight(layer, weight_bits))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            _remove_last(layer)


def _rounding(low: float, high: float) -> Any:
    scale, zero = activation_params(low, high)

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        kept = x.clamp(-zero * scale, (255 - zero) * scale)
        rounded = ((kept / scale).round() + zero).clamp(0, 255).sub(zero) * scale
        return (kept + (rounded - kept).detach(), *args[1:])

    return hook


def _remove_last(layer: nn.Module) -> None:
    """Take the rounding off, and leave a mask that is on the weight, too."""
    held: Any = layer.parametrizations["weight"]  # type: ignore[index]
    if len(held) > 1:
        del held[len(held) - 1]
        return
    original = held.original
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert layer.weight is original  # training goes on with the same parameter
