"""BriVL's image and text tower: a backbone, self-attention over boxes or tokens, a masked mean and an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.nn.roi_pooling import RoIGridPool


class SetEncoder(nn.Module):
    r"""What both towers do with a set of vectors: :math:`\text{MLP}(\text{mean}_{\text{valid}}\,
    \text{Transformer}(x / \lVert x \rVert))`.

    Post-norm TransformerEncoder layers with ReLU, then the mean over valid members, then Linear-ReLU-Linear (BriVL,
    arXiv:2103.06561, section 3; sizes of the released code).

    Args:
        dim: width of the members.
        embed_dim: width of the embedding.
        layers, heads, feedforward, dropout: of the Transformer.

    Shapes: members [B, N, dim], valid [B, N] (bool, or numbers that are 0 for padding) or None -> [B, embed_dim], not
    normalised. Where a row has no valid member the released code divides 0 by 0; here its mean is 0 and every result
    and gradient is finite.

    Example:
        >>> import torch
        >>> SetEncoder(16, 8, layers=1)(torch.randn(2, 5, 16), torch.ones(2, 5)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        dim: int,
        embed_dim: int,
        *,
        layers: int = 4,
        heads: int = 4,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, heads, feedforward, dropout, batch_first=True)
        # Nested tensors would make shapes depend on the mask's values, which costs a host synchronisation.
        self.attention = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim))

    def forward(self, members: Tensor, valid: Tensor | None = None) -> Tensor:
        """members [B, N, dim], valid [B, N] or None -> [B, embed_dim]."""
        members = F.normalize(members, dim=-1)
        if valid is None:
            return self.head(self.attention(members).mean(1))
        if valid.shape != members.shape[:2]:
            raise ValueError(
                f"{type(self).__name__}: mask got shape {tuple(valid.shape)}, expected {tuple(members.shape[:2])}, "
                "one entry for each box or token"
            )
        valid = valid != 0
        # Attention over nothing is NaN in some kernels: a row without members attends to its padding, and keeps none.
        padding = ~valid & valid.any(1, keepdim=True)
        attended = self.attention(members, src_key_padding_mask=padding).masked_fill(~valid.unsqueeze(-1), 0.0)
        return self.head(attended.sum(1) / valid.sum(1, keepdim=True).clamp_min(1))


class BriVLImageTower(SetEncoder):
    """BriVL's image tower: feature map -> RoI grid pooling of every box -> 1x1 convolution -> :class:`SetEncoder`.

    The convolution is a Linear on the pooled vectors (``projection``): it commutes with the mean over the grid, at a
    16th of the FLOP for a 4 x 4 grid.

    Args:
        backbone: pixels [B, 3, S, S] -> feature map [B, in_channels, H, W]; from timm
            ``create_model(name, num_classes=0, global_pool="")``.
        in_channels: channels of the feature map.
        embed_dim: width of the embedding.
        image_size: S, the side of the square image in pixels; boxes are given in these pixels.
        grid_size: RoI samples per axis and box.
        trainable: which modules of the backbone train, by name ("blocks.5"); the rest is frozen. None: all of it.
        settings: layers, heads, feedforward, dropout, as in :class:`SetEncoder`.

    Shapes: pixels [B, 3, S, S]; boxes [B, R, 4] as (x1, y1, x2, y2) in pixels, padded with zeros; box_mask [B, R],
    0 for padding. BriVL passes up to 36 detector boxes and the whole image as the last one; without boxes the whole
    image is the only one. -> [B, embed_dim], not normalised.

    Raises:
        ValueError: a name in `trainable` that the backbone does not have; wrong shapes in the call.

    Example:
        >>> import torch
        >>> tower = BriVLImageTower(torch.nn.Conv2d(3, 32, 8, 8), 32, 16, image_size=64, layers=1)
        >>> boxes = torch.tensor([[[0.0, 0.0, 30.0, 40.0], [0.0, 0.0, 64.0, 64.0]]])
        >>> tower(torch.randn(1, 3, 64, 64), boxes, torch.ones(1, 2)).shape
        torch.Size([1, 16])
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_channels: int,
        embed_dim: int,
        *,
        image_size: int,
        grid_size: int = 4,
        trainable: Sequence[str] | None = None,
        layers: int = 4,
        heads: int = 4,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_channels, embed_dim, layers=layers, heads=heads, feedforward=feedforward, dropout=dropout)
        self.backbone = backbone
        self.pool = RoIGridPool(image_size, grid_size)
        self.projection = nn.Linear(in_channels, in_channels)
        freeze_except(backbone, trainable)

    def forward(  # type: ignore[override]
        self, pixels: Tensor, boxes: Tensor | None = None, box_mask: Tensor | None = None
    ) -> Tensor:
        """pixels [B, 3, S, S], boxes [B, R, 4], box_mask [B, R] -> [B, embed_dim]."""
        features = self.backbone(pixels)
        if boxes is None:
            whole = torch.zeros(1, 1, 4, device=pixels.device)
            whole[..., 2:] = self.pool.image_size
            boxes = whole.expand(len(pixels), 1, 4)
        return super().forward(self.projection(self.pool(features, boxes)), box_mask)


class BriVLTextTower(SetEncoder):
    """BriVL's text tower: token features of a language model -> :class:`SetEncoder`.

    The backbone gets token ids alone, as in the released code: padding is attended to inside of it, and the mask acts
    in the self-attention after it and in the mean.

    Args:
        backbone: token ids [B, T] -> token features [B, T, in_channels].
        in_channels: width of the token features.
        embed_dim: width of the embedding.
        trainable: which modules of the backbone train, by name ("layer.11"); the rest is frozen. None: all of it.
        settings: layers, heads, feedforward, dropout, as in :class:`SetEncoder`.

    Shapes: token_ids int64 [B, T], token_mask [B, T], 0 for padding -> [B, embed_dim], not normalised.

    Raises:
        ValueError: a name in `trainable` that the backbone does not have; wrong shapes in the call.

    Example:
        >>> import torch
        >>> tower = BriVLTextTower(torch.nn.Embedding(100, 32), 32, 16, layers=1)
        >>> tower(torch.randint(100, (2, 7)), torch.ones(2, 7)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_channels: int,
        embed_dim: int,
        *,
        trainable: Sequence[str] | None = None,
        layers: int = 4,
        heads: int = 4,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_channels, embed_dim, layers=layers, heads=heads, feedforward=feedforward, dropout=dropout)
        self.backbone = backbone
        freeze_except(backbone, trainable)

    def forward(self, token_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """token_ids [B, T], token_mask [B, T] -> [B, embed_dim]."""
        return super().forward(self.backbone(token_ids), token_mask)


def freeze_except(backbone: nn.Module, trainable: Sequence[str] | None) -> None:
    """Freezes the parameters of all modules but those with a name in `trainable` somewhere in their path.

    Whole parts of a path count: "layer.1" is not part of "encoder.layer.11". None freezes nothing. Batch-norm
    statistics of frozen parts still follow the data in training mode, as in the released code.

    Raises:
        ValueError: a name that no parameter's path contains.
    """
    if trainable is None:
        return
    paths = {f".{name}.": parameter for name, parameter in backbone.named_parameters()}
    for name in trainable:
        if not any(f".{name}." in path for path in paths):
            raise ValueError(f"trainable: got {name!r}, which is in no parameter's name of {type(backbone).__name__}")
    for path, parameter in paths.items():
        parameter.requires_grad_(any(f".{name}." in path for name in trainable))
