"""What maxout and APL are compared with: the lines of PyTorch that users write, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Maxout = Callable[[Tensor], Tensor]
"""Of the input [N, 2 C, ...]."""
Unit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of the input [N, C, ...], slopes and hinges [S, C] or [S, C, ...]."""


def maximum(input: Tensor) -> Tensor:
    """Of both halves of the channels. Splits the gradient of equal numbers."""
    return torch.maximum(*input.chunk(2, 1))


def amax(input: Tensor) -> Tensor:
    """Over an axis of pieces, without places. Splits the gradient of equal numbers."""
    return input.unflatten(1, (2, -1)).amax(1)


def max_of_pieces(input: Tensor) -> Tensor:
    """Over an axis of pieces, with places: 8 bytes each."""
    return input.unflatten(1, (2, -1)).max(1).values


def sum_of_hinges(input: Tensor, slope: Tensor, hinge: Tensor) -> Tensor:
    """A ReLU for every segment."""
    if slope.dim() < input.dim():
        slope, hinge = (t.reshape(t.shape + (1,) * (input.dim() - t.dim())) for t in (slope, hinge))
    output = F.relu(input)
    for a, b in zip(slope, hinge, strict=True):
        output = output + a * F.relu(b - input)
    return output


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with its defaults."""
    return torch.compile(function, fullgraph=True, dynamic=False)
