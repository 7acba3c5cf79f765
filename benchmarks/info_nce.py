"""Workloads of ``perfvl.functional.info_nce``: MoCo and BriVL queues, float32 and bfloat16.

The gradient goes to the query alone, as in training with momentum keys. The least work is one read of the queue and of
the few queries, and 4 B K d FLOP (2 B K d forward only): two matrix products, whose logits need not leave the chip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.functional import info_nce

from . import info_nce_peers as peers
from .workload import Contender, Step, Tensors, Workload

BuildLoss = Callable[[Tensor, float], peers.Loss]


def fused(queue: Tensor, temperature: float) -> peers.Loss:
    """perfvl itself; the dtype of the queue decides that of the products."""
    return lambda query, positive: info_nce(query, positive, queue, temperature=temperature)


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Unit vectors per direction: independent negatives, positives at a cosine of about 0.7 to their query."""

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, params["d"], generator=generator), dim=1)

    tensors = {}
    for direction in range(params["directions"]):
        query = unit(params["B"])
        tensors[f"query{direction}"] = query
        tensors[f"positive{direction}"] = F.normalize(query + unit(params["B"]), dim=1)
        tensors[f"queue{direction}"] = unit(params["K"]).to(getattr(torch, params["queue_dtype"]))
    return tensors


def truth(inputs: Tensors, temperature: float) -> Tensors:
    """Loss and query gradients in float64 over chunks of keys: first the log-sum-exp, then the expected key."""
    found: Tensors = {"loss": torch.zeros((), dtype=torch.float64)}
    for direction in range(len(inputs) // 3):
        query, positive, queue = (inputs[f"{name}{direction}"].detach() for name in ("query", "positive", "queue"))
        scaled, positive = query.double() / temperature, positive.double()
        positive_logit = (scaled * positive).sum(1)
        lse = positive_logit
        for keys in queue.split(4096):
            lse = torch.logaddexp(lse, (scaled @ keys.double().t()).logsumexp(1))
        expected_key = (positive_logit - lse).exp().unsqueeze(1) * positive
        for keys in queue.split(4096):
            keys = keys.double()
            expected_key += (scaled @ keys.t() - lse.unsqueeze(1)).exp() @ keys
        found["loss"] = found["loss"].to(lse.device) + (lse - positive_logit).mean()
        found[f"query{direction}"] = (expected_key - positive) / (temperature * len(query))
    return found


def contender(
    build: BuildLoss,
    temperature: float,
    role: Any = "peer",
    precision: Any = "float32",
    queue_dtype: torch.dtype | None = None,
    compiles: bool = False,
) -> Contender:
    """A one-direction loss, summed over directions; ``queue_dtype`` is what this contender keeps its queue in."""

    def build_step(inputs: Tensors) -> Step:
        directions = range(len(inputs) // 3)
        losses = [build(inputs[f"queue{i}"].to(queue_dtype), temperature) for i in directions]
        pairs = [(inputs[f"query{i}"], inputs[f"positive{i}"]) for i in directions]
        return lambda: functools.reduce(torch.add, [loss(*pair) for loss, pair in zip(losses, pairs, strict=True)])

    return Contender(build_step, role=role, precision=precision, compiles=compiles)


def contenders(temperature: float, queue_dtype: str) -> dict[str, Contender]:
    """perfvl first, then eager, then the peers, then the bound."""
    half, single = torch.bfloat16, torch.float32

    def row(build: BuildLoss, *arguments: Any, **keywords: Any) -> Contender:
        return contender(build, temperature, *arguments, **keywords)

    def with_autocast(build: BuildLoss) -> BuildLoss:
        return lambda queue, temperature: peers.under_autocast(build(queue, temperature))

    def in_half(build: Callable[..., peers.Loss]) -> BuildLoss:
        return functools.partial(build, dtype=half)

    if queue_dtype == "float32":
        return {
            "perfvl": row(fused, "perfvl"),
            "perfvl, autocast": row(with_autocast(fused), "perfvl", "bfloat16"),
            "eager": row(peers.eager, "eager"),
            "eager, no clone": row(functools.partial(peers.eager, clone=False)),
            "eager, autocast": row(with_autocast(peers.eager), "peer", "bfloat16"),
            "torch.compile": row(peers.compiled, compiles=True),
            "chunked mm loop": row(peers.chunked_loop),
            "linear_cross_entropy": row(peers.linear_cross_entropy),
            "cut cross-entropy": row(peers.cut_cross_entropy, compiles=True),
            "attention, K = V": row(peers.attention),
            "two products alone": row(peers.products_alone, "bound"),
        }
    return {
        "perfvl": row(fused, "perfvl", "bfloat16", half),
        "eager, float32": row(peers.eager, "eager", "float32", single),
        "eager, autocast": row(with_autocast(peers.eager), "peer", "bfloat16", single),
        "eager, bfloat16": row(in_half(peers.eager), "peer", "bfloat16", half),
        "chunked mm loop": row(in_half(peers.chunked_loop), "peer", "bfloat16", half),
        "attention, K = V": row(peers.attention, "peer", "bfloat16", half),
        "two products alone": row(in_half(peers.products_alone), "bound", "bfloat16", half),
    }


def workload(
    model: str,
    batch: int,
    keys: int,
    width: int,
    *,
    queue_dtype: str = "float32",
    temperature: float = 0.07,
    directions: int = 1,
    backward: bool = True,
    quick: bool = False,
) -> Workload:
    """One InfoNCE problem as a workload."""
    suffix = f"{'' if directions == 1 else '-two-way'}{'' if backward else '-forward'}-{queue_dtype}"
    itemsize = 2 if queue_dtype == "bfloat16" else 4
    vectors = 3 if backward else 2  # query and positive are read, the gradient is written
    what = "forward and backward" if backward else "forward only, no gradient"
    return Workload(
        op="info_nce",
        name=f"{model.lower()}-b{batch}-k{keys}-d{width}{suffix}",
        title=f"{model}: {batch} queries, {keys:,} {queue_dtype} keys of width {width}"
        f"{'' if directions == 1 else ', two directions'}; {what}",
        params={
            "B": batch,
            "K": keys,
            "d": width,
            "queue_dtype": queue_dtype,
            "temperature": temperature,
            "directions": directions,
        },
        make=make,
        contenders=contenders(temperature, queue_dtype),
        truth=functools.partial(truth, temperature=temperature),
        leaves=tuple(f"query{i}" for i in range(directions)) if backward else (),
        backward=backward,
        bytes=directions * (keys * width * itemsize + vectors * batch * width * 4),
        flops=directions * (4 if backward else 2) * batch * keys * width,
        shrink={"K": 4096},
        quick=quick,
    )


_moco = functools.partial(workload, "MoCo")
_brivl = functools.partial(workload, "BriVL")

WORKLOADS = (
    _moco(256, 65536, 128, quick=True),
    _moco(256, 65536, 128, queue_dtype="bfloat16", quick=True),
    _moco(256, 65536, 128, backward=False),
    _moco(256, 65536, 256),
    _moco(256, 65536, 256, queue_dtype="bfloat16"),
    _moco(32, 65536, 128),
    _moco(32, 65536, 128, queue_dtype="bfloat16"),
    _moco(32, 4096, 128, quick=True),
    _brivl(256, 16384, 2560),
    _brivl(256, 16384, 2560, queue_dtype="bfloat16"),
    _brivl(16, 16384, 2560, directions=2),
    _brivl(16, 16384, 2560, directions=2, queue_dtype="bfloat16"),
)
