"""The benchmarks of CaffeNet128's steps: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import caffenet_step, registry
from perfvl.benchmarks.workload import Contender


@pytest.mark.parametrize("variant", caffenet_step.VARIANTS)
def test_every_contender_gives_the_answer(variant):
    rows = rows_of(caffenet_step.workload(variant, 8))
    check_rows(rows, set())
    assert set(rows) == {"perfvl", "perfvl, NCHW", "eager", "eager, NCHW"}


def test_the_compiled_step_gives_the_answer():
    problem = caffenet_step.workload("all", 2)
    inputs = problem.inputs(CPU, seed=0)
    found = problem.results(problem.contenders["torch.compile"].build(inputs), inputs)
    torch.testing.assert_close(found["losses"].double(), problem.truth(inputs)["losses"], rtol=5e-3, atol=0)


def test_a_step_that_learns_nothing_is_noticed():
    problem = caffenet_step.workload("base", 2)

    def build(inputs):
        first = problem.contenders["eager"].build(inputs)()
        return lambda: first

    assert row_of(problem, Contender(build))["match"] is False


def test_another_network_is_noticed():
    problem = caffenet_step.workload("base", 2)
    other = caffenet_step.contender(problem.params, lambda _: caffenet_step.copied("max-avg"))
    assert row_of(problem, other)["match"] is False


def test_every_variant_has_its_workload():
    found = registry.workloads("caffenet_step")
    assert [workload.params["variant"] for workload in found] == list(caffenet_step.VARIANTS)
    assert all(workload.flops > 6 * workload.params["N"] * 200_000_000 for workload in found)
