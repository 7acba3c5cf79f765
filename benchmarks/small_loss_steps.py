"""Whole Co-teaching steps of the papers' small networks: two forward passes, loss, two backward passes, two Adams.

The loss is a small part of a step on the CPU, so expect step times close to each other there. On a GPU `TwinStep` is
one launch. What is compared is the losses of the first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perfvl.models.noisy_label import MLP, SmallCNN
from perfvl.nn import CoTeachingLoss, TwinStep

from . import small_loss_peers as peers
from .small_loss import FORGET_RATE
from .workload import Contender, Step, Tensors, Workload

STEPS_COMPARED = 5
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (MLP, (1, 28, 28)),
    "SmallCNN": (SmallCNN, (3, 32, 32)),
}


def networks(name: str, device: torch.device, dtype: torch.dtype) -> list[nn.Module]:
    """Two networks of different, fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [NETWORKS[name][0]().to(device, dtype) for _ in range(2)]


def adams(pair: list[nn.Module], **options: Any) -> list[torch.optim.Optimizer]:
    """One Adam for each network, as in the recipes."""
    return [torch.optim.Adam(network.parameters(), lr=1e-3, **options) for network in pair]


def loop(loss: peers.Loss) -> Callable[[list[nn.Module], Tensor, Tensor], Step]:
    """A training loop as everybody writes it, around a loss."""

    def build(pair: list[nn.Module], images: Tensor, labels: Tensor) -> Step:
        optimizers = adams(pair)

        def step() -> Tensor:
            total = loss(pair[0](images), pair[1](images), labels, FORGET_RATE)
            for optimizer in optimizers:
                optimizer.zero_grad()
            total.backward()
            for optimizer in optimizers:
                optimizer.step()
            return total.detach()

        return step

    return build


def twin_step(pair: list[nn.Module], images: Tensor, labels: Tensor) -> Step:
    """perfvl's step."""
    capturable = {"capturable": True} if images.is_cuda else {}
    step = TwinStep(*pair, CoTeachingLoss(FORGET_RATE), adams(pair, **capturable))

    def run() -> Tensor:
        losses = step(images, labels).losses
        return losses.loss1 + losses.loss2

    return run


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """A batch of noise with random labels."""
    images = torch.randn(params["n"], *NETWORKS[params["network"]][1], generator=generator)
    return {"images": images, "labels": torch.randint(10, (params["n"],), generator=generator)}


def losses_of(step: Step) -> Tensor:
    """The losses of the first steps."""
    return torch.stack([step() for _ in range(STEPS_COMPARED)])


def workload(network: str, n: int, **settings: Any) -> Workload:
    """Training steps of one network."""

    def contender(build: Callable[[list[nn.Module], Tensor, Tensor], Step], role: Any = "peer") -> Contender:
        def build_step(inputs: Tensors) -> Step:
            images = inputs["images"]
            return build(networks(network, images.device, images.dtype), images, inputs["labels"])

        return Contender(build_step, role=role)

    def truth(inputs: Tensors) -> Tensors:
        images = inputs["images"].double()
        pair = networks(network, images.device, images.dtype)
        return {"losses": losses_of(loop(peers.sync_free("co_teaching"))(pair, images, inputs["labels"]))}

    return Workload(
        op="small_loss",
        name=f"co-teaching-step-{network.lower()}-n{n}",
        title=f"Co-teaching, whole training steps of two {network}s: {n} images, 10 classes",
        params={"network": network, "n": n, "forget_rate": FORGET_RATE, "steps_compared": STEPS_COMPARED},
        make=make,
        contenders={
            "perfvl": contender(twin_step, "perfvl"),
            "perfvl, plain loop": contender(loop(peers.fused("co_teaching")), "perfvl"),
            "eager": contender(loop(peers.published("co_teaching")), "eager"),
            "without syncs": contender(loop(peers.sync_free("co_teaching"))),
        },
        truth=truth,
        backward=False,
        output="losses",
        evaluate=lambda workload, step, inputs: {"losses": losses_of(step)},
        memory=False,
        **settings,
    )


WORKLOADS = (workload("MLP", 128, quick=True), workload("SmallCNN", 128))
