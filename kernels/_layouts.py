"""Dense tensors in NCHW or channels_last, and tiles over their memory: what activations and norms share."""

from __future__ import annotations

import torch
from torch import Tensor

from ._tiles import power_of_2


def is_channels_last(x: Tensor) -> bool:
    """As perfvl.ops.depthwise_conv has it."""
    return x.shape[1] > 1 and x.stride(1) == 1


def _memory(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def empty(last: bool, shape: tuple[int, ...], beside: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, of the dtype and on the device of another tensor."""
    return torch.empty(shape, dtype=dtype or beside.dtype, device=beside.device, memory_format=_memory(last))


def dense(x: Tensor, last: bool) -> Tensor:
    """Without gaps, a copy only where it has to be one."""
    return x.contiguous(memory_format=_memory(last))


def tile(columns: int, elements: int) -> tuple[int, int]:
    """Powers of two: rows and columns of a tile of `elements`, as wide as the columns or the tile, which is less."""
    width = min(power_of_2(columns), elements)
    return elements // width, width
