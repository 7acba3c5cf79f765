"""The activations of the CaffeNet study that PyTorch has no module for.

Mishkin et al. 2016, arXiv:1606.02228, section 3.1, and the tables of its benchmark, from which the top-1 accuracies on
ImageNet come that docstrings quote. :func:`perfvl.nn.activation` builds these and PyTorch's by their published names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.ops._library import bad_type, bad_value, check_float
from perfvl.ops.activation import apl, maxout
from perfvl.ops.depthwise_conv import is_channels_last
from perfvl.reference.activation import of_samples, rrelu_slope


def _whole(where: str, argument: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        bad_type(where, argument, type(value).__name__, "an int")
    if value < least:
        bad_value(where, argument, value, f"at least {least}")
    return value


def _number(where: str, argument: str, value: Any) -> float:
    check_float(where, argument, value)
    if not math.isfinite(value):
        bad_value(where, argument, value, "a finite number")
    return float(value)


class Maxout(nn.Module):
    """The largest of each channel's pieces, [N, pieces * C, ...] to [N, C, ...]: :func:`perfvl.ops.activation.maxout`.

    Stands behind one convolution or linear layer of `pieces` times the width: one product where two layers and a
    maximum take two. 0.517 top-1 with the study's full widths, 0.482 with widths of the same cost.

    Args:
        pieces: of every channel: c, C + c, ... Of equal ones the last wins.
        groups: of the convolution before it. Each group's outputs then hold the pieces of its own channels, so that
            one grouped convolution of twice the width is two grouped ones; the views this takes copy nothing.

    Raises:
        TypeError, ValueError: `pieces` or `groups` is not an int of at least 1. Calls: as the function; channels that
            are not a multiple of `groups`.

    Example:
        >>> import torch
        >>> layer = nn.Sequential(nn.Conv2d(3, 2 * 8, 3), Maxout(2))
        >>> layer(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, pieces: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.pieces = _whole("Maxout", "pieces", pieces)
        self.groups = _whole("Maxout", "groups", groups)

    def forward(self, input: Tensor) -> Tensor:
        if self.groups == 1:
            return maxout(input, self.pieces)
        if input.dim() < 2 or input.shape[1] % self.groups:
            bad_value(
                "Maxout", "input", f"shape {tuple(input.shape)}", f"channels that are a multiple of {self.groups}"
            )
        # A group is a sample where channels are planes, and a row where they are next to each other.
        if input.dim() == 4 and is_channels_last(input):
            rows = input.permute(0, 2, 3, 1).unflatten(3, (self.groups, -1))
            return maxout(rows.flatten(0, 3), self.pieces).view(*rows.shape[:3], -1).permute(0, 3, 1, 2)
        samples = input.unflatten(1, (self.groups, -1))
        return maxout(samples.flatten(0, 1), self.pieces).unflatten(0, samples.shape[:2]).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"pieces={self.pieces}" + (f", groups={self.groups}" if self.groups > 1 else "")


class APL(nn.Module):
    r"""The adaptive piecewise linear unit, :math:`\max(0, x) + \sum_s a_s \max(0, b_s - x)`, with learned a and b
    (Agostinelli et al. 2015, arXiv:1412.6830): :func:`perfvl.ops.activation.apl`.

    `slope` a starts from U(-0.5, 0.5), `hinge` b from N(0, 0.5). 0.471 top-1 with 2 segments, 0.465 with 5, both with
    parameters of positions.

    Args:
        num_parameters: C, or, with `shared` "position", the sizes (C, H, W) of a sample (C alone behind a linear
            layer).
        segments: S.
        shared: "channel": parameters of channels, [S, C]. "position": of every element of a sample, [S, C, H, W].

    Raises:
        TypeError, ValueError: sizes that are not ints of at least 1, or do not fit `shared`. Calls: as the function.

    Example:
        >>> import torch
        >>> APL(8, segments=2)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        num_parameters: int | Sequence[int],
        segments: int = 2,
        shared: str = "channel",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shared not in ("channel", "position"):
            bad_value("APL", "shared", repr(shared), '"channel" or "position"')
        if not isinstance(num_parameters, (int, Sequence)):
            bad_type("APL", "num_parameters", type(num_parameters).__name__, "an int or a sequence of them")
        sizes = (num_parameters,) if isinstance(num_parameters, int) else tuple(num_parameters)
        if not sizes or (shared == "channel" and len(sizes) > 1):
            bad_value("APL", "num_parameters", num_parameters, "the channels" if shared == "channel" else "(C, H, W)")
        shape = [_whole("APL", "num_parameters", size) for size in sizes]
        shape.insert(0, _whole("APL", "segments", segments))
        self.shared = shared
        self.slope = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.hinge = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.slope, -0.5, 0.5)
        nn.init.normal_(self.hinge, 0.0, 0.5)

    def forward(self, input: Tensor) -> Tensor:
        return apl(input, self.slope, self.hinge)

    def extra_repr(self) -> str:
        segments, *sizes = self.slope.shape
        return f"{sizes[0] if len(sizes) == 1 else tuple(sizes)}, segments={segments}, shared={self.shared!r}"


class RReLU(nn.Module):
    """Leaky ReLU with a slope drawn for every negative element of every training step.

    Xu et al. 2015, arXiv:1505.00853. With `convention` "divide", as published, ``x / U(lower, upper)``, and in
    evaluation ``2 x / (lower + upper)``; with "slope", as `nn.RReLU` has it, ``x * U(lower, upper)`` and the mean
    slope. Numbers come from PyTorch's generator of the device: `torch.manual_seed` repeats them. Saves the slopes, in
    the input's dtype. 0.478 top-1.

    Args:
        lower, upper: of the uniform distribution; for "divide" above 0.
        convention: "divide" or "slope".

    Raises:
        TypeError, ValueError: an unknown convention, or bounds that are no range.

    Example:
        >>> import torch
        >>> RReLU(10, 30).eval()(torch.tensor([-3.0, 2.0]))
        tensor([-0.1500,  2.0000])
    """

    def __init__(self, lower: float, upper: float, convention: str = "divide") -> None:
        super().__init__()
        if convention not in ("divide", "slope"):
            bad_value("RReLU", "convention", repr(convention), '"divide" or "slope"')
        self.lower, self.upper = _number("RReLU", "lower", lower), _number("RReLU", "upper", upper)
        if convention == "divide" and self.lower <= 0:
            bad_value("RReLU", "lower", lower, 'above 0 with convention "divide"')
        if self.upper < self.lower:
            bad_value("RReLU", "upper", upper, f"at least `lower`, {lower}")
        self.convention = convention

    def forward(self, input: Tensor) -> Tensor:
        divide = self.convention == "divide"
        if self.training:
            with torch.no_grad():
                slope = rrelu_slope(input, self.lower, self.upper, divide=divide)
            return input * slope
        mean = (self.lower + self.upper) / 2
        return F.leaky_relu(input, 1 / mean if divide else mean)

    def extra_repr(self) -> str:
        return f"lower={self.lower}, upper={self.upper}, convention={self.convention!r}"


class VLReLU(nn.LeakyReLU):
    """Very leaky ReLU: `nn.LeakyReLU` with a slope of 1/3. 0.469 top-1 with a slope of 0.3.

    Example:
        >>> import torch
        >>> VLReLU(0.3)(torch.tensor([-1.0, 2.0]))
        tensor([-0.3000,  2.0000])
    """

    def __init__(self, slope: float = 1 / 3) -> None:
        super().__init__(_number("VLReLU", "slope", slope))


class ScaledTanh(nn.Module):
    """``a tanh(b x)`` (LeCun et al. 1998). The slides have a = 1.73 and b = 2/3, the trained network a = 1.759. 0.423.

    Example:
        >>> import torch
        >>> ScaledTanh(2.0, 0.0)(torch.ones(2))
        tensor([0., 0.])
    """

    def __init__(self, a: float = 1.73, b: float = 2 / 3) -> None:
        super().__init__()
        self.a, self.b = _number("ScaledTanh", "a", a), _number("ScaledTanh", "b", b)

    def forward(self, input: Tensor) -> Tensor:
        return self.a * torch.tanh(self.b * input)

    def extra_repr(self) -> str:
        return f"a={self.a}, b={self.b}"


class Asinh(nn.Module):
    """``log(x + sqrt(x^2 + 1))``, without its cancellation where x is negative. 0.417 top-1, with gradients clipped."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.asinh(input)


class ShiftedSoftplus(nn.Module):
    """``log(1 + exp(x)) - log 2``, which is 0 at 0. 0.486 top-1."""

    def forward(self, input: Tensor) -> Tensor:
        # Above 40 the softplus is x in float64; torch's own threshold of 20 has an error of 2e-9.
        return F.softplus(input, threshold=40) - math.log(2)


class ELULeaky(nn.Module):
    """The mean of ELU and a leaky ReLU of slope 0.05. 0.486 top-1."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * (F.elu(input) + F.leaky_relu(input, 0.05))


class _BiasedActivation(nn.Module):
    """An activation, then a learned bias of every channel."""

    def __init__(
        self, num_parameters: int, init: float, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        channels = _whole(type(self).__name__, "num_parameters", num_parameters)
        self.init = _number(type(self).__name__, "init", init)
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.bias, self.init)

    def _biased(self, activated: Tensor) -> Tensor:
        return activated + of_samples(self.bias, activated.dim() - 1)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, init={self.init}"


class FReLU(_BiasedActivation):
    """``max(0, x) + bias`` with a learned bias of every channel of [N, C, ...] (Qiu et al. 2018, arXiv:1706.08098).

    0.488 top-1, the bias with twice the learning rate and no weight decay.

    Example:
        >>> import torch
        >>> FReLU(1)(torch.tensor([[1.0], [-1.0]])).tolist()
        [[0.800000011920929], [-0.20000000298023224]]
    """

    def __init__(
        self,
        num_parameters: int,
        init: float = -0.2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_parameters, init, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._biased(F.relu(input))


class FELU(_BiasedActivation):
    """``elu(x) + bias`` with a learned bias of every channel of [N, C, ...] (Qiu et al. 2018). 0.489 top-1.

    Example:
        >>> import torch
        >>> FELU(1)(torch.zeros(1, 1)).tolist()
        [[-0.10000000149011612]]
    """

    def __init__(
        self,
        num_parameters: int,
        init: float = -0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_parameters, init, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._biased(F.elu(input))
