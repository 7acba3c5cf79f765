"""Workloads of ``perfvl.nn.Maxout`` and ``perfvl.nn.APL``: the activations of CaffeNet while training.

At the least maxout reads its pieces and writes the largest; backward reads one gradient and writes the pieces'.
APL reads its input and writes its output; backward reads the input and the output's gradient and writes the input's.
Maps are in channels_last, except where a contender's name says NCHW; behind a linear layer there is one layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from perfvl.ops.activation import apl, maxout

from . import activation_peers as peers
from .workload import Contender, Precision, Step, Tensors, Workload, in_layout, step_of

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Function = Callable[..., Tensor]


def sample(params: Mapping[str, Any]) -> tuple[int, ...]:
    """Sizes of one output: (C, H, W), or (C,) behind a linear layer."""
    size = params["size"]
    return (params["C"], size, size) if size else (params["C"],)


def make_pieces(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers; of two pieces none are equal: what PyTorch does to those differs from function to function."""
    shape = (params["N"], *sample(params))
    first, second, grad = (torch.randn(shape, generator=generator).to(DTYPES[params["dtype"]]) for _ in range(3))
    second = torch.where(first == second, second + 1, second)
    return {"input": torch.cat([first, second], 1), "grad_output": grad}


def make_units(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers; parameters as an untrained layer has them."""
    shape = (params["N"], *sample(params))
    parameters = (params["segments"], *(sample(params) if params["shared"] == "position" else (params["C"],)))
    dtype = DTYPES[params["dtype"]]
    return {
        "input": torch.randn(shape, generator=generator).to(dtype),
        "slope": torch.rand(parameters, generator=generator) - 0.5,
        "hinge": 0.5 * torch.randn(parameters, generator=generator),
        "grad_output": torch.randn(shape, generator=generator).to(dtype),
    }


def contender(
    params: Mapping[str, Any],
    function: Callable[[], Function],
    memory: torch.memory_format = CHANNELS_LAST,
    role: Any = "peer",
    **settings: Any,
) -> Contender:
    """A function of tensors in its layout. `function` is called in time: it may compile."""

    def build(inputs: Tensors) -> Step:
        held = in_layout(inputs, memory)
        upstream = held.pop("grad_output")
        leaves = {name: t.requires_grad_(params["backward"]) for name, t in held.items()}
        call = function()
        return step_of(lambda: call(*leaves.values()), leaves, upstream, params["backward"])

    return Contender(build, role=role, **settings)


def in_both_layouts(params: Mapping[str, Any], name: str, function: Callable[[], Function], **settings: Any) -> dict:
    """One row for each layout of maps; one for vectors."""
    row = functools.partial(contender, params, function, precision=params["dtype"], **settings)
    return {name: row(CHANNELS_LAST), f"{name}, NCHW": row(NCHW)} if params["size"] else {name: row(NCHW)}


def contenders(params: Mapping[str, Any], fused: Function, written: Mapping[str, Function]) -> dict[str, Contender]:
    """perfvl, what users write, and the first of that compiled."""
    found = in_both_layouts(params, "perfvl", lambda: fused, role="perfvl")
    for name, function in written.items():
        role = "eager" if name == "eager" else "peer"
        found |= in_both_layouts(params, name, lambda function=function: function, role=role)
    first = next(iter(written.values()))
    return found | in_both_layouts(params, "torch.compile", lambda: peers.compiled(first), compiles=True)


def workload(
    params: Mapping[str, Any],
    name: str,
    title: str,
    make: Callable[[Mapping[str, Any], torch.Generator], Tensors],
    rows: dict[str, Contender],
    exact: Function,
    *,
    elements: int,
    operations: int,
    **settings: Any,
) -> Workload:
    """`elements` to move, and `operations` on them."""

    def truth(inputs: Tensors) -> Tensors:
        return contender(params, lambda: exact, NCHW).build({name: t.double() for name, t in inputs.items()})()

    direction = "fwd-bwd" if params["backward"] else "fwd"
    where = f"{params['size']}x{params['size']}, " if params["size"] else ""
    return Workload(
        op="activation",
        name=f"{name}-{params['C']}-{params['size'] or 'fc'}-n{params['N']}-{direction}-{params['dtype']}",
        title=f"{title}, {params['C']} channels, {where}batch {params['N']}, {params['dtype']}; "
        f"{'forward and backward' if params['backward'] else 'forward'}",
        params=params,
        make=make,
        contenders=rows,
        truth=truth,
        backward=False,
        evaluate=lambda workload, step, inputs: step(),
        bytes=(2 if params["dtype"] == "bfloat16" else 4) * elements,
        flops=operations,
        memory=params["backward"],
        **settings,
    )


def count(params: Mapping[str, Any]) -> int:
    """Outputs."""
    return params["N"] * torch.Size(sample(params)).numel()


def maxout_workload(
    channels: int, size: int, batch: int, *, backward: bool = False, dtype: Precision = "float32", **settings: Any
) -> Workload:
    """Two pieces of `channels` channels; `size` 0: of vectors."""
    params = {"N": batch, "C": channels, "size": size, "dtype": dtype, "backward": backward}
    written = {"eager": peers.maximum, "amax": peers.amax, "max": peers.max_of_pieces}
    rows = contenders(params, maxout, written)
    outputs, directions = count(params), 2 if backward else 1
    return workload(
        params, "maxout", "Maxout of 2 pieces", make_pieces, rows, peers.maximum,
        elements=3 * directions * outputs, operations=directions * outputs, **settings,
    )  # fmt: skip


def apl_workload(
    channels: int,
    size: int,
    batch: int,
    segments: int = 2,
    *,
    shared: str = "channel",
    backward: bool = False,
    dtype: Precision = "float32",
    **settings: Any,
) -> Workload:
    """Units with parameters of channels or of positions; `size` 0: of vectors."""
    params = {
        "N": batch,
        "C": channels,
        "size": size,
        "dtype": dtype,
        "backward": backward,
        "segments": segments,
        "shared": shared,
    }
    rows = contenders(params, apl, {"eager": peers.sum_of_hinges})
    elements = count(params)
    return workload(
        params, f"apl{segments}-{shared}", f"APL-{segments}, parameters of {shared}s", make_units, rows,
        peers.sum_of_hinges, elements=(5 if backward else 2) * elements,
        operations=((2 + 10 * segments) if backward else (1 + 4 * segments)) * elements, **settings,
    )  # fmt: skip


ON_GPU = torch.cuda.is_available()
# Channels and side of CaffeNet's maps, and of what its linear layers give.
MAPS = [(96, 30), (256, 15), (384, 7), (2048, 0)]


def _all() -> list[Workload]:
    found = []
    for channels, size in MAPS:
        batch = 256 if ON_GPU else 32
        maps = functools.partial(maxout_workload, channels, size, quick=size == 15)
        found += [maps(batch), maps(batch, backward=True), maps(4 * batch, backward=True)]
        found.append(maps(batch, backward=True, dtype="bfloat16"))
        for segments in (2, 5):
            units = functools.partial(apl_workload, channels, size, batch, segments, quick=(size, segments) == (15, 2))
            found += [units(), units(backward=True)]
            if size:
                found.append(units(shared="position", backward=True))
        found.append(apl_workload(channels, size, batch, backward=True, dtype="bfloat16"))
        found.append(apl_workload(channels, size, 4 * batch, backward=True))
    return found


WORKLOADS = tuple(_all())
