"""The loss of a discriminator's or a generator's step: every head's binary cross-entropy in one launch.

Top to bottom: the function, its checks, autograd, the torch op with its fake.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import (
    LIBRARY,
    bad_type,
    bad_value,
    check_float,
    check_floating,
    check_name,
    refuse_second_derivative,
)
from perfvl.reference import gan_loss as reference

_MODES = ("stable", "exact")
_MOST_HEADS = 16  # of one launch: their addresses are among its arguments


class GANLoss(NamedTuple):
    """What :func:`gan_loss` returns."""

    total: Tensor
    """[] float32: the weighted sum, differentiable in every head's logits."""
    heads: Tensor
    """[heads] float32 on the device: each head's mean, before its weight. Not differentiable: for the log."""


def gan_loss(
    logits: Sequence[Tensor], targets: Sequence[float], weights: Sequence[float], *, mode: str = "stable"
) -> GANLoss:
    r"""Weighted binary cross-entropies of several heads,
    :math:`\sum_k w_k \frac{1}{n_k} \sum_i \text{BCE}(\sigma(x_{k,i}), y_k)` with
    :math:`\text{BCE}(p, y) = -y \log p - (1 - y) \log(1 - p)`.

    Replaces a ``Sigmoid``, a ``BCELoss`` against a vector of labels, and the weighted additions, for every head of a
    discriminator (StackGAN, Zhang et al. 2017, arXiv:1612.03242: real, wrong and fake pairs weighted 1, 1/2, 1/2).

    Args:
        logits: one tensor [n_k] for each head, before the sigmoid, in one dtype and of any strides; heads may differ in
            rows.
        targets: y_k in [0, 1], one for each head: 1 real, 0 fake, between them a smoothed label.
        weights: w_k, one finite number for each head.
        mode: "stable" works on the logits. "exact" is the arithmetic of ``BCELoss`` after ``Sigmoid`` in float32: above
            a logit of 16.6 the probability is 1, the gradient exactly 0 and the loss for target 0 the clamp 100; below
            -27.6 the gradient for target 1 fades.

    Returns:
        :class:`GANLoss`. Computed in float32 whatever the logits' dtype; float64 and more than 16 heads run the plain
        PyTorch reference. The mean of a head without rows is NaN, as in PyTorch. A NaN logit makes its head NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: no head; targets or weights that are not one for each head, or not in range; logits that are not
            one-dimensional or not on one device; an unknown mode.
        RuntimeError: on backward through the gradient (second order).

    Cost: reads every logit once and saves its gradient, 4 bytes; one launch, no host synchronisation. Backward is one
    multiplication.

    Example:
        >>> import torch
        >>> real, wrong, fake = torch.randn(3, 64, requires_grad=True).unbind()
        >>> loss = gan_loss([real, wrong[1:], fake], [1.0, 0.0, 0.0], [1.0, 0.5, 0.5])
        >>> loss.total.backward()
        >>> loss.heads.shape
        torch.Size([3])
    """
    logits, targets, weights = _checked(logits, targets, weights, mode)
    first, exact = logits[0], mode == "exact"
    if (
        first.dtype == torch.float64
        or len(logits) > _MOST_HEADS
        or backends.choose(first, cuda="native") == "reference"
    ):
        return GANLoss(*reference.gan_loss(logits, targets, weights, exact=exact))
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in logits)
    with torch.no_grad():
        total, heads, grad = _GAN_LOSS(logits, targets, weights, exact, with_grad)
    return GANLoss(_Weighted.apply((total, grad), *logits) if with_grad else total, heads)


def _checked(
    logits: Sequence[Tensor], targets: Sequence[float], weights: Sequence[float], mode: str
) -> tuple[list[Tensor], list[float], list[float]]:
    op = "gan_loss"
    for name, values in (("logits", logits), ("targets", targets), ("weights", weights)):
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            bad_type(op, name, type(values).__name__, "a list, one for each head")
        if len(values) != len(logits):
            bad_value(op, name, f"{len(values)} of them", f"one for each of the {len(logits)} heads")
    if not logits:
        bad_value(op, "logits", "no head", "at least one")
    for k, x in enumerate(logits):
        where = f"logits[{k}]"
        check_floating(op, where, x)
        if x.dim() != 1:
            bad_value(op, where, f"shape {tuple(x.shape)}", "1 dimension: one logit for each row")
        if x.dtype != logits[0].dtype:
            bad_type(op, where, x.dtype, f"the dtype of logits[0], {logits[0].dtype}")
        if x.device != logits[0].device:
            bad_value(op, where, f"device {x.device}", f"the device of logits[0], {logits[0].device}")
    for name, values in (("targets", targets), ("weights", weights)):
        for k, value in enumerate(values):
            check_float(op, f"{name}[{k}]", value)
    for k, (target, weight) in enumerate(zip(targets, weights, strict=True)):
        if not 0.0 <= target <= 1.0:
            bad_value(op, f"targets[{k}]", target, "a number in [0, 1]")
        if not -math.inf < weight < math.inf:
            bad_value(op, f"weights[{k}]", weight, "a finite number")
    check_name(op, "mode", mode, _MODES)
    return list(logits), [float(y) for y in targets], [float(w) for w in weights]


class _Weighted(torch.autograd.Function):
    """The gradients of all heads came with the loss: in backward they meet the upstream gradient."""

    @staticmethod
    def forward(ctx, given, *logits):
        total, grad = given
        ctx.save_for_backward(grad, *logits)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad, *logits = ctx.saved_tensors
        # In float32 until here: a loss scale lifts what float16 would have lost before.
        parts = (grad * upstream).to(logits[0].dtype).split([x.shape[0] for x in logits])
        grads = [part if need else None for part, need in zip(parts, ctx.needs_input_grad[1:], strict=True)]
        return None, *refuse_second_derivative("gan_loss", grads, logits)


LIBRARY.define(
    "gan_loss(Tensor[] logits, float[] targets, float[] weights, bool exact, bool with_grad) "
    "-> (Tensor total, Tensor heads, Tensor grad)"
)
_GAN_LOSS = torch.ops.perfvl.gan_loss.default


@torch.library.register_fake("perfvl::gan_loss", lib=LIBRARY)
def _fake_gan_loss(logits, targets, weights, exact, with_grad):
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits[0].device)

    return empty(), empty(len(logits)), empty(sum(x.shape[0] for x in logits) if with_grad else 0)
