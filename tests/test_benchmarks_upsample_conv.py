"""The benchmarks of upsampling blocks: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import registry, upsample_conv, upsample_conv_peers
from perfvl.benchmarks.workload import Workload


def block(**options) -> Workload:
    return upsample_conv.workload("test", 6, 10, 4, 2, **options)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_block_gives_the_answer(dtype, backward):
    rows = rows_of(block(backward=backward, dtype=dtype))
    check_rows(rows, set())
    names = {"perfvl", "perfvl, NCHW", "eager", "eager, NCHW", "transposed convolution", "nine products alone"}
    assert names == set(rows)


@pytest.mark.parametrize("backward", [False, True])
def test_a_shifted_image_is_noticed(backward):
    problem = block(backward=backward)

    def shifted(module, x):
        return upsample_conv_peers.eager(module, x.roll(1, 2))

    assert row_of(problem, upsample_conv.contender(problem.params, lambda: shifted))["match"] is False


def test_zeros_for_gradients_are_noticed():
    problem = block(backward=True)

    def constant(module, x):
        right = upsample_conv_peers.eager(module, x)
        return right.detach() + 0 * sum(p.sum() for p in module.parameters()) + 0 * x.sum()

    assert row_of(problem, upsample_conv.contender(problem.params, lambda: constant))["match"] is False


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_blocks_give_the_answer(backward):
    problem = block(backward=backward)
    inputs = problem.inputs(CPU, seed=0)
    expected = problem.truth(inputs)
    (compiled,) = [c for c in problem.contenders.values() if c.compiles]
    for what, value in compiled.build(inputs)().items():
        torch.testing.assert_close(value.double(), expected[what], rtol=1e-4, atol=1e-5, msg=what)


def test_half_the_channels_pass_through_relu():
    problem = block()
    inputs = problem.inputs(CPU, seed=0)
    passed = problem.contenders["eager"].build(inputs)()["output"] > 0
    assert passed.float().mean((0, 2, 3)).tolist() == [1.0, 0.0] * 5


def test_the_products_alone_have_the_shapes_of_the_pixels():
    step = upsample_conv_peers.products(12, 5, 7, torch.ones(1), backward=True)
    assert torch.equal(step(), torch.full((12, 7), 5.0))


def test_least_work_of_a_block():
    problem, pixels, weights = block(), 2 * 4 * 4, 9 * 6 * 10
    assert problem.flops == 2 * pixels * weights
    assert problem.bytes == 4 * (pixels * 6 + 4 * pixels * 10 + weights)
    both = block(backward=True, dtype="bfloat16")
    assert both.flops == 3 * problem.flops
    assert both.bytes == 2 * (3 * pixels * 6 + 2 * 4 * pixels * 10 + 3 * weights)


def test_every_block_of_both_stages_has_its_workloads():
    found = [workload.name for workload in registry.workloads("upsample_conv")]
    assert len(found) == len(set(found)) == 20
    for c, o, size in [*upsample_conv.STAGE_1, *upsample_conv.STAGE_2]:
        for direction in ("fwd-float32", "fwd-bwd-float32"):
            assert any(n.startswith(f"upsample-{c}-{o}-{size}-n") and n.endswith(direction) for n in found)
    assert registry.workloads("upsample_conv", quick=True)
