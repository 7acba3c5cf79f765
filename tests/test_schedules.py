"""Forget rates and learning rates: known answers, ends, resuming, bad input."""

from __future__ import annotations

import doctest
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

import perfvl.schedules
from perfvl.schedules import (
    co_teaching_plus_rate,
    forget_rate,
    linear,
    linear_cosine,
    linear_decay,
    polynomial,
    square,
    square_root,
    step,
)

DATA = Path(__file__).parent / "data"
KNOWN = json.loads((DATA / "small_loss_around.json").read_text())["schedules"]
RATES = json.loads((DATA / "learning_rates.json").read_text())


@pytest.mark.parametrize("rate", [0.2, 0.45, 0.5])
@pytest.mark.parametrize(
    ("rule", "mode", "count"),
    [
        ("reference_epoch1to10", "reference", int),
        ("paper_trunc_epoch1to10", "paper", int),
        ("paper_ceil_epoch1to10", "paper", math.ceil),
    ],
)
def test_rows_kept_of_a_batch_are_the_published_ones(rate, rule, mode, count):
    kept = [
        count((1 - forget_rate(epoch, rate, gradual=KNOWN["E_k"], mode=mode)) * KNOWN["batch"])
        for epoch in range(1, 11)
    ]
    assert kept == KNOWN["keep_counts"][f"tau_{rate}"][rule]


@pytest.mark.parametrize("gradual", [1, 2, 5, 10, 15, 37])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.3, 0.45, 0.8, 1.0])
def test_reference_mode_is_numpys_linspace_to_the_last_bit(rate, exponent, gradual):
    expected = np.full(60, rate)
    expected[:gradual] = np.linspace(0, rate**exponent, gradual)
    assert [forget_rate(e, rate, gradual=gradual, exponent=exponent, mode="reference") for e in range(60)] == list(
        expected
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_paper_mode_rises_from_zero_to_the_rate_and_stays(exponent):
    rates = [forget_rate(epoch, 0.4, gradual=9, exponent=exponent) for epoch in range(200)]
    assert rates[0] == 0.0
    assert rates[-1] == 0.4
    assert rates == sorted(rates)
    reached = rates.index(0.4)
    assert reached == math.ceil(9 ** (1 / exponent))
    assert rates[1] == pytest.approx(0.4 / 9)
    assert rates[2] == pytest.approx(0.4 * 2**exponent / 9)


def test_co_teaching_plus_rate_doubles_until_the_last_epoch():
    known = KNOWN["variant2"]
    for epoch, value in known["values"].items():
        rate = co_teaching_plus_rate(int(epoch), known["tau"], gradual=known["E_k"], epochs=known["E_max"])
        assert rate == pytest.approx(value, abs=1e-15)


def test_co_teaching_plus_rate_stays_in_the_unit_interval():
    assert co_teaching_plus_rate(200, 0.8) == 1.0
    assert co_teaching_plus_rate(1000, 0.5) == 1.0
    assert co_teaching_plus_rate(0, 0.5, gradual=10, epochs=12) == 0.0


def test_variant_one_of_co_teaching_plus_is_the_plain_rise():
    for epoch in range(30):
        assert co_teaching_plus_rate(epoch, 0.45, gradual=7, variant=1) == forget_rate(epoch, 0.45, gradual=7)


def test_the_learning_rate_falls_linearly_to_zero():
    known = KNOWN["lr"]
    for epoch, value in known["values"].items():
        assert known["lr0"] * linear_decay(int(epoch), start=known["start"]) == pytest.approx(value, rel=1e-6)
    assert linear_decay(0) == 1.0
    assert linear_decay(250) == 0.0
    assert linear_decay(150, start=100) == 0.5


def sgd(rate: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def rate_at(schedule, iteration: int, base: float) -> float:
    """The learning rate after this many iterations, without running them."""
    optimizer = sgd(base)
    optimizer.param_groups[0]["initial_lr"] = base
    return schedule(optimizer, last_iteration=iteration - 1).get_last_lr()[0]


@pytest.mark.parametrize("name", ["step", "linear", "sqrt", "square"])
def test_learning_rates_of_the_study_are_the_published_ones(name):
    schedule = {"step": step, "linear": linear, "sqrt": square_root, "square": square}[name]
    for iteration, rate in RATES[name].items():
        assert rate_at(schedule, int(iteration), RATES["base_lr"]) == pytest.approx(rate, rel=1e-9, abs=0)


def test_the_exponential_schedule_of_the_study_is_one_of_short_steps():
    for iteration, rate in RATES["exp_160k"]["values"].items():
        found = rate_at(lambda o, **k: step(o, 2000, 0.915, **k), int(iteration), 0.035)
        assert found == pytest.approx(rate, rel=1e-4)


def test_the_docstrings_have_the_published_accuracies():
    published = {name: f"{row['accuracy']:.3f}"[1:] for name, row in RATES["published"].items()}
    assert published["step_100k"] in step.__doc__
    assert published["exp_160k"] in step.__doc__
    assert published["linear"] in linear.__doc__
    assert published["linear_160k"] in linear.__doc__
    assert published["square"] in square.__doc__
    assert published["sqrt"] in square_root.__doc__


def run(scheduler: LRScheduler, iterations: int) -> list[float]:
    rates = []
    for _ in range(iterations):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_linear_cosine_is_bellos():
    def expected(i: int, total: int, periods: float, alpha: float, beta: float) -> float:
        i = min(i, total)
        return (alpha + (total - i) / total) * 0.5 * (1 + math.cos(math.pi * 2 * periods * i / total)) + beta

    for options in ((0.5, 0.0, 0.001), (2.5, 0.1, 0.0)):
        periods, alpha, beta = options
        scheduler = linear_cosine(sgd(0.3), 7, periods=periods, alpha=alpha, beta=beta)
        assert run(scheduler, 10) == pytest.approx([0.3 * expected(i, 7, *options) for i in range(10)])
    assert run(linear_cosine(sgd(), 7), 9)[-1] == pytest.approx(0.001)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_polynomials_end_on_zero_and_stay(power):
    rates = run(polynomial(sgd(), power, 5), 9)
    assert rates[0] == 1.0
    assert rates[5:] == [0.0] * 4
    assert rates[:5] == pytest.approx([(1 - i / 5) ** power for i in range(5)])


def test_every_parameter_group_keeps_its_own_learning_rate():
    weight, bias = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [weight]}, {"params": [bias], "lr": 0.02}], lr=0.01)
    scheduler = linear(optimizer, 4)
    run(scheduler, 1)
    assert scheduler.get_last_lr() == pytest.approx([0.0075, 0.015])


SCHEDULES = {
    "step": lambda optimizer, **k: step(optimizer, 3, 0.5, **k),
    "polynomial": lambda optimizer, **k: polynomial(optimizer, 1.5, 9, **k),
    "linear_cosine": lambda optimizer, **k: linear_cosine(optimizer, 9, alpha=0.1, **k),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_resumes_from_its_state(name):
    rates = run(SCHEDULES[name](sgd()), 9)
    first = SCHEDULES[name](sgd())
    run(first, 4)
    file = io.BytesIO()
    torch.save({"optimizer": first.optimizer.state_dict(), "scheduler": first.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    others = {"step": step, "polynomial": polynomial, "linear_cosine": linear_cosine}
    second = others[name](sgd())  # other numbers: those of the state count
    second.optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["scheduler"])
    assert run(second, 5) == rates[4:]
    third = SCHEDULES[name](first.optimizer, last_iteration=5)
    assert run(third, 3) == rates[6:]


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: step(torch.zeros(1)), TypeError, "optimizer"),
        (lambda: step(sgd(), 0), ValueError, "step_size"),
        (lambda: step(sgd(), 1.5), TypeError, "step_size"),
        (lambda: step(sgd(), 1, 0), ValueError, "factor"),
        (lambda: step(sgd(), 1, 1.5), ValueError, "factor"),
        (lambda: step(sgd(), last_iteration=-2), ValueError, "last_iteration"),
        (lambda: polynomial([], 1), TypeError, "optimizer"),
        (lambda: polynomial(sgd(), 0), ValueError, "power"),
        (lambda: polynomial(sgd(), math.inf), ValueError, "power"),
        (lambda: polynomial(sgd(), "1"), TypeError, "power"),
        (lambda: linear(sgd(), 0), ValueError, "iterations"),
        (lambda: square(sgd(), 0.5), TypeError, "iterations"),
        (lambda: square_root(sgd(), True), TypeError, "iterations"),
        (lambda: linear_cosine(None), TypeError, "optimizer"),
        (lambda: linear_cosine(sgd(), 0), ValueError, "iterations"),
        (lambda: linear_cosine(sgd(), periods=-1), ValueError, "periods"),
        (lambda: linear_cosine(sgd(), alpha=math.nan), ValueError, "alpha"),
        (lambda: linear_cosine(sgd(), beta=math.inf), ValueError, "beta"),
    ],
)
def test_learning_rates_name_what_they_do_not_take(call, error, argument):
    with pytest.raises(error, match=f"`{argument}` got .*, expected"):
        call()


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: forget_rate(-1, 0.5), ValueError, "epoch"),
        (lambda: forget_rate(1.0, 0.5), TypeError, "epoch"),
        (lambda: forget_rate(1, 1.5), ValueError, "rate"),
        (lambda: forget_rate(1, math.nan), ValueError, "rate"),
        (lambda: forget_rate(1, "0.5"), TypeError, "rate"),
        (lambda: forget_rate(1, 0.5, gradual=0), ValueError, "gradual"),
        (lambda: forget_rate(1, 0.5, exponent=0), ValueError, "exponent"),
        (lambda: forget_rate(1, 0.5, mode="code"), ValueError, "mode"),
        (lambda: co_teaching_plus_rate(1, -0.5), ValueError, "rate"),
        (lambda: co_teaching_plus_rate(1, 0.5, epochs=10), ValueError, "epochs"),
        (lambda: co_teaching_plus_rate(1, 0.5, variant=3), ValueError, "variant"),
        (lambda: linear_decay(True), TypeError, "epoch"),
        (lambda: linear_decay(1, start=-1), ValueError, "start"),
        (lambda: linear_decay(1, start=200), ValueError, "epochs"),
    ],
)
def test_schedules_name_what_they_do_not_take(call, error, argument):
    with pytest.raises(error, match=f"`{argument}` got .*, expected"):
        call()


def test_docstring_examples_run():
    result = doctest.testmod(perfvl.schedules)
    assert result.attempted > 0
    assert result.failed == 0
