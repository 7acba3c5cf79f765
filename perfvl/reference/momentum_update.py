"""The exponential moving average of a momentum encoder, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def momentum_update(target: Tensor, source: Tensor, momentum: float | Tensor, *, convex: bool = False) -> Tensor:
    r"""The new target :math:`m t + (1 - m) s` in the target's dtype (BriVL, arXiv:2103.06561, eq. 1-2; MoCo, eq. 2).

    Interpolated from the nearer end in float32 (float64 where an operand is): exactly ``source`` at m = 0, exactly
    ``target`` at m = 1 and wherever both are equal. ``convex`` is the expression of MoCo's code instead, which rounds
    three times. Tensors that are not floating-point are the source's.
    """
    if not target.is_floating_point():
        return source
    if convex:
        return (target * momentum + source * (1.0 - momentum)).to(target.dtype)
    wide = torch.float64 if torch.float64 in (target.dtype, source.dtype) else torch.float32
    start, end = target.to(wide), source.to(wide)
    m = torch.as_tensor(momentum, dtype=torch.float64, device=target.device)
    weight = (1.0 - m).to(wide)
    moved = torch.where(weight == 0, start, torch.where(weight == 1, end, torch.lerp(start, end, weight)))
    return moved.to(target.dtype)
