"""StackGAN's conditioning: convolutions over [image, text repeated over space] without the repetition, and the
condition drawn from a text embedding.

Top to bottom: the public convolution, its checks, the part that a shared image convolution is completed with, the
condition and its divergence, autograd, the torch ops with their fakes, the CUDA implementation of the taps.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl import backends
from perfvl.ops._library import LIBRARY, autocast_dtype, bad_value, check_name, check_tensor, refuse_second_derivative
from perfvl.ops.depthwise_conv import dense
from perfvl.reference import conditioning as reference
from perfvl.reference.conditioning import PROJECTION_CODES, PROJECTIONS


def conditioned_conv2d(input: Tensor, condition: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    r"""``y = conv3x3([x, c repeated over space], weight) + bias``, with nothing repeated and nothing concatenated.

    The same as ``F.conv2d(torch.cat([x, c[:, :, None, None].expand(-1, -1, H, W)], 1), weight, bias, padding=1)``
    (StackGAN, arXiv:1612.03242, sections 3.2 and 3.3). Of the condition a pixel sees one number for each tap that falls
    inside the image, so there are nine kinds of pixels: top, inner, bottom x left, inner, right.

    Args:
        input: [N, C, H, W], any strides; NCHW or channels_last goes in and comes out.
        condition: [N, E].
        weight: [O, C + E, 3, 3]; input channels first.
        bias: [O].

    Returns:
        [N, O, H, W].

    dtypes: float32, bfloat16 and float16 (float64 runs the plain PyTorch reference); all tensors alike, as `F.conv2d`
    wants them; autocast casts as it does for `F.conv2d`. What the condition adds is summed in float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; no channel, no pixel, an empty condition.
        RuntimeError: on backward through the gradient (second order).

    Cost: 18 N O (H W C + E) FLOP forward, where the concatenation takes 18 N O H W (C + E); the condition's part moves
    the image once more. Saves `input`, `condition` and `weight`. On the CPU the concatenation runs where it is faster:
    where a few pixels meet large weights, of which the library's convolution copies the image's part, and where there
    is little to compute.

    Example:
        >>> import torch
        >>> x, c = torch.randn(8, 64, 4, 4), torch.randn(8, 32)
        >>> conditioned_conv2d(x, c, torch.randn(64, 96, 3, 3)).shape
        torch.Size([8, 64, 4, 4])
    """
    _check(input, condition, weight, bias)
    if not _has_kernel(input) or (input.is_cpu and not _is_faster(input, condition, weight)):
        return reference.conditioned_conv(input, condition, weight, bias)
    # Split and not sliced: backward then writes one gradient of the whole weight.
    of_image, of_condition = weight.split((input.shape[1], condition.shape[1]), 1)
    return add_condition(F.conv2d(input, of_image, bias, padding=1), condition, of_condition)


def _check(input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "conditioned_conv2d"
    for name, value, dims in (("input", input, 4), ("condition", condition, 2), ("weight", weight, 4)):
        check_tensor(op, name, value, dims, input)
    if 0 in input.shape[1:]:
        bad_value(op, "input", f"shape {tuple(input.shape)}", "at least one channel and one pixel")
    if condition.shape[0] != input.shape[0] or condition.shape[1] == 0:
        bad_value(op, "condition", f"shape {tuple(condition.shape)}", f"({input.shape[0]}, E) beside the input, E > 0")
    channels = input.shape[1] + condition.shape[1]
    if weight.shape[0] == 0 or weight.shape[1:] != (channels, 3, 3):
        expected = (
            f"(O, {channels}, 3, 3): {input.shape[1]} channels of the input, {condition.shape[1]} of the condition"
        )
        bad_value(op, "weight", f"shape {tuple(weight.shape)}", expected)
    if bias is not None:
        check_tensor(op, "bias", bias, 1, input)
        if bias.shape[0] != weight.shape[0]:
            bad_value(op, "bias", f"shape {tuple(bias.shape)}", f"({weight.shape[0]},)")


def _has_kernel(input: Tensor) -> bool:
    if input.numel() == 0 or input.dtype == torch.float64:
        return False
    return backends.choose(input, cuda="native") != "reference"


def _is_faster(input: Tensor, condition: Tensor, weight: Tensor) -> bool:
    """CPU: where the products that are saved take longer than a copy of the image's weights, and than the more calls.
    Of 16-bit numbers the library's products are faster, and the rest is not."""
    seen = input.shape[0] * input.shape[2] * input.shape[3] * condition.shape[1]
    wide = (autocast_dtype(input) or input.dtype) == torch.float32
    copies, products = (64, 1 << 21) if wide else (128, 1 << 24)
    return seen >= copies * input.shape[1] and seen * weight.shape[0] >= products


def add_condition(image: Tensor, condition: Tensor, weight: Tensor) -> Tensor:
    """``image + conv3x3(condition repeated over space, weight)``: image [N, O, H, W], condition [N, E], weight
    [O, E, 3, 3].

    Private, unchecked: what completes an image convolution that several conditions share. Takes any strides and any
    float dtype of each, and gives the dtype and the layout of the image. Saves `condition` and `weight` alone.
    """
    if not _has_kernel(image):
        return reference.add_condition(image, condition, weight)
    if torch.is_grad_enabled() and (image.requires_grad or condition.requires_grad or weight.requires_grad):
        return _AddCondition.apply(image, condition, weight)
    return _ADD_TAPS(image, _TAPS(condition, weight))


class ConditioningOutput(NamedTuple):
    """What StackGAN draws from a text: the condition [N, e], the mean and the logarithm of the variance of its normal
    distribution [N, e], and the divergence of that from N(0, 1), a scalar: the mean over all N e elements."""

    condition: Tensor
    mu: Tensor
    logvar: Tensor
    kl: Tensor


def conditioning_augmentation(
    text: Tensor, weight: Tensor, bias: Tensor, eps: Tensor, *, activation: str = "relu"
) -> ConditioningOutput:
    r"""``c = mu + eps exp(logvar / 2)`` with ``[mu, logvar] = activation(text weight^T + bias)``, and its divergence.

    Private: :class:`perfvl.nn.ConditioningAugmentation` is the public form. One op behind the linear layer's product.

    Args:
        text: [N, T].
        weight: [2 e, T], with "glu" [4 e, T].
        bias: [2 e], with "glu" [4 e].
        eps: [N, e], noise; no gradient flows through it.
        activation: "relu", "leaky_relu" (slope 0.2), "none" or "glu" (first half times the sigmoid of the second).

    Returns:
        condition, mu and logvar in the dtype of the linear layer's product, kl in float32 (float64 for float64).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; an unknown activation; eps that requires a gradient.
        RuntimeError: on backward through the gradient (second order).

    Cost: 2 N T 2 e FLOP and one pass over the product. Saves `text`, `weight`, mu, logvar and `eps`; with "glu" the
    product is computed again in backward.

    Example:
        >>> import torch
        >>> weight, eps = torch.randn(256, 1024), torch.randn(16, 128)
        >>> conditioning_augmentation(torch.randn(16, 1024), weight, torch.zeros(256), eps).condition.shape
        torch.Size([16, 128])
    """
    _check_augmentation(text, weight, bias, eps, activation)
    dtype = autocast_dtype(text)
    if dtype is not None:
        text, weight, bias = text.to(dtype), weight.to(dtype), bias.to(dtype)
    eps = eps.to(text.dtype)
    with _without_autocast(text.device.type):
        if not _has_kernel(text) or eps.shape[1] == 0:
            return ConditioningOutput(*reference.augment(F.linear(text, weight, bias), eps, activation))
        code = PROJECTION_CODES[activation]
        if torch.is_grad_enabled() and (text.requires_grad or weight.requires_grad or bias.requires_grad):
            return ConditioningOutput(*_Augment.apply(text, weight, bias, (eps, code)))
        return ConditioningOutput(*_AUGMENT(F.linear(text, weight, bias), eps, code))


def _without_autocast(device: str) -> Any:
    """The tensors have been cast; the context would take as long as the op where there is nothing to switch off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _check_augmentation(text: Tensor, weight: Tensor, bias: Tensor, eps: Tensor, activation: str) -> None:
    op = "conditioning_augmentation"
    for name, value, dims in (("text", text, 2), ("weight", weight, 2), ("bias", bias, 1), ("eps", eps, 2)):
        check_tensor(op, name, value, dims, text)
    check_name(op, "activation", activation, PROJECTIONS)
    parts = 4 if activation == "glu" else 2
    if weight.shape[0] % parts or weight.shape[1] != text.shape[1]:
        bad_value(op, "weight", f"shape {tuple(weight.shape)}", f"({parts} e, {text.shape[1]})")
    if bias.shape[0] != weight.shape[0]:
        bad_value(op, "bias", f"shape {tuple(bias.shape)}", f"({weight.shape[0]},)")
    expected = (text.shape[0], weight.shape[0] // parts)
    if eps.shape != expected:
        bad_value(op, "eps", f"shape {tuple(eps.shape)}", f"{expected}")
    if eps.requires_grad:
        bad_value(op, "eps", "a tensor that requires a gradient", "noise, through which none flows")


class _AddCondition(torch.autograd.Function):
    """Saves the condition and its weights: the gradient of the image is the output's."""

    @staticmethod
    def forward(ctx, image, condition, weight):
        ctx.save_for_backward(condition, weight)
        return _ADD_TAPS(image, _TAPS(condition, weight))

    @staticmethod
    def backward(ctx, grad_output):
        condition, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [grad_output if ctx.needs_input_grad[0] else None, None, None]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            with _without_autocast(grad_output.device.type):
                outputs, dim = weight.shape[:2]
                rows = _TAP_SUMS(grad_output).transpose(1, 2).flatten(1)  # [N, 9 O], as channels_last weights lie
                if ctx.needs_input_grad[1]:
                    weights = weight.permute(0, 2, 3, 1).float().reshape(-1, dim)
                    grads[1] = torch.mm(rows, weights).to(condition.dtype)
                if ctx.needs_input_grad[2]:
                    of_tap = torch.mm(rows.t(), condition.float()).to(weight.dtype)  # [9 O, E]
                    grads[2] = of_tap.view(outputs, 3, 3, dim).permute(0, 3, 1, 2)
        return tuple(refuse_second_derivative("conditioned_conv2d", grads, [condition, weight]))


class _Augment(torch.autograd.Function):
    """The linear layer and what follows it."""

    @staticmethod
    def forward(ctx, text, weight, bias, given):
        eps, code = given
        condition, mu, logvar, kl = _AUGMENT(F.linear(text, weight, bias), eps, code)
        glu = code == PROJECTION_CODES["glu"]
        ctx.save_for_backward(text, weight, bias if glu else None, mu, logvar, eps)
        ctx.code = code
        ctx.set_materialize_grads(False)
        return condition, mu, logvar, kl

    @staticmethod
    def backward(ctx, grad_condition, grad_mu, grad_logvar, grad_kl):
        if grad_condition is None and grad_mu is None and grad_logvar is None and grad_kl is None:
            return None, None, None, None
        text, weight, bias, mu, logvar, eps = ctx.saved_tensors
        needed = ctx.needs_input_grad
        with _without_autocast(mu.device.type):
            projected = None if bias is None else F.linear(text, weight, bias)
            grad = _AUGMENT_BACKWARD(
                grad_condition, grad_mu, grad_logvar, grad_kl, mu, logvar, eps, projected, ctx.code
            )
            grads = [
                torch.mm(grad, weight) if needed[0] else None,
                torch.mm(grad.t(), text) if needed[1] else None,
                grad.sum(0) if needed[2] else None,
            ]
        return *refuse_second_derivative("conditioning_augmentation", grads, [text, weight, mu]), None


LIBRARY.define("condition_taps(Tensor condition, Tensor weight) -> Tensor")
LIBRARY.define("add_taps(Tensor image, Tensor taps) -> Tensor")
LIBRARY.define("tap_sums(Tensor grad) -> Tensor")
LIBRARY.define(
    "conditioning_augmentation(Tensor projected, Tensor eps, int activation) "
    "-> (Tensor condition, Tensor mu, Tensor logvar, Tensor kl)"
)
LIBRARY.define(
    "conditioning_augmentation_backward(Tensor? grad_condition, Tensor? grad_mu, Tensor? grad_logvar, "
    "Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor eps, Tensor? projected, int activation) -> Tensor"
)
_TAPS = torch.ops.perfvl.condition_taps.default
_ADD_TAPS = torch.ops.perfvl.add_taps.default
_TAP_SUMS = torch.ops.perfvl.tap_sums.default
_AUGMENT = torch.ops.perfvl.conditioning_augmentation.default
_AUGMENT_BACKWARD = torch.ops.perfvl.conditioning_augmentation_backward.default


@torch.library.register_fake("perfvl::condition_taps", lib=LIBRARY)
def _fake_taps(condition, weight):
    return torch.empty((condition.shape[0], 9, weight.shape[0]), dtype=torch.float32, device=condition.device)


@torch.library.register_fake("perfvl::add_taps", lib=LIBRARY)
def _fake_add(image, taps):
    return dense(image, image.shape)


@torch.library.register_fake("perfvl::tap_sums", lib=LIBRARY)
def _fake_sums(grad):
    return torch.empty((grad.shape[0], 9, grad.shape[1]), dtype=torch.float32, device=grad.device)


@torch.library.register_fake("perfvl::conditioning_augmentation", lib=LIBRARY)
def _fake_augment(projected, eps, activation):
    condition, mu, logvar = (torch.empty(eps.shape, dtype=projected.dtype, device=eps.device) for _ in range(3))
    return condition, mu, logvar, torch.empty((), dtype=torch.float32, device=eps.device)


@torch.library.register_fake("perfvl::conditioning_augmentation_backward", lib=LIBRARY)
def _fake_backward(grad_condition, grad_mu, grad_logvar, grad_kl, mu, logvar, eps, projected, activation):
    parts = 4 if activation == PROJECTION_CODES["glu"] else 2
    return torch.empty((mu.shape[0], parts * mu.shape[1]), dtype=mu.dtype, device=mu.device)


def _cuda_taps(condition: Tensor, weight: Tensor) -> Tensor:
    """A product for the library."""
    by_tap = weight.permute(2, 3, 0, 1).float().reshape(-1, weight.shape[1])  # [9 O, E]
    with _without_autocast("cuda"):
        taps = torch.mm(condition.float(), by_tap.t())
    return taps.view(condition.shape[0], 9, weight.shape[0])


LIBRARY.impl("condition_taps", _cuda_taps, "CUDA")
