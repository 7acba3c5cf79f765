"""The Triton kernels of `maxout` and `apl`, interpreted, against the definitions in float64.

`test_triton_activation.py` runs this file in a process of its own. The GPU has one multiprocessor, so that sums come in
few parts: more are asked for where they matter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from triton_support import interpreter

interpreter.install()

from perfvl.kernels import _tiles, activation  # noqa: E402  (the interpreter has to be patched first)

from perfvl.reference import activation as reference  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second channel": lambda x: x.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2],
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "one image for all": lambda x: x[:1].expand(x.shape),
}
SIZES = [(1, 1, 1, 1), (3, 5, 1, 1), (2, 17, 1, 1), (2, 3, 7, 7), (1, 2, 33, 35), (5, 20, 2, 3)]
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch):
    monkeypatch.setattr(_tiles, "gpu_limits", lambda device: _tiles.Gpu(90, 1, 232_448))


def strides(shape: tuple[int, ...], like: Tensor) -> tuple[int, ...]:
    last = like.shape[1] > 1 and like.stride(1) == 1
    return torch.empty(shape, memory_format=torch.channels_last if last else torch.contiguous_format).stride()


@every_size
@every_layout
@every_dtype
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_the_largest_piece_and_its_gradient(pieces, dtype, layout, size):
    n, channels, *pixels = size
    x = LAYOUTS[layout](torch.randn(n, pieces * channels, *pixels).to(dtype))
    output, winner = activation.maxout(x, pieces, True)
    assert torch.equal(output, reference.maxout(x, pieces))
    assert output.stride() == winner.stride() == strides(size, x)
    grad = LAYOUTS[layout](torch.randn(size).to(dtype))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.maxout(leaf, pieces), leaf, grad)
    found = activation.maxout_backward(grad, winner, pieces)
    assert torch.equal(found, expected)
    assert found.stride() == strides(x.shape, winner)


def test_ties_go_to_the_last_piece_and_nan_wins():
    nan = float("nan")
    x = torch.tensor([[1.0, 2.0, 0.0, nan, 3.0, nan], [1.0, 1.0, -0.0, 5.0, nan, nan]]).reshape(1, 12, 1, 1)
    output, winner = activation.maxout(x, 2, True)
    assert winner.flatten().tolist() == [1, 0, 1, 0, 1, 1]
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 2.0, 0.0, nan, nan, nan]), equal_nan=True)
    assert activation.maxout(x, 2, False)[1].shape == (0,)


def units(size: tuple[int, ...], segments: int, *, positions: bool) -> tuple[Tensor, Tensor]:
    sizes = size[1:] if positions else (size[1], 1, 1)
    return torch.rand(segments, *sizes) - 0.5, 0.5 * torch.randn(segments, *sizes)


def check(x: Tensor, slope: Tensor, hinge: Tensor, grad: Tensor) -> None:
    wide = [t.double().requires_grad_() for t in (x, slope, hinge)]
    truth = reference.apl(*wide)
    gradients = torch.autograd.grad(truth, wide, grad.double())
    output = activation.apl(x, slope, hinge)
    found = activation.apl_backward(grad, x, slope, hinge)
    assert output.dtype == found[0].dtype == x.dtype
    assert output.stride() == found[0].stride() == strides(x.shape, x)
    terms = 1 + slope.abs().sum(0) * 2
    for got, true in ((output, truth), (found[0], gradients[0])):
        assert ((got.double() - true).abs() <= ROUNDING[x.dtype] * true.abs() + 2.0**-21 * terms * 4).all()
    for got, true in zip(found[1:], gradients[1:], strict=True):
        assert got.stride() == strides(slope.shape, x)
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5 * len(x) * 4)


@every_size
@every_layout
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_units_and_all_their_gradients(segments, positions, layout, size):
    x, grad = (LAYOUTS[layout](torch.randn(size)) for _ in range(2))
    check(x, *units(size, segments, positions=positions), grad)


@every_dtype
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_half_precision_is_rounded_once(layout, positions, dtype):
    size = (3, 6, 5, 5)
    x, grad = (LAYOUTS[layout](torch.randn(size).to(dtype)) for _ in range(2))
    check(x, *units(size, 3, positions=positions), grad)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_sums_in_any_number_of_parts(monkeypatch, multiprocessors, layout):
    monkeypatch.setattr(_tiles, "gpu_limits", lambda device: _tiles.Gpu(90, multiprocessors, 232_448))
    size = (70, 2, 9, 10)
    x, grad = (LAYOUTS[layout](torch.randn(size)) for _ in range(2))
    parameters = units(size, 2, positions=False)
    check(x, *parameters, grad)
    first, second = (activation.apl_backward(grad, x, *parameters) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_stays_where_it_is():
    x = torch.randn(2, 3, 4, 4)
    x[1, 1, 2, 3] = float("nan")
    slope, hinge = units((2, 3, 4, 4), 2, positions=False)
    assert torch.equal(activation.apl(x, slope, hinge).isnan(), x.isnan())
    _, by_slope, by_hinge = activation.apl_backward(torch.ones_like(x), x, slope, hinge)
    assert by_slope.isnan().nonzero()[:, 1].unique().tolist() == [1]
    assert not by_hinge.isnan().any()
