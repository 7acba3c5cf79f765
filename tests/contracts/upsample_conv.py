"""upsample_conv2d under the contract: dtypes, layouts, channels, image sizes, activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample

import perfvl.functional as pf
from perfvl.nn import UpsampleConv2d

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# The kernels sum taps (and pixels) before they multiply: roundings of their own, of a few ulps.
SLACK = {F32: 4e-6, F64: 1e-12, BF16: 1e-3, F16: 2e-4}
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}


def upsampled(input, weight, bias=None, *, activation="none"):
    """What users run."""
    batched = input if input.dim() == 4 else input[None]
    u = F.interpolate(batched, scale_factor=2, mode="nearest")
    y = ACTIVATIONS[activation](F.conv2d(u, weight, bias, padding=1))
    return y if input.dim() == 4 else y[0]


def tensors(
    device: str,
    shape: tuple[int, ...],
    outputs: int,
    *,
    bias: bool = False,
    dtype: torch.dtype = F32,
    channels_last: bool = True,
) -> dict[str, Any]:
    """Weights such that outputs are near 1."""
    channels = shape[-3]
    x = torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    found = {"input": x, "weight": torch.randn(outputs, channels, 3, 3) / (3 * channels**0.5)}
    if bias:
        found["bias"] = torch.randn(outputs)
    return {name: t.to(device, dtype).requires_grad_() for name, t in found.items()}


def clear_of_zero(inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs before the activation are far from its kink, so that a rounding moves none across it."""
    found = {name: (0.4 * inputs[name].detach()).requires_grad_() for name in ("input", "weight")}
    bias = torch.tensor([-2.0, -1.5, 1.5, 2.0, 2.5, 3.0, -3.0, 1.5]).repeat(len(inputs["weight"]) // 8)
    return found | {"bias": bias.to(inputs["weight"]).requires_grad_()}


def samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any], **options: Any) -> None:
        found.append(Sample(name, {**inputs, **options}, upsampled, SLACK[inputs["input"].dtype]))

    def make(shape: tuple[int, ...], outputs: int, **options: Any) -> dict[str, Any]:
        return tensors(device, shape, outputs, **options)

    def changed(inputs: dict[str, Any], **change: Any) -> dict[str, Any]:
        """Other layouts: a function of each tensor's values, which keeps them."""
        return inputs | {name: f(inputs[name].detach()).requires_grad_() for name, f in change.items()}

    # Sizes and channels, in both layouts.
    for shape, outputs in [
        ((1, 3, 1, 1), 4),
        ((3, 17, 1, 7), 5),
        ((2, 64, 5, 3), 24),
        ((2, 1, 4, 4), 3),
        ((3, 3, 7, 1), 1),
        ((2, 24, 16, 11), 17),
        ((1, 33, 2, 2), 130),
        ((1, 130, 9, 33), 64),
        ((5, 16, 3, 19), 33),
    ]:
        for channels_last in (True, False):
            layout = "channels_last" if channels_last else "NCHW"
            add(f"{shape} to {outputs}, {layout}", make(shape, outputs, bias=True, channels_last=channels_last))
    add("no batch", make((24, 7, 10), 16, bias=True))
    add("no bias", make((2, 17, 6, 6), 8))

    # Activations, with and without gradients.
    for name in ACTIVATIONS:
        scaled = changed(make((2, 20, 4, 5), 18, bias=True), input=lambda x: 3 * x)
        add(f"activation {name}", scaled, activation=name)
        add(f"activation {name}, nothing learns", {k: v.detach() for k, v in scaled.items()}, activation=name)

    # Half precision, and float64.
    for dtype in (BF16, F16, F64):
        for channels_last in (True, False):
            options = {"bias": True, "dtype": dtype, "channels_last": channels_last}
            add(f"{dtype}, {channels_last=}", make((2, 40, 7, 5), 33, **options))
            add(f"{dtype}, one pixel, {channels_last=}", make((2, 3, 1, 1), 5, **options))
            add(f"{dtype}, one channel, {channels_last=}", make((3, 1, 4, 4), 17, **options))
            add(f"{dtype}, smooth, {channels_last=}", make((2, 24, 4, 9), 40, **options), activation="silu")
            relu = clear_of_zero(make((2, 17, 8, 5), 24, **options))
            add(f"{dtype}, relu, {channels_last=}", relu, activation="relu")

    # Layouts.
    base = make((2, 12, 6, 5), 14, bias=True)
    layouts = {
        "rows sliced": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        "columns sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
        "channels sliced": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :12],
        "channels sliced, NCHW": lambda x: torch.cat([x, x], 1).contiguous()[:, 12:],
        "batch and width transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "offset by one": lambda x: torch.cat([x.new_zeros(1), x.contiguous().flatten()])[1:].view(x.shape),
    }
    for name, f in layouts.items():
        add(f"input with {name}", changed(base, input=f))
    one = base["input"].detach()
    add("input expanded over the batch", base | {"input": one[:1].expand(3, -1, -1, -1).requires_grad_()})
    add("input expanded over channels", base | {"input": one[:, :1].expand(-1, 12, -1, -1).requires_grad_()})
    add("input expanded over pixels", base | {"input": one[:, :, :1, :1].expand(-1, -1, 5, 4).requires_grad_()})
    strided = changed(
        base,
        weight=lambda w: w.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        bias=lambda b: b.repeat_interleave(3)[::3],
    )
    add("weights of other layouts", strided)
    add("channels_last weights", changed(base, weight=lambda w: w.to(memory_format=torch.channels_last)))
    expanded = base["weight"].detach()[:, :, :1, :1].expand(-1, -1, 3, 3).requires_grad_()
    add("one weight for all taps", base | {"weight": expanded})
    return found


def raw_samples(device: str) -> list[tuple]:
    """With and without scale, shift and activation."""
    found = []
    for dtype, channels_last in [(F32, True), (F32, False), (BF16, True), (F16, False)]:
        t = tensors(device, (2, 6, 5, 7), 9, dtype=dtype, channels_last=channels_last)
        x, weight = t["input"].detach(), t["weight"].detach()
        scale, shift = torch.rand(9, device=device) + 0.5, torch.randn(9, device=device)
        found += [(x, weight, None, None, 0), (x, weight, None, shift, 1), (x, weight, scale, shift, 5)]
    return found


def small(device: str) -> dict[str, Any]:
    return clear_of_zero(tensors(device, (2, 6, 4, 5), 8)) | {"activation": "relu"}


def resized(inputs: dict[str, Any]) -> dict[str, Any]:
    """Another batch size."""
    more = inputs["input"].detach().repeat(3, 1, 1, 1).to(memory_format=torch.channels_last)
    return inputs | {"input": more.requires_grad_()}


def emptied(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"input": inputs["input"].detach()[:0].requires_grad_()}


def double() -> dict[str, Any]:
    return tensors("cpu", (2, 2, 2, 3), 3, bias=True, dtype=F64) | {"activation": "silu"}


def saved_bytes(inputs: dict[str, Any]) -> int:
    """The input and the weights; the output, by which relu knows where it was negative. No upsampled image."""
    n, _, height, width = inputs["input"].shape
    kept = inputs["input"].numel() + inputs["weight"].numel() + 4 * n * len(inputs["weight"]) * height * width
    return 4 * kept


def bad_inputs() -> list[BadInput]:
    x, weight = torch.randn(2, 6, 4, 5), torch.randn(8, 6, 3, 3)

    def bad(name: str, error: type[Exception], argument: str, value: Any, message: str, **more: Any) -> BadInput:
        return BadInput(name, {argument: value, **more}, error, f"^upsample_conv2d: `{argument}` got {message}")

    V, T = ValueError, TypeError
    known = "one of none, relu, relu6, silu, hardswish, leaky_relu"
    return [
        bad("not a tensor", T, "input", [1.0], "list, expected a torch.Tensor"),
        bad("weight not a tensor", T, "weight", None, "NoneType, expected a torch.Tensor"),
        bad("bias not a tensor", T, "bias", 1.0, "float, expected a torch.Tensor"),
        bad("integer input", T, "input", x.long(), "torch.int64, expected a float"),
        bad("sparse input", T, "input", x.to_sparse(), "torch.sparse_coo, expected a dense"),
        bad("rank 2", V, "input", x[0, :, :, 0], r"shape \(6, 4\), expected 4 dimensions"),
        bad("rank 5", V, "input", x[None], r"shape \(1, 2, 6, 4, 5\), expected 4 dimensions"),
        bad("no pixels", V, "input", x[:, :, :0], r"shape \(2, 6, 0, 5\), expected at least one channel and one pixel"),
        bad("no channels", V, "input", x[:, :0], r"shape \(2, 0, 4, 5\), expected at least", weight=weight[:, :0]),
        bad("weight rank", V, "weight", weight[:, 0], r"shape \(8, 3, 3\), expected 4 dimensions"),
        bad("bias rank", V, "bias", torch.zeros(8, 1), r"shape \(8, 1\), expected 1 dim"),
        bad("other channels", V, "weight", weight[:, :5], r"shape \(8, 5, 3, 3\), expected \(O, 6, 3, 3\)"),
        bad("other kernel", V, "weight", torch.ones(8, 6, 4, 4), r"shape \(8, 6, 4, 4\), expected \(O, 6, 3, 3\)"),
        bad("no outputs", V, "weight", weight[:0], r"shape \(0, 6, 3, 3\), expected"),
        bad("bias length", V, "bias", torch.zeros(7), r"shape \(7,\), expected \(8,\)"),
        bad("other dtype", T, "weight", weight.double(), "torch.float64, expected the input's dtype torch.float32"),
        bad("half bias", T, "bias", torch.zeros(8).half(), "torch.float16, expected the input's dtype"),
        bad("elsewhere", V, "weight", weight.to("meta"), "device meta, expected the input's device cpu"),
        bad("unknown activation", V, "activation", "gelu", f"'gelu', expected {known}"),
        bad("no activation", V, "activation", None, f"None, expected {known}"),
    ]


def modules() -> list[torch.nn.Module]:
    found: list[torch.nn.Module] = [
        UpsampleConv2d(6, 4),
        UpsampleConv2d(6, 4, bias=False, activation="silu"),
        UpsampleConv2d(6, 4, bias=False, batch_norm=True, activation="relu"),
        UpsampleConv2d(6, 4, batch_norm=True, momentum=None),
    ]
    trained = UpsampleConv2d(6, 4, bias=False, batch_norm=True, activation="relu")
    trained(torch.randn(2, 6, 5, 5))
    return [*found, trained.eval()]


UPSAMPLE_CONV = OpContract(
    name="upsample_conv2d",
    call=pf.upsample_conv2d,
    samples=samples,
    raw_op=torch.ops.perfvl.upsample_conv.default,
    raw_samples=raw_samples,
    small=small,
    double=double,
    bad_inputs=bad_inputs(),
    cuda="native",
    saved_bytes=saved_bytes,
    modules=modules,
    call_module=lambda module, inputs: module(inputs["input"]),
    resize=resized,
    empty=emptied,
    autocast_output=True,
)
