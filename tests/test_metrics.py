"""psnr, ssim, density_coverage and precision_recall against values worked out by hand or by another formula."""

import math

import pytest
import torch

from sparsegan.metrics import density_coverage, precision_recall, psnr, ssim


def _images(n: int = 3, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, channels, 16, 20, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_known_error_is_per_image() -> None:
    reference = torch.zeros(3, 1, 4, 4)
    images = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), -0.02), torch.zeros(1, 4, 4)])
    # 20 * log10(2 / error)
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0, math.inf]))
    torch.testing.assert_close(psnr(images, reference, data_range=0.2)[0].item(), 0.0, atol=1e-5, rtol=0)


def test_ssim_is_one_only_for_equal_images() -> None:
    images = _images()
    torch.testing.assert_close(ssim(images, images), torch.ones(3))
    assert (ssim(images, -images) < 0).all()
    assert (ssim(images, _images(seed=1)).abs() < 0.3).all()


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = 0.5, -0.6
    c1 = 0.02**2
    want = (2 * (a + 1) * (b + 1) + c1) / ((a + 1) ** 2 + (b + 1) ** 2 + c1)  # black is -1
    got = ssim(torch.full((1, 3, 11, 11), a), torch.full((1, 3, 11, 11), b))
    assert got.item() == pytest.approx(want, abs=2e-3)


def test_ssim_equals_the_definition_written_out() -> None:
    """One window (11x11 image), each moment as an explicit weighted sum in float64."""
    x, y = _images(1)[:, :, :11, :11], _images(1, seed=1)[:, :, :11, :11]
    coordinates = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-(coordinates[:, None] ** 2 + coordinates[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    x64, y64 = x[0, 0].double() + 1, y[0, 0].double() + 1
    mx, my = (weights * x64).sum(), (weights * y64).sum()
    vx, vy = (weights * (x64 - mx) ** 2).sum(), (weights * (y64 - my) ** 2).sum()
    cov = (weights * (x64 - mx) * (y64 - my)).sum()
    c1, c2 = 0.02**2, 0.06**2
    want = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(x, y).item() == pytest.approx(want.item(), abs=1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_pair_metrics_refuse_other_shapes(metric) -> None:
    with pytest.raises(ValueError, match="same shape"):
        metric(torch.zeros(1, 1, 16, 16), torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="same shape"):
        metric(torch.zeros(16, 16), torch.zeros(16, 16))


def test_ssim_refuses_small_images() -> None:
    with pytest.raises(ValueError, match="11x11"):
        ssim(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16))


def test_density_coverage_counted_by_hand() -> None:
    # Balls for k = 1: 0 reaches 1, 1 reaches 1, 3 reaches 2, 10 reaches 7.
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    samples = torch.tensor([[0.5], [100.0]])  # 0.5 lies in the balls of 0 and 1, 100 in none
    assert density_coverage(samples, real, k=1) == pytest.approx((1.0, 0.5))


def test_density_coverage_tells_model_collapse_and_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    real, same = torch.randn(300, 4, generator=rng), torch.randn(300, 4, generator=rng)
    density, coverage = density_coverage(same, real)
    assert 0.8 < density < 1.2
    assert coverage > 0.9
    _, collapsed = density_coverage(same[:1].expand(300, 4), real)
    assert collapsed < 0.2
    assert density_coverage(same + 20, real) == (0.0, 0.0)


def test_density_coverage_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="one shape"):
        density_coverage(torch.zeros(4, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="one shape"):
        density_coverage(torch.zeros(0, 3), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="from 1 to 4"):
        density_coverage(torch.zeros(4, 2), torch.zeros(5, 2), k=5)


def test_precision_recall_counted_by_hand() -> None:
    # Balls for k = 1: 0 reaches 1, 1 reaches 1, 3 reaches 2, 10 reaches 7; 0.5 reaches 1.5, 2 reaches 1.5, 30 reaches 28.
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0], [100.0]])
    samples = torch.tensor([[0.5], [2.0], [30.0], [-5.0]])
    # 0.5 and 2 lie in real balls, as 30 does in that of 100 (90); -5 in none. All real points but 100 lie in balls of samples.
    assert precision_recall(samples, real, k=1) == pytest.approx((3 / 4, 4 / 5))


def test_precision_recall_tell_what_is_missing_from_what_is_wrong() -> None:
    rng = torch.Generator().manual_seed(0)
    real, same = torch.randn(300, 4, generator=rng), torch.randn(300, 4, generator=rng)
    assert min(precision_recall(same, real)) > 0.8
    precision, recall = precision_recall(same * 0.2, real)  # good images, little variety
    assert precision > 0.9
    assert recall < 0.1
    assert precision_recall(real, same * 0.2) == (recall, precision)
    assert precision_recall(same + 20, real) == (0.0, 0.0)


def test_precision_recall_refuses_too_few() -> None:
    with pytest.raises(ValueError, match="from 1 to 2"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="one shape"):
        precision_recall(torch.zeros(4, 2), torch.zeros(9, 3))
