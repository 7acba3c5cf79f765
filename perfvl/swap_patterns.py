"""What forwards do with their children, read for :func:`perfvl.swap`: a chain of layers, or why it is none."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from perfvl.nn.fused_blocks import Path, find, is_touched
from perfvl.ops._library import FLOATING

_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.LeakyReLU: "leaky_relu",
}
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish"}
_SUMS = (operator.add, operator.iadd, torch.add)
# What fx writes for arguments that it was given by value; no data goes through it.
_GUARDS = {"eq", "_assert", "_assert_is_none"}


class Item(NamedTuple):
    """A layer, in the order in which a forward runs it."""

    kind: str  # depthwise, pointwise, norm, activation, drop (path), nothing, tap; call is anything else
    path: Path  # from the root; () for a function and a tap
    parent: Path  # of the module whose forward calls it
    module: nn.Module | None
    activation: str = "none"
    inplace: bool = False
    tf_same: bool = False
    why: str = ""  # it is a call, although it looks like a layer of another kind


class Step(NamedTuple):
    """What a forward does next: call a child, apply an activation, or (neither) mark what its end adds."""

    child: Path | None = None
    activation: str | None = None
    inplace: bool = False


class Forward(NamedTuple):
    """A chain of layers, and whether its end adds what came in (or what was there at the tap)."""

    steps: list[Step]
    residual: bool = False
    tf_same: bool = False  # a convolution is padded as in TensorFlow, by the forward


class Unreadable(NamedTuple):
    """Why a forward is no chain; and what reads the output of its children."""

    why: str
    readers: dict[Path, str]


def is_depthwise(module: nn.Module) -> bool:
    """By attributes: convolutions of classes that perfvl does not run are to be reported too."""
    kernel, groups = module.__dict__.get("kernel_size"), module.__dict__.get("groups")
    return isinstance(kernel, tuple) and len(kernel) == 2 and groups != 1 and groups == module.__dict__["in_channels"]


def is_of(module: nn.Module, package: str, *names: str) -> bool:
    """Optional packages are recognised without importing them."""
    kind = type(module)
    return kind.__module__.partition(".")[0] == package and (not names or kind.__name__ in names)


class Reader:
    """Reads forwards below a root, each once."""

    def __init__(self, root: nn.Module) -> None:
        self._places = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
        self._forwards: dict[int, Forward | Unreadable] = {}

    def forward(self, module: nn.Module) -> Forward | Unreadable:
        if id(module) not in self._forwards:
            self._forwards[id(module)] = _read(module)
        return self._forwards[id(module)]

    def expand(self, module: nn.Module, path: Path, forward: Forward) -> list[list[Item]]:
        """The layers of each step."""
        groups = []
        for step in forward.steps:
            if step.child is not None:
                group = self.flatten(find(module, step.child), path + step.child, path)
            elif step.activation is not None:
                group = [Item("activation", (), path, None, step.activation, step.inplace)]
            else:
                group = [Item("tap", (), path, None)]
            if forward.tf_same:
                group = [item._replace(tf_same=item.kind == "depthwise") for item in group]
            groups.append(group)
        return groups

    def flatten(self, module: nn.Module, path: Path, parent: Path) -> list[Item]:
        """A child: one layer, or those of its own forward."""
        why = self.refusal(module)
        if why:
            return [Item("call", path, parent, module, why=why)]
        items = self._layer(module, path, parent)
        if items is not None:
            return items
        forward = self.forward(module)
        if isinstance(forward, Unreadable) or forward.residual:
            return [Item("call", path, parent, module)]
        items = [item for group in self.expand(module, path, forward) for item in group]
        if forward.tf_same and any(isinstance(i.module, nn.Conv2d) and i.kind == "call" for i in items):
            return [Item("call", path, parent, module)]
        return items

    def refusal(self, module: nn.Module) -> str:
        """Why nothing but calling the module does what it does, whatever its class."""
        if isinstance(module, torch.jit.ScriptModule):
            return "scripted or traced"
        if parametrize.is_parametrized(module):
            return "parametrized (weight_norm, spectral_norm, ...)"
        if hasattr(module, "weight_g") or hasattr(module, "weight_orig"):
            return "its weight is computed by a hook (weight_norm, spectral_norm, pruning)"
        if "forward" in module.__dict__:
            return "its forward was replaced"
        if is_touched(module):
            return "it has hooks"
        if self._places[id(module)] > 1 and next(module.parameters(), None) is not None:
            return "shared: it stands in more than one place"
        return ""

    def _layer(self, module: nn.Module, path: Path, parent: Path) -> list[Item] | None:
        """By the class; None where the forward has to be read."""
        kind = type(module)
        item = Item("call", path, parent, module)
        if isinstance(module, nn.Conv2d):
            return [_convolution(item, module)]
        if is_of(module, "timm", "BatchNormAct2d"):
            drop, act = (self.flatten(module._modules[name], (*path, name), path)[0] for name in ("drop", "act"))  # type: ignore[arg-type]
            if drop.kind == "nothing" and act.kind in ("nothing", "activation"):
                return [item._replace(kind="norm"), drop, act]
            unknown = drop if drop.kind != "nothing" else act
            return [item._replace(why=f"its {type(unknown.module).__name__} is not known, or has hooks")]
        if isinstance(module, nn.SyncBatchNorm):
            return [item._replace(why="its statistics are those of all processes")]
        if isinstance(module, _BatchNorm):
            if kind is nn.BatchNorm2d:
                return [item._replace(kind="norm")]
            return [item._replace(why="a batch norm that perfvl does not know")]
        if kind is nn.LeakyReLU and module.negative_slope != 0.01:
            return [item._replace(why="its slope is not 0.01")]
        if kind in _ACTIVATIONS:
            return [item._replace(kind="activation", activation=_ACTIVATIONS[kind], inplace=bool(module.inplace))]
        if (
            kind is nn.Identity
            or (kind is nn.Dropout and module.p == 0)
            or (kind is nn.Sequential and not module._modules)
        ):
            return [item._replace(kind="nothing")]
        if is_of(module, "timm", "DropPath") or is_of(module, "torchvision", "StochasticDepth"):
            return [item._replace(kind="drop")]
        if not module._modules or is_of(module, "perfvl"):
            return [item]
        return None


def _convolution(item: Item, conv: nn.Conv2d) -> Item:
    depthwise = is_depthwise(conv)
    if not depthwise and conv.kernel_size != (1, 1):
        return item
    same = is_of(conv, "timm", "Conv2dSame")
    why = ""
    if type(conv) is not nn.Conv2d and not same:
        why = "a subclass of Conv2d that perfvl does not know"
    elif conv.padding_mode != "zeros":
        why = f"padding_mode is {conv.padding_mode}"
    elif conv.weight.dtype not in FLOATING:
        why = f"its dtype is {conv.weight.dtype}"
    elif not depthwise:
        padded = conv.padding not in ((0, 0), "same", "valid")
        if conv.groups != 1 or conv.stride != (1, 1) or padded:
            why = "a 1x1 convolution with groups, stride or padding"
    if why:
        return item._replace(why=why)
    return item._replace(kind="depthwise" if depthwise else "pointwise", tf_same=depthwise and same)


def _read(module: nn.Module) -> Forward | Unreadable:
    if type(module).forward is nn.Sequential.forward:
        return Forward([Step((name,)) for name in module._modules])
    config: Any = getattr(module, "config", None)
    if is_of(module, "transformers", "MobileNetV1ConvLayer", "MobileNetV2ConvLayer") and config.tf_padding:
        # It pads by the size of the input, where tracing ends; strides and dilations together not as TensorFlow does.
        conv = find(module, ("convolution",))
        if conv.stride != (1, 1) and conv.dilation != (1, 1):
            return Unreadable("it pads in a way that perfvl does not know", {})
        names = [name for name in ("convolution", "normalization", "activation") if getattr(module, name) is not None]
        return Forward([Step((name,)) for name in names], tf_same=True)
    if not module._modules or type(module).forward is nn.Module.forward:
        return Unreadable("it has no forward over children", {})
    found = []
    dicts: list[dict[str, Any]] = [vars(module), module._parameters, module._buffers, module._modules]
    before = [dict(values) for values in dicts]
    try:
        for training in (module.training, not module.training):
            module.training = training
            with torch.random.fork_rng(devices=[]):
                graph = _Tracer().trace(module, _defaults(module))
            found.append(_chain(graph, module))
    except Exception as error:  # whatever a forward does with what is no tensor
        return Unreadable(f"it cannot be traced ({type(error).__name__})", {})
    finally:  # a forward may set attributes of its module
        for values, old in zip(dicts, before, strict=True):
            for name in values.keys() - old.keys():
                del values[name]
            values.update(old)
    return found[0] if found[0] == found[1] else Unreadable("it does another thing in training", {})


class _Tracer(fx.Tracer):
    """Children are called, not looked into; nothing is computed, as with a buffer that counts calls."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _chain(graph: fx.Graph, module: nn.Module) -> Forward | Unreadable:
    """From the output back to the input, one layer reading the one before and nothing else reading it."""
    readers = _readers(graph, module)
    nodes = [node for node in graph.nodes if getattr(node.target, "__name__", "") not in _GUARDS]
    source, end = nodes[0], nodes[-1].args[0]
    seen, branch, tap = {source, nodes[-1]}, end, None
    if isinstance(end, fx.Node) and end.target in _SUMS and len(end.args) == 2 and not end.kwargs:
        seen.add(end)
        branch, tap = end.args
        if branch is source or branch in _behind(tap):
            branch, tap = tap, branch
    steps: list[Step] = []
    while branch is not source:
        step = _step(branch)
        if step is None:
            what = branch.name if isinstance(branch, fx.Node) else type(branch).__name__
            return Unreadable(f"it is no chain of layers ({what})", readers)
        if branch is tap:
            steps.append(Step())
        steps.append(step)
        seen.add(branch)
        branch = branch.args[0]
    for node in seen:
        if len(node.users) > 1 + (node is tap):
            return Unreadable(f"it is no chain of layers ({node.name} is read twice)", readers)
    placeholders = {node for node in nodes if node.op == "placeholder"}
    if tap not in (None, *seen) or set(nodes) - seen - placeholders or not steps:
        return Unreadable("it is no chain of layers", readers)
    return Forward(steps[::-1], residual=tap is not None)


def _behind(node: Any) -> list[fx.Node]:
    found = []
    while isinstance(node, fx.Node) and node.args:
        found.append(node)
        node = node.args[0]
    return found


def _step(node: Any) -> Step | None:
    if not isinstance(node, fx.Node) or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module" and not node.kwargs:
        return Step(tuple(str(node.target).split(".")))
    if node.op == "call_function" and node.target in _FUNCTIONS and node.kwargs.keys() <= {"inplace"}:
        return Step(None, _FUNCTIONS[node.target], bool(node.kwargs.get("inplace", False)))
    if node.op == "call_method" and node.target == "relu":
        return Step(None, "relu")
    return None


def _readers(graph: fx.Graph, module: nn.Module) -> dict[Path, str]:
    """For each child that is called, the name of what comes next."""
    found = {}
    for node in graph.nodes:
        after = node
        while len(after.users) == 1 and (after is node or after.target in ("permute", "contiguous")):
            (after,) = after.users
        if node.op == "call_module" and after is not node:
            called = after.op == "call_module"
            what = type(module.get_submodule(after.target)).__name__ if called else after.name
            found[tuple(str(node.target).split("."))] = what
    return found
