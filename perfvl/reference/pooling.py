"""Maximum plus average pooling, and stochastic pooling, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = list[int]  # of height and width


def max_avg_pool(input: Tensor, kernel: Pair, stride: Pair, padding: Pair, *, ceil_mode: bool) -> Tensor:
    r"""``y = max_{i in W} x_i + (1 / |W|) sum_{i in W} x_i`` over windows W.

    The sum of both poolings in Mishkin et al. 2016 (arXiv:1606.02228, section 3.3). Padding counts as zeros for the
    average alone; \|W\| are the window's pixels in the padded image.
    """
    largest = F.max_pool2d(input, kernel, stride, padding, ceil_mode=ceil_mode)
    return largest + F.avg_pool2d(input, kernel, stride, padding, ceil_mode=ceil_mode)


def stochastic_pool(
    input: Tensor, uniform: Tensor | None, kernel: Pair, stride: Pair, padding: Pair, size: Pair
) -> Tensor:
    r"""``y = x_k`` of the first k in scan order with ``x_1 + ... + x_k >= u (x_1 + ... + x_n)``: element i of a window
    with probability ``x_i / sum_j x_j``. Without `uniform` its expectation, ``y = sum_i x_i^2 / (sum_i x_i + tiny)``.

    Zeiler and Fergus 2013 (arXiv:1301.3557, sections 3.1 and 3.2), for x >= 0. uniform: u in [0, 1) for every window;
    size: how many windows there are.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    tiny = torch.finfo(torch.float32).tiny
    x = windows(input.to(dtype), kernel, stride, padding, size)
    total = x.sum(-1)
    if uniform is None:
        return (x.square().sum(-1) / (total + tiny)).to(input.dtype)
    before = x.detach().cumsum(-1) < (uniform.to(dtype) * total.detach()).unsqueeze(-1)
    # Padding is no element: it is passed over in front, and behind the sum has been reached.
    outside = windows(torch.zeros_like(input, dtype=torch.bool), kernel, stride, padding, size, True)
    first = (before | outside).to(torch.uint8).argmin(-1, keepdim=True)
    picked = x.gather(-1, first).squeeze(-1)
    return (picked + torch.where(total.isnan(), total, 0.0).detach()).to(input.dtype)  # a NaN is not lost


def windows(input: Tensor, kernel: Pair, stride: Pair, padding: Pair, size: Pair, fill: float | bool = 0.0) -> Tensor:
    """[N, C, H, W] to [N, C, OH, OW, kernel height * kernel width]."""
    behind = [
        max(0, (o - 1) * s + k - p - n)
        for n, o, k, s, p in zip(input.shape[2:], size, kernel, stride, padding, strict=True)
    ]
    x = F.pad(input, (padding[1], behind[1], padding[0], behind[0]), value=fill)
    for axis in (0, 1):
        x = x.unfold(2 + axis, kernel[axis], stride[axis]).narrow(2 + axis, 0, size[axis])
    return x.flatten(-2)
