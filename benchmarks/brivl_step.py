"""BriVL's training step without its towers: momentum update, both losses and their gradients, both enqueues.

The backbones left out are the same for everybody. Their outputs, queries and keys, are given; what the momentum update
has to do is given by a projection head per tower. At the least the queues are read once in bfloat16, and three numbers
move per parameter of the heads. Answers are those of the first step, from equal queues and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perfvl.nn import CrossModalInfoNCELoss

from . import info_nce, info_nce_peers, key_queue, key_queue_peers, momentum_update, momentum_update_peers
from .workload import Contender, Step, Tensors, Workload

TEMPERATURE = 0.07
MOMENTUM = 0.99

TwoWayLoss = Callable[[list[Tensor], list[Tensor]], Tensor]
"""``loss(queries, positives)``: first images and the keys of texts, second texts and the keys of images."""


class Parts(NamedTuple):
    """What a contender's step is made of. ``reads_in_backward``: backward reads the queues, so keys must wait for it.

    The ring of a direction holds its negatives: first texts, second images.
    """

    loss: TwoWayLoss
    rings: list[key_queue_peers.Ring]
    update: momentum_update_peers.Update
    reads_in_backward: bool = False


Build = Callable[[list[Tensor], list[Tensor], list[Tensor]], Parts]
"""``build(queues, targets, sources)``: queues [K, d] in float32 to start from, and targets that are the contender's."""


class Outcome(NamedTuple):
    """What a step leaves behind."""

    loss: Tensor
    queries: list[Tensor]
    rings: list[key_queue_peers.Ring]
    targets: list[Tensor]


def fused(dtype: torch.dtype) -> Build:
    """perfvl's modules, with queues of this dtype."""

    def build(queues: list[Tensor], targets: list[Tensor], sources: list[Tensor]) -> Parts:
        texts, images = (key_queue.filled(queue.to(dtype), 0) for queue in queues)
        criterion = CrossModalInfoNCELoss(TEMPERATURE)

        def loss(queries: list[Tensor], positives: list[Tensor]) -> Tensor:
            (image, text), (text_key, image_key) = queries, positives
            return criterion(image, text, image_key, text_key, images, texts)

        rings = [key_queue_peers.Ring(lambda keys, _, q=q: q.enqueue(keys), q.keys, None) for q in (texts, images)]
        return Parts(loss, rings, momentum_update.encoder(targets, sources, [], MOMENTUM))

    return build


def eager(*, clone: bool = True, autocast: bool = False) -> Build:
    """BriVL's way: float32 (d, K) queues, cloned for each product since keys come before backward, two pointers that
    the host reads, parameters averaged one by one. Without the clones the keys come after backward.
    """

    def build(queues: list[Tensor], targets: list[Tensor], sources: list[Tensor]) -> Parts:
        rings = [key_queue_peers.moco(queue, 0, None) for queue in queues]

        def loss(queries: list[Tensor], positives: list[Tensor]) -> Tensor:
            with torch.autocast(queries[0].device.type, dtype=torch.bfloat16, enabled=autocast):
                columns = [ring.keys.t().clone() if clone else ring.keys.t() for ring in rings]
                return two_way(queries, positives, columns)

        return Parts(loss, rings, momentum_update_peers.moco(targets, sources, MOMENTUM), not clone)

    return build


def compiled(queues: list[Tensor], targets: list[Tensor], sources: list[Tensor]) -> Parts:
    """``torch.compile`` of both losses over queues that are not cloned; the rest as in eager."""
    rings = [key_queue_peers.moco(queue, 0, None) for queue in queues]
    columns = [ring.keys.t() for ring in rings]
    compiled_loss = torch.compile(two_way, fullgraph=True, dynamic=False)

    def loss(queries: list[Tensor], positives: list[Tensor]) -> Tensor:
        return compiled_loss(queries, positives, columns)

    return Parts(loss, rings, momentum_update_peers.moco(targets, sources, MOMENTUM), True)


def best_of_torch(queues: list[Tensor], targets: list[Tensor], sources: list[Tensor]) -> Parts:
    """What plain PyTorch can do: bfloat16 (K, d) queues under autocast, no clones, Python pointers, foreach lerp."""
    rings = [key_queue_peers.slices(queue.bfloat16(), 0, None) for queue in queues]
    columns = [ring.keys.t() for ring in rings]

    def loss(queries: list[Tensor], positives: list[Tensor]) -> Tensor:
        with torch.autocast(queries[0].device.type, dtype=torch.bfloat16):
            return two_way(queries, positives, columns)

    return Parts(loss, rings, momentum_update_peers.foreach_lerp(targets, sources, MOMENTUM), True)


def two_way(queries: list[Tensor], positives: list[Tensor], columns: list[Tensor]) -> Tensor:
    """The sum of both directions' eager losses over (d, K) queues."""
    first, second = (
        info_nce_peers.moco_loss(query, positive, keys, TEMPERATURE)
        for query, positive, keys in zip(queries, positives, columns, strict=True)
    )
    return first + second


def head_shapes(params: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The parameters of two projection heads, Linear(features, d), ReLU, Linear(d, d): of images and of texts."""
    features, width = params["features"], params["d"]
    return 2 * [(width, features), (width,), (width, width), (width,)]


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Queries, keys and queues as for the loss alone, and the parameters of the heads (source) and of their momentum
    copies (target).
    """
    tensors = info_nce.make({**params, "directions": 2, "queue_dtype": "float32"}, generator)
    for i, shape in enumerate(head_shapes(params)):
        tensors[f"target{i}"] = torch.randn(shape, generator=generator)
        tensors[f"source{i}"] = torch.randn(shape, generator=generator)
    return tensors


def truth(inputs: Tensors) -> Tensors:
    """In float64: loss and gradients; the rows that are written and as many behind them; how far the heads move."""
    start, source = (_in_a_row(momentum_update.of_kind(inputs, kind)) for kind in ("target", "source"))
    vectors = ("query", "positive", "queue")
    found = info_nce.truth({name: t for name, t in inputs.items() if name.startswith(vectors)}, TEMPERATURE)
    for i in (0, 1):
        keys = inputs[f"positive{i}"]
        found[f"rows{i}"] = torch.cat([keys, inputs[f"queue{i}"][len(keys) : 2 * len(keys)]]).double()
    return {**found, "heads": source - start}


def evaluate(workload: Workload, call: Step, inputs: Tensors) -> Tensors:
    """The same from the first step of a contender. The heads' movement is divided by 1 - m, so that an error in it is
    not hidden by what did not move.
    """
    outcome: Outcome = call()
    start = _in_a_row(momentum_update.of_kind(inputs, "target"))
    found = {"loss": outcome.loss, "heads": (_in_a_row(outcome.targets) - start) / (1.0 - MOMENTUM)}
    for i, (query, ring) in enumerate(zip(outcome.queries, outcome.rings, strict=True)):
        found[f"rows{i}"] = ring.keys[: 2 * len(query)].clone()
        if query.grad is not None:
            found[f"query{i}"] = query.grad
    return found


def _in_a_row(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def contender(build: Build, role: Any = "peer", precision: Any = "float32", compiles: bool = False) -> Contender:
    """A way to make the step, with queues and heads of its own."""

    def build_step(inputs: Tensors) -> Step:
        queries = [inputs[f"query{i}"].clone().requires_grad_() for i in (0, 1)]
        positives, queues = ([inputs[f"{kind}{i}"] for i in (0, 1)] for kind in ("positive", "queue"))
        targets = [tensor.clone() for tensor in momentum_update.of_kind(inputs, "target")]
        parts = build([queue.clone() for queue in queues], targets, momentum_update.of_kind(inputs, "source"))

        def enqueue() -> None:
            for ring, keys in zip(parts.rings, positives, strict=True):
                ring.enqueue(keys, None)

        def step() -> Outcome:
            for query in queries:
                query.grad = None
            parts.update()
            loss = parts.loss(queries, positives)
            if not parts.reads_in_backward:
                enqueue()
            loss.backward()
            if parts.reads_in_backward:
                enqueue()
            return Outcome(loss.detach(), queries, parts.rings, targets)

        return step

    return Contender(build_step, role=role, precision=precision, compiles=compiles)


CONTENDERS = {
    "perfvl": contender(fused(torch.bfloat16), "perfvl", "bfloat16"),
    "perfvl, float32 queue": contender(fused(torch.float32), "perfvl"),
    "eager": contender(eager(), "eager"),
    "eager, no clones": contender(eager(clone=False)),
    "eager, autocast": contender(eager(autocast=True), precision="bfloat16"),
    "torch.compile": contender(compiled, compiles=True),
    "best of torch, bfloat16": contender(best_of_torch, precision="bfloat16"),
}


def workload(name: str, batch: int, keys: int, width: int, features: int, **settings: Any) -> Workload:
    """One configuration of BriVL as a workload."""
    params = {"B": batch, "K": keys, "d": width, "features": features, "temperature": TEMPERATURE, "momentum": MOMENTUM}
    parameters = sum(map(math.prod, head_shapes(params)))
    return Workload(
        op="brivl_step",
        name=f"brivl-step-b{batch}-k{keys}-d{width}",
        title=f"BriVL step without towers ({name}): {batch} pairs, 2 queues of {keys:,} keys of width {width}, "
        f"momentum update of 2 heads with {parameters / 2e6:.1f} M parameters each",
        params=params,
        make=make,
        contenders=CONTENDERS,
        truth=truth,
        backward=False,
        evaluate=evaluate,
        bytes=2 * keys * width * 2 + 12 * parameters,
        flops=2 * 4 * batch * keys * width + 3 * parameters,
        shrink={"K": 1024, "features": 64},
        **settings,
    )


WORKLOADS = (
    workload("paper", 16, 16384, 2560, 1280),
    workload("released code", 16, 9600, 2048, 2048, memory=False, quick=True),
)
