"""Gather-GEMM: block-sparse linear layer, convolution and transposed convolution in one kernel (own).

    y[m, o] = post_act(act((acc[m, o] - zero_sum[o]) * scale[o] + bias[o]) + residual[m, o])
    acc[m, o] = sum over the kept blocks b of x[m moved by the tap of b, input block of b] . w[b, o]

    program (row, phase, tile):  BLOCK_M output pixels of one phase  x  the BLOCK_O channels of one packed row

          BLOCK_K                BLOCK_K                             The kept blocks of the row are one list, and so are the
         +-------+              +-------+                            taps of a phase: one loop over all of them.
         | gather|              |  w[b] | BLOCK_O
 BLOCK_M |  x    |   dot (T)    +-------+    ──>  acc [BLOCK_M, BLOCK_O], s32 or f32
         |       |
         +-------+    every pixel's own address, or `pad` where the tap lies outside the image

Pixels are the rows of the product, for two reasons: wgmma and tcgen05 want at least 64 of them, and their results then lie as
the output does, channels last. Activations are u8, weights s8, but `dot` wants two operands of one type: q ^ 128 is q - 128 as
an s8, one instruction for four values, and sum w (q - 128) = sum w q - 128 sum w is put right with the zero point in the
epilogue. All of it is whole numbers, so int8 results are bit for bit those of the CPU.

Limits: block_o of 16, 32 or 64; block_k of at least 32 int8 or 16 half-precision channels; fewer than 2^31 elements a tensor.
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, which has no types that mypy knows.

import triton
import triton.language as tl

from .elementwise import activate, convert, dequantize


@triton.jit
def axis_taps(residue, K: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """Of one axis of a transposed convolution: the taps that feed output coordinates of this residue modulo the stride.

    They are `first`, first + PERIOD, ... (`count` of them); `below` taps feed smaller residues.
    """
    first = 0
    count = 0
    below = 0
    for back in tl.static_range(K):
        k = K - 1 - back
        fed = (k * DILATION + (PADDING // STRIDE + 1) * STRIDE - PADDING) % STRIDE
        first = tl.where(residue == fed, k, first)
        count += tl.where(residue == fed, 1, 0)
        below += tl.where(residue > fed, 1, 0)
    return first, count, below


@triton.jit
def place(first, offs, height, width):
    """(image, row, column) of pixels first + offs (whole number, vector), numbered through images of height x width.

    One division for all; what is left of it is small enough for float32, whose quotients cannot reach the next whole number
    while coordinates stay below 2^20.
    """
    width = tl.maximum(width, 1)
    height = tl.maximum(height, 1)
    line = first // width
    image = line // height
    x = first - line * width + offs
    lines = ((x.to(tl.float32) + 0.5) * (1.0 / width)).to(tl.int32)
    y = line - image * height + lines
    images = ((y.to(tl.float32) + 0.5) * (1.0 / height)).to(tl.int32)
    return image + images, y - images * height, x - lines * width


@triton.jit
def within(position, step, size):
    """0 <= position + step < size: as unsigned numbers, negative ones are large."""
    return (position + step).to(tl.uint32, bitcast=True) < size


@triton.jit
def spread(channels, ROWS: tl.constexpr):
    """[ROWS, BLOCK_O] of one value a channel."""
    return tl.broadcast_to(channels[None, :], (ROWS, channels.shape[0]))


@triton.jit
def store_tile(v, out_pixel, offs_c, mask, residual_ptr, y_ptr, residual_stride, y_stride, residual_scale, residual_zero,
               post_slope, y_inverse_scale, y_zero, POST_ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """post_act(v + residual) of float32 v [BLOCK_M, BLOCK_O], as y has it."""
    if RESIDUAL:
        held = tl.load(
            residual_ptr + out_pixel[:, None] * residual_stride + offs_c[None, :],
            mask=mask & (offs_c < residual_stride)[None, :],
            other=0,
        )
        v = activate(v + dequantize(held, residual_scale, residual_zero), post_slope, POST_ACTIVATION)
    else:
        v = activate(v, post_slope, POST_ACTIVATION)
    stored = convert(v, y_inverse_scale, y_zero, y_ptr.dtype.element_ty)
    tl.store(y_ptr + out_pixel[:, None] * y_stride + offs_c[None, :], stored, mask=mask)


@triton.jit
def gather(col, x_ptrs, pad_ptrs, inside_bits, in_y, in_x, real_m, tap_begin, height, width, x_stride, columns,
           IN_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, KERNEL_W: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
           BORDER: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """x [BLOCK_M, BLOCK_K] of one block: what its tap meets, or `pad` outside the image."""
    tap = col // IN_BLOCKS
    channel = (col - tap * IN_BLOCKS) * BLOCK_K
    tap -= tap_begin
    ky = tap // columns
    kx = tap - ky * columns
    if not BORDER:
        inside = real_m
    elif FEW:
        inside = (inside_bits & (1 << (ky * KERNEL_W + kx))) != 0
    else:
        inside = within(in_y, ky * DY, height) & within(in_x, kx * DX, width)
    shift = (ky * DY * width + kx * DX) * x_stride + channel
    return tl.load(tl.where(inside[:, None], x_ptrs + shift, pad_ptrs))


@triton.jit
def multiply(x, w, acc):
    """acc + x w^T; u8 x are taken as s8 that are 128 less."""
    if x.dtype == tl.uint8:
        x = (x ^ 128).to(tl.int8, bitcast=True)
    return tl.dot(x, w.T, acc, out_dtype=acc.dtype)


@triton.jit
def gather_gemm_kernel(
    x_ptr,  # [batch, height, width, x_stride] u8, f16 or bf16
    pad_ptr,  # [BLOCK_K] of the same type: what stands around an image
    values_ptr,  # [blocks, BLOCK_O, BLOCK_K] s8, f16 or bf16
    cols_ptr,  # [blocks]: tap * IN_BLOCKS + input block
    tap_ptr,  # [rows * taps + 1]: where the blocks of each row and tap begin
    row_channels_ptr,  # [rows * BLOCK_O]: output channel of each packed row, -1: none
    tap_sums_ptr,  # [out_channels, taps], int8 only: sums of the weights at each tap
    scale_ptr,  # [out_channels]
    bias_ptr,  # [out_channels]
    residual_ptr,  # [batch, out_height, out_width, residual_stride] of any type, or anything
    y_ptr,  # [batch, out_height, out_width, y_stride]
    batch,
    height,
    width,
    x_stride,
    rows,
    out_height,
    out_width,
    residual_stride,
    y_stride,
    slope,
    residual_scale,
    residual_zero,
    post_slope,
    y_inverse_scale,
    y_zero,
    IN_BLOCKS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PERIOD_H: tl.constexpr,  # STRIDE_H / gcd(STRIDE_H, DILATION_H)
    PERIOD_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POST_ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TAPS_POWER: tl.constexpr,  # the power of two that holds all taps
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    INTEGER: tl.constexpr = values_ptr.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32

    # Rows fastest: programs that run at the same time then read the same pixels.
    pid = tl.program_id(0)
    row = pid % rows
    pid = pid // rows

    # The phase: its first output pixel, its size, its taps (tap 0 of it is tap `tap_begin` of the weight).
    if TRANSPOSED:
        phase = pid % (STRIDE_H * STRIDE_W)
        pid = pid // (STRIDE_H * STRIDE_W)
        first_y = phase // STRIDE_W
        first_x = phase % STRIDE_W
        phase_height = (out_height - first_y + STRIDE_H - 1) // STRIDE_H
        phase_width = (out_width - first_x + STRIDE_W - 1) // STRIDE_W
        first_ky, count_y, below_y = axis_taps(first_y, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H)
        first_kx, count_x, below_x = axis_taps(first_x, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W)
        tap_begin = below_y * KERNEL_W + count_y * below_x
        tap_end = tap_begin + count_y * count_x
        # Taps of a phase in a line of the kernel: the same in all phases, so that it divides as a constant, or not.
        if KERNEL_W % STRIDE_W == 0 and PERIOD_W == STRIDE_W:
            columns: tl.constexpr = KERNEL_W // STRIDE_W
        else:
            columns = tl.maximum(count_x, 1)
        # Input row of tap (ky, kx) from output row i of the phase: i + dy + (number of ky in the phase) * step
        dy0 = (first_y + PADDING_H - first_ky * DILATION_H) // STRIDE_H
        dx0 = (first_x + PADDING_W - first_kx * DILATION_W) // STRIDE_W
        DY: tl.constexpr = -(PERIOD_H * DILATION_H // STRIDE_H)
        DX: tl.constexpr = -(PERIOD_W * DILATION_W // STRIDE_W)
        IN_STEP_H: tl.constexpr = 1
        IN_STEP_W: tl.constexpr = 1
    else:
        phase = 0
        first_y = 0
        first_x = 0
        phase_height = out_height
        phase_width = out_width
        tap_begin = 0
        tap_end = TAPS
        columns: tl.constexpr = KERNEL_W
        dy0 = -PADDING_H
        dx0 = -PADDING_W
        DY: tl.constexpr = DILATION_H
        DX: tl.constexpr = DILATION_W
        IN_STEP_H: tl.constexpr = STRIDE_H
        IN_STEP_W: tl.constexpr = STRIDE_W

    # The pixels: m -> (image, i, j) of the phase, and where the input pixel of offset (0, 0) lies.
    pixels = batch * phase_height * phase_width
    first_m = pid * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    real_m = offs_m < pixels - first_m
    image, i, j = place(first_m, offs_m, phase_height, phase_width)
    in_y = i * IN_STEP_H + dy0
    in_x = j * IN_STEP_W + dx0
    in_pixel = (image * height + in_y) * width + in_x
    # Rows of pixels that do not exist lie outside every image.
    in_y = tl.where(real_m, in_y, -0x40000000)

    offs_k = tl.arange(0, BLOCK_K)
    offs_o = tl.arange(0, BLOCK_O)
    begin = tl.load(tap_ptr + row * TAPS + tap_begin)
    end = tl.load(tap_ptr + row * TAPS + tap_end)
    if TRANSPOSED:  # a tile beyond a phase that is smaller than the largest one
        end = tl.where(first_m < pixels, end, begin)

    # Which taps of a pixel lie inside its image, a bit each: in the loop that is one instruction.
    FEW: tl.constexpr = TAPS <= 32
    BORDER: tl.constexpr = TRANSPOSED or PADDING_H > 0 or PADDING_W > 0
    inside_bits = tl.zeros((BLOCK_M,), tl.int32)
    if FEW and BORDER:
        for t in tl.static_range(TAPS):
            inside = within(in_y, t // KERNEL_W * DY, height) & within(in_x, t % KERNEL_W * DX, width)
            inside_bits |= tl.where(inside, 1 << t, 0)

    acc = tl.zeros((BLOCK_M, BLOCK_O), dtype=SUM)
    x_ptrs = x_ptr + (in_pixel * x_stride)[:, None] + offs_k[None, :]
    pad_ptrs = pad_ptr + tl.zeros((BLOCK_M,), tl.int32)[:, None] + offs_k[None, :]
    w_ptrs = values_ptr + begin * (BLOCK_O * BLOCK_K) + offs_o[:, None] * BLOCK_K + offs_k[None, :]
    # The columns are read a step ahead: the pipeline then holds nothing but x and w.
    col = tl.load(cols_ptr + begin, mask=begin < end, other=0)
    second_col = tl.load(cols_ptr + begin + 1, mask=begin + 1 < end, other=0)
    # Two blocks a turn, the second one first: without it the last turn multiplies by zeros.
    for b in tl.range(begin, end, 2):
        x = gather(second_col, x_ptrs, pad_ptrs, inside_bits, in_y, in_x, real_m, tap_begin, height, width, x_stride, columns,
                   IN_BLOCKS, BLOCK_K, KERNEL_W, DY, DX, BORDER, FEW)  # fmt: skip
        w = tl.load(w_ptrs + BLOCK_O * BLOCK_K, mask=b + 1 < end, other=0)  # [BLOCK_O, BLOCK_K]
        second_col = tl.load(cols_ptr + b + 3, mask=b + 3 < end, other=0)
        acc = multiply(x, w, acc)
        x = gather(col, x_ptrs, pad_ptrs, inside_bits, in_y, in_x, real_m, tap_begin, height, width, x_stride, columns,
                   IN_BLOCKS, BLOCK_K, KERNEL_W, DY, DX, BORDER, FEW)  # fmt: skip
        w = tl.load(w_ptrs)
        w_ptrs += 2 * BLOCK_O * BLOCK_K
        col = tl.load(cols_ptr + b + 2, mask=b + 2 < end, other=0)
        acc = multiply(x, w, acc)

    # The epilogue. z: the zero point, which `pad` holds.
    channels = tl.load(row_channels_ptr + row * BLOCK_O + offs_o)
    real_o = channels >= 0
    if INTEGER:
        offs_t = tl.arange(0, TAPS_POWER)
        of_phase = (offs_t >= tap_begin) & (offs_t < tap_end)
        tap_sums = tl.load(
            tap_sums_ptr + channels[:, None] * TAPS + offs_t[None, :],
            mask=real_o[:, None] & of_phase[None, :],
            other=0,
        )
        z = tl.load(pad_ptr).to(tl.int32)
        acc -= ((z - 128) * tl.sum(tap_sums, 1))[None, :]
    scale = tl.load(scale_ptr + channels, mask=real_o, other=0.0)
    bias = tl.load(bias_ptr + channels, mask=real_o, other=0.0)
    v = tl.fma(acc.to(tl.float32), spread(scale, BLOCK_M), spread(bias, BLOCK_M))
    v = activate(v, slope, ACTIVATION)

    # col is 0 again, which the compiler does not know: so it keeps nothing about the pixels in registers through the loop.
    first_m += col
    real_m = offs_m < pixels - first_m
    out_pixel = first_m + offs_m
    if TRANSPOSED:
        image, i, j = place(first_m, offs_m, phase_height, phase_width)
        out_pixel = (image * out_height + first_y + i * STRIDE_H) * out_width + first_x + j * STRIDE_W
    # The channels of a row are neighbours nearly always: then they are stored as vectors, with what fills up the pixel.
    offs_c = row * BLOCK_O + offs_o
    moved = tl.sum((real_o & (channels != offs_c)).to(tl.int32), 0)
    if moved == 0:
        mask = real_m[:, None] & (offs_c < y_stride)[None, :]
        store_tile(v, out_pixel, offs_c, mask, residual_ptr, y_ptr, residual_stride, y_stride, residual_scale, residual_zero,
                   post_slope, y_inverse_scale, y_zero, POST_ACTIVATION, RESIDUAL)  # fmt: skip
    else:
        mask = real_m[:, None] & real_o[None, :]
        store_tile(v, out_pixel, channels, mask, residual_ptr, y_ptr, residual_stride, y_stride, residual_scale, residual_zero,
                   post_slope, y_inverse_scale, y_zero, POST_ACTIVATION, RESIDUAL)  # fmt: skip
