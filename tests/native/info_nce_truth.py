"""InfoNCE in float64 numpy, and how far from it a float32 kernel may be."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from native.floats import BFLOAT16, narrow, widen

EPS = 2.0**-24  # half an ulp of 1 in float32
BFLOAT16_EPS = 2.0**-8  # the same of bfloat16


class Truth(NamedTuple):
    """Per row i: values, and the sizes that errors are measured by."""

    loss: NDArray
    lse: NDArray
    positive_logit: NDArray
    positive_weight: NDArray  # 1 - P_i0, as a sum
    grad_query: NDArray
    logits: NDArray  # [B, K]
    reach: NDArray  # the largest |s| sum_c |q_ic key_c|: rounding errors of logits are proportional to it
    terms: NDArray  # [B, d] |s| (sum_j P_ij |N_jc| + w_i |k_ic|): what the gradient is a difference of


def truth(query: NDArray, positive: NDArray, queue: NDArray, scale: float, rounded: bool) -> Truth:
    """`rounded`: both products take bfloat16 operands; the positive's logit never does."""
    q, k, n = (widen(x).astype(np.float64) for x in (query, positive, queue))
    first = scale * (q * k).sum(1)
    if rounded:
        q, n = (widen(narrow(x, BFLOAT16)).astype(np.float64) for x in (q, n))
    logits = scale * q @ n.T
    top = np.maximum(first, logits.max(1, initial=-np.inf))
    exps, first_exp = np.exp(logits - top[:, None]), np.exp(first - top)
    negatives = exps.sum(1)
    with np.errstate(divide="ignore"):
        small, large = np.log1p(negatives / np.maximum(first_exp, 1e-200)), np.log(negatives) + top - first
        loss = np.where(first_exp > 1e-200, small, large)
    probability, weight = exps / (negatives + first_exp)[:, None], negatives / (negatives + first_exp)
    reach = abs(scale) * np.maximum((np.abs(q) @ np.abs(n).T).max(1, initial=0), (np.abs(q) * np.abs(k)).sum(1))
    return Truth(
        loss=loss,
        lse=loss + first,
        positive_logit=first,
        positive_weight=weight,
        grad_query=scale * (probability @ n - weight[:, None] * k),
        logits=logits,
        reach=reach,
        terms=abs(scale) * (probability @ np.abs(n) + weight[:, None] * np.abs(k)),
    )


def excess(
    got: dict[str, NDArray], true: Truth, rounded: bool, row_factor: float = 1.0, equal_terms: int = 0
) -> dict[str, float]:
    """Each output's largest error as a multiple of what is allowed: above 1 is too much, and so is NaN.

    With u = 2^-24: a logit is off by at most 3 u reach (a rounded dot product, times a rounded scale), exp by 3 u, sums
    and the rest by a few u. The loss is log1p of a sum of exps and must be that accurate relative to *itself*, however
    small it is; so must the weight and the gradient. With bfloat16 products the softmax terms are rounded to 2^-8.
    `equal_terms`: how many terms of a sum are the same number; their rounding errors add up instead of averaging out.
    """
    relative = EPS * (6 + 3 * true.reach + equal_terms)
    floor = 2.0**-124 * (1 + true.logits.shape[1])  # exp does not go below 2^-126
    allowed = {
        "loss": relative * true.loss + floor,
        "lse": relative * np.abs(true.loss) + EPS * (2 * np.abs(true.lse) + 3 * true.reach) + floor,
        "positive_logit": EPS * (1 + 3 * true.reach),
        "positive_weight": (relative * true.positive_weight + floor) * row_factor,
        "grad_query": ((relative[:, None] + BFLOAT16_EPS * rounded + floor) * true.terms + floor) * row_factor,
    }
    result = {}
    for name, bound in allowed.items():
        if name in got:
            value = getattr(true, name) * (row_factor if name in ("positive_weight", "grad_query") else 1.0)
            ratio = np.abs(got[name] - value) / bound
            result[name] = float(np.where(np.isnan(ratio), np.inf, ratio).max(initial=0))
    if "rank" in got:
        margin = (EPS * (2 + 6 * true.reach))[:, None]
        surely = (true.logits >= true.positive_logit[:, None] + margin).sum(1)
        perhaps = (true.logits >= true.positive_logit[:, None] - margin).sum(1)
        result["rank"] = 0.0 if ((surely <= got["rank"]) & (got["rank"] <= perhaps)).all() else np.inf
    return result
