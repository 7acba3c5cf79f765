"""Workloads of ``perfvl.functional.enqueue_``: MoCo and BriVL queues, float32 and bfloat16, with norms and ids.

The least work is one read of the keys and one write of their rows, some 10 microseconds for MoCo: what is measured is
mostly what a call costs. Calls change the queue, so every contender has its own; answers are compared after a few
batches into a fresh one, the last of which begins again at row 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.functional import enqueue_
from perfvl.nn import KeyQueue

from . import key_queue_peers as peers
from .workload import Contender, Step, Tensors, Workload

BATCHES = 3
"""Different batches of keys; as many are enqueued before the queue is compared."""


def fused(queue: Tensor, first: int, ids: Tensor | None, *, normalize: bool = False) -> peers.Ring:
    """perfvl itself, as a function of buffers."""
    cursor = torch.tensor(first, device=queue.device)
    rings = () if ids is None else (ids,)

    def enqueue(keys: Tensor, key_ids: Tensor | None) -> None:
        payloads = () if key_ids is None else (key_ids,)
        enqueue_(queue, cursor, keys, normalize=normalize, payload_queues=rings, payloads=payloads)

    return peers.Ring(enqueue, queue, ids)


def filled(queue: Tensor, first: int, ids: Tensor | None = None, *, normalize: bool = False) -> KeyQueue:
    """A `KeyQueue` whose rows are those of ``queue``, all valid."""
    payloads = {} if ids is None else {"ids": ids.dtype}
    ring = KeyQueue(*queue.shape, dtype=queue.dtype, normalize=normalize, payloads=payloads).to(queue.device)
    state = {"keys": queue, "cursor": torch.tensor(first), "valid": torch.tensor(len(queue))}
    ring.load_state_dict(state if ids is None else {**state, "payloads.ids": ids})
    return ring


def module(queue: Tensor, first: int, ids: Tensor | None, *, normalize: bool = False) -> peers.Ring:
    """perfvl's module, which also counts valid rows and checks payloads."""
    ring = filled(queue, first, ids, normalize=normalize)

    def enqueue(keys: Tensor, key_ids: Tensor | None) -> None:
        if key_ids is None:
            ring.enqueue(keys)
        else:
            ring.enqueue(keys, ids=key_ids)

    return peers.Ring(enqueue, ring.keys, None if ids is None else ring.payloads["ids"])


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Normal numbers: a queue in its dtype, and batches of float32 keys; their ids count from 0."""
    batch, size, width = params["B"], params["K"], params["d"]
    tensors = {
        "queue": torch.randn(size, width, generator=generator).to(getattr(torch, params["queue_dtype"])),
        "keys": torch.randn(BATCHES, batch, width, generator=generator),
    }
    if params["ids"]:
        tensors["queue_ids"] = torch.full((size,), -100)
        tensors["ids"] = torch.arange(BATCHES * batch).view(BATCHES, batch)
    return tensors


def first_row(inputs: Tensors) -> int:
    """Where the first batch goes: one batch before the last rows, so that the third is at row 0."""
    return len(inputs["queue"]) - (BATCHES - 1) * inputs["keys"].shape[1]


def truth(inputs: Tensors, normalize: bool) -> Tensors:
    """The queue after all batches; keys are normalised in float64 and rounded once."""
    queue, keys = inputs["queue"], inputs["keys"].flatten(0, 1).double()
    rows = (torch.arange(len(keys), device=queue.device) + first_row(inputs)) % len(queue)
    rounded = (F.normalize(keys, dim=1) if normalize else keys).to(queue.dtype)
    found = {"keys": queue.index_copy(0, rows, rounded)}
    if "ids" in inputs:
        found["ids"] = inputs["queue_ids"].index_copy(0, rows, inputs["ids"].flatten())
    return found


def evaluate(workload: Workload, call: Step, inputs: Tensors) -> Tensors:
    """The queue of a contender that has not been called yet, after all batches."""
    for _ in range(BATCHES):
        ring = call()
    return {name: rows.clone() for name, rows in (("keys", ring.keys), ("ids", ring.ids)) if rows is not None}


def contender(build: peers.Build, precision: Any, role: Any = "peer") -> Contender:
    """A way to enqueue, into a queue of its own."""

    def build_step(inputs: Tensors) -> Step:
        ids = inputs["queue_ids"].clone() if "ids" in inputs else None
        ring = build(inputs["queue"].clone(), first_row(inputs), ids)
        key_ids = inputs["ids"].unbind() if "ids" in inputs else [None] * BATCHES
        batches = itertools.cycle(list(zip(inputs["keys"].unbind(), key_ids, strict=True)))

        def step() -> peers.Ring:
            ring.enqueue(*next(batches))
            return ring

        return step

    return Contender(build_step, role=role, precision=precision)


def contenders(queue_dtype: str, normalize: bool) -> dict[str, Contender]:
    """perfvl first, then eager, then the peers, then the bound."""

    def ours(build: Any) -> Contender:
        return contender(functools.partial(build, normalize=normalize), queue_dtype, "perfvl")

    def row(build: peers.Build, role: Any = "peer") -> Contender:
        return contender(peers.normalized(build) if normalize else build, queue_dtype, role)

    return {
        "perfvl": ours(fused),
        "perfvl, KeyQueue": ours(module),
        "eager": row(peers.moco, "eager"),
        "(d, K), index_copy_": row(functools.partial(peers.index_copy, by_column=True)),
        "(K, d), index_copy_": row(peers.index_copy),
        "(K, d), slice": row(peers.slices),
        "lightly MemoryBank": row(peers.lightly),
        "CrossBatchMemory": row(peers.metric_learning),
        "plain copy": contender(peers.plain_copy, queue_dtype, "bound"),
    }


def workload(
    batch: int,
    keys: int,
    width: int,
    *,
    queue_dtype: str = "float32",
    normalize: bool = False,
    ids: bool = False,
    **settings: Any,
) -> Workload:
    """One queue as a workload."""
    itemsize = 2 if queue_dtype == "bfloat16" else 4
    extras = f"{'-normalize' if normalize else ''}{'-ids' if ids else ''}"
    return Workload(
        op="key_queue",
        name=f"enqueue-b{batch}-k{keys}-d{width}-{queue_dtype}{extras}",
        title=f"Enqueue: {batch:,} float32 keys of width {width} into {keys:,} of {queue_dtype}"
        f"{', normalised' if normalize else ''}{', with int64 ids' if ids else ''}",
        params={"B": batch, "K": keys, "d": width, "queue_dtype": queue_dtype, "normalize": normalize, "ids": ids},
        make=make,
        contenders=contenders(queue_dtype, normalize),
        truth=functools.partial(truth, normalize=normalize),
        backward=False,
        output="keys",
        evaluate=evaluate,
        # Keys are rounded once, as in the truth. A norm's own rounding may put a bfloat16 number on its other side.
        tolerance={"float32": 1e-6, "bfloat16": 1e-4},
        bytes=batch * (width * (4 + itemsize) + (16 if ids else 0)),
        flops=3 * batch * width if normalize else 0,
        memory=False,
        **settings,
    )


_moco = functools.partial(workload, 256, 65536, 128, repeats=100)

WORKLOADS = (
    _moco(quick=True),
    _moco(queue_dtype="bfloat16", quick=True),
    workload(2048, 16384, 2560, queue_dtype="bfloat16", repeats=2),
    _moco(normalize=True),
    _moco(ids=True),
)
