"""Error of a contender against float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Error = dict[str, float]
"""``max_abs``: largest absolute difference; ``relative``: Frobenius norm of the difference over that of the truth."""


def errors(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> dict[str, Error]:
    """The error of every tensor in ``truth``. A tensor that is missing or has another shape has infinite error."""
    report: dict[str, Error] = {}
    for name, expected in truth.items():
        value = found.get(name)
        if value is None or value.shape != expected.shape:
            report[name] = {"max_abs": math.inf, "relative": math.inf}
            continue
        expected = expected.double()
        difference = value.detach().to(expected.device).double() - expected
        scale = float(expected.norm()) or 1.0
        report[name] = {
            "max_abs": float(difference.abs().max()) if difference.numel() else 0.0,
            "relative": float(difference.norm()) / scale,
        }
    return report


def matches(report: Mapping[str, Error], tolerance: float) -> bool:
    """Whether every tensor is within ``tolerance`` of the truth; NaN never is."""
    return bool(report) and all(error["relative"] <= tolerance for error in report.values())
