"""How many rows noisy-label training forgets, as Python floats, one per epoch, and schedules of the learning rate.

Those of the CaffeNet study are PyTorch schedulers that count iterations: call ``scheduler.step()`` after every
``optimizer.step()``. They multiply the learning rate that the optimizer was made with, 0.01 in the study, and compute
every value anew from the iteration, so that nothing is rounded 320,000 times and a scheduler resumes at any iteration.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from perfvl.ops._library import bad_type, bad_value, check_float


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


def step(optimizer: Optimizer, step_size: int = 100_000, factor: float = 0.1, *, last_iteration: int = -1) -> LambdaLR:
    r"""A learning rate that falls in steps: :math:`\eta_0 f^{\lfloor i / s \rfloor}`.

    The study's default: top-1 of the 128-pixel CaffeNet .471 after 320,000 iterations. Its exponential schedule is this
    one with steps of 2,000, a factor of 0.915 and a learning rate of 0.035: .441 after 160,000.

    Args:
        optimizer: any, with its first learning rate.
        step_size: s, iterations between steps.
        factor: f, in (0, 1].
        last_iteration: i to resume after (`last_epoch` of PyTorch's schedulers), -1 to start.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Source: Mishkin et al., Systematic evaluation of CNN advances on the ImageNet, arXiv:1606.02228.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        >>> scheduler = step(optimizer, step_size=2)
        >>> for iteration in range(4):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> round(scheduler.get_last_lr()[0], 9)
        0.0001
    """
    _check_count("step", "step_size", step_size, 1)
    _check_number("step", "factor", factor, 0.0, 1.0)
    if factor == 0:
        bad_value("step", "factor", factor, "above 0")
    return _scheduler("step", optimizer, _Step(step_size, factor), last_iteration)


def polynomial(
    optimizer: Optimizer, power: float = 1.0, iterations: int = 320_000, *, last_iteration: int = -1
) -> LambdaLR:
    r"""A learning rate that falls to 0: :math:`\eta_0 (1 - i/M)^p`, and stays there.

    The study found :func:`linear` best (top-1 of the 128-pixel CaffeNet .493), :func:`square` and :func:`square_root`
    as good as one another (.483), and steps worst (.471).

    Args:
        optimizer: any, with its first learning rate.
        power: p, a positive number.
        iterations: M, an int of at least 1.
        last_iteration: i to resume after (`last_epoch` of PyTorch's schedulers), -1 to start.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Source: Mishkin et al., Systematic evaluation of CNN advances on the ImageNet, arXiv:1606.02228.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        >>> scheduler = polynomial(optimizer, power=2, iterations=4)
        >>> optimizer.step()
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.005625]
    """
    _check_number("polynomial", "power", power, 0.0, math.inf)
    if not 0 < power < math.inf:
        bad_value("polynomial", "power", power, "a positive number")
    _check_count("polynomial", "iterations", iterations, 1)
    return _scheduler("polynomial", optimizer, _Polynomial(iterations, power), last_iteration)


def linear(optimizer: Optimizer, iterations: int = 320_000, *, last_iteration: int = -1) -> LambdaLR:
    r""":math:`\eta_0 (1 - i/M)`, see :func:`polynomial`: .493, and .466 in half the iterations (160,000)."""
    return polynomial(optimizer, 1.0, iterations, last_iteration=last_iteration)


def square(optimizer: Optimizer, iterations: int = 320_000, *, last_iteration: int = -1) -> LambdaLR:
    r""":math:`\eta_0 (1 - i/M)^2`, see :func:`polynomial`: .483."""
    return polynomial(optimizer, 2.0, iterations, last_iteration=last_iteration)


def square_root(optimizer: Optimizer, iterations: int = 320_000, *, last_iteration: int = -1) -> LambdaLR:
    r""":math:`\eta_0 \sqrt{1 - i/M}`, see :func:`polynomial`: .483."""
    return polynomial(optimizer, 0.5, iterations, last_iteration=last_iteration)


def linear_cosine(
    optimizer: Optimizer,
    iterations: int = 320_000,
    *,
    periods: float = 0.5,
    alpha: float = 0.0,
    beta: float = 0.001,
    last_iteration: int = -1,
) -> LambdaLR:
    r"""A line times a cosine: :math:`\eta_0 \left((\alpha + 1 - \frac{i}{M}) \cdot \tfrac{1}{2} (1 + \cos 2 \pi n
    \frac{i}{M}) + \beta\right)`, and from M on what it is at M.

    The CaffeNet study cites it and has no result of it. At the start it is :math:`1 + \alpha + \beta` times the
    optimizer's learning rate, and near the end smaller than either factor alone, so that it may start higher.

    Args:
        optimizer: any, with its first learning rate.
        iterations: M, an int of at least 1.
        periods: n, of the cosine; 0.5 falls once, 1.5 and so on start again, warm.
        alpha, beta: as above, at least 0.
        last_iteration: i to resume after (`last_epoch` of PyTorch's schedulers), -1 to start.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Source: Bello et al., Neural Optimizer Search with Reinforcement Learning, arXiv:1709.07417; the defaults are those
        of TensorFlow's `linear_cosine_decay`.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = linear_cosine(optimizer, iterations=2)
        >>> optimizer.step()
        >>> scheduler.step()
        >>> round(scheduler.get_last_lr()[0], 9)
        0.251
    """
    _check_count("linear_cosine", "iterations", iterations, 1)
    for name, value in (("periods", periods), ("alpha", alpha), ("beta", beta)):
        _check_number("linear_cosine", name, value, 0.0, math.inf)
        if value == math.inf:
            bad_value("linear_cosine", name, value, "a finite number")
    return _scheduler("linear_cosine", optimizer, _LinearCosine(iterations, periods, alpha, beta), last_iteration)


# Objects and not closures: LambdaLR then has their numbers in its state_dict, and they can be pickled.
@dataclasses.dataclass
class _Step:
    step_size: int
    factor: float

    def __call__(self, iteration: int) -> float:
        return self.factor ** (iteration // self.step_size)


@dataclasses.dataclass
class _Polynomial:
    iterations: int
    power: float

    def __call__(self, iteration: int) -> float:
        return max(0.0, 1 - iteration / self.iterations) ** self.power


@dataclasses.dataclass
class _LinearCosine:
    iterations: int
    periods: float
    alpha: float
    beta: float

    def __call__(self, iteration: int) -> float:
        done = min(1.0, iteration / self.iterations)
        cosine = 0.5 * (1 + math.cos(2 * math.pi * self.periods * done))
        return (self.alpha + 1 - done) * cosine + self.beta


def _scheduler(function: str, optimizer: object, factor: _Step | _Polynomial | _LinearCosine, last: int) -> LambdaLR:
    if not isinstance(optimizer, Optimizer):
        bad_type(function, "optimizer", type(optimizer).__name__, "a torch.optim.Optimizer")
    _check_count(function, "last_iteration", last, -1)
    return LambdaLR(optimizer, factor, last)


def _check_count(function: str, argument: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        bad_type(function, argument, type(value).__name__, "an int")
    if value < least:
        bad_value(function, argument, value, f"at least {least}")


def _check_number(function: str, argument: str, value: Any, low: float, high: float) -> None:
    check_float(function, argument, value)
    if not low <= value <= high:
        bad_value(function, argument, value, f"a number in [{low}, {high}]")
