"""Images as numpy arrays in any layout, for the tests of the convolution kernels."""

from __future__ import annotations

import numpy as np
import torch

from native.floats import widen


def laid_out(a: np.ndarray, layout: str) -> np.ndarray:
    """The same values, contiguous, channels_last, or with room between the elements."""
    if layout == "channels_last":
        return np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if layout == "sliced":
        n, c, h, w = a.shape
        wide = np.zeros((n, c + 1, h, 2 * w), a.dtype)
        wide[:, :c, :, ::2] = a
        return wide[:, :c, :, ::2]
    return np.ascontiguousarray(a)


def double(a: np.ndarray | None) -> torch.Tensor | None:
    return None if a is None else torch.from_numpy(widen(a).astype(np.float64))


def nchw(a: np.ndarray, channels_last: bool) -> torch.Tensor:
    """A kernel's result in float64; one that is channels_last comes as it lies in memory."""
    found = torch.from_numpy(widen(a).astype(np.float64))
    return found.permute(0, 3, 1, 2) if channels_last else found


def distance(got: torch.Tensor, truth: torch.Tensor) -> float:
    assert got.shape == truth.shape
    return float((got - truth).norm() / truth.norm().clamp_min(1e-12))
