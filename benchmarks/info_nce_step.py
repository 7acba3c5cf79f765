"""MoCo's loss with its queue, from what the projection heads give: normalised, compared, differentiated, enqueued.

Here whole modules can stand side by side: lightly's ``NTXentLoss`` with a memory bank does all of it in one call. At
the least the queue is read once. Answers are those of the first step, from equal queues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.nn import InfoNCELoss

from . import info_nce, info_nce_peers, key_queue, key_queue_peers
from .workload import Contender, Step, Tensors, Workload, imported

TEMPERATURE = 0.07

Forward = Callable[[Tensor, Tensor], Tensor]
"""``forward(query, key)``: the loss; the keys are enqueued as well."""


class Parts(NamedTuple):
    """A contender's step, and where its keys [K, d] lie."""

    forward: Forward
    keys: Tensor


class Outcome(NamedTuple):
    """What a step leaves behind."""

    loss: Tensor
    query: Tensor
    keys: Tensor


def fused(dtype: torch.dtype) -> Callable[[Tensor], Parts]:
    """perfvl's modules, with a queue of this dtype."""

    def build(queue: Tensor) -> Parts:
        ring = key_queue.filled(queue.to(dtype), 0, normalize=True)
        criterion = InfoNCELoss(TEMPERATURE, normalize=True)

        def forward(query: Tensor, key: Tensor) -> Tensor:
            loss = criterion(query, key, ring)
            ring.enqueue(key)
            return loss

        return Parts(forward, ring.keys)

    return build


def eager(queue: Tensor) -> Parts:
    """MoCo's way: the keys come before backward, so the queue is cloned."""
    ring = key_queue_peers.moco(queue, 0, None)

    def forward(query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        loss = info_nce_peers.moco_loss(query, key, ring.keys.t().clone(), TEMPERATURE)
        ring.enqueue(key, None)
        return loss

    return Parts(forward, ring.keys)


def lightly(queue: Tensor) -> Parts:
    """lightly's ``NTXentLoss``, whose memory bank enqueues by itself."""
    losses = imported("lightly.loss.ntx_ent_loss", "lightly: pip install 'perfvl[peers]'")
    criterion = losses.NTXentLoss(TEMPERATURE, memory_bank_size=tuple(queue.shape)).to(queue.device)
    criterion.memory_bank.bank.copy_(queue)
    return Parts(criterion, criterion.memory_bank.bank)


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """As for the loss alone, but queries and keys of lengths from 1 to 3."""
    tensors = info_nce.make({**params, "directions": 1, "queue_dtype": "float32"}, generator)
    for name in ("query0", "positive0"):
        tensors[name] *= 1 + 2 * torch.rand(len(tensors[name]), 1, generator=generator)
    return tensors


def truth(inputs: Tensors) -> Tensors:
    """In float64: the loss, the gradient through the normalisation, and the rows of the queue from the first to as many
    behind those that are written.
    """
    query = inputs["query0"].detach().double().requires_grad_()
    unit, key = F.normalize(query, dim=1), F.normalize(inputs["positive0"].double(), dim=1)
    found = info_nce.truth({"query0": unit, "positive0": key, "queue0": inputs["queue0"]}, TEMPERATURE)
    unit.backward(found["query0"])
    assert query.grad is not None
    rows = torch.cat([key, inputs["queue0"][len(key) : 2 * len(key)].double()])
    return {"loss": found["loss"], "query": query.grad, "rows": rows}


def evaluate(workload: Workload, call: Step, inputs: Tensors) -> Tensors:
    """The same from the first step of a contender."""
    outcome: Outcome = call()
    assert outcome.query.grad is not None
    return {
        "loss": outcome.loss,
        "query": outcome.query.grad.clone(),
        "rows": outcome.keys[: 2 * len(outcome.query)].clone(),
    }


def contender(build: Callable[[Tensor], Parts], role: Any = "peer", precision: Any = "float32") -> Contender:
    """A way to make the step, with a queue of its own."""

    def build_step(inputs: Tensors) -> Step:
        query, key = inputs["query0"].clone().requires_grad_(), inputs["positive0"]
        parts = build(inputs["queue0"].clone())

        def step() -> Outcome:
            query.grad = None
            loss = parts.forward(query, key)
            loss.backward()
            return Outcome(loss.detach(), query, parts.keys)

        return step

    return Contender(build_step, role=role, precision=precision)


CONTENDERS = {
    "perfvl": contender(fused(torch.float32), "perfvl"),
    "perfvl, bfloat16 queue": contender(fused(torch.bfloat16), "perfvl", "bfloat16"),
    "eager": contender(eager, "eager"),
    "lightly NTXentLoss": contender(lightly),
}


def workload(batch: int, keys: int, width: int, **settings: Any) -> Workload:
    """One size as a workload."""
    return Workload(
        op="info_nce",
        name=f"moco-step-b{batch}-k{keys}-d{width}",
        title=f"MoCo's loss with its queue: {batch} features, {keys:,} keys of width {width}; "
        "normalise, loss, gradient, enqueue",
        params={"B": batch, "K": keys, "d": width, "temperature": TEMPERATURE},
        make=make,
        contenders=CONTENDERS,
        truth=truth,
        backward=False,
        evaluate=evaluate,
        bytes=4 * keys * width,
        flops=4 * batch * keys * width,
        shrink={"K": 1024},
        **settings,
    )


WORKLOADS = (workload(256, 65536, 128), workload(256, 4096, 128, quick=True))
