"""What the four StackGAN networks are made of. Parameters and their names are those of the published checkpoints."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.nn.fused_blocks import is_touched
from perfvl.nn.upsample_conv import upsample_norm
from perfvl.ops._library import bad_type, bad_value
from perfvl.ops.conditioning import add_condition, conditioned_conv2d


def initialize(module: nn.Module) -> None:
    """The published start: weights of convolutions and linear layers N(0, 0.02), of batch norms N(1, 0.02); biases of
    linear layers and batch norms 0, those of convolutions as PyTorch has them. Running statistics stay.

    Example:
        >>> from torch import nn
        >>> norm = nn.BatchNorm2d(8)
        >>> initialize(norm)
        >>> bool((norm.weight - 1).abs().max() < 0.2)
        True
    """
    for part in module.modules():
        if isinstance(part, nn.modules.conv._ConvNd):
            nn.init.normal_(part.weight, 0.0, 0.02)
        elif isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
            nn.init.normal_(part.weight, 1.0, 0.02)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0.0, 0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def in_layout_of(convolution: nn.Module, image: Tensor) -> Tensor:
    """The image as the weights are: PyTorch copies those to the image's layout, in every call and every gradient."""
    weight = cast(nn.Conv2d, convolution).weight
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return image.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3x3 that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


def conv4(in_channels: int, out_channels: int) -> nn.Conv2d:
    """4x4 that halves the size."""
    return nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=False)


def normed(convolution: nn.Conv2d, activation: nn.Module) -> tuple[nn.Module, ...]:
    """A convolution, its batch norm and an activation that writes over the batch norm's output."""
    return convolution, nn.BatchNorm2d(convolution.out_channels), activation


def leaky_relu() -> nn.LeakyReLU:
    return nn.LeakyReLU(0.2, inplace=True)


def relu() -> nn.ReLU:
    return nn.ReLU(inplace=True)


class UpBlock(nn.Sequential):
    """Nearest x2, 3x3 convolution, batch norm, ReLU: [N, C, H, W] -> [N, O, 2H, 2W], the enlarged input never written.

    The modules run one after the other where they are no longer what this class made of them, or somebody watches.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2.0), *normed(conv3(in_channels, out_channels), relu()))

    def forward(self, input: Tensor) -> Tensor:
        kinds = (nn.Upsample, nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
        if tuple(map(type, self)) != kinds or any(map(is_touched, self)):
            return super().forward(input)
        convolution, norm = cast(nn.Conv2d, self[1]), cast(nn.BatchNorm2d, self[2])
        return upsample_norm(input, convolution.weight, convolution.bias, norm, "relu")


def add_up_blocks(network: nn.Module, channels: int, blocks: int) -> None:
    """Children `upsample1`, `upsample2`, ..., each of which halves the channels, and `img`, whose output has three."""
    for i in range(blocks):
        network.add_module(f"upsample{i + 1}", UpBlock(channels >> i, channels >> i + 1))
    network.add_module("img", nn.Sequential(conv3(channels >> blocks, 3), nn.Tanh()))


def run_up_blocks(network: nn.Module, x: Tensor, blocks: int) -> Tensor:
    for name in (*(f"upsample{i + 1}" for i in range(blocks)), "img"):
        x = network.get_submodule(name)(x)
    return x


class ResidualBlock(nn.Module):
    """``ReLU(x + BN(conv(ReLU(BN(conv(x))))))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        second = conv3(channels, channels), nn.BatchNorm2d(channels)
        self.block = nn.Sequential(*normed(conv3(channels, channels), relu()), *second)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu_(self.block(input).add_(input))


class JointBlock(nn.Sequential):
    """3x3 convolution of [image code, condition repeated over space], batch norm, ReLU, with nothing repeated."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__(*normed(conv3(channels + condition_dim, channels), relu()))

    def forward(self, code: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        convolution, norm, activation = self
        weight = cast(nn.Conv2d, convolution).weight
        return activation(norm(conditioned_conv2d(code, condition, weight)))


class ConditionalHead(nn.Module):
    """Probability that an image is real and its condition right: features [N, C, 4, 4], condition [N, e] -> [N]."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.channels, self.condition_dim = channels, condition_dim
        joint = normed(conv3(channels + condition_dim, channels), leaky_relu())
        self.outlogits = nn.Sequential(*joint, nn.Conv2d(channels, 1, 4, 4), nn.Sigmoid())

    def pairs(self, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Logits of each (features, condition), in this order. A condition of fewer rows meets the first images.

        The 3x3 convolution of both is one of the features, which pairs of the same features tensor share, plus what the
        condition adds to it. Batch norm takes the statistics of each pair by itself.
        """
        convolution, norm, activation, last, _ = self.outlogits
        # Split and not sliced for every pair: backward then writes one gradient of the whole weight.
        of_image, of_condition = cast(nn.Conv2d, convolution).weight.split((self.channels, self.condition_dim), 1)
        # Dense, as the library wants it: else it makes it so for every product.
        of_image = in_layout_of(convolution, of_image)
        convolved: dict[int, Tensor] = {}
        logits = []
        for features, condition in pairs:
            if id(features) not in convolved:
                convolved[id(features)] = F.conv2d(features, of_image, padding=1)
            x = add_condition(convolved[id(features)][: len(condition)], condition, of_condition)
            logits.append(torch.flatten(last(activation(norm(x)))))
        return logits

    def logits(self, features: Tensor, condition: Tensor) -> Tensor:
        """[N], before the sigmoid."""
        return self.pairs((features, condition))[0]

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        check_vectors("get_cond_logits", "condition", condition, self.condition_dim, len(features))
        return self.logits(features, condition).sigmoid()


class UnconditionalHead(nn.Module):
    """Probability that an image is real: features [N, C, 4, 4] -> [N]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.outlogits = nn.Sequential(nn.Conv2d(channels, 1, 4, 4), nn.Sigmoid())

    def logits(self, features: Tensor) -> Tensor:
        """[N], before the sigmoid."""
        return torch.flatten(self.outlogits[0](features))

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(features).sigmoid()


def check_vectors(op: str, argument: str, value: object, width: int, rows: int | None = None) -> None:
    """`value` must be a tensor [N, width], of as many rows as said."""
    if not isinstance(value, Tensor):
        bad_type(op, argument, type(value).__name__, "a torch.Tensor")
    if value.dim() != 2 or value.shape[1] != width or (rows is not None and len(value) != rows):
        bad_value(op, argument, f"shape {tuple(value.shape)}", f"[{'N' if rows is None else rows}, {width}]")


def check_images(op: str, argument: str, value: object, size: int, rows: int | None = None) -> None:
    """`value` must be a tensor [N, 3, size, size], of as many rows as said."""
    if not isinstance(value, Tensor):
        bad_type(op, argument, type(value).__name__, "a torch.Tensor")
    if value.dim() != 4 or tuple(value.shape[1:]) != (3, size, size) or (rows is not None and len(value) != rows):
        expected = f"[{'N' if rows is None else rows}, 3, {size}, {size}]"
        bad_value(op, argument, f"shape {tuple(value.shape)}", expected)


def check_sizes(op: str, **sizes: object) -> None:
    """All must be ints of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            bad_value(op, name, repr(value), "an int of at least 1")


def doublings(op: str, image_size: object, start: int = 4) -> int:
    """How often `start` is doubled to come to the image size: at least once."""
    if isinstance(image_size, bool) or not isinstance(image_size, int):
        bad_value(op, "image_size", repr(image_size), f"{start} times a power of two, at least {2 * start}")
    times = (image_size // start).bit_length() - 1
    if times < 1 or start << times != image_size:
        bad_value(op, "image_size", image_size, f"{start} times a power of two, at least {2 * start}")
    return times
