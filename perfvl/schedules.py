"""Schedules of noisy-label training: how many rows to forget, and the learning rate. Python floats, one per epoch."""

from __future__ import annotations

import math
from typing import Literal

from perfvl.ops._library import bad_type, bad_value


def forget_rate(
    epoch: int, rate: float, *, gradual: int = 10, exponent: float = 1.0, mode: Literal["paper", "reference"] = "paper"
) -> float:
    r"""The share of a batch to reject: :math:`\tau \min(e^c / E_k,\ 1)`.

    Rises from 0 at epoch 0 to `rate` and stays there (Co-teaching, arXiv:1804.06872, algorithm 1 and, for c, section 4;
    JoCoR, arXiv:2003.02752). The released code of Co-teaching, Co-teaching+ and JoCoR differs: it walks from 0
    to :math:`\tau^c` in `gradual` steps that start at epoch 0, and jumps to :math:`\tau` after them. It evaluates at
    epoch 0 and trains from epoch 1 on.

    Args:
        epoch: e, an int of at least 0.
        rate: :math:`\tau` in [0, 1], usually the noise rate. JoCoR's code halves it for asymmetric noise.
        gradual: :math:`E_k`, the epochs of the rise, an int of at least 1.
        exponent: c, a positive number.
        mode: "paper", or "reference" for ``linspace(0, rate**exponent, gradual)[epoch]``, then `rate`.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Example:
        >>> [forget_rate(epoch, 0.5) for epoch in (0, 1, 5, 10, 200)]
        [0.0, 0.05, 0.25, 0.5, 0.5]
        >>> [round(forget_rate(epoch, 0.5, mode="reference"), 4) for epoch in (0, 1, 9, 10)]
        [0.0, 0.0556, 0.5, 0.5]
    """
    _check_count("forget_rate", "epoch", epoch, 0)
    _check_number("forget_rate", "rate", rate, 0.0, 1.0)
    _check_count("forget_rate", "gradual", gradual, 1)
    _check_number("forget_rate", "exponent", exponent, 0.0, math.inf)
    if exponent == 0:
        bad_value("forget_rate", "exponent", exponent, "a positive number")
    if mode not in ("paper", "reference"):
        bad_value("forget_rate", "mode", repr(mode), '"paper" or "reference"')
    if mode == "paper":
        return min(epoch**exponent / gradual, 1.0) * rate
    if epoch >= gradual:
        return float(rate)
    # linspace ends on its end point exactly, and one point alone is the start.
    end = float(rate**exponent)
    if gradual == 1:
        return 0.0
    return end if epoch == gradual - 1 else epoch * (end / (gradual - 1))


def co_teaching_plus_rate(
    epoch: int, rate: float, *, gradual: int = 10, epochs: int = 200, variant: Literal[1, 2] = 2
) -> float:
    r"""Co-teaching+'s share to reject, which goes on rising: :math:`\min\!\left(\frac{e}{E_k}\tau,\
    \left(1 + \frac{e - E_k}{E_{max} - E_k}\right)\tau\right)`, clamped to [0, 1].

    Variant 2 (Co-teaching+, arXiv:1901.04215, algorithm 1) reaches :math:`2\tau` at the last epoch: for a rate
    of 0.5 nothing is kept then. Variant 1 is the plain rise of :func:`forget_rate`, what the released code runs.

    Args:
        epoch: e, an int of at least 0.
        rate: :math:`\tau` in [0, 1].
        gradual: :math:`E_k`, an int of at least 1.
        epochs: :math:`E_{max}`, an int above `gradual`.
        variant: 2, or 1 for ``min(e / gradual * rate, rate)``.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Example:
        >>> [co_teaching_plus_rate(epoch, 0.5) for epoch in (5, 10, 105, 200)]
        [0.25, 0.5, 0.75, 1.0]
    """
    _check_count("co_teaching_plus_rate", "epoch", epoch, 0)
    _check_number("co_teaching_plus_rate", "rate", rate, 0.0, 1.0)
    _check_count("co_teaching_plus_rate", "gradual", gradual, 1)
    _check_count("co_teaching_plus_rate", "epochs", epochs, gradual + 1)
    if variant not in (1, 2):
        bad_value("co_teaching_plus_rate", "variant", repr(variant), "1 or 2")
    if variant == 1:
        return forget_rate(epoch, rate, gradual=gradual)
    rising = 1 + (epoch - gradual) / (epochs - gradual)
    return min(max(min(epoch / gradual, rising) * rate, 0.0), 1.0)


def linear_decay(epoch: int, *, start: int = 80, epochs: int = 200) -> float:
    r"""The factor of the learning rate: 1 before `start`, then :math:`\frac{E_{max} - e}{E_{max} - \text{start}}`.

    The recipes of Co-teaching, Co-teaching+ and JoCoR (Adam, learning rate 1e-3, 200 epochs) also switch Adam's beta1
    from 0.9 to 0.1 at `start`, which a learning-rate scheduler does not do. `start` is 80, and 100 for CIFAR-100 in
    Co-teaching and JoCoR. From `epochs` on the factor is 0.

    Args:
        epoch: e, an int of at least 0.
        start: the epoch the decay starts from, an int of at least 0.
        epochs: :math:`E_{max}`, an int above `start`.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Example:
        >>> [linear_decay(epoch) for epoch in (0, 80, 140, 200)]
        [1.0, 1.0, 0.5, 0.0]
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_decay)
    """
    _check_count("linear_decay", "epoch", epoch, 0)
    _check_count("linear_decay", "start", start, 0)
    _check_count("linear_decay", "epochs", epochs, start + 1)
    return min(max((epochs - epoch) / (epochs - start), 0.0), 1.0)


def _check_count(function: str, argument: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        bad_type(function, argument, type(value).__name__, "an int")
    if value < least:
        bad_value(function, argument, value, f"at least {least}")


def _check_number(function: str, argument: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        bad_type(function, argument, type(value).__name__, "a float")
    if not low <= value <= high:
        bad_value(function, argument, value, f"a number in [{low}, {high}]")
