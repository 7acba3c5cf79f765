"""The benchmarks of norm and activation: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import norm_act, norm_act_peers, registry

DTYPES = list(norm_act.DTYPES)
directions = pytest.mark.parametrize("backward", [False, True])
orders = pytest.mark.parametrize("order", ["before", "after"])


@directions
@orders
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_every_contender_gives_the_answer(activation, dtype, order, backward):
    rows = rows_of(norm_act.workload(12, 6, 5, activation, order, backward=backward, dtype=dtype))
    check_rows(rows, set())
    assert set(rows) == {"perfvl", "perfvl, NCHW", "eager", "eager, NCHW"}


def test_compiled_ones_give_the_answer():
    problem = norm_act.workload(12, 6, 3, order="after")
    inputs = problem.inputs(CPU, seed=0)
    expected = problem.truth(inputs)
    compiled = [c for c in problem.contenders.values() if c.compiles]
    assert len(compiled) == 2
    for contender in compiled:
        for what, value in contender.build(inputs)().items():
            torch.testing.assert_close(value.double(), expected[what], rtol=1e-4, atol=1e-5, msg=what)


@directions
@orders
def test_the_other_order_is_noticed(order, backward):
    problem = norm_act.workload(12, 6, 5, order=order, backward=backward)
    other = norm_act_peers.two_layers(12, "relu", "after" if order == "before" else "before")
    wrong = norm_act.contender(problem.params, lambda: norm_act_peers.with_state(other))
    assert row_of(problem, wrong)["match"] is False


@directions
def test_statistics_that_are_not_the_batch_s_are_noticed(backward):
    problem = norm_act.workload(12, 6, 5, backward=backward)

    def frozen(x, weight, bias, mean, variance):
        return F.relu(F.batch_norm(x, mean, variance, weight, bias, False))

    assert row_of(problem, norm_act.contender(problem.params, lambda: frozen))["match"] is False


def test_a_gradient_that_is_left_out_is_noticed():
    problem = norm_act.workload(12, 6, 5)
    for without in range(3):

        def constant(*arguments, without=without):
            given = [t.detach() + 0 * t if i == without else t for i, t in enumerate(arguments)]
            return F.relu(F.batch_norm(given[0], *given[3:], *given[1:3], training=True))

        assert row_of(problem, norm_act.contender(problem.params, lambda f=constant: f))["match"] is False


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_next_to_the_kink(dtype):
    inputs = norm_act.workload(64, 15, 8, dtype=dtype).inputs(CPU, seed=0)
    wide = [inputs[name].double() for name in norm_act.LEARNED]
    normal = F.batch_norm(wide[0], None, None, *wide[1:], training=True)
    assert normal.abs().min() > 1e-4


def test_least_work():
    problem, elements = norm_act.workload(12, 6, 5, backward=False), 5 * 12 * 36
    assert (problem.bytes, problem.flops) == (4 * 2 * elements, 8 * elements)
    both = norm_act.workload(12, 6, 5, dtype="bfloat16")
    assert (both.bytes, both.flops) == (2 * 5 * elements, 22 * elements)


def test_every_map_of_the_network_has_its_workloads():
    found = [workload.name for workload in registry.workloads("norm_act")]
    assert len(found) == len(set(found))
    for channels, size in norm_act.MAPS:
        for kind in ("relu-before", "relu-after", "elu-after"):
            assert any(n.startswith(f"{kind}-{channels}-{size}-") and "-fwd-bwd-float32" in n for n in found)
    assert registry.workloads("norm_act", quick=True)
