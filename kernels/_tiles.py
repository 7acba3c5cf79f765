"""What the Triton kernels of several ops share: the limits of the GPU at hand and small device functions."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_ALREADY_THERE = contextlib.nullcontext()


class Gpu(NamedTuple):
    """The three numbers that tile sizes and grids are chosen from."""

    capability: int  # compute capability times ten: 90 for H100 and H200
    multiprocessors: int
    shared_memory: int  # bytes one program may use


@functools.cache
def gpu_limits(device: torch.device) -> Gpu:
    """Limits of a CUDA device, read once per device."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b). Triton's own takes microseconds: it is made for kernels."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def reads_in_vectors(matrix: torch.Tensor) -> bool:
    """Whether Triton can load 16 bytes at a time: it knows strides and sizes to be multiples of 16 elements, or not."""
    first, second = matrix.stride()
    long, short = (first, second) if first > second else (second, first)
    return short == 1 and long % 16 == 0 and matrix.shape[1] % 16 == 0 and matrix.data_ptr() % 16 == 0


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, so the tensor's device has to be made current."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _ALREADY_THERE
    return torch.cuda.device(tensor.device)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 with full relative accuracy; 1 + x alone loses the low bits of a small x."""
    r = x / (2.0 + x)
    r2 = r * r
    # atanh series; for x < 1/2 the first dropped term is below 4e-10 of the sum.
    series = 1.0 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7 + r2 * (1 / 9 + r2 * (1 / 11)))))
    return tl.where(x < 0.5, 2.0 * r * series, tl.log(1.0 + x))


@triton.jit
def load_scale(temperature, temperature_tensor):
    """1 / temperature in fp32, read from the device when the temperature is a tensor."""
    if temperature_tensor is not None:
        temperature = tl.load(temperature_tensor).to(tl.float32)
    return tl.div_rn(1.0, temperature)


@triton.jit
def load_count(K, valid):
    """How many rows of the queue count: all K, or clamp(valid, 0, K) read from the device."""
    count = K
    if valid is not None:
        count = tl.minimum(tl.maximum(tl.load(valid), 0), K).to(tl.int32)
    return count
