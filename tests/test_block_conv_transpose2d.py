"""block_conv_transpose2d on every backend: integer-exact for every geometry, within rounding, clear about wrong input."""

import pytest
import torch
from hypothesis import assume, given, settings
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
    packed_weight,
    rounding_bound,
    run,
    running_on,
)

from sparsegan import ops

KIND = "conv_transpose2d"


def window(kernel, stride=(1, 1), padding=(0, 0), output_padding=(0, 0), dilation=(1, 1)):
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "output_padding": output_padding,
        "dilation": dilation,
    }


# name: (N, C, H, W), O, geometry
SHAPES = {
    "DCGAN latent": ((3, 100, 1, 1), 64, window((4, 4))),
    "DCGAN 4x4": ((2, 64, 4, 4), 32, window((4, 4), (2, 2), (1, 1))),
    "DCGAN 16x16": ((1, 16, 16, 16), 8, window((4, 4), (2, 2), (1, 1))),
    "DCGAN image": ((2, 16, 32, 32), 3, window((4, 4), (2, 2), (1, 1))),
    "stride 1": ((2, 8, 7, 9), 12, window((3, 3), (1, 1), (1, 1))),
    "5x5 stride 2, odd size": ((1, 8, 7, 7), 8, window((5, 5), (2, 2), (2, 2), (1, 1))),
    "stride 3 and 2": ((1, 8, 6, 20), 8, window((3, 5), (3, 2), (0, 1), (2, 0))),
    "stride 4": ((1, 8, 5, 17), 8, window((6, 6), (4, 4), (1, 1))),
    "stride beyond interleaving": ((2, 8, 5, 18), 8, window((3, 7), (1, 6), (0, 1))),
    "stride beyond the kernel": ((1, 4, 5, 6), 8, window((2, 2), (3, 3))),
    "dilation": ((1, 8, 9, 20), 8, window((3, 3), (2, 2), (2, 2), (1, 1), (2, 3))),
    "padding beyond the kernel": ((1, 8, 9, 12), 8, window((2, 2), (2, 2), (3, 3))),
    "1x1 image, stride 2": ((4, 12, 1, 1), 8, window((3, 3), (2, 2), (0, 0), (1, 1))),
    "one row": ((2, 8, 1, 20), 8, window((4, 4), (2, 2), (1, 1))),
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
        y = run(KIND, x, packed, backend, **geometry, x_zero=zero, activation="relu")
        wanted = dense_op(KIND, x.double(), view, geometry) + bias[:, None, None]
        assert torch.equal(y.double(), torch.relu(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_rounding(backend, dtype):
    geometry = window((4, 4), (2, 2), (1, 1))
    view, x = blocked_view(16, 16, 48, 0.3, 1, False), inputs((2, 48, 16, 16), 1, False)
    packed = packed_weight(KIND, view, geometry, dtype, blocks(backend, dtype)[-1])
    y = run(KIND, x, packed, backend, **geometry)
    view, x = view.to(dtype).float(), x.to(dtype).float()
    exact = dense_op(KIND, x.double(), view, geometry)
    assert ((y - exact).abs() <= rounding_bound(KIND, x, view, geometry, exact)).all()


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(backend, groups):
    geometry = window((4, 4), (2, 2), (1, 1))
    view, x = blocked_view(24, 16, 12 // groups, 0.7, 3, True), inputs((2, 12, 8, 8), 3, True)
    block = blocks(backend, torch.int8)[-1]
    packed = packed_weight(KIND, view, geometry, torch.int8, block, groups=groups)
    y = run(KIND, x, packed, backend, **geometry, x_zero=5)
    assert torch.equal(y.double(), dense_op(KIND, x.double(), view, geometry, groups))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 12), st.integers(1, 36)),
    o=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    nth_block=st.sampled_from([0, 1]),
    zero=st.sampled_from([0, 5, 128, 250]),
    seed=st.integers(0, 99),
    runner=RUNNERS,
)
def test_any_geometry(size, o, kernel, stride, padding, extra, dilation, nth_block, zero, seed, runner):
    output_padding = tuple(min(e, max(s, d) - 1) for e, s, d in zip(extra, stride, dilation, strict=True))
    geometry = window(kernel, stride, padding, output_padding, dilation)
    axes = zip(size[2:], kernel, stride, padding, output_padding, dilation, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 >= 1 for n, k, s, p, e, d in axes))
    view, x = blocked_view(o, kernel[0] * kernel[1], size[1], 0.5, seed, True), inputs(size, seed, True)
    q = (x.double() + zero).clamp(0, 255) - zero
    with running_on(runner) as backend:
        for dtype in (torch.int8, a_float(backend)):
            packed = packed_weight(KIND, view, geometry, dtype, blocks(backend, dtype)[nth_block])
            x_zero = zero if dtype == torch.int8 else 0
            if backend in CUDA and stride[0] * stride[1] > 16:
                with pytest.raises(RuntimeError, match="more than 16 phases"):
                    run(KIND, x, packed, backend, **geometry, x_zero=x_zero)
                continue
            y = run(KIND, x, packed, backend, **geometry, x_zero=x_zero)
            wanted = dense_op(KIND, q if dtype == torch.int8 else x.double(), view, geometry)
            assert torch.equal(y.double(), wanted)


def test_threads_agree_bit_for_bit():
    geometry = window((4, 4), (2, 2), (1, 1))
    view, x = blocked_view(64, 16, 64, 0.5, 0, False), inputs((2, 64, 16, 16), 0, False)
    packed = packed_weight(KIND, view, geometry, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.block_conv_transpose2d(x, packed, **geometry, activation="tanh"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_strides_and_empty_batch(backend):
    geometry = window((4, 4), (2, 2), (1, 1))
    view, x = blocked_view(8, 16, 12, 0.5, 0, True), inputs((2, 12, 5, 17), 0, True)
    packed = packed_weight(KIND, view, geometry, torch.int8, blocks(backend, torch.int8)[0])
    last = x.contiguous(memory_format=torch.channels_last)
    y = run(KIND, last, packed, backend, **geometry, x_zero=9)
    assert torch.equal(y.double(), dense_op(KIND, x.double(), view, geometry))
    assert run(KIND, x[:0], packed, backend, **geometry).shape == (0, 8, 10, 34)


def test_wrong_input_is_named(backend):
    dtype = a_float(backend)
    packed = packed_weight(KIND, torch.ones(6, 9, 5), window((3, 3)), dtype, blocks(backend, dtype)[0])
    with pytest.raises(ValueError, match=r"7 channels .*takes 5"):
        run(KIND, torch.zeros(1, 7, 8, 8), packed, backend, kernel_size=(3, 3))
    with pytest.raises(ValueError, match="no output pixel"):
        run(KIND, torch.zeros(1, 5, 1, 1), packed, backend, kernel_size=(3, 3), padding=(2, 2))
    with pytest.raises(TypeError, match="int64"):
        run(KIND, torch.zeros(1, 5, 8, 8).long(), packed, backend, kernel_size=(3, 3))
