"""The benchmarks of maxout and APL: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import activation, activation_peers, registry

DTYPES = list(activation.DTYPES)
directions = pytest.mark.parametrize("backward", [False, True])
sizes = pytest.mark.parametrize("size", [0, 4], ids=["vectors", "maps"])


@sizes
@directions
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_maxout_gives_the_answer(dtype, backward, size):
    rows = rows_of(activation.maxout_workload(6, size, 5, backward=backward, dtype=dtype))
    check_rows(rows, set())
    names = {"perfvl", "eager", "amax", "max"}
    assert set(rows) == (names | {f"{name}, NCHW" for name in names} if size else names)


@sizes
@directions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("segments", "shared"), [(2, "channel"), (5, "position")])
def test_every_unit_gives_the_answer(segments, shared, dtype, backward, size):
    problem = activation.apl_workload(6, size, 5, segments, shared=shared, backward=backward, dtype=dtype)
    rows = rows_of(problem)
    check_rows(rows, set())
    assert set(rows) == ({"perfvl", "perfvl, NCHW", "eager", "eager, NCHW"} if size else {"perfvl", "eager"})


@pytest.mark.parametrize("make", [activation.maxout_workload, activation.apl_workload], ids=["maxout", "apl"])
def test_compiled_ones_give_the_answer(make):
    problem = make(6, 4, 3, backward=True)
    inputs = problem.inputs(CPU, seed=0)
    expected = problem.truth(inputs)
    compiled = [c for c in problem.contenders.values() if c.compiles]
    assert len(compiled) == 2
    for contender in compiled:
        for what, value in contender.build(inputs)().items():
            torch.testing.assert_close(value.double(), expected[what], rtol=1e-4, atol=1e-5, msg=what)


@directions
def test_pieces_of_another_channel_are_noticed(backward):
    problem = activation.maxout_workload(6, 4, 3, backward=backward)

    def neighbours(x):
        return x.unflatten(1, (-1, 2)).amax(2)

    assert row_of(problem, activation.contender(problem.params, lambda: neighbours))["match"] is False


@directions
def test_a_segment_that_is_left_out_is_noticed(backward):
    problem = activation.apl_workload(6, 4, 3, backward=backward)

    def short(x, slope, hinge):
        return activation_peers.sum_of_hinges(x, slope[:1], hinge[:1])

    assert row_of(problem, activation.contender(problem.params, lambda: short))["match"] is False


def test_zeros_for_gradients_are_noticed():
    problem = activation.apl_workload(6, 4, 3, backward=True)
    for without in range(3):

        def constant(*arguments, without=without):
            given = [t.detach() + 0 * t if i == without else t for i, t in enumerate(arguments)]
            return activation_peers.sum_of_hinges(*given)

        assert row_of(problem, activation.contender(problem.params, lambda f=constant: f))["match"] is False


def test_no_two_pieces_are_equal():
    inputs = activation.maxout_workload(64, 15, 4, dtype="bfloat16").inputs(CPU, seed=0)
    first, second = inputs["input"].chunk(2, 1)
    assert not (first == second).any()


def test_tensors_have_the_layout_of_the_name():
    problem, seen = activation.maxout_workload(6, 4, 3), {}

    def look(x):
        seen["layout"] = x.is_contiguous(memory_format=torch.channels_last)
        return activation_peers.maximum(x)

    for memory in (activation.CHANNELS_LAST, activation.NCHW):
        activation.contender(problem.params, lambda: look, memory).build(problem.inputs(CPU, seed=0))()
        assert seen["layout"] == (memory == torch.channels_last)


def test_least_work():
    problem, outputs = activation.maxout_workload(6, 4, 3), 3 * 6 * 16
    assert (problem.bytes, problem.flops) == (4 * 3 * outputs, outputs)
    both = activation.maxout_workload(6, 4, 3, backward=True, dtype="bfloat16")
    assert (both.bytes, both.flops) == (2 * 6 * outputs, 2 * outputs)
    unit = activation.apl_workload(6, 4, 3, 2)
    assert (unit.bytes, unit.flops) == (4 * 2 * outputs, 9 * outputs)
    both = activation.apl_workload(6, 4, 3, 2, backward=True)
    assert (both.bytes, both.flops) == (4 * 5 * outputs, 22 * outputs)


def test_every_map_of_the_network_has_its_workloads():
    found = [workload.name for workload in registry.workloads("activation")]
    assert len(found) == len(set(found))
    for channels, size in activation.MAPS:
        for kind in ("maxout", "apl2-channel", "apl5-channel", *(["apl2-position", "apl5-position"] if size else [])):
            assert any(n.startswith(f"{kind}-{channels}-{size or 'fc'}-") and "-fwd-bwd-float32" in n for n in found)
    assert registry.workloads("activation", quick=True)
