"""Maximum plus average pooling and stochastic pooling as layers."""

from __future__ import annotations

from torch import Tensor, nn

from perfvl.ops.pooling import Size, check_windows, draw, max_avg_pool2d, stochastic_pool2d


class _Pool2d(nn.Module):
    """What both have: windows, checked once. No parameters, no buffers."""

    def __init__(
        self, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False
    ) -> None:
        super().__init__()
        check_windows(type(self).__name__, kernel_size, stride, padding, ceil_mode)
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, ceil_mode={self.ceil_mode}"
        )


class MaxAvgPool2d(_Pool2d):
    """``y = max(window) + mean(window)``: :func:`perfvl.functional.max_avg_pool2d` as a layer.

    Stands for the sum of `nn.MaxPool2d` and `nn.AvgPool2d`, whose arguments it takes.

    Args:
        kernel_size: of the windows, an int or (height, width).
        stride: from window to window; None: the kernel size.
        padding: on each side, at most half of the kernel size.
        ceil_mode: whether the number of windows is rounded up, as Caffe does.

    Raises:
        TypeError, ValueError: sizes of the wrong type or out of range. Dtypes, layouts, cost and errors of a call are
            those of the function.

    Example:
        >>> import torch
        >>> MaxAvgPool2d(3, 2, ceil_mode=True)(torch.randn(2, 96, 30, 30)).shape
        torch.Size([2, 96, 15, 15])
    """

    def forward(self, input: Tensor) -> Tensor:
        return max_avg_pool2d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode)


class StochasticPool2d(_Pool2d):
    r"""Picks an element x_i of each window with probability ``x_i / sum_j x_j`` while training; its expectation,
    ``sum_i x_i^2 / sum_i x_i``, in evaluation.

    Zeiler and Fergus 2013 (arXiv:1301.3557); as Caffe has it, the element picked is the first in scan order at which
    the sum so far reaches u times the whole, and the smallest normal float32 is added to the divisor. For inputs that
    are not negative, such as those behind a ReLU. u comes from torch's generator of the device: the same seed gives the
    same elements (in one layout), and each replay of a CUDA graph draws anew.

    Args:
        kernel_size, stride, padding, ceil_mode: as those of :class:`MaxAvgPool2d`; padding is never picked.

    Input [N, C, H, W] or [C, H, W], float32, bfloat16 or float16 (float64 runs plain PyTorch), any strides.

    Raises:
        TypeError, ValueError: sizes or tensors of the wrong type or out of range.
        RuntimeError: on backward through the gradient (second order).

    Cost: reads the input and a uniform number for each window, writes the output and a byte for each, which is all that
    is saved.

    Example:
        >>> import torch
        >>> pool = StochasticPool2d(3, 2, ceil_mode=True)
        >>> x = torch.rand(2, 96, 30, 30)
        >>> bool(torch.isin(pool(x), x).all()), bool(torch.isin(pool.eval()(x), x).all())
        (True, False)
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None])[0]
        windows = (self.kernel_size, self.stride, self.padding, self.ceil_mode)
        return stochastic_pool2d(input, draw(input, *windows) if self.training else None, *windows)
