"""A colour net: 1x1 convolution, leaky ReLU, 1x1 convolution, leaky ReLU, in one pass over the image.

Top to bottom: the public function, its checks, the choice of backend, autograd, the torch ops with their fakes, the
CUDA implementation.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import (
    FLOATING,
    LIBRARY,
    autocast_dtype,
    bad_type,
    bad_value,
    check_bool,
    check_float,
    refuse_second_derivative,
)
from perfvl.ops.depthwise_conv import is_channels_last
from perfvl.reference import color_transform as reference

_MOST = 16  # channels, hidden units and outputs that the kernels take


def color_transform(
    image: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    negative_slope: float,
    residual: bool = False,
    mean: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    r"""``y = act(W2 act(W1 x + b1) + b2)`` for every pixel, with ``x = scale (image - mean)`` and a leaky ReLU as act.

    The same as ``F.leaky_relu(F.conv2d(F.leaky_relu(F.conv2d(x, weight1, bias1), s), weight2, bias2), s)``: the colour
    nets of the CaffeNet study (Mishkin et al. 2016, arXiv:1606.02228, section 3.2). The image is read as it comes from
    the decoder, bytes included, and neither the centred image nor the hidden layer is written or saved: backward
    computes them again.

    Args:
        image: [N, C, H, W] or [C, H, W], uint8 or floating, any strides; NCHW or channels_last goes in and comes out.
            Receives a gradient if it is floating and requires one.
        weight1: [M, C, 1, 1], as that of an `nn.Conv2d`.
        bias1: [M] or None.
        weight2: [O, M, 1, 1].
        bias2: [O] or None.
        negative_slope: of both activations, at least 0.
        residual: add x before the second activation; then O = C.
        mean: [C], subtracted from every pixel; constant.
        scale: multiplies what is left.

    Returns:
        [N, O, H, W] in the dtype of the weights.

    dtypes: weights and biases are all float32, bfloat16 or float16, autocast casts them as for `F.conv2d`; the image
    has any of these dtypes or uint8. Everything between is float32. float64, and more than 16 channels, hidden units
    or outputs, run the plain PyTorch reference.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; an image without pixels; a negative slope; numbers that are not
            finite; a mean that requires a gradient; a residual where O is not C.
        RuntimeError: on backward through the gradient (second order).

    Cost: 2 M (C + O) FLOP for each pixel, and three to four times that backward. Forward reads the image and writes the
    output; backward reads the image and the output's gradient. Saves `image`, as it came, and the weights.

    Example:
        >>> import torch
        >>> image = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
        >>> weights = torch.randn(10, 3, 1, 1), torch.zeros(10), torch.randn(3, 10, 1, 1), torch.zeros(3)
        >>> mean = torch.tensor([104.0, 117.0, 124.0])
        >>> color_transform(image, *weights, negative_slope=0.5, mean=mean, scale=0.04).shape
        torch.Size([2, 3, 8, 8])
    """
    options: dict[str, Any] = {"negative_slope": negative_slope, "residual": residual, "mean": mean, "scale": scale}
    if isinstance(image, Tensor) and image.dim() == 3:
        return color_transform(image[None], weight1, bias1, weight2, bias2, **options)[0]
    _check(image, weight1, bias1, weight2, bias2, **options)
    dtype = autocast_dtype(weight1)
    if dtype is not None:
        weight1, weight2 = weight1.to(dtype), weight2.to(dtype)
        bias1, bias2 = (None if bias is None else bias.to(dtype) for bias in (bias1, bias2))
    if not _has_kernel(image, weight1, weight2):
        options.pop("mean")
        with _without_autocast(image.device.type):
            return reference.color_transform(image, weight1, bias1, weight2, bias2, mean, **options)
    mean = None if mean is None else mean.detach().float()
    settings = mean, float(scale), float(negative_slope), residual
    tensors = image, weight1, bias1, weight2, bias2
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _ColorTransform.apply(*tensors, settings)
    return _OP(*tensors, *settings)


def _without_autocast(device: str) -> Any:
    """The tensors have been cast; the context would take as long as the op where there is nothing to switch off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _check(
    image: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    negative_slope: float,
    residual: bool,
    mean: Tensor | None,
    scale: float,
) -> None:
    op = "color_transform"
    _check_tensor("image", image, 4, (torch.uint8, *FLOATING), image)
    _check_tensor("weight1", weight1, 4, FLOATING, image)
    _check_tensor("weight2", weight2, 4, FLOATING, image)
    if 0 in image.shape[1:]:
        bad_value(op, "image", f"shape {tuple(image.shape)}", "at least one channel and one pixel")
    channels, hidden, outputs = image.shape[1], weight1.shape[0], weight2.shape[0]
    if hidden == 0 or weight1.shape[1:] != (channels, 1, 1):
        bad_value(op, "weight1", f"shape {tuple(weight1.shape)}", f"(M, {channels}, 1, 1)")
    if outputs == 0 or weight2.shape[1:] != (hidden, 1, 1):
        bad_value(op, "weight2", f"shape {tuple(weight2.shape)}", f"(O, {hidden}, 1, 1)")
    vectors = ("bias1", bias1, hidden), ("bias2", bias2, outputs), ("mean", mean, channels)
    for name, value, length in vectors:
        if value is not None:
            _check_tensor(name, value, 1, FLOATING, image)
            if value.shape[0] != length:
                bad_value(op, name, f"shape {tuple(value.shape)}", f"({length},)")
    for name, value in (("bias1", bias1), ("weight2", weight2), ("bias2", bias2)):
        if value is not None and value.dtype != weight1.dtype and autocast_dtype(weight1) is None:
            bad_type(op, name, value.dtype, f"the dtype of weight1, {weight1.dtype}")
    if mean is not None and mean.requires_grad:
        bad_value(op, "mean", "a tensor that requires a gradient", "a constant")
    for name, number in (("negative_slope", negative_slope), ("scale", scale)):
        check_float(op, name, number)
    if not 0 <= negative_slope < math.inf:
        bad_value(op, "negative_slope", negative_slope, "a finite number, at least 0")
    if not -math.inf < scale < math.inf:
        bad_value(op, "scale", scale, "a finite number")
    check_bool(op, "residual", residual)
    if residual and outputs != channels:
        bad_value(op, "residual", f"True with {outputs} outputs", f"as many as the image's channels, {channels}")


def _check_tensor(name: str, value: object, dims: int, dtypes: tuple[torch.dtype, ...], image: Tensor) -> None:
    op = "color_transform"
    if not isinstance(value, Tensor):
        bad_type(op, name, type(value).__name__, "a torch.Tensor")
    if value.dtype not in dtypes:
        bytes_too = "uint8, " if torch.uint8 in dtypes else ""
        bad_type(op, name, value.dtype, f"a {bytes_too}float32, bfloat16, float16 or float64 tensor")
    if value.layout is not torch.strided:
        bad_type(op, name, value.layout, "a dense (strided) tensor")
    if value.dim() != dims:
        bad_value(op, name, f"shape {tuple(value.shape)}", f"{dims} dimension{'s' if dims > 1 else ''}")
    if value.device != image.device:
        bad_value(op, name, f"device {value.device}", f"the image's device {image.device}")


def _has_kernel(image: Tensor, weight1: Tensor, weight2: Tensor) -> bool:
    """By shape, dtype and device alone."""
    if image.numel() == 0 or torch.float64 in (image.dtype, weight1.dtype):
        return False
    if max(*weight1.shape[:2], weight2.shape[0]) > _MOST:
        return False
    return backends.choose(image, cuda="triton") != "reference"


class _ColorTransform(torch.autograd.Function):
    """Saves the image and the weights."""

    @staticmethod
    def forward(ctx, image, weight1, bias1, weight2, bias2, settings):
        mean, *ctx.numbers = settings
        ctx.save_for_backward(image, weight1, bias1, weight2, bias2, mean)
        return _OP(image, weight1, bias1, weight2, bias2, *settings)

    @staticmethod
    def backward(ctx, grad_output):
        image, weight1, bias1, weight2, bias2, mean = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        found = _OP_BACKWARD(
            grad_output, image, weight1, bias1, weight2, bias2, mean, *ctx.numbers, needed[0], any(needed[1:])
        )
        grads = [grad if need else None for grad, need in zip(found, needed, strict=True)]
        grads[1:] = [None if grad is None else grad.to(weight1.dtype) for grad in grads[1:]]
        return *refuse_second_derivative("color_transform", grads, [image, weight1, weight2]), None


_ARGUMENTS = (
    "Tensor image, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? mean, float scale, "
    "float negative_slope, bool residual"
)
LIBRARY.define(f"color_transform({_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    f"color_transform_backward(Tensor grad_output, {_ARGUMENTS}, bool need_image, bool need_weights) "
    "-> (Tensor grad_image, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight2, Tensor grad_bias2)"
)
_OP = torch.ops.perfvl.color_transform.default
_OP_BACKWARD = torch.ops.perfvl.color_transform_backward.default


def _image_beside(image: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, of other channels and dtype, channels_last where the image is."""
    memory = torch.channels_last if is_channels_last(image) else torch.contiguous_format
    shape = (image.shape[0], channels, *image.shape[2:])
    return torch.empty(shape, dtype=dtype, device=image.device, memory_format=memory)


@torch.library.register_fake("perfvl::color_transform", lib=LIBRARY)
def _fake(image, weight1, bias1, weight2, bias2, mean, scale, negative_slope, residual):
    return _image_beside(image, weight2.shape[0], weight1.dtype)


@torch.library.register_fake("perfvl::color_transform_backward", lib=LIBRARY)
def _fake_backward(
    grad_output, image, weight1, bias1, weight2, bias2, mean, scale, negative_slope, residual, need_image, need_weights
):
    def empty(like: Tensor | None) -> Tensor:
        shape = like.shape if like is not None and need_weights else (0,)
        return torch.empty(shape, dtype=torch.float32, device=image.device)

    nothing = torch.empty(0, dtype=image.dtype, device=image.device)
    grad_image = _image_beside(image, image.shape[1], image.dtype) if need_image else nothing
    return grad_image, empty(weight1), empty(bias1), empty(weight2), empty(bias2)


def _cuda(*arguments):
    from perfvl.kernels import color_transform as kernels

    return kernels.color_transform(*arguments)


def _cuda_backward(*arguments):
    from perfvl.kernels import color_transform as kernels

    return kernels.color_transform_backward(*arguments)


LIBRARY.impl("color_transform", _cuda, "CUDA")
LIBRARY.impl("color_transform_backward", _cuda_backward, "CUDA")
