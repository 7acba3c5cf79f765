"""LSUV on models of all kinds: which layers, fused modules, other libraries, and no traces left."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from lsuv_support import check_unit, images, small_net, variances
from swap_support import require
from torch import Tensor, nn

import perfvl
from perfvl.models.xception import xception
from perfvl.nn import ColorTransform, SeparableConv2d, SeparableConvBNAct2d, UpsampleConv2d, lsuv_init_
from perfvl.nn.lsuv_layers import LAYERS


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.used(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class TestTraces:
    def test_modes_buffers_and_objects_are_what_they_were(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Sequential(nn.Conv2d(8, 4, 3), nn.InstanceNorm2d(4))
        )
        model[1].eval()
        model[3][0].eval()
        model[0].weight.requires_grad_(False)
        model[3][0].weight.grad = torch.ones_like(model[3][0].weight)
        modes = [module.training for module in model.modules()]
        parameters, buffers = list(model.parameters()), [(b, b.clone()) for b in model.buffers()]
        grads = [(p.requires_grad, p.grad) for p in parameters]
        for mode in ("paper", "reference"):
            lsuv_init_(model, images(4), mode=mode)
            assert [module.training for module in model.modules()] == modes
            assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
            assert all(a is b and torch.equal(a, value) for a, (b, value) in zip(model.buffers(), buffers, strict=True))
            assert [(p.requires_grad, p.grad) for p in parameters] == grads
            assert all(p.is_leaf for p in parameters)
            assert not any("forward" in module.__dict__ for module in model.modules())
        assert torch.is_grad_enabled()

    def test_a_batch_norm_that_trains_uses_the_batch(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        batch = 50 * images() + 100
        lsuv_init_(model, batch)
        check_unit(model, batch)
        lsuv_init_(model, batch, mode="reference")
        check_unit(model.eval(), batch, tolerance=0.21)

    def test_a_head_for_training_alone_is_initialised_by_a_model_that_trains(self):
        class TwoHeads(nn.Module):
            def __init__(self):
                super().__init__()
                self.head, self.auxiliary = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

            def forward(self, x):
                return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

        model, batch = TwoHeads(), 5 * torch.randn(64, 4)
        assert lsuv_init_(model, batch).skipped == []
        check_unit(model, batch)
        left = [("auxiliary", "the forward pass does not call it")]
        assert lsuv_init_(model, batch, mode="reference").skipped == left
        assert lsuv_init_(model.eval(), batch).skipped == left

    def test_dropout_rests(self):
        model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Dropout(0.9), nn.Linear(64, 64, bias=False))
        batch = torch.randn(64, 32)
        lsuv_init_(model, batch)
        check_unit(model.eval(), batch)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes_stay(self, dtype):
        model, batch = small_net().to(dtype), images().to(dtype)
        report = lsuv_init_(model, batch)
        assert {p.dtype for p in model.parameters()} == {dtype}
        found = variances(model, batch)
        for row in report.layers:
            assert found[row.name] == pytest.approx(1, abs=0.02)
            assert row.variance_after == pytest.approx(found[row.name], rel=1e-3)

    def test_channels_last_stays(self):
        model = small_net().to(memory_format=torch.channels_last)
        batch = images().to(memory_format=torch.channels_last)
        lsuv_init_(model, batch)
        assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
        check_unit(model, batch)

    def test_autocast_and_inference_mode_of_the_caller(self):
        model, batch = small_net(), images()
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lsuv_init_(model, batch, orthonormal=False)
        lsuv_init_(twin, batch, orthonormal=False)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
        model = small_net()
        with torch.inference_mode():
            lsuv_init_(model, batch)
        check_unit(model, batch)
        model(batch).sum().backward()

    def test_an_optimizer_made_before_trains_the_weights(self):
        model, batch = small_net(), images()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lsuv_init_(model, batch)
        before = model[0].weight.detach().clone()
        model(batch).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].weight, before)


class TestWhichLayers:
    def test_chosen_layers_alone_change(self):
        model, batch = small_net(), images()
        before = copy.deepcopy(model.state_dict())
        report = lsuv_init_(model, batch, layers=["2", "8"])
        assert [row.name for row in report.layers] == ["2", "8"]
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"2.weight", "8.weight"}

    def test_a_module_stands_for_its_layers(self):
        model = nn.ModuleDict({"features": small_net(), "features2": nn.Linear(10, 4)})
        model.forward = lambda x: model["features2"](model["features"](x))
        report = lsuv_init_(model, images(), layers=("features",))
        assert [row.name for row in report.layers] == [f"features.{i}" for i in (0, 2, 6, 8)]

    def test_what_is_left_is_said(self):
        report = lsuv_init_(model := Uncalled(), torch.randn(8, 4))
        assert report.skipped == [("unused", "the forward pass does not call it")]
        assert "left  unused: the forward pass does not call it" in str(report)
        assert model.unused.weight.abs().max() < 0.5

    @pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_computed_weights_are_left(self, wrap):
        model = nn.Sequential(nn.Linear(4, 8, bias=False), wrap(nn.Linear(8, 4)))
        before = copy.deepcopy(model[1].state_dict())
        report = lsuv_init_(model, torch.randn(16, 4))
        assert [row.name for row in report.layers] == ["0"]
        assert report.skipped == [("1", "its weight is computed from other parameters")]
        torch.testing.assert_close(model[1].state_dict(), before, rtol=0, atol=0)

    @pytest.mark.parametrize("repeated", [False, True])
    def test_a_layer_that_undoes_the_scale_is_left(self, repeated):
        convolution = Standardised(3, 3, 3)
        parts = [convolution, convolution] if repeated else [convolution]
        model = nn.Sequential(*parts, nn.Conv2d(3, 4, 1, bias=False))
        before, batch = copy.deepcopy(convolution.state_dict()), images()
        report = lsuv_init_(model, batch)
        assert report.skipped == [("0", "its output does not follow the scale of its weight")]
        assert report.layers[0].variance_after == pytest.approx(1, abs=0.02)
        assert variances(model, batch)[str(len(parts))] == pytest.approx(report.layers[0].variance_after, rel=1e-4)
        torch.testing.assert_close(convolution.state_dict(), before, rtol=0, atol=0)

    def test_a_subclass_with_a_forward_of_its_own_runs_again(self):
        class Same(nn.Conv2d):
            def forward(self, x):
                return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)

        model, batch = nn.Sequential(Same(3, 4, 2, bias=False), nn.ReLU(), Same(4, 4, 2, bias=False)), images()
        report = lsuv_init_(model, batch)
        check_unit(model, batch)
        assert len(report) == 2


class TestFusedModules:
    def test_separable_convolutions(self):
        model = nn.Sequential(
            SeparableConv2d(3, 8, padding=1),
            SeparableConvBNAct2d(8, 8, padding=1, pre_activation="relu", activation="relu6"),
            SeparableConv2d(8, 4, bias=True),
        )
        batch = images()
        report = lsuv_init_(model, batch)
        names = [f"{i}.{name}" for i in range(3) for name in ("conv1", "pointwise")]
        assert [row.name for row in report.layers] == names
        assert report.skipped == []

        def parts(module: nn.Module, x: Tensor) -> list[Tensor]:
            middle = module.conv1(x)
            return [middle, module.pointwise(middle)]

        with torch.no_grad():
            first = parts(model[0], batch)
            second = parts(model[1], first[1].relu())
            third = parts(model[2], F.relu6(model[1].bn(second[1])))
        for output in first + second + third:
            assert output.var().item() == pytest.approx(1, abs=0.03)

    def test_unfused_forwards_say_the_same(self):
        from perfvl.nn.lsuv_layers import UNFUSED, watched

        modules = [
            SeparableConv2d(3, 8, padding=1, bias=True),
            SeparableConvBNAct2d(3, 3, padding=1, pre_activation="silu", activation="hardswish", bias=True),
            UpsampleConv2d(3, 4, batch_norm=True, activation="leaky_relu"),
            UpsampleConv2d(3, 4),
            *(ColorTransform(v, mean=(0.1, 0.2, 0.3), scale=0.7) for v in ("A", "B", "C", "E", "F", "maxout")),
            ColorTransform("D"),
            ColorTransform("D2"),
        ]
        assert {type(m).forward for m in modules} == set(UNFUSED)
        batch = images(2).abs()
        for module in modules:
            for p in module.parameters():
                nn.init.normal_(p)
            for training in (False, True):
                inputs = (batch, batch) if isinstance(module, SeparableConvBNAct2d) else (batch,)
                module.train(training)
                with perfvl.use_backend("reference"), torch.no_grad():
                    expected = module(*inputs)
                    with watched(module, [], lambda module, compute: compute()):
                        found = module(*inputs)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # without the batch's dimension
            for module in modules:
                if isinstance(module, SeparableConvBNAct2d):
                    continue
                module.eval()
                with watched(module, [], lambda module, compute: compute()):
                    found = module(batch[0])
                torch.testing.assert_close(found, module(batch[:1])[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("options", [{}, {"batch_norm": True, "activation": "relu"}])
    def test_upsampling_convolutions(self, options):
        model, batch = nn.Sequential(UpsampleConv2d(3, 6, **options), UpsampleConv2d(6, 2, bias=False)), images()
        report = lsuv_init_(model, batch)
        assert [row.name for row in report.layers] == ["0", "1"]
        with torch.no_grad():
            wide = F.interpolate(batch, scale_factor=2.0)
            first = F.conv2d(wide, model[0].weight, model[0].bias, padding=1)
            assert first.var().item() == pytest.approx(1, abs=0.03)
            assert model(batch).var().item() == pytest.approx(1, abs=0.03)

    @pytest.mark.parametrize("variant", ["A", "C", "D2", "F", "maxout"])
    def test_colour_nets(self, variant):
        model = nn.Sequential(ColorTransform(variant), nn.Conv2d(3, 8, 3, bias=False))
        batch = 255 * torch.rand(4, 3, 8, 8)
        report = lsuv_init_(model, batch)
        assert [row.name for row in report.layers] == ["0.conv1", "0.conv2", "1"]
        assert [row.variance_after for row in report.layers] == pytest.approx([1] * 3, abs=0.02)
        with torch.no_grad():
            assert model(batch).var().item() == pytest.approx(1, abs=0.03)

    def test_xception(self):
        model = xception(10, width=0.125, middle_blocks=1)
        batch = images(4, 64)
        report = lsuv_init_(model, batch)
        assert len(report) == sum(isinstance(m, LAYERS) for m in model.modules())
        assert report.skipped == []
        with torch.no_grad():
            assert model(batch).var().item() == pytest.approx(1, abs=0.03)

    def test_a_swapped_model(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        )
        outer, batch = nn.Sequential(model), images()
        assert perfvl.swap(outer)
        report = lsuv_init_(outer, batch)
        assert [row.name for row in report.layers] == ["0.0", "0.2", "0.3"]
        check_unit(outer, batch)
        assert not any("forward" in module.__dict__ for module in outer.modules())


class TestOtherModels:
    @pytest.mark.parametrize(
        "name", ["resnet18", "alexnet", "vgg11", "googlenet", "resnext50_32x4d", "mobilenet_v3_small"]
    )
    def test_torchvision(self, name):
        require("torchvision")
        build = getattr(importlib.import_module("torchvision").models, name)
        options = {"init_weights": False} if name == "googlenet" else {}
        model = build(num_classes=7, **options)
        batch = images(3, 64)
        # A fully connected layer of VGG takes 0.8 TFLOP to start from orthonormal rows.
        report = lsuv_init_(model, batch, orthonormal=name not in ("alexnet", "vgg11"))
        assert len(report) == sum(isinstance(m, LAYERS) for m in model.modules())
        assert report.skipped == []
        assert [row.variance_after for row in report.layers] == pytest.approx([1] * len(report), abs=0.02)
        if name in ("resnet18", "alexnet"):
            check_unit(model.eval() if name == "alexnet" else model, batch)

    @pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "tf_efficientnet_b0"])
    def test_timm(self, name):
        require("timm")
        options = {"img_size": 32} if name.startswith("vit") else {}
        model = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=7, **options)
        report = lsuv_init_(model, images(3, 32))
        assert len(report) == sum(isinstance(m, LAYERS) for m in model.modules())
        assert [row.variance_after for row in report.layers] == pytest.approx([1] * len(report), abs=0.02)

    def test_timm_with_standardised_convolutions(self):
        require("timm")
        model = importlib.import_module("timm").create_model("resnetv2_50", pretrained=False, num_classes=7)
        model.stem.conv = type("Std", (Standardised,), {})(3, 64, 7, 2, bias=False)
        report = lsuv_init_(model, images(3, 32))
        assert ("stem.conv", "its output does not follow the scale of its weight") in report.skipped

    def test_transformer_layers_have_no_fast_path_here(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model, batch = nn.TransformerEncoder(layer, 2), torch.randn(4, 5, 8)
        for mode in ("paper", "reference"):
            report = lsuv_init_(model.eval(), batch, mode=mode)
            assert {row.name for row in report.layers} == {f"layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)}
            assert [name for name, _ in report.skipped] == [f"layers.{i}.self_attn.out_proj" for i in (0, 1)]

    def test_compiled_models_run_eagerly_under_their_own_names(self):
        batch = images()
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return graph.forward

        inner = nn.Sequential(torch.compile(small_net(), backend=counting))
        assert len(lsuv_init_(inner, batch)) == 4
        assert graphs == []
        compiled = torch.compile(small_net(), backend="eager")
        assert [row.name for row in lsuv_init_(compiled, batch).layers] == ["0", "2", "6", "8"]
        compiled(batch)
        lsuv_init_(compiled, batch)
        check_unit(compiled._orig_mod, batch)
