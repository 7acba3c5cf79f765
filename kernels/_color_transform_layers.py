"""What the kernels of `color_transform` do with pixels: device functions on tuples of tensors [BLOCK].

A tuple holds the channels or hidden units of a block of pixels, or those of several blocks, [channel][block], so that a
weight that has been read is used for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def leaky(positive, x, slope):
    return tl.where(positive, x, x * slope)


@triton.jit
def tile_pixels(tile, across, N, HW, W, BLOCK: tl.constexpr, JOINED: tl.constexpr):
    """(n, h, w, whether there is such a pixel); of images whose rows follow one another, all of it is one row."""
    n = (tile // across).to(tl.int64)
    w = tile % across * BLOCK + tl.arange(0, BLOCK)
    exists = (w < HW) & (n < N)
    h = w
    if not JOINED:
        h = w // W
        w = w - h * W
    return n, h, w, exists


@triton.jit
def offset_of(n, h, w, stride_n, stride_h, stride_w, JOINED: tl.constexpr):
    offset = n * stride_n + w.to(tl.int64) * stride_w
    if not JOINED:
        offset += h.to(tl.int64) * stride_h
    return offset


@triton.jit
def read_channels(pointers, exists, stride_c, COUNT: tl.constexpr):
    """A pixel's channels in float32; where there is no pixel 0."""
    values = ()
    for _ in tl.static_range(COUNT):
        values += (tl.load(pointers, mask=exists, other=0).to(tl.float32),)
        pointers += stride_c
    return values


@triton.jit
def centered(values, mean, scale, COUNT: tl.constexpr, SHARED: tl.constexpr):
    """``scale * (values - mean[c])`` for SHARED pixels: values are [c][pixel]."""
    x = ()
    for c in tl.static_range(COUNT):
        start = 0.0
        if mean is not None:
            start = tl.load(mean + c)
        for s in tl.static_range(SHARED):
            x += ((values[c * SHARED + s] - start) * scale,)
    return x


@triton.jit
def write_channels(pointers, values, exists, stride_c, COUNT: tl.constexpr):
    for c in tl.static_range(COUNT):
        tl.store(pointers, values[c].to(pointers.dtype.element_ty), mask=exists)
        pointers += stride_c


@triton.jit
def number(pointer, index):
    """One weight, the same for all pixels."""
    return tl.load(pointer + index).to(tl.float32)


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values += (tl.zeros([BLOCK], tl.float32),)
    return values


@triton.jit
def weighted_sum(
    values, weight, start, step: tl.constexpr, COUNT: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr
):
    """``start + sum_c weight[c * step] * values[c]`` for SHARED pixels: values are [c][pixel]."""
    sums = ()
    for _ in tl.static_range(SHARED):
        sums += (tl.zeros([BLOCK], tl.float32) + start,)
    for c in tl.static_range(COUNT):
        factor = number(weight, c * step)
        more = ()
        for s in tl.static_range(SHARED):
            more += (sums[s] + factor * values[c * SHARED + s],)
        sums = more
    return sums


@triton.jit
def before_activation(
    x, weight1, bias1, weight2, bias2, slope, C: tl.constexpr, M: tl.constexpr, CO: tl.constexpr,
    RESIDUAL: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Outputs before the second activation, [o][pixel]. A hidden unit lives until all of them have their share."""
    z = ()
    for o in tl.static_range(CO):
        start = 0.0
        if bias2 is not None:
            start = number(bias2, o)
        for s in tl.static_range(SHARED):
            first = tl.zeros([BLOCK], tl.float32) + start
            if RESIDUAL:
                first += x[o * SHARED + s]
            z += (first,)
    for m in range(M):  # unrolled, all weights would be read first, into registers
        start = 0.0
        if bias1 is not None:
            start = number(bias1, m)
        h = weighted_sum(x, weight1 + m * C, start, 1, C, SHARED, BLOCK)
        more = ()
        for o in tl.static_range(CO):
            factor = number(weight2, o * M + m)
            for s in tl.static_range(SHARED):
                more += (z[o * SHARED + s] + factor * leaky(h[s] > 0.0, h[s], slope),)
        z = more
    return z


@triton.jit
def inputs_and_gradients(
    grad_output, image, weight1, bias1, weight2, bias2, mean, scale, slope, first, across, N,
    HW, W, stride_in, stride_ic, stride_ih, stride_iw, stride_gn, stride_gc, stride_gh, stride_gw,
    C: tl.constexpr, M: tl.constexpr, CO: tl.constexpr, RESIDUAL: tl.constexpr, JOINED: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [c][pixel], and the gradient before the second activation [o][pixel], of SHARED tiles from the first one on."""
    pixels = ()
    upstream = ()
    for s in tl.static_range(SHARED):
        n, h, w, exists = tile_pixels(first + s, across, N, HW, W, BLOCK, JOINED)
        pixels += read_channels(
            image + offset_of(n, h, w, stride_in, stride_ih, stride_iw, JOINED), exists, stride_ic, C
        )
        offset = offset_of(n, h, w, stride_gn, stride_gh, stride_gw, JOINED)
        upstream += read_channels(grad_output + offset, exists, stride_gc, CO)
    x = ()
    for c in tl.static_range(C):
        for s in tl.static_range(SHARED):
            x += (pixels[s * C + c],)
    x = centered(x, mean, scale, C, SHARED)
    z = before_activation(x, weight1, bias1, weight2, bias2, slope, C, M, CO, RESIDUAL, SHARED, BLOCK)
    g = ()
    for o in tl.static_range(CO):
        for s in tl.static_range(SHARED):
            g += (leaky(z[o * SHARED + s] > 0.0, upstream[s * CO + o], slope),)
    return x, g
