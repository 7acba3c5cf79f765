"""Orthonormal weights, and the variance of all numbers of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Numbers that stay in a CPU's cache between two reads."""


def orthonormal_(weight: Tensor) -> None:
    r"""Orthonormal rows or columns, whichever are fewer, of the weight as a matrix [shape[0], ...].

    Uniformly distributed, as the singular vectors of normal numbers are. Those cost tens of times more, and a QR
    decomposition twice: of normal numbers it meets a normal vector, again independent, at each Householder reflection,
    so that these vectors can be drawn instead of computed (Stewart 1980, SIAM J. Numer. Anal. 17).
    """
    matrix = weight.flatten(1)
    rows, columns = matrix.shape
    m, n = max(rows, columns), min(rows, columns)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    vectors = torch.randn(m, n, dtype=wide, device=device).tril_()
    diagonal = vectors.diagonal().clone()
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(wide)
    # v = x + sign(x_1) |x| e_1, divided by v_1; H = 1 - tau v v'; the signs make the triangular factor's diagonal > 0.
    vectors.div_(diagonal + sign * torch.linalg.vector_norm(vectors, dim=0))
    vectors.diagonal().fill_(1.0)
    tau = 2 / vectors.square().sum(0)
    q = torch.linalg.householder_product(vectors, tau).mul_(-sign)
    matrix = q if rows >= columns else q.t()
    weight.copy_(matrix.reshape(weight.shape))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance (of the population) and mean of all numbers, in float32 at least."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type != "cpu" or x.numel() == 0:
        return torch.var_mean(x.to(wide), correction=0)
    # torch's Welford loop on the CPU takes ten times as long as this, chunk by chunk in the cache (Chan et al. 1983).
    flat = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)
    count, average, squares = 0, 0.0, 0.0
    for chunk in flat.split(CHUNK):
        chunk, n = chunk.to(wide), chunk.numel()
        here = chunk.mean()
        delta = here.item() - average
        squares += torch.dist(chunk, here).item() ** 2 + delta * delta * count * n / (count + n)
        count += n
        average += delta * n / count
    return torch.tensor(squares / count, dtype=wide), torch.tensor(average, dtype=wide)


def moments_together(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Variance and mean of several tensors' numbers, from (how many, variance, mean) of each."""
    counts = torch.tensor([n for n, _, _ in parts], dtype=torch.float64)
    variances = torch.stack([variance.double().cpu() for _, variance, _ in parts])
    means = torch.stack([mean.double().cpu() for _, _, mean in parts])
    mean = (counts * means).sum() / counts.sum()
    return (counts * (variances + (means - mean).square())).sum() / counts.sum(), mean
