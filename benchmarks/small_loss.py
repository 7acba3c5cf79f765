"""Workloads of the losses on noisy labels and of ``perfvl.functional.small_loss_mask``.

The least work of a loss is one read of both networks' logits and one write of both gradients. A batch of 128 rows and
10 classes is 10 kB: what is measured there is what a call costs, forward, in autograd and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from perfvl.functional import small_loss_mask

from . import small_loss_peers as peers
from .workload import Contender, Step, Tensors, Workload

FORGET_RATE = 0.2
KEEP_RATE = 0.5
NAMES = {
    "decoupling": "Decoupling",
    "co_teaching": "Co-teaching",
    "co_teaching_plus": "Co-teaching+",
    "jocor": "JoCoR",
}


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal logits of two independent networks, and labels that are what network 1 says for half of the rows."""
    shape = (*(() if params["groups"] == 1 else (params["groups"],)), params["n"], params["K"])
    logits1, logits2 = (torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    right = torch.rand(shape[:-1], generator=generator) < 0.5
    return {"logits1": logits1, "logits2": logits2, "labels": torch.where(right, logits1.argmax(-1), labels)}


def truth(inputs: Tensors, method: str) -> Tensors:
    """Value and gradients in float64, by plain PyTorch."""
    logits1, logits2 = (inputs[k].detach().double().requires_grad_() for k in ("logits1", "logits2"))
    loss = peers.sync_free(method)(logits1, logits2, inputs["labels"], FORGET_RATE)
    grads = torch.autograd.grad(loss, [logits1, logits2])
    return {"loss": loss.detach(), "logits1": grads[0], "logits2": grads[1]}


def contender(loss: peers.Loss, role: Any = "peer") -> Contender:
    """A loss as a contender."""

    def build_step(inputs: Tensors) -> Step:
        logits1, logits2, labels = inputs["logits1"], inputs["logits2"], inputs["labels"]
        return lambda: loss(logits1, logits2, labels, FORGET_RATE)

    return Contender(build_step, role=role)


def contenders(method: str, groups: int) -> dict[str, Contender]:
    """perfvl, then the published formulation, then the peers, then the bound."""
    found = {"perfvl": contender(peers.fused(method), "perfvl")}
    if groups > 1:
        found["perfvl, group by group"] = contender(peers.group_by_group(peers.fused(method)), "perfvl")
    return found | {
        "eager": contender(peers.published(method), "eager"),
        "without syncs": contender(peers.sync_free(method)),
        "torch.compile": Contender(lambda inputs: contender(peers.compiled(method)).build(inputs), compiles=True),
        "cross-entropy, nothing selected": contender(peers.without_selection, "bound"),
    }


def workload(method: str, n: int, classes: int, groups: int = 1, **settings: Any) -> Workload:
    """One loss on one shape."""
    numbers = groups * n * classes
    many = "" if groups == 1 else f"{groups} groups of "
    return Workload(
        op="small_loss",
        name=f"{method.replace('_', '-')}-g{groups}-n{n}-k{classes}",
        title=f"{NAMES[method]}: {many}{n:,} rows, {classes:,} classes; forward and backward",
        params={"n": n, "K": classes, "groups": groups, "forget_rate": FORGET_RATE},
        make=make,
        contenders=contenders(method, groups),
        truth=functools.partial(truth, method=method),
        leaves=("logits1", "logits2"),
        bytes=2 * 2 * 4 * numbers,
        flops=2 * 8 * numbers,
        shrink={"n": 64},
        repeats=max(1, min(40, 400_000 // numbers)),
        memory=numbers >= 1_000_000,
        **settings,
    )


def make_losses(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Positive numbers, as losses are."""
    shape = (params["groups"], params["n"]) if params["groups"] > 1 else (params["n"],)
    return {"losses": torch.empty(shape).exponential_(generator=generator)}


def mask_truth(inputs: Tensors) -> Tensors:
    """The rows of a stable sort; as numbers, so that they have an error."""
    losses = inputs["losses"]
    chosen = losses.argsort(dim=-1, stable=True)[..., : int(KEEP_RATE * losses.shape[-1])]
    return {"mask": torch.zeros(losses.shape, dtype=torch.float64, device=losses.device).scatter_(-1, chosen, 1.0)}


def mask_contenders() -> dict[str, Contender]:
    """perfvl, then the three ways of PyTorch."""

    def row(choose: Any, role: Any = "peer") -> Contender:
        return Contender(lambda inputs: lambda: choose(inputs["losses"]), role=role)

    def scattered(losses: Tensor, chosen: Tensor) -> Tensor:
        return torch.zeros(losses.shape, dtype=torch.bool, device=losses.device).scatter_(-1, chosen, True)

    def argsort(losses: Tensor) -> Tensor:
        return scattered(losses, losses.argsort(dim=-1)[..., : int(KEEP_RATE * losses.shape[-1])])

    def topk(losses: Tensor) -> Tensor:
        kept = int(KEEP_RATE * losses.shape[-1])
        return scattered(losses, losses.topk(kept, largest=False, sorted=False).indices)

    def kthvalue(losses: Tensor) -> Tensor:
        return losses <= losses.kthvalue(int(KEEP_RATE * losses.shape[-1]), dim=-1, keepdim=True).values

    return {
        "perfvl": row(lambda losses: small_loss_mask(losses, KEEP_RATE), "perfvl"),
        "eager": row(argsort, "eager"),
        "topk": row(topk),
        "kthvalue, ties not settled": row(kthvalue),
        "topk indices alone": row(
            lambda losses: losses.topk(int(KEEP_RATE * losses.shape[-1]), largest=False, sorted=False).indices, "bound"
        ),
    }


def mask_workload(n: int, groups: int = 1, **settings: Any) -> Workload:
    """A selection without a loss."""
    many = "" if groups == 1 else f"{groups} rows of "
    return Workload(
        op="small_loss",
        name=f"small-loss-mask-g{groups}-n{n}",
        title=f"Small-loss mask: half of {many}{n:,} losses",
        params={"n": n, "groups": groups, "keep_rate": KEEP_RATE},
        make=make_losses,
        contenders=mask_contenders(),
        truth=mask_truth,
        backward=False,
        output="mask",
        evaluate=lambda workload, step, inputs: {"mask": step().double()},
        tolerance={"float32": 1e-12},
        bytes=5 * n * groups,
        repeats=max(1, 100_000 // (n * groups)),
        memory=False,
        **settings,
    )


WORKLOADS = (
    workload("co_teaching", 128, 10, quick=True),
    workload("co_teaching", 128, 100),
    workload("co_teaching", 1024, 1000, quick=True),
    workload("co_teaching", 65536, 10),
    workload("decoupling", 128, 10),
    workload("decoupling", 1024, 1000),
    workload("co_teaching_plus", 128, 10, quick=True),
    workload("co_teaching_plus", 128, 100),
    workload("co_teaching_plus", 1024, 1000),
    workload("jocor", 128, 10, quick=True),
    workload("jocor", 128, 100),
    workload("jocor", 1024, 1000),
    workload("co_teaching", 128, 10, 16, quick=True),
    workload("jocor", 128, 10, 16),
    workload("co_teaching", 1024, 100, 16),
    mask_workload(1_000_000, quick=True),
    mask_workload(128),
    mask_workload(1024, 16),
)
