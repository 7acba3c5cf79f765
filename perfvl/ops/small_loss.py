"""Small-loss selection for training on noisy labels, and the losses of two networks that select rows for one another.

Top to bottom: the public functions, their checks, autograd, the torch ops with their fakes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import (
    LIBRARY,
    bad_type,
    bad_value,
    check_float,
    check_floating,
    check_name,
    refuse_second_derivative,
)
from perfvl.reference import small_loss as reference

Rate = float | Tensor
_METHODS = {"decoupling": 0, "co_teaching": 1, "co_teaching_plus": 2, "jocor": 3}


class TwinLoss(NamedTuple):
    """What the losses of two networks return."""

    loss1: Tensor
    """[...] float32: the loss of network 1. Its gradient reaches `logits1` alone (JoCoR: both)."""
    loss2: Tensor
    """[...] float32: the loss of network 2."""
    kept1: Tensor
    """[..., n] bool: the rows that train network 1; Co-teaching: those that network 2 chose."""
    kept2: Tensor
    """[..., n] bool: the rows that train network 2."""

    def label_precision(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of clean rows among the rows that train each network [...]; NaN where none does.

        `clean`: [..., n] bool, True where the label is right (known for synthetic noise only). In Co-teaching the
        precision of network 1's own choice ("pure ratio 1") is the second number.
        """
        first, second = ((kept & clean).sum(-1) / kept.sum(-1) for kept in (self.kept1, self.kept2))
        return first, second


def small_loss_mask(losses: Tensor, keep_rate: Rate, *, candidates: Tensor | None = None) -> Tensor:
    r"""The :math:`\lfloor \text{keep\_rate} \cdot n \rfloor` smallest of n losses, as a mask.

    Replaces ``argsort`` on the CPU and a gather (Co-teaching, Han et al. 2018, arXiv:1804.06872, and its successors),
    without a sort.

    Args:
        losses: [..., n]; every row of the leading dimensions is a selection of its own (several models or seeds at
            once).
        keep_rate: share to keep, in [0, 1]: a float, or a float32 or float64 tensor with one element or one for each
            selection [...], on the device of the losses, read there (no host sync; its range is not checked: the count
            is clamped).
        candidates: [..., n] bool; only these rows are ranked and counted.

    Returns:
        bool [..., n]. The count is ``int(keep_rate * n)`` in float64, as Python has it; ties go to the lower row, -0 is
        0, NaN comes last. The same on every device.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; a float outside [0, 1].

    Cost: a few passes over 4 n bytes, O(n). float64 losses run the plain PyTorch reference.

    Example:
        >>> import torch
        >>> small_loss_mask(torch.tensor([3.0, 1.0, 2.0, 5.0]), 0.5)
        tensor([False,  True,  True, False])
    """
    op = "small_loss_mask"
    check_floating(op, "losses", losses)
    if losses.dim() == 0:
        bad_value(op, "losses", "0 dimensions", "[..., n]")
    _check_rate(op, "keep_rate", keep_rate, losses, losses.shape[:-1])
    if candidates is not None:
        _check_rows(op, "candidates", candidates, torch.bool, losses.shape, losses)
    if losses.requires_grad:
        losses = losses.detach()
    if losses.dtype == torch.float64 or losses.numel() == 0 or backends.choose(losses, cuda="native") == "reference":
        return reference.small_loss_mask(losses, _shaped(keep_rate, losses.shape[:-1]), candidates)
    number, numbers = _split(keep_rate)
    if losses.dim() <= 2:
        return _MASK(losses, number, numbers, candidates)
    rows = losses.shape[-1]
    counted = None if candidates is None else candidates.reshape(-1, rows)
    return _MASK(losses.reshape(-1, rows), number, numbers, counted).view(losses.shape)


def decoupling_loss(
    logits1: Tensor, logits2: Tensor, labels: Tensor, *, min_batch_fraction: float = 0.1, mode: str = "paper"
) -> TwinLoss:
    r"""Decoupling, "update by disagreement": :math:`L_j = \frac{1}{|D|} \sum_{i \in D} \text{CE}_j(i)`, with D the rows
    whose two predictions differ (Malach & Shalev-Shwartz 2017, arXiv:1706.02613, algorithm 1).

    Args:
        logits1, logits2: [..., n, K] of the two networks, in one dtype; leading dimensions are batches of their own.
            Each receives the gradient of its own loss.
        labels: [..., n] int64 in [0, K).
        min_batch_fraction: of n, the least number of rows that ``mode="reference"`` divides by.
        mode: "paper", or "reference" as the authors' code: rows weighted by n / (K #class of their label in the batch),
            divided by max(`min_batch_fraction` n, \|D\|).

    Returns:
        :class:`TwinLoss`. Where D is empty the losses are 0, with zero gradients. Two equal networks never disagree.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; no classes; labels outside [0, K) where they are on the CPU (on
            a GPU the loss of such a row is NaN); unknown mode; n = 0 where the mode cannot divide by it.
        RuntimeError: on backward through the gradient (second order).

    Computed in float32 whatever the logits' dtype; float64 runs the plain PyTorch reference. Rejected rows get a
    gradient of exactly 0. A NaN logit is the largest, as in ``torch.argmax``.

    Cost: reads both networks' logits once forward and, of rows that are kept, once backward; saves no softmax.

    Example:
        >>> import torch
        >>> logits1, logits2 = torch.randn(2, 128, 10).unbind()
        >>> labels = torch.randint(10, (128,))
        >>> out = decoupling_loss(logits1.requires_grad_(), logits2.requires_grad_(), labels)
        >>> (out.loss1 + out.loss2).backward()
    """
    op = "decoupling_loss"
    check_float(op, "min_batch_fraction", min_batch_fraction)
    if not 0.0 <= min_batch_fraction <= 1.0:
        bad_value(op, "min_batch_fraction", min_batch_fraction, "a number in [0, 1]")
    return _evaluate(
        op, "decoupling", mode, logits1, logits2, labels, 0.0, "min_batch_fraction", float(min_batch_fraction)
    )


def co_teaching_loss(
    logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: Rate, *, mode: str = "paper"
) -> TwinLoss:
    r"""Co-teaching: each network learns from the rows of smallest loss in the other,
    :math:`L_1 = \frac{1}{k} \sum_{i \in I_2} \text{CE}_1(i)` and
    :math:`L_2 = \frac{1}{k} \sum_{i \in I_1} \text{CE}_2(i)`, with :math:`I_j` the
    :math:`k = \lfloor (1 - \text{forget\_rate})\, n \rfloor` rows of smallest :math:`\text{CE}_j`
    (Han et al. 2018, arXiv:1804.06872, algorithm 1).

    Args:
        logits1, logits2: [..., n, K] of the two networks, in one dtype; leading dimensions are batches of their own.
            Each receives the gradient of its own loss.
        labels: [..., n] int64 in [0, K).
        forget_rate: in [0, 1]: a float, or a float32 or float64 tensor with one element or one for each batch [...],
            on the device of the logits, read there (no host sync, fit for CUDA graphs; its range is not checked). See
            :func:`perfvl.schedules.forget_rate`.
        mode: "paper", or "reference" as the authors' code, which divides by k twice and keeps all rows where k = 0.

    Returns:
        :class:`TwinLoss`; ``kept1`` is network 2's choice. k is evaluated in float64 as Python's
        ``int((1 - forget_rate) * n)``, but at least 1 where forget_rate < 1; ties go to the lower row, NaN losses come
        last. At forget_rate = 1 nothing is kept and the losses are 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; n = 0 or K = 0; a forget rate outside [0, 1]; labels outside
            [0, K) where they are on the CPU (on a GPU the loss of such a row is NaN); unknown mode.
        RuntimeError: on backward through the gradient (second order).

    Computed in float32 whatever the logits' dtype, by the same operations on every device, so that all choose alike;
    float64 runs the plain PyTorch reference. Rejected rows get a gradient of exactly 0. The choice is made within the
    batch given: under data parallelism within each process's own. The two losses have graphs of their own:
    ``loss1.backward()`` and ``loss2.backward()`` may come in any order, or as one sum.

    Cost: reads both networks' logits once forward and, of rows that are kept, once backward; saves no softmax.

    Example:
        >>> import torch
        >>> logits1, logits2 = torch.randn(2, 128, 10).unbind()
        >>> out = co_teaching_loss(logits1.requires_grad_(), logits2, torch.randint(10, (128,)), 0.2)
        >>> out.loss1.backward()
        >>> int(out.kept1.sum())
        102
    """
    return _evaluate("co_teaching_loss", "co_teaching", mode, logits1, logits2, labels, forget_rate)


def co_teaching_plus_loss(
    logits1: Tensor,
    logits2: Tensor,
    labels: Tensor,
    forget_rate: Rate,
    *,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    mode: str = "paper",
) -> TwinLoss:
    r"""Co-teaching+: :func:`co_teaching_loss` among the rows D whose two predictions differ,
    :math:`k = \lfloor (1 - \text{forget\_rate})\, |D| \rfloor` (Yu et al. 2019, arXiv:1901.04215, algorithm 1).

    The recipe runs :func:`co_teaching_loss` for the first epochs. Arguments, dtypes, errors and cost are those of
    :func:`co_teaching_loss`, and:

    Args:
        step: read by ``mode="reference"`` alone: the number that the authors' code compares with 5,000 where D is empty
            (it passes epoch * batch index): an int, or a one-element int64 tensor on the device of the logits. None is
            0.
        sample_ids: read by ``mode="reference"`` alone: [..., n] int64, the rows' positions in the data set. The code
            loses one row, the last of D, for each row of D with id 0.
        mode: "paper" (where D is empty the losses are 0, with zero gradients), or "reference": cross-entropy of
            probabilities (a softmax too many), divided by k twice; all of D where k = 0; where D is empty the mean over
            all rows while step < 5000, then 0.

    Example:
        >>> import torch
        >>> logits1, logits2 = torch.randn(2, 128, 10).unbind()
        >>> out = co_teaching_plus_loss(logits1, logits2, torch.randint(10, (128,)), 0.2)
    """
    op = "co_teaching_plus_loss"
    if isinstance(step, Tensor):
        if step.dtype != torch.int64:
            bad_type(op, "step", step.dtype, "an int or an int64 tensor with one element")
        if step.numel() != 1:
            bad_value(op, "step", f"shape {tuple(step.shape)}", "an int or an int64 tensor with one element")
    elif step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        bad_type(op, "step", type(step).__name__, "an int or an int64 tensor with one element")
    elif step is not None and not -(2**63) <= step < 2**63:
        bad_value(op, "step", step, "a number of 64 bits")
    return _evaluate(
        op,
        "co_teaching_plus",
        mode,
        logits1,
        logits2,
        labels,
        forget_rate,
        step=0 if step is None else step,
        sample_ids=sample_ids,
    )


def jocor_loss(
    logits1: Tensor, logits2: Tensor, labels: Tensor, forget_rate: Rate, *, co_lambda: float, mode: str = "paper"
) -> TwinLoss:
    r"""JoCoR: :math:`L = \frac{1}{k} \sum_{i \in I} l_i` with one choice I for both networks, the k rows of smallest
    :math:`l_i = (1-\lambda)(\text{CE}_1 + \text{CE}_2) + \lambda\,[KL(p \| q) + KL(q \| p)]`
    (Wei et al. 2020, arXiv:2003.02752, eq. 2-6).

    Arguments, dtypes, errors and cost are those of :func:`co_teaching_loss`, and:

    Args:
        co_lambda: in [0, 1]: the weight of agreement. The authors use 0.9 on CIFAR-10, 0.85 on CIFAR-100.
        mode: "paper", or "reference" as the authors' code: k may be 0, and the loss is then NaN.

    Returns:
        :class:`TwinLoss` whose two losses are one, and whose two masks are one: call backward through one of them.

    Example:
        >>> import torch
        >>> logits1, logits2 = torch.randn(2, 128, 10).unbind()
        >>> out = jocor_loss(logits1.requires_grad_(), logits2, torch.randint(10, (128,)), 0.2, co_lambda=0.9)
        >>> out.loss1.backward()
    """
    op = "jocor_loss"
    check_float(op, "co_lambda", co_lambda)
    if not 0.0 <= co_lambda <= 1.0:
        bad_value(op, "co_lambda", co_lambda, "a number in [0, 1]")
    return _evaluate(op, "jocor", mode, logits1, logits2, labels, forget_rate, "co_lambda", float(co_lambda))


def _evaluate(
    op: str,
    method: str,
    mode: str,
    logits1: Tensor,
    logits2: Tensor,
    labels: Tensor,
    forget_rate: Rate,
    parameter: str = "",
    value: float = 0.0,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
) -> TwinLoss:
    released = mode == "reference"
    _check(op, method, mode, logits1, logits2, labels, forget_rate, step, sample_ids)
    if not released:
        sample_ids = None
    shape = logits1.shape
    if logits1.dtype == torch.float64 or logits1.numel() == 0 or _runs_reference(logits1):
        _check_labels(op, labels, shape[-1])
        options: dict[str, Any] = {parameter: value} if parameter else {}
        leading = shape[:-2]
        return TwinLoss(
            *reference.twin_loss(
                logits1,
                logits2,
                labels,
                method=method,
                released=released,
                forget_rate=_shaped(forget_rate, leading),
                step=step.reshape(()) if isinstance(step, Tensor) else step,
                sample_ids=sample_ids,
                **options,
            )
        )
    flat = len(shape) > 3
    if flat:  # the kernels know one dimension of batches
        logits1, logits2 = logits1.reshape(-1, *shape[-2:]), logits2.reshape(-1, *shape[-2:])
        labels = labels.reshape(-1, shape[-2])
        sample_ids = None if sample_ids is None else sample_ids.reshape(-1, shape[-2])
    rate, rates = _split(forget_rate)
    number, tensor = (0, step) if isinstance(step, Tensor) else (step, None)
    code = _METHODS[method]
    settings = (code, released, value)
    with torch.no_grad():
        try:
            loss1, loss2, kept1, kept2, coefficients, stats = _TWIN(
                logits1, logits2, labels, *settings, rate, rates, number, tensor, sample_ids
            )
        except RuntimeError:
            _check_labels(op, labels, shape[-1])
            raise
    joint = method == "jocor"
    if torch.is_grad_enabled():
        saved = (labels, coefficients, stats)
        if joint:
            if logits1.requires_grad or logits2.requires_grad:
                loss1 = _Joint.apply(logits1, logits2, (loss1, saved, settings))
        else:
            if logits1.requires_grad:
                loss1 = _First.apply(logits1, (loss1, saved, settings))
            if logits2.requires_grad:
                loss2 = _Second.apply(logits2, (loss2, saved, settings))
    if flat:
        loss1, loss2 = loss1.view(shape[:-2]), loss2.view(shape[:-2])
        kept1, kept2 = kept1.view(shape[:-1]), kept2.view(shape[:-1])
    return TwinLoss(loss1, loss1, kept1, kept1) if joint else TwinLoss(loss1, loss2, kept1, kept2)


def _runs_reference(logits: Tensor) -> bool:
    return backends.choose(logits, cuda="native") == "reference"


def _split(rate: Rate) -> tuple[float, Tensor | None]:
    return (0.0, rate.reshape(-1)) if isinstance(rate, Tensor) else (float(rate), None)


def _shaped(rate: Rate, leading: torch.Size) -> Rate:
    return rate.reshape(leading if rate.numel() != 1 else ()) if isinstance(rate, Tensor) else rate


def _check(
    op: str,
    method: str,
    mode: str,
    logits1: Tensor,
    logits2: Tensor,
    labels: Tensor,
    forget_rate: Rate,
    step: int | Tensor,
    sample_ids: Tensor | None,
) -> None:
    for name, logits in (("logits1", logits1), ("logits2", logits2)):
        check_floating(op, name, logits)
    shape = logits1.shape
    if len(shape) < 2:
        bad_value(op, "logits1", f"shape {tuple(shape)}", "[..., n, K]")
    if logits2.shape != shape:
        bad_value(op, "logits2", f"shape {tuple(logits2.shape)}", f"that of logits1, {tuple(shape)}")
    if logits2.dtype != logits1.dtype:
        bad_type(op, "logits2", logits2.dtype, f"that of logits1, {logits1.dtype}")
    if logits2.device != logits1.device:
        bad_value(op, "logits2", f"device {logits2.device}", f"that of logits1, {logits1.device}")
    _check_rows(op, "labels", labels, torch.int64, shape[:-1], logits1)
    check_name(op, "mode", mode, ("paper", "reference"))
    if shape[-1] == 0:
        bad_value(op, "logits1", f"shape {tuple(shape)}", "at least one class")
    if shape[-2] == 0 and (method in ("co_teaching", "jocor") or mode == "reference"):
        bad_value(op, "logits1", f"shape {tuple(shape)}", "at least one row: a mean of none is undefined")
    _check_rate(op, "forget_rate", forget_rate, logits1, shape[:-2])
    if isinstance(step, Tensor) and step.device != logits1.device:
        bad_value(op, "step", f"device {step.device}", f"the device of the logits, {logits1.device}")
    if sample_ids is not None:
        _check_rows(op, "sample_ids", sample_ids, torch.int64, shape[:-1], logits1)


def _check_rows(op: str, name: str, value: object, dtype: torch.dtype, shape: torch.Size, beside: Tensor) -> None:
    if not isinstance(value, Tensor):
        bad_type(op, name, type(value).__name__, "a torch.Tensor")
    if value.dtype != dtype:
        bad_type(op, name, value.dtype, f"{dtype}")
    if value.shape != shape:
        bad_value(op, name, f"shape {tuple(value.shape)}", f"{tuple(shape)}: one for each row")
    if value.device != beside.device:
        bad_value(op, name, f"device {value.device}", f"{beside.device}, as the other tensors")


def _check_rate(op: str, name: str, value: object, beside: Tensor, leading: torch.Size) -> None:
    if isinstance(value, float):  # the case of every step
        if not 0.0 <= value <= 1.0:
            bad_value(op, name, value, "a number in [0, 1]")
    elif isinstance(value, Tensor):
        if value.dtype not in (torch.float32, torch.float64):
            bad_type(op, name, value.dtype, "a float, or a float32 or float64 tensor")
        if value.numel() != 1 and value.shape != leading:
            bad_value(op, name, f"shape {tuple(value.shape)}", f"one element, or one for each of {tuple(leading)}")
        if value.device != beside.device:
            bad_value(op, name, f"device {value.device}", f"{beside.device}, as the other tensors")
    elif isinstance(value, bool) or not isinstance(value, int):
        bad_type(op, name, type(value).__name__, "a float, or a float32 or float64 tensor")
    elif value not in (0, 1):
        bad_value(op, name, value, "a number in [0, 1]")


def _check_labels(op: str, labels: Tensor, classes: int) -> None:
    """On the CPU, where looking costs no synchronisation."""
    if labels.numel() == 0 or not labels.is_cpu or torch.compiler.is_compiling():
        return
    least, most = (int(t) for t in labels.aminmax())
    if least < 0 or most >= classes:
        bad_value(op, "labels", least if least < 0 else most, f"classes in [0, {classes})")


class _First(torch.autograd.Function):
    """The loss of network 1: a graph of its own, so that either loss may be differentiated alone.

    What backward needs comes in one tuple: `apply` takes half a microsecond for every argument.
    """

    @staticmethod
    def forward(ctx, logits, given):
        loss, saved, ctx.settings = given
        ctx.save_for_backward(logits, *saved)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        logits, *saved = ctx.saved_tensors
        grad, _ = _BACKWARD(upstream, None, logits, None, *saved, *ctx.settings, True, False)
        return *refuse_second_derivative("small_loss", [grad], [logits]), None


class _Second(_First):
    """The loss of network 2."""

    @staticmethod
    def backward(ctx, upstream):
        logits, *saved = ctx.saved_tensors
        _, grad = _BACKWARD(None, upstream, None, logits, *saved, *ctx.settings, False, True)
        return *refuse_second_derivative("small_loss", [grad], [logits]), None


class _Joint(torch.autograd.Function):
    """JoCoR's one loss."""

    @staticmethod
    def forward(ctx, logits1, logits2, given):
        loss, saved, ctx.settings = given
        ctx.save_for_backward(logits1, logits2, *saved)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        logits1, logits2, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        found = _BACKWARD(upstream, None, logits1, logits2, *saved, *ctx.settings, *needed)
        grads = [grad if need else None for grad, need in zip(found, needed, strict=True)]
        return *refuse_second_derivative("small_loss", grads, [logits1, logits2]), None


LIBRARY.define("small_loss_mask(Tensor losses, float keep_rate, Tensor? keep_rates, Tensor? candidates) -> Tensor")
LIBRARY.define(
    "twin_loss(Tensor logits1, Tensor logits2, Tensor labels, int method, bool released, float parameter, "
    "float forget_rate, Tensor? forget_rates, int step, Tensor? step_tensor, Tensor? sample_ids) "
    "-> (Tensor loss1, Tensor loss2, Tensor kept1, Tensor kept2, Tensor coefficients, Tensor stats)"
)
LIBRARY.define(
    "twin_loss_backward(Tensor? upstream1, Tensor? upstream2, Tensor? logits1, Tensor? logits2, Tensor labels, "
    "Tensor coefficients, Tensor stats, int method, bool released, float parameter, bool need1, bool need2) "
    "-> (Tensor grad1, Tensor grad2)"
)
_MASK = torch.ops.perfvl.small_loss_mask.default
_TWIN = torch.ops.perfvl.twin_loss.default
_BACKWARD = torch.ops.perfvl.twin_loss_backward.default


@torch.library.register_fake("perfvl::small_loss_mask", lib=LIBRARY)
def _fake_mask(losses, keep_rate, keep_rates, candidates):
    return torch.empty(losses.shape, dtype=torch.bool, device=losses.device)


@torch.library.register_fake("perfvl::twin_loss", lib=LIBRARY)
def _fake_twin(
    logits1,
    logits2,
    labels,
    method,
    released,
    parameter,
    forget_rate,
    forget_rates,
    step,
    step_tensor,
    sample_ids,
):
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits1.device)

    *leading, rows, _ = logits1.shape
    return (
        empty(*leading),
        empty(*leading),
        empty(*leading, rows, dtype=torch.bool),
        empty(*leading, rows, dtype=torch.bool),
        empty(2, *leading, rows),
        empty(2, *leading, rows, 3),
    )


@torch.library.register_fake("perfvl::twin_loss_backward", lib=LIBRARY)
def _fake_backward(
    upstream1,
    upstream2,
    logits1,
    logits2,
    labels,
    coefficients,
    stats,
    method,
    released,
    parameter,
    need1,
    need2,
):
    like = logits2 if logits1 is None else logits1

    def gradient(needed: bool) -> Tensor:
        return torch.empty(like.shape if needed else (0,), dtype=like.dtype, device=like.device)

    return gradient(need1), gradient(need2)
