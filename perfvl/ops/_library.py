"""What every op shares: the torch.library namespace, and argument checks that name argument, got and expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

# Schemas live in Python, so that an op's name exists whether or not its kernels could be built.
LIBRARY = torch.library.Library("perfvl", "FRAGMENT")

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def bad_value(op: str, argument: str, got: object, expected: str) -> NoReturn:
    raise ValueError(f"{op}: `{argument}` got {got}, expected {expected}")


def bad_type(op: str, argument: str, got: object, expected: str) -> NoReturn:
    raise TypeError(f"{op}: `{argument}` got {got}, expected {expected}")


def check_floating(op: str, argument: str, value: Any, beside: Tensor | None = None) -> None:
    """`value` must be a strided, floating-point tensor, on the device of `beside`."""
    if not isinstance(value, Tensor):
        bad_type(op, argument, type(value).__name__, "a torch.Tensor")
    if value.dtype not in FLOATING:
        bad_type(op, argument, value.dtype, "a float32, bfloat16, float16 or float64 tensor")
    if value.layout is not torch.strided:
        bad_type(op, argument, value.layout, "a dense (strided) tensor")
    if beside is not None and value.device != beside.device:
        bad_value(op, argument, f"device {value.device}", f"the input's device {beside.device}")


def check_matrix(op: str, argument: str, value: Any, query: Tensor | None = None) -> None:
    """`value` must be a two-dimensional, strided, floating-point tensor, on the device of `query`."""
    check_floating(op, argument, value)
    if value.dim() != 2:
        bad_value(op, argument, f"shape {tuple(value.shape)}", "2 dimensions")
    if query is not None and value.device != query.device:
        bad_value(op, argument, f"device {value.device}", f"the query's device {query.device}")


def check_tensor(op: str, argument: str, value: Any, dims: int, beside: Tensor) -> None:
    """`value` must be a strided, floating-point tensor of `dims` dimensions, of the device and dtype of `beside`.

    For operands of one convolution or product: autocast, where it is on, makes the dtypes equal.
    """
    check_floating(op, argument, value)
    if value.dim() != dims:
        bad_value(op, argument, f"shape {tuple(value.shape)}", f"{dims} dimensions")
    if value.device != beside.device:
        bad_value(op, argument, f"device {value.device}", f"the input's device {beside.device}")
    if value.dtype != beside.dtype and autocast_dtype(beside) is None:
        bad_type(op, argument, value.dtype, f"the input's dtype {beside.dtype}")


def check_float(op: str, argument: str, value: object) -> None:
    """`value` must be a number of Python."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        bad_type(op, argument, type(value).__name__, "a float")


def check_bool(op: str, argument: str, value: object) -> None:
    """`value` must be True or False."""
    if not isinstance(value, bool):
        bad_type(op, argument, _shown(value), "a bool")


def check_name(op: str, argument: str, value: object, names: Iterable[str]) -> None:
    """`value` must be one of the names."""
    if not isinstance(value, str) or value not in names:
        few = " or ".join(f'"{name}"' for name in names)
        bad_value(op, argument, _shown(value), few if len(few) < 30 else f"one of {', '.join(names)}")


def _shown(value: object) -> str:
    """The value where it is short and to be had without looking at a device."""
    return repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def as_list(op: str, argument: str, value: object) -> list[Tensor]:
    """What `value` has, tensors or not: any number of them, but not one tensor's rows."""
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        bad_type(op, argument, type(value).__name__, "a list of tensors")
    return list(value)


def autocast_dtype(beside: Tensor) -> torch.dtype | None:
    """What autocast makes of the operands of a convolution or product, if it is on; float64 it leaves alone."""
    device = beside.device.type
    if beside.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_temperature(op: str, value: object, query: Tensor) -> None:
    """A float that is finite and not zero (negative is allowed), or a one-element floating tensor beside `query`."""
    if isinstance(value, Tensor):
        if value.dtype not in FLOATING:
            bad_type(op, "temperature", value.dtype, "a floating-point tensor")
        if value.numel() != 1:
            bad_value(op, "temperature", f"shape {tuple(value.shape)}", "a float or a tensor with one element")
        if value.device != query.device:
            bad_value(op, "temperature", f"device {value.device}", f"the query's device {query.device}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        bad_type(op, "temperature", type(value).__name__, "a float or a tensor with one element")
    elif value == 0 or not math.isfinite(value):
        bad_value(op, "temperature", value, "a finite number other than 0")


def same_device(*tensors: Tensor | None) -> None:
    """For fakes of ops that write: one tensor on the meta device brings a call to the fake, which would do nothing."""
    if len({t.device for t in tensors if t is not None}) > 1:
        raise RuntimeError("tensors on different devices")


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        ctx.count = count
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op}: second-order gradients are not supported by the fused kernels; "
            'run this part under perfvl.use_backend("reference")'
        )


def refuse_second_derivative(op: str, grads: list[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
    """Makes a gradient of these gradients an error instead of silently missing terms.

    Inside backward, grad mode is on only under ``create_graph=True``. ``once_differentiable`` would not do: it raises
    only where the incoming gradient itself requires grad, which that of ``loss.sum()`` does not.
    """
    if not torch.is_grad_enabled():
        return grads
    present = [g for g in grads if g is not None]
    guarded = iter(_NoSecondDerivative.apply(op, len(present), *present, *inputs))
    return [None if g is None else next(guarded) for g in grads]
