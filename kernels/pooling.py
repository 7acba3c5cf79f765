"""Maximum + average pooling and stochastic pooling of images on the GPU, and their gradients.

Forward reads the image from memory once (windows overlap in the caches) and writes a number and a byte for each window:
for 3 x 3 windows 2 apart 21 bytes for each window in float32 and 11 in half precision, where PyTorch's two functions
and their sum move 64 and 36. Backward reads gradients and bytes and writes each pixel once, 21 bytes for each window,
where PyTorch fills two images and adds them. There is next to nothing to compute, so that memory's bandwidth is the
limit as long as a window costs no more than some hundred instructions.

A tile is rows x columns: pixels x channels of channels_last images, else rows of images x their columns. One division
for each row finds out where it is.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._launch import launch
from ._tiles import ceil_div, power_of_2

Pair = list[int]  # of height and width
_MOST_UNROLLED = 32  # positions of a window; larger ones are loops


@triton.jit
def _place(
    rows, C, OH, OW,
    LAST: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(n, c, h, w, whether there is such an element, its place in a dense tensor) of the tile's elements, each of them
    as a row, a column or all of the tile."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if WIDE:  # beyond 2^31 rows: divisions of 64 bits take their time
        r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if LAST:
        pixel = r // OW
        w = (r % OW)[:, None]
        h = (pixel % OH)[:, None]
        n = (pixel // OH)[:, None]
        c = j[None, :]
        width = C
    else:
        image = r // OH
        h = (r % OH)[:, None]
        c = (image % C)[:, None]
        n = (image // C)[:, None]
        w = j[None, :]
        width = OW
    exists = (r < rows)[:, None]
    if not EVEN:
        exists = exists & (j < width)[None, :]
    return n, c, h, w, exists, r.to(tl.int64)[:, None] * width + j[None, :]


@triton.jit
def _offset(n, c, h, w, stride_n, stride_c, stride_h, stride_w):
    return n.to(tl.int64) * stride_n + c.to(tl.int64) * stride_c + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def _pixel(pointer, h, w, i, j, H, W, exists, stride_h, stride_w):
    """Pixel (i, j) of the windows that begin at (h, w), and whether it is inside the image."""
    inside = exists & (h + i >= 0) & (h + i < H) & (w + j >= 0) & (w + j < W)
    return tl.load(pointer + (i * stride_h + j * stride_w), mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def _take_larger(top, at, total, pointer, h, w, i, j, H, W, exists, stride_h, stride_w, KW: tl.constexpr):
    """One pixel further: the largest so far, its position, the sum."""
    x, inside = _pixel(pointer, h, w, i, j, H, W, exists, stride_h, stride_w)
    larger = inside & (x > top)
    return tl.where(larger, x, top), tl.where(larger, i * KW + j, at), total + x


@triton.jit(do_not_specialize=("rows", "H", "W", "OH", "OW", "KH", "stride_n", "stride_h"))
def _max_average_kernel(
    input, output, positions,
    rows, H, W, OH, OW, KH,
    C, stride_n, stride_c, stride_h, stride_w,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One tile of windows."""
    # 1. The windows, and where they begin.
    n, c, oh, ow, exists, place = _place(rows, C * UNIT, OH, OW, LAST, WIDE, EVEN, BLOCK_R, BLOCK_C)
    h = oh * SH - PH
    w = ow * SW - PW
    stride_h *= UNIT
    stride_w *= UNIT
    pointer = input + _offset(n, c, h, w, stride_n * UNIT, stride_c, stride_h, stride_w)

    # 2. Their pixels, in the order in which the first of equal ones wins. The loop over rows stays a loop, its length
    # unknown to the compiler: it would load all pixels at first, and has too few registers for the masks of them all.
    top = tl.full([BLOCK_R, BLOCK_C], float("-inf"), tl.float32)
    at = tl.zeros([BLOCK_R, BLOCK_C], tl.int32) + (tl.maximum(-h, 0) * KW + tl.maximum(-w, 0)).to(tl.int32)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in tl.range(0, KH, num_stages=1):
        if UNROLL:
            for j in tl.static_range(KW):
                top, at, total = _take_larger(
                    top, at, total, pointer, h, w, i, j, H, W, exists, stride_h, stride_w, KW
                )  # fmt: skip
        else:
            for j in range(KW):
                top, at, total = _take_larger(
                    top, at, total, pointer, h, w, i, j, H, W, exists, stride_h, stride_w, KW
                )  # fmt: skip

    # A NaN is in the sum, and so in the result. Comparisons pass it over: it is looked for where there is one.
    if positions is not None:
        lost = tl.max(tl.max((total != total).to(tl.int32), 1), 0)
        for i in range(KH * lost):
            for j in range(KW):
                x, _ = _pixel(pointer, h, w, i, j, H, W, exists, stride_h, stride_w)
                at = tl.where(x != x, i * KW + j, at)

    # 3. The average over the window in the padded image.
    size = (tl.minimum(H + PH - h, KH) * tl.minimum(W + PW - w, KW)).to(tl.float32)
    result = top + total * tl.div_rn(tl.full(size.shape, 1.0, tl.float32), size)
    tl.store(output + place, result.to(output.dtype.element_ty), mask=exists)
    if positions is not None:
        tl.store(positions + place, at.to(tl.uint8), mask=exists)


@triton.jit(
    do_not_specialize=("rows", "H", "W", "OH", "OW", "KH", "stride_n", "stride_h", "stride_un", "stride_uh")
)  # fmt: skip
def _stochastic_kernel(
    input, uniform, output, positions,
    rows, H, W, OH, OW, KH,
    C, stride_n, stride_c, stride_h, stride_w, stride_un, stride_uc, stride_uh, stride_uw,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of windows: the element that the uniform number falls on, or, without one, what is to be expected."""
    # 1. The windows, their sums and the sums of their squares.
    n, c, oh, ow, exists, place = _place(rows, C * UNIT, OH, OW, LAST, WIDE, EVEN, BLOCK_R, BLOCK_C)
    h = oh * SH - PH
    w = ow * SW - PW
    stride_h *= UNIT
    stride_w *= UNIT
    pointer = input + _offset(n, c, h, w, stride_n * UNIT, stride_c, stride_h, stride_w)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in range(KH):
        for j in range(KW):
            x, inside = _pixel(pointer, h, w, i, j, H, W, exists, stride_h, stride_w)
            total += x
            squares += x * x
    result = tl.div_rn(squares, total + 1.1754943508222875e-38)

    # 2. Once more, from the caches: the next pixel, as long as the sum has not reached its share.
    if uniform is not None:
        share = tl.load(
            uniform + _offset(n, c, oh, ow, stride_un * UNIT, stride_uc, stride_uh * UNIT, stride_uw * UNIT),
            mask=exists,
            other=0.0,
        )
        share *= total
        reached = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        result = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        at = tl.full([BLOCK_R, BLOCK_C], -1, tl.int32)
        for i in range(KH):
            for j in range(KW):
                x, inside = _pixel(pointer, h, w, i, j, H, W, exists, stride_h, stride_w)
                further = inside & ((at < 0) | (reached < share))
                result = tl.where(further, x, result)
                at = tl.where(further, i * KW + j, at)
                # Beyond the element nothing is added: a sum that has reached the share stays there.
                reached = tl.where(further, reached + x, reached)
        result = tl.where(total == total, result, total)  # a NaN is not lost
        tl.store(positions + place, at.to(tl.uint8), mask=exists)
    tl.store(output + place, result.to(output.dtype.element_ty), mask=exists)


@triton.jit
def _visit(
    whole, shared, gradient, position, h, w, i, j, here, exists, ratio_h, ratio_w, OH, OW,
    stride_gh, stride_gw, stride_ph, stride_pw,
    AVERAGE: tl.constexpr,
):  # fmt: skip
    """What windows (h - i, w - j) send to the pixel at position `here` of them."""
    inside = exists & (h - i >= 0) & (h - i < OH) & (w - j >= 0) & (w - j < OW)
    g = tl.load(gradient - (i * stride_gh + j * stride_gw), mask=inside, other=0.0).to(tl.float32)
    at = tl.load(position - (i * stride_ph + j * stride_pw), mask=inside, other=255).to(tl.int32)
    whole += tl.where(at == here, g, 0.0)
    if AVERAGE:
        shared += g * (ratio_h * ratio_w)
    return whole, shared


@triton.jit
def _ratio(window, SIZE, STRIDE: tl.constexpr, PADDING: tl.constexpr, kernel):
    """By how much the end of the padded image makes windows shorter: mostly 1."""
    extent = tl.minimum(SIZE + 2 * PADDING - window * STRIDE, kernel)
    return tl.where(extent == kernel, 1.0, kernel / tl.maximum(extent, 1).to(tl.float32))


@triton.jit
def _gather(
    gradient, position, h, w, y, x, exists, H, W, OH, OW, KH, stride_gh, stride_gw, stride_ph, stride_pw,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    AVERAGE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of pixel (y, x) of each cell: of the windows whose kernel reaches that far."""
    whole = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    shared = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in tl.range(0, (KH - y + SH - 1) // SH, num_stages=1):
        ratio = _ratio(h - i, H, SH, PH, KH)
        if UNROLL:
            for j in tl.static_range((KW + SW - 1) // SW):
                if x + j * SW < KW:
                    whole, shared = _visit(
                        whole, shared, gradient, position, h, w, i, j, (y + i * SH) * KW + x + j * SW, exists,
                        ratio, _ratio(w - j, W, SW, PW, KW), OH, OW, stride_gh, stride_gw, stride_ph, stride_pw,
                        AVERAGE,
                    )  # fmt: skip
        else:
            for j in range((KW - x + SW - 1) // SW):
                whole, shared = _visit(
                    whole, shared, gradient, position, h, w, i, j, (y + i * SH) * KW + x + j * SW, exists,
                    ratio, _ratio(w - j, W, SW, PW, KW), OH, OW, stride_gh, stride_gw, stride_ph, stride_pw, AVERAGE,
                )  # fmt: skip
    return whole + shared * tl.div_rn(1.0, (KH * KW).to(tl.float32))


@triton.jit(
    do_not_specialize=(
        "rows", "H", "W", "OH", "OW", "cells_h", "cells_w", "KH",
        "stride_gn", "stride_gh", "stride_pn", "stride_ph", "stride_xn", "stride_xh",
    )
)  # fmt: skip
def _backward_kernel(
    grad_output, positions, grad_input,
    rows, H, W, OH, OW, cells_h, cells_w, KH,
    C, stride_gn, stride_gc, stride_gh, stride_gw, stride_pn, stride_pc, stride_ph, stride_pw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr, UNROLL: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """One tile of cells: the SH x SW pixels of the padded image at which one window begins.

    All pixels (y, x) of cells see windows at the same distance, and the same positions of them.
    """
    # 1. The cells.
    n, c, h, w, exists, _ = _place(rows, C * UNIT, cells_h, cells_w, LAST, WIDE, EVEN, BLOCK_R, BLOCK_C)
    stride_gh *= UNIT
    stride_gw *= UNIT
    stride_ph *= UNIT
    stride_pw *= UNIT
    stride_xh *= UNIT
    stride_xw *= UNIT
    gradient = grad_output + _offset(n, c, h, w, stride_gn * UNIT, stride_gc, stride_gh, stride_gw)
    position = positions + _offset(n, c, h, w, stride_pn * UNIT, stride_pc, stride_ph, stride_pw)
    out = grad_input + _offset(n, c, h * SH - PH, w * SW - PW, stride_xn * UNIT, stride_xc, stride_xh, stride_xw)

    # 2. Their pixels, one after another.
    if UNROLL:
        for y in tl.static_range(SH):
            for x in tl.static_range(SW):
                g = _gather(
                    gradient, position, h, w, y, x, exists, H, W, OH, OW, KH,
                    stride_gh, stride_gw, stride_ph, stride_pw, KW, SH, SW, PH, PW, AVERAGE, UNROLL, BLOCK_R, BLOCK_C,
                )  # fmt: skip
                _store(g, out, h, w, y, x, H, W, exists, stride_xh, stride_xw, SH, SW, PH, PW)
    else:
        for y in range(SH):
            for x in range(SW):
                g = _gather(
                    gradient, position, h, w, y, x, exists, H, W, OH, OW, KH,
                    stride_gh, stride_gw, stride_ph, stride_pw, KW, SH, SW, PH, PW, AVERAGE, UNROLL, BLOCK_R, BLOCK_C,
                )  # fmt: skip
                _store(g, out, h, w, y, x, H, W, exists, stride_xh, stride_xw, SH, SW, PH, PW)


@triton.jit
def _store(
    g, out, h, w, y, x, H, W, exists, stride_h, stride_w,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    row = h * SH - PH + y
    column = w * SW - PW + x
    inside = exists & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    tl.store(out + (y * stride_h + x * stride_w), g.to(out.dtype.element_ty), mask=inside)


def _is_last(dense: Tensor) -> bool:
    """Whether a dense image is channels_last; where either would do, its channels are the longer rows."""
    return dense.shape[1] > 1 and dense.stride(1) == 1


def _tile(rows: int, width: int, elements: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of tiles of so many elements, and its constants. Columns: the power of two that leaves fewest idle."""
    most = min(power_of_2(width), 128)
    columns = min((most, 64, 32), key=lambda c: (ceil_div(width, c) * c, -c)) if most > 32 else most
    block = elements // columns
    grid = (ceil_div(rows, block), ceil_div(width, columns))
    even, wide = width % columns == 0, rows + block >= 2**31
    return grid, {"WIDE": wide, "EVEN": even, "BLOCK_R": block, "BLOCK_C": columns}


def _windows(kernel: Pair, stride: Pair, padding: Pair) -> dict[str, int]:
    return {
        "KW": kernel[1], "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1]
    }  # fmt: skip


def _sizes(last: bool, first: Tensor, *others: Tensor | None) -> tuple[tuple[int, ...], int]:
    """Channels and the strides of all tensors, those of pixels divided by a power of two, and that: up to 16 bytes.

    Multiplied again in the kernel, it tells the compiler how far it may vectorise channels: by itself that sees
    multiples of 16 only, and 24 channels are none. Strides of dimensions of one element do not matter.
    """
    strides = [
        [0] * 4 if t is None else [s if n > 1 else 0 for n, s in zip(t.shape, t.stride(), strict=True)]
        for t in (first, *others)
    ]
    pixels = [stride for n, _, h, w in strides for stride in (n, h, w)]
    unit = math.gcd(16 // first.itemsize, first.shape[1], *pixels) if last else 1
    given = [(n // unit, c, h // unit, w // unit) for n, c, h, w in strides]
    return (first.shape[1] // unit, *(stride for four in given for stride in four)), unit


def forward(
    input: Tensor,
    uniform: Tensor | None,
    output: Tensor,
    positions: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    *,
    stochastic: bool,
) -> None:
    """Writes `output` [N, C, OH, OW] and, where they are wanted, `positions`, both dense or both channels_last, of
    `input` [N, C, H, W] of any strides: maximum + average, or stochastic pooling with `uniform` of the output's shape
    and any strides (None: what is to be expected). One launch, no host synchronisation; compiled for each kind of
    window, dtype and layout, not for sizes of images."""
    (_, C, H, W), (N, _, OH, OW) = input.shape, output.shape
    last = _is_last(output)
    rows, width = (N * OH * OW, C) if last else (N * C * OH, OW)
    if rows == 0:
        return
    grid, tile = _tile(rows, width, 1024 if last and not stochastic else 512)
    constants = {**_windows(kernel, stride, padding), **tile, "LAST": last}
    numbers = (rows, H, W, OH, OW, kernel[0])
    with _tiles.on_device(input):
        if stochastic:
            sizes, unit = _sizes(last, input, uniform)
            launch(
                _stochastic_kernel, grid, (input, uniform, output, positions), numbers, sizes, 4, **constants, UNIT=unit
            )  # fmt: skip
        else:
            sizes, unit = _sizes(last, input)
            launch(
                _max_average_kernel, grid, (input, output, positions), numbers, sizes, 4, **constants, UNIT=unit,
                UNROLL=kernel[1] <= _MOST_UNROLLED,
            )  # fmt: skip


def backward(
    grad_output: Tensor,
    positions: Tensor,
    grad_input: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    *,
    average: bool,
) -> None:
    """Writes `grad_input` [N, C, H, W], dense or channels_last, of `grad_output` [N, C, OH, OW] of any strides and
    `positions`: the gradient of maximum + average or, without `average`, of stochastic pooling. One launch."""
    (N, C, H, W), (OH, OW) = grad_input.shape, grad_output.shape[2:]
    last = _is_last(grad_input)
    cells_h, cells_w = (ceil_div(n + p, s) for n, p, s in zip((H, W), padding, stride, strict=True))
    rows, width = (N * cells_h * cells_w, C) if last else (N * C * cells_h, cells_w)
    if rows == 0:
        return
    # Four pixels for each cell: a thread has 16 bytes of channels, or two cells. More take too many registers.
    grid, tile = _tile(rows, width, 2048 // grad_input.itemsize if last else 256)
    sizes, unit = _sizes(last, grad_output, positions, grad_input)
    with _tiles.on_device(grad_output):
        launch(
            _backward_kernel, grid,
            (grad_output, positions, grad_input), (rows, H, W, OH, OW, cells_h, cells_w, kernel[0]),
            sizes, 4,
            **_windows(kernel, stride, padding), **tile, LAST=last, UNIT=unit,
            UNROLL=max(kernel[0], stride[0]) * max(kernel[1], stride[1]) <= _MOST_UNROLLED, AVERAGE=average,
        )  # fmt: skip
