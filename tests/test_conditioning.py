"""Convolutions that see a text condition, and the condition drawn from the text: the spec's identities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from perfvl.functional import conditioned_conv2d
from perfvl.nn import ConditioningAugmentation
from perfvl.ops import conditioning
from perfvl.ops.conditioning import add_condition, conditioning_augmentation
from perfvl.reference import conditioning as reference

DTYPES = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(conditioning, "_is_faster", lambda *_: True)


def problem(n, c, e, o, size, dtype=torch.float32, channels_last=False):
    x, condition = torch.randn(n, c, *size).to(dtype), torch.randn(n, e).to(dtype)
    weight = (torch.randn(o, c + e, 3, 3) / (9 * (c + e)) ** 0.5).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in (x, condition, weight, torch.randn(o).to(dtype))]


def run(function, tensors, upstream):
    x, condition, weight, bias = tensors
    y = function(x, condition, weight, bias)
    return y, *torch.autograd.grad(y, tensors, upstream)


def near(got, truth, tolerance):
    return (got.double() - truth).norm() <= tolerance * truth.norm().clamp_min(1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (16, 16), (1, 7), (5, 1), (3, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_repeat_and_concatenate(size, dtype, channels_last):
    tensors = problem(3, 5, 7, 18, size, dtype, channels_last)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    upstream = torch.randn(3, 18, *size).to(dtype)
    truth = run(reference.conditioned_conv, doubles, upstream.double())
    found = run(lambda x, c, w, b: conditioned_conv2d(x, c, w, bias=b), tensors, upstream)
    for got, exact, beside in zip(found, truth, (tensors[0], *tensors), strict=True):
        assert got.dtype == dtype
        assert near(got, exact, DTYPES[dtype])
        assert beside.dtype == dtype


def test_expanded_gradients_and_strided_conditions():
    x, _, weight, bias = problem(2, 4, 6, 9, (4, 4))
    wide = torch.randn(2, 12, requires_grad=True)
    y = conditioned_conv2d(x, wide[:, ::2], weight, bias=bias)
    exact = reference.conditioned_conv(*(t.detach().double() for t in (x, wide[:, ::2], weight, bias)))
    assert near(y, exact, 3e-6)
    (grad,) = torch.autograd.grad(y.sum(), wide)
    taps = conditioned_conv2d(torch.zeros(1, 4, 4, 4), torch.ones(1, 6), weight.detach())  # what a condition adds
    assert torch.allclose(grad[0, ::2].sum(), taps.sum(), rtol=1e-4)
    assert not grad[:, 1::2].any()


def test_no_concatenated_tensor_is_saved():
    tensors, saved = problem(2, 64, 32, 16, (8, 8)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        conditioned_conv2d(*tensors[:3], bias=tensors[3])
    assert torch.Size((2, 96, 8, 8)) not in saved
    assert torch.Size((2, 64, 8, 8)) in saved


def test_the_kernels_run_in_both_directions():
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    layer = ConditioningAugmentation(12, 7)
    x, _, weight, bias = problem(2, 4, 7, 9, (4, 4))
    with Calls():
        out = layer(torch.randn(2, 12))
        (conditioned_conv2d(x, out.condition, weight, bias=bias).sum() + out.kl).backward()
    ours = {name.removeprefix("perfvl::") for name in called if name.startswith("perfvl::")}
    augment = {"conditioning_augmentation", "conditioning_augmentation_backward"}
    assert ours == {"condition_taps", "add_taps", "tap_sums"} | augment


def test_two_conditions_share_one_image_convolution():
    x, condition, weight, _ = (t.detach() for t in problem(4, 8, 6, 10, (4, 4)))
    image = F.conv2d(x, weight[:, :8], padding=1)
    shifted = add_condition(image[:-1], condition[1:], weight[:, 8:])
    assert torch.allclose(shifted, conditioned_conv2d(x[:-1], condition[1:], weight), atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none", "glu"])
def test_augmentation_equals_its_definition(activation):
    parts = 4 if activation == "glu" else 2
    text, weight = torch.randn(5, 12, requires_grad=True), torch.randn(parts * 3, 12, requires_grad=True)
    bias, eps = torch.randn(parts * 3, requires_grad=True), torch.randn(5, 3)
    found = conditioning_augmentation(text, weight, bias, eps, activation=activation)
    doubles = [t.detach().double().requires_grad_() for t in (text, weight, bias)]
    exact = reference.augment(F.linear(*doubles), eps.double(), activation)
    upstream = [torch.randn_like(t) for t in found]
    for got, truth in zip(found, exact, strict=True):
        assert near(got, truth, 2e-6)
    grads = torch.autograd.grad(found, [text, weight, bias], upstream)
    truths = torch.autograd.grad(exact, doubles, [u.double() for u in upstream])
    for got, truth in zip(grads, truths, strict=True):
        assert near(got, truth, 5e-6)


@pytest.mark.parametrize(("mu", "logvar", "kl"), [(0, 0, 0.0), (1, 0, 0.5), (0, 1, 0.35914091422952255)])
def test_divergence_of_known_distributions(mu, logvar, kl):
    bias = torch.tensor([float(mu)] * 4 + [float(logvar)] * 4)
    out = conditioning_augmentation(torch.zeros(3, 2), torch.zeros(8, 2), bias, torch.zeros(3, 4), activation="none")
    assert out.kl.item() == pytest.approx(kl, abs=5e-7)


def test_augmentation_saves_no_projection():
    layer, saved = ConditioningAugmentation(32, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(torch.randn(4, 32))
    assert torch.Size((4, 16)) not in saved
    assert sorted(layer.state_dict()) == ["fc.bias", "fc.weight"]


def test_noise_from_outside_is_used():
    layer, text = ConditioningAugmentation(32, 8), torch.randn(4, 32)
    quiet = layer(text, torch.zeros(4, 8))
    assert torch.equal(quiet.condition, quiet.mu)
    assert not torch.equal(layer(text).condition, quiet.mu)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"condition": torch.randn(3, 6)}, ValueError, r"`condition` got shape \(3, 6\)"),
        ({"weight": torch.randn(9, 9, 3, 3)}, ValueError, r"`weight` got .* expected \(O, 10, 3, 3\)"),
        ({"bias": torch.randn(8)}, ValueError, r"`bias` got shape \(8,\)"),
        ({"input": torch.randn(2, 4, 4, 4).double()}, TypeError, "`condition` got torch.float32"),
        ({"input": 3}, TypeError, "`input` got int"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, condition, weight, bias = (t.detach() for t in problem(2, 4, 6, 9, (4, 4)))
    given = {"input": x, "condition": condition, "weight": weight, "bias": bias} | change
    with pytest.raises(error, match=message):
        conditioned_conv2d(**given)


def test_second_order_gradients_are_refused():
    tensors = problem(2, 4, 6, 9, (4, 4))
    y = conditioned_conv2d(*tensors[:3], bias=tensors[3])
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        grad.sum().backward()


@pytest.mark.skipif(not hasattr(torch.ops.perfvl, "_isa_levels"), reason="no native library")
def test_every_instruction_set_level():
    levels, best = torch.ops.perfvl._isa_levels(), torch.ops.perfvl._isa()
    x, condition, weight, bias = (t.detach() for t in problem(3, 5, 7, 37, (5, 6), channels_last=True))
    truth = reference.conditioned_conv(*(t.double() for t in (x, condition, weight, bias)))
    try:
        for level in levels:
            torch.ops.perfvl._set_isa(level)
            assert near(conditioned_conv2d(x, condition, weight, bias=bias), truth, 3e-6), level
    finally:
        torch.ops.perfvl._set_isa(best)
