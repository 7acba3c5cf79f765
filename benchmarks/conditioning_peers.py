"""What StackGAN's conditioning is compared with: the published code's modules, eager and compiled, and its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of the image [N, C, H, W], the condition [N, E] and the weight [O, C + E, 3, 3]."""
Augmentation = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Condition and divergence of the text [N, T], the weight [2 e, T], the bias [2 e] and the noise [N, e]."""

torch.backends.cudnn.benchmark = True  # as whoever trains on images of one size has it


def concatenated(input: Tensor, condition: Tensor, weight: Tensor) -> Tensor:
    """The condition repeated over space and concatenated with the image, a convolution of both."""
    repeated = condition[:, :, None, None].expand(-1, -1, *input.shape[2:])
    return F.conv2d(torch.cat((input, repeated), 1), weight, padding=1)


def of_image(input: Tensor, condition: Tensor, weight: Tensor) -> Tensor:
    """The convolution without what the condition adds: `weight` is [O, C, 3, 3]."""
    return F.conv2d(input, weight, padding=1)


def augmentation(text: Tensor, weight: Tensor, bias: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Linear, ReLU, mean and log-variance, a sample of them, and their divergence in float32 at least."""
    mu, logvar = F.relu(F.linear(text, weight, bias)).chunk(2, 1)
    condition = eps * (0.5 * logvar).exp() + mu
    wide_mu, wide_logvar = (t if t.dtype == torch.float64 else t.float() for t in (mu, logvar))
    return condition, -0.5 * (1 + wide_logvar - wide_mu.square() - wide_logvar.exp()).mean()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with its defaults."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def product(text: Tensor, weight: Tensor, bias: Tensor, *, backward: bool) -> Callable[[], Tensor]:
    """The linear layer; with backward, the product of its weight's gradient too."""
    text, weight, bias = (t.detach() for t in (text, weight, bias))
    projected = torch.addmm(bias, text, weight.t())
    grad_weight = torch.empty_like(weight)

    def step() -> Tensor:
        torch.addmm(bias, text, weight.t(), out=projected)
        if backward:
            torch.mm(projected.t(), text, out=grad_weight)
        return projected

    return step
