"""The benchmarks of separable convolution: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import registry, separable_conv, separable_conv_peers, xception_step
from perfvl.benchmarks.workload import Contender, Workload

from perfvl.nn import SeparableConv2d


def layer(**options) -> Workload:
    return separable_conv.workload("test", 6, 10, 9, batch=2, **options)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": 5, "stride": 2}, {"layout": "NCHW"}, {"dtype": "bfloat16"}],
    ids=["plain", "k5 s2", "NCHW", "bfloat16"],
)
def test_every_layer_gives_the_answer(options, backward):
    rows = rows_of(layer(backward=backward, **options))
    check_rows(rows, set())
    assert {"perfvl", "eager", "eager, NCHW", "pointwise products alone"} == set(rows)


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_padding_is_noticed(backward):
    def shifted(*weights):
        return lambda x, *w: separable_conv_peers.eager(1, 1)(x.roll(1, 2), *w)

    wrong = separable_conv.contender(shifted, torch.channels_last, backward)
    assert row_of(layer(backward=backward), wrong)["match"] is False


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_layers_give_the_answer(backward):
    problem = layer(backward=backward)
    inputs = problem.inputs(CPU, seed=0)
    expected = problem.truth(inputs)
    compiled = {name: c for name, c in problem.contenders.items() if c.compiles}
    assert len(compiled) == (1 if backward else 2)
    for name, contender in compiled.items():
        for what, value in contender.build(inputs)().items():
            torch.testing.assert_close(value.double(), expected[what], rtol=1e-4, atol=1e-5, msg=f"{name}: {what}")


def test_the_products_alone_have_the_pointwise_shapes():
    step = separable_conv_peers.products(12, 5, 7, torch.ones(1), backward=True)
    assert torch.equal(step(), torch.full((12, 7), 5.0))


def test_the_block_gives_the_answer_and_a_missing_residual_is_noticed():
    problem = separable_conv.block_workload(8, 7, 2)
    check_rows(rows_of(problem), set())
    without = dataclasses.replace(problem.contenders["eager"], build=lambda inputs: lambda: {"output": inputs["input"]})
    assert row_of(problem, without)["match"] is False


@pytest.mark.parametrize("training", [False, True])
def test_the_whole_network_gives_the_answer(training):
    rows = rows_of(xception_step.workload(training, 2, 71))
    check_rows(rows, {"timm's model, swapped"})


def test_the_plain_network_has_no_fused_layer_and_the_same_weights():
    fused, plain = xception_step.ours(), xception_step.plain()
    assert not any(isinstance(module, SeparableConv2d) for module in plain.modules())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in fused.state_dict().items())


def test_training_that_learns_nothing_is_noticed():
    problem = xception_step.workload(True, 2, 71)
    frozen = Contender(lambda inputs: lambda: torch.tensor(6.9))
    assert row_of(problem, frozen)["match"] is False


def test_least_work_of_a_layer():
    problem = layer()
    assert problem.bytes == 4 * (2 * 6 * 81 + 2 * 81 * 10 + 6 * (9 + 10))
    assert problem.flops == 2 * 2 * 81 * 6 * (9 + 10)
    both = layer(backward=True, dtype="bfloat16")
    assert both.bytes == 2 * (3 * 2 * 6 * 81 + 2 * 2 * 81 * 10 + 3 * 6 * (9 + 10))
    assert both.flops == 3 * problem.flops


def test_every_shape_of_xception_has_its_workloads():
    found = [workload.name for workload in registry.workloads("separable_conv")]
    assert len(found) == len(set(found))
    for c, o, size in separable_conv.XCEPTION:
        for direction in ("fwd-float32", "fwd-bwd-float32", "fwd-bwd-bfloat16"):
            assert any(n.startswith(f"separable-{c}-{o}-{size}-k3-s1-") and n.endswith(direction) for n in found)
    assert registry.workloads("separable_conv", quick=True)
