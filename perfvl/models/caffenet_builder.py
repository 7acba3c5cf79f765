"""How CaffeNet128 is put together from its config."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from perfvl.models.caffenet_config import CaffeNetConfig
from perfvl.models.caffenet_parts import (
    Centered,
    Deeper,
    FixedColorSpace,
    MeanOverSpace,
    SpatialPyramidPool2d,
    WithImage,
)
from perfvl.nn.activation import Maxout
from perfvl.nn.activation_names import IN_PLACE, NormAct2d, activation
from perfvl.nn.color_transform import ColorTransform
from perfvl.nn.pooling import MaxAvgPool2d, StochasticPool2d
from perfvl.ops._library import bad_value

# max(act(x)) is act(max(x)) of what never falls: the pool goes first and leaves the activation a fourth of the work.
_RISING = {"relu", "tanh", "scaled_tanh", "asinh", "vlrelu", "elu", "elu_leaky", "softplus", "selu", "frelu", "felu"}
_POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d, "max_avg": MaxAvgPool2d, "stochastic": StochasticPool2d}
_LEARNED_COLORS = {"A", "B", "C", "D", "D2", "E", "F", "maxout"}
_MOMENTUM = 0.05  # Caffe's moving_average_fraction of 0.95


class LayerRow(NamedTuple):
    """A layer: its name, channels and side of its output (None: a vector), multiply-adds of an image, parameters."""

    layer: str
    channels: int
    size: int | None
    macs: int
    parameters: int


class Builder:
    """Adds modules in the order in which they run, and knows the channels and side of what comes out of the last."""

    def __init__(self, model: nn.Module, layers: list[LayerRow], config: CaffeNetConfig) -> None:
        self.model, self.layers, self.config = model, layers, config
        self.channels, self.size = config.in_channels, config.input_size

    def add(self, name: str, module: nn.Module) -> None:
        self.model.add_module(name, module)

    def row(self, layer: str, channels: int, size: int | None, module: nn.Module | None = None) -> None:
        """A layer of the table, of which `module` has the weights."""
        macs = 0
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            macs = module.weight.numel() * (size or 1) ** 2
        parameters = 0 if module is None else sum(p.numel() for p in module.parameters())
        self.layers.append(LayerRow(layer, channels, size, macs, parameters))

    def input(self) -> None:
        config, color = self.config, self.config.color
        if color in _LEARNED_COLORS:
            raw = color in ("D", "D2")
            net = ColorTransform(color) if raw else ColorTransform(color, mean=config.means, scale=config.scale)
            self.add("color", net)
            return
        mean = config.means
        layers: list[nn.Module] = []
        if color.endswith("_bn"):
            layers += [FixedColorSpace(color[:-3]), nn.BatchNorm2d(self.channels, momentum=_MOMENTUM, affine=False)]
        elif color == "gray":
            blue, green, red = mean
            mean = (0.114 * blue + 0.587 * green + 0.299 * red,)
            layers += [FixedColorSpace(color), Centered(mean, config.scale)]
        else:
            layers.append(Centered(mean, config.scale))
        if color == "learned_gray":
            layers.append(nn.Conv2d(self.channels, 1, 1))
        if color.endswith("gray"):
            self.channels = 1
        self.add("color", layers[0] if len(layers) == 1 else nn.Sequential(*layers))

    def convolution(self, stage: int) -> None:
        """conv1 to conv5, each with what stands between it and the next."""
        config = self.config
        kernel = config.conv1_kernel if stage == 1 else 5 if stage == 2 else 3
        stride = config.conv1_stride if stage == 1 else 1
        padding = kernel // 2 if stage > 1 and config.conv_padding else 0
        if config.table == "slides" and stage == 2:
            stride, padding = 2, 1
        if config.pooling == "strided" and stage in (2, 3, 5):
            stride = 2
        groups = config.groups if stage in (2, 4, 5) and self.channels % config.groups == 0 else 1
        channels, pieces = config.channels[stage - 1], self.pieces(config.activation)
        self.size = _slid(self.size, kernel, stride, padding)
        self.check_size(f"conv{stage}")
        biased = not (config.batch_norm == "before" and config.bn_affine)
        layer = nn.Conv2d(self.channels, pieces * channels, kernel, stride, padding, groups=groups, bias=biased)
        self.channels = channels
        self.add(f"conv{stage}", layer)
        self.row(f"conv{stage}", channels, self.size, layer)

        depth = config.conv1_depth if stage == 1 else 0
        pooled = stage in (1, 2, 5) and config.pooling != "strided" and (stage < 5 or config.pools_last)
        early = (
            pooled
            and (config.pooling, depth) == ("max", 0)
            and self.never_falls(config.activation)
            and config.batch_norm != "after"
            and not config.conv_dropout[stage - 1]
        )
        norm: str = config.batch_norm
        if early:
            if norm == "before":
                self.norm(stage, channels)
                norm = "none"
            self.pool(stage)
        self.activation(stage, config.activation, groups, norm=norm)
        if depth:
            deeper = Deeper(
                channels, depth, config.conv1_depth_kernel, config.conv1_residual, lambda: self.active(channels)
            )
            self.add("deeper", deeper)
            for i in range(depth):
                self.row(f"conv1x{i + 1}", channels, self.size, deeper[2 * i])
        if config.conv_dropout[stage - 1]:
            self.add(f"drop{stage}", nn.Dropout(config.conv_dropout[stage - 1]))
        if pooled and not early:
            self.pool(stage)
        if config.lrn and stage < 3:
            self.add(f"norm{stage}", nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0))

    def pool(self, stage: int) -> None:
        config, name = self.config, f"pool{stage}"
        size = _pooled(self.size, config.pool_size, 2, config.pool_padding, config.ceil_mode)
        pool: nn.Module = _POOLS[config.pooling](
            config.pool_size, 2, padding=config.pool_padding, ceil_mode=config.ceil_mode
        )
        if config.color == "concat_rgb" and stage < 5:
            pool = WithImage(pool)
            self.channels += 3
        self.size = size
        self.check_size(name)
        self.add(name, pool)
        self.row(name, self.channels, size)

    def classifier(self) -> None:
        """fc6 to fc8."""
        config = self.config
        name = config.fc_activation or config.activation
        pieces = self.pieces(name)
        flat = not config.fc_kernels
        if config.spp_levels:
            self.add("spp", SpatialPyramidPool2d(config.spp_levels, config.pooling == "max_avg"))
            for level in config.spp_levels:
                SpatialPyramidPool2d.windows(level, self.size)
            self.row("spp", self.channels, None)
            features = self.channels * sum(level**2 for level in config.spp_levels)
        elif flat:
            self.add("flatten", nn.Flatten())
            features = self.channels * self.size**2
        else:
            features = self.channels
        for i, width in enumerate(config.fc_widths):
            label, after = ("fc6", "fc7", "fc7a")[i], ("6", "7", "7a")[i]
            biased = not (config.batch_norm == "before" and config.bn_affine)
            layer: nn.Module
            if flat:
                layer = nn.Linear(features, pieces * width, bias=biased)
            else:
                kernel = config.fc_kernels[i]
                padding = kernel // 2 if config.fc_padding else 0
                self.size = _slid(self.size, kernel, 1, padding)
                self.check_size(label)
                layer = nn.Conv2d(features, pieces * width, kernel, padding=padding, bias=biased)
            self.add(label, layer)
            self.row(label, width, None if flat else self.size, layer)
            if config.batch_norm == "before":
                self.norm(after, pieces * width, flat)
            self.channels, features = width, width
            self.activation(after, name, flat=flat)
            if config.batch_norm == "after":
                self.norm(after, width, flat)
            if not flat and config.average == "fc6":
                self.add("average", MeanOverSpace())
                flat = True
            if config.fc_dropout[i]:
                self.add(f"drop{after}", nn.Dropout(config.fc_dropout[i]))
        both = config.average == "scores_and_maximum"
        # The mean of a 1x1 convolution is the convolution of the mean, which is one position instead of nine.
        if not flat and not both:
            self.add("average", MeanOverSpace())
        last: nn.Module = (
            nn.Conv2d(features, config.num_classes, 1) if both else nn.Linear(features, config.num_classes)
        )
        self.add("fc8", last)
        self.row("fc8", config.num_classes, self.size if both else None, last)
        if both:
            self.add("average", MeanOverSpace(maximum=True))

    def pieces(self, name: str) -> int:
        return self.config.activation_options.get("pieces", 2) if name == "maxout" else 1

    def active(self, parameters: int | tuple[int, ...], name: str | None = None) -> nn.Module:
        config = self.config
        options = config.activation_options if name in (None, config.activation) else {}
        module = activation(name or config.activation, parameters, mode=config.mode, **options)
        if isinstance(module, IN_PLACE) and self.never_falls(name or config.activation):
            module.inplace = True  # backward of what comes before does not read it
        return module

    def never_falls(self, name: str) -> bool:
        options = self.config.activation_options
        return name in _RISING and all(options.get(slope, 1) >= 0 for slope in ("alpha", "slope", "a", "b"))

    def activation(self, number: int | str, name: str, groups: int = 1, flat: bool = False, norm: str = "none") -> None:
        """An activation, or with a norm both as one module under the norm's name."""
        by_position = name.startswith("apl") and "position" in (
            self.config.activation_options.get("shared"),
            "position" if self.config.mode == "reference" else None,
        )
        sizes = () if flat else (self.size, self.size)
        module = self.active((self.channels, *sizes) if by_position else self.channels, name)
        if isinstance(module, Maxout):
            module.groups = groups
        if norm != "none":
            if norm == "after" and isinstance(module, IN_PLACE):
                module.inplace = False
            channels = self.channels * (self.pieces(name) if norm == "before" else 1)
            affine = self.config.bn_affine
            self.add(f"bn{number}", NormAct2d(channels, module, order=norm, affine=affine, momentum=_MOMENTUM))
        elif name != "identity":
            self.add(f"act{number}", module)

    def norm(self, number: int | str, channels: int, flat: bool = False) -> None:
        norm = nn.BatchNorm1d if flat else nn.BatchNorm2d
        self.add(f"bn{number}", norm(channels, momentum=_MOMENTUM, affine=self.config.bn_affine))

    def check_size(self, layer: str) -> None:
        if self.size < 1:
            bad_value("CaffeNet128", "input_size", self.config.input_size, f"images that leave pixels for {layer}")


def _slid(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _pooled(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Caffe's rule and PyTorch's: a last window that would start in the padding is left out."""
    over = size + 2 * padding - kernel
    count = (-(-over // stride) if ceil_mode else over // stride) + 1
    return count - (ceil_mode and (count - 1) * stride >= size + padding)
