"""The texture distance, and the shift of features of a set."""

import pytest
import torch
from torch import Tensor

from sparsegan.metrics import FeatureDistance, TextureDistance
from sparsegan.metrics.perceptual import feature_shift
from sparsegan.metrics.scattering import Scattering


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def stripes(angle: float, size: int = 32) -> Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    turned = x * torch.cos(torch.tensor(angle)) + y * torch.sin(torch.tensor(angle))
    return torch.sin(2.0 * turned)[None, None]


def test_flat_images_have_no_texture():
    maps = Scattering()(torch.full((2, 3, 32, 32), 0.7))
    assert all(float(m.max()) < 2e-3 for m in maps[:-1])
    assert torch.allclose(maps[-1][:, 0], torch.full((2, 4, 4), 0.7), atol=1e-5)


def test_each_orientation_answers_to_its_stripes():
    for step in range(6):
        first = Scattering()(stripes(torch.pi * step / 6))[0].mean((0, 2, 3))
        assert int(first.argmax()) == step and first.max() > 2 * first.sort().values[-3]


def test_texture_that_moves_stays_the_same_texture():
    distance = TextureDistance()
    image = stripes(0.0)
    moved, gone = image.roll(1, 3), torch.zeros_like(image)
    assert (image - moved).abs().mean() > (image - gone).abs().mean()  # pixels would rather have none
    assert distance(moved, image) < 0.7 * distance(gone, image)


def test_blurring_is_seen():
    image = noise(4, 3, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    distance = TextureDistance()
    assert float(distance(image, image)) == 0.0
    assert distance(blurred, image) > 0.3


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 9, 40), (1, 1, 8, 8), (3, 3, 64, 64)])
def test_sizes_and_gradients(shape: tuple[int, ...]):
    image = noise(*shape).requires_grad_(True)
    TextureDistance(shift=0.1)(image, noise(*shape, seed=1)).backward()
    assert bool(image.grad.isfinite().all()) and bool(image.grad.any())


def test_the_shift_is_the_distance_of_the_means_over_the_variance():
    wanted = torch.tensor([[0.0, 1.0], [2.0, 1.0]])[:, :, None, None].expand(2, 2, 3, 3)
    found = wanted + torch.tensor([0.5, -1.0])[None, :, None, None]
    # means (1, 1) and (1.5, 0): squared distance 1.25; variance over the batch 1 + 0
    assert float(feature_shift([found], [wanted])) == pytest.approx(1.25)
    assert float(feature_shift([found, wanted], [wanted, wanted])) == pytest.approx(1.25)
    # what differs from image to image, but not on average, is no shift
    assert float(feature_shift([wanted.flip(0)], [wanted])) == 0.0


def test_the_shift_adds_to_a_feature_distance():
    def maps(images: Tensor) -> list[Tensor]:
        return [images]

    image, target = noise(4, 3, 8, 8), noise(4, 3, 8, 8, seed=1)
    plain, shifted = FeatureDistance(maps), FeatureDistance(maps, shift=2.0)
    extra = float(shifted(image, target) - plain(image, target))
    assert extra == pytest.approx(2 * float(feature_shift([image], [target])), rel=1e-5)
    assert torch.equal(plain.distances(image, target), shifted.distances(image, target))
