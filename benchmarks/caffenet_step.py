"""Training steps of CaffeNet128 and of what the study added to it: from bytes of images to SGD with momentum.

Peers are the same networks with PyTorch's modules in the order of the layer tables, activations in place. All have the
weights that LSUV gives, the study's learning rates in PyTorch's fused SGD, and no dropout, so that the losses of the
first steps can be compared. What must move through memory depends on the caches, so no bound on bytes is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.models.caffenet import CaffeNet128, parameter_groups
from perfvl.nn import lsuv_init_

from . import caffenet_peers as peers
from .workload import Contender, Step, Tensors, Workload

STEPS_COMPARED = 2
VARIANTS = {
    "base": "base",
    "max-avg": "pooling/max_plus_avg",
    "norm-after": "batchnorm/after",
    "all": "all_in/caffenet128_all",
}


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Random pixels, not alike in scale, and labels."""
    shape = (params["N"], 3, 128, 128)
    contrast = torch.rand(params["N"], 1, 1, 1, generator=generator)
    images = 128 + 127 * contrast * torch.randn(shape, generator=generator).clamp(-1, 1)
    return {
        "images": images.to(torch.uint8),
        "labels": torch.randint(1000, (params["N"],), generator=generator),
    }


@functools.cache
def fused(variant: str) -> CaffeNet128:
    """perfvl's network with the weights that all contenders start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CaffeNet128(VARIANTS[variant], dropout=0.0)
        lsuv_init_(model, make({"N": 8}, torch.Generator().manual_seed(0))["images"])
    return model


def plain(variant: str) -> nn.Module:
    """The network as it is written."""
    model = peers.caffenet(fused(variant).config)
    model.load_state_dict(fused(variant).state_dict())
    return model


def copied(variant: str) -> nn.Module:
    """perfvl's network with weights of its own."""
    model = CaffeNet128(VARIANTS[variant], dropout=0.0)
    model.load_state_dict(fused(variant).state_dict())
    return model


def contender(
    params: Mapping[str, Any],
    build: Callable[[str], nn.Module],
    role: Any = "peer",
    memory: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float32,
    compiles: bool = False,
) -> Contender:
    """A network in its layout, and its step."""

    def build_step(inputs: Tensors) -> Step:
        images, labels = inputs["images"].contiguous(memory_format=memory), inputs["labels"]
        model = build(params["variant"]).to(images.device, dtype).to(memory_format=memory)
        optimizer = torch.optim.SGD(parameter_groups(model), momentum=0.9, fused=True)
        forward = torch.compile(model, dynamic=False) if compiles else model

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return Contender(build_step, role=role, compiles=compiles)


def losses_of(step: Step) -> Tensors:
    return {"losses": torch.stack([step() for _ in range(STEPS_COMPARED)])}


def workload(variant: str, count: int, **settings: Any) -> Workload:
    """One variant."""
    params = {"variant": variant, "N": count, "steps_compared": STEPS_COMPARED}
    nchw = torch.contiguous_format
    with torch.device("meta"):
        macs = CaffeNet128(VARIANTS[variant]).macs
    return Workload(
        op="caffenet_step",
        name=f"caffenet-{variant}-n{count}",
        title=f"CaffeNet128, {VARIANTS[variant]}: training step, {count} images of 128 pixels, float32",
        params=params,
        make=make,
        contenders={
            "perfvl": contender(params, copied, "perfvl"),
            "perfvl, NCHW": contender(params, copied, "perfvl", nchw),
            "eager": contender(params, plain, "eager"),
            "eager, NCHW": contender(params, plain, memory=nchw),
            "torch.compile": contender(params, plain, compiles=True),
            "torch.compile, NCHW": contender(params, plain, memory=nchw, compiles=True),
        },
        truth=lambda inputs: losses_of(contender(params, plain, memory=nchw, dtype=torch.float64).build(inputs)),
        backward=False,
        convolves=True,
        evaluate=lambda workload, step, inputs: losses_of(step),
        flops=6 * count * macs,
        tolerance={"float32": 5e-3, "tf32": 2e-2},  # of the second loss, which batch norms make rounding tell in
        shrink={"N": 2},
        **settings,
    )


COUNT = 256 if torch.cuda.is_available() else 32
WORKLOADS = tuple(workload(variant, COUNT, quick=variant == "base") for variant in VARIANTS)
