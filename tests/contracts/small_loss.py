"""small_loss_mask and the losses of two networks under the contract: dtypes, layouts, batches, rates, both modes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample
from torch import Tensor

import perfvl.functional as pf
from perfvl.nn import CoTeachingLoss, CoTeachingPlusLoss, DecouplingLoss, JoCoRLoss

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def smallest(losses: Tensor, k: int, rows: Tensor) -> Tensor:
    """The rows of the k smallest losses among `rows`, as the published code sorts them, but stably."""
    return rows[losses[rows].float().argsort(stable=True)[:k]]


def one_batch(method, z1, z2, labels, rate, co_lambda, min_batch_fraction, step, sample_ids, released):
    """The published formulation with gathers, for one batch, in the dtypes given."""
    n, classes = z1.shape
    everyone = torch.arange(n)
    losses = [F.cross_entropy(z.float() if z.dtype != F64 else z, labels, reduction="none") for z in (z1, z2)]
    rows = everyone
    sample_ids = sample_ids if released else None
    if method in ("decoupling", "co_teaching_plus"):
        rows = (z1.argmax(1) != z2.argmax(1)).nonzero()[:, 0]
    if method == "co_teaching_plus" and released:
        wide = [z.float() if z.dtype != F64 else z for z in (z1, z2)]
        losses = [F.cross_entropy(z.softmax(1), labels, reduction="none") for z in wide]
        if sample_ids is not None:
            rows = rows[: len(rows) - int((sample_ids[rows] == 0).sum())]
    if method == "jocor":
        wide = [z.float() if z.dtype != F64 else z for z in (z1, z2)]
        log_p, log_q = (z.log_softmax(1) for z in wide)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        divergence = divergence + F.kl_div(log_p, log_q, reduction="none", log_target=True)
        losses = [(1 - co_lambda) * (losses[0] + losses[1]) + co_lambda * divergence.sum(1)] * 2
    k = int((1.0 - rate) * len(rows))
    if method == "decoupling":
        weights, divisor = torch.ones(n, dtype=F64), max(1, len(rows))
        if released:
            weights = n / (classes * torch.bincount(labels, minlength=classes)[labels].double())
            divisor = max(min_batch_fraction * n, len(rows))
        found = [(losses[j] * weights.to(losses[j].dtype))[rows].sum() / divisor for j in (0, 1)]
        chosen = [rows, rows]
    elif released and method == "co_teaching_plus" and len(rows) == 0:
        chosen = [everyone if step < 5000 else rows] * 2
        found = [losses[j][chosen[j]].sum() / n for j in (0, 1)]
    else:
        if released and method != "jocor":
            k = k or len(rows)
        elif not released and rate < 1:
            k = max(k, min(1, len(rows)))
        chosen = [smallest(losses[1 - j].detach(), k, rows) for j in (0, 1)]
        divisor = k * k if released and method != "jocor" else max(k, 0 if released else 1)
        found = [losses[j][chosen[j]].sum() / divisor for j in (0, 1)]
    kept = [torch.zeros(n, dtype=torch.bool).index_fill(0, c, True) for c in chosen]
    if method == "jocor":
        found, kept = [found[0]] * 2, [kept[0]] * 2
    return *found, *kept


def published(
    logits1,
    logits2,
    labels,
    forget_rate=0.0,
    *,
    method,
    co_lambda=0.0,
    min_batch_fraction=0.1,
    step=None,
    sample_ids=None,
    mode="paper",
):
    """Batch after batch, on the CPU: what users run."""
    device, leading = logits1.device, labels.shape[:-1]
    z1, z2 = (z.cpu().reshape(-1, *z.shape[-2:]) for z in (logits1, logits2))
    y = labels.cpu().reshape(-1, labels.shape[-1])
    ids = [None] * len(y) if sample_ids is None else sample_ids.cpu().reshape(y.shape)
    rates = torch.as_tensor(forget_rate, dtype=F64).cpu().expand(leading).reshape(-1).tolist()
    step = 0 if step is None else int(step)
    results = [
        one_batch(method, a, b, t, r, co_lambda, min_batch_fraction, step, i, mode == "reference")
        for a, b, t, r, i in zip(z1, z2, y, rates, ids, strict=True)
    ]
    loss1, loss2, kept1, kept2 = (torch.stack(x) for x in zip(*results, strict=True))
    losses = (x.reshape(leading).to(device) for x in (loss1, loss2))
    return *losses, *(x.reshape(labels.shape).to(device) for x in (kept1, kept2))


def tensors(device: str, *shape: int, dtype=F32, agree: float = 0.3) -> dict[str, Any]:
    """Logits of which the networks agree on a share of rows, and labels that are mostly what network 1 says."""
    logits1 = 2 * torch.randn(shape)
    logits2 = torch.where(torch.rand(shape[:-1])[..., None] < agree, logits1 + 0.1, 2 * torch.randn(shape))
    labels = torch.where(torch.rand(shape[:-1]) < 0.6, logits1.argmax(-1), torch.randint(shape[-1], shape[:-1]))
    return {
        "logits1": logits1.to(device, dtype).requires_grad_(),
        "logits2": logits2.to(device, dtype).requires_grad_(),
        "labels": labels.to(device),
    }


def samples(device: str, method: str, options: dict[str, Any]) -> list[Sample]:
    rival = functools.partial(published, method=method)
    found: list[Sample] = []
    ranks = method != "decoupling"

    def add(name: str, inputs: dict[str, Any], slack: float = 3e-6, **change: Any) -> None:
        found.append(Sample(name, {**inputs, **options, **change}, rival, slack))

    make = functools.partial(tensors, device)
    for shape in [(1, 1), (1, 7), (2, 2), (3, 10), (33, 3), (128, 10), (128, 100), (65, 1000), (2100, 5), (4, 16, 31)]:
        add(f"shape {shape}", make(*shape))
    add("mode reference", make(64, 10), mode="reference")
    add("mode reference, two classes", make(3, 40, 2), mode="reference")
    add("batches of batches", make(2, 3, 17, 12))
    for dtype in (BF16, F16):
        add(f"{dtype}", make(66, 33, dtype=dtype), slack=4e-3 if dtype == BF16 else 5e-4)
        add(f"{dtype}, reference", make(66, 33, dtype=dtype), slack=4e-3 if dtype == BF16 else 5e-4, mode="reference")
    add("nobody disagrees", make(3, 20, 6, agree=1.0))
    add("large logits", {k: v if k == "labels" else (50 * v.detach()).requires_grad_() for k, v in make(40, 8).items()})
    far = make(40, 8)
    add("far from zero", far | {k: (far[k].detach() + 3000).requires_grad_() for k in ("logits1", "logits2")}, 1e-3)
    if ranks:
        for rate in (0.0, 0.5, 0.8, 0.999):
            add(f"forget rate {rate}", make(2, 45, 9), forget_rate=rate)
        rates = torch.tensor([0.0, 0.3, 0.9], dtype=F64, device=device)
        add("a rate for each batch", make(3, 30, 9), forget_rate=rates)
        add("rate tensor", make(3, 30, 9), forget_rate=torch.tensor([0.25], device=device))
        add("forget rate 1", make(2, 9, 5), forget_rate=1)
    if method == "co_teaching_plus":
        nobody = make(2, 20, 6, agree=1.0)
        for step in (0, 4999, 5000):
            add(f"nobody disagrees at step {step}", nobody, mode="reference", step=step)
        add("step tensor", nobody, mode="reference", step=torch.tensor([5000], device=device))
        ids = torch.arange(60, device=device).view(2, 30) % 7
        add("sample ids", make(2, 30, 6), mode="reference", sample_ids=ids)
        add("step and ids, of which the paper knows nothing", make(2, 30, 6), sample_ids=ids, step=9999)

    # Layouts: transposed, sliced, expanded over batches, an odd offset.
    base = make(20, 12)
    z1, z2, y = (base[k].detach() for k in ("logits1", "logits2", "labels"))

    def layout(name: str, change: Any) -> None:
        add(name, {"logits1": change(z1).requires_grad_(), "logits2": change(z2).requires_grad_(), "labels": y})

    layout("transposed", lambda z: z.T.contiguous().T)
    layout("column slice", lambda z: torch.cat([z, z, z], 1)[:, 12:24])
    layout("every other column", lambda z: z.repeat_interleave(2, 1)[:, ::2])
    layout("every other row", lambda z: z.repeat_interleave(2, 0)[::2])
    layout("offset by one", lambda z: torch.cat([z.flatten(), z[0, :1]])[1:].view(20, 12))
    add("labels with a stride", base | {"labels": y.repeat_interleave(3)[::3]})
    wide = make(5, 20, 12)
    add("labels for all batches", wide | {"labels": y.expand(5, 20)})
    add("batches inside", {
        k: (v.detach().transpose(0, 1).contiguous().transpose(0, 1)).requires_grad_(v.requires_grad)
        for k, v in wide.items()
    })  # fmt: skip
    return found


def raw_samples(device: str, code: int) -> list[tuple]:
    found = []
    for shape, dtype in [((5, 3), F32), ((2, 7, 4), BF16), ((1, 2, 1), F16)]:
        t = [v.detach() for v in tensors(device, *shape, dtype=dtype).values()]
        rates = torch.tensor([0.5], device=device)
        for released in (False, True):
            found += [
                (*t, code, released, 0.1, 0.2, None, 0, None, None),
                (*t, code, released, 0.1, 0.0, rates, 0, torch.tensor(1, device=device), t[2] + 1),
            ]
    return found


def bad_inputs(function: str, method: str) -> list[BadInput]:
    base = tensors("cpu", 12, 5)
    labels = base["labels"]

    def bad(name: str, error: type[Exception], message: str, **change: Any) -> BadInput:
        return BadInput(name, base | change, error, f"^{function}: `{message}")

    V, T = ValueError, TypeError
    odd = torch.randn(12, 4)
    found = [
        bad("not a tensor", T, "logits1` got list, expected a torch.Tensor", logits1=[1.0]),
        bad("integer logits", T, "logits2` got torch.int64, expected a float", logits2=labels),
        bad("rank 1", V, r"logits1` got shape \(12,\), expected \[..., n, K\]", logits1=odd[:, 0]),
        bad("other shape", V, r"logits2` got shape \(12, 4\), expected that of logits1", logits2=odd),
        bad("other dtype", T, "logits2` got torch.float64, expected that of", logits2=base["logits2"].double()),
        bad("elsewhere", V, "logits2` got device meta, expected that of", logits2=base["logits2"].to("meta")),
        bad("labels elsewhere", V, "labels` got device meta, expected cpu", labels=labels.to("meta")),
        bad("fewer labels", V, r"labels` got shape \(11,\), expected \(12,\)", labels=labels[:11]),
        bad("int32 labels", T, "labels` got torch.int32, expected torch.int64", labels=labels.int()),
        bad("label beyond", V, r"labels` got 5, expected classes in \[0, 5\)", labels=labels.clamp_min(5)),
        bad("label below", V, "labels` got -100, expected classes", labels=labels.clamp_max(-100)),
        bad("unknown mode", V, "mode` got 'code', expected", mode="code"),
        bad("no classes", V, r"logits1` got shape \(12, 0\), expected", logits1=odd[:, :0], logits2=odd[:, :0]),
    ]
    if method in ("co_teaching", "jocor"):
        none = {"logits1": torch.randn(0, 5), "logits2": torch.randn(0, 5), "labels": labels[:0]}
        found.append(bad("no rows", V, r"logits1` got shape \(0, 5\), expected at least one row", **none))
    if method != "decoupling":
        found += [
            bad("rate above 1", V, r"forget_rate` got 1.1, expected a number in \[0, 1\]", forget_rate=1.1),
            bad("rate below 0", V, "forget_rate` got -0.1, expected", forget_rate=-0.1),
            bad("rate nan", V, "forget_rate` got nan, expected", forget_rate=float("nan")),
            bad("rate 2", V, "forget_rate` got 2, expected", forget_rate=2),
            bad("rate text", T, "forget_rate` got str, expected a float", forget_rate="0.2"),
            bad("half rate", T, "forget_rate` got torch.float16, expected a float", forget_rate=torch.ones(1).half()),
            bad("rates", V, r"forget_rate` got shape \(3,\), expected one element", forget_rate=torch.ones(3)),
            bad("rate elsewhere", V, "forget_rate` got device meta", forget_rate=torch.ones(1, device="meta")),
        ]
    if method == "decoupling":
        found.append(bad("fraction", V, "min_batch_fraction` got 2.0, expected", min_batch_fraction=2.0))
    if method == "jocor":
        found += [
            bad("lambda above 1", V, "co_lambda` got 1.5, expected", co_lambda=1.5),
            bad("lambda text", T, "co_lambda` got str, expected", co_lambda="1"),
        ]
    if method == "co_teaching_plus":
        found += [
            bad("float step", T, "step` got float, expected an int", step=1.0, mode="reference"),
            bad("steps", V, r"step` got shape \(2,\), expected", step=torch.tensor([1, 2]), mode="reference"),
            bad("float ids", T, "sample_ids` got torch.float32", sample_ids=labels.float(), mode="reference"),
        ]
    return found


def resized(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | tensors(inputs["labels"].device.type, 3, 17, 5)


def emptied(inputs: dict[str, Any]) -> dict[str, Any]:
    """No batches: what every method allows."""
    shapes = {"logits1": (0, 12, 5), "logits2": (0, 12, 5)}
    empty = {k: torch.zeros(s, device=inputs[k].device).requires_grad_() for k, s in shapes.items()}
    return inputs | empty | {"labels": inputs["labels"].new_zeros((0, 12))}


def contract(function: Any, method: str, code: int, options: dict[str, Any], modules: Any) -> OpContract:
    return OpContract(
        name=function.__name__,
        call=function,
        samples=functools.partial(samples, method=method, options=options),
        raw_op=torch.ops.perfvl.twin_loss.default,
        raw_samples=functools.partial(raw_samples, code=code),
        small=lambda device: tensors(device, 3, 12, 5) | options,
        double=lambda: tensors("cpu", 2, 6, 3, dtype=F64) | options,
        bad_inputs=bad_inputs(function.__name__, method),
        cuda="native",
        # the logits themselves, labels, coefficients, three numbers per row and network
        saved_bytes=lambda inputs: 8 * inputs["logits1"].numel() + inputs["labels"].numel() * (8 + 2 * 4 + 2 * 12),
        modules=modules,
        call_module=lambda module, inputs: torch.stack(
            module(inputs["logits1"], inputs["logits2"], inputs["labels"])[:2]
        ),
        resize=resized,
        empty=emptied,
    )


DECOUPLING = contract(
    pf.decoupling_loss, "decoupling", 0, {}, lambda: [DecouplingLoss(), DecouplingLoss(mode="reference")]
)
CO_TEACHING = contract(
    pf.co_teaching_loss,
    "co_teaching",
    1,
    {"forget_rate": 0.3},
    lambda: [CoTeachingLoss(0.2), CoTeachingLoss(torch.tensor(0.4)), CoTeachingLoss(0.2, mode="reference")],
)
CO_TEACHING_PLUS = contract(
    pf.co_teaching_plus_loss, "co_teaching_plus", 2, {"forget_rate": 0.3}, lambda: [CoTeachingPlusLoss(0.2)]
)
JOCOR = contract(pf.jocor_loss, "jocor", 3, {"forget_rate": 0.3, "co_lambda": 0.7}, lambda: [JoCoRLoss(0.9, 0.2)])


def sorted_mask(losses, keep_rate, candidates=None):
    """Row by row, by a stable sort."""
    flat = losses.cpu().reshape(-1, losses.shape[-1])
    counted = torch.ones_like(flat, dtype=torch.bool) if candidates is None else candidates.cpu().reshape(flat.shape)
    rates = torch.as_tensor(keep_rate, dtype=F64).cpu().expand(losses.shape[:-1]).reshape(-1).tolist()
    mask = torch.zeros_like(counted)
    for row, rate in enumerate(rates):
        rows = counted[row].nonzero()[:, 0]
        mask[row, smallest(flat[row].double(), int(rate * len(rows)), rows)] = True
    return mask.reshape(losses.shape).to(losses.device)


def mask_samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, losses: Tensor, rate: Any = 0.5, **options: Any) -> None:
        found.append(Sample(name, {"losses": losses.to(device), "keep_rate": rate, **options}, sorted_mask))

    for shape in [(1,), (2,), (127,), (128,), (3, 1000), (2, 3, 17), (5000,), (2, 20_000)]:
        add(f"shape {shape}", torch.rand(shape))
    for rate in (0.0, 0.1, 1 - 0.8, 0.7, 0.999, 1.0, 1):
        add(f"keep {rate}", torch.randn(4, 90), rate)
    add("rates", torch.rand(3, 50), torch.tensor([0.1, 0.5, 1.0], device=device))
    add("ties", torch.randint(3, (4, 300)).float(), 0.4)
    add("many ties", torch.randint(3, (9000,)).float(), 0.4)
    special = torch.tensor([torch.nan, -0.0, 0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 1e-40, -1e-40])
    for rate in (0.1, 0.3, 0.4, 0.5, 0.8, 0.9, 1.0):
        add(f"special numbers, keep {rate}", special, rate)
    add("negative nan", torch.tensor([-torch.nan, 1.0, torch.inf]), 0.67)
    for dtype in (BF16, F16):
        add(f"{dtype}", torch.rand(3, 400).to(dtype))
    add("candidates", torch.rand(3, 70), candidates=torch.rand(3, 70).to(device) < 0.5)
    add("no candidates", torch.rand(70), candidates=torch.zeros(70, dtype=torch.bool, device=device))
    add("nan among candidates", torch.full((6,), torch.nan), candidates=torch.arange(6, device=device) % 2 == 0)
    add("strided", torch.rand(60, 4).T)
    add("expanded", torch.rand(1, 30).expand(4, 30))
    return found


SMALL_LOSS_MASK = OpContract(
    name="small_loss_mask",
    call=pf.small_loss_mask,
    samples=mask_samples,
    raw_op=torch.ops.perfvl.small_loss_mask.default,
    raw_samples=lambda device: [
        (torch.rand(3, 20, device=device), 0.4, None, None),
        (torch.rand(3, 20, device=device).bfloat16(), 0.0, torch.rand(3, device=device), None),
        (torch.rand(20, 3, device=device).T, 0.4, None, torch.rand(3, 20, device=device) < 0.5),
    ],
    small=lambda device: {"losses": torch.rand(4, 30, device=device), "keep_rate": 0.4},
    bad_inputs=[
        BadInput("not a tensor", {"losses": [1.0]}, TypeError, "^small_loss_mask: `losses` got list, expected"),
        BadInput("integers", {"losses": torch.ones(3, dtype=torch.int64)}, TypeError, "`losses` got torch.int64"),
        BadInput("0-d", {"losses": torch.tensor(1.0)}, ValueError, r"`losses` got 0 dimensions, expected \[..., n\]"),
        BadInput("rate", {"keep_rate": 1.5}, ValueError, r"`keep_rate` got 1.5, expected a number in \[0, 1\]"),
        BadInput("text", {"keep_rate": "all"}, TypeError, "`keep_rate` got str, expected a float"),
        BadInput("rates", {"keep_rate": torch.rand(3)}, ValueError, r"`keep_rate` got shape \(3,\), expected one"),
        BadInput("float candidates", {"candidates": torch.rand(4, 30)}, TypeError, "`candidates` got torch.float32"),
        BadInput(
            "fewer candidates",
            {"candidates": torch.ones(30, dtype=torch.bool)},
            ValueError,
            r"`candidates` got shape \(30,\), expected \(4, 30\)",
        ),
    ],
    cuda="native",
    resize=lambda inputs: inputs | {"losses": torch.rand(4, 41, device=inputs["losses"].device)},
    empty=lambda inputs: inputs | {"losses": inputs["losses"][:, :0]},
)
