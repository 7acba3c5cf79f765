"""All workloads, by op. Modules are imported when asked for, since some need an optional extra."""

from __future__ import annotations

import fnmatch
import importlib

import torch

from .workload import Step, Unavailable, Workload

MODULES = {
    "info_nce": ("info_nce", "info_nce_step", "info_nce_overhead"),
    "momentum_update": ("momentum_update",),
    "key_queue": ("key_queue",),
    "brivl_step": ("brivl_step",),
    "small_loss": ("small_loss", "small_loss_steps"),
    "separable_conv": ("separable_conv", "xception_step"),
    "upsample_conv": ("upsample_conv",),
    "color_transform": ("color_transform",),
    "conditioning": ("conditioning",),
    "pooling": ("pooling",),
    "stackgan_step": ("stackgan_step",),
    "activation": ("activation",),
    "norm_act": ("norm_act",),
    "caffenet_step": ("caffenet_step",),
    "lsuv": ("lsuv",),
    "moco_digits": ("moco_digits",),
}


def workloads(op: str | None = None, *patterns: str, quick: bool = False) -> list[Workload]:
    """The workloads of one op or of all, with names that contain any of ``patterns`` (or match it as a glob)."""
    if op is not None and op not in MODULES:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(MODULES)}")
    found: list[Workload] = []
    for name in [op] if op is not None else MODULES:
        for module in MODULES[name]:
            found.extend(importlib.import_module(f"{__package__}.{module}").WORKLOADS)
    if patterns:
        found = [w for w in found if any(p in w.name or fnmatch.fnmatchcase(w.name, p) for p in patterns)]
    return [w for w in found if w.quick or not quick]


def memory_calls(op: str, workload: str, contender: str, seed: int) -> tuple[Step, Step]:
    """What the memory worker runs for one contender: a warm-up on a small copy of the problem, and the call itself."""
    problem = next(w for w in workloads(op) if w.name == workload)
    chosen = problem.contenders[contender]

    def prepare(variant: Workload) -> Step:
        inputs = variant.inputs(torch.device("cpu"), seed)
        return variant.call(chosen.build(inputs), inputs)

    try:
        call = prepare(problem)
    except Unavailable as reason:
        raise RuntimeError(str(reason)) from reason
    # The compiler works in this process and would be counted: compiled code is warmed up on the problem itself.
    return (call if chosen.compiles else prepare(problem.shrunk())), call
