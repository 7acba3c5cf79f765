"""separable_conv on CUDA: one fused Triton kernel for few outputs, else depthwise kernels around library products.

The depthwise result is written and read once, and freed before the next tensor of its size is made: forward and
backward need room for one of them. 16-bit channels_last products are plain matrix products over all pixels; float32
takes the library's 1x1 convolution, so that TF32 follows torch's setting for convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from perfvl import backends
from perfvl.ops import depthwise_conv
from perfvl.reference.activation import ACTIVATIONS

_ACTIVATIONS = list(ACTIVATIONS.values())
_depthwise, _depthwise_backward = depthwise_conv.OP, depthwise_conv.BACKWARD


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, inverse_deviation = torch.batch_norm_stats(x, 0.0)
    return mean, inverse_deviation.pow(-2)


def _rows(x: Tensor) -> Tensor:
    """A channels_last tensor as the matrix [pixels, channels] that it is."""
    images, channels, height, width = x.shape
    return x.as_strided((images * height * width, channels), (channels, 1))


def _pointwise(
    v: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool, *, transposed: bool = False
) -> Tensor:
    """bias + weight v, or weight^T v, with sums in float32, in the layout of `v`; `weight` is [O, C, 1, 1].

    What is returned is no view: a view that leaves an autograd function cannot be modified in place. Every call of
    torch costs the host about as much time as a GPU needs for a small layer, so there are few.
    """
    if v.dtype == torch.float32:
        return F.conv_transpose2d(v, weight, bias) if transposed else F.conv2d(v, weight, bias)
    outputs, inner = (1, 0) if transposed else (0, 1)
    rows, columns = weight.shape[outputs], weight.shape[inner]
    strides = weight.stride(outputs), weight.stride(inner)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((len(v), rows, *v.shape[2:]), dtype=v.dtype, device=v.device, memory_format=memory)
    if channels_last:
        matrix = weight.as_strided((columns, rows), strides[::-1])
        if bias is None:
            torch.mm(_rows(v), matrix, out=_rows(out))
        else:
            torch.addmm(bias, _rows(v), matrix, out=_rows(out))
    else:
        matrices = weight.as_strided((len(v), rows, columns), (0, *strides))
        if bias is None:
            torch.bmm(matrices, v.flatten(2), out=out.flatten(2))
        else:
            torch.baddbmm(bias[:, None], matrices, v.flatten(2), out=out.flatten(2))
    return out


def _pointwise_weight_gradient(g: Tensor, v: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    if g.dtype == torch.float32:
        return conv2d_weight(v, weight.shape, g)
    if not channels_last:
        return torch.bmm(g.flatten(2), v.flatten(2).mT).sum(0, dtype=torch.float32).to(g.dtype).view(weight.shape)
    out = torch.empty(weight.shape, dtype=g.dtype, device=g.device)
    torch.mm(_rows(g).t(), _rows(v), out=out.flatten(1))
    return out


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
    """Depthwise kernel and library product."""
    # 1. Scales go into the weights, in float32 and rounded once.
    dtype = input.dtype
    if mid_scale is not None:
        depthwise_weight = (depthwise_weight * mid_scale.reshape(-1, 1, 1, 1)).to(dtype)
    if output_scale is not None:
        pointwise_weight = (pointwise_weight * output_scale.reshape(-1, 1, 1, 1)).to(dtype)
    # 2. The depthwise convolution.
    v, mean, variance = _depthwise(
        input,
        scale,
        shift,
        depthwise_weight,
        None if mid_shift is None else mid_shift.to(dtype),
        stride,
        padding,
        dilation,
        pre_activation,
        mid_activation,
        False,
    )
    # 3. The product, and what follows it.
    bias = None if output_shift is None else output_shift.to(dtype)
    output = _pointwise(v, pointwise_weight, bias, depthwise_conv.is_channels_last(input))
    if activation:
        output = _ACTIVATIONS[activation](output)
    if residual is not None:
        output += residual
    if statistics:
        mean, variance = _statistics(output)
    return output, mean, variance


def forward(*arguments):
    input, scale, _, depthwise_weight, mid_scale, _, pointwise_weight, output_scale, *rest = arguments
    if _fuses(input, scale, depthwise_weight, pointwise_weight, arguments[10:13]):
        from perfvl.kernels import separable_conv as kernels

        return kernels.fused_forward(
            *arguments[:4],
            *arguments[5:7],
            *rest,
            mid_scale=mid_scale,
            output_scale=output_scale,
        )
    return composed(*arguments)


def _fuses(
    input: Tensor, scale: Tensor | None, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: tuple
) -> bool:
    """Whether the Triton kernel takes it: up to 128 outputs, many pixels, an image that its tiles fit.

    On an H100 that takes 0.65 to 0.95 of the time of two kernels: 128 -> 128 channels at 147 x 147 in bfloat16,
    96 -> 24 at 112 x 112 with stride 2 and, in NCHW, 64 -> 128 at 512 x 512 in TF32. With 256 outputs, or with a batch
    norm before the convolution, it takes no less. Without TF32 it has no tensor cores for float32.
    """
    if scale is not None or backends.missing("triton", input.device.index or 0):
        return False
    if input.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return False
    from perfvl.kernels import separable_conv as kernels

    if not kernels.supports(input, depthwise_weight, pointwise_weight, *geometry):
        return False
    height, width = depthwise_conv.output_size(input, depthwise_weight, *geometry)
    columns = 16 if depthwise_conv.is_channels_last(input) else 32
    covered = 4 * columns * (-(-height // 4) * -(-width // columns))
    return len(input) * height * width >= 1 << 16 and covered <= 1.4 * height * width


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
    """The depthwise result once more for the gradient of the pointwise weight, then its gradient and the others."""
    # 1. The gradient of the output, with what its statistics add.
    g = grad_output
    if slope is not None:
        g = torch.addcmul(offset.reshape(-1, 1, 1), output, slope.reshape(-1, 1, 1)).add_(g).to(input.dtype)
    channels_last = depthwise_conv.is_channels_last(input)
    g = g.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def nothing(dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype, device=input.device)

    grad_bias = g.sum((0, 2, 3), dtype=torch.float32) if need_bias else nothing(torch.float32)
    # 2. Of the pointwise weight.
    if need_pointwise:
        v, _, _ = _depthwise(
            input, scale, shift, depthwise_weight, None, stride, padding, dilation, pre_activation, 0, False
        )
        grad_pointwise = _pointwise_weight_gradient(g, v, pointwise_weight, channels_last)
        del v
    else:
        grad_pointwise = nothing(input.dtype)
    # 3. Of the depthwise result, and through it.
    if not (need_input or need_affine or need_depthwise):
        scale_and_shift = (nothing(torch.float32), nothing(torch.float32))
        return nothing(input.dtype), *scale_and_shift, nothing(input.dtype), grad_pointwise, grad_bias
    found = _depthwise_backward(
        _pointwise(g, pointwise_weight, None, channels_last, transposed=True),
        input,
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
    return *found, grad_pointwise, grad_bias
