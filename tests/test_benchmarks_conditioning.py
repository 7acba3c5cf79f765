"""The benchmarks of StackGAN's conditioning: every contender gives the answer, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import conditioning, conditioning_peers, registry
from perfvl.benchmarks.workload import Workload

DTYPES = list(conditioning.DTYPES)
LEAVES = {"input", "condition", "weight"}


def convolution(**options) -> Workload:
    return conditioning.workload("test", 6, 5, 10, 4, 3, **options)


def augmentation(**options) -> Workload:
    return conditioning.augmentation_workload(4, 20, 6, **options)


class TestConvolutions:
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_contender_gives_the_answer(self, dtype, backward):
        rows = rows_of(convolution(backward=backward, dtype=dtype))
        check_rows(rows, set())
        names = {"perfvl", "eager", "image convolution alone"}
        assert set(rows) == names | {f"{name}, NCHW" for name in names}

    @pytest.mark.parametrize("backward", [False, True])
    def test_compiled_ones_give_the_answer(self, backward):
        problem = convolution(backward=backward)
        inputs = problem.inputs(CPU, seed=0)
        expected = problem.truth(inputs)
        compiled = [c for c in problem.contenders.values() if c.compiles]
        assert len(compiled) == 2
        for contender in compiled:
            for what, value in contender.build(inputs)().items():
                torch.testing.assert_close(value.double(), expected[what], rtol=1e-4, atol=1e-5, msg=what)

    @pytest.mark.parametrize("backward", [False, True])
    def test_a_condition_of_another_sample_is_noticed(self, backward):
        problem = convolution(backward=backward)

        def shifted(x, condition, weight):
            return conditioning_peers.concatenated(x, condition.roll(1, 0), weight)

        assert row_of(problem, conditioning.contender(problem.params, lambda: shifted))["match"] is False

    def test_zeros_for_gradients_are_noticed(self):
        problem = convolution(backward=True)
        for without in range(3):

            def constant(*arguments, without=without):
                given = [t.detach() + 0 * t if i == without else t for i, t in enumerate(arguments)]
                return conditioning_peers.concatenated(*given)

            assert row_of(problem, conditioning.contender(problem.params, lambda f=constant: f))["match"] is False

    def test_the_image_alone_has_the_image_s_weights(self):
        problem = convolution(backward=True)
        inputs = problem.inputs(CPU, seed=0)
        alone = {name: c for name, c in problem.contenders.items() if c.role == "bound"}
        assert len(alone) == 2
        for contender in alone.values():
            found = contender.build(inputs)()
            assert set(found) == {"output", "input", "weight"}
            assert found["weight"].shape == (10, 6, 3, 3)
            without = inputs | {"condition": torch.zeros(3, 5)}
            torch.testing.assert_close(found["output"].double(), problem.truth(without)["output"], rtol=1e-4, atol=1e-5)

    def test_tensors_have_the_layout_of_the_name(self):
        problem, seen = convolution(), {}

        def look(x, condition, weight):
            seen["layout"] = [t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)]
            return conditioning_peers.concatenated(x, condition, weight)

        for memory in (conditioning.CHANNELS_LAST, conditioning.NCHW):
            conditioning.contender(problem.params, lambda: look, memory).build(problem.inputs(CPU, seed=0))()
            assert seen["layout"] == [memory == torch.channels_last] * 2

    def test_least_work(self):
        problem, image, condition, weights = convolution(), 3 * 16 * 6, 3 * 5, 9 * 11 * 10
        assert problem.flops == 18 * 10 * (image + condition)
        assert problem.bytes == 4 * (image + condition + 3 * 16 * 10 + weights)
        both = convolution(backward=True, dtype="bfloat16")
        assert both.flops == 3 * problem.flops
        assert both.bytes == 2 * (3 * (image + condition) + 2 * 3 * 16 * 10 + 3 * weights)


class TestAugmentations:
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_contender_gives_the_answer(self, dtype, backward):
        rows = rows_of(augmentation(backward=backward, dtype=dtype))
        check_rows(rows, set())
        assert set(rows) == {"perfvl", "eager", "product alone"}

    @pytest.mark.parametrize("backward", [False, True])
    def test_compiled_ones_give_the_answer(self, backward):
        problem = augmentation(backward=backward)
        inputs = problem.inputs(CPU, seed=0)
        expected = problem.truth(inputs)
        (compiled,) = [c for c in problem.contenders.values() if c.compiles]
        for what, value in compiled.build(inputs)().items():
            torch.testing.assert_close(value.double(), expected[what], rtol=1e-4, atol=1e-5, msg=what)

    @pytest.mark.parametrize("backward", [False, True])
    def test_wrong_outputs_are_noticed(self, backward):
        problem = augmentation(backward=backward)

        def quiet(text, weight, bias, eps):
            return conditioning_peers.augmentation(text, weight, bias, 0 * eps)

        def summed(text, weight, bias, eps):
            condition, kl = conditioning_peers.augmentation(text, weight, bias, eps)
            return condition, kl * condition.numel()

        for wrong in (quiet, summed):
            contender = conditioning.augmentation_contender(problem.params, lambda f=wrong: f)
            assert row_of(problem, contender)["match"] is False

    def test_a_divergence_without_a_gradient_is_noticed(self):
        problem = augmentation(backward=True)

        def constant(text, weight, bias, eps):
            condition, kl = conditioning_peers.augmentation(text, weight, bias, eps)
            return condition, kl.detach() + 0 * kl

        contender = conditioning.augmentation_contender(problem.params, lambda: constant)
        assert row_of(problem, contender)["match"] is False

    def test_half_the_columns_pass_through_relu(self):
        inputs = conditioning.augmentation_workload(16).inputs(CPU, seed=0)
        projected = torch.addmm(inputs["bias"], inputs["text"], inputs["weight"].t())
        assert (projected > 0).float().mean(0).tolist() == [1.0, 0.0] * 128

    def test_the_product_alone_has_the_shapes_of_the_layer(self):
        step = conditioning_peers.product(torch.ones(3, 5), torch.ones(8, 5), torch.ones(8), backward=True)
        assert torch.equal(step(), torch.full((3, 8), 6.0))

    def test_least_work(self):
        problem, moved = augmentation(), 4 * 20 + 12 * 21 + 4 * 4 * 6
        assert problem.flops == 2 * 4 * 20 * 12
        assert problem.bytes == 4 * moved
        both = augmentation(backward=True, dtype="bfloat16")
        assert both.flops == 2 * problem.flops
        assert both.bytes == 2 * 2 * moved


def test_both_places_of_the_network_and_the_augmentation_have_their_workloads():
    found = [workload.name for workload in registry.workloads("conditioning")]
    assert len(found) == len(set(found)) == (14 if conditioning.ON_GPU else 18)
    for place in ("conditioned-512-128-512-4-", "conditioned-512-128-512-16-", "augmentation-1024-128-"):
        for direction in ("-fwd-float32", "-fwd-bwd-float32", "-fwd-bwd-bfloat16"):
            assert any(name.startswith(place) and name.endswith(direction) for name in found)
    assert registry.workloads("conditioning", quick=True)
