"""Workloads of ``perfvl.nn.NormAct2d``: batch norm and activation of CaffeNet's maps while training.

At the least forward reads the input and writes the output; backward reads the input and the output's gradient and
writes the input's. That is what a cache as large as the maps would leave: the mean is known when all has been read.
Maps are in channels_last, except where a contender's name says NCHW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from perfvl.nn import NormAct2d

from . import norm_act_peers as peers
from .workload import Contender, Precision, Step, Tensors, Workload, in_layout, step_of

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEARNED = ("input", "weight", "bias")


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers around 0.5; parameters and statistics as some training leaves them.

    What the norm gives is not next to 0, where rounding would decide on which side of a ReLU's kink it is.
    """
    shape, channels = (params["N"], params["C"], params["size"], params["size"]), params["C"]
    dtype = DTYPES[params["dtype"]]
    input = (torch.randn(shape, generator=generator) + 0.5).to(dtype)
    weight = 0.5 + torch.rand(channels, generator=generator)
    bias = torch.randn(channels, generator=generator)
    for _ in range(3):  # what is moved moves the mean, a little
        normal = F.batch_norm(input.double(), None, None, weight.double(), bias.double(), True)
        input = torch.where(normal.abs() < 1e-3, input + 0.0625, input)
    return {
        "input": input,
        "weight": weight,
        "bias": bias,
        "running_mean": torch.randn(channels, generator=generator),
        "running_var": 0.5 + torch.rand(channels, generator=generator),
        "grad_output": torch.randn(shape, generator=generator).to(dtype),
    }


def contender(
    params: Mapping[str, Any],
    function: Callable[[], peers.NormAct],
    memory: torch.memory_format = CHANNELS_LAST,
    role: Any = "peer",
    **settings: Any,
) -> Contender:
    """A norm with tensors in its layout and statistics of its own. `function` is called in time: it may compile."""

    def build(inputs: Tensors) -> Step:
        held = in_layout(inputs, memory)
        leaves = {name: nn.Parameter(held[name], requires_grad=params["backward"]) for name in LEARNED}
        arguments = *leaves.values(), *(held[name] for name in peers.STATE[2:])
        call = function()
        return step_of(lambda: call(*arguments), leaves, held["grad_output"], params["backward"])

    return Contender(build, role=role, precision=params["dtype"], **settings)


def workload(
    channels: int,
    size: int,
    batch: int,
    activation: str = "relu",
    order: str = "before",
    *,
    backward: bool = True,
    dtype: Precision = "float32",
    **settings: Any,
) -> Workload:
    """Training-mode norm of [batch, channels, size, size] and an activation on one side of it."""
    params = {
        "N": batch,
        "C": channels,
        "size": size,
        "activation": activation,
        "order": order,
        "dtype": dtype,
        "backward": backward,
    }

    def fused() -> peers.NormAct:
        behind = order == "before"
        return peers.with_state(NormAct2d(channels, peers.activation_of(activation, inplace=behind), order=order))

    def plain(compiles: bool = False) -> peers.NormAct:
        return peers.with_state(peers.two_layers(channels, activation, order), compiles=compiles)

    rows: dict[str, Contender] = {}
    ways: list[tuple[str, Callable[[], peers.NormAct], dict[str, Any]]] = [
        ("perfvl", fused, {"role": "perfvl"}),
        ("eager", plain, {"role": "eager"}),
        ("torch.compile", lambda: plain(compiles=True), {"compiles": True}),
    ]
    for name, function, options in ways:
        rows[name] = contender(params, function, CHANNELS_LAST, **options)
        rows[f"{name}, NCHW"] = contender(params, function, NCHW, **options)

    def truth(inputs: Tensors) -> Tensors:
        return contender(params, plain, NCHW).build({name: t.double() for name, t in inputs.items()})()

    elements = batch * channels * size * size
    direction = "fwd-bwd" if backward else "fwd"
    return Workload(
        op="norm_act",
        name=f"{activation}-{order}-{channels}-{size}-n{batch}-{direction}-{dtype}",
        title=f"{activation} {'behind' if order == 'before' else 'before'} batch norm, {channels} channels, "
        f"{size}x{size}, batch {batch}, {dtype}; {'forward and backward' if backward else 'forward'}",
        params=params,
        make=make,
        contenders=rows,
        truth=truth,
        backward=False,
        evaluate=lambda workload, step, inputs: step(),
        bytes=(2 if dtype == "bfloat16" else 4) * (5 if backward else 2) * elements,
        flops=(22 if backward else 8) * elements,
        memory=backward,
        **settings,
    )


ON_GPU = torch.cuda.is_available()
MAPS = [(96, 30), (256, 15), (384, 7)]  # channels and side of CaffeNet's maps


def _all() -> list[Workload]:
    found = []
    for channels, size in MAPS:
        batch = 256 if ON_GPU else 32
        maps = functools.partial(workload, channels, size)
        found += [maps(n, order=order) for n in (batch, 4 * batch) for order in ("before", "after")]
        found.append(maps(batch, backward=False, quick=size == 15))
        found.append(maps(4 * batch, order="after", backward=False))
        found += [maps(batch, "elu", "after", backward=backward) for backward in (False, True)]
    found.append(workload(256, 15, 256 if ON_GPU else 32, "elu", "after", dtype="bfloat16"))
    found.append(workload(256, 15, 256 if ON_GPU else 32, dtype="bfloat16", quick=True))
    return found


WORKLOADS = tuple(_all())
