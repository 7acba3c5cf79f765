"""The benchmarks of poolings: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import pooling, registry
from perfvl.benchmarks.workload import Workload


def pool(**options) -> Workload:
    return pooling.workload("test", 6, 9, 2, **options)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_pooling_gives_the_answer(dtype, backward):
    rows = rows_of(pool(backward=backward, dtype=dtype))
    check_rows(rows, set())
    assert set(rows) == {"perfvl", "perfvl, NCHW", "eager", "eager, NCHW", "a copy of the input"}


@pytest.mark.parametrize("backward", [False, True])
def test_a_shifted_image_is_noticed(backward):
    problem = pool(backward=backward)

    def shifted(x, *windows):
        return pooling.eager(x.roll(1, 2), *windows)

    assert row_of(problem, pooling.contender(problem.params, lambda: shifted))["match"] is False


def test_the_gradient_of_the_maximum_alone_is_noticed():
    problem = pool(backward=True)

    def half(x, *windows):
        right = pooling.eager(x, *windows)
        largest = torch.nn.functional.max_pool2d(x, *windows[:3], ceil_mode=windows[3])
        return largest + (right - largest).detach()

    assert row_of(problem, pooling.contender(problem.params, lambda: half))["match"] is False


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_poolings_give_the_answer(backward):
    problem = pool(backward=backward, padding=1)
    inputs = problem.inputs(CPU, seed=0)
    expected = problem.truth(inputs)
    found = [c for c in problem.contenders.values() if c.compiles]
    assert len(found) == 2
    for contender in found:
        for what, value in contender.build(inputs)().items():
            torch.testing.assert_close(value.double(), expected[what], rtol=1e-4, atol=1e-5, msg=what)


def test_least_work_of_a_pooling():
    problem, pixels, outputs = pool(), 2 * 6 * 9 * 9, 2 * 6 * 4 * 4
    assert problem.bytes == 4 * (pixels + outputs)
    assert problem.flops == 9 * outputs
    both = pool(backward=True, dtype="bfloat16")
    assert both.bytes == 2 * (2 * (pixels + outputs) + outputs)
    assert pool(ceil_mode=False, padding=1).params["padding"] == 1


def test_sizes_are_those_of_caffenet():
    sizes = [pooling.output_size(pooling.workload("test", c, size, 1).params) for c, size in pooling.CAFFENET]
    assert sizes == [15, 7, 3]


def test_every_layer_has_its_workloads():
    found = [workload.name for workload in registry.workloads("pooling")]
    assert len(found) == len(set(found)) >= 12
    for c, size in [*pooling.CAFFENET, (64, 112)]:
        for direction in ("fwd-float32", "fwd-bwd-float32", "fwd-bwd-bfloat16"):
            assert any(n.startswith(f"pool-{c}-{size}-n") and n.endswith(direction) for n in found)
    assert registry.workloads("pooling", quick=True)
