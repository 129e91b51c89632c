"""What only a CUDA device can show: streams, several devices, graph capture, whole models. Skipped, with the reason, without one.

Never run on hardware so far. The numbers themselves are checked by the shared op tests, which also run on `cuda`.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import blocked_view, dense_op, inputs
from torch import nn

from sparsegan import (
    BlockPattern,
    SwapConfig,
    explain,
    load,
    make_permanent,
    ops,
    prune,
    save,
    swap_to_sparse,
)
from sparsegan.formats import pack
from sparsegan.layers import SparseConv2d, SparseLayer
from sparsegan.ops import cuda

pytestmark = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))

CONV = {"kernel_size": (3, 3), "padding": (1, 1)}


def layer_call(device="cuda", seed=0):
    """A validated weight and an input on `device`, and the exact result on the CPU."""
    view, x = blocked_view(64, 9, 64, 0.5, seed, True), inputs((2, 64, 32, 32), seed, True)
    packed = cuda.validated(pack(view, torch.int8, (32, 32)).to(device), [9], 9)
    return packed, x.to(device), dense_op("conv2d", x.double(), view, CONV).float()


def conv(x, packed):
    return ops.block_conv2d(x, packed, **CONV, x_zero=9)


def test_the_current_stream_is_used():
    """The input is written late on a side stream; a kernel on any other stream would read zeros."""
    packed, x, wanted = layer_call()
    conv(x, packed)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        y = conv(late, packed)
    stream.synchronize()
    assert torch.equal(y.cpu(), wanted)


def test_nothing_waits_for_the_device():
    packed, x, wanted = layer_call()
    conv(x, packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = conv(x, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y.cpu(), wanted)


def test_graph_capture():
    packed, x, wanted = layer_call()
    conv(x, packed)
    static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = conv(static, packed)
    static.copy_(x)
    graph.replay()
    assert torch.equal(y.cpu(), wanted)


def test_every_device_computes_its_own():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for device in ("cuda:1", "cuda:0"):
        packed, x, wanted = layer_call(device)
        before = torch.cuda.current_device()
        y = conv(x, packed)
        assert y.device == x.device and torch.cuda.current_device() == before
        assert torch.equal(y.cpu(), wanted)
    with pytest.raises(ops.BackendError, match="the weight on cuda:1"):
        conv(x, layer_call("cuda:1")[0])


def test_opcheck():
    packed, x, _ = layer_call()
    window = ((3, 3), (1, 1), (1, 1), (1, 1))
    arguments = (x, packed.tensors(), *window, 1.0, 9, "relu", 0.0)
    torch.library.opcheck(torch.ops.sparsegan.block_conv2d, arguments)


def pruned_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1)
    ).eval()
    x = torch.randn(2, 64, 16, 16)
    make_permanent(prune(model, BlockPattern(32, 32), 0.5, "l2", example_inputs=(x,)))
    return model, x


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "f16", "bf16"])
def test_swap_on_the_device(dtype, half):
    model, x = pruned_model()
    model, x = (model.cuda().half(), x.cuda().half()) if half else (model.cuda(), x.cuda())
    swapped = swap_to_sparse(model, SwapConfig(dtype, min_speedup=0), (x,))
    assert "programs for whole models run on the CPU only" in str(explain(swapped))
    assert sum(isinstance(m, SparseLayer) for m in swapped.modules()) == 2
    y, wanted = swapped(x), model(x)
    assert y.dtype == x.dtype and y.is_cuda
    assert (y - wanted).float().norm() < {"int8": 0.1, "f16": 0.01, "bf16": 0.05}[
        dtype
    ] * wanted.float().norm()


def test_a_swapped_model_compiles_without_a_graph_break():
    model, x = pruned_model()
    swapped = swap_to_sparse(model.cuda(), SwapConfig("f16", min_speedup=0), (x.cuda(),))
    compiled = torch.compile(swapped, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x.cuda()), swapped(x.cuda()), atol=1e-3)


def test_a_model_saved_on_the_cpu_runs_on_the_device(tmp_path):
    model, x = pruned_model()
    swapped = swap_to_sparse(model, SwapConfig("int8", min_speedup=0, programs=False), (x,))
    save(swapped, tmp_path / "model.safetensors")
    wanted = swapped(x)
    loaded = load(tmp_path / "model.safetensors", device="cuda")
    y = loaded(x.cuda()).cpu()
    # only the activation between the layers is rounded alike; the sums are the same integers
    assert torch.allclose(y, wanted, atol=1e-5)
    assert torch.equal(swapped.cuda()(x.cuda()).cpu(), y)
    assert torch.equal(swapped.cpu()(x), wanted)


def test_constants_move_with_the_layer():
    layer = SparseConv2d.from_dense(
        nn.Conv2d(64, 64, 3), dtype=torch.int8, block=(32, 32), x_range=(-4.0, 4.0)
    )
    x = torch.randn(1, 64, 8, 8)
    wanted = ops.block_conv2d(
        x, layer.packed, kernel_size=(3, 3), x_scale=layer.x_scale, x_zero=layer.x_zero, backend="reference"
    )
    layer.cuda()
    assert all(tensor.is_cuda for tensor in layer.packed.tensors()) and len(layer.packed.tensors()) == 9
    assert torch.equal(layer(x.cuda()).cpu(), wanted)
