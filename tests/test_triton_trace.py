"""torch.compile and torch.export see through the Triton ops: CUDA fake tensors, on a machine that needs no GPU."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily

from sparsegan import BlockPattern, SwapConfig, make_permanent, prune, swap_to_sparse, triton_kernels

if reason := triton_kernels.unavailable():
    pytest.skip(reason, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton_cases import BASE, UP, replace

from sparsegan.layers import SparseLayer
from sparsegan.ops import cuda
from sparsegan.ops.cuda import Map, Numbers
from sparsegan.triton_kernels import ops
from sparsegan.triton_kernels.configs import TILES

LIBRARY = torch.ops.sparsegan_triton


class Layer(nn.Module):
    """A layer op and a ReLU of torch's, with the weight as buffers."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        for i, tensor in enumerate(on_packed(case).tensors()):
            self.register_buffer(f"w{i}", tensor)

    def forward(self, x):
        weight = [getattr(self, f"w{i}") for i in range(9)]
        geometry = list(self.case.geometry.values())
        if self.case.kind == "conv_transpose2d":
            geometry = [geometry[i] for i in (0, 1, 2, 4, 3)]
        op = getattr(triton_kernels, f"block_{self.case.kind}")
        return torch.relu(op(x, weight, *map(list, geometry), 1.0, self.case.zero, "relu", 0.0))


def on_packed(case):
    """The packed weight of a case, on a device that is not there."""
    with unset_fake_temporarily():
        packed = case.packed
    fields = {name: moved(value) for name, value in vars(packed).items() if name != "constants"}
    return type(packed)(**fields, constants=tuple(map(moved, packed.constants)))


def moved(value):
    return torch.empty_like(value, device="cuda") if isinstance(value, torch.Tensor) else value


def output_shape(case):
    with unset_fake_temporarily():
        return case.wanted().shape


@pytest.fixture
def device(monkeypatch):
    """Tensors made in the mode are on a device that is not there. torch asks Triton which one, to see what a kernel writes."""
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 80, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", target, raising=False)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def traced(model, *x):
    """(graphs of Dynamo, graph of AOTAutograd) of a model that must not break into several."""
    seen = []

    def compiler(graph, inputs):
        seen.append(graph)
        return lambda *_: [node.meta["val"] for node in graph.graph.output_node().args[0]]

    y = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(*x)
    assert len(seen) == 1
    return y, seen[0].graph


def launches(graph):
    return [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]


@pytest.mark.parametrize(
    "case", [BASE, UP, replace(BASE, dtype=torch.bfloat16, block=(64, 16))], ids=["conv", "up", "bf16"]
)
def test_compile_sees_the_kernels(device, case):
    model = Layer(case)
    x = torch.empty(case.size, device="cuda")
    y, graph = traced(model, x)
    assert y.shape == output_shape(case) and y.device.type == "cuda" and y.dtype == torch.float32
    assert (
        len(launches(graph)) == 2
    )  # packing and the gather-GEMM; and of each, only what it writes is copied or kept
    assert [node.kwargs["tensors_to_clone"] for node in launches(graph)] == [["y_ptr"], ["y_ptr"]]
    assert "aten.relu" in str([node.target for node in graph.nodes])


def test_compile_with_any_batch(device):
    model = Layer(BASE)
    x = torch.empty(BASE.size, device="cuda")
    torch._dynamo.mark_dynamic(x, 0)
    y, graph = traced(model, x)
    assert len(launches(graph)) == 2 and y.shape[1:] == output_shape(BASE)[1:]


def test_export_keeps_the_ops(device):
    model = Layer(UP)
    program = torch.export.export(model, (torch.empty(UP.size, device="cuda"),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets[:2] == ["sparsegan_triton.quantize_pack.default", "sparsegan_triton.gather_gemm.default"]


def test_a_packed_chain(device):
    """Layers that hand on u8 maps, with a group norm and a residual."""
    packed = on_packed(BASE)
    numbers = Numbers(torch.uint8, 0.1, 100, multiple=32)

    def chain(x):
        a = cuda.quantize_pack(x, Numbers(torch.uint8, 1.0, BASE.zero), LIBRARY)
        b = cuda.gather_gemm(a, packed, "conv2d", BASE.geometry, numbers, library=LIBRARY)
        c = cuda.group_norm_act(b, 4, numbers, activation="silu", library=LIBRARY)
        d = cuda.gather_gemm(
            a, packed, "conv2d", BASE.geometry, Numbers(torch.float16), residual=c, library=LIBRARY
        )
        return d.data

    y, graph = traced(chain, torch.empty(BASE.size, device="cuda"))
    assert y.shape == (2, 7, 9, 64) and y.dtype == torch.float16
    assert len(launches(graph)) == 1 + 1 + 3 + 1


def test_fakes_say_what_the_kernels_return():
    """The fake of an op is its own host code: sizes, types and strides of a call with `run=False` agree."""
    from triton_offline import launching

    case = replace(UP, out=torch.float16)
    with launching(run=False):
        real = case.run(LIBRARY).data
    with FakeTensorMode(allow_non_fake_inputs=True):
        with unset_fake_temporarily():
            data = case.packed_x().data
        x = Map(moved(data), case.size[1], 1.0, case.zero)
        fake = cuda.gather_gemm(
            x, on_packed(case), case.kind, case.geometry, case.numbers, library=LIBRARY
        ).data
    assert fake.shape == real.shape and fake.dtype == real.dtype and fake.stride() == real.stride()
    assert fake.device.type == "cuda"


def test_autotuning_is_over_the_list_and_can_be_traced(device):
    triton_kernels.autotune(True)
    try:
        for architecture, lists in TILES.items():
            for block_o, tiles in lists.items():
                assert len(ops._tuned[architecture, block_o].configs) == len(tiles)
        _, graph = traced(Layer(BASE), torch.empty(BASE.size, device="cuda"))
        assert len(launches(graph)) == 2
    finally:
        triton_kernels.autotune(False)
    assert not ops._tuned


def swapped(dtype):
    """A generator pruned and swapped on the CPU."""
    model = nn.Sequential(
        nn.Linear(40, 64),
        nn.Unflatten(1, (64, 1, 1)),
        nn.ConvTranspose2d(64, 64, 4),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 3, 3, padding=1),
        nn.Tanh(),
    ).eval()
    z = torch.randn(3, 40)
    make_permanent(prune(model, BlockPattern(32, 32), 0.5, "l2", example_inputs=(z,)))
    config = SwapConfig(dtype, programs=False, min_speedup=0)
    # With inputs layers are timed, and the CPU has no kernels for f16.
    model = swap_to_sparse(model, config, None if dtype == "f16" else (z,))
    for layer in layers_of(model):
        layer.backend = None if cuda.unavailable() else "triton"
    return model


def layers_of(model):
    return [part for part in model.modules() if isinstance(part, SparseLayer)]


def on_blocks_of_cuda(layer):
    """The weight that the move shall make, with real numbers."""
    layer.repack("cuda")
    return cuda.validated(layer.packed, cuda.phase_taps(layer.KIND, layer.geometry), layer.x_zero)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["int8", "f16"])
def test_a_swapped_model(device, dtype):
    """As a user has it: packed for the CPU, moved, and the backend chosen by dispatch."""
    with unset_fake_temporarily():
        model = swapped(dtype)
        wanted = [on_blocks_of_cuda(layer) for layer in layers_of(copy.deepcopy(model))]
    model.to("cuda:0")  # by number: a torch without CUDA cannot look up which device is the current one
    for layer, real in zip(layers_of(model), wanted, strict=True):
        got = layer.packed.tensors()
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in real.tensors()]
        assert all(is_fake(t) and t.is_cuda for t in got)
    z = torch.empty(3, 40, device="cuda:0")
    y, graph = traced(model, z)
    assert y.shape == (3, 3, 8, 8) and y.device.type == "cuda" and len(launches(graph)) == 8
    exported = torch.export.export(model, (z,)).graph
    ops_called = [str(node.target) for node in exported.nodes if "sparsegan" in str(node.target)]
    of_a_layer = ["sparsegan_triton.quantize_pack.default", "sparsegan_triton.gather_gemm.default"]
    assert ops_called == of_a_layer * 4


def test_only_fake_weights_go_unchecked(device, monkeypatch):
    def refuse(packed):
        raise ValueError("checked")

    monkeypatch.setattr(cuda, "validate", refuse)
    with unset_fake_temporarily():
        model, other = swapped("f16"), swapped("f16")
    other.to("cuda:0")
    monkeypatch.setattr("sparsegan.layers.is_fake", lambda tensor: False)
    with pytest.raises(ValueError, match="checked"):
        model.to("cuda:0")
