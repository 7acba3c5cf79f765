"""Upsampling and convolution as a layer, and with batch norm and an activation behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perfvl.nn.separable_conv import running_affine
from perfvl.ops._library import bad_type, bad_value
from perfvl.ops.upsample_conv import activate_, check, run
from perfvl.reference.activation import ACTIVATIONS


class UpsampleConv2d(nn.Module):
    """``act(bn(conv3x3(up2(x))))``: :func:`perfvl.functional.upsample_conv2d` as a layer, alone or with a batch norm.

    Stands for ``nn.Upsample(scale_factor=2)``, ``nn.Conv2d(in_channels, out_channels, 3, padding=1)`` and, as child
    `bn`, ``nn.BatchNorm2d(out_channels)``. `weight` [O, C, 3, 3] and `bias` [O] are those of the `nn.Conv2d`, initial
    values included; what the kernels make of them is made in every call, so that none can be stale. Evaluation without
    gradients: one pass for everything. Training: the batch norm is torch's own, statistics included.

    Args:
        in_channels, out_channels: C and O.
        bias: whether the convolution has one.
        batch_norm: whether a batch norm follows it.
        activation: a name that :func:`perfvl.functional.upsample_conv2d` knows.
        eps, momentum: of `nn.BatchNorm2d`.

    Raises:
        ValueError: fewer than one channel; an unknown activation. Dtypes, layouts, cost and errors of a call are those
            of the function.

    Example:
        >>> import torch
        >>> block = UpsampleConv2d(64, 32, bias=False, batch_norm=True, activation="relu")
        >>> block(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 32, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        batch_norm: bool = False,
        activation: str = "none",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or isinstance(value, bool):
                bad_type("UpsampleConv2d", name, repr(value), "an int")
            if value < 1:
                bad_value("UpsampleConv2d", name, value, "at least 1")
        if activation not in ACTIVATIONS:
            bad_value("UpsampleConv2d", "activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype) if batch_norm else None
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv2d` does, which draws the same numbers from the same seed."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(9 * self.weight.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)
        if self.bn is not None:
            self.bn.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        if self.bn is not None:
            return upsample_norm(input, self.weight, self.bias, self.bn, self.activation)
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None])[0]
        check("upsample_conv2d", input, self.weight, self.bias, self.activation)
        return run(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        out_channels, in_channels = self.weight.shape[:2]
        return f"{in_channels}, {out_channels}, bias={self.bias is not None}, activation={self.activation}"


def upsample_norm(input: Tensor, weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d, activation: str) -> Tensor:
    """``act(bn(upsample_conv2d(input, weight, bias)))``, [N, C, H, W] to [N, O, 2 H, 2 W]."""
    check("upsample_conv2d", input, weight, bias, activation)
    if bn.num_features != weight.shape[0]:
        bad_value("upsample_conv2d", "bn", f"{bn.num_features} features", f"the weight's {weight.shape[0]}")
    if bn.training or bn.running_mean is None or torch.is_grad_enabled():
        return activate_(bn(run(input, weight, bias)), activation)
    return run(input, weight, post=running_affine(bn, bias), activation=activation)
