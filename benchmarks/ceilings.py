"""What this machine can do at best: the two ceilings of the roofline, measured in the same run as the workloads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .timing import clock_for


def measure_ceilings(device: torch.device, *, seconds: float = 0.5) -> dict[str, float]:
    """Best copy bandwidth (bytes read plus written) and best square matrix product rate in float32, bfloat16, and on a
    GPU TF32. On the CPU the better of the two libraries that PyTorch has for products: its BLAS is not made for every
    processor.

    Best, not median: a ceiling that noise had lowered would flatter every fraction computed from it. The float32 rate
    is that of torch's current matmul precision setting. A workload whose inputs stay in cache may exceed the copy
    bandwidth.
    """
    on_gpu = device.type == "cuda"
    copy = _copy(1 << 30 if on_gpu else 1 << 28, device)
    ceilings = {"bytes_per_second": copy.work / _best(copy.call, device, seconds)}
    for dtype in (torch.float32, torch.bfloat16):
        product = _product(8192 if on_gpu else 2048, dtype, device)
        rivals = [product] if on_gpu else [product, _convolution(2048, dtype)]
        name = f"{str(dtype).removeprefix('torch.')}_flops_per_second"
        ceilings[name] = max(rival.work / _best(rival.call, device, seconds) for rival in rivals)
        if on_gpu and dtype == torch.float32:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            ceilings["tf32_flops_per_second"] = product.work / _best(product.call, device, seconds)
            torch.backends.cuda.matmul.allow_tf32 = before
    return ceilings


def roofline_seconds(
    bytes_moved: int | None, flops: int | None, precision: str, ceilings: dict[str, float]
) -> float | None:
    """The least time the work can take on this machine: its bytes or its FLOPs, whichever takes longer."""
    if bytes_moved is None or flops is None:
        return None
    return max(bytes_moved / ceilings["bytes_per_second"], flops / ceilings[f"{precision}_flops_per_second"])


class _Task(NamedTuple):
    call: Callable[[], Any]
    work: int


def _copy(size: int, device: torch.device) -> _Task:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros(size, dtype=torch.uint8, device=device)
    return _Task(lambda: target.copy_(source), 2 * size)


def _product(size: int, dtype: torch.dtype, device: torch.device) -> _Task:
    left = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    return _Task(lambda: torch.mm(left, left, out=out), 2 * size**3)


def _convolution(size: int, dtype: torch.dtype) -> _Task:
    """The same product as pixels of channels by a 1x1 convolution's weights."""
    pixels, weights = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((1, size, 32, size // 32), (size, size, 1, 1))
    )
    return _Task(lambda: torch.conv2d(pixels, weights), 2 * size**3)


def _best(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    clock = clock_for(device, cold=False)
    clock(call, 1)
    deadline = time.perf_counter() + seconds
    best = clock(call, 1)
    while time.perf_counter() < deadline:
        best = min(best, clock(call, 1))
    return best
