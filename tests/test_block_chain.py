"""block_chain gives, bit for bit, what its layers give one after another, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, RUNNERS, blocked_view, inputs, packed_weight, running_on

from sparsegan import ops
from sparsegan.ops import ChainLayer


def layer(kind, c, o, dtype, seed, density=0.5, pruned_channels=False, **settings):
    window = {
        k: settings[k]
        for k in ("kernel_size", "stride", "padding", "output_padding", "dilation")
        if k in settings
    }
    full = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | window
    kh, kw = full["kernel_size"]
    view = blocked_view(o, kh * kw, c, density, seed, True)
    if pruned_channels:
        view[torch.arange(o) % 3 != 0] = 0
    scale = torch.full((o,), 0.125) if dtype == torch.int8 else None
    bias = inputs((o,), seed, True)
    return ChainLayer(kind, packed_weight(kind, view, full, dtype, scale=scale, bias=bias), **settings)


def one_by_one(x, layers, backend):
    for la in layers:
        window = {
            "kernel_size": la.kernel_size,
            "stride": la.stride,
            "padding": la.padding,
            "dilation": la.dilation,
        }
        last = {"x_scale": la.x_scale, "x_zero": la.x_zero, "activation": la.activation, "slope": la.slope}
        if la.kind == "linear":
            x = ops.block_linear(x, la.packed, **last, backend=backend)
        elif la.kind == "conv2d":
            x = ops.block_conv2d(x, la.packed, **window, **last, backend=backend)
        else:
            window["output_padding"] = la.output_padding
            x = ops.block_conv_transpose2d(x, la.packed, **window, **last, backend=backend)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 20, 1, 1), (3, 20, 1, 1), (2, 20, 5, 5)])
def test_generator(backend, dtype, size, uninitialised_is_nan):
    up = {"kernel_size": (4, 4), "stride": (2, 2), "padding": (1, 1)}
    layers = [
        layer(
            "conv_transpose2d",
            20,
            24,
            dtype,
            0,
            kernel_size=(4, 4),
            x_zero=4 * (dtype == torch.int8),
            activation="relu",
        ),
        layer("conv_transpose2d", 24, 18, dtype, 1, **up, x_scale=0.5, activation="leaky_relu", slope=0.25),
        layer(
            "conv2d",
            18,
            9,
            dtype,
            2,
            kernel_size=(3, 3),
            padding=(1, 1),
            x_scale=0.5,
            x_zero=30 * (dtype == torch.int8),
        ),
        layer("conv_transpose2d", 9, 3, dtype, 3, **up, x_scale=2.0, activation="none"),
    ]
    x = inputs(size, 0, True)
    y = ops.block_chain(x, layers, backend=backend)
    assert torch.equal(y, one_by_one(x, layers, "reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_convolutions_and_moved_channels(backend, dtype, uninitialised_is_nan):
    down = {"kernel_size": (4, 4), "stride": (2, 2), "padding": (1, 1)}
    layers = [
        layer("conv2d", 3, 22, dtype, 0, **down, pruned_channels=True, activation="relu"),
        layer("conv2d", 22, 31, dtype, 1, **down, pruned_channels=True, activation="relu"),
        layer(
            "conv2d",
            31,
            17,
            dtype,
            2,
            kernel_size=(3, 3),
            stride=(3, 1),
            pruned_channels=True,
            activation="relu",
        ),
        layer("conv_transpose2d", 17, 5, dtype, 3, kernel_size=(3, 3), stride=(1, 5), activation="none"),
    ]
    x = inputs((2, 3, 21, 38), 0, True)
    assert torch.equal(ops.block_chain(x, layers, backend=backend), one_by_one(x, layers, "reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layers(backend, dtype):
    layers = [
        layer("linear", 30, 50, dtype, 0, activation="relu", x_zero=3 * (dtype == torch.int8)),
        layer("linear", 50, 21, dtype, 1, pruned_channels=True, activation="leaky_relu", slope=0.5),
        layer("linear", 21, 7, dtype, 2, x_zero=100 * (dtype == torch.int8)),
    ]
    x = inputs((2, 9, 30), 0, True)
    assert torch.equal(ops.block_chain(x, layers, backend=backend), one_by_one(x, layers, "reference"))


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["conv2d", "conv_transpose2d"]), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(1, 20)),
    seed=st.integers(0, 999),
    runner=RUNNERS,
)
def test_random_chains(kinds, size, seed, runner):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=g))

    for dtype in DTYPES:
        channels, layers = size[1], []
        for i, kind in enumerate(kinds):
            o, kernel = draw(1, 20), (draw(1, 4), draw(1, 4))
            stride, padding = (draw(1, 3), draw(1, 3)), (draw(0, 1), draw(0, 1))
            if kind == "conv2d":
                padding = (2, 2)
            zero, activation = draw(0, 255) * (dtype == torch.int8), ops.ACTIVATIONS[draw(0, 2)]
            layers.append(
                layer(
                    kind, channels, o, dtype, seed + i, kernel_size=kernel, stride=stride, padding=padding, x_zero=zero,
                    x_scale=0.5, activation=activation, slope=0.5, pruned_channels=draw(0, 3) == 0,
                )
            )  # fmt: skip
            channels = o
        x = inputs(size, seed, True)
        try:
            wanted = one_by_one(x, layers, "reference")
        except ValueError:
            with pytest.raises((ValueError, RuntimeError)):
                ops.block_chain(x, layers)
            continue
        with running_on(runner) as backend:
            assert torch.equal(ops.block_chain(x, layers, backend=backend), wanted)


def test_chains_that_do_not_fit_are_refused(backend):
    conv = layer("conv2d", 4, 8, torch.float32, 0)
    with pytest.raises(ValueError, match="gives 8 channels, the next takes 4"):
        ops.block_chain(torch.zeros(1, 4, 3, 3), [conv, conv], backend=backend)
    with pytest.raises(ValueError, match="cannot stand in one chain"):
        ops.block_chain(
            torch.zeros(1, 4, 3, 3), [conv, layer("linear", 8, 8, torch.float32, 0)], backend=backend
        )
    with pytest.raises(ValueError, match="no layers"):
        ops.block_chain(torch.zeros(1, 4, 3, 3), [], backend=backend)


def test_mixed_formats(backend):
    layers = [
        layer("conv2d", 4, 9, torch.int8, 0, kernel_size=(3, 3), padding=(1, 1), activation="relu"),
        layer("conv2d", 9, 9, torch.float32, 1, kernel_size=(3, 3), padding=(1, 1), activation="relu"),
        layer("conv2d", 9, 4, torch.bfloat16, 2, kernel_size=(3, 3), padding=(1, 1)),
        layer("conv2d", 4, 6, torch.int8, 3, kernel_size=(1, 1), x_scale=4.0, x_zero=9),
    ]
    x = inputs((2, 4, 7, 18), 0, True)
    assert torch.equal(ops.block_chain(x, layers, backend=backend), one_by_one(x, layers, "reference"))
