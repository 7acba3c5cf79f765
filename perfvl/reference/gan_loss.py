"""Binary cross-entropies of several discriminator heads and their weighted sum, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gan_loss(
    logits: Sequence[Tensor], targets: Sequence[float], weights: Sequence[float], *, exact: bool
) -> tuple[Tensor, Tensor]:
    r"""The weighted sum [] of the heads' losses, and these [heads], of logits :math:`x_k` [rows of head k]:
    :math:`L_k = \frac{1}{n_k} \sum_i -y_k \log \sigma(x_{k,i}) - (1 - y_k) \log(1 - \sigma(x_{k,i}))`
    (Goodfellow et al. 2014, arXiv:1406.2661, eq. 1; the weights are those of Zhang et al. 2017, arXiv:1612.03242).

    By :math:`1 - \sigma(x) = \sigma(-x)` both logarithms keep their precision for logits of any size. ``exact`` is
    what ``BCELoss`` after ``Sigmoid`` computes instead, from a probability rounded to the dtype: logarithms of at least
    -100, and a gradient divided by at least 1e-12.
    """
    with torch.autocast(logits[0].device.type, enabled=False):
        wide = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
        rows = _probability_losses if exact else _logit_losses
        heads = [rows(x.to(wide), target).mean() for x, target in zip(logits, targets, strict=True)]
        total = sum((w * head for w, head in zip(weights, heads, strict=True)), torch.zeros_like(heads[0]))
        return total, torch.stack(heads).detach()


def _logit_losses(x: Tensor, target: float) -> Tensor:
    # A term with the factor 0 is left out: of an infinite logit it would be NaN.
    loss = torch.zeros_like(x)
    if target != 0:
        loss = loss - target * F.logsigmoid(x)
    if target != 1:
        loss = loss - (1 - target) * F.logsigmoid(-x)
    return loss


def _probability_losses(x: Tensor, target: float) -> Tensor:
    p = x.sigmoid()
    # torch's own function refuses what is not a probability, NaN among it, by looking at the data.
    numbers = torch.where(p.isnan(), 0.5, p)
    losses = F.binary_cross_entropy(numbers, torch.full_like(p, target), reduction="none")
    return torch.where(p.isnan(), p, losses)
