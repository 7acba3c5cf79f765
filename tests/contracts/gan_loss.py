"""gan_loss under the contract: dtypes, layouts, heads of different sizes, soft targets, both modes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample
from torch import Tensor

from perfvl.ops.gan_loss import GANLoss, gan_loss

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HEADS = ("real", "wrong", "fake")
STEP: dict[str, Any] = {"targets": [1.0, 0.0, 0.0], "weights": [1.0, 0.5, 0.5]}


def of_heads(real: Any, wrong: Any, fake: Any, targets: Any, weights: Any, **options: Any) -> GANLoss:
    """The op with a name for each of its heads."""
    return gan_loss([real, wrong, fake], targets, weights, **options)


def published(
    real: Tensor, wrong: Tensor, fake: Tensor, targets: list[float], weights: list[float], mode: str = "stable"
) -> tuple[Tensor, Tensor]:
    """A criterion for each head, and additions."""
    losses = []
    for logits, y in zip((real, wrong, fake), targets, strict=True):
        x = logits if logits.dtype == F64 else logits.float()
        labels = torch.full_like(x, y)
        losses.append(
            F.binary_cross_entropy(x.sigmoid(), labels)
            if mode == "exact"
            else F.binary_cross_entropy_with_logits(x, labels)
        )
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)), torch.stack(losses).detach()


def logits(device: str, *rows: int, dtype: torch.dtype = F32, size: float = 2.0) -> dict[str, Any]:
    made = (size * torch.randn(n) for n in rows)
    return {name: x.to(device, dtype).requires_grad_() for name, x in zip(HEADS, made, strict=True)}


def samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any], slack: float = 4e-6, **change: Any) -> None:
        found.append(Sample(name, {**inputs, **STEP, **change}, published, slack))

    make = functools.partial(logits, device)
    for mode in ("stable", "exact"):
        for rows in [(1, 1, 1), (64, 63, 64), (2, 33, 17), (40, 40, 40), (128, 127, 300), (5000, 3, 1)]:
            add(f"{rows} rows, {mode}", make(*rows), mode=mode)
        add(f"smoothed, {mode}", make(64, 64, 64), targets=[0.9, 0.1, 0.3], mode=mode)
        add(f"integers, {mode}", make(64, 64, 64), targets=[1, 0, 0], weights=[1, 2, -3], mode=mode)
        for dtype in (BF16, F16):
            slack = 4e-3 if dtype == BF16 else 5e-4  # gradients are rounded once
            add(f"{dtype}, {mode}", make(64, 63, 64, dtype=dtype), slack, mode=mode)
        table = torch.randn(64, 3, device=device)
        columns = {name: table[:, i].detach().requires_grad_() for i, name in enumerate(HEADS)}
        add(f"strided, {mode}", columns, mode=mode)
        expanded = {name: torch.randn(1, device=device).expand(64).requires_grad_() for name in HEADS}
        add(f"expanded, {mode}", expanded, mode=mode)
    add("large logits", make(64, 63, 64, size=30.0))
    return found


def bad(name: str, error: type[Exception], message: str, **change: Any) -> BadInput:
    return BadInput(name, change, error, message)


T, V = TypeError, ValueError
GAN_LOSS = OpContract(
    name="gan_loss",
    call=of_heads,
    samples=samples,
    raw_op=torch.ops.perfvl.gan_loss.default,
    raw_samples=lambda device: [
        ([torch.randn(64, device=device)] * 2, [1.0, 0.0], [0.5, 0.5], False, True),
        ([torch.randn(7, device=device).bfloat16()], [0.9], [2.0], True, False),
        ([torch.randn(7, 3, device=device)[:, 1], torch.randn(1, device=device)], [1.0, 0.0], [1.0, 1.0], True, True),
    ],
    small=lambda device: logits(device, 12, 11, 12) | STEP,
    double=lambda: logits("cpu", 4, 3, 5, dtype=F64) | STEP | {"targets": [0.9, 0.0, 1.0]},
    bad_inputs=[
        bad("a number", T, r"^gan_loss: `logits\[0\]` got float, expected a torch.Tensor", real=1.0),
        bad("integers", T, r"logits\[1\]` got torch.int64, expected a float32", wrong=torch.ones(3, dtype=torch.int64)),
        bad(
            "two dtypes",
            T,
            r"logits\[2\]` got torch.bfloat16, expected the dtype of logits\[0\]",
            fake=torch.ones(3).bfloat16(),
        ),
        bad("a matrix", V, r"logits\[0\]` got shape \(3, 1\), expected 1 dimension", real=torch.ones(3, 1)),
        bad("a scalar", V, r"logits\[0\]` got shape \(\), expected 1 dimension", real=torch.ones(())),
        bad("another device", V, r"logits\[2\]` got device meta, expected", fake=torch.ones(3, device="meta")),
        bad("few targets", V, "targets` got 2 of them, expected one for each of the 3 heads", targets=[1.0, 0.0]),
        bad("many weights", V, "weights` got 4 of them, expected one for each of the 3 heads", weights=[1.0] * 4),
        bad("targets in a tensor", T, "targets` got Tensor, expected a list", targets=torch.ones(3)),
        bad("text", T, r"targets\[1\]` got str, expected a float", targets=[1.0, "fake", 0.0]),
        bad("bool", T, r"weights\[2\]` got bool, expected a float", weights=[1.0, 0.5, True]),
        bad("no probability", V, r"targets\[0\]` got 1.1, expected a number in \[0, 1\]", targets=[1.1, 0.0, 0.0]),
        bad("nan", V, r"targets\[0\]` got nan, expected a number in \[0, 1\]", targets=[float("nan"), 0.0, 0.0]),
        bad("infinite", V, r"weights\[1\]` got inf, expected a finite number", weights=[1.0, float("inf"), 0.5]),
        bad("mode", V, 'mode` got \'paper\', expected "stable" or "exact"', mode="paper"),
    ],
    cuda="native",
    saved_bytes=lambda inputs: sum(8 * len(inputs[name]) for name in HEADS),  # the logits themselves, and a gradient
    grow=lambda inputs: inputs | logits(inputs["real"].device.type, 1200, 1100, 1200),
    resize=lambda inputs: inputs | logits(inputs["real"].device.type, 17, 16, 17),
    empty=lambda inputs: inputs | {"weights": [0.0, 0.0, 0.0]},
)
