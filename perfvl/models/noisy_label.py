"""The networks that Decoupling, Co-teaching, Co-teaching+ and JoCoR were measured with.

Their layers and the names in their state_dict are those of the published experiments; initial weights are PyTorch's.
Sizes are per image: multiply-adds of convolutions and linear layers.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.models.noisy_label_news import NewsNet, PooledEmbedding

__all__ = [
    "MLP",
    "CoTeachingCNN",
    "GenderCNN",
    "JoCoRCNN",
    "NewsNet",
    "PooledEmbedding",
    "PreActBlock",
    "PreActResNet18",
    "SmallCNN",
]


class CoTeachingCNN(nn.Module):
    r"""CNN-9 of Co-teaching: nine times :math:`\text{LeakyReLU}_{0.01}(\text{BN}(\text{conv}_{3 \times 3}(x)))`, then
    global average, linear (Co-teaching, arXiv:1804.06872, released code).

    Channels 128-128-128, max-pool, 256-256-256, max-pool (padding 1), then 512-256-128 without padding. 745.5 M
    multiply-adds at 32 x 32 x 3 and 4.43 M parameters.

    Args:
        num_classes: K.
        in_channels: of the images, 1 for MNIST.
        dropout: "module" drops channels (0.25) after each max-pool in training alone. The released code calls
            ``F.dropout2d`` without ``training=``: under PyTorch 0.3, where the published figures come from, that drops
            nothing ("none"), and from 1.0 on it drops at evaluation too, which is not offered.

    Shapes: images [B, in_channels, H, W], H and W at least 28 -> logits [B, K].

    Raises:
        ValueError: bad `dropout` here, images of another shape in the call.

    Example:
        >>> import torch
        >>> CoTeachingCNN(10, in_channels=1).eval()(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, *, dropout: Literal["module", "none"] = "module"
    ) -> None:
        super().__init__()
        if dropout not in ("module", "none"):
            raise ValueError(f'CoTeachingCNN: `dropout` got {dropout!r}, expected "module" or "none"')
        channels = (in_channels, 128, 128, 128, 256, 256, 256, 512, 256, 128)
        for i in range(1, 10):
            self.add_module(f"c{i}", nn.Conv2d(channels[i - 1], channels[i], 3, padding=1 if i < 7 else 0))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels[i]))
        self.dropout = nn.Dropout2d(0.25) if dropout == "module" else nn.Identity()
        self.l_c1 = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_channels, H, W] -> logits [B, num_classes]."""
        _check_images(self, images, self.get_submodule("c1"), 28, None)
        x = images
        for i in range(1, 10):
            x = F.leaky_relu(_norm_conv(self, i, x), 0.01)
            if i in (3, 6):
                x = self.dropout(F.max_pool2d(x, 2))
        return self.l_c1(x.mean((2, 3)))


class JoCoRCNN(nn.Module):
    r"""CNN-7 of JoCoR and of Co-teaching+ on CIFAR-100: six blocks :math:`\text{ReLU}(\text{BN}(\text{conv}_{3 \times
    3}(x)))`, linear (JoCoR, arXiv:2003.02752, released code).

    Channels 64-64, 128-128, 196-16, a max-pool after each pair. 112.4 M multiply-adds and 0.518 M parameters (K = 10).

    Args:
        num_classes: K.
        in_channels: of the images.

    Shapes: images [B, in_channels, 32, 32] -> logits [B, K].

    Raises:
        ValueError: images of another shape in the call.

    Example:
        >>> import torch
        >>> JoCoRCNN(100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        channels = (in_channels, 64, 64, 128, 128, 196, 16)
        for i in range(1, 7):
            self.add_module(f"c{i}", nn.Conv2d(channels[i - 1], channels[i], 3, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels[i]))
        self.linear1 = nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_channels, 32, 32] -> logits [B, num_classes]."""
        _check_images(self, images, self.get_submodule("c1"), 32, 32)
        x = images
        for i in range(1, 7):
            x = F.relu(_norm_conv(self, i, x))
            if i % 2 == 0:
                x = F.max_pool2d(x, 2)
        return self.linear1(x.flatten(1))


class SmallCNN(nn.Module):
    r"""The small network of Co-teaching+ on CIFAR-10: :math:`2 \times \text{pool}(\text{ReLU}(\text{conv}_{5 \times
    5}(x)))`, then three linear layers 400-120-84-K (Co-teaching+, arXiv:1901.04215, released code).

    0.652 M multiply-adds and 62,006 parameters (K = 10); no batch-norm.

    Args:
        num_classes: K.
        in_channels: of the images.

    Shapes: images [B, in_channels, 32, 32] -> logits [B, K].

    Raises:
        ValueError: images of another shape in the call.

    Example:
        >>> import torch
        >>> SmallCNN()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_channels, 32, 32] -> logits [B, num_classes]."""
        _check_images(self, images, self.conv1, 32, 32)
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class MLP(nn.Module):
    r"""The MNIST network of Co-teaching+ and JoCoR: :math:`W_2\, \text{ReLU}(W_1 x)`, 784-256-K (Co-teaching+,
    arXiv:1901.04215, released code).

    0.203 M multiply-adds and 203,530 parameters (K = 10).

    Args:
        num_classes: K.
        in_features: numbers per image.

    Shapes: images [B, ...] with `in_features` numbers each -> logits [B, K].

    Raises:
        ValueError: images of another size in the call.

    Example:
        >>> import torch
        >>> MLP()(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_features: int = 784) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, 256)
        self.fc2 = nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, ...] -> logits [B, num_classes]."""
        if images.dim() < 2 or images.shape[1:].numel() != self.fc1.in_features:
            raise ValueError(
                f"MLP: `images` got shape {tuple(images.shape)}, expected [B, ...] with {self.fc1.in_features} numbers "
                "per image"
            )
        return self.fc2(F.relu(self.fc1(images.flatten(1))))


class PreActBlock(nn.Module):
    """conv(ReLU(BN(.))) twice, plus a shortcut: the block's input, or a 1x1 convolution of the first ReLU's output."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + shortcut


class PreActResNet18(nn.Module):
    """Co-teaching+'s network for Tiny-ImageNet: 3x3 convolution, 2-2-2-2 pre-activation blocks of 64 to 512 channels,
    4x4 average, linear (blocks: He et al. 2016, arXiv:1603.05027).

    Two oddities of the published experiment are kept, since its figures come from them. No batch-norm and ReLU follow
    the last block. And the average has a window of 4 and the last map 7 x 7 entries for the 56-pixel crops, so only
    the top-left 4 x 4 of them reach the classifier: it sees the image's upper left more than the rest.

    Args:
        num_classes: K.
        in_channels: of the images.

    Shapes: images [B, in_channels, H, W], H and W from 25 to 56 -> logits [B, K].

    Raises:
        ValueError: images of another shape in the call.

    Example:
        >>> import torch
        >>> PreActResNet18().eval()(torch.randn(1, 3, 56, 56)).shape
        torch.Size([1, 200])
    """

    def __init__(self, num_classes: int = 200, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(64, 64, 1), PreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(PreActBlock(64, 128, 2), PreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(PreActBlock(128, 256, 2), PreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(PreActBlock(256, 512, 2), PreActBlock(512, 512, 1))
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_channels, H, W] -> logits [B, num_classes]."""
        _check_images(self, images, self.conv1, 25, 56)
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(x[:, :, :4, :4].mean((2, 3)))


class GenderCNN(nn.Module):
    r"""Decoupling's network for the gender of LFW faces: three blocks of convolution, ReLU, 3x3 max-pool, the first two
    with local response normalisation, and three linear layers (Decoupling, arXiv:1706.02613, released code; Levi and
    Hassner 2015).

    Convolutions 7x7/4 to 96 channels, 5x5 to 256, 3x3 to 384; linear 13824-512-512-K, dropout after each hidden layer.
    TensorFlow's normalisation with radius 5 covers 11 channels and does not divide alpha by them, hence the numbers
    here.

    Args:
        num_classes: K.
        in_channels: of the images.
        dropout: probability after each hidden linear layer.

    Shapes: images [B, in_channels, 227, 227] -> logits [B, K].

    Raises:
        ValueError: images of another shape in the call.

    Example:
        >>> import torch
        >>> GenderCNN()(torch.randn(1, 3, 227, 227)).shape
        torch.Size([1, 2])
    """

    def __init__(self, num_classes: int = 2, in_channels: int = 3, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 96, 7, 4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.norm = nn.LocalResponseNorm(11, alpha=11e-4, beta=0.75, k=1.0)
        self.fc1 = nn.Linear(384 * 6 * 6, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_channels, 227, 227] -> logits [B, num_classes]."""
        _check_images(self, images, self.conv1, 227, 227)
        x = self.norm(F.max_pool2d(F.relu(self.conv1(images)), 3, 2))
        x = self.norm(F.max_pool2d(F.relu(self.conv2(x)), 3, 2))
        x = F.max_pool2d(F.relu(self.conv3(x)), 3, 2)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        return self.fc3(self.dropout(F.relu(self.fc2(x))))


def _norm_conv(model: nn.Module, block: int, x: Tensor) -> Tensor:
    return model.get_submodule(f"bn{block}")(model.get_submodule(f"c{block}")(x))


def _check_images(model: nn.Module, images: Tensor, first: nn.Module, least: int, most: int | None) -> None:
    """images [B, C, H, W] with the channels of the `first` convolution and sides from `least` to `most` pixels."""
    channels = first.in_channels
    sides = images.shape[2:]
    fits = images.dim() == 4 and images.shape[1] == channels and min(sides) >= least
    if not fits or (most is not None and max(sides) > most):
        wanted = f"of {least}" if least == most else f"of at least {least}" if most is None else f"of {least} to {most}"
        raise ValueError(
            f"{type(model).__name__}: `images` got shape {tuple(images.shape)}, expected [B, {channels}, H, W] with "
            f"sides {wanted} pixels"
        )
