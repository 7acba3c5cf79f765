"""The benchmarks of StackGAN's steps: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import registry, stackgan_peers, stackgan_step
from perfvl.benchmarks.workload import Contender, Workload


def small(kind: str, stage: int = 1) -> Workload:
    return stackgan_step.workload(kind, stage, 3, gf=8, df=4, blocks=1)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", stackgan_step.KINDS)
def test_every_step_gives_the_answer(kind, stage):
    rows = rows_of(small(kind, stage))
    check_rows(rows, set())
    assert set(rows) == {"perfvl", "eager, NCHW", "eager, channels_last"}


def test_compiled_steps_give_the_answer():
    problem = small("training")
    inputs = problem.inputs(CPU, seed=0)
    found = problem.results(problem.contenders["torch.compile"].build(inputs), inputs)
    torch.testing.assert_close(found["losses"].double(), problem.truth(inputs)["losses"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", stackgan_step.KINDS)
def test_a_step_that_learns_nothing_is_noticed(kind):
    problem = small(kind)

    def build(inputs):
        step = problem.contenders["eager, NCHW"].build(inputs)
        first = step()
        return lambda: first

    assert row_of(problem, Contender(build))["match"] is False


def test_another_generator_loss_is_noticed():
    problem = small("training")

    def heavier(part):
        if part is not stackgan_peers.generator_loss:
            return part
        return lambda *arguments: part(*arguments, kl_weight=2.1)

    def build(inputs):
        nets = stackgan_step.networks(problem.params, fused=False)
        return stackgan_step.plain("training", *nets, inputs, heavier)

    assert row_of(problem, Contender(build))["match"] is False


def test_peers_have_the_same_weights():
    for stage in (1, 2):
        ours, plain = (stackgan_step.networks(small("training", stage).params, fused) for fused in (True, False))
        for network, twin in zip(ours, plain, strict=True):
            torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_every_step_of_both_stages_has_its_workload():
    found = registry.workloads("stackgan_step")
    names = [workload.name for workload in found]
    assert len(names) == len(set(names)) == 6
    assert {(w.params["gf"], w.params["df"], w.params["R"]) for w in found} == {(128, 64, 4)}
    assert dataclasses.replace(found[0]).shrunk().params["N"] == 2
