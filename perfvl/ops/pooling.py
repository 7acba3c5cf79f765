"""Maximum plus average pooling in one pass, and stochastic pooling.

Top to bottom: the public function, the stochastic one, their checks, the choice of backend, autograd, the torch ops
with their fakes, the CUDA implementation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import LIBRARY, bad_type, bad_value, check_bool, check_tensor, refuse_second_derivative
from perfvl.ops.depthwise_conv import dense, is_channels_last
from perfvl.reference import pooling as reference

Size = int | Sequence[int]
MOST_POSITIONS = 255  # of a window: one of them is saved in a byte


def max_avg_pool2d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False
) -> Tensor:
    r"""``y = max(window) + mean(window)``: both poolings of an image, added, in one pass over memory.

    The same as ``F.max_pool2d(x, ...) + F.avg_pool2d(x, ...)`` (Mishkin et al. 2016, arXiv:1606.02228, section 3.3: the
    best pooling of their study), windows, ties and NaN included: padding is no element for the maximum and zeros for
    the mean, whose divisor is the window's size in the padded image; with `ceil_mode` a last window may reach beyond
    the padding, but not begin behind the image; the gradient of the maximum goes to the first largest element.

    Args:
        input: [N, C, H, W] or [C, H, W], any strides; NCHW or channels_last goes in and comes out.
        kernel_size: of the windows, an int or (height, width).
        stride: from window to window, an int or (height, width); None: the kernel size.
        padding: on each side, an int or (height, width); at most half of the kernel size.
        ceil_mode: whether the number of windows is rounded up (as Caffe does), not down.

    Returns:
        [N, C, OH, OW].

    dtypes: float32, bfloat16 and float16 (float64, and windows of more than 255 positions, run the plain PyTorch
    reference); in and out alike, autocast or not, as PyTorch's poolings have it. Sums are float32, rounded once.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an image without pixels; sizes out of range; windows that do not fit.
        RuntimeError: on backward through the gradient (second order).

    Cost: forward reads `input` and writes the output, and a byte for each output element where a gradient is wanted,
    which is all that is saved. Backward reads the output's gradient and these bytes and writes the input's; it is
    deterministic.

    Example:
        >>> import torch
        >>> max_avg_pool2d(torch.randn(2, 96, 30, 30), 3, 2, ceil_mode=True).shape
        torch.Size([2, 96, 15, 15])
    """
    op = "max_avg_pool2d"
    if isinstance(input, Tensor) and input.dim() == 3:
        return max_avg_pool2d(input[None], kernel_size, stride, padding, ceil_mode)[0]
    check_image(op, input)
    g = geometry(op, input, kernel_size, stride, padding, ceil_mode)
    if _runs_reference(input, g):
        return reference.max_avg_pool(input, g.kernel, g.stride, g.padding, ceil_mode=g.ceil_mode)
    if torch.is_grad_enabled() and input.requires_grad:
        return _MaxAvgPool.apply(input, g)
    return _MAX_AVG(input, g.kernel, g.stride, g.padding, g.ceil_mode, False)[0]


def stochastic_pool2d(
    input: Tensor,
    uniform: Tensor | None,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
) -> Tensor:
    r"""``y = x_k`` of the first k in scan order with ``x_1 + ... + x_k >= u (x_1 + ... + x_n)``; without `uniform`
    its expectation, ``sum_i x_i^2 / (sum_i x_i + tiny)``.

    Private: :class:`perfvl.nn.StochasticPool2d` is the public form (Zeiler and Fergus 2013, arXiv:1301.3557).

    Args:
        input: [N, C, H, W], any strides; not negative.
        uniform: [N, C, OH, OW] float32 (float64 beside float64) in [0, 1): u of every window; :func:`draw` makes it.
        kernel_size, stride, padding, ceil_mode: as those of :func:`max_avg_pool2d`.

    Returns:
        [N, C, OH, OW], NaN where the window's sum is.

    Raises:
        TypeError, ValueError: as :func:`max_avg_pool2d`; a `uniform` of another dtype, shape or device.
        RuntimeError: on backward through the gradient (second order).

    Cost: that of :func:`max_avg_pool2d`, and 4 bytes more for each window. The expectation with gradients runs the
    plain PyTorch reference.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 96, 30, 30)
        >>> stochastic_pool2d(x, torch.rand(2, 96, 15, 15), 3, 2, ceil_mode=True).shape
        torch.Size([2, 96, 15, 15])
    """
    op = "stochastic_pool2d"
    check_image(op, input)
    g = geometry(op, input, kernel_size, stride, padding, ceil_mode)
    learns = torch.is_grad_enabled() and input.requires_grad
    if uniform is not None:
        _check_uniform(op, uniform, input, g)
    if _runs_reference(input, g) or (learns and uniform is None):
        return reference.stochastic_pool(input, uniform, g.kernel, g.stride, g.padding, g.size)
    if learns:
        return _StochasticPool.apply(input, uniform, g)
    return _STOCHASTIC(input, uniform, g.kernel, g.stride, g.padding, g.ceil_mode)[0]


def draw(input: Tensor, kernel_size: Size, stride: Size | None, padding: Size, ceil_mode: bool) -> Tensor:
    """A uniform number for each window of :func:`stochastic_pool2d`, by torch's generator of the device."""
    check_image("stochastic_pool2d", input)
    height, width = geometry("stochastic_pool2d", input, kernel_size, stride, padding, ceil_mode).size
    (n, c), dtype = input.shape[:2], torch.float64 if input.dtype == torch.float64 else torch.float32
    if is_channels_last(input):
        return torch.rand((n, height, width, c), dtype=dtype, device=input.device).permute(0, 3, 1, 2)
    return torch.rand((n, c, height, width), dtype=dtype, device=input.device)


class Geometry(NamedTuple):
    """Checked sizes of height and width."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    ceil_mode: bool
    image: list[int]
    size: list[int]
    """Of the output."""


def check_image(op: str, input: Tensor) -> None:
    """[N, C, H, W], the batch alone may be empty."""
    check_tensor(op, "input", input, 4, input)
    if 0 in input.shape[1:]:
        bad_value(op, "input", f"shape {tuple(input.shape)}", "at least one channel and one pixel")


def check_windows(op: str, kernel_size: Size, stride: Size | None, padding: Size, ceil_mode: bool) -> list[list[int]]:
    """Kernel size, stride and padding of height and width."""
    kernel = _pair(op, "kernel_size", kernel_size, 1)
    steps = kernel if stride is None else _pair(op, "stride", stride, 1)
    around = _pair(op, "padding", padding, 0)
    if any(2 * p > k for p, k in zip(around, kernel, strict=True)):
        bad_value(op, "padding", padding, f"at most half of the kernel size {kernel_size}")
    check_bool(op, "ceil_mode", ceil_mode)
    return [kernel, steps, around]


def geometry(
    op: str, input: Tensor, kernel_size: Size, stride: Size | None, padding: Size, ceil_mode: bool
) -> Geometry:
    """The sizes of a pooling of an image, which has to have a window."""
    height, width = input.shape[2:]
    plain = type(ceil_mode) is bool and all(
        type(n) is int for n in (height, width, kernel_size, padding, 1 if stride is None else stride)
    )
    if plain and not torch.compiler.is_compiling():
        return _remembered(op, height, width, kernel_size, stride, padding, ceil_mode)
    return _geometry(op, height, width, kernel_size, stride, padding, ceil_mode)


def _geometry(
    op: str, height: int, width: int, kernel_size: Size, stride: Size | None, padding: Size, ceil_mode: bool
) -> Geometry:
    kernel, steps, around = check_windows(op, kernel_size, stride, padding, ceil_mode)
    size = output_size([height, width], kernel, steps, around, ceil_mode)
    if min(size) < 1:
        bad_value(op, "kernel_size", kernel_size, f"a window that fits an image {(height, width)} with padding")
    return Geometry(kernel, steps, around, ceil_mode, [height, width], size)


# Of square windows: the checks take as long as a small pooling.
_remembered = functools.lru_cache(maxsize=1024, typed=True)(_geometry)


def _pair(op: str, name: str, value: Size, least: int) -> list[int]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
        bad_type(op, name, repr(value), "an int, or two of them: (height, width)")
    if min(pair) < least or max(pair) >= 2**31:
        bad_value(op, name, value, f"at least {least}, below 2^31")
    return pair


def output_size(
    size: Sequence[int], kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> list[int]:
    """How many windows there are: with `ceil_mode` a last one that begins inside the image, wherever it ends."""
    found = []
    for n, k, s, p in zip(size, kernel, stride, padding, strict=True):
        count = (n + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
        found.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
    return found


def _check_uniform(op: str, uniform: Tensor, input: Tensor, g: Geometry) -> None:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if not isinstance(uniform, Tensor):
        bad_type(op, "uniform", type(uniform).__name__, "a torch.Tensor or None")
    if uniform.dtype != dtype:
        bad_type(op, "uniform", uniform.dtype, f"{dtype}")
    if uniform.shape != (expected := (*input.shape[:2], *g.size)):
        bad_value(op, "uniform", f"shape {tuple(uniform.shape)}", f"{tuple(expected)}")
    if uniform.device != input.device:
        bad_value(op, "uniform", f"device {uniform.device}", f"the input's device {input.device}")
    if uniform.requires_grad:
        bad_value(op, "uniform", "a tensor that requires a gradient", "numbers through which none flows")


def _runs_reference(input: Tensor, g: Geometry) -> bool:
    if input.numel() == 0 or input.dtype == torch.float64 or math.prod(g.kernel) > MOST_POSITIONS:
        return True
    return backends.choose(input, cuda="triton") == "reference"


class _MaxAvgPool(torch.autograd.Function):
    """Saves the position of each window's maximum, a byte."""

    @staticmethod
    def forward(ctx, input, g):
        output, argmax = _MAX_AVG(input, g.kernel, g.stride, g.padding, g.ceil_mode, True)
        ctx.save_for_backward(argmax)
        ctx.geometry = g
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (argmax,) = ctx.saved_tensors
        g = ctx.geometry
        grad = _MAX_AVG_BACKWARD(grad_output, argmax, g.image, g.kernel, g.stride, g.padding)
        return _differentiable_once("max_avg_pool2d", grad, grad_output), None


class _StochasticPool(torch.autograd.Function):
    """Saves the position of each window's element, a byte."""

    @staticmethod
    def forward(ctx, input, uniform, g):
        output, picked = _STOCHASTIC(input, uniform, g.kernel, g.stride, g.padding, g.ceil_mode)
        ctx.save_for_backward(picked)
        ctx.geometry = g
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (picked,) = ctx.saved_tensors
        g = ctx.geometry
        grad = _STOCHASTIC_BACKWARD(grad_output, picked, g.image, g.kernel, g.stride, g.padding)
        return _differentiable_once("stochastic_pool2d", grad, grad_output), None, None


def _differentiable_once(op: str, grad: Tensor, grad_output: Tensor) -> Tensor | None:
    """The input is not saved, and the gradient of a sum requires none: a leaf of its own stands for the input."""
    if not torch.is_grad_enabled():
        return grad
    return refuse_second_derivative(op, [grad], [grad_output, torch.empty(0, requires_grad=True)])[0]


LIBRARY.define(
    "max_avg_pool(Tensor input, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool with_argmax) "
    "-> (Tensor output, Tensor argmax)"
)
LIBRARY.define(
    "max_avg_pool_backward(Tensor grad_output, Tensor argmax, int[] size, int[] kernel, int[] stride, int[] padding) "
    "-> Tensor"
)
LIBRARY.define(
    "stochastic_pool(Tensor input, Tensor? uniform, int[] kernel, int[] stride, int[] padding, bool ceil_mode) "
    "-> (Tensor output, Tensor picked)"
)
LIBRARY.define(
    "stochastic_pool_backward(Tensor grad_output, Tensor picked, int[] size, int[] kernel, int[] stride, "
    "int[] padding) -> Tensor"
)
_MAX_AVG = torch.ops.perfvl.max_avg_pool.default
_MAX_AVG_BACKWARD = torch.ops.perfvl.max_avg_pool_backward.default
_STOCHASTIC = torch.ops.perfvl.stochastic_pool.default
_STOCHASTIC_BACKWARD = torch.ops.perfvl.stochastic_pool_backward.default


def empty_outputs(
    input: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool, with_positions: bool
) -> tuple[Tensor, Tensor]:
    """Output and positions, uninitialised; no positions where they are not wanted."""
    size = output_size(input.shape[2:], kernel, stride, padding, ceil_mode)
    output = dense(input, (*input.shape[:2], *size))
    positions = torch.empty_like(output, dtype=torch.uint8) if with_positions else output.new_empty(0).byte()
    return output, positions


def empty_gradient(grad_output: Tensor, positions: Tensor, size: list[int]) -> Tensor:
    """The input's gradient, uninitialised, in the layout that the positions, and so the input, have."""
    # Not by the stride of the channels alone, which is 1 in either layout where there is one window.
    channels = positions.shape[1]
    last = channels > 1 and positions.stride(1) == 1 and positions.stride(3) == channels
    memory = torch.channels_last if last else torch.contiguous_format
    shape = (*positions.shape[:2], *size)
    return torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory)


@torch.library.register_fake("perfvl::max_avg_pool", lib=LIBRARY)
def _fake_max_avg(input, kernel, stride, padding, ceil_mode, with_argmax):
    return empty_outputs(input, kernel, stride, padding, ceil_mode, with_argmax)


@torch.library.register_fake("perfvl::stochastic_pool", lib=LIBRARY)
def _fake_stochastic(input, uniform, kernel, stride, padding, ceil_mode):
    return empty_outputs(input, kernel, stride, padding, ceil_mode, uniform is not None)


@torch.library.register_fake("perfvl::max_avg_pool_backward", lib=LIBRARY)
@torch.library.register_fake("perfvl::stochastic_pool_backward", lib=LIBRARY)
def _fake_backward(grad_output, positions, size, kernel, stride, padding):
    return empty_gradient(grad_output, positions, size)


def _cuda_max_avg(input, kernel, stride, padding, ceil_mode, with_argmax):
    from perfvl.kernels import pooling as kernels

    output, argmax = empty_outputs(input, kernel, stride, padding, ceil_mode, with_argmax)
    kernels.forward(input, None, output, argmax if with_argmax else None, kernel, stride, padding, stochastic=False)
    return output, argmax


def _cuda_stochastic(input, uniform, kernel, stride, padding, ceil_mode):
    from perfvl.kernels import pooling as kernels

    output, picked = empty_outputs(input, kernel, stride, padding, ceil_mode, uniform is not None)
    positions = None if uniform is None else picked
    kernels.forward(input, uniform, output, positions, kernel, stride, padding, stochastic=True)
    return output, picked


def _cuda_backward(grad_output, positions, size, kernel, stride, padding, *, average):
    from perfvl.kernels import pooling as kernels

    grad_input = empty_gradient(grad_output, positions, size)
    kernels.backward(grad_output, positions, grad_input, kernel, stride, padding, average=average)
    return grad_input


LIBRARY.impl("max_avg_pool", _cuda_max_avg, "CUDA")
LIBRARY.impl("stochastic_pool", _cuda_stochastic, "CUDA")
LIBRARY.impl("max_avg_pool_backward", lambda *a: _cuda_backward(*a, average=True), "CUDA")
LIBRARY.impl("stochastic_pool_backward", lambda *a: _cuda_backward(*a, average=False), "CUDA")
