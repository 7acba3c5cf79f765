"""What CaffeNet128 is made of beside the layers of :mod:`perfvl.nn`: its input, its depth and its ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.ops._library import bad_value
from perfvl.ops.pooling import max_avg_pool2d
from perfvl.reference.color_transform import centered


class Centered(nn.Module):
    """``scale * (image - mean)`` of pixels [N, C, H, W], bytes or floats, in the dtype of `mean`."""

    mean: Tensor

    def __init__(self, mean: Sequence[float], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return centered(image, self.mean, self.scale, self.mean.dtype)

    def extra_repr(self) -> str:
        return f"mean={[round(m, 3) for m in self.mean.tolist()]}, scale={self.scale}"


class FixedColorSpace(nn.Module):
    """Pixels of blue, green and red, 0 to 255, as such or as OpenCV has them in YCrCb, HSV (H from 0 to 180) or gray.

    Computed in float32 at least and given in the module's dtype.
    """

    like: Tensor

    def __init__(self, space: str) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        if self.space == "rgb":
            return image.to(self.like.dtype)
        x = image if image.dtype == torch.float64 else image.float()
        blue, green, red = x.unbind(-3)
        if self.space == "hsv":
            return torch.stack(_hsv(blue, green, red), -3).to(self.like.dtype)
        gray = 0.114 * blue + 0.587 * green + 0.299 * red
        if self.space == "ycrcb":
            x = torch.stack((gray, (red - gray) * 0.713 + 128, (blue - gray) * 0.564 + 128), -3)
        else:
            x = gray.unsqueeze(-3)
        return x.to(self.like.dtype)

    def extra_repr(self) -> str:
        return self.space


def _hsv(blue: Tensor, green: Tensor, red: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.maximum(torch.maximum(blue, green), red)
    span = value - torch.minimum(torch.minimum(blue, green), red)
    per_span = 30 / span.clamp(min=1e-12)
    hue = torch.where(
        value == red,
        (green - blue) * per_span,
        torch.where(value == green, 60 + (blue - red) * per_span, 120 + (red - green) * per_span),
    )
    hue = torch.where(hue < 0, hue + 180, hue) * (span > 0)
    return hue, 255 * span / value.clamp(min=1e-12), value


class Deeper(nn.Sequential):
    """Convolutions of one width with activations; with `residual`, each pair's input is added to what it gives."""

    def __init__(
        self,
        channels: int,
        depth: int,
        kernel_size: int,
        residual: bool,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.residual = residual
        for i in range(1, depth + 1):
            self.add_module(f"conv{i}", nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2))
            self.add_module(f"act{i}", activation())

    def forward(self, input: Tensor) -> Tensor:
        x = before = input
        for i, module in enumerate(self, 1):
            x = module(x)
            if self.residual and i % 4 == 0:
                x = before = x + before
        return x


class WithImage(nn.Module):
    """A pool, and the mean colour of each of its windows as more channels of what it gives."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, input: Tensor, image: Tensor) -> Tensor:
        x = self.pool(input)
        return torch.cat((x, F.adaptive_avg_pool2d(image, x.shape[2:])), 1)


class SpatialPyramidPool2d(nn.Module):
    """Pools [N, C, n, n] to b x b windows for each level b, [N, C (b1^2 + b2^2 + ...)].

    He et al. 2014, arXiv:1406.4729, as Caffe has it: windows have ``k = ceil(n / b)`` pixels, next to each other,
    behind a padding of ``floor((k b - n + 1) / 2)``; means divide by k^2. With `average`, each value is the maximum and
    the mean together.

    Example:
        >>> SpatialPyramidPool2d((1, 2, 4))(torch.zeros(2, 256, 7, 7)).shape
        torch.Size([2, 5376])
    """

    def __init__(self, levels: Sequence[int], average: bool = False) -> None:
        super().__init__()
        self.levels, self.average = tuple(levels), average

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or input.shape[2] != input.shape[3]:
            bad_value("SpatialPyramidPool2d", "input", f"shape {tuple(input.shape)}", "[N, C, n, n]")
        pool = max_avg_pool2d if self.average else F.max_pool2d
        return torch.cat([pool(input, *self.windows(level, input.shape[2])).flatten(1) for level in self.levels], 1)

    @staticmethod
    def windows(level: int, size: int) -> tuple[int, int, int]:
        """Kernel, stride and padding of a level."""
        kernel = -(-size // level)
        padding = (kernel * level - size + 1) // 2
        if padding > kernel // 2 or (size + 2 * padding) // kernel != level:
            bad_value("SpatialPyramidPool2d", "levels", level, f"windows that divide {size} pixels")
        return kernel, kernel, padding

    def extra_repr(self) -> str:
        return f"levels={self.levels}, average={self.average}"


class MeanOverSpace(nn.Module):
    """[N, C, H, W] to [N, C]; with `maximum`, the mean and the maximum together."""

    def __init__(self, maximum: bool = False) -> None:
        super().__init__()
        self.maximum = maximum

    def forward(self, input: Tensor) -> Tensor:
        mean = input.mean((2, 3))
        return mean + input.amax((2, 3)) if self.maximum else mean

    def extra_repr(self) -> str:
        return f"maximum={self.maximum}"
