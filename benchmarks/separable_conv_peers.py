"""What fused separable convolutions are compared with: PyTorch's two convolutions, in both layouts, and compiled.

A pair takes the input [N, C, H, W] and both weights. Bounds are the matrix products alone: what no implementation with
the library's products can beat while it also does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.nn import SeparableConvBNAct2d

Pair = Callable[[Tensor, Tensor, Tensor], Tensor]

torch.backends.cudnn.benchmark = True  # as whoever trains on images of one size has it


def eager(stride: int, padding: int) -> Pair:
    """ReLU, depthwise convolution, pointwise convolution."""

    def pair(input: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
        x = F.conv2d(F.relu(input), depthwise, None, stride, padding, groups=input.shape[1])
        return F.conv2d(x, pointwise)

    return pair


def through_channels_last(pair: Pair) -> Pair:
    """For NCHW tensors: converted, computed, converted back."""

    def converted(input: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
        return pair(input.contiguous(memory_format=torch.channels_last), depthwise, pointwise).contiguous()

    return converted


def compiled(pair: Pair) -> Pair:
    """``torch.compile`` with its defaults."""
    return torch.compile(pair, fullgraph=True, dynamic=False)


class PairModule(nn.Module):
    """A pair with weights of its own, which a compiler may take for constants."""

    def __init__(self, pair: Pair, depthwise: Tensor, pointwise: Tensor) -> None:
        super().__init__()
        self.pair = pair
        self.depthwise, self.pointwise = (nn.Parameter(w, requires_grad=False) for w in (depthwise, pointwise))

    def forward(self, input: Tensor) -> Tensor:
        return self.pair(input, self.depthwise, self.pointwise)


def frozen(module: nn.Module) -> nn.Module:
    """``torch.compile`` for inference: all it can tune, weights as constants (batch norms folded into them)."""
    options = {**torch._inductor.list_mode_options("max-autotune"), "freezing": True}
    return torch.compile(module.eval(), fullgraph=True, dynamic=False, options=options)


def products(pixels: int, inner: int, outputs: int, like: Tensor, *, backward: bool) -> Callable[[], Any]:
    """The pointwise convolution as a matrix product; with backward, the two products of its gradients too."""
    columns, gradient = like.new_ones(pixels, inner), like.new_ones(pixels, outputs)
    weight = like.new_ones(outputs, inner)
    output, grad_columns, grad_weight = (torch.empty_like(t) for t in (gradient, columns, weight))

    def step() -> Tensor:
        torch.mm(columns, weight.t(), out=output)
        if backward:
            torch.mm(gradient, weight, out=grad_columns)
            torch.mm(gradient.t(), columns, out=grad_weight)
        return output

    return step


def block(channels: int, count: int) -> nn.ModuleList:
    """Layers of ReLU, separable convolution and batch norm, with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (SeparableConvBNAct2d(channels, channels, 3, padding=1, pre_activation="relu") for _ in range(count))
        return nn.ModuleList(layers)


def run_modules(layers: nn.ModuleList, input: Tensor) -> Tensor:
    """A block by PyTorch's modules, one after another, and the residual connection around it."""
    x = input
    for layer in layers:
        x = layer.bn(layer.pointwise(layer.conv1(F.relu(x))))
    return x + input
