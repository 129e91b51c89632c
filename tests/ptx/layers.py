"""Gather-GEMM calls on the interpreter's device, from the description of a layer, and what they should compute.

The reference knows nothing of phases, taps in one list or packed blocks: it is the definition of a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sparsegan import formats

from .device import Device

TYPES = {"u8": "kUint8", "f16": "kFloat16", "bf16": "kBFloat16", "f32": "kFloat32"}
TORCH = {"u8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}
BYTES = {"u8": 1, "f16": 2, "bf16": 2, "f32": 4}
MAX_TAPS, MAX_PHASES = 128, 16


@dataclass(frozen=True)
class Layer:
    """A convolution, a transposed one, or (kernel 1, one pixel an image) a linear layer."""

    kind: str = "u8"  # of the input; weights are s8 then
    block: tuple[int, int] = (32, 32)
    two_four: bool = False
    batch: int = 1
    size: tuple[int, int] = (8, 8)
    channels: tuple[int, int] = (64, 64)  # in, out
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)
    density: float = 0.6
    staircase: bool = False  # row r keeps r + 1 blocks instead
    x_zero: int = 7
    y: str = "f32"
    y_zero: int = 0
    y_scale: float = 1.0
    y_extra: int = 0  # channels of a pixel of y beyond the layer's
    x_extra: int = 0  # blocks of a pixel of x beyond the layer's
    act: str = "kNone"
    post_act: str = "kNone"
    slope: float = 0.0
    residual: str | None = None
    residual_extra: int = 0
    integers: bool = True  # weights and inputs that sum without rounding
    dead_channels: tuple[int, ...] = ()  # output channels without any weight: rows are then out of order
    seed: int = 0
    split: bool = False
    multiprocessors: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        sizes = []
        for n, k, s, p, d, o in zip(
            self.size, self.kernel, self.stride, self.padding, self.dilation, self.output_padding, strict=True
        ):
            reach = d * (k - 1) + 1
            sizes.append((n - 1) * s - 2 * p + reach + o if self.transposed else (n + 2 * p - reach) // s + 1)
        return sizes[0], sizes[1]


@dataclass
class Data:
    """Values of a layer as numbers (float64), and as the device holds them."""

    weight: np.ndarray  # [O, taps, C], raster order of the taps
    x: np.ndarray  # [N, H, W, C], the zero point taken off
    residual: np.ndarray | None
    scale: np.ndarray
    bias: np.ndarray
    packed: formats.PackedWeight
    taps: list[int] = field(default_factory=list)  # raster tap of every packed position


def bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as an array of that type; bf16 as its bits."""
    if kind == "u8":
        return values.astype(np.uint8)
    if kind == "bf16":
        return (
            torch.from_numpy(values.astype(np.float32))
            .to(torch.bfloat16)
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
        )
    return values.astype({"f16": np.float16, "f32": np.float32}[kind])


def numbers(array: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `bits`."""
    if kind == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def make(layer: Layer) -> Data:
    random = np.random.default_rng(layer.seed)
    inputs, outputs = layer.channels
    taps = layer.kernel[0] * layer.kernel[1]
    bo, bk = layer.block
    shape = outputs, taps, inputs
    if layer.kind == "u8":
        weight = random.integers(-128, 128, shape).astype(np.float64)
        x = random.integers(0, 256, (layer.batch, *layer.size, inputs)).astype(np.float64)
        x[random.random(x.shape) < 0.05] = 0
        x[random.random(x.shape) < 0.05] = 255
    elif layer.integers:
        weight = random.integers(-8, 9, shape).astype(np.float64)
        x = random.integers(-8, 9, (layer.batch, *layer.size, inputs)).astype(np.float64)
    else:
        weight = numbers(bits(random.normal(size=shape), layer.kind), layer.kind).astype(np.float64)
        x = random.normal(size=(layer.batch, *layer.size, inputs))
        x = numbers(bits(x, layer.kind), layer.kind).astype(np.float64)
    if layer.two_four:
        weight = weight.reshape(outputs, taps, -1, 4)
        order = random.random(weight.shape).argsort(-1)
        keep = order < random.integers(0, 3, (*weight.shape[:3], 1))  # none, one or two of four
        weight = (weight * keep).reshape(shape)
    keep = random.random((-(-outputs // bo), taps, -(-inputs // bk))) < layer.density
    if layer.staircase:
        keep = np.arange(keep[0].size).reshape(keep.shape[1:]) <= np.arange(len(keep))[:, None, None]
    weight *= keep.repeat(bo, 0)[:outputs].repeat(bk, 2)[:, :, :inputs]
    weight[list(layer.dead_channels)] = 0
    scale = np.float32(2.0) ** random.integers(-6, -2, outputs).astype(np.float32)
    if not layer.integers:
        scale = random.uniform(0.5, 2, outputs).astype(np.float32)
    bias = random.integers(-50, 50, outputs).astype(np.float32)
    order = list(range(taps))
    if layer.transposed:
        order = formats.tap_order(layer.kernel, layer.stride, layer.padding, layer.dilation)
    view = torch.from_numpy(weight[:, order].astype(np.float32))
    pack = formats.pack_two_four if layer.two_four else formats.pack
    packed = pack(view, TORCH[layer.kind], layer.block, torch.from_numpy(scale), torch.from_numpy(bias))
    residual = None
    if layer.residual:
        residual = random.integers(0, 200, (layer.batch, *layer.out_size, outputs)).astype(np.float64)
    zero = layer.x_zero if layer.kind == "u8" else 0
    return Data(weight, x - zero, residual, scale, bias, packed, order)


def sums(layer: Layer, data: Data) -> np.ndarray:
    """[N, P, Q, O] float64: the convolution by its definition, exact for integers."""
    (h, w), (p, q) = layer.size, layer.out_size
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation
    total = np.zeros((layer.batch, p, q, layer.channels[1]))
    for tap in range(layer.kernel[0] * layer.kernel[1]):
        ky, kx = divmod(tap, layer.kernel[1])
        # without BLAS, whose threads wait for each other for longer than this takes
        product = np.einsum("nhwc,oc->nhwo", data.x, data.weight[:, tap])
        for i in range(h if layer.transposed else p):
            for j in range(w if layer.transposed else q):
                near = i * sh + ky * dh - ph, j * sw + kx * dw - pw
                if layer.transposed and 0 <= near[0] < p and 0 <= near[1] < q:
                    total[:, *near] += product[:, i, j]
                elif not layer.transposed and 0 <= near[0] < h and 0 <= near[1] < w:
                    total[:, i, j] += product[:, *near]
    return total


def activate(v: np.ndarray, name: str, slope: float) -> np.ndarray:
    if name == "kGelu":
        return torch.nn.functional.gelu(torch.from_numpy(v)).numpy()
    with np.errstate(over="ignore"):
        return {
            "kNone": lambda: v,
            "kRelu": lambda: np.maximum(v, 0),
            "kLeakyRelu": lambda: np.where(v > 0, v, v * np.float32(slope)),
            "kTanh": lambda: np.tanh(v),
            "kSigmoid": lambda: 1 / (1 + np.exp(-v)),
            "kSilu": lambda: v / (1 + np.exp(-v)),
        }[name]()


def expected(layer: Layer, data: Data) -> np.ndarray:
    """[N, P, Q, O] float64 before rounding to the type of y, u8 without its zero point and limits."""
    v = sums(layer, data).astype(np.float32).astype(np.float64) if layer.integers else sums(layer, data)
    v = activate(v * data.scale.astype(np.float64) + data.bias, layer.act, layer.slope)
    if data.residual is not None:
        # u8 residuals have scale 1/2 and zero point 5
        v = v + ((data.residual - 5) / 2 if layer.residual == "u8" else data.residual)
    return activate(v, layer.post_act, layer.slope)


def rounded(layer: Layer, v: np.ndarray) -> np.ndarray:
    """Numbers that y holds of exact v."""
    if layer.y == "u8":
        steps = np.rint(v.astype(np.float32) * np.float32(1 / layer.y_scale))
        return np.clip(steps + layer.y_zero, 0, 255)
    return numbers(bits(v, layer.y), layer.y).astype(np.float64)


def fields(layer: Layer, data: Data, device: Device) -> dict:
    """Fields of a GatherGemm, everything on the device."""
    memory, packed = device.memory, data.packed
    inputs, outputs = layer.channels
    bo, bk = layer.block
    width = -(-inputs // bk)
    zero = layer.x_zero if layer.kind == "u8" else 0
    place = memory.put
    # what lies beyond the channels may be anything that is finite
    pitch = (width + layer.x_extra) * bk
    x = np.full((layer.batch, *layer.size, pitch), 99.0)
    x[..., :inputs] = data.x + zero
    pad = np.full(bk, float(zero))
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation
    dy, dx, phases = [], [], []
    p, q = layer.out_size
    phase_of = [0] * len(data.taps)
    if layer.transposed:
        raster = formats.tap_phases(layer.kernel, layer.stride, layer.padding, layer.dilation)
        phase_of = [raster[tap] for tap in data.taps]
    for tap, phase in zip(data.taps, phase_of, strict=True):
        ky, kx = divmod(tap, layer.kernel[1])
        if layer.transposed:
            y0, x0 = divmod(phase, sw)
            dy.append((y0 + ph - ky * dh) // sh)
            dx.append((x0 + pw - kx * dw) // sw)
        else:
            dy.append(ky * dh - ph)
            dx.append(kx * dw - pw)
    make_phase = device.library.structs["Phase"]
    count = sh * sw if layer.transposed else 1
    for number in range(count):
        members = [i for i, phase in enumerate(phase_of) if phase == number]
        begin = members[0] if members else 0
        y0, x0 = divmod(number, sw) if layer.transposed else (0, 0)
        step = (sh, sw) if layer.transposed else (1, 1)
        size = max(0, -(-(p - y0) // step[0])), max(0, -(-(q - x0) // step[1]))
        phases.append(make_phase(begin, begin + len(members), y0, x0, *size))
    call = {
        "x": place(bits(x, layer.kind), "x"),
        "batch": layer.batch,
        "height": layer.size[0],
        "width": layer.size[1],
        "x_stride": pitch,
        "pad": place(bits(pad, layer.kind), "pad"),
        "weight_type": device.library.numbers[f"Type::{TYPES[layer.kind]}"],
        "block_o": bo,
        "block_k": bk,
        "values": place(_array(packed.values), "values"),
        "cols": place(_array(packed.cols), "cols"),
        "tap_ptr": place(_array(packed.tap_ptr), "tap_ptr"),
        "row_channels": place(_array(packed.row_channels), "row_channels"),
        "rows": packed.rows,
        "taps": packed.taps,
        "in_blocks": width,
        "blocks": len(packed.cols),
        "out_channels": outputs,
        "dy": dy,
        "dx": dx,
        "phases": phases,
        "phase_count": count,
        "out_height": p,
        "out_width": q,
        "scale": place(data.scale, "scale"),
        "bias": place(data.bias, "bias"),
        "act": device.library.numbers[f"Activation::{layer.act}"],
        "post_act": device.library.numbers[f"Activation::{layer.post_act}"],
        "slope": layer.slope,
        "post_slope": layer.slope,
        "y": memory.empty(
            (layer.batch, p, q, outputs + layer.y_extra), bits(np.zeros(1), layer.y).dtype, "y"
        ),
        "y_type": device.library.numbers[f"Type::{TYPES[layer.y]}"],
        "y_stride": outputs + layer.y_extra,
        "y_inverse_scale": float(np.float32(1 / layer.y_scale)),
        "y_zero": layer.y_zero,
    }
    steps = dict(
        zip(
            ("out_step_h", "out_step_w") if layer.transposed else ("in_step_h", "in_step_w"),
            (sh, sw),
            strict=True,
        )
    )
    call |= steps
    if packed.metadata is not None:
        call["metadata"] = place(_array(packed.metadata), "metadata")
    if layer.kind == "u8":
        # the zero point times the weights of the taps of each phase
        by_phase = np.zeros((count, outputs))
        for tap, phase in zip(data.taps, phase_of, strict=True):
            by_phase[phase] += zero * data.weight[:, tap].sum(1)
        call["zero_sums"] = place(by_phase.astype(np.int32), "zero_sums")
    if data.residual is not None:
        whole = np.full((*data.residual.shape[:3], outputs + layer.residual_extra), 77.0)
        whole[..., :outputs] = data.residual
        call |= {
            "residual": place(bits(whole, layer.residual), "residual"),
            "residual_type": device.library.numbers[f"Type::{TYPES[layer.residual]}"],
            "residual_stride": outputs + layer.residual_extra,
            "residual_scale": 0.5,
            "residual_zero": 5,
        }
    return call


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (
        tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def run(layer: Layer, device: Device) -> tuple[np.ndarray, np.ndarray]:
    """(what the kernel stored, what it should have), as numbers. Raises PtxError for a kernel's mistake."""
    data = make(layer)
    call = fields(layer, data, device)
    if layer.split:
        # the workspace's size depends on everything else
        size = device.library.host.gather_gemm_bytes
        size.restype = np.ctypeslib.ctypes.c_int64
        wanted = size(np.ctypeslib.ctypes.byref(device.struct("GatherGemm", **call)), layer.multiprocessors)
        assert wanted > 0, "this call is not split"
        call |= {
            "workspace": device.memory.empty(wanted // 4, np.int32, "workspace"),
            "workspace_bytes": wanted,
        }
    answer = device.call("run_gather_gemm", device.struct("GatherGemm", **call), layer.multiprocessors)
    assert answer is None, answer
    outputs = layer.channels[1]
    written = device.memory.written(call["y"])
    assert written[..., :outputs].all(), "some of y was not written"
    assert not written[..., outputs:].any(), "channels beyond the layer's were written"
    y = numbers(np.ascontiguousarray(call["y"][..., :outputs]), layer.y).astype(np.float64)
    return y, rounded(layer, expected(layer, data))
