"""What colour nets are compared with: the layers of PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Net = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of the image [N, C, H, W], weight1, bias1, weight2, bias2 and the mean [C]."""

SCALE, SLOPE = 0.04, 0.5  # as published

torch.backends.cudnn.benchmark = True  # as whoever trains on images of one size has it


def eager(image: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, mean: Tensor) -> Tensor:
    """The image centred and scaled in float32 at least, and twice a convolution and a leaky ReLU."""
    x = image.to(torch.promote_types(weight1.dtype, torch.float32))
    x = ((x - mean[:, None, None]) * SCALE).to(weight1.dtype)
    h = F.leaky_relu(F.conv2d(x, weight1, bias1), SLOPE, inplace=True)
    return F.leaky_relu(F.conv2d(h, weight2, bias2), SLOPE, inplace=True)


def compiled(net: Net) -> Net:
    """``torch.compile`` with its defaults."""
    return torch.compile(net, fullgraph=True, dynamic=False)
