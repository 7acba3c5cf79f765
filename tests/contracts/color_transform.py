"""color_transform under the contract: bytes and floats, layouts, channels, slopes, what is around the two layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample

import perfvl.functional as pf
from perfvl.nn import ColorTransform

F32, BF16, F16, F64, BYTES = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8
MEAN = (104.0, 117.0, 124.0)
SLACK = {F32: 4e-6, F64: 1e-12, BF16: 1e-3, F16: 2e-4}


def published(image, weight1, bias1, weight2, bias2, *, negative_slope, residual=False, mean=None, scale=1.0):
    """What users run: the image centred and scaled in float32 at least, two convolutions."""
    x = image.to(torch.promote_types(weight1.dtype, F32))
    x = x if mean is None else x - mean.to(x)[:, None, None]
    x = (x * scale).to(weight1.dtype)
    h = F.leaky_relu(F.conv2d(x, weight1, bias1), negative_slope)
    z = F.conv2d(h, weight2, bias2)
    return F.leaky_relu(z + x if residual else z, negative_slope)


def tensors(
    device: str,
    shape: tuple[int, ...] = (2, 3, 9, 7),
    hidden: int = 10,
    outputs: int = 3,
    *,
    dtype: torch.dtype = F32,
    of_image: torch.dtype | None = None,
    biases: bool = True,
    channels_last: bool = False,
) -> dict[str, Any]:
    """Weights such that outputs are near 1."""
    of_image, channels = of_image or dtype, shape[-3]
    image = torch.randint(256, shape, dtype=BYTES) if of_image == BYTES else torch.randn(shape)
    if channels_last:
        image = image.to(memory_format=torch.channels_last)
    found = {"image": image.to(device, of_image).requires_grad_(of_image != BYTES)}
    made = {
        "weight1": torch.randn(hidden, channels, 1, 1) / channels**0.5,
        "bias1": torch.randn(hidden),
        "weight2": torch.randn(outputs, hidden, 1, 1) / hidden**0.5,
        "bias2": torch.randn(outputs),
    }
    found |= {name: t.to(device, dtype).requires_grad_() for name, t in made.items()}
    options = {"negative_slope": 0.5}
    if of_image == BYTES:
        options |= {"mean": torch.full((channels,), 110.0, device=device), "scale": 0.02}
    return found | ({} if biases else {"bias1": None, "bias2": None}) | options


def samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any], **options: Any) -> None:
        found.append(Sample(name, {**inputs, **options}, published, SLACK[inputs["weight1"].dtype]))

    def make(*arguments: Any, **options: Any) -> dict[str, Any]:
        return tensors(device, *arguments, **options)

    # Sizes and channels, bytes and floats, in both layouts.
    for of_image in (F32, BYTES):
        for shape, hidden, outputs in [
            ((2, 3, 9, 7), 10, 3),
            ((1, 3, 1, 1), 10, 3),
            ((3, 3, 1, 5), 3, 3),
            ((1, 3, 40, 1), 16, 3),
            ((2, 1, 6, 6), 1, 1),
            ((1, 9, 13, 11), 10, 3),
            ((3, 16, 5, 33), 16, 16),
            ((1, 4, 70, 66), 7, 6),
        ]:
            for last in (False, True):
                inputs = make(shape, hidden, outputs, of_image=of_image, channels_last=last)
                add(f"{of_image} {shape} to {hidden} to {outputs}, {'channels_last' if last else 'NCHW'}", inputs)
        add(f"{of_image}, no batch", make((3, 7, 10), of_image=of_image))
        add(f"{of_image}, no bias", make(biases=False, of_image=of_image))
        add(f"{of_image}, one bias", make(of_image=of_image) | {"bias1": None})

    # What is around the layers.
    for of_image in (F32, BYTES):
        for slope in (0, 0.25, 1.0, 2.0):
            add(f"{of_image}, slope {slope}", make(of_image=of_image), negative_slope=slope)
        for last in (False, True):
            inputs = make(of_image=of_image, channels_last=last)
            add(f"{of_image}, residual, {last=}", inputs, residual=True)
            add(f"{of_image}, no mean", inputs, mean=None, scale=0.01)
            mean = torch.tensor(MEAN, device=device)
            add(f"{of_image}, mean alone", inputs, mean=mean / 100, scale=1.0 if of_image == F32 else 0.04)
            add(f"{of_image}, mean of another dtype", inputs, mean=mean.bfloat16(), scale=0.04, residual=True)
    add("bytes, nothing learns", {k: v.detach() if torch.is_tensor(v) else v for k, v in make(of_image=BYTES).items()})

    # Dtypes.
    for dtype in (BF16, F16, F64):
        for of_image in (dtype, F32, BYTES):
            for last in (False, True):
                inputs = make((2, 3, 12, 11), dtype=dtype, of_image=of_image, channels_last=last)
                add(f"{of_image} to {dtype}, {last=}", inputs, residual=last)
    add("half an image to float32", make(of_image=BF16))
    add("double image to float32", make(of_image=F64))

    # Layouts.
    layouts = {
        "rows sliced": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        "columns sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
        "a window": lambda x: F.pad(x, (2, 1, 1, 2))[..., 1:-2, 2:-1],
        "a window, channels_last": lambda x: F.pad(x, (2, 1, 1, 2)).contiguous(memory_format=torch.channels_last)[
            ..., 1:-2, 2:-1
        ],
        "three of four channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :3],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch and width transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "one column of some": lambda x: x[..., 3:4],
        "one row of some": lambda x: x[:, :, 3:4],
        "expanded over the batch": lambda x: x[:1].expand(3, -1, -1, -1),
        "expanded over channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
        "expanded over pixels": lambda x: x[:, :, :1, :1].expand(-1, -1, 5, 4),
    }
    for of_image in (F32, BYTES):
        base = make(of_image=of_image)
        for name, f in layouts.items():
            image = f(base["image"].detach()).requires_grad_(of_image != BYTES)
            add(f"{of_image} {name}", base | {"image": image})
    strided = {
        "weight1": base["weight1"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        "weight2": base["weight2"].detach().repeat_interleave(2, 0)[::2].requires_grad_(),
        "bias1": base["bias1"].detach()[:1].expand(10).requires_grad_(),
        "bias2": base["bias2"].detach().repeat_interleave(3)[::3].requires_grad_(),
        "mean": torch.tensor([7.0, 110.0], device=device)[1:].expand(3),
    }
    add("parameters of other layouts", base | strided)
    # More than the kernels take.
    add("17 hidden units", make((2, 3, 6, 6), 17))
    add("20 channels", make((2, 20, 6, 6), 3, 20, channels_last=True), residual=True)
    return found


def raw_samples(device: str) -> list[tuple]:
    found = []
    for dtype, of_image, last in [(F32, F32, True), (F32, BYTES, False), (BF16, BYTES, True), (F16, F32, False)]:
        t = tensors(device, (2, 3, 5, 4), dtype=dtype, of_image=of_image, channels_last=last)
        arguments = [t[name].detach() for name in ("image", "weight1", "bias1", "weight2", "bias2")]
        found += [
            (*arguments, torch.tensor(MEAN, device=device), 0.04, 0.5, True),
            (*arguments[:2], None, arguments[3], None, None, 1.0, 0.0, False),
        ]
    return found


def small(device: str) -> dict[str, Any]:
    """Far from the kinks, so that a rounding moves nothing across them."""
    found = tensors(device, (2, 3, 4, 5))
    found["image"] = (0.3 * found["image"].detach()).clamp(-0.5, 0.5).requires_grad_()
    found["weight1"] = (0.5 * found["weight1"].detach()).clamp(-0.5, 0.5).requires_grad_()
    found["weight2"] = (0.3 * found["weight2"].detach()).clamp(-0.1, 0.1).requires_grad_()
    found["bias1"] = torch.tensor([1.5, -1.5] * 5, device=device).requires_grad_()
    found["bias2"] = torch.tensor([3.0, -3.0, 4.0], device=device).requires_grad_()
    return found | {"mean": torch.tensor([0.1, -0.1, 0.05], device=device), "scale": 0.8, "residual": True}


def resized(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"image": inputs["image"].detach().repeat(3, 1, 1, 1).requires_grad_()}


def emptied(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"image": inputs["image"].detach()[:0].requires_grad_()}


def saved_bytes(inputs: dict[str, Any]) -> int:
    """The image, the parameters, the mean."""
    return sum(t.numel() * t.element_size() for t in inputs.values() if torch.is_tensor(t))


def call_module(module: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return module(100 * (inputs["image"].detach() + 1))


def modules() -> list[torch.nn.Module]:
    published = ColorTransform("C", mean=MEAN, scale=0.04, negative_slope=0.25)
    return [published, *(ColorTransform(variant) for variant in ("A", "B", "D", "D2", "E", "F", "maxout"))]


def bad_inputs() -> list[BadInput]:
    x, w1, w2 = torch.randn(2, 3, 4, 5), torch.randn(10, 3, 1, 1), torch.randn(3, 10, 1, 1)

    def bad(name: str, error: type[Exception], argument: str, value: Any, message: str, **more: Any) -> BadInput:
        return BadInput(name, {argument: value, **more}, error, f"^color_transform: `{argument}` got {message}")

    V, T = ValueError, TypeError
    found = [
        bad("not a tensor", T, "image", [1.0], "list, expected a torch.Tensor"),
        bad("no weight", T, "weight1", None, "NoneType, expected a torch.Tensor"),
        bad("bias not a tensor", T, "bias1", 1.0, "float, expected a torch.Tensor"),
        bad("mean not a tensor", T, "mean", MEAN, "tuple, expected a torch.Tensor"),
        bad("integer image", T, "image", x.long(), "torch.int64, expected a uint8, float32,"),
        bad("byte weights", T, "weight1", w1.byte(), "torch.uint8, expected a float32,"),
        bad("sparse image", T, "image", x.to_sparse(), "torch.sparse_coo, expected a dense"),
        bad("rank 2", V, "image", x[0, 0], r"shape \(4, 5\), expected 4 dimensions"),
        bad("no pixels", V, "image", x[:, :, :0], r"shape \(2, 3, 0, 5\), expected at least one channel and one pixel"),
        bad("no channels", V, "image", x[:, :0], r"shape \(2, 0, 4, 5\), expected at least"),
        bad("weight rank", V, "weight1", w1[..., 0, 0], r"shape \(10, 3\), expected 4 dimensions"),
        bad("bias rank", V, "bias2", torch.zeros(3, 1), r"shape \(3, 1\), expected 1 dimension$"),
        bad("other channels", V, "weight1", w1[:, :2], r"shape \(10, 2, 1, 1\), expected \(M, 3, 1, 1\)"),
        bad("other kernel", V, "weight1", torch.ones(10, 3, 3, 3), r"shape \(10, 3, 3, 3\), expected \(M, 3, 1, 1\)"),
        bad("no hidden units", V, "weight1", w1[:0], r"shape \(0, 3, 1, 1\), expected \(M, 3, 1, 1\)"),
        bad("other hidden units", V, "weight2", w2[:, :9], r"shape \(3, 9, 1, 1\), expected \(O, 10, 1, 1\)"),
        bad("no outputs", V, "weight2", w2[:0], r"shape \(0, 10, 1, 1\), expected \(O, 10, 1, 1\)"),
        bad("bias length", V, "bias1", torch.zeros(3), r"shape \(3,\), expected \(10,\)"),
        bad("mean length", V, "mean", torch.zeros(1), r"shape \(1,\), expected \(3,\)"),
        bad("other dtype", T, "weight2", w2.double(), "torch.float64, expected the dtype of weight1, torch.float32"),
        bad("bias dtype", T, "bias2", torch.zeros(3).half(), "torch.float16, expected the dtype of weight1"),
        bad("other device", V, "weight1", w1.to("meta"), "device meta, expected the image's device cpu"),
        bad("learned mean", V, "mean", torch.zeros(3).requires_grad_(), "a tensor that requires a gradient, expected"),
        bad("negative slope", V, "negative_slope", -0.1, "-0.1, expected a finite number, at least 0"),
        bad("nan slope", V, "negative_slope", float("nan"), "nan, expected a finite number, at least 0"),
        bad("slope in a tensor", T, "negative_slope", torch.ones(()), "Tensor, expected a float"),
        bad("bool scale", T, "scale", True, "bool, expected a float"),
        bad("infinite scale", V, "scale", float("inf"), "inf, expected a finite number"),
        bad("residual", T, "residual", 1, "1, expected a bool"),
        bad("no room", V, "residual", True, "True with 2 outputs, expected as many", weight2=w2[:2], bias2=None),
    ]
    return found


COLOR_TRANSFORM = OpContract(
    name="color_transform",
    call=pf.color_transform,
    samples=samples,
    raw_op=torch.ops.perfvl.color_transform.default,
    raw_samples=raw_samples,
    small=small,
    bad_inputs=bad_inputs(),
    resize=resized,
    empty=emptied,
    cuda="triton",
    autocast_output=True,
    double=lambda: tensors("cpu", (2, 3, 2, 3), 4, dtype=F64) | {"residual": True, "scale": 0.7},
    saved_bytes=saved_bytes,
    grow=resized,
    modules=modules,
    call_module=call_module,
)
