"""The ways to put keys into a queue that perfvl is compared with, each written as well as PyTorch allows.

Every builder takes a queue [K, d] (the contender's own), the row to write first, and ids [K] that move with the keys
(or None), prepares what a training run prepares once, and returns a `Ring`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .workload import Unavailable, imported

Enqueue = Callable[[Tensor, Tensor | None], object]
"""``enqueue(keys [B, d], ids [B] or None)``; with ids where the ring was built with ids."""


class Ring(NamedTuple):
    """A way to enqueue, and views of where it writes: keys [K, d], ids [K] or None."""

    enqueue: Enqueue
    keys: Tensor
    ids: Tensor | None


Build = Callable[[Tensor, int, Tensor | None], Ring]


def moco(queue: Tensor, first: int, ids: Tensor | None) -> Ring:
    """MoCo's way: a (d, K) buffer, whose pointer is a tensor that the host reads, then columns are overwritten.

    The ids are a (1, K) buffer, as in ALBEF.
    """
    columns = queue.t().contiguous()
    id_columns = None if ids is None else ids[None].contiguous()
    pointer = torch.tensor([first], device=queue.device)
    size = len(queue)

    def enqueue(keys: Tensor, key_ids: Tensor | None) -> None:
        at, batch = int(pointer), len(keys)
        if size % batch:
            raise ValueError(f"keys: got {batch}, expected a divisor of the queue's size {size}")
        columns[:, at : at + batch] = keys.t()
        if id_columns is not None and key_ids is not None:
            id_columns[:, at : at + batch] = key_ids[None]
        pointer[0] = (at + batch) % size

    return Ring(enqueue, columns.t(), None if id_columns is None else id_columns[0])


def index_copy(queue: Tensor, first: int, ids: Tensor | None, *, by_column: bool = False) -> Ring:
    """Indices computed on the device: any batch size, and the host never waits. (K, d), or MoCo's (d, K)."""
    buffer, dim = (queue.t().contiguous(), 1) if by_column else (queue, 0)
    pointer = torch.tensor(first, device=queue.device)
    size = len(queue)
    offsets: dict[int, Tensor] = {}

    def enqueue(keys: Tensor, key_ids: Tensor | None) -> None:
        batch = len(keys)
        if batch not in offsets:
            offsets[batch] = torch.arange(batch, device=queue.device)
        rows = (offsets[batch] + pointer).remainder_(size)
        keys = keys.to(queue.dtype)
        buffer.index_copy_(dim, rows, keys.t() if by_column else keys)
        if ids is not None and key_ids is not None:
            ids.index_copy_(0, rows, key_ids)
        pointer.add_(batch).remainder_(size)

    return Ring(enqueue, buffer.t() if by_column else buffer, ids)


def slices(queue: Tensor, first: int, ids: Tensor | None) -> Ring:
    """One assignment to rows of a (K, d) buffer. The pointer is a Python number: no wait, but no checkpoint and no
    CUDA graph either, and a batch may not wrap.
    """
    at, size = first, len(queue)

    def enqueue(keys: Tensor, key_ids: Tensor | None) -> None:
        nonlocal at
        batch = len(keys)
        if size % batch:
            raise ValueError(f"keys: got {batch}, expected a divisor of the queue's size {size}")
        queue[at : at + batch] = keys
        if ids is not None and key_ids is not None:
            ids[at : at + batch] = key_ids
        at = (at + batch) % size

    return Ring(enqueue, queue, ids)


def lightly(queue: Tensor, first: int, ids: Tensor | None) -> Ring:
    """The enqueue of lightly's ``MemoryBankModule``, without the clone of the bank that its ``forward`` returns."""
    if ids is not None:
        raise Unavailable("lightly's memory bank keeps no ids")
    module = imported("lightly.models.modules.memory_bank", "lightly: pip install 'perfvl[peers]'")
    bank = module.MemoryBankModule(tuple(queue.shape), feature_dim_first=False)
    bank.bank, bank.bank_ptr = queue, torch.tensor([first], device=queue.device)
    return Ring(lambda keys, _: bank._dequeue_and_enqueue(keys), queue, None)


def metric_learning(queue: Tensor, first: int, ids: Tensor | None) -> Ring:
    """The enqueue of pytorch-metric-learning's ``CrossBatchMemory``, without its loss. It always keeps a label per key;
    where there are no ids, zeros.
    """
    if queue.dtype != torch.float32:
        raise Unavailable("CrossBatchMemory keeps its memory in the dtype of the keys")
    losses = imported("pytorch_metric_learning.losses", "pytorch-metric-learning: pip install 'perfvl[peers]'")
    size, width = queue.shape
    memory = losses.CrossBatchMemory(losses.NTXentLoss(), width, memory_size=size)
    memory.embedding_memory, memory.queue_idx = queue, first
    memory.label_memory = ids if ids is not None else torch.zeros(size, dtype=torch.int64, device=queue.device)
    labels: dict[int, Tensor] = {}

    def enqueue(keys: Tensor, key_ids: Tensor | None) -> None:
        if key_ids is None and len(keys) not in labels:
            labels[len(keys)] = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        memory.add_to_memory(keys, labels[len(keys)] if key_ids is None else key_ids, len(keys))

    return Ring(enqueue, queue, ids)


def plain_copy(queue: Tensor, first: int, ids: Tensor | None) -> Ring:
    """The batch copied to the same rows each time: no pointer and no wrap, so no answer, but the least work."""

    def enqueue(keys: Tensor, key_ids: Tensor | None) -> None:
        queue[: len(keys)].copy_(keys)
        if ids is not None and key_ids is not None:
            ids[: len(keys)].copy_(key_ids)

    return Ring(enqueue, queue, ids)


def normalized(build: Build) -> Build:
    """A way to enqueue, after ``F.normalize``."""

    def build_normalized(queue: Tensor, first: int, ids: Tensor | None) -> Ring:
        ring = build(queue, first, ids)
        return ring._replace(enqueue=lambda keys, key_ids: ring.enqueue(F.normalize(keys, dim=1), key_ids))

    return build_normalized
