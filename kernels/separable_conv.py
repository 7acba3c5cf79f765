"""Depthwise k x k, pointwise 1x1 and what is around them (prologue, activations, residual, statistics) in one kernel.

The tensor between the two convolutions never leaves the chip: the input is read from memory about once, the output
written once. For 128 -> 128 channels at 147 x 147 and N = 64 in bf16 that is 708 MB where two kernels move 1416 MB, for
45 GFLOP on the tensor cores. A program owns a tile of pixels and all output channels (256 at most), so the depthwise
part is computed once per pixel: per channel and tap one conversion and one multiply-add on the CUDA cores. Taps and
neighbouring tiles read the same input again, from the L1 and L2 caches; tiles are shaped to keep that little.
"""

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

WIDEST = 256  # output channels of one program
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
def _pixels(N, OH, OW, tiles_h, tiles_w, BLOCK_P: tl.constexpr, TILE_W: tl.constexpr):
    """(n, oh, ow, whether there is such a pixel) of this program: a rectangle of an image, or a run if TILE_W is 0."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_P)
    if TILE_W == 0:
        first = program.to(tl.int64) * BLOCK_P
        n = first // (OH * OW)
        index = (first - n * (OH * OW)).to(tl.int32) + lane
        n += index // (OH * OW)
        index = index % (OH * OW)
        oh = index // OW
        ow = index % OW
        exists = n < N
    else:
        oh = (program // tiles_w) % tiles_h * (BLOCK_P // TILE_W) + lane // TILE_W
        ow = program % tiles_w * TILE_W + lane % TILE_W
        n = tl.zeros([BLOCK_P], tl.int64) + program // (tiles_w * tiles_h)
        exists = (oh < OH) & (ow < OW)
    return n, oh, ow, exists


@triton.jit(
    do_not_specialize=(
        "N", "H", "W", "OH", "OW", "CO_units", "tiles_h", "tiles_w", "top", "left", "KH",
        "stride_xn", "stride_xh", "stride_xw", "stride_rn", "stride_rh", "stride_rw",
    )
)  # fmt: skip
def _fused_kernel(
    input, scale, shift, taps, depthwise_bias, pointwise, output_scale, bias, residual,
    output, counts, means, squares,
    N, H, W, OH, OW, CO_units, tiles_h, tiles_w, top, left, KH,
    stride_xn, stride_xh, stride_xw, stride_rn, stride_rh, stride_rw, stride_ro,
    C: tl.constexpr, UNIT: tl.constexpr, R_UNIT: tl.constexpr, CO_UNIT: tl.constexpr,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PRE: tl.constexpr, MID: tl.constexpr, POST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One tile of pixels. Strides of pixels come in units, which say how far loads may be vectorised."""
    # 1. The pixels and, in the padded input, the upper left corner of what each of them reads.
    n, oh, ow, exists = _pixels(N, OH, OW, tiles_h, tiles_w, BLOCK_P, TILE_W)
    first_h = oh * SH - top
    first_w = ow * SW - left
    corner = n * stride_xn + first_h.to(tl.int64) * stride_xh + first_w.to(tl.int64) * stride_xw
    step_h = stride_xh.to(tl.int64) * DH
    step_w = stride_xw.to(tl.int64) * DW
    CO = CO_units * CO_UNIT
    o = tl.arange(0, BLOCK_O)

    acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=1):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C) | (C % BLOCK_C == 0)
        # 2. Depthwise. The loop over rows stays a loop, its length unknown to the compiler: unrolled, every address and
        # mask would be computed before the loop over channels and kept in registers. Padding is 0 after the prologue,
        # whatever that makes of 0.
        v = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for i in tl.range(0, KH, num_stages=1):
            h = first_h + i * DH
            row = exists & (h >= 0) & (h < H)
            for j in tl.static_range(KW):
                w = first_w + j * DW
                read = (row & (w >= 0) & (w < W))[:, None] & inside[None, :]
                offset = (corner + (i * step_h + j * step_w)) * UNIT
                a = tl.load(input + offset[:, None] + c[None, :], mask=read, other=0.0).to(tl.float32)
                a = _activate(_affine(a, scale, shift, c, inside), PRE)
                if scale is not None or shift is not None:
                    a = tl.where(read, a, 0.0)
                v += a * tl.load(taps + (i * KW + j) * C + c, mask=inside, other=0.0)[None, :]

        # 3. Rounded once, as if it had been stored, and multiplied.
        weights = tl.load(
            pointwise + (o * C)[:, None] + c[None, :], mask=(o < CO)[:, None] & inside[None, :], other=0.0
        )
        v = _activate(_affine(v, None, depthwise_bias, c, inside), MID).to(weights.dtype)
        acc = tl.dot(v, tl.trans(weights), acc, input_precision=PRECISION)

    # 4. Epilogue.
    y = _activate(_affine(acc, output_scale, bias, o, o < CO), POST)
    write = exists[:, None] & (o < CO)[None, :]
    if residual is not None:
        offset = (n * stride_rn + oh.to(tl.int64) * stride_rh + ow.to(tl.int64) * stride_rw) * R_UNIT
        pointers = residual + offset[:, None] + o.to(tl.int64)[None, :] * stride_ro
        y += tl.load(pointers, mask=write, other=0.0).to(tl.float32)
    rounded = y.to(output.dtype.element_ty)
    offset = ((n * OH + oh) * OW + ow) * CO
    tl.store(output + offset[:, None] + o[None, :], rounded, mask=write)

    # 5. Statistics of the tile, of the numbers that were stored.
    if counts is not None:
        program = tl.program_id(0).to(tl.int64)
        count = tl.sum(exists.to(tl.float32), 0)
        z = tl.where(write, rounded.to(tl.float32), 0.0)
        mean = tl.sum(z, 0) / count
        deviation = tl.where(write, z - mean[None, :], 0.0)
        tl.store(counts + program, count)
        tl.store(means + program * CO + o, mean, mask=o < CO)
        tl.store(squares + program * CO + o, tl.sum(deviation * deviation, 0), mask=o < CO)


class Tiles(NamedTuple):
    pixels: int
    channels: int  # input channels of one step
    outputs: int
    registers: int | None  # of a thread; None: as many as the compiler likes


def _choose_tiles(
    C: int, CO: int, kernel: int, dtype: torch.dtype, affine: bool, precision: str, capability: int
) -> Tiles:
    """Tiles for 8 warps, from compiled register counts: none of them spills in a loop, on sm_80 to sm_120.

    64 x 256 sums are 64 registers of a thread, 128 x 64 sums 32. If a thread has 128 registers, two programs share a
    multiprocessor, each of them loading while the other multiplies. Five taps in flight leave room for half the pixels.
    A step in channels is 64 bytes of a pixel, or half of that where the most sums stand beside five taps or an affine
    prologue. The most sums of tcgen05, which moves them, and float32 without tensor cores take what they need.
    """
    block_o = max(16, triton.next_power_of_2(CO))
    most = block_o == 256
    block_c = 16 if C <= 16 or (most and (affine or kernel > 3)) else 64 // dtype.itemsize
    fits = not (most and capability // 10 == 10) and not (dtype == torch.float32 and precision == "ieee")
    return Tiles(128 if block_o <= 64 and kernel == 3 else 64, block_c, block_o, 128 if fits else None)


@functools.lru_cache(maxsize=1024)
def tile_width(
    pixels: int, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> int:
    """The width of the tiles of so many pixels that read the least input; 0 for runs of pixels across rows.

    Runs waste nothing at the borders of small images. In a wide one they read as many rows as the kernel is high, each
    run for itself, where the rows of a rectangle share them.
    """
    height, width = size
    halo_h, halo_w = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))

    def reads(rows: float, columns: float) -> float:
        return ((rows - 1) * stride[0] + 1 + halo_h) * ((columns - 1) * stride[1] + 1 + halo_w)

    costs = {0: height * width / pixels * reads(1 + (pixels - 1) / width, min(width, pixels))}
    for columns in (8, 16, 32):
        rows = pixels // columns
        costs[columns] = triton.cdiv(height, rows) * triton.cdiv(width, columns) * reads(rows, columns)
    return min(costs, key=costs.__getitem__)


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
    return (
        input.dtype in _DTYPES
        and input.dtype == depthwise_weight.dtype == pointwise_weight.dtype
        and input.numel() > 0
        and input.shape[1] > 1
        and input.stride(1) == 1
        and depthwise_weight.shape[0] == input.shape[1]
        and tuple(depthwise_weight.shape[2:]) in _KERNELS
        and 0 < pointwise_weight.shape[0] <= WIDEST
        and max(math.prod(_output_size(input, depthwise_weight, stride, padding, dilation)), *input.shape) < 2**30
    )


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
    input_precision: str,
    mid_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`perfvl::separable_conv` for what `supports`: (output, mean, variance), the output channels_last.

    With ``v = mid(depthwise pre(input * scale + shift) * mid_scale + depthwise_bias)`` the output is
    ``act(pointwise v * output_scale + bias) + residual``. Scales are dense and float32, shifts and biases of any
    floating dtype up to 32 bits; `residual` has the output's shape, any strides. Activations are the codes of the op.
    `input_precision` ("ieee" or "tf32") says how float32 operands are multiplied and is ignored for others. Two
    launches, and with statistics one to three that join them. No host synchronisation and no tuning: kernels are
    compiled per layer (dtype, channels, kernel, options) and shape of tile, never per size of the image or the batch.
    """
    (N, C, H, W), CO = input.shape, pointwise_weight.shape[0]
    kernel = (depthwise_weight.shape[2], depthwise_weight.shape[3])
    size = OH, OW = _output_size(input, depthwise_weight, stride, padding, dilation)
    affine = scale is not None or shift is not None
    capability = _tiles.gpu_limits(input.device).capability
    tiles = _choose_tiles(C, CO, kernel[1], input.dtype, affine, input_precision, capability)
    width = tile_width(tiles.pixels, size, kernel, tuple(stride), tuple(dilation))
    tiles_h, tiles_w = (triton.cdiv(OH, tiles.pixels // width), triton.cdiv(OW, width)) if width else (0, 0)
    programs = N * tiles_h * tiles_w if width else triton.cdiv(N * OH * OW, tiles.pixels)
    input_strides, unit = _pixel_strides(input, C)
    residual_strides, residual_unit = ([0, 0, 0], 1) if residual is None else _pixel_strides(residual)
    output_unit = math.gcd(16 // input.itemsize, CO)

    output = torch.empty((N, CO, OH, OW), dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
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
            N, H, W, OH, OW, CO // output_unit, tiles_h, tiles_w, padding[0], padding[2], kernel[0],
            *input_strides, *residual_strides, 1 if residual is None else residual.stride(1),
            C=C, UNIT=unit, R_UNIT=residual_unit, CO_UNIT=output_unit,
            KW=kernel[1], SH=stride[0], SW=stride[1], DH=dilation[0], DW=dilation[1],
            PRE=pre_activation, MID=mid_activation, POST=activation, PRECISION=input_precision,
            BLOCK_P=tiles.pixels, TILE_W=width, BLOCK_C=tiles.channels, BLOCK_O=tiles.outputs,
            num_warps=8, maxnreg=tiles.registers, enable_fp_fusion=True,
        )  # fmt: skip
        if statistics:
            mean, variance = merge_statistics(*partials)
        else:
            mean, variance = (torch.empty(0, **float32) for _ in range(2))
    return output, mean, variance
