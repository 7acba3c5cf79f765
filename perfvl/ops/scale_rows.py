"""scale_rows: out_i = dtype(scale_i * rows_i), what backward makes of a gradient that forward saved in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import LIBRARY


def scale_rows(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(rows.float() * scale[:, None]).to(dtype)`` for rows [B, d] and float32 scale [B] of any strides.

    Private to the ops' backward passes. On CUDA one kernel instead of three (widen, multiply, round); elsewhere torch.
    """
    if rows.is_cuda and backends.choose(rows, cuda="native") == "native":
        return torch.ops.perfvl.scale_rows.default(rows, scale, dtype)
    return (rows * scale.unsqueeze(1)).to(dtype)


LIBRARY.define("scale_rows(Tensor rows, Tensor scale, ScalarType dtype) -> Tensor")


@torch.library.register_fake("perfvl::scale_rows", lib=LIBRARY)
def _fake(rows, scale, dtype):
    return torch.empty(rows.shape, dtype=dtype, device=rows.device)
