"""Workloads of ``perfvl.functional.separable_conv2d`` and of blocks of separable convolutions with batch norm.

A layer is ReLU, depthwise and pointwise convolution. At the least forward reads the input and writes the output;
backward reads both of input and the output's gradient, and writes the input's. Every contender has its tensors in the
layout it likes best, except where the workload is NCHW: there a conversion is part of the work.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.functional import separable_conv2d
from perfvl.nn.separable_chain import run_chain

from . import separable_conv_peers as peers
from .workload import Contender, Precision, Step, Tensors, Unavailable, Workload, in_layout, step_of

LEAVES = ("input", "depthwise", "pointwise")
CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def output_size(params: Mapping[str, Any]) -> int:
    """Height and width of the output."""
    return (params["size"] + 2 * params["padding"] - params["kernel"]) // params["stride"] + 1


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers that stay near 1 through both convolutions, and the gradient of the output."""
    n, c, o, k, size = (params[name] for name in ("N", "C", "O", "kernel", "size"))
    out = output_size(params)
    tensors = {
        "input": torch.randn(n, c, size, size, generator=generator),
        "depthwise": torch.randn(c, 1, k, k, generator=generator) / k,
        "pointwise": torch.randn(o, c, 1, 1, generator=generator) / c**0.5,
        "grad_output": torch.randn(n, o, out, out, generator=generator),
    }
    memory = NCHW if params["layout"] == "NCHW" else CHANNELS_LAST
    return {name: t.to(DTYPES[params["dtype"]]).contiguous(memory_format=memory) for name, t in tensors.items()}


def contender(pair: Any, memory: torch.memory_format, backward: bool, role: Any = "peer", **settings: Any) -> Contender:
    """A pair on tensors in its layout. `pair` is built in time, and is given the contender's own weights."""

    def build(inputs: Tensors) -> Step:
        own = in_layout(inputs, memory)
        leaves = {name: own[name].requires_grad_(backward) for name in LEAVES}
        x, *weights = leaves.values()
        function = pair(*weights)
        return step_of(lambda: function(x, *weights), leaves, own["grad_output"], backward)

    return Contender(build, role=role, **settings)


def truth(inputs: Tensors, stride: int, padding: int, backward: bool) -> Tensors:
    """Output and gradients in float64."""
    double = {name: t.detach().double() for name, t in inputs.items()}
    step = contender(lambda *weights: peers.eager(stride, padding), NCHW, backward).build(double)
    return step()


def contenders(params: Mapping[str, Any], backward: bool) -> dict[str, Contender]:
    """perfvl, eager in both layouts, both ways to compile, and the products alone."""
    stride, padding = params["stride"], params["padding"]
    eager = peers.eager(stride, padding)
    converted = params["layout"] == "NCHW"
    memory = NCHW if converted else CHANNELS_LAST
    best = peers.through_channels_last(eager) if converted else eager
    precision: dict[str, Any] = {"precision": params["dtype"]}

    def fused(input: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
        return separable_conv2d(input, depthwise, pointwise, stride=stride, padding=padding, pre_activation="relu")

    def frozen(*weights: Tensor) -> Any:
        module = peers.frozen(peers.PairModule(best, *weights))
        return lambda input, *_: module(input)

    def products(inputs: Tensors) -> Step:
        pixels = params["N"] * output_size(params) ** 2
        return peers.products(pixels, params["C"], params["O"], inputs["input"].detach(), backward=backward)

    found = {
        "perfvl": contender(lambda *_: fused, memory, backward, "perfvl", **precision),
        "eager": contender(lambda *_: best, memory, backward, "eager", **precision),
        "eager, NCHW": contender(lambda *_: eager, NCHW, backward, **precision),
        "torch.compile": contender(lambda *_: peers.compiled(best), memory, backward, compiles=True, **precision),
        "pointwise products alone": Contender(products, "bound", params["dtype"]),
    }
    if not backward:
        found["torch.compile, max-autotune, frozen"] = contender(frozen, memory, False, compiles=True, **precision)
    return found


def workload(
    network: str,
    channels: int,
    outputs: int,
    size: int,
    *,
    batch: int,
    kernel: int = 3,
    stride: int = 1,
    backward: bool = False,
    dtype: Precision = "float32",
    layout: str = "channels_last",
    **settings: Any,
) -> Workload:
    """One layer, forward or forward and backward."""
    params = {"N": batch, "C": channels, "O": outputs, "size": size, "kernel": kernel, "stride": stride}
    params |= {"padding": kernel // 2, "dtype": dtype, "layout": layout}
    pixels, weights = batch * output_size(params) ** 2, channels * (kernel**2 + outputs)
    read, written = batch * channels * size**2, pixels * outputs
    moved = 3 * read + 2 * written + 3 * weights if backward else read + written + weights
    direction = "fwd-bwd" if backward else "fwd"
    return Workload(
        op="separable_conv",
        name=f"separable-{channels}-{outputs}-{size}-k{kernel}-s{stride}-n{batch}-{direction}-{dtype}",
        title=f"{network}: {channels} to {outputs} channels, {size}x{size}, kernel {kernel}, stride {stride}, batch "
        f"{batch}, {layout}, {dtype}; {'forward and backward' if backward else 'forward'}",
        params=params,
        make=make,
        contenders=contenders(params, backward),
        truth=functools.partial(truth, stride=stride, padding=kernel // 2, backward=backward),
        backward=False,
        convolves=True,
        evaluate=lambda workload, step, inputs: step(),
        bytes=(2 if dtype == "bfloat16" else 4) * moved,
        flops=(3 if backward else 1) * 2 * pixels * weights,
        memory=backward,
        **settings,
    )


def block_workload(channels: int, size: int, batch: int, count: int = 3, **settings: Any) -> Workload:
    """A block of Xception's middle flow while training, forward and backward."""

    def make_images(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
        shape = (params["N"], channels, size, size)
        found = {name: torch.randn(shape, generator=generator) for name in ("input", "grad_output")}
        return {name: t.contiguous(memory_format=CHANNELS_LAST) for name, t in found.items()}

    def chain(layers: nn.ModuleList, input: Tensor) -> Tensor:
        parts = [("relu", layer.conv1, layer.pointwise, layer.bn) for layer in layers]
        return run_chain(input, parts, residual=input)

    def row(forward: Any, memory: torch.memory_format, role: Any = "peer", **options: Any) -> Contender:
        def build(inputs: Tensors) -> Step:
            x, upstream = (inputs[name].detach().clone(memory_format=memory) for name in ("input", "grad_output"))
            layers = peers.block(channels, count).to(x.device, x.dtype).to(memory_format=memory)
            leaves = {"input": x.requires_grad_(), **dict(layers.named_parameters())}
            function = forward()

            def step() -> Tensors:
                output = function(layers, x)
                grads = torch.autograd.grad(output, list(leaves.values()), upstream)
                return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

            return step

        return Contender(build, role=role, **options)

    def exact(inputs: Tensors) -> Tensors:
        return row(lambda: peers.run_modules, NCHW).build({name: t.double() for name, t in inputs.items()})()

    def products(inputs: Tensors) -> Step:
        one = peers.products(batch * size**2, channels, channels, inputs["input"], backward=True)
        return lambda: [one() for _ in range(count)]

    pixels, weights = batch * size**2, channels * (9 + channels)
    return Workload(
        op="separable_conv",
        name=f"xception-block-{channels}-{size}-n{batch}",
        title=f"(ReLU, separable convolution, batch norm) x {count} with residual, training: {channels} channels, "
        f"{size}x{size}, batch {batch}; forward and backward",
        params={"N": batch, "C": channels, "size": size, "layers": count},
        make=make_images,
        contenders={
            "perfvl": row(lambda: chain, CHANNELS_LAST, "perfvl"),
            "eager": row(lambda: peers.run_modules, CHANNELS_LAST, "eager"),
            "eager, NCHW": row(lambda: peers.run_modules, NCHW),
            "torch.compile": row(lambda: peers.compiled(peers.run_modules), CHANNELS_LAST, compiles=True),
            "pointwise products alone": Contender(products, "bound"),
        },
        truth=exact,
        backward=False,
        convolves=True,
        evaluate=lambda workload, step, inputs: step(),
        bytes=4 * (count * (2 + 4) * pixels * channels + 3 * count * weights),
        flops=count * 3 * 2 * pixels * weights,
        **settings,
    )


def depthwise_workload(number: int, shape: tuple[int, ...], kernel: tuple[int, int]) -> Workload:
    """A depthwise convolution of KernelBench by itself, where a GPU has the op for it."""

    def fused(inputs: Tensors) -> Step:
        if not inputs["input"].is_cuda:
            raise Unavailable("the depthwise convolution alone has a CUDA kernel only")
        op = torch.ops.perfvl.depthwise_conv.default
        x, weight = inputs["input"], inputs["weight"]
        return lambda: op(x, None, None, weight, None, [1, 1], [0] * 4, [1, 1], 0, 0, False)[0]

    def eager(inputs: Tensors) -> Step:
        return lambda: F.conv2d(inputs["input"], inputs["weight"], groups=shape[1])

    def make_images(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
        weight = torch.randn(shape[1], 1, *kernel, generator=generator)
        return {"input": torch.randn(shape, generator=generator), "weight": weight}

    n, c, height, width = shape
    pixels = n * c * (height - kernel[0] + 1) * (width - kernel[1] + 1)
    return Workload(
        op="separable_conv",
        name=f"kernelbench-{number}-depthwise",
        title=f"KernelBench level 1, {number}: depthwise {kernel[0]}x{kernel[1]}, {shape}, NCHW, float32; forward",
        params={"shape": list(shape), "kernel": list(kernel)},
        make=make_images,
        contenders={"perfvl": Contender(fused, "perfvl"), "eager": Contender(eager, "eager")},
        truth=lambda inputs: {"output": eager({name: t.double() for name, t in inputs.items()})()},
        backward=False,
        convolves=True,
        output="output",
        bytes=4 * (n * c * height * width + pixels),
        flops=2 * pixels * kernel[0] * kernel[1],
        memory=False,
    )


ON_GPU = torch.cuda.is_available()
XCEPTION = [
    (64, 128, 147),
    (128, 128, 147),
    (128, 256, 74),
    (256, 256, 74),
    (256, 728, 37),
    (728, 728, 37),
    (728, 728, 19),
    (728, 1024, 19),
    (1024, 1536, 10),
    (1536, 2048, 10),
]
MOBILENET_V2 = [(32, 16, 112, 1), (96, 24, 112, 2), (144, 24, 56, 1), (192, 32, 28, 1), (384, 64, 14, 1)]
MOBILENET_V2 += [(576, 96, 14, 1), (960, 160, 7, 1)]
EFFICIENTNET_B0 = [(144, 40, 56, 2), (240, 40, 28, 1), (480, 112, 14, 1), (672, 112, 14, 1), (1152, 192, 7, 1)]
KINDS = tuple(itertools.product(DTYPES, (False, True)))
KERNELBENCH = {
    82: ((16, 64, 512, 512), (3, 3)),
    83: ((64, 8, 512, 512), (3, 1)),
    84: ((64, 128, 256, 512), (3, 3)),
    85: ((32, 128, 128, 256), (3, 7)),
}


def _all() -> list[Workload]:
    found = []
    for c, o, size in XCEPTION:
        batch = 64 if ON_GPU else 1 if size == 147 else 4
        quick = (c, o) == (728, 728) and size == 19
        for dtype, backward in KINDS:
            layer = functools.partial(workload, "Xception", c, o, size, batch=batch, quick=quick)
            found.append(layer(backward=backward, dtype=dtype))
    for dtype, backward in KINDS:
        for c, o, size, stride in MOBILENET_V2:
            layer = functools.partial(workload, "MobileNetV2", c, o, size, batch=64 if ON_GPU else 4)
            found.append(layer(stride=stride, backward=backward, dtype=dtype))
        for c, o, size, stride in EFFICIENTNET_B0:
            layer = functools.partial(workload, "EfficientNet-B0", c, o, size, batch=64 if ON_GPU else 4, kernel=5)
            found.append(layer(stride=stride, backward=backward, dtype=dtype))
    size, batch = (512, 16) if ON_GPU else (256, 1)
    found.append(workload("KernelBench level 1, 86", 64, 128, size, batch=batch, layout="NCHW"))
    found.append(block_workload(728, 19, 64 if ON_GPU else 4, quick=True))
    if ON_GPU:
        found += [depthwise_workload(number, *problem) for number, problem in KERNELBENCH.items()]
    return found


WORKLOADS = tuple(_all())
