"""The colour nets of the CaffeNet study as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perfvl.ops._library import bad_value, check_float
from perfvl.ops.color_transform import color_transform
from perfvl.reference.color_transform import centered


class _Variant(NamedTuple):
    hidden: int
    activation: str = "leaky_relu"
    residual: bool = False
    logarithms: int = 0  # beside the image


_VARIANTS = {
    "A": _Variant(10, "tanh"),
    "B": _Variant(3),
    "C": _Variant(10, residual=True),
    "D": _Variant(10, logarithms=1),
    "D2": _Variant(10, logarithms=2),
    "E": _Variant(16),
    "F": _Variant(10),
    "maxout": _Variant(10, "maxout"),
}


class ColorTransform(nn.Module):
    r"""A learned colour space: two 1x1 convolutions with activations on every pixel, before a network's first layer.

    The nets of "Systematic evaluation of CNN advances on the ImageNet" (Mishkin et al. 2016, arXiv:1606.02228, section
    3.2), with top-1 on ImageNet of a 128-pixel CaffeNet behind them (single runs; without one .471):

    ======== ======= ============================================ =====
    variant  widths  what it is                                   top-1
    ======== ======= ============================================ =====
    "A"      3-10-3  tanh                                         .463
    "B"      3-3-3   leaky ReLU                                   .480
    "C"      3-10-3  the image added before the second leaky ReLU .482
    "D"      6-10-3  batch norm of [x, log(x+1)], leaky ReLU      .482
    "D2"     9-10-3  the same of [x, log(x+1), log(256-x)]        .484
    "E"      3-16-3  leaky ReLU                                   .483
    "F"      3-10-3  leaky ReLU                                   .485
    "maxout" 3-10-3  maxout of two pieces, widths 20 and 6        .488
    ======== ======= ============================================ =====

    `conv1` and `conv2` are `nn.Conv2d`, with weights from a normal distribution of deviation 0.01 as published (LSUV
    came after it) and biases of 0. Leaky ones run :func:`perfvl.functional.color_transform`: one pass over the image,
    bytes if it has them, with nothing between saved; "D" and "D2" have their logarithms and their batch norm (`bn`,
    without affine parameters) before that, and "A" and "maxout" are whole in plain PyTorch. Of equal pieces the second
    wins and gets the gradient.

    Args:
        variant: a name in the table.
        mean: of the image's channels, subtracted first; three numbers, or None. Published: (104, 117, 124), of BGR.
        scale: multiplies what is left; published: 0.04. "D" and "D2" take the raw image, 0 to 255, and neither.
        negative_slope: of the leaky ReLUs, at least 0; published: 0.5.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value. dtypes, layouts, cost and errors of a call are
            those of the function.

    Example:
        >>> import torch
        >>> net = ColorTransform("F", mean=(104, 117, 124), scale=0.04)
        >>> net(torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)).shape
        torch.Size([2, 3, 8, 8])
    """

    mean: Tensor | None

    def __init__(
        self,
        variant: str = "F",
        *,
        mean: Sequence[float] | None = None,
        scale: float = 1.0,
        negative_slope: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "ColorTransform"
        if variant not in _VARIANTS:
            bad_value(op, "variant", repr(variant), f"one of {', '.join(_VARIANTS)}")
        found = _VARIANTS[variant]
        if mean is not None and len(mean) != 3:
            bad_value(op, "mean", f"{len(mean)} numbers", "one for each of 3 channels")
        for name, number in (("scale", scale), ("negative_slope", negative_slope)):
            check_float(op, name, number)
        if found.logarithms and (mean is not None or scale != 1):
            name, got = ("mean", mean) if mean is not None else ("scale", scale)
            bad_value(op, name, got, f'none with "{variant}": its logarithms are of the raw image')
        if negative_slope < 0:
            bad_value(op, "negative_slope", negative_slope, "at least 0")
        self.variant, self.scale, self.negative_slope = variant, scale, negative_slope
        channels, pieces = 3 * (1 + found.logarithms), 2 if found.activation == "maxout" else 1
        self.bn = None
        if found.logarithms:
            # Caffe's moving_average_fraction of 0.95.
            self.bn = nn.BatchNorm2d(channels, momentum=0.05, affine=False, device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(channels, pieces * found.hidden, 1, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(found.hidden, pieces * 3, 1, device=device, dtype=dtype)
        numbers = None if mean is None else torch.tensor([float(m) for m in mean], device=device)
        self.register_buffer("mean", numbers, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: normal weights of deviation 0.01, biases of 0."""
        for name, value in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(value, std=0.01)
            else:
                nn.init.zeros_(value)
        if self.bn is not None:
            self.bn.reset_running_stats()

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W], or without N, to the same in the dtype of the weights."""
        variant = _VARIANTS[self.variant]
        if variant.activation != "leaky_relu":
            x = centered(image, self.mean, self.scale, self.conv1.weight.dtype)
            act = torch.tanh if variant.activation == "tanh" else _maxout
            return act(self.conv2(act(self.conv1(x))))
        if self.bn is not None:
            image = self._features(self.bn, image, variant.logarithms)
        return color_transform(
            image,
            self.conv1.weight,
            self.conv1.bias,
            self.conv2.weight,
            self.conv2.bias,
            negative_slope=self.negative_slope,
            residual=variant.residual,
            mean=self.mean,
            scale=self.scale,
        )

    def _features(self, bn: nn.BatchNorm2d, image: Tensor, logarithms: int) -> Tensor:
        x = image if image.is_floating_point() else image.to(self.conv1.weight.dtype)
        functions = (torch.log1p, lambda x: torch.log(256 - x))
        features = torch.cat([x, *(f(x) for f in functions[:logarithms])], -3)
        return bn(features) if features.dim() == 4 else bn(features[None])[0]

    def extra_repr(self) -> str:
        return f'"{self.variant}", scale={self.scale}, negative_slope={self.negative_slope}'


def _maxout(z: Tensor) -> Tensor:
    """The larger of two halves of the channels; as in Caffe the second where they are equal."""
    first, second = z.chunk(2, -3)
    return torch.where((first > second) | first.isnan(), first, second)
