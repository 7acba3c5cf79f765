"""Workloads of ``perfvl.functional.max_avg_pool2d``: the poolings of CaffeNet and of ResNet's stem while training.

At the least forward reads the input and writes the output and a byte for each window; backward reads the output's
gradient and the bytes and writes the input's gradient. There are no products. Contenders have their tensors in
channels_last, except where their name says NCHW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.functional import max_avg_pool2d

from .workload import Contender, Precision, Step, Tensors, Workload, in_layout, step_of

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Pool = Callable[..., Tensor]


def eager(input: Tensor, kernel_size: int, stride: int, padding: int, ceil_mode: bool) -> Tensor:
    """PyTorch's two functions, and a sum."""
    largest = F.max_pool2d(input, kernel_size, stride, padding, ceil_mode=ceil_mode)
    return largest + F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode=ceil_mode)


def compiled() -> Pool:
    """``torch.compile`` with its defaults."""
    return torch.compile(eager, fullgraph=True, dynamic=False)


def windows(params: Mapping[str, Any]) -> tuple[int, int, int, bool]:
    """Kernel size, stride, padding, and whether sizes are rounded up."""
    return 3, 2, params["padding"], params["ceil_mode"]


def output_size(params: Mapping[str, Any]) -> int:
    """Height and width of the output."""
    image = torch.empty((1, 1, params["size"], params["size"]), device="meta")
    return F.max_pool2d(image, *windows(params)[:3], ceil_mode=params["ceil_mode"]).shape[2]


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers."""
    n, c, size, out = params["N"], params["C"], params["size"], output_size(params)
    shapes = {"input": (n, c, size, size), "grad_output": (n, c, out, out)}
    return {name: torch.randn(s, generator=generator).to(DTYPES[params["dtype"]]) for name, s in shapes.items()}


def contender(
    params: Mapping[str, Any],
    pool: Callable[[], Pool],
    memory: torch.memory_format = CHANNELS_LAST,
    role: Any = "peer",
    **settings: Any,
) -> Contender:
    """A pooling with tensors in its layout. `pool` is called in time: it may compile."""

    def build(inputs: Tensors) -> Step:
        held = in_layout(inputs, memory)
        x = held["input"].requires_grad_(params["backward"])
        function, sizes = pool(), windows(params)
        return step_of(lambda: function(x, *sizes), {"input": x}, held["grad_output"], params["backward"])

    return Contender(build, role=role, **settings)


def contenders(params: Mapping[str, Any]) -> dict[str, Contender]:
    """perfvl, eager and compiled, in both layouts, and a copy of the input."""
    row = functools.partial(contender, params, precision=params["dtype"])

    def copy(inputs: Tensors) -> Step:
        source, target = inputs["input"], torch.empty_like(inputs["input"])
        return lambda: target.copy_(source)

    return {
        "perfvl": row(lambda: max_avg_pool2d, role="perfvl"),
        "perfvl, NCHW": row(lambda: max_avg_pool2d, NCHW, role="perfvl"),
        "eager": row(lambda: eager, role="eager"),
        "eager, NCHW": row(lambda: eager, NCHW),
        "torch.compile": row(compiled, compiles=True),
        "torch.compile, NCHW": row(compiled, NCHW, compiles=True),
        "a copy of the input": Contender(copy, "bound", params["dtype"]),
    }


def workload(
    layer: str,
    channels: int,
    size: int,
    batch: int,
    *,
    padding: int = 0,
    ceil_mode: bool = True,
    backward: bool = False,
    dtype: Precision = "float32",
    **settings: Any,
) -> Workload:
    """One pooling with 3x3 windows 2 apart, forward or forward and backward."""
    params = {"N": batch, "C": channels, "size": size, "padding": padding, "ceil_mode": ceil_mode}
    params |= {"dtype": dtype, "backward": backward}
    exact = contender(params, lambda: eager, NCHW)

    def truth(inputs: Tensors) -> Tensors:
        return exact.build({name: t.double() for name, t in inputs.items()})()

    pixels, outputs = batch * channels * size**2, batch * channels * output_size(params) ** 2
    item = 2 if dtype == "bfloat16" else 4
    forward, with_bytes = item * (pixels + outputs), 2 * (item * (pixels + outputs) + outputs)
    direction = "fwd-bwd" if backward else "fwd"
    return Workload(
        op="pooling",
        name=f"pool-{channels}-{size}-n{batch}-{direction}-{dtype}",
        title=f"{layer}: maximum + average of 3x3, {channels} channels, {size}x{size}, batch {batch}, {dtype}; "
        f"{'forward and backward' if backward else 'forward'}",
        params=params,
        make=make,
        contenders=contenders(params),
        truth=truth,
        backward=False,
        evaluate=lambda workload, step, inputs: step(),
        bytes=with_bytes if backward else forward,
        flops=9 * outputs * (2 if backward else 1),
        memory=backward,
        **settings,
    )


ON_GPU = torch.cuda.is_available()
CAFFENET = [(96, 30), (256, 15), (256, 7)]


def _all() -> list[Workload]:
    found = []
    for i, (channels, size) in enumerate(CAFFENET):
        for batch in (256,) if ON_GPU else (16, 64):
            pool = functools.partial(workload, f"CaffeNet pool{(1, 2, 5)[i]}", channels, size, batch)
            found += [pool(quick=(batch, size) == (16, 15)), pool(backward=True, quick=(batch, size) == (16, 15))]
            found.append(pool(backward=True, dtype="bfloat16"))
    stem = functools.partial(workload, "ResNet stem", 64, 112, 128 if ON_GPU else 8, padding=1, ceil_mode=False)
    return [*found, stem(), stem(backward=True), stem(backward=True, dtype="bfloat16")]


WORKLOADS = tuple(_all())
