"""Activations in plain PyTorch: pointwise ones by name, and those of several linear pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


# In the order of the codes that kernels know them by.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _identity,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def maxout(input: Tensor, pieces: int) -> Tensor:
    r""":math:`y_c = \max_p x_{p C + c}` over the pieces p of every channel c of [N, pieces * C, ...] (Goodfellow et al.
    2013, arXiv:1302.4389, equation 1).

    Of equal pieces the last one wins and alone gets the gradient, as in Caffe's element-wise maximum. NaN wins.
    """
    largest, *others = input.unflatten(1, (pieces, input.shape[1] // pieces)).unbind(1)
    for other in others:
        largest = torch.where((other >= largest) | other.isnan(), other, largest)
    return largest.clone() if not others else largest


def of_samples(parameter: Tensor, dims: int) -> Tensor:
    """Parameters [C] as they stand beside samples [C, ...] of `dims` dimensions."""
    return parameter.reshape(parameter.shape + (1,) * (dims - parameter.dim()))


def apl(input: Tensor, slope: Tensor, hinge: Tensor) -> Tensor:
    r"""The adaptive piecewise linear unit :math:`y = \max(0, x) + \sum_s a_s \max(0, b_s - x)` (Agostinelli et al.
    2015, arXiv:1412.6830, equation 1), of x [N, C, ...] with slopes a and hinges b, [S, C] or [S, C, ...].

    In float32 at least, and rounded once.
    """
    wide = torch.float64 if torch.float64 in (input.dtype, slope.dtype, hinge.dtype) else torch.float32
    x = input.to(wide)
    y = F.relu(x)
    for a, b in zip(slope.to(wide), hinge.to(wide), strict=True):
        y = y + of_samples(a, input.dim() - 1) * F.relu(of_samples(b, input.dim() - 1) - x)
    return y.to(input.dtype)


def rrelu_slope(input: Tensor, lower: float, upper: float, *, divide: bool) -> Tensor:
    """What each element is multiplied by: 1, or, where it is negative, a number drawn from U(lower, upper) or its
    reciprocal (Xu et al. 2015, arXiv:1505.00853, section 2.4)."""
    drawn = torch.empty_like(input).uniform_(lower, upper)
    return torch.where(input < 0, drawn.reciprocal() if divide else drawn, 1.0)
