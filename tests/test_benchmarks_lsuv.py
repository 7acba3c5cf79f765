"""The benchmarks of LSUV: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import lsuv, registry
from perfvl.benchmarks.workload import Workload


def small(start: str = "Gaussian") -> Workload:
    return lsuv.workload(start, "quarter", 2)


@pytest.mark.parametrize("start", ["Gaussian", "orthonormal"])
def test_every_contender_gives_the_answer(start):
    rows = rows_of(small(start))
    check_rows(rows, set())
    assert set(rows) == {"perfvl", "published", "published, variance on the device"}
    assert rows["perfvl"]["error"].keys() == ({"variances", "norms"} if start == "Gaussian" else {"variances"})


@pytest.mark.parametrize("start", ["Gaussian", "orthonormal"])
def test_weights_that_stay_are_noticed(start):
    problem = small(start)
    nothing = lsuv.contender(lambda model, images, orthonormal: None, problem.params)
    assert row_of(problem, nothing)["match"] is False


@pytest.mark.parametrize("start", ["Gaussian", "orthonormal"])
def test_other_variances_are_noticed(start):
    problem = small(start)

    def twice(model, images, orthonormal):
        lsuv.one_pass(model, images, orthonormal)
        with torch.no_grad():
            model[-1].weight.mul_(1.1)

    assert row_of(problem, lsuv.contender(twice, problem.params))["match"] is False


def test_another_start_than_the_given_is_noticed():
    problem = small()
    orthonormal = lsuv.contender(lambda model, images, orthonormal: lsuv.one_pass(model, images, True), problem.params)
    assert row_of(problem, orthonormal)["match"] is False


def test_every_call_starts_from_the_given_weights():
    problem = small()
    inputs = problem.inputs(CPU, seed=0)
    step = problem.contenders["perfvl"].build(inputs)
    first = [p.clone() for p in step().parameters()]
    assert all(map(torch.equal, first, step().parameters()))


def test_the_published_procedure_runs_the_model_twice_for_each_layer():
    problem = small()
    inputs = problem.inputs(CPU, seed=0)
    model, calls = lsuv.caffenet(lsuv.WIDTHS["quarter"]), []
    model.register_forward_hook(lambda module, given, output: calls.append(None))
    with torch.no_grad():
        for i, layer in enumerate(lsuv.layers_of(model)):
            layer.weight.copy_(inputs[f"weight{i}"])
            layer.bias.zero_()
    lsuv.sequential(lsuv.on_host)(model, inputs["images"], False)
    assert len(calls) == 16


def test_the_network_is_caffenet128():
    with torch.device("meta"):
        model = lsuv.caffenet(lsuv.WIDTHS["full"])
        assert sum(p.numel() for p in model.parameters()) == 13_300_072
        sizes = []
        for layer in lsuv.layers_of(model):
            layer.register_forward_hook(lambda module, given, output: sizes.append(output.shape[-1]))
        model(torch.empty(1, 3, 128, 128))
    assert sizes == [30, 15, 7, 7, 7, 2048, 2048, 1000]


def test_both_starts_have_their_workloads():
    found = registry.workloads("lsuv")
    assert {workload.params["start"] for workload in found} == {"Gaussian", "orthonormal"}
    assert len({workload.name for workload in found}) == len(found) == 3
    assert registry.workloads("lsuv", quick=True)
