"""The benchmarks of colour nets: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import color_transform, color_transform_peers, registry
from perfvl.benchmarks.workload import Workload

LEAVES = {"weight1", "bias1", "weight2", "bias2"}


def net(image="uint8", **options) -> Workload:
    return color_transform.workload(12, 3, image, **options)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("image", ["uint8", "float32"])
@pytest.mark.parametrize("dtype", list(color_transform.DTYPES))
def test_every_contender_gives_the_answer(dtype, image, backward):
    rows = rows_of(net(image, backward=backward, dtype=dtype))
    check_rows(rows, set())
    assert set(rows) == {"perfvl", "perfvl, NCHW", "eager", "eager, NCHW"}


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_ones_give_the_answer(backward):
    problem = net(backward=backward)
    inputs = problem.inputs(CPU, seed=0)
    expected = problem.truth(inputs)
    compiled = [c for c in problem.contenders.values() if c.compiles]
    assert len(compiled) == 2
    for contender in compiled:
        for what, value in contender.build(inputs)().items():
            torch.testing.assert_close(value.double(), expected[what], rtol=1e-4, atol=1e-3, msg=what)


@pytest.mark.parametrize("image", ["uint8", "float32"])
def test_gradients_are_of_the_parameters_and_of_an_image_of_floats(image):
    problem = net(image, backward=True)
    found = problem.truth(problem.inputs(CPU, seed=0))
    assert set(found) == {"output", *LEAVES, *(["image"] if image == "float32" else [])}
    assert all(t.dtype == torch.float64 for t in found.values())


@pytest.mark.parametrize("backward", [False, True])
def test_another_mean_and_shifted_channels_are_noticed(backward):
    problem = net(backward=backward)

    def off(*arguments):
        return color_transform_peers.eager(*arguments[:-1], arguments[-1] + 1)

    def shifted(image, *rest):
        return color_transform_peers.eager(image.roll(1, 1), *rest)

    for wrong in (off, shifted):
        assert row_of(problem, color_transform.contender(problem.params, lambda f=wrong: f))["match"] is False


def test_zeros_for_gradients_are_noticed():
    problem = net("float32", backward=True)
    for without in range(5):

        def constant(*arguments, without=without):
            given = [t.detach() + 0 * t if i == without else t for i, t in enumerate(arguments)]
            return color_transform_peers.eager(*given)

        assert row_of(problem, color_transform.contender(problem.params, lambda f=constant: f))["match"] is False


@pytest.mark.parametrize("dtype", list(color_transform.DTYPES))
def test_no_unit_is_next_to_its_kink(dtype):
    inputs = color_transform.workload(48, 5, hidden=16, dtype=dtype).inputs(CPU, seed=0)
    exact = {name: t.double() for name, t in inputs.items()}
    hidden = F.conv2d((exact["image"] - 110) * 0.04, exact["weight1"], exact["bias1"])
    output = F.conv2d(F.leaky_relu(hidden, 0.5), exact["weight2"], exact["bias2"])
    assert min(hidden.abs().min(), output.abs().min()) > 9e-4


def test_tensors_have_the_layout_of_the_name():
    problem, seen = net(), {}

    def look(*arguments):
        seen["last"] = arguments[0].is_contiguous(memory_format=torch.channels_last)
        return color_transform_peers.eager(*arguments)

    for memory in (color_transform.CHANNELS_LAST, color_transform.NCHW):
        color_transform.contender(problem.params, lambda: look, memory).build(problem.inputs(CPU, seed=0))()
        assert seen["last"] == (memory == torch.channels_last)


def test_activations_let_both_sides_through():
    problem = color_transform.workload(64, 2)
    output = problem.truth(problem.inputs(CPU, seed=0))["output"]
    assert 0.1 < float((output > 0).double().mean()) < 0.9


def test_least_work():
    pixels, layer = 3 * 144, 2 * 3 * 10
    assert (net().bytes, net().flops) == (pixels * (3 + 12), 2 * pixels * layer)
    assert net("float32").bytes == pixels * (12 + 12)
    both = net(backward=True)
    assert (both.bytes, both.flops) == (pixels * 2 * (3 + 12), 5 * pixels * layer)
    both = net("float32", backward=True)
    assert (both.bytes, both.flops) == (pixels * (3 * 12 + 2 * 12), 6 * pixels * layer)
    assert net(backward=True, dtype="bfloat16").bytes == pixels * 2 * (3 + 6)


def test_every_size_has_its_workloads():
    found = [workload.name for workload in registry.workloads("color_transform")]
    assert len(found) == len(set(found)) == 16
    for size, batch in color_transform.SIZES:
        for image in ("uint8", "float32"):
            for direction in ("fwd", "fwd-bwd"):
                assert f"color-3-10-3-{size}-n{batch}-{image}-{direction}-float32" in found
    assert registry.workloads("color_transform", quick=True)
