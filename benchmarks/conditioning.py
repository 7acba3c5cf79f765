"""Workloads of ``perfvl.functional.conditioned_conv2d`` and ``perfvl.nn.ConditioningAugmentation``: StackGAN's
conditioning while training.

A conditioned convolution sees an image and a text that is the same everywhere. At the least forward reads both and
writes the output; backward reads both and the output's gradient, and writes both gradients, that of the weight apart.
The least products known are those of the image's convolution and nine for each sample of the condition, where the
concatenation takes nine for each pixel. Contenders have their tensors in channels_last, except where their name says
NCHW. The augmentation is a linear layer, ReLU, a sample of a normal distribution and that one's divergence; no gradient
of the text is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from perfvl.functional import conditioned_conv2d
from perfvl.ops.conditioning import conditioning_augmentation

from . import conditioning_peers as peers
from .workload import Contender, Precision, Step, Tensors, Workload, in_layout, step_of

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers; weights such that outputs are near 1."""
    n, c, e, o, size = (params[name] for name in ("N", "C", "E", "O", "size"))
    shapes = {
        "input": (n, c, size, size),
        "condition": (n, e),
        "weight": (o, c + e, 3, 3),
        "grad_output": (n, o, size, size),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["weight"] /= (9 * (c + e)) ** 0.5
    return {name: t.to(DTYPES[params["dtype"]]) for name, t in made.items()}


def contender(
    params: Mapping[str, Any],
    convolution: Callable[[], peers.Convolution],
    memory: torch.memory_format = CHANNELS_LAST,
    role: Any = "peer",
    *,
    image_alone: bool = False,
    **settings: Any,
) -> Contender:
    """A convolution with tensors in its layout. `convolution` is called in time: it may compile."""

    def build(inputs: Tensors) -> Step:
        held = in_layout(inputs, memory)
        if image_alone:
            held["weight"] = held["weight"][:, : params["C"]].clone(memory_format=memory)
        wanted = ("input", "weight") if image_alone else ("input", "condition", "weight")
        leaves = {name: held[name].requires_grad_(params["backward"]) for name in wanted}
        arguments = held["input"], held["condition"], held["weight"]
        function = convolution()
        return step_of(lambda: function(*arguments), leaves, held["grad_output"], params["backward"])

    return Contender(build, role=role, **settings)


def contenders(params: Mapping[str, Any]) -> dict[str, Contender]:
    """perfvl and eager in both layouts, compiled, and the image's convolution alone."""
    row = functools.partial(contender, params, precision=params["dtype"])
    return {
        "perfvl": row(lambda: conditioned_conv2d, role="perfvl"),
        "perfvl, NCHW": row(lambda: conditioned_conv2d, NCHW, role="perfvl"),
        "eager": row(lambda: peers.concatenated, role="eager"),
        "eager, NCHW": row(lambda: peers.concatenated, NCHW),
        "torch.compile": row(lambda: peers.compiled(peers.concatenated), compiles=True),
        "torch.compile, NCHW": row(lambda: peers.compiled(peers.concatenated), NCHW, compiles=True),
        "image convolution alone": row(lambda: peers.of_image, role="bound", image_alone=True),
        "image convolution alone, NCHW": row(lambda: peers.of_image, NCHW, role="bound", image_alone=True),
    }


def workload(
    part: str,
    channels: int,
    dim: int,
    outputs: int,
    size: int,
    batch: int,
    *,
    backward: bool = False,
    dtype: Precision = "float32",
    **settings: Any,
) -> Workload:
    """One conditioned convolution, forward or forward and backward."""
    params = {
        "N": batch,
        "C": channels,
        "E": dim,
        "O": outputs,
        "size": size,
        "dtype": dtype,
        "backward": backward,
    }
    exact = contender(params, lambda: peers.concatenated, NCHW)

    def truth(inputs: Tensors) -> Tensors:
        return exact.build({name: t.double() for name, t in inputs.items()})()

    pixels, weights = batch * size**2, 9 * (channels + dim) * outputs
    read, written = pixels * channels + batch * dim, pixels * outputs
    moved = 3 * read + 2 * written + 3 * weights if backward else read + written + weights
    direction = "fwd-bwd" if backward else "fwd"
    return Workload(
        op="conditioning",
        name=f"conditioned-{channels}-{dim}-{outputs}-{size}-n{batch}-{direction}-{dtype}",
        title=f"StackGAN {part}: {channels} channels and a condition of {dim} to {outputs} channels, {size}x{size}, "
        f"batch {batch}, {dtype}; {'forward and backward' if backward else 'forward'}",
        params=params,
        make=make,
        contenders=contenders(params),
        truth=truth,
        backward=False,
        evaluate=lambda workload, step, inputs: step(),
        bytes=(2 if dtype == "bfloat16" else 4) * moved,
        flops=(3 if backward else 1) * 18 * outputs * (pixels * channels + batch * dim),
        convolves=True,
        memory=backward,
        **settings,
    )


def make_texts(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers. The bias puts every column of the projection well above or below 0: where ReLU's kink is near, a
    rounding moves numbers across it, and the gradients of right answers differ."""
    n, width, dim = (params[name] for name in ("N", "T", "e"))
    shapes = {"text": (n, width), "weight": (2 * dim, width), "eps": (n, dim), "grad_condition": (n, dim)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["weight"] /= 3 * width**0.5
    made["bias"] = torch.tensor([2.5, -2.5]).repeat(dim)
    return {name: t.to(DTYPES[params["dtype"]]) for name, t in made.items()}


def augmentation_contender(
    params: Mapping[str, Any], augmentation: Callable[[], peers.Augmentation], role: Any = "peer", **settings: Any
) -> Contender:
    """Forward, and the gradients of weight and bias for those of the condition and of twice the divergence."""

    def build(inputs: Tensors) -> Step:
        text, weight, bias, eps = (inputs[name].detach() for name in ("text", "weight", "bias", "eps"))
        leaves = {"weight": weight, "bias": bias}
        leaves = {name: t.clone().requires_grad_(params["backward"]) for name, t in leaves.items()}
        upstream = inputs["grad_condition"], torch.full((), 2.0, device=text.device, dtype=torch.float32)
        if text.dtype == torch.float64:
            upstream = upstream[0], upstream[1].double()
        function = augmentation()

        def step() -> Tensors:
            if not params["backward"]:
                with torch.no_grad():
                    condition, kl = function(text, leaves["weight"], leaves["bias"], eps)
                return {"condition": condition, "kl": kl}
            condition, kl = function(text, leaves["weight"], leaves["bias"], eps)
            grads = torch.autograd.grad((condition, kl), list(leaves.values()), upstream)
            return {"condition": condition.detach(), "kl": kl.detach(), **dict(zip(leaves, grads, strict=True))}

        return step

    return Contender(build, role=role, **settings)


def fused(text: Tensor, weight: Tensor, bias: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """perfvl's."""
    found = conditioning_augmentation(text, weight, bias, eps)
    return found.condition, found.kl


def augmentation_workload(
    batch: int,
    width: int = 1024,
    dim: int = 128,
    *,
    backward: bool = False,
    dtype: Precision = "float32",
    **settings: Any,
) -> Workload:
    """The condition of a batch of texts, forward or forward and backward."""
    params = {"N": batch, "T": width, "e": dim, "dtype": dtype, "backward": backward}
    row = functools.partial(augmentation_contender, params, precision=dtype)
    exact = augmentation_contender(params, lambda: peers.augmentation)

    def truth(inputs: Tensors) -> Tensors:
        return exact.build({name: t.double() for name, t in inputs.items()})()

    def product(inputs: Tensors) -> Step:
        return peers.product(*(inputs[name] for name in ("text", "weight", "bias")), backward=backward)

    texts, weights, numbers = batch * width, 2 * dim * (width + 1), batch * dim
    # Forward: noise read; condition, mu and logvar written. Backward: the condition's gradient and the last three read.
    moved = (2 if backward else 1) * (texts + weights + 4 * numbers)
    direction = "fwd-bwd" if backward else "fwd"
    return Workload(
        op="conditioning",
        name=f"augmentation-{width}-{dim}-n{batch}-{direction}-{dtype}",
        title=f"StackGAN conditioning augmentation: texts of {width} to conditions of {dim}, batch {batch}, {dtype}; "
        f"{'forward and backward' if backward else 'forward'}",
        params=params,
        make=make_texts,
        contenders={
            "perfvl": row(lambda: fused, "perfvl"),
            "eager": row(lambda: peers.augmentation, "eager"),
            "torch.compile": row(lambda: peers.compiled(peers.augmentation), compiles=True),
            "product alone": Contender(product, "bound", dtype),
        },
        truth=truth,
        backward=False,
        evaluate=lambda workload, step, inputs: step(),
        bytes=(2 if dtype == "bfloat16" else 4) * moved,
        flops=(2 if backward else 1) * 4 * batch * width * dim,
        memory=False,
        repeats=10,
        **settings,
    )


ON_GPU = torch.cuda.is_available()
HEAD = ("Stage-I discriminator's head", 512, 128, 512, 4)
GENERATOR = ("Stage-II generator", 512, 128, 512, 16)


def _all() -> list[Workload]:
    found = []
    placed = [(HEAD, (64,)), (GENERATOR, (16,))] if ON_GPU else [(HEAD, (16,)), (GENERATOR, (4, 16))]
    for place, batches in placed:
        for batch in batches:
            for backward in (False, True):
                for dtype in DTYPES:
                    quick = dtype == "float32" and batch == batches[0]
                    found.append(workload(*place, batch, backward=backward, dtype=dtype, quick=quick))
    for batch in (16, 64):
        for backward in (False, True):
            found.append(augmentation_workload(batch, backward=backward, quick=batch == 64))
        found.append(augmentation_workload(batch, backward=True, dtype="bfloat16"))
    return found


WORKLOADS = tuple(_all())
