"""Nearest-neighbour upsampling and 3x3 convolution behind one another, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from perfvl.reference.activation import ACTIVATIONS
from perfvl.reference.separable_conv import affine


def upsample_conv(
    input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, *, activation: str
) -> Tensor:
    r"""``y = act(z * scale + shift)`` with ``z[n, o, i, j] = sum_ckl w[o, c, k, l] u[n, c, i + k - 1, j + l - 1]``,
    ``u[n, c, i, j] = x[n, c, i // 2, j // 2]``, and 0 outside.

    The block of StackGAN's generators (Zhang et al. 2017, arXiv:1612.03242, section 3). Scale and shift [O] are a batch
    norm or a bias; absent ones are 1 and 0.
    """
    u = F.interpolate(input, scale_factor=2, mode="nearest")
    if scale is None:
        z = F.conv2d(u, weight, None if shift is None else shift.to(u.dtype), padding=1)
    else:
        z = affine(F.conv2d(u, weight, padding=1), scale, shift)
    return ACTIVATIONS[activation](z)
