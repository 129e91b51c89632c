"""The CUDA kernels beyond what every backend does: all blocks and 2:4, split sums, half inputs, packed chains, wrong calls.

On the emulator everywhere, and on the device itself where there is one.
"""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import emulated
import pytest
import torch
import torch.nn.functional as F
from op_cases import OPS, activate, blocked_view, dense_op, inputs, positions, rounding_bound

from sparsegan import BackendError, formats, ops
from sparsegan.formats import BLOCKS, TWO_FOUR_BLOCKS, pack, pack_two_four
from sparsegan.ops import cuda
from sparsegan.ops.cuda import Map, Numbers
from sparsegan.patterns import NMPattern

CONV = {"kernel_size": (3, 3), "padding": (1, 1)}
UP = {
    "kernel_size": (4, 4),
    "stride": (2, 2),
    "padding": (1, 1),
    "dilation": (1, 1),
    "output_padding": (0, 0),
}
# kind: shape of x, O, geometry; channels of several blocks, ragged at the end
LAYERS = {
    "linear": ((6, 150), 75, {}),
    "conv2d": ((2, 150, 6, 7), 75, CONV),
    "conv_transpose2d": ((2, 150, 3, 5), 75, UP),
}
DENSE = [(dtype, block, False) for dtype, known in BLOCKS["cuda"].items() for block in known]
HALVED = [(dtype, block, True) for dtype, known in TWO_FOUR_BLOCKS.items() for block in known]


@pytest.fixture(params=["cuda_emulated", "cuda"])
def cuda_backend(request):
    """name: of the backend; device; library: of the ops; split(n): pretend that the device has n multiprocessors."""
    if request.param == "cuda":
        if reason := cuda.unavailable():
            pytest.skip(reason)
        yield SimpleNamespace(name="cuda", device="cuda", library=torch.ops.sparsegan, split=lambda n: None)
        return
    with emulated.registered() as name:
        library = emulated.library()
        split = lambda n: library.set_device(80, n)  # noqa: E731
        yield SimpleNamespace(name=name, device="cpu", library=library, split=split)


def sparse_view(kind, o, c, geometry, block, seed, integers=True):
    """A weight view whose zeros are whole blocks, about half of them; taps in raster order."""
    taps = geometry.get("kernel_size", (1, 1))
    view = blocked_view(o, taps[0] * taps[1], c, 1.0, seed, integers)
    keep = torch.rand(
        -(-o // block[0]), view.shape[1], -(-c // block[1]), generator=torch.Generator().manual_seed(seed)
    )
    mask = (keep < 0.5).repeat_interleave(block[0], 0)[:o].repeat_interleave(block[1], 2)[:, :, :c]
    return view * mask


def packed_for(kind, view, geometry, dtype, block, two_four, **options):
    return (pack_two_four if two_four else pack)(positions(kind, view, geometry), dtype, block, **options)


def halved(view, seed):
    scores = torch.rand(view.shape, generator=torch.Generator().manual_seed(seed))
    return view * NMPattern(2, 4).best(scores)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "block", "two_four"), [*DENSE, *HALVED])
def test_every_block_and_every_way_to_cut_the_sums(
    cuda_backend, kind, dtype, block, two_four, uninitialised_is_nan
):
    size, o, geometry = LAYERS[kind]
    view, x, bias = (
        sparse_view(kind, o, size[1], geometry, block, 1),
        inputs(size, 1, True),
        inputs((o,), 2, True),
    )
    view = halved(view, 3) if two_four else view
    packed = packed_for(kind, view, geometry, dtype, block, two_four, bias=bias).to(cuda_backend.device)
    assert formats.density(packed) < (0.4 if two_four else 0.7)
    wanted = dense_op(kind, x.double(), view, geometry) + bias.view(-1, *[1] * (len(size) - 2))
    for multiprocessors in (1, 4, 132):  # 1: whole sums and large tiles; 132: sums in parts
        cuda_backend.split(multiprocessors)
        zero = 9 * (dtype == torch.int8)
        y = OPS[kind](x.to(cuda_backend.device), packed, **geometry, x_zero=zero, backend=cuda_backend.name)
        assert torch.equal(y.cpu().double(), wanted), multiprocessors


@pytest.mark.parametrize("two_four", [False, True])
def test_a_weight_of_zeros_gives_the_bias(cuda_backend, two_four, uninitialised_is_nan):
    """No block is kept: values, columns and metadata are empty."""
    bias = inputs((40,), 1, True)
    for dtype, block, halved_block in (*DENSE, *HALVED):
        if halved_block == two_four:
            packed = packed_for("conv2d", torch.zeros(40, 9, 70), CONV, dtype, block, two_four, bias=bias)
            x = inputs((2, 70, 4, 5), 1, True).to(cuda_backend.device)
            y = ops.block_conv2d(x, packed.to(x.device), **CONV, backend=cuda_backend.name)
            assert torch.equal(y.cpu(), bias[:, None, None].expand(y.shape))


@pytest.mark.parametrize("two_four", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_int8_is_bit_for_bit_what_the_other_backends_compute(cuda_backend, kind, two_four):
    """Real scales: the epilogue is rounded as on the CPU, whatever the tiles and the parts of the sums."""
    size, o, geometry = LAYERS[kind]
    view, x = (
        sparse_view(kind, o, size[1], geometry, (32, 32), 5) * 13,
        torch.randn(size, generator=_seeded(5)),
    )
    view = halved(view, 6) if two_four else view
    scale, bias = torch.rand(o, generator=_seeded(6)) * 0.01, torch.randn(o, generator=_seeded(7))
    settings = {**geometry, "x_scale": 0.031, "x_zero": 117, "activation": "leaky_relu", "slope": 0.2}
    block = next(iter(TWO_FOUR_BLOCKS[torch.int8])) if two_four else (32, 32)
    packed = packed_for(kind, view, geometry, torch.int8, block, two_four, scale=scale, bias=bias)
    wanted = OPS[kind](x, packed, **settings, backend="reference")
    if not ops.extension_error():
        on_cpu = pack(positions(kind, view, geometry), torch.int8, (8, 4), scale, bias)
        assert torch.equal(OPS[kind](x, on_cpu, **settings, backend="cpu"), wanted)
    for multiprocessors in (1, 132):
        cuda_backend.split(multiprocessors)
        moved = packed.to(cuda_backend.device)
        y = OPS[kind](x.to(cuda_backend.device), moved, **settings, backend=cuda_backend.name)
        assert torch.equal(y.cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_give_half_outputs(cuda_backend, dtype, x_dtype):
    view = sparse_view("conv2d", 40, 64, CONV, (32, 32), 2, integers=False)
    x = inputs((2, 64, 9, 8), 2, False).to(x_dtype)
    packed = pack(view, dtype, (32, 32)).to(cuda_backend.device)
    y = ops.block_conv2d(x.to(cuda_backend.device), packed, **CONV, backend=cuda_backend.name).cpu()
    assert y.dtype == x_dtype and y.is_contiguous(memory_format=torch.channels_last)
    seen, view = x.to(dtype).float(), view.to(dtype).float()
    exact = dense_op("conv2d", seen.double(), view, CONV)
    bound = rounding_bound("conv2d", seen, view, CONV, exact) + torch.finfo(x_dtype).eps * exact.abs()
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_that_are_packed_already_are_read_where_they_are(cuda_backend, kind):
    """float16 in channels_last, of whole blocks of channels; and what only looks like it."""
    size, o, geometry = LAYERS[kind]
    size = (size[0], 64, *size[2:])
    view, x = sparse_view(kind, o, 64, geometry, (16, 16), 3), inputs(size, 3, True)
    packed = packed_for(kind, view, geometry, torch.float16, (16, 16), False).to(cuda_backend.device)
    wanted = dense_op(kind, x.double(), view, geometry).half()
    held = x.half().to(cuda_backend.device)
    if kind != "linear":
        held = held.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([held, held + 1], 1)
    if kind != "linear":
        wide = wide.contiguous(memory_format=torch.channels_last)
    shifted = held.new_empty(held.numel() + 1)[1:].as_strided(held.shape, held.stride()).copy_(held)
    contiguous = held.contiguous(memory_format=torch.contiguous_format)
    for same in (held, wide[:, :64], shifted, contiguous):
        y = OPS[kind](same, packed, **geometry, backend=cuda_backend.name)
        assert torch.equal(y.cpu(), wanted)


def test_int8_of_half_inputs_is_exact(cuda_backend):
    view, x = sparse_view("conv2d", 40, 64, CONV, (32, 32), 2), inputs((2, 64, 9, 8), 2, True).half()
    packed = pack(view, torch.int8, (32, 32)).to(cuda_backend.device)
    y = ops.block_conv2d(x.to(cuda_backend.device), packed, **CONV, x_zero=8, backend=cuda_backend.name).cpu()
    assert torch.equal(y, dense_op("conv2d", x.double(), view, CONV).half())


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- Chains that stay packed ----


def quantised(x, scale, zero):
    """The u8 values of x, as float64 minus the zero point."""
    steps = torch.round(x * torch.tensor(1.0 / scale, dtype=torch.float32)) + zero
    return steps.clamp(0, 255).double() - zero


def test_a_map_comes_back_as_it_went_in(cuda_backend, uninitialised_is_nan):
    x = inputs((2, 10, 5, 6), 0, True)
    for numbers in (
        Numbers(torch.uint8, 0.5, 100, multiple=16),
        Numbers(torch.float16),
        Numbers(torch.bfloat16),
    ):
        packed = cuda.quantize_pack(x.to(cuda_backend.device), numbers, cuda_backend.library)
        assert packed.data.shape == (2, 5, 6, numbers.pitch(10)) and packed.data.dtype == numbers.dtype
        assert torch.equal(packed.dense().float().cpu(), x)
        rest = packed.data[..., 10:].float().cpu()
        assert (rest == (100 if numbers.dtype == torch.uint8 else 0)).all()
    rows = cuda.quantize_pack(
        x[:, :, 0, 0].to(cuda_backend.device), Numbers(torch.float16), cuda_backend.library
    )
    assert rows.data.shape == (2, 1, 1, 64) and torch.equal(
        rows.dense()[:, :, 0, 0].float().cpu(), x[:, :, 0, 0]
    )


@pytest.mark.parametrize("out", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual", [None, torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_epilogue(cuda_backend, out, residual, dtype, uninitialised_is_nan):
    """post_act(act(conv) + residual) in every number format; small whole numbers, so that the result is exact."""
    o, device = 20, cuda_backend.device
    view, x = sparse_view("conv2d", o, 40, CONV, (16, 16), 4), inputs((2, 40, 4, 5), 4, True)
    x_numbers = Numbers(torch.uint8, 1.0, 120) if dtype == torch.int8 else Numbers(dtype)
    packed = pack(view, dtype, next(iter(BLOCKS["cuda"][dtype])), bias=inputs((o,), 3, True)).to(device)
    packed = cuda.validated(packed, [9], x_numbers.zero)
    numbers = Numbers(out, 2.0, 50, multiple=32) if out == torch.uint8 else Numbers(out, multiple=32)
    other, added = inputs((2, o, 4, 5), 9, True), None
    if residual is not None:
        pitched = torch.zeros(2, 4, 5, 32)
        pitched[..., :o] = other.permute(0, 2, 3, 1)
        if residual == torch.uint8:
            added = Map((pitched / 0.5 + 60).to(torch.uint8).to(device), o, 0.5, 60)
        else:
            added = Map(pitched.to(residual).to(device), o)
    packed_x = cuda.quantize_pack(x.to(device), x_numbers, cuda_backend.library)
    for multiprocessors in (1, 132):
        cuda_backend.split(multiprocessors)
        y = cuda.gather_gemm(
            packed_x,
            packed,
            "conv2d",
            CONV,
            numbers,
            activation="leaky_relu",
            slope=0.5,
            residual=added,
            post_activation="relu",
            library=cuda_backend.library,
        )
        exact = activate(
            dense_op("conv2d", x.double(), view, CONV) + inputs((o,), 3, True)[:, None, None],
            "leaky_relu",
            0.5,
        )
        exact = torch.relu(exact + (other if residual is not None else 0))
        wanted = quantised(exact.float(), 2.0, 50) * 2.0 if out == torch.uint8 else exact.to(out)
        assert y.data.shape == (2, 4, 5, 32) and torch.equal(y.dense().cpu().double(), wanted.double())
        if out != torch.uint8:
            assert (y.data[..., o:] == 0).all()  # or the next layer's sums would be NaN


@pytest.mark.parametrize("groups", [1, 5, 20])
@pytest.mark.parametrize("came", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("out", [torch.uint8, torch.float16, torch.float32])
def test_group_norm_act(cuda_backend, groups, came, out, uninitialised_is_nan):
    x = torch.randn(3, 20, 6, 7, generator=_seeded(0)) * 3 + 1
    weight, bias = torch.rand(20, generator=_seeded(1)) + 0.5, torch.randn(20, generator=_seeded(2))
    numbers = Numbers(came, 0.05, 110) if came == torch.uint8 else Numbers(came)
    if came == torch.float32:
        data = torch.zeros(3, 6, 7, 64)
        data[..., :20] = x.permute(0, 2, 3, 1)
        packed = Map(data.to(cuda_backend.device), 20)
    else:
        packed = cuda.quantize_pack(x.to(cuda_backend.device), numbers, cuda_backend.library)
    made = Numbers(out, 0.03, 128) if out == torch.uint8 else Numbers(out)
    y = cuda.group_norm_act(
        packed,
        groups,
        made,
        weight=weight.to(cuda_backend.device),
        bias=bias.to(cuda_backend.device),
        activation="silu",
        library=cuda_backend.library,
    )
    seen = packed.dense().float().cpu().double()
    exact = F.silu(F.group_norm(seen, groups, weight.double(), bias.double(), 1e-5))
    close = {torch.uint8: 0.0151, torch.float16: 2e-3, torch.float32: 1e-5}[out]
    wanted = exact.clamp(-128 * 0.03, 127 * 0.03) if out == torch.uint8 else exact
    assert (
        (y.dense().cpu().double() - wanted).abs() <= close * (1 + exact.abs() * (out == torch.float16))
    ).all()
    assert (y.data[..., 20:].float() == made.zero).all()


def test_a_chain_of_layers_stays_packed(cuda_backend, uninitialised_is_nan):
    """Transposed convolution, group norm, convolution with the residual of its own input: f16 all through."""
    device, library, half = cuda_backend.device, cuda_backend.library, Numbers(torch.float16)
    up = sparse_view("conv_transpose2d", 48, 32, UP, (16, 16), 0, integers=False)
    mix = sparse_view("conv2d", 48, 48, CONV, (16, 16), 1, integers=False)
    x = inputs((2, 32, 4, 4), 0, False)
    packed_up = cuda.validated(
        pack(positions("conv_transpose2d", up, UP), torch.float16, (32, 32)).to(device),
        cuda.phase_taps("conv_transpose2d", UP),
        0,
    )
    packed_mix = cuda.validated(pack(mix, torch.float16, (64, 16)).to(device), [9], 0)
    a = cuda.quantize_pack(x.to(device), half, library)
    b = cuda.gather_gemm(a, packed_up, "conv_transpose2d", UP, half, library=library)
    c = cuda.group_norm_act(b, 8, half, activation="relu", library=library)
    d = cuda.gather_gemm(c, packed_mix, "conv2d", CONV, half, residual=c, library=library)
    e = torch.relu(F.group_norm(dense_op("conv_transpose2d", x.double(), up, UP), 8))
    exact = dense_op("conv2d", e, mix, CONV) + e
    assert (d.dense().cpu().double() - exact).abs().max() < 0.01


# ---- The tables of Python and C++ agree ----


def test_the_blocks_that_python_names_are_those_that_the_kernels_take(cuda_backend):
    """Both ways: what is in the tables runs (above); what is not is refused by both."""
    library, device = cuda_backend.library, cuda_backend.device
    sizes = list(itertools.product((4, 8, 16, 32, 48, 64, 128), (4, 8, 16, 32, 64, 128)))
    for dtype, block in itertools.product((torch.int8, torch.float16, torch.bfloat16), sizes):
        allowed = cuda.refuse_block(dtype, block) is None
        assert allowed == (block in BLOCKS["cuda"][dtype])
        packed = cuda.validated(pack(torch.ones(1, 1, 1), dtype, block).to(device), [1], 0)
        x = torch.ones(1, 1, device=device)
        if allowed:
            assert library.block_linear(x, packed.tensors(), 1.0, 0, "none", 0.0).item() == 1
        else:
            with pytest.raises(RuntimeError, match="wanted"):
                library.block_linear(x, packed.tensors(), 1.0, 0, "none", 0.0)
    assert "float32" in cuda.refuse_block(torch.float32, (32, 32))
    said = cuda.refuse_block(torch.int8, (8, 4))
    assert (
        said
        == "the weight has int8 blocks of 8x4, none of 16x32, 32x32, 64x32: prune with pattern_for('cuda', torch.int8)"
    )
    assert "2:4 blocks of 16x32, none of 32x64, 64x64" in cuda.refuse_block(
        torch.int8, (16, 32), two_four=True
    )


# ---- Wrong calls: a text, and no launch ----


def conv_call(device, dtype=torch.int8, **changes):
    """Arguments of block_conv2d, valid but for the changes."""
    packed = pack(sparse_view("conv2d", 40, 64, CONV, (32, 32), 0), dtype, (32, 32)).to(device)
    weight = cuda.validated(packed, [9], changes.get("x_zero", 0)).tensors()
    call = {
        "x": inputs((2, 64, 6, 5), 0, True).to(device),
        "weight": weight,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "x_scale": 1.0,
        "x_zero": 0,
        "activation": "none",
        "slope": 0.0,
    }
    for name, change in changes.items():
        call[name] = change(call[name]) if callable(change) else change
    return list(call.values())


def with_field(index, change):
    def changed(weight):
        weight = list(weight)
        weight[index] = change(weight[index])
        return weight

    return changed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": lambda x: x.double()}, "x is Double, wanted"),
        ({"x": lambda x: x[0]}, "x has shape .*wanted 4 dimensions"),
        ({"x": lambda x: x[:, :, :0, :0], "padding": [0, 0]}, "leave no output pixel"),
        ({"x": lambda x: x[:, :32]}, "x has 32 channels, the weight comes with a pad of 64"),
        ({"kernel_size": [2, 2]}, "tap_ptr holds"),
        ({"kernel_size": [12, 12]}, "more than 128 positions"),
        ({"stride": [0, 1]}, "stride holds 0"),
        ({"padding": [1]}, "padding has 1 values, wanted 2"),
        ({"x_scale": 0.0}, "scale is 0"),
        ({"x_zero": 256}, "zero is 256"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"padding": [40000, 1], "dilation": [40000, 1]}, "beyond 16 bits"),
        ({"weight": lambda w: w[:7]}, "weight holds 7 tensors.*validated"),
        ({"weight": with_field(0, lambda t: t.float())}, "values is Float"),
        ({"weight": with_field(0, lambda t: t.transpose(1, 2))}, "values is not contiguous"),
        ({"weight": with_field(0, lambda t: t[:, :8].contiguous())}, "blocks of 8x32|wanted 16x32"),
        ({"weight": with_field(1, lambda t: t[:-1])}, "cols holds"),
        ({"weight": with_field(2, lambda t: t[:-1])}, "tap_ptr holds"),
        ({"weight": with_field(2, lambda t: t.long())}, "tap_ptr is Long"),
        ({"weight": with_field(3, lambda t: t[:-1])}, "row_channels holds|tap_ptr holds"),
        ({"weight": with_field(6, lambda t: t[:-1])}, "bias holds 39 values, wanted 40"),
        ({"weight": with_field(-2, lambda t: t[:0])}, "zero_sums holds 0 values"),
        ({"weight": with_field(-1, lambda t: t.float())}, "pad is Float"),
        ({"weight": with_field(-1, lambda t: t[:16])}, "the weight comes with a pad of 16, wanted 64"),
        (
            {"weight": with_field(0, lambda t: misaligned(t))},
            "values does not begin at a multiple of 16 bytes",
        ),
    ],
)
def test_a_wrong_layer_call_says_what_is_wrong(cuda_backend, changes, said):
    changes = {**changes}
    said_zero = changes.pop("x_zero", None)
    arguments = conv_call(cuda_backend.device, **changes)
    if said_zero is not None:
        arguments[7] = said_zero
    with pytest.raises(RuntimeError, match=said):
        cuda_backend.library.block_conv2d(*arguments)


def misaligned(t):
    """The same values one element further on."""
    room = t.new_empty(t.numel() + 1)
    room[1:] = t.flatten()
    return room[1:].view(t.shape)


def map_call(device, **changes):
    """Arguments of gather_gemm, valid but for the changes."""
    packed = pack(sparse_view("conv2d", 40, 64, CONV, (32, 32), 0), torch.int8, (32, 32)).to(device)
    call = {
        "x": torch.zeros(2, 6, 5, 64, dtype=torch.uint8, device=device),
        "in_channels": 64,
        "weight": cuda.validated(packed, [9], 0).tensors(),
        "transposed": False,
        "window": [3, 3, 1, 1, 1, 1, 0, 0, 1, 1],
        "activation": "none",
        "slope": 0.0,
        "residual": None,
        "residual_scale": 1.0,
        "residual_zero": 0,
        "post_activation": "none",
        "post_slope": 0.0,
        "dtype": torch.uint8,
        "pitch": 64,
        "y_scale": 1.0,
        "y_zero": 0,
    }
    for name, change in changes.items():
        call[name] = change(call[name]) if callable(change) else change
    return list(call.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": lambda x: x.half()}, "x is Half, wanted Byte"),
        ({"x": lambda x: x.permute(0, 3, 1, 2)}, "x is not contiguous"),
        ({"x": lambda x: x[:, :, :, :32]}, "x is not contiguous"),
        ({"x": lambda x: x[:, :, :, :32].contiguous()}, "32 channels a pixel, wanted at least 64"),
        ({"x": lambda x: torch.zeros(2, 6, 5, 72, dtype=torch.uint8, device=x.device)}, "72 bytes a pixel"),
        ({"x": misaligned}, "x does not begin at a multiple of 16 bytes"),
        ({"x": lambda x: x[0]}, "wanted 4 dimensions"),
        ({"window": [3, 3, 1, 1]}, "window has 4 values, wanted 10"),
        ({"dtype": torch.int32}, "dtype is Int"),
        ({"pitch": 39}, "pitch is 39, wanted at least 40"),
        ({"pitch": 41}, "a multiple of 16"),
        ({"y_scale": -1.0}, "y_scale is -1"),
        ({"y_zero": -1}, "y_zero is -1"),
        (
            {"residual": torch.zeros(2, 6, 4, 64)},
            r"residual has shape \[2, 6, 4, 64\], the output \[2, 6, 5, 64\]",
        ),
        ({"residual": torch.zeros(2, 6, 5, 32)}, "32 channels a pixel, wanted at least 40"),
        ({"transposed": True, "window": [3, 3, 5, 5, 1, 1, 0, 0, 1, 1]}, "more than 16 phases"),
    ],
)
def test_a_wrong_packed_call_says_what_is_wrong(cuda_backend, changes, said):
    if isinstance(changes.get("residual"), torch.Tensor):
        changes = {"residual": changes["residual"].to(cuda_backend.device)}
    with pytest.raises(RuntimeError, match=said):
        cuda_backend.library.gather_gemm(*map_call(cuda_backend.device, **changes))


def test_other_wrong_calls(cuda_backend):
    library, device = cuda_backend.library, cuda_backend.device
    x = torch.zeros(2, 6, 5, 64, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="groups is 7, wanted a divisor of the 40 channels"):
        library.group_norm_act(x, 40, 7, 1e-5, None, None, 1.0, 0, "none", 0.0, torch.uint8, 64, 1.0, 0)
    with pytest.raises(RuntimeError, match="weight holds 39 values, wanted 40"):
        weight = torch.ones(39, device=device)
        library.group_norm_act(x, 40, 8, 1e-5, weight, None, 1.0, 0, "none", 0.0, torch.uint8, 64, 1.0, 0)
    with pytest.raises(RuntimeError, match=r"x has shape .* wanted"):
        library.quantize_pack(torch.zeros(2, 3, 4, device=device), torch.uint8, 64, 1.0, 0)
    with pytest.raises(RuntimeError, match="dtype is Float, wanted"):
        library.quantize_pack(torch.zeros(2, 3, device=device), torch.float32, 64, 1.0, 0)


def test_sizes_beyond_32_bits_are_refused_before_anything_is_allocated(cuda_backend):
    library, device = cuda_backend.library, cuda_backend.device
    many = torch.zeros(1, device=device)
    with pytest.raises(RuntimeError, match=r"\[268435456, 1, 1, 64\] has 2\^31 elements or more"):
        library.quantize_pack(many.expand(2**28, 3), torch.float16, 64, 1.0, 0)
    arguments = conv_call(device, x=lambda x: many.expand(2, 64, 2**14, 2**14))
    with pytest.raises(RuntimeError, match=r"the output .* has 2\^31 elements or more"):
        library.block_conv2d(*arguments)
    arguments = conv_call(device, x=lambda x: many.expand(1, 64, 8, 8), padding=[65535, 65535])
    with pytest.raises(RuntimeError, match=r"2\^31 elements|beyond 16 bits"):
        library.block_conv2d(*arguments)


def test_rows_far_apart_are_read_where_they_are(cuda_backend, tmp_path):
    """Strides of x beyond 32 bits, in a file that is nearly all hole."""
    if cuda_backend.name == "cuda":
        pytest.skip("takes memory that a device need not have")
    rows, step = 6, 600_000_000
    with (tmp_path / "far").open("wb") as file:
        file.truncate(rows * step * 2)
    flat = torch.from_file(str(tmp_path / "far"), shared=True, size=rows * step, dtype=torch.float16)
    x = flat.as_strided((rows, 40), (step, 1))
    x[:, :] = inputs((rows, 40), 0, True)
    view = sparse_view("linear", 20, 40, {}, (16, 16), 0)
    y = ops.block_linear(x, pack(view, torch.float16, (16, 16)), backend=cuda_backend.name)
    assert torch.equal(y.double(), x.double() @ view[:, 0].double().T)


def test_an_older_architecture_is_refused(cuda_backend):
    if cuda_backend.name == "cuda":
        pytest.skip("the device is what it is")
    library = cuda_backend.library
    library.set_device(75, 40)
    with pytest.raises(RuntimeError, match=r"compute capability 7.5, the kernels need 8.0 or later"):
        library.block_conv2d(*conv_call("cpu"))
    library.set_device(80, 4)


def test_tensors_of_other_devices_are_refused(cuda_backend):
    other = "meta" if cuda_backend.name == "cuda_emulated" else "cpu"
    call = cuda_backend.library.block_conv2d.default
    key = torch._C.DispatchKey.CPU if cuda_backend.name == "cuda_emulated" else torch._C.DispatchKey.CUDA
    for field, name in ((0, "values"), (2, "tap_ptr"), (-1, "pad")):
        arguments = conv_call(cuda_backend.device, weight=with_field(field, lambda t: t.to(other)))
        with pytest.raises(RuntimeError, match=f"{name} is not on the device of x"):
            call.redispatch(torch._C.DispatchKeySet(key), *arguments)
    packed = pack(torch.ones(32, 1, 32), torch.int8, (32, 32)).to(other)
    x = torch.ones(1, 32, device=cuda_backend.device)
    with pytest.raises(BackendError, match=f"the weight on {other}"):
        ops.block_linear(x, packed, backend=cuda_backend.name)


def test_an_empty_batch_launches_nothing(cuda_backend):
    library, device = cuda_backend.library, cuda_backend.device
    assert library.block_conv2d(*conv_call(device, x=lambda x: x[:0])).shape == (0, 40, 6, 5)
    assert library.gather_gemm(*map_call(device, x=lambda x: x[:0])).shape == (0, 6, 5, 64)
    assert library.quantize_pack(torch.zeros(0, 3, device=device), torch.uint8, 64, 1.0, 0).shape == (
        0,
        1,
        1,
        64,
    )
    empty = torch.zeros(0, 6, 5, 64, dtype=torch.uint8, device=device)
    y = library.group_norm_act(empty, 40, 8, 1e-5, None, None, 1.0, 0, "none", 0.0, torch.uint8, 64, 1.0, 0)
    assert y.shape == (0, 6, 5, 64)


def test_a_damaged_weight_is_refused_when_it_is_validated(cuda_backend):
    """The kernels do not look: it is done once, and by itself where nobody did it before."""
    packed = pack(sparse_view("conv2d", 40, 64, CONV, (32, 32), 0), torch.int8, (32, 32)).to(
        cuda_backend.device
    )
    packed.cols.fill_(2**30)
    x = torch.zeros(1, 64, 4, 4, device=cuda_backend.device)
    with pytest.raises(ValueError, match="cols must"):
        ops.block_conv2d(x, packed, **CONV, backend=cuda_backend.name)


# ---- Shape functions ----


def test_shape_functions_say_what_the_kernels_return(cuda_backend):
    device, library = cuda_backend.device, cuda_backend.library
    up = cuda.validated(
        pack(torch.ones(20, 16, 40), torch.int8, (16, 32)).to(device),
        cuda.phase_taps("conv_transpose2d", UP),
        0,
    )
    window = [4, 4, 2, 2, 1, 1, 0, 0, 1, 1]
    x = torch.zeros(2, 5, 6, 64, dtype=torch.uint8, device=device)
    calls = {
        "quantize_pack": (inputs((2, 10, 5, 6), 0, True).to(device), torch.uint8, 64, 1.0, 0),
        "gather_gemm": tuple(map_call(device)),
        "group_norm_act": (x, 40, 8, 1e-5, None, None, 1.0, 0, "none", 0.0, torch.float16, 64, 1.0, 0),
    }
    rest = ("none", 0.0, None, 1.0, 0, "none", 0.0, torch.float16, 32, 1.0, 0)
    shapes = {name: getattr(library, name)(*call).shape for name, call in calls.items()}
    made = library.gather_gemm(x, 40, up.tensors(), True, window, *rest).shape
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        for name, call in calls.items():
            assert getattr(torch.ops.sparsegan, name)(*call).shape == shapes[name]
        assert torch.ops.sparsegan.gather_gemm(x, 40, up.tensors(), True, window, *rest).shape == made


def test_the_reasons_of_this_machine_are_readable():
    if reason := cuda.unavailable():
        assert re.search("no CUDA device: |built without CUDA|not built", reason)
        with pytest.raises(BackendError, match=re.escape(reason)):
            ops.block_linear(torch.ones(1, 4), pack(torch.ones(4, 1, 4)), backend="cuda")
    else:
        assert cuda.devices() and cuda.architectures()
