"""What is special to pooling: known answers, windows as PyTorch and Caffe have them, memory, layouts, drawing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contracts.pooling import CAFFE, WINDOWS, both_pools
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import perfvl
import perfvl.functional as pf
from perfvl import backends
from perfvl.nn import MaxAvgPool2d, StochasticPool2d
from perfvl.ops import pooling
from perfvl.ops.pooling import stochastic_pool2d

KNOWN = json.loads((Path(__file__).parent / "data" / "pooling_known.json").read_text())
HAS_KERNELS = not backends.CPU_MISSING


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with perfvl.use_backend(request.param):
        yield request.param


def memory(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


# Known answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_known_window(backend, dtype):
    known = KNOWN["pooling"]
    x = torch.tensor(known["x"], dtype=dtype)[None, None]
    tolerance = {torch.bfloat16: 0.02, torch.float16: 3e-3}.get(dtype, 1e-6)
    assert pf.max_avg_pool2d(x, 3).item() == pytest.approx(known["max_plus_avg"], rel=tolerance)
    assert stochastic_pool2d(x, None, 3).item() == pytest.approx(known["stochastic_eval"], rel=tolerance)
    for u, pick in zip(known["stochastic_train"]["u"], known["stochastic_train"]["picks"], strict=True):
        uniform = torch.full((1, 1, 1, 1), u, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        assert stochastic_pool2d(x, uniform, 3).item() == pick


def test_the_average_divides_by_the_window_in_the_padded_image(backend):
    average = pf.max_avg_pool2d(torch.full((1, 1, 3, 3), 2.0), 3, 1, padding=1) - 2
    expected = torch.tensor(KNOWN["pooling"]["avg_3x3_s1_pad1_of_constant_2"])[None, None]
    torch.testing.assert_close(average, expected)


def test_without_padding_a_constant_stays_one(backend):
    y = pf.max_avg_pool2d(torch.full((1, 3, 30, 30), 2.0), **CAFFE)
    assert torch.equal(y, torch.full((1, 3, 15, 15), 4.0))


def test_sizes_of_caffenet_are_rounded_up():
    sizes = {True: KNOWN["rounding"]["ceil"], False: KNOWN["rounding"]["floor_is_wrong"]}
    for ceil_mode, (conv1, pool1, conv2, pool2, *_, conv5, pool5) in sizes.items():
        for before, after in ((conv1, pool1), (conv2, pool2), (conv5, pool5)):
            y = pf.max_avg_pool2d(torch.zeros(1, 1, before, before), 3, 2, ceil_mode=ceil_mode)
            assert y.shape == (1, 1, after, after)


def test_spatial_pyramids(backend):
    known = KNOWN["spp_7x7"]
    x, ones = torch.arange(49.0).reshape(1, 1, 7, 7), torch.ones(1, 1, 7, 7)
    found = []
    for windows in known["windows"].values():
        sizes = windows["kernel"], windows["stride"], windows["pad"]
        y, average = pf.max_avg_pool2d(x, *sizes), pf.max_avg_pool2d(ones, *sizes) - 1
        found += zip((y - F.avg_pool2d(x, *sizes)).flatten().tolist(), average.flatten().tolist(), strict=True)
    largest, averages = zip(*found, strict=True)
    assert largest == pytest.approx(known["max_of_arange49"])
    assert averages == pytest.approx(known["avg_of_ones"])


# Windows --------------------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 40)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.tuples(st.integers(1, 2), st.integers(1, 36), SIZES, SIZES), st.data())
def test_any_windows_are_those_of_pytorch(shape, data):
    kernel = [data.draw(st.integers(1, 6)) for _ in range(2)]
    stride = [data.draw(st.integers(1, 7)) for _ in range(2)]
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    ceil_mode, channels_last = data.draw(st.booleans()), data.draw(st.booleans())
    torch.manual_seed(sum(shape))
    x = torch.randint(-4, 5, shape).float().contiguous(memory_format=memory(channels_last)).requires_grad_()
    windows = (kernel, stride, padding, ceil_mode)
    if min(pooling.output_size(shape[2:], *windows)) < 1:
        with pytest.raises(ValueError, match="a window that fits an image"):
            pf.max_avg_pool2d(x, *windows)
        return
    expected = both_pools(x, *windows)
    y = pf.max_avg_pool2d(x, *windows)
    assert torch.equal(y, expected)
    upstream = torch.randn(y.shape)
    ours, theirs = (torch.autograd.grad(t, x, upstream)[0] for t in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", WINDOWS)
def test_float32_is_bit_for_bit_that_of_pytorch(name, channels_last):
    shape, windows = WINDOWS[name]
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=memory(channels_last))
    assert torch.equal(pf.max_avg_pool2d(x, **windows), both_pools(x.contiguous(), **windows))


def test_windows_given_in_any_way_are_the_same():
    x = torch.randn(2, 3, 9, 9)
    expected = both_pools(x, 3, 2, 1)
    for kernel, stride, padding in itertools.product((3, (3, 3), [3, 3]), (2, (2, 2), [2, 2]), (1, (1, 1), [1, 1])):
        assert torch.equal(pf.max_avg_pool2d(x, kernel, stride, padding), expected)
    assert torch.equal(pf.max_avg_pool2d(x, [3, 3], None, 1, True), both_pools(x, 3, 3, 1, True))
    with pytest.raises(TypeError, match="`stride` got True"):
        pf.max_avg_pool2d(x, 1, True)


def test_equal_elements_leave_the_gradient_to_the_first(backend):
    x = torch.zeros(1, 20, 5, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(pf.max_avg_pool2d(x, 3, 2).sum(), x)
    largest = torch.zeros(5, 5)
    largest[:3:2, :3:2] = 1
    shares = F.conv_transpose2d(torch.ones(1, 1, 2, 2), torch.full((1, 1, 3, 3), 1 / 9), stride=2)[0, 0]
    torch.testing.assert_close(grad, (largest + shares).expand(1, 20, 5, 5))


def test_pixels_between_windows_have_no_gradient(backend):
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(pf.max_avg_pool2d(x, 2, 3).sum(), x)
    assert not grad[:, :, 2::3].any()
    assert not grad[:, :, :, 2::3].any()
    assert grad[:, :, ::3, ::3].all()


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
def test_windows_of_more_positions_than_a_byte_has_run_plain_pytorch(monkeypatch):
    def fail(*_):
        raise AssertionError

    x = torch.randn(1, 2, 20, 20)
    monkeypatch.setattr(pooling, "_MAX_AVG", fail)
    assert torch.equal(pf.max_avg_pool2d(x, 16), both_pools(x, 16))
    for just_fits in ((15, 17), (17, 15)):
        with pytest.raises(AssertionError):
            pf.max_avg_pool2d(x, just_fits)


# Memory and layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_KERNELS, reason="plain PyTorch saves the input and 64-bit indices")
@pytest.mark.parametrize("draw", [True, False])
def test_a_byte_for_each_window_is_saved_and_nothing_else(draw):
    x, saved = torch.rand(2, 16, 30, 30, requires_grad=True), []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = StochasticPool2d(**CAFFE)(x) if draw else pf.max_avg_pool2d(x, **CAFFE)
    assert [t.untyped_storage().nbytes() for t in saved] == [y.numel()]


@pytest.mark.skipif(not HAS_KERNELS, reason="plain PyTorch has layouts of its own")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("kernel", [3, 7])  # 7: one window, whose strides are those of either layout
def test_output_and_gradient_have_the_layout_of_the_input(kernel, channels_last):
    x = torch.randn(2, 6, 7, 7).contiguous(memory_format=memory(channels_last)).requires_grad_()
    y = pf.max_avg_pool2d(x, kernel)
    for upstream in (torch.randn(y.shape), torch.randn(y.shape).to(memory_format=torch.channels_last)):
        (grad,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        assert grad.stride() == x.stride()
    assert y.is_contiguous(memory_format=memory(channels_last))


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
@pytest.mark.parametrize("channels_last", [True, False])
def test_opcheck_of_the_backward_ops(channels_last):
    x = torch.rand(2, 6, 7, 9).contiguous(memory_format=memory(channels_last))
    windows = ([3, 3], [2, 2], [0, 0])
    _, argmax = torch.ops.perfvl.max_avg_pool(x, *windows, True, True)
    for upstream in (torch.randn(argmax.shape), torch.ones(()).expand(argmax.shape)):
        for op in (torch.ops.perfvl.max_avg_pool_backward, torch.ops.perfvl.stochastic_pool_backward):
            torch.library.opcheck(op.default, (upstream, argmax, [7, 9], *windows))


def test_cuda_has_kernels_for_every_op():
    for op in ("max_avg_pool", "max_avg_pool_backward", "stochastic_pool", "stochastic_pool_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"perfvl::{op}", "CUDA")


# Layers ---------------------------------------------------------------------------------------------------------------


def test_the_layer_is_the_sum_of_both_of_pytorch():
    x = torch.randn(2, 5, 15, 15)
    for windows in (CAFFE, {"kernel_size": (3, 2), "stride": 1, "padding": (1, 0)}, {"kernel_size": 2}):
        both = nn.MaxPool2d(**windows)(x) + nn.AvgPool2d(**windows)(x)
        assert torch.equal(MaxAvgPool2d(**windows)(x), both)
    assert repr(MaxAvgPool2d(3, 2)) == "MaxAvgPool2d(kernel_size=3, stride=2, padding=0, ceil_mode=False)"


def test_layers_check_their_windows_when_they_are_made():
    with pytest.raises(ValueError, match=r"^MaxAvgPool2d: `padding` got 2, expected at most half of the kernel size 3"):
        MaxAvgPool2d(3, padding=2)
    with pytest.raises(TypeError, match=r"^StochasticPool2d: `kernel_size` got 2.5, expected an int, or two of them"):
        StochasticPool2d(2.5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_same_seed_picks_the_same_elements(backend, channels_last):
    x = torch.rand(2, 8, 15, 15).contiguous(memory_format=memory(channels_last))
    pool, picks = StochasticPool2d(**CAFFE), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        picks.append(pool(x))
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])


def test_elements_are_picked_as_often_as_they_are_large(backend):
    x = torch.tensor([[1.0, 2.0], [0.0, 5.0]]).expand(1, 4000, 2, 2)
    picked = StochasticPool2d(2)(x).flatten()
    shares = [(picked == value).float().mean().item() for value in (1.0, 2.0, 5.0)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)
    assert StochasticPool2d(2).eval()(x)[0, 0].item() == pytest.approx((1 + 4 + 25) / 8)


def test_a_window_of_zeros_is_zero(backend):
    x = torch.zeros(1, 20, 6, 6, requires_grad=True)
    for pool in (StochasticPool2d(3, 2), StochasticPool2d(3, 2).eval()):
        y = pool(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert not y.any()
        assert grad.isfinite().all()


def test_stochastic_pooling_expects_no_more_than_the_largest_and_no_less_than_the_mean(backend):
    x = torch.rand(2, 5, 14, 14)
    y = StochasticPool2d(**CAFFE).eval()(x)
    assert (y <= F.max_pool2d(x, 3, 2, ceil_mode=True) + 1e-6).all()
    assert (y >= F.avg_pool2d(x, 3, 2, ceil_mode=True) - 1e-6).all()


def test_one_image_without_a_batch(backend):
    x = torch.rand(6, 15, 15)
    assert torch.equal(pf.max_avg_pool2d(x, **CAFFE), both_pools(x, **CAFFE))
    assert StochasticPool2d(**CAFFE)(x).shape == (6, 7, 7)


def test_stochastic_pooling_compiles_whole():
    torch._dynamo.reset()
    x, pool = torch.rand(2, 6, 15, 15, requires_grad=True), StochasticPool2d(**CAFFE)
    y = torch.compile(pool, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.isin(y, x).all()
    assert grad.sum() == y.numel()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(count):
    before = torch.get_num_threads()
    results = []
    for threads in (1, count):
        torch.set_num_threads(threads)
        x = torch.arange(3 * 40 * 60 * 60.0).mul(0.7).sin().reshape(3, 40, 60, 60).requires_grad_()
        y = pf.max_avg_pool2d(x, 3, 2, 1)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
