"""What norm and activation in one are compared with: PyTorch's two layers, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormAct = Callable[..., Tensor]
"""Of the input [N, C, H, W], weight, bias, running mean and variance [C]."""
STATE = ("weight", "bias", "running_mean", "running_var")


def activation_of(name: str, *, inplace: bool) -> nn.Module:
    """ReLU or ELU."""
    return nn.ReLU(inplace) if name == "relu" else nn.ELU(inplace=inplace)


def two_layers(channels: int, activation: str, order: str) -> nn.Sequential:
    """Behind the norm, the activation works in the memory of the norm's output; before it, the input stays."""
    layers = [nn.BatchNorm2d(channels), activation_of(activation, inplace=order == "before")]
    return nn.Sequential(*(layers if order == "before" else layers[::-1]))


def with_state(module: nn.Module, *, compiles: bool = False) -> NormAct:
    """A layer as a function of its norm's parameters and statistics, which it takes over when first called."""
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    run = torch.compile(module, fullgraph=True, dynamic=False) if compiles else module

    def call(x: Tensor, *state: Tensor) -> Tensor:
        if norm.weight is not state[0]:
            for name, value in zip(STATE, state, strict=True):
                setattr(norm, name, value)
        return run(x)

    return call
