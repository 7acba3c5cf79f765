"""Xception as a whole: inference, and training steps with SGD, of which the losses of the first two are compared.

Peers are the same network as timm writes its `legacy_xception`: PyTorch's modules one after another. What must move
through memory depends on the caches, so no bound on bytes is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perfvl
from perfvl.models import xception
from perfvl.nn import SeparableConv2d

from . import separable_conv_peers as peers
from .workload import Contender, Step, Tensors, Workload, imported

STEPS_COMPARED = 2
Prepare = Callable[[nn.Module], Callable[[Tensor], Tensor]]
"""What is done to a model once before its steps: swapped, compiled, or nothing."""


def ours() -> nn.Module:
    """perfvl's model with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return xception()


class TwoConvolutions(nn.Module):
    """A separable convolution as its two modules."""

    def __init__(self, separable: SeparableConv2d) -> None:
        super().__init__()
        self.conv1, self.pointwise = separable.conv1, separable.pointwise

    def forward(self, input: Tensor) -> Tensor:
        return self.pointwise(self.conv1(input))


def plain() -> nn.Module:
    """The same model and weights with nothing fused."""
    model = ours()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, SeparableConv2d):
                setattr(module, name, TwoConvolutions(child))
    return model


def swapped() -> nn.Module:
    """timm's own model with the same weights after :func:`perfvl.swap`."""
    timm = imported("timm", "timm (pip install 'perfvl[models]')")
    model = timm.create_model("legacy_xception", pretrained=False)
    model.load_state_dict(ours().state_dict())
    perfvl.swap(model)
    return model


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` with its defaults."""
    return torch.compile(model, dynamic=False)


def infer(model: nn.Module, images: Tensor, labels: Tensor, prepare: Prepare) -> Step:
    """Logits, without gradients."""
    forward = prepare(model.eval())

    def step() -> Tensor:
        with torch.no_grad():
            return forward(images)

    return step


def train(model: nn.Module, images: Tensor, labels: Tensor, prepare: Prepare) -> Step:
    """Forward, cross-entropy, backward, SGD; returns the loss."""
    forward = prepare(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Noise with random labels."""
    images = torch.randn(params["N"], 3, params["size"], params["size"], generator=generator)
    return {"images": images, "labels": torch.randint(1000, (params["N"],), generator=generator)}


def contender(
    model: Callable[[], nn.Module],
    training: bool,
    *,
    role: Any = "peer",
    prepare: Prepare = lambda model: model,
    memory: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float32,
    compiles: bool = False,
) -> Contender:
    """A model that starts from the same weights."""

    def build(inputs: Tensors) -> Step:
        images = inputs["images"].to(dtype).contiguous(memory_format=memory)
        network = model().to(images.device, dtype).to(memory_format=memory)
        return (train if training else infer)(network, images, inputs["labels"], prepare)

    precision: Any = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return Contender(build, role=role, precision=precision, compiles=compiles)


def answer(step: Step, training: bool) -> Tensors:
    """The losses of the first steps, or logits."""
    if training:
        return {"losses": torch.stack([step() for _ in range(STEPS_COMPARED)])}
    return {"logits": step()}


def workload(training: bool, batch: int, size: int = 299, **settings: Any) -> Workload:
    """One of the two."""

    def row(model: Callable[[], nn.Module], **given: Any) -> Contender:
        return contender(model, training, **given)

    def truth(inputs: Tensors) -> Tensors:
        return answer(row(ours, dtype=torch.float64).build(inputs), training)

    half = {"dtype": torch.bfloat16}
    contenders = {
        "perfvl": row(ours, role="perfvl"),
        "eager": row(plain, role="eager"),
        "perfvl, bfloat16": row(ours, role="perfvl", **half),
        "eager, bfloat16": row(plain, **half),
    }
    if ON_GPU:  # in the precision that is trained in there; tuning would take minutes
        contenders["torch.compile, bfloat16"] = row(plain, prepare=compiled, compiles=True, **half)
    else:
        contenders["timm's model, swapped"] = row(swapped, role="perfvl")
        contenders["eager, NCHW"] = row(plain, memory=torch.contiguous_format)
        contenders["torch.compile"] = row(plain, prepare=compiled, compiles=True)
    if not training and not ON_GPU:
        contenders["torch.compile, max-autotune, frozen"] = row(plain, prepare=peers.frozen, compiles=True)
    return Workload(
        op="separable_conv",
        name=f"xception-{'train' if training else 'infer'}-n{batch}-{size}",
        title=f"Xception, {'training step with SGD' if training else 'inference'}: {batch} images of {size}x{size}",
        params={"N": batch, "size": size, "training": training, "steps_compared": STEPS_COMPARED if training else 0},
        make=make,
        contenders=contenders,
        truth=truth,
        backward=False,
        convolves=True,
        evaluate=lambda workload, step, inputs: answer(step, training),
        tolerance={"float32": 1e-3, "bfloat16": 0.1},
        shrink={"size": 75},
        **settings,
    )


ON_GPU = torch.cuda.is_available()
BATCH = 128 if ON_GPU else 2
WORKLOADS = (workload(False, BATCH), workload(True, BATCH))
