"""Depthwise-separable convolution: depthwise k x k, then pointwise 1x1, without the tensor between them.

Top to bottom: the public function, the form for batch norm around it, their checks, autograd, the torch ops with
their fakes, the CUDA implementation.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops import separable_conv_cuda
from perfvl.ops._library import (
    FLOATING,
    LIBRARY,
    autocast_dtype,
    bad_type,
    bad_value,
    check_name,
    check_tensor,
    refuse_second_derivative,
)
from perfvl.ops.depthwise_conv import dense, is_channels_last, output_size
from perfvl.reference import separable_conv as reference
from perfvl.reference.activation import ACTIVATIONS, CODES

Size = int | tuple[int, ...]  # or (height, width)
Padding = int | tuple[int, ...] | str  # or (height, width), or (top, bottom, left, right)


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    pre_activation: str = "none",
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    r"""``y = act(bias + pointwise * (depthwise * pre(x))) + residual``: two convolutions, one pass over memory.

    The same as ``F.conv2d(F.conv2d(x, depthwise_weight, groups=C, ...), pointwise_weight, bias)`` (Chollet, Xception,
    arXiv:1610.02357, section 3). The depthwise result is neither written nor saved: backward computes it again.

    Args:
        input: [N, C, H, W] or [C, H, W], any strides; NCHW or channels_last goes in and comes out.
        depthwise_weight: [C m, 1, kh, kw]; output channel ``c m + j`` reads input channel ``c``.
        pointwise_weight: [O, C m, 1, 1].
        bias: [O].
        stride, dilation: of the depthwise convolution, an int or (height, width).
        padding: zeros around ``pre(x)``: an int, (height, width), (top, bottom, left, right), "valid" (0), "same" (as
            `F.conv2d` has it, stride 1) or "tf_same" (TensorFlow's: output ceil(size / stride), the odd pixel at the
            bottom and the right).
        pre_activation, activation: "none", "relu", "relu6", "silu", "hardswish" or "leaky_relu" (slope 0.01), before
            the depthwise and after the pointwise convolution.
        residual: what broadcasts to the output, added after `activation`.

    Returns:
        [N, O, H', W'] with ``H' = (H + top + bottom - dilation (kh - 1) - 1) // stride + 1``.

    dtypes: float32, bfloat16 and float16 (float64 runs the plain PyTorch reference); all tensors alike, as `F.conv2d`
    wants them; autocast casts them as it does for `F.conv2d`. Sums are float32; the depthwise result is rounded once to
    the dtype of `input`, as if it had been stored.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, groups or devices that do not fit; a kernel larger than the padded input; a stride or
            dilation below 1; negative padding; an unknown activation.
        RuntimeError: on backward through the gradient (second order).

    Cost: 2 N H' W' C m (kh kw + O) FLOP forward, twice that and the depthwise part once more backward. Reads `input`,
    writes the output; saves `input` alone for backward. On the CPU a calling thread keeps its working memory, up to
    64 MiB, for the next call. Where the two convolutions of torch are faster, they run (and save what they save).

    Example:
        >>> import torch
        >>> x = torch.randn(2, 64, 19, 19).to(memory_format=torch.channels_last)
        >>> separable_conv2d(x, torch.randn(64, 1, 3, 3), torch.randn(128, 64, 1, 1), padding=1).shape
        torch.Size([2, 128, 19, 19])
    """
    op = "separable_conv2d"
    if isinstance(input, Tensor) and input.dim() == 3:
        batched = separable_conv2d(
            input[None],
            depthwise_weight,
            pointwise_weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            pre_activation=pre_activation,
            activation=activation,
            residual=residual,
        )
        return batched[0]
    layer = check_layer(
        op, input, depthwise_weight, pointwise_weight, bias, stride, padding, dilation, pre_activation, activation
    )
    if residual is not None:
        if not isinstance(residual, Tensor):
            bad_type(op, "residual", type(residual).__name__, "a torch.Tensor")
        if residual.dtype not in FLOATING:
            bad_type(op, "residual", residual.dtype, "a float32, bfloat16, float16 or float64 tensor")
        if residual.device != input.device:
            bad_value(op, "residual", f"device {residual.device}", f"the input's device {input.device}")
        shape = (input.shape[0], pointwise_weight.shape[0], *layer.output_size)
        given = (1,) * (4 - residual.dim()) + tuple(residual.shape)
        if len(given) > 4 or any(n not in (1, size) for n, size in zip(given, shape, strict=True)):
            bad_value(op, "residual", f"shape {tuple(residual.shape)}", f"one that broadcasts to {shape}")
    return run(layer, input, depthwise_weight, pointwise_weight, bias, residual=residual)


class Layer(NamedTuple):
    """The checked geometry and activations of a call."""

    output_size: tuple[int, ...]
    stride: list[int]
    padding: list[int]  # top, bottom, left, right
    dilation: list[int]
    pre_activation: str
    activation: str


def check_layer(
    op: str,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    pre_activation: str,
    activation: str,
) -> Layer:
    """Everything but `residual`: shapes, dtypes, devices; the padding in pixels, the size of the output."""
    check_tensor(op, "input", input, 4, input)
    check_tensor(op, "depthwise_weight", depthwise_weight, 4, input)
    check_tensor(op, "pointwise_weight", pointwise_weight, 4, input)
    _, channels, height, width = input.shape
    inner, inputs, kernel_height, kernel_width = depthwise_weight.shape
    outputs, *others = pointwise_weight.shape
    if channels == 0 or inner == 0 or inner % channels or inputs != 1:
        expected = f"({channels} m, 1, kh, kw) for an input of {channels} channels"
        bad_value(op, "depthwise_weight", f"shape {tuple(depthwise_weight.shape)}", expected)
    if others != [inner, 1, 1] or outputs == 0:
        bad_value(op, "pointwise_weight", f"shape {tuple(pointwise_weight.shape)}", f"(O, {inner}, 1, 1)")
    if bias is not None:
        check_tensor(op, "bias", bias, 1, input)
        if bias.shape[0] != outputs:
            bad_value(op, "bias", f"shape {tuple(bias.shape)}", f"({outputs},)")
    check_name(op, "pre_activation", pre_activation, ACTIVATIONS)
    check_name(op, "activation", activation, ACTIVATIONS)
    strides, dilations = _pair(op, "stride", stride, 1), _pair(op, "dilation", dilation, 1)
    # Height and width by name: loops over the two would take as long as the rest of the checks.
    reach = dilations[0] * (kernel_height - 1) + 1, dilations[1] * (kernel_width - 1) + 1
    pad = _pad(op, padding, strides, reach, (height, width))
    padded = height + pad[0] + pad[1], width + pad[2] + pad[3]
    if kernel_height == 0 or kernel_width == 0 or padded[0] < reach[0] or padded[1] < reach[1]:
        got = f"a kernel of {(kernel_height, kernel_width)} that reaches over {reach} pixels"
        bad_value(op, "depthwise_weight", got, f"at least one pixel, and at most the padded input's {padded}")
    output_size = (padded[0] - reach[0]) // strides[0] + 1, (padded[1] - reach[1]) // strides[1] + 1
    return Layer(output_size, strides, pad, dilations, pre_activation, activation)


def _pair(op: str, name: str, value: Any, least: int) -> list[int]:
    if type(value) is int and value >= least:
        return [value, value]
    pair = list(value) if isinstance(value, (tuple, list)) else [value, value]
    for v in pair:
        if not isinstance(v, (int, torch.SymInt)) or isinstance(v, bool):
            bad_type(op, name, repr(value), "an int or a tuple of ints")
    if len(pair) != 2 or min(pair) < least:
        bad_value(op, name, repr(value), f"an int of at least {least}, or two (height, width)")
    return pair


def _pad(op: str, padding: object, stride: list[int], reach: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """Pixels at the top, bottom, left and right."""
    if isinstance(padding, str):
        if padding == "valid":
            return [0, 0, 0, 0]
        if padding == "same" and stride == [1, 1]:
            total = [r - 1 for r in reach]
        elif padding == "tf_same":
            total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(size, stride, reach, strict=True)]
        else:
            expected = 'an int, a tuple, "valid", "same" (stride 1) or "tf_same"'
            bad_value(op, "padding", f"{padding!r} with stride {tuple(stride)}", expected)
        return [total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2]
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return [*_pair(op, "padding", padding[:2], 0), *_pair(op, "padding", padding[2:], 0)]
    height, width = _pair(op, "padding", padding, 0)
    return [height, height, width, width]


class Affine(NamedTuple):
    """``x * scale + shift`` for each channel, float32: what batch norm and bias are to a kernel."""

    scale: Tensor | None
    shift: Tensor | None


NO_AFFINE = Affine(None, None)


def run(
    layer: Layer,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    *,
    mid: Affine = NO_AFFINE,
    mid_activation: str = "none",
    post: Affine = NO_AFFINE,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution of checked arguments. Where nothing learns, batch norms `mid` [C m] and `post` [O] join it."""
    input, depthwise_weight, pointwise_weight, bias = _cast(input, depthwise_weight, pointwise_weight, bias)
    if post.shift is None:
        post = Affine(None, bias)
    learns = _learns(input, depthwise_weight, *mid, pointwise_weight, *post, residual)
    between = mid is not NO_AFFINE or mid_activation != "none" or post.scale is not None
    fuses = _fuses(input, depthwise_weight, pointwise_weight, alone=not between)
    if not fuses or (between and learns):
        return _reference(
            layer, input, NO_AFFINE, depthwise_weight, mid, mid_activation, pointwise_weight, post, residual
        )
    if learns:
        y, _, _ = _apply(layer, input, NO_AFFINE, depthwise_weight, pointwise_weight, bias, False)
        y = ACTIVATIONS[layer.activation](y)
        return y if residual is None else y + residual
    shape = (input.shape[0], pointwise_weight.shape[0], *layer.output_size)
    fits = residual is not None and residual.dtype == input.dtype and residual.shape == shape
    y, _, _ = _call(
        layer,
        input,
        NO_AFFINE,
        depthwise_weight,
        mid,
        mid_activation,
        pointwise_weight,
        post,
        residual if fits else None,
        False,
    )
    return y if residual is None or fits else y + residual


def run_with_statistics(
    layer: Layer,
    input: Tensor,
    norm: Affine,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The convolution of ``pre(input * scale + shift)``, with mean and biased variance of each output channel.

    For batch norm: that of the layer before is `norm` [C] float32, that of this layer's output follows from the
    statistics [O] float32, taken while it is written. `layer.activation` must be "none". Differentiable in all that is
    given, through all that is returned: the gradient of a batch norm needs no tensor but the output itself.
    """
    input, depthwise_weight, pointwise_weight, bias = _cast(input, depthwise_weight, pointwise_weight, bias)
    learns = _learns(input, *norm, depthwise_weight, pointwise_weight, bias)
    if not _fuses(input, depthwise_weight, pointwise_weight, alone=False):
        post = Affine(None, bias)
        y = _reference(layer, input, norm, depthwise_weight, NO_AFFINE, "none", pointwise_weight, post, None)
        return y, *reference.channel_statistics(y)
    if learns:
        return _apply(layer, input, norm, depthwise_weight, pointwise_weight, bias, True)
    post = Affine(None, bias)
    return _call(layer, input, norm, depthwise_weight, NO_AFFINE, "none", pointwise_weight, post, None, True)


def _cast(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """As autocast does for `F.conv2d`."""
    dtype = autocast_dtype(input)
    return (input, *others) if dtype is None else tuple(None if t is None else t.to(dtype) for t in (input, *others))


def _reference(
    layer: Layer,
    input: Tensor,
    norm: Affine,
    depthwise_weight: Tensor,
    mid: Affine,
    mid_activation: str,
    pointwise_weight: Tensor,
    post: Affine,
    residual: Tensor | None,
) -> Tensor:
    cast = torch.is_autocast_enabled(
        input.device.type
    )  # the tensors are, and the context would take as long as a layer
    with torch.autocast(input.device.type, enabled=False) if cast else contextlib.nullcontext():
        return reference.separable_conv(
            input,
            norm.scale,
            norm.shift,
            depthwise_weight,
            mid.scale,
            mid.shift,
            pointwise_weight,
            post.scale,
            post.shift,
            residual,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            pre_activation=layer.pre_activation,
            mid_activation=mid_activation,
            activation=layer.activation,
        )


def _call(
    layer: Layer,
    input: Tensor,
    norm: Affine,
    depthwise_weight: Tensor,
    mid: Affine,
    mid_activation: str,
    pointwise_weight: Tensor,
    post: Affine,
    residual: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shift = post.shift
    return _OP(
        input,
        *norm,
        depthwise_weight,
        *mid,
        pointwise_weight,
        post.scale,
        None if shift is None else shift.float().contiguous(),
        residual,
        layer.stride,
        layer.padding,
        layer.dilation,
        CODES[layer.pre_activation],
        CODES[mid_activation],
        CODES[layer.activation],
        statistics,
    )


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# oneDNN's bfloat16 convolutions run on AMX tiles, this op's do not.
_AMX = not backends.CPU_MISSING and "amx" in torch.ops.perfvl._isa_levels()


def has_kernel(input: Tensor) -> bool:
    """Whether there is a kernel for this dtype and device that some shape is faster with."""
    if input.dtype == torch.float64 or (_AMX and input.is_cpu and input.dtype == torch.bfloat16):
        return False
    return backends.choose(input, cuda="native") != "reference"


def _fuses(input: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *, alone: bool) -> bool:
    """Whether the kernels run. `alone`: no batch norm joins the convolutions, which would save passes of its own."""
    if input.numel() == 0 or not has_kernel(input) or depthwise_weight.shape[2] * depthwise_weight.shape[3] > 8192:
        return False
    return not alone or not input.is_cpu or _is_faster(input, pointwise_weight)


def _is_faster(input: Tensor, pointwise_weight: Tensor) -> bool:
    """CPU: not where oneDNN is faster, by benchmarks/results: in NCHW, which has to be turned into channels_last and
    back, beside a large product, and in bfloat16."""
    if input.dtype == torch.float16 or is_channels_last(input):
        return True
    return input.dtype == torch.float32 and pointwise_weight.shape[0] * pointwise_weight.shape[1] <= 1 << 16


def _apply(layer, input, norm, depthwise_weight, pointwise_weight, bias, statistics):
    return _SeparableConv.apply(input, *norm, depthwise_weight, pointwise_weight, bias, (layer, statistics))


class _SeparableConv(torch.autograd.Function):
    """Saves the input, and with statistics the output, which the next layer saves anyway."""

    @staticmethod
    def forward(ctx, input, scale, shift, depthwise_weight, pointwise_weight, bias, given):
        layer, statistics = given
        layer = layer._replace(activation="none")
        norm, post = Affine(scale, shift), Affine(None, bias)
        output, mean, variance = _call(
            layer, input, norm, depthwise_weight, NO_AFFINE, "none", pointwise_weight, post, None, statistics
        )
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept = (output, mean) if statistics else (None, None)
        ctx.save_for_backward(input, scale, shift, depthwise_weight, pointwise_weight, *kept)
        ctx.set_materialize_grads(False)
        if not statistics:
            ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance

    @staticmethod
    def backward(ctx, grad_output, grad_mean, grad_variance):
        input, scale, shift, depthwise_weight, pointwise_weight, output, mean = ctx.saved_tensors
        layer, needed = ctx.layer, ctx.needs_input_grad
        if grad_output is None:
            if grad_mean is None and grad_variance is None:
                return (None,) * 7
            grad_output = torch.zeros_like(output)
        # With y = gradient of the output, d/dz of (mean, variance) adds the line slope * z + offset to it.
        slope = offset = None
        if output is not None and (grad_mean is not None or grad_variance is not None):
            count = output.numel() // output.shape[1]
            slope = torch.zeros_like(mean) if grad_variance is None else grad_variance * (2 / count)
            offset = -slope * mean if grad_mean is None else torch.addcmul(grad_mean / count, slope, mean, value=-1)
        found = _BACKWARD(
            grad_output,
            None if slope is None else output,
            slope,
            offset,
            input,
            scale,
            shift,
            depthwise_weight,
            pointwise_weight,
            layer.stride,
            layer.padding,
            layer.dilation,
            CODES[layer.pre_activation],
            needed[0],
            needed[1] or needed[2],
            needed[3],
            needed[4],
            ctx.bias_dtype is not None and needed[5],
        )
        grads = [grad if need else None for grad, need in zip(found, needed[:6], strict=True)]
        if grads[5] is not None:
            grads[5] = grads[5].to(ctx.bias_dtype)
        inputs = [t for t in (input, scale, shift, depthwise_weight, pointwise_weight) if t is not None]
        return *refuse_second_derivative("separable_conv2d", grads, inputs), None


LIBRARY.define(
    "separable_conv(Tensor input, Tensor? scale, Tensor? shift, Tensor depthwise_weight, Tensor? mid_scale, "
    "Tensor? mid_shift, Tensor pointwise_weight, Tensor? output_scale, Tensor? output_shift, Tensor? residual, "
    "int[] stride, int[] padding, int[] dilation, int pre_activation, int mid_activation, int activation, "
    "bool statistics) "
    "-> (Tensor output, Tensor mean, Tensor variance)"
)
LIBRARY.define(
    "separable_conv_backward(Tensor grad_output, Tensor? output, Tensor? slope, Tensor? offset, Tensor input, "
    "Tensor? scale, Tensor? shift, Tensor depthwise_weight, Tensor pointwise_weight, int[] stride, int[] padding, "
    "int[] dilation, int pre_activation, bool need_input, bool need_affine, bool need_depthwise, bool need_pointwise, "
    "bool need_bias) -> (Tensor grad_input, Tensor grad_scale, Tensor grad_shift, Tensor grad_depthwise, "
    "Tensor grad_pointwise, Tensor grad_bias)"
)
_OP = torch.ops.perfvl.separable_conv.default
_BACKWARD = torch.ops.perfvl.separable_conv_backward.default


@torch.library.register_fake("perfvl::separable_conv", lib=LIBRARY)
def _fake(
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
    size, channels = output_size(input, depthwise_weight, stride, padding, dilation), pointwise_weight.shape[0]
    output = dense(input, (input.shape[0], channels, *size))
    mean, variance = (
        torch.empty(channels if statistics else 0, dtype=torch.float32, device=input.device) for _ in range(2)
    )
    return output, mean, variance


@torch.library.register_fake("perfvl::separable_conv_backward", lib=LIBRARY)
def _fake_backward(
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
    def empty(needed: bool, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=input.device)

    channels = (input.shape[1],)
    return (
        dense(input, input.shape) if need_input else empty(False, channels, input.dtype),
        empty(need_affine, channels, torch.float32),
        empty(need_affine, channels, torch.float32),
        empty(need_depthwise, depthwise_weight.shape, input.dtype),
        empty(need_pointwise, pointwise_weight.shape, input.dtype),
        empty(need_bias, (pointwise_weight.shape[0],), torch.float32),
    )


LIBRARY.impl("separable_conv", separable_conv_cuda.forward, "CUDA")
LIBRARY.impl("separable_conv_backward", separable_conv_cuda.backward, "CUDA")
