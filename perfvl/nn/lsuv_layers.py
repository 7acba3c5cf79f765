"""What LSUV needs of a model: its layers, each called where a hook sees it, and a forward pass that leaves no trace."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.nn.color_transform import _VARIANTS, ColorTransform
from perfvl.nn.separable_conv import SeparableConv2d, SeparableConvBNAct2d
from perfvl.nn.upsample_conv import UpsampleConv2d
from perfvl.ops._library import bad_type, bad_value
from perfvl.reference.activation import ACTIVATIONS
from perfvl.reference.color_transform import centered

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, nn.Linear, UpsampleConv2d)
OP = "lsuv_init_"


@dataclasses.dataclass(eq=False)
class Layer:
    """A weight, and the modules that apply it: more than one where the weight is shared."""

    name: str
    modules: list[nn.Module]
    shared: bool
    """Whether something else in the model has the same weight."""
    plain: bool = True
    """Whether the forward is torch's or perfvl's own: without the bias the output then scales as the weight does."""

    @property
    def weight(self) -> Tensor:
        return self.modules[0].weight  # type: ignore[return-value]

    @property
    def biases(self) -> list[Tensor]:
        found = {id(m.bias): m.bias for m in self.modules if isinstance(m.bias, Tensor)}
        return list(found.values())


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, UpsampleConv2d):
        return True
    kind = next(kind for kind in LAYERS if isinstance(module, kind))
    same = (getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
    return all(same) and "forward" not in module.__dict__


def find_layers(model: nn.Module, names: Sequence[str] | None) -> tuple[list[Layer], list[tuple[str, str]]]:
    """The layers to initialise, in order of registration, and (name, why not) of those that cannot be."""
    every: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    if not every:
        bad_value(OP, "model", f"a {type(model).__name__} without layers", "convolutions or linear layers")
    chosen = every if names is None else _named(every, names)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    layers: dict[int, Layer] = {}
    left = []
    for name, module in chosen.items():
        weight = module._parameters.get("weight")
        if weight is None:
            if names is not None:
                bad_value(OP, "layers", repr(name), "layers whose weight is a parameter: that of this one is computed")
            left.append((name, "its weight is computed from other parameters"))
            continue
        if isinstance(weight, nn.parameter.UninitializedParameter) or weight.is_meta:
            bad_value(OP, "model", f"a weight without data in {name!r}", "parameters with data")
        if id(weight) in layers:
            layers[id(weight)].modules.append(module)
        else:
            layers[id(weight)] = Layer(name, [module], owners[id(weight)] > 1)
        layers[id(weight)].plain &= _is_plain(module)
    if not layers:
        bad_value(OP, "model", "computed weights only", "a layer whose weight is a parameter")
    return list(layers.values()), left


def _named(every: dict[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    """Of the layers those with these names, or inside of modules with these names."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        bad_type(OP, "layers", type(names).__name__, "a sequence of names of modules, or None for all layers")
    chosen = []
    for wanted in names:
        if not isinstance(wanted, str):
            bad_type(OP, "layers", f"a {type(wanted).__name__}", "names of modules")
        below = [name for name in every if name == wanted or wanted == "" or name.startswith(f"{wanted}.")]
        if not below:
            bad_value(OP, "layers", repr(wanted), f"modules with layers; the layers are {', '.join(every)}")
        chosen += below
    if not chosen:
        bad_value(OP, "layers", "no names", "at least one, or None for all layers")
    return {name: module for name, module in every.items() if name in set(chosen)}


def unwrapped(model: object) -> nn.Module:
    """The module itself, where it was compiled."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        got = type(model).__name__
        bad_value(OP, "model", got, "the module before it is wrapped: each process would scale by a batch of its own")
    if not isinstance(model, nn.Module):
        bad_type(OP, "model", type(model).__name__, "a torch.nn.Module")
    while isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    return model


def arguments(batch: object) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """Positional and keyword arguments of the model, and the tensors among them."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, nn.Parameter):
        _bad_batch("a Parameter (weights, not data?)")
    elif isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, (tuple, list)):
        args = tuple(batch)
    elif isinstance(batch, dict) and all(isinstance(name, str) for name in batch):
        kwargs = batch
    else:
        _bad_batch(type(batch).__name__)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        _bad_batch(f"a {type(batch).__name__} without a tensor")
    return args, kwargs, tensors


def _bad_batch(got: str) -> NoReturn:
    bad_type(OP, "batch", got, "a tensor, or a tuple, list or dict of the model's arguments with a tensor among them")


def _separable(module: SeparableConv2d, visit: Visit, input: Tensor) -> Tensor:
    return module.pointwise(module.conv1(input))


def _separable_norm(
    module: SeparableConvBNAct2d, visit: Visit, input: Tensor, residual: Tensor | None = None
) -> Tensor:
    x = ACTIVATIONS[module.pre_activation](input)
    y = ACTIVATIONS[module.activation](module.bn(module.pointwise(module.conv1(x))))
    return y if residual is None else y + residual


def _upsample(module: UpsampleConv2d, visit: Visit, input: Tensor) -> Tensor:
    batched = input if input.dim() == 4 else input[None]
    wide = F.interpolate(batched, scale_factor=2.0, mode="nearest")
    y = visit(module, lambda: F.conv2d(wide, module.weight, module.bias, padding=1))
    if module.bn is not None:
        y = module.bn(y)
    y = ACTIVATIONS[module.activation](y)
    return y if input.dim() == 4 else y[0]


def _color_transform(module: ColorTransform, visit: Visit, image: Tensor) -> Tensor:
    variant = _VARIANTS[module.variant]
    if variant.activation != "leaky_relu":
        return ColorTransform.forward(module, image)
    features = image if module.bn is None else module._features(module.bn, image, variant.logarithms)
    x = centered(features, module.mean, module.scale, module.conv1.weight.dtype)
    z = module.conv2(F.leaky_relu(module.conv1(x), module.negative_slope))
    return F.leaky_relu(z + x if variant.residual else z, module.negative_slope)


# By the forward they stand for: a subclass with another one is none of these.
UNFUSED: dict[Any, Callable[..., Tensor]] = {
    SeparableConv2d.forward: _separable,
    SeparableConvBNAct2d.forward: _separable_norm,
    UpsampleConv2d.forward: _upsample,
    ColorTransform.forward: _color_transform,
}

Visit = Callable[[nn.Module, Callable[[], Tensor]], Tensor]
"""Called with a layer and what computes its output; returns the output to go on with."""


@contextlib.contextmanager
def watched(model: nn.Module, modules: Sequence[nn.Module], visit: Visit) -> Iterator[None]:
    """`visit` is called instead of each of `modules`, also of those that perfvl's own modules run without a call."""
    patched: list[tuple[nn.Module, Any]] = []

    def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
        patched.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    for module in model.modules():
        unfused = UNFUSED.get(type(module).forward)
        if unfused is not None and "forward" not in module.__dict__:
            patch(module, lambda *args, _run=unfused, _module=module, **kw: _run(_module, visit, *args, **kw))
    for module in modules:
        if not isinstance(module, UpsampleConv2d):
            own = module.forward
            patch(module, lambda *args, _own=own, _module=module, **kw: visit(_module, lambda: _own(*args, **kw)))
    try:
        yield
    finally:
        for module, before in reversed(patched):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


@contextlib.contextmanager
def at_rest(model: nn.Module, device: torch.device, *, evaluating: bool = False) -> Iterator[None]:
    """Eager, without autocast, and modules with neither children nor buffers are in evaluation mode: dropout is.

    Norms are not, if they train: running statistics say nothing before. Nor is what holds others and may have heads for
    training alone. With `evaluating` everything is. Modes and buffers are afterwards what they were.
    """
    training = [module for module in model.modules() if module.training]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # Transformer layers have a path of their own for evaluation that calls no layer.
        torch.backends.mha.set_fastpath_enabled(False)
        for module in training:
            module.training = not evaluating and bool(module._modules or module._buffers)
        # Where nothing was compiled the compiler is not imported, which takes seconds.
        compiled = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        with eager, torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in training:
            module.training = True
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
