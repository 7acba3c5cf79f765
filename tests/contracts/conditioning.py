"""conditioned_conv2d and the conditioning augmentation under the contract: dtypes, layouts, sizes, activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample
from torch import Tensor

import perfvl.functional as pf
from perfvl.nn import ConditioningAugmentation
from perfvl.ops.conditioning import conditioning_augmentation

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# The image's part is rounded to the dtype before the condition's is added, and once more after.
SLACK = {F32: 4e-6, F64: 1e-12, BF16: 1e-3, F16: 2e-4}
V, T = ValueError, TypeError


def concatenated(input: Tensor, condition: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """What users run."""
    height, width = input.shape[2:]
    repeated = condition[:, :, None, None].repeat(1, 1, height, width)
    return F.conv2d(torch.cat([input, repeated], 1), weight, bias, padding=1)


def tensors(
    device: str,
    shape: tuple[int, ...],
    dim: int,
    outputs: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = F32,
    channels_last: bool = True,
) -> dict[str, Any]:
    """Weights such that outputs are near 1, to which the condition adds as much as the image."""
    batch, channels = shape[:2]
    x = torch.randn(shape)
    found = {
        "input": x.to(memory_format=torch.channels_last) if channels_last else x,
        "condition": torch.randn(batch, dim) * (channels / dim) ** 0.5,
        "weight": torch.randn(outputs, channels + dim, 3, 3) / (3 * channels**0.5),
    }
    if bias:
        found["bias"] = torch.randn(outputs)
    return {name: t.to(device, dtype).requires_grad_() for name, t in found.items()}


def changed(inputs: dict[str, Any], **change: Any) -> dict[str, Any]:
    """Other layouts: a function of each tensor's values, which keeps them."""
    return inputs | {name: f(inputs[name].detach()).requires_grad_() for name, f in change.items()}


def samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any]) -> None:
        found.append(Sample(name, inputs, concatenated, SLACK[inputs["input"].dtype]))

    def make(*arguments: Any, **options: Any) -> dict[str, Any]:
        return tensors(device, *arguments, **options)

    # Sizes and channels, in both layouts.
    for shape, dim, outputs in [
        ((1, 3, 1, 1), 4, 5),
        ((3, 17, 1, 7), 5, 33),
        ((2, 5, 2, 2), 1, 4),
        ((1, 24, 5, 1), 40, 17),
        ((5, 16, 4, 4), 12, 24),
        ((2, 1, 3, 2), 7, 1),
        ((17, 6, 4, 4), 33, 140),
        ((2, 9, 16, 11), 8, 18),
        ((1, 12, 3, 35), 6, 16),
    ]:
        for channels_last in (True, False):
            layout = "channels_last" if channels_last else "NCHW"
            add(f"{shape} and {dim} to {outputs}, {layout}", make(shape, dim, outputs, channels_last=channels_last))
    add("no bias", make((2, 17, 6, 6), 9, 8, bias=False))
    add("nothing learns", {k: v.detach() for k, v in make((2, 17, 6, 6), 9, 8).items()})

    # Half precision, and float64.
    for dtype in (BF16, F16, F64):
        for channels_last in (True, False):
            options = {"dtype": dtype, "channels_last": channels_last}
            add(f"{dtype}, {channels_last=}", make((3, 20, 4, 5), 24, 33, **options))
            add(f"{dtype}, one pixel, {channels_last=}", make((3, 7, 1, 1), 5, 6, **options))
            add(f"{dtype}, wide, {channels_last=}", make((2, 8, 3, 40), 16, 18, **options))

    # Layouts.
    base = make((3, 12, 6, 5), 10, 14)
    one, condition = base["input"].detach(), base["condition"].detach()
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
    add("input expanded over the batch", base | {"input": one[:1].expand(3, -1, -1, -1).requires_grad_()})
    add("input expanded over pixels", base | {"input": one[:, :, :1, :1].expand(-1, -1, 5, 4).requires_grad_()})
    add("condition sliced", changed(base, condition=lambda c: torch.cat([c, c], 1)[:, ::2]))
    add("condition transposed", changed(base, condition=lambda c: c.t().contiguous().t()))
    add("one condition for all samples", base | {"condition": condition[:1].expand(3, -1).requires_grad_()})
    add("one number for a condition", base | {"condition": condition[:, :1].expand(-1, 10).requires_grad_()})
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
    found = []
    for dtype, channels_last in [(F32, True), (F32, False), (BF16, True), (F16, False)]:
        for shape in [(2, 6, 5, 7), (3, 5, 1, 1)]:
            image = tensors(device, shape, 1, 1, dtype=dtype, channels_last=channels_last)["input"].detach()
            found.append((image, torch.randn(shape[0], 9, shape[1], device=device)))
            found.append((image[..., ::2], torch.randn(shape[0], shape[1], 9, device=device).transpose(1, 2)))
    return found


def small(device: str) -> dict[str, Any]:
    return tensors(device, (2, 6, 4, 5), 7, 8)


def resized(inputs: dict[str, Any]) -> dict[str, Any]:
    """Another batch size."""
    more = inputs["input"].detach().repeat(3, 1, 1, 1).to(memory_format=torch.channels_last)
    conditions = inputs["condition"].detach().repeat(3, 1)
    return inputs | {"input": more.requires_grad_(), "condition": conditions.requires_grad_()}


def emptied(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {name: inputs[name].detach()[:0].requires_grad_() for name in ("input", "condition")}


def bad_inputs() -> list[BadInput]:
    x, condition, weight = torch.randn(2, 6, 4, 5), torch.randn(2, 7), torch.randn(8, 13, 3, 3)

    def bad(name: str, error: type[Exception], argument: str, value: Any, message: str, **more: Any) -> BadInput:
        return BadInput(name, {argument: value, **more}, error, f"^conditioned_conv2d: `{argument}` got {message}")

    return [
        bad("not a tensor", T, "input", [1.0], "list, expected a torch.Tensor"),
        bad("condition not a tensor", T, "condition", 1.0, "float, expected a torch.Tensor"),
        bad("weight not a tensor", T, "weight", None, "NoneType, expected a torch.Tensor"),
        bad("bias not a tensor", T, "bias", 1.0, "float, expected a torch.Tensor"),
        bad("integer input", T, "input", x.long(), "torch.int64, expected a float"),
        bad("integer condition", T, "condition", condition.long(), "torch.int64, expected a float"),
        bad("sparse input", T, "input", x.to_sparse(), "torch.sparse_coo, expected a dense"),
        bad("no batch", V, "input", x[0], r"shape \(6, 4, 5\), expected 4 dimensions"),
        bad("no pixels", V, "input", x[:, :, :0], r"shape \(2, 6, 0, 5\), expected at least one channel and one pixel"),
        bad("no channels", V, "input", x[:, :0], r"shape \(2, 0, 4, 5\), expected at least"),
        bad("an image for a condition", V, "condition", x, r"shape \(2, 6, 4, 5\), expected 2 dimensions"),
        bad("other batch", V, "condition", condition[:1], r"shape \(1, 7\), expected \(2, E\) beside the input, E > 0"),
        bad("empty condition", V, "condition", condition[:, :0], r"shape \(2, 0\), expected \(2, E\) beside"),
        bad("weight rank", V, "weight", weight[:, 0], r"shape \(8, 3, 3\), expected 4 dimensions"),
        bad("weight of the image alone", V, "weight", weight[:, :6], r"shape \(8, 6, 3, 3\), expected \(O, 13, 3, 3\)"),
        bad("other kernel", V, "weight", torch.ones(8, 13, 4, 4), r"shape \(8, 13, 4, 4\), expected \(O, 13, 3, 3\)"),
        bad("no outputs", V, "weight", weight[:0], r"shape \(0, 13, 3, 3\), expected"),
        bad("bias rank", V, "bias", torch.zeros(8, 1), r"shape \(8, 1\), expected 1 dim"),
        bad("bias length", V, "bias", torch.zeros(7), r"shape \(7,\), expected \(8,\)"),
        bad("double condition", T, "condition", condition.double(), "torch.float64, expected the input's dtype"),
        bad("half bias", T, "bias", torch.zeros(8).half(), "torch.float16, expected the input's dtype torch.float32"),
        bad("elsewhere", V, "condition", condition.to("meta"), "device meta, expected the input's device cpu"),
    ]


CONDITIONED_CONV = OpContract(
    name="conditioned_conv2d",
    call=pf.conditioned_conv2d,
    samples=samples,
    raw_op=torch.ops.perfvl.add_taps.default,
    raw_samples=raw_samples,
    small=small,
    double=lambda: tensors("cpu", (2, 2, 3, 2), 3, 2, dtype=F64),
    bad_inputs=bad_inputs(),
    cuda="native",
    saved_bytes=lambda inputs: sum(4 * inputs[name].numel() for name in ("input", "condition", "weight")),
    resize=resized,
    empty=emptied,
    autocast_output=True,
)

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "glu": F.glu,
}


def augment(
    text: Any, weight: Any, bias: Any, eps: Any, *, activation: str = "relu", **unknown: Any
) -> tuple[Tensor, ...]:
    """The op, its divergence rounded as its other outputs are: under autocast that is float32, and theirs is not."""
    condition, mu, logvar, kl = conditioning_augmentation(text, weight, bias, eps, activation=activation, **unknown)
    return condition, mu, logvar, kl.to(condition.dtype)


def published(
    text: Tensor, weight: Tensor, bias: Tensor, eps: Tensor, *, activation: str = "relu"
) -> tuple[Tensor, ...]:
    """CA_NET and KL_loss of the published code: the loss in float32, as autocast would run it."""
    mu, logvar = ACTIVATIONS[activation](F.linear(text, weight, bias)).chunk(2, 1)
    condition = eps * logvar.mul(0.5).exp() + mu
    wide_mu, wide_logvar = (t if t.dtype == F64 else t.float() for t in (mu, logvar))
    kl = wide_mu.pow(2).add(wide_logvar.exp()).mul(-1).add(1).add(wide_logvar).mean().mul(-0.5)
    return condition, mu, logvar, kl.to(condition.dtype)


def texts(
    device: str, rows: int, width: int, dim: int, activation: str = "relu", *, dtype: torch.dtype = F32
) -> dict[str, Any]:
    """Projections that are well clear of 0, the kink of two activations: roundings move none across it."""
    parts = 4 if activation == "glu" else 2
    sign = torch.where(torch.arange(parts * dim) % 3 == 0, -1.0, 1.0)
    found = {
        "text": torch.randn(rows, width).clamp(-2.5, 2.5),
        "weight": torch.randn(parts * dim, width).clamp(-2.5, 2.5) / (8 * width),
        "bias": sign * (1 + torch.rand(parts * dim)),
    }
    learning = {name: t.to(device, dtype).requires_grad_() for name, t in found.items()}
    return learning | {"eps": torch.randn(rows, dim).to(device, dtype), "activation": activation}


def augmentation_samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any]) -> None:
        # Sums and gradients of products are rounded once more than in float32's own.
        slack = {F32: 4e-6, F64: 1e-12, BF16: 4e-3, F16: 5e-4}[inputs["text"].dtype]
        found.append(Sample(name, inputs, published, slack))

    for activation in ACTIVATIONS:
        for shape in [(1, 1, 1), (3, 10, 5), (16, 64, 128), (2, 7, 33)]:
            add(f"{shape}, {activation}", texts(device, *shape, activation))
        add(f"many rows, {activation}", texts(device, 300, 3, 70, activation))
        for dtype in (BF16, F16, F64):
            add(f"{dtype}, {activation}", texts(device, 16, 40, 24, activation, dtype=dtype))
        base = texts(device, 6, 12, 10, activation)
        add(f"nothing learns, {activation}", {k: v.detach() if torch.is_tensor(v) else v for k, v in base.items()})
        layouts = changed(base, text=lambda t: t.t().contiguous().t(), weight=lambda w: torch.cat([w, w], 1)[:, ::2])
        layouts = changed(layouts, bias=lambda b: b.repeat_interleave(3)[::3])
        add(f"other layouts, {activation}", layouts | {"eps": base["eps"].t().contiguous().t()})
        one = base["text"].detach()[:1].expand(6, -1).requires_grad_()
        add(f"one text for all rows, {activation}", base | {"text": one})
        add(f"one noise for all columns, {activation}", base | {"eps": base["eps"][:, :1].expand(-1, 10)})
    return found


def raw_augmentation_samples(device: str) -> list[tuple]:
    found = []
    for code, activation in enumerate(ACTIVATIONS):
        for dtype in (F32, BF16, F16):
            width = 4 * 9 if activation == "glu" else 2 * 9
            projected, eps = (torch.randn(5, n, device=device).to(dtype) for n in (width, 9))
            found.append((projected, eps, code))
    return [*found, (found[0][0].t().contiguous().t(), found[0][1][:1].expand(5, 9), 0)]


def resized_texts(inputs: dict[str, Any]) -> dict[str, Any]:
    more = {name: inputs[name].detach().repeat(3, 1) for name in ("text", "eps")}
    return inputs | more | {"text": more["text"].requires_grad_()}


def emptied_texts(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"text": inputs["text"].detach()[:0].requires_grad_(), "eps": inputs["eps"][:0]}


def saved_texts(inputs: dict[str, Any]) -> int:
    """The text, the weights, mu, logvar and the noise. No projection."""
    return 4 * (inputs["text"].numel() + inputs["weight"].numel() + 3 * inputs["eps"].numel())


def bad_texts() -> list[BadInput]:
    text, weight, bias, eps = torch.randn(4, 6), torch.randn(10, 6), torch.randn(10), torch.randn(4, 5)

    def bad(name: str, error: type[Exception], argument: str, value: Any, message: str, **more: Any) -> BadInput:
        start = f"^conditioning_augmentation: `{argument}` got "
        return BadInput(name, {argument: value, **more}, error, start + message)

    return [
        bad("not a tensor", T, "text", [1.0], "list, expected a torch.Tensor"),
        bad("no bias", T, "bias", None, "NoneType, expected a torch.Tensor"),
        bad("no noise", T, "eps", None, "NoneType, expected a torch.Tensor"),
        bad("integer text", T, "text", text.long(), "torch.int64, expected a float"),
        bad("sparse weight", T, "weight", weight.to_sparse(), "torch.sparse_coo, expected a dense"),
        bad("one text", V, "text", text[0], r"shape \(6,\), expected 2 dimensions"),
        bad("weight of another width", V, "weight", weight[:, :5], r"shape \(10, 5\), expected \(2 e, 6\)"),
        bad("no halves", V, "weight", weight[:9], r"shape \(9, 6\), expected \(2 e, 6\)"),
        bad("no quarters", V, "weight", weight, r"shape \(10, 6\), expected \(4 e, 6\)", activation="glu"),
        bad("bias length", V, "bias", bias[:9], r"shape \(9,\), expected \(10,\)"),
        bad("noise of other rows", V, "eps", eps[:3], r"shape \(3, 5\), expected \(4, 5\)"),
        bad("noise of other columns", V, "eps", torch.zeros(4, 10), r"shape \(4, 10\), expected \(4, 5\)"),
        bad("noise that learns", V, "eps", torch.zeros(4, 5, requires_grad=True), "a tensor that requires a gradient"),
        bad("half noise", T, "eps", eps.half(), "torch.float16, expected the input's dtype torch.float32"),
        bad("elsewhere", V, "weight", weight.to("meta"), "device meta, expected the input's device cpu"),
        bad("unknown activation", V, "activation", "gelu", "'gelu', expected one of none, relu, leaky_relu, glu"),
    ]


AUGMENTATION = OpContract(
    name="conditioning_augmentation",
    call=augment,
    samples=augmentation_samples,
    raw_op=torch.ops.perfvl.conditioning_augmentation.default,
    raw_samples=raw_augmentation_samples,
    small=lambda device: texts(device, 4, 6, 5),
    double=lambda: texts("cpu", 3, 4, 2, "glu", dtype=F64),
    bad_inputs=bad_texts(),
    cuda="native",
    saved_bytes=saved_texts,
    modules=lambda: [ConditioningAugmentation(6, 5, activation=activation) for activation in ACTIVATIONS],
    call_module=lambda module, inputs: module(inputs["text"], inputs["eps"]).condition,
    resize=resized_texts,
    empty=emptied_texts,
    autocast_output=True,
)
