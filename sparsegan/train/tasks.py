"""Image-to-image tasks that need no pairs: what is given is made of the image that is wanted."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def colourise(images: Tensor) -> Tensor:
    """Images [N, 3, S, S] without their colour: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) in all three channels.

    Raises ValueError for other than three channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f"colourise wants images of 3 channels, got {images.shape[1]}: load them with 3")
    luma = images.new_tensor(_LUMA).reshape(1, 3, 1, 1)
    return (images * luma).sum(1, keepdim=True).expand(-1, 3, -1, -1)


def super_resolve(images: Tensor) -> Tensor:
    """Images [N, C, S, S] with a sixteenth of their pixels: means of 4x4, made S x S again bilinearly.

    Raises ValueError for a side that does not divide by 4.
    """
    if images.shape[2] % 4 or images.shape[3] % 4:
        raise ValueError(
            f"super-resolve wants sides that divide by 4, got {images.shape[2]}x{images.shape[3]}"
        )
    return F.interpolate(F.avg_pool2d(images, 4), scale_factor=4.0, mode="bilinear", align_corners=False)


def deblur(
    images: Tensor, sigma: float = 1.5, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Images [N, C, S, S] behind a Gaussian of standard deviation `sigma` pixels, whose edge pixels go on outside.

    The kernel has weights proportional to exp(-d^2 / (2 sigma^2)) for distances d up to 3 sigma, and sum 1; `noise`
    is the standard deviation of normal noise that is added, drawn from `generator`.
    """
    reach = int(3 * sigma + 0.5)
    distance = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-distance.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    maps = F.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(maps, kernel[None, None, None]), kernel[None, None, :, None])
    blurred = blurred.reshape(images.shape)
    if noise:
        blurred = blurred + noise * torch.randn(blurred.shape, generator=generator).to(blurred)
    return blurred


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "colourise": colourise,
    "super-resolve": super_resolve,
    "deblur": deblur,
}
"""What a model is given, by the name of what it has to do: images [N, C, S, S] in [-1, 1] to inputs of that shape."""
