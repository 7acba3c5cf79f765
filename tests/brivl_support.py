"""Small BriVL models for its tests, and an independent copy of what the released towers compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.models import (
    BriVL,
    BriVLImageTower,
    BriVLTextTower,
)

WIDE = {torch.float32: 1e-5, torch.float64: 1e-12}


def boxes_of_every_kind(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Three boxes in an image of 380 pixels, two that leave it, a line, the whole image and two zero boxes."""
    corners = torch.rand(batch, 3, 2, 2, dtype=dtype).mul(380).sort(2).values.flatten(2)
    special = [[-90, -40, 50, 60], [300, 350, 470, 500], [120, 10, 120, 300], [0, 0, 380, 380], [0] * 4, [0] * 4]
    return torch.cat([corners, torch.tensor(special, dtype=dtype).expand(batch, -1, -1)], dim=1)


def image_tower(dtype: torch.dtype = torch.float32, **settings) -> BriVLImageTower:
    return BriVLImageTower(
        nn.Conv2d(3, 8, 4, 4), 8, 16, image_size=380, layers=2, heads=2, feedforward=24, dropout=0.0, **settings
    ).to(dtype)


def text_tower(dtype: torch.dtype = torch.float32) -> BriVLTextTower:
    return BriVLTextTower(nn.Embedding(20, 8), 8, 16, layers=2, heads=2, feedforward=24, dropout=0.0).to(dtype)


class ReleasedSet(nn.Module):
    """The released towers' attention, mean and MLP: sequence first, 0/0 where nothing is valid."""

    def __init__(self, kind: str, dim: int, embed_dim: int) -> None:
        super().__init__()
        mlp = nn.ModuleDict({"fc1": nn.Linear(dim, embed_dim), "fc2": nn.Linear(embed_dim, embed_dim)})
        layer = nn.TransformerEncoderLayer(dim, 2, 24, 0.0)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.learnable = nn.ModuleDict({f"{kind}FC": mlp, f"{kind}Att": encoder})
        self.kind = kind

    def pool(self, members: Tensor, mask: Tensor) -> Tensor:
        members = F.normalize(members, p=2, dim=-1).transpose(0, 1)
        members = self.learnable[f"{self.kind}Att"](members, src_key_padding_mask=mask == 0).transpose(0, 1)
        weight = (mask == 1).to(members.dtype)
        mean = (members * weight.unsqueeze(-1)).sum(1) / weight.sum(1).unsqueeze(-1)
        mlp = self.learnable[f"{self.kind}FC"]
        return mlp["fc2"](F.relu(mlp["fc1"](mean)))


class ReleasedImage(ReleasedSet):
    """The released image tower with a small backbone: 1x1 convolution on every sample, then the average."""

    def __init__(self) -> None:
        super().__init__("img", 8, 16)
        self.backbone = nn.Conv2d(3, 8, 4, 4)
        self.learnable["max_pool"] = nn.Sequential(nn.Conv2d(8, 8, 1), nn.AvgPool2d(4, stride=1))

    def forward(self, pixels: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        features = self.backbone(pixels)
        height, width = features.shape[2:]
        pooled = []
        for image, rois in zip(features, boxes / (380 / height), strict=True):
            x1, y1, x2, y2 = rois.unbind(1)
            zero = torch.zeros_like(x1)
            theta = torch.stack(
                [
                    torch.stack([(x2 - x1) / (width - 1), zero, (x1 + x2 - width + 1) / (width - 1)], dim=1),
                    torch.stack([zero, (y2 - y1) / (height - 1), (y1 + y2 - height + 1) / (height - 1)], dim=1),
                ],
                dim=1,
            )
            grid = F.affine_grid(theta, [len(rois), 8, 4, 4], align_corners=False)
            samples = F.grid_sample(image.expand(len(rois), -1, -1, -1), grid, align_corners=False)
            pooled.append(self.learnable["max_pool"](samples)[:, :, 0, 0])
        return self.pool(torch.stack(pooled), mask)


class ReleasedText(ReleasedSet):
    def __init__(self) -> None:
        super().__init__("text", 8, 16)
        self.backbone = nn.Embedding(20, 8)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        return self.pool(self.backbone(token_ids), mask)


class ReleasedModel(nn.Module):
    """The state of the released model under its own names, with small towers."""

    def __init__(self, queue_size: int) -> None:
        super().__init__()
        self.learnable = nn.ModuleDict()
        for name, tower in (("imgencoder", ReleasedImage), ("textencoder", ReleasedText)):
            self.learnable[name] = tower()
            self.learnable[f"{name}_mom"] = tower()
        for name in ("img_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(16, queue_size), dim=0))
            self.register_buffer(f"{name}_ptr", torch.full((1,), 5))


def released_twin(queue_size: int = 32) -> tuple[ReleasedModel, BriVL]:
    released = ReleasedModel(queue_size)
    model = BriVL(image_tower(), text_tower(), embed_dim=16, queue_size=queue_size, mode="reference")
    return released, model


def pairs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Images with 9 boxes of which some are padding, and texts of 7 tokens of which some are padding."""
    image = torch.randn(batch, 3, 40, 40, dtype=dtype), boxes_of_every_kind(batch, dtype)
    box_mask = (torch.arange(9) < torch.randint(1, 10, (batch, 1))).to(dtype)
    token_mask = (torch.arange(7) < torch.randint(1, 8, (batch, 1))).to(dtype)
    return (*image, box_mask), (torch.randint(20, (batch, 7)), token_mask)


def small(mode: str = "paper", dtype: torch.dtype = torch.float32, **settings) -> BriVL:
    """Linear towers from 6 and 10 numbers to 8."""
    return BriVL(nn.Linear(6, 8), nn.Linear(10, 8), embed_dim=8, mode=mode, **{"queue_size": 24, **settings}).to(dtype)


def batch_for(model: BriVL, batch: int = 4) -> tuple:
    if isinstance(model.image_tower, nn.Linear):
        dtype = model.image_tower.weight.dtype
        return torch.randn(batch, 6, dtype=dtype), torch.randn(batch, 10, dtype=dtype)
    return pairs(batch)


def train(model: BriVL, steps: int, batch: int = 4, rate: float = 0.05) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        output = model(*batch_for(model, batch))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses
