"""The momentum (key, shadow, EMA) copy of a model."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perfvl.ops.momentum_update import momentum_update_

Momentum = float | Tensor | Callable[[int], float | Tensor]
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")


class MomentumEncoder(nn.Module):
    r"""A copy of a module that follows it by :math:`t \leftarrow m\,t + (1 - m)\,s`, every tensor in one pass, see
    :func:`perfvl.functional.momentum_update_`.

    Replaces the ``for`` loop over two parameter lists of MoCo, BriVL, ALBEF and BLIP, timm's ``ModelEmaV3`` and
    ``torch.optim.swa_utils.AveragedModel``. Call :meth:`update` after the optimiser's step or, as MoCo does, after the
    query pass and before the key pass of the next one. Tensors are paired by name, once; tied tensors are updated once.

    Args:
        module: the module that is trained. It is not registered here and not in this state_dict. Wrapped in DDP or
            ``torch.compile`` before or after, it stays paired: ``module.``, ``_orig_mod.`` and
            ``_fsdp_wrapped_module.`` in names do not count. For FSDP2 make this encoder before ``fully_shard``, and
            shard the copy (``.module``) like the module: both are updated shard by shard, without communication.
        momentum: m in [0, 1], dimensionless: a float (0, or at least 0.5: a smaller one is taken for 1 - m and
            refused), a tensor with one element on the parameters' device, read there, or a schedule: a callable that
            takes the number of updates made so far and returns one or the other.
        buffers: "copy" from the module, "average" floating-point ones and copy the rest (timm), or "skip": the copy
            keeps its own (MoCo, whose key encoder runs in train mode).
        dtype: of the copy's floating-point parameters and buffers, None for those of the module. A bfloat16 or float16
            average stalls (see :func:`perfvl.functional.momentum_update_`): give a half-precision model
            ``dtype=torch.float32``.
        compute_dtype: also keep a copy in this dtype, written in the same pass, that ``__call__`` runs: a bfloat16 key
            encoder whose average is float32. It is ``compute_module``; not in the state_dict, but remade on loading.
        strict: "moco" evaluates MoCo's convex form, bit for bit.
        every_n_steps: only every n-th :meth:`update` moves the average.
        update_after_step: while fewer updates were made, :meth:`update` copies the module (m = 0).

    ``step``, the number of calls of :meth:`update`, is in the state_dict, so that schedules resume. A deep copy or
    pickle of a model that holds this encoder and its module keeps them paired; one of the encoder alone follows a copy
    of the module.

    Raises:
        TypeError: settings of the wrong type.
        ValueError: settings out of range; in :meth:`update` a name without partner, other shapes, other devices.
            Nothing is modified then.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        >>> teacher = MomentumEncoder(model, 0.99)
        >>> teacher.update()
        >>> features = teacher(torch.randn(8, 4))
    """

    module: nn.Module

    def __init__(
        self,
        module: nn.Module,
        momentum: Momentum = 0.999,
        *,
        buffers: Literal["copy", "average", "skip"] = "copy",
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        strict: Literal["moco"] | None = None,
        every_n_steps: int = 1,
        update_after_step: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            _bad(TypeError, "module", type(module).__name__, "a torch.nn.Module")
        if buffers not in ("copy", "average", "skip"):
            _bad(ValueError, "buffers", repr(buffers), '"copy", "average" or "skip"')
        if strict not in (None, "moco"):
            _bad(ValueError, "strict", repr(strict), 'None or "moco"')
        for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype)):
            if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
                _bad(TypeError, name, value, "a floating-point torch.dtype")
        for name, count, least in (("every_n_steps", every_n_steps, 1), ("update_after_step", update_after_step, 0)):
            if isinstance(count, bool) or not isinstance(count, int):
                _bad(TypeError, name, type(count).__name__, "an int")
            if count < least:
                _bad(ValueError, name, count, f"at least {least}")
        if not callable(momentum) and not isinstance(momentum, Tensor):
            if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
                _bad(TypeError, "momentum", type(momentum).__name__, "a float, a tensor or a callable")
            if not (momentum == 0 or 0.5 <= momentum <= 1):
                _bad(
                    ValueError,
                    "momentum",
                    momentum,
                    "0, or a number in [0.5, 1]: the share of the old value that stays",
                )
        self.momentum = momentum
        self._buffers_rule = buffers
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.strict = strict
        self.every_n_steps, self.update_after_step = every_n_steps, update_after_step
        self.module = _copied(module, dtype)
        self._step = torch.zeros((), dtype=torch.int64)  # not an int, on which torch.compile would specialise
        # In tuples: neither is a child, so neither is in the state_dict nor among the parameters.
        self._online = (module,)
        self._compute: tuple[nn.Module, ...] = () if compute_dtype is None else (_copied(self.module, compute_dtype),)
        self._plan: _Plan | None = None
        self.register_load_state_dict_post_hook(_remake_compute_module)

    @property
    def compute_module(self) -> nn.Module:
        """What ``__call__`` runs: the copy in `compute_dtype`, or :attr:`module` itself."""
        return self._compute[0] if self._compute else self.module

    @torch.no_grad()
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The momentum copy's output, without gradients."""
        return self.compute_module(*arguments, **keywords)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average one step towards the module as it is now."""
        if self._plan is not None:
            self._plan.reshard()
        if self._plan is None or not self._plan.is_current():
            self._plan = _Plan(self._online[0], self.module, self._compute, self._buffers_rule)
        if self.every_n_steps == 1 or self.step % self.every_n_steps == 0:
            if self.update_after_step and self.step < self.update_after_step:
                self._plan.run(0.0, None)
            else:
                self._plan.run(self.momentum(self.step) if callable(self.momentum) else self.momentum, self.strict)
        self._step.add_(1)

    @property
    def step(self) -> int:
        """How often :meth:`update` was called."""
        return int(self._step)

    def get_extra_state(self) -> Tensor:
        return self._step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self._step.copy_(state)

    def train(self, mode: bool = True) -> MomentumEncoder:
        for module in self._compute:
            module.train(mode)
        return super().train(mode)

    def _apply(self, *arguments: Any, **keywords: Any) -> MomentumEncoder:
        super()._apply(*arguments, **keywords)
        self._compute = tuple(_copied(self.module, self.compute_dtype) for _ in self._compute)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, buffers={self._buffers_rule!r}, strict={self.strict!r}"


class _Plan:
    """Which tensor follows which: made once, and again when a module has another tensor in the place of one of these.

    Tensors are held as the modules hold them, so that ``parameter.data = ...`` moves them here too.
    """

    def __init__(self, online: nn.Module, slow: nn.Module, compute: tuple[nn.Module, ...], buffers: str) -> None:
        modules = [m for module in (online, slow, *compute) for m in module.modules()]
        self._sharded = _sharded(modules)
        self.reshard()
        averaged: list[tuple[Tensor, ...]] = []  # (target, source), and the copy where there is one
        copied: list[tuple[Tensor, ...]] = []
        for kind in ("parameters",) if buffers == "skip" else ("parameters", "buffers"):
            sources, targets, *copies = (_by_name(module, kind) for module in (online, slow, *compute))
            _match(kind, targets, sources)
            tied: set[tuple[int, int]] = set()
            for name, target in targets.items():
                source = sources[name]
                if (id(target), id(source)) in tied:
                    continue
                tied.add((id(target), id(source)))
                _check_pair(name, target, source)
                average = target.is_floating_point() and (kind == "parameters" or buffers == "average")
                (averaged if average else copied).append((target, source, *(c[name] for c in copies)))
        self._averaged, self._copied = list(zip(*averaged, strict=True)), list(zip(*copied, strict=True))
        self._has_shards = any(hasattr(t, "to_local") for tensors in averaged + copied for t in tensors)
        holders: list[dict] = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self._holders, self._sizes = holders, [len(d) for d in holders]
        self._places = [(d, name) for d in holders for name in d]
        self._holder_of, self._name_of = [d for d, _ in self._places], [name for _, name in self._places]
        self._found = [d[name] for d, name in self._places]

    def reshard(self) -> None:
        """Puts shards in the place of whole parameters, which FSDP2 leaves in a root module after its forward.

        Moving those would not move the shards, which is what is saved and gathered again.
        """
        for module in self._sharded:
            module.reshard()

    def is_current(self) -> bool:
        """Whether every submodule, parameter and buffer is the object it was. Runs every step: no Python loop."""
        now = map(operator.getitem, self._holder_of, self._name_of)
        try:
            return self._sizes == list(map(len, self._holders)) and all(map(operator.is_, now, self._found))
        except KeyError:
            return False

    def run(self, momentum: float | Tensor, strict: str | None) -> None:
        if self._averaged:
            targets, sources, *copies = self._local(self._averaged)
            momentum_update_(targets, sources, momentum, copies=copies[0] if copies else None, strict=strict)
        if self._copied:
            targets, sources, *copies = self._local(self._copied)
            torch._foreach_copy_(targets, sources)
            for tensors in copies:
                torch._foreach_copy_(tensors, targets)

    def _local(self, lists: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """This rank's shards of tensors that are sharded (DTensor), other tensors as they are."""
        if not self._has_shards:
            return lists
        return [tuple(t.to_local() if hasattr(t, "to_local") else t for t in tensors) for tensors in lists]


def _sharded(modules: list[nn.Module]) -> list[Any]:
    """The modules that were given to ``fully_shard``."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in modules if isinstance(module, FSDPModule)]


def _by_name(module: nn.Module, kind: str) -> dict[str, Tensor]:
    named = getattr(module, f"named_{kind}")(remove_duplicate=False)
    return {".".join(part for part in name.split(".") if part not in _WRAPPERS): tensor for name, tensor in named}


def _match(kind: str, targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    for have, lack, whose in ((targets, sources, "the module"), (sources, targets, "the momentum copy")):
        alone = [name for name in have if name not in lack]
        if alone:
            shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
            _bad(ValueError, kind, f"no partner for {shown}", f"{whose} to have {kind} of these names")


def _check_pair(name: str, target: Tensor, source: Tensor) -> None:
    if source.shape != target.shape:
        _bad(ValueError, name, f"shape {tuple(source.shape)}", f"the momentum copy's shape {tuple(target.shape)}")
    if source.device != target.device:
        _bad(ValueError, name, f"device {source.device}", f"the momentum copy's device {target.device}")
    if hasattr(source, "to_local") != hasattr(target, "to_local"):
        _bad(ValueError, name, type(source).__name__, f"{type(target).__name__}: shard the module and `.module` alike")


def _copied(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    twin = copy.deepcopy(module).requires_grad_(False)
    return twin if dtype is None else twin.to(dtype)


def _remake_compute_module(encoder: MomentumEncoder, incompatible: object) -> None:
    for module in encoder._compute:
        for kind in ("parameters", "buffers"):
            values = _by_name(encoder.module, kind)
            for name, tensor in _by_name(module, kind).items():
                tensor.data.copy_(values[name])


def _bad(error: type[Exception], argument: str, got: object, expected: str) -> None:
    raise error(f"MomentumEncoder: `{argument}` got {got}, expected {expected}")
