"""separable_conv2d under the contract: dtypes, layouts, channels, geometry, activations, residuals."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample

import perfvl.functional as pf
from perfvl.nn import SeparableConv2d, SeparableConvBNAct2d

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}


def two_convolutions(
    input,
    depthwise_weight,
    pointwise_weight,
    bias=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    pre_activation="none",
    activation="none",
    residual=None,
):
    """What users run. Paddings that `F.conv2d` does not know are pixels around its input."""
    a = ACTIVATIONS[pre_activation](input)
    if padding == "tf_same":
        sides = []
        for size, kernel, s, d in zip(
            input.shape[-2:], depthwise_weight.shape[2:], pair(stride), pair(dilation), strict=True
        ):
            total = max((-(-size // s) - 1) * s + d * (kernel - 1) + 1 - size, 0)
            sides += [total // 2, total - total // 2]
        padding = tuple(sides)
    if isinstance(padding, tuple) and len(padding) == 4:
        top, bottom, left, right = padding
        a, padding = F.pad(a, (left, right, top, bottom)), 0
    u = F.conv2d(a, depthwise_weight, None, stride, padding, dilation, groups=input.shape[-3])
    y = ACTIVATIONS[activation](F.conv2d(u, pointwise_weight, bias))
    return y if residual is None else y + residual


def pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def tensors(
    device: str,
    shape: tuple[int, ...],
    outputs: int,
    kernel: int | tuple[int, int] = 3,
    *,
    multiplier: int = 1,
    bias: bool = False,
    dtype: torch.dtype = F32,
    channels_last: bool = True,
) -> dict[str, Any]:
    """Weights such that numbers stay near 1 through both convolutions."""
    height, width = pair(kernel)
    inner = shape[-3] * multiplier
    x = torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    found = {
        "input": x,
        "depthwise_weight": torch.randn(inner, 1, height, width) / (height * width) ** 0.5,
        "pointwise_weight": torch.randn(outputs, inner, 1, 1) / inner**0.5,
    }
    if bias:
        found["bias"] = torch.randn(outputs)
    return {name: t.to(device, dtype).requires_grad_() for name, t in found.items()}


def samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any], slack: float = 4e-6, **options: Any) -> None:
        found.append(Sample(name, {**inputs, **options}, two_convolutions, slack))

    def make(shape: tuple[int, ...], outputs: int, kernel: Any = 3, **options: Any) -> dict[str, Any]:
        return tensors(device, shape, outputs, kernel, **options)

    def changed(inputs: dict[str, Any], **change: Any) -> dict[str, Any]:
        """Other layouts: a function of each tensor's values, which keeps them."""
        return inputs | {name: f(inputs[name].detach()).requires_grad_() for name, f in change.items()}

    # Sizes and channels, in both layouts.
    for shape, outputs in [
        ((1, 3, 37, 19), 24),
        ((2, 16, 19, 10), 5),
        ((1, 728, 7, 5), 24),
        ((2, 24, 10, 7), 130),
        ((2, 33, 7, 19), 16),
        ((3, 16, 1, 1), 1),
        ((2, 1, 10, 3), 3),
        ((1, 24, 1, 37), 728),
    ]:
        for channels_last in (True, False):
            layout = "channels_last" if channels_last else "NCHW"
            add(
                f"{shape} to {outputs}, {layout}",
                make(shape, outputs, bias=True, channels_last=channels_last),
                padding=1,
            )
    add("no batch", make((24, 7, 10), 16, bias=True), padding=1)

    # Geometry.
    for kernel, stride, padding, dilation in [
        (1, 1, 0, 1),
        (1, 2, 0, 1),
        (3, 1, 0, 1),
        (3, 2, 1, 1),
        (3, 3, 1, 1),
        (3, (2, 1), (0, 1), 1),
        (3, 1, 2, 2),
        (3, 1, 6, 6),
        (3, 2, 6, (1, 6)),
        (5, 1, 2, 1),
        (5, 2, 2, 1),
        (7, 1, 3, 1),
        (7, 3, 3, 2),
        ((3, 1), 1, (1, 0), 1),
        ((3, 7), 1, (1, 3), 1),
        ((3, 7), 2, (0, 3), (2, 1)),
        (2, 2, 0, 1),
        (4, 1, (1, 2, 2, 1), 1),
        (3, 2, (0, 1, 0, 1), 1),
        (3, 1, (0, 0, 4, 1), 1),
        (3, 1, "same", 2),
        (4, 1, "same", 1),
        (5, 1, "valid", 1),
        (3, 2, "tf_same", 1),
        (2, 3, "tf_same", 1),
        (5, (1, 2), "tf_same", 1),
        (3, 1, 9, 1),
    ]:
        for size in ((14, 11), (13, 16)):
            name = f"k {kernel}, stride {stride}, padding {padding}, dilation {dilation} on {size}"
            options = {"stride": stride, "padding": padding, "dilation": dilation}
            add(name, make((2, 12, *size), 10, kernel, channels_last=size[1] == 11), **options)
    add("kernel larger than the image", make((2, 8, 2, 3), 6, 7), padding=3)
    add("dilated kernel larger than the image", make((2, 8, 3, 4), 6), padding=6, dilation=6)
    for multiplier in (2, 3):
        for channels_last in (True, False):
            inputs = make((2, 5, 9, 10), 7, multiplier=multiplier, bias=True, channels_last=channels_last)
            add(f"depth multiplier {multiplier}, {channels_last=}", inputs, padding=1, stride=multiplier - 1)

    # Activations and residuals.
    for name in ACTIVATIONS:
        scaled = make((2, 20, 8, 9), 18, bias=True)
        add(f"pre_activation {name}", scaled, padding=1, pre_activation=name)
        add(f"activation {name}", changed(scaled, input=lambda x: 3 * x), padding=1, activation=name)
        frozen = {k: 3 * v.detach() for k, v in scaled.items()}
        add(f"both {name}, nothing learns", frozen, padding=1, pre_activation=name, activation=name)
    for shape, dtype in [
        ((2, 18, 8, 9), F32),
        ((18, 1, 1), F32),
        ((1, 1, 8, 9), F32),
        ((2, 18, 8, 9), F64),
        ((), BF16),
    ]:
        residual = torch.randn(shape).to(device, dtype)
        for learns in (True, False):
            inputs = make((2, 20, 8, 9), 18, bias=True) | {"residual": residual.clone().requires_grad_()}
            if not learns:
                inputs = {k: v.detach() for k, v in inputs.items()}
            name = f"residual {shape} {dtype}, {learns=}"
            add(name, inputs, padding=1, pre_activation="relu", activation="relu")
    transposed = torch.randn(2, 9, 8, 18, device=device).permute(0, 3, 2, 1)
    add("residual of another layout", make((2, 20, 8, 9), 18) | {"residual": transposed}, padding=1)

    # Half precision. Roundings near 0 move numbers across the kinks of activations, so those have their own slack.
    for dtype, slack in ((BF16, 4e-3), (F16, 5e-4)):
        for channels_last in (True, False):
            options = {"bias": True, "dtype": dtype, "channels_last": channels_last}
            add(f"{dtype}, {channels_last=}", make((2, 40, 10, 7), 33, **options), slack, padding=1)
            add(
                f"{dtype}, k 5, s 2, {channels_last=}",
                make((2, 24, 9, 13), 40, 5, **options),
                slack,
                padding=2,
                stride=2,
            )
        add(f"{dtype}, multiplier 2", make((2, 9, 8, 8), 12, multiplier=2, dtype=dtype), slack, padding=1)
        add(f"{dtype}, smooth", make((2, 24, 9, 8), 40, dtype=dtype), slack, padding=1, activation="silu")
        smooth = make((2, 24, 9, 8), 40, dtype=dtype)
        add(f"{dtype}, silu before", smooth, slack, padding=1, pre_activation="silu")
        kinked = make((2, 24, 9, 8), 40, bias=True, dtype=dtype)
        residual = torch.randn(2, 40, 9, 8, device=device, dtype=dtype).requires_grad_()
        add(
            f"{dtype}, relu and residual",
            kinked | {"residual": residual},
            5 * slack,
            padding=1,
            pre_activation="relu",
            activation="relu",
        )

    # Layouts.
    base = make((2, 12, 9, 10), 14, bias=True)
    layouts = {
        "rows sliced": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        "columns sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
        "channels sliced": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :12],
        "channels sliced, NCHW": lambda x: torch.cat([x, x], 1).contiguous()[:, 12:],
        "batch and width transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "offset by one": lambda x: torch.cat([x.new_zeros(1), x.contiguous().flatten()])[1:].view(x.shape),
    }
    for name, f in layouts.items():
        add(f"input with {name}", changed(base, input=f), padding=1, pre_activation="relu")
    one = base["input"].detach()
    add("input expanded over the batch", base | {"input": one[:1].expand(3, -1, -1, -1).requires_grad_()}, padding=1)
    add("input expanded over channels", base | {"input": one[:, :1].expand(-1, 12, -1, -1).requires_grad_()}, padding=1)
    add("input expanded over pixels", base | {"input": one[:, :, :1, :1].expand(-1, -1, 5, 4).requires_grad_()})
    strided = changed(
        base,
        depthwise_weight=lambda w: w.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        pointwise_weight=lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        bias=lambda b: b.repeat_interleave(3)[::3],
    )
    add("weights of other layouts", strided, padding=1)
    expanded = base["depthwise_weight"].detach()[:1].expand(12, -1, -1, -1).requires_grad_()
    add("one depthwise kernel for all channels", base | {"depthwise_weight": expanded}, padding=1)
    return found


def raw_samples(device: str) -> list[tuple]:
    """Scales and shifts in all three places, residual, statistics, and none of them."""
    found = []
    for dtype, channels_last, multiplier in [(F32, True, 1), (F32, False, 2), (BF16, True, 1), (F16, False, 1)]:
        t = [v.detach() for v in tensors(device, (2, 6, 5, 7), 9, multiplier=multiplier, dtype=dtype).values()]
        if not channels_last:
            t[0] = t[0].contiguous()
        per_input, per_inner, per_output = (torch.rand(n, device=device) + 0.5 for n in (6, 6 * multiplier, 9))
        residual = torch.randn(2, 9, 3, 7, device=device, dtype=dtype)
        x, depthwise, pointwise = t
        geometry = ([2, 1], [1, 1, 0, 2], [1, 1])
        for pre, mid, post, activations, statistics in [
            ((None, None), (None, None), (None, None), (0, 0, 0), False),
            ((per_input, -per_input), (None, None), (None, per_output), (1, 0, 0), True),
            ((per_input, per_input), (per_inner, -per_inner), (per_output, per_output), (3, 2, 4), False),
        ]:
            added = None if statistics or pre[0] is None else residual
            affine = (x, *pre, depthwise, *mid, pointwise, *post, added)
            found.append((*affine, *geometry, *activations, statistics))
    return found


def small(device: str) -> dict[str, Any]:
    """Outputs before the activation are far from its kink, so that a rounding moves none across it."""
    inputs = tensors(device, (2, 6, 7, 5), 8, channels_last=True)
    inputs["pointwise_weight"] = (0.2 * inputs["pointwise_weight"].detach()).requires_grad_()
    bias = torch.tensor([-2.0, -1.5, 1.5, 2.0, 2.5, 3.0, -3.0, 1.5], device=device).requires_grad_()
    residual = torch.randn(2, 8, 4, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
    options = {"stride": 2, "padding": 1, "pre_activation": "relu", "activation": "relu"}
    return inputs | {"bias": bias, "residual": residual} | options


def resized(inputs: dict[str, Any]) -> dict[str, Any]:
    """Another batch size."""
    return inputs | {
        name: inputs[name].detach().repeat(3, 1, 1, 1).to(memory_format=torch.channels_last).requires_grad_()
        for name in ("input", "residual")
    }


def emptied(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {name: inputs[name].detach()[:0].requires_grad_() for name in ("input", "residual")}


def double() -> dict[str, Any]:
    inputs = tensors("cpu", (2, 2, 4, 3), 3, multiplier=2, bias=True, dtype=F64)
    return inputs | {"stride": (2, 1), "padding": (1, 0, 1, 1), "pre_activation": "silu", "activation": "silu"}


def saved_bytes(inputs: dict[str, Any]) -> int:
    """The input and the weights; the output, by which relu knows where it was negative. No depthwise result."""
    kept = (inputs[name] for name in ("input", "depthwise_weight", "pointwise_weight", "residual"))
    return sum(t.numel() * t.element_size() for t in kept)


def bad_inputs() -> list[BadInput]:
    x, depthwise, pointwise = torch.randn(2, 6, 7, 5), torch.randn(6, 1, 3, 3), torch.randn(8, 6, 1, 1)

    def bad(name: str, error: type[Exception], argument: str, value: Any, message: str, **more: Any) -> BadInput:
        return BadInput(name, {argument: value, **more}, error, f"^separable_conv2d: `{argument}` got {message}")

    V, T = ValueError, TypeError
    known = "one of none, relu, relu6, silu, hardswish, leaky_relu"
    dw, pw = "depthwise_weight", "pointwise_weight"
    return [
        bad("not a tensor", T, "input", [1.0], "list, expected a torch.Tensor"),
        bad("bias not a tensor", T, "bias", 1.0, "float, expected a torch.Tensor"),
        bad("residual not a tensor", T, "residual", 1.0, "float, expected a torch.Tensor"),
        bad("integer input", T, "input", x.long(), "torch.int64, expected a float"),
        bad("sparse input", T, "input", x.to_sparse(), "torch.sparse_coo, expected a dense"),
        bad("rank 2", V, "input", x[0, :, :, 0], r"shape \(6, 7\), expected 4 dimensions"),
        bad("rank 5", V, "input", x[None], r"shape \(1, 2, 6, 7, 5\), expected 4 dimensions"),
        bad("depthwise rank", V, dw, depthwise[:, 0], r"shape \(6, 3, 3\), expected 4"),
        bad("pointwise rank", V, pw, pointwise[..., 0, 0], r"shape \(8, 6\), expected 4"),
        bad("bias rank", V, "bias", torch.zeros(8, 1), r"shape \(8, 1\), expected 1 dim"),
        bad("other dtype", T, dw, depthwise.double(), "torch.float64, expected the input's dtype torch.float32"),
        bad("half bias", T, "bias", torch.zeros(8).half(), "torch.float16, expected the input's dtype"),
        bad("elsewhere", V, pw, pointwise.to("meta"), "device meta, expected the input's device cpu"),
        bad("groups", V, dw, torch.ones(8, 1, 3, 3), r"shape \(8, 1, 3, 3\), expected \(6 m, 1, kh, kw\)"),
        bad("not depthwise", V, dw, torch.ones(6, 2, 3, 3), r"shape \(6, 2, 3, 3\), expected \(6 m, 1"),
        bad("no channels", V, dw, depthwise[:0], r"shape \(0, 1, 3, 3\), expected", input=x[:, :0]),
        bad("other inner", V, pw, pointwise[:, :5], r"shape \(8, 5, 1, 1\), expected \(O, 6, 1, 1\)"),
        bad("3x3 pointwise", V, pw, torch.ones(8, 6, 3, 3), r"shape \(8, 6, 3, 3\), expected \(O, 6, 1, 1\)"),
        bad("no outputs", V, pw, pointwise[:0], r"shape \(0, 6, 1, 1\), expected"),
        bad("bias length", V, "bias", torch.zeros(7), r"shape \(7,\), expected \(8,\)"),
        bad("no kernel", V, dw, depthwise[:, :, :0], r"a kernel of \(0, 3\)"),
        bad("large kernel", V, dw, torch.ones(6, 1, 8, 3), r"a kernel of \(8, 3\).* input's \(7, 5\)", padding=0),
        bad("zero stride", V, "stride", 0, "0, expected an int of at least 1"),
        bad("three strides", V, "stride", (1, 1, 1), r"\(1, 1, 1\), expected an int"),
        bad("float stride", T, "stride", 1.5, "1.5, expected an int"),
        bad("zero dilation", V, "dilation", (1, 0), r"\(1, 0\), expected an int of at least 1"),
        bad("negative padding", V, "padding", -1, "-1, expected an int of at least 0"),
        bad("negative side", V, "padding", (1, 1, 0, -1), r".*-1\), expected an int of at least 0"),
        bad("three paddings", V, "padding", (1, 1, 1), r"\(1, 1, 1\), expected"),
        bad("same with a stride", V, "padding", "same", r"'same' with stride \(2, 2\), expected"),
        bad("unknown padding", V, "padding", "full", "'full' with stride"),
        bad("unknown activation", V, "activation", "gelu", f"'gelu', expected {known}"),
        bad("unknown pre_activation", V, "pre_activation", None, f"None, expected {known}"),
        bad("more dimensions", V, "residual", torch.ones(3, 2, 8, 4, 3), r"shape \(3, 2, 8, 4, 3\), expected one that"),
        bad("other residual", V, "residual", torch.ones(2, 8, 7, 5), r"shape \(2, 8, 7, 5\), expected one that"),
    ]


def modules() -> list[torch.nn.Module]:
    options = {"kernel_size": 3, "padding": 1}
    found: list[torch.nn.Module] = [
        SeparableConv2d(6, 4, **options),
        SeparableConv2d(6, 4, 5, 2, 2, bias=True),
        SeparableConvBNAct2d(6, 4, **options, pre_activation="relu"),
        SeparableConvBNAct2d(6, 4, **options, activation="relu", affine=False).eval(),
        SeparableConvBNAct2d(6, 4, **options, momentum=None),
        SeparableConvBNAct2d(6, 4, **options, bias=True, track_running_stats=False).eval(),
    ]
    trained = SeparableConvBNAct2d(6, 4, **options, activation="silu")
    trained(torch.randn(2, 6, 5, 5))
    return [*found, trained.eval()]


SEPARABLE_CONV = OpContract(
    name="separable_conv2d",
    call=pf.separable_conv2d,
    samples=samples,
    raw_op=torch.ops.perfvl.separable_conv.default,
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
)
