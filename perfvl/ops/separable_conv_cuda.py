"""separable_conv on CUDA: one fused Triton kernel for few outputs, else depthwise kernels around library products.

The depthwise result of a chunk of images is small enough for the L2 cache, where the product finds it; the next chunk
takes the same memory. float32 takes all images at once and the library's 1x1 convolution, so that TF32 follows torch's
setting for convolutions.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from perfvl import backends
from perfvl.ops import depthwise_conv
from perfvl.reference.activation import ACTIVATIONS

_ACTIVATIONS = list(ACTIVATIONS.values())
_depthwise, _depthwise_backward = depthwise_conv.OP, depthwise_conv.BACKWARD


@functools.cache
def _l2_bytes(device: int) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def _chunks(input: Tensor, image_elements: int) -> list[slice]:
    """Runs of images whose depthwise result fills at most half of the L2 cache."""
    images = size = input.shape[0]
    if input.dtype != torch.float32:
        bytes_each = max(1, image_elements * input.element_size())
        size = max(1, min(images, _l2_bytes(input.device.index or 0) // 2 // bytes_each))
    return [slice(first, min(first + size, images)) for first in range(0, images, size)]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, inverse_deviation = torch.batch_norm_stats(x, 0.0)
    return mean, inverse_deviation.pow(-2)


def _rows(x: Tensor) -> Tensor:
    """A channels_last tensor as the matrix [pixels, channels] that it is."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _pointwise(v: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool, out: Tensor) -> None:
    """out = bias + weight v, with sums in float32."""
    outputs, inner = weight.shape
    if channels_last and bias is not None:
        torch.addmm(bias, _rows(v), weight.T, out=_rows(out))
    elif channels_last:
        torch.mm(_rows(v), weight.T, out=_rows(out))
    else:
        torch.bmm(weight.expand(len(v), outputs, inner), v.flatten(2), out=out.flatten(2))
        if bias is not None:
            out += bias.reshape(-1, 1, 1)


def composed(
    input,
    scale,
    shift,
    depthwise_weight,
    mid_scale,
    mid_shift,
    pointwise_weight,
    output_scale,
    output_shift,
    residual,
    stride,
    padding,
    dilation,
    pre_activation,
    mid_activation,
    activation,
    statistics,
):
    """Depthwise kernel and library product, chunk by chunk."""
    # 1. Scales go into the weights, in float32 and rounded once.
    dtype, channels_last = input.dtype, depthwise_conv.is_channels_last(input)
    if mid_scale is not None:
        depthwise_weight = (depthwise_weight * mid_scale.reshape(-1, 1, 1, 1)).to(dtype)
    if output_scale is not None:
        pointwise_weight = (pointwise_weight * output_scale.reshape(-1, 1, 1, 1)).to(dtype)
    mid_bias = None if mid_shift is None else mid_shift.to(dtype)
    bias = None if output_shift is None else output_shift.to(dtype)
    size = depthwise_conv.output_size(input, depthwise_weight, stride, padding, dilation)
    (outputs, inner), images = pointwise_weight.shape[:2], input.shape[0]
    output = depthwise_conv.dense(input, (images, outputs, *size))
    for chunk in _chunks(input, inner * size[0] * size[1]):
        # 2. The depthwise convolution.
        v, _, _ = _depthwise(
            input[chunk],
            scale,
            shift,
            depthwise_weight,
            mid_bias,
            stride,
            padding,
            dilation,
            pre_activation,
            mid_activation,
            False,
        )
        # 3. The product, and what follows it.
        if dtype == torch.float32:
            output = part = F.conv2d(v, pointwise_weight, bias)
        else:
            part = output[chunk]
            _pointwise(v, pointwise_weight.flatten(1), bias, channels_last, part)
        if activation:
            part.copy_(_ACTIVATIONS[activation](part))
        if residual is not None:
            part += residual[chunk]
    if statistics:
        return output, *_statistics(output)
    return output, *(torch.empty(0, dtype=torch.float32, device=input.device) for _ in range(2))


def forward(*arguments):
    input, scale, _, depthwise_weight, mid_scale, _, pointwise_weight, output_scale, *rest = arguments
    if _fuses(input, scale, depthwise_weight, pointwise_weight, arguments[10:13]):
        from perfvl.kernels import separable_conv as kernels

        return kernels.fused_forward(
            *arguments[:4],
            *arguments[5:7],
            *rest,
            input_precision="tf32",
            mid_scale=mid_scale,
            output_scale=output_scale,
        )
    return composed(*arguments)


def _fuses(
    input: Tensor, scale: Tensor | None, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: tuple
) -> bool:
    """Whether the Triton kernel takes it: few outputs, so that nothing is computed twice, and many pixels.

    It evaluates a batch norm before the convolution once for every tap, and without TF32 it has no tensor cores.
    """
    if scale is not None or backends.triton_missing(input.device.index or 0):
        return False
    if input.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return False
    from perfvl.kernels import separable_conv as kernels

    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    return pixels >= 4096 and kernels.supports(input, depthwise_weight, pointwise_weight, *geometry)


def backward(
    grad_output,
    output,
    slope,
    offset,
    input,
    scale,
    shift,
    depthwise_weight,
    pointwise_weight,
    stride,
    padding,
    dilation,
    pre_activation,
    need_input,
    need_affine,
    need_depthwise,
    need_pointwise,
    need_bias,
):
    """The depthwise result and its gradient, chunk by chunk; sums over chunks in float32 and in order."""
    dtype, channels_last = input.dtype, depthwise_conv.is_channels_last(input)
    outputs, inner = pointwise_weight.shape[:2]
    size, matrix = grad_output.shape[2:], pointwise_weight.flatten(1)
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def zeros(needed: bool, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape if needed else (0,), dtype=torch.float32, device=input.device)

    grad_scale, grad_shift = zeros(need_affine, (input.shape[1],)), zeros(need_affine, (input.shape[1],))
    grad_depthwise = zeros(need_depthwise, tuple(depthwise_weight.shape))
    grad_pointwise, grad_bias = zeros(need_pointwise, (outputs, inner)), zeros(need_bias, (outputs,))
    grad_input = torch.empty(0, dtype=dtype, device=input.device)
    chunks = _chunks(input, (inner + outputs) * size[0] * size[1])
    if need_input and len(chunks) > 1:
        grad_input = depthwise_conv.dense(input, input.shape)
    for chunk in chunks:
        # 1. The gradient of the output, with what its statistics add.
        g = grad_output[chunk]
        if slope is not None:
            line = torch.addcmul(offset.reshape(-1, 1, 1), output[chunk], slope.reshape(-1, 1, 1))
            g = line.add_(g).to(dtype)
        g = g.contiguous(memory_format=memory)
        if need_bias:
            grad_bias += g.sum((0, 2, 3), dtype=torch.float32)
        # 2. Of the pointwise weights, with the depthwise result once more.
        if need_pointwise:
            v, _, _ = _depthwise(
                input[chunk], scale, shift, depthwise_weight, None, stride, padding, dilation, pre_activation, 0, False
            )
            grad_pointwise += _pointwise_weight_gradient(g, v, pointwise_weight, channels_last)
        if not (need_input or need_affine or need_depthwise):
            continue
        # 3. Of the depthwise result, and through it.
        if dtype == torch.float32:
            du = F.conv_transpose2d(g, pointwise_weight)
        else:
            du = depthwise_conv.dense(input, (len(g), inner, *size))
            _pointwise(g, matrix.T, None, channels_last, du)
        found = _depthwise_backward(
            du,
            input[chunk],
            scale,
            shift,
            depthwise_weight,
            stride,
            padding,
            dilation,
            pre_activation,
            need_input,
            need_affine,
            need_depthwise,
        )
        if need_input and len(chunks) > 1:
            grad_input[chunk] = found[0]
        elif need_input:
            grad_input = found[0]
        for total, part in zip((grad_scale, grad_shift, grad_depthwise), found[1:], strict=True):
            total += part
    return (
        grad_input,
        grad_scale,
        grad_shift,
        grad_depthwise.to(dtype),
        grad_pointwise.reshape(pointwise_weight.shape if need_pointwise else (0,)).to(dtype),
        grad_bias,
    )


def _pointwise_weight_gradient(g: Tensor, v: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    if g.dtype == torch.float32:
        return conv2d_weight(v, weight.shape, g).flatten(1)
    if channels_last:
        return _rows(g).T @ _rows(v)
    return torch.bmm(g.flatten(2), v.flatten(2).mT).sum(0, dtype=torch.float32)
