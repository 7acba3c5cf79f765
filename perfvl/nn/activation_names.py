"""The activations of the CaffeNet study by their published names, alone and beside a batch norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from perfvl.nn.activation import APL, FELU, Asinh, ELULeaky, FReLU, Maxout, RReLU, ScaledTanh, ShiftedSoftplus, VLReLU
from perfvl.nn.fused_blocks import is_touched
from perfvl.ops import norm_act
from perfvl.ops._library import bad_type, bad_value

MODES = ("paper", "reference")

# By published name. Those in the second table have parameters of channels (or positions) and are told how many.
_PLAIN: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "scaled_tanh": ScaledTanh,
    "asinh": Asinh,
    "vlrelu": VLReLU,
    "rrelu": RReLU,
    "elu": nn.ELU,
    "elu_leaky": ELULeaky,
    "softplus": ShiftedSoftplus,
    "selu": nn.SELU,
    "maxout": Maxout,
    "identity": nn.Identity,
}
_LEARNED: dict[str, Callable[..., nn.Module]] = {
    "prelu": nn.PReLU,
    "frelu": FReLU,
    "felu": FELU,
    "apl2": APL,
    "apl5": APL,
}
# What the study's slides say (or, where they say nothing, its network definitions), and what was trained.
_DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scaled_tanh": ({"a": 1.73, "b": 2 / 3}, {"a": 1.759, "b": 0.6666667}),
    "vlrelu": ({"slope": 1 / 3}, {"slope": 0.3}),
    "rrelu": (
        {"lower": 0.1, "upper": 0.5, "convention": "slope"},
        {"lower": 10.0, "upper": 30.0, "convention": "divide"},
    ),
    "prelu": ({"init": 0.3}, {"init": 0.3}),
    "apl2": ({"segments": 2}, {"segments": 2, "shared": "position"}),
    "apl5": ({"segments": 5}, {"segments": 5, "shared": "position"}),
}
ACTIVATION_NAMES = (*_PLAIN, *_LEARNED)


def activation(
    name: str, num_parameters: int | Sequence[int] | None = None, *, mode: str = "paper", **options: Any
) -> nn.Module:
    """An activation of the CaffeNet study by its published name.

    Args:
        name: relu, tanh, sigmoid, scaled_tanh, asinh, vlrelu, rrelu, elu, elu_leaky, softplus, selu, maxout, identity,
            or, with learned parameters, prelu, frelu, felu, apl2, apl5.
        num_parameters: how many channels those with learned parameters have; the others do not need it. The sizes
            (C, H, W) of a sample for parameters of positions.
        mode: whose constants are the defaults: "paper", those of the slides; "reference", those of the networks that
            were trained: a slope of 0.3 for vlrelu, ``x / U(10, 30)`` for rrelu, a = 1.759 for scaled_tanh, parameters
            of positions for apl2 and apl5.
        **options: of the class: alpha of `nn.ELU`, slope of :class:`VLReLU`, pieces of :class:`Maxout`, ...

    Raises:
        ValueError: an unknown name or mode; no `num_parameters` where they are needed.
        TypeError: an option that the class does not have.

    Example:
        >>> activation("elu", alpha=0.5)
        ELU(alpha=0.5)
        >>> activation("vlrelu", mode="reference")
        VLReLU(negative_slope=0.3)
    """
    if name not in ACTIVATION_NAMES:
        bad_value("activation", "name", repr(name), f"one of {', '.join(ACTIVATION_NAMES)}")
    if mode not in MODES:
        bad_value("activation", "mode", repr(mode), '"paper" or "reference"')
    if name in _DEFAULTS:
        options = _DEFAULTS[name][MODES.index(mode)] | options
    if name in _PLAIN:
        return _PLAIN[name](**options)
    if num_parameters is None:
        bad_value("activation", "num_parameters", None, f"the channels that {name} has parameters of")
    return _LEARNED[name](num_parameters, **options)


# What the fused op knows of activations: its name for them, and which attribute is its parameter.
_FUSED: dict[type[nn.Module], tuple[str, str]] = {
    nn.Identity: ("identity", ""),
    nn.ReLU: ("relu", ""),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    VLReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.Tanh: ("tanh", ""),
    nn.Sigmoid: ("sigmoid", ""),
}
_named = activation  # where an argument has the function's name
IN_PLACE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU)  # of which backward needs the result alone


class NormAct2d(nn.BatchNorm2d):
    """Batch norm and an activation: ``act(bn(x))`` or ``bn(act(x))``, the study's two places for the norm.

    The state_dict is that of the `nn.BatchNorm2d` (and of an activation that learns). ReLU, leaky ReLU, ELU, tanh,
    sigmoid and identity run with the norm in as few passes over memory as there are, where that is the fastest; there
    backward keeps the input alone. All else, and an activation with hooks, is PyTorch's own functions one by one; of
    those an activation built from its name works in the memory of the norm's output, where backward allows.
    Top-1 with ReLU: no norm 0.471, before 0.474 (affine 0.478), after 0.499 (affine 0.493).

    Args:
        num_features: channels of the norm.
        activation: a name for :func:`activation`, or a module. A maxout before the norm leaves fewer channels.
        order: "before": the norm before the activation; "after": behind it.
        affine: whether the norm has a weight and a bias.
        eps, momentum: of `nn.BatchNorm2d`.

    Raises:
        TypeError: an activation that is neither a name nor a module.
        ValueError: an unknown order or name.

    Example:
        >>> import torch
        >>> NormAct2d(8, "relu", order="after")(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        activation: str | nn.Module,
        *,
        order: str = "before",
        affine: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        if not isinstance(activation, (str, nn.Module)):
            bad_type("NormAct2d", "activation", type(activation).__name__, "a name or an nn.Module")
        if order not in ("before", "after"):
            bad_value("NormAct2d", "order", repr(order), '"before" or "after"')
        self.order = order
        module = _named(activation, num_features) if isinstance(activation, str) else activation
        if order == "before" and isinstance(activation, str) and isinstance(module, IN_PLACE):
            module.inplace = True
        self.activation: nn.Module = module

    def forward(self, input: Tensor) -> Tensor:
        fused = self._fused(input)
        if fused is not None:
            return fused
        if self.order == "before":
            return self.activation(super().forward(input))
        return super().forward(self.activation(input))

    def _fused(self, input: Tensor) -> Tensor | None:
        """Norm and activation in one, where that is what their own calls would do and the faster way."""
        act = self.activation
        if type(act) not in _FUSED or not isinstance(input, Tensor):
            return None
        name, parameter = _FUSED[type(act)]
        batch = self.training or (self.running_mean is None and self.running_var is None)
        if not norm_act.pays(input, name, self.order, training=batch) or is_touched(act):
            return None
        if self.order == "after" and getattr(act, "inplace", False):  # writes to the input as well
            return None
        if not torch.compiler.is_compiling() and _has_any_global_hook():
            return None
        given = (self.weight, self.bias, self.running_mean, self.running_var)
        if not norm_act.fits(input, self.num_features, given, training=batch):
            return None
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative
                momentum = 1.0 / float(self.num_batches_tracked)
        unused = self.training and not self.track_running_stats
        running = (None, None) if unused else given[2:]
        return norm_act.run(
            input,
            (*given[:2], *running),
            training=batch,
            momentum=momentum,
            eps=self.eps,
            activation=name,
            parameter=getattr(act, parameter) if parameter else 0.0,
            order=self.order,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order!r}"
