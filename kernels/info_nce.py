"""InfoNCE over a key queue on the GPU: loss, log-sum-exp, rank and the query's gradient from one sweep over the queue.

No B x K matrix is stored. Eager PyTorch moves 50 to 70 bytes per logit; the least there is to do is 4BKd FLOP and one
read of the queue: for B = 256, K = 65536, d = 128 in bf16, 8.6 GFLOP (11 us of an H200's tensor cores) and 16.8 MB (4
us of its memory).

Three routes leave (max, sum, rank, gradient) per row and split of the keys, and `_merge_kernel` joins them in a fixed
order, adds the positive and reduces the loss. The choice depends on shape, dtype and layout alone:

* d <= 256, half precision or TF32: `_info_nce_narrow`, one kernel, logits never leave the chip.
* d > 256, half precision, B <= 64, rows contiguous: `_info_nce_wide`, two kernels that stream the queue.
* everything else: `_info_nce_wide`, library GEMMs over chunks of keys around one fused row kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._info_nce_narrow import COMPUTE, WIDEST, Partials, partials_by_streaming
from ._info_nce_wide import partials_by_library, partials_for_few_rows, suits_few_rows
from ._launch import launch
from ._tiles import ceil_div, load_scale, log1p, power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_NONE, _MEAN = tl.constexpr(0), tl.constexpr(1)


@triton.jit(do_not_specialize=("B", "splits", "rows"))
def _merge_kernel(
    query, positive, temperature_tensor, workspace,
    loss, lse, positive_logit, rank, grad_query, positive_weight,
    temperature, B, splits, rows,
    d, width, stride_qb, stride_qd, stride_pb, stride_pd,
    REDUCTION: tl.constexpr, WITH_RANK: tl.constexpr, WITH_GRAD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one row in fixed order, adds the positive; the last row to finish reduces the loss."""
    row = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_D
    split = tl.arange(0, BLOCK_S)
    entries = splits.to(tl.int64) * rows
    statistics = workspace
    if WITH_GRAD:
        statistics = workspace + entries * width
    scale = load_scale(temperature, temperature_tensor)

    # 1. The positive logit: an fp32 dot of the vectors as given.
    dot = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, d, BLOCK):
        column = begin + tl.arange(0, BLOCK).to(tl.int64)
        q = tl.load(query + row * stride_qb + column * stride_qd, mask=column < d, other=0.0).to(tl.float32)
        k = tl.load(positive + row * stride_pb + column * stride_pd, mask=column < d, other=0.0).to(tl.float32)
        dot += q * k
    logit = tl.sum(dot, 0) * scale
    logit2 = logit * LOG2E

    # 2. Sum of the negatives relative to the largest logit of the row, positive included.
    top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for begin in range(0, splits, BLOCK_S):
        entry = (begin + split).to(tl.int64) * rows + row
        top = tl.maximum(top, tl.load(statistics + entry, mask=begin + split < splits, other=float("-inf")))
    reference = tl.maximum(tl.max(top, 0), logit2)
    sums = tl.zeros([BLOCK_S], tl.float32)
    ranks = tl.zeros([BLOCK_S], tl.int32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    column = first_column + tl.arange(0, BLOCK_D).to(tl.int64)
    for begin in range(0, splits, BLOCK_S):
        inside = begin + split < splits
        entry = (begin + split).to(tl.int64) * rows + row
        shrink = tl.exp2(tl.load(statistics + entry, mask=inside, other=float("-inf")) - reference)
        shrink = tl.where(inside, shrink, 0.0)
        sums += shrink * tl.load(statistics + entries + entry, mask=inside, other=0.0)
        if WITH_RANK:
            hits = tl.load(statistics + 2 * entries + entry, mask=inside, other=0.0)
            ranks += hits.to(tl.int32, bitcast=True)
        if WITH_GRAD:
            tile_inside = inside[:, None] & (column < d)[None, :]
            tile = tl.load(workspace + entry[:, None] * width + column[None, :], mask=tile_inside, other=0.0)
            acc += tl.sum(shrink[:, None] * tile, 0)
    negatives = tl.sum(sums, 0)
    own = tl.exp2(logit2 - reference)  # exactly 1 when the positive is the largest logit
    total = negatives + own

    # 3. Outputs. log1p keeps small losses exact; where a negative is larger the loss is at least log 2.
    behind = reference > logit2
    row_loss = tl.where(behind, tl.log(total) + (reference - logit2) * LN2, log1p(negatives / own))
    weight = negatives / total
    if WITH_GRAD:
        factor = scale
        weight_out = weight
        if REDUCTION == _MEAN:
            factor = scale / B
            weight_out = weight / B
        k = tl.load(positive + row * stride_pb + column * stride_pd, mask=column < d, other=0.0).to(tl.float32)
        tl.store(grad_query + row * d + column, factor * (acc / total - weight * k), mask=column < d)
    if first_column == 0:
        tl.store(positive_logit + row, logit)
        tl.store(lse + row, tl.where(behind, tl.log(total) + reference * LN2, logit + row_loss))
        if WITH_RANK:
            tl.store(rank + row, tl.sum(ranks, 0))
        if WITH_GRAD:
            tl.store(positive_weight + row, weight_out)
        if REDUCTION == _NONE:
            tl.store(loss + row, row_loss)
        else:
            # 4. An integer counter tells the last row to finish, which adds all rows in index order: a deterministic
            # sum.
            row_losses = statistics + 3 * entries
            tl.store(row_losses + row, row_loss)
            tl.debug_barrier()  # every thread's store comes before the release below
            finished = tl.atomic_add((row_losses + B).to(tl.pointer_type(tl.int32)), 1, sem="acq_rel")
            if finished == B - 1:
                partial = tl.zeros([BLOCK], tl.float32)
                for begin in range(0, B, BLOCK):
                    index = begin + tl.arange(0, BLOCK)
                    # .cg: other programs wrote these values, so the first-level cache must not answer.
                    partial += tl.load(row_losses + index, mask=index < B, other=0.0, cache_modifier=".cg")
                result = tl.sum(partial, 0)
                if REDUCTION == _MEAN:
                    result = result / B
                tl.store(loss, result)


def info_nce(
    query: torch.Tensor,
    positive: torch.Tensor,
    queue: torch.Tensor,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    valid: torch.Tensor | None,
    compute_dtype: torch.dtype,
    reduction: int,
    with_rank: bool,
    with_grad: bool,
    *,
    input_precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The CUDA implementation of `perfvl::info_nce`: (loss, lse, positive_logit, rank, grad_query, positive_weight).

    query and positive [B, d], queue [K, d] of any floating dtype up to 32 bits and any strides, K < 2^31; reduction 0
    none, 1 mean, 2 sum. `input_precision` ("ieee" or "tf32") says how float32 operands are multiplied and is ignored
    for others. Two launches for d <= 256 (three where a query wider than 128 has to be cast first), three for few
    wide rows. No host synchronisation, no tuning: kernels are compiled per dtype, per d and for a few ranges of B,
    never per B or K.
    """
    (B, d), K = query.shape, queue.shape[0]
    fp32 = {"dtype": torch.float32, "device": query.device}
    loss = torch.empty((B,) if reduction == 0 else (), **fp32)
    lse = torch.empty(B, **fp32)
    positive_logit = torch.empty(B, **fp32)
    rank = torch.empty(B if with_rank else 0, dtype=torch.int32, device=query.device)
    grad_query = torch.empty((B if with_grad else 0, d), **fp32)
    positive_weight = torch.empty(B if with_grad else 0, **fp32)
    outputs = (loss, lse, positive_logit, rank, grad_query, positive_weight)
    if B == 0:
        if reduction != 0:
            loss.fill_(float("nan") if reduction == 1 else 0.0)
        return outputs

    with _tiles.on_device(query):
        common = (query, positive, queue, temperature, temperature_tensor, valid)
        gpu = _tiles.gpu_limits(query.device)
        many = True
        if K == 0:
            partials = Partials.empty(query, 0, B, d, with_grad)
            partials.workspace.zero_()
        elif d <= WIDEST and (compute_dtype != torch.float32 or input_precision == "tf32"):
            partials = partials_by_streaming(*common, compute_dtype, with_rank, with_grad, gpu)
        elif compute_dtype != torch.float32 and suits_few_rows(B, queue):
            partials = partials_for_few_rows(*common, COMPUTE[compute_dtype], with_rank, with_grad, gpu)
        else:
            partials = partials_by_library(*common, compute_dtype, with_rank, with_grad)
            many = False
        # A program adds tiles of 4096 numbers; narrow columns give enough programs where there are few rows. One or two
        # splits are added in whole rows, so that the positive's product is made once.
        if many:
            block_d = 128 if B * ceil_div(d, 128) >= gpu.multiprocessors else 32
            block_s = 4096 // block_d
        else:
            block_s, block_d = 2, min(4096, max(32, power_of_2(d)))
        launch(
            _merge_kernel,
            (B, ceil_div(d, block_d) if with_grad else 1),
            (query, positive, temperature_tensor, partials.workspace, *outputs),
            (temperature, B, partials.splits, partials.rows),
            (d, partials.width, *query.stride(), *positive.stride()),
            8 if block_s * block_d > 4096 else 4,
            REDUCTION=reduction, WITH_RANK=with_rank, WITH_GRAD=with_grad,
            BLOCK_D=block_d, BLOCK_S=block_s, BLOCK=1024,
        )  # fmt: skip
    return outputs
