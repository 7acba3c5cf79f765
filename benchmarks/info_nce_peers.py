"""The ways to compute InfoNCE over a queue that perfvl is compared with, each written as well as PyTorch allows.

Every builder takes the queue [K, d] and the temperature, prepares what a training run prepares once, and returns
``loss(query, positive) -> scalar``. All give the mean loss and the gradient of the query; keys and queue are constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .workload import Unavailable

Loss = Callable[[Tensor, Tensor], Tensor]
Compute = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""Loss and, where the flag asks for it, the gradient of the query."""

CHUNK = 2048
"""Keys per step of the chunked loops. 512 to 4,096 differ by 3 % on the machines tried."""


def moco_loss(query: Tensor, positive: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """MoCo's loss with (d, K) keys: logits concatenated, divided in place, and given to cross_entropy with label 0."""
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ keys], dim=1)
    logits /= temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def eager(queue: Tensor, temperature: float, *, clone: bool = True, dtype: torch.dtype = torch.float32) -> Loss:
    """MoCo's way: a (d, K) queue, cloned at every step against the enqueue that follows."""
    queue = queue.to(dtype).t().contiguous()

    def loss(query: Tensor, positive: Tensor) -> Tensor:
        return moco_loss(query.to(dtype), positive.to(dtype), queue.clone() if clone else queue, temperature)

    return loss


def under_autocast(loss: Loss) -> Loss:
    """Any of these losses under bfloat16 autocast."""

    def autocast_loss(query: Tensor, positive: Tensor) -> Tensor:
        with torch.autocast(query.device.type, dtype=torch.bfloat16):
            return loss(query, positive)

    return autocast_loss


def compiled(queue: Tensor, temperature: float) -> Loss:
    """``torch.compile`` of MoCo's eager code."""
    return torch.compile(eager(queue, temperature), fullgraph=True, dynamic=False)


class _OnePass(torch.autograd.Function):
    """Loss whose query gradient is computed in forward, for the loops that know it by then."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, positive: Tensor, compute: Compute) -> Tensor:
        value, gradient = compute(query, positive, True)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def _one_pass(compute: Compute) -> Loss:
    """The loss of a sweep that leaves out the gradient where nobody asked for one."""

    def loss(query: Tensor, positive: Tensor) -> Tensor:
        if query.requires_grad and torch.is_grad_enabled():
            return _OnePass.apply(query, positive, compute)
        return compute(query, positive, False)[0]

    return loss


def chunked_loop(queue: Tensor, temperature: float, *, dtype: torch.dtype = torch.float32) -> Loss:
    """torch.mm, exp and torch.mm over chunks of keys with reused buffers; loss and gradient leave the same sweep.

    The strong baseline: no custom kernel, nothing of size B x K. With unit vectors no logit exceeds 1/temperature, so
    where (1 + K) exp(1/temperature) fits float32 no maximum is subtracted at all, which a general loss may not do.
    """
    scale = 1.0 / temperature
    if abs(scale) + math.log1p(len(queue)) > 80.0:
        raise Unavailable(f"temperature {temperature} would overflow without a running maximum")
    queue = queue.to(dtype)
    buffers: dict[str, Tensor] = {}

    def compute(query: Tensor, positive: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        batch, width = query.shape
        if not buffers:
            buffers["logits"] = query.new_empty(batch, CHUNK)
            if dtype != torch.float32:
                buffers["rounded"] = query.new_empty(batch, CHUNK, dtype=dtype)
                buffers["product"] = query.new_empty(batch, width, dtype=dtype)
        scaled = query * scale
        operand = scaled.to(dtype)
        positive_weight = (scaled * positive).sum(1).exp_()
        total = positive_weight.clone()
        weighted_keys = torch.zeros_like(query)
        for keys in queue.split(CHUNK):
            logits = buffers["logits"][:, : len(keys)]
            if dtype == torch.float32:
                torch.mm(operand, keys.t(), out=logits).exp_()
                if with_gradient:
                    weighted_keys.addmm_(logits, keys)
            else:
                rounded = buffers["rounded"][:, : len(keys)]
                logits.copy_(torch.mm(operand, keys.t(), out=rounded)).exp_()
                if with_gradient:
                    weighted_keys += torch.mm(rounded.copy_(logits), keys, out=buffers["product"])
            total += logits.sum(1)
        loss = (total.log() - positive_weight.log()).mean()
        if not with_gradient:
            return loss, None
        negative_mass = (total - positive_weight).unsqueeze(1)
        gradient = (weighted_keys - negative_mass * positive) / total.unsqueeze(1) * (scale / batch)
        return loss, gradient

    return _one_pass(compute)


def products_alone(queue: Tensor, temperature: float, *, dtype: torch.dtype = torch.float32) -> Loss:
    """The two matrix products of the chunked loop. Not an answer, but a time no loop over these products can beat."""
    queue = queue.to(dtype)
    buffers: dict[str, Tensor] = {}

    def compute(query: Tensor, positive: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        operand = query.to(dtype)
        if not buffers:
            buffers["logits"] = operand.new_empty(len(query), CHUNK)
        accumulator = torch.zeros_like(operand)
        for keys in queue.split(CHUNK):
            logits = torch.mm(operand, keys.t(), out=buffers["logits"][:, : len(keys)])
            if with_gradient:
                accumulator.addmm_(logits, keys)
        return accumulator.new_zeros((), dtype=torch.float32), accumulator.to(query.dtype)

    return _one_pass(compute)


def _over_the_queue(against_first: Callable[[Tensor, Tensor], Tensor], queue: Tensor, temperature: float) -> Loss:
    """InfoNCE from a fused linear cross-entropy over the queue.

    Such an op wants the target among its weights; the positive is not. So it is asked for -log softmax of queue row 0
    per query, from which the log-sum-exp over the queue follows: loss_i = softplus(lse_i - positive logit_i).
    """
    first = queue[0]

    def loss(query: Tensor, positive: Tensor) -> Tensor:
        scaled = query / temperature
        target = torch.zeros(len(query), dtype=torch.long, device=query.device)
        negative_lse = against_first(scaled, target) + scaled @ first
        return F.softplus(negative_lse - (scaled * positive).sum(1)).mean()

    return loss


def linear_cross_entropy(queue: Tensor, temperature: float) -> Loss:
    """``F.linear_cross_entropy``. Its default chunking was 6 times slower than chunks of 64 rows at B = 256,
    K = 65,536, d = 128 on the CPU; the faster setting is used.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64)
    return _over_the_queue(
        lambda scaled, target: F.linear_cross_entropy(scaled, queue, target, reduction="none", options=options),
        queue,
        temperature,
    )


def cut_cross_entropy(queue: Tensor, temperature: float) -> Loss:
    """Apple's cut cross-entropy (CCE), with its approximate gradient filter off; on the CPU its portable version."""
    try:
        from cut_cross_entropy import linear_cross_entropy as cce
    except ImportError:
        raise Unavailable("needs cut-cross-entropy: pip install 'perfvl[peers]'") from None
    exact = {"reduction": "none", "filter_eps": None, "impl": "cce" if queue.is_cuda else "torch_compile"}
    return _over_the_queue(lambda scaled, target: cce(scaled, queue, target, **exact), queue, temperature)


def attention(queue: Tensor, temperature: float) -> Loss:
    """PyTorch's fused attention with key = value = queue: its output is the mean key, its log-sum-exp gives the loss.

    With P the probability mass of the negatives, dloss/dquery = (P / temperature) (output - positive): no backward
    kernel needed.
    """
    keys = queue[None, None]
    scale = 1.0 / temperature
    aten = torch.ops.aten
    if queue.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
    elif queue.dtype == torch.float32:
        flash = aten._scaled_dot_product_efficient_attention
    elif queue.shape[1] <= 256:
        flash = aten._scaled_dot_product_flash_attention
    else:
        raise Unavailable("flash attention on CUDA is limited to d <= 256")

    def compute(query: Tensor, positive: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        rows = query.to(queue.dtype)[None, None]
        if flash is aten._scaled_dot_product_efficient_attention:
            output, lse = flash(rows, keys, keys, None, True, scale=scale)[:2]
        else:
            output, lse = flash(rows, keys, keys, scale=scale)[:2]
        output, lse = output.reshape(query.shape), lse.flatten()[: len(query)].float()
        margin = lse - (query * positive).sum(1) * scale
        if not with_gradient:
            return F.softplus(margin).mean(), None
        gradient = (scale / len(query)) * margin.sigmoid().unsqueeze(1) * (output - positive)
        return F.softplus(margin).mean(), gradient

    return _one_pass(compute)
