"""Sparse layers against the dense layers they replace, on the reference backend: which numbers reach the ops.

The kernels themselves are compared with the reference in the tests of each op.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsegan.formats import pack, unpack
from sparsegan.layers import (
    SPARSE_TYPES,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseLinear,
    unsupported_reason,
)
from sparsegan.ops import BackendError
from sparsegan.patterns import from_weight_view, weight_view


def prune_blocks(layer, keep, seed, bo=4, bk=4):
    """Zero random blocks of a layer's weight in place."""
    view = weight_view(layer).detach()
    o, t, c = view.shape
    kept = torch.rand(-(-o // bo), t, -(-c // bk), generator=torch.Generator().manual_seed(seed)) < keep
    mask = kept.repeat_interleave(bo, 0)[:o].repeat_interleave(bk, 2)[:, :, :c]
    layer.weight.data = from_weight_view(layer, view * mask)
    return layer


def integers(shape, low, high, seed):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def conv(transposed, channels, outputs, groups, kernel, stride, padding, dilation, output_padding=0):
    if transposed:
        extra = min(output_padding, max(stride, dilation) - 1)
        return nn.ConvTranspose2d(
            channels * groups, outputs * groups, kernel, stride, padding, extra, groups, True, dilation
        )
    return nn.Conv2d(channels * groups, outputs * groups, kernel, stride, padding, dilation, groups)


conv_settings = {
    "transposed": st.booleans(),
    "channels": st.integers(1, 6),
    "outputs": st.integers(1, 9),
    "groups": st.integers(1, 3),
    "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "stride": st.integers(1, 3),
    "padding": st.integers(0, 2),
    "dilation": st.integers(1, 2),
    "output_padding": st.integers(0, 1),
}


@torch.no_grad()
@settings(deadline=None, max_examples=40)
@given(**conv_settings, size=st.integers(7, 9), keep=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 5))
def test_convolutions_equal_the_dense_layer(size, keep, seed, **shape):
    layer = conv(**shape)
    layer.weight.data = integers(layer.weight.shape, -8, 9, seed)
    layer.bias.data = integers(layer.bias.shape, -8, 9, seed)
    prune_blocks(layer, keep, seed)
    x = integers((2, layer.in_channels, size, size + 1), -8, 9, seed + 1)
    sparse = SPARSE_TYPES[type(layer)].from_dense(layer, backend="reference")
    # Whole numbers: every order of summation is exact, so this is equality.
    assert torch.equal(sparse(x), layer(x))


@torch.no_grad()
@settings(deadline=None, max_examples=25)
@given(
    **conv_settings,
    low=st.sampled_from([-100, -3, 0]),
    step=st.sampled_from([0.25, 1.0, 4.0]),
    seed=st.integers(0, 5),
)
def test_int8_convolutions_equal_the_dense_layer_on_the_quantised_grid(low, step, seed, **shape):
    layer = conv(**shape)
    # Whole weights with a largest one of 127 are their own quantisation, and so are whole steps as inputs.
    view = integers(weight_view(layer).shape, -127, 128, seed)
    view[:, 0, 0] = 127
    layer.weight.data = from_weight_view(layer, view)
    layer.bias.data.zero_()
    x = integers((2, layer.in_channels, 8, 7), low, low + 256, seed + 1) * step
    sparse = SPARSE_TYPES[type(layer)].from_dense(
        layer, dtype=torch.int8, x_range=(low * step, (low + 255) * step), backend="reference"
    )
    assert (sparse.x_scale, sparse.x_zero) == (step, -low)
    assert torch.equal(sparse(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_linear_takes_any_leading_shape(shape):
    layer = nn.Linear(5, 7)
    layer.weight.data, layer.bias.data = integers((7, 5), -8, 9, 0), integers((7,), -8, 9, 1)
    x = integers(shape, -8, 9, 2)
    assert torch.equal(SparseLinear.from_dense(layer, backend="reference")(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding="same", dilation=2),
        nn.Conv2d(3, 5, (3, 2), padding="valid", bias=False),
        nn.Conv2d(3, 5, 1),
        nn.ConvTranspose2d(3, 5, 4, 1),
        nn.ConvTranspose2d(3, 5, 1, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (3, 6, 5), (1, 3, 2, 2), (0, 3, 6, 5)])
def test_paddings_and_batches(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if isinstance(layer, nn.Conv2d) and shape[-1] < layer.kernel_size[0] and layer.padding == "valid":
        pytest.skip("torch refuses too")
    sparse = SPARSE_TYPES[type(layer)].from_dense(layer, backend="reference")
    torch.testing.assert_close(sparse(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 1)])
def test_one_pixel(shape):
    layer = nn.ConvTranspose2d(3, 5, 4, 1, 0)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SparseConvTranspose2d.from_dense(layer, backend="reference")(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "activation, module",
    [
        ("relu", nn.ReLU()),
        ("leaky_relu", nn.LeakyReLU(0.3)),
        ("tanh", nn.Tanh()),
        ("sigmoid", nn.Sigmoid()),
    ],
)
def test_activations(activation, module):
    layer = nn.Linear(6, 8)
    sparse = SparseLinear.from_dense(layer, activation=activation, slope=0.3, backend="reference")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sparse(x), module(layer(x)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_an_all_zero_layer_is_its_bias(dtype):
    layer = nn.Conv2d(4, 3, 3)
    layer.weight.data.zero_()
    sparse = SparseConv2d.from_dense(layer, dtype=dtype, x_range=(-1.0, 1.0), backend="reference")
    assert sparse.density == 0 and sparse.packed.values.shape[0] == 0
    y = sparse(torch.ones(1, 4, 5, 5))
    assert torch.equal(y, layer.bias[None, :, None, None].expand(1, 3, 3, 3))


def test_repr_shows_pattern_density_and_dtype():
    layer = prune_blocks(nn.Conv2d(64, 64, 3, groups=2), 0.25, seed=0)
    sparse = SparseConv2d.from_dense(layer, dtype=torch.int8, x_range=(0.0, 1.0), activation="relu")
    assert sparse.density == pytest.approx(0.25, abs=0.03)
    for part in ("groups=2", "pattern=4x4", f"density={sparse.density:.2f}", "dtype=int8", "activation=relu"):
        assert part in repr(sparse)
    assert "pattern=dense, density=1.00, dtype=float32" in repr(SparseLinear.from_dense(nn.Linear(8, 8)))


def test_buffers_copies_and_state_dict():
    layer = prune_blocks(nn.Linear(16, 16), 0.5, seed=1)
    sparse = SparseLinear.from_dense(layer, backend="reference")
    assert list(sparse.parameters()) == [] and len(sparse.state_dict()) == 7
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        other.load_state_dict(sparse.state_dict())
        assert torch.equal(other(x), sparse(x))
    # A cast of the whole model leaves the number format alone.
    assert torch.equal(sparse.half().double()(x), SparseLinear.from_dense(layer, backend="reference")(x))


def test_the_weight_is_shared_with_the_buffers():
    sparse = SparseLinear.from_dense(nn.Linear(4, 4))
    assert sparse.packed.values is sparse.values
    assert unpack(sparse.packed).shape == (4, 1, 4)


def test_compiles_without_a_graph_break():
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    first = SparseConv2d.from_dense(nn.Conv2d(8, 8, 3))
    second = SparseConvTranspose2d.from_dense(nn.ConvTranspose2d(8, 4, 3))
    with torch.no_grad():
        for model in (first, nn.Sequential(first, second)):
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert torch.equal(compiled(x), model(x))


def test_training_through_a_sparse_layer_is_refused():
    sparse = SparseLinear.from_dense(nn.Linear(4, 4), backend="reference")
    x = torch.ones(1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"for inference.*torch\.no_grad"):
        sparse(x)
    with torch.no_grad():
        sparse(x)
    assert not sparse(x.detach()).requires_grad


def test_a_named_backend_never_falls_back():
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        SparseLinear.from_dense(nn.Linear(4, 4), backend="cuda")(torch.ones(1, 4))


def test_inputs_of_the_wrong_kind():
    sparse = SparseConv2d.from_dense(nn.Conv2d(4, 4, 3), backend="reference")
    with pytest.raises(TypeError, match="float16"):
        sparse(torch.ones(1, 4, 5, 5).half())
    with pytest.raises(ValueError, match="channels"):
        sparse(torch.ones(1, 5, 5, 5))
    with pytest.raises(ValueError, match="shape"):
        sparse(torch.ones(5, 5))
    with pytest.raises(ValueError, match="too small"):
        sparse(torch.ones(1, 4, 1, 1))


def with_weight(layer, value):
    layer.weight.data.view(-1)[0] = value
    return layer


def with_bias(layer, value):
    layer.bias.data[0] = value
    return layer


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
        (nn.Conv2d(3, 3, 2, padding="same"), "padding 'same' pads one side more"),
        (nn.Linear(3, 3).half(), r"torch\.float16"),
        (nn.Linear(3, 3).double(), r"torch\.float64"),
        (nn.Linear(3, 3, device="meta"), "meta"),
        (with_weight(nn.Linear(3, 3), float("nan")), "NaN or infinite"),
        (with_weight(nn.Conv2d(3, 3, 1), float("inf")), "NaN or infinite"),
        (with_bias(nn.Linear(3, 3), float("nan")), "bias holds NaN"),
    ],
    ids=str,
)
def test_layers_without_a_sparse_counterpart(layer, reason):
    with pytest.raises(ValueError, match=reason):
        SPARSE_TYPES[type(layer)].from_dense(layer)


def test_other_types_are_refused():
    assert "Conv1d is not" in (unsupported_reason(nn.Conv1d(3, 3, 3)) or "")
    assert unsupported_reason(nn.Linear(3, 3)) is None
    with pytest.raises(TypeError, match="SparseLinear replaces Linear, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="needs x_range"):
        SparseLinear.from_dense(nn.Linear(3, 3), dtype=torch.int8)
    with pytest.raises(ValueError, match="dtype must be one of"):
        SparseLinear.from_dense(nn.Linear(3, 3), dtype=torch.float64)


GEOMETRY = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"kernel_size": (2, 3)}, "9 taps"),
        ({"stride": (0, 1)}, "stride must be two whole numbers in 1.."),
        ({"padding": (-1, 0)}, "padding must be two whole numbers in 0.."),
        ({"dilation": (2**40, 1)}, "dilation must be"),
        ({"stride": (1.0, 1)}, "stride must be"),
        ({"output_padding": (0, 0)}, "SparseConv2d takes kernel_size"),
        ({"x_scale": 0.0}, "x_scale"),
        ({"x_scale": float("nan")}, "x_scale"),
        ({"x_scale": 1e-40}, "x_scale"),
        ({"x_zero": 256}, "x_zero"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"slope": float("inf")}, "slope"),
        ({"groups": 3}, "groups must divide"),
    ],
)
def test_settings_are_checked(change, match):
    with pytest.raises(ValueError, match=match):
        SparseConv2d(pack(torch.ones(4, 9, 4)), **{**GEOMETRY, **change})


def test_output_padding_is_checked():
    with pytest.raises(ValueError, match="output_padding must be smaller"):
        SparseConvTranspose2d(pack(torch.ones(4, 9, 4)), **GEOMETRY, output_padding=(1, 0))
