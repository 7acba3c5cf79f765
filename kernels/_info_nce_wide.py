"""InfoNCE partial results for rows too wide to stay on the chip (d > 256), and for plain float32 of any width.

Two routes. In both, logits exist for a bounded number of keys at a time (64 MB), never for a growing B x K.

* Few rows (B <= 64): bound by reading the queue. One kernel streams it for the logits of every key tile and their
  (max, sum, rank), a second streams it again for sum_j P_ij N_j with the maximum known: 2 + 2 bytes per element of a
  bf16 queue from memory, less what L2 still holds, against 2 for a single read. A single-read kernel would have to
  hold BLOCK_K x d keys and B x d fp32 sums. At B = 16, d = 2560 that is 164 KB per 32 keys and 164 KB of sums, more
  than a multiprocessor has, so it would read each tile again through L2 (the same 2 + 2 bytes into the
  multiprocessors) and write 164 KB of sums per program: at an assumed 5.5 TB/s of L2 that is slower than the second
  read from memory.
* Many rows: bound by arithmetic. Chunks of keys go through library GEMM -> one fused row kernel (fp32 logits in,
  probabilities out in the operand dtype: 12 bytes per logit) -> library GEMM. Recomputing the logits instead would cost
  2BKd more FLOP. Float32 without TF32 takes this route at any width: plain multiply-adds belong to the library's GEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._info_nce_narrow import Partials
from ._launch import launch
from ._tiles import Gpu, ceil_div, load_count, load_scale, reads_in_vectors

LOG2E = tl.constexpr(1.4426950408889634)

_CHUNK_BYTES = 64 << 20
_FEW_ROWS = 64
# Logits of a row that a program of the row kernel keeps in registers, and its warps: for up to 512 rows, and for more,
# where smaller programs are 1.6 times as fast (H100, 2048 x 8192: 36 us against 59).
_FEW, _ROW_TILES, _MORE_ROW_TILES = 512, (16384, 32), (4096, 8)
_FEW_ROWS_KEYS = 64  # keys per tile of the few-rows kernels


def suits_few_rows(B: int, queue: torch.Tensor) -> bool:
    """Whether B rows are few enough, and their logits small enough, for two kernels that stream a row-major queue."""
    return B <= _FEW_ROWS and queue.stride(1) == 1 and 4 * B * (queue.shape[0] + _FEW_ROWS_KEYS) <= _CHUNK_BYTES


@triton.jit(do_not_specialize=("B", "K"))
def _logits_kernel(
    query, positive, queue, temperature_tensor, valid, logits, statistics,
    temperature, B, K,
    d, stride_qb, stride_qd, stride_pb, stride_pd, stride_kk, stride_kd,
    COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    WITH_RANK: tl.constexpr, WITH_GRAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits (in log2 units) of all rows for one tile of keys, with the tile's (max, sum, rank) per row."""
    tile = tl.program_id(0)
    row = tl.arange(0, BLOCK_B)
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    count = load_count(K, valid)
    row_inside = row < B
    key_inside = key < count
    row64 = row.to(tl.int64)[:, None]
    key64 = key.to(tl.int64)[:, None]

    # 1. One pass over the row dimension; the positive's fp32 dot rides along where the rank needs it.
    products = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    floor = tl.zeros([BLOCK_B], tl.float32)
    for begin in tl.range(0, d, BLOCK_D, num_stages=STAGES):
        column = begin + tl.arange(0, BLOCK_D)
        column64 = column.to(tl.int64)[None, :]
        if EVEN_D:
            rows_mask = row_inside[:, None]
            keys_mask = key_inside[:, None]
        else:
            rows_mask = row_inside[:, None] & (column < d)[None, :]
            keys_mask = key_inside[:, None] & (column < d)[None, :]
        q = tl.load(query + row64 * stride_qb + column64 * stride_qd, mask=rows_mask, other=0.0)
        keys = tl.load(queue + key64 * stride_kk + column64 * stride_kd, mask=keys_mask, other=0.0)
        products = tl.dot(q.to(COMPUTE), tl.trans(keys.to(COMPUTE)), products)
        if WITH_RANK:
            k = tl.load(positive + row64 * stride_pb + column64 * stride_pd, mask=rows_mask, other=0.0)
            floor += tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)

    # 2. Softmax statistics of the tile.
    scale2 = load_scale(temperature, temperature_tensor) * LOG2E
    logits2 = tl.where(key_inside[None, :], products * scale2, float("-inf"))
    top = tl.max(logits2, 1)
    reference = tl.where(top == float("-inf"), 0.0, top)
    row_sum = tl.sum(tl.exp2(logits2 - reference[:, None]), 1)

    entries = tl.num_programs(0).to(tl.int64) * B
    entry = tile.to(tl.int64) * B + row
    tl.store(statistics + entry, top, mask=row_inside)
    tl.store(statistics + entries + entry, row_sum, mask=row_inside)
    if WITH_RANK:
        hits = (logits2 >= (floor * scale2)[:, None]) & key_inside[None, :]
        rank = tl.sum(hits.to(tl.int32), 1)
        tl.store(statistics + 2 * entries + entry, rank.to(tl.float32, bitcast=True), mask=row_inside)
    if WITH_GRAD:
        width = tl.num_programs(0).to(tl.int64) * BLOCK_K
        tl.store(logits + row64 * width + key.to(tl.int64)[None, :], logits2, mask=row_inside[:, None])
    elif tile == 0:
        tl.store((statistics + 3 * entries + B).to(tl.pointer_type(tl.int32)), 0)


@triton.jit(do_not_specialize=("B", "K", "splits", "key_tiles"))
def _gradient_kernel(
    queue, valid, logits, tile_statistics, workspace,
    B, K, splits, key_tiles,
    d, stride_kk, stride_kd,
    COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    WITH_RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sum_j exp2(logit_ij - max_i) N_j over one share of the key tiles and one slice of the columns."""
    slices = tl.cdiv(d, BLOCK_D)
    split = tl.program_id(0) // slices
    piece = tl.program_id(0) % slices
    row = tl.arange(0, BLOCK_B)
    row64 = row.to(tl.int64)
    row_inside = row < B
    column = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    column_inside = column < d
    share = tl.cdiv(key_tiles, splits)
    first = tl.minimum(split * share, key_tiles)
    last = tl.minimum(first + share, key_tiles)

    # 1. Statistics of the share from those of its tiles.
    rows = B.to(tl.int64)
    tile_entries = key_tiles * rows
    row_max = tl.full([BLOCK_B], float("-inf"), tl.float32)
    for tile in range(first, last):
        entry = tile * rows + row64
        row_max = tl.maximum(row_max, tl.load(tile_statistics + entry, mask=row_inside, other=float("-inf")))
    reference = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.zeros([BLOCK_B], tl.float32)
    rank = tl.zeros([BLOCK_B], tl.int32)
    for tile in range(first, last):
        entry = tile * rows + row64
        shrink = tl.exp2(tl.load(tile_statistics + entry, mask=row_inside, other=float("-inf")) - reference)
        row_sum += shrink * tl.load(tile_statistics + tile_entries + entry, mask=row_inside, other=0.0)
        if WITH_RANK:
            hits = tl.load(tile_statistics + 2 * tile_entries + entry, mask=row_inside, other=0.0)
            rank += hits.to(tl.int32, bitcast=True)

    # 2. The weighted sum of the keys.
    count = load_count(K, valid)
    width = key_tiles.to(tl.int64) * BLOCK_K
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for begin in tl.range(first * BLOCK_K, last * BLOCK_K, BLOCK_K, num_stages=STAGES):
        key = begin + tl.arange(0, BLOCK_K)
        key64 = key.to(tl.int64)
        logits2 = tl.load(
            logits + row64[:, None] * width + key64[None, :], mask=row_inside[:, None], other=float("-inf")
        )
        mask = (key < count)[:, None]
        if not EVEN_D:
            mask = mask & column_inside[None, :]
        keys = tl.load(
            queue + key64[:, None] * stride_kk + column.to(tl.int64)[None, :] * stride_kd, mask=mask, other=0.0
        )
        weights = tl.exp2(logits2 - reference[:, None])
        acc = tl.dot(weights.to(COMPUTE), keys.to(COMPUTE), acc)

    # 3. Partial results of the share.
    entry = split.to(tl.int64) * B + row64
    entries = splits.to(tl.int64) * B
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(workspace + entry[:, None] * d + column.to(tl.int64)[None, :], acc, mask=inside)
    if piece == 0:
        statistics = workspace + entries * d
        tl.store(statistics + entry, row_max, mask=row_inside)
        tl.store(statistics + entries + entry, row_sum, mask=row_inside)
        if WITH_RANK:
            tl.store(statistics + 2 * entries + entry, rank.to(tl.float32, bitcast=True), mask=row_inside)
        if split == 0:
            tl.store((statistics + 3 * entries + B).to(tl.pointer_type(tl.int32)), 0)


def partials_for_few_rows(
    query, positive, queue, temperature, temperature_tensor, valid, compute, with_rank, with_grad, gpu: Gpu
):
    """Half-precision operands, B <= 64: two kernels that stream the queue."""
    (B, d), K = query.shape, queue.shape[0]
    block_b = 16 if B <= 16 else 32 if B <= 32 else 64
    key_tiles = ceil_div(K, _FEW_ROWS_KEYS)
    if with_grad:
        tile_statistics = torch.empty(3 * key_tiles * B, dtype=torch.float32, device=query.device)
        logits = torch.empty(B * key_tiles * _FEW_ROWS_KEYS, dtype=torch.float32, device=query.device)
    else:
        partials = Partials.empty(query, key_tiles, B, d, False)
        tile_statistics = logits = partials.workspace
    if not reads_in_vectors(queue):
        block_d = 32  # one load instruction and one address per element
    else:
        block_d = 128 if queue.itemsize == 2 else 64
    # Four stages of a 64 x 128 tile keep some 50 KB per program in flight; 64 rows leave no room for that on 99 KB
    # parts.
    stages = 4 if block_b < 64 or gpu.shared_memory > 160_000 else 2
    tiles = {
        "COMPUTE": compute, "BLOCK_B": block_b, "BLOCK_K": _FEW_ROWS_KEYS, "BLOCK_D": block_d,
        "EVEN_D": d % block_d == 0, "WITH_RANK": with_rank, "STAGES": stages,
    }  # fmt: skip
    launch(
        _logits_kernel,
        (key_tiles,),
        (query, positive, queue, temperature_tensor, valid, logits, tile_statistics),
        (temperature, B, K),
        (d, *query.stride(), *positive.stride(), *queue.stride()),
        4,
        **tiles,
        WITH_GRAD=with_grad,
    )
    if not with_grad:
        return partials

    slices = ceil_div(d, block_d)
    splits = min(key_tiles, max(1, 2 * gpu.multiprocessors // slices))
    partials = Partials.empty(query, splits, B, d, True)
    launch(
        _gradient_kernel,
        (slices * splits,),
        (queue, valid, logits, tile_statistics, partials.workspace),
        (B, K, splits, key_tiles),
        (d, *queue.stride()),
        4,
        **tiles,
    )
    return partials


@triton.jit(do_not_specialize=("B", "K", "start", "columns", "splits"))
def _rows_kernel(
    query, positive, temperature_tensor, valid, logits, weights, workspace,
    temperature, B, K, start, columns, splits,
    d, stride_qb, stride_qd, stride_pb, stride_pd, stride_row,
    WITH_RANK: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of a chunk of logits: maximum, sum and rank of its split, and the weights relative to that maximum.

    The first chunk is split 0, every other one split 1. From the third chunk on split 1 is added to split 0 before.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    scale2 = load_scale(temperature, temperature_tensor) * LOG2E
    inside_count = tl.minimum(tl.maximum(load_count(K, valid) - start, 0), columns)
    logits += row * stride_row
    weights += row * stride_row
    entries = splits.to(tl.int64) * B
    statistics = workspace
    if WITH_GRAD:
        statistics = workspace + entries * d

    # 1. The first block of logits is read once and stays in registers. Masks that end at a multiple of 128, as rows of
    # the buffer do, leave loads and stores whole vectors; what lies past the columns that count is then overwritten.
    readable = tl.cdiv(columns, 128) * 128
    kept = tl.load(logits + lane, mask=lane < readable, other=0.0)

    # 2. Split 1 is needed again: add it to split 0.
    slot = tl.where(start > 0, B, 0).to(tl.int64) + row
    if start > stride_row:
        top0 = tl.load(statistics + row)
        top1 = tl.load(statistics + B + row)
        top = tl.maximum(top0, top1)
        base = tl.where(top == float("-inf"), 0.0, top)
        shrink0 = tl.exp2(top0 - base)
        shrink1 = tl.exp2(top1 - base)
        sum0 = tl.load(statistics + entries + row)
        sum1 = tl.load(statistics + entries + B + row)
        tl.debug_barrier()  # every thread has read before one writes
        tl.store(statistics + row, top)
        tl.store(statistics + entries + row, sum0 * shrink0 + sum1 * shrink1)
        if WITH_RANK:
            hits0 = tl.load(statistics + 2 * entries + row).to(tl.int32, bitcast=True)
            hits1 = tl.load(statistics + 2 * entries + B + row).to(tl.int32, bitcast=True)
            tl.debug_barrier()
            tl.store(statistics + 2 * entries + row, (hits0 + hits1).to(tl.float32, bitcast=True))
        if WITH_GRAD:
            for begin in range(0, d, BLOCK_D):
                column = begin + tl.arange(0, BLOCK_D).to(tl.int64)
                into = workspace + row * d + column
                acc0 = tl.load(into, mask=column < d, other=0.0)
                acc1 = tl.load(into + B.to(tl.int64) * d, mask=column < d, other=0.0)
                tl.store(into, acc0 * shrink0 + acc1 * shrink1, mask=column < d)

    # 3. The positive's product to rank against.
    floor2 = 0.0
    if WITH_RANK:
        dot = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(0, d, BLOCK_D):
            column = begin + tl.arange(0, BLOCK_D).to(tl.int64)
            q = tl.load(query + row * stride_qb + column * stride_qd, mask=column < d, other=0.0).to(tl.float32)
            k = tl.load(positive + row * stride_pb + column * stride_pd, mask=column < d, other=0.0).to(tl.float32)
            dot += q * k
        floor2 = tl.sum(dot, 0) * scale2

    # 4. Maximum and rank.
    kept = tl.where(lane < inside_count, kept * scale2, float("-inf"))
    top = tl.max(kept, 0)
    rank = tl.full([], 0, tl.int32)
    if WITH_RANK:
        rank = tl.sum(((kept >= floor2) & (lane < inside_count)).to(tl.int32), 0)
    for begin in range(BLOCK, inside_count, BLOCK):
        column = begin + lane
        inside = column < inside_count
        logit2 = tl.load(logits + column, mask=column < readable, other=0.0) * scale2
        logit2 = tl.where(inside, logit2, float("-inf"))
        top = tl.maximum(top, tl.max(logit2, 0))
        if WITH_RANK:
            rank += tl.sum(((logit2 >= floor2) & inside).to(tl.int32), 0)
    reference = tl.where(top == float("-inf"), 0.0, top)

    # 5. Weights in the operand dtype of the second product, backwards: the second-level cache still holds the end.
    total = tl.full([], 0.0, tl.float32)
    blocks = tl.cdiv(columns, BLOCK)
    for done in range(blocks - 1):
        column = (blocks - 1 - done) * BLOCK + lane
        inside = column < inside_count
        logit2 = tl.load(logits + column, mask=column < readable, other=0.0) * scale2
        weight = tl.where(inside, tl.exp2(logit2 - reference), 0.0)
        total += tl.sum(weight, 0)
        if WITH_GRAD:
            tl.store(weights + column, weight.to(weights.dtype.element_ty), mask=column < readable)
    weight = tl.where(lane < inside_count, tl.exp2(kept - reference), 0.0)
    total += tl.sum(weight, 0)
    if WITH_GRAD:
        tl.store(weights + lane, weight.to(weights.dtype.element_ty), mask=lane < readable)

    # 6. Statistics of the split;
    tl.store(statistics + slot, top)
    tl.store(statistics + entries + slot, total)
    if WITH_RANK:
        tl.store(statistics + 2 * entries + slot, rank.to(tl.float32, bitcast=True))
    if tl.program_id(0) == 0:
        tl.store((statistics + 3 * entries + B).to(tl.pointer_type(tl.int32)), 0)


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b with fp32 accumulation and result; float32 operands follow torch's own TF32 setting."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def partials_by_library(
    query, positive, queue, temperature, temperature_tensor, valid, compute_dtype, with_rank, with_grad
):
    """Chunks of keys through library GEMMs."""
    (B, d), K = query.shape, queue.shape[0]
    # A GEMM reads every row it is given, and 0 * NaN is NaN: with a device-side count the chunk is copied without its
    # tail.
    copied = queue.dtype != compute_dtype or valid is not None
    bytes_per_key = max(4 * B, compute_dtype.itemsize * d if copied else 0)
    chunk = min(ceil_div(K, 128), max(1, _CHUNK_BYTES // (128 * bytes_per_key))) * 128
    splits = 1 if chunk >= K else 2
    block, warps = _ROW_TILES if B <= _FEW else _MORE_ROW_TILES

    partials = Partials.empty(query, splits, B, d, with_grad)
    workspace = partials.workspace
    logits = torch.empty((B, chunk), dtype=torch.float32, device=query.device)
    weights = logits
    if with_grad and compute_dtype != torch.float32:
        weights = torch.empty((B, chunk), dtype=compute_dtype, device=query.device)
    operand = query.to(compute_dtype)
    if valid is not None:
        index = torch.arange(K, device=query.device).unsqueeze(1)
    for start in range(0, K, chunk):
        columns = min(chunk, K - start)
        keys = queue[start : start + columns].to(compute_dtype)
        if valid is not None:
            keys = keys.masked_fill(index[start : start + columns] >= valid, 0)
        _matmul(operand, keys.t(), logits[:, :columns])
        launch(
            _rows_kernel,
            (B,),
            (query, positive, temperature_tensor, valid, logits, weights, workspace),
            (temperature, B, K, start, columns, splits),
            (d, *query.stride(), *positive.stride(), chunk),
            warps,
            WITH_RANK=with_rank, WITH_GRAD=with_grad, BLOCK=block, BLOCK_D=4096,
        )  # fmt: skip
        if with_grad:
            slot = 0 if start == 0 else 1
            _matmul(weights[:, :columns], keys, workspace[slot * B * d : (slot + 1) * B * d].view(B, d))
    return partials
