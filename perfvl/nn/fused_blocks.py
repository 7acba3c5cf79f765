"""What a module does after :func:`perfvl.swap`: its own children, run fused, or its own forward where that is due."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from perfvl import backends
from perfvl.nn.separable_chain import run_chain
from perfvl.nn.separable_conv import running_affine, separable_pair
from perfvl.ops.separable_conv import Affine, check_layer, has_kernel, run
from perfvl.reference.activation import ACTIVATIONS

# Names of children, from the module whose plan it is: copies and pickles of a plan fit copies of the module.
Path = tuple[str, ...]


class Separable(NamedTuple):
    """``activation(norm(pointwise(mid_activation(mid_norm(depthwise(pre_activation(x)))))))``."""

    pre_activation: str
    depthwise: Path
    tf_same: bool  # padding as TensorFlow's "same", which the convolution itself does not carry
    mid_norm: Path | None
    mid_activation: str
    pointwise: Path
    norm: Path | None
    activation: str

    @property
    def between(self) -> bool:
        """Whether something stands between the convolutions: one pass then only where nothing learns."""
        return self.mid_norm is not None or self.mid_activation != "none"


class Chain(NamedTuple):
    """Separable convolutions behind one another, all with a batch norm; or a single one without."""

    layers: tuple[Separable, ...]


class Call(NamedTuple):
    """A module that runs as it is."""

    path: Path


class Apply(NamedTuple):
    """An activation that the forward calls as a function."""

    name: str


class Tap(NamedTuple):
    """What is here is what the residual connection adds."""


class Covered(NamedTuple):
    """A module that the plan runs without calling it, as it was when the plan was made."""

    path: Path
    kind: type
    children: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]  # what its forward may ask: use_residual, grad_checkpointing, ...


class Plan(NamedTuple):
    """The forward of a module, step by step; then ``drop(x) + tap`` if there is a `residual`."""

    steps: tuple[Chain | Call | Apply | Tap, ...]
    residual: bool
    drop: Path | None
    covered: tuple[Covered, ...]
    frozen: bool  # a normalisation or activation between convolutions: for evaluation only


def find(module: nn.Module, path: Path) -> Any:
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def is_touched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _fits(module: nn.Module, plan: Plan, args: tuple[Any, ...]) -> bool:
    """Whether the plan says what the module's own forward would do to these arguments, now."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].dim() != 4 or not runs_fused(args[0]):
        return False
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return False
    for path, kind, children, settings in plan.covered:
        part: nn.Module | None = module
        for name in path:
            part = None if part is None else part._modules.get(name)
        if part is None or (path and (type(part) is not kind or is_touched(part))) or tuple(part._modules) != children:
            return False
        for name, value in settings:
            if getattr(part, name, None) != value:
                return False
    return not plan.frozen or (_is_frozen(module, plan) and not _learns(module, args[0]))


def runs_fused(input: Tensor) -> bool:
    """Whether there is a kernel, or the definition is asked for; else a module's own layers are faster."""
    return backends._forced == "reference" or has_kernel(input)


def _is_frozen(module: nn.Module, plan: Plan) -> bool:
    for step in plan.steps:
        for layer in step.layers if isinstance(step, Chain) else ():
            for path in (layer.mid_norm, layer.norm):
                if path is not None:
                    norm = find(module, path)
                    if norm.training or norm.running_mean is None:
                        return False
    return True


def _learns(module: nn.Module, input: Tensor) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in module.parameters()))


def _run_plan(module: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    drop: Any = None if plan.drop is None else find(module, plan.drop)
    dropping = drop is not None and drop.training
    shortcut = x
    for index, step in enumerate(plan.steps):
        if isinstance(step, Chain):
            joins = plan.residual and not dropping and index == len(plan.steps) - 1
            x = _run_layers(module, step.layers, x, shortcut if joins else None)
            if joins:
                return x
        elif isinstance(step, Call):
            x = find(module, step.path)(x)
        elif isinstance(step, Apply):
            x = ACTIVATIONS[step.name](x)
        else:
            shortcut = x
    if not plan.residual:
        return x
    return (drop(x) if dropping else x) + shortcut


def _run_layers(module: nn.Module, layers: tuple[Separable, ...], x: Tensor, residual: Tensor | None) -> Tensor:
    last = layers[-1]
    if last.between:
        return _one_pass(module, last, x, residual)
    if last.norm is None:
        return separable_pair(
            x,
            _depthwise(module, last),
            find(module, last.pointwise),
            pre_activation=last.pre_activation,
            activation=last.activation,
            residual=residual,
        )
    chain = [
        (
            layer.pre_activation,
            _depthwise(module, layer),
            find(module, layer.pointwise),
            find(module, cast(Path, layer.norm)),
        )
        for layer in layers
    ]
    return run_chain(x, chain, activation=last.activation, residual=residual)


class _TFSame(NamedTuple):
    """What the separable functions read of a depthwise convolution, with the padding that its forward applies."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: str
    dilation: tuple[int, int]


def _depthwise(module: nn.Module, layer: Separable) -> Any:
    conv = find(module, layer.depthwise)
    if layer.tf_same:
        return _TFSame(conv.weight, conv.bias, conv.stride, "tf_same", conv.dilation)
    return conv


def _one_pass(module: nn.Module, layer: Separable, x: Tensor, residual: Tensor | None) -> Tensor:
    """Batch norms by their running statistics, inside the convolution."""
    depthwise, pointwise = _depthwise(module, layer), find(module, layer.pointwise)
    geometry = check_layer(
        "separable_conv2d",
        x,
        depthwise.weight,
        pointwise.weight,
        pointwise.bias,
        depthwise.stride,
        depthwise.padding,
        depthwise.dilation,
        layer.pre_activation,
        layer.activation,
    )
    return run(
        geometry,
        x,
        depthwise.weight,
        pointwise.weight,
        mid=_affine(module, layer.mid_norm, depthwise.bias),
        mid_activation=layer.mid_activation,
        post=_affine(module, layer.norm, pointwise.bias),
        residual=residual,
    )


def _affine(module: nn.Module, norm: Path | None, bias: Tensor | None) -> Affine:
    if norm is not None:
        return running_affine(find(module, norm), bias)
    if bias is None or bias.dtype == torch.float64:
        return Affine(None, bias)
    return Affine(None, bias.float())


def _rebuild(original: type[nn.Module]) -> nn.Module:
    kind: Any = fused_class(original)  # type: ignore[arg-type]
    return kind.__new__(kind)


class FusedForward(nn.Module):
    """Mixed into the class of a swapped module. See :func:`fused_class`."""

    _perfvl_plan: Plan
    _perfvl_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy cannot look it up by name: they get the original's.
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_rebuild, (self._perfvl_original,), *reduced[2:])
        return reduced


@functools.cache
def fused_class(original: Any) -> type[nn.Module]:
    """The class of a swapped module: `original` with another forward.

    The module stays the same object, as with `torch.nn.utils.parametrize`: whoever holds it (its parent, DDP, a list of
    hook points, the caller, if it is the whole model) need not be found, `isinstance` holds, nothing is renamed in
    state_dict. A `forward` set on the instance would not survive pickling and hide from torch.compile.
    """

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._perfvl_plan
        if kwargs or not _fits(self, plan, args):
            return original.forward(self, *args, **kwargs)
        return _run_plan(self, plan, args[0])

    body = {"forward": forward, "_perfvl_original": original, "__module__": original.__module__}
    return cast("type[nn.Module]", type(f"Fused{original.__name__}", (FusedForward, original), body))


def install(module: nn.Module, plan: Plan) -> Callable[[], None]:
    """Makes `module` run by `plan`; returns what takes that back."""
    original = type(module)
    fused: Any = fused_class(original)  # type: ignore[arg-type]
    module.__class__ = fused
    module._perfvl_plan = plan  # type: ignore[assignment]

    def undo() -> None:
        if type(module) is not fused:  # FSDP2 and parametrize change the class as well
            raise RuntimeError(
                f"undo: {type(module).__name__} was {fused.__name__} after swap; undo what came since first"
            )
        module.__class__ = original
        del module._perfvl_plan

    return undo
