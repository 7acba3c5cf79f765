"""norm_act under the contract: both orders, every activation, dtypes, layouts, dimensions, training or not.

Running statistics stand in for the batch's here; that training moves them is a matter of test_norm_act.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from op_contract import BadInput, OpContract, Sample
from torch import Tensor

from perfvl.nn import NormAct2d
from perfvl.ops.norm_act import norm_act

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
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
}
# Planes and columns: sizes around whole vectors, one sample, planes longer than a float32 sum, parts and blocks.
SHAPES = [
    (7, 1),
    (9, 17),
    (600, 130),
    (5, 3, 5),
    (1, 1, 5, 3),
    (3, 5, 1, 7),
    (1, 3, 70, 70),
    (2, 33, 7, 7),
    (16, 40, 7, 7),
    (3, 16, 15, 15),
    (5, 6, 60, 61),
    (2, 3, 2, 5, 4),
]
ACTIVATIONS = {"identity": 0.0, "relu": 0.0, "leaky_relu": 0.3, "elu": 1.5, "tanh": 0.0, "sigmoid": 0.0}
ORDERS = ("before", "after")


def two_layers(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    eps: float = 1e-5,
    activation: str = "relu",
    parameter: float = 0.0,
    order: str = "before",
) -> Tensor:
    """What users run."""
    act = {
        "identity": lambda x: x,
        "relu": F.relu,
        "leaky_relu": lambda x: F.leaky_relu(x, parameter),
        "elu": lambda x: F.elu(x, parameter),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }[activation]
    x = act(input) if order == "after" else input
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.1, eps)
    return act(y) if order == "before" else y


def problem(
    device: str,
    shape: tuple[int, ...],
    activation: str = "relu",
    order: str = "before",
    dtype: torch.dtype = F32,
    *,
    affine: bool = True,
    training: bool = True,
    mean: float = 0.3,
) -> dict[str, Any]:
    channels = shape[1]
    found: dict[str, Any] = {"input": (mean + torch.randn(shape)).to(device, dtype).requires_grad_()}
    wide = F64 if dtype == F64 else F32
    if affine:
        found["weight"] = (0.5 + torch.rand(channels)).to(device, wide).requires_grad_()
        found["bias"] = torch.randn(channels).to(device, wide).requires_grad_()
    if not training:
        found["running_mean"] = (mean + torch.randn(channels)).to(device, wide)
        found["running_var"] = (0.5 + torch.rand(channels)).to(device, wide)
    settings = {"training": training, "activation": activation, "parameter": ACTIVATIONS[activation], "order": order}
    return found | settings


def samples(device: str) -> list[Sample]:
    found = []

    def add(name: str, inputs: dict[str, Any], slack: float = 4e-6) -> None:
        # In half precision it is upstream gradients that are rounded: of sums in which they cancel, little else counts.
        of_dtype = {F64: 1e-12, F32: slack}.get(inputs["input"].dtype, 5e-3)
        found.append(Sample(name, inputs, two_layers, of_dtype))

    for i, shape in enumerate(SHAPES):
        for order in ORDERS:
            add(f"{shape}, {order}", problem(device, shape, list(ACTIVATIONS)[i % 6], order))
    for activation in ACTIVATIONS:
        for order in ORDERS:
            for layout in ("NCHW", "channels_last"):
                for training in (True, False):
                    inputs = problem(device, (4, 20, 9, 9), activation, order, training=training)
                    x = LAYOUTS[layout](inputs["input"].detach()).requires_grad_()
                    add(f"{activation} {order}, {layout}, {training=}", inputs | {"input": x})
    for dtype in (BF16, F16, F64):
        for activation, order in (("relu", "before"), ("elu", "after"), ("tanh", "before"), ("sigmoid", "after")):
            for layout in ("NCHW", "channels_last"):
                inputs = problem(device, (4, 20, 7, 7), activation, order, dtype)
                x = LAYOUTS[layout](inputs["input"].detach()).requires_grad_()
                add(f"{dtype}, {activation} {order}, {layout}", inputs | {"input": x})
    for layout, lay_out in LAYOUTS.items():
        inputs = problem(device, (6, 12, 6, 5), order=ORDERS[len(found) % 2])
        add(layout, inputs | {"input": lay_out(inputs["input"].detach()).requires_grad_()})
    for layout in ("NCHW", "channels_last"):
        for training in (True, False):
            inputs = problem(device, (4, 12, 6, 5), affine=False, training=training)
            x = LAYOUTS[layout](inputs["input"].detach()).requires_grad_()
            add(f"no parameters, {layout}, {training=}", inputs | {"input": x})
        # The mean is far from 0: sums of squares would lose all digits of the variance. It is rounded to float32, by
        # 5e-4 of a deviation.
        inputs = problem(device, (8, 20, 15, 15), "tanh", mean=1e4)
        x = LAYOUTS[layout](inputs["input"].detach()).requires_grad_()
        add(f"far from 0, {layout}", inputs | {"input": x}, 5e-4)
        # And the first element, from which distances are measured, far from the mean.
        x = torch.randn(8, 20, 15, 15)
        x[0, :, 0, 0] = 1e4
        inputs = problem(device, (8, 20, 15, 15), "tanh")
        add(f"the first far off, {layout}", inputs | {"input": LAYOUTS[layout](x.to(device)).requires_grad_()}, 2e-5)
    return found


def small(device: str) -> dict[str, Any]:
    return problem(device, (6, 4, 9, 9), "elu")


def raw_samples(device: str) -> list[tuple]:
    found = []
    for layout, dtype, code, after, training in [
        ("NCHW", F32, 1, False, True),
        ("channels_last", BF16, 3, True, True),
        ("rows sliced", F16, 4, False, False),
    ]:
        x = LAYOUTS[layout](torch.randn(3, 5, 4, 4, device=device)).to(dtype)
        parameters = [torch.rand(5, device=device) for _ in range(4)]
        found.append((x, *parameters, training, 0.1, 1e-5, code, 0.5, after))
    x = torch.randn(3, 5, 4, 4, device=device)
    return [*found, (x, None, None, None, None, True, 0.1, 1e-5, 0, 0.0, False)]


def bad(name: str, error: type[Exception], argument: str, value: Any, message: str, **more: Any) -> BadInput:
    return BadInput(name, {argument: value, **more}, error, f"^norm_act: `{argument}` got {message}")


X, P = torch.randn(2, 4, 4, 5), torch.ones(4)
NORM_ACT = OpContract(
    name="norm_act",
    call=norm_act,
    samples=samples,
    raw_op=torch.ops.perfvl.norm_act.default,
    raw_samples=raw_samples,
    small=small,
    double=lambda: problem("cpu", (3, 2, 2, 3), "elu", "after", F64),
    bad_inputs=[
        bad("not a tensor", TypeError, "input", [1.0], "list, expected a torch.Tensor"),
        bad("integers", TypeError, "input", X.long(), "torch.int64, expected a float"),
        bad("sparse", TypeError, "input", X.to_sparse(), "torch.sparse_coo, expected a dense"),
        bad("a vector", ValueError, "input", torch.ones(4), r"shape \(4,\), expected at least 2 dimensions"),
        bad("weight not a tensor", TypeError, "weight", 0.5, "float, expected a torch.Tensor"),
        bad("elsewhere", ValueError, "bias", P.to("meta"), "device meta, expected the input's device"),
        bad("other channels", ValueError, "weight", torch.ones(5), r"shape \(5,\), expected \(4,\)"),
        bad("a matrix", ValueError, "running_mean", torch.ones(4, 1), r"shape \(4, 1\), expected \(4,\)"),
        bad("one of two", ValueError, "running_var", None, "None, expected both running stat", running_mean=P),
        bad("no statistics", ValueError, "running_mean", None, "None, expected running statistics", training=False),
        bad("momentum", TypeError, "momentum", None, "NoneType, expected a float"),
        bad("infinite", ValueError, "momentum", float("inf"), "inf, expected a finite number"),
        bad("below 0", ValueError, "eps", -1e-5, "-1e-05, expected a finite number of at least 0"),
        bad("a slope", TypeError, "parameter", "0.1", "str, expected a float"),
        bad("unknown", ValueError, "activation", "gelu", "'gelu', expected one of identity, relu"),
        bad("unknown order", ValueError, "order", "both", "'both', expected \"before\" or"),
        BadInput(
            "one value",
            {"input": torch.ones(1, 4, 1, 1)},
            ValueError,
            r"^Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 4, 1, 1\]\)",
        ),
    ],
    saved_bytes=lambda inputs: 4 * (inputs["input"].numel() + 4 * inputs["input"].shape[1]),
    grow=lambda inputs: problem(inputs["input"].device.type, (60, 4, 15, 15), "elu"),
    resize=lambda inputs: inputs | {"input": torch.randn(9, 4, 9, 9).to(inputs["input"]).requires_grad_()},
    empty=lambda inputs: inputs | {"input": inputs["input"].detach()[:0].requires_grad_()},
    modules=lambda: [
        NormAct2d(4, "relu"),
        NormAct2d(4, "elu", order="after", affine=False),
        NormAct2d(4, "tanh", momentum=None).eval(),
    ],
    call_module=lambda module, inputs: module(inputs["input"]),
)
