"""block_conv2d on every backend: integer-exact for every geometry, within rounding, and clear about wrong input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    CUDA,
    DTYPES,
    RUNNERS,
    a_float,
    blocked_view,
    blocks,
    dense_op,
    inputs,
    number_formats,
    packed_weight,
    placed,
    rounding_bound,
    run,
    running_on,
)

from sparsegan import ops

KIND = "conv2d"
# name: (N, C, H, W), O, geometry
SHAPES = {
    "3x3": ((2, 16, 16, 20), 24, {"kernel_size": (3, 3), "padding": (1, 1)}),
    "wide rows": ((1, 8, 5, 70), 8, {"kernel_size": (3, 3), "padding": (1, 1)}),
    "1x1": ((3, 20, 9, 9), 12, {"kernel_size": (1, 1)}),
    "stride 2": ((2, 12, 17, 19), 16, {"kernel_size": (4, 4), "stride": (2, 2), "padding": (1, 1)}),
    "stride 3 and 1": ((1, 4, 20, 20), 8, {"kernel_size": (3, 5), "stride": (3, 1), "padding": (0, 2)}),
    "stride beyond the kernel": ((1, 4, 20, 21), 8, {"kernel_size": (2, 2), "stride": (5, 6)}),
    "dilation": ((1, 8, 14, 15), 8, {"kernel_size": (3, 3), "padding": (2, 3), "dilation": (2, 3)}),
    "stride and dilation": (
        (2, 8, 15, 16),
        8,
        {"kernel_size": (3, 3), "stride": (2, 3), "padding": (1, 2), "dilation": (3, 2)},
    ),
    "to an image": ((2, 64, 33, 16), 3, {"kernel_size": (7, 7), "padding": (3, 3)}),
    "from an image": ((2, 3, 16, 16), 64, {"kernel_size": (3, 3), "padding": (1, 1)}),
    "1x1 image": ((5, 16, 1, 1), 16, {"kernel_size": (3, 3), "padding": (1, 1)}),
    "1x1 image, wide padding": (
        (2, 8, 1, 1),
        8,
        {"kernel_size": (3, 3), "stride": (2, 1), "padding": (3, 2)},
    ),
    "1x1 image, no tap in reach": (
        (2, 8, 1, 1),
        8,
        {"kernel_size": (2, 2), "stride": (1, 1), "padding": (2, 2), "dilation": (3, 3)},
    ),
    "one column": ((2, 8, 9, 1), 8, {"kernel_size": (3, 1), "padding": (1, 0)}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_on_integers(backend, shape, dtype, uninitialised_is_nan):
    size, o, geometry = SHAPES[shape]
    kh, kw = geometry["kernel_size"]
    view, x, bias = (
        blocked_view(o, kh * kw, size[1], 0.4, 0, True),
        inputs(size, 0, True),
        inputs((o,), 7, True),
    )
    for block in blocks(backend, dtype):
        packed = packed_weight(KIND, view, geometry, dtype, block, bias=bias)
        zero = 77 if dtype == torch.int8 else 0
        y = run(KIND, x, packed, backend, **geometry, x_zero=zero, activation="leaky_relu", slope=0.5)
        wanted = dense_op(KIND, x.double(), view, geometry) + bias[:, None, None]
        assert torch.equal(y.double(), torch.where(wanted > 0, wanted, wanted / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_rounding(backend, dtype):
    geometry = {"kernel_size": (3, 3), "padding": (1, 1)}
    view, x = blocked_view(32, 9, 48, 0.3, 1, False), inputs((2, 48, 16, 16), 1, False)
    packed = packed_weight(KIND, view, geometry, dtype, blocks(backend, dtype)[-1])
    y = run(KIND, x, packed, backend, **geometry)
    view, x = view.to(dtype).float(), x.to(dtype).float()
    exact = dense_op(KIND, x.double(), view, geometry)
    assert ((y - exact).abs() <= rounding_bound(KIND, x, view, geometry, exact)).all()


@pytest.mark.parametrize("groups", [2, 3, 12])
def test_groups(backend, groups):
    geometry = {"kernel_size": (3, 3), "padding": (1, 1)}
    view, x = blocked_view(24, 9, 12 // groups, 0.7, 3, True), inputs((2, 12, 8, 8), 3, True)
    block = blocks(backend, torch.int8)[-1]
    packed = packed_weight(KIND, view, geometry, torch.int8, block, groups=groups)
    y = run(KIND, x, packed, backend, **geometry, x_zero=5)
    assert torch.equal(y.double(), dense_op(KIND, x.double(), view, geometry, groups))


def test_whole_channels_pruned(backend, uninitialised_is_nan):
    geometry = {"kernel_size": (3, 3), "padding": (1, 1)}
    view, x = blocked_view(30, 9, 16, 1.0, 4, True), inputs((1, 16, 12, 12), 4, True)
    view[torch.arange(30) % 4 != 0] = 0
    bias = inputs((30,), 5, True)
    block = blocks(backend, torch.int8)[0]
    packed = packed_weight(KIND, view, geometry, torch.int8, block, bias=bias)
    assert packed.values.shape[0] <= 9 * 8 * 4 / min(block[0], 8)  # 8 live channels, in one row if they fit
    y = run(KIND, x, packed, backend, **geometry, x_zero=5)
    assert torch.equal(y.double(), dense_op(KIND, x.double(), view, geometry) + bias[:, None, None])


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(backend, density, uninitialised_is_nan):
    geometry = {"kernel_size": (3, 3), "padding": (1, 1)}
    view, x = blocked_view(12, 9, 8, density, 0, True), inputs((2, 8, 6, 6), 0, True)
    for dtype in number_formats(backend):
        packed = packed_weight(
            KIND, view, geometry, dtype, blocks(backend, dtype)[-1], bias=torch.arange(12.0)
        )
        y = run(KIND, x, packed, backend, **geometry, x_zero=5 * (dtype == torch.int8))
        assert torch.equal(
            y.double(), dense_op(KIND, x.double(), view, geometry) + torch.arange(12.0)[:, None, None]
        )


def strided(x, how):
    return {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": lambda: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2],
        "expanded": lambda: x[:1].expand(x.shape),
        "cropped": lambda: torch.nn.functional.pad(x, (2, 3, 1, 4))[:, :, 1:-4, 2:-3],
        "flipped batch": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
    }[how]()


@pytest.mark.parametrize(
    "how", ["channels_last", "transposed", "every second", "expanded", "cropped", "flipped batch"]
)
def test_any_strides(backend, how):
    geometry = {"kernel_size": (3, 3), "padding": (1, 1)}
    view = blocked_view(16, 9, 10, 0.5, 2, True)
    x = strided(placed(inputs((3, 10, 7, 21), 2, True).clamp(-5, 4), backend), how)
    layout = torch.channels_last if backend in CUDA else torch.contiguous_format
    for dtype in number_formats(backend):
        packed = packed_weight(KIND, view, geometry, dtype, blocks(backend, dtype)[0])
        y = run(KIND, x, packed, backend, **geometry, x_zero=5 * (dtype == torch.int8))
        assert y.is_contiguous(memory_format=layout)
        assert torch.equal(y.double(), dense_op(KIND, x.cpu().double(), view, geometry))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 40)),
    o=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    nth_block=st.sampled_from([0, 1]),
    zero=st.sampled_from([0, 5, 128, 250]),
    seed=st.integers(0, 99),
    runner=RUNNERS,
)
def test_any_geometry(size, o, kernel, stride, padding, dilation, nth_block, zero, seed, runner):
    geometry = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    view, x = blocked_view(o, kernel[0] * kernel[1], size[1], 0.5, seed, True), inputs(size, seed, True)
    with running_on(runner) as backend:
        for dtype in (torch.int8, a_float(backend)):
            packed = packed_weight(KIND, view, geometry, dtype, blocks(backend, dtype)[nth_block])
            x_zero = zero if dtype == torch.int8 else 0
            if any(
                s + 2 * p < d * (k - 1) + 1
                for s, k, p, d in zip(size[2:], kernel, padding, dilation, strict=True)
            ):
                with pytest.raises(ValueError, match="too small"):
                    run(KIND, x, packed, backend, **geometry, x_zero=x_zero)
                continue
            q = quantised(x, zero) if dtype == torch.int8 else x.double()
            y = run(KIND, x, packed, backend, **geometry, x_zero=x_zero)
            assert torch.equal(y.double(), dense_op(KIND, q, view, geometry))


def quantised(x, zero):
    return (x.double() + zero).clamp(0, 255) - zero


def test_stale_memory_does_not_leak(backend):
    """Buffers are kept between calls: what an earlier call left there must not reach a later output."""
    geometry = {"kernel_size": (3, 3), "padding": (1, 1)}
    view = blocked_view(9, 9, 9, 0.5, 0, True)
    for dtype in number_formats(backend):
        packed = packed_weight(KIND, view, geometry, dtype, blocks(backend, dtype)[0])
        run(KIND, torch.full((2, 9, 30, 40), float("nan")), packed, backend, **geometry)
        x = inputs((1, 9, 5, 6), 0, True)
        y = run(KIND, x, packed, backend, **geometry)
        assert torch.equal(
            y.double(), dense_op(KIND, quantised(x, 0) if dtype == torch.int8 else x.double(), view, geometry)
        )


def test_threads_agree_bit_for_bit():
    geometry = {"kernel_size": (3, 3), "padding": (1, 1)}
    view, x = blocked_view(64, 9, 64, 0.5, 0, False), inputs((2, 64, 33, 33), 0, False)
    packed = packed_weight(KIND, view, geometry, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.block_conv2d(x, packed, **geometry, activation="tanh"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_empty_batch(backend):
    dtype = a_float(backend)
    packed = packed_weight(
        KIND, torch.ones(6, 9, 5), {"kernel_size": (3, 3)}, dtype, blocks(backend, dtype)[0]
    )
    y = run(KIND, torch.zeros(0, 5, 8, 8), packed, backend, kernel_size=(3, 3))
    assert y.shape == (0, 6, 6, 6)


def test_wrong_input_is_named(backend):
    dtype = a_float(backend)
    packed = packed_weight(
        KIND, torch.ones(6, 9, 5), {"kernel_size": (3, 3)}, dtype, blocks(backend, dtype)[0]
    )
    with pytest.raises(ValueError, match=r"7 channels .*takes 5"):
        run(KIND, torch.zeros(1, 7, 8, 8), packed, backend, kernel_size=(3, 3))
    with pytest.raises(ValueError, match=r"\(5, 8, 8\), wanted \[N, C, H, W\]"):
        run(KIND, torch.zeros(5, 8, 8), packed, backend, kernel_size=(3, 3))
    with pytest.raises(ValueError, match="too small for a 3x3 kernel"):
        run(KIND, torch.zeros(1, 5, 2, 8), packed, backend, kernel_size=(3, 3))
    with pytest.raises(TypeError, match="float64"):
        run(KIND, torch.zeros(1, 5, 8, 8).double(), packed, backend, kernel_size=(3, 3))
    if backend not in CUDA:
        with pytest.raises(TypeError, match="float16"):
            run(KIND, torch.zeros(1, 5, 8, 8).half(), packed, backend, kernel_size=(3, 3))
