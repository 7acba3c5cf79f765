"""Models of every family compute after swap what they computed before, in evaluation and in training."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from swap_support import check_same, require
from torch import Tensor, nn

from perfvl import swap

# Name, options, modules replaced, depthwise convolutions left, what one of the replaced ones runs.
TIMM: list[tuple[str, dict[str, Any], int, int, str]] = [
    ("mobilenetv1_100", {}, 13, 0, "depthwise 3x3 > norm > relu6 > pointwise > norm > relu6, in evaluation"),
    ("mobilenetv2_035", {"drop_path_rate": 0.2}, 17, 0, "depthwise 3x3 > norm > relu6 > pointwise > norm + residual"),
    ("mobilenetv3_small_050", {}, 2, 9, "depthwise 3x3 > norm > relu > pointwise > norm + residual"),
    ("mobilenetv4_conv_small_050", {}, 12, 0, "depthwise 5x5 > norm > pointwise > norm > relu | depthwise 5x5"),
    ("mnasnet_small", {}, 5, 10, "depthwise 3x3 > norm > relu > pointwise > norm"),
    ("tf_mobilenetv3_small_minimal_100", {}, 11, 0, "depthwise 3x3 > norm > relu > pointwise > norm"),
    ("efficientvit_b0", {}, 11, 4, "depthwise 3x3 > norm > hardswish > pointwise > norm"),
]
SQUEEZE = "squeeze-excite needs the whole depthwise result before the pointwise convolution"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    yield
    torch.set_num_threads(before)


def image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "options", "replaced", "left", "what"), TIMM, ids=[row[0] for row in TIMM])
def test_timm_models(name, options, replaced, left, what):
    require("timm")
    model = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=7, **options)
    report = check_same(model, image(33))
    assert (len(report), len(report.skipped)) == (replaced, left), str(report)
    assert what in str(report)


@pytest.mark.parametrize(
    ("package", "name", "why"),
    [
        ("timm", "efficientnet_b0", SQUEEZE),
        ("timm", "tinynet_e", SQUEEZE),
        ("torchvision.models", "efficientnet_b0", SQUEEZE),
        ("timm", "convnext_atto", "LayerNorm2d reads it, not a pointwise convolution"),
        ("torchvision.models", "convnext_tiny", "LayerNorm reads it, not a pointwise convolution"),
    ],
)
def test_models_that_stay_as_they_are(package, name, why):
    require(package.partition(".")[0])
    package = importlib.import_module(package)
    with torch.device("meta"):
        model = package.create_model(name) if hasattr(package, "create_model") else getattr(package, name)()
    classes = [type(module) for module in model.modules()]
    report = swap(model)
    assert not report
    assert {text for _, text in report.skipped} == {why}
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("start_with_relu", [True, False])
@pytest.mark.parametrize("widths", [(8, 8, 1), (8, 16, 2)], ids=["identity", "skip"])
def test_blocks_of_timm_legacy_xception(widths, start_with_relu):
    require("timm")
    channels, out_channels, stride = widths
    block = importlib.import_module("timm.models.xception").Block(
        channels, out_channels, 3, stride, start_with_relu=start_with_relu
    )
    report = check_same(nn.Sequential(block), torch.randn(2, 8, 9, 11))
    relu = "relu > " if start_with_relu else ""
    layer = "depthwise 3x3 > pointwise > norm"
    chain = f"{relu}{layer} | relu > {layer} | relu > {layer}"
    assert report.replaced == [("0", f"{chain} + residual") if stride == 1 else ("0.rep", chain)]


def test_feature_hooks_on_the_first_activation_of_timm_legacy_xception_fire():
    require("timm")
    block = importlib.import_module("timm.models.xception").Block(8, 8, 2)
    seen: list[Tensor] = []
    block.rep[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    report = check_same(nn.Sequential(block), torch.randn(2, 8, 9, 11))
    layer = "depthwise 3x3 > pointwise > norm"
    assert report.replaced == [("0", f"{layer} | relu > {layer} + residual")]
    assert len(seen) == 10  # of every model that was compared, in evaluation and in training
    assert all(feature.min() == 0 for feature in seen)


class Residual(nn.Module):
    """The residual connection starts behind the norm; stochastic depth before it ends."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.layers = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.Conv2d(6, 6, 1, bias=False),
            nn.BatchNorm2d(6),
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.drop(self.layers(x))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_residual_connections_from_the_middle_with_stochastic_depth(rate):
    require("timm")
    drop = importlib.import_module("timm.layers").DropPath(rate)
    report = check_same(nn.Sequential(Residual(drop), Residual(nn.Identity())), torch.randn(4, 6, 7, 8))
    what = "relu > depthwise 3x3 > pointwise > norm + residual"
    assert report.replaced == [("0", what), ("1", what)]


def test_timm_legacy_xception_as_a_whole():
    require("timm")
    with torch.device("meta"):
        model = importlib.import_module("timm").create_model("legacy_xception", pretrained=False)
    keys = list(model.state_dict())
    report = swap(model)
    assert [name for name, _ in report.replaced] == [
        "",
        *(f"block{i}.rep" for i in (1, 2, 3)),
        *(f"block{i}" for i in range(4, 12)),
        "block12.rep",
    ]
    assert not report.skipped
    assert list(model.state_dict()) == keys
    assert len(keys) == 276


@pytest.mark.parametrize("kind", ["XceptionModule", "PreXceptionModule"])
@pytest.mark.parametrize(
    "options",
    [
        {"out_chs": 8},
        {"out_chs": (8, 12, 16), "stride": 2},
        {"out_chs": 8, "pad_type": "same", "dilation": 2, "stride": 2},
        {"out_chs": 8, "start_with_relu": False, "no_skip": True},
    ],
    ids=["identity", "strided", "same", "activation in the layers"],
)
def test_blocks_of_timm_xception41(kind, options):
    require("timm")
    options = dict(options)
    if kind == "PreXceptionModule":
        options.pop("start_with_relu", None)
    block = getattr(importlib.import_module("timm.models.xception_aligned"), kind)(
        8, norm_layer=nn.BatchNorm2d, **options
    )
    report = check_same(nn.Sequential(block), torch.randn(2, 8, 10, 13))
    assert report
    assert not report.skipped
    pure = kind == "PreXceptionModule"
    assert all(("in evaluation" in what) != pure for _, what in report.replaced)


@pytest.mark.parametrize("padding", ["", "same"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_separable_layers_of_timm(padding, stride, multiplier):
    require("timm")
    layers = importlib.import_module("timm.layers")
    model = nn.Sequential(
        layers.SeparableConvNormAct(6, 10, 3, stride, padding=padding, channel_multiplier=multiplier),
        layers.SeparableConv2d(10, 5, 5, stride, padding=padding, channel_multiplier=multiplier, bias=True),
    )
    report = check_same(model, torch.randn(2, 6, 12, 15))
    assert report.replaced == [
        ("0", "depthwise 3x3 > pointwise > norm > relu"),
        ("1", "depthwise 5x5 > pointwise"),
    ]


TORCHVISION: list[tuple[str, dict[str, Any], int, int, str]] = [
    ("mobilenet_v2", {"width_mult": 0.25}, 17, 0, "depthwise 3x3 > norm > relu6 > pointwise > norm + residual"),
    ("mobilenet_v3_small", {}, 2, 9, "depthwise 3x3 > norm > relu > pointwise > norm"),
    ("mnasnet0_5", {}, 17, 0, "depthwise 5x5 > norm > relu > pointwise > norm + residual"),
    ("shufflenet_v2_x0_5", {}, 19, 0, "depthwise 3x3 > norm > pointwise > norm > relu"),
]


@pytest.mark.parametrize(
    ("name", "options", "replaced", "left", "what"), TORCHVISION, ids=[row[0] for row in TORCHVISION]
)
def test_torchvision_models(name, options, replaced, left, what):
    require("torchvision")
    models = importlib.import_module("torchvision").models
    report = check_same(getattr(models, name)(weights=None, num_classes=7, **options), image(33))
    assert (len(report), len(report.skipped)) == (replaced, left), str(report)
    assert what in str(report)


def test_heads_of_torchvision_ssdlite():
    require("torchvision")
    ssdlite = importlib.import_module("torchvision.models.detection.ssdlite")
    model = nn.Sequential(
        ssdlite._extra_block(6, 8, nn.BatchNorm2d), ssdlite._prediction_block(8, 5, 3, nn.BatchNorm2d)
    )
    report = check_same(model, torch.randn(2, 6, 9, 9))
    assert report.replaced == [
        ("0", "relu6 > depthwise 3x3 > norm > relu6 > pointwise > norm > relu6, in evaluation"),
        ("1", "depthwise 3x3 > norm > relu6 > pointwise, in evaluation"),
    ]


@pytest.mark.parametrize("tf_padding", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_inverted_residuals_of_transformers_mobilenet_v2(tf_padding, stride):
    require("transformers")
    module = importlib.import_module("transformers.models.mobilenet_v2.modeling_mobilenet_v2")
    config = importlib.import_module("transformers").MobileNetV2Config(tf_padding=tf_padding)
    block = module.MobileNetV2InvertedResidual(config, 8, 8, stride)
    report = check_same(nn.Sequential(block), torch.randn(2, 8, 9, 12))
    end = " + residual" if stride == 1 else ""
    assert report.replaced == [("0", f"relu6 > depthwise 3x3 > norm > relu6 > pointwise > norm{end}, in evaluation")]


class ConvModule(nn.Module):
    """As mmcv has it: switches by argument, layers in a given order, the norm under a name of its own."""

    def __init__(self, channels: int, out_channels: int, kernel: int, groups: int, activate: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.add_module("bn", nn.BatchNorm2d(out_channels))
        self.order = ("conv", "norm", "act")
        self.with_activation = activate
        if activate:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self) -> nn.Module:
        return self.bn

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class DepthwiseSeparableConvModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(6, 6, 3, 6)
        self.pointwise_conv = ConvModule(6, 9, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


def test_modules_that_take_switches_as_mmcv():
    report = check_same(nn.Sequential(DepthwiseSeparableConvModule()), torch.randn(2, 6, 7, 8))
    assert report.replaced == [("0", "depthwise 3x3 > norm > relu > pointwise > norm > relu, in evaluation")]


class SeparableSequential(nn.Sequential):
    """As segmentation_models_pytorch has it, dilated, in its DeepLabV3+."""

    def __init__(self, channels: int, out_channels: int, dilation: int, bias: bool) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False),
            nn.Conv2d(channels, out_channels, 1, bias=bias),
        )


def test_dilated_separable_convolutions_as_segmentation_models():
    model = nn.Sequential(SeparableSequential(6, 9, 4, True), nn.BatchNorm2d(9), nn.ReLU())
    report = check_same(model, torch.randn(2, 6, 11, 10))
    assert report.replaced == [("", "depthwise 3x3 > pointwise > norm > relu")]


class TwoConvolutions(nn.Module):
    """KernelBench level 1, problem 86."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=bias)
        self.pointwise = nn.Conv2d(6, 9, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_of_two_convolutions(bias):
    report = check_same(TwoConvolutions(bias), torch.randn(2, 6, 12, 9))
    assert report.replaced == [("", "depthwise 3x3 > pointwise")]


class Functional(nn.Module):
    """MobileNet as in pytorch-cifar: activations are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 9, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(9)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn1(self.conv1(x)))
        return nn.functional.relu(self.bn2(self.conv2(x)), inplace=True)


def test_activations_that_are_functions():
    report = check_same(Functional(), torch.randn(2, 6, 7, 8))
    assert report.replaced == [("", "depthwise 3x3 > norm > relu > pointwise > norm > relu, in evaluation")]


def test_separable_cells_as_darts():
    def half(stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(6, 6, 5, stride, 2, groups=6, bias=False)
        return [nn.ReLU(), depthwise, nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False)]

    report = check_same(nn.Sequential(*half(2), *half(1)), torch.randn(2, 6, 12, 13))
    layer = "relu > depthwise 5x5 > pointwise > norm"
    assert report.replaced == [("", f"{layer} | {layer}")]


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(inplace=True), nn.LeakyReLU(inplace=True)]
)
def test_every_activation_everywhere(activation):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 1),
        activation,
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        activation,
        nn.Conv2d(6, 8, 1),
        activation,
    )
    report = check_same(model, torch.randn(2, 4, 7, 8))
    name = {"ReLU": "relu", "ReLU6": "relu6", "SiLU": "silu", "Hardswish": "hardswish", "LeakyReLU": "leaky_relu"}[
        type(activation).__name__
    ]
    assert report.replaced == [("", f"{name} > depthwise 3x3 > {name} > pointwise > {name}, in evaluation")]
