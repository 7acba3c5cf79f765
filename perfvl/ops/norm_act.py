"""Batch norm and an activation on either side of it, in as few passes over memory as there are.

Private: `NormAct2d` calls it. Top to bottom: the function, its checks, the choice of backend, autograd, the torch ops
with their fakes, the CUDA implementation. Kernels see images [N, C, H, W]; other inputs are given as such, without a
copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import (
    FLOATING,
    LIBRARY,
    bad_value,
    check_bool,
    check_float,
    check_floating,
    check_name,
    refuse_second_derivative,
)
from perfvl.ops.activation import as_given, as_images
from perfvl.ops.depthwise_conv import dense
from perfvl.reference import norm_act as reference
from perfvl.reference.norm_act import ACTIVATIONS, CODES

ORDERS = ("before", "after")
# Elements of a layer's input: below, a call costs more than the passes it saves. Many where it saves a single pass, for
# the norm is alone, or by running statistics and the activation simple and in place.
_FEW, _MANY = 2**16, 2**18


def norm_act(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    parameter: float = 0.0,
    order: str = "before",
) -> Tensor:
    r"""Batch norm and an activation: :math:`y = \phi(\mathrm{bn}(x))`, or :math:`y = \mathrm{bn}(\phi(x))`.

    :math:`\mathrm{bn}(z) = \gamma (z - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta` over all axes but the second (Ioffe
    and Szegedy 2015, arXiv:1502.03167, algorithm 1), the rest as `torch.nn.functional.batch_norm` has it.

    Args:
        input: [N, C] or [N, C, ...], float32, bfloat16, float16 or float64, any strides; NCHW or channels_last goes in
            and comes out.
        weight, bias: gamma and beta [C], or None for 1 and 0.
        running_mean, running_var: [C], both or none; needed where not training, where they stand for the batch's.
            Training moves them, in place: the variance is the unbiased one.
        training: whether the batch's own mean and variance (biased) are used.
        momentum: of the running statistics, r <- (1 - momentum) r + momentum b.
        eps: added to the variance.
        activation: "identity", "relu", "leaky_relu", "elu", "tanh" or "sigmoid".
        parameter: the slope of leaky_relu; alpha of elu.
        order: "before": the norm before the activation; "after": behind it.

    Returns:
        The input's shape and dtype. Computed in float32 and rounded once; float64 and parameters or statistics that
        are not float32 run the plain PyTorch reference.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; one value per channel while training; an unknown name.
        RuntimeError: on backward through the gradient (second order).

    Cost: training reads the input twice and writes the output; backward reads input and gradient twice and writes one
    gradient. On the CPU, planes of a channel that stay in the cache are read from memory once. Saves the input and four
    numbers a channel: neither the activation nor the normalised input. Sums are added in a fixed order.

    Example:
        >>> import torch
        >>> norm_act(torch.tensor([[-1.0], [1.0]]), eps=0.0)
        tensor([[0.],
                [1.]])
    """
    _check(input, weight, bias, running_mean, running_var, training, momentum, eps, activation, parameter, order)
    parameters = (weight, bias, running_mean, running_var)
    call = run if runs_fused(input, parameters) else _definition
    return call(
        input,
        parameters,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
        parameter=parameter,
        order=order,
    )


def _definition(input: Tensor, parameters: Sequence[Tensor | None], **settings: Any) -> Tensor:
    return reference.norm_act(input, *parameters, **settings)


def run(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    parameter: float,
    order: str,
) -> Tensor:
    """The fused op on arguments that `runs_fused`. `parameters`: weight, bias, running mean and variance."""
    settings = (training, float(eps), CODES[activation], float(parameter), order == "after")
    weight, bias, *running = parameters
    image, learned = as_images(input), (input, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
        output = _NormAct.apply(image, *parameters, float(momentum), settings)
    else:
        output = _run(image, parameters, float(momentum), settings)[0]
    if training:  # the op writes through raw pointers, of which autograd's version counters know nothing
        torch.autograd.graph.increment_version([t for t in running if t is not None])
    return as_given(output, input.shape)


def _check(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    parameter: float,
    order: str,
) -> None:
    check_floating("norm_act", "input", input)
    if input.dim() < 2:
        bad_value("norm_act", "input", f"shape {tuple(input.shape)}", "at least 2 dimensions, the second of channels")
    check_bool("norm_act", "training", training)
    channels = input.shape[1]
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in named.items():
        if value is not None:
            check_floating("norm_act", name, value, input)
            if value.shape != (channels,):
                bad_value("norm_act", name, f"shape {tuple(value.shape)}", f"({channels},)")
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        bad_value("norm_act", missing, None, "both running statistics or none")
    if not training and running_mean is None:
        bad_value("norm_act", "running_mean", None, "running statistics where the batch's are not used")
    for name, number in (("momentum", momentum), ("eps", eps), ("parameter", parameter)):
        check_float("norm_act", name, number)
        if not -math.inf < number < math.inf or (name == "eps" and number < 0):  # isfinite: unknown to torch.compile
            bad_value("norm_act", name, number, "a finite number" + (" of at least 0" if name == "eps" else ""))
    check_name("norm_act", "activation", activation, ACTIVATIONS)
    check_name("norm_act", "order", order, ORDERS)
    if training and input.shape[0] * math.prod(input.shape[2:]) == 1:  # the text of torch.nn.functional.batch_norm
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")


def runs_fused(input: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    """Whether there are kernels: by shape, dtype and device alone."""
    if input.dtype == torch.float64 or input.numel() == 0 or backends.choose(input, cuda="triton") == "reference":
        return False
    # The kernels' tensors are dense; a running statistic must be written where it is.
    return all(t is None or (t.dtype == torch.float32 and t.stride(0) == 1) for t in parameters)


def pays(input: Tensor, activation: str, order: str, *, training: bool) -> bool:
    """Whether the op on an image is faster than PyTorch's layers: by size and layout alone."""
    if input.dim() != 4 or input.layout is not torch.strided:
        return False
    if activation == "identity" and not training and not input.is_cuda:
        return False  # a pass either way
    one = activation == "identity" or (not training and order == "before" and activation in ("relu", "leaky_relu"))
    return input.numel() >= (_MANY if one and not input.is_cuda else _FEW)


def fits(input: Tensor, channels: int, parameters: Sequence[Tensor | None], *, training: bool) -> bool:
    """Whether `run` takes an image that `pays`, and a layer's parameters of so many channels."""
    if input.dtype not in FLOATING or input.shape[1] != channels or (training and input.numel() == channels):
        return False
    same = all(t is None or (t.device == input.device and t.shape == (channels,)) for t in parameters)
    both = (parameters[2] is None) == (parameters[3] is None)
    return same and both and runs_fused(input, parameters)


def _run(
    image: Tensor, parameters: Sequence[Tensor | None], momentum: float, settings: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    training, *others = settings
    return _OP(image, *parameters, training, momentum, *others)


class _NormAct(torch.autograd.Function):
    """Saves the input, the parameters and the statistics that were used."""

    @staticmethod
    def forward(ctx, input, weight, bias, running_mean, running_var, momentum, settings):
        parameters = (weight, bias, running_mean, running_var)
        output, mean, variance = _run(input, parameters, momentum, settings)
        ctx.save_for_backward(input, weight, bias, mean, variance)
        ctx.settings = settings
        return output

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        need_input, *need_affine = ctx.needs_input_grad[:3]
        found = _BACKWARD(grad_output, *saved, *ctx.settings, need_input, any(need_affine))
        grads = [
            found[0] if need_input else None,
            *(grad if need else None for grad, need in zip(found[1:], need_affine, strict=True)),
        ]
        inputs = [t for t in saved[:3] if t is not None]
        return *refuse_second_derivative("norm_act", grads, inputs), None, None, None, None


LIBRARY.define(
    "norm_act(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "bool training, float momentum, float eps, int activation, float parameter, bool after) "
    "-> (Tensor output, Tensor mean, Tensor variance)"
)
LIBRARY.define(
    "norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, "
    "bool training, float eps, int activation, float parameter, bool after, bool need_input, bool need_affine) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
_OP = torch.ops.perfvl.norm_act.default
_BACKWARD = torch.ops.perfvl.norm_act_backward.default


@torch.library.register_fake("perfvl::norm_act", lib=LIBRARY)
def _fake(
    input, weight, bias, running_mean, running_var, training, momentum, eps, activation, parameter, after
):  # fmt: skip
    mean, variance = (input.new_empty(input.shape[1], dtype=torch.float32) for _ in range(2))
    return dense(input, input.shape), mean, variance


@torch.library.register_fake("perfvl::norm_act_backward", lib=LIBRARY)
def _fake_backward(
    grad_output, input, weight, bias, mean, variance, training, eps, activation, parameter, after, need_input,
    need_affine,
):  # fmt: skip
    grad_input = dense(input, input.shape if need_input else (0, *input.shape[1:]))
    return grad_input, *(mean.new_empty(mean.shape[0] if need_affine else 0) for _ in range(2))


def _cuda(name: str) -> Callable[..., Any]:
    def run(*arguments):
        from perfvl.kernels import norm_act as kernels

        return getattr(kernels, name)(*arguments)

    return run


for _name in ("norm_act", "norm_act_backward"):
    LIBRARY.impl(_name, _cuda(_name), "CUDA")
