"""Nearest x2 upsampling, then a 3x3 convolution, without the tensor between them.

Top to bottom: the public function, the form for batch norm behind it, their checks, the choice of backend, autograd,
the torch ops with their fakes, the CUDA implementation.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl import backends
from perfvl.ops import upsample_conv_transposed as transposed
from perfvl.ops._library import LIBRARY, autocast_dtype, bad_value, check_name, check_tensor, refuse_second_derivative
from perfvl.ops.depthwise_conv import dense
from perfvl.ops.separable_conv import NO_AFFINE, Affine
from perfvl.reference import upsample_conv as reference
from perfvl.reference.activation import ACTIVATIONS, CODES


def upsample_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    r"""``y = act(conv3x3(up2(x)) + bias)``: nearest-neighbour upsampling by 2 and a convolution, one pass over memory.

    The same as ``F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)``, the block that doubles the size
    of images in generators (StackGAN: Zhang et al. 2017, arXiv:1612.03242, section 3). Neighbouring pixels of the
    upsampled image are equal, so that their taps are summed first: row 2 i of the output is
    ``x[i-1] w0 + x[i] (w1 + w2)``, row 2 i + 1 is ``x[i] (w0 + w1) + x[i+1] w2``, and columns likewise. The upsampled
    image is neither written nor saved.

    Args:
        input: [N, C, H, W] or [C, H, W], any strides; NCHW or channels_last goes in and comes out.
        weight: [O, C, 3, 3], as that of the `nn.Conv2d` it replaces.
        bias: [O].
        activation: "none", "relu", "relu6", "silu", "hardswish" or "leaky_relu" (slope 0.01).

    Returns:
        [N, O, 2 H, 2 W].

    dtypes: float32, bfloat16 and float16 (float64 runs the plain PyTorch reference); all tensors alike, as `F.conv2d`
    wants them; autocast casts them as it does for `F.conv2d`. Sums are float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; an image without pixels; an unknown activation.
        RuntimeError: on backward through the gradient (second order).

    Cost: 18 N H W C O FLOP forward on the CPU (nine products for each pixel of the input), 32 on CUDA, where the
    convolution of the upsampled image takes 72; twice that backward. Reads `input`, writes the output; saves `input`
    and `weight`. The nine products add and subtract neighbouring pixels first: float32 results differ from the plain
    definition's by a few ulps more, and an output that sees an infinite pixel may be NaN. In bfloat16 on CPUs with AMX
    the library's convolutions run, transposed or of the upsampled image by the number of pixels.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
        >>> upsample_conv2d(x, torch.randn(32, 64, 3, 3)).shape
        torch.Size([2, 32, 16, 16])
    """
    op = "upsample_conv2d"
    if isinstance(input, Tensor) and input.dim() == 3:
        return upsample_conv2d(input[None], weight, bias, activation=activation)[0]
    check(op, input, weight, bias, activation)
    return run(input, weight, bias, activation=activation)


def check(op: str, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """Shapes, dtypes, devices and the name of the activation."""
    check_tensor(op, "input", input, 4, input)
    check_tensor(op, "weight", weight, 4, input)
    if 0 in input.shape[1:]:
        bad_value(op, "input", f"shape {tuple(input.shape)}", "at least one channel and one pixel")
    if weight.shape[0] == 0 or weight.shape[1:] != (input.shape[1], 3, 3):
        bad_value(op, "weight", f"shape {tuple(weight.shape)}", f"(O, {input.shape[1]}, 3, 3)")
    if bias is not None:
        check_tensor(op, "bias", bias, 1, input)
        if bias.shape[0] != weight.shape[0]:
            bad_value(op, "bias", f"shape {tuple(bias.shape)}", f"({weight.shape[0]},)")
    check_name(op, "activation", activation, ACTIVATIONS)


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    post: Affine = NO_AFFINE,
    activation: str = "none",
) -> Tensor:
    """The convolution of checked arguments. Where nothing learns, a batch norm `post` [O] (its shift has the bias)
    joins it."""
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if post is NO_AFFINE:
        post = Affine(None, bias)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, *post))
    path = _path(input)
    if path == "reference" or (learns and post.scale is not None):
        cast = torch.is_autocast_enabled(input.device.type)  # the tensors are, and the context takes its time
        with torch.autocast(input.device.type, enabled=False) if cast else contextlib.nullcontext():
            return reference.upsample_conv(input, weight, *post, activation=activation)
    if learns:
        return activate_(_UpsampleConv.apply(input, weight, bias, path), activation)
    scale, shift = (None if t is None else t.float().contiguous() for t in post)
    return _FORWARD[path](input, weight, scale, shift, CODES[activation])


_IN_PLACE: dict[str, Any] = {"relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu}


def activate_(y: Tensor, activation: str) -> Tensor:
    """The activation of a tensor nobody else holds, in its memory where backward is satisfied with the result."""
    if activation in _IN_PLACE:
        return _IN_PLACE[activation](y, inplace=True)
    return ACTIVATIONS[activation](y)


Path = Literal["kernel", "transposed", "reference"]
# oneDNN's convolutions multiply bfloat16 numbers, this op's kernels float32 ones.
_LEVELS = () if backends.CPU_MISSING else torch.ops.perfvl._isa_levels()
_AMX, _BFLOAT16_PRODUCTS = "amx" in _LEVELS, "avx512_bf16" in _LEVELS


def _path(input: Tensor) -> Path:
    """The kernel, the library's transposed convolution, or plain PyTorch: by shape, dtype and device alone."""
    if input.numel() == 0 or input.dtype == torch.float64 or backends.choose(input, cuda="native") == "reference":
        return "reference"
    return _cpu_path(input) if input.is_cpu else "kernel"


def _cpu_path(input: Tensor) -> Path:
    if input.dtype != torch.bfloat16 or not _BFLOAT16_PRODUCTS:
        return "kernel"
    # The 16 numbers made of every 9 weights have to be used by enough pixels.
    if input.shape[0] * input.shape[2] * input.shape[3] >= 2048:
        return "transposed"
    return "reference" if _AMX else "kernel"


class _UpsampleConv(torch.autograd.Function):
    """Saves the input and the weights."""

    @staticmethod
    def forward(ctx, input, weight, bias, path):
        ctx.save_for_backward(input, weight)
        ctx.path = path
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _FORWARD[path](input, weight, None, None if bias is None else bias.float().contiguous(), 0)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        found = _BACKWARD[ctx.path](grad_output, input, weight, *needed)
        grads = [grad if need else None for grad, need in zip(found, needed, strict=True)]
        if grads[2] is not None:
            grads[2] = grads[2].to(ctx.bias_dtype)
        return *refuse_second_derivative("upsample_conv2d", grads, [input, weight]), None


LIBRARY.define("upsample_conv(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, int activation) -> Tensor")
LIBRARY.define(
    "upsample_conv_backward(Tensor grad_output, Tensor input, Tensor weight, bool need_input, bool need_weight, "
    "bool need_bias) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
_OP = torch.ops.perfvl.upsample_conv.default
_OP_BACKWARD = torch.ops.perfvl.upsample_conv_backward.default
_FORWARD: dict[str, Any] = {"kernel": _OP, "transposed": transposed.forward}
_BACKWARD: dict[str, Any] = {"kernel": _OP_BACKWARD, "transposed": transposed.backward}


@torch.library.register_fake("perfvl::upsample_conv", lib=LIBRARY)
def _fake(input, weight, scale, shift, activation):
    n, _, height, width = input.shape
    return dense(input, (n, weight.shape[0], 2 * height, 2 * width))


@torch.library.register_fake("perfvl::upsample_conv_backward", lib=LIBRARY)
def _fake_backward(grad_output, input, weight, need_input, need_weight, need_bias):
    def empty(needed: bool, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=input.device)

    return (
        dense(input, input.shape) if need_input else empty(False, (0,), input.dtype),
        empty(need_weight, weight.shape, input.dtype),
        empty(need_bias, (weight.shape[0],), torch.float32),
    )


LIBRARY.impl("upsample_conv", transposed.forward, "CUDA")
LIBRARY.impl("upsample_conv_backward", transposed.backward, "CUDA")
