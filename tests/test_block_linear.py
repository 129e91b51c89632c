"""block_linear on every backend: integer-exact, within rounding, and clear about wrong input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    DTYPES,
    RUNNERS,
    a_float,
    activate,
    blocked_view,
    blocks,
    inputs,
    number_formats,
    packed_weight,
    placed,
    quantized,
    rounding_bound,
    run,
    running_on,
)

from sparsegan import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nth_block", [0, 1, 2])
def test_exact_on_integers(backend, dtype, nth_block, uninitialised_is_nan):
    if nth_block >= len(blocks(backend, dtype)):
        pytest.skip("the backend has no more blocks")
    block = blocks(backend, dtype)[nth_block]
    for m, c, o, seed in [(1, 100, 512, 0), (5, 3, 7, 1), (16, 64, 64, 2), (33, 17, 100, 3)]:
        view, x = blocked_view(o, 1, c, 0.4, seed, True), inputs((m, c), seed, True)
        bias = inputs((o,), seed + 7, True)
        packed = packed_weight("linear", view, {}, dtype, block, bias=bias)
        y = run("linear", x, packed, backend, activation="relu", x_zero=9 * (dtype == torch.int8))
        wanted = torch.relu(x.double() @ view[:, 0].double().T + bias)
        assert torch.equal(y.double(), wanted)


def test_quantises_its_input(backend):
    view, x = blocked_view(24, 1, 40, 0.5, 0, True), torch.randn(9, 40) * 30
    x[0, 0], x[1, 1], x[2, 2] = float("inf"), -float("inf"), 1e30
    block = blocks(backend, torch.int8)[-1]
    packed = packed_weight("linear", view, {}, torch.int8, block, scale=torch.full((24,), 0.25))
    y = run("linear", x, packed, backend, x_scale=0.25, x_zero=100)
    wanted = (quantized(x, 0.25, 100) @ view[:, 0].double().T).float() * 0.25
    assert torch.equal(y, wanted)


def test_nan_input_gives_the_lowest_int8_step(backend):
    packed = packed_weight("linear", torch.ones(4, 1, 4), {}, torch.int8, blocks(backend, torch.int8)[-1])
    y = run("linear", torch.full((1, 4), float("nan")), packed, backend, x_zero=3)
    assert torch.equal(y, torch.full((1, 4), -12.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_rounding(backend, dtype):
    view, x = blocked_view(96, 1, 300, 0.3, 5, False), inputs((20, 300), 5, False)
    packed = packed_weight("linear", view, {}, dtype, blocks(backend, dtype)[-1])
    y = run("linear", x, packed, backend)
    view, x = view.to(dtype).float(), x.to(dtype).float()
    exact = x.double() @ view[:, 0].double().T
    assert ((y - exact).abs() <= rounding_bound("linear", x, view, {}, exact)).all()


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations(backend, activation):
    x = torch.cat(
        [
            torch.linspace(-20, 20, 4001),
            torch.linspace(-1e-3, 1e-3, 101),
            torch.tensor([100.0, -100, 1e38, -1e38]),
        ]
    )
    if torch.float32 in number_formats(backend):
        packed = packed_weight("linear", torch.ones(1, 1, 1), {}, torch.float32)
        y = run("linear", x[:, None], packed, backend, activation=activation, slope=0.2)[:, 0]
    else:  # x would be rounded: the values come as the bias of a channel each, which has no weights
        block = blocks(backend, torch.int8)[0]
        packed = packed_weight("linear", torch.zeros(len(x), 1, 1), {}, torch.int8, block, bias=x)
        y = run("linear", torch.zeros(1, 1), packed, backend, activation=activation, slope=0.2)[0]
    wanted = activate(x.double(), activation, 0.2)
    rtol, atol = {"silu": (1e-6, 1e-7), "gelu": (1e-6, 1e-6)}.get(activation, (4e-7, 1e-7))
    assert torch.allclose(y.double(), wanted, rtol=rtol, atol=atol)


def test_activation_keeps_nan(backend):
    dtype = a_float(backend)
    packed = packed_weight("linear", torch.ones(1, 1, 1), {}, dtype, blocks(backend, dtype)[0])
    x = torch.tensor([[float("nan")]])
    for activation in ops.ACTIVATIONS:
        assert run("linear", x, packed, backend, activation=activation).isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    c=st.integers(1, 70),
    o=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
    runner=RUNNERS,
)
def test_any_shape(m, c, o, density, seed, runner):
    view, x = blocked_view(o, 1, c, density, seed, True), inputs((m, c), seed, True)
    with running_on(runner) as backend:
        for dtype in number_formats(backend):
            packed = packed_weight("linear", view, {}, dtype, blocks(backend, dtype)[seed % 2])
            y = run("linear", x, packed, backend, x_zero=7 * (dtype == torch.int8))
            assert torch.equal(y.double(), x.double() @ view[:, 0].double().T)


def test_leading_dimensions_and_strides(backend):
    view, dtype = blocked_view(10, 1, 12, 0.5, 0, True), a_float(backend)
    packed = packed_weight("linear", view, {}, dtype, blocks(backend, dtype)[-1])
    x = inputs((3, 12, 5), 0, True)
    y = run("linear", x.transpose(1, 2), packed, backend)
    assert torch.equal(y, x.transpose(1, 2) @ view[:, 0].T)
    rows = placed(inputs((8, 24), 1, True), backend)[:, ::2]
    assert torch.equal(run("linear", rows, packed, backend), rows.cpu() @ view[:, 0].T)


def test_empty_batch(backend):
    dtype = a_float(backend)
    packed = packed_weight("linear", torch.ones(6, 1, 5), {}, dtype, blocks(backend, dtype)[0])
    assert run("linear", torch.zeros(0, 5), packed, backend).shape == (0, 6)
    assert run("linear", torch.zeros(2, 0, 5), packed, backend).shape == (2, 0, 6)


def test_wrong_input_is_named(backend):
    dtype = a_float(backend)
    packed = packed_weight("linear", torch.ones(6, 1, 5), {}, dtype, blocks(backend, dtype)[0])
    with pytest.raises(ValueError, match=r"7 channels .*takes 5"):
        run("linear", torch.zeros(2, 7), packed, backend)
    with pytest.raises(TypeError, match=r"float64.*float32"):
        run("linear", torch.zeros(2, 5, dtype=torch.float64), packed, backend)
