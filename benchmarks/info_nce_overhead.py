"""What a call costs when there is next to nothing to compute: Python, dispatch, autograd and allocation.

A training step of a small model makes such calls; on a GPU this is the time the host needs to launch the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perfvl.functional import info_nce
from perfvl.nn import InfoNCELoss

from . import info_nce_peers as peers
from .info_nce import make, truth
from .workload import Contender, Step, Tensors, Workload

TEMPERATURE = 0.07
SIZES = {"B": 4, "K": 16, "d": 16, "queue_dtype": "float32", "temperature": TEMPERATURE, "directions": 1}


def _contender(build: Callable[[Tensor], peers.Loss], role: Any) -> Contender:
    def build_step(inputs: Tensors) -> Step:
        loss = build(inputs["queue0"])
        query, positive = inputs["query0"], inputs["positive0"]
        return lambda: loss(query, positive)

    return Contender(build_step, role=role)


def _functional(queue: Tensor) -> peers.Loss:
    return lambda query, positive: info_nce(query, positive, queue, temperature=TEMPERATURE)


def _module(queue: Tensor) -> peers.Loss:
    criterion = InfoNCELoss(TEMPERATURE)
    return lambda query, positive: criterion(query, positive, queue)


def _raw_op(queue: Tensor, *, with_grad: bool) -> peers.Loss:
    """The torch op under the public function, without its argument checks and without autograd."""
    op = torch.ops.perfvl.info_nce
    mean = 1

    def loss(query: Tensor, positive: Tensor) -> Tensor:
        with torch.no_grad():
            return op(query, positive, queue, TEMPERATURE, None, None, torch.float32, mean, False, with_grad)[0]

    return loss


def _workload(name: str, title: str, *, grad: bool, backward: bool) -> Workload:
    contenders = {
        "perfvl": _contender(_functional, "perfvl"),
        "perfvl, module": _contender(_module, "perfvl"),
        "eager": _contender(functools.partial(peers.eager, temperature=TEMPERATURE), "eager"),
    }
    if not backward:
        contenders["raw op"] = _contender(functools.partial(_raw_op, with_grad=grad), "bound")
    return Workload(
        op="info_nce",
        name=name,
        title=f"Call overhead: 4 queries, 16 keys of width 16; {title}",
        params=SIZES,
        make=make,
        contenders=contenders,
        truth=functools.partial(truth, temperature=TEMPERATURE),
        leaves=("query0",) if grad else (),
        backward=backward,
        repeats=100,
        memory=False,
        quick=True,
    )


WORKLOADS = (
    _workload("overhead-inference", "no gradient asked for", grad=False, backward=False),
    _workload("overhead-forward", "forward of a training step", grad=True, backward=False),
    _workload("overhead-forward-backward", "forward and backward", grad=True, backward=True),
)
