"""Workloads of ``perfvl.functional.color_transform``: the colour nets of the CaffeNet study while training.

An image, bytes or float32, is centred and scaled, and goes through two 1x1 convolutions with a leaky ReLU behind each.
At the least forward reads the image and writes the output; backward reads the image and the output's gradient and, for
an image of floats, writes its gradient. Contenders have their tensors in channels_last, except where their name says
NCHW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.functional import color_transform

from . import color_transform_peers as peers
from .workload import Contender, Precision, Step, Tensors, Workload, in_layout, step_of

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("weight1", "bias1", "weight2", "bias2")


CLEAR = 1e-3  # of the activations' kinks


def next_to_a_kink(image: Tensor, net: Mapping[str, Tensor]) -> Tensor:
    """Where a unit of a pixel is so near to 0 that rounding may choose its slope."""
    weight1, bias1, weight2, bias2 = (net[name].float() for name in WEIGHTS)
    hidden = F.conv2d((image.float() - net["mean"][:, None, None]) * peers.SCALE, weight1, bias1)
    output = F.conv2d(F.leaky_relu(hidden, peers.SLOPE), weight2, bias2)
    return torch.cat([hidden, output], 1).abs().amin(1, keepdim=True) < CLEAR


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Random bytes, of which no unit is next to its kink; normal weights such that outputs are near 1."""
    n, c, m, o, size = (params[name] for name in ("N", "C", "M", "O", "size"))
    shapes = {
        "weight1": (m, c, 1, 1),
        "bias1": (m,),
        "weight2": (o, m, 1, 1),
        "bias2": (o,),
        "grad_output": (n, o, size, size),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["weight1"] /= 3 * c**0.5
    made["weight2"] /= m**0.5
    made = {name: t.to(DTYPES[params["dtype"]]) for name, t in made.items()}
    made["mean"] = torch.full((c,), 110.0)
    image = torch.randint(256, (n, c, size, size), generator=generator, dtype=torch.uint8)
    while (near := next_to_a_kink(image, made)).any():
        image = torch.where(near, torch.randint(256, image.shape, generator=generator, dtype=torch.uint8), image)
    return {"image": image if params["image"] == "uint8" else image.float(), **made}


def contender(
    params: Mapping[str, Any],
    net: Callable[[], peers.Net],
    memory: torch.memory_format = CHANNELS_LAST,
    role: Any = "peer",
    **settings: Any,
) -> Contender:
    """A net with tensors in its layout. `net` is called in time: it may compile."""

    def build(inputs: Tensors) -> Step:
        held = in_layout(inputs, memory)
        learning = WEIGHTS if params["image"] == "uint8" else ("image", *WEIGHTS)
        leaves = {name: held[name].requires_grad_(params["backward"]) for name in learning}
        arguments = held["image"], *(held[name] for name in WEIGHTS), held["mean"]
        function = net()
        return step_of(lambda: function(*arguments), leaves, held["grad_output"], params["backward"])

    return Contender(build, role=role, **settings)


def fused(image: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, mean: Tensor) -> Tensor:
    """perfvl's."""
    options = {"negative_slope": peers.SLOPE, "mean": mean, "scale": peers.SCALE}
    return color_transform(image, weight1, bias1, weight2, bias2, **options)


def contenders(params: Mapping[str, Any]) -> dict[str, Contender]:
    """perfvl, eager and compiled, in both layouts."""
    row = functools.partial(contender, params, precision=params["dtype"])
    return {
        "perfvl": row(lambda: fused, role="perfvl"),
        "perfvl, NCHW": row(lambda: fused, NCHW, role="perfvl"),
        "eager": row(lambda: peers.eager, role="eager"),
        "eager, NCHW": row(lambda: peers.eager, NCHW),
        "torch.compile": row(lambda: peers.compiled(peers.eager), compiles=True),
        "torch.compile, NCHW": row(lambda: peers.compiled(peers.eager), NCHW, compiles=True),
    }


def workload(
    size: int,
    batch: int,
    image: Literal["uint8", "float32"] = "uint8",
    *,
    hidden: int = 10,
    backward: bool = False,
    dtype: Precision = "float32",
    **settings: Any,
) -> Workload:
    """A net of 3 - `hidden` - 3 channels, forward or forward and backward."""
    params = {"N": batch, "C": 3, "M": hidden, "O": 3, "size": size, "image": image, "dtype": dtype}
    params["backward"] = backward
    exact = contender(params, lambda: peers.eager, NCHW)

    def truth(inputs: Tensors) -> Tensors:
        return exact.build({name: t.double() for name, t in inputs.items()})()

    pixels, learns = batch * size**2, image == "float32"
    of_image, of_output = 3 * (4 if learns else 1), 3 * (2 if dtype == "bfloat16" else 4)
    moved = (2 + learns) * of_image + 2 * of_output if backward else of_image + of_output
    # Products of the first layer and the second: forward, the weights' gradient, and the gradient of what is before.
    products = (2 + learns + 3) if backward else 2
    direction = "fwd-bwd" if backward else "fwd"
    return Workload(
        op="color_transform",
        name=f"color-3-{hidden}-3-{size}-n{batch}-{image}-{direction}-{dtype}",
        title=f"Colour net 3-{hidden}-3: {size}x{size}, batch {batch}, image of {image}, {dtype}; "
        f"{'forward and backward' if backward else 'forward'}",
        params=params,
        make=make,
        contenders=contenders(params),
        truth=truth,
        backward=False,
        evaluate=lambda workload, step, inputs: step(),
        bytes=pixels * moved,
        flops=products * pixels * 2 * 3 * hidden,
        memory=backward,
        **settings,
    )


ON_GPU = torch.cuda.is_available()
SIZES = ((128, 256), (224, 64), (512, 16)) if ON_GPU else ((128, 32), (224, 16), (512, 4))


def _all() -> list[Workload]:
    found = []
    for size, batch in SIZES:
        for image in ("uint8", "float32"):
            for backward in (False, True):
                found.append(workload(size, batch, image, backward=backward, quick=(size, image) == (128, "uint8")))
        found.append(workload(size, batch, backward=True, dtype="bfloat16"))
    size, batch = SIZES[0]
    found.append(workload(size, batch, hidden=16, backward=True))
    return found


WORKLOADS = tuple(_all())
