"""Xception (Chollet, arXiv:1610.02357): 36 convolutions, of which 34 are depthwise separable."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perfvl.nn.fused_blocks import is_touched, runs_fused
from perfvl.nn.separable_chain import ChainLayer, run_chain
from perfvl.nn.separable_conv import SeparableConv2d

_BETWEEN = {"none": None, "relu": F.relu, "elu": F.elu}


def xception(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> Xception:
    """Xception with the options of :class:`Xception`; the network of the paper's ImageNet experiments without any.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in xception().parameters())
        22855952
    """
    return Xception(num_classes, in_channels, **options)


class Xception(nn.Module):
    r"""Stem, entry flow (blocks 1 to 3), middle flow (8 blocks of 728 channels), exit flow, pooling, linear.

    Modules and state_dict are those of timm's `legacy_xception` (276 entries). A batch norm and the ReLU after it are
    no pass over memory of their own: evaluation without gradients writes them with the convolution before, training
    reads them with the convolution after, and saves one tensor for each separable convolution. Modules of a block that
    have hooks, or were replaced, run one after the other as written: timm's five feature points (`feature_info`) work.

    Args:
        num_classes: K; 0 for pooled features instead of logits.
        in_channels: of the images.
        keras: batch norm and pooling of the Keras original, where the published weights come from: eps 1e-3 and
            momentum 0.01 (PyTorch's convention) instead of 1e-5 and 0.1, and TensorFlow's padding, which differs at
            pools of even sizes (at 299 pixels that of block2 alone).
        hidden_features: widths of fully connected layers, each with ReLU, before the last; (4096, 4096) is the
            paper's variant for JFT.
        residual: False leaves out all residual connections (section 4.6 of the paper: worse).
        intermediate_activation: between depthwise and pointwise convolution, "relu" or "elu" (section 4.7: worse than
            "none"). Runs the two unfused.
        drop_rate: of the dropout before the last layer, while training. Old releases of timm drop nothing here.
        width: factor on all channels, rounded to multiples of 8.
        middle_blocks: of the middle flow.
        stem_stride: of the first convolution; 1 for small images.

    Shapes: images [B, in_channels, H, W], H and W at least 7 (5 with `stem_stride` 1) -> logits [B, K].

    Weights from timm, `legacy_xception.tf_in1k`, want 299 x 299 pixels (bicubic, crop 0.8975), mean = std = 0.5. They
    were trained with `keras` settings, and are published and evaluated with PyTorch's.

    Recipes of the paper (section 4.3). ImageNet: SGD, momentum 0.9, learning rate 0.045, times 0.94 every 2 epochs,
    dropout 0.5. JFT: RMSprop, momentum 0.9, learning rate 0.001, times 0.9 every 3,000,000 images, no dropout. Both:
    weight decay 1e-5 (Inception V3's 4e-5 is too much), and evaluation with averaged weights (Polyak).

    Raises:
        ValueError: an argument out of range here, images of another shape in the call; while training, one value per
            channel only (`nn.BatchNorm2d` has it so).

    Example:
        >>> import torch
        >>> model = Xception(10, 1, width=0.125, middle_blocks=1, stem_stride=1).eval()
        >>> model(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        keras: bool = False,
        hidden_features: Sequence[int] = (),
        residual: bool = True,
        intermediate_activation: Literal["none", "relu", "elu"] = "none",
        drop_rate: float = 0.0,
        width: float = 1.0,
        middle_blocks: int = 8,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        _check("num_classes", num_classes, num_classes >= 0, "at least 0")
        _check("in_channels", in_channels, in_channels >= 1, "at least 1")
        _check("hidden_features", hidden_features, all(n >= 1 for n in hidden_features), "widths of at least 1")
        _check(
            "intermediate_activation",
            intermediate_activation,
            intermediate_activation in _BETWEEN,
            f"one of {', '.join(_BETWEEN)}",
        )
        _check("drop_rate", drop_rate, 0 <= drop_rate < 1, "at least 0 and below 1")
        _check("width", width, width > 0, "above 0")
        _check("middle_blocks", middle_blocks, middle_blocks >= 0, "at least 0")
        _check("stem_stride", stem_stride, stem_stride >= 1, "at least 1")
        c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
            max(8, 8 * round(channels * width / 8)) for channels in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        self.in_channels, self.num_features, self.drop_rate = in_channels, c2048, drop_rate
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_channels, c32, 3, stem_stride, bias=False)
        self.bn1 = nn.BatchNorm2d(c32)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c32, c64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(c64)
        self.act2 = nn.ReLU(inplace=True)

        shapes: list[tuple[int, ...]] = [(c64, c128, c128), (c128, c256, c256), (c256, c728, c728)]
        shapes += [(c728,) * 4] * middle_blocks + [(c728, c728, c1024)]
        pool: type[nn.MaxPool2d] = TFSameMaxPool2d if keras else nn.MaxPool2d
        for i, channels in enumerate(shapes):
            downsample = None if len(channels) == 4 else pool(3, 2, 1)
            block = XceptionBlock(channels, downsample, i > 0, residual, intermediate_activation)
            self.add_module(f"block{i + 1}", block)
        self.num_blocks = len(shapes)

        self.conv3 = _SeparableConv2d(c1024, c1536, intermediate_activation)
        self.bn3 = nn.BatchNorm2d(c1536)
        self.act3 = nn.ReLU()
        self.conv4 = _SeparableConv2d(c1536, c2048, intermediate_activation)
        self.bn4 = nn.BatchNorm2d(c2048)
        self.act4 = nn.ReLU()

        widths = (c2048, *hidden_features)
        if hidden_features:
            layers = [(nn.Linear(before, after), nn.ReLU(inplace=True)) for before, after in itertools.pairwise(widths)]
            self.hidden: nn.Module = nn.Sequential(*itertools.chain(*layers))
        else:
            self.hidden = nn.Identity()
        self.head_hidden_size = widths[-1]
        self.reset_classifier(num_classes)

        points = ("act2", "block2.rep.0", "block3.rep.0", f"block{self.num_blocks}.rep.0", "act4")
        self.feature_info = [
            {"num_chs": channels, "reduction": stem_stride * 2**i, "module": name}
            for i, (channels, name) in enumerate(zip((c64, c128, c256, c728, c2048), points, strict=True))
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d) and keras:
                module.eps, module.momentum = 1e-3, 0.01

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer; none for 0 classes."""
        _check("num_classes", num_classes, num_classes >= 0, "at least 0")
        like = self.conv1.weight
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether backward computes each block again instead of keeping what it saves."""
        self.grad_checkpointing = enable

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, in_channels, H, W] -> [B, num_features, h, w], after the last ReLU."""
        self._check_images(images)
        x = self.act1(self.bn1(self.conv1(images)))
        x = self.act2(self.bn2(self.conv2(x)))
        for i in range(1, self.num_blocks + 1):
            block = self.get_submodule(f"block{i}")
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = _checkpointed(block, x)
            else:
                x = block(x)
        return _run((self.conv3, self.bn3, self.act3, self.conv4, self.bn4, self.act4), x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] -> logits [B, K], or what the last layer would read."""
        x = self.hidden(x.mean((2, 3)))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_channels, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(images))

    def _check_images(self, images: Tensor) -> None:
        least = 2 * self.conv1.stride[0] + 3
        if images.dim() != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < least:
            expected = f"[B, {self.in_channels}, H, W] with H and W of at least {least}"
            raise ValueError(f"Xception: `images` got shape {tuple(images.shape)}, expected {expected}")


class XceptionBlock(nn.Module):
    """``rep(x) + skip(x)``: separable convolutions, each with batch norm, and with a pool a strided skip convolution.

    `channels` are those before, between and after the separable convolutions.
    """

    def __init__(
        self,
        channels: Sequence[int],
        pool: nn.MaxPool2d | None,
        leading_relu: bool,
        residual: bool,
        intermediate_activation: str,
    ) -> None:
        super().__init__()
        self.residual, self.pooled = residual, pool is not None
        if residual and pool is not None:
            self.skip = nn.Conv2d(channels[0], channels[-1], 1, pool.stride, bias=False)
            self.skipbn = nn.BatchNorm2d(channels[-1])
        rep: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            if i or leading_relu:
                rep.append(nn.ReLU())
            rep += [_SeparableConv2d(before, after, intermediate_activation), nn.BatchNorm2d(after)]
        if pool is not None:
            rep.append(pool)
        self.rep = nn.Sequential(*rep)

    def forward(self, input: Tensor) -> Tensor:
        modules, residual = list(self.rep), input if self.residual and not self.pooled else None
        if is_touched(self.rep):
            x = self.rep(input)
            x = x if residual is None else x + residual
        elif self.pooled:
            x = modules[-1](_run(modules[:-1], input))
        else:
            x = _run(modules, input, residual)
        return x + self.skipbn(self.skip(input)) if self.residual and self.pooled else x


class TFSameMaxPool2d(nn.MaxPool2d):
    """Max pool of 3 with stride 2 that pads as TensorFlow does: the pixel that an even size lacks is the last."""

    def forward(self, input: Tensor) -> Tensor:
        odd = (input.shape[2] % 2, input.shape[3] % 2)
        return F.max_pool2d(input, 3, 2, odd, ceil_mode=True)


class _SeparableConv2d(SeparableConv2d):
    """3x3, that runs its two convolutions as modules where it has to."""

    def __init__(self, in_channels: int, out_channels: int, between: str) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.between = between

    def fusable(self) -> bool:
        convolutions = (self.conv1, self.pointwise)
        return self.between == "none" and all(type(m) is nn.Conv2d and not is_touched(m) for m in convolutions)

    def forward(self, input: Tensor) -> Tensor:
        if self.fusable():
            return super().forward(input)
        x, between = self.conv1(input), _BETWEEN[self.between]
        return self.pointwise(x if between is None else between(x))


def _run(modules: Sequence[nn.Module], input: Tensor, residual: Tensor | None = None) -> Tensor:
    """The modules one after the other, fused if all are what this file made of them and nobody watches."""
    chain = _read_chain(modules) if runs_fused(input) else None
    if chain is not None:
        layers, activation = chain
        return run_chain(input, layers, activation=activation, residual=residual)
    x = input
    for module in modules:
        x = module(x)
    return x if residual is None else x + residual


def _read_chain(modules: Sequence[nn.Module]) -> tuple[list[ChainLayer], str] | None:
    """The layers, and the activation after the last; None where modules are anything else."""
    layers: list[ChainLayer] = []
    activation, separable = "none", None
    for module in modules:
        if is_touched(module):
            return None
        if type(module) is nn.ReLU and separable is None:
            activation = "relu"
        elif type(module) is _SeparableConv2d and module.fusable() and separable is None:
            separable = module
        elif type(module) is nn.BatchNorm2d and separable is not None:
            layers.append((activation, separable.conv1, separable.pointwise, module))
            activation, separable = "none", None
        else:
            return None
    return (layers, activation) if layers and separable is None else None


def _checkpointed(block: nn.Module, input: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # whose backward repeats no write to a buffer
        return checkpoint(block, input, use_reentrant=False)
    contexts = functools.partial(_checkpoint_contexts, block)
    return checkpoint(block, input, use_reentrant=False, context_fn=contexts)


def _checkpoint_contexts(block: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _frozen_statistics(block)


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """While a block is computed again: the step has updated its running statistics before."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _check(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"Xception: `{name}` got {value!r}, expected {expected}")
