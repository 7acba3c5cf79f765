"""What is special to small-loss selection and the losses of two networks: known answers, invariants, odd numbers."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import perfvl
import perfvl.functional as pf
from perfvl import backends
from perfvl.nn import CoTeachingLoss, CoTeachingPlusLoss, DecouplingLoss, JoCoRLoss

KNOWN = json.loads((Path(__file__).parent / "data" / "small_loss.json").read_text())
ISA_LEVELS = [] if backends.CPU_MISSING else list(torch.ops.perfvl._isa_levels())
LOSSES: dict[str, Any] = {
    "decoupling": pf.decoupling_loss,
    "co_teaching": functools.partial(pf.co_teaching_loss, forget_rate=0.3),
    "co_teaching_plus": functools.partial(pf.co_teaching_plus_loss, forget_rate=0.3),
    "jocor": functools.partial(pf.jocor_loss, forget_rate=0.3, co_lambda=0.6),
}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def batch(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits1, logits2 = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    return logits1, logits2, torch.randint(shape[-1], shape[:-1], generator=generator)


def gradients(out: pf.TwinLoss, logits1: Tensor, logits2: Tensor) -> tuple[Tensor, ...]:
    total = out.loss1.sum() + (0 if out.loss2 is out.loss1 else out.loss2.sum())
    return torch.autograd.grad(total, [logits1, logits2])


def known_inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    i, j = torch.arange(8.0, dtype=torch.float64)[:, None], torch.arange(3.0, dtype=torch.float64)
    logits1, logits2, labels = 2 * torch.sin(1 + 3 * i + j), 2 * torch.cos(2 + 3 * i + 1.5 * j), torch.arange(8) % 3
    change = case["args"].get("Y2")
    if case["op"] == "decoupling" and "Y1" in case["args"]:  # two classes
        logits1, logits2, labels = logits1[:, :2], logits2[:, :2], torch.tensor([0, 0, 0, 1, 0, 1, 0, 0])
        if "tiled" in change:  # of 32 rows the networks disagree on the first alone
            logits1, labels = logits1.repeat(4, 1), labels.repeat(4)
            logits2 = torch.cat([logits2[:1], logits1[1:]])
    elif change == ":= Y1":
        logits2 = logits1.clone()
    elif change is not None:
        logits2 = torch.cat([logits1[:4], logits2[4:]])
    return logits1, logits2, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", KNOWN["cases"], ids=lambda case: case["name"])
def test_known_answers(case, dtype):
    arguments, name = case["args"], case["op"].replace("coteaching", "co_teaching")
    logits1, logits2, labels = known_inputs(case)
    logits1, logits2 = (z.to(dtype).clone().requires_grad_() for z in (logits1, logits2))
    for mode in ("paper", "reference"):
        if mode not in case["mode"]:
            continue
        options = {k: arguments[k] for k in ("forget_rate", "co_lambda", "step") if k in arguments}
        if name == "decoupling":
            options["min_batch_fraction"] = arguments.get("min_batch_size", 0.1)
        if name == "co_teaching_plus" and mode == "reference":
            options["sample_ids"] = torch.arange(8) + (0 if "contains" in arguments["index"] else 1)
        out = getattr(pf, f"{name}_loss")(logits1, logits2, labels, mode=mode, **options)
        grads = gradients(out, logits1, logits2)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-9}
        for network in (1, 2):
            found = getattr(out, f"loss{network}").item()
            assert found == pytest.approx(case[f"L{network}"], rel=tolerance["rtol"], abs=tolerance["atol"])
            assert getattr(out, f"kept{network}").nonzero()[:, 0].tolist() == case[f"rows_with_grad{network}"]
            if f"dY{network}" in case:
                expected = torch.tensor(case[f"dY{network}"], dtype=dtype)
                torch.testing.assert_close(grads[network - 1], expected, **tolerance)


def test_label_precision_is_that_of_the_rows_that_train_a_network():
    clean = torch.tensor([(i + 1) % 4 != 0 for i in range(8)])
    for case in KNOWN["cases"]:
        if not case["name"].startswith("coteaching_") or "index0" in case["name"] or "label_precision1" not in case:
            continue
        logits1, logits2, labels = known_inputs(case)
        name = "co_teaching_plus_loss" if "plus" in case["name"] else "co_teaching_loss"
        out = getattr(pf, name)(logits1, logits2, labels, case["args"]["forget_rate"], mode=case["mode"])
        # The published figure of a network is that of its own choice, which trains the other.
        second, first = (p.item() for p in out.label_precision(clean))
        assert (first, second) == pytest.approx((case["label_precision1"], case["label_precision2"]))


def test_ranking_by_probabilities_differs_from_ranking_by_logits():
    known = KNOWN["double_softmax"]
    logits, labels = torch.tensor(known["logits"]), torch.tensor(known["t"])
    for losses, rows in (
        (known["ce_logits"], known["two_smallest_logits"]),
        (known["ce_of_probabilities"], known["two_smallest_probabilities"]),
    ):
        assert pf.small_loss_mask(torch.tensor(losses), 0.5).nonzero()[:, 0].tolist() == rows
    other = logits.roll(1, 1)  # disagrees everywhere
    out = pf.co_teaching_plus_loss(logits, other, labels, 0.5, mode="reference")
    assert out.kept2.nonzero()[:, 0].tolist() == known["two_smallest_probabilities"]
    assert pf.co_teaching_plus_loss(logits, other, labels, 0.5).kept2.nonzero()[:, 0].tolist() == [1, 2]


def test_the_count_is_pythons():
    for rate, n, expected, _ in KNOWN["keep_count"]["hazards"]:
        losses = torch.rand(n)
        for keep in (1 - rate, torch.tensor(1 - rate, dtype=torch.float64)):
            assert int(pf.small_loss_mask(losses, keep).sum()) == expected, (rate, n)
        labels = torch.zeros(n, dtype=torch.int64)
        out = pf.co_teaching_loss(torch.randn(n, 2), torch.randn(n, 2), labels, rate)
        assert int(out.kept1.sum()) == max(expected, 1)


def test_ties_go_to_the_lower_row_and_nan_comes_last():
    known = KNOWN["ties"]
    losses = torch.tensor([float(x) for x in known["losses"]])
    for k in range(7):
        kept = pf.small_loss_mask(losses, k / 6 + 1e-9 if k < 6 else 1.0)
        assert sorted(known["order"][:k]) == kept.nonzero()[:, 0].tolist()


@pytest.mark.skipif(not ISA_LEVELS, reason="no CPU kernels here")
@EVERY_LOSS
@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_every_isa_level_and_thread_count_chooses_the_same_rows_to_the_bit(loss, mode):
    threads = torch.get_num_threads()
    shapes = [(128, 10), (3, 33, 100), (700, 37), (6000, 3)]
    try:
        for seed, shape in enumerate(shapes):
            logits1, logits2, labels = batch(*shape, seed=seed)
            with torch.no_grad():
                logits1[..., 1::3, :] = logits1[..., :1, :]  # many ties, where labels agree too
                logits1[..., 2, 0], logits2[..., 3, 0], logits2[..., 4, 1] = torch.nan, torch.inf, -torch.inf
            results = []
            for level in ISA_LEVELS:
                torch.ops.perfvl._set_isa(level)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(loss(logits1, logits2, labels, mode=mode))
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.ops.perfvl._set_isa(ISA_LEVELS[0])
        torch.set_num_threads(threads)


@EVERY_LOSS
def test_permuting_rows_permutes_choice_and_gradients(loss):
    logits1, logits2, labels = batch(60, 8)
    order = torch.randperm(60)
    out = loss(logits1, logits2, labels)
    mixed1, mixed2 = (z.detach()[order].requires_grad_() for z in (logits1, logits2))
    mixed = loss(mixed1, mixed2, labels[order])
    assert torch.equal(mixed.kept1, out.kept1[order])
    assert torch.equal(mixed.kept2, out.kept2[order])
    for ours, theirs in zip(gradients(mixed, mixed1, mixed2), gradients(out, logits1, logits2), strict=True):
        assert torch.equal(ours, theirs[order])


@EVERY_LOSS
def test_swapping_the_networks_swaps_the_results(loss):
    logits1, logits2, labels = batch(2, 60, 8)
    out, swapped = loss(logits1, logits2, labels), loss(logits2, logits1, labels)
    torch.testing.assert_close((swapped.loss2, swapped.loss1), (out.loss1, out.loss2))
    assert torch.equal(swapped.kept2, out.kept1)
    assert torch.equal(swapped.kept1, out.kept2)


@EVERY_LOSS
def test_a_constant_added_to_a_row_changes_nothing(loss):
    logits1, logits2, labels = batch(60, 8)
    shift = torch.linspace(-30, 30, 60)[:, None]
    out, shifted = loss(logits1, logits2, labels), loss(logits1 + shift, logits2 - shift, labels)
    assert torch.equal(shifted.kept1, out.kept1)
    torch.testing.assert_close(shifted.loss1, out.loss1, rtol=1e-5, atol=1e-5)


@EVERY_LOSS
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rejected_rows_get_a_gradient_of_exactly_zero_whatever_they_hold(loss, backend):
    logits1, logits2, labels = batch(40, 6)
    with torch.no_grad():
        for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            logits1[row] = logits2[row] = value
    with perfvl.use_backend(backend):
        out = loss(logits1, logits2, labels)
        grads = gradients(out, logits1, logits2)
    assert not out.kept1[:3].any()
    for kept, grad in zip((out.kept1, out.kept2), grads, strict=True):
        assert (grad[~kept] == 0).all()
        assert grad[kept].isfinite().all()
        assert (grad[kept].abs().sum(1) > 0).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_jocor_with_a_class_that_one_network_rules_out_is_infinitely_far(backend):
    logits1, logits2, labels = batch(10, 4)
    with torch.no_grad():
        logits1[4, (labels[4] + 1) % 4] = -torch.inf
        logits1[5, (labels[5] + 1) % 4] = logits2[5, (labels[5] + 1) % 4] = -torch.inf
    with perfvl.use_backend(backend):
        everything = pf.jocor_loss(logits1, logits2, labels, 0.0, co_lambda=0.5)
        out = pf.jocor_loss(logits1, logits2, labels, 0.1, co_lambda=0.5)
    assert everything.loss1 == torch.inf
    assert (~out.kept1).nonzero().tolist() == [[4]]
    assert out.loss1.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(out, logits1, logits2))


def test_nan_is_kept_only_where_it_must_be():
    logits1, logits2, labels = batch(10, 4)
    with torch.no_grad():
        logits1[4] = torch.nan
        logits2[7] = torch.nan
    out = pf.co_teaching_loss(logits1, logits2, labels, 0.1)
    assert (~out.kept2).nonzero().tolist() == [[4]]
    assert (~out.kept1).nonzero().tolist() == [[7]]
    assert out.loss1.isnan()  # row 4 is network 2's choice
    assert pf.co_teaching_loss(logits1, logits2, labels, 0.0).kept1.all()


def test_each_loss_has_a_graph_of_its_own():
    first, second = (torch.nn.Linear(6, 4) for _ in range(2))
    x, labels = torch.randn(20, 6), torch.randint(4, (20,))
    wanted = []
    for together in (True, False):
        out = pf.co_teaching_loss(first(x), second(x), labels, 0.2)
        for network in (first, second):
            network.zero_grad()
        if together:
            (out.loss1 + out.loss2).backward()
        else:
            out.loss2.backward()
            assert first.weight.grad is None
            out.loss1.backward()
        wanted.append((first.weight.grad, second.weight.grad))
    assert torch.equal(wanted[0][0], wanted[1][0])
    assert torch.equal(wanted[0][1], wanted[1][1])


def test_jocor_is_one_loss_for_both_networks():
    first, second = (torch.nn.Linear(6, 4) for _ in range(2))
    x, labels = torch.randn(20, 6), torch.randint(4, (20,))
    out = pf.jocor_loss(first(x), second(x), labels, 0.2, co_lambda=0.5)
    assert out.loss1 is out.loss2
    out.loss2.backward()
    assert first.weight.grad.norm() > 0
    assert second.weight.grad.norm() > 0


def test_a_forget_rate_of_zero_is_plain_cross_entropy():
    logits1, logits2, labels = batch(50, 7)
    out = pf.co_teaching_loss(logits1, logits2, labels, 0.0)
    torch.testing.assert_close(out.loss1, F.cross_entropy(logits1, labels))
    torch.testing.assert_close(out.loss2, F.cross_entropy(logits2, labels))
    joint = pf.jocor_loss(logits1, logits2, labels, 0.0, co_lambda=0.0)
    torch.testing.assert_close(joint.loss1, out.loss1 + out.loss2)
    agreement = pf.jocor_loss(logits1, logits1.detach().clone(), labels, 0.3, co_lambda=1.0)
    assert agreement.loss1.abs() < 1e-6


def test_everything_forgotten_is_nothing_learnt():
    logits1, logits2, labels = batch(50, 7)
    for loss in (pf.co_teaching_loss, functools.partial(pf.jocor_loss, co_lambda=0.5)):
        out = loss(logits1, logits2, labels, 1.0)
        assert not out.kept1.any()
        assert out.loss1.item() == 0
        assert all((grad == 0).all() for grad in gradients(out, logits1, logits2))
        almost = loss(logits1, logits2, labels, 0.9999)
        assert int(almost.kept1.sum()) == 1
    assert math.isnan(pf.jocor_loss(logits1, logits2, labels, 1.0, co_lambda=0.5, mode="reference").loss1)
    assert pf.co_teaching_loss(logits1, logits2, labels, 1.0, mode="reference").kept1.all()


def test_the_released_code_divides_once_more_by_k():
    logits1, logits2, labels = batch(50, 7)
    paper = pf.co_teaching_loss(logits1, logits2, labels, 0.3)
    released = pf.co_teaching_loss(logits1, logits2, labels, 0.3, mode="reference")
    torch.testing.assert_close(released.loss1 * 35, paper.loss1)


def test_where_all_disagree_co_teaching_plus_is_co_teaching():
    logits1, _, labels = batch(40, 6)
    logits2 = (logits1.detach().roll(1, 1)).requires_grad_()
    plus, plain = (f(logits1, logits2, labels, 0.3) for f in (pf.co_teaching_plus_loss, pf.co_teaching_loss))
    for a, b in zip(plus, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", [pf.decoupling_loss, LOSSES["co_teaching_plus"]], ids=["decoupling", "plus"])
def test_no_rows_and_no_disagreement_give_zero_with_a_graph(loss):
    logits1, logits2, labels = batch(4, 0, 6)
    out = loss(logits1, logits2, labels)
    assert out.loss1.tolist() == [0.0] * 4
    assert gradients(out, logits1, logits2)[0].shape == (4, 0, 6)
    logits1, _, labels = batch(20, 6)
    twin = logits1.detach().clone().requires_grad_()
    out = loss(logits1, twin, labels)
    assert (out.loss1.item(), int(out.kept1.sum())) == (0.0, 0)
    assert all((grad == 0).all() for grad in gradients(out, logits1, twin))
    with pytest.raises(ValueError, match="expected at least one row"):
        loss(*batch(0, 6), mode="reference")


@EVERY_LOSS
def test_many_batches_at_once_are_each_on_their_own(loss):
    logits1, logits2, labels = batch(5, 3, 64, 9)
    out = loss(logits1, logits2, labels)
    grads = gradients(out, logits1, logits2)
    for at in [(0, 0), (2, 1), (4, 2)]:
        one1, one2 = (z.detach()[at].requires_grad_() for z in (logits1, logits2))
        one = loss(one1, one2, labels[at])
        assert torch.equal(one.kept1, out.kept1[at])
        torch.testing.assert_close(one.loss1, out.loss1[at])
        for ours, theirs in zip(gradients(one, one1, one2), grads, strict=True):
            torch.testing.assert_close(ours, theirs[at])


def test_a_forget_rate_on_the_device_gives_the_same_as_a_number():
    logits1, logits2, labels = batch(3, 50, 9)
    rates = [0.0, 0.25, 0.7]
    together = pf.co_teaching_loss(logits1, logits2, labels, torch.tensor(rates, dtype=torch.float64))
    for group, rate in enumerate(rates):
        alone = pf.co_teaching_loss(logits1[group], logits2[group], labels[group], rate)
        assert torch.equal(alone.kept1, together.kept1[group])
        torch.testing.assert_close(alone.loss1, together.loss1[group])
    for wild in (-1.0, 2.0, math.nan):  # not checked on the device, but never out of bounds
        out = pf.co_teaching_loss(logits1, logits2, labels, torch.tensor(wild))
        assert int(out.kept1.sum()) == (150 if wild == -1.0 else 0)


def test_large_batches_are_selected_exactly():
    generator = torch.Generator().manual_seed(0)
    for losses in (
        torch.randn(70_001, generator=generator),
        torch.randint(50, (70_001,), generator=generator).float(),
        torch.full((70_001,), 0.25),
        torch.rand(70_001, generator=generator) * 1e-3 + 1.0,
    ):
        order = losses.argsort(stable=True)
        for k in (1, 35_000, 70_000):
            expected = torch.zeros(70_001, dtype=torch.bool).index_fill(0, order[:k], True)
            assert torch.equal(pf.small_loss_mask(losses, k / 70_001 + 1e-9), expected)


def test_choosing_is_not_differentiated():
    losses = torch.rand(20, requires_grad=True)
    assert not pf.small_loss_mask(losses, 0.5).requires_grad


def test_modules_take_the_forget_rate_of_the_call_or_their_own():
    logits1, logits2, labels = batch(50, 7)
    expected = pf.co_teaching_loss(logits1, logits2, labels, 0.4)
    for found in (
        CoTeachingLoss(0.4)(logits1, logits2, labels),
        CoTeachingLoss()(logits1, logits2, labels, 0.4),
        CoTeachingLoss(0.1)(logits1, logits2, labels, 0.4),
        CoTeachingLoss(torch.tensor(0.4, dtype=torch.float64)).half()(logits1, logits2, labels),
    ):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(TypeError, match="CoTeachingPlusLoss: `forget_rate` got None, expected one from the call"):
        CoTeachingPlusLoss()(logits1, logits2, labels)
    for make in (DecouplingLoss, CoTeachingLoss, CoTeachingPlusLoss, functools.partial(JoCoRLoss, 0.5)):
        with pytest.raises(ValueError, match="`mode` got 'code', expected"):
            make(mode="code")


def test_a_module_in_a_checkpoint_leaves_nothing_behind():
    assert CoTeachingLoss(torch.tensor(0.2)).state_dict() == {}
    assert JoCoRLoss(0.9, 0.2).state_dict() == {}
