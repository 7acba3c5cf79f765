"""Depthwise k x k, pointwise 1x1 and what is around them (prologue, activations, residual, statistics) in one kernel.

The tensor between the two convolutions never leaves the chip: the input is read from memory about once, the output
written once. For 128 -> 128 channels at 147 x 147 and N = 64 in bf16 that is 708 MB where two kernels move 1416 MB, for
45 GFLOP on the tensor cores. A program owns a rectangle of pixels and all output channels (128 at most), so the
depthwise part is computed once per pixel; a row of input is loaded and converted once for all rows of output that it
serves. Measured on an H100: 472 us (two kernels 540, torch 564), 1.5 TB/s; 136 us for 96 -> 24 channels at 112 x 112
with stride 2 in TF32 (torch 172), 2.4 TB/s; in NCHW, which a thread reads four bytes at a time, 1780 us for 64 -> 128
channels at 512 x 512 and N = 16 in TF32 (two kernels 1880, torch 3630). What is left is waiting: 512 threads of a
multiprocessor are too few to hide a tile's loads, its product and its way through shared memory behind one another.
"""

# ruff: noqa: RUF005 (Triton has no stars in tuples)
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._separable_conv_statistics import merge_statistics

WIDEST = 128  # output channels of one program
_KERNELS = ((3, 3), (5, 5))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Sizes = list[int]  # of height and width; as padding: top, bottom, left, right


@triton.jit
def _activate(x, CODE: tl.constexpr):
    """none, relu, relu6, silu, hardswish, leaky_relu; 0 stays 0 and NaN stays NaN."""
    if CODE == 1:
        x = tl.where(x < 0.0, 0.0, x)
    elif CODE == 2:
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif CODE == 3:
        x = x / (1.0 + tl.exp(-x))
    elif CODE == 4:
        gate = x + 3.0
        x = x * tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) * (1.0 / 6.0)
    elif CODE == 5:
        x = tl.where(x < 0.0, 0.01 * x, x)
    return x


@triton.jit
def _affine(x, scale, shift, column, inside):
    """``x * scale[column] + shift[column]`` for the columns of a tile; either may be absent."""
    if scale is not None:
        x *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        x += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _below(v, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """The rows of a tile, tensors [COLUMNS, CHANNELS], below each other."""
    if ROWS == 1:
        stacked = v[0]
    elif ROWS == 2:
        stacked = tl.reshape(tl.permute(tl.join(v[0], v[1]), (2, 0, 1)), [2 * COLUMNS, CHANNELS])
    else:
        joined = tl.join(tl.join(v[0], v[1]), tl.join(v[2], v[3]))
        stacked = tl.reshape(tl.permute(joined, (3, 2, 0, 1)), [4 * COLUMNS, CHANNELS])
    return stacked


@triton.jit
def _stack(v, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PLANES: tl.constexpr):
    """The same, so that a thread with neighbouring channels stores them at once for the product.

    What is joined last comes first in the registers of a thread. That decides in which order the compiler lays a
    tensor out in shared memory: rows first would mean one store for every number.
    """
    if ROWS == 1 or PLANES:
        stacked = _below(v, ROWS, COLUMNS, CHANNELS)
    else:
        even = ()
        odd = ()
        for r in tl.static_range(ROWS):
            one, other = tl.split(tl.reshape(v[r], [COLUMNS, CHANNELS // 2, 2]))
            even = even + (one,)
            odd = odd + (other,)
        halves = tl.join(_below(even, ROWS, COLUMNS, CHANNELS // 2), _below(odd, ROWS, COLUMNS, CHANNELS // 2))
        stacked = tl.reshape(halves, [ROWS * COLUMNS, CHANNELS])
    return stacked


@triton.jit(
    do_not_specialize=(
        "H", "W", "OH", "OW_units", "CO_units", "tiles_h", "tiles_w", "top", "left",
        "stride_xn", "stride_xh", "stride_xw", "stride_rn", "stride_rh", "stride_rw",
    )
)  # fmt: skip
def _fused_kernel(
    input, scale, shift, taps, depthwise_bias, pointwise, output_scale, bias, residual,
    output, counts, means, squares,
    H, W, OH, OW_units, CO_units, tiles_h, tiles_w, top, left,
    stride_xn, stride_xh, stride_xw, stride_xc, stride_rn, stride_rh, stride_rw, stride_ro,
    C: tl.constexpr, PLANES: tl.constexpr,
    UNIT: tl.constexpr, R_UNIT: tl.constexpr, CO_UNIT: tl.constexpr, OW_UNIT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PRE: tl.constexpr, MID: tl.constexpr, POST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One rectangle of pixels. Strides and sizes come in units, which say how far accesses may be vectorised."""
    # 1. The rectangle and, in the padded input, the upper left corner of what it reads.
    tile = tl.program_id(0)
    n = (tile // (tiles_w * tiles_h)).to(tl.int64)
    top_row = tile // tiles_w % tiles_h * ROWS
    left_column = tile % tiles_w * COLUMNS
    first_h = top_row * SH - top
    first_w = left_column * SW - left
    corner = n * stride_xn + first_h.to(tl.int64) * stride_xh + first_w.to(tl.int64) * stride_xw
    p = tl.arange(0, COLUMNS)
    o = tl.arange(0, BLOCK_O)
    CO = CO_units * CO_UNIT
    OW = OW_units * OW_UNIT

    acc = tl.zeros([ROWS * COLUMNS, BLOCK_O], tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=1):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C) | (C % BLOCK_C == 0)
        if PLANES:
            within = (p * SW)[:, None] + (c * stride_xc)[None, :]
        else:
            within = (p * (SW * stride_xw) * UNIT)[:, None] + c[None, :]
        # 2. Depthwise, one column of the kernel after the other. All rows of the input that it covers are asked for
        # before the first is used; each serves up to KH rows of output. The loop stays a loop: unrolled, all weights
        # would be kept in registers. Padding is 0 after the prologue, whatever that makes of 0.
        v = ()
        for _ in tl.static_range(ROWS):
            v = v + (tl.zeros([COLUMNS, BLOCK_C], tl.float32),)
        for j in tl.range(KW, num_stages=1):
            w = first_w + j * DW + p * SW
            column = (w >= 0) & (w < W)
            k = ()
            for i in tl.static_range(KH):
                k = k + (tl.load(taps + (i * KW + j) * C + c, mask=inside, other=0.0)[None, :],)
            for q in tl.static_range((ROWS - 1) * SH + (KH - 1) * DH + 1):
                h = first_h + q
                read = (column & (h >= 0) & (h < H))[:, None] & inside[None, :]
                row = input + (corner + (q * stride_xh + j * (DW * stride_xw)).to(tl.int64)) * UNIT
                a = tl.load(row + within, mask=read, other=0.0).to(tl.float32)
                a = _activate(_affine(a, scale, shift, c, inside), PRE)
                if scale is not None or shift is not None:
                    a = tl.where(read, a, 0.0)
                for r in tl.static_range(ROWS):
                    if q - r * SH >= 0 and (q - r * SH) % DH == 0 and (q - r * SH) // DH < KH:
                        v = v[:r] + (v[r] + a * k[(q - r * SH) // DH],) + v[r + 1 :]

        # 3. Rounded once, as if it had been stored, and multiplied.
        rounded = ()
        for r in tl.static_range(ROWS):
            activated = _activate(_affine(v[r], None, depthwise_bias, c, inside), MID)
            rounded = rounded + (activated.to(pointwise.dtype.element_ty),)
        mask = (o < CO)[:, None] & inside[None, :]
        weights = tl.load(pointwise + (o * C)[:, None] + c[None, :], mask=mask, other=0.0)
        u = _stack(rounded, ROWS, COLUMNS, BLOCK_C, PLANES)
        acc = tl.dot(u, tl.trans(weights), acc, input_precision="tf32")

    # 4. Epilogue.
    y = _activate(_affine(acc, output_scale, bias, o, o < CO), POST)
    oh = top_row + tl.arange(0, ROWS * COLUMNS) // COLUMNS
    ow = left_column + tl.arange(0, ROWS * COLUMNS) % COLUMNS
    exists = (oh < OH) & (ow < OW)
    write = exists[:, None] & (o < CO)[None, :]
    if residual is not None:
        offset = (n * stride_rn + oh.to(tl.int64) * stride_rh + ow.to(tl.int64) * stride_rw) * R_UNIT
        pointers = residual + offset[:, None] + o.to(tl.int64)[None, :] * stride_ro
        y += tl.load(pointers, mask=write, other=0.0).to(tl.float32)
    rounded_y = y.to(output.dtype.element_ty)
    if PLANES:
        offset = (oh * OW_units * OW_UNIT + ow)[:, None] + (o * (OH * OW_units) * OW_UNIT)[None, :]
        tl.store(output + n * CO * OH * OW + offset, rounded_y, mask=write)
    else:
        offset = (((oh - top_row) * OW + ow) * CO_units * CO_UNIT)[:, None] + o[None, :]
        tl.store(output + (n * OH + top_row) * OW * CO + offset, rounded_y, mask=write)

    # 5. Statistics of the tile, of the numbers that were stored.
    if counts is not None:
        count = tl.sum(exists.to(tl.float32), 0)
        z = tl.where(write, rounded_y.to(tl.float32), 0.0)
        mean = tl.sum(z, 0) / count
        deviation = tl.where(write, z - mean[None, :], 0.0)
        tl.store(counts + tile, count)
        tl.store(means + tile.to(tl.int64) * CO + o, mean, mask=o < CO)
        tl.store(squares + tile.to(tl.int64) * CO + o, tl.sum(deviation * deviation, 0), mask=o < CO)


class Tiles(NamedTuple):
    rows: int
    columns: int
    channels: int  # input channels of one step
    outputs: int
    warps: int
    registers: int  # of a thread, at most


@functools.lru_cache(maxsize=1024)
def choose_tiles(
    C: int,
    CO: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    planes: bool,
    affine: bool,
    capability: int,
) -> Tiles:
    """Rows and columns that read the least input, pixels outside the output included; the rest from register counts.

    None of these spills in a loop, on sm_80 to sm_120. A thread has eight channels of a pixel in each row (16 bytes, or
    twice that in float32), half of that in planes, beside an affine prologue and beside many sums that several steps
    add to, and 128 registers, so that 512 threads share a multiprocessor. tcgen05, which moves sums through registers,
    takes what it needs, and so do planes where the tensor cores read their operands from registers.
    """
    halo_h, halo_w = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))

    def reads(shape: tuple[int, int]) -> int:
        rows, columns = shape
        programs = triton.cdiv(size[0], rows) * triton.cdiv(size[1], columns)
        return programs * ((rows - 1) * stride[0] + 1 + halo_h) * ((columns - 1) * stride[1] + 1 + halo_w)

    shapes = ((4, 32), (2, 64)) if planes else ((4, 16), (2, 32), (1, 64))
    few_rows = kernel[0] > 3 or (planes and (affine or stride != (1, 1)))
    rows, columns = min(shapes[1:] if few_rows else shapes, key=reads)
    lean, many_sums = planes or affine, CO > 64
    widest = (1024 if lean else 2048) // columns
    if many_sums and not planes and widest < C:
        widest //= 2
    # One step where it can be; else the largest that is mostly filled.
    block_c = widest
    while block_c > 16 and (block_c >= 2 * C or (widest < C and -C % block_c > 0.15 * C)):
        block_c //= 2
    warps = 8 if lean or many_sums or columns * block_c > 1024 else 4
    takes_all = capability // 10 == 10 or (planes and capability // 10 != 9)
    return Tiles(rows, columns, block_c, max(16, triton.next_power_of_2(CO)), warps, 255 if takes_all else 128)


def _output_size(input: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes) -> tuple[int, int]:
    height, width = (
        (input.shape[2 + d] + padding[2 * d] + padding[2 * d + 1] - dilation[d] * (weight.shape[2 + d] - 1) - 1)
        // stride[d]
        + 1
        for d in (0, 1)
    )
    return height, width


def _pixel_strides(tensor: Tensor, *more: int) -> tuple[list[int], int]:
    """Strides along N, H and W divided by a power of two, and that: up to 16 bytes, a divisor of `more` as well.

    Multiplied again in the kernel, it tells the compiler how far it may vectorise. By itself that sees multiples of 16
    only, and 24, 40 or 728 channels are none. The stride of a dimension of one element does not matter.
    """
    strides = [tensor.stride(d) if tensor.shape[d] > 1 else 0 for d in (0, 2, 3)]
    unit = math.gcd(16 // tensor.itemsize, *strides, *more)
    return [stride // unit for stride in strides], unit


def supports(
    input: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes
) -> bool:
    """Whether `fused_forward` takes these shapes, dtypes and layouts."""
    if not (
        input.dtype in _DTYPES
        and input.dtype == depthwise_weight.dtype == pointwise_weight.dtype
        and input.numel() > 0
        and input.shape[1] > 1
        and (input.stride(1) == 1 or (input.stride(3) == 1 and input.dtype == torch.float32))
        and depthwise_weight.shape[0] == input.shape[1]
        and tuple(depthwise_weight.shape[2:]) in (_KERNELS if input.stride(1) == 1 else _KERNELS[:1])
        and 0 < pointwise_weight.shape[0] <= WIDEST
    ):
        return False
    size = math.prod(_output_size(input, depthwise_weight, stride, padding, dilation))
    reach = sum((n - 1) * step for n, step in zip(input.shape[1:], input.stride()[1:], strict=True))
    of_a_tile = 64 * max(*stride, *dilation) * max(input.stride()[2:])
    # Offsets inside an image are 32-bit, with room for what a tile hangs over.
    return max(*input.shape, reach, of_a_tile, size * pointwise_weight.shape[0]) < 2**30


def fused_forward(
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    pre_activation: int,
    mid_activation: int,
    activation: int,
    statistics: bool,
    *,
    mid_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`perfvl::separable_conv` for what `supports`: (output, mean, variance), the output channels_last or NCHW.

    With ``v = mid(depthwise pre(input * scale + shift) * mid_scale + depthwise_bias)`` the output is
    ``act(pointwise v * output_scale + bias) + residual``. Scales are dense and float32, shifts and biases of any
    floating dtype up to 32 bits; `residual` has the output's shape, any strides. Activations are the codes of the op.
    float32 operands are multiplied as TF32. Two
    launches, and with statistics one to three that join them. No host synchronisation and no tuning: kernels are
    compiled per layer (dtype, channels, kernel, options) and shape of tile, never per size of the image or the batch.
    """
    (N, C, H, W), CO = input.shape, pointwise_weight.shape[0]
    kernel = (depthwise_weight.shape[2], depthwise_weight.shape[3])
    size = OH, OW = _output_size(input, depthwise_weight, stride, padding, dilation)
    planes = input.stride(1) != 1
    tiles = choose_tiles(
        C, CO, size, kernel, tuple(stride), tuple(dilation), planes, scale is not None or shift is not None,
        _tiles.gpu_limits(input.device).capability,
    )  # fmt: skip
    tiles_h, tiles_w = triton.cdiv(OH, tiles.rows), triton.cdiv(OW, tiles.columns)
    programs = N * tiles_h * tiles_w
    input_strides, unit = ([input.stride(d) for d in (0, 2, 3)], 1) if planes else _pixel_strides(input, C)
    residual_strides, residual_unit = ([0, 0, 0], 1) if residual is None else _pixel_strides(residual)
    vector = 16 // input.itemsize
    output_unit, width_unit = (1, math.gcd(vector, OW)) if planes else (math.gcd(vector, CO), 1)

    memory = torch.contiguous_format if planes else torch.channels_last
    output = torch.empty((N, CO, OH, OW), dtype=input.dtype, device=input.device, memory_format=memory)
    float32 = {"dtype": torch.float32, "device": input.device}
    # Channels innermost, so that a thread reads its weights of one tap at once, and not each of them alone: that is
    # worth a launch, since there are as many of them as pixels. A scale after the convolution costs nothing here.
    taps = torch.empty((kernel[0] * kernel[1], C), **float32)
    torch.mul(depthwise_weight.detach().flatten(1).t(), 1.0 if mid_scale is None else mid_scale.detach(), out=taps)
    partials: tuple[Tensor | None, ...] = (None, None, None)
    if statistics:
        partials = (torch.empty(programs, **float32), *torch.empty((2, programs, CO), **float32).unbind())

    with _tiles.on_device(input):
        _fused_kernel[(programs,)](
            input, scale, shift, taps, depthwise_bias, pointwise_weight.contiguous(), output_scale, bias, residual,
            output, *partials,
            H, W, OH, OW // width_unit, CO // output_unit, tiles_h, tiles_w, padding[0], padding[2],
            *input_strides, input.stride(1), *residual_strides, 1 if residual is None else residual.stride(1),
            C=C, PLANES=planes, UNIT=unit, R_UNIT=residual_unit, CO_UNIT=output_unit, OW_UNIT=width_unit,
            KH=kernel[0], KW=kernel[1], SH=stride[0], SW=stride[1], DH=dilation[0], DW=dilation[1],
            PRE=pre_activation, MID=mid_activation, POST=activation,
            ROWS=tiles.rows, COLUMNS=tiles.columns, BLOCK_C=tiles.channels, BLOCK_O=tiles.outputs,
            num_warps=tiles.warps, maxnreg=tiles.registers, enable_fp_fusion=True,
        )  # fmt: skip
        if statistics:
            mean, variance = merge_statistics(*partials)
        else:
            mean, variance = (torch.empty(0, **float32) for _ in range(2))
    return output, mean, variance
