"""BriVL's RoI grid pooling as one batched matrix product."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from perfvl.ops._library import FLOATING, bad_type, bad_value


class RoIGridPool(nn.Module):
    r"""The mean of a grid of bilinear samples of every box, as one product:
    :math:`\text{pooled}_r = \sum_{y,x} w^y_r(y)\, w^x_r(x)\, F(y, x)`.

    Replaces the ``affine_grid`` + ``grid_sample`` + average of BriVL's image tower (arXiv:2103.06561, released code),
    with the same numbers. Bilinear weights are separable, so the mean over the grid of a box is a weighted mean over
    the cells of the feature map whose weight is a product of one factor per axis:

    .. math::
        w^x_r(x) = \frac1g \sum_{i=0}^{g-1} \max(0, 1 - |p_{ri} - x|), \qquad
        p_{ri} = \frac{(\frac{(x_2 - x_1) u_i + x_1 + x_2 - W + 1}{W - 1} + 1)\, W - 1}{2}, \qquad
        u_i = \frac{2i + 1}{g} - 1

    The odd :math:`p_{ri}` is the released model's: corner-aligned coefficients with samples that are not. Samples
    outside of the map are zeros. A linear layer (1x1 convolution) on the samples commutes with their mean: apply it to
    the pooled vectors.

    Args:
        image_size: side in pixels of the square image in which boxes are given. One ratio image_size / H serves both
            axes, as in the released code.
        grid_size: samples per axis and box.

    Shapes: features [B, C, H, W] with H, W >= 2, NCHW or channels_last, neither copied; boxes [B, R, 4] as
    (x1, y1, x2, y2) in pixels -> [B, R, C] in the features' dtype. The gradient goes to the features; boxes are
    constants. Weights and sums are float32 (float64 for float64), under autocast too.

    Raises:
        TypeError: an argument that is not a floating-point tensor; an `image_size` or `grid_size` that is no number.
        ValueError: wrong shapes or devices; an `image_size` or `grid_size` below 1.

    Cost: 2 B R H W C FLOP; stores B R H W weights for backward, and no B R C g^2 samples.

    Example:
        >>> import torch
        >>> whole = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
        >>> RoIGridPool(image_size=64)(torch.randn(1, 8, 4, 4), whole).shape
        torch.Size([1, 1, 8])
    """

    def __init__(self, image_size: float, grid_size: int = 4) -> None:
        super().__init__()
        for name, value, kinds in (("image_size", image_size, (int, float)), ("grid_size", grid_size, (int,))):
            if isinstance(value, bool) or not isinstance(value, kinds):
                bad_type("RoIGridPool", name, type(value).__name__, "a number" if float in kinds else "an int")
            if not value >= 1:
                bad_value("RoIGridPool", name, value, "at least 1")
        self.image_size = image_size
        self.grid_size = grid_size

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """features [B, C, H, W], boxes [B, R, 4] -> [B, R, C]."""
        _check(features, boxes)
        height, width = features.shape[2:]
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        device = features.device.type
        # The meta device, on which shapes are worked out, has no autocast to switch off.
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else contextlib.nullcontext():
            cells = boxes.detach().to(wide) / (self.image_size / height)
            along_x = self._weights(cells[..., 0], cells[..., 2], width)
            along_y = self._weights(cells[..., 1], cells[..., 3], height)
            weights = (along_y.unsqueeze(-1) * along_x.unsqueeze(-2)).flatten(2)
            return torch.bmm(weights, features.to(wide).flatten(2).transpose(1, 2)).to(features.dtype)

    def _weights(self, low: Tensor, high: Tensor, size: int) -> Tensor:
        """The mean bilinear weight of every cell of an axis [B, R, size], for boxes from `low` to `high` [B, R]."""
        steps = torch.arange(self.grid_size, device=low.device, dtype=low.dtype)
        offsets = (2 * steps + 1) / self.grid_size - 1
        scaled = ((high - low).unsqueeze(-1) * offsets + (low + high - size + 1).unsqueeze(-1)) / (size - 1)
        position = ((scaled + 1) * size - 1) / 2
        cells = torch.arange(size, device=low.device, dtype=low.dtype)
        return (1 - (position.unsqueeze(-1) - cells).abs()).clamp_min(0).mean(-2)

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, grid_size={self.grid_size}"


def _check(features: Tensor, boxes: Tensor) -> None:
    for name, value in (("features", features), ("boxes", boxes)):
        if not isinstance(value, Tensor):
            bad_type("RoIGridPool", name, type(value).__name__, "a torch.Tensor")
        if value.dtype not in FLOATING:
            bad_type("RoIGridPool", name, value.dtype, "a float32, bfloat16, float16 or float64 tensor")
    if features.dim() != 4 or features.shape[2] < 2 or features.shape[3] < 2:
        bad_value("RoIGridPool", "features", f"shape {tuple(features.shape)}", "(B, C, H, W) with H and W at least 2")
    if boxes.dim() != 3 or boxes.shape[0] != features.shape[0] or boxes.shape[2] != 4:
        bad_value("RoIGridPool", "boxes", f"shape {tuple(boxes.shape)}", f"({features.shape[0]}, R, 4)")
    if boxes.device != features.device:
        bad_value("RoIGridPool", "boxes", f"device {boxes.device}", f"the features' device {features.device}")
