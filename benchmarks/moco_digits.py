"""End to end: a MoCo training step on digits with perfvl's loss and with the eager one, on equal seeds.

The loss is a small part of so small a model's step, so expect step times close to each other; what this workload shows
is that the loss curves are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from perfvl.nn import InfoNCELoss

from .info_nce_peers import moco_loss
from .moco_digits_training import Loss, MoCoTrainer, load_digits
from .workload import Contender, Step, Tensors, Unavailable, Workload

TEMPERATURE = 0.2
STEPS_COMPARED = 20


def eager_loss(query: torch.Tensor, positive: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    """MoCo's own loss, with the clone that keeps the queue safe from the enqueue."""
    return moco_loss(query, positive, queue.clone().t(), TEMPERATURE)


def fused_loss() -> Loss:
    """perfvl's loss at the same temperature."""
    return InfoNCELoss(TEMPERATURE)


def _make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    return {"images": load_digits()[0]}


def _truth(inputs: Tensors) -> Tensors:
    return {"losses": _losses(MoCoTrainer(inputs["images"], eager_loss, dtype=torch.float64).step)}


def _losses(step: Step) -> torch.Tensor:
    return torch.stack([step() for _ in range(STEPS_COMPARED)])


def _contender(loss: Loss, role: Any) -> Contender:
    def build(inputs: Tensors) -> Step:
        if inputs["images"].device.type != "cpu":
            raise Unavailable("this small model trains on the CPU")
        return MoCoTrainer(inputs["images"], loss).step

    return Contender(build, role=role)


WORKLOADS = (
    Workload(
        op="moco_digits",
        name="moco-digits-step",
        title="MoCo on digits: whole training steps, 128 queries, 4,096 keys of width 64; loss curve over 20 steps",
        params={"B": 128, "K": 4096, "d": 64, "temperature": TEMPERATURE, "steps_compared": STEPS_COMPARED},
        make=_make,
        contenders={"perfvl": _contender(fused_loss(), "perfvl"), "eager": _contender(eager_loss, "eager")},
        truth=_truth,
        backward=False,
        output="losses",
        evaluate=lambda workload, step, inputs: {"losses": _losses(step)},
        quick=True,
    ),
)
