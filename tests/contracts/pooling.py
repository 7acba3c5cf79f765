"""max_avg_pool2d and stochastic_pool2d under the contract: windows, dtypes, layouts, sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample
from torch import Tensor

import perfvl.functional as pf
from perfvl.nn import MaxAvgPool2d, StochasticPool2d
from perfvl.ops.pooling import stochastic_pool2d

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CAFFE: dict[str, Any] = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
# name -> shape and windows
WINDOWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "CaffeNet's pool1": ((2, 24, 30, 30), CAFFE),
    "CaffeNet's pool2": ((2, 33, 15, 15), CAFFE),
    "CaffeNet's pool5": ((3, 20, 7, 7), CAFFE),
    "padded": ((2, 17, 12, 13), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "padded, rounded up": ((2, 5, 11, 14), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    "side by side": ((2, 16, 8, 11), {"kernel_size": 2}),
    "one apart": ((1, 18, 9, 7), {"kernel_size": 3, "stride": 1, "padding": 1}),
    "not square": ((2, 6, 9, 17), {"kernel_size": (2, 5), "stride": (3, 1), "padding": (1, 2)}),
    "gaps": ((2, 6, 13, 14), {"kernel_size": 2, "stride": (5, 3), "padding": (1, 0), "ceil_mode": True}),
    "one pixel": ((2, 40, 1, 1), {"kernel_size": 1}),
    "the whole image": ((2, 40, 7, 7), {"kernel_size": 7}),
    "larger than the image": ((2, 7, 2, 2), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "wide": ((1, 3, 70, 131), {"kernel_size": (3, 2), "stride": 2}),
    "large": ((1, 20, 16, 18), {"kernel_size": 15, "stride": 2, "padding": 7}),
    "larger than a byte": ((1, 3, 20, 20), {"kernel_size": 16, "stride": 2}),
    "one channel": ((3, 1, 9, 9), CAFFE),
    "no batch": ((12, 7, 10), CAFFE),
}


def both_pools(input, kernel_size, stride=None, padding=0, ceil_mode=False):
    """What users run."""
    largest = F.max_pool2d(input, kernel_size, stride, padding, ceil_mode=ceil_mode)
    return largest + F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode=ceil_mode)


def chosen_one_by_one(input, uniform, kernel_size, stride=None, padding=0, ceil_mode=False):
    """Stochastic pooling, element after element of all windows at once."""
    given = (kernel_size, kernel_size if stride is None else stride, padding)
    kernel, step, around = ([v, v] if isinstance(v, int) else list(v) for v in given)
    x = input.to(F64 if input.dtype == F64 else F32)
    size = F.max_pool2d(x, kernel, step, around, ceil_mode=ceil_mode).shape[2:]
    far = [(o - 1) * s + k for o, s, k in zip(size, step, kernel, strict=True)]
    behind = [max(0, f - p - n) for f, p, n in zip(far, around, x.shape[2:], strict=True)]
    padded = F.pad(x, (around[1], behind[1], around[0], behind[0]))
    elements = [
        padded[:, :, i : i + far[0] - kernel[0] + 1 : step[0], j : j + far[1] - kernel[1] + 1 : step[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    total = sum(elements)
    if uniform is None:
        return (sum(e * e for e in elements) / (total + torch.finfo(F32).tiny)).to(input.dtype)
    reached, result, done = torch.zeros_like(total), torch.zeros_like(total), torch.zeros_like(total, dtype=torch.bool)
    for element in elements:
        reached = reached + element
        here = ~done & (reached >= uniform * total) & (element > 0)
        result = torch.where(here, element, result)
        done = done | here
    return result.to(input.dtype)


def image(device: str, shape: tuple[int, ...], dtype: torch.dtype = F32, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    return x.to(device, dtype).requires_grad_()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows sliced": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "columns sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channels sliced": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :12],
    "channels sliced, NCHW": lambda x: torch.cat([x, x], 1).contiguous()[:, 12:],
    "batch and width transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "offset by one": lambda x: torch.cat([x.new_zeros(1), x.contiguous().flatten()])[1:].view(x.shape),
    "the batch expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "channels expanded": lambda x: x[:, :1].expand(-1, 12, -1, -1),
    "pixels expanded": lambda x: x[:, :, :1, :1].expand(-1, -1, 9, 7),
}


def samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, x: Tensor, **windows: Any) -> None:
        found.append(Sample(name, {"input": x, **windows}, both_pools))

    for name, (shape, windows) in WINDOWS.items():
        for channels_last in (True, False)[: len(shape) - 2]:
            add(f"{name}, {channels_last=}", image(device, shape, channels_last=channels_last), **windows)
    for dtype in (BF16, F16, F64):
        for channels_last in (True, False):
            for name in ("CaffeNet's pool2", "padded", "not square", "the whole image"):
                shape, windows = WINDOWS[name]
                add(f"{name}, {dtype}, {channels_last=}", image(device, shape, dtype, channels_last), **windows)
    base = image(device, (2, 12, 9, 10)).detach()
    for name, f in LAYOUTS.items():
        add(f"input with {name}", f(base).requires_grad_(), **CAFFE)
    return found


def stochastic_samples(device: str) -> list[Sample]:
    found: list[Sample] = []
    for i, (name, (shape, windows)) in enumerate(WINDOWS.items()):
        for channels_last in (True, False):
            for dtype in (F32, (BF16, F16, F64)[i % 3]):
                if len(shape) == 4:
                    inputs = stochastic(device, shape, windows, dtype, channels_last)
                    found.append(Sample(f"{name}, {dtype}, {channels_last=}", inputs, chosen_one_by_one))
                    if i % 2:
                        expected = inputs | {"uniform": None}
                        found.append(Sample(f"expected {name}, {dtype}, {channels_last=}", expected, chosen_one_by_one))
                        frozen = expected | {"input": inputs["input"].detach()}
                        found.append(Sample(f"{name}, {dtype}, nothing learns", frozen, chosen_one_by_one))
    base = stochastic(device, (2, 12, 9, 10), CAFFE)
    for name, f in LAYOUTS.items():
        x = f(base["input"].detach())
        uniform = torch.rand(both_pools(x, **CAFFE).shape, device=device)
        inputs = base | {"input": x.requires_grad_(), "uniform": uniform}
        found.append(Sample(f"input with {name}", inputs, chosen_one_by_one))
    return found


def stochastic(
    device: str, shape: tuple[int, ...], windows: dict[str, Any], dtype: torch.dtype = F32, channels_last: bool = False
) -> dict[str, Any]:
    """Positive numbers, and a number for each window."""
    x = (image("cpu", shape, channels_last=channels_last).detach().abs() + 0.01).to(device, dtype)
    uniform = torch.rand(both_pools(x.float(), **windows).shape, dtype=F64 if dtype == F64 else F32, device=device)
    return {"input": x.requires_grad_(), "uniform": uniform, **windows}


def raw_samples(device: str) -> list[tuple]:
    x = torch.randn(2, 6, 7, 9, device=device)
    last = x.to(memory_format=torch.channels_last)
    caffe, padded = ([3, 3], [2, 2], [0, 0], True), ([3, 2], [2, 1], [1, 1], False)
    found: list[tuple] = [(x, *caffe, True), (last, *caffe, True), (last.bfloat16(), *padded, False)]
    return [*found, (x.half(), *padded, True), (x[:, :, :3, :3], *caffe, True), (x[..., ::2], *padded, True)]


def stochastic_raw_samples(device: str) -> list[tuple]:
    x = torch.rand(2, 6, 7, 9, device=device)
    uniform = torch.rand(2, 6, 3, 4, device=device)
    windows = ([3, 3], [2, 2], [0, 0], True)
    last = x.to(memory_format=torch.channels_last)
    return [(x, uniform, *windows), (last, uniform, *windows), (last.half(), None, *windows)]


def fewer_windows(inputs: dict[str, Any]) -> int:
    """A byte for each window."""
    return math.prod(both_pools(inputs["input"].detach(), **CAFFE).shape)


def resized(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    """Another batch size."""

    def repeat(t: Tensor) -> Tensor:
        more = t.detach().repeat(times, 1, 1, 1) if times else t.detach()[:0]
        return more.requires_grad_(t.requires_grad)

    return {k: repeat(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def bad_inputs(op: str) -> list[BadInput]:
    x = torch.rand(2, 6, 7, 9)

    def bad(name: str, error: type[Exception], argument: str, value: Any, message: str, **more: Any) -> BadInput:
        return BadInput(name, {argument: value, **more}, error, f"^{op}: `{argument}` got {message}")

    V, T = ValueError, TypeError
    two = r"expected an int, or two of them: \(height, width\)"
    return [
        bad("not a tensor", T, "input", [1.0], "list, expected a torch.Tensor"),
        bad("integer input", T, "input", x.long(), "torch.int64, expected a float"),
        bad("sparse input", T, "input", x.to_sparse(), "torch.sparse_coo, expected a dense"),
        bad("rank 2", V, "input", x[0, 0], r"shape \(7, 9\), expected 4 dimensions"),
        bad("rank 5", V, "input", x[None], r"shape \(1, 2, 6, 7, 9\), expected 4 dimensions"),
        bad("no pixels", V, "input", x[:, :, :0], r"shape \(2, 6, 0, 9\), expected at least one channel and one pixel"),
        bad("no channels", V, "input", x[:, :0], r"shape \(2, 0, 7, 9\), expected at least one channel"),
        bad("text", T, "kernel_size", "33", f"'33', {two}"),
        bad("a float", T, "kernel_size", 3.0, f"3.0, {two}"),
        bad("three numbers", T, "stride", (2, 2, 2), rf"\(2, 2, 2\), {two}"),
        bad("a bool", T, "padding", True, f"True, {two}"),
        bad("no kernel", V, "kernel_size", 0, "0, expected at least 1"),
        bad("no stride", V, "stride", (2, 0), r"\(2, 0\), expected at least 1"),
        bad("negative padding", V, "padding", -1, "-1, expected at least 0"),
        bad("wide padding", V, "padding", (1, 2), r"\(1, 2\), expected at most half of the kernel size 3"),
        bad("an int for a bool", T, "ceil_mode", 1, "1, expected a bool"),
        bad("too large", V, "kernel_size", (3, 12), r"\(3, 12\), expected a window that fits an image \(7, 9\)"),
        bad("no kernel at all", T, "kernel_size", None, f"None, {two}"),
    ]


def bad_numbers() -> list[BadInput]:
    def bad(name: str, error: type[Exception], value: Any, message: str) -> BadInput:
        return BadInput(name, {"uniform": value}, error, f"^stochastic_pool2d: `uniform` got {message}")

    u = torch.rand(2, 6, 3, 4)
    return [
        bad("a number", TypeError, 0.5, "float, expected a torch.Tensor or None"),
        bad("half precision", TypeError, u.half(), "torch.float16, expected torch.float32"),
        bad("one short", ValueError, u[..., :3], r"shape \(2, 6, 3, 3\), expected \(2, 6, 3, 4\)"),
        bad("elsewhere", ValueError, u.to("meta"), "device meta, expected the input's device cpu"),
        bad("learnt", ValueError, u.requires_grad_(), "a tensor that requires a gradient, expected numbers"),
    ]


POOLS: list[dict[str, Any]] = [CAFFE, {"kernel_size": 2}, {"kernel_size": (3, 2), "stride": 1, "padding": (1, 0)}]
MAX_AVG_POOL = OpContract(
    name="max_avg_pool2d",
    call=pf.max_avg_pool2d,
    samples=samples,
    raw_op=torch.ops.perfvl.max_avg_pool.default,
    raw_samples=raw_samples,
    small=lambda device: {"input": image(device, (2, 6, 7, 9)), **CAFFE},
    double=lambda: {"input": image("cpu", (2, 2, 5, 6), F64), **CAFFE, "padding": 1},
    bad_inputs=bad_inputs("max_avg_pool2d"),
    saved_bytes=fewer_windows,
    grow=lambda inputs: resized(inputs, 50),
    modules=lambda: [MaxAvgPool2d(**windows) for windows in POOLS],
    call_module=lambda module, inputs: module(inputs["input"]),
    resize=lambda inputs: resized(inputs, 3),
    empty=lambda inputs: resized(inputs, 0),
)
STOCHASTIC_POOL = OpContract(
    name="stochastic_pool2d",
    call=stochastic_pool2d,
    samples=stochastic_samples,
    raw_op=torch.ops.perfvl.stochastic_pool.default,
    raw_samples=stochastic_raw_samples,
    small=lambda device: stochastic(device, (2, 6, 7, 9), CAFFE),
    double=lambda: stochastic("cpu", (2, 2, 5, 6), CAFFE, F64),
    bad_inputs=[*bad_inputs("stochastic_pool2d"), *bad_numbers()],
    saved_bytes=fewer_windows,
    grow=lambda inputs: resized(inputs, 50),
    modules=lambda: [StochasticPool2d(**windows).eval() for windows in POOLS],
    call_module=lambda module, inputs: module(inputs["input"].abs()),
    resize=lambda inputs: resized(inputs, 3),
    empty=lambda inputs: resized(inputs, 0),
)
