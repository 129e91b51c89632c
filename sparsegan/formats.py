"""The packed weight: the blocks of a layer's weight that are not all zero, in the order kernels read them.

    view [O, T, C]                          packed rows of BO output channels
       C (input channels)                   row 0: | tap 0: block, block | tap 1: block | ...
     +----+----+----+                       row 1: | tap 0:              | tap 1: block | ...
   O | ██ |    | ██ |  at each of T taps    ...
     +----+----+----+                       cols:    where in [T, ceil(C/BK)] each block lies
     |    |    |    |                       tap_ptr: where in the list of blocks each (row, tap) begins

One layout serves linear layers (T = 1), convolutions and transposed convolutions: a kernel walks the blocks
of a row, turns each column into the address of an input block and multiplies. `csrc/packed.h` is the same
description for C++.

Tap *positions* are raster positions (ky * kw + kx), except for a transposed convolution, where `tap_order`
sorts the taps by the output phase they feed, so that the blocks of one (row, phase) are one contiguous range.

The layout is our own (a block CSR with one pointer a tap).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32)

# Blocks (BO, BK) that the kernels of a device are compiled for, with the share of their peak that each reaches.
# CPU: lower blocks reuse every loaded input vector fewer times; BK is 4 because a 32-bit lane holds four int8 input channels.
# CUDA: BK is one slice of a tensor core's sum or two; lower blocks reuse every gathered input fewer times (predicted from the
# bytes a multiply-add, never measured).
_CPU = {(4, 4): 0.85, (8, 4): 1.0}
_CUDA_HALF = {(16, 16): 0.5, (32, 32): 0.8, (64, 16): 1.0}
BLOCKS: dict[str, dict[torch.dtype, dict[tuple[int, int], float]]] = {
    "cpu": dict.fromkeys(DTYPES, _CPU),
    "cuda": {
        torch.int8: {(16, 32): 0.5, (32, 32): 0.8, (64, 32): 1.0},
        torch.float16: _CUDA_HALF,
        torch.bfloat16: _CUDA_HALF,
    },
}
# The same for 2:4 weights, on CUDA; BK counts the zeros too.
TWO_FOUR_BLOCKS: dict[torch.dtype, dict[tuple[int, int], float]] = {
    torch.int8: {(32, 64): 0.8, (64, 64): 1.0},
    torch.float16: {(32, 32): 0.8, (64, 32): 1.0},
    torch.bfloat16: {(32, 32): 0.8, (64, 32): 1.0},
}

# An int32 accumulator holds this many u8 x s8 products: 255 * 128 * 65536 < 2**31.
MAX_INT8_PRODUCTS = 65536

MAX_FOUR_BITS = 7  # symmetric, as -127..127 is: without -8

# In the order of csrc/packed.h.
ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu")

FIELDS = ("values", "cols", "tap_ptr", "row_channels", "tap_sums", "scale", "bias")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Kept blocks of a weight [O, T, C] with its epilogue.

    y = act((sum of q * w over the taps used - x_zero * their tap_sums) * scale + bias), where q are the input
    values, for int8 as u8 with zero point x_zero, and act is the activation of the layer.

    values:       [B, BO, BK] int8, bfloat16 or float32: kept blocks row by row, in a row sorted by column.
    cols:         int32 [B], tap position * ceil(C / BK) + input block; C counts all groups' inputs.
    tap_ptr:      int32 [rows * T + 1]; the blocks of row r at tap position t are
                  tap_ptr[r * T + t] .. tap_ptr[r * T + t + 1].
    row_channels: int32 [rows * BO], the output channel that each packed row computes; -1 pads the last row.
                  Every output channel appears exactly once, those without any block too.
    tap_sums:     int32 [O, T], int8 only (else zeros): sum of the weights over the input channels at each tap
                  position. The zero point is not folded into the bias, because each output phase of a
                  transposed convolution sums other taps.
    scale:        float32 [O], weight scale times input scale; 1 unless values are int8.
    bias:         float32 [O].
    metadata:     int32 [B, BO * BK / 32], of a 2:4 weight only (`pack_two_four`), whose values are [B, BO, BK / 2].
    constants:    (zero_sums, pad), what the CUDA kernels derive from the rest; made and explained by
                  `ops.cuda.validated`.
    """

    values: Tensor
    cols: Tensor
    tap_ptr: Tensor
    row_channels: Tensor
    tap_sums: Tensor
    scale: Tensor
    bias: Tensor
    in_channels: int
    taps: int
    metadata: Tensor | None = None
    constants: tuple[Tensor, ...] = ()

    @property
    def out_channels(self) -> int:
        return self.scale.shape[0]

    @property
    def block(self) -> tuple[int, int]:
        """(BO, BK)"""
        return self.values.shape[1], self.values.shape[2] * (1 if self.metadata is None else 2)

    @property
    def rows(self) -> int:
        return self.row_channels.shape[0] // self.values.shape[1]

    def tensors(self) -> list[Tensor]:
        """The tensors in the order in which the ops take them: `FIELDS`, metadata, constants. See `from_tensors`."""
        return [*as_dict(self).values(), *self.constants]

    def clone(self) -> PackedWeight:
        """The same weight in memory of its own."""
        return from_tensors([tensor.clone() for tensor in self.tensors()], self.in_channels, self.taps)

    def to(self, device: str | torch.device) -> PackedWeight:
        """The same weight on another device."""
        return from_tensors([tensor.to(device) for tensor in self.tensors()], self.in_channels, self.taps)


def blocks_for(device: str | torch.device, dtype: torch.dtype) -> dict[tuple[int, int], float]:
    """Blocks of the kernels that compute with `dtype` weights on `device`, see `BLOCKS`; empty where there are none."""
    return BLOCKS.get(torch.device(device).type, {}).get(dtype, {})


def tap_phases(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> list[int]:
    """Output phase that each tap of a transposed convolution feeds, in raster order of the taps.

    Input pixel i and tap k meet at output pixel i * stride - padding + k * dilation, so a tap always feeds
    the same residue of the coordinate modulo the stride: its phase, numbered (y mod sh) * sw + (x mod sw).
    """
    kh, kw = kernel
    return [
        ((ky * dilation[0] - padding[0]) % stride[0]) * stride[1]
        + (kx * dilation[1] - padding[1]) % stride[1]
        for ky in range(kh)
        for kx in range(kw)
    ]


def tap_order(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> list[int]:
    """Raster indices of a transposed convolution's taps in packed order: by phase, then in raster order."""
    phases = tap_phases(kernel, stride, padding, dilation)
    return sorted(range(len(phases)), key=phases.__getitem__)  # sorted() is stable


def pack(
    view: Tensor,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
    device: str = "cpu",
) -> PackedWeight:
    """Keep the blocks of a weight that are not all zero.

    view:   [O, T, C / groups], taps in position order; for int8 the integer values themselves.
    dtype:  number format of the packed values, one of `DTYPES`.
    block:  (BO, BK); None takes the one of `BLOCKS` that costs the kernels of `device` least.
    scale:  [O], default ones. bias: [O], default zeros.
    groups: a grouped weight becomes the block-diagonal [O, T, C]; the absent blocks cost nothing.
    device: "cpu" or "cuda"; whose blocks to choose from. The packed weight lies on the CPU in either case.

    Raises ValueError for a view that is not 3-d or is empty, NaN or infinite weights, values that int8 cannot
    hold, and sizes that overflow the 32-bit indices or the int32 accumulator of the kernels.
    """
    if view.dim() != 3 or 0 in view.shape:
        raise ValueError(
            f"view must be a weight [O, T, C] with at least one element, got {tuple(view.shape)}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise ValueError(f"block must be two positive numbers (output channels, input channels), got {block}")
    out_channels, taps, group_inputs = view.shape
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups must divide the {out_channels} output channels, got {groups}")
    in_channels = group_inputs * groups
    sizes = blocks_for(device, dtype) if block is None else {(block[0], block[1]): 1.0}
    if not sizes:
        raise ValueError(f"there are no {device} kernels for {dtype} weights")
    for bo, bk in sizes:
        if -(-out_channels // bo) * taps * -(-in_channels // bk) >= 2**31:
            shape = [out_channels, taps, in_channels]
            raise ValueError(f"a weight {shape} has more {bo}x{bk} blocks than 32 bits can number")
    _check_weights(view, dtype)

    # Working with the list of non-zero weights makes groups, ragged channels and moved channels plain index
    # arithmetic. The weights are rounded first: what rounds to zero needs no block.
    weights = view.detach().to("cpu").to(dtype)
    o, t, c = weights.nonzero(as_tuple=True)
    nonzero = weights[o, t, c]
    c = c + o // (out_channels // groups) * group_inputs

    # Channels without any weight go last, so that a layer pruned by channels has whole rows without blocks.
    # Where that would tear apart blocks that were pruned together, they stay in place.
    alive = torch.zeros(out_channels, dtype=torch.bool)
    alive[o] = True
    in_place = torch.arange(out_channels)
    orders = [in_place] if alive.all() else [torch.cat([in_place[alive], in_place[~alive]]), in_place]
    layouts = []
    for bo, bk in sizes:
        width = -(-in_channels // bk)
        held = torch.zeros(out_channels, taps * width, dtype=torch.bool)
        held[o, t * width + c // bk] = True
        layouts += [((bo, bk), order, _rows(held, order, bo)) for order in orders]
    (bo, bk), order, cells = min(
        layouts, key=lambda layout: layout[2].sum().item() * math.prod(layout[0]) / sizes[layout[0]]
    )
    width = -(-in_channels // bk)
    column = t * width + c // bk

    row, col = cells.nonzero(as_tuple=True)
    blocks = row.shape[0]
    number = torch.empty(cells.shape, dtype=torch.int64)
    number[row, col] = torch.arange(blocks)
    place = torch.empty_like(order)
    place[order] = in_place
    slot = place[o]
    values = torch.zeros(blocks, bo, bk, dtype=dtype)
    values[number[slot // bo, column], slot % bo, c % bk] = nonzero

    tap_ptr = torch.zeros(cells.shape[0] * taps + 1, dtype=torch.int32)
    tap_ptr[1:] = cells.view(-1, width).sum(1).cumsum(0)
    row_channels = torch.full((cells.shape[0] * bo,), -1, dtype=torch.int32)
    row_channels[:out_channels] = order
    tap_sums = torch.zeros(out_channels, taps, dtype=torch.int32)
    if dtype == torch.int8:
        tap_sums = weights.sum(2, dtype=torch.int32)
    packed = PackedWeight(
        values=values,
        cols=col.to(torch.int32),
        tap_ptr=tap_ptr,
        row_channels=row_channels,
        tap_sums=tap_sums,
        scale=torch.ones(out_channels) if scale is None else _float(scale),
        bias=torch.zeros(out_channels) if bias is None else _float(bias),
        in_channels=in_channels,
        taps=taps,
    )
    if packed.out_channels != out_channels:
        raise ValueError(f"scale must hold {out_channels} numbers, got shape {tuple(packed.scale.shape)}")
    validate(packed)
    return packed


def pack_two_four(
    view: Tensor,
    dtype: torch.dtype = torch.int8,
    block: tuple[int, int] | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
) -> PackedWeight:
    """As `pack`, for a weight with at most 2 non-zeros in every 4 consecutive input channels: half the values are left out.

    Of each run of 4, two values are kept, lower channel first, and their places in the run, 0..3, as two bits each in
    `metadata`, in the order in which tensor cores take them (csrc/cuda/launch.h). Blocks of zeros are left out as ever.
    block: one of `TWO_FOUR_BLOCKS`; None takes the cheapest.

    Raises ValueError for what `pack` refuses, other blocks and number formats, and a weight that is not 2:4.
    """
    sizes = TWO_FOUR_BLOCKS.get(dtype, {})
    if not sizes or (block is not None and tuple(block) not in sizes):
        wanted = ", ".join(f"{t} {bo}x{bk}" for t, known in TWO_FOUR_BLOCKS.items() for bo, bk in known)
        came = f"{dtype} blocks of {block[0]}x{block[1]}" if block else f"{dtype} blocks"
        raise ValueError(f"there are no 2:4 kernels for {came}; there are for {wanted}")
    packs = [pack(view, dtype, size, scale, bias, groups) for size in ([block] if block else sizes)]
    best = min(packs, key=lambda packed: packed.values.numel() / sizes[packed.block])
    runs = best.values.unflatten(2, (-1, 4))
    if bool(((runs != 0).sum(-1) > 2).any()):
        raise ValueError("the weight is not 2:4: 4 consecutive input channels hold more than 2 non-zeros")
    # The non-zeros first, then zeros, so that two different places always come out.
    places = (runs == 0).byte().argsort(dim=-1, stable=True)[..., :2].sort(dim=-1).values
    values = runs.gather(-1, places).flatten(2)
    packed = replace(best, values=values, metadata=_metadata(places.flatten(2), dtype))
    validate(packed)
    return packed


def _metadata(places: Tensor, dtype: torch.dtype) -> Tensor:
    """Places [B, BO, kept] in 0..3 as int32 words [B, BO * kept / 16], ordered for mma.sp; see csrc/cuda/launch.h."""
    fields = 16 if dtype == torch.int8 else 8  # of one row in a word
    shape = (len(places), places.shape[1] // 16, 2, 8, 2, fields)  # [B, tile, row / 8, row % 8, half, field]
    words = (
        places.view(shape)
        .permute(0, 1, 3, 4, 2, 5)
        .reshape(len(places), places.shape[1] * places.shape[2] // 16, 16)
    )
    shifted = words.long() << (2 * torch.arange(16, device=places.device))
    return shifted.sum(-1).to(torch.int32)  # wraps: bit 31 becomes the sign


def _places(packed: PackedWeight) -> Tensor:
    """The inverse of `_metadata`: int64 [B, BO, kept]."""
    assert packed.metadata is not None
    blocks, bo, kept = packed.values.shape
    fields = 16 if packed.values.dtype == torch.int8 else 8
    bits = packed.metadata.long()[..., None] >> (2 * torch.arange(16, device=packed.metadata.device)) & 3
    return bits.view(blocks, bo // 16, 8, 2, 2, fields).permute(0, 1, 4, 2, 3, 5).reshape(blocks, bo, kept)


def _whole_values(packed: PackedWeight) -> Tensor:
    """values [B, BO, BK], those that a 2:4 weight leaves out as zeros."""
    if packed.metadata is None:
        return packed.values
    kept = packed.values.unflatten(2, (-1, 2))
    runs = kept.new_zeros(*kept.shape[:3], 4)
    return runs.scatter_(-1, _places(packed).view(kept.shape), kept).flatten(2)


def repack(packed: PackedWeight, block: tuple[int, int] | None = None, device: str = "cpu") -> PackedWeight:
    """The same weight in other blocks, on the CPU. Arguments and errors: see `pack`."""
    view, scale, bias = (t.cpu() for t in (unpack(packed), packed.scale, packed.bias))
    return pack(view, packed.values.dtype, block, scale, bias, device=device)


def unpack(packed: PackedWeight) -> Tensor:
    """The dense weight [O, T, C] that `packed` holds, groups expanded, taps in position order."""
    bo, bk = packed.block
    width = -(-packed.in_channels // bk)
    per_row = packed.tap_ptr[:: packed.taps].diff().long()
    row = torch.arange(packed.rows, device=per_row.device).repeat_interleave(per_row)
    grid = packed.values.new_zeros(packed.rows, packed.taps * width, bo, bk)
    grid[row, packed.cols.long()] = _whole_values(packed)
    dense = grid.view(packed.rows, packed.taps, width, bo, bk).permute(0, 3, 1, 2, 4)
    dense = dense.reshape(packed.rows * bo, packed.taps, width * bk)[..., : packed.in_channels]
    real = packed.row_channels >= 0
    view = dense.new_empty(packed.out_channels, packed.taps, packed.in_channels)
    view[packed.row_channels[real].long()] = dense[real]
    return view


def validate(packed: PackedWeight) -> None:
    """Raise ValueError, naming the field, unless a kernel can run `packed` without leaving its memory."""

    def need(ok: bool | Tensor, field: str, wanted: str) -> None:
        if not ok:
            raise ValueError(f"packed weight: {field} must {wanted}")

    int32, float32 = (torch.int32,), (torch.float32,)
    for field, dims, dtypes in (
        ("values", 3, DTYPES),
        ("cols", 1, int32),
        ("tap_ptr", 1, int32),
        ("row_channels", 1, int32),
        ("tap_sums", 2, int32),
        ("scale", 1, float32),
        ("bias", 1, float32),
    ):
        tensor = getattr(packed, field)
        need(isinstance(tensor, Tensor), field, f"be a tensor, got {type(tensor).__name__}")
        need(tensor.dim() == dims, field, f"have {dims} dimension(s), got shape {tuple(tensor.shape)}")
        need(tensor.dtype in dtypes, field, f"be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        need(tensor.is_contiguous(), field, "be contiguous")
        device = packed.values.device
        need(tensor.device == device, field, f"be on {device} like values, got {tensor.device}")
    for field in ("in_channels", "taps"):
        number = getattr(packed, field)
        need(type(number) is int and 0 < number < 2**31, field, f"be a positive 32-bit int, got {number!r}")

    blocks, (bo, bk) = packed.values.shape[0], packed.block
    channels, taps = packed.out_channels, packed.taps
    need(bo > 0 and bk > 0, "values", f"have blocks of at least one weight, got {bo}x{bk}")
    width = -(-packed.in_channels // bk)
    need(taps * width < 2**31, "taps", f"times input blocks fit in 32 bits, got {taps} x {width}")

    if packed.metadata is not None:
        known = TWO_FOUR_BLOCKS.get(packed.values.dtype, {})
        need((bo, bk) in known, "values", f"be half of one of the 2:4 blocks {[*known]}, got {bo}x{bk}")
        came, words = packed.metadata, (blocks, bo * bk // 32)
        fits = came.dtype == torch.int32 and tuple(came.shape) == words and came.is_contiguous()
        need(fits, "metadata", f"be int32 {words}, contiguous; got {came.dtype} {tuple(came.shape)}")
        need(came.device == packed.values.device, "metadata", f"be on {device}, got {came.device}")
        places = _places(packed).unflatten(2, (-1, 2))
        need((places.diff(dim=-1) > 0).all(), "metadata", "name two places of each run, the lower first")

    slots, bias = packed.row_channels, packed.bias
    need(channels > 0, "scale", "hold at least one output channel")
    wanted = -(-channels // bo) * bo
    need(slots.shape[0] == wanted, "row_channels", f"have {wanted} entries, got {slots.shape[0]}")
    need((slots[:channels] != -1).all(), "row_channels", "have its padding, -1, at the end")
    real = slots[slots != -1].sort().values
    every = torch.arange(channels, dtype=torch.int32, device=real.device)
    need(torch.equal(real, every), "row_channels", f"hold each of 0..{channels - 1} once, and -1 as padding")
    need(bias.shape[0] == channels, "bias", f"have {channels} entries like scale, got {bias.shape[0]}")
    sums = tuple(packed.tap_sums.shape)
    need(sums == (channels, taps), "tap_sums", f"have shape {(channels, taps)}, got {sums}")
    need(packed.scale.isfinite().all(), "scale", "be finite")
    need(bias.isfinite().all(), "bias", "be finite")
    need(packed.values.dtype == torch.int8 or packed.values.isfinite().all(), "values", "be finite")

    cells = packed.rows * taps
    ptr, cols = packed.tap_ptr.long(), packed.cols
    need(ptr.shape[0] == cells + 1, "tap_ptr", f"have {cells + 1} entries, got {ptr.shape[0]}")
    need(ptr[0] == 0 and ptr[-1] == blocks, "tap_ptr", f"run from 0 to the number of blocks, {blocks}")
    counts = ptr.diff()
    need((counts >= 0).all(), "tap_ptr", "never decrease")
    need(cols.shape[0] == blocks, "cols", f"have an entry for each of {blocks} blocks, got {cols.shape[0]}")
    # A column must lie at the tap that tap_ptr says, and columns must rise in a row: no block stands twice.
    cell = torch.arange(cells, device=ptr.device).repeat_interleave(counts)
    need(torch.equal(cols // width, (cell % taps).int()), "cols", "lie at the tap that tap_ptr gives")
    need(((cell // taps * (taps * width) + cols).diff() > 0).all(), "cols", "rise within each row")
    if packed.values.dtype == torch.int8:
        most = int(counts.view(packed.rows, taps).sum(1).max()) * bk
        limit = MAX_INT8_PRODUCTS
        need(most <= limit, "values", f"hold at most {limit} int8 weights an output channel, got {most}")


def nbytes(packed: PackedWeight) -> int:
    """Bytes of all tensors of `packed`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in as_dict(packed).values())


def density(packed: PackedWeight) -> float:
    """Share of the blocks of the full [O, T, C] grid that are held, half of that if 2:4: the executed part of a dense layer."""
    grid = packed.rows * packed.taps * -(-packed.in_channels // packed.block[1])
    return packed.values.shape[0] / grid / (1 if packed.metadata is None else 2)


def as_dict(packed: PackedWeight) -> dict[str, Tensor]:
    """The tensors of `packed` by field name, for saving; constants can be made again."""
    tensors = {field: getattr(packed, field) for field in FIELDS}
    return tensors if packed.metadata is None else {**tensors, "metadata": packed.metadata}


def from_tensors(tensors: Sequence[Tensor], in_channels: int, taps: int) -> PackedWeight:
    """The inverse of `PackedWeight.tensors`: 7 tensors, 8 with metadata, and 2 more with constants."""
    named = dict(zip(FIELDS, tensors, strict=False))
    rest = list(tensors[len(FIELDS) :])
    if len(rest) % 2:
        named["metadata"] = rest.pop(0)
    return replace(_packed(named, in_channels, taps), constants=tuple(rest))


def has_four_bits(packed: PackedWeight) -> bool:
    """Whether these are int8 weights that all lie in -7..7, as `quantize_weight` makes them with 4 bits."""
    return packed.values.numel() > 0 and _fits_four_bits(packed.values)


def narrowed(field: str, tensor: Tensor) -> Tensor:
    """A tensor of `as_dict` as files hold it; see `widened`.

    cols in 16 bits where they fit: 32 would be a fifth of a file of int8 blocks of 16 weights. values of int8 that all lie in
    -7..7 two to a byte, see `pack_nibbles`.
    """
    if field == "cols" and (tensor.numel() == 0 or tensor.max() <= torch.iinfo(torch.int16).max):
        return tensor.to(torch.int16)
    if field == "values" and _fits_four_bits(tensor) and tensor.shape[-1] % 2 == 0:
        return pack_nibbles(tensor)
    return tensor


def widened(field: str, tensor: Tensor) -> Tensor:
    """The inverse of `narrowed`; what is not narrow stays as it is."""
    if field == "cols" and tensor.dtype == torch.int16:
        return tensor.to(torch.int32)
    if field == "values" and tensor.dtype == torch.uint8:
        return unpack_nibbles(tensor)
    return tensor


def _fits_four_bits(values: Tensor) -> bool:
    return values.dtype == torch.int8 and torch.equal(values, values.clamp(-MAX_FOUR_BITS, MAX_FOUR_BITS))


def pack_nibbles(integers: Tensor) -> Tensor:
    """Integers in -7..7, int8 [..., 2k], two to a byte, uint8 [..., k]: the even one in the low 4 bits, in two's complement."""
    low, high = (integers[..., start::2].view(torch.uint8) & 15 for start in (0, 1))
    return low | high << 4


def unpack_nibbles(nibbles: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: int8 [..., 2k]. Raises ValueError for a -8, which it never writes."""
    both = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2)
    integers = both.to(torch.int8)
    integers -= (integers > MAX_FOUR_BITS) * 16
    if bool((integers < -MAX_FOUR_BITS).any()):
        raise ValueError("packed weight: values of 4 bits must lie in -7..7, got -8")
    return integers


def from_dict(tensors: Mapping[str, Tensor], in_channels: int, taps: int) -> PackedWeight:
    """The inverse of `as_dict`, and of `narrowed`. Raises ValueError, naming the field, for what a kernel must not be given."""
    if not set(FIELDS) <= set(tensors) <= {*FIELDS, "metadata"}:
        came = ", ".join(sorted(tensors)) or "none"
        raise ValueError(f"packed weight: wanted the tensors {', '.join(FIELDS)}, got {came}")
    packed = _packed({field: widened(field, t) for field, t in tensors.items()}, in_channels, taps)
    validate(packed)
    return packed


def _packed(tensors: Mapping[str, Tensor], in_channels: int, taps: int) -> PackedWeight:
    metadata = tensors.get("metadata")
    return PackedWeight(*(tensors[field] for field in FIELDS), in_channels, taps, metadata)  # type: ignore[arg-type, call-arg]


def _rows(held: Tensor, order: Tensor, bo: int) -> Tensor:
    """Gather the channels of held [O, columns] in this order into rows of bo: bool [rows, columns]."""
    ragged = held.new_zeros(-held.shape[0] % bo, held.shape[1])
    return torch.cat([held[order], ragged]).view(-1, bo, held.shape[1]).any(1)


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _check_weights(view: Tensor, dtype: torch.dtype) -> None:
    if view.is_floating_point() and not view.isfinite().all():
        raise ValueError("the weight holds NaN or infinite values")
    if dtype == torch.int8 and (view.min() < -128 or view.max() > 127 or bool((view != view.round()).any())):
        raise ValueError(
            "an int8 weight must hold whole numbers in -128..127: quantise it first (quantize_weight)"
        )
