"""Layer-sequential unit-variance initialisation: one pass gives what the published loop gives."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lsuv_support import Counted, check_unit, images, published, small_net, variances
from torch import nn

from perfvl.nn import lsuv_init_
from perfvl.nn.lsuv import RULES
from perfvl.nn.lsuv_layers import LAYERS
from perfvl.nn.lsuv_numbers import CHUNK, moments, orthonormal_

KNOWN = json.loads((Path(__file__).parent / "data" / "lsuv.json").read_text())


class TestOnePass:
    def test_every_kind_of_layer_has_unit_variance(self):
        class Kinds(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv3d = nn.Conv3d(2, 4, 3, padding=1, bias=False)
                self.up3d = nn.ConvTranspose3d(4, 3, 2, 2, bias=False)
                self.conv2d = nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular", bias=False)
                self.up2d = nn.ConvTranspose2d(8, 4, 3, 2, groups=2, bias=False)
                self.conv1d = nn.Conv1d(4, 5, 3, dilation=2, bias=False)
                self.up1d = nn.ConvTranspose1d(5, 7, 2, bias=False)
                self.linear = nn.Linear(7, 11, bias=False)

            def forward(self, x):
                x = self.up3d(F.relu(self.conv3d(x))).flatten(1, 2)[:, :6]
                x = self.up2d(F.relu(self.conv2d(x))).flatten(2)
                return self.linear(self.up1d(F.relu(self.conv1d(x))).transpose(1, 2))

        model, batch = Kinds(), 5 * torch.randn(4, 2, 4, 6, 6)
        report = lsuv_init_(model, batch)
        check_unit(model, batch, tolerance=0.02)
        assert [row.name for row in report.layers] == ["conv3d", "up3d", "conv2d", "up2d", "conv1d", "up1d", "linear"]
        assert report.skipped == []

    @pytest.mark.parametrize("mode", ["paper", "reference"])
    def test_the_result_is_that_of_the_published_procedure_from_one_forward(self, mode):
        model, batch = small_net(), images()
        twin = copy.deepcopy(model)
        counted = Counted(model)
        report = lsuv_init_(counted, batch, orthonormal=False, mode=mode)
        expected = published(twin, batch, mode)
        assert counted.calls == 1
        assert [row.iterations for row in report.layers] == [count for _, count in expected.values()]
        assert [row.scale for row in report.layers] == pytest.approx(
            [scale for scale, _ in expected.values()], rel=1e-5
        )
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            difference = (ours - theirs).norm() / theirs.norm()
            assert difference <= 4 * KNOWN["one_pass_vs_sequential_max_rel"]

    @pytest.mark.parametrize("orthonormal", [True, False])
    def test_reference_mode_takes_the_mean_out_with_the_bias(self, orthonormal):
        model, batch = small_net(bias=True), images() + 0.5
        twin = copy.deepcopy(model)
        counted = Counted(model)
        lsuv_init_(counted, batch, mode="reference", orthonormal=orthonormal)
        assert counted.calls == 1
        if orthonormal:  # from another start
            biases = [m.bias for m in model if isinstance(m, LAYERS)]
            assert all(torch.equal(bias, bias[:1].expand_as(bias)) for bias in biases)
            assert any(bias[0] != 0 for bias in biases)
            check_unit(model, batch, tolerance=0.21)
        else:
            published(twin, batch, "reference", most=11)
            torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)

    def test_with_biases_a_layer_alone_runs_again(self):
        model, batch = small_net(bias=True), images()
        with torch.no_grad():
            model[2].bias.mul_(10)
        twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
        counted = Counted(model)
        report = lsuv_init_(counted, batch, orthonormal=False)
        expected = published(twin, batch)
        assert counted.calls == 1
        assert max(row.iterations for row in report.layers) >= 2
        assert [row.iterations for row in report.layers] == [count for _, count in expected.values()]
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if "bias" in name)
        check_unit(model, batch)

    def test_layers_go_in_the_order_in_which_they_run(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.second, self.first = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

            def forward(self, x):
                return self.second(self.first(x).relu())

        model, batch = Counted(Backwards()), 7 * torch.randn(64, 8)
        twin = copy.deepcopy(model.body)
        report = lsuv_init_(model, batch)
        assert [row.name for row in report.layers] == ["body.first", "body.second"]
        assert model.calls == 1
        check_unit(model, batch)
        model.body.load_state_dict(twin.state_dict())
        report = lsuv_init_(model, batch, mode="reference", orthonormal=False)
        published(twin, batch, "reference")
        assert [row.name for row in report.layers] == ["body.second", "body.first"]
        torch.testing.assert_close(model.body.state_dict(), twin.state_dict())
        assert variances(model, batch)["body.second"] < 0.5  # which is why the order is that of the pass otherwise

    def test_what_is_near_enough_stays(self):
        layer = nn.Linear(16, 16, bias=False)
        batch = torch.randn(64, 16)
        lsuv_init_(layer, batch)
        for variance, scaled in ((1.019, 0), (0.981, 0), (1.021, 1), (0.979, 1)):
            model = copy.deepcopy(layer)
            model.weight.data *= variance**0.5
            report = lsuv_init_(model, batch, orthonormal=False)
            assert report.layers[0].iterations == scaled
            assert report.layers[0].variance_before == pytest.approx(variance, rel=1e-5)
        model.weight.data *= 1.09
        assert lsuv_init_(model, batch, orthonormal=False, mode="reference").layers[0].iterations == 0
        assert lsuv_init_(model, batch, orthonormal=False, tolerance=0.2).layers[0].iterations == 0
        assert lsuv_init_(model, batch, orthonormal=False, tolerance=0.18).layers[0].iterations == 1

    def test_a_bias_that_varies_too_much_ends_at_the_most_iterations(self):
        layer, batch = nn.Linear(4, 8), torch.randn(32, 4)
        layer.bias.data = torch.linspace(-3, 3, 8)
        for mode, most in (("paper", 21), ("reference", 11)):
            report = lsuv_init_(copy.deepcopy(layer), batch, mode=mode, orthonormal=False)
            assert report.layers[0].iterations == most
        assert lsuv_init_(copy.deepcopy(layer), batch, max_iterations=3).layers[0].iterations == 3

    def test_rules_are_those_of_the_published_code(self):
        for mode, name in (("paper", "caffe"), ("reference", "lsuv_pytorch")):
            known, rules = KNOWN["implementations"][name], RULES[mode]
            what, tolerance = known["test"].split(">")
            assert rules.tolerance == float(tolerance)
            assert rules.max_iterations == known["max_scalings"]
            assert rules.as_pytorch is ("std" in what) is known.get("bias_shift", False)


class TestRepeatedLayers:
    def test_outputs_of_all_calls_count_together(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.again = nn.Linear(6, 12, bias=False), nn.Linear(12, 12, bias=False)
                self.last = nn.Linear(12, 3, bias=False)

            def forward(self, x):
                return self.last(self.again(self.again(self.first(x)).relu()).relu())

        model, batch = Twice(), torch.randn(64, 6)
        twin = copy.deepcopy(model)
        report = lsuv_init_(model, batch, orthonormal=False)
        expected = published(twin, batch)
        assert {row.name: row.iterations for row in report.layers} == {n: count for n, (_, count) in expected.items()}
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
        check_unit(model, batch)

    def test_tied_weights_are_one_layer(self):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
        model[2].weight = model[0].weight
        batch = 3 * torch.randn(64, 8)
        report = lsuv_init_(model, batch)
        assert [row.name for row in report.layers] == ["0"]
        assert model[2].weight is model[0].weight
        with torch.no_grad():
            first = model[0](batch)
            both = torch.cat([first, model[2](first.relu())])
        assert both.var().item() == pytest.approx(1, abs=0.03)
        assert report.layers[0].variance_after == pytest.approx(both.var(correction=0).item(), rel=1e-4)

    def test_a_weight_that_also_changes_what_comes_before_is_scaled_as_published(self):
        class Language(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(20, 8)
                self.body, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 20, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, tokens):
                return self.head(self.body(self.embed(tokens)).relu())

        model, tokens = Language(), torch.randint(20, (16, 5))
        twin = copy.deepcopy(model)
        report = lsuv_init_(model, tokens, orthonormal=False)
        published(twin, tokens)
        assert [row.name for row in report.layers] == ["body", "head"]
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-3, atol=1e-4)
        found = variances(model, tokens)["head"]  # which is far from 1: the steps overshoot, and the report says so
        assert report.layers[1].variance_after == pytest.approx(found, rel=1e-4)
        assert report.layers[1].iterations == 21


class TestStart:
    @pytest.mark.parametrize("shape", [(8, 20), (20, 8), (9, 9), (1, 5), (5, 1), (6, 3, 2, 2), (16, 1, 3, 3)])
    def test_rows_or_columns_are_orthonormal(self, shape):
        weight = torch.empty(shape, dtype=torch.float64)
        orthonormal_(weight)
        matrix = weight.flatten(1)
        small = matrix @ matrix.t() if shape[0] <= matrix.shape[1] else matrix.t() @ matrix
        torch.testing.assert_close(small, torch.eye(len(small), dtype=torch.float64), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("shape", [(3, 3), (2, 4)])
    def test_no_direction_is_preferred(self, shape):
        weights = torch.stack([orthonormal_(w) or w for w in torch.empty(1000, *shape, dtype=torch.float64).unbind()])
        size = max(shape)
        assert weights.mean(0).abs().max().item() < 4 / (1000 * size) ** 0.5
        torch.testing.assert_close(weights.square().mean(0), torch.full(shape, 1 / size).double(), rtol=0.15, atol=0)
        fourth = 3 / (size * (size + 2))  # of a coordinate on the sphere
        torch.testing.assert_close(weights.pow(4).mean(0), torch.full(shape, fourth).double(), rtol=0.3, atol=0)
        if shape == (3, 3):
            assert abs((torch.linalg.det(weights) > 0).double().mean().item() - 0.5) < 0.08

    def test_weights_are_orthonormal_up_to_their_scale(self):
        model = small_net()
        report = lsuv_init_(model, images())
        for name, scale in ((row.name, row.scale) for row in report.layers):
            matrix = model.get_submodule(name).weight.detach().flatten(1) / scale
            small = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
            torch.testing.assert_close(small, torch.eye(len(small)), rtol=0, atol=1e-5)

    def test_equal_seeds_give_equal_weights(self):
        first, second = small_net(), small_net()
        batch = images()
        for model in (first, second):
            torch.manual_seed(5)
            lsuv_init_(model, batch)
        assert all(map(torch.equal, first.parameters(), second.parameters()))


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("count", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
    def test_moments_of_many_numbers(self, dtype, count):
        x = (3 * torch.randn(count) + 20).to(dtype)
        variance, mean = moments(x)
        torch.testing.assert_close(variance.double(), x.double().var(correction=0), rtol=1e-5, atol=0)
        torch.testing.assert_close(mean.double(), x.double().mean(), rtol=1e-6, atol=0)
        assert variance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    def test_a_large_mean_costs_no_digits(self):
        x = 1000 + torch.randn(100_000)
        assert moments(x)[0].item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-4)

    def test_chunks_of_different_means(self):
        x = torch.linspace(-1, 3, 3 * CHUNK + 5)
        variance, mean = moments(x)
        assert variance.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-5)
        assert mean.item() == pytest.approx(1, abs=1e-5)

    def test_layouts(self):
        x = torch.randn(4, 6, 5, 7)
        for view in (
            x.to(memory_format=torch.channels_last),
            x[:, ::2, 1:],
            x.transpose(0, 3),
            x[:1].expand(3, 6, 5, 7),
        ):
            torch.testing.assert_close(moments(view)[0].double(), view.double().var(correction=0), rtol=1e-6, atol=0)

    def test_equal_numbers_have_no_variance_at_all(self):
        assert moments(torch.full((CHUNK + 3,), 0.5))[0].item() == 0
