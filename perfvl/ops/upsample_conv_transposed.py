"""upsample_conv by the library's transposed convolution: on CUDA, and on CPUs whose library has AMX tiles.

conv3x3(up2(x)) is a transposed convolution with kernel 4, stride 2 and padding 1. Output rows 2 i and 2 i + 1 see
``x[i-1] w0 + x[i] (w1 + w2)`` and ``x[i] (w0 + w1) + x[i+1] w2``, so its kernel is ``(w2, w1 + w2, w0 + w1, w0)`` along
either axis: ``k = M w M^T``, exact at the borders too. That is 16 multiplications for each pixel of the input, channel
and output, where the convolution of the upsampled image takes 36. The sums are made in float32 and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.ops._library import LIBRARY
from perfvl.ops.depthwise_conv import is_channels_last
from perfvl.reference.activation import ACTIVATIONS

_ACTIVATIONS = list(ACTIVATIONS.values())


LIBRARY.define("upsample_weight(Tensor weight, Tensor? scale, bool channels_last) -> Tensor")
LIBRARY.define("upsample_weight_backward(Tensor grad_kernel, bool channels_last) -> Tensor")
_WEIGHT = torch.ops.perfvl.upsample_weight.default
_WEIGHT_BACKWARD = torch.ops.perfvl.upsample_weight_backward.default


def transposed_weight(weight: Tensor, scale: Tensor | None, channels_last: bool) -> Tensor:
    """[C, O, 4, 4] for the transposed convolution, in the layout of the images; `scale` [O] goes into it."""
    if weight.is_cuda:
        return _WEIGHT(weight, scale, channels_last)
    # 1. [C, 3, 3, O] or [C, O, 3, 3], in float32.
    w = (weight.permute(1, 2, 3, 0) if channels_last else weight.transpose(0, 1)).contiguous().float()
    axis = 1 if channels_last else 2
    if scale is not None:
        w = w * (scale if channels_last else scale.reshape(-1, 1, 1))
    # 2. M w, then w M^T straight into its place: for wide layers fresh memory takes longer than the sums.
    w0, w1, w2 = w.unbind(axis)
    w0, w1, w2 = torch.stack((w2, w1 + w2, w0 + w1, w0), axis).unbind(axis + 1)
    sizes = [4 if n in (axis, axis + 1) else size for n, size in enumerate(w.shape)]
    kernel = torch.empty(sizes, dtype=weight.dtype, device=weight.device)
    for place, column in zip(kernel.unbind(axis + 1), (w2, w1 + w2, w0 + w1, w0), strict=True):
        place.copy_(column)
    return kernel.permute(0, 3, 1, 2) if channels_last else kernel


def _weight_gradient(grad_kernel: Tensor) -> Tensor:
    """``M^T k M``: [C, O, 4, 4] to [O, C, 3, 3], summed in float32."""
    if grad_kernel.is_cuda:
        return _WEIGHT_BACKWARD(grad_kernel, False)
    (inputs, outputs), dtype = grad_kernel.shape[:2], grad_kernel.dtype
    k0, k1, k2, k3 = grad_kernel.unbind(2)
    k0, k1, k2, k3 = torch.stack((k2.float() + k3, k1.float() + k2, k0.float() + k1), 2).unbind(3)
    grad = torch.empty((outputs, inputs, 3, 3), dtype=dtype, device=grad_kernel.device)
    for place, column in zip(grad.transpose(0, 1).unbind(3), (k2 + k3, k1 + k2, k0 + k1), strict=True):
        place.copy_(column)
    return grad


def forward(input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, activation: int) -> Tensor:
    channels_last = is_channels_last(input)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    kernel = transposed_weight(weight, scale, channels_last)
    bias = None if shift is None else shift.to(input.dtype)
    y = F.conv_transpose2d(input.contiguous(memory_format=memory), kernel, bias, stride=2, padding=1)
    return _ACTIVATIONS[activation](y.contiguous(memory_format=memory))


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, need_input: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = is_channels_last(input)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    g = grad_output.contiguous(memory_format=memory)
    grad_input, grad_weight = (torch.empty(0, dtype=input.dtype, device=input.device) for _ in range(2))
    grad_bias = torch.empty(0, dtype=torch.float32, device=input.device)
    if need_input or need_weight:
        dx, dk, _ = torch.ops.aten.convolution_backward.default(
            g,
            input.contiguous(memory_format=memory),
            transposed_weight(weight, None, channels_last),
            None,
            [2, 2],
            [1, 1],
            [1, 1],
            True,
            [0, 0],
            1,
            [need_input, need_weight, False],
        )
        if need_input:
            grad_input = dx.contiguous(memory_format=memory)
        if need_weight:
            grad_weight = _weight_gradient(dk)
    if need_bias:
        grad_bias = g.sum((0, 2, 3), dtype=torch.float32)
    return grad_input, grad_weight, grad_bias
