"""Forget rates and learning-rate factors of noisy-label training: known answers, ends, bad input."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest

import perfvl.schedules
from perfvl.schedules import co_teaching_plus_rate, forget_rate, linear_decay

KNOWN = json.loads((Path(__file__).parent / "data" / "small_loss_around.json").read_text())["schedules"]


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
