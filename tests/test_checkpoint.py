"""One file in, the same model out; and no file makes load() do anything but that or raise ValueError."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparsegan import checkpoint
from sparsegan.checkpoint import load, save
from sparsegan.graph import CaptureError, capture, lower, observe
from sparsegan.layers import SparseConv2d, SparseLayer, SparseLinear, SparseProgram
from sparsegan.swap import SwapConfig, exchange, explain, single, swap_to_sparse


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """One round for each race: here it does not matter who wins."""
    monkeypatch.setattr(single, "LAYER_BUDGET", 0.0)
    monkeypatch.setattr(exchange, "MODEL_BUDGET", 0.0)


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
def test_layers_one_by_one_come_back(tmp_path, dtype, monkeypatch):
    def no_graph(*_):
        raise CaptureError("not now")

    monkeypatch.setattr(exchange, "swap_programs", no_graph)
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
    assert any(isinstance(module, SparseLayer) for module in again.modules())


class Skips(nn.Module):
    """A skip, attention and a clamp that stay torch, several inputs and a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Conv2d(8, 3, 1)
        self.register_buffer("shift", torch.linspace(0, 1, 8).view(1, 8, 1, 1))

    def forward(self, x, scale):
        x = self.first(x) * scale[:, :, None, None]
        x = (x + self.second(x)).clamp(-2, 2) + self.shift
        rows = x.flatten(2).transpose(1, 2)
        rows = nn.functional.scaled_dot_product_attention(self.q(rows), self.k(rows), rows)
        x = x + rows.transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
        return {"image": torch.tanh(self.last(x)), "features": [x, (rows,)]}


def graph(dtype="int8"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = Skips().eval(), (torch.randn(2, 4, 6, 5), torch.rand(2, 8))
    captured = capture(model, inputs)
    lowered = lower(captured, observe(captured, [inputs]), {"second": "bf16"}, dtype, backend="reference")
    return lowered.model, inputs


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["int8", "bf16", "f32"])
def test_graphs_come_back(tmp_path, dtype):
    model, inputs = graph(dtype)
    path = tmp_path / "model.safetensors"
    save(model, path)
    again = load(path, backend="reference")
    for x in (inputs, (torch.randn(1, 4, 3, 9), torch.rand(1, 8))):
        got, wanted = again(*x), model(*x)
        assert list(got) == list(wanted) and torch.equal(got["image"], wanted["image"])
        assert torch.equal(got["features"][0], wanted["features"][0])
        assert torch.equal(got["features"][1][0], wanted["features"][1][0])
    assert again.state_dict().keys() == model.state_dict().keys()
    programs = [module for module in again.modules() if isinstance(module, SparseProgram)]
    assert programs and all(program.backend == "reference" for program in programs)
    with pytest.raises(ValueError, match="captured for"):
        again(inputs[0], torch.rand(3, 8))
    save(nn.Sequential(again), path)  # a file of a file, inside another module


@torch.no_grad()
def test_swapped_models_come_back_with_their_explanation(tmp_path):
    model, z = swapped()
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", backend="reference")
    assert torch.equal(again(z), model(z)) and str(explain(again)) == str(explain(model))
    assert explain(again).programs == 1


@torch.no_grad()
def test_equations_between_sizes_come_back(tmp_path):
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).view(4, 4, 64)

    save(lower(capture(Folded().eval(), (torch.randn(4, 3, 10, 10),))).model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again(torch.randn(4, 3, 6, 18)).shape == (4, 4, 64)
    with pytest.raises(ValueError, match=r"which needs .* capture it again"):
        again(torch.randn(4, 3, 10, 11))


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
    rewrite(file, version="4")
    with pytest.raises(ValueError, match="format version 4, this sparsegan reads 1, 2, 3"):
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
    rewrite(file, version="1")
    load(file)


@pytest.fixture
def graph_file(tmp_path):
    path = tmp_path / "g.safetensors"
    save(graph()[0], path)
    return path


def rewrite_graph(path, edit, **metadata):
    with safe_open(path, framework="pt") as opened:
        old = opened.metadata()
        held = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    tree = json.loads(old["content"])
    edit(tree["model"])
    text = json.dumps(tree)
    save_file(held, path, {**old, "content": text, "sha256": checkpoint._digest(text, held), **metadata})


def call(spec, op):
    return next(node for node in spec["nodes"] if node["op"].startswith(op))


def program(spec):
    return next(iter(spec["programs"].values()))


def step(spec):
    return next(step for step in program(spec)["steps"] if step["weight"])


HOSTILE_GRAPHS = {
    "an operator that is not in the list": lambda g: call(g, "aten.clamp").update(op="aten.set_.default"),
    "an operator of another library": lambda g: call(g, "aten.clamp").update(op="os.system.default"),
    "an overload that is none": lambda g: call(g, "aten.clamp").update(op="aten.clamp.__class__"),
    "no overload": lambda g: call(g, "aten.clamp").update(op="aten.clamp"),
    "a packet's method": lambda g: call(g, "aten.clamp").update(op="aten.clamp.overloads"),
    "an unknown program": lambda g: call(g, "program").update(program="check_inputs"),
    "an unknown node": lambda g: call(g, "aten.clamp").update(args=[{"node": "nowhere"}]),
    "an argument of no kind": lambda g: call(g, "aten.clamp").update(args=[{"call": "exit"}]),
    "a device": lambda g: call(g, "aten.clamp").update(args=[{"device": "cuda"}]),
    "a name of torch": lambda g: call(g, "aten.clamp").update(args=[{"torch": "load"}]),
    "code for a keyword": lambda g: call(g, "aten.clamp").update(kwargs={"keywords": {"a=exit()) #": 1}}),
    "keywords that are none": lambda g: call(g, "aten.clamp").update(kwargs=[1]),
    "code for a tensor": lambda g: call(g, "tensor").update(tensor='a")) or exit() #'),
    "a tensor in a dunder": lambda g: call(g, "tensor").update(tensor="__class__.x"),
    "a tensor that is not there": lambda g: call(g, "tensor").update(tensor="nowhere"),
    "a node twice": lambda g: g["nodes"].insert(0, g["nodes"][0]),
    "an input late": lambda g: g["nodes"].insert(-1, {"name": "late", "op": "input"}),
    "no output": lambda g: g["nodes"].pop(),
    "an output of one tensor": lambda g: g["nodes"][-1].update(args=[g["nodes"][-1]["args"][0][0]]),
    "two outputs": lambda g: g["nodes"].append(g["nodes"][-1] | {"name": "again"}),
    "leaves that are not numbered": lambda g: g.update(returns=["tuple", [0, 0]]),
    "a tree of another kind": lambda g: g.update(returns=["set", [0]]),
    "inputs in no tuple": lambda g: g.update(takes=["list", [0, 1]]),
    "a size of an input": lambda g: g["check"].update(wanted=[[1.5]]),
    "a formula": lambda g: g["check"].update(equations=[[["**", 9, 9], 1]]),
    "a formula of strings": lambda g: g["check"].update(equations=[["exit()", 1]]),
    "a slot that is not there": lambda g: step(g).update(x=99),
    "a slot by a fraction": lambda g: step(g).update(x=0.5),
    "an input for a weight": lambda g: step(g).update(x=-1),
    "a truth of text": lambda g: step(g).update(stats="yes"),
    "a window": lambda g: step(g).update(stride=[0, 1]),
    "three strides": lambda g: step(g).update(stride=[1, 1, 1]),
    "a kind": lambda g: step(g).update(kind="conv9d"),
    "channels of a weight": lambda g: step(g)["weight"].update(in_channels=2**40),
    "a field too many": lambda g: step(g).update(extra=1),
    "a field too few": lambda g: step(g).pop("act"),
    "an activation": lambda g: step(g)["act"].update(name="swish"),
    "steps that are no list": lambda g: program(g).update(steps={}),
    "a program with code for a name": lambda g: g["programs"].update({"x); exit(": program(g)}),
    "the scale of a slot": lambda g: program(g)["slots"][0].update(scale="1"),
    "no programs": lambda g: g.pop("programs"),
}


@pytest.mark.parametrize("edit", HOSTILE_GRAPHS.values(), ids=HOSTILE_GRAPHS)
def test_hostile_graphs(graph_file, edit):
    load(graph_file)
    rewrite_graph(graph_file, edit)
    with pytest.raises(ValueError, match=r"describes no model|unknown"):
        load(graph_file)


class Repeated(nn.Module):
    """One layer, called three times with an operator between that no program has."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        for _ in range(3):
            x = torch.cos(self.layer(x))
        return x


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["int8", "f32"])
def test_a_layer_that_is_called_again_is_held_once(tmp_path, dtype):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    captured = capture(Repeated().eval(), (x,))
    model = lower(captured, observe(captured, [(x,)]), default=dtype).model
    assert len([m for m in model.modules() if isinstance(m, SparseProgram)]) == 3
    path = tmp_path / "m.safetensors"
    save(model, path)
    with safe_open(path, framework="pt") as opened:
        values = [name for name in opened.keys() if name.endswith("_values")]  # noqa: SIM118
    assert len(values) == 1
    again = load(path)
    for one in (model, again):
        for field in ("values", "cols", "tap_ptr"):
            assert len({t.data_ptr() for name, t in one.state_dict().items() if name.endswith(field)}) == 1
    assert torch.equal(again(x), model(x))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    rewrite_graph(path, lambda g: g["programs"]["program_1"]["steps"][1]["weight"].update(cols="/nowhere"))
    with pytest.raises(ValueError, match="nowhere is missing"):
        load(path)


@torch.no_grad()
def test_equal_layers_and_models_of_one_capture_share_nothing(tmp_path):
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x):
            return self.b(torch.cos(self.a(x)))

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    twins = Twins().eval()
    captured = capture(twins, (x,))
    lower(captured)  # packs; the others take what it packed
    first, second = lower(captured).model, lower(captured).model
    wanted = first(x)
    nn.init.normal_(twins.b.weight)
    other = lower(capture(twins, (x,))).model
    second.load_state_dict(other.state_dict())
    assert not torch.equal(other(x), wanted)
    save(second, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")(x), other(x))  # a and b are apart
    assert torch.equal(copy.deepcopy(first)(x), wanted)  # so are the two models


@torch.no_grad()
def test_version_2_files_load(tmp_path):
    model, inputs = graph()
    path = tmp_path / "m"
    save(model, path)
    rewrite_graph(path, lambda g: None, version="2")
    assert torch.equal(load(path, backend="reference")(*inputs)["image"], model(*inputs)["image"])


def unsaveable():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return torch.linalg.qr(self.layer(x))[0]

    x = (torch.randn(4, 4),)
    return [
        (lower(capture(Odd().eval(), x)).model, "linalg_qr.* cannot be saved"),
        (torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), "ReLU"),
    ]


def test_graphs_that_cannot_be_saved(tmp_path):
    for model, match in unsaveable():
        with pytest.raises(ValueError, match=match):
            save(model, tmp_path / "m")


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
