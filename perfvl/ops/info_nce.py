"""InfoNCE of queries against one positive key each and a queue of negative keys, without the B x K logits.

Top to bottom: the public functions, their checks, autograd, the torch op with its fake, the CUDA implementation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import (
    LIBRARY,
    REDUCTIONS,
    bad_type,
    bad_value,
    check_bool,
    check_float,
    check_matrix,
    check_name,
    check_temperature,
    refuse_second_derivative,
)
from perfvl.ops.scale_rows import scale_rows
from perfvl.reference import info_nce as reference

Temperature = float | Tensor


class InfoNCEOutput(NamedTuple):
    """What :func:`info_nce_stats` returns."""

    loss: Tensor
    """The loss, as :func:`info_nce` returns it."""
    lse: Tensor
    """[B] float32: log of the sum of exp over positive and negatives. Differentiable."""
    positive_logit: Tensor
    """[B] float32: query . positive / temperature. Differentiable."""
    rank: Tensor
    """[B] int32: how many negatives score at least as high as the positive; top-k accuracy is ``(rank < k).mean()``."""


def info_nce(
    query: Tensor,
    positive: Tensor,
    queue: Tensor,
    *,
    temperature: Temperature = 0.07,
    normalize: bool = False,
    valid: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""InfoNCE: :math:`\text{loss}_i = \log \sum_{j=0}^{K} e^{l_{ij}} - l_{i0}`, with
    :math:`l_{i0} = q_i \cdot k_i / \tau` and :math:`l_{ij} = q_i \cdot N_j / \tau`.

    The same number as ``F.cross_entropy(torch.cat([l0, l], 1), zeros)`` (MoCo, He et al. 2020, arXiv:1911.05722, eq. 1;
    one direction of BriVL, arXiv:2103.06561, eq. 3), without storing the logits: one pass over the queue gives the loss
    and the gradient.

    Args:
        query: [B, d], usually L2-normalised. Receives a gradient.
        positive: [B, d], the key of each query. Receives a gradient if it requires one.
        queue: [K, d] negatives, the same for every query; never receives a gradient. Any strides: a (d, K) buffer goes
            in as ``buffer.T``.
        temperature: float, or a one-element tensor on the same device (read there, no host sync), which receives a
            gradient if it requires one; for a log-scale parameter ``t`` pass ``torch.exp(-t)``. May be negative.
        normalize: L2-normalise `query` and `positive` first (eps 1e-12), with gradient. The queue is taken as it is:
            normalise keys when they are enqueued.
        valid: only the first ``valid`` rows of the queue count: an int in [0, K], or a one-element int64 tensor on the
            same device (clamped to [0, K] there, no host sync).
        label_smoothing: epsilon in [0, 1], spread over all 1 + K columns as in ``F.cross_entropy``.
        reduction: "mean" (over B), "sum" or "none".

    Returns:
        float32 loss (float64 for float64 inputs): 0-d, or [B] with ``reduction="none"``. 0 where K = 0.

    dtypes may be mixed (float32, bfloat16, float16). Under autocast the products with the queue run in the autocast
    dtype; else in the queue's dtype if that is bfloat16 or float16 (the query is then rounded to it), else in float32.
    Sums, logits, exp and the saved gradient are float32; the positive's product uses its operands unrounded. On CUDA
    float32 products follow torch's TF32 setting. float64 inputs run the plain PyTorch reference.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong rank, sizes or devices; a queue that requires grad; a temperature of 0 or not finite;
            ``valid`` outside [0, K]; unknown reduction; label_smoothing outside [0, 1].
        RuntimeError: on backward through the gradient (second order).

    Cost: 4 B K d FLOP with gradient, 2 B K d without; reads the queue once; saves (B, d + 1) float32 for backward,
    whatever K is.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> query = F.normalize(torch.randn(8, 128), dim=1).requires_grad_()
        >>> key, queue = F.normalize(torch.randn(8, 128), dim=1), F.normalize(torch.randn(4096, 128), dim=1)
        >>> info_nce(query, key, queue, temperature=0.2).backward()
    """
    return _evaluate(
        "info_nce", query, positive, queue, temperature, normalize, valid, label_smoothing, reduction, False
    )[0]


def info_nce_stats(
    query: Tensor,
    positive: Tensor,
    queue: Tensor,
    *,
    temperature: Temperature = 0.07,
    normalize: bool = False,
    valid: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> InfoNCEOutput:
    """:func:`info_nce` with what trainers log: lse, positive logit and rank, from the same pass over the queue.

    Arguments, dtypes and errors are those of :func:`info_nce`. ``rank`` counts ties against the positive. A negative
    that repeats the positive ties exactly only where both dot products round alike.

    Example:
        >>> import torch
        >>> out = info_nce_stats(torch.randn(8, 16), torch.randn(8, 16), torch.randn(64, 16))
        >>> accuracy_at_1 = (out.rank == 0).float().mean()
    """
    return InfoNCEOutput(
        *_evaluate(
            "info_nce_stats", query, positive, queue, temperature, normalize, valid, label_smoothing, reduction, True
        )
    )


def _evaluate(
    op: str,
    query: Tensor,
    positive: Tensor,
    queue: Tensor,
    temperature: Temperature,
    normalize: bool,
    valid: int | Tensor | None,
    label_smoothing: float,
    reduction: str,
    with_rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(op, query, positive, queue, temperature, normalize, valid, label_smoothing, reduction)
    if normalize:
        query, positive = _normalized(query), _normalized(positive)
    if isinstance(valid, int):
        queue, valid = queue[:valid], None
    compute_dtype = _compute_dtype(query, positive, queue)
    if compute_dtype == torch.float64 or query.numel() == 0 or backends.choose(query, cuda="triton") == "reference":
        return reference.info_nce(
            query,
            positive,
            queue,
            temperature=temperature,
            valid=valid,
            label_smoothing=label_smoothing,
            reduction=reduction,
            compute_dtype=compute_dtype,
        )
    fixed, learned = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
    code = 0 if label_smoothing else REDUCTIONS[reduction]
    arguments = (query, positive, queue, float(fixed), learned, valid, compute_dtype, code, with_rank)
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad or positive.requires_grad or (learned is not None and learned.requires_grad)
    )
    if needs_grad:
        loss, lse, positive_logit, rank = _InfoNCE.apply(*arguments)
    else:
        loss, lse, positive_logit, rank, _, _ = _OP(*arguments, False)
    if label_smoothing:
        # loss_smooth = loss + eps (l_0 - mean of all logits); the mean needs only the sum of the keys.
        total, count = _sum_of_keys(queue, valid)
        mean_logit = (query.float() * (positive.float() + total)).sum(1) / (1 + count) / temperature
        loss = loss + label_smoothing * (positive_logit - mean_logit)
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss, lse, positive_logit, rank


def _check(
    op: str,
    query: Tensor,
    positive: Tensor,
    queue: Tensor,
    temperature: Temperature,
    normalize: bool,
    valid: int | Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    check_matrix(op, "query", query)
    check_matrix(op, "positive", positive, query)
    check_matrix(op, "queue", queue, query)
    shape, queue_shape = query.shape, queue.shape
    if positive.shape != shape:
        bad_value(op, "positive", f"shape {tuple(positive.shape)}", f"the query's shape {tuple(shape)}")
    if queue_shape[1] != shape[1]:
        bad_value(op, "queue", f"shape {tuple(queue_shape)}", f"(K, {shape[1]}): keys as wide as the queries")
    if queue.requires_grad:
        bad_value(op, "queue", "a tensor that requires grad", "constant keys: pass queue.detach()")
    check_temperature(op, temperature, query)
    if valid is not None:
        _check_valid(op, valid, queue)
    check_float(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        bad_value(op, "label_smoothing", label_smoothing, "a number in [0, 1]")
    check_name(op, "reduction", reduction, REDUCTIONS)
    check_bool(op, "normalize", normalize)


def _check_valid(op: str, valid: int | Tensor, queue: Tensor) -> None:
    if isinstance(valid, Tensor):
        if valid.dtype != torch.int64:
            bad_type(op, "valid", valid.dtype, "an int or an int64 tensor with one element")
        if valid.numel() != 1:
            bad_value(op, "valid", f"shape {tuple(valid.shape)}", "an int or an int64 tensor with one element")
        if valid.device != queue.device:
            bad_value(op, "valid", f"device {valid.device}", f"the queue's device {queue.device}")
    elif isinstance(valid, bool) or not isinstance(valid, int):
        bad_type(op, "valid", type(valid).__name__, "an int or an int64 tensor with one element")
    elif not 0 <= valid <= queue.shape[0]:
        bad_value(op, "valid", valid, f"0 <= valid <= K = {queue.shape[0]}")


def _normalized(x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=1, eps=1e-12)


def _compute_dtype(query: Tensor, positive: Tensor, queue: Tensor) -> torch.dtype:
    query_dtype, queue_dtype = query.dtype, queue.dtype
    if torch.float64 in (query_dtype, positive.dtype, queue_dtype):
        return torch.float64
    device = "cpu" if query.is_cpu else query.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    # Two different half dtypes have no common one but float32.
    return queue_dtype if query_dtype in (queue_dtype, torch.float32) else torch.float32


def _sum_of_keys(queue: Tensor, valid: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """Float32 sum of the rows that count [d], and how many those are."""
    if valid is None:
        return queue.sum(0, dtype=torch.float32), queue.shape[0]
    count = valid.reshape(()).clamp(0, queue.shape[0])
    counted = torch.arange(queue.shape[0], device=queue.device) < count
    return torch.where(counted[:, None], queue, 0).sum(0, dtype=torch.float32), count


class _InfoNCE(torch.autograd.Function):
    """Backward is a product with the gradient that forward left: the queue is not saved and may be overwritten."""

    @staticmethod
    def forward(ctx, query, positive, queue, temperature, learned, valid, compute_dtype, reduction, with_rank):
        loss, lse, positive_logit, rank, grad_query, positive_weight = _OP(
            query, positive, queue, temperature, learned, valid, compute_dtype, reduction, with_rank, True
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rank)
        ctx.save_for_backward(query, positive, learned, positive_logit, grad_query, positive_weight)
        ctx.temperature = temperature
        ctx.per_row = query.shape[0] if reduction == REDUCTIONS["mean"] else 1  # forward divided by this
        return loss, lse, positive_logit, rank

    @staticmethod
    def backward(ctx, g_loss, g_lse, g_positive, _):
        query, positive, learned, positive_logit, grad_query, positive_weight = ctx.saved_tensors
        rows, inverse = query.shape[0], 1 / (ctx.temperature if learned is None else learned.reshape(()).float())
        # lse_i = loss_i + l_i0 and l_i0 = query_i . positive_i / tau: every gradient is a part along the loss's own,
        # which forward left, and a part along the positive logit's.
        along_loss = None if g_loss is None else g_loss.expand(rows)
        along_positive = None
        if g_lse is not None:
            along_loss = g_lse * ctx.per_row if along_loss is None else along_loss + g_lse * ctx.per_row
            along_positive = g_lse
        if g_positive is not None:
            along_positive = g_positive if along_positive is None else along_positive + g_positive
        grads: list[Tensor | None] = [None, None, None]
        one_factor = along_positive is None and g_loss is not None and g_loss.dim() == 0
        if ctx.needs_input_grad[0] and one_factor and query.dtype == torch.float32:
            grads[0] = grad_query * g_loss  # the common case, in half the host time of scale_rows
        elif ctx.needs_input_grad[0]:
            grads[0] = _plus(along_loss, grad_query, along_positive, positive, inverse, query.dtype)
        if ctx.needs_input_grad[1]:
            pull = None if along_loss is None else along_loss * positive_weight * -inverse
            push = None if along_positive is None else along_positive * inverse
            total = push if pull is None else pull if push is None else pull + push
            grads[1] = None if total is None else scale_rows(query, total, positive.dtype)
        if learned is not None and ctx.needs_input_grad[4]:
            per_row = torch.zeros_like(positive_logit)
            if along_loss is not None:
                per_row = along_loss * (query.float() * grad_query).sum(1)
            if along_positive is not None:
                per_row = per_row + along_positive * positive_logit
            grads[2] = (-inverse * per_row.sum()).to(learned.dtype).reshape(learned.shape)
        grads = refuse_second_derivative(
            "info_nce", grads, [query, positive, *([learned] if learned is not None else [])]
        )
        return grads[0], grads[1], None, None, grads[2], None, None, None, None


def _plus(along_loss, grad_query, along_positive, positive, inverse, dtype):
    """along_loss_i G_i + along_positive_i positive_i / tau, either of which may be absent."""
    if along_positive is None:
        return None if along_loss is None else scale_rows(grad_query, along_loss, dtype)
    push = scale_rows(positive, along_positive * inverse, torch.float32)
    return (push if along_loss is None else push + scale_rows(grad_query, along_loss, torch.float32)).to(dtype)


LIBRARY.define(
    "info_nce(Tensor query, Tensor positive, Tensor queue, float temperature, Tensor? temperature_tensor, "
    "Tensor? valid, ScalarType compute_dtype, int reduction, bool with_rank, bool with_grad) "
    "-> (Tensor loss, Tensor lse, Tensor positive_logit, Tensor rank, Tensor grad_query, Tensor positive_weight)"
)
_OP = torch.ops.perfvl.info_nce.default


@torch.library.register_fake("perfvl::info_nce", lib=LIBRARY)
def _fake(
    query, positive, queue, temperature, temperature_tensor, valid, compute_dtype, reduction, with_rank, with_grad
):
    rows, dim = query.shape
    graded = rows if with_grad else 0

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    return (
        empty(rows) if reduction == REDUCTIONS["none"] else empty(),
        empty(rows),
        empty(rows),
        empty(rows if with_rank else 0, dtype=torch.int32),
        empty(graded, dim),
        empty(graded),
    )


def _cuda(
    query, positive, queue, temperature, temperature_tensor, valid, compute_dtype, reduction, with_rank, with_grad
):
    from perfvl.kernels import info_nce as kernels

    # The one question that torch answers after its old and its new setters alike.
    tf32 = compute_dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return kernels.info_nce(
        query,
        positive,
        queue,
        temperature,
        temperature_tensor,
        valid,
        compute_dtype,
        reduction,
        with_rank,
        with_grad,
        input_precision="tf32" if tf32 else "ieee",
    )


LIBRARY.impl("info_nce", _cuda, "CUDA")
