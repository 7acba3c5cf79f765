"""info_nce under the contract: samples over dtypes, layouts and options, rivals, bad inputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample
from torch import Tensor

import perfvl.functional as pf
from perfvl.nn import CrossModalInfoNCELoss, InfoNCELoss

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def eager(
    query,
    positive,
    queue,
    *,
    temperature=0.07,
    normalize=False,
    valid=None,
    label_smoothing=0.0,
    reduction="mean",
    stats=False,
):
    """What MoCo's users run, in the dtypes given: half dtypes as autocast computes them."""
    half = next((d for d in (queue.dtype, query.dtype) if d in (BF16, F16)), None)
    if normalize:
        query, positive = F.normalize(query, dim=1), F.normalize(positive, dim=1)
    valid = len(queue) if valid is None else int(valid)
    with torch.autocast(query.device.type, dtype=half or BF16, enabled=half is not None):
        positive_logit, negatives = torch.einsum("nc,nc->n", query, positive), query @ queue[: max(valid, 0)].T
    dtype = torch.promote_types(positive_logit.dtype, F32)
    logits = torch.cat([positive_logit[:, None], negatives], 1).to(dtype) / temperature
    labels = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    loss = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    if not stats:
        return loss
    rank = (logits[:, 1:] >= logits[:, :1]).sum(1, dtype=torch.int32)
    return loss, torch.logsumexp(logits, 1), logits[:, 0], rank


def unit(*shape: int, dtype=F32, device="cpu") -> Tensor:
    rows = torch.randn(*shape)
    return (rows if shape[-1] == 1 else F.normalize(rows, dim=-1)).to(device, dtype)  # in one dimension: only +-1


def tensors(device: str, b: int, k: int, d: int, dtype=F32, queue_dtype=None, positive_grad=True) -> dict[str, Any]:
    return {
        "query": unit(b, d, dtype=dtype, device=device).requires_grad_(),
        "positive": unit(b, d, dtype=dtype, device=device).requires_grad_(positive_grad),
        "queue": unit(k, d, dtype=queue_dtype or dtype, device=device),
    }


def samples(device: str, stats: bool) -> list[Sample]:
    rival = functools.partial(eager, stats=stats)
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any], slack: float = 4e-6, **options: Any) -> None:
        found.append(Sample(name, {**inputs, **options}, rival, slack))

    make = functools.partial(tensors, device)
    for b, k, d in [
        (1, 1, 1),
        (1, 100, 16),
        (2, 8, 3),
        (4, 15, 16),
        (33, 257, 123),
        (300, 1100, 64),
        (16, 700, 300),
        (5, 2500, 700),
    ]:
        add(f"float32 B={b} K={k} d={d}", make(b, k, d), temperature=1.0 if d == 1 else 0.07)
    for query, queue in [(BF16, BF16), (F16, F16), (F32, BF16), (F32, F16), (BF16, F32), (F16, BF16)]:
        # Half operands round the scores; near-equal rows then change ranks, so the ranks are tested on exact data.
        if not stats:
            add(
                f"{query} query, {queue} queue",
                make(65, 777, 100, query, queue),
                slack=2e-3 if BF16 in (query, queue) else 3e-4,
            )
    base = make(20, 300, 32)
    add("temperature 0.01", base, temperature=0.01, slack=2e-5)
    add("negative temperature", base, temperature=-1.0)
    add("temperature tensor", base, temperature=torch.tensor(0.2, device=device, requires_grad=True))
    add("valid int", base, valid=77)
    add("valid 0", base, valid=0)
    add("valid tensor", base, valid=torch.tensor(77, device=device))
    add("valid tensor beyond K", base, valid=torch.tensor([10**6], device=device))
    add("normalize", make(20, 300, 32) | {"query": torch.randn(20, 32, device=device).requires_grad_()}, normalize=True)
    for reduction in ("sum", "none"):
        add(f"reduction {reduction}", base, reduction=reduction)
    for smoothing in (0.1, 1.0):
        add(f"label smoothing {smoothing}", base, label_smoothing=smoothing, reduction="none", slack=1e-5)
    add("label smoothing, valid tensor", base, label_smoothing=0.1, valid=torch.tensor(77, device=device), slack=1e-5)
    add("large logits", {**base, "query": (base["query"].detach() * 300).requires_grad_()}, slack=2e-5)
    add("converged", {**base, "positive": base["query"].detach().clone().requires_grad_()}, slack=2e-5)

    # Layouts: the MoCo buffer (d, K), sliced columns, a step of two rows, an odd offset, expanded rows.
    q, k, n = unit(20, 32, device=device), unit(20, 32, device=device), unit(300, 32, device=device)
    wide = torch.randn(300, 70, device=device)
    layouts = {
        "transposed queue": (q, k, n.T.contiguous().T),
        "column slice": (q, k, wide[:, 3:35]),
        "every other column": (q, k, wide[:, :64:2]),
        "every other row": (q, k, n[::2]),
        "transposed query": (q.T.contiguous().T, k.T.contiguous().T, n),
        "offset by one": (
            torch.cat([q.flatten(), q[0, :1]])[1:].view(20, 32),
            k,
            torch.cat([n.flatten(), n[0, :1]])[1:].view(300, 32),
        ),
        "expanded positive": (q, k[:1].expand(20, 32), n),
        "expanded queue": (q, k, n[:1].expand(300, 32)),
    }
    for name, (query, positive, queue) in layouts.items():
        inputs = {
            "query": query.detach().requires_grad_(),
            "positive": positive.detach().requires_grad_("expanded" not in name),
            "queue": queue,
        }
        add(name, inputs)
        if not stats:
            add(f"{name}, bfloat16 queue", {**inputs, "queue": restrided(queue, BF16)}, slack=2e-3)
    return found


def restrided(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values in another dtype with the same strides."""
    if 0 in t.stride():
        return t[:1].to(dtype).expand(t.shape)
    size = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return torch.empty(size, dtype=dtype, device=t.device).as_strided(t.shape, t.stride()).copy_(t)


def raw_samples(device: str) -> list[tuple]:
    found = []
    for b, k, d, dtype in [(4, 33, 17, F32), (1, 8, 64, BF16), (0, 8, 4, F32), (3, 0, 4, F32)]:
        for reduction in (0, 1, 2) if b else (0, 2):  # the mean of no rows is NaN, which opcheck calls a difference
            for flag in (False, True):
                t = tensors(device, b, k, d, dtype)
                temperature = torch.tensor(0.3, device=device) if flag else None
                valid = torch.tensor(k // 2, device=device) if flag else None
                found.append(
                    (*(v.detach() for v in t.values()), 0.2, temperature, valid, dtype, reduction, flag, not flag)
                )
    t = [v.detach() for v in tensors(device, 4, 30, 16).values()]
    for queue in (t[2].T.contiguous().T, t[2][::2], t[2][:1].expand(30, 16)):
        found.append((t[0].T.contiguous().T, t[1], queue, 0.2, None, None, F32, 1, True, True))
    return found


def bad_inputs(function: str) -> list[BadInput]:
    def bad(name: str, error: type[Exception], message: str, **change: Any) -> BadInput:
        return BadInput(name, change, error, f"^{function}: `{message}")

    V, T = ValueError, TypeError
    return [
        bad("query not a tensor", T, "query` got list, expected a torch.Tensor", query=[1.0]),
        bad("query of rank 1", V, r"query` got shape \(16,\), expected 2 dimensions", query=torch.randn(16)),
        bad("queue of rank 3", V, "queue` got shape .*, expected 2 dimensions", queue=torch.randn(2, 3, 16)),
        bad("integer query", T, "query` got torch.int64, expected a float", query=torch.ones(8, 16, dtype=torch.int64)),
        bad(
            "integer queue", T, "queue` got torch.int32, expected a float", queue=torch.ones(50, 16, dtype=torch.int32)
        ),
        bad("sparse queue", T, "queue` got torch.sparse_coo, expected a dense", queue=torch.randn(50, 16).to_sparse()),
        bad(
            "other batch",
            V,
            r"positive` got shape \(7, 16\), expected the query's shape \(8, 16\)",
            positive=torch.randn(7, 16),
        ),
        bad("other width", V, r"queue` got shape \(50, 15\), expected \(K, 16\)", queue=torch.randn(50, 15)),
        bad(
            "devices apart",
            V,
            "queue` got device meta, expected the query's device",
            queue=torch.randn(50, 16, device="meta"),
        ),
        bad(
            "queue requires grad",
            V,
            "queue` got a tensor that requires grad, expected",
            queue=torch.randn(50, 16, requires_grad=True),
        ),
        bad("temperature zero", V, "temperature` got 0.0, expected a finite number other than 0", temperature=0.0),
        bad("temperature nan", V, "temperature` got nan, expected a finite", temperature=float("nan")),
        bad("temperature inf", V, "temperature` got inf, expected a finite", temperature=float("inf")),
        bad("temperature text", T, "temperature` got str, expected a float or", temperature="0.1"),
        bad("temperature with two elements", V, r"temperature` got shape \(2,\), expected", temperature=torch.ones(2)),
        bad("integer temperature tensor", T, "temperature` got torch.int64, expected", temperature=torch.tensor(1)),
        bad("valid beyond K", V, "valid` got 51, expected 0 <= valid <= K = 50", valid=51),
        bad("valid negative", V, "valid` got -1, expected 0 <= valid", valid=-1),
        bad("valid float", T, "valid` got float, expected an int", valid=3.0),
        bad("valid int32 tensor", T, "valid` got torch.int32, expected", valid=torch.tensor(3, dtype=torch.int32)),
        bad("valid with two elements", V, r"valid` got shape \(2,\), expected", valid=torch.tensor([1, 2])),
        bad("unknown reduction", V, "reduction` got 'avg', expected", reduction="avg"),
        bad(
            "label smoothing above 1",
            V,
            r"label_smoothing` got 1.5, expected a number in \[0, 1\]",
            label_smoothing=1.5,
        ),
    ]


def call_loss(loss: InfoNCELoss, inputs: dict[str, Any]) -> Tensor:
    query, positive, queue = (inputs[k] for k in ("query", "positive", "queue"))
    if isinstance(loss, CrossModalInfoNCELoss):
        return loss(query, positive, query, positive, queue, queue)
    return loss(query, positive, queue)


def contract(function: Any, stats: bool) -> OpContract:
    return OpContract(
        name=function.__name__,
        call=function,
        samples=functools.partial(samples, stats=stats),
        raw_op=torch.ops.perfvl.info_nce.default,
        raw_samples=raw_samples,
        small=lambda device: (
            tensors(device, 8, 50, 16) | {"temperature": torch.tensor(0.2, device=device, requires_grad=True)}
        ),
        double=lambda: (
            tensors("cpu", 3, 5, 4, torch.float64)
            | {
                "temperature": torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
                "label_smoothing": 0.1,
                "valid": torch.tensor(4),
            }
        ),
        bad_inputs=bad_inputs(function.__name__),
        # query and positive themselves, the gradient, weight, positive logit, temperature
        saved_bytes=lambda inputs: 4 * (3 * inputs["query"].numel() + 2 * len(inputs["query"]) + 1),
        grow=lambda inputs: inputs | {"queue": unit(5000, 16, device=inputs["query"].device.type)},
        modules=lambda: [
            *(InfoNCELoss(0.3, learnable=kind, label_smoothing=0.1) for kind in (False, True, "log_scale")),
            CrossModalInfoNCELoss(0.3, directions="mean"),
        ],
        call_module=call_loss,
        per_row={"reduction": "none"},
        empty=lambda inputs: (
            inputs | {k: inputs[k][:0].detach().requires_grad_() for k in ("query", "positive")} | {"reduction": "sum"}
        ),
        resize=lambda inputs: (
            inputs | {k: unit(11, 16, device=inputs[k].device.type).requires_grad_() for k in ("query", "positive")}
        ),
    )


INFO_NCE = contract(pf.info_nce, stats=False)
INFO_NCE_STATS = contract(pf.info_nce_stats, stats=True)
