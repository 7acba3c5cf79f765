"""Depthwise convolution and pointwise (1x1) convolution behind one another, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.reference.activation import ACTIVATIONS


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x * scale[c] + shift[c]`` in the wider dtype, rounded once to that of `x` [N, C, H, W]."""
    if scale is None and shift is None:
        return x
    wide = x if scale is None else x * scale.reshape(1, -1, 1, 1)
    if shift is not None:
        wide = wide + shift.reshape(1, -1, 1, 1)
    return wide.to(x.dtype)


def depthwise_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    pre_activation: str,
    activation: str,
) -> Tensor:
    r"""Every channel by itself: ``u[n, c m + j] = act(bias + sum_il weight[c m + j, 0, i, l] * a[n, c, ...])``.

    ``a = pre(input * scale[c] + shift[c])`` is rounded to the dtype of `input`, and outside pixels of ``a`` are 0:
    padding comes after it. `padding` is (top, bottom, left, right).
    """
    a = ACTIVATIONS[pre_activation](affine(input, scale, shift))
    top, bottom, left, right = padding
    symmetric = [top, left]
    if top != bottom or left != right:
        a, symmetric = F.pad(a, (left, right, top, bottom)), [0, 0]
    return ACTIVATIONS[activation](F.conv2d(a, weight, bias, stride, symmetric, dilation, input.shape[1]))


def separable_conv(
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    depthwise_weight: Tensor,
    mid_scale: Tensor | None,
    mid_shift: Tensor | None,
    pointwise_weight: Tensor,
    output_scale: Tensor | None,
    output_shift: Tensor | None,
    residual: Tensor | None,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    pre_activation: str,
    mid_activation: str,
    activation: str,
) -> Tensor:
    r"""``y = act(z * output_scale + output_shift) + residual``, with ``z = pointwise v``,
    ``v = mid(u * mid_scale + mid_shift)`` and ``u = depthwise pre(input * scale + shift)``.

    Chollet, Xception, arXiv:1610.02357, section 3 (where nothing stands between the two). Scales and shifts [C], [C m]
    and [O] are batch norms or biases; absent ones are 1 and 0.
    """
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    u = depthwise_conv(
        input,
        depthwise_weight,
        None,
        scale=scale,
        shift=shift,
        pre_activation=pre_activation,
        activation="none",
        **geometry,
    )
    v = ACTIVATIONS[mid_activation](affine(u, mid_scale, mid_shift))
    if output_scale is None:
        bias = None if output_shift is None else output_shift.to(v.dtype)
        z = F.conv2d(v, pointwise_weight, bias)
    else:
        z = affine(F.conv2d(v, pointwise_weight), output_scale, output_shift)
    y = ACTIVATIONS[activation](z)
    return y if residual is None else y + residual


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over (N, H, W) for each channel, in float32 (float64 for float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return mean, variance
