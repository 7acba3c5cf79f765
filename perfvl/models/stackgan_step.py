"""The losses of StackGAN's two networks, and one training iteration of either stage.

What the published code and the paper disagree on is `mode`, in all functions here. "paper": binary cross-entropy works
on logits, and each of the N images is paired with a wrong condition. "reference", the published code: sigmoid, then
``BCELoss`` with its clamps, so that a confident discriminator leaves the generator no gradient, and N - 1 wrong pairs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perfvl.models.stackgan import Stage1Discriminator, Stage1Generator, Stage2Discriminator, Stage2Generator
from perfvl.models.stackgan_parts import check_images, check_vectors
from perfvl.ops._library import bad_type, bad_value, check_float
from perfvl.ops.gan_loss import GANLoss, gan_loss

__all__ = [
    "GeneratorLoss",
    "StepOutput",
    "discriminator_loss",
    "generator_loss",
    "kl_divergence",
    "train_step",
]

Discriminator = Stage1Discriminator | Stage2Discriminator
Generator = Stage1Generator | Stage2Generator
Mode = Literal["paper", "reference"]
Wrong = Literal["shift", "permute", "image"]

_BCE = {"paper": "stable", "reference": "exact"}
_WRONG = ("shift", "permute", "image")


class GeneratorLoss(NamedTuple):
    """What :func:`generator_loss` returns."""

    total: Tensor
    """[]: differentiable."""
    heads: Tensor
    """[1 or 2]: the binary cross-entropies of the conditional and, in Stage II, the unconditional head, unweighted."""
    kl: Tensor
    """[]: the divergence, unweighted."""


class StepOutput(NamedTuple):
    """What a :func:`train_step` computed before its updates: tensors on the device, without gradient."""

    discriminator_loss: Tensor
    """[]: total."""
    discriminator_heads: Tensor
    """[3 or 5], as :func:`discriminator_loss` orders them."""
    generator_loss: Tensor
    """[]: total, by the discriminator after its update."""
    generator_heads: Tensor
    """[1 or 2], as in :class:`GeneratorLoss`."""
    kl: Tensor
    """[]: unweighted."""
    images: Tensor
    """[N, 3, S, S]: what the generator made, and both networks learned from."""


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    r""":math:`-\frac{1}{2 N e} \sum 1 + \text{logvar} - \mu^2 - e^{\text{logvar}}`, of mu and logvar [N, e].

    The mean over conditions and their numbers: 1 / e of the divergence from the standard normal distribution.

    Example:
        >>> import torch
        >>> kl_divergence(torch.ones(4, 8), torch.zeros(4, 8))
        tensor(0.5000)
    """
    return (1 + logvar - mu * mu - logvar.exp()).mean() * -0.5


def discriminator_loss(
    discriminator: Discriminator,
    real: Tensor,
    fake: Tensor,
    condition: Tensor,
    *,
    mode: Mode = "paper",
    wrong: Wrong = "shift",
    wrong_images: Tensor | None = None,
    permutation: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> GANLoss:
    r"""Real images with their text against real images with a wrong text and against fakes, :math:`L(\text{real}) +
    \frac{1}{2} (L(\text{wrong}) + L(\text{fake}))` in Stage I and, with u for the head without a condition,
    :math:`\frac{1}{2} (L(\text{real}) + L_u(\text{real})) + \frac{1}{3} (L(\text{wrong}) + L(\text{fake}) +
    L_u(\text{fake}))` in Stage II (arXiv:1612.03242, section 3; weights of the published code).

    Args:
        discriminator: of either stage.
        real, fake: images [N, 3, S, S] in [-1, 1]; the fakes' graph is left out.
        condition: [N, e], the generator's mu; its graph is left out.
        mode: "paper" or "reference", as the module says.
        wrong: where wrong pairs come from. "shift": image i with condition i + 1, cyclic; of "reference" N - 1 pairs
            without the last image. "permute": a random permutation of the conditions, which leaves about one image with
            its own. "image": `wrong_images` with the right conditions.
        wrong_images: [N, 3, S, S], of other classes than the conditions describe.
        permutation: [N] int64, the condition of each image, instead of a random one for "permute". Not checked.
        label_smoothing: in [0, 1): the target of what is real is 1 minus it.

    Returns:
        :class:`perfvl.ops.gan_loss.GANLoss`: total [], and heads: real, wrong, fake, in Stage II then real and fake
        without a condition, each [] before its weight.

    Raises:
        TypeError, ValueError: an argument that is not as said above; fewer than two images where a wrong condition is
            another image's; another `wrong` than "shift" with ``mode="reference"``.

    Cost: real and fake images are encoded once each, and so are wrong ones. Pairs of one image with several conditions
    share the head's convolution of the image. Batch norms take the statistics of each kind of images or pairs by
    themselves, in the published order: real, wrong, fake. No host synchronisation.

    Example:
        >>> import torch
        >>> from perfvl.models.stackgan import Stage1Discriminator
        >>> real, fake = torch.rand(2, 4, 3, 16, 16) * 2 - 1
        >>> discriminator = Stage1Discriminator(8, 4, image_size=16)
        >>> loss = discriminator_loss(discriminator, real, fake, torch.randn(4, 8))
        >>> loss.total.backward()
        >>> loss.heads.shape
        torch.Size([3])
    """
    op = "discriminator_loss"
    check_images(op, "real", real, discriminator.image_size)
    check_images(op, "fake", fake, discriminator.image_size, len(real))
    check_vectors(op, "condition", condition, discriminator.condition_dim, len(real))
    _check_pairs(op, real, discriminator.image_size, mode, wrong, wrong_images, permutation, label_smoothing)
    condition = condition.detach()
    features = discriminator(real)
    if wrong == "image":
        mismatch = (discriminator(wrong_images), condition)
    else:
        mismatch = (features, _wrong_condition(condition, mode, wrong, permutation))
    made = discriminator(fake.detach())
    logits = discriminator.get_cond_logits.pairs((features, condition), mismatch, (made, condition))
    right = 1.0 - label_smoothing
    targets, weights = [right, 0.0, 0.0], [1.0, 1 / 2, 1 / 2]
    if (head := discriminator.get_uncond_logits) is not None:
        logits += [head.logits(features), head.logits(made)]
        targets, weights = [*targets, right, 0.0], [1 / 2, 1 / 3, 1 / 3, 1 / 2, 1 / 3]
    return gan_loss(logits, targets, weights, mode=_BCE[mode])


def generator_loss(
    discriminator: Discriminator,
    fake: Tensor,
    condition: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    kl_weight: float = 2.0,
    mode: Mode = "paper",
) -> GeneratorLoss:
    r"""Fakes that pass for real: :math:`L(\text{fake}) + \lambda\, KL`, in Stage II with :math:`L_u(\text{fake})` added
    (arXiv:1612.03242, equations 2, 4 and 6).

    Args:
        discriminator: of either stage. Its parameters are left out of the graph: backward computes no gradient of them
            and their ``.grad`` stays as it is. Its batch norms do update their running statistics.
        fake: images [N, 3, S, S] of the generator.
        condition: [N, e], the generator's mu; its graph is left out.
        mu, logvar: [N, e] of the generator: the divergence reaches them.
        kl_weight: of :func:`kl_divergence`.
        mode: "paper" or "reference", as the module says.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Example:
        >>> import torch
        >>> from perfvl.models.stackgan import Stage1Discriminator
        >>> discriminator = Stage1Discriminator(8, 4, image_size=16)
        >>> fake, mu, logvar = torch.rand(4, 3, 16, 16, requires_grad=True), torch.randn(4, 8), torch.zeros(4, 8)
        >>> generator_loss(discriminator, fake, mu, mu, logvar).total.backward()
        >>> {parameter.grad for parameter in discriminator.parameters()}
        {None}
    """
    op = "generator_loss"
    check_images(op, "fake", fake, discriminator.image_size)
    check_vectors(op, "condition", condition, discriminator.condition_dim, len(fake))
    for name, value in (("mu", mu), ("logvar", logvar)):
        check_vectors(op, name, value, discriminator.condition_dim, len(fake))
    _check_kl_weight(op, kl_weight)
    _check_mode(op, mode)
    with _without_weight_gradients(discriminator):
        features = discriminator(fake)
        logits = [discriminator.get_cond_logits.logits(features, condition.detach())]
        if (head := discriminator.get_uncond_logits) is not None:
            logits.append(head.logits(features))
    loss = gan_loss(logits, [1.0] * len(logits), [1.0] * len(logits), mode=_BCE[mode])
    kl = kl_divergence(mu, logvar)
    return GeneratorLoss(loss.total + kl_weight * kl, loss.heads, kl.detach())


def train_step(
    generator: Generator,
    discriminator: Discriminator,
    generator_optimizer: Optimizer,
    discriminator_optimizer: Optimizer,
    images: Tensor,
    text: Tensor,
    *,
    noise: Tensor | None = None,
    eps: Tensor | tuple[Tensor, Tensor] | None = None,
    mode: Mode = "paper",
    wrong: Wrong = "shift",
    wrong_images: Tensor | None = None,
    permutation: Tensor | None = None,
    kl_weight: float = 2.0,
    label_smoothing: float = 0.0,
) -> StepOutput:
    r"""One iteration of either stage: the generator makes images, the discriminator learns from them, the generator
    learns from the discriminator as it is then and the same images (arXiv:1612.03242, section 3; published code).

    Args:
        generator, discriminator: both of one stage, and of one image size and condition.
        generator_optimizer, discriminator_optimizer: published: Adam, learning rate 2e-4, betas (0.5, 0.999), of the
            parameters that require gradients.
        images: real ones [N, 3, S, S] in [-1, 1].
        text: embeddings [N, text_dim] of the images' captions.
        noise: [N, z_dim]; None draws it on the device, with the dtype of `text`.
        eps: of the generator's call; None draws it.
        mode, wrong, wrong_images, permutation, label_smoothing: of :func:`discriminator_loss`, `mode` also of
            :func:`generator_loss`. The published code is ``mode="reference"``, and in Stage II a generator made with
            ``stage1_bn="train"``.
        kl_weight: of :func:`generator_loss`.

    Returns:
        :class:`StepOutput`. Gradients stay in ``.grad``; the discriminator's are those of its own loss.

    Raises:
        TypeError, ValueError: an argument that is not as said above. Nothing was trained then.

    Autocast around the call covers forward passes and losses. ``GradScaler`` is not supported: use bfloat16.

    Cost: one forward pass of the generator, three of the discriminator's encoder, four of its head, of which two share
    their convolution of the image. No weight gradients of the discriminator in the generator's step, no host
    synchronisation, and batch norms update their statistics as often and in the order as published.

    Example:
        >>> import torch
        >>> from perfvl.models.stackgan import Stage1Discriminator, Stage1Generator
        >>> generator = Stage1Generator(8, 8, 4, text_dim=16, image_size=16)
        >>> discriminator = Stage1Discriminator(8, 4, image_size=16)
        >>> adams = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (generator, discriminator)]
        >>> images, text = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 16)
        >>> out = train_step(generator, discriminator, *adams, images, text)
        >>> out.discriminator_heads.shape, out.images.shape
        (torch.Size([3]), torch.Size([4, 3, 16, 16]))
    """
    op = "train_step"
    for name in ("image_size", "condition_dim"):
        got, expected = getattr(discriminator, name), getattr(generator, name)
        if got != expected:
            bad_value(op, "discriminator", f"one of {name} {got}", f"that of the generator, {expected}")
    check_images(op, "images", images, generator.image_size)
    check_vectors(op, "text", text, generator.text_dim, len(images))
    _check_pairs(op, images, generator.image_size, mode, wrong, wrong_images, permutation, label_smoothing)
    _check_kl_weight(op, kl_weight)
    if noise is None:
        noise = torch.randn(len(text), generator.z_dim, dtype=text.dtype, device=text.device)

    with _uncached_autocast(text.device.type):
        _, fake, mu, logvar = generator(text, noise, eps)
        discriminator_optimizer.zero_grad()
        of_discriminator = discriminator_loss(
            discriminator,
            images,
            fake,
            mu,
            mode=mode,
            wrong=wrong,
            wrong_images=wrong_images,
            permutation=permutation,
            label_smoothing=label_smoothing,
        )
    _update(discriminator_optimizer, of_discriminator.total)

    with _uncached_autocast(text.device.type):
        generator_optimizer.zero_grad()
        of_generator = generator_loss(discriminator, fake, mu, mu, logvar, kl_weight=kl_weight, mode=mode)
    _update(generator_optimizer, of_generator.total)

    (d_total, d_heads), (g_total, g_heads, kl) = of_discriminator, of_generator
    return StepOutput(d_total.detach(), d_heads, g_total.detach(), g_heads, kl, fake.detach())


def _uncached_autocast(kind: str) -> torch.autocast:
    """The caller's, without the cache: that would give a step half-precision weights from before the last update."""
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
        optimizer.step()


@contextlib.contextmanager
def _without_weight_gradients(network: nn.Module) -> Iterator[None]:
    """Graphs made inside leave the network's parameters out; backward may come after."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _wrong_condition(condition: Tensor, mode: str, wrong: str, permutation: Tensor | None) -> Tensor:
    if mode == "reference":
        return condition[1:]
    if wrong == "shift":
        return condition.roll(-1, 0)
    if permutation is None:  # as the order of noise: torch.randperm may come from the host
        permutation = torch.rand(len(condition), device=condition.device).argsort()
    return condition[permutation]


def _check_mode(op: str, mode: object) -> None:
    if mode not in _BCE:
        bad_value(op, "mode", repr(mode), '"paper" or "reference"')


def _check_kl_weight(op: str, kl_weight: Any) -> None:
    check_float(op, "kl_weight", kl_weight)
    if not math.isfinite(kl_weight):
        bad_value(op, "kl_weight", kl_weight, "a finite number")


def _check_pairs(
    op: str,
    real: Tensor,
    size: int,
    mode: object,
    wrong: object,
    wrong_images: object,
    permutation: object,
    label_smoothing: Any,
) -> None:
    _check_mode(op, mode)
    if wrong not in _WRONG:
        bad_value(op, "wrong", repr(wrong), f"one of {', '.join(_WRONG)}")
    if mode == "reference" and wrong != "shift":
        bad_value(op, "wrong", repr(wrong), '"shift" in mode="reference"')
    if wrong == "image":
        check_images(op, "wrong_images", wrong_images, size, len(real))
    else:
        if wrong_images is not None:
            bad_value(op, "wrong_images", "a value", f'None with wrong="{wrong}"')
        if len(real) < 2:
            bad_value(op, "images" if op == "train_step" else "real", f"{len(real)} of them", "at least 2")
    if permutation is not None:
        if wrong != "permute":
            bad_value(op, "permutation", "a value", f'None with wrong="{wrong}"')
        if not isinstance(permutation, Tensor) or permutation.dtype != torch.int64:
            got = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
            bad_type(op, "permutation", got, "an int64 tensor")
        if permutation.shape != real.shape[:1]:
            bad_value(op, "permutation", f"shape {tuple(permutation.shape)}", f"[{len(real)}]")
    check_float(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        bad_value(op, "label_smoothing", label_smoothing, "a number in [0, 1)")
