"""The losses on noisy labels that perfvl is compared with: the published formulation, and ones without host syncs.

Every peer takes logits [n, K] or [G, n, K] of both networks, labels and the forget rate, and returns the sum of losses.
All compute what the papers say, so that answers are equal: the published code's second division by k and its second
softmax are left out, as are its sorted losses and label precision, which no gradient needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.functional import co_teaching_loss, co_teaching_plus_loss, decoupling_loss, jocor_loss

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
LAMBDA = 0.9


def _total(losses: Tensor) -> Tensor:
    return losses.sum() if losses.dim() else losses


def fused(method: str) -> Loss:
    """perfvl itself."""

    def loss(logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: float) -> Tensor:
        if method == "decoupling":
            out = decoupling_loss(logits1, logits2, labels)
        elif method == "co_teaching":
            out = co_teaching_loss(logits1, logits2, labels, forget_rate)
        elif method == "co_teaching_plus":
            out = co_teaching_plus_loss(logits1, logits2, labels, forget_rate)
        else:
            return _total(jocor_loss(logits1, logits2, labels, forget_rate, co_lambda=LAMBDA).loss1)
        return _total(out.loss1 + out.loss2)

    return loss


def group_by_group(loss: Loss) -> Loss:
    """A loss called once for every group."""

    def looped(logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: float) -> Tensor:
        if labels.dim() == 1:
            return loss(logits1, logits2, labels, forget_rate)
        groups = zip(logits1, logits2, labels, strict=True)
        return functools.reduce(torch.add, [loss(*group, forget_rate) for group in groups])

    return looped


def published(method: str) -> Loss:
    """The released code's way: losses to the host, argsort there, rows gathered by index, losses computed again."""

    def one(logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: float) -> Tensor:
        if method in ("decoupling", "co_teaching_plus"):
            # The rows of D one by one, as the code collects them.
            differs = (logits1.argmax(1).cpu().numpy() != logits2.argmax(1).cpu().numpy()).tolist()
            rows = [i for i, different in enumerate(differs) if different]
            index = torch.tensor(rows, dtype=torch.int64, device=labels.device)
            logits1, logits2, labels = logits1[index], logits2[index], labels[index]
        if method == "decoupling":
            return F.cross_entropy(logits1, labels) + F.cross_entropy(logits2, labels)
        kept = max(1, int((1 - forget_rate) * len(labels)))
        if method == "jocor":
            cross_entropy = F.cross_entropy(logits1, labels, reduction="none") * (1 - LAMBDA)
            cross_entropy = cross_entropy + F.cross_entropy(logits2, labels, reduction="none") * (1 - LAMBDA)
            joint = cross_entropy + LAMBDA * (_kl(logits1, logits2) + _kl(logits2, logits1))
            joint = joint.cpu()
            return joint[_smallest(joint, kept)].mean()
        chosen1 = _smallest(F.cross_entropy(logits1, labels, reduction="none"), kept)
        chosen2 = _smallest(F.cross_entropy(logits2, labels, reduction="none"), kept)
        loss1 = F.cross_entropy(logits1[chosen2], labels[chosen2])
        return loss1 + F.cross_entropy(logits2[chosen1], labels[chosen1])

    return group_by_group(one)


def _smallest(losses: Tensor, kept: int) -> Tensor:
    return torch.from_numpy(losses.detach().cpu().numpy().argsort()[:kept]).to(losses.device)


def _kl(logits: Tensor, other: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(other, 1), reduction="none").sum(1)


def sync_free(method: str) -> Loss:
    """As well as PyTorch allows: all groups at once, nothing copied to the host, one cross-entropy per network."""

    def loss(logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: float) -> Tensor:
        n = labels.shape[-1]
        log_p, log_q = logits1.log_softmax(-1), logits2.log_softmax(-1)
        index = labels.unsqueeze(-1)
        losses1, losses2 = -log_p.gather(-1, index).squeeze(-1), -log_q.gather(-1, index).squeeze(-1)
        if method == "decoupling":
            differs = (logits1.argmax(-1) != logits2.argmax(-1)).to(losses1.dtype)
            return _total(((losses1 + losses2) * differs).sum(-1) / differs.sum(-1).clamp_min(1))
        if method == "jocor":
            divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
            joint = (1 - LAMBDA) * (losses1 + losses2) + LAMBDA * divergence
            kept = max(1, int((1 - forget_rate) * n))
            return _total(joint.topk(kept, largest=False, sorted=False).values.mean(-1))
        if method == "co_teaching":
            kept = max(1, int((1 - forget_rate) * n))
            chosen1, chosen2 = (x.detach().topk(kept, largest=False, sorted=False).indices for x in (losses1, losses2))
            return _total(losses1.gather(-1, chosen2).mean(-1) + losses2.gather(-1, chosen1).mean(-1))
        # The count depends on the data: ranks instead of a prefix.
        differs = logits1.argmax(-1) != logits2.argmax(-1)
        count = differs.sum(-1, keepdim=True)
        kept = torch.maximum((count.double() * (1 - forget_rate)).long(), count.clamp_max(1))
        parts = []
        for mine, others in ((losses1, losses2), (losses2, losses1)):
            ranks = others.detach().masked_fill(~differs, torch.inf).argsort(-1).argsort(-1)
            parts.append((mine * ((ranks < kept) & differs)).sum(-1) / kept.squeeze(-1).clamp_min(1))
        return _total(parts[0] + parts[1])

    return loss


def without_selection(logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: float) -> Tensor:
    """Both networks' plain cross-entropy, nothing selected: no answer, but what two losses cost in PyTorch."""
    rows = labels.flatten()
    return F.cross_entropy(logits1.flatten(0, -2), rows) + F.cross_entropy(logits2.flatten(0, -2), rows)


def compiled(method: str) -> Loss:
    """``torch.compile`` of the version without syncs."""
    return torch.compile(sync_free(method), fullgraph=True, dynamic=False)
