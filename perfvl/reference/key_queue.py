"""Writing a batch of keys into a ring, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def enqueue_(
    queue: Tensor,
    cursor: Tensor,
    keys: Tensor,
    *,
    normalize: bool,
    valid: Tensor | None,
    mask: Tensor | None,
    payload_queues: Sequence[Tensor],
    payloads: Sequence[Tensor],
    drop_tail: bool,
) -> None:
    """Row i of ``keys`` goes to ring row (cursor + i) mod K, and ``cursor`` moves on by the number of rows.

    As if rows were written one at a time: of more than K rows the last K stay. ``mask`` (bool [B]) keeps rows, and only
    kept rows count; with a mask this definition reads it on the host. ``drop_tail`` is the memory bank of lightly: rows
    that would wrap are dropped, and a batch that reaches the end sets the cursor to 0. ``valid`` becomes
    min(K, valid + rows). ``payloads`` move with their keys into ``payload_queues``.
    """
    size = queue.shape[0]
    if mask is not None:
        keys, payloads = keys[mask], [p[mask] for p in payloads]
    if normalize:
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        keys = F.normalize(keys.to(wide), dim=1)
    count = len(keys)
    start = cursor.remainder(size)
    if drop_tail:
        last = size - 1 - start
        own = torch.minimum(torch.arange(min(count, size), device=queue.device), last)  # dropped rows repeat the last
        for ring, values in [(queue, keys), *zip(payload_queues, payloads, strict=True)]:
            ring.index_copy_(0, start + own, values[own].to(ring.dtype))
        moved = torch.where(start + count >= size, 0, start + count)
    else:
        first = max(count - size, 0)
        rows = (start + torch.arange(first, count, device=queue.device)).remainder(size)
        for ring, values in [(queue, keys), *zip(payload_queues, payloads, strict=True)]:
            ring.index_copy_(0, rows, values[first:].to(ring.dtype))
        moved = (start + count).remainder(size)
    cursor.copy_(moved.reshape(cursor.shape))
    if valid is not None:
        valid.add_(count).clamp_(max=size)
