"""Depthwise-separable convolution layers, and batch norm between such layers without passes of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from perfvl.ops.separable_conv import NO_AFFINE, Affine, Layer, check_layer, run, run_with_statistics
from perfvl.reference.activation import ACTIVATIONS


class SeparableConv2d(nn.Module):
    """Depthwise k x k and pointwise 1x1 convolution in one pass: :func:`perfvl.functional.separable_conv2d`.

    Children, parameters and state_dict are those of timm's `SeparableConv2d`: `conv1` (depthwise) and `pointwise`. With
    `bias` both have one, as there. Dtypes, layouts, errors and cost are those of the function.

    Example:
        >>> import torch
        >>> SeparableConv2d(64, 128, padding=1)(torch.randn(2, 64, 19, 19)).shape
        torch.Size([2, 128, 19, 19])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=in_channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return separable_pair(input, self.conv1, self.pointwise)


class SeparableConvBNAct2d(nn.Module):
    """``act(bn(pointwise(depthwise(pre(x))))) + residual``, children `conv1`, `pointwise` and `bn`.

    Training: the statistics of `bn` are taken while the convolution writes its output, and its backward reads that
    output only; normalising and `activation` are one more pass (none where the next layer takes it over, as inside
    :func:`perfvl.models.xception`). Evaluation without gradients: one pass for everything. All options and the running
    statistics of `nn.BatchNorm2d`; no folded copy of a weight is kept, so none can be stale.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as :class:`SeparableConv2d` has them.
        pre_activation, activation: names that :func:`perfvl.functional.separable_conv2d` knows.
        eps, momentum, affine, track_running_stats: of `nn.BatchNorm2d`.

    Raises:
        ValueError: an input of other than 4 dimensions; while training, one value per channel only (`nn.BatchNorm2d`
            has both so); an unknown activation.

    Example:
        >>> import torch
        >>> SeparableConvBNAct2d(64, 128, padding=1, activation="relu")(torch.randn(2, 64, 19, 19)).shape
        torch.Size([2, 128, 19, 19])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        *,
        pre_activation: str = "none",
        activation: str = "none",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("pre_activation", pre_activation), ("activation", activation)):
            if value not in ACTIVATIONS:
                expected = f"one of {', '.join(ACTIVATIONS)}"
                raise ValueError(f"SeparableConvBNAct2d: `{name}` got {value!r}, expected {expected}")
        pair = SeparableConv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias, device=device, dtype=dtype
        )
        self.conv1, self.pointwise = pair.conv1, pair.pointwise
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.pre_activation, self.activation = pre_activation, activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return separable_norm(
            input,
            self.conv1,
            self.pointwise,
            self.bn,
            pre_activation=self.pre_activation,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"pre_activation={self.pre_activation}, activation={self.activation}"


class Deferred(NamedTuple):
    """A batch norm's output that is not written yet: ``value * scale[c] + shift[c]``.

    The next separable convolution reads it so (:func:`separable_norm`); :meth:`write` makes a tensor of it.
    """

    value: Tensor
    scale: Tensor
    shift: Tensor

    def write(self, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        value, scale, shift = self
        # The evaluation mode of batch norm is one pass forward, and two backward, that torch has for every device.
        channels = value.shape[1]
        zero, one = value.new_zeros(channels, dtype=scale.dtype), value.new_ones(channels, dtype=scale.dtype)
        cudnn = torch.backends.cudnn.enabled
        normed = torch.batch_norm(value, scale, shift, zero, one, False, 0.0, 0.0, cudnn)  # F.batch_norm refuses eps 0
        y = ACTIVATIONS[activation](normed)
        return y if residual is None else y + residual


def separable_pair(
    input: Tensor,
    depthwise: nn.Conv2d,
    pointwise: nn.Conv2d,
    *,
    pre_activation: str = "none",
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """A depthwise and a pointwise `nn.Conv2d` with nothing between them."""
    if input.dim() == 3:
        batched = separable_pair(
            input[None],
            depthwise,
            pointwise,
            pre_activation=pre_activation,
            activation=activation,
            residual=residual,
        )
        return batched[0]
    bias, layer = _layer(input, depthwise, pointwise, pre_activation, activation)
    return run(layer, input, depthwise.weight, pointwise.weight, bias, residual=residual)


def separable_norm(
    input: Tensor | Deferred,
    depthwise: nn.Conv2d,
    pointwise: nn.Conv2d,
    bn: nn.BatchNorm2d,
    *,
    pre_activation: str = "none",
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``act(bn(pointwise(depthwise(pre(input))))) + residual``, as a tensor."""
    if isinstance(input, Tensor) and not _batch_statistics(bn) and not torch.is_grad_enabled():
        bias, layer = _layer(input, depthwise, pointwise, pre_activation, activation)
        post = running_affine(bn, bias)
        return run(layer, input, depthwise.weight, pointwise.weight, post=post, residual=residual)
    deferred = separable_deferred(input, depthwise, pointwise, bn, pre_activation=pre_activation)
    return deferred.write(activation, residual)


def separable_deferred(
    input: Tensor | Deferred,
    depthwise: nn.Conv2d,
    pointwise: nn.Conv2d,
    bn: nn.BatchNorm2d,
    *,
    pre_activation: str = "none",
) -> Deferred:
    """``bn(pointwise(depthwise(pre(input))))``, with the batch norm left to whoever reads it."""
    x, norm = (input.value, Affine(input.scale, input.shift)) if isinstance(input, Deferred) else (input, NO_AFFINE)
    bias, layer = _layer(x, depthwise, pointwise, pre_activation, "none")
    if not _batch_statistics(bn):
        if norm is NO_AFFINE:
            return Deferred(run(layer, x, depthwise.weight, pointwise.weight, bias), *_running(bn))
        z, _, _ = run_with_statistics(layer, x, norm, depthwise.weight, pointwise.weight, bias)
        return Deferred(z, *_running(bn))
    if x.shape[0] * layer.output_size[0] * layer.output_size[1] == 1:
        size = torch.Size((1, pointwise.out_channels, 1, 1))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    z, mean, variance = run_with_statistics(layer, x, norm, depthwise.weight, pointwise.weight, bias)
    update_running_statistics(bn, mean, variance, z.numel() // z.shape[1])
    return Deferred(z, *_affine(bn, mean, variance))


def _layer(
    input: Tensor, depthwise: nn.Conv2d, pointwise: nn.Conv2d, pre_activation: str, activation: str
) -> tuple[Tensor | None, Layer]:
    """The one bias that both convolutions' make, and the checked geometry."""
    bias = pointwise.bias
    if depthwise.bias is not None:  # nothing stands between the two, so it passes through the second
        through = pointwise.weight.flatten(1) @ depthwise.bias
        bias = through if bias is None else bias + through
    layer = check_layer(
        "separable_conv2d",
        input,
        depthwise.weight,
        pointwise.weight,
        bias,
        depthwise.stride,
        depthwise.padding,
        depthwise.dilation,
        pre_activation,
        activation,
    )
    return bias, layer


def _batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or bn.running_mean is None


def _affine(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(variance + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    if bn.bias is None:
        return scale, -mean * scale
    return scale, torch.addcmul(bn.bias.to(scale.dtype), mean, scale, value=-1)


def running_affine(bn: nn.BatchNorm2d, bias: Tensor | None = None) -> Affine:
    """Batch norm by its running statistics, of what `bias` [C] is still to be added to."""
    return Affine(*_running(bn, bias))


def _running(bn: nn.BatchNorm2d, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    mean, variance = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
    if mean.dtype != torch.float64:
        mean, variance = mean.float(), variance.float()
    return _affine(bn, mean if bias is None else mean - bias, variance)


@torch.no_grad()
def update_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """As `nn.BatchNorm2d` does while training: unbiased variance; `momentum` None is the average over all steps."""
    if not bn.training or not bn.track_running_stats or bn.running_mean is None:
        return
    known_mean, known_variance = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
    factor: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            factor = bn.num_batches_tracked.to(known_mean.dtype).reciprocal()
    known_mean.lerp_(mean.to(known_mean.dtype), factor)
    known_variance.lerp_((variance * (count / (count - 1))).to(known_variance.dtype), factor)
