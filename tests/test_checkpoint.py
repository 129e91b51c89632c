"""One file in, the same model out; and no file makes load() do anything but that or raise ValueError."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparsegan import checkpoint, swap
from sparsegan.checkpoint import load, save
from sparsegan.layers import SparseChain, SparseConv2d, SparseLinear
from sparsegan.swap import SwapConfig, explain, swap_to_sparse


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """One round for each race: here it does not matter who wins."""
    monkeypatch.setattr(swap, "LAYER_BUDGET", 0.0)
    monkeypatch.setattr(swap, "MODEL_BUDGET", 0.0)


def decoder():
    """Linear, transposed convolution, grouped convolution and modules that stay dense."""
    return nn.Sequential(
        nn.Linear(6, 64),
        nn.LeakyReLU(0.1),
        nn.Unflatten(1, (4, 4, 4)),
        nn.Sequential(nn.ConvTranspose2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 4, 3, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.Upsample(scale_factor=2.0),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
    ).eval()


def swapped(dtype="int8"):
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    return swap_to_sparse(decoder(), SwapConfig(dtype=dtype, min_speedup=0, backend="reference"), (z,)), z


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["int8", "bf16", "f32"])
def test_the_model_comes_back(tmp_path, dtype):
    model, z = swapped(dtype)
    path = tmp_path / "model.safetensors"
    save(model, path)
    again = load(path, backend="reference")
    assert torch.equal(again(z), model(z))
    assert repr(again) == repr(model) and str(explain(again)) == str(explain(model))
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value) and again.state_dict()[key].dtype == value.dtype
    assert not any(module.training for module in again.modules())
    assert again[0].backend == "reference" and load(str(path))[0].backend is None
    assert any(isinstance(module, SparseChain) for module in again.modules())


@torch.no_grad()
@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.Linear(4, 3, bias=False), (2, 4)),
        (nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, 2, False, 2), (1, 4, 5, 5)),
        (nn.Conv2d(4, 2, 3, padding="same"), (1, 4, 5, 5)),
        (nn.BatchNorm2d(4), (1, 4, 3, 3)),
        (nn.BatchNorm1d(4, affine=False), (2, 4)),
        (nn.InstanceNorm2d(4), (1, 4, 3, 3)),
        (nn.LayerNorm((4, 3)), (2, 4, 3)),
        (nn.PReLU(4), (1, 4, 3)),
        (nn.Hardtanh(-2.0, 3.0), (4,)),
        (nn.GELU("tanh"), (4,)),
        (nn.Sequential(nn.SiLU(), nn.ELU(0.5), nn.Softplus(2.0), nn.Hardswish(), nn.ReLU6()), (4,)),
        (nn.Sequential(nn.Dropout(0.3), nn.Flatten(), nn.Identity(), nn.Sigmoid()), (2, 3, 3)),
        (nn.Upsample(size=(7, 6), mode="bilinear", align_corners=True), (1, 2, 3, 3)),
        (nn.UpsamplingNearest2d(scale_factor=2), (1, 2, 3, 3)),
        (
            nn.Sequential(nn.ReflectionPad2d(1), nn.ZeroPad2d((1, 2, 0, 1)), nn.ReplicationPad2d(1)),
            (1, 2, 3, 3),
        ),
        (
            nn.Sequential(nn.PixelShuffle(2), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)),
            (1, 4, 4, 4),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_dense_modules(tmp_path, module, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for parameter in module.parameters():
        parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    save(module.eval(), tmp_path / "m")
    again = load(tmp_path / "m")
    assert torch.equal(again(x), module(x)) and repr(again) == repr(module)


def test_an_int8_file_is_small(tmp_path):
    layer = nn.Conv2d(256, 256, 3)
    mask = torch.rand(64, 64, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.25
    layer.weight.data *= mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    save(SparseConv2d.from_dense(layer, dtype=torch.int8, x_range=(0.0, 1.0)), tmp_path / "sparse")
    dense = layer.weight.numel() * 4
    assert (tmp_path / "sparse").stat().st_size < dense * 0.25 / 4 * 1.25


def test_subclasses_of_sequential_come_back_as_sequential(tmp_path):
    class Generator(nn.Sequential):
        pass

    save(Generator(nn.Tanh()), tmp_path / "m")
    assert type(load(tmp_path / "m")) is nn.Sequential


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Tanh())

    def forward(self, x):
        return self.main(x)


def hooked():
    module = nn.Tanh()
    module.register_forward_hook(lambda *_: None)
    return module


def masked():
    layer = nn.Linear(2, 2)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


@pytest.mark.parametrize(
    "model, match",
    [
        (Own(), r"the model itself\) of type Own cannot be saved.*Save the nn.Sequential"),
        (nn.Sequential(nn.ReLU(), Own()), "the module 1 of type Own"),
        (nn.Sequential(hooked()), "forward hooks"),
        (nn.Sequential(masked()), "ParametrizedLinear.*made permanent"),
    ],
)
def test_save_refuses(tmp_path, model, match):
    with pytest.raises(ValueError, match=match):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "m.safetensors"
    save(
        nn.Sequential(SparseLinear.from_dense(nn.Linear(8, 8)), nn.Linear(8, 4), nn.BatchNorm1d(4)).eval(),
        path,
    )
    return path


def test_truncated_files(file):
    data = file.read_bytes()
    for size in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load(file)


def test_every_altered_byte_is_noticed(file):
    data = file.read_bytes()
    for position in range(0, len(data), 13):
        altered = bytearray(data)
        altered[position] ^= 0x11
        file.write_bytes(altered)
        try:
            load(file)
        except ValueError:
            continue
        # JSON has room for bytes that mean nothing; anything else must have been noticed.
        assert chr(data[position]).isspace()


def rewrite(path, *, content=None, tensors=None, **metadata):
    """Forge a file: change the tree or the tensors and write a fitting checksum."""
    with safe_open(path, framework="pt") as opened:
        old = opened.metadata()
        held = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    tree = json.loads(old["content"])
    if content:
        content(tree["model"]["children"])
    if tensors:
        tensors(held)
    text = json.dumps(tree)
    new = {**old, "content": text, "sha256": checkpoint._digest(text, held), **metadata}
    save_file(held, path, new)


def test_wrong_versions_and_foreign_files(file):
    rewrite(file, version="2")
    with pytest.raises(ValueError, match="format version 2, this sparsegan reads version 1"):
        load(file)
    rewrite(file, version="1", format="other")
    with pytest.raises(ValueError, match=r"not one that sparsegan\.save wrote"):
        load(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"not one that sparsegan\.save wrote"):
        load(file)
    with pytest.raises(FileNotFoundError):
        load(file.with_name("nowhere"))


def test_a_forged_file_that_is_fine_loads(file):
    rewrite(file)
    load(file)


def setting(index, key, value):
    return lambda children: children[index][1]["settings"].__setitem__(key, value)


def tensor(name, edit):
    return lambda held: held.__setitem__(name, edit(held[name]))


@pytest.mark.parametrize(
    "content, match",
    [
        (lambda c: c[0][1].__setitem__("type", "Popen"), "unknown module type 'Popen'"),
        (lambda c: c[0][1].pop("type"), "type"),
        (lambda c: c.append(c[1]), "missing"),
        (lambda c: c.pop(), "belong to no module: 2"),
        (lambda c: c[0].__setitem__(0, "a.b"), "missing"),
        (lambda c: c.__setitem__(slice(None), [1, 2]), "unpack"),
        (lambda c: c[0][1].__setitem__("taps", 2**40), "taps must be a positive 32-bit"),
        (lambda c: c[0][1].__setitem__("taps", 2), "tap_sums must have shape"),
        (lambda c: c[0][1].__setitem__("in_channels", 4), "cols must lie"),
        (lambda c: c[0][1].__setitem__("in_channels", "8"), "in_channels must be a positive"),
        (setting(0, "activation", "evil"), "activation must be one of"),
        (setting(0, "x_scale", "1"), "model that can be loaded"),
        (setting(0, "backend", "cpu"), "backend"),
        (setting(0, "kernel_size", [3, 3]), "takes no geometry"),
        (setting(1, "in_features", 2**40), "size mismatch"),
        (setting(1, "in_features", 2**62), "model that can be loaded"),
        (setting(1, "in_features", -1), "model that can be loaded"),
        (setting(1, "device", "cpu"), "Linear takes in_features"),
        (setting(2, "num_features", 5), "size mismatch"),
    ],
)
def test_hostile_trees(file, content, match):
    rewrite(file, content=content)
    with pytest.raises(ValueError, match=match):
        load(file)


@pytest.mark.parametrize(
    "tensors, match",
    [
        (tensor("0.cols", lambda t: t + 1), "cols must lie"),
        (tensor("0.cols", lambda t: t - 1), "cols must lie"),
        (tensor("0.tap_ptr", lambda t: t * 2), "tap_ptr must run"),
        (tensor("0.row_channels", lambda t: t * 1000), "row_channels must hold"),
        (tensor("0.values", lambda t: t * float("inf")), "values must be finite"),
        (tensor("0.scale", lambda t: t.half()), "scale must be"),
        (tensor("0.values", lambda t: t[:, :, :0].contiguous()), "values"),
        (lambda held: held.pop("1.weight"), "the tensor 1.weight is missing"),
        (lambda held: held.update(extra=torch.ones(1)), "belong to no module: extra"),
        (tensor("1.weight", lambda t: t.int()), "1.weight is torch.int32"),
        (tensor("1.weight", lambda t: t.flatten()), "size mismatch"),
        (tensor("2.num_batches_tracked", lambda t: t.float()), "num_batches_tracked is torch.float32"),
    ],
)
def test_hostile_tensors(file, tensors, match):
    rewrite(file, tensors=tensors)
    with pytest.raises(ValueError, match=match):
        load(file)


def test_deeply_nested_json(file):
    text = '{"model": ' + '{"type": "Sequential", "children": [["0", ' * 5000 + "0" + "]]}" * 5000 + "}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file({}, file, {"format": "sparsegan", "version": "1", "content": text, "sha256": digest})
    with pytest.raises(ValueError, match="model that can be loaded"):
        load(file)
