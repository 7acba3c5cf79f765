"""How separable_conv is put together on CUDA, with definitions in the place of the depthwise kernels: no GPU needed."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from perfvl.ops import separable_conv_cuda as cuda
from perfvl.reference import separable_conv as reference
from perfvl.reference.activation import ACTIVATIONS

NAMES = list(ACTIVATIONS)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
CALLS: list[int] = []


def defined(input, scale, shift, weight, stride, padding, dilation, pre, bias=None, activation=0):
    return reference.depthwise_conv(
        input,
        weight,
        bias,
        scale=scale,
        shift=shift,
        stride=stride,
        padding=padding,
        dilation=dilation,
        pre_activation=NAMES[pre],
        activation=NAMES[activation],
    )


def depthwise(input, scale, shift, weight, bias, stride, padding, dilation, pre, activation, statistics):
    CALLS.append(len(input))
    nothing = torch.empty(0)
    return defined(input, scale, shift, weight, stride, padding, dilation, pre, bias, activation), nothing, nothing


def depthwise_backward(
    grad, input, scale, shift, weight, stride, padding, dilation, pre, need_input, need_affine, need_weight
):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (input, scale, shift, weight)]
    with torch.enable_grad():
        u = defined(*leaves, stride, padding, dilation, pre)
    present = [t for t in leaves if t is not None]
    found = dict(zip(map(id, present), torch.autograd.grad(u, present, grad), strict=True))
    needed = (need_input, need_affine, need_affine, need_weight)
    return tuple(found[id(t)] if need else torch.empty(0) for t, need in zip(leaves, needed, strict=True))


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    CALLS.clear()
    monkeypatch.setattr(cuda, "_depthwise", depthwise)
    monkeypatch.setattr(cuda, "_depthwise_backward", depthwise_backward)
    monkeypatch.setattr(cuda, "_statistics", reference.channel_statistics)


def tensors(dtype, layout, multiplier=1):
    x = torch.randn(5, 12 // multiplier, 9, 8).to(dtype).to(memory_format=layout)
    w, p = torch.randn(12, 1, 3, 3).to(dtype), (torch.randn(7, 12, 1, 1) / 3).to(dtype)
    return x, w, p


def wide(t):
    return None if t is None else t.double()


def distance(got, truth):
    assert got.shape == truth.shape
    return float((got.double() - truth).norm() / truth.norm())


CONFIGURATIONS = list(
    itertools.product([torch.float32, torch.bfloat16], [torch.channels_last, torch.contiguous_format], [1, 3])
)
GEOMETRY = ([1, 1], [1, 1, 1, 1], [1, 1])


@pytest.mark.parametrize(("dtype", "layout", "multiplier"), CONFIGURATIONS)
@pytest.mark.parametrize("plain", [True, False])
def test_output_is_that_of_the_definition(dtype, layout, multiplier, plain):
    x, w, p = tensors(dtype, layout, multiplier)
    affine = [None] * 6 if plain else [torch.rand(n) + 0.5 for n in (12 // multiplier,) * 2 + (12,) * 2 + (7,) * 2]
    pre, mid, post = ("none",) * 3 if plain else ("relu", "silu", "hardswish")
    residual = None if plain else torch.randn(5, 7, 9, 8).to(dtype)
    s, t, ms, mt, os, ot = affine
    got, mean, variance = cuda.composed(
        x, s, t, w, ms, mt, p, os, ot, residual, *GEOMETRY, *map(NAMES.index, (pre, mid, post)), True
    )
    geometry = dict(zip(("stride", "padding", "dilation"), GEOMETRY, strict=True))
    truth = reference.separable_conv(
        *map(wide, (x, s, t, w, ms, mt, p, os, ot, residual)),
        **geometry,
        pre_activation=pre,
        mid_activation=mid,
        activation=post,
    )
    assert distance(got, truth) < TOLERANCE[dtype]
    assert got.is_contiguous(memory_format=layout)
    for found, expected in zip((mean, variance), reference.channel_statistics(got), strict=True):
        torch.testing.assert_close(found, expected)
    assert CALLS == [5]  # all images at once


@pytest.mark.parametrize(("dtype", "layout", "multiplier"), CONFIGURATIONS)
@pytest.mark.parametrize("plain", [True, False])
def test_gradients_are_those_of_the_definition(dtype, layout, multiplier, plain):
    x, w, p = tensors(dtype, layout, multiplier)
    s, t = (None, None) if plain else (torch.rand(12 // multiplier) + 0.5, torch.randn(12 // multiplier))
    leaves = [None if v is None else v.double().requires_grad_() for v in (x, s, t, w, p, torch.zeros(7))]
    geometry = dict(zip(("stride", "padding", "dilation"), GEOMETRY, strict=True))
    z = reference.separable_conv(
        *leaves[:4],
        None,
        None,
        leaves[4],
        None,
        leaves[5],
        None,
        **geometry,
        pre_activation="relu",
        mid_activation="none",
        activation="none",
    )
    g = torch.randn(z.shape).to(dtype)
    output, slope, offset = None, None, None
    total = g.double()
    if not plain:
        output, slope, offset = z.detach().to(dtype), torch.randn(7), torch.randn(7)
        total = total + output.double() * slope.double().reshape(-1, 1, 1) + offset.double().reshape(-1, 1, 1)
    present = [v for v in leaves if v is not None]
    truth = dict(zip(map(id, present), torch.autograd.grad(z, present, total), strict=True))
    needed = (True, not plain, True, True, True)
    found = cuda.backward(g, output, slope, offset, x, s, t, w, p, *GEOMETRY, NAMES.index("relu"), *needed)
    for leaf, got in zip(leaves, found, strict=True):
        if leaf is None:
            assert got.shape == (0,)
        else:
            assert distance(got, truth[id(leaf)]) < 3 * TOLERANCE[dtype]
    assert found[0].is_contiguous(memory_format=layout)
    nothing = cuda.backward(
        g, output, slope, offset, x, s, t, w, p, *GEOMETRY, NAMES.index("relu"), *(False,) * 4, True
    )
    assert [tuple(v.shape) for v in nothing] == [(0,)] * 5 + [(7,)]
    torch.testing.assert_close(nothing[5], found[5])


def fuses(C, CO, size, *, N=64, k=3, stride=1, dtype=torch.bfloat16, layout=torch.channels_last, norm=False):
    x = torch.empty((N, C, size, size), dtype=dtype, device="meta", memory_format=layout)
    weights = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((C, 1, k, k), (CO, C, 1, 1)))
    scale = torch.empty(C, device="meta") if norm else None
    return cuda._fuses(x, scale, *weights, ([stride] * 2, [k // 2] * 4, [1, 1]))


def test_one_kernel_where_it_is_faster(monkeypatch):
    pytest.importorskip("triton", reason="the one kernel needs Triton")
    monkeypatch.setattr(cuda.backends, "missing", lambda *_: None)
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="tf32"))
    planes = {"layout": torch.contiguous_format}
    assert fuses(128, 128, 147)
    assert fuses(96, 24, 112, stride=2, dtype=torch.float32)
    assert fuses(64, 128, 512, N=16, dtype=torch.float32, **planes)
    assert not fuses(64, 128, 512, N=16, **planes)
    assert not fuses(728, 728, 19)
    assert not fuses(256, 256, 74)
    assert not fuses(128, 128, 147, norm=True)
    assert not fuses(192, 32, 28)  # few pixels
    assert not fuses(192, 32, 19, N=1024)  # a third of the tiles outside the image
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="ieee"))
    assert not fuses(96, 24, 112, stride=2, dtype=torch.float32)
    monkeypatch.setattr(cuda.backends, "missing", lambda *_: "no Triton")
    assert not fuses(128, 128, 147)
