"""The Triton kernels of `norm_act`, interpreted, against the definition in float64.

`test_triton_norm_act.py` runs this file in a process of its own. The GPU has one multiprocessor, so that sums come in
few parts: more are asked for where they matter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from triton_support import interpreter

interpreter.install()

from perfvl.kernels import _tiles, norm_act  # noqa: E402  (the interpreter has to be patched first)

from perfvl.reference import norm_act as reference  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second channel": lambda x: x.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2],
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
}
SIZES = [(5, 1, 1, 1), (9, 5, 1, 1), (7, 17, 1, 1), (2, 3, 7, 7), (1, 2, 33, 35), (5, 20, 2, 3)]
NAMES = list(reference.ACTIVATIONS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
every_order = pytest.mark.parametrize("order", ["before", "after"])
every_name = pytest.mark.parametrize("name", NAMES)
EPS, MOMENTUM, PARAMETER = 1e-3, 0.25, 0.75


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch):
    monkeypatch.setattr(_tiles, "gpu_limits", lambda device: _tiles.Gpu(90, 1, 232_448))


def strides(like: Tensor) -> tuple[int, ...]:
    last = like.shape[1] > 1 and like.stride(1) == 1
    return torch.empty(like.shape, memory_format=torch.channels_last if last else torch.contiguous_format).stride()


def check(x: Tensor, grad: Tensor, name: str, order: str, *, training: bool = True, affine: bool = True) -> None:
    channels = x.shape[1]
    weight, bias = (0.5 + torch.rand(channels), torch.randn(channels)) if affine else (None, None)
    running = [torch.randn(channels), 0.5 + torch.rand(channels)]
    wide = [t if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    moved = [t.double() for t in running]
    truth = reference.norm_act(
        *wide, *moved, training=training, momentum=MOMENTUM, eps=EPS, activation=name, parameter=PARAMETER, order=order
    )
    gradients = torch.autograd.grad(truth, [t for t in wide if t is not None], grad.double())

    shared = (EPS, NAMES.index(name), PARAMETER, order == "after")
    output, mean, variance = norm_act.norm_act(x, weight, bias, *running, training, MOMENTUM, *shared)
    found = norm_act.norm_act_backward(grad, x, weight, bias, mean, variance, training, *shared, True, affine)
    assert output.dtype == found[0].dtype == x.dtype
    assert output.stride() == found[0].stride() == strides(x)
    # Where the norm gives (or sees) what is next to 0, either side of a kink is right.
    seen = x.double() if order == "after" else None
    if seen is None:
        still = [t.double() for t in (mean, variance)]
        plain = {"training": False, "momentum": 0.0, "eps": EPS, "parameter": 0.0, "order": "before"}
        with torch.no_grad():
            seen = reference.norm_act(*wide, *still, activation="identity", **plain)
    clear = seen.abs() > 1e-4
    rounding = ROUNDING[x.dtype]
    assert ((output.double() - truth).abs() <= rounding * truth.abs() + 3e-6 * (1 + truth.abs().max())).all()
    wrong = (found[0].double() - gradients[0]).abs() > rounding * gradients[0].abs() + 1e-5 * (
        1 + gradients[0].abs().max()
    )
    assert not (wrong & clear).any()
    if affine and clear.all():
        for got, true in zip(found[1:], gradients[1:], strict=True):
            torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5 * x.numel() ** 0.5)
    for got, true in zip(running, moved, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-6)


@every_size
@every_layout
@every_order
def test_norm_and_activation_and_all_their_gradients(order, layout, size):
    x, grad = (LAYOUTS[layout](torch.randn(size)) for _ in range(2))
    check(x, grad, NAMES[(SIZES.index(size) + list(LAYOUTS).index(layout)) % len(NAMES)], order)


@every_order
@every_name
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_every_activation(layout, name, order):
    x, grad = (LAYOUTS[layout](torch.randn(3, 6, 5, 5)) for _ in range(2))
    check(x, grad, name, order)


@every_order
@every_name
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_statistics_that_are_given(layout, name, order):
    x, grad = (LAYOUTS[layout](torch.randn(3, 6, 5, 5)) for _ in range(2))
    for affine in (True, False):
        check(x, grad, name, order, training=False, affine=affine)


@every_order
@pytest.mark.parametrize("name", ["relu", "elu", "tanh"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_half_precision_is_rounded_once(layout, dtype, name, order):
    x, grad = (LAYOUTS[layout](torch.randn(3, 6, 5, 5).to(dtype)) for _ in range(2))
    check(x, grad, name, order, affine=False)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_sums_in_any_number_of_parts(monkeypatch, multiprocessors, layout):
    monkeypatch.setattr(_tiles, "gpu_limits", lambda device: _tiles.Gpu(90, multiprocessors, 232_448))
    x, grad = (LAYOUTS[layout](torch.randn(70, 2, 9, 10)) for _ in range(2))
    check(x, grad, "tanh", "before")
    arguments = (None, None, None, None, True, MOMENTUM, EPS, 1, 0.0, False)
    first, second = (norm_act.norm_act(x, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_the_variance_keeps_its_digits_far_from_zero(layout):
    x = LAYOUTS[layout](torch.randn(40, 3, 9, 9) + 1e4)
    _, mean, variance = norm_act.norm_act(x, None, None, None, None, True, MOMENTUM, EPS, 0, 0.0, False)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), correction=0), rtol=2e-5, atol=0)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_nan_stays_in_its_channel(layout):
    x = torch.randn(2, 3, 4, 4)
    x[1, 1, 2, 3] = float("nan")
    x = LAYOUTS[layout](x)
    output, mean, variance = norm_act.norm_act(x, None, None, None, None, True, MOMENTUM, EPS, 1, 0.0, False)
    found = norm_act.norm_act_backward(
        torch.ones_like(x), x, None, None, mean, variance, True, EPS, 1, 0.0, False, True, True
    )
    for t in (output, found[0]):
        assert t.isnan().all(0).all(-1).all(-1).tolist() == [False, True, False]
        assert t.isnan().any(0).any(-1).any(-1).tolist() == [False, True, False]
    assert found[1].isnan().tolist() == [False, True, False]


def test_what_is_not_needed_is_empty():
    x = torch.randn(2, 3, 4, 4)
    for training in (True, False):
        shared = (x, x, None, None, torch.zeros(3), torch.ones(3), training, EPS, 1, 0.0, False)
        both = norm_act.norm_act_backward(*shared, True, True)
        for needed in ((True, False), (False, True)):
            found = norm_act.norm_act_backward(*shared, *needed)
            for own, full, wanted in zip(found, both, (needed[0], needed[1], needed[1]), strict=True):
                assert torch.equal(own, full) if wanted else own.numel() == 0
