"""The colour net on the GPU: 1x1 convolution, leaky ReLU, 1x1 convolution, leaky ReLU on every pixel of an image.

Forward reads the image and writes the output: 24 bytes a pixel for 3-10-3 channels in float32, 9 for bytes to bfloat16,
and some 120 instructions, the time of about 15 bytes on an H100. Backward computes the hidden layer again and keeps the
sums of the weights' gradients, 73 of them, in registers over all pixels of a program: 24 bytes, or 15 of an image of
bytes, and 300 instructions a pixel, the time of about 40 bytes: it is bound by them. A second kernel adds the programs'
sums in a fixed order. The image's gradient, which a network's first layer does not need, is a kernel of its own.

A thread has pixels to itself: every value of a pixel is a tensor [BLOCK], layers are tuples of them. A weight is read,
from the first-level cache, for several pixels at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._color_transform_layers import (
    before_activation,
    centered,
    inputs_and_gradients,
    leaky,
    number,
    offset_of,
    read_channels,
    tile_pixels,
    weighted_sum,
    write_channels,
    zeros,
)
from ._launch import launch
from ._tiles import ceil_div

_BLOCK = 128  # pixels of a value in backward, one of each thread
_MOST_SUMS = 76  # of one program, each in a register
_PROGRAMS = 2  # of a multiprocessor, in backward: as many as its registers hold


@triton.jit(do_not_specialize=("across", "N"))
def _forward_kernel(
    image, weight1, bias1, weight2, bias2, mean, output,
    scale, slope, across, N,
    HW, W, stride_in, stride_ic, stride_ih, stride_iw, stride_on, stride_oc, stride_ow,
    C: tl.constexpr, M: tl.constexpr, CO: tl.constexpr, RESIDUAL: tl.constexpr, JOINED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n, h, w, exists = tile_pixels(tile, across, N, HW, W, BLOCK, JOINED)
    x = read_channels(image + offset_of(n, h, w, stride_in, stride_ih, stride_iw, JOINED), exists, stride_ic, C)
    x = centered(x, mean, scale, C, 1)
    z = before_activation(x, weight1, bias1, weight2, bias2, slope, C, M, CO, RESIDUAL, 1, BLOCK)
    y = ()
    for o in tl.static_range(CO):
        y += (leaky(z[o] > 0.0, z[o], slope),)
    # The output's rows follow one another.
    pixel = tile % across * BLOCK + tl.arange(0, BLOCK)
    write_channels(output + n * stride_on + pixel.to(tl.int64) * stride_ow, y, exists, stride_oc, CO)


@triton.jit(do_not_specialize=("across", "N", "tiles"))
def _sums_kernel(
    grad_output, image, weight1, bias1, weight2, bias2, mean, partials,
    scale, slope, across, N, tiles,
    HW, W, stride_in, stride_ic, stride_ih, stride_iw, stride_gn, stride_gc, stride_gh, stride_gw,
    C: tl.constexpr, M: tl.constexpr, CO: tl.constexpr, RESIDUAL: tl.constexpr, JOINED: tl.constexpr,
    UNITS: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the program's pixels of what belongs to UNITS hidden units: partials [sum][program].

    Sums are those of weight1 and bias1, [M][C + 1], and of weight2 and bias2, [CO][M + 1].
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first_unit = tl.program_id(1) * UNITS
    sums1 = zeros(UNITS * (C + 1), BLOCK)
    sums2 = zeros(UNITS * CO, BLOCK)
    sums_bias = zeros(CO, BLOCK)
    for tile in range(program * SHARED, tiles, programs * SHARED):
        # 1. The pixels, and the gradient before the second activation.
        x, g = inputs_and_gradients(
            grad_output, image, weight1, bias1, weight2, bias2, mean, scale, slope, tile, across, N,
            HW, W, stride_in, stride_ic, stride_ih, stride_iw, stride_gn, stride_gc, stride_gh, stride_gw,
            C, M, CO, RESIDUAL, JOINED, SHARED, BLOCK,
        )  # fmt: skip
        more1 = ()
        more2 = ()
        for unit in tl.static_range(UNITS):
            # 2. A hidden unit, and the gradient before its activation. A unit beyond the last is another one.
            m = tl.minimum(first_unit + unit, M - 1)
            start = 0.0
            if bias1 is not None:
                start = number(bias1, m)
            z = weighted_sum(x, weight1 + m * C, start, 1, C, SHARED, BLOCK)
            back = weighted_sum(g, weight2 + m, 0.0, M, CO, SHARED, BLOCK)
            # 3. Its sums.
            for c in tl.static_range(C + 1):
                total = sums1[unit * (C + 1) + c]
                for s in tl.static_range(SHARED):
                    before = leaky(z[s] > 0.0, back[s], slope)
                    if c < C:
                        before *= x[c * SHARED + s]
                    total += before
                more1 += (total,)
            for o in tl.static_range(CO):
                total = sums2[unit * CO + o]
                for s in tl.static_range(SHARED):
                    total += g[o * SHARED + s] * leaky(z[s] > 0.0, z[s], slope)
                more2 += (total,)
        sums1 = more1
        sums2 = more2
        more_bias = ()
        for o in tl.static_range(CO):
            total = sums_bias[o]
            for s in tl.static_range(SHARED):
                total += g[o * SHARED + s]
            more_bias += (total,)
        sums_bias = more_bias

    # 4. One number each.
    partials += program
    for unit in tl.static_range(UNITS):
        m = first_unit + unit
        for c in tl.static_range(C + 1):
            tl.store(partials + (m * (C + 1) + c) * programs, tl.sum(sums1[unit * (C + 1) + c], 0), mask=m < M)
    partials += M * (C + 1) * programs
    for o in tl.static_range(CO):
        for unit in tl.static_range(UNITS):
            m = first_unit + unit
            tl.store(partials + (o * (M + 1) + m) * programs, tl.sum(sums2[unit * CO + o], 0), mask=m < M)
        tl.store(partials + (o * (M + 1) + M) * programs, tl.sum(sums_bias[o], 0), mask=first_unit == 0)


@triton.jit(do_not_specialize=("programs",))
def _merge_kernel(
    partials, grad_weight1, grad_bias1, grad_weight2, grad_bias2,
    programs,
    C: tl.constexpr, M: tl.constexpr, CO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the programs' sums of one number in a fixed order."""
    index = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, programs, BLOCK):
        inside = begin + lane < programs
        sums += tl.load(partials + index * programs + begin + lane, mask=inside, other=0.0)
    total = tl.sum(sums, 0)
    if index < M * (C + 1):
        row = index // (C + 1)
        column = index % (C + 1)
        tl.store(grad_weight1 + row * C + column, total, mask=column < C)
        if grad_bias1 is not None:
            tl.store(grad_bias1 + row, total, mask=column == C)
    else:
        row = (index - M * (C + 1)) // (M + 1)
        column = (index - M * (C + 1)) % (M + 1)
        tl.store(grad_weight2 + row * M + column, total, mask=column < M)
        if grad_bias2 is not None:
            tl.store(grad_bias2 + row, total, mask=column == M)


@triton.jit(do_not_specialize=("across", "N"))
def _image_kernel(
    grad_output, image, weight1, bias1, weight2, bias2, mean, grad_image,
    scale, slope, across, N,
    HW, W, stride_in, stride_ic, stride_ih, stride_iw, stride_gn, stride_gc, stride_gh, stride_gw,
    stride_on, stride_oc, stride_ow,
    C: tl.constexpr, M: tl.constexpr, CO: tl.constexpr, RESIDUAL: tl.constexpr, JOINED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The image's gradient."""
    tile = tl.program_id(0)
    x, g = inputs_and_gradients(
        grad_output, image, weight1, bias1, weight2, bias2, mean, scale, slope, tile, across, N,
        HW, W, stride_in, stride_ic, stride_ih, stride_iw, stride_gn, stride_gc, stride_gh, stride_gw,
        C, M, CO, RESIDUAL, JOINED, 1, BLOCK,
    )  # fmt: skip
    sums = zeros(C, BLOCK)
    if RESIDUAL:
        sums = g
    for m in range(M):
        start = 0.0
        if bias1 is not None:
            start = number(bias1, m)
        z = weighted_sum(x, weight1 + m * C, start, 1, C, 1, BLOCK)
        back = weighted_sum(g, weight2 + m, 0.0, M, CO, 1, BLOCK)
        before = leaky(z[0] > 0.0, back[0], slope)
        more = ()
        for c in tl.static_range(C):
            more += (sums[c] + number(weight1, m * C + c) * before,)
        sums = more
    result = ()
    for c in tl.static_range(C):
        result += (sums[c] * scale,)
    n, _, _, exists = tile_pixels(tile, across, N, HW, W, BLOCK, JOINED)
    pixel = tile % across * BLOCK + tl.arange(0, BLOCK)
    write_channels(grad_image + n * stride_on + pixel.to(tl.int64) * stride_ow, result, exists, stride_oc, C)


def _strides(image: Tensor) -> tuple[int, int, int, int]:
    """Of N, C, H and W; the stride of a single column is that of its rows."""
    n, c, h, w = image.stride()
    return n, c, h, h if image.shape[3] == 1 else w


def _is_joined(*images: Tensor) -> bool:
    """Whether rows follow one another, so that an image is one long row."""
    return all(x.shape[2] == 1 or _strides(x)[2] == x.shape[3] * _strides(x)[3] for x in images)


def _beside(image: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    last = image.shape[1] > 1 and image.stride(1) == 1
    memory = torch.channels_last if last else torch.contiguous_format
    shape = (image.shape[0], channels, *image.shape[2:])
    return torch.empty(shape, dtype=dtype, device=image.device, memory_format=memory)


def _written(image: Tensor) -> tuple[int, int, int]:
    """Strides of images, channels and pixels of a dense result."""
    return image.stride(0), image.stride(1), _strides(image)[3]


def _dense(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if p is None else p.contiguous() for p in parameters)


def color_transform(
    image: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mean: Tensor | None,
    scale: float,
    negative_slope: float,
    residual: bool,
) -> Tensor:
    """The CUDA implementation of `perfvl::color_transform`, for at most 16 channels, hidden units and outputs.

    One launch, no host synchronisation, no tuning: kernels are compiled per dtypes, channels, options and kinds of
    strides, never per size of the image or the batch.
    """
    N, C, H, W = image.shape
    joined, CO = _is_joined(image), weight2.shape[0]
    output = _beside(image, CO, weight1.dtype)
    block = 1024 if C + CO <= 12 else 256  # of a thread as many as its registers have values for
    across = ceil_div(H * W, block)
    with _tiles.on_device(image):
        launch(
            _forward_kernel,
            (N * across,),
            (image, *_dense(weight1, bias1, weight2, bias2, mean), output),
            (scale, negative_slope, across, N),
            (H * W, W, *_strides(image), *_written(output)),
            4,
            C=C, M=weight1.shape[0], CO=CO, RESIDUAL=residual, JOINED=joined, BLOCK=block,
        )  # fmt: skip
    return output


def color_transform_backward(
    grad_output: Tensor,
    image: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mean: Tensor | None,
    scale: float,
    negative_slope: float,
    residual: bool,
    need_image: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The CUDA implementation of `perfvl::color_transform_backward`: gradients of the image and of the parameters.

    Two launches for the parameters, one for the image.
    """
    (N, C, H, W), M, CO = image.shape, weight1.shape[0], weight2.shape[0]

    def floats(like: Tensor | None) -> Tensor:
        shape = like.shape if like is not None and need_weights else (0,)
        return torch.empty(shape, dtype=torch.float32, device=image.device)

    nothing = torch.empty(0, dtype=image.dtype, device=image.device)
    grad_image = _beside(image, C, image.dtype) if need_image else nothing
    found = tuple(floats(parameter) for parameter in (weight1, bias1, weight2, bias2))
    inputs = (grad_output, image, *_dense(weight1, bias1, weight2, bias2, mean))
    sizes = (H * W, W, *_strides(image), *_strides(grad_output))
    options = {"C": C, "M": M, "CO": CO, "RESIDUAL": residual, "JOINED": _is_joined(image, grad_output)}
    with _tiles.on_device(image):
        if need_weights:
            units, together = _units(C, M, CO), 4 if C + CO <= 12 else 2
            chunks, across = ceil_div(M, units), ceil_div(H * W, _BLOCK)
            most = max(1, _PROGRAMS * _tiles.gpu_limits(image.device).multiprocessors // chunks)
            programs = min(most, ceil_div(N * across, together))
            count = M * (C + 1) + CO * (M + 1)
            partials = torch.empty((count, programs), dtype=torch.float32, device=image.device)
            launch(
                _sums_kernel,
                (programs, chunks),
                (*inputs, partials),
                (scale, negative_slope, across, N, N * across),
                sizes,
                _BLOCK // 32,
                **options, UNITS=units, SHARED=together, BLOCK=_BLOCK,
            )  # fmt: skip
            destinations = (
                found[0],
                None if bias1 is None else found[1],
                found[2],
                None if bias2 is None else found[3],
            )
            launch(_merge_kernel, (count,), (partials, *destinations), (programs,), (), 4, C=C, M=M, CO=CO, BLOCK=512)
        if need_image:
            block = 256
            across = ceil_div(H * W, block)
            launch(
                _image_kernel,
                (N * across,),
                (*inputs, grad_image),
                (scale, negative_slope, across, N),
                (*sizes, *_written(grad_image)),
                4,
                **options, BLOCK=block,
            )  # fmt: skip
    return grad_image, *found


def _units(C: int, M: int, CO: int) -> int:
    """Hidden units of a program: as many as its registers have sums for, in equal shares."""
    most = max(1, (_MOST_SUMS - CO) // (C + 1 + CO))
    return ceil_div(M, ceil_div(M, most))
