"""BriVL in the sizes of the paper, of the released code, and of a laptop. Nothing here downloads anything."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from perfvl.models.brivl import BriVL
from perfvl.models.brivl_towers import BriVLImageTower, BriVLTextTower

CHINESE_VOCABULARY = 21_128
"""Tokens of bert-base-chinese, and of the Chinese RoBERTas trained with its tokenizer."""


class TokenFeatures(nn.Module):
    """A Hugging Face text model as a backbone: token ids [B, T] -> its last hidden state [B, T, width].

    Example:
        >>> from transformers import BertModel  # doctest: +SKIP
        >>> backbone = TokenFeatures(BertModel.from_pretrained("hfl/chinese-roberta-wwm-ext"))  # doctest: +SKIP
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.bert(token_ids).last_hidden_state


def brivl_paper(
    *,
    embed_dim: int = 2560,
    image_size: int = 600,
    image_backbone: nn.Module | None = None,
    text_backbone: nn.Module | None = None,
    freeze: bool = True,
    **settings: Any,
) -> BriVL:
    """The paper's model (arXiv:2103.06561): EfficientNet-B7, RoBERTa-Large, 4 attention layers, d = 2560, K = 16,384.

    Args:
        embed_dim: d.
        image_size: side in pixels of the images and of the boxes' coordinates. The paper does not give one; 600 is
            EfficientNet-B7's own.
        image_backbone: pixels -> feature map with 2560 channels. None builds ``tf_efficientnet_b7`` of timm with random
            weights; for pre-trained ones pass ``timm.create_model("tf_efficientnet_b7", pretrained=True, num_classes=0,
            global_pool="")``, before the momentum copies are made.
        text_backbone: token ids -> features of width 1024. None builds a Chinese RoBERTa-Large of transformers with
            random weights; for pre-trained ones pass ``TokenFeatures(BertModel.from_pretrained(...))``.
        freeze: train only what the released code trains of the backbones: EfficientNet blocks 3 to 6, the last 4 layers
            of the text model.
        settings: of :class:`BriVL`.

    Raises:
        ImportError: without timm or transformers, where a backbone is to be built.

    Example:
        >>> model = brivl_paper()  # doctest: +SKIP
    """
    return BriVL(
        BriVLImageTower(
            image_backbone or _efficientnet("tf_efficientnet_b7"),
            2560,
            embed_dim,
            image_size=image_size,
            trainable=_TRAINED_BLOCKS if freeze else None,
        ),
        BriVLTextTower(
            text_backbone or _chinese_roberta(width=1024, layers=24, heads=16),
            1024,
            embed_dim,
            trainable=[f"layer.{i}" for i in range(20, 24)] if freeze else None,
        ),
        embed_dim=embed_dim,
        **settings,
    )


def brivl_released(
    *,
    embed_dim: int = 2048,
    image_size: int = 380,
    image_backbone: nn.Module | None = None,
    text_backbone: nn.Module | None = None,
    freeze: bool = True,
    **settings: Any,
) -> BriVL:
    """The released code's model: EfficientNet-B5, RoBERTa-wwm-ext base, 4 attention layers, d = 2048, K = 9,600.

    For the published weights see :func:`load_released_state_dict`. Images and boxes are resized to 380 pixels, 37 boxes
    each with the whole image as the last valid one, and texts hold at most 80 tokens.

    Args:
        embed_dim, image_size, image_backbone, text_backbone, freeze: as in :func:`brivl_paper`, with 2048 channels and
            width 768.
        settings: of :class:`BriVL`; `mode` is "reference" unless given.

    Raises:
        ImportError: without timm or transformers, where a backbone is to be built.

    Example:
        >>> model = brivl_released()  # doctest: +SKIP
    """
    return BriVL(
        BriVLImageTower(
            image_backbone or _efficientnet("tf_efficientnet_b5"),
            2048,
            embed_dim,
            image_size=image_size,
            trainable=_TRAINED_BLOCKS if freeze else None,
        ),
        BriVLTextTower(
            text_backbone or _chinese_roberta(width=768, layers=12, heads=12),
            768,
            embed_dim,
            trainable=[f"layer.{i}" for i in range(8, 12)] if freeze else None,
        ),
        embed_dim=embed_dim,
        **{"mode": "reference", **settings},
    )


def brivl_small(
    vocabulary_size: int,
    *,
    image_size: int = 32,
    image_channels: int = 3,
    max_tokens: int = 32,
    embed_dim: int = 64,
    queue_size: int = 1024,
    width: int = 64,
    layers: int = 1,
    dropout: float = 0.0,
    **settings: Any,
) -> BriVL:
    """BriVL with small backbones of its own, which trains on a CPU and needs nothing but torch.

    Args:
        vocabulary_size: token ids are in [0, vocabulary_size).
        image_size: side in pixels of the images, at least 3.
        image_channels: of the images: 1 or 3.
        max_tokens: the longest text.
        embed_dim, queue_size: d and K.
        width: of the backbones and of the attention layers, a multiple of 4.
        layers: attention layers of each tower, and of the text backbone.
        dropout: of the attention layers.
        settings: of :class:`BriVL`.

    Example:
        >>> import torch
        >>> model = brivl_small(100, image_size=16)
        >>> output = model(torch.randn(4, 3, 16, 16), torch.randint(100, (4, 6)))
        >>> output.loss.backward()
    """
    attention: dict[str, Any] = {"layers": layers, "heads": 4, "feedforward": 2 * width, "dropout": dropout}
    return BriVL(
        BriVLImageTower(
            _small_image_backbone(image_channels, width), width, embed_dim, image_size=image_size, **attention
        ),
        BriVLTextTower(
            _SmallTextBackbone(vocabulary_size, max_tokens, width, attention), width, embed_dim, **attention
        ),
        embed_dim=embed_dim,
        queue_size=queue_size,
        **settings,
    )


_TRAINED_BLOCKS = [f"blocks.{i}" for i in range(3, 7)]


def _efficientnet(name: str) -> nn.Module:
    return _extra("timm").create_model(name, pretrained=False, num_classes=0, global_pool="")


def _chinese_roberta(width: int, layers: int, heads: int) -> nn.Module:
    transformers = _extra("transformers")
    config = transformers.BertConfig(
        vocab_size=CHINESE_VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    return TokenFeatures(transformers.BertModel(config, add_pooling_layer=False))


def _extra(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this BriVL preset needs {package}: pip install 'perfvl[models]'") from error


def _small_image_backbone(channels: int, width: int) -> nn.Module:
    """Pixels [B, channels, S, S] -> [B, width, S/2, S/2]."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((channels, width // 2, 1), (width // 2, width, 2), (width, width, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    # Without the last ReLU, and with batch norm before it, pooled vectors of different images point in different
    # directions from the first step on; else both towers fall onto one point and chase each other there.
    return nn.Sequential(*layers[:-1])


class _SmallTextBackbone(nn.Module):
    """Token ids [B, T] -> [B, T, width]: embeddings and Transformer layers."""

    def __init__(self, vocabulary_size: int, max_tokens: int, width: int, attention: dict[str, Any]) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, attention["heads"], attention["feedforward"], attention["dropout"], batch_first=True
        )
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        self.encoder = nn.TransformerEncoder(layer, attention["layers"], enable_nested_tensor=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.encoder(self.tokens(token_ids) + self.positions[: token_ids.shape[1]])
