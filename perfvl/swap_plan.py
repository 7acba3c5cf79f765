"""Which layers of a chain run in one pass, and the plan of the module that then runs them, for :func:`perfvl.swap`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from perfvl.nn.fused_blocks import Apply, Call, Chain, Covered, Path, Plan, Separable, Tap, find
from perfvl.swap_patterns import Forward, Item

_INTERNAL = vars(nn.Module()).keys()  # `training` among them


class Region(NamedTuple):
    """Items [start, end) that run in one pass."""

    start: int
    end: int
    layer: Separable  # with paths from the root


def match(items: Sequence[Item], why: dict[int, str]) -> list[Region]:
    """``[act] depthwise [norm] [act] pointwise [norm] [act]``, from the left. For others, `why` not (by id)."""
    regions: list[Region] = []
    at = 0
    while at < len(items):
        cursor = _Cursor(items, at)
        depthwise = cursor.take("depthwise")
        if depthwise is None:
            at += 1
            continue
        mid_norm, mid_act = cursor.take("norm"), cursor.take("activation")
        pointwise = cursor.take("pointwise")
        reason = _between(items[cursor.at :]) if pointwise is None else _mismatch(depthwise.module, pointwise.module)
        if pointwise is None or reason:
            why.setdefault(id(depthwise.module), reason)
            at += 1
            continue
        norm = cursor.take("norm")
        act = cursor.take("activation", within=_owner(items[at : cursor.at]))
        start = _prologue(items, at, _owner(items[at : cursor.at]), regions[-1].end if regions else 0)
        pre = items[start] if start < at else None
        layer = Separable(
            pre.activation if pre else "none",
            depthwise.path,
            depthwise.tf_same,
            mid_norm.path if mid_norm else None,
            mid_act.activation if mid_act else "none",
            pointwise.path,
            norm.path if norm else None,
            act.activation if act else "none",
        )
        regions.append(Region(start, cursor.at, layer))
        at = cursor.at
    return regions


class _Cursor:
    def __init__(self, items: Sequence[Item], at: int) -> None:
        self._items, self.at = items, at

    def next(self) -> Item | None:
        return next((item for item in self._items[self.at :] if item.kind != "nothing"), None)

    def take(self, kind: str, within: Path | None = None) -> Item | None:
        """The next item, if it is of this kind, and no part of a module beside `within`."""
        item = self.next()
        if item is None or item.kind != kind or (within is not None and _is_beside(item, within)):
            return None
        self.at = next(i for i in range(self.at, len(self._items)) if self._items[i] is item) + 1
        return item


def _prologue(items: Sequence[Item], at: int, owner: Path, free: int) -> int:
    """Where the activation before the depthwise convolution `at` stands, if that can run it; else `at`.

    Others must not see what it writes in place. One that ends another module stays there: a module that runs both would
    stand for all between. One of timm's BatchNormAct2d stays with its norm.
    """
    start = next((i for i in reversed(range(free, at)) if items[i].kind != "nothing"), at)
    item = items[start]
    if item.kind != "activation" or _is_beside(item, owner) or (item.inplace and not _reads_fresh(items, start)):
        return at
    before = _before(items, start)
    return at if before is not None and item.parent == before.path else start


def _is_beside(item: Item, owner: Path) -> bool:
    """Whether the module that calls it is neither around `owner` nor in it."""
    return any(a != b for a, b in zip(item.parent, owner, strict=False))


def _before(items: Sequence[Item], at: int) -> Item | None:
    return next((item for item in reversed(items[:at]) if item.kind != "nothing"), None)


def _reads_fresh(items: Sequence[Item], at: int) -> bool:
    """Whether what this item reads was written by a layer for it alone."""
    before = _before(items, at)
    return before is not None and isinstance(before.module, (nn.Conv2d, _BatchNorm))


def _between(after: Sequence[Item]) -> str:
    """Why nothing pointwise follows a depthwise convolution, its norm and its activation."""
    moved = ("Permute",)  # torchvision's ConvNeXt: what reads it is the norm behind
    item = next((i for i in after if i.kind != "nothing" and type(i.module).__name__ not in moved), None)
    if item is None or item.module is None:
        return "no pointwise convolution follows it"
    name = type(item.module).__name__
    if item.why:
        return f"{'.'.join(item.path)} ({name}) follows it: {item.why}"
    if name.startswith(("Squeeze", "SE")):
        return "squeeze-excite needs the whole depthwise result before the pointwise convolution"
    if item.path[-1] == "aa":
        return f"anti-aliasing (`aa`, {name}) stands between it and the pointwise convolution"
    return f"{name} reads it, not a pointwise convolution"


def _mismatch(depthwise: nn.Module | None, pointwise: nn.Module | None) -> str:
    assert isinstance(depthwise, nn.Conv2d)
    assert isinstance(pointwise, nn.Conv2d)
    for what in ("dtype", "device"):
        first, second = getattr(depthwise.weight, what), getattr(pointwise.weight, what)
        if first != second:
            return f"its {what} is {first}, that of the pointwise convolution {second}"
    if depthwise.out_channels != pointwise.in_channels:
        return f"the pointwise convolution reads {pointwise.in_channels} channels"
    return ""


def make_plan(
    module: nn.Module,
    path: Path,
    forward: Forward,
    groups: Sequence[Sequence[Item]],
    drop: Path | None,
    why: dict[int, str],
) -> Plan | None:
    """The plan of `module` at `path`; `groups` are the layers of each step of its forward.

    A region belongs to the innermost module that runs all of it: so a module stands for as few layers as possible when
    it later has to run its own forward. Steps without a part in a region stay calls.
    """
    items = [item for group in groups for item in group]
    step_of = [index for index, group in enumerate(groups) for _ in group]
    regions = {region.start: region for region in match(items, why)}
    last = max((i for i, item in enumerate(items) if item.kind != "nothing"), default=-1)
    own = [
        region
        for region in regions.values()
        if _owner(items[region.start : region.end]) == path or (forward.residual and region.end > last)
    ]
    if not own:
        return None
    absorbed = {step_of[i] for region in own for i in range(region.start, region.end)}
    absorbed |= {i for i, group in enumerate(groups) if all(item.kind == "nothing" for item in group)}
    steps: list[Chain | Call | Apply | Tap] = []
    covered: dict[Path, None] = {(): None}
    at = 0
    while at < len(items):
        item, step, region = items[at], step_of[at], regions.get(at)
        child = forward.steps[step].child
        if step not in absorbed and child is not None:
            steps.append(Call(child))
            at += len(groups[step])
        elif step in absorbed and region is not None:
            _append(steps, _relative(region.layer, path))
            for inner in items[at : region.end]:
                _cover(covered, inner, path, called=False)
            at = region.end
        elif _unsafe_alone(items, at):
            return None
        else:
            _cover(covered, item, path, called=item.kind != "nothing")
            if item.kind == "tap":
                steps.append(Tap())
            elif item.kind == "activation" and item.module is None:
                steps.append(Apply(item.activation))
            elif item.kind != "nothing":
                steps.append(Call(item.path[len(path) :]))
            at += 1
            while item.kind == "norm" and at < len(items) and items[at].parent == item.path:
                at += 1  # timm's BatchNormAct2d has called it
    frozen = any(layer.between for step in steps if isinstance(step, Chain) for layer in step.layers)
    parts = []
    for part in covered:
        found = find(module, part)
        parts.append(Covered(part, type(found), tuple(found._modules), _settings(found)))
    return Plan(tuple(steps), forward.residual, None if drop is None else drop[len(path) :], tuple(parts), frozen)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Of modules whose forward was read; a layer has its meaning in perfvl, and is asked when it runs."""
    if isinstance(module, _DropoutNd):
        return (("p", module.p),)
    if not module._modules or type(module).forward is nn.Sequential.forward or isinstance(module, _BatchNorm):
        return ()
    plain = (bool, int, float, str, type(None))
    return tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain) and k not in _INTERNAL)


def _owner(items: Sequence[Item]) -> Path:
    """The innermost module that runs all of them."""
    parents = [item.parent for item in items if item.kind != "nothing"]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    return tuple(names[0] for names in shared)


def _unsafe_alone(items: Sequence[Item], at: int) -> bool:
    """A layer that is more than its module or its function, and stands in no region."""
    item = items[at]
    padded_outside = item.kind == "depthwise" and item.tf_same and type(item.module) is nn.Conv2d
    writes_input = item.kind == "activation" and item.module is None and item.inplace and not _reads_fresh(items, at)
    return padded_outside or writes_input


def _relative(layer: Separable, path: Path) -> Separable:
    def cut(whole: Path | None) -> Path | None:
        return None if whole is None else whole[len(path) :]

    return layer._replace(
        depthwise=layer.depthwise[len(path) :],
        mid_norm=cut(layer.mid_norm),
        pointwise=layer.pointwise[len(path) :],
        norm=cut(layer.norm),
    )


def _cover(covered: dict[Path, None], item: Item, path: Path, *, called: bool) -> None:
    """The modules between `path` and the item, and the item itself unless it is called."""
    deepest = len(item.parent) if called or not item.path else len(item.path)
    whole = item.path or item.parent
    covered.update({whole[len(path) : length]: None for length in range(len(path) + 1, deepest + 1)})


def _append(steps: list[Chain | Call | Apply | Tap], layer: Separable) -> None:
    """Behind a separable convolution with batch norm, the activation between moves into this one's prologue."""
    before = steps[-1] if steps else None
    if isinstance(before, Chain):
        end = before.layers[-1]
        joined = end.norm is not None and layer.norm is not None and not end.between and not layer.between
        if joined and "none" in (end.activation, layer.pre_activation):
            pre = end.activation if layer.pre_activation == "none" else layer.pre_activation
            layers = (*before.layers[:-1], end._replace(activation="none"), layer._replace(pre_activation=pre))
            steps[-1] = Chain(layers)
            return
    steps.append(Chain((layer,)))


def describe(module: nn.Module, plan: Plan) -> str:
    """For each separable convolution the layers that it runs with it."""
    chains = [step for step in plan.steps if isinstance(step, Chain)]
    text = " | ".join(_describe(module, layer) for chain in chains for layer in chain.layers)
    text += " + residual" if plan.residual else ""
    return f"{text}, in evaluation" if plan.frozen else text


def _describe(module: nn.Module, layer: Separable) -> str:
    kernel = find(module, layer.depthwise).kernel_size
    parts = [
        layer.pre_activation,
        f"depthwise {kernel[0]}x{kernel[1]}",
        "norm" if layer.mid_norm else "none",
        layer.mid_activation,
        "pointwise",
        "norm" if layer.norm else "none",
        layer.activation,
    ]
    return " > ".join(part for part in parts if part != "none")
