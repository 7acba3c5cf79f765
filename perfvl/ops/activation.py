"""Activations of several linear pieces: maxout, and the adaptive piecewise linear unit (APL).

Top to bottom: the two functions, their checks, the choice of backend, autograd, the torch ops with their fakes, the
CUDA implementation. Kernels see images [N, C, H, W]; other inputs are given as such, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import LIBRARY, bad_type, bad_value, check_floating, refuse_second_derivative
from perfvl.ops.depthwise_conv import dense, is_channels_last
from perfvl.reference import activation as reference

_MOST_PIECES = 256  # what the kernels' byte can name
_MOST_SEGMENTS = 6  # of the kernels
_FEW = 2**17  # elements in 16 bits of which PyTorch finds the larger ones as fast


def maxout(input: Tensor, pieces: int = 2) -> Tensor:
    r"""The largest of each channel's pieces, :math:`y_c = \max_p x_{p C + c}`.

    Stands behind a layer of `pieces` times the width (Goodfellow et al. 2013, arXiv:1302.4389): channel c's pieces are
    its outputs c, C + c, 2 C + c, ... Of equal pieces the last wins and alone gets the gradient, as in Caffe, where
    `torch.maximum` halves it. NaN wins.

    Args:
        input: [N, pieces * C] or [N, pieces * C, ...], float32, bfloat16, float16 or float64, any strides; NCHW or
            channels_last goes in and comes out.
        pieces: how many, at least 1.

    Returns:
        [N, C, ...] in the input's dtype: elements of the input, not rounded. float64 and more than 256 pieces run the
        plain PyTorch reference.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: fewer than 2 dimensions; channels that are not a multiple of `pieces`.
        RuntimeError: on backward through the gradient (second order).

    Cost: reads the input, writes the output and, for backward, one byte an output, which is all that is saved. Backward
    reads these bytes and the output's gradient. Where nothing learns, two pieces on the CPU are `torch.maximum`.

    Example:
        >>> import torch
        >>> maxout(torch.tensor([[1.0, 5.0, 2.0, -3.0]]))
        tensor([[2., 5.]])
    """
    _check_input("maxout", input)
    if isinstance(pieces, bool) or not isinstance(pieces, int):
        bad_type("maxout", "pieces", type(pieces).__name__, "an int")
    if pieces < 1 or input.shape[1] % pieces:
        bad_value("maxout", "pieces", pieces, f"a divisor of the input's {input.shape[1]} channels")
    if pieces > _MOST_PIECES or not _has_kernel(input):
        return reference.maxout(input, pieces)
    if torch.is_grad_enabled() and input.requires_grad:
        return as_given(_Maxout.apply(as_images(input), pieces), _shape_of_maxout(input, pieces))
    # Nothing to keep: PyTorch moves as many bytes, and is called sooner. In 16 bits it takes longer over them.
    if pieces == 2 and input.is_cpu and (input.dtype == torch.float32 or input.numel() < _FEW):
        return torch.maximum(*input.chunk(2, 1))
    return as_given(_MAXOUT(as_images(input), pieces, False)[0], _shape_of_maxout(input, pieces))


def apl(input: Tensor, slope: Tensor, hinge: Tensor) -> Tensor:
    r"""The adaptive piecewise linear unit, :math:`y = \max(0, x) + \sum_s a_s \max(0, b_s - x)`.

    A ReLU with S more hinges, whose places b and slopes a are learned (Agostinelli et al. 2015, arXiv:1412.6830,
    equation 1).

    Args:
        input: [N, C] or [N, C, ...], float32, bfloat16, float16 or float64, any strides; NCHW or channels_last goes in
            and comes out.
        slope: a, [S, C], or [S, C, ...] with the input's sizes: parameters of channels, or of every position.
        hinge: b, in the shape of `slope`. Both of any floating dtype.

    Returns:
        The input's shape and dtype. Computed in float32; float64 and more than 6 segments run the plain PyTorch
        reference.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit.
        RuntimeError: on backward through the gradient (second order).

    Cost: reads the input and writes the output; backward reads the input and the output's gradient once for all
    gradients. Saves the input and the parameters. Sums for the parameters' gradients are float32, in a fixed order.

    Example:
        >>> import torch
        >>> x = torch.tensor([[-1.0, 0.0, 1.0]])
        >>> apl(x, torch.full((1, 3), 0.5), torch.zeros(1, 3))
        tensor([[0.5000, 0.0000, 1.0000]])
    """
    _check_input("apl", input)
    _check_parameters(input, slope, hinge)
    if torch.float64 in (slope.dtype, hinge.dtype) or len(slope) > _MOST_SEGMENTS or not _has_kernel(input):
        return reference.apl(input, slope, hinge)
    images = as_images(input), as_images(slope.float()), as_images(hinge.float())
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in images)
    return as_given(_Apl.apply(*images) if learns else _APL(*images), input.shape)


def _check_input(op: str, input: Tensor) -> None:
    check_floating(op, "input", input)
    if input.dim() < 2:
        bad_value(op, "input", f"shape {tuple(input.shape)}", "at least 2 dimensions, the second of channels")


def _check_parameters(input: Tensor, slope: Tensor, hinge: Tensor) -> None:
    check_floating("apl", "slope", slope, input)
    check_floating("apl", "hinge", hinge, input)
    sample = tuple(input.shape[1:])
    if slope.dim() < 2 or len(slope) == 0 or tuple(slope.shape[1:]) not in (sample[:1], sample):
        of_positions = f" or (S, {', '.join(map(str, sample))})" if len(sample) > 1 else ""
        bad_value("apl", "slope", f"shape {tuple(slope.shape)}", f"(S, {sample[0]}){of_positions} with S of at least 1")
    if hinge.shape != slope.shape:
        bad_value("apl", "hinge", f"shape {tuple(hinge.shape)}", f"the slope's {tuple(slope.shape)}")


def _has_kernel(input: Tensor) -> bool:
    """By shape, dtype and device alone."""
    if input.dtype == torch.float64 or input.numel() == 0:
        return False
    return backends.choose(input, cuda="triton") != "reference"


def as_images(x: Tensor) -> Tensor:
    """[N, C, ...] as [N, C, H, W], a view where strides allow."""
    dims = x.dim()
    if dims == 4:
        return x
    if dims > 4:
        return x.flatten(2, -2)
    return x.view(*x.shape, 1, 1) if dims == 2 else x.unsqueeze(2)


def as_given(image: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, C, H, W] in the shape of what it was made of."""
    return image if len(shape) == 4 else image.reshape(shape)


def _shape_of_maxout(input: Tensor, pieces: int) -> tuple[int, ...]:
    return (input.shape[0], input.shape[1] // pieces, *input.shape[2:])


class _Maxout(torch.autograd.Function):
    """Saves which piece won: a byte for each output."""

    @staticmethod
    def forward(ctx, input, pieces):
        output, winner = _MAXOUT(input, pieces, True)
        ctx.save_for_backward(winner)
        ctx.pieces = pieces
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (winner,) = ctx.saved_tensors
        grad = _MAXOUT_BACKWARD(grad_output, winner, ctx.pieces)
        # The input was not kept: any tensor that requires a gradient makes the gradient's own an error.
        anchor = [grad.new_empty(0).requires_grad_()] if torch.is_grad_enabled() else []
        return *refuse_second_derivative("maxout", [grad], anchor), None


class _Apl(torch.autograd.Function):
    """Saves the input and the parameters."""

    @staticmethod
    def forward(ctx, input, slope, hinge):
        ctx.save_for_backward(input, slope, hinge)
        return _APL(input, slope, hinge)

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        return tuple(refuse_second_derivative("apl", [*_APL_BACKWARD(grad_output, *saved)], [*saved]))


LIBRARY.define("maxout(Tensor input, int pieces, bool with_winner) -> (Tensor output, Tensor winner)")
LIBRARY.define("maxout_backward(Tensor grad_output, Tensor winner, int pieces) -> Tensor")
LIBRARY.define("apl(Tensor input, Tensor slope, Tensor hinge) -> Tensor")
LIBRARY.define(
    "apl_backward(Tensor grad_output, Tensor input, Tensor slope, Tensor hinge) "
    "-> (Tensor grad_input, Tensor grad_slope, Tensor grad_hinge)"
)
_MAXOUT = torch.ops.perfvl.maxout.default
_MAXOUT_BACKWARD = torch.ops.perfvl.maxout_backward.default
_APL = torch.ops.perfvl.apl.default
_APL_BACKWARD = torch.ops.perfvl.apl_backward.default


@torch.library.register_fake("perfvl::maxout", lib=LIBRARY)
def _fake_maxout(input, pieces, with_winner):
    n, channels, height, width = input.shape
    output = dense(input, (n, channels // pieces, height, width))
    winner = torch.empty_like(output, dtype=torch.uint8) if with_winner else output.new_empty(0, dtype=torch.uint8)
    return output, winner


@torch.library.register_fake("perfvl::maxout_backward", lib=LIBRARY)
def _fake_maxout_backward(grad_output, winner, pieces):
    n, channels, height, width = winner.shape
    return dense(winner, (n, pieces * channels, height, width)).to(grad_output.dtype)


@torch.library.register_fake("perfvl::apl", lib=LIBRARY)
def _fake_apl(input, slope, hinge):
    return dense(input, input.shape)


@torch.library.register_fake("perfvl::apl_backward", lib=LIBRARY)
def _fake_apl_backward(grad_output, input, slope, hinge):
    memory = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    grads = (torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory) for t in (slope, hinge))
    return (dense(input, input.shape), *grads)


def _cuda(name: str) -> Callable[..., Any]:
    def run(*arguments):
        from perfvl.kernels import activation as kernels

        return getattr(kernels, name)(*arguments)

    return run


for _name in ("maxout", "maxout_backward", "apl", "apl_backward"):
    LIBRARY.impl(_name, _cuda(_name), "CUDA")
