"""The losses of two networks that teach one another on noisy labels, as modules."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from perfvl.functional import TwinLoss, co_teaching_loss, co_teaching_plus_loss, decoupling_loss, jocor_loss

Rate = float | Tensor
Mode = Literal["paper", "reference"]


class DecouplingLoss(nn.Module):
    """Both networks learn from the rows on which they disagree, see :func:`perfvl.functional.decoupling_loss`.

    Args:
        min_batch_fraction, mode: as there.

    Example:
        >>> import torch
        >>> logits1, logits2 = torch.randn(2, 128, 10).unbind()
        >>> out = DecouplingLoss()(logits1, logits2, torch.randint(10, (128,)))
    """

    def __init__(self, *, min_batch_fraction: float = 0.1, mode: Mode = "paper") -> None:
        super().__init__()
        _check_mode(self, mode)
        self.min_batch_fraction, self.mode = min_batch_fraction, mode

    def forward(self, logits1: Tensor, logits2: Tensor, labels: Tensor) -> TwinLoss:
        """Logits [..., n, K] of both networks and labels [..., n] -> losses and kept rows."""
        return decoupling_loss(logits1, logits2, labels, min_batch_fraction=self.min_batch_fraction, mode=self.mode)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"


class CoTeachingLoss(nn.Module):
    """Each network learns from the rows of smallest loss in the other, see :func:`perfvl.functional.co_teaching_loss`.

    Args:
        forget_rate: what calls use that give none: a float or a tensor, as there. A tensor is moved with the module and
            may be changed in place, which a captured CUDA graph sees; it is not in the state_dict.
        mode: as there.

    Raises:
        TypeError: on a call, where neither it nor the module has a forget rate.

    Example:
        >>> import torch
        >>> from perfvl.schedules import forget_rate
        >>> criterion = CoTeachingLoss()
        >>> logits1, logits2 = torch.randn(2, 128, 10).unbind()
        >>> out = criterion(logits1, logits2, torch.randint(10, (128,)), forget_rate(epoch=3, rate=0.5))
    """

    forget_rate: Rate | None

    def __init__(self, forget_rate: Rate | None = None, *, mode: Mode = "paper") -> None:
        super().__init__()
        _check_mode(self, mode)
        self.mode = mode
        if isinstance(forget_rate, Tensor):
            self.register_buffer("forget_rate", forget_rate, persistent=False)
        else:
            self.forget_rate = forget_rate

    def forward(self, logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: Rate | None = None) -> TwinLoss:
        """Logits [..., n, K] of both networks, labels [..., n], forget rate -> losses and kept rows."""
        return co_teaching_loss(logits1, logits2, labels, self._rate(forget_rate), mode=self.mode)

    def _rate(self, given: Rate | None) -> Rate:
        rate = self.forget_rate if given is None else given
        if rate is None:
            raise TypeError(f"{type(self).__name__}: `forget_rate` got None, expected one from the call or the module")
        return rate

    def _apply(self, *arguments, **keywords):
        rate = self.forget_rate
        super()._apply(*arguments, **keywords)
        if isinstance(rate, Tensor) and isinstance(self.forget_rate, Tensor):
            self.forget_rate = self.forget_rate.to(rate.dtype)  # .half() is for networks, not for rates
        return self

    def extra_repr(self) -> str:
        return f"forget_rate={self.forget_rate}, mode={self.mode!r}"


class CoTeachingPlusLoss(CoTeachingLoss):
    """As :class:`CoTeachingLoss`, among the rows on which the networks disagree, see
    :func:`perfvl.functional.co_teaching_plus_loss`. The recipe begins with some epochs of :class:`CoTeachingLoss`.

    Example:
        >>> import torch
        >>> logits1, logits2 = torch.randn(2, 128, 10).unbind()
        >>> out = CoTeachingPlusLoss(0.2)(logits1, logits2, torch.randint(10, (128,)))
    """

    def forward(
        self,
        logits1: Tensor,
        logits2: Tensor,
        labels: Tensor,
        forget_rate: Rate | None = None,
        *,
        step: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> TwinLoss:
        """As :meth:`CoTeachingLoss.forward`; `step` and `sample_ids` are of ``mode="reference"`` alone."""
        rate = self._rate(forget_rate)
        return co_teaching_plus_loss(logits1, logits2, labels, rate, step=step, sample_ids=sample_ids, mode=self.mode)


class JoCoRLoss(CoTeachingLoss):
    """One loss and one choice of rows for both networks, agreement included, see
    :func:`perfvl.functional.jocor_loss`.

    Args:
        co_lambda: the weight of agreement, in [0, 1].
        forget_rate, mode: as in :class:`CoTeachingLoss`.

    Example:
        >>> import torch
        >>> logits1, logits2 = torch.randn(2, 128, 10).unbind()
        >>> out = JoCoRLoss(0.9, forget_rate=0.2)(logits1, logits2, torch.randint(10, (128,)))
    """

    def __init__(self, co_lambda: float, forget_rate: Rate | None = None, *, mode: Mode = "paper") -> None:
        super().__init__(forget_rate, mode=mode)
        self.co_lambda = co_lambda

    def forward(self, logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: Rate | None = None) -> TwinLoss:
        """Logits [..., n, K] of both networks, labels [..., n], forget rate -> losses (equal) and kept rows (equal)."""
        rate = self._rate(forget_rate)
        return jocor_loss(logits1, logits2, labels, rate, co_lambda=self.co_lambda, mode=self.mode)

    def extra_repr(self) -> str:
        return f"co_lambda={self.co_lambda}, {super().extra_repr()}"


def _check_mode(module: nn.Module, mode: str) -> None:
    if mode not in ("paper", "reference"):
        raise ValueError(f'{type(module).__name__}: `mode` got {mode!r}, expected "paper" or "reference"')
