"""InfoNCE partial results for rows of up to 256 elements: everything of B x K stays on the chip.

A program keeps a tile of queries and the matching tile of the query gradient, streams its share of the keys through
shared memory and uses every key tile twice: for the logits and for sum_j P_ij N_j, as attention does with V = K. That
is 4BKd FLOP and one read of the queue from memory. B gives only one or two row tiles, so the keys are split over
enough programs to fill the GPU.

The running maximum starts at -inf, not at the positive: weights are then relative to the largest negative, so the
gradient of a row whose positive wins by far does not vanish in half precision. Logits are kept in units of log2: exp
is one multiply-add and one exp2, and the maximum is taken before scaling.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._tiles import Gpu, ceil_div, load_count, load_scale, power_of_2, reads_in_vectors

LOG2E = tl.constexpr(1.4426950408889634)

WIDEST = 256  # elements of a row that a program keeps whole
COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Partials(NamedTuple):
    """What the sweep over the keys leaves for `info_nce._merge_kernel`, in one fp32 buffer.

    gradient[splits, rows, width] (only with a gradient), then max, sum and rank (as bits) [splits, rows], then the
    row losses[B] and one int32 counter that the sweep zeroes. rows >= B and width >= d may include padding.
    """

    workspace: torch.Tensor
    splits: int
    rows: int
    width: int

    @classmethod
    def empty(cls, query: torch.Tensor, splits: int, rows: int, width: int, with_grad: bool) -> Partials:
        size = splits * rows * (3 + (width if with_grad else 0)) + query.shape[0] + 1
        return cls(torch.empty(size, dtype=torch.float32, device=query.device), splits, rows, width)


class Tiles(NamedTuple):
    rows: int
    keys: int
    warps: int
    programs_per_multiprocessor: int


@triton.jit
def _fold_keys(
    operands, floor, scale2, row_max, row_sum, rank, acc,
    queue, start, end, d, stride_kk, stride_kd,
    COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    MASKED: tl.constexpr, WITH_RANK: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """Adds the keys [start, min(start + BLOCK_K, end)) to the running softmax of a tile of queries."""
    key_index = start + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_D)
    pointers = queue + key_index.to(tl.int64)[:, None] * stride_kk + column.to(tl.int64)[None, :] * stride_kd
    inside = key_index < end
    # Rows past the end may hold anything, NaN included: they are neither read nor counted.
    if MASKED and EVEN_D:
        keys = tl.load(pointers, mask=inside[:, None], other=0.0)
    elif MASKED:
        keys = tl.load(pointers, mask=inside[:, None] & (column < d)[None, :], other=0.0)
    elif EVEN_D:
        keys = tl.load(pointers)
    else:
        keys = tl.load(pointers, mask=(column < d)[None, :], other=0.0)
    keys = keys.to(COMPUTE)

    logits = tl.dot(operands, tl.trans(keys), input_precision="tf32")
    # The largest logit is the largest product, or the smallest one under a negative temperature.
    if scale2 < 0:
        if MASKED:
            logits = tl.where(inside[None, :], logits, float("inf"))
        extreme = tl.min(logits, 1)
    else:
        if MASKED:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        extreme = tl.max(logits, 1)
    if WITH_RANK:
        if scale2 < 0:
            hits = (logits <= floor[:, None]).to(tl.int32)
            if MASKED:
                hits = tl.where(inside[None, :], hits, 0)
            rank += tl.sum(hits, 1)
        else:
            hits = (logits >= floor[:, None]).to(tl.int32)
            if MASKED:
                hits = tl.where(inside[None, :], hits, 0)
            rank += tl.sum(hits, 1)

    new_max = tl.maximum(row_max, extreme * scale2)
    # A row of -inf logits has no finite maximum; any finite reference gives it exp2(-inf) = 0 instead of NaN.
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits * scale2 - reference[:, None])
    if MASKED:
        weights = tl.where(inside[None, :], weights, 0.0)
    shrink = tl.exp2(row_max - reference)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if WITH_GRAD:
        acc = tl.dot(weights.to(COMPUTE), keys, acc * shrink[:, None], input_precision="tf32")
    return new_max, row_sum, rank, acc


@triton.jit(do_not_specialize=("B", "K", "splits"))
def _stream_kernel(
    operand, query, positive, queue, temperature_tensor, valid, workspace,
    temperature, B, K, splits,
    d, stride_ob, stride_od, stride_qb, stride_qd, stride_pb, stride_pd, stride_kk, stride_kd,
    COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, WITH_RANK: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """One tile of queries against one contiguous share of the keys; writes (max, sum, rank, gradient) of that share."""
    # 1. Row tiles vary fastest, so programs that run side by side read the same keys and share them through L2.
    row_tiles = tl.cdiv(B, BLOCK_B)
    split = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.arange(0, BLOCK_D)
    row64 = row.to(tl.int64)
    column64 = column.to(tl.int64)
    inside = (row < B)[:, None]
    if not EVEN_D:
        inside = inside & (column < d)[None, :]

    # 2. The query tile, and the positive's product to rank against.
    scale2 = load_scale(temperature, temperature_tensor) * LOG2E
    operands = tl.load(operand + row64[:, None] * stride_ob + column64[None, :] * stride_od, mask=inside, other=0.0)
    operands = operands.to(COMPUTE)
    floor = tl.zeros([BLOCK_B], tl.float32)
    if WITH_RANK:
        for begin in tl.range(
            0, d, 16, num_stages=1
        ):  # a few columns at a time: whole rows would take too many registers
            narrow = begin + tl.arange(0, 16).to(tl.int64)[None, :]
            mask = (row < B)[:, None] & (narrow < d)
            q = tl.load(query + row64[:, None] * stride_qb + narrow * stride_qd, mask=mask, other=0.0).to(tl.float32)
            k = tl.load(positive + row64[:, None] * stride_pb + narrow * stride_pd, mask=mask, other=0.0).to(tl.float32)
            floor += tl.sum(q * k, 1)

    # 3. The share of the keys: whole tiles without masks, then at most one ragged tile.
    count = load_count(K, valid)
    share = tl.cdiv(tl.cdiv(count, BLOCK_K), splits) * BLOCK_K
    start = (
        split * share
    )  # a multiple of the tile even where it lies past the end: vector loads along the keys need that
    end = tl.minimum(start + share, count)
    whole_end = start + tl.maximum(end - start, 0) // BLOCK_K * BLOCK_K

    row_max = tl.full([BLOCK_B], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_B], tl.float32)
    rank = tl.zeros([BLOCK_B], tl.int32)
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for key in tl.range(start, whole_end, BLOCK_K, num_stages=3):
        row_max, row_sum, rank, acc = _fold_keys(
            operands, floor, scale2, row_max, row_sum, rank, acc, queue, key, end, d, stride_kk, stride_kd,
            COMPUTE, BLOCK_K, BLOCK_D, EVEN_D, False, WITH_RANK, WITH_GRAD,
        )  # fmt: skip
    if whole_end < end:
        row_max, row_sum, rank, acc = _fold_keys(
            operands, floor, scale2, row_max, row_sum, rank, acc, queue, whole_end, end, d, stride_kk, stride_kd,
            COMPUTE, BLOCK_K, BLOCK_D, EVEN_D, True, WITH_RANK, WITH_GRAD,
        )  # fmt: skip

    # 4. Partial results, padded to whole tiles: no masks, and offsets that are constants but for the first.
    rows = row_tiles * BLOCK_B
    first = split.to(tl.int64) * rows + (tl.program_id(0) % row_tiles) * BLOCK_B
    entries = splits.to(tl.int64) * rows
    lane = tl.arange(0, BLOCK_B)
    statistics = workspace
    if WITH_GRAD:
        tl.store(workspace + first * BLOCK_D + (lane[:, None] * BLOCK_D + column[None, :]), acc)
        statistics = workspace + entries * BLOCK_D
    tl.store(statistics + first + lane, row_max)
    tl.store(statistics + entries + first + lane, row_sum)
    if WITH_RANK:
        tl.store(statistics + 2 * entries + first + lane, rank.to(tl.float32, bitcast=True))
    if tl.program_id(0) == 0:
        tl.store((statistics + 3 * entries + B).to(tl.pointer_type(tl.int32)), 0)


@functools.lru_cache(maxsize=1024)
def _choose_tiles(B: int, d: int, itemsize: int, vectors: bool, gpu: Gpu) -> Tiles:
    """Tile sizes for d <= 256 and operands of at most `itemsize` bytes, from compiled register counts.

    None of them spills in a loop, on sm_80 to sm_120. Per thread, a 128 x 128 tile on 8 warps holds 64 registers of
    logits and 64 of gradient; d = 256 doubles the latter, so the key tile is halved. The wgmma of sm_90 and the
    tcgen05 of sm_100 read both operands from shared memory; mma.sync (all others, and fewer than 64 rows) has them in
    registers, which again halves the tile. tcgen05 keeps sums in tensor memory, but rescaling them passes through
    registers: at d = 256 that asks for smaller tiles.
    """
    wide = d > 128
    wgmma, tcgen05 = (gpu.capability // 10 == generation for generation in (9, 10))
    fp32_keys = itemsize == 4
    rows = next((size for size in (16, 32, 64) if size >= B), 128)
    if wide and not wgmma:
        rows = min(rows, 64)
    keys = 128 if wgmma or tcgen05 else 32 if rows == 128 and d > 64 else 64
    if wide:
        keys //= 4 if tcgen05 else 2
    if fp32_keys:
        keys //= 2
    warps = 8 if rows == 128 or (wide and (fp32_keys or (rows >= 32 and not tcgen05))) else 4
    if not vectors:
        keys, warps = 32, 8  # one load instruction and one address per element
    return Tiles(rows, max(16, keys), warps, 8 // warps)


@functools.lru_cache(maxsize=1024)
def split_count(row_tiles: int, key_tiles: int, slots: int) -> int:
    """The number of key splits that finishes first when `slots` programs run at once.

    Time is counted in key tiles: full waves of programs, each with its share of tiles plus about two tiles' worth of
    start, end and merge.
    """
    best, best_cost = 1, float("inf")
    for splits in range(1, min(key_tiles, max(1, 4 * slots // row_tiles)) + 1):
        cost = ceil_div(row_tiles * splits, slots) * (ceil_div(key_tiles, splits) + 2)
        if cost < best_cost:
            best, best_cost = splits, cost
    return best


def partials_by_streaming(
    query, positive, queue, temperature, temperature_tensor, valid, compute_dtype, with_rank, with_grad, gpu
):
    """d <= 256: everything on the chip."""
    (B, d), K = query.shape, queue.shape[0]
    itemsize = max(queue.itemsize, compute_dtype.itemsize)
    tiles = _choose_tiles(B, d, itemsize, reads_in_vectors(queue), gpu)
    row_tiles = ceil_div(B, tiles.rows)
    slots = gpu.multiprocessors * tiles.programs_per_multiprocessor
    splits = split_count(row_tiles, ceil_div(K, tiles.keys), slots)
    block_d = max(16, power_of_2(d))
    # A tile of the operand dtype goes straight to shared memory; converting on the way takes registers that wide
    # tiles lack.
    operand = query.to(compute_dtype) if block_d > 128 else query
    partials = Partials.empty(query, splits, row_tiles * tiles.rows, block_d, with_grad)
    launch(
        _stream_kernel,
        (row_tiles * splits,),
        (operand, query, positive, queue, temperature_tensor, valid, partials.workspace),
        (temperature, B, K, splits),
        (d, *operand.stride(), *query.stride(), *positive.stride(), *queue.stride()),
        tiles.warps,
        COMPUTE=COMPUTE[compute_dtype], BLOCK_B=tiles.rows, BLOCK_K=tiles.keys, BLOCK_D=block_d,
        EVEN_D=block_d == d, WITH_RANK=with_rank, WITH_GRAD=with_grad,
    )  # fmt: skip
    return partials
