"""What upsampling blocks are compared with: PyTorch's modules, compiled, and its transposed convolution.

A block takes its parameters, as :class:`perfvl.nn.UpsampleConv2d` holds them, and the input [N, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.nn import UpsampleConv2d

Block = Callable[[UpsampleConv2d, Tensor], Tensor]

torch.backends.cudnn.benchmark = True  # as whoever trains on images of one size has it


def parameters(channels: int, outputs: int) -> UpsampleConv2d:
    """Fixed weights. The batch norm puts every channel well above or below 0: where ReLU's kink is near, a rounding
    moves numbers across it, and the gradients of right answers differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = UpsampleConv2d(channels, outputs, bias=False, batch_norm=True, activation="relu")
    nn.init.constant_(block.get_parameter("bn.bias"), 6.0)
    with torch.no_grad():
        block.get_parameter("bn.bias")[1::2].neg_()
    return block


def norm(block: UpsampleConv2d) -> nn.Module:
    """The batch norm of a block."""
    return block.get_submodule("bn")


def eager(block: UpsampleConv2d, input: Tensor) -> Tensor:
    """StackGAN's modules: nearest x2, convolution, batch norm, ReLU in place."""
    x = F.interpolate(input, scale_factor=2, mode="nearest")
    return F.relu(norm(block)(F.conv2d(x, block.weight, padding=1)), inplace=True)


def transposed(block: UpsampleConv2d, input: Tensor) -> Tensor:
    """The library's transposed convolution with weights that make it the same, derived in every step."""
    w0, w1, w2 = block.weight.transpose(0, 1).unbind(2)
    rows = torch.stack((w2, w1 + w2, w0 + w1, w0), 2)
    c0, c1, c2 = rows.unbind(3)
    kernel = torch.stack((c2, c1 + c2, c0 + c1, c0), 3)
    return F.relu(norm(block)(F.conv_transpose2d(input, kernel, stride=2, padding=1)), inplace=True)


def compiled(block: Block) -> Block:
    """``torch.compile`` with its defaults."""
    return torch.compile(block, fullgraph=True, dynamic=False)


def products(pixels: int, channels: int, outputs: int, like: Tensor, *, backward: bool) -> Callable[[], Any]:
    """Nine matrix products of the pixels of the input; with backward, the eighteen of both gradients too."""
    columns, gradient = like.new_ones(pixels, channels), like.new_ones(pixels, outputs)
    weight = like.new_ones(outputs, channels)
    output, grad_columns, grad_weight = (torch.empty_like(t) for t in (gradient, columns, weight))

    def step() -> Tensor:
        for _ in range(9):
            torch.mm(columns, weight.t(), out=output)
            if backward:
                torch.mm(gradient, weight, out=grad_columns)
                torch.mm(gradient.t(), columns, out=grad_weight)
        return output

    return step
