"""Metrics of one image against another at the same place of the batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW, _SIGMA = 11, 1.5


def _check(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.dim() != 4:
        raise ValueError(
            "images and reference should both be [N, C, H, W] of the same shape, "
            f"they are {list(images.shape)} and {list(reference.shape)}"
        )


def psnr(images: Tensor, reference: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, [N] float32; +inf where both are equal.

    images, reference: [N, C, H, W]; data_range: largest minus smallest possible value (2 for images in [-1,
    1]). Raises ValueError when the shapes differ.
    """
    _check(images, reference)
    mse = (images.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(data_range**2 / mse)


def ssim(images: Tensor, reference: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each image, [N] float32, 1 where both are equal.

    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", section III:
    11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, mean over channels and over the windows that lie
    inside the image. images, reference: [N, C, H, W] with H, W >= 11 and values in [-data_range / 2,
    data_range / 2]. Raises ValueError otherwise, or when the shapes differ.
    """
    _check(images, reference)
    channels = images.shape[1]
    if min(images.shape[2:]) < _WINDOW:
        raise ValueError(f"ssim needs images of 11x11 or more, these are {images.shape[2]}x{images.shape[3]}")
    offsets = torch.arange(_WINDOW, device=images.device) - (_WINDOW - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    window = torch.outer(weights, weights).expand(channels, 1, _WINDOW, _WINDOW)

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    # The luminance term compares means and wants them from black = 0 upwards.
    x, y = images.float() + data_range / 2, reference.float() + data_range / 2
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x.square()
    variance_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))
