"""The benchmarks of small-loss selection: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import registry, small_loss, small_loss_peers, small_loss_steps
from perfvl.benchmarks.workload import Contender

METHODS = list(small_loss.NAMES)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_loss_gives_the_answer(method, groups):
    rows = rows_of(small_loss.workload(method, 40, 6, groups))
    check_rows(rows, {"torch.compile"})
    assert ("perfvl, group by group" in rows) == (groups > 1)


@pytest.mark.parametrize("method", METHODS)
def test_torch_compile_gives_the_answer(method):
    workload = small_loss.workload(method, 24, 5)
    inputs = workload.inputs(CPU, seed=0)
    loss = small_loss_peers.compiled(method)(inputs["logits1"], inputs["logits2"], inputs["labels"], 0.2)
    torch.testing.assert_close(loss.double(), workload.truth(inputs)["loss"], rtol=1e-5, atol=1e-6)


def test_a_choice_of_the_wrong_network_is_noticed():
    swapped = small_loss.contender(lambda a, b, labels, rate: small_loss_peers.fused("co_teaching")(a, a, labels, rate))
    assert row_of(small_loss.workload("co_teaching", 40, 6), swapped)["match"] is False


@pytest.mark.parametrize("groups", [1, 3])
def test_every_mask_is_that_of_the_stable_sort(groups):
    workload = small_loss.mask_workload(500, groups)
    check_rows(rows_of(workload), set())
    larger = Contender(lambda inputs: lambda: inputs["losses"] > 0.7)
    assert row_of(workload, larger)["match"] is False


def test_steps_train_alike():
    tiny = small_loss_steps.workload("MLP", 16)
    check_rows(rows_of(tiny), set())
    frozen = Contender(lambda inputs: lambda: inputs["images"].sum())
    assert row_of(tiny, frozen)["match"] is False


def test_every_method_has_a_small_and_a_large_workload():
    found = {workload.name for workload in registry.workloads("small_loss")}
    assert {"co-teaching-g1-n128-k10", "co-teaching-g16-n128-k10", "small-loss-mask-g1-n1000000"} <= found
    assert {f"{m.replace('_', '-')}-g1-n1024-k1000" for m in METHODS} <= found
    assert registry.workloads("small_loss", quick=True)
