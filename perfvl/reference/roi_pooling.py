"""BriVL's RoI grid pooling, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def roi_grid_pool(features: Tensor, boxes: Tensor, image_size: float, grid_size: int) -> Tensor:
    r"""The mean of ``grid_size`` x ``grid_size`` bilinear samples of every box: [B, C, H, W], [B, R, 4] -> [B, R, C].

    With a box (x1, y1, x2, y2) in cells of the feature map, one ratio image_size / H serving both axes:

    .. math::
        \theta = \begin{pmatrix} \frac{x_2 - x_1}{W-1} & 0 & \frac{x_1 + x_2 - W + 1}{W-1} \\
                                 0 & \frac{y_2 - y_1}{H-1} & \frac{y_1 + y_2 - H + 1}{H-1} \end{pmatrix}

    Source: the image tower of BriVL (arXiv:2103.06561, released code). :math:`\theta` is that of
    ``align_corners=True``, while grid and samples are taken with ``align_corners=False`` and zeros outside of the map,
    so samples lie somewhat off the box: the trained model knows them there.
    """
    batch, channels, height, width = features.shape
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    x1, y1, x2, y2 = (boxes.detach().to(wide) / (image_size / height)).unbind(-1)
    zero = torch.zeros_like(x1)
    theta = torch.stack(
        [
            torch.stack([(x2 - x1) / (width - 1), zero, (x1 + x2 - width + 1) / (width - 1)], -1),
            torch.stack([zero, (y2 - y1) / (height - 1), (y1 + y2 - height + 1) / (height - 1)], -1),
        ],
        dim=-2,
    )
    count = boxes.shape[1]
    if batch == 0 or count == 0:
        return features.new_zeros(batch, count, channels)
    pooled = []
    for image, transform in zip(features.to(wide), theta, strict=True):
        grid = F.affine_grid(transform, [count, channels, grid_size, grid_size], align_corners=False)
        samples = F.grid_sample(
            image.expand(count, -1, -1, -1), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        pooled.append(samples.mean((2, 3)))
    return torch.stack(pooled).to(features.dtype)
