"""Fused separable convolutions for a model that was written without them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from perfvl.nn.fused_blocks import Call, Chain, FusedForward, Path, Plan, find, install
from perfvl.swap_patterns import Reader, Unreadable, is_depthwise, is_of
from perfvl.swap_plan import describe, make_plan


def swap(model: nn.Module) -> SwapReport:
    r"""Runs depthwise and pointwise convolutions of `model` in one pass, in place: same values, less memory traffic.

    Found by structure, not by name: ``[activation] depthwise [batch norm] [activation] pointwise [batch norm]
    [activation] [+ residual]`` in any `nn.Sequential`, and in any module whose forward is such a chain of its children:
    Xception (timm's three kinds and others), MobileNetV1 to V4, MNASNet, ShuffleNetV2, DeepLabV3+ heads and what looks
    like them.

    With nothing between the convolutions, one pass serves in training too, and batch norms between such layers need no
    pass of their own. With batch norm or an activation between them it serves in evaluation without gradients; in
    training these modules run their own layers, as before. Squeeze-and-excitation (EfficientNet) leaves two passes.

    Modules stay the same objects with the same children: state_dict, optimizers, DDP and EMA see no difference. Where
    children get hooks or parametrizations later or are replaced, or attributes change that a forward asks
    (``if self.grad_checkpointing``), the module runs its own forward again.

    Args:
        model: any module, in training or evaluation mode, before or after it is wrapped in DistributedDataParallel or
            `torch.compile`. A model that is compiled already compiles anew: `torch.compiler.reset` is called.

    Returns:
        What was replaced, which depthwise convolutions were not, and why: ``print(perfvl.swap(model))``. A second call
        replaces nothing. ``report.undo()`` takes everything back, as is due before `torch.jit.script` or before a whole
        module is pickled for where perfvl is not.

    Raises:
        TypeError: `model` is no `nn.Module`.

    Example:
        >>> import perfvl
        >>> from torch import nn
        >>> block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
        >>> perfvl.swap(nn.Sequential(block)).replaced
        [('0', 'depthwise 3x3 > pointwise > norm')]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: `model` got {type(model).__name__}, expected a torch.nn.Module")
    compiled = any(_is_compiled(module) for module in model.modules())
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    found = _Swap(model)
    report = SwapReport(found.replaced, found.skipped(), found.undo, compiled)
    if compiled and report:
        torch.compiler.reset()
    return report


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


class SwapReport:
    """What :func:`swap` did. Its length is the number of modules replaced; `str()` is a table.

    Attributes:
        replaced: (name of the module, the layers that run as one, and " | " between those that do not).
        skipped: (name of the depthwise convolution, why it runs as before).
    """

    def __init__(
        self,
        replaced: list[tuple[str, str]],
        skipped: list[tuple[str, str]],
        undo: list[Callable[[], None]],
        compiled: bool,
    ) -> None:
        self.replaced, self.skipped = replaced, skipped
        self._undo, self._compiled = undo, compiled

    def undo(self) -> None:
        """Gives the modules their own forward again. Copies made meanwhile keep the fused one."""
        while self._undo:
            self._undo.pop()()
        if self._compiled:
            torch.compiler.reset()

    def __len__(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        lines = [f"perfvl.swap: {len(self.replaced)} modules replaced, {len(self.skipped)} depthwise convolutions left"]
        rows = [("replaced", *row) for row in self.replaced] + [("left", *row) for row in self.skipped]
        width = max((len(name) for _, name, _ in rows), default=0)
        lines += [f"{what:<8}  {name:<{width}}  {text}" for what, name, text in rows]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<SwapReport: {len(self.replaced)} replaced, {len(self.skipped)} left>"


class _Swap:
    """One walk through a model, from the outside in: a module is replaced if a region spans several of its children."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._reader = Reader(root)
        self._seen: set[int] = set()
        self._fused: set[int] = set()
        self._why: dict[int, str] = {}
        self.replaced: list[tuple[str, str]] = []
        self.undo: list[Callable[[], None]] = []
        self._visit(root, ())

    def _visit(self, module: nn.Module, path: Path) -> None:
        nothing_here = not any(is_depthwise(part) for part in module.modules())
        if id(module) in self._seen or isinstance(module, torch.jit.ScriptModule) or nothing_here:
            return
        self._seen.add(id(module))
        if is_of(module, "perfvl"):
            self._fused.update(id(part) for part in module.modules())
            return
        plan: Plan | None
        if isinstance(module, FusedForward):
            plan = module._perfvl_plan
        else:
            plan = self._plan(module, path)
            if plan is not None:
                self.undo.append(install(module, plan))
                self.replaced.append((".".join(path), describe(module, plan)))
        if plan is None:
            for name, child in module.named_children():
                self._visit(child, (*path, name))
            return
        for step in plan.steps:
            if isinstance(step, Call):
                self._visit(find(module, step.path), path + step.path)
            elif isinstance(step, Chain):
                for layer in step.layers:
                    self._fused.add(id(find(module, layer.depthwise)))

    def _plan(self, module: nn.Module, path: Path) -> Plan | None:
        forward = self._reader.forward(module)
        if isinstance(forward, Unreadable) or "forward" in module.__dict__:
            return None
        groups = self._reader.expand(module, path, forward)
        drop = None
        if forward.residual and [item.kind for item in groups[-1]] == ["drop"]:
            drop = groups.pop()[0].path
        return make_plan(module, path, forward, groups, drop, self._why)

    def skipped(self) -> list[tuple[str, str]]:
        found = []
        scripted: set[int] = set()
        for name, module in self._root.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                scripted.update(id(part) for part in module.children())
                if id(module) not in scripted:
                    found.append((name, "scripted or traced"))
            elif is_depthwise(module) and id(module) not in self._fused:
                found.append((name, self._reason(name, module)))
        return found

    def _reason(self, name: str, module: nn.Module) -> str:
        path = tuple(name.split(".")) if name else ()
        if not isinstance(module, nn.Conv2d):
            return f"{type(module).__name__} is not torch.nn.Conv2d"
        why = self._reader.flatten(module, path, path[:-1])[0].why or self._why.get(id(module))
        if why:
            return why
        parent = self._root.get_submodule(".".join(path[:-1]))
        forward = self._reader.forward(parent) if path else None
        if isinstance(forward, Unreadable):
            reader = forward.readers.get(path[-1:])
            if reader is not None and reader != "Conv2d":
                return f"{reader} reads it, not a pointwise convolution"
            return f"the forward of its {type(parent).__name__} was not understood: {forward.why}"
        return "no pointwise convolution follows it"
