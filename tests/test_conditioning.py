"""What the contract does not ask of the conditioning ops: known answers, layouts, what they share and what runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import perfvl
from perfvl import backends
from perfvl.functional import conditioned_conv2d
from perfvl.nn import ConditioningAugmentation
from perfvl.ops import conditioning
from perfvl.ops.conditioning import _is_faster, add_condition, conditioning_augmentation

needs_kernels = pytest.mark.skipif(bool(backends.CPU_MISSING), reason="needs the kernels")
HALF = [torch.bfloat16, torch.float16]


def problem(n, c, e, o, size, dtype=torch.float32, channels_last=False):
    x, condition = torch.randn(n, c, *size).to(dtype), torch.randn(n, e).to(dtype)
    weight = (torch.randn(o, c + e, 3, 3) / (9 * (c + e)) ** 0.5).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in (x, condition, weight, torch.randn(o).to(dtype))]


def called(run):
    """The names of perfvl's ops that it calls."""
    names = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    with Calls():
        run()
    return {name.removeprefix("perfvl::") for name in names if name.startswith("perfvl::")}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_condition_of_ones_counts_the_taps_inside(dtype, channels_last):
    x, _, weight, _ = (t.detach() for t in problem(2, 3, 5, 4, (3, 4), dtype, channels_last))
    y = conditioned_conv2d(0 * x, torch.ones(2, 5, dtype=dtype), torch.ones_like(weight))
    expected = 5 * torch.tensor([[4.0, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]).to(dtype)
    assert torch.equal(y, expected.expand(2, 4, 3, 4))
    single = conditioned_conv2d(0 * x[:, :, :1, :1], torch.ones(2, 5, dtype=dtype), torch.ones_like(weight))
    assert torch.equal(single, torch.full((2, 4, 1, 1), 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_gradients_have_the_dtypes_of_what_they_belong_to(dtype):
    tensors = problem(3, 5, 7, 18, (4, 4), dtype)
    y = conditioned_conv2d(*tensors[:3], bias=tensors[3])
    assert y.dtype == dtype
    assert [g.dtype for g in torch.autograd.grad(y.sum(), tensors)] == [dtype] * 4


@pytest.mark.parametrize("channels_last", [False, True])
def test_output_and_gradients_have_the_layout_of_input_and_weight(channels_last):
    x, condition, weight, _ = problem(2, 6, 7, 9, (5, 4), channels_last=channels_last)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    weight = weight.detach().to(memory_format=memory).requires_grad_()
    y = conditioned_conv2d(x, condition, weight)
    grads = torch.autograd.grad(y.square().sum(), [x, weight])
    assert all(t.is_contiguous(memory_format=memory) for t in (y, *grads))


@needs_kernels
def test_the_kernels_run_in_both_directions():
    layer = ConditioningAugmentation(12, 7)
    x, _, weight, bias = problem(2, 4, 7, 9, (4, 4))

    def step():
        out = layer(torch.randn(2, 12))
        (conditioned_conv2d(x, out.condition, weight, bias=bias).sum() + out.kl).backward()

    augment = {"conditioning_augmentation", "conditioning_augmentation_backward"}
    assert called(step) == {"condition_taps", "add_taps", "tap_sums"} | augment


@needs_kernels
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_of_the_ops_around_the_image(channels_last):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    for dtype in (torch.float32, *HALF):
        x, condition, weight, _ = (t.detach() for t in problem(2, 4, 6, 9, (5, 4), dtype, channels_last))
        of_condition = weight.contiguous(memory_format=memory)[:, 4:]
        torch.library.opcheck(torch.ops.perfvl.condition_taps.default, (condition, of_condition))
        for grad in (x, x[..., ::2], torch.ones((), dtype=dtype).expand(2, 4, 5, 4)):
            torch.library.opcheck(torch.ops.perfvl.tap_sums.default, (grad,))


@needs_kernels
@pytest.mark.parametrize("given", [(True,) * 4, (True, False, False, False), (False, True, False, True)])
def test_opcheck_of_the_augmentation_s_backward(given):
    for code in range(4):
        mu, logvar, eps = torch.randn(3, 2, 5).relu()
        upstream = [torch.randn(2, 5), torch.randn(2, 10)[:, ::2], torch.randn(5, 2).t(), torch.tensor(0.5)]
        upstream = [g if present else None for g, present in zip(upstream, given, strict=True)]
        arguments = *upstream, mu, logvar, eps, torch.randn(2, 20) if code == 3 else None, code
        torch.library.opcheck(torch.ops.perfvl.conditioning_augmentation_backward.default, arguments)


def test_two_conditions_share_one_image_convolution():
    x, condition, weight, _ = (t.detach() for t in problem(4, 8, 6, 10, (4, 4)))
    image = F.conv2d(x, weight[:, :8], padding=1)
    shifted = add_condition(image[:-1], condition[1:], weight[:, 8:])
    assert torch.allclose(shifted, conditioned_conv2d(x[:-1], condition[1:], weight), atol=1e-5)


@needs_kernels
class TestTheChoiceOnTheCpu:
    """Of the concatenation, where it is faster."""

    @pytest.fixture(autouse=True)
    def _as_released(self, monkeypatch):
        monkeypatch.setattr(conditioning, "_is_faster", _is_faster)

    @staticmethod
    def runs_kernels(n, c, e, o, size, dtype):
        tensors = [t.detach() for t in problem(n, c, e, o, (size, size), dtype)]
        return "add_taps" in called(lambda: conditioned_conv2d(*tensors[:3]))

    def test_many_pixels_for_their_weights(self):
        assert self.runs_kernels(16, 64, 128, 64, 8, torch.float32)
        assert self.runs_kernels(4, 32, 128, 32, 32, torch.bfloat16)

    def test_few_pixels_for_their_weights(self):
        for dtype in (torch.float32, *HALF):
            assert not self.runs_kernels(1, 512, 128, 256, 4, dtype)

    def test_little_to_compute(self):
        for dtype in (torch.float32, *HALF):
            assert not self.runs_kernels(16, 8, 16, 8, 8, dtype)

    def test_autocast_decides_by_the_dtype_it_computes_in(self):
        assert self.runs_kernels(16, 64, 128, 64, 4, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not self.runs_kernels(16, 64, 128, 64, 4, torch.float32)

    def test_both_give_the_same(self, monkeypatch):
        tensors = problem(2, 4, 6, 9, (4, 4))

        def run():
            y = conditioned_conv2d(*tensors[:3], bias=tensors[3])
            return y, *torch.autograd.grad(y.square().sum(), tensors)

        concatenated = run()
        monkeypatch.setattr(conditioning, "_is_faster", lambda *_: True)
        for ours, theirs in zip(run(), concatenated, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("mu", "logvar", "kl"), [(0, 0, 0.0), (1, 0, 0.5), (0, 1, 0.35914091422952255)])
def test_divergence_of_known_distributions(mu, logvar, kl, dtype):
    text, weight, eps = torch.zeros(3, 2, dtype=dtype), torch.zeros(8, 2, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    bias = torch.tensor([float(mu)] * 4 + [float(logvar)] * 4, dtype=dtype)
    out = conditioning_augmentation(text, weight, bias, eps, activation="none")
    assert out.kl.dtype == torch.float32
    assert out.kl.item() == pytest.approx(kl, abs=5e-7)


def test_condition_of_known_noise():
    """logvar 2 log 3: three times the noise."""
    bias = torch.tensor([2.0, -1.0, 2.1972246, 0.0])
    out = conditioning_augmentation(
        torch.zeros(1, 2), torch.zeros(4, 2), bias, torch.tensor([[0.5, 4.0]]), activation="none"
    )
    torch.testing.assert_close(out.condition, torch.tensor([[3.5, 3.0]]))


def test_divergence_stays_wide_under_autocast():
    layer, text = ConditioningAugmentation(32, 8), torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(text)
    assert [t.dtype for t in out] == [torch.bfloat16] * 3 + [torch.float32]


def test_parameters_have_the_published_names():
    assert sorted(ConditioningAugmentation(32, 8).state_dict()) == ["fc.bias", "fc.weight"]


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="`activation` got 'gelu', expected one of none, relu, leaky_relu, glu"):
        ConditioningAugmentation(32, 8, activation="gelu")


def test_noise_from_outside_is_used():
    layer, text = ConditioningAugmentation(32, 8), torch.randn(4, 32)
    quiet = layer(text, torch.zeros(4, 8))
    assert torch.equal(quiet.condition, quiet.mu)
    assert not torch.equal(layer(text).condition, quiet.mu)


def test_the_reference_runs_without_kernels():
    x, condition, weight, _ = (t.detach() for t in problem(2, 4, 6, 9, (4, 4)))
    with perfvl.use_backend("reference"):
        assert called(lambda: conditioned_conv2d(x, condition, weight)) == set()
        assert called(lambda: ConditioningAugmentation(12, 7)(torch.randn(2, 12))) == set()
