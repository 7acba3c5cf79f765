"""CaffeNet128 with PyTorch's modules in the order of the published layer tables: what users write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.models.caffenet_config import CaffeNetConfig

ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU}


class Centred(nn.Module):
    """Pixels less their mean, times a scale."""

    def __init__(self, mean: Sequence[float], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image.to(self.mean.dtype) - self.mean) * self.scale


class ColorNet(Centred):
    """Two 1x1 convolutions, each with a leaky ReLU."""

    def __init__(self, mean: Sequence[float], scale: float, hidden: int = 10) -> None:
        super().__init__(mean, scale)
        self.conv1, self.conv2 = nn.Conv2d(3, hidden, 1), nn.Conv2d(hidden, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(super().forward(image)), 0.5, True)
        return F.leaky_relu(self.conv2(x), 0.5, True)


class SumOfPools(nn.Module):
    """The maximum and the mean of each window."""

    def __init__(self, size: int, stride: int, padding: int = 0, ceil_mode: bool = False) -> None:
        super().__init__()
        self.maximum = nn.MaxPool2d(size, stride, padding, ceil_mode=ceil_mode)
        self.mean = nn.AvgPool2d(size, stride, padding, ceil_mode=ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.maximum(x) + self.mean(x)


class Pyramid(nn.Module):
    """Pools of 1, 2 and 3 windows a side over 7 x 7 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList(SumOfPools(size, size, padding) for size, padding in ((7, 0), (4, 1), (3, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([pool(x).flatten(1) for pool in self.pools], 1)


def caffenet(config: CaffeNetConfig) -> nn.Sequential:
    """The variants that are timed, with the keys of :class:`perfvl.models.caffenet.CaffeNet128`."""
    model = nn.Sequential()
    color = ColorNet if config.color == "F" else Centred
    model.add_module("color", color(config.means, config.scale))
    pool = SumOfPools if config.pooling == "max_avg" else nn.MaxPool2d

    def finish(number: int, channels: int, norm: type[nn.Module]) -> None:
        model.add_module(f"act{number}", ACTIVATIONS[config.activation](inplace=True))
        if config.batch_norm == "after":
            model.add_module(f"bn{number}", norm(channels, momentum=0.05, affine=False))

    before, shapes = 3, ((11, 4, 0, 1), (5, 1, 2, 2), (3, 1, 1, 1), (3, 1, 1, 2), (3, 1, 1, 2))
    for i, (channels, (kernel, stride, padding, groups)) in enumerate(zip(config.channels, shapes, strict=True), 1):
        model.add_module(f"conv{i}", nn.Conv2d(before, channels, kernel, stride, padding, groups=groups))
        finish(i, channels, nn.BatchNorm2d)
        if i < 3 or (i == 5 and not config.spp):
            model.add_module(f"pool{i}", pool(3, 2, ceil_mode=True))
        before = channels
    model.add_module("flat", Pyramid() if config.spp else nn.Flatten())
    before *= 14 if config.spp else 9
    for i, width in zip((6, 7), config.fc_widths, strict=True):
        model.add_module(f"fc{i}", nn.Linear(before, width))
        finish(i, width, nn.BatchNorm1d)
        before = width
    model.add_module("fc8", nn.Linear(before, config.num_classes))
    return model
