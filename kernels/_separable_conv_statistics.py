"""Mean and variance per channel from (count, mean, sum of squared deviations) of tiles of pixels.

Chan, Golub and LeVeque's formula for many parts at once: no difference of large squares, so the variance keeps its
digits where the mean is far from 0. Parts are joined in a fixed order, some hundred of them per launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PARTS = 128  # joined by one program


@triton.jit(do_not_specialize=("parts", "O"))
def _merge_kernel(
    counts, means, squares, merged_counts, merged_means, merged_squares,
    parts, CO,
    PARTS: tl.constexpr, BLOCK_O: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Joins up to PARTS parts for a few channels; the last launch turns squares into a variance."""
    group = tl.program_id(0).to(tl.int64)
    part = group * PARTS + tl.arange(0, PARTS)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = (part < parts)[:, None] & (o < CO)[None, :]
    entry = part[:, None] * CO + o[None, :]

    weights = tl.load(counts + part, mask=part < parts, other=0.0)
    count = tl.sum(weights, 0)
    mean_of_part = tl.load(means + entry, mask=inside, other=0.0)
    mean = tl.sum(mean_of_part * (weights / count)[:, None], 0)
    deviation = mean_of_part - mean[None, :]
    within = tl.load(squares + entry, mask=inside, other=0.0)
    square = tl.sum(within + deviation * deviation * weights[:, None], 0)
    if LAST:
        square = square / count
    tl.store(merged_counts + group, count)
    tl.store(merged_means + group * CO + o, mean, mask=o < CO)
    tl.store(merged_squares + group * CO + o, square, mask=o < CO)


def merge_statistics(counts: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [CO] from counts [parts], means and sums of squared deviations [parts, CO], float32."""
    while True:
        parts, channels = means.shape
        groups = triton.cdiv(parts, PARTS)
        merged = (counts.new_empty(groups), means.new_empty(groups, channels), squares.new_empty(groups, channels))
        _merge_kernel[(groups, triton.cdiv(channels, 32))](
            counts, means, squares, *merged, parts, channels,
            PARTS=PARTS, BLOCK_O=32, LAST=groups == 1, num_warps=4,
        )  # fmt: skip
        if groups == 1:
            return merged[1][0], merged[2][0]
        counts, means, squares = merged
