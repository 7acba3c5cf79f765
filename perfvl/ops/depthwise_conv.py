"""depthwise_conv: one filter (or m) for every channel, with what stands before and after it; and its gradients.

Private: `separable_conv` runs it on CUDA beside matrix products of the library. Arguments are checked there. Weights
have at most 8,192 taps, and every channel at most 2^31 pixels in the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perfvl.ops._library import LIBRARY

LIBRARY.define(
    "depthwise_conv(Tensor input, Tensor? scale, Tensor? shift, Tensor weight, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int pre_activation, int activation, bool statistics) "
    "-> (Tensor output, Tensor mean, Tensor variance)"
)
LIBRARY.define(
    "depthwise_conv_backward(Tensor grad_output, Tensor input, Tensor? scale, Tensor? shift, Tensor weight, "
    "int[] stride, int[] padding, int[] dilation, int pre_activation, bool need_input, bool need_affine, "
    "bool need_weight) -> (Tensor grad_input, Tensor grad_scale, Tensor grad_shift, Tensor grad_weight)"
)


OP = torch.ops.perfvl.depthwise_conv.default
BACKWARD = torch.ops.perfvl.depthwise_conv_backward.default


def is_channels_last(x: Tensor) -> bool:
    """Whether outputs and gradients beside `x` [N, C, H, W] are channels_last. Kernels ask the same."""
    return x.shape[1] > 1 and x.stride(1) == 1


def dense(like: Tensor, shape: Any) -> Tensor:
    """Uninitialised, channels_last where `like` is."""
    memory = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory)


def output_size(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    """Height and width; `padding` is (top, bottom, left, right)."""
    return [
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, before, after, d, k, s in zip(
            input.shape[2:], padding[::2], padding[1::2], dilation, weight.shape[2:], stride, strict=True
        )
    ]


@torch.library.register_fake("perfvl::depthwise_conv", lib=LIBRARY)
def _fake(input, scale, shift, weight, bias, stride, padding, dilation, pre_activation, activation, statistics):
    size = output_size(input, weight, stride, padding, dilation)
    channels = weight.shape[0]
    output = dense(input, (input.shape[0], channels, *size))
    mean, variance = (
        torch.empty(channels if statistics else 0, dtype=torch.float32, device=input.device) for _ in range(2)
    )
    return output, mean, variance


@torch.library.register_fake("perfvl::depthwise_conv_backward", lib=LIBRARY)
def _fake_backward(
    grad_output,
    input,
    scale,
    shift,
    weight,
    stride,
    padding,
    dilation,
    pre_activation,
    need_input,
    need_affine,
    need_weight,
):
    def empty(needed: bool, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=input.device)

    channels = (input.shape[1],)
    return (
        dense(input, input.shape) if need_input else empty(False, channels, input.dtype),
        empty(need_affine, channels, torch.float32),
        empty(need_affine, channels, torch.float32),
        empty(need_weight, weight.shape, weight.dtype),
    )
