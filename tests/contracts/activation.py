"""maxout and apl under the contract: dtypes, layouts, dimensions, pieces, segments, shared parameters or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample
from torch import Tensor

from perfvl.nn import APL, Maxout
from perfvl.ops.activation import apl, maxout

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HALVES = (BF16, F16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "rows sliced": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "columns sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channels sliced": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "channels sliced, NCHW": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "batch and width transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "offset by one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded over the batch": lambda x: x[:1].expand(x.shape),
    "expanded over channels": lambda x: x[:, :1].expand(x.shape),
    "expanded over pixels": lambda x: x[:, :, :1, :1].expand(x.shape),
}
# Every layout of the kernels: planes, pixels, rows; sizes around whole vectors, tasks of several rows and of a part.
SHAPES = [
    (1, 1),
    (3, 17),
    (64, 130),
    (2, 3, 5),
    (1, 1, 1, 1),
    (3, 5, 1, 7),
    (2, 33, 7, 7),
    (3, 16, 15, 15),
    (1, 2, 130, 140),
    (2, 3, 2, 5, 4),
]


def bad(op: str, name: str, error: type[Exception], argument: str, value: Any, message: str, **more: Any) -> BadInput:
    return BadInput(name, {argument: value, **more}, error, f"^{op}: `{argument}` got {message}")


# Maxout ---------------------------------------------------------------------------------------------------------------


def largest(input: Tensor, pieces: int = 2) -> Tensor:
    """What users run, for inputs without equal numbers."""
    return input.unflatten(1, (pieces, -1)).amax(1)


def pieces_of(device: str, shape: tuple[int, ...], pieces: int = 2, dtype: torch.dtype = F32) -> dict[str, Any]:
    x = torch.randn(shape[0], pieces * shape[1], *shape[2:]).to(device, dtype)
    return {"input": x.requires_grad_(), "pieces": pieces}


def maxout_samples(device: str) -> list[Sample]:
    found = [Sample(f"{shape}", pieces_of(device, shape), largest, 0.0) for shape in SHAPES]
    found += [Sample(f"{p} pieces", pieces_of(device, (3, 6, 5, 5), p), largest, 0.0) for p in (1, 3, 5, 256, 257)]
    for dtype in (*HALVES, F64):
        for layout in ("NCHW", "channels_last"):
            inputs = pieces_of(device, (2, 20, 7, 7), dtype=dtype)
            x = LAYOUTS[layout](inputs["input"].detach())
            found.append(Sample(f"{dtype}, {layout}", inputs | {"input": x.requires_grad_()}, chosen, 0.0))
    for layout, lay_out in LAYOUTS.items():
        x = lay_out(torch.randn(2, 24, 6, 5)).to(device)
        found.append(Sample(layout, {"input": x.requires_grad_()}, chosen, 0.0))
    return found


def chosen(input: Tensor, pieces: int = 2) -> Tensor:
    """The last of the largest: of halves, and of channels that are one, some are equal."""
    parts = input.unflatten(1, (pieces, -1))
    place = torch.arange(pieces, device=input.device).reshape(pieces, *(1,) * (input.dim() - 1))
    last = torch.where(parts == parts.amax(1, keepdim=True), place, -1).amax(1, keepdim=True)
    return parts.gather(1, last).squeeze(1)


MAXOUT = OpContract(
    name="maxout",
    call=maxout,
    samples=maxout_samples,
    raw_op=torch.ops.perfvl.maxout.default,
    raw_samples=lambda device: [
        (LAYOUTS[layout](torch.randn(2, 12, 5, 3, device=device)).to(dtype), pieces, with_winner)
        for layout in ("NCHW", "channels_last", "rows sliced")
        for dtype, pieces, with_winner in [(F32, 2, True), (BF16, 3, True), (F16, 12, True), (F32, 4, False)]
    ],
    small=lambda device: pieces_of(device, (6, 4, 5, 5)),
    double=lambda: pieces_of("cpu", (2, 2, 2, 3), 3, F64),
    bad_inputs=[
        bad("maxout", "not a tensor", TypeError, "input", [1.0], "list, expected a torch.Tensor"),
        bad("maxout", "integers", TypeError, "input", torch.ones(2, 4).long(), "torch.int64, expected a float"),
        bad("maxout", "sparse", TypeError, "input", torch.ones(2, 4).to_sparse(), "torch.sparse_coo, expected a dense"),
        bad("maxout", "a vector", ValueError, "input", torch.ones(4), r"shape \(4,\), expected at least 2 dimensions"),
        bad("maxout", "a float", TypeError, "pieces", 2.0, "float, expected an int"),
        bad("maxout", "a bool", TypeError, "pieces", True, "bool, expected an int"),
        bad("maxout", "none", ValueError, "pieces", 0, "0, expected a divisor of the input's 8 channels"),
        bad("maxout", "negative", ValueError, "pieces", -2, "-2, expected a divisor of the input's 8 channels"),
        bad("maxout", "no divisor", ValueError, "pieces", 3, "3, expected a divisor of the input's 8 channels"),
    ],
    saved_bytes=lambda inputs: inputs["input"].numel() // inputs["pieces"],  # one for each output
    grow=lambda inputs: pieces_of(inputs["input"].device.type, (60, 4, 15, 15)),
    resize=lambda inputs: pieces_of(inputs["input"].device.type, (9, 4, 5, 5)),
    empty=lambda inputs: inputs | {"input": inputs["input"].detach()[:0].requires_grad_()},
    modules=lambda: [Maxout(2), Maxout(pieces=4)],
    call_module=lambda module, inputs: module(inputs["input"]),
)


# APL ------------------------------------------------------------------------------------------------------------------


def hinges(input: Tensor, slope: Tensor, hinge: Tensor) -> Tensor:
    """What users run."""
    if slope.dim() < input.dim():
        slope, hinge = (t.reshape(t.shape + (1,) * (input.dim() - t.dim())) for t in (slope, hinge))
    y = F.relu(input)
    for a, b in zip(slope, hinge, strict=True):
        y = y + a * F.relu(b - input)
    return y


def units(
    device: str, shape: tuple[int, ...], segments: int = 2, dtype: torch.dtype = F32, *, positions: bool = False
) -> dict[str, Any]:
    sizes = (segments, *shape[1:]) if positions else (segments, shape[1])
    found = {"input": torch.randn(shape), "slope": torch.rand(sizes) - 0.5, "hinge": 0.5 * torch.randn(sizes)}
    return {name: t.to(device, dtype).requires_grad_() for name, t in found.items()}


def apl_samples(device: str) -> list[Sample]:
    found = []

    def add(name: str, inputs: dict[str, Any]) -> None:
        # What is rounded once is compared with what is rounded after every step.
        found.append(Sample(name, inputs, hinges, {F64: 1e-12, F32: 4e-6}.get(inputs["input"].dtype, 4e-6)))

    for shape in SHAPES:
        add(f"{shape}", units(device, shape))
        if len(shape) > 2:
            add(f"{shape}, positions", units(device, shape, positions=True))
    for segments in range(1, 8):
        for positions in (False, True):
            add(f"{segments} segments, {positions=}", units(device, (4, 6, 9, 9), segments, positions=positions))
    for dtype in (*HALVES, F64):
        for layout in ("NCHW", "channels_last"):
            for positions in (False, True):
                inputs = units(device, (2, 20, 7, 7), dtype=dtype, positions=positions)
                x = LAYOUTS[layout](inputs["input"].detach())
                add(f"{dtype}, {layout}, {positions=}", inputs | {"input": x.requires_grad_()})
    for layout, lay_out in LAYOUTS.items():
        for positions in (False, True):
            inputs = units(device, (3, 12, 6, 5), 3, positions=positions)
            add(f"{layout}, {positions=}", inputs | {"input": lay_out(inputs["input"].detach()).requires_grad_()})
    strided = units(device, (3, 12, 6, 5), positions=True)
    for name in ("slope", "hinge"):
        strided[name] = strided[name].detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    add("parameters transposed", strided)
    return found


X, A, B = torch.randn(2, 6, 4, 5), torch.randn(3, 6), torch.randn(3, 6)
APL_CONTRACT = OpContract(
    name="apl",
    call=apl,
    samples=apl_samples,
    raw_op=torch.ops.perfvl.apl.default,
    raw_samples=lambda device: [
        (
            LAYOUTS[layout](torch.randn(2, 5, 4, 3, device=device)).to(dtype),
            torch.randn(3, *sizes, device=device),
            torch.randn(3, *sizes, device=device),
        )
        for layout, dtype in [("NCHW", F32), ("channels_last", BF16), ("rows sliced", F16)]
        for sizes in [(5, 1, 1), (5, 4, 3)]
    ],
    small=lambda device: units(device, (6, 4, 5, 5)),
    double=lambda: units("cpu", (2, 2, 2, 3), 2, F64, positions=True),
    bad_inputs=[
        bad("apl", "not a tensor", TypeError, "input", [1.0], "list, expected a torch.Tensor"),
        bad("apl", "integers", TypeError, "input", X.long(), "torch.int64, expected a float"),
        bad("apl", "a vector", ValueError, "input", torch.ones(4), r"shape \(4,\), expected at least 2 dimensions"),
        bad("apl", "slope not a tensor", TypeError, "slope", 0.5, "float, expected a torch.Tensor"),
        bad("apl", "sparse", TypeError, "hinge", A.to_sparse(), "torch.sparse_coo, expected a dense", input=X, slope=A),
        bad("apl", "elsewhere", ValueError, "slope", A.to("meta"), "device meta, expected the input's device", input=X),
        bad("apl", "no segments", ValueError, "slope", A[:0], r"shape \(0, 6\), expected \(S, 6\)", input=X),
        bad("apl", "a slope", ValueError, "slope", A[0], r"shape \(6,\), expected \(S, 6\) or \(S, 6, 4, 5\)", input=X),
        bad("apl", "other channels", ValueError, "slope", A[:, :5], r"shape \(3, 5\), expected \(S, 6\)", input=X),
        bad("apl", "other pixels", ValueError, "slope", torch.ones(3, 6, 5, 4), r"shape \(3, 6, 5, 4\), exp", input=X),
        bad(
            "apl",
            "other",
            ValueError,
            "hinge",
            B[:2],
            r"shape \(2, 6\), expected the slope's \(3, 6\)",
            input=X,
            slope=A,
        ),
    ],
    saved_bytes=lambda inputs: 4 * sum(t.numel() for t in inputs.values()),
    grow=lambda inputs: units(inputs["input"].device.type, (60, 4, 15, 15)),
    resize=lambda inputs: inputs | {"input": torch.randn(9, 4, 5, 5).to(inputs["input"]).requires_grad_()},
    empty=lambda inputs: inputs | {"input": inputs["input"].detach()[:0].requires_grad_()},
    modules=lambda: [APL(4), APL(4, segments=5), APL((4, 5, 5), shared="position")],
    call_module=lambda module, inputs: module(inputs["input"]),
)
