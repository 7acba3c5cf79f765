"""What is special to the loss of several discriminator heads: known answers, odd logits, which heads get gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import perfvl
from perfvl import backends
from perfvl.ops.gan_loss import gan_loss

KNOWN = json.loads((Path(__file__).parent / "data" / "gan_loss.json").read_text())
ISA_LEVELS = ["reference"] if backends.CPU_MISSING else ["reference", *torch.ops.perfvl._isa_levels()]
MODES = ("stable", "exact")
NAN, INF = math.nan, math.inf


@pytest.fixture(params=ISA_LEVELS)
def _backend(request):
    """Everything by the definition, and by the kernels of every instruction-set level."""
    if request.param == "reference":
        with perfvl.use_backend("reference"):
            yield
        return
    before = torch.ops.perfvl._isa()
    torch.ops.perfvl._set_isa(request.param)
    yield
    torch.ops.perfvl._set_isa(before)


every_backend = pytest.mark.usefixtures("_backend")


def row_by_row(logits: list[float], target: float, mode: str) -> tuple[Tensor, Tensor]:
    """Losses and gradients of rows that are heads of their own."""
    x = torch.tensor(logits, requires_grad=True)
    losses = [gan_loss([x[i : i + 1]], [target], [1.0], mode=mode).total for i in range(len(x))]
    losses = torch.stack(losses)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), grad


def all_but(known: dict, *logits: float) -> Tensor:
    return torch.tensor([x not in logits for x in known["logits"]])


@every_backend
@pytest.mark.parametrize("known", [KNOWN["target0"], KNOWN["target1"]], ids=["target 0", "target 1"])
def test_exact_mode_has_the_numbers_of_a_sigmoid_and_a_criterion(known):
    losses, grad = row_by_row(known["logits"], known["target"], "exact")
    # Next to 16.6355 and -27.6 the last bit of the sigmoid decides.
    sure = all_but(known, 16.6, 16.7, -27.0, -28.0)
    torch.testing.assert_close(losses[sure], torch.tensor(known["exact_loss"])[sure], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[sure], torch.tensor(known["exact_grad"])[sure], rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize("known", [KNOWN["target0"], KNOWN["target1"]], ids=["target 0", "target 1"])
def test_stable_mode_has_the_numbers_of_float64(known):
    losses, grad = row_by_row(known["logits"], known["target"], "stable")
    x = torch.tensor(known["logits"], dtype=torch.float64).float().double()  # 16.6 as float32 has it
    sign = 1 - 2 * known["target"]
    # torch's own difference sigmoid(x) - y has an error of 6e-8 here, however small the gradient is.
    torch.testing.assert_close(grad, torch.tensor(known["stable_grad"]), rtol=0, atol=6e-8)
    torch.testing.assert_close(grad.double(), sign * torch.sigmoid(sign * x), rtol=1e-6, atol=1e-37)
    true = torch.tensor(known["stable_loss_fp64"], dtype=torch.float64)
    certain = true > 1e-6  # below, the recorded values are those of 1 - sigmoid(x)
    torch.testing.assert_close(losses.double()[certain], true[certain], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.double(), -F.logsigmoid(-sign * x), rtol=1e-6, atol=1e-37)


@every_backend
def test_exact_mode_has_no_gradient_left_where_the_probability_is_one():
    for target in (0.0, 1.0):
        _, grad = row_by_row([17.0, 25.0, 100.0], target, "exact")
        assert not grad.any()


@every_backend
@pytest.mark.parametrize("stage", ["D_stage1", "D_stage2"])
def test_weights_of_a_discriminator_step_sum_to_two(stage):
    weights = list(KNOWN["weights"][stage].values())
    out = gan_loss(
        [torch.zeros(5)] * len(weights), [float("real" in name) for name in KNOWN["weights"][stage]], weights
    )
    torch.testing.assert_close(out.total, torch.tensor(2 * math.log(2)))
    torch.testing.assert_close(out.heads, torch.full((len(weights),), math.log(2)))


@every_backend
@pytest.mark.parametrize("mode", MODES)
def test_infinite_logits_of_either_side(mode):
    clamped = 100.0 if mode == "exact" else INF
    for target, expected in ((0.0, [clamped, 0.0]), (1.0, [0.0, clamped])):
        losses, grad = row_by_row([INF, -INF], target, mode)
        assert losses.tolist() == expected
        assert grad.isfinite().all()
    losses, grad = row_by_row([INF, -INF], 0.25, mode)
    assert losses.tolist() == [75.0 if mode == "exact" else INF, 25.0 if mode == "exact" else INF]
    assert grad.tolist() == ([0.0, 0.0] if mode == "exact" else [0.75, -0.25])


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [0.0, 0.9, 1.0])
def test_a_logit_that_is_no_number_is_seen_in_its_head_and_gradient_alone(mode, target):
    x, y = torch.randn(40), torch.randn(40)
    x[33] = NAN
    x.requires_grad_()
    y.requires_grad_()
    out = gan_loss([x, y], [target, target], [1.0, 1.0], mode=mode)
    out.total.backward()
    assert out.heads.isnan().tolist() == [True, False]
    assert out.total.isnan()
    assert x.grad.isnan().nonzero().tolist() == [[33]]
    assert y.grad.isfinite().all()


@every_backend
def test_the_mean_of_no_rows_is_nan_as_in_torch():
    x, y = torch.zeros(0, requires_grad=True), torch.randn(3, requires_grad=True)
    out = gan_loss([x, y], [1.0, 0.0], [1.0, 0.5])
    out.total.backward()
    assert out.heads.isnan().tolist() == [True, False]
    assert out.total.isnan()
    assert x.grad.shape == (0,)
    torch.testing.assert_close(y.grad, 0.5 * y.detach().sigmoid() / 3)


@pytest.mark.parametrize("mode", MODES)
def test_heads_are_not_differentiable(mode):
    out = gan_loss([torch.randn(3, requires_grad=True)], [1.0], [1.0], mode=mode)
    assert out.total.requires_grad
    assert not out.heads.requires_grad


@pytest.mark.parametrize("count", [1, 5, 16, 17])
def test_any_number_of_heads(count):
    logits = [torch.randn(3 + k) for k in range(count)]
    targets, weights = [k / 16 for k in range(count)], [1.0 / (k + 1) for k in range(count)]
    x = [t.clone().requires_grad_() for t in logits]
    out = gan_loss(x, targets, weights)
    expected = [F.binary_cross_entropy_with_logits(t, torch.full_like(t, y)) for t, y in zip(x, targets, strict=True)]
    torch.testing.assert_close(out.heads, torch.stack(expected).detach())
    total = sum(w * loss for w, loss in zip(weights, expected, strict=True))
    for mine, right in zip(torch.autograd.grad(out.total, x), torch.autograd.grad(total, x), strict=True):
        torch.testing.assert_close(mine, right)


def test_one_tensor_may_be_several_heads():
    x = torch.randn(20, requires_grad=True)
    out = gan_loss([x, x[:10], x], [1.0, 0.0, 1.0], [1.0, 1.0, 0.5])
    (grad,) = torch.autograd.grad(out.total, x)
    p = x.detach().sigmoid()
    expected = 1.5 * (p - 1) / 20
    expected[:10] += p[:10] / 10
    torch.testing.assert_close(grad, expected)


def test_a_loss_scale_reaches_gradients_that_float16_could_not_hold():
    x = torch.full((64,), -10.0, dtype=torch.float16, requires_grad=True)
    (gan_loss([x], [0.0], [0.01]).total * 65536).backward()
    torch.testing.assert_close(x.grad.float(), torch.full((64,), 0.01 / 64 * 65536 * 4.5398e-5), rtol=1e-3, atol=0)


def test_weights_may_be_negative_or_zero():
    x = torch.randn(8, requires_grad=True)
    forth, back = (torch.autograd.grad(gan_loss([x], [1.0], [w]).total, x)[0] for w in (2.0, -2.0))
    assert torch.equal(forth, -back)
    (none,) = torch.autograd.grad(gan_loss([x], [1.0], [0.0]).total, x)
    assert not none.any()
