"""One training step of two networks that teach one another: on a GPU a single CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perfvl.functional import TwinLoss
from perfvl.nn.small_loss import DecouplingLoss, Rate
from perfvl.ops._library import bad_type, bad_value


class TwinStepOutput(NamedTuple):
    """What a step computed before its update: tensors without gradient, which later steps do not overwrite."""

    losses: TwinLoss
    logits1: Tensor
    logits2: Tensor


class TwinStep:
    r"""A training step of two networks: :math:`\theta_j \leftarrow \text{optimizer}_j(\theta_j, \nabla_{\theta_j} L_j)`
    with :math:`L_1, L_2` of a small-loss criterion (Co-teaching, arXiv:1804.06872, algorithm 1).

    On CUDA both forward passes, the criterion, both backward passes and the optimisers become one graph: one launch
    for hundreds. Elsewhere this is the plain loop: ``zero_grad``, forward, ``backward``, ``step``, bit for bit.

    Args:
        network1, network2: modules that map inputs to logits [..., n, K], all parameters on one device.
        criterion: a loss of :mod:`perfvl.nn`, or any callable ``(logits1, logits2, labels, forget_rate, **extra) ->
            TwinLoss``, called without `forget_rate` while none is set (``DecouplingLoss`` takes none). Both losses are
            differentiated, where they are one (JoCoR) once; of losses [...] the sum.
        optimizers: one for each network (Co-teaching), or one over both (JoCoR); on CUDA made with ``capturable=True``
            where they have that option, and with a tensor on the device as ``lr`` if it changes in every step.
        forget_rate: in [0, 1]: a float, or a tensor with one element or [...]. Kept as a float64 tensor on the device,
            which ``step.forget_rate = 0.2`` or the argument of a call fills: no new capture while the shape stays.
        cuda_graph: False for the plain loop on CUDA too, for networks in DistributedDataParallel or that synchronise.
        warmup: how many steps run before one is captured. They are steps like any other, and capturing computes
            nothing: a call trains once, always.
        max_graphs: how many graphs are kept, the last used ones. Each keeps its step's activations, gradients, batch.

    ``step(inputs, labels, forget_rate=None, **extra)`` takes a tensor or a tuple of them for both networks, labels
    [..., n] and tensors for the criterion's keywords (``sample_ids=``), which may be in pinned CPU memory, and returns
    a :class:`TwinStepOutput`. Gradients stay in ``.grad``.

    Steps that one graph cannot run get one each, after `warmup` steps of their own: other shapes or dtypes (a smaller
    last batch), ``train()`` or ``eval()``, ``requires_grad``, autocast, settings of the optimisers that are no tensors
    on the device (a float ``lr``). After other changes, to attributes of the criterion for one, call :meth:`reset`.
    Autocast around the call covers the forward passes and the criterion. ``GradScaler`` is not supported: use bfloat16.

    Raises:
        TypeError, ValueError: an argument that is not as said above; on a call, a criterion that returns no TwinLoss.
        RuntimeError: the step cannot be captured, because of its cause. Nothing was trained then.

    Example:
        >>> import torch
        >>> from perfvl.nn import CoTeachingLoss
        >>> cuda = torch.cuda.is_available()
        >>> networks = [torch.nn.Linear(64, 10, device="cuda" if cuda else "cpu") for _ in range(2)]
        >>> optimizers = [torch.optim.Adam(network.parameters(), capturable=cuda) for network in networks]
        >>> step = TwinStep(*networks, CoTeachingLoss(), optimizers)
        >>> losses, logits1, logits2 = step(torch.randn(128, 64), torch.randint(10, (128,)), 0.2)
        >>> int(losses.kept1.sum())
        102
    """

    def __init__(
        self,
        network1: nn.Module,
        network2: nn.Module,
        criterion: Callable[..., TwinLoss],
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        forget_rate: Rate | None = None,
        cuda_graph: bool = True,
        warmup: int = 3,
        max_graphs: int = 2,
    ) -> None:
        for network in (network1, network2):
            if not isinstance(network, nn.Module):
                bad_type("TwinStep", "network1, network2", type(network).__name__, "a torch.nn.Module")
        if not callable(criterion):
            bad_type("TwinStep", "criterion", type(criterion).__name__, "a callable that returns a TwinLoss")
        listed = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
        if not isinstance(listed, (list, tuple)) or not all(isinstance(o, Optimizer) for o in listed):
            bad_type("TwinStep", "optimizers", type(optimizers).__name__, "a torch.optim.Optimizer, or a list of two")
        if not 1 <= len(listed) <= 2:
            bad_value("TwinStep", "optimizers", f"{len(listed)} of them", "one for each network, or one over both")
        for name, count in (("warmup", warmup), ("max_graphs", max_graphs)):
            if not isinstance(count, int) or count < 1:
                bad_value("TwinStep", name, repr(count), "an int of at least 1")
        self._parameters = [*network1.parameters(), *network2.parameters()]
        devices = {parameter.device for parameter in self._parameters}
        if len(devices) != 1:
            bad_value("TwinStep", "network1, network2", f"parameters on {sorted(map(str, devices))}", "one device")
        self.device = devices.pop()
        self._captures = cuda_graph and self.device.type == "cuda"
        if self._captures:
            _check_capturable(listed)
            self._stream = torch.cuda.Stream(self.device)  # warms up and captures
        self.network1, self.network2, self.criterion, self.optimizers = network1, network2, criterion, listed
        self.warmup, self.max_graphs = warmup, max_graphs
        self._modules = [*network1.modules(), *network2.modules()]
        self._slots: dict[tuple, _Slot] = {}  # least recently used first
        self._rate: Tensor | None = None
        if forget_rate is not None:
            self.forget_rate = forget_rate

    @property
    def forget_rate(self) -> Tensor | None:
        """What the criterion is given: float64, on the device; None where it is given nothing."""
        return self._rate

    @forget_rate.setter
    def forget_rate(self, value: Rate) -> None:
        if isinstance(self.criterion, DecouplingLoss):
            bad_value("TwinStep", "forget_rate", value, "none: DecouplingLoss has none")
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            bad_type("TwinStep", "forget_rate", type(value).__name__, "a float or a tensor")
        if not isinstance(value, Tensor) and not 0.0 <= value <= 1.0:
            bad_value("TwinStep", "forget_rate", value, "a number in [0, 1]")
        given = value.detach() if isinstance(value, Tensor) else None
        shape = torch.Size() if given is None or given.numel() == 1 else given.shape
        if self._rate is None or self._rate.shape != shape:
            self._rate = torch.empty(shape, dtype=torch.float64, device=self.device)
        if given is None:
            self._rate.fill_(value)
        else:
            self._rate.copy_(given.reshape(shape), non_blocking=True)

    def __call__(
        self, inputs: Tensor | Sequence[Tensor], labels: Tensor, forget_rate: Rate | None = None, **extra: Tensor
    ) -> TwinStepOutput:
        """Trains both networks once."""
        tensors = [*(inputs if isinstance(inputs, (list, tuple)) else (inputs,)), labels, *extra.values()]
        names = tuple(extra)
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                bad_type("TwinStep", "inputs, labels or extra", type(tensor).__name__, "torch.Tensor")
        if forget_rate is not None:
            self.forget_rate = forget_rate
        if not self._captures:
            return self._train(tensors, names)
        with torch.cuda.device(self.device):
            slot = self._slot(tensors, names)
            slot.calls += 1
            if slot.graph is None and slot.calls > self.warmup:
                slot.graph = _Graph(self, tensors, names)
            if slot.graph is not None:
                return slot.graph.replay(tensors)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                output = self._train(tensors, names)
            torch.cuda.current_stream().wait_stream(self._stream)
            return output

    def reset(self) -> None:
        """Forgets all graphs: the next calls warm up and capture again. What was trained stays."""
        self._slots.clear()

    def _train(self, tensors: Sequence[Tensor], names: tuple[str, ...]) -> TwinStepOutput:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # in a graph: backward then writes, it does not add
        moved = [t.to(self.device, non_blocking=True) for t in tensors]
        extra = {name: moved.pop() for name in reversed(names)}
        *inputs, labels = moved
        kind = self.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # Not cached: a context that spans several steps would give them the half-precision weights of the first.
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            logits1, logits2 = self.network1(*inputs), self.network2(*inputs)
            rate = () if self._rate is None else (self._rate,)
            losses = self.criterion(logits1, logits2, labels, *rate, **extra)
        if not isinstance(losses, TwinLoss):
            bad_type("TwinStep", "criterion", f"a result of type {type(losses).__name__}", "a TwinLoss")
        with torch.autocast(kind, enabled=False):
            roots = [losses.loss1] if losses.loss2 is losses.loss1 else [losses.loss1, losses.loss2]
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
            for optimizer in self.optimizers:
                optimizer.step()
        return TwinStepOutput(TwinLoss(*(t.detach() for t in losses)), logits1.detach(), logits2.detach())

    def _slot(self, tensors: Sequence[Tensor], names: tuple[str, ...]) -> _Slot:
        """The place of this step's graph: steps alike in all that a graph cannot change share one."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        key = (
            names,
            tuple((t.shape, t.dtype) for t in tensors),
            bytes(module.training for module in self._modules),
            bytes(parameter.requires_grad for parameter in self._parameters),
            (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), id(self._rate)),
            tuple((id(g), len(g["params"]), _settings([v for k, v in g.items() if k != "params"])) for g in groups),
        )
        slot = self._slots.pop(key, None) or _Slot([self._rate, *((group, dict(group)) for group in groups)])
        self._slots[key] = slot
        while len(self._slots) > self.max_graphs:
            del self._slots[next(iter(self._slots))]
        return slot


class _Slot:
    def __init__(self, held: list) -> None:
        self.calls = 0
        self.graph: _Graph | None = None
        self.held = held  # so that nothing else comes to have the ids in the key


class _Graph:
    """A captured step, the tensors that it reads and those that it writes."""

    def __init__(self, step: TwinStep, tensors: Sequence[Tensor], names: tuple[str, ...]) -> None:
        self.tensors = [t.to(step.device, copy=True) for t in tensors]
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Thread-local: loaders may pin memory meanwhile. The stream, twice: a failed capture leaves its own set.
            with torch.cuda.stream(step._stream), torch.cuda.graph(self.graph, None, step._stream, "thread_local"):
                self.output = step._train(self.tensors, names)
        except Exception as reason:
            step.reset()
            raise RuntimeError("TwinStep: capture failed; cuda_graph=False runs without, see the cause") from reason
        self.gradients = [(p, p.grad) for p in step._parameters if p.grad is not None]

    def replay(self, tensors: Sequence[Tensor]) -> TwinStepOutput:
        for mine, given in zip(self.tensors, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in self.gradients:  # steps without this graph have put others there
            parameter.grad = gradient
        losses, *logits = self.output
        return TwinStepOutput(TwinLoss(*map(torch.clone, losses)), *map(torch.clone, logits))


def _check_capturable(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        if not all(group.get("capturable", True) for group in optimizer.param_groups):
            bad_value("TwinStep", "optimizers", f"{type(optimizer).__name__} without capturable=True", "it with that")


def _settings(value: Any) -> Any:
    """What a graph makes of an optimiser's setting: tensors on the device are read in every replay, all else once."""
    if isinstance(value, Tensor):
        return id(value) if value.is_cuda else tuple(value.flatten().tolist())
    if isinstance(value, (tuple, list)):
        return tuple(map(_settings, value))
    return value if isinstance(value, (int, float, str, type(None))) else repr(value)
