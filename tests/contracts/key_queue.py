"""enqueue_ under the contract: wraps, batches beyond the ring, dtypes, layouts, masks, payloads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample
from torch import Tensor

import perfvl.functional as pf
from perfvl.nn import KeyQueue

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def rival(
    queue,
    cursor,
    keys,
    *,
    normalize=False,
    valid=None,
    mask=None,
    payload_queues=(),
    payloads=(),
    drop_tail=False,
):
    """One row at a time, as the definition has it; the position read on the host, as MoCo does."""
    size = len(queue)
    queue, payload_queues = queue.clone(), [p.clone() for p in payload_queues]
    if normalize:
        keys = F.normalize(keys if keys.dtype == F64 else keys.float(), dim=1)
    kept = range(len(keys)) if mask is None else mask.nonzero().flatten().tolist()
    at = start = int(cursor) % size
    for row in kept:
        if drop_tail and at == size:
            break
        at %= size
        for ring, rows in [(queue, keys), *zip(payload_queues, payloads, strict=True)]:
            ring[at] = rows[row]
        at += 1
    at = 0 if drop_tail and start + len(kept) >= size else (start + len(kept)) % size
    found = [queue, torch.full_like(cursor, at)]
    if valid is not None:
        found.append((valid + len(kept)).clamp(max=size))
    return [*found, *payload_queues]


def ring(device: str, size: int, dim: int, batch: int, cursor: int = 0, queue_dtype=F32, dtype=F32) -> dict[str, Any]:
    return {
        "queue": torch.randn(size, dim).to(device, queue_dtype),
        "cursor": torch.tensor(cursor, device=device),
        "keys": torch.randn(batch, dim).to(device, dtype),
    }


def samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any], **options: Any) -> None:
        # Outputs are copies or rounded copies of the inputs: where nothing is normalised they are exact.
        found.append(Sample(name, {**inputs, **options}, rival, 1e-6 if options.get("normalize") else 0.0))

    for size, dim, batch, cursor in [
        (8, 4, 3, 0),
        (8, 4, 3, 6),
        (8, 4, 8, 5),
        (8, 4, 19, 5),
        (8, 4, 1, 7),
        (1, 3, 5, 0),
        (100, 37, 64, 90),
        (300, 130, 200, 250),
        (2000, 64, 1500, 1999),
        (5, 1, 2, 4),
    ]:
        add(f"K={size} d={dim} B={batch} at {cursor}", ring(device, size, dim, batch, cursor))
    for queue_dtype in (F32, BF16, F16):
        for dtype in (F32, BF16, F16):
            inputs = ring(device, 40, 33, 30, 25, queue_dtype, dtype)
            add(f"{dtype} keys into {queue_dtype}", inputs)
            add(f"{dtype} keys into {queue_dtype}, normalised", inputs, normalize=True)
    base = ring(device, 20, 16, 12, 15)
    zeros = {**base, "keys": base["keys"].clone().index_fill_(0, torch.tensor([3], device=device), 0.0)}
    add("a key of zeros, normalised", zeros, normalize=True)
    add("huge keys, normalised", {**base, "keys": base["keys"] * 1e15}, normalize=True)
    for start, count in ((0, 12), (15, 19)):
        add(f"{start} valid", base, valid=torch.tensor(start, device=device))
        add(f"{count} valid, shape [1]", base, valid=torch.tensor([count], device=device))
    add("cursor of shape [1]", {**base, "cursor": torch.tensor([15], device=device)})
    add("cursor beyond the ring", {**base, "cursor": torch.tensor(1015, device=device)})
    add("negative cursor", {**base, "cursor": torch.tensor(-7, device=device)})
    for size, batch in ((20, 12), (5, 30), (64, 300)):
        for kind in ("some", "none", "all"):
            mask = {"some": torch.rand(batch) > 0.4, "none": torch.zeros(batch) > 0, "all": torch.ones(batch) > 0}[kind]
            inputs = ring(device, size, 16, batch, size - 1)
            add(f"mask keeps {kind} of {batch}, K={size}", inputs, mask=mask.to(device), valid=inputs["cursor"].clone())
    add("mask with a step", base, mask=(torch.rand(24, device=device) > 0.5)[::2])
    for size, batch, cursor in [(5, 3, 0), (5, 3, 3), (5, 2, 3), (5, 9, 2)]:
        add(f"drop tail K={size} B={batch} at {cursor}", ring(device, size, 4, batch, cursor), drop_tail=True,
            valid=torch.tensor(cursor, device=device))  # fmt: skip
    kinds = {torch.int64: (), torch.int32: (3,), torch.bool: (), torch.uint8: (5,), BF16: (2, 2), F32: ()}
    payload_queues = [torch.zeros(20, *shape, dtype=dtype, device=device) for dtype, shape in kinds.items()]
    payloads = [(torch.randn(12, *shape) * 9).to(device, dtype) for dtype, shape in kinds.items()]
    add("payloads", base, payload_queues=payload_queues, payloads=payloads)
    mask = torch.rand(12, device=device) > 0.4
    add("payloads, mask", base, payload_queues=payload_queues, payloads=payloads, mask=mask)
    add("payload of another dtype", base, payload_queues=payload_queues[:1], payloads=[payloads[1][:, 0]])
    add("strided payload", base, payload_queues=[torch.zeros(20, 3, device=device)],
        payloads=[torch.randn(3, 12, device=device).T])  # fmt: skip

    keys, queue = base["keys"], base["queue"]
    layouts = {
        "ring of a (d, K) buffer": {"queue": queue.T.contiguous().T},
        "keys of a (d, B) buffer": {"keys": keys.T.contiguous().T},
        "both transposed": {"queue": queue.T.contiguous().T, "keys": keys.T.contiguous().T},
        "columns of a wider ring": {"queue": torch.randn(20, 40, device=device)[:, 3:19]},
        "every other row of a ring": {"queue": torch.randn(40, 16, device=device)[::2]},
        "every other column of keys": {"keys": torch.randn(12, 32, device=device)[:, ::2]},
        "offset by one": {"keys": torch.randn(12 * 16 + 1, device=device)[1:].view(12, 16)},
        "expanded keys": {"keys": keys[:1].expand(12, 16)},
    }
    for name, change in layouts.items():
        add(name, {**base, **change})
        add(f"{name}, normalised, bfloat16", {**base, **change, "queue": change.get("queue", queue)}, normalize=True)
    return found


def raw_samples(device: str) -> list[tuple]:
    found = []
    for size, batch, queue_dtype in [(8, 3, F32), (4, 9, BF16), (5, 0, F32)]:
        t = ring(device, size, 6, batch, 2, queue_dtype)
        ids, rows = torch.zeros(size, dtype=torch.int64, device=device), torch.arange(batch, device=device)
        mask = torch.arange(batch, device=device) % 3 > 0
        found.append((*t.values(), None, None, [], [], False, False))
        found.append((*t.values(), torch.tensor(1, device=device), mask, [ids], [rows], True, False))
        found.append((*t.values(), torch.tensor(1, device=device), None, [], [], False, True))
    return found


def bad_inputs() -> list[BadInput]:
    def bad(name: str, error: type[Exception], message: str, **change: Any) -> BadInput:
        payloads = {} if "payloads" in change else {"payload_queues": (), "payloads": ()}
        return BadInput(name, payloads | change, error, f"^enqueue_: `{message}")

    V, T = ValueError, TypeError
    ids = torch.zeros(50, dtype=torch.int64)
    return [
        bad("queue not a tensor", T, "queue` got list, expected a torch.Tensor", queue=[1.0]),
        bad("queue of rank 1", V, r"queue` got shape \(16,\), expected 2 dimensions", queue=torch.randn(16)),
        bad("integer queue", T, "queue` got torch.int64, expected a float", queue=torch.ones(50, 16).long()),
        bad("queue without rows", V, r"queue` got shape \(0, 16\), expected at least one row",
            queue=torch.randn(0, 16)),
        bad("expanded queue", V, "queue` got an expanded tensor, expected", queue=torch.randn(1, 16).expand(50, 16)),
        bad("queue that requires grad", V, "queue` got a tensor that requires grad",
            queue=torch.randn(50, 16, requires_grad=True)),
        bad("keys not a tensor", T, "keys` got NoneType, expected a torch.Tensor", keys=None),
        bad("keys of rank 3", V, "keys` got shape .*, expected 2 dimensions", keys=torch.randn(2, 3, 16)),
        bad("keys of another width", V, r"keys` got shape \(8, 15\), expected \(B, 16\)", keys=torch.randn(8, 15)),
        bad("integer keys", T, "keys` got torch.int32, expected a float", keys=torch.ones(8, 16, dtype=torch.int32)),
        bad("keys elsewhere", V, "keys` got device meta, expected the queue's device cpu",
            keys=torch.randn(8, 16, device="meta")),
        bad("queue elsewhere", V, "cursor` got device cpu, expected the queue's device meta",
            queue=torch.randn(50, 16, device="meta")),
        bad("cursor is an int", T, "cursor` got int, expected an int64 tensor", cursor=3),
        bad("cursor of another dtype", T, "cursor` got torch.int32, expected", cursor=torch.tensor(3).int()),
        bad("two cursors", V, r"cursor` got shape \(2,\), expected one element", cursor=torch.tensor([1, 2])),
        bad("no cursor", T, "cursor` got NoneType, expected", cursor=None),
        bad("valid is an int", T, "valid` got int, expected", valid=3),
        bad("valid of another dtype", T, "valid` got torch.float32, expected", valid=torch.tensor(3.0)),
        bad("mask of another dtype", T, "mask` got torch.int64, expected a bool", mask=torch.ones(8).long()),
        bad("mask of another length", V, r"mask` got shape \(7,\), expected \(8,\)", mask=torch.ones(7) > 0),
        bad("mask is a list", T, "mask` got list, expected a bool tensor", mask=[True] * 8),
        bad("payload without a ring", V, "payloads` got 1 tensors, expected one for each of 0",
            payload_queues=[], payloads=[torch.arange(8)]),
        bad("payload of another length", V, r"payloads\[0\]` got shape \(7,\), expected \(8,",
            payload_queues=[ids], payloads=[torch.arange(7)]),
        bad("payload ring of another length", V, r"payload_queues\[0\]` got shape \(49,\), expected \(50,",
            payload_queues=[ids[:49]], payloads=[torch.arange(8)]),
        bad("payload is a list", T, r"payloads\[0\]` got list, expected a torch.Tensor",
            payload_queues=[ids], payloads=[[1] * 8]),
        bad("too many payloads", V, "payloads` got 9 tensors, expected at most 8",
            payload_queues=[ids.clone() for _ in range(9)], payloads=[torch.arange(8)] * 9),
        bad("payload ring with gaps in rows", V, r"payload_queues\[0\]` got strides .*, expected rows",
            payload_queues=[torch.zeros(50, 6)[:, ::2]], payloads=[torch.zeros(8, 3)]),
    ]  # fmt: skip


def small(device: str, batch: int = 8) -> dict[str, Any]:
    ids = torch.full((50,), -100, device=device)
    return {
        **ring(device, 50, 16, batch, 45),
        "valid": torch.tensor(45, device=device),
        "payload_queues": [ids],
        "payloads": [torch.arange(batch, device=device)],
    }


def partly_filled(**options: Any) -> KeyQueue:
    queue = KeyQueue(50, 16, **options)
    queue.enqueue(torch.randn(45, 16), ids=torch.arange(45))
    return queue


def call_queue(module: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    module.enqueue(inputs["keys"], ids=inputs["payloads"][0])
    state = [module.keys, module.cursor, module.valid, module.payloads["ids"]]
    return torch.cat([t.double().flatten() for t in state])


ENQUEUE = OpContract(
    name="enqueue_",
    call=pf.enqueue_,
    samples=samples,
    raw_op=torch.ops.perfvl.enqueue_.default,
    raw_samples=raw_samples,
    small=small,
    bad_inputs=bad_inputs(),
    resize=lambda inputs: small(inputs["queue"].device.type, 11),
    empty=lambda inputs: inputs | {"keys": inputs["keys"][:0], "payloads": [inputs["payloads"][0][:0]]},
    cuda="native",
    mutates=("queue", "cursor", "valid", "payload_queues"),
    modules=lambda: [partly_filled(), partly_filled(dtype=BF16, normalize=True)],
    call_module=call_queue,
)
