"""Separable convolutions behind one another, each with its batch norm, with no pass for what stands between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perfvl.nn.separable_conv import Deferred, separable_deferred, separable_norm

ChainLayer = tuple[str, nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]
"""Activation before it, depthwise convolution, pointwise convolution, batch norm."""


def run_chain(
    input: Tensor, layers: Sequence[ChainLayer], *, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """``x = bn(pointwise(depthwise(pre(x))))`` for each layer in turn, then ``activation(x) + residual``.

    Evaluation without gradients: a convolution writes its batch norm and the next layer's activation. Else both are
    left to the next layer: a backward of batch norm needs what the convolution wrote, and nothing else is saved.
    """
    defer = torch.is_grad_enabled() or any(bn.training or bn.running_mean is None for *_, bn in layers)
    x: Tensor | Deferred = input
    pre = layers[0][0]
    for (_, depthwise, pointwise, bn), (after, *_) in itertools.pairwise(layers):
        if defer:
            x, pre = separable_deferred(x, depthwise, pointwise, bn, pre_activation=pre), after
        else:
            x, pre = separable_norm(x, depthwise, pointwise, bn, pre_activation=pre, activation=after), "none"
    _, depthwise, pointwise, bn = layers[-1]
    return separable_norm(x, depthwise, pointwise, bn, pre_activation=pre, activation=activation, residual=residual)
