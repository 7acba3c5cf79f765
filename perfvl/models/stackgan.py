"""StackGAN (Zhang et al. 2017, arXiv:1612.03242): images from text in two stages, each a generator and a discriminator.

The networks are those of the published checkpoints, key by key of state_dict. :mod:`perfvl.models.stackgan_step` trains
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perfvl.models.stackgan_parts import (
    ConditionalHead,
    JointBlock,
    ResidualBlock,
    UnconditionalHead,
    add_up_blocks,
    check_images,
    check_sizes,
    check_vectors,
    conv3,
    conv4,
    doublings,
    in_layout_of,
    initialize,
    leaky_relu,
    normed,
    relu,
    run_up_blocks,
)
from perfvl.nn.conditioning import ConditioningAugmentation
from perfvl.ops._library import bad_type, bad_value

__all__ = ["Stage1Discriminator", "Stage1Generator", "Stage2Discriminator", "Stage2Generator", "initialize"]

_Images = tuple[Tensor | None, Tensor, Tensor, Tensor]  # Stage I's or None, this stage's, mu, logvar


class Stage1Generator(nn.Module):
    r"""Text embedding and noise to an image of 64 pixels: conditioning augmentation, linear layer to 4 x 4, blocks of
    nearest x2, 3x3 convolution, batch norm and ReLU, last 3x3 convolution and tanh (arXiv:1612.03242, section 3.2).

    Args:
        z_dim: numbers of noise for each image.
        condition_dim: e, of the condition that is drawn from :math:`\mathcal{N}(\mu, e^{\text{logvar}})`.
        gf_dim: channels of the block that makes 32 pixels of 16; each block halves the channels, 8 `gf_dim` at 4 x 4.
        text_dim: of the embeddings.
        image_size: 8, 16, 32, 64, ...: one block for each doubling of 4.
        ca_activation: of :class:`perfvl.nn.ConditioningAugmentation`. The published code has "relu" and so do the
            checkpoints, the TensorFlow code "leaky_relu", the text of the paper "none", StackGAN-v2 "glu".

    Call: text_embedding [N, text_dim], noise [N, z_dim], and eps [N, condition_dim], the numbers that the condition is
    drawn with (None: new ones, on the device) -> (None, image [N, 3, image_size, image_size] in [-1, 1], mu [N, e],
    logvar [N, e]). Images are in channels_last.

    Parameters start as published (:func:`initialize`). 10.3 M of them with the defaults, and 1.22 G multiply-adds for
    an image as the layers are written; blocks need fewer (:func:`perfvl.functional.upsample_conv2d`) and keep no
    enlarged input for backward.

    Raises:
        TypeError, ValueError: an argument here, or of the call, that is not as said above.

    Example:
        >>> import torch
        >>> generator = Stage1Generator(gf_dim=8, text_dim=16).eval()
        >>> _, image, mu, logvar = generator(torch.randn(2, 16), torch.randn(2, 100))
        >>> image.shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(
        self,
        z_dim: int = 100,
        condition_dim: int = 128,
        gf_dim: int = 128,
        text_dim: int = 1024,
        *,
        image_size: int = 64,
        ca_activation: str = "relu",
    ) -> None:
        super().__init__()
        op = "Stage1Generator"
        check_sizes(op, z_dim=z_dim, condition_dim=condition_dim, gf_dim=gf_dim, text_dim=text_dim)
        self.blocks = doublings(op, image_size)
        channels = 8 * gf_dim
        _check_halvings(op, gf_dim, channels, self.blocks)
        self.z_dim, self.condition_dim, self.text_dim = z_dim, condition_dim, text_dim
        self.image_size, self.channels = image_size, channels
        self.ca_net = ConditioningAugmentation(text_dim, condition_dim, activation=ca_activation)
        linear = nn.Linear(z_dim + condition_dim, 16 * channels, bias=False)
        self.fc = nn.Sequential(linear, nn.BatchNorm1d(16 * channels), relu())
        add_up_blocks(self, channels, self.blocks)
        initialize(self)

    def forward(self, text_embedding: Tensor, noise: Tensor, eps: Tensor | None = None) -> _Images:
        """text_embedding [N, text_dim], noise [N, z_dim] -> None, image, mu, logvar."""
        _check_inputs(self, text_embedding, noise)
        if eps is not None:
            check_vectors("Stage1Generator", "eps", eps, self.condition_dim, len(noise))
        condition, mu, logvar, _ = self.ca_net(text_embedding, eps)
        x = self.fc(torch.cat((noise, condition), 1)).view(-1, self.channels, 4, 4)
        image = run_up_blocks(self, x.contiguous(memory_format=torch.channels_last), self.blocks)
        return None, image, mu, logvar


class Stage2Generator(nn.Module):
    r"""Stage I's image and the text again to an image of 256 pixels: encoder to a quarter of the size, text joined,
    residual blocks, blocks of nearest x2, 3x3 convolution, batch norm and ReLU (arXiv:1612.03242, section 3.3).

    Args:
        stage1: a trained :class:`Stage1Generator`, which becomes the child `STAGE1_G`. Its parameters stop requiring
            gradients and it runs without; its weights are not initialized again.
        condition_dim: e, of this stage's own conditioning augmentation.
        gf_dim: channels of the encoder at the size of Stage I's image, 4 `gf_dim` at a quarter of it. Each block halves
            them.
        text_dim: of the embeddings, as Stage I has it.
        residual_blocks: R.
        image_size: a quarter of Stage I's times a power of two.
        stage1_bn: "eval": Stage I normalises by its running statistics and stays as it was, as the paper has it fixed;
            ``train()`` leaves it in evaluation mode. "train": it follows ``train()``, so that while training it
            normalises by the batch and its running statistics keep moving: the published code.
        ca_activation: as :class:`Stage1Generator` has it.

    Call: text_embedding [N, text_dim], noise [N, z_dim of Stage I], and eps: None, a pair of tensors [N, condition_dim]
    for Stage I's condition and this stage's, or one tensor for both -> (Stage I's image, image [N, 3, image_size,
    image_size] in [-1, 1], mu [N, e], logvar [N, e]). Images are in channels_last.

    36.6 M parameters with the defaults, 26.3 M of which learn, and 11.6 G multiply-adds for an image, Stage I's apart.
    Neither an enlarged input of a block nor the text repeated over space is written.

    Raises:
        TypeError, ValueError: an argument here, or of the call, that is not as said above.

    Example:
        >>> import torch
        >>> stage1 = Stage1Generator(gf_dim=8, text_dim=16, image_size=32)
        >>> generator = Stage2Generator(stage1, gf_dim=8, text_dim=16, residual_blocks=2, image_size=64)
        >>> small, image, mu, logvar = generator(torch.randn(2, 16), torch.randn(2, 100))
        >>> small.shape, image.shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 3, 64, 64]))
    """

    def __init__(
        self,
        stage1: Stage1Generator,
        condition_dim: int = 128,
        gf_dim: int = 128,
        text_dim: int = 1024,
        residual_blocks: int = 4,
        *,
        image_size: int = 256,
        stage1_bn: Literal["eval", "train"] = "eval",
        ca_activation: str = "relu",
    ) -> None:
        super().__init__()
        op = "Stage2Generator"
        if not isinstance(stage1, Stage1Generator):
            bad_type(op, "stage1", type(stage1).__name__, "a Stage1Generator")
        check_sizes(op, condition_dim=condition_dim, gf_dim=gf_dim, text_dim=text_dim, residual_blocks=residual_blocks)
        if text_dim != stage1.text_dim:
            bad_value(op, "text_dim", text_dim, f"that of Stage I, {stage1.text_dim}")
        if stage1_bn not in ("eval", "train"):
            bad_value(op, "stage1_bn", repr(stage1_bn), '"eval" or "train"')
        self.blocks = doublings(op, image_size, stage1.image_size // 4)
        channels = 4 * gf_dim
        _check_halvings(op, gf_dim, channels, self.blocks)
        self.z_dim, self.condition_dim, self.text_dim = stage1.z_dim, condition_dim, text_dim
        self.image_size, self.stage1_bn = image_size, stage1_bn
        self.STAGE1_G = stage1.requires_grad_(False)
        if stage1_bn == "eval":
            stage1.eval()
        self.ca_net = ConditioningAugmentation(text_dim, condition_dim, activation=ca_activation)
        half, quarter = (normed(conv4(gf_dim * i, gf_dim * 2 * i), relu()) for i in (1, 2))
        self.encoder = nn.Sequential(conv3(3, gf_dim), relu(), *half, *quarter)
        self.hr_joint = JointBlock(channels, condition_dim)
        self.residual = nn.Sequential(*(ResidualBlock(channels) for _ in range(residual_blocks)))
        add_up_blocks(self, channels, self.blocks)
        for child in self.children():
            if child is not stage1:
                initialize(child)

    def train(self, mode: bool = True) -> Stage2Generator:
        """Of Stage I only where `stage1_bn` says so."""
        super().train(mode)
        if self.stage1_bn == "eval":
            self.STAGE1_G.eval()
        return self

    def forward(self, text_embedding: Tensor, noise: Tensor, eps: Tensor | Sequence[Tensor] | None = None) -> _Images:
        """text_embedding [N, text_dim], noise [N, z_dim] -> Stage I's image, image, mu, logvar."""
        _check_inputs(self, text_embedding, noise)
        eps1, eps2 = self._pair(eps, len(noise))
        with torch.no_grad():
            stage1_image = self.STAGE1_G(text_embedding, noise, eps1)[1]
        condition, mu, logvar, _ = self.ca_net(text_embedding, eps2)
        code = self.hr_joint(self.encoder(in_layout_of(self.encoder[0], stage1_image)), condition)
        x = self.residual(code).contiguous(memory_format=torch.channels_last)
        return stage1_image, run_up_blocks(self, x, self.blocks), mu, logvar

    def _pair(self, eps: Tensor | Sequence[Tensor] | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
        if eps is None:
            return None, None
        pair = (eps, eps) if isinstance(eps, Tensor) else tuple(eps)
        if len(pair) != 2:
            bad_value("Stage2Generator", "eps", f"{len(pair)} tensors", "one for both stages, or a pair")
        for value, width in zip(pair, (self.STAGE1_G.condition_dim, self.condition_dim), strict=True):
            check_vectors("Stage2Generator", "eps", value, width, rows)
        return pair


class _Discriminator(nn.Module):
    """4x4 convolutions of stride 2 to 4 x 4, each of twice the channels, 3x3 ones that halve channels above `most`."""

    def __init__(self, condition_dim: int, df_dim: int, image_size: int, most: int | None, unconditional: bool) -> None:
        super().__init__()
        op = type(self).__name__
        check_sizes(op, condition_dim=condition_dim, df_dim=df_dim)
        levels = doublings(op, image_size)
        layers: list[nn.Module] = [conv4(3, df_dim), leaky_relu()]
        channels = df_dim
        for _ in range(levels - 1):
            layers += normed(conv4(channels, 2 * channels), leaky_relu())
            channels *= 2
        while most is not None and channels > most:
            layers += normed(conv3(channels, channels // 2), leaky_relu())
            channels //= 2
        self.image_size, self.condition_dim, self.feature_channels = image_size, condition_dim, channels
        self.encode_img = nn.Sequential(*layers)
        self.get_cond_logits = ConditionalHead(channels, condition_dim)
        self.get_uncond_logits = UnconditionalHead(channels) if unconditional else None
        initialize(self)

    def forward(self, image: Tensor) -> Tensor:
        """image [N, 3, image_size, image_size] -> features [N, C, 4, 4]."""
        check_images(type(self).__name__, "image", image, self.image_size)
        return self.encode_img(in_layout_of(self.encode_img[0], image))


class Stage1Discriminator(_Discriminator):
    """Judges 64 pixels with a condition: 4x4 convolutions of stride 2, batch norm, leaky ReLU to 4 x 4, then a head
    that reads features and condition (arXiv:1612.03242, section 3.2).

    Args:
        condition_dim: e, of the conditions.
        df_dim: channels of the first convolution. Each next one doubles them.
        image_size: 8, 16, 32, 64, ...: one convolution for each halving to 4.

    Call: image [N, 3, image_size, image_size] -> features [N, C, 4, 4], which the head is called with:
    ``get_cond_logits(features, condition [N, e])`` -> probabilities [N]. As published the name says logits;
    ``get_cond_logits.logits`` returns these. `get_uncond_logits` is None. 5.7 M parameters with the defaults.

    Raises:
        TypeError, ValueError: an argument here, or of the call, that is not as said above.

    Example:
        >>> import torch
        >>> discriminator = Stage1Discriminator(df_dim=8)
        >>> features = discriminator(torch.randn(2, 3, 64, 64))
        >>> discriminator.get_cond_logits(features, torch.randn(2, 128)).shape
        torch.Size([2])
    """

    def __init__(self, condition_dim: int = 128, df_dim: int = 64, *, image_size: int = 64) -> None:
        super().__init__(condition_dim, df_dim, image_size, None, unconditional=False)


class Stage2Discriminator(_Discriminator):
    """Judges 256 pixels, with a condition and without: as :class:`Stage1Discriminator`, then 3x3 convolutions at 4 x 4
    that halve the channels down to 8 `df_dim`, and a second head (arXiv:1612.03242, section 3.3).

    Arguments, call and errors are those of :class:`Stage1Discriminator`; ``get_uncond_logits(features)`` ->
    probabilities [N]. 71.3 M parameters with the defaults.

    Example:
        >>> import torch
        >>> discriminator = Stage2Discriminator(df_dim=8, image_size=128)
        >>> features = discriminator(torch.randn(2, 3, 128, 128))
        >>> discriminator.get_uncond_logits(features).shape
        torch.Size([2])
    """

    def __init__(self, condition_dim: int = 128, df_dim: int = 64, *, image_size: int = 256) -> None:
        super().__init__(condition_dim, df_dim, image_size, 8 * df_dim, unconditional=True)


def _check_halvings(op: str, gf_dim: int, channels: int, blocks: int) -> None:
    if channels % (1 << blocks):
        expected = f"a number whose {channels // gf_dim}-fold can be halved {blocks} times, once for each block"
        bad_value(op, "gf_dim", gf_dim, expected)


def _check_inputs(generator: Stage1Generator | Stage2Generator, text_embedding: Tensor, noise: Tensor) -> None:
    op = type(generator).__name__
    check_vectors(op, "text_embedding", text_embedding, generator.text_dim)
    check_vectors(op, "noise", noise, generator.z_dim, len(text_embedding))
