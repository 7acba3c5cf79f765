"""Workloads of ``perfvl.nn.UpsampleConv2d``: the blocks of StackGAN's generators while training.

A block is nearest x2 upsampling, 3x3 convolution, batch norm and ReLU. At the least forward reads the input and writes
the output; backward reads both of input and the output's gradient, and writes the input's. The least products known are
nine for each pixel of the input, where the convolution of the upsampled image takes thirty-six. Contenders have their
tensors in channels_last, except where their name says NCHW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from perfvl.nn import UpsampleConv2d

from . import upsample_conv_peers as peers
from .workload import Contender, Precision, Step, Tensors, Workload, in_layout, step_of

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers."""
    n, c, o, size = (params[name] for name in ("N", "C", "O", "size"))
    shapes = {"input": (n, c, size, size), "grad_output": (n, o, 2 * size, 2 * size)}
    return {name: torch.randn(s, generator=generator).to(DTYPES[params["dtype"]]) for name, s in shapes.items()}


def contender(
    params: Mapping[str, Any],
    block: Callable[[], peers.Block],
    memory: torch.memory_format = CHANNELS_LAST,
    role: Any = "peer",
    **settings: Any,
) -> Contender:
    """A block with parameters of its own, and tensors in its layout. `block` is called in time: it may compile."""

    def build(inputs: Tensors) -> Step:
        held = in_layout(inputs, memory)
        x = held["input"]
        module = peers.parameters(params["C"], params["O"]).to(x.device, x.dtype).to(memory_format=memory)
        leaves = {"input": x.requires_grad_(params["backward"]), **dict(module.named_parameters())}
        function = block()
        return step_of(lambda: function(module, x), leaves, held["grad_output"], params["backward"])

    return Contender(build, role=role, **settings)


def contenders(params: Mapping[str, Any]) -> dict[str, Contender]:
    """perfvl and eager in both layouts, compiled, the transposed convolution, and the products alone."""
    row = functools.partial(contender, params, precision=params["dtype"])

    def fused(block: UpsampleConv2d, input: Tensor) -> Tensor:
        return block(input)

    def products(inputs: Tensors) -> Step:
        pixels = params["N"] * params["size"] ** 2
        return peers.products(pixels, params["C"], params["O"], inputs["input"], backward=params["backward"])

    return {
        "perfvl": row(lambda: fused, role="perfvl"),
        "perfvl, NCHW": row(lambda: fused, NCHW, role="perfvl"),
        "eager": row(lambda: peers.eager, role="eager"),
        "eager, NCHW": row(lambda: peers.eager, NCHW),
        "torch.compile": row(lambda: peers.compiled(peers.eager), compiles=True),
        "transposed convolution": row(lambda: peers.transposed),
        "nine products alone": Contender(products, "bound", params["dtype"]),
    }


def workload(
    stage: str,
    channels: int,
    outputs: int,
    size: int,
    batch: int,
    *,
    backward: bool = False,
    dtype: Precision = "float32",
    **settings: Any,
) -> Workload:
    """One block, forward or forward and backward."""
    params = {"N": batch, "C": channels, "O": outputs, "size": size, "dtype": dtype, "backward": backward}
    exact = contender(params, lambda: peers.eager, NCHW)

    def truth(inputs: Tensors) -> Tensors:
        return exact.build({name: t.double() for name, t in inputs.items()})()

    pixels, weights = batch * size**2, 9 * channels * outputs
    read, written = pixels * channels, 4 * pixels * outputs
    moved = 3 * read + 2 * written + 3 * weights if backward else read + written + weights
    direction = "fwd-bwd" if backward else "fwd"
    return Workload(
        op="upsample_conv",
        name=f"upsample-{channels}-{outputs}-{size}-n{batch}-{direction}-{dtype}",
        title=f"StackGAN {stage}: {channels} to {outputs} channels, {size}x{size} to {2 * size}x{2 * size}, batch "
        f"{batch}, {dtype}, training; {'forward and backward' if backward else 'forward'}",
        params=params,
        make=make,
        contenders=contenders(params),
        truth=truth,
        backward=False,
        convolves=True,
        evaluate=lambda workload, step, inputs: step(),
        bytes=(2 if dtype == "bfloat16" else 4) * moved,
        flops=(3 if backward else 1) * 2 * pixels * weights,
        memory=backward,
        **settings,
    )


ON_GPU = torch.cuda.is_available()
STAGE_1 = [(1024, 512, 4), (512, 256, 8), (256, 128, 16), (128, 64, 32)]
STAGE_2 = [(512, 256, 16), (256, 128, 32), (128, 64, 64), (64, 32, 128)]


def _all() -> list[Workload]:
    found = []
    stages = ("Stage-I", STAGE_1, 64 if ON_GPU else 16), ("Stage-II", STAGE_2, 16 if ON_GPU else 4)
    for stage, blocks, batch in stages:
        for c, o, size in blocks:
            block = functools.partial(workload, stage, c, o, size, batch, quick=(stage, size) == ("Stage-I", 16))
            found += [block(), block(backward=True)]
            if stage == "Stage-I":
                found.append(block(backward=True, dtype="bfloat16"))
    return found


WORKLOADS = tuple(_all())
