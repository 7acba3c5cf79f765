"""What the losses of two networks have to be, in float64 numpy: loops over rows, sorts, and the definitions' formulas.

Everything has groups: logits [groups, rows, classes], labels [groups, rows], a forget rate for each group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

METHODS = ["decoupling", "co_teaching", "co_teaching_plus", "jocor"]


class Settings(NamedTuple):
    method: str
    released: bool = False
    parameter: float = 0.0  # co_lambda, or of the rows that Decoupling divides by at least

    def __str__(self) -> str:
        return f"{self.method}-{'released' if self.released else 'paper'}"

    @property
    def arguments(self) -> tuple[int, bool, float]:
        return METHODS.index(self.method), self.released, self.parameter

    @property
    def of_probabilities(self) -> bool:
        return self.released and self.method == "co_teaching_plus"


SETTINGS = [
    Settings("decoupling"),
    Settings("decoupling", True, 0.5),
    Settings("co_teaching"),
    Settings("co_teaching", True),
    Settings("co_teaching_plus"),
    Settings("co_teaching_plus", True),
    Settings("jocor", False, 0.9),
    Settings("jocor", True, 0.25),
]


def order(losses: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Rows by (is no candidate, is NaN, loss, row)."""
    values = np.where(np.isnan(losses), 0, losses) + 0.0
    return np.lexsort((np.arange(len(losses)), values, np.isnan(losses), ~candidates))


def keep_count(rate: float, count: int) -> int:
    return 0 if np.isnan(rate) else int(min(max(rate * count, 0), count))


def mask(losses: np.ndarray, rates: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    kept = np.zeros(losses.shape, bool)
    for g, rate in enumerate(rates):
        k = keep_count(float(rate), int(candidates[g].sum()))
        kept[g, order(losses[g], candidates[g])[:k]] = True
    return kept


def log_softmax(z: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        shifted = z - z.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def row_losses(z1: np.ndarray, z2: np.ndarray, labels: np.ndarray, settings: Settings) -> np.ndarray:
    """[2, groups, rows]."""
    logs = [log_softmax(z.astype(np.float64)) for z in (z1, z2)]
    with np.errstate(all="ignore"):
        if settings.of_probabilities:
            logs = [log_softmax(np.exp(log)) for log in logs]
        entropies = [-np.take_along_axis(log, labels[..., None], -1)[..., 0] for log in logs]
        if settings.method != "jocor":
            return np.stack(entropies)
        p, q = np.exp(logs[0]), np.exp(logs[1])
        apart = np.where((p == 0) & (q == 0), 0, (p - q) * (logs[0] - logs[1])).sum(-1)
        joint = (1 - settings.parameter) * (entropies[0] + entropies[1]) + settings.parameter * apart
    return np.stack([joint, joint])


def candidates_of(z1: np.ndarray, z2: np.ndarray, settings: Settings, sample_ids: np.ndarray | None) -> np.ndarray:
    if settings.method in ("co_teaching", "jocor"):
        return np.ones(z1.shape[:2], bool)
    candidates = z1.argmax(-1) != z2.argmax(-1)  # of the first NaN, if any
    if sample_ids is not None:
        for g in range(len(candidates)):
            rows = np.flatnonzero(candidates[g])
            lost = int((sample_ids[g, rows] == 0).sum())
            candidates[g, rows[len(rows) - lost :]] = False
    return candidates


class Twins(NamedTuple):
    losses: np.ndarray  # [2, groups]
    kept: np.ndarray  # [2, groups, rows]
    coefficients: np.ndarray  # [2, groups, rows]


def twin_loss(
    z1: np.ndarray,
    z2: np.ndarray,
    labels: np.ndarray,
    settings: Settings,
    rates: np.ndarray,
    step: int = 0,
    sample_ids: np.ndarray | None = None,
    order_by: np.ndarray | None = None,
) -> Twins:
    """`order_by`: row losses [2, groups, rows] to choose rows by, where float32 must decide."""
    groups, n, classes = z1.shape
    losses = row_losses(z1, z2, labels, settings)
    chosen_by = losses if order_by is None else order_by
    candidates = candidates_of(z1, z2, settings, sample_ids)
    kept, coefficients = np.zeros((2, groups, n), bool), np.zeros((2, groups, n))
    totals = np.zeros((2, groups))
    for g in range(groups):
        count, rate, weights = int(candidates[g].sum()), 1.0 - float(rates[g]), np.ones(n)
        k = keep_count(rate, count)
        if settings.method == "decoupling":
            k, divisor = count, float(max(settings.parameter * n if settings.released else 1, count))
            if settings.released:
                weights = n / (classes * np.bincount(labels[g], minlength=classes)[labels[g]])
        elif settings.of_probabilities and count == 0:
            k, divisor = 0, float(n)
        elif settings.released and settings.method != "jocor":
            k = k or count
            divisor = float(k) ** 2
        else:
            k = min(1, count) if not settings.released and k == 0 and rate > 0 else k
            divisor = float(k)
        for network in range(2):
            rows = order(chosen_by[1 - network, g], candidates[g])[:k]
            if settings.of_probabilities and count == 0 and step < 5000:
                rows = np.arange(n)
            kept[network, g, rows] = True
            coefficients[network, g, rows] = weights[rows] / divisor if len(rows) else 0
            totals[network, g] = (coefficients[network, g, rows] * losses[network, g, rows]).sum()
            if settings.method == "jocor" and settings.released and k == 0:
                totals[network, g] = np.nan
    return Twins(totals, kept, coefficients)


def gradients(
    z1: np.ndarray, z2: np.ndarray, labels: np.ndarray, settings: Settings, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By the logits, of the sum over rows of scales[network] * the row's loss; of JoCoR's one loss: scales[0]."""
    target = np.arange(z1.shape[-1]) == labels[..., None]
    logs = [log_softmax(z.astype(np.float64)) for z in (z1, z2)]
    p, q = np.exp(logs[0]), np.exp(logs[1])
    if settings.method == "jocor":
        with np.errstate(invalid="ignore"):
            d = np.where((p == 0) & (q == 0), 0, logs[0] - logs[1])
        share, scale = settings.parameter, scales[0][..., None]
        first = (1 - share) * (p - target) + share * (p * (d - (p * d).sum(-1, keepdims=True)) + p - q)
        second = (1 - share) * (q - target) + share * (q * ((q * d).sum(-1, keepdims=True) - d) + q - p)
        return first * scale, second * scale
    found = []
    for s, scale in zip((p, q), scales, strict=True):
        if settings.of_probabilities:
            by_probability = np.exp(log_softmax(s)) - target
            found.append(scale[..., None] * s * (by_probability - (s * by_probability).sum(-1, keepdims=True)))
        else:
            found.append(scale[..., None] * (s - target))
    return found[0], found[1]
