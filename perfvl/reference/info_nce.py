"""InfoNCE over a queue of keys, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def info_nce_logits(
    query: Tensor, positive: Tensor, queue: Tensor, temperature: float | Tensor, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""Positive logits :math:`l_{i0} = q_i \cdot k_i / \tau` [B] and :math:`l_{ij} = q_i \cdot N_j / \tau` [B, K].

    ``compute_dtype`` rounds the operands of the large product, as a tensor core would; sums are float32 (float64 for
    float64), and the positive's product is never rounded.
    """
    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    positive_logit = (query.to(wide) * positive.to(wide)).sum(1) / temperature
    rounded_query, rounded_queue = query.to(compute_dtype).to(wide), queue.to(compute_dtype).to(wide)
    return positive_logit, rounded_query @ rounded_queue.T / temperature


def info_nce(
    query: Tensor,
    positive: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor,
    valid: Tensor | None,
    label_smoothing: float,
    reduction: str,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Loss, lse [B], positive logit [B] and rank [B].

    .. math::
        \text{lse}_i = \log \sum_{j=0}^{n} e^{l_{ij}}, \qquad
        \text{loss}_i = \text{lse}_i - (1-\epsilon)\, l_{i0} - \frac{\epsilon}{1+n} \sum_{j=0}^{n} l_{ij}, \qquad
        \text{rank}_i = \#\{j \ge 1 : l_{ij} \ge l_{i0}\}

    This is ``F.cross_entropy(cat([l_0, l_1..n]), label 0, label_smoothing)``: MoCo (He et al. 2020, arXiv:1911.05722,
    eq. 1) with the positive as column 0. Only the first ``valid`` rows of the queue count.
    """
    with torch.autocast(query.device.type, enabled=False):
        keys = queue.shape[0]
        counted = torch.arange(keys, device=queue.device) < (keys if valid is None else valid)
        queue = torch.where(counted[:, None], queue, 0)  # NaN in a row that does not count must not reach a gradient
        positive_logit, negatives = info_nce_logits(query, positive, queue, temperature, compute_dtype)
        masked = torch.where(counted, negatives, -torch.inf)
        lse = torch.logsumexp(torch.cat([positive_logit[:, None], masked], dim=1), dim=1)
        loss = lse - positive_logit
        if label_smoothing:
            total = positive_logit + torch.where(counted, negatives, 0).sum(1)
            loss = loss + label_smoothing * (positive_logit - total / (1 + counted.sum()))
        rank = (masked >= positive_logit[:, None]).sum(1, dtype=torch.int32)
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        return loss, lse, positive_logit, rank
