"""Calls of the Triton ops with exact results, for whatever runs the kernels: Triton's interpreter or that of ptx/.

Everything is small whole numbers, so that sums are exact in any order and number format.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from op_cases import activate, blocked_view, dense_op, inputs, positions
from torch import Tensor

from sparsegan.formats import PackedWeight, pack
from sparsegan.ops import cuda
from sparsegan.ops.cuda import Map, Numbers

KERNELS = Path(__file__).parent.parent / "sparsegan" / "triton_kernels"


@dataclass(frozen=True)
class Case:
    """A gather-GEMM. pruned: output channels without weights, so that the others move together."""

    kind: str = "conv2d"
    size: tuple[int, ...] = (2, 40, 7, 9)
    outputs: int = 24
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: torch.dtype = torch.int8
    block: tuple[int, int] = (16, 32)
    density: float = 0.5
    pruned: tuple[int, ...] = ()
    zero: int = 77
    out: torch.dtype = torch.float32
    residual: torch.dtype | None = None
    activation: str = "leaky_relu"
    post_activation: str = "none"
    seed: int = 0

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        names = ("kernel_size", "stride", "padding", "dilation")
        names += ("output_padding",) if self.kind == "conv_transpose2d" else ()
        return {name: getattr(self, name) for name in names}

    @property
    def x(self) -> Tensor:
        return inputs(self.size, self.seed, True)

    @property
    def view(self) -> Tensor:
        o, t, c = self.outputs, math.prod(self.kernel_size), self.size[1]
        view = blocked_view(o, t, c, 1.0, self.seed, True)
        bo, bk = self.block
        keep = (
            torch.rand(-(-o // bo), t, -(-c // bk), generator=torch.Generator().manual_seed(self.seed))
            < self.density
        )
        view *= keep.repeat_interleave(bo, 0)[:o].repeat_interleave(bk, 2)[:, :, :c]
        view[list(self.pruned)] = 0
        return view

    @property
    def packed(self) -> PackedWeight:
        bias = inputs((self.outputs,), 7, True)
        packed = pack(positions(self.kind, self.view, self.geometry), self.dtype, self.block, bias=bias)
        zero = self.zero if self.dtype == torch.int8 else 0
        return cuda.validated(packed, cuda.phase_taps(self.kind, self.geometry), zero)  # type: ignore[arg-type]

    @property
    def x_numbers(self) -> Numbers:
        return Numbers(torch.uint8, 1.0, self.zero) if self.dtype == torch.int8 else Numbers(self.dtype)

    @property
    def numbers(self) -> Numbers:
        return Numbers(self.out, 2.0, 50) if self.out == torch.uint8 else Numbers(self.out)

    def packed_x(self) -> Map:
        """x as the kernel reads it, made without one."""
        return as_map(self.x, self.x_numbers)

    def added(self) -> tuple[Tensor, Map] | None:
        """(values, map) of the residual."""
        if self.residual is None:
            return None
        values = inputs(tuple(self.sums().shape), 9, True)
        numbers = Numbers(self.residual, 0.5, 60) if self.residual == torch.uint8 else Numbers(self.residual)
        return values, as_map(values, numbers)

    def sums(self) -> Tensor:
        return (
            dense_op(self.kind, self.x.double(), self.view, self.geometry)
            + inputs((self.outputs,), 7, True)[:, None, None]
        )

    def wanted(self) -> Tensor:
        y = activate(self.sums(), self.activation, 0.5)
        if added := self.added():
            y = y + added[0]
        y = activate(y, self.post_activation, 0.25)
        if self.out != torch.uint8:
            return y.to(self.out).double()
        return ((torch.round(y.float() * 0.5) + 50).clamp(0, 255).double() - 50) * 2

    def run(self, library: object) -> Map:
        added = self.added()
        return cuda.gather_gemm(
            self.packed_x(),
            self.packed,
            self.kind,  # type: ignore[arg-type]
            self.geometry,
            self.numbers,
            activation=self.activation,
            slope=0.5,
            residual=added[1] if added else None,
            post_activation=self.post_activation,
            post_slope=0.25,
            library=library,
        )


def as_map(x: Tensor, numbers: Numbers) -> Map:
    """x [N, C, H, W] as a map, with other finite numbers in the channels that x lacks."""
    n, c, h, w = x.shape
    data = torch.full((n, h, w, numbers.pitch(c)), 3.0, dtype=torch.float64)
    data[..., :c] = x.double().permute(0, 2, 3, 1)
    if numbers.dtype == torch.uint8:
        data = (data / numbers.scale).round() + numbers.zero
    return Map(data.to(numbers.dtype), c, numbers.scale, numbers.zero)


BASE = Case()
UP = Case("conv_transpose2d", kernel_size=(4, 4), stride=(2, 2), size=(2, 40, 5, 7))
ONE = replace(BASE, kernel_size=(1, 1), padding=(0, 0))
LAYERS = {
    "3x3": BASE,
    "linear": replace(ONE, size=(70, 40, 1, 1)),
    "1x1": replace(ONE, size=(3, 40, 9, 9)),
    "stride": replace(BASE, stride=(2, 3), kernel_size=(4, 5), size=(1, 40, 12, 15), padding=(1, 2)),
    "stride beyond the kernel": replace(
        BASE, stride=(5, 6), kernel_size=(2, 2), padding=(0, 0), size=(1, 40, 20, 21)
    ),
    "dilation": replace(BASE, dilation=(2, 3), padding=(2, 3)),
    "wide border": replace(BASE, kernel_size=(2, 2), padding=(2, 2), dilation=(3, 3), size=(2, 40, 1, 1)),
    "7x7 to an image": replace(BASE, kernel_size=(7, 7), padding=(3, 3), outputs=3, density=0.2),
    "no blocks": replace(BASE, density=0.0),
    "all blocks": replace(BASE, density=1.0, size=(1, 64, 5, 5)),
    "pruned channels": replace(BASE, pruned=(0, 3, 4, 9, 20), outputs=40),
    "transposed": UP,
    "transposed, channels pruned": replace(UP, pruned=(0, 3, 4, 9, 20), outputs=40),
    "transposed from a pixel": replace(UP, size=(3, 40, 1, 1), stride=(1, 1), padding=(0, 0)),
    "transposed 5x5": replace(
        UP, kernel_size=(5, 5), padding=(2, 2), output_padding=(1, 1), size=(1, 40, 4, 5)
    ),
    "transposed 3x5": replace(
        UP, kernel_size=(3, 5), stride=(3, 2), padding=(0, 1), output_padding=(2, 0), size=(1, 40, 3, 6)
    ),
    "transposed 2x2, phases without taps": replace(
        UP, kernel_size=(2, 2), stride=(3, 3), padding=(0, 0), size=(1, 40, 4, 5)
    ),
    "transposed with dilation": replace(
        UP, kernel_size=(3, 3), dilation=(2, 3), padding=(2, 2), size=(1, 40, 5, 6)
    ),
}
EPILOGUES = {
    "u8": replace(BASE, out=torch.uint8),
    "u8 with a u8 residual": replace(BASE, out=torch.uint8, residual=torch.uint8, post_activation="relu"),
    "f16 with a bf16 residual": replace(BASE, out=torch.float16, residual=torch.bfloat16, activation="none"),
    "bf16 with an f32 residual": replace(
        BASE, out=torch.bfloat16, residual=torch.float32, post_activation="leaky_relu"
    ),
    "u8 and pruned channels": replace(
        BASE, out=torch.uint8, residual=torch.float16, pruned=(1, 2, 17), outputs=40
    ),
    "transposed to u8": replace(UP, out=torch.uint8, residual=torch.uint8, activation="relu"),
}
BLOCKS = {
    torch.int8: [(16, 32), (32, 32), (64, 32)],
    torch.float16: [(16, 16), (32, 32), (64, 16)],
    torch.bfloat16: [(16, 16), (32, 32), (64, 16)],
}
DENSE = list(
    itertools.chain.from_iterable([(dtype, block) for block in blocks] for dtype, blocks in BLOCKS.items())
)


@dataclass(frozen=True)
class Bug:
    """A change of a kernel's source that makes it wrong. case: a call in which it shows.

    ptx: what the PTX interpreter says of it, or "wrong result"; interpreted: whether Triton's interpreter gives a wrong result.
    """

    file: str
    old: str
    new: str
    case: Case
    ptx: str
    interpreted: bool


BUGS = {
    # Rows beyond the last pixel are read, and thrown away: no result shows it.
    "missing mask of the last pixels": Bug(
        "gather_gemm.py",
        "inside = real_m\n",
        "inside = real_m | (in_y >= in_y)\n",
        LAYERS["1x1"],
        "out of bounds.*read",
        False,
    ),
    "missing mask of the border": Bug(
        "gather_gemm.py",
        "inside = (inside_bits & (1 << (ky * KERNEL_W + kx))) != 0",
        "inside = in_x == in_x",
        replace(BASE, size=(1, 40, 7, 9)),
        "out of bounds.*read",
        True,
    ),
    "missing mask of the store": Bug(
        "gather_gemm.py",
        "real_m[:, None] & (offs_c < y_stride)[None, :]",
        "(offs_m >= 0)[:, None] & (offs_c < y_stride)[None, :]",
        LAYERS["1x1"],
        "out of bounds.*written",
        False,
    ),
    "wrong stride of the input": Bug(
        "gather_gemm.py",
        "* x_stride + channel\n",
        "* (x_stride - 16) + channel\n",
        BASE,
        "out of bounds.*read|wrong result",
        True,
    ),
    "wrong stride of the output": Bug(
        "gather_gemm.py",
        "out_pixel[:, None] * y_stride + offs_c",
        "out_pixel[:, None] * (y_stride - 1) + offs_c",
        BASE,
        "a race|wrong result",
        True,
    ),
    "wrong phase": Bug(
        "gather_gemm.py",
        "axis_taps(first_y, KERNEL_H",
        "axis_taps(first_x, KERNEL_H",
        UP,
        "wrong result",
        True,
    ),
    "taps in the wrong direction": Bug(
        "gather_gemm.py", "-(PERIOD_W * DILATION_W", "(PERIOD_W * DILATION_W", UP, "wrong result", True
    ),
    "a block too many": Bug(
        "gather_gemm.py",
        "mask=b + 1 < end, other=0)  # [BLOCK_O",
        "mask=b < end, other=0)  # [BLOCK_O",
        replace(
            BASE,
            size=(1, 33, 5, 5),
            kernel_size=(1, 1),
            padding=(0, 0),
            density=1.0,
            outputs=16,
            block=(16, 64),
        ),
        "out of bounds.*read",
        False,
    ),
    "stale pointer": Bug(
        "gather_gemm.py", "w_ptrs += 2 * BLOCK_O * BLOCK_K", "w_ptrs += 0", BASE, "wrong result", True
    ),
    "stale column": Bug(
        "gather_gemm.py",
        "col = tl.load(cols_ptr + b + 2, mask=b + 2 < end",
        "col = tl.load(cols_ptr + b, mask=b < end",
        BASE,
        "wrong result",
        True,
    ),
    "zero point left in": Bug("gather_gemm.py", "(z - 128) *", "(z - 127) *", BASE, "wrong result", True),
    "sign of the activations": Bug("gather_gemm.py", "(x ^ 128)", "(x ^ 0)", BASE, "wrong result", True),
}


def broken(bug: Bug, folder: Path) -> ModuleType:
    """The kernels' module with the bug in it."""
    text = (KERNELS / bug.file).read_text()
    assert text.count(bug.old) >= 1, f"{bug.old!r} is not in {bug.file}"
    path = folder / "broken.py"
    path.write_text(text.replace(bug.old, bug.new).replace("from .", "from sparsegan.triton_kernels."))
    spec = importlib.util.spec_from_file_location(f"broken_{folder.name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
