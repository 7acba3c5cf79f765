"""Workloads of ``perfvl.functional.momentum_update_``: many small tensors, few large ones, and both dtypes.

The least work is one read of target and source and one write of the target (12 bytes per float32 element, 10 where the
source is bfloat16), and 2 bytes more for a bfloat16 copy of the new target. Calls change their targets, so every
contender has its own, and answers are those of the first two steps. Later steps move towards the sources and cost the
same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from perfvl.functional import momentum_update_
from perfvl.nn import MomentumEncoder

from . import momentum_update_peers as peers
from .workload import Contender, Step, Tensors, Workload

MOMENTUM = 0.999
STEPS_COMPARED = 2
MOST_COMPILED = 64
"""Tensors up to which torch.compile takes part: it makes code for each of them, hundreds take it minutes."""
TOLERANCE = {("float32", None): 1e-6, ("bfloat16", None): 1e-5, ("bfloat16", "bfloat16"): 2e-4}
"""By dtype of source and copy. Two steps move numbers by 0.2 %, so a wrong momentum is far outside. MoCo's expression
rounds (1 - m) s to the source's dtype, and a copy may then be rounded to its other side.
"""

BuildWithCopies = Callable[[list[Tensor], list[Tensor], list[Tensor], float], peers.Update]
"""As `peers.Build`, with tensors (none, or one for each target) that receive the new targets in their own dtype."""


def fused(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float) -> peers.Update:
    """perfvl itself, as a function of lists."""
    return lambda: momentum_update_(targets, sources, momentum, copies=copies or None)


def encoder(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float) -> peers.Update:
    """perfvl's module, which also makes sure at every step that it still pairs the right tensors."""
    compute_dtype = copies[0].dtype if copies else None
    teacher = MomentumEncoder(
        peers.holding(sources), momentum, dtype=targets[0].dtype, compute_dtype=compute_dtype, buffers="skip"
    )
    peers.share(teacher.module, targets)
    if copies:
        peers.share(teacher.compute_module, copies)
    return teacher.update


def then_copied(build: peers.Build) -> BuildWithCopies:
    """A peer without write-out, followed by a pass that writes the copies."""

    def build_both(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float) -> peers.Update:
        update = build(targets, sources, momentum)
        if not copies:
            return update

        def both() -> None:
            update()
            torch._foreach_copy_(copies, targets)

        return both

    return build_both


def compiled(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float) -> peers.Update:
    """``torch.compile`` of cast, lerp and write-out: one fused loop per tensor."""

    @functools.partial(torch.compile, fullgraph=True, dynamic=False)
    def move(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor]) -> None:
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            target.lerp_(source.to(target.dtype), 1.0 - momentum)
            if copies:
                copies[i].copy_(target)

    return lambda: move(targets, sources, copies)


def fused_alone(targets: list[Tensor], sources: list[Tensor], momentum: float) -> peers.Update:
    """perfvl without its write-out."""
    return fused(targets, sources, [], momentum)


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The 161 parameters of ResNet-50 (25.6 million numbers): half of them are vectors of at most 2,048."""

    def convolution(outputs: int, inputs: int, kernel: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # and its BatchNorm

    shapes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def shapes_of(params: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of the tensors to update."""
    return resnet50_shapes() if params["tensors"] == "ResNet-50" else [(params["elements"],)] * params["tensors"]


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Independent normal numbers: targets in float32, sources in the dtype of the model that is trained."""
    tensors = {}
    for i, shape in enumerate(shapes_of(params)):
        tensors[f"target{i}"] = torch.randn(shape, generator=generator)
        tensors[f"source{i}"] = torch.randn(shape, generator=generator).to(getattr(torch, params["source_dtype"]))
    return tensors


def of_kind(inputs: Tensors, kind: str) -> list[Tensor]:
    """All targets, or all sources, in order."""
    return [tensor for name, tensor in inputs.items() if name.startswith(kind)]


def truth(inputs: Tensors, copy_dtype: str | None) -> Tensors:
    """t_n = s + m^n (t_0 - s) in float64, all tensors in one row; the copies are these numbers rounded once."""
    start, source = (torch.cat([t.flatten() for t in of_kind(inputs, kind)]) for kind in ("target", "source"))
    moved = torch.lerp(start.double(), source.double(), 1.0 - MOMENTUM**STEPS_COMPARED)
    return {"targets": moved} if copy_dtype is None else {"targets": moved, "copies": _rounded(moved, copy_dtype)}


def _rounded(values: Tensor, dtype: str) -> Tensor:
    return values.to(getattr(torch, dtype))


def evaluate(workload: Workload, call: Step, inputs: Tensors) -> Tensors:
    """The targets (and copies) after the first steps of a contender that has not been called yet."""
    for _ in range(STEPS_COMPARED):
        targets, copies = call()
    found = {"targets": torch.cat([tensor.flatten() for tensor in targets])}
    if copies:
        found["copies"] = torch.cat([tensor.flatten() for tensor in copies])
    return found


def contender(build: BuildWithCopies, copy_dtype: str | None, role: Any = "peer", compiles: bool = False) -> Contender:
    """A way to update, on targets and copies of its own."""

    def build_step(inputs: Tensors) -> Step:
        targets, sources = [tensor.clone() for tensor in of_kind(inputs, "target")], of_kind(inputs, "source")
        copies = [] if copy_dtype is None else [_rounded(target, copy_dtype) for target in targets]
        update = build(targets, sources, copies, MOMENTUM)

        def step() -> tuple[list[Tensor], list[Tensor]]:
            update()
            return targets, copies

        return step

    return Contender(build_step, role=role, compiles=compiles)


def contenders(count: int, source_dtype: str, copy_dtype: str | None) -> dict[str, Contender]:
    """The ways to update ``count`` tensors: perfvl first, then eager, then the peers, then the bound."""

    def row(build: peers.Build, role: Any = "peer") -> Contender:
        return contender(then_copied(build), copy_dtype, role)

    rows = {
        "perfvl": contender(fused, copy_dtype, "perfvl"),
        "perfvl, MomentumEncoder": contender(encoder, copy_dtype, "perfvl"),
    }
    if copy_dtype is not None:
        rows["perfvl, copy in a second pass"] = row(fused_alone, "perfvl")
    rows |= {
        "eager": row(peers.moco, "eager"),
        "mul_, add_": row(peers.per_tensor),
        "foreach mul, add": row(peers.foreach_mul_add),
    }
    if count <= MOST_COMPILED:
        rows["torch.compile"] = contender(compiled, copy_dtype, compiles=True)
    if source_dtype != "float32":
        rows |= {
            "cast + foreach lerp": row(peers.cast_foreach_lerp),
            "cast + lerp_": row(peers.cast_lerp_per_tensor),
        }
    rows |= {
        "foreach lerp": row(peers.where_allowed(peers.foreach_lerp)),
        "AveragedModel": row(peers.where_allowed(peers.averaged_model)),
        "timm ModelEmaV3": row(peers.where_allowed(peers.timm_ema)),
        "plain copy": row(peers.copied, "bound"),
    }
    return rows


def workload(
    name: str,
    tensors: int | str,
    elements: int | None = None,
    *,
    source_dtype: str = "float32",
    copy_dtype: str | None = None,
    **settings: Any,
) -> Workload:
    """One list of tensors as a workload."""
    params = {
        "tensors": tensors,
        "elements": elements,
        "source_dtype": source_dtype,
        "copy_dtype": copy_dtype,
        "momentum": MOMENTUM,
    }
    shapes = shapes_of(params)
    count = sum(map(math.prod, shapes))
    size = f"{len(shapes)} tensors, {count:,} numbers" if elements is None else f"{tensors} tensors of {elements:,}"
    written = "" if copy_dtype is None else f", and a {copy_dtype} copy written out"
    return Workload(
        op="momentum_update",
        name=f"ema-{name}-{source_dtype}{'' if copy_dtype is None else f'-to-{copy_dtype}'}",
        title=f"Momentum update: {size}{f' ({tensors})' if elements is None else ''}; "
        f"float32 from {source_dtype}{written}",
        params=params,
        make=make,
        contenders=contenders(len(shapes), source_dtype, copy_dtype),
        truth=functools.partial(truth, copy_dtype=copy_dtype),
        backward=False,
        output="targets",
        evaluate=evaluate,
        tolerance={"float32": TOLERANCE[source_dtype, copy_dtype]},
        bytes=count * (8 + (4 if source_dtype == "float32" else 2) + (0 if copy_dtype is None else 2)),
        flops=3 * count,
        **settings,
    )


_large: dict[str, Any] = {"shrink": {"elements": 50_000}}
_layers: dict[str, Any] = {"memory": False}  # the size of a large transformer's: a cast one fits no cache
_small: dict[str, Any] = {"repeats": 10, "memory": False}

WORKLOADS = (
    workload("50x1m", 50, 1_000_000, **_large),
    workload("500x256", 500, 256, quick=True, **_small),
    workload("resnet50", "ResNet-50", memory=False, quick=True),
    workload("50x1m", 50, 1_000_000, source_dtype="bfloat16", **_large),
    workload("50x1m", 50, 1_000_000, source_dtype="bfloat16", copy_dtype="bfloat16", **_large),
    workload("12x4m", 12, 4096 * 1024, source_dtype="bfloat16", **_layers),
    workload("500x256", 500, 256, source_dtype="bfloat16", **_small),
)
