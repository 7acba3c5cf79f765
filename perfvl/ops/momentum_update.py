"""The exponential moving average of a momentum encoder: every tensor in one pass, in place, in any mix of dtypes.

Top to bottom: the public function, its checks, the torch op with its fake.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import LIBRARY, as_list, bad_type, bad_value, same_device
from perfvl.reference import momentum_update as reference

Momentum = float | Tensor
_FUSED = (torch.float32, torch.bfloat16, torch.float16)


def momentum_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: Momentum,
    *,
    copies: Sequence[Tensor] | None = None,
    strict: str | None = None,
) -> None:
    r"""Momentum update, in place: :math:`t \leftarrow m\,t + (1 - m)\,s` for every pair of tensors, in one pass.

    Replaces ``t.data = t.data * m + s.data * (1 - m)`` per tensor (MoCo, He et al. 2020, arXiv:1911.05722, eq. 2;
    BriVL, arXiv:2103.06561, eq. 1-2), ``mul_().add_()`` and ``torch._foreach_lerp_``.

    Args:
        targets: tensors to update: the momentum encoder's. A tensor listed twice with the same source is updated once.
        sources: one tensor for each target, of its shape, on its device; any floating dtype (float32 targets may follow
            bfloat16 sources). Where a target is not floating-point (``num_batches_tracked``) it becomes a copy of its
            source, which must have its dtype.
        momentum: m in [0, 1], dimensionless: a float, or a float32 or float64 tensor with one element on the targets'
            device, read there (no host sync, fit for CUDA graphs; its range is not checked).
        copies: one tensor for each target, of its shape, that receives the new target rounded to its own dtype in the
            same pass: the bfloat16 weights of a key encoder whose average is kept in float32.
        strict: "moco" evaluates MoCo's convex form with its three roundings, bit for bit.

    The average is a linear interpolation in float32, rounded once to the target's dtype: exact for m = 0 (a copy), for
    m = 1 and for frozen tensors (t = s), which the convex form lets drift. bfloat16 or float16 targets stall where
    (1 - m) |s - t| is below half an ulp of t (at m = 0.999 and bfloat16, whenever t and s differ by less than a factor
    of 3): keep averages in float32. Any strides; pairs whose strides differ, or that are not dense, take a slower way.
    float64 runs the plain PyTorch reference. Gradients are not recorded; version counters of targets and copies rise.

    Raises:
        TypeError: an argument of the wrong type, a complex tensor, an integer target with a source of another dtype.
        ValueError: lists of different lengths; a pair with different shapes or devices; targets that share memory;
            m outside [0, 1]; unknown ``strict``. Nothing is modified then.

    Cost: per element one read of target and source and one write of the target: 12 bytes in float32, where MoCo's
    expression moves 28; 10 with bfloat16 sources; 2 more for a bfloat16 copy.

    Example:
        >>> import torch
        >>> model, average = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        >>> momentum_update_(list(average.parameters()), list(model.parameters()), 0.999)
    """
    number, tensor = _split_momentum(momentum)
    if strict not in (None, "moco"):
        bad_value("momentum_update_", "strict", repr(strict), 'None or "moco"')
    convex = strict == "moco"
    targets = as_list("momentum_update_", "targets", targets)
    sources = as_list("momentum_update_", "sources", sources)
    copies = [] if copies is None else as_list("momentum_update_", "copies", copies)
    fused = _runs_fused(targets, tensor)
    with torch.no_grad():
        if fused and not torch.compiler.is_compiling():
            try:
                _update(targets, sources, number, tensor, copies, convex)
                return
            except RuntimeError:
                pass  # the kernel wrote nothing: some pair is a mistake, or not for one flat pass
        check(targets, sources, momentum, copies)
        flat: tuple[list[Tensor], ...] = ([], [], [])
        for i in _untied(targets, sources):
            target, source, copied = targets[i], sources[i], copies[i : i + 1]
            if fused and _is_flat(target, source, copied):
                for tensors, more in zip(flat, ([target], [source], copied), strict=True):
                    tensors += more
                continue
            m = number if tensor is None else tensor
            target.copy_(reference.momentum_update(target, source, m, convex=convex))
            for copy in copied:
                copy.copy_(target)
        if flat[0]:
            _update(flat[0], flat[1], number, tensor, flat[2], convex)


def _split_momentum(momentum: Momentum) -> tuple[float, Tensor | None]:
    if isinstance(momentum, Tensor):
        if momentum.dtype not in (torch.float32, torch.float64):
            bad_type("momentum_update_", "momentum", momentum.dtype, "a float32 or float64 tensor")
        if momentum.numel() != 1:
            bad_value("momentum_update_", "momentum", f"shape {tuple(momentum.shape)}", "a float or one element")
        return 0.0, momentum.reshape(())
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        bad_type("momentum_update_", "momentum", type(momentum).__name__, "a float or a tensor with one element")
    if not 0.0 <= momentum <= 1.0:
        bad_value("momentum_update_", "momentum", momentum, "a number in [0, 1]")
    return float(momentum), None


def _runs_fused(targets: list[Tensor], momentum: Tensor | None) -> bool:
    """Whether this device has a kernel. Anything that is not a tensor is left to `check`."""
    first = targets[0] if targets else None
    if not isinstance(first, Tensor) or backends.choose(first, cuda="native") == "reference":
        return False
    return momentum is None or momentum.device == first.device


def check(targets: list[Tensor], sources: list[Tensor], momentum: Momentum, copies: list[Tensor]) -> None:
    """Raises for what `momentum_update_` does not take."""
    op = "momentum_update_"
    for name, tensors in (("sources", sources), ("copies", copies)):
        if len(tensors) != len(targets) and (name == "sources" or tensors):
            bad_value(op, name, f"{len(tensors)} tensors", f"one for each of the {len(targets)} targets")
    for name, tensors in (("targets", targets), ("sources", sources), ("copies", copies)):
        for i, value in enumerate(tensors):
            where = f"{name}[{i}]"
            if not isinstance(value, Tensor):
                bad_type(op, where, type(value).__name__, "a torch.Tensor")
            if value.is_complex():
                bad_type(op, where, value.dtype, "a real tensor")
            if value.layout is not torch.strided:
                bad_type(op, where, value.layout, "a dense (strided) tensor")
            if value.shape != targets[i].shape:
                bad_value(op, where, f"shape {tuple(value.shape)}", f"the target's shape {tuple(targets[i].shape)}")
            if value.device != targets[0].device:
                bad_value(op, where, f"device {value.device}", f"the first target's device {targets[0].device}")
            if name != "sources" and any(n > 1 and s == 0 for n, s in zip(value.shape, value.stride(), strict=True)):
                bad_value(op, where, "an expanded tensor", "a tensor with memory for every element")
            if not targets[i].is_floating_point() and value.dtype != targets[i].dtype:
                bad_type(op, where, value.dtype, f"the target's dtype {targets[i].dtype}")
            if targets[i].is_floating_point() and not value.is_floating_point():
                bad_type(op, where, value.dtype, "a floating-point tensor, as its target")
    if isinstance(momentum, Tensor) and targets and momentum.device != targets[0].device:
        bad_value(op, "momentum", f"device {momentum.device}", f"the targets' device {targets[0].device}")
    untied = _untied(targets, sources)
    _check_apart("targets", [targets[i] for i in untied])
    _check_apart("copies", [copies[i] for i in untied] if copies else [])


def _untied(targets: list[Tensor], sources: list[Tensor]) -> list[int]:
    """The indices to update: of pairs that repeat one another (tied parameters) the first alone."""
    if torch.compiler.is_compiling():  # no addresses while tracing: the kernel refuses tied targets when it runs
        return list(range(len(targets)))
    first: dict[object, int] = {}
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        first.setdefault((_place(target), _place(source)) if target.numel() else i, i)
    return list(first.values())


def _place(t: Tensor) -> tuple:
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def _check_apart(name: str, tensors: list[Tensor]) -> None:
    """Refuses tensors whose memory overlaps, except interleaved views such as the columns of one matrix."""
    if torch.compiler.is_compiling():
        return
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel() and _is_dense(t))
    for (_, end), (begin, _) in itertools.pairwise(ranges):
        if begin < end:
            bad_value("momentum_update_", name, "tensors that share memory", "each element once, or equal pairs")


def _is_dense(t: Tensor) -> bool:
    """Whether a tensor without repeated elements has no gaps between them."""
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 == t.numel()


def _is_flat(target: Tensor, source: Tensor, copies: list[Tensor]) -> bool:
    """Whether the kernel can take the tensors as flat memory: dense, in the same order, of its dtypes."""
    tensors = (target, source, *copies)
    if any(t.dtype not in _FUSED for t in tensors):
        return False
    return target.numel() == 0 or (_is_dense(target) and all(_steps(t) == _steps(target) for t in tensors))


def _steps(t: Tensor) -> list[int]:
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1]


def _update(
    targets: list[Tensor],
    sources: list[Tensor],
    number: float,
    tensor: Tensor | None,
    copies: list[Tensor],
    convex: bool,
) -> None:
    _OP(targets, sources, number, tensor, copies, convex)
    # The op writes through raw pointers, of which autograd's version counters know nothing.
    torch.autograd.graph.increment_version(targets + copies if copies else targets)


LIBRARY.define(
    "momentum_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, Tensor? momentum_tensor, "
    "Tensor(b!)[] copies, bool convex) -> ()"
)
_OP = torch.ops.perfvl.momentum_update_.default


@torch.library.register_fake("perfvl::momentum_update_", lib=LIBRARY)
def _fake(targets, sources, momentum, momentum_tensor, copies, convex):
    same_device(*targets, *sources, *copies, momentum_tensor)
