"""Maxout and the adaptive piecewise linear unit (APL) on the GPU: one pass over memory each way.

Bytes in half precision with two pieces: maxout moves 7 an output forward and 7 backward; APL 4 an element forward and 6
backward. For 128 x 96 x 30 x 30 outputs that is 77 MB each way, and 44 and 66 MB: 9 to 17 us of an H200's memory.
Tensors are dense: [rows, pieces, columns] and [outer, parameters, inner] are both NCHW and channels_last. Sums for the
parameters of APL are added in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._launch import launch
from ._layouts import dense, empty, is_channels_last, tile
from ._tiles import ceil_div, power_of_2

_TILE = 1024  # elements of a program


# Maxout ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("rows",))
def _maxout_kernel(
    input, output, winner,
    rows, columns,
    PIECES: tl.constexpr, WITH_WINNER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of the output. The last of equal pieces wins, and NaN."""
    blocks = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < columns)

    pointer = input + row * PIECES * columns + column
    largest = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    place = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for piece in range(1, PIECES):
        pointer += columns
        other = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
        wins = (other >= largest) | (other != other)
        largest = tl.where(wins, other, largest)
        place = tl.where(wins, piece, place)
    to = row * columns + column
    tl.store(output + to, largest, mask=inside)
    if WITH_WINNER:
        tl.store(winner + to, place.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=("rows",))
def _maxout_backward_kernel(
    grad_output, winner, grad_input,
    rows, columns,
    PIECES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of the output's gradient, given to the piece that won; 0 to the others."""
    blocks = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < columns)

    at = row * columns + column
    grad = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
    place = tl.load(winner + at, mask=inside, other=0).to(tl.int32)
    pointer = grad_input + row * PIECES * columns + column
    for piece in range(PIECES):
        tl.store(pointer, tl.where(place == piece, grad, 0.0), mask=inside)
        pointer += columns


def maxout(input: Tensor, pieces: int, with_winner: bool) -> tuple[Tensor, Tensor]:
    """The CUDA implementation of `perfvl::maxout`: input [N, pieces * C, H, W] of any strides."""
    last = is_channels_last(input)
    n, channels, height, width = input.shape
    output = empty(last, (n, channels // pieces, height, width), input)
    winner = empty(last, output.shape, input, torch.uint8) if with_winner else input.new_empty(0, dtype=torch.uint8)
    rows, columns = _rows(output, last)
    block_r, block_c = tile(columns, _TILE)
    with _tiles.on_device(input):
        launch(
            _maxout_kernel,
            (ceil_div(rows, block_r) * ceil_div(columns, block_c),),
            (dense(input, last), output, winner),
            (rows,),
            (columns,),
            4,
            PIECES=pieces, WITH_WINNER=with_winner, BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip
    return output, winner


def maxout_backward(grad_output: Tensor, winner: Tensor, pieces: int) -> Tensor:
    """The CUDA implementation of `perfvl::maxout_backward`, in the layout of `winner`."""
    last = is_channels_last(winner)
    n, channels, height, width = winner.shape
    grad_input = empty(last, (n, pieces * channels, height, width), grad_output)
    rows, columns = _rows(winner, last)
    block_r, block_c = tile(columns, _TILE)
    with _tiles.on_device(winner):
        launch(
            _maxout_backward_kernel,
            (ceil_div(rows, block_r) * ceil_div(columns, block_c),),
            (dense(grad_output, last), dense(winner, last), grad_input),
            (rows,),
            (columns,),
            4,
            PIECES=pieces, BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip
    return grad_input


# APL ------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("rows",))
def _apl_kernel(
    input, slope, hinge, output,
    rows, columns, parameters,
    SEGMENTS: tl.constexpr, ACROSS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of rows: of one parameter each, or, ACROSS, of one for each column."""
    blocks = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < columns)
    at = row * columns + column
    x = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    if ACROSS:
        parameter = column
        exists = column < columns
    else:
        parameter = (row % parameters).to(tl.int32)
        exists = row < rows
    for s in tl.static_range(SEGMENTS):
        below = tl.load(hinge + s * parameters + parameter, mask=exists, other=0.0) - x
        y += tl.load(slope + s * parameters + parameter, mask=exists, other=0.0) * tl.where(below <= 0.0, 0.0, below)
    tl.store(output + at, y, mask=inside)


@triton.jit(do_not_specialize=("outer", "height"))
def _apl_backward_kernel(
    grad_output, input, slope, hinge, grad_input, sums,
    outer, height, parameters, inner,
    SEGMENTS: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`height` samples of one parameter's planes, or, ACROSS, of BLOCK_C parameters; and their part of the sums."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)[:, None]
    if ACROSS:
        p = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        first, last = block * BLOCK_C, tl.minimum(parameters, (block + 1) * BLOCK_C)
    else:
        p = block + tl.zeros([1, 1], tl.int32)
        first, last = 0, inner
    entry = s * parameters + p
    exists = (s < SEGMENTS) & (p < parameters)
    a = tl.load(slope + entry, mask=exists, other=0.0)[:, None, :]
    b = tl.load(hinge + entry, mask=exists, other=0.0)[:, None, :]

    # 1. Tiles of samples and columns: the input's gradient, and sums that stay with their lanes.
    by_slope = tl.zeros([BLOCK_S, BLOCK_O, BLOCK_C], tl.float32)
    by_hinge = tl.zeros([BLOCK_S, BLOCK_O, BLOCK_C], tl.float32)
    offset = 0 if ACROSS else block.to(tl.int64) * inner
    end = tl.minimum((part + 1) * height, outer)
    for start in range(part * height, end, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)[:, None]
        for begin in range(first, last, BLOCK_C):
            column = begin + tl.arange(0, BLOCK_C)[None, :]
            inside = (o < end) & (column < last)
            at = o.to(tl.int64) * parameters * inner + offset + column
            x = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
            below = b - x[None, :, :]
            passed = tl.where(below <= 0.0, 0.0, grad[None, :, :])
            by_slope += grad[None, :, :] * tl.where(below <= 0.0, 0.0, below)
            by_hinge += passed
            tl.store(grad_input + at, tl.where(x <= 0.0, 0.0, grad) - tl.sum(a * passed, 0), mask=inside)

    # 2. One sum for each parameter: [parts][2][SEGMENTS][parameters].
    to = sums + part.to(tl.int64) * 2 * SEGMENTS * parameters + entry
    slopes, hinges = tl.sum(by_slope, 1), tl.sum(by_hinge, 1)
    if not ACROSS:
        slopes, hinges = tl.sum(slopes, 1)[:, None], tl.sum(hinges, 1)[:, None]
    tl.store(to, slopes, mask=exists)
    tl.store(to + SEGMENTS * parameters, hinges * tl.sum(a, 1), mask=exists)


def apl(input: Tensor, slope: Tensor, hinge: Tensor) -> Tensor:
    """The CUDA implementation of `perfvl::apl`: input [N, C, H, W], parameters float32 [S, C, 1, 1] or [S, C, H, W]."""
    last = is_channels_last(input)
    output = empty(last, input.shape, input)
    outer, parameters, inner = _parameters(input, slope, last)
    across = inner == 1
    rows, columns = (outer, parameters) if across else (outer * parameters, inner)
    block_r, block_c = tile(columns, _TILE)
    with _tiles.on_device(input):
        launch(
            _apl_kernel,
            (ceil_div(rows, block_r) * ceil_div(columns, block_c),),
            (dense(input, last), dense(slope, last), dense(hinge, last), output),
            (rows,),
            (columns, parameters),
            4,
            SEGMENTS=len(slope), ACROSS=across, BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip
    return output


def apl_backward(grad_output: Tensor, input: Tensor, slope: Tensor, hinge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA implementation of `perfvl::apl_backward`: one launch, and two that add the parts' sums."""
    last, segments = is_channels_last(input), len(slope)
    grad_input = empty(last, input.shape, input)
    outer, parameters, inner = _parameters(input, slope, last)
    across = inner == 1
    block_s = power_of_2(segments)
    # Parameters and sums of an element, 4 BLOCK_S registers, leave room for few elements in a thread.
    block_o, block_c = tile(parameters if across else inner, min(_TILE // 2, 2 * _TILE // block_s))
    blocks = ceil_div(parameters, block_c) if across else parameters
    # As many parts as fill the GPU, of two tiles at least.
    most = ceil_div(8 * _tiles.gpu_limits(input.device).multiprocessors, blocks)
    height = max(2 * block_o, ceil_div(outer, min(most, 65_535)))
    parts = ceil_div(outer, height)
    sums = torch.empty(parts, 2, segments, parameters, dtype=torch.float32, device=input.device)
    with _tiles.on_device(input):
        launch(
            _apl_backward_kernel,
            (blocks, parts),
            (dense(grad_output, last), *(dense(t, last) for t in (input, slope, hinge)), grad_input, sums),
            (outer, height),
            (parameters, inner),
            4,
            SEGMENTS=segments, ACROSS=across, BLOCK_S=block_s, BLOCK_O=block_o, BLOCK_C=block_c,
        )  # fmt: skip
    return grad_input, *(_as_parameters(sums[:, k].sum(0), slope, last) for k in range(2))


# Layouts --------------------------------------------------------------------------------------------------------------


def _rows(output: Tensor, last: bool) -> tuple[int, int]:
    """Rows and columns of a maxout's output: images in NCHW, pixels in channels_last."""
    n, channels, height, width = output.shape
    return (n * height * width, channels) if last else (n, channels * height * width)


def _parameters(input: Tensor, slope: Tensor, last: bool) -> tuple[int, int, int]:
    """The input in memory as [outer, parameters, inner]."""
    n, channels, height, width = input.shape
    pixels = height * width
    if slope.shape[2] * slope.shape[3] == pixels:
        return n, channels * pixels, 1
    return (n * pixels, channels, 1) if last else (n, channels, pixels)


def _as_parameters(found: Tensor, slope: Tensor, last: bool) -> Tensor:
    """[S, parameters], in the order of the input's memory, in the shape of `slope`."""
    segments, channels, height, width = slope.shape
    if last:
        return found.view(segments, height, width, channels).permute(0, 3, 1, 2)
    return found.view(slope.shape)
