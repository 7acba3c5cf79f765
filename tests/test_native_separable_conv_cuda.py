"""The depthwise kernels of CUDA, run on the CPU by tests/native/cuda_emulator.h, against float64, and their fakes."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT32, narrow, same, widen
from torch._subclasses.fake_tensor import FakeTensorMode

import perfvl.ops.depthwise_conv
from perfvl.reference.activation import ACTIVATIONS, CODES
from perfvl.reference.separable_conv import depthwise_conv

cuda = build.load("native_cuda")
LAYOUTS = ["nchw", "channels_last"]
# Units in the last place, and what rounding `pre(...)` to the dtype, as the reference does, is worth.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}


class Case(NamedTuple):
    channels: int
    size: tuple[int, int] = (9, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    batch: int = 2
    pre: str = "none"
    post: str = "none"
    affine: bool = False

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


def square(k: int, channels: int, **options: Any) -> Case:
    return Case(channels, kernel=(k, k), padding=(k // 2,) * 4, **options)


GEOMETRIES = {
    "1x1": square(1, 16),
    "3x3": square(3, 24),
    "3x3 of many channels": square(3, 72, size=(5, 7)),
    "3x3 of 33 channels": square(3, 33, size=(6, 5)),
    "3x3 of 3 channels": square(3, 3),
    "3x3 of 1 channel": square(3, 1),
    "3x3 stride 2": square(3, 24, stride=(2, 2)),
    "3x3 stride 2 even": square(3, 8, stride=(2, 2), size=(8, 10)),
    "3x3 stride 2 no padding": Case(8, stride=(2, 2), padding=(0, 0, 0, 0)),
    "3x3 stride 2 odd below": Case(8, stride=(2, 2), padding=(0, 1, 0, 1), size=(8, 8)),
    "3x3 stride 3": square(3, 8, stride=(3, 3)),
    "3x3 strides 1 and 2": square(3, 8, stride=(1, 2)),
    "3x3 strides 2 and 1": square(3, 8, stride=(2, 1)),
    "3x3 dilation 2": Case(16, padding=(2, 2, 2, 2), dilation=(2, 2)),
    "3x3 dilations 1 and 2": Case(16, padding=(1, 1, 2, 2), dilation=(1, 2)),
    "3x3 stride 2 dilation 2": Case(16, padding=(2, 2, 2, 2), dilation=(2, 2), stride=(2, 2)),
    "3x3 padding of four kinds": Case(8, padding=(0, 2, 3, 1)),
    "3x3 padding wider than the kernel": Case(4, size=(4, 5), padding=(5, 4, 3, 4)),
    "3x3 of two filters a channel": square(3, 8, multiplier=2),
    "3x3 of three filters, stride 2": square(3, 3, multiplier=3, stride=(2, 2)),
    "3x3 of long rows": square(3, 20, size=(6, 31)),
    "3x3 of whole vectors": square(3, 3, size=(11, 24)),
    "3x3 of whole vectors, no padding": Case(2, size=(11, 24), padding=(0, 0, 0, 0)),
    "3x3 of whole vectors, padding 4 and 5": Case(2, size=(6, 8), padding=(0, 1, 4, 5)),
    "3x3 of whole vectors, padding 9": Case(2, size=(6, 8), padding=(2, 2, 9, 9)),
    "3x3 of whole vectors, two filters a channel": square(3, 2, size=(5, 8), multiplier=2),
    "3x1 of whole vectors": Case(3, size=(13, 16), kernel=(3, 1), padding=(1, 1, 0, 0)),
    "3x1 of whole vectors, padding 8": Case(2, size=(5, 8), kernel=(3, 1), padding=(0, 2, 8, 3)),
    "one pixel": square(3, 16, size=(1, 1)),
    "one pixel, stride 2": square(5, 16, size=(1, 1), stride=(2, 2)),
    "one row": square(3, 4, size=(1, 19)),
    "one column": square(3, 4, size=(19, 1)),
    "5x5": square(5, 24),
    "5x5 stride 2": square(5, 20, stride=(2, 2), size=(10, 9)),
    "5x5 stride 2 odd below": Case(4, kernel=(5, 5), stride=(2, 2), padding=(1, 2, 1, 2), size=(8, 8)),
    "7x7": square(7, 16),
    "7x7 of 3 channels": square(7, 3, size=(17, 4)),
    "7x7 stride 2": square(7, 8, stride=(2, 2)),
    "7x7 larger than the image": square(7, 8, size=(3, 2)),
    "3x1": Case(8, kernel=(3, 1), padding=(0, 0, 0, 0)),
    "3x7": Case(8, kernel=(3, 7), padding=(1, 1, 3, 3)),
    "2x4": Case(8, kernel=(2, 4), padding=(0, 1, 1, 2)),
    "11x11": square(11, 4),
}
PROLOGUES = {
    f"{pre}{' of an affine' if affine else ''}": square(3, 8, size=(5, 6), batch=1, pre=pre, affine=affine)
    for pre in ACTIVATIONS
    for affine in (False, True)
    if affine or pre != "none"
}


class Operands(NamedTuple):
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | None
    shift: np.ndarray | None
    grad: np.ndarray


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """[N, C, H, W] in memory as `layout` says, as torch would tell by the strides: of one channel it is NCHW."""
    if layout == "nchw" or x.shape[1] == 1:
        return np.ascontiguousarray(x)
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def output_size(case: Case) -> list[int]:
    return [
        (n + sum(case.padding[2 * i : 2 * i + 2]) - d * (k - 1) - 1) // s + 1
        for i, (n, k, s, d) in enumerate(zip(case.size, case.kernel, case.stride, case.dilation, strict=True))
    ]


def operands(case: Case, layout: str, dtype: np.dtype) -> Operands:
    rng = np.random.default_rng(0)
    outputs = case.channels * case.multiplier

    def some(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    scale, shift = (some(case.channels), some(case.channels) + 2) if case.affine else (None, None)
    return Operands(
        laid_out(narrow(some(case.batch, case.channels, *case.size), dtype), layout),
        narrow(some(outputs, 1, *case.kernel), dtype),
        narrow(some(outputs), dtype),
        scale,
        shift,
        laid_out(narrow(some(case.batch, outputs, *output_size(case)), dtype), layout),
    )


def double(x: np.ndarray | None) -> torch.Tensor | None:
    return None if x is None else torch.from_numpy(widen(np.ascontiguousarray(x)).astype(np.float64))


def truth(case: Case, o: Operands) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor]:
    """The output in float64, the leaves (input, scale, shift, weight), and the output without bias and activation."""
    x, scale, shift, weight = (double(a) for a in (o.x, o.scale, o.shift, o.weight))
    leaves = [None if t is None else t.requires_grad_() for t in (x, scale, shift, weight)]
    geometry = {name: list(value) for name, value in case.geometry.items()} | {"pre_activation": case.pre}
    options = {"scale": scale, "shift": shift, **geometry}
    bare = depthwise_conv(x, weight, None, activation="none", **options)
    return depthwise_conv(x, weight, double(o.bias), activation=case.post, **options), leaves, bare


def forward(case: Case, o: Operands, **options: Any) -> tuple[np.ndarray, ...]:
    return cuda.depthwise_conv(
        o.x,
        o.weight,
        scale=o.scale,
        shift=o.shift,
        bias=o.bias,
        **case.geometry,
        pre=CODES[case.pre],
        post=CODES[case.post],
        **options,
    )


def backward(case: Case, o: Operands, **options: Any) -> tuple[np.ndarray, ...]:
    return cuda.depthwise_conv_backward(
        o.grad, o.x, o.weight, scale=o.scale, shift=o.shift, **case.geometry, pre=CODES[case.pre], **options
    )


def assert_near(got: np.ndarray, right: torch.Tensor, tolerance: float) -> None:
    right = right.detach().numpy()
    assert got.shape == right.shape
    scale = max(1.0, float(np.abs(right).max()))
    np.testing.assert_allclose(widen(got), right, rtol=tolerance, atol=tolerance * scale)


def check(case: Case, layout: str, dtype: str, o: Operands | None = None) -> None:
    o = o or operands(case, layout, DTYPES[dtype])
    output, leaves, bare = truth(case, o)
    got, mean, variance = forward(case, o, statistics=True)
    assert_near(got, output, TOLERANCE[dtype])
    assert got.strides[1] == got.itemsize if layout == "channels_last" and case.channels > 1 else True
    stored = widen(np.ascontiguousarray(got)).astype(np.float64)
    np.testing.assert_allclose(mean, stored.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, stored.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
    without_statistics, *_ = forward(case, o)  # where a faster kernel may run
    assert_near(without_statistics, output, TOLERANCE[dtype])

    given = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(bare, given, double(o.grad)))
    right = [None if leaf is None else next(grads) for leaf in leaves]
    found = backward(case, o, needed=(True, case.affine, True))
    for mine, true in zip(found, right, strict=True):
        if true is None:
            assert mine.shape == (0,)
        else:
            assert_near(mine, true, TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_geometry_gives_what_float64_gives(name, layout):
    every = name in ("3x3", "5x5 stride 2", "3x3 of two filters a channel") or "whole vectors" in name
    for dtype in DTYPES if every else ["float32"]:
        check(GEOMETRIES[name], layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PROLOGUES)
def test_outside_pixels_are_zero_whatever_stands_before_the_convolution(name, layout):
    # With a shift above 0 an outside pixel would be act(shift) if padding came first.
    check(PROLOGUES[name], layout, "float32")
    check(PROLOGUES[name]._replace(kernel=(2, 3), stride=(2, 1)), layout, "float32")
    check(PROLOGUES[name]._replace(size=(3, 8), channels=4), layout, "bfloat16")  # rows of whole vectors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [5, 7])
def test_larger_kernels_take_a_prologue(k, layout):
    check(square(k, 8, size=(7, 6), batch=1, pre="relu", affine=True), layout, "bfloat16")
    check(square(k, 4, size=(7, 6), batch=1, pre="silu", affine=True, stride=(2, 2)), layout, "float32")


@pytest.mark.parametrize("post", ACTIVATIONS)
def test_every_activation_may_follow(post):
    for layout in LAYOUTS:
        check(square(3, 4, size=(4, 5), batch=1, post=post), layout, "float32")


@pytest.mark.parametrize("pre", ACTIVATIONS)
def test_derivatives_at_the_corners_are_those_of_torch(pre):
    corners = np.array([-3, 0, 3, 6, -0.0, -3.5, 5.9, 100, -100], np.float32).reshape(1, 1, 3, 3)
    case = square(1, 1, size=(3, 3), batch=1, pre=pre)
    o = operands(case, "nchw", FLOAT32)._replace(x=corners, weight=np.ones((1, 1, 1, 1), np.float32))
    check(case, "nchw", "float32", o)


@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "7x7", "3x3 dilation 2"])
def test_only_what_is_needed_is_computed(name):
    case = GEOMETRIES[name]._replace(affine=True, pre="relu", size=(5, 6))
    o = operands(case, "channels_last", FLOAT32)
    everything = backward(case, o)
    for needed in itertools.product([False, True], repeat=3):
        found = backward(case, o, needed=needed)
        for mine, right, need in zip(found, everything, (needed[0], needed[1], needed[1], needed[2]), strict=True):
            assert same(mine, right) if need else mine.size == 0


def strided(x: np.ndarray, view: str) -> np.ndarray:
    n, c, h, w = x.shape
    if view == "sliced":  # a window of a larger NCHW image
        whole = np.full((n, c + 1, h + 2, w + 3), 99, x.dtype)
        window = whole[:, 1:, 1:-1, 2:-1]
    elif view == "sliced channels":
        whole = np.full((n, h, w, c + 5), 99, x.dtype)
        window = whole[..., 3:-2].transpose(0, 3, 1, 2)
    elif view == "aligned channels":
        whole = np.full((n, h, w, 2 * c), 99, x.dtype)
        window = whole[..., c:].transpose(0, 3, 1, 2)
    else:  # transposed
        whole = np.empty((w, c, h, n), x.dtype)
        window = whole.transpose(3, 1, 2, 0)
    window[...] = x
    return window


@pytest.mark.parametrize("view", ["sliced", "sliced channels", "aligned channels", "transposed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_and_gradients_may_have_any_strides(view, dtype):
    for case in (square(3, 8, affine=True), Case(8, kernel=(2, 3), stride=(2, 1), multiplier=2)):
        o = operands(case, "nchw", DTYPES[dtype])
        weight = np.ascontiguousarray(o.weight.transpose(2, 3, 0, 1)).transpose(2, 3, 0, 1)
        check(case, "any", dtype, o._replace(x=strided(o.x, view), grad=strided(o.grad, view), weight=weight))


def test_a_gradient_may_be_expanded_or_of_another_layout():
    case = square(3, 8)
    o = operands(case, "channels_last", FLOAT32)
    check(case, "channels_last", "float32", o._replace(grad=np.broadcast_to(o.grad[:, :, :1, :1], o.grad.shape)))
    check(case, "channels_last", "float32", o._replace(grad=laid_out(o.grad, "nchw")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["3x3", "5x5 stride 2", "3x3 of two filters a channel"])
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(name, layout):
    case = GEOMETRIES[name]._replace(affine=True, pre="relu")
    o = operands(case, layout, BFLOAT16)
    first = [*forward(case, o, statistics=True), *backward(case, o)]
    cuda.set_order(True)
    try:
        second = [*forward(case, o, statistics=True), *backward(case, o)]
    finally:
        cuda.set_order(False)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_statistics_keep_a_small_variance_beside_a_large_mean():
    case = square(1, 4, size=(40, 40), batch=3)
    o = operands(case, "channels_last", FLOAT32)
    o = o._replace(weight=np.ones((4, 1, 1, 1), np.float32), bias=np.full(4, 3000, np.float32))
    output, mean, variance = forward(case, o, statistics=True)
    np.testing.assert_allclose(mean, output.astype(np.float64).mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(variance, output.astype(np.float64).var((0, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_blocks_share_the_sums_of_a_channel(layout):
    # More strips than one block takes at a time, of several groups of channels.
    case = square(3, 72 if layout == "channels_last" else 2, size=(23, 29), batch=2, affine=True, pre="relu")
    check(case, layout, "float32")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pre", ["none", "relu", "relu6", "silu", "leaky_relu"])
def test_nan_and_infinity_spread_as_far_as_the_kernel_reaches(pre, layout):
    case = square(3, 4, size=(9, 9), batch=1, pre=pre)
    o = operands(case, layout, FLOAT32)
    o.x[0, 0, 4, 4], o.x[0, 1, 4, 4] = np.nan, np.inf
    o.grad[0, 2, 4, 4], o.grad[0, 3, 4, 4] = np.nan, np.inf
    output, grad_input = forward(case, o)[0], backward(case, o, needed=(True, False, False))[0]
    reached = np.zeros((9, 9), bool)
    reached[3:6, 3:6] = True
    assert (np.isnan(output[0, 0]) == reached).all()
    assert (np.isinf(output[0, 1]) == (reached if pre != "relu6" else False)).all()
    open_ = np.ones((9, 9), bool) if pre not in ("relu", "relu6") else o.x[0, 2:] > 0
    open_ = np.broadcast_to(open_, (2, 9, 9)) & ~(np.abs(o.x[0, 2:]) < 1e-3)
    assert (np.isnan(grad_input[0, 2]) == (reached & open_[0])).all()
    assert (np.isinf(grad_input[0, 3]) == (reached & open_[1])).all()


def test_a_kernel_too_large_to_stage_is_refused():
    case = Case(1, size=(8200, 1), kernel=(8200, 1), padding=(0, 0, 0, 0), batch=1)
    with pytest.raises(RuntimeError, match="cudaError 1"):
        forward(case, operands(case, "nchw", FLOAT32))


def test_neighbouring_channels_are_moved_together():
    check(square(3, 64, size=(3, 4), batch=1), "channels_last", "bfloat16")
    forward(square(3, 64), operands(square(3, 64), "channels_last", BFLOAT16))
    assert cuda.last_launch()[1] == (8, 16, 1)  # eight lanes of four channels
    forward(square(3, 33), operands(square(3, 33), "channels_last", BFLOAT16))
    assert cuda.last_launch()[1] == (8, 16, 1)  # eight of one: of 32, half of a second block's would idle
    forward(square(3, 64), operands(square(3, 64), "nchw", BFLOAT16))
    assert cuda.last_launch()[1] == (1, 128, 1)


# Fakes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_fake_outputs_have_the_kernels_shapes_and_strides(memory, statistics):
    assert perfvl.ops.depthwise_conv.LIBRARY is not None
    with FakeTensorMode():
        x = torch.empty(2, 8, 9, 11, dtype=torch.bfloat16, device="cuda").to(memory_format=memory)
        weight = torch.empty(16, 1, 3, 5, dtype=torch.bfloat16, device="cuda")
        y, mean, variance = torch.ops.perfvl.depthwise_conv(
            x, None, None, weight, None, [2, 1], [0, 1, 2, 2], [1, 2], 1, 0, statistics
        )
        assert y.shape == (2, 16, 4, 7)
        assert y.is_contiguous(memory_format=memory)
        assert (y.dtype, mean.dtype, y.device.type) == (torch.bfloat16, torch.float32, "cuda")
        assert mean.shape == variance.shape == (16 if statistics else 0,)
        for needed in itertools.product([False, True], repeat=3):
            found = torch.ops.perfvl.depthwise_conv_backward(
                y, x, None, None, weight, [2, 1], [0, 1, 2, 2], [1, 2], 1, *needed
            )
            shapes = [x.shape, (8,), (8,), weight.shape]
            needs = (needed[0], needed[1], needed[1], needed[2])
            assert [g.shape for g in found] == [s if n else (0,) for s, n in zip(shapes, needs, strict=True)]
            assert [g.dtype for g in found] == [x.dtype, torch.float32, torch.float32, x.dtype]
            assert not needed[0] or found[0].is_contiguous(memory_format=memory)
