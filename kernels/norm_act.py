"""Batch norm and an activation on either side of it, on the GPU, in as few passes over memory as there are.

Training reads the input for the statistics, reads it again and writes the output; backward reads input and gradient
for two sums, reads them again and writes the input's gradient: 6 and 10 bytes an element in half precision, less where
the second pass finds the L2 cache warm.
Neither the activation nor the normalised input is stored. Tensors are dense: [outer, channels, inner] is NCHW, or, with
an inner of 1, channels_last. Sums are added in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._launch import launch
from ._layouts import dense, empty, is_channels_last, tile
from ._separable_conv_statistics import merge_statistics
from ._tiles import ceil_div

_TILE = 1024  # elements of a program's step


# Activations, by their codes in perfvl/reference/norm_act.py ----------------------------------------------------------


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0 with full relative accuracy; a difference alone loses the low bits of a small x."""
    series = 1.0 + x * (1 / 5 + x * (1 / 30 + x * (1 / 210)))  # of x^4 / 24 and what follows
    series = x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24) * series)))
    return tl.where(x > -0.35, series, tl.exp(x) - 1.0)


@triton.jit
def _activate(x, parameter, ACT: tl.constexpr):
    y = x
    if ACT == 1:
        y = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    if ACT == 2:
        y = tl.where(x > 0.0, x, x * parameter)
    if ACT == 3:
        y = tl.where(x <= 0.0, parameter * _expm1(tl.minimum(x, 0.0)), x)
    if ACT == 4:
        e = _expm1(-2.0 * tl.abs(x))
        size = -e / (2.0 + e)
        y = tl.where(x < 0.0, -size, size)
    if ACT == 5:
        e = tl.exp(-tl.abs(x))
        y = tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
    return y


@triton.jit
def _differentiate(x, grad, parameter, ACT: tl.constexpr):
    """grad * act'(x)."""
    result = grad
    if ACT == 1:
        result = tl.where(x <= 0.0, 0.0, grad)
    if ACT == 2:
        result = tl.where(x > 0.0, grad, grad * parameter)
    if ACT == 3:
        result = tl.where(x <= 0.0, grad * parameter * tl.exp(tl.minimum(x, 0.0)), grad)
    if ACT == 4:
        y = _activate(x, parameter, ACT)
        result = grad * (1.0 - y * y)
    if ACT == 5:
        y = _activate(x, parameter, ACT)
        result = grad * (y * (1.0 - y))
    return result


@triton.jit
def _seen(x, parameter, ACT: tl.constexpr, AFTER: tl.constexpr):
    """What the norm sees of the input."""
    y = x
    if AFTER:
        y = _activate(x, parameter, ACT)
    return y


@triton.jit
def _load_norm(mean, variance, weight, bias, eps, channel, exists):
    """Mean, 1 / deviation, the factor and the shift of some channels."""
    m = tl.load(mean + channel, mask=exists, other=0.0)
    inverse = tl.rsqrt(tl.load(variance + channel, mask=exists, other=1.0) + eps)
    scale = inverse
    if weight is not None:
        scale = inverse * tl.load(weight + channel, mask=exists, other=0.0)
    shift = tl.zeros_like(m)
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0)
    return m, inverse, scale, shift


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("outer", "height"))
def _statistics_kernel(
    input, counts, means, squares,
    parameter, outer, height, channels, inner,
    ACT: tl.constexpr, AFTER: tl.constexpr, ACROSS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`height` samples of one channel's planes, or, ACROSS, of BLOCK_C channels: count, mean, squared distances."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    if ACROSS:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        first, last = block * BLOCK_C, tl.minimum(channels, (block + 1) * BLOCK_C)
    else:
        c = block + tl.zeros([1, 1], tl.int32)
        first, last = 0, inner
    offset = 0 if ACROSS else block.to(tl.int64) * inner
    start, end = part * height, tl.minimum((part + 1) * height, outer)

    # 1. The mean of the first tile: squares of distances from it lose few digits, whatever the mean.
    o = start + tl.arange(0, BLOCK_O)[:, None]
    column = first + tl.arange(0, BLOCK_C)[None, :]
    inside = (o < end) & (column < last)
    x = tl.load(input + o.to(tl.int64) * channels * inner + offset + column, mask=inside, other=0.0).to(tl.float32)
    pilot = tl.sum(tl.where(inside, _seen(x, parameter, ACT, AFTER), 0.0), 0)
    few = tl.sum(inside.to(tl.float32), 0)
    if ACROSS:
        near = (pilot / tl.maximum(few, 1.0))[None, :]
    else:
        near = tl.sum(pilot, 0) / tl.sum(few, 0)
    near = tl.where(near - near == 0.0, near, 0.0)  # else infinite ones would make NaN of the mean

    # 2. Sums that stay with their lanes.
    once = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    twice = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for row in range(start, end, BLOCK_O):
        o = row + tl.arange(0, BLOCK_O)[:, None]
        for begin in range(first, last, BLOCK_C):
            column = begin + tl.arange(0, BLOCK_C)[None, :]
            inside = (o < end) & (column < last)
            at = o.to(tl.int64) * channels * inner + offset + column
            x = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
            distance = tl.where(inside, _seen(x, parameter, ACT, AFTER) - near, 0.0)
            once += distance
            twice += distance * distance

    # 3. One entry for each channel: [parts, channels].
    total, square = tl.sum(once, 0)[None, :], tl.sum(twice, 0)[None, :]
    count = ((end - start) * (1 if ACROSS else inner)).to(tl.float32)
    if not ACROSS:
        total, square = tl.sum(total, 1)[:, None], tl.sum(square, 1)[:, None]
    to = part.to(tl.int64) * channels + c
    tl.store(means + to, near + total / count, mask=c < channels)
    tl.store(squares + to, tl.maximum(square - total * total / count, 0.0), mask=c < channels)
    tl.store(counts + part, count)


@triton.jit
def _move_kernel(
    running_mean, running_var, mean, variance,
    momentum, unbiased,
    channels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Running statistics on their way to the batch's. `unbiased`: what makes the variance so."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = c < channels
    m = tl.load(running_mean + c, mask=exists) * (1.0 - momentum) + momentum * tl.load(mean + c, mask=exists)
    v = tl.load(variance + c, mask=exists) * unbiased
    tl.store(running_mean + c, m, mask=exists)
    tl.store(running_var + c, tl.load(running_var + c, mask=exists) * (1.0 - momentum) + momentum * v, mask=exists)


@triton.jit(do_not_specialize=("rows",))
def _apply_kernel(
    input, mean, variance, weight, bias, output,
    eps, parameter, rows, columns, channels,
    ACT: tl.constexpr, AFTER: tl.constexpr, ACROSS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of rows: of one channel each, or, ACROSS, of one for each column."""
    blocks = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < columns)
    if ACROSS:
        channel, exists = column, column < columns
    else:
        channel, exists = (row % channels).to(tl.int32), row < rows
    m, _, scale, shift = _load_norm(mean, variance, weight, bias, eps, channel, exists)
    x = tl.load(input + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    y = (_seen(x, parameter, ACT, AFTER) - m) * scale + shift
    if not AFTER:
        y = _activate(y, parameter, ACT)
    tl.store(output + row * columns + column, y, mask=inside)


@triton.jit(do_not_specialize=("outer", "height"))
def _sums_kernel(
    grad_output, input, mean, variance, weight, bias, sums,
    eps, parameter, outer, height, channels, inner,
    ACT: tl.constexpr, AFTER: tl.constexpr, ACROSS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As the statistics: sums of the norm's gradient g, and of g times what is normalised, [parts, 2, channels]."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    if ACROSS:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        first, last = block * BLOCK_C, tl.minimum(channels, (block + 1) * BLOCK_C)
    else:
        c = block + tl.zeros([1, 1], tl.int32)
        first, last = 0, inner
    offset = 0 if ACROSS else block.to(tl.int64) * inner
    m, inverse, scale, shift = _load_norm(mean, variance, weight, bias, eps, c, c < channels)

    by_bias = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    by_weight = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    end = tl.minimum((part + 1) * height, outer)
    for row in range(part * height, end, BLOCK_O):
        o = row + tl.arange(0, BLOCK_O)[:, None]
        for begin in range(first, last, BLOCK_C):
            column = begin + tl.arange(0, BLOCK_C)[None, :]
            inside = (o < end) & (column < last)
            at = o.to(tl.int64) * channels * inner + offset + column
            x = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
            distance = _seen(x, parameter, ACT, AFTER) - m
            if not AFTER:
                grad = _differentiate(distance * scale + shift, grad, parameter, ACT)
            by_bias += grad
            by_weight += grad * distance

    of_bias, of_weight = tl.sum(by_bias, 0)[None, :], tl.sum(by_weight, 0)[None, :]
    if not ACROSS:
        of_bias, of_weight = tl.sum(of_bias, 1)[:, None], tl.sum(of_weight, 1)[:, None]
    to = sums + part.to(tl.int64) * 2 * channels + c
    tl.store(to, of_bias, mask=c < channels)
    tl.store(to + channels, of_weight * inverse, mask=c < channels)


@triton.jit(do_not_specialize=("rows",))
def _grad_kernel(
    grad_output, input, mean, variance, weight, bias, sums, grad_input,
    eps, parameter, share, rows, columns, channels,
    ACT: tl.constexpr, AFTER: tl.constexpr, ACROSS: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of the input's gradient. `share`: 1 / elements of a channel. FIXED: the statistics are not the batch's."""
    blocks = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < columns)
    if ACROSS:
        channel, exists = column, column < columns
    else:
        channel, exists = (row % channels).to(tl.int32), row < rows
    m, inverse, scale, shift = _load_norm(mean, variance, weight, bias, eps, channel, exists)
    x = tl.load(input + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    distance = _seen(x, parameter, ACT, AFTER) - m
    if not AFTER:
        grad = _differentiate(distance * scale + shift, grad, parameter, ACT)
    if not FIXED:
        of_bias = tl.load(sums + channel, mask=exists, other=0.0) * share
        of_weight = tl.load(sums + channels + channel, mask=exists, other=0.0) * share * inverse
        grad = grad - of_bias - distance * of_weight
    grad *= scale
    if AFTER:
        grad = _differentiate(x, grad, parameter, ACT)
    tl.store(grad_input + row * columns + column, grad, mask=inside)


# Launchers ------------------------------------------------------------------------------------------------------------


def norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    parameter: float,
    after: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA implementation of `perfvl::norm_act`: input [N, C, H, W] of any strides, the others float32 [C]."""
    last = is_channels_last(input)
    x = dense(input, last)
    output = empty(last, input.shape, input)
    outer, channels, inner = _sizes(input, last)
    with _tiles.on_device(input):
        if training:
            mean, variance = _statistics(x, outer, channels, inner, activation, parameter, after)
            if running_mean is not None and running_var is not None:
                count = outer * inner
                launch(
                    _move_kernel,
                    (ceil_div(channels, _TILE),),
                    (running_mean, running_var, mean, variance),
                    (float(momentum), count / (count - 1)),
                    (channels,),
                    4,
                    BLOCK=_TILE,
                )
        else:
            mean, variance = running_mean.clone(), running_var.clone()
        rows, columns = (outer, channels) if last else (outer * channels, inner)
        block_r, block_c = tile(columns, _TILE)
        launch(
            _apply_kernel,
            (ceil_div(rows, block_r) * ceil_div(columns, block_c),),
            (x, mean, variance, weight, bias, output),
            (float(eps), float(parameter), rows),
            (columns, channels),
            4,
            ACT=activation, AFTER=after, ACROSS=last, BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip
    return output, mean, variance


def _statistics(
    x: Tensor, outer: int, channels: int, inner: int, activation: int, parameter: float, after: bool
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of what the norm sees: one launch, and one or two that join its parts."""
    across = inner == 1
    block_o, block_c = tile(channels if across else inner, _TILE)
    blocks, height, parts = _parts(x, outer, channels, across, block_o, block_c)
    counts = torch.empty(parts, dtype=torch.float32, device=x.device)
    means, squares = (torch.empty(parts, channels, dtype=torch.float32, device=x.device) for _ in range(2))
    launch(
        _statistics_kernel,
        (blocks, parts),
        (x, counts, means, squares),
        (float(parameter), outer, height),
        (channels, inner),
        4,
        ACT=activation if after else 0, AFTER=after, ACROSS=across, BLOCK_O=block_o, BLOCK_C=block_c,
    )  # fmt: skip
    return merge_statistics(counts, means, squares)


def norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
    activation: int,
    parameter: float,
    after: bool,
    need_input: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA implementation of `perfvl::norm_act_backward`: a launch for the sums, one that adds their parts, one
    for the input's gradient."""
    last = is_channels_last(input)
    x, upstream = dense(input, last), dense(grad_output, last)
    outer, channels, inner = _sizes(input, last)
    given = (mean, variance, weight, bias)
    sums = mean.new_zeros(2, 0)
    with _tiles.on_device(input):
        if training or need_affine:
            block_o, block_c = tile(channels if last else inner, _TILE)
            blocks, height, parts = _parts(x, outer, channels, last, block_o, block_c)
            of_parts = torch.empty(parts, 2, channels, dtype=torch.float32, device=x.device)
            launch(
                _sums_kernel,
                (blocks, parts),
                (upstream, x, *given, of_parts),
                (float(eps), float(parameter), outer, height),
                (channels, inner),
                4,
                ACT=activation, AFTER=after, ACROSS=last, BLOCK_O=block_o, BLOCK_C=block_c,
            )  # fmt: skip
            sums = of_parts.sum(0)
        if need_input:
            grad_input = empty(last, input.shape, input)
            rows, columns = (outer, channels) if last else (outer * channels, inner)
            block_r, block_c = tile(columns, _TILE)
            launch(
                _grad_kernel,
                (ceil_div(rows, block_r) * ceil_div(columns, block_c),),
                (upstream, x, *given, sums, grad_input),
                (float(eps), float(parameter), 1.0 / (outer * inner), rows),
                (columns, channels),
                4,
                ACT=activation, AFTER=after, ACROSS=last, FIXED=not training, BLOCK_R=block_r, BLOCK_C=block_c,
            )  # fmt: skip
        else:
            grad_input = empty(last, input[:0].shape, input)
    found = sums if need_affine else sums[:, :0]
    return grad_input, found[1].clone(), found[0].clone()


# Layouts --------------------------------------------------------------------------------------------------------------


def _sizes(x: Tensor, last: bool) -> tuple[int, int, int]:
    """The input in memory as [outer, channels, inner]."""
    n, channels, height, width = x.shape
    return (n * height * width, channels, 1) if last else (n, channels, height * width)


def _parts(x: Tensor, outer: int, channels: int, across: bool, block_o: int, block_c: int) -> tuple[int, int, int]:
    """Blocks of channels, samples of a part and how many parts: as many as fill the GPU, of two tiles at least."""
    blocks = ceil_div(channels, block_c) if across else channels
    most = ceil_div(8 * _tiles.gpu_limits(x.device).multiprocessors, blocks)
    height = max(2 * block_o, ceil_div(outer, min(most, 65_535)))
    return blocks, height, ceil_div(outer, height)
