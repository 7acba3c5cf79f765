"""The Triton kernels of `pooling`, interpreted, against float64 and plain PyTorch. `test_triton_pooling.py` runs this
file in a process of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_support import interpreter

interpreter.install()

from perfvl.kernels import pooling  # noqa: E402  (the interpreter has to be patched first)

from perfvl.ops.pooling import empty_gradient, empty_outputs, output_size  # noqa: E402
from perfvl.reference import pooling as reference  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 0.0, BF16: 2.0**-8, F16: 2.0**-11}
U = 2.0**-24
# name -> shape, kernel, stride, padding, ceil_mode
CASES = {
    "CaffeNet": ((1, 3, 30, 30), [3, 3], [2, 2], [0, 0], True),
    "CaffeNet's last": ((3, 20, 7, 7), [3, 3], [2, 2], [0, 0], True),
    "padded": ((2, 17, 12, 13), [3, 3], [2, 2], [1, 1], False),
    "padded, rounded up": ((2, 5, 11, 14), [3, 3], [2, 2], [1, 1], True),
    "one apart": ((1, 18, 9, 7), [3, 3], [1, 1], [1, 1], False),
    "not square": ((2, 6, 9, 17), [2, 5], [3, 1], [1, 2], False),
    "gaps": ((2, 6, 13, 14), [2, 2], [5, 3], [1, 0], True),
    "one pixel": ((2, 40, 1, 1), [1, 1], [1, 1], [0, 0], False),
    "the whole image": ((2, 40, 7, 7), [7, 7], [7, 7], [0, 0], False),
    "larger than the image": ((2, 7, 2, 2), [3, 3], [2, 2], [0, 0], True),
    "wide": ((1, 2, 8, 300), [3, 2], [2, 2], [0, 0], False),
    "large": ((1, 3, 9, 7), [7, 36], [2, 3], [3, 18], False),
    "many channels": ((1, 300, 4, 5), [2, 2], [1, 1], [0, 0], False),
}
LAYOUTS = ("NCHW", "channels_last", "sliced")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# Every case in one layout and dtype, two of them in all.
RUNS = [
    (case, layout, dtype)
    for i, case in enumerate(CASES)
    for j, layout in enumerate(LAYOUTS)
    for k, dtype in enumerate(ROUNDING)
    if case in ("padded, rounded up", "CaffeNet's last") or (i % 3 == j and (i + j) % 3 == k)
]
runs = pytest.mark.parametrize(("case", "layout", "dtype"), RUNS, ids=str)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "sliced":
        return torch.cat([x, x], 3)[:, :, :, x.shape[3] :]
    return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def pool(x: Tensor, windows, *, uniform: Tensor | None = None, wanted: bool = True, stochastic: bool = False):
    output, positions = empty_outputs(x, *windows, wanted)
    kernel, stride, padding, _ = windows
    given = positions if wanted else None
    pooling.forward(x, uniform, output.fill_(torch.nan), given, kernel, stride, padding, stochastic=stochastic)
    return output, positions


def gradient(upstream: Tensor, positions: Tensor, x: Tensor, windows, *, average: bool) -> Tensor:
    kernel, stride, padding, _ = windows
    grad = empty_gradient(upstream, positions, list(x.shape[2:])).fill_(torch.nan)
    pooling.backward(upstream, positions, grad, kernel, stride, padding, average=average)
    return grad


def close(got: Tensor, truth: Tensor, dtype: torch.dtype, slack: float = 4 * U) -> bool:
    return bool(((got.double() - truth).abs() <= (ROUNDING[dtype] + slack) * truth.abs() + slack).all())


@runs
def test_maximum_plus_average(case, layout, dtype):
    shape, *windows = CASES[case]
    x = laid_out(torch.randn(shape).to(dtype), layout)
    leaf = x.double().requires_grad_()
    truth = reference.max_avg_pool(leaf, *windows[:3], ceil_mode=windows[3])
    output, positions = pool(x, windows)
    assert close(output, truth.detach(), dtype)
    assert torch.equal(pool(x, windows, wanted=False)[0], output)
    upstream = torch.randn(truth.shape).to(dtype)
    (expected,) = torch.autograd.grad(truth, leaf, upstream.double())
    other = LAYOUTS[(LAYOUTS.index(layout) + len(case)) % 3]  # upstream gradients have a layout of their own
    grad = gradient(laid_out(upstream, other), positions, x, windows, average=True)
    assert close(grad, expected, dtype, slack=16 * U)
    assert grad.is_contiguous(memory_format=torch.channels_last) or layout != "channels_last"


@runs
def test_stochastic_pooling(case, layout, dtype):
    shape, *windows = CASES[case]
    kernel, stride, padding, _ = windows
    size = output_size(shape[2:], *windows)
    # Sixteenths: sums are exact, whatever their order.
    x = laid_out((torch.randint(0, 64, shape) / 16).to(dtype), layout)
    uniform = laid_out(torch.rand(*shape[:2], *size), layout)
    leaf = x.float().requires_grad_()
    truth = reference.stochastic_pool(leaf, uniform, kernel, stride, padding, size)
    output, picked = pool(x, windows, uniform=uniform, stochastic=True)
    assert torch.equal(output.float(), truth)
    upstream = torch.randint(-4, 5, truth.shape).to(dtype)
    (expected,) = torch.autograd.grad(truth, leaf, upstream.float())
    assert torch.equal(gradient(upstream, picked, x, windows, average=False), expected.to(dtype))
    expectation = reference.stochastic_pool(x.double(), None, kernel, stride, padding, size)
    assert close(pool(x, windows, wanted=False, stochastic=True)[0], expectation, dtype, slack=64 * U)


@layouts
def test_ties_and_what_is_no_number(layout):
    """The first of equal elements, the last NaN: as PyTorch has it."""
    windows = ([3, 3], [2, 2], [1, 1], True)
    x = torch.randint(0, 3, (2, 6, 9, 10)).float()
    x[0, 1, 2, 2] = x[0, 1, 3, 3] = x[1, 2, 0, 0] = torch.nan
    x[1, 3] = -torch.inf
    x[1, 4, 4, 4], x[1, 4, 4, 5] = torch.inf, -torch.inf
    x = laid_out(x, layout)
    leaf = x.clone().requires_grad_()
    truth = F.max_pool2d(leaf, *windows[:3], ceil_mode=True)
    upstream = torch.randn(truth.shape)
    output, positions = pool(x, windows)
    expected = reference.max_avg_pool(x, *windows[:3], ceil_mode=True)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    (grad,) = torch.autograd.grad(truth, leaf, upstream)
    torch.testing.assert_close(gradient(upstream, positions, x, windows, average=False), grad, rtol=1e-6, atol=1e-6)


def test_an_expanded_gradient():
    windows = ([3, 3], [2, 2], [0, 0], True)
    x = torch.randn(2, 5, 9, 9)
    _, positions = pool(x, windows)
    one = torch.ones(()).expand(positions.shape)
    expanded, dense = (gradient(g, positions, x, windows, average=True) for g in (one, one.contiguous()))
    assert torch.equal(expanded, dense)


def test_nothing_to_do():
    windows = ([3, 3], [2, 2], [0, 0], True)
    x = torch.randn(0, 5, 9, 9)
    output, positions = pool(x, windows)
    assert output.shape == (0, 5, 4, 4)
    assert gradient(output, positions, x, windows, average=True).shape == x.shape
