"""StackGAN's conditioning in plain PyTorch: the condition drawn from a text, and convolutions that see it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def repeated(condition: Tensor, height: int, width: int) -> Tensor:
    """[N, E] as an image [N, E, H, W] that is the same everywhere."""
    return condition[:, :, None, None].expand(-1, -1, height, width)


def conditioned_conv(input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution, padding 1, of [input, condition repeated over space] (Zhang et al., StackGAN, 1612.03242, 3.3:
    the text embedding is spatially replicated and concatenated with the feature map)."""
    return F.conv2d(torch.cat([input, repeated(condition, *input.shape[2:])], 1), weight, bias, padding=1)


def add_condition(image: Tensor, condition: Tensor, weight: Tensor) -> Tensor:
    """`image` plus the part of such a convolution that sees the condition: `weight` is [O, E, 3, 3]."""
    return image + F.conv2d(repeated(condition, *image.shape[2:]), weight, padding=1)


# What the projection of a text is put through: by name, and by what becomes of its width.
PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "glu": lambda x: F.glu(x, 1),
}
PROJECTION_CODES = {name: code for code, name in enumerate(PROJECTIONS)}  # Projection of csrc/conditioning.h


def augment(projected: Tensor, eps: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Condition ``mu + eps exp(logvar / 2)``, mu, logvar, and the divergence of that normal distribution from N(0, 1).

    mu and logvar [N, e] are the halves of ``activation(projected)``. The divergence is the mean over all their elements
    of ``(mu^2 + exp(logvar) - 1 - logvar) / 2``, in float32 at least; 0 for an empty batch (StackGAN, 1612.03242,
    equation 2, with a mean where the paper sums over the elements of a sample).
    """
    mu, logvar = PROJECTIONS[activation](projected).chunk(2, 1)
    condition = mu + eps * (0.5 * logvar).exp()
    wide_mu, wide_logvar = (t if t.dtype == torch.float64 else t.float() for t in (mu, logvar))
    divergence = 0.5 * (wide_mu.square() + (wide_logvar.expm1() - wide_logvar)).sum() / max(mu.numel(), 1)
    return condition, mu, logvar, divergence
