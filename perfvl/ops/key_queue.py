"""A ring buffer of keys, written in place: cast, normalise, wrap, payloads, cursor and count in one kernel.

Top to bottom: the public function, its checks, the torch op with its fake.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import LIBRARY, as_list, bad_type, bad_value, check_bool, check_matrix, same_device
from perfvl.reference import key_queue as reference

MAX_PAYLOADS = 8


def enqueue_(
    queue: Tensor,
    cursor: Tensor,
    keys: Tensor,
    *,
    normalize: bool = False,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    payload_queues: Sequence[Tensor] = (),
    payloads: Sequence[Tensor] = (),
    drop_tail: bool = False,
) -> None:
    r"""Writes keys into a ring, in place: :math:`\text{queue}[(c + i) \bmod K] \leftarrow \text{keys}[i]`, then
    :math:`c \leftarrow (c + B) \bmod K`.

    Replaces ``ptr = int(queue_ptr); queue[:, ptr:ptr + B] = keys.T; queue_ptr[0] = (ptr + B) % K`` with
    ``assert K % B == 0`` (MoCo, He et al. 2020, arXiv:1911.05722): any B, no host sync, fit for CUDA graphs. Where
    B > K the last K keys stay, as if they had come one at a time. Training against the rows needs no order: InfoNCE is
    the same for every permutation of the queue.

    Args:
        queue: [K, d], K >= 1, any floating dtype, any strides without overlap: a (d, K) buffer goes in as ``buffer.T``.
        cursor: int64 tensor with one element: the row that is written next. Read and advanced on the device. A value
            outside [0, K) counts modulo K.
        keys: [B, d] on the queue's device; rounded once to the queue's dtype. Must not share memory with the queue.
        normalize: L2-normalise every key first (eps 1e-12), in float32.
        valid: int64 tensor with one element, or None: becomes min(K, valid + B), how many rows hold keys.
        mask: bool [B], or None: only rows that are True are enqueued and counted. Read on the device.
        payload_queues: up to 8 tensors [K, ...] that hold what belongs to the keys (ids, labels).
        payloads: one tensor [B, ...] for each of them, cast to its dtype.
        drop_tail: the memory bank of lightly instead of a ring: rows that would wrap are dropped, and a batch that
            reaches the end sets the cursor to 0.

    float64 queues or keys run the plain PyTorch reference, which reads a ``mask`` on the host. Gradients are not
    recorded; version counters of all that is written rise.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong rank, width, sizes or devices; expanded buffers; more than 8 payloads. Nothing is modified
            then.

    Cost: keys read once, rows written once.

    Example:
        >>> import torch
        >>> queue, cursor = torch.zeros(5, 2), torch.tensor(4)
        >>> enqueue_(queue, cursor, torch.ones(3, 2))
        >>> queue[:, 0], cursor
        (tensor([1., 1., 0., 0., 1.]), tensor(2))
    """
    keys = keys.detach() if isinstance(keys, Tensor) and keys.requires_grad else keys
    fused = isinstance(queue, Tensor) and backends.choose(queue, cuda="native") != "reference"
    if fused and not queue.requires_grad and not torch.compiler.is_compiling():
        try:
            _write(queue, cursor, keys, valid, mask, list(payload_queues), list(payloads), normalize, drop_tail)
            return
        except (RuntimeError, TypeError):
            pass  # the kernel wrote nothing: some argument is a mistake, or of a dtype it does not know
    payload_queues = as_list("enqueue_", "payload_queues", payload_queues)
    payloads = as_list("enqueue_", "payloads", payloads)
    check_bool("enqueue_", "normalize", normalize)
    check_bool("enqueue_", "drop_tail", drop_tail)
    check(queue, cursor, keys, valid, mask, payload_queues, payloads)
    with torch.no_grad():
        payloads = [p.to(q.dtype) for p, q in zip(payloads, payload_queues, strict=True)]
        if fused and torch.float64 not in (queue.dtype, keys.dtype):
            payloads = [_rows(p) for p in payloads]
            _write(queue, cursor, keys, valid, mask, list(payload_queues), payloads, normalize, drop_tail)
            return
        reference.enqueue_(
            queue,
            cursor,
            keys,
            normalize=normalize,
            valid=valid,
            mask=mask,
            payload_queues=payload_queues,
            payloads=payloads,
            drop_tail=drop_tail,
        )


def check(
    queue: Tensor,
    cursor: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    payload_queues: Sequence[Tensor],
    payloads: Sequence[Tensor],
) -> None:
    """Raises for what :func:`enqueue_` does not take."""
    op = "enqueue_"
    check_matrix(op, "queue", queue)
    check_matrix(op, "keys", keys)
    size, dim = queue.shape
    if size < 1:
        bad_value(op, "queue", f"shape {tuple(queue.shape)}", "at least one row")
    if keys.shape[1] != dim:
        bad_value(op, "keys", f"shape {tuple(keys.shape)}", f"(B, {dim}), the width of the queue")
    if queue.requires_grad:
        bad_value(op, "queue", "a tensor that requires grad", "a buffer without")
    _check_ring(op, "queue", queue)
    for name, counter in (("cursor", cursor), ("valid", valid)):
        if counter is None and name == "valid":
            continue
        if not isinstance(counter, Tensor):
            bad_type(op, name, type(counter).__name__, "an int64 tensor with one element")
        if counter.dtype != torch.int64:
            bad_type(op, name, counter.dtype, "an int64 tensor")
        if counter.numel() != 1:
            bad_value(op, name, f"shape {tuple(counter.shape)}", "one element")
        _check_device(op, name, counter, queue)
    _check_device(op, "keys", keys, queue)
    if mask is not None:
        if not isinstance(mask, Tensor):
            bad_type(op, "mask", type(mask).__name__, "a bool tensor")
        if mask.dtype != torch.bool:
            bad_type(op, "mask", mask.dtype, "a bool tensor")
        if mask.shape != keys.shape[:1]:
            bad_value(op, "mask", f"shape {tuple(mask.shape)}", f"({keys.shape[0]},), one entry for each key")
        _check_device(op, "mask", mask, queue)
    if not payload_queues and not payloads:
        return
    if len(payloads) != len(payload_queues):
        bad_value(op, "payloads", f"{len(payloads)} tensors", f"one for each of {len(payload_queues)} payload_queues")
    if len(payloads) > MAX_PAYLOADS:
        bad_value(op, "payloads", f"{len(payloads)} tensors", f"at most {MAX_PAYLOADS}")
    for i, (ring, rows) in enumerate(zip(payload_queues, payloads, strict=True)):
        for name, value, count in ((f"payload_queues[{i}]", ring, size), (f"payloads[{i}]", rows, keys.shape[0])):
            if not isinstance(value, Tensor):
                bad_type(op, name, type(value).__name__, "a torch.Tensor")
            if value.dim() == 0 or value.shape[0] != count or value.shape[1:] != ring.shape[1:]:
                bad_value(op, name, f"shape {tuple(value.shape)}", f"({count}, *{tuple(ring.shape[1:])})")
            _check_device(op, name, value, queue)
        _check_ring(op, f"payload_queues[{i}]", ring)
        if not ring[0].is_contiguous():
            bad_value(op, f"payload_queues[{i}]", f"strides {ring.stride()}", "rows that are contiguous")


def _check_device(op: str, name: str, value: Tensor, queue: Tensor) -> None:
    if value.device != queue.device:
        bad_value(op, name, f"device {value.device}", f"the queue's device {queue.device}")


def _check_ring(op: str, name: str, ring: Tensor) -> None:
    if any(n > 1 and s == 0 for n, s in zip(ring.shape, ring.stride(), strict=True)):
        bad_value(op, name, "an expanded tensor", "a tensor with memory for every row")


def _rows(payload: Tensor) -> Tensor:
    """Contiguous within a row, as the kernel copies bytes."""
    return payload if payload.shape[0] == 0 or payload[0].is_contiguous() else payload.contiguous()


def _write(
    queue: Tensor,
    cursor: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    payload_queues: list[Tensor],
    payloads: list[Tensor],
    normalize: bool,
    drop_tail: bool,
) -> None:
    _OP(queue, cursor, keys, valid, mask, payload_queues, payloads, normalize, drop_tail)
    # The op writes through raw pointers, of which autograd's version counters know nothing.
    written = [queue, cursor, *payload_queues]
    if valid is not None:
        written.append(valid)
    torch.autograd.graph.increment_version(written)


LIBRARY.define(
    "enqueue_(Tensor(a!) queue, Tensor(b!) cursor, Tensor keys, Tensor(c!)? valid, Tensor? mask, "
    "Tensor(d!)[] payload_queues, Tensor[] payloads, bool normalize, bool drop_tail) -> ()"
)
_OP = torch.ops.perfvl.enqueue_.default


@torch.library.register_fake("perfvl::enqueue_", lib=LIBRARY)
def _fake(queue, cursor, keys, valid, mask, payload_queues, payloads, normalize, drop_tail):
    same_device(queue, cursor, keys, valid, mask, *payload_queues, *payloads)
