"""Small-loss selection, and the losses of two networks that select rows for one another, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Rate = float | Tensor
GATE_STEPS = 5000


def small_loss_mask(losses: Tensor, keep_rate: Rate, candidates: Tensor | None) -> Tensor:
    r"""bool [..., n]: the first :math:`\lfloor \text{rate} \cdot \#\text{candidates} \rfloor` candidates in ascending
    order of (loss, row), NaN last. ``keep_rate`` is a number or has the leading shape.
    """
    candidates = torch.ones_like(losses, dtype=torch.bool) if candidates is None else candidates
    return _smallest(losses, candidates, _keep_count(_double(keep_rate, losses), candidates.sum(-1)))


def twin_loss(
    logits1: Tensor,
    logits2: Tensor,
    labels: Tensor,
    *,
    method: str,
    released: bool,
    forget_rate: Rate = 0.0,
    co_lambda: float = 0.0,
    min_batch_fraction: float = 0.0,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Losses of network 1 and 2 [...] and the rows that train them [..., n]. With :math:`l^j_i` the cross-entropy of
    row i in network j, R = 1 - forget rate, :math:`I_j` the :math:`k = \lfloor R\,|D| \rfloor` (at least 1 where R > 0)
    rows of D with the smallest :math:`l^j`, and D all rows or those on which the two predictions differ:

    - "decoupling" (Malach & Shalev-Shwartz 2017, arXiv:1706.02613): :math:`L_j = \frac{1}{|D|} \sum_{i \in D} l^j_i`
    - "co_teaching" (Han et al. 2018, arXiv:1804.06872): :math:`L_1 = \frac{1}{k} \sum_{i \in I_2} l^1_i`,
      :math:`L_2 = \frac{1}{k} \sum_{i \in I_1} l^2_i`, all rows in D
    - "co_teaching_plus" (Yu et al. 2019, arXiv:1901.04215): the same, D the disagreement; 0 where D is empty
    - "jocor" (Wei et al. 2020, arXiv:2003.02752): one selection and loss for both by
      :math:`l_i = (1-\lambda)(l^1_i + l^2_i) + \lambda [KL(p_i \| q_i) + KL(q_i \| p_i)]`

    ``released`` is the arithmetic of the authors' code instead: Decoupling weighs rows by n / (K #class) and divides by
    at least ``min_batch_fraction`` n; Co-teaching(+) divides by k twice and keeps all of D where k = 0; Co-teaching+
    takes the cross-entropy of probabilities, trains on all rows where D is empty and the step is below 5000, and loses
    the last rows of D, one for each row of D with sample id 0; JoCoR's k may be 0, and its loss then NaN.
    """
    with torch.autocast(logits1.device.type, enabled=False), torch.no_grad():
        n, classes = logits1.shape[-2:]
        losses1, losses2 = _row_losses(logits1, logits2, labels, method, released, co_lambda)
        disagree = logits1.argmax(-1) != logits2.argmax(-1) if classes else torch.zeros_like(labels, dtype=torch.bool)
        candidates = disagree if method in ("decoupling", "co_teaching_plus") else torch.ones_like(disagree)
        if sample_ids is not None:
            lost = (candidates & (sample_ids == 0)).sum(-1, keepdim=True)
            candidates = candidates & (candidates.flip(-1).cumsum(-1).flip(-1) > lost)
        count = candidates.sum(-1)
        rate = 1.0 - _double(forget_rate, losses1)
        k = _keep_count(rate, count)
        divisor = k.double()
        if method == "decoupling":
            kept1 = kept2 = candidates
            divisor = count.double().clamp_min(min_batch_fraction * n if released else 1.0)
        else:
            if released and method != "jocor":
                k = torch.where(k == 0, count, k)
                divisor = k.double() ** 2
            elif not released:
                k = torch.where((rate > 0) & (count > 0), k.clamp_min(1), k)
                divisor = k.clamp_min(1).double()
            kept1, kept2 = _smallest(losses2, candidates, k), _smallest(losses1, candidates, k)
        if released and method == "co_teaching_plus":
            gate = step < GATE_STEPS
            kept1, kept2 = (torch.where(count.unsqueeze(-1) > 0, kept, gate) for kept in (kept1, kept2))
            divisor = torch.where(count > 0, divisor, n)
        weights = torch.ones((), dtype=torch.float64, device=labels.device)
        if released and method == "decoupling":
            weights = n / (classes * F.one_hot(labels, classes).sum(-2).gather(-1, labels).double())
    with torch.autocast(logits1.device.type, enabled=False):
        if method == "jocor":  # rejected rows must not reach the gradient, not even as 0 * NaN
            logits1, logits2 = (torch.where(kept1.unsqueeze(-1), z, 0) for z in (logits1, logits2))
        else:
            logits1 = torch.where(kept1.unsqueeze(-1), logits1, 0)
            logits2 = torch.where(kept2.unsqueeze(-1), logits2, 0)
        losses1, losses2 = _row_losses(logits1, logits2, labels, method, released, co_lambda)
        weights, divisor = weights.to(losses1.dtype), divisor.to(losses1.dtype)
        loss1 = torch.where(kept1, losses1 * weights, 0).sum(-1) / divisor
        loss2 = torch.where(kept2, losses2 * weights, 0).sum(-1) / divisor
        return loss1, loss1 if method == "jocor" else loss2, kept1, kept2


def _row_losses(
    logits1: Tensor, logits2: Tensor, labels: Tensor, method: str, released: bool, co_lambda: float
) -> tuple[Tensor, Tensor]:
    """[..., n] each, in float32 (float64 for float64)."""
    wide = torch.float64 if logits1.dtype == torch.float64 else torch.float32
    log_p, log_q = logits1.to(wide).log_softmax(-1), logits2.to(wide).log_softmax(-1)
    if released and method == "co_teaching_plus":
        log_p, log_q = log_p.exp().log_softmax(-1), log_q.exp().log_softmax(-1)
    loss1, loss2 = (-z.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for z in (log_p, log_q))
    if method != "jocor":
        return loss1, loss2
    p, q = log_p.exp(), log_q.exp()
    difference = torch.where((p == 0) & (q == 0), 0, log_p - log_q)
    joint = (1 - co_lambda) * (loss1 + loss2) + co_lambda * ((p - q) * difference).sum(-1)
    return joint, joint


def _double(rate: Rate, losses: Tensor) -> Tensor:
    """[...]: a rate in float64, for every batch."""
    if isinstance(rate, Tensor):
        return rate.double().expand(losses.shape[:-1])
    return torch.full(losses.shape[:-1], rate, dtype=torch.float64, device=losses.device)


def _keep_count(rate: Tensor, count: Tensor) -> Tensor:
    """int(rate * count) as Python has it, in float64; within [0, count], and 0 for NaN."""
    kept = torch.where(rate > 0, rate * count, 0).clamp_max(count.double())
    return kept.to(torch.int64)


def _smallest(losses: Tensor, candidates: Tensor, k: Tensor) -> Tensor:
    order = losses.sort(dim=-1, stable=True).indices  # NaN comes last
    order = order.gather(-1, (~candidates).gather(-1, order).sort(dim=-1, stable=True).indices)
    return (order.argsort(-1) < k.unsqueeze(-1)) & candidates
