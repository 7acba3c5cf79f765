"""A colour net, two 1x1 convolutions on every pixel of an image, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def centered(image: Tensor, mean: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * (image - mean[c])`` in float32 at least, rounded once to `dtype`."""
    if mean is None and scale == 1:
        return image.to(dtype)
    x = image.to(torch.float64 if torch.float64 in (image.dtype, dtype) else torch.float32)
    if mean is not None:
        x = x - mean.reshape(-1, 1, 1)
    return (x * scale).to(dtype)


def color_transform(
    image: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mean: Tensor | None,
    *,
    scale: float,
    negative_slope: float,
    residual: bool,
) -> Tensor:
    r"""``y = act(W2 act(W1 x + b1) + b2)`` with ``x = scale (image - mean)``, ``act(z) = max(z, 0) + slope min(z, 0)``.

    With `residual`, x is added before the second activation. The learned colour spaces of Mishkin et al. 2016
    (arXiv:1606.02228, section 3.2 and its figure).
    """
    x = centered(image, mean, scale, weight1.dtype)
    h = F.leaky_relu(F.conv2d(x, weight1, bias1), negative_slope)
    z = F.conv2d(h, weight2, bias2)
    return F.leaky_relu(z + x if residual else z, negative_slope)
