"""Every kernel of csrc/cuda, as the PTX that nvcc emits for sm_80, run by the interpreter: right results, and its modelled cost.

The launchers are the real ones (ptx/device.py). Sums of integers are compared exactly, of any type.
"""

import re

import numpy as np
import pytest
from ptx.device import Device, Library
from ptx.layers import BYTES, TYPES, Layer, activate, bits, expected, fields, make, numbers, run

BANK_CONFLICTS, SECTORS = 1.05, 1.15


@pytest.fixture(scope="session")
def library():
    try:
        return Library()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def device(library):
    return Device(library)


def check(layer, device):
    y, wanted = run(layer, device)
    wrong = np.argwhere(y != wanted)
    assert not len(wrong), (
        f"{len(wrong)} of {y.size} differ, first at {wrong[0]}: {y[*wrong[0]]}, wanted {wanted[*wrong[0]]}"
    )


def main_kernel(device):
    (name,) = [name for name in device.costs if "gather_gemm_kernel" in name]
    return device.costs[name]


# All tiles of tile.h: (type, block, 2:4). The launcher is told of one multiprocessor for the large tile, of many for the small.
BLOCKS = [
    *(("u8", block, False) for block in ((16, 32), (32, 32), (64, 32))),
    *((kind, block, False) for kind in ("f16", "bf16") for block in ((16, 16), (32, 32), (64, 16))),
    *(("u8", block, True) for block in ((32, 64), (64, 64))),
    *((kind, block, True) for kind in ("f16", "bf16") for block in ((32, 32), (64, 32))),
]
IDS = [f"{kind}-{bo}x{bk}{'-2:4' if two_four else ''}" for kind, (bo, bk), two_four in BLOCKS]


@pytest.mark.parametrize(("kind", "block", "two_four"), BLOCKS, ids=IDS)
@pytest.mark.parametrize("size", ["large", "small"])
def test_tiles(device, kind, block, two_four, size):
    """A convolution whose pixels, channels and blocks fill no tile, and the cost of its main loop."""
    layer = Layer(
        kind=kind,
        block=block,
        two_four=two_four,
        batch=2,
        size=(9, 11),
        channels=(block[1] * 3 - 8, block[0] * 2 - 4),
        multiprocessors=1 if size == "large" else 1000,
        seed=hash((kind, block, two_four)) % 1000,
    )
    check(layer, device)
    pixels = 128 if size == "large" else 64
    ((name, grid, _, _),) = device.launches
    assert f"Li{block[0]}ELi{block[1]}ELi{pixels}E" in name
    assert grid == (-(-198 // pixels) * 2, 1, 1)


@pytest.mark.parametrize(("kind", "block", "two_four"), BLOCKS, ids=IDS)
@pytest.mark.parametrize("size", ["large", "small"])
def test_rows_of_any_length(device, kind, block, two_four, size):
    """One block to seven: every stage is the last one in some row, when the sums take its place in shared memory."""
    layer = Layer(
        kind=kind,
        block=block,
        two_four=two_four,
        kernel=(1, 1),
        padding=(0, 0),
        batch=2,
        size=(5, 13),
        channels=(7 * block[1], 7 * block[0]),
        staircase=True,
        multiprocessors=1 if size == "large" else 1000,
    )
    assert make(layer).packed.tap_ptr.diff().tolist() == [1, 2, 3, 4, 5, 6, 7]
    check(layer, device)


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize(("block", "two_four"), [((16, 32), False), ((32, 64), True)], ids=["s8", "2:4"])
def test_more_blocks_than_a_run(device, block, two_four, size):
    """tile.h works out the places of 128 blocks at a time."""
    layer = Layer(
        block=block,
        two_four=two_four,
        kernel=(5, 5),
        padding=(2, 2),
        batch=9,
        size=(4, 4),
        channels=(6 * block[1] + 8, block[0]),
        density=0.95,
        multiprocessors=1 if size == "large" else 1000,
    )
    assert len(make(layer).packed.cols) > 128
    check(layer, device)


LAYERS = {
    "linear": Layer(size=(1, 1), batch=70, kernel=(1, 1), padding=(0, 0), channels=(96, 40)),
    "1x1": Layer(kernel=(1, 1), padding=(0, 0), size=(5, 7), batch=3, y="f16"),
    "stride 2": Layer(stride=(2, 2), size=(12, 9), channels=(64, 32)),
    "dilation": Layer(dilation=(2, 3), padding=(2, 3), size=(9, 10), channels=(64, 32)),
    "7x7 with a wide border": Layer(
        kernel=(7, 7), padding=(5, 6), size=(5, 5), channels=(32, 32), density=0.3
    ),
    "image smaller than the kernel": Layer(kernel=(5, 5), padding=(2, 2), size=(2, 3), channels=(32, 32)),
    "3x1 with two strides": Layer(
        kernel=(3, 1), stride=(2, 1), padding=(1, 0), size=(9, 6), channels=(32, 32)
    ),
    "no blocks in a row": Layer(channels=(64, 96), density=0.15, seed=4),
    "no blocks at all": Layer(channels=(32, 32), density=0.0),
    "all blocks": Layer(channels=(96, 32), density=1.0),
    "channels out of order": Layer(
        channels=(32, 40),
        dead_channels=tuple(range(0, 16, 2)),
        density=1.0,
        block=(16, 32),
        y="u8",
        y_zero=9,
        y_scale=64.0,
    ),
    "odd pitch of y": Layer(channels=(32, 30), y_extra=1, y="f16"),
    "room behind the channels": Layer(
        channels=(40, 24), y_extra=8, x_extra=1, y="u8", y_zero=128, y_scale=50.0
    ),
    "transposed, stride 2": Layer(
        transposed=True, kernel=(4, 4), stride=(2, 2), padding=(1, 1), size=(5, 6), batch=2, channels=(64, 32)
    ),
    "transposed, stride 2, kernel 3": Layer(
        transposed=True,
        kernel=(3, 3),
        stride=(2, 2),
        output_padding=(1, 1),
        size=(5, 6),
        channels=(64, 48),
        block=(16, 32),
    ),
    "transposed, stride 3x2": Layer(
        transposed=True,
        kernel=(3, 2),
        stride=(3, 2),
        padding=(0, 0),
        size=(4, 5),
        channels=(32, 32),
        y="bf16",
    ),
    "transposed, phases without taps": Layer(
        transposed=True, kernel=(1, 1), stride=(2, 2), padding=(0, 0), size=(4, 5), channels=(32, 32)
    ),
    "transposed, dilation": Layer(
        transposed=True,
        kernel=(3, 3),
        stride=(2, 1),
        dilation=(1, 2),
        padding=(1, 2),
        size=(6, 5),
        channels=(32, 32),
        kind="f16",
    ),
    "transposed, one pixel": Layer(
        transposed=True, kernel=(4, 4), stride=(1, 1), padding=(0, 0), size=(1, 1), batch=3, channels=(64, 32)
    ),
    "zero point 0": Layer(x_zero=0),
    "zero point 255": Layer(x_zero=255),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(device, name):
    layer = LAYERS[name]
    in_order = bool((make(layer).packed.row_channels[: layer.channels[1]].diff() == 1).all())
    assert in_order == (name != "channels out of order")
    check(layer, device)


@pytest.mark.parametrize("y", ["u8", "f16", "bf16", "f32"])
@pytest.mark.parametrize("residual", [None, "u8", "f16", "bf16", "f32"])
def test_output_and_residual(device, y, residual):
    options = {"y_zero": 100, "y_scale": 32.0} if y == "u8" else {}
    check(
        Layer(
            size=(5, 5),
            channels=(32, 24),
            y=y,
            residual=residual,
            act="kLeakyRelu",
            post_act="kRelu",
            slope=0.25,
            residual_extra=8,
            **options,
        ),
        device,
    )


@pytest.mark.parametrize("act", ["kTanh", "kSigmoid", "kSilu", "kGelu"])
def test_activations(device, act):
    """Within a few units in the last place of float32; the hardware's approximations are not modelled."""
    layer = Layer(
        kind="f16",
        block=(16, 16),
        size=(4, 4),
        channels=(16, 16),
        kernel=(1, 1),
        padding=(0, 0),
        act=act,
        integers=False,
    )
    data = make(layer)
    y, wanted = run(layer, device)
    exact = expected(layer, data)
    assert np.abs(y - wanted).max() <= 1e-5 * max(1, np.abs(exact).max())


@pytest.mark.parametrize(
    ("kind", "two_four"), [("f16", False), ("bf16", False), ("f16", True), ("bf16", True)]
)
def test_normal_numbers(device, kind, two_four):
    """Rounded sums: products of numbers with few digits are exact in float32, so only the sums of up to K of them round."""
    layer = Layer(
        kind=kind, block=(32, 32), two_four=two_four, integers=False, size=(6, 6), channels=(96, 32)
    )
    y, wanted = run(layer, device)
    data = make(layer)
    depth = 9 * 96
    size = np.sqrt(depth) * data.scale.max()  # of a sum of standard normal products
    assert np.abs(y - wanted).max() <= 4 * 2**-24 * np.sqrt(depth) * 4 * size + 1e-6


@pytest.mark.parametrize(("kind", "block", "two_four"), BLOCKS, ids=IDS)
def test_split_sums(device, kind, block, two_four):
    """Small maps with many channels: the sums of several CTAs are added by a second kernel."""
    wide = {"u8": 32, "f16": 16, "bf16": 16}[kind] * (2 if two_four else 1)
    layer = Layer(
        kind=kind,
        block=block,
        two_four=two_four,
        size=(4, 4),
        channels=(wide * 20, block[0] + 8 if block[0] < 64 else 64),
        density=0.8,
        y="u8",
        y_zero=128,
        y_scale=512.0 if kind == "u8" else 16.0,
        residual="f16",
        split=True,
        multiprocessors=108,
        integers=True,
    )
    check(layer, device)
    (first, grid, _, _), (second, _, _, _) = device.launches
    assert "gather_gemm_kernel" in first
    assert "add_splits" in second
    assert grid[1] > 1


# ---- cost ----


@pytest.mark.parametrize(("kind", "block", "two_four"), BLOCKS, ids=IDS)
@pytest.mark.parametrize("size", ["large", "small"])
def test_cost(library, kind, block, two_four, size):
    """Of a layer like those in generators: no bank conflicts, no sectors moved in vain."""
    device = Device(library, size=1 << 25)
    layer = Layer(
        kind=kind,
        block=block,
        two_four=two_four,
        size=(16, 16),
        channels=(128, 128),
        density=0.5,
        y="u8" if kind == "u8" else kind,
        y_scale=512.0,
        y_zero=128,
        multiprocessors=1 if size == "large" else 1000,
    )
    check(layer, device)
    cost = main_kernel(device)
    loop = cost.figures(cost.main_loop())
    assert loop.bank_conflicts <= BANK_CONFLICTS, "\n".join(cost.hot_spots())
    assert loop.sector_overhead <= SECTORS, "\n".join(cost.hot_spots())
    whole = cost.figures()
    stores = cost.figures(
        [i for i, ins in enumerate(cost.kernel.code) if ins.opcode == "st" and ins.space == "global"]
    )
    narrow = block[0] == 16 and kind == "u8"  # half a sector a pixel, see tile.h
    assert stores.sector_overhead <= (2.0 if narrow else SECTORS), "\n".join(cost.hot_spots())
    assert whole.bank_conflicts <= BANK_CONFLICTS, "\n".join(cost.hot_spots())
    assert whole.sector_overhead <= SECTORS, "\n".join(cost.hot_spots())


# ---- quantise and group norm ----


def quantize(device, x, layout, x_kind, y_kind, extra=0, scale=0.125, zero=3, skew=0):
    """x [N, C, H, W] float -> what the kernel stores, [N, H, W, C + extra], as numbers."""
    stored = bits(x, x_kind)
    if layout == "nhwc":
        place = device.memory.put(
            np.ascontiguousarray(stored.transpose(0, 2, 3, 1)), "x", skew=skew
        ).transpose(0, 3, 1, 2)
    elif layout == "nchw":
        place = device.memory.put(stored, "x", skew=skew)
    else:  # every second row and column of something larger, pixels turned
        large = np.zeros((x.shape[0], x.shape[1], 2 * x.shape[3], 2 * x.shape[2]), stored.dtype)
        large[:, :, ::2, ::2] = stored.transpose(0, 1, 3, 2)
        place = device.memory.put(large, "x", skew=skew)[:, :, ::2, ::2].transpose(0, 1, 3, 2)
    batch, channels, height, width = x.shape
    types = device.library.numbers
    y = device.memory.empty((batch, height, width, channels + extra), bits(np.zeros(1), y_kind).dtype, "y")
    call = device.struct(
        "Quantize",
        x=place,
        x_type=types[f"Type::{TYPES[x_kind]}"],
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        x_strides=[s // place.itemsize for s in place.strides],
        y=y,
        y_type=types[f"Type::{TYPES[y_kind]}"],
        y_stride=channels + extra,
        inverse_scale=1 / scale,
        zero=zero,
    )
    answer = device.call("run_quantize", call)
    assert answer is None, answer
    assert device.memory.written(y).all()
    return numbers(y, y_kind)


def quantized(x, x_kind, y_kind, extra=0, scale=0.125, zero=3):
    values = numbers(bits(x, x_kind), x_kind).transpose(0, 2, 3, 1).astype(np.float32)
    if y_kind == "u8":
        steps = np.clip(
            np.nan_to_num(values * np.float32(1 / scale), nan=-1024, posinf=1024, neginf=-1024), -1024, 1024
        )
        values = np.clip(np.rint(steps) + zero, 0, 255)
    else:
        values = numbers(bits(values, y_kind), y_kind)
    background = zero if y_kind == "u8" else 0
    return np.pad(values, ((0, 0), (0, 0), (0, 0), (0, extra)), constant_values=background)


@pytest.mark.parametrize("x_kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("y_kind", ["u8", "f16", "bf16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
def test_quantize(device, x_kind, y_kind, layout):
    channels = 24 if layout == "nhwc" else 23
    extra = 8 if layout == "nhwc" else 9
    x = np.random.default_rng(0).normal(size=(2, channels, 6, 12)) * 20
    got = quantize(device, x, layout, x_kind, y_kind, extra)
    assert np.array_equal(got, quantized(x, x_kind, y_kind, extra))


def test_quantize_corner_cases(device):
    x = np.zeros((1, 16, 1, 4), np.float32)
    x[0, :8, 0, 0] = [
        np.nan,
        np.inf,
        -np.inf,
        1e30,
        0.0625,
        0.1875,
        -0.0625,
        -1e-9,
    ]  # halves go to the even step
    assert np.array_equal(quantize(device, x, "nchw", "f32", "u8"), quantized(x, "f32", "u8"))
    images = np.random.default_rng(1).normal(size=(70, 16, 1, 1))
    assert np.array_equal(quantize(device, images, "nchw", "f32", "u8"), quantized(images, "f32", "u8"))
    wide = np.random.default_rng(2).normal(size=(1, 160, 3, 4)) * 9
    assert np.array_equal(quantize(device, wide, "nchw", "f32", "f16"), quantized(wide, "f32", "f16"))
    # begins between two multiples of four elements
    assert np.array_equal(quantize(device, wide, "nchw", "f32", "u8", skew=4), quantized(wide, "f32", "u8"))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("x_kind", "y_kind"), [("f32", "u8"), ("f16", "u8"), ("f16", "f16"), ("f32", "bf16")]
)
def test_cost_of_quantize(device, layout, x_kind, y_kind):
    x = np.random.default_rng(0).normal(size=(1, 64, 16, 16))
    assert np.array_equal(quantize(device, x, layout, x_kind, y_kind), quantized(x, x_kind, y_kind))
    ((_, cost),) = device.costs.items()
    figures = cost.figures()
    assert figures.bank_conflicts <= BANK_CONFLICTS, "\n".join(cost.hot_spots())
    assert figures.sector_overhead <= SECTORS, "\n".join(cost.hot_spots())


def group_norm(device, x, x_kind, y_kind, groups, x_extra=0, y_extra=0, act="kSilu", affine=True):
    """(what the kernels store, exact values before rounding) for x [N, H, W, C] float; u8 has scale 1/4 and zero point 100."""
    batch, height, width, channels = x.shape
    random, types = np.random.default_rng(5), device.library.numbers
    if x_kind == "u8":
        x = np.clip(np.rint(x * 4) + 100, 0, 255)
    whole = np.full((batch, height, width, channels + x_extra), 50.0)
    whole[..., :channels] = x
    weight, bias = random.normal(size=(2, channels)).astype(np.float32)
    y = device.memory.empty((batch, height, width, channels + y_extra), bits(np.zeros(1), y_kind).dtype, "y")
    call = {
        "x": device.memory.put(bits(whole, x_kind), "x"),
        "x_type": types[f"Type::{TYPES[x_kind]}"],
        "batch": batch,
        "height": height,
        "width": width,
        "channels": channels,
        "x_stride": channels + x_extra,
        "x_scale": 0.25,
        "x_zero": 100,
        "groups": groups,
        "eps": 1e-5,
        "act": types[f"Activation::{act}"],
        "slope": 0.1,
        "y": y,
        "y_type": types[f"Type::{TYPES[y_kind]}"],
        "y_stride": channels + y_extra,
        "y_inverse_scale": 32.0,
        "y_zero": 9,
    }
    if affine:
        call |= {"weight": device.memory.put(weight, "weight"), "bias": device.memory.put(bias, "bias")}
    size = device.library.host.group_norm_bytes
    size.restype = np.ctypeslib.ctypes.c_int64
    wanted = size(np.ctypeslib.ctypes.byref(device.struct("GroupNorm", **call)))
    call |= {"workspace": device.memory.empty(wanted // 4, np.int32, "workspace"), "workspace_bytes": wanted}
    answer = device.call("run_group_norm", device.struct("GroupNorm", **call))
    assert answer is None, answer
    assert device.memory.written(y).all()
    exact = numbers(bits(x, x_kind), x_kind).astype(np.float64)
    exact = (exact - 100) / 4 if x_kind == "u8" else exact
    grouped = exact.reshape(batch, -1, groups, channels // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    exact = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(exact.shape)
    if affine:
        exact = exact * weight + bias
    return numbers(y, y_kind).astype(np.float64), activate(exact, act, 0.1)


def check_norm(y, exact, y_kind, y_extra):
    values, rest = (y[..., : y.shape[-1] - y_extra], y[..., y.shape[-1] - y_extra :])
    assert (rest == (9 if y_kind == "u8" else 0)).all()
    error = 2e-5 * np.maximum(1, np.abs(exact))
    if y_kind == "u8":
        limited = np.clip(exact * 32 + 9, 0, 255)
        assert np.abs(values - limited).max() <= 0.5 + 0.01
    else:
        unit = {"f16": 2**-11, "bf16": 2**-8, "f32": 0}[y_kind]
        assert (
            np.abs(values - exact) <= np.abs(exact) * unit + error + (2**-25 if y_kind == "f16" else 0)
        ).all()


@pytest.mark.parametrize("x_kind", ["u8", "f16", "bf16", "f32"])
@pytest.mark.parametrize("y_kind", ["u8", "f16", "bf16", "f32"])
def test_group_norm(device, x_kind, y_kind):
    x = np.random.default_rng(3).normal(size=(2, 7, 9, 48)) * 3 + np.linspace(-9, 9, 48)
    y, exact = group_norm(device, x, x_kind, y_kind, groups=8, x_extra=16, y_extra=16)
    check_norm(y, exact, y_kind, 16)


NORMS = {
    "instance": {"shape": (2, 8, 8, 32), "groups": 32, "act": "kRelu"},
    "one group": {"shape": (1, 5, 5, 64), "groups": 1, "act": "kNone"},
    "one pixel": {"shape": (3, 1, 1, 64), "groups": 4, "act": "kLeakyRelu"},
    "many pixels": {"shape": (1, 40, 50, 16), "groups": 2, "act": "kSilu"},
    "many channels": {"shape": (1, 3, 4, 352), "groups": 11, "act": "kTanh"},
    "wide groups": {"shape": (1, 4, 4, 256), "groups": 2, "act": "kSigmoid"},
    "channels that fill no vector": {
        "shape": (2, 4, 5, 20),
        "groups": 5,
        "act": "kGelu",
        "x_extra": 12,
        "y_extra": 12,
    },
    "no weight": {"shape": (1, 6, 6, 32), "groups": 4, "affine": False},
    "a large mean": {"shape": (1, 16, 16, 32), "groups": 4, "offset": 1000.0},
}


@pytest.mark.parametrize("name", NORMS)
def test_group_norms(device, name):
    options = dict(NORMS[name])
    shape, offset = options.pop("shape"), options.pop("offset", 0.0)
    x = np.random.default_rng(4).normal(size=shape) + offset
    y, exact = group_norm(device, x, "f32", "f32", **options)
    if offset:  # float32 itself holds x to 2^-24 of 1000
        assert np.abs(y - exact).max() < 2e-3
    else:
        check_norm(y, exact, "f32", options.get("y_extra", 0))


@pytest.mark.parametrize(("x_kind", "y_kind"), [("f16", "u8"), ("u8", "u8"), ("f16", "f16"), ("f32", "f16")])
def test_cost_of_group_norm(device, x_kind, y_kind):
    """Twice over x and once over y, in whole sectors, with the sums of the runs and the coefficients on top."""
    shape = 1, 48, 48, 64
    y, exact = group_norm(device, np.random.default_rng(6).normal(size=shape), x_kind, y_kind, groups=8)
    check_norm(y, exact, y_kind, 0)
    x_bytes, y_bytes = (np.prod(shape) * BYTES[kind] for kind in (x_kind, y_kind))
    moved = sum(32 * cost.figures().sectors for cost in device.costs.values())
    assert moved <= SECTORS * (2 * x_bytes + y_bytes), [str(c.figures()) for c in device.costs.values()]
    for name, cost in device.costs.items():
        assert cost.figures().sector_overhead <= SECTORS, "\n".join(cost.hot_spots())
        if "merge" not in name:  # which sees a few sums of each channel only
            assert cost.figures().bank_conflicts <= BANK_CONFLICTS, "\n".join(cost.hot_spots())


# ---- refusals ----

REFUSED = {
    "misaligned x": ({"x": 1}, "multiples of 16 bytes"),
    "a stride that is no multiple of 16 bytes": ({"x_stride": 328}, "multiples of 16 bytes apart"),
    "2^31 elements": ({"batch": 1 << 20, "x_stride": 1 << 20}, "2\\^31"),
    "an unknown block": (
        {"block_o": 8, "block_k": 4},
        "int8 blocks of 8x4 have no CUDA kernel: wanted 16x32, 32x32 or 64x32",
    ),
    "a phase beyond the output": ({"out_height": 3}, "a phase leaves the output"),
    "too small a workspace": ({"workspace": 0, "workspace_bytes": 1}, "workspace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_launch(device, name):
    change, message = REFUSED[name]
    layer = Layer(channels=(320, 32), size=(4, 4), density=1.0)
    call = fields(layer, make(layer), device)
    for key, value in change.items():
        call[key] = (
            call[key].ctypes.data + value
            if key == "x"
            else device.memory.base
            if key == "workspace"
            else value
        )
    answer = device.call("run_gather_gemm", device.struct("GatherGemm", **call), 108)
    assert answer
    assert re.search(message, answer), answer
    assert not device.launches


def test_an_empty_batch_launches_nothing(device):
    layer = Layer()
    call = fields(layer, make(layer), device)
    assert device.call("run_gather_gemm", device.struct("GatherGemm", **(call | {"batch": 0})), 1) is None
    assert not device.launches


def test_every_kernel_ran(request, library):
    """The tests above leave out no instance of a kernel."""
    if request.session.testscollected < 250:
        pytest.skip("only some of the tests run")
    left_out = set(library.kernels) - library.ran
    assert not left_out, "\n".join(sorted(left_out))
