"""bfloat16 for numpy, which has none: its bits in uint16, by bit manipulation independent of the kernels' own."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

BFLOAT16 = np.dtype(np.uint16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}


def widen(x: NDArray) -> NDArray[np.float32]:
    """float32 of a float32, float16 or bfloat16 array; exact."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == BFLOAT16 else x.astype(np.float32)


def narrow(x: NDArray, dtype: np.dtype) -> NDArray:
    """`x`, first rounded to float32, as `dtype`: to nearest, ties to even."""
    x = np.asarray(x, np.float32)
    if dtype != BFLOAT16:
        with np.errstate(over="ignore"):
            return x.astype(dtype)
    low = x.view(np.uint32) & np.uint32(0xFFFF0000)  # the two neighbours of |x|, and which one is nearer
    high = (low.astype(np.uint64) + 0x10000).astype(np.uint32)
    with np.errstate(all="ignore"):
        below = np.abs(x.astype(np.float64) - low.view(np.float32))
        infinite = (high & 0x7FFFFFFF) == 0x7F800000  # beyond the largest: as if the next one were 2^128
        next_one = np.where(infinite, np.copysign(np.float64(2.0**128), x), high.view(np.float32).astype(np.float64))
        above = np.abs(next_one - x)
    up = (above < below) | ((above == below) & ((low >> 16) & 1).astype(bool))
    bits = np.where(up & np.isfinite(x), high, low) >> 16
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint16)


def same(a: NDArray, b: NDArray) -> bool:
    """Equal bit for bit, except that any NaN equals any NaN."""
    x, y = widen(a), widen(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((x.view(np.uint32) == y.view(np.uint32)) | (np.isnan(x) & np.isnan(y))).all())


def far_apart(x: NDArray) -> NDArray:
    """The same rows, more than 2^31 elements apart, in address space that costs no memory: 32-bit offsets overflow."""
    stride = ((1 << 31) + 32) * x.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux
    buffer = mmap.mmap(-1, (len(x) - 1) * stride + x.shape[1] * x.itemsize, flags=flags)
    view = np.ndarray(x.shape, x.dtype, buffer, strides=(stride, x.itemsize))
    view[...] = x
    return view
