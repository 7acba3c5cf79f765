"""What an op declares to be held to the contract in test_contract.py, and how its numbers are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclasses.dataclass
class Sample:
    """One call. `rival`: what a user would run in plain PyTorch in the same dtypes; its error is our bar."""

    name: str
    inputs: dict[str, Any]  # by the public function's argument names; tensors among them may require grad
    rival: Callable[..., Any]  # same arguments, same outputs
    slack: float = 4e-6  # relative error allowed above the rival's; a few float32 ulps by default


@dataclasses.dataclass(frozen=True)
class BadInput:
    name: str
    change: Mapping[str, Any]  # argument -> replacement, or a callable of the good inputs
    error: type[Exception]
    message: str  # regex: must name argument, got, expected


@dataclasses.dataclass(frozen=True)
class OpContract:
    name: str
    call: Callable[..., Any]  # the public function
    samples: Callable[[str], list[Sample]]  # device -> samples over dtypes, shapes, layouts, options
    raw_op: Callable[..., Any]  # torch.ops.perfvl.<op>.default
    raw_samples: Callable[[str], list[tuple]]  # arguments for opcheck
    small: Callable[[str], dict[str, Any]]  # well-conditioned float32 inputs that vary little in size
    bad_inputs: list[BadInput]
    resize: Callable[[dict[str, Any]], dict[str, Any]]  # the same call with another batch size
    empty: Callable[[dict[str, Any]], dict[str, Any]]  # the same call with nothing to do
    cuda: Literal["triton", "native"] = "triton"  # the kind of its CUDA kernels
    mutates: tuple[str, ...] = ()  # arguments written in place
    autocast_output: bool = False  # under autocast outputs have its dtype, as those of convolutions
    # Of differentiable ops:
    double: Callable[[], dict[str, Any]] | None = (
        None  # float64 inputs for gradcheck, tensors requiring grad among them
    )
    saved_bytes: Callable[[dict[str, Any]], int] = lambda inputs: 0  # upper bound for `small`, whatever `grow` does
    grow: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs  # a problem many times larger
    per_row: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options for outputs that are not reduced
    modules: Callable[[], list[torch.nn.Module]] = list  # the op's layers or losses, in every kind of state they have
    call_module: Callable[[torch.nn.Module, dict[str, Any]], Tensor] | None = None  # a module on `small` inputs

    @property
    def function(self) -> Callable[..., Any]:
        """The op from inputs to outputs: one that writes to arguments gets copies of them, and returns these."""
        return self.pure(self.call)

    def pure(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(**inputs: Any) -> Any:
            if not self.mutates:
                return call(**inputs)
            inputs |= {name: tree_map_only(Tensor, twin, inputs[name]) for name in self.mutates if name in inputs}
            call(**inputs)
            return tree_leaves([inputs[name] for name in self.mutates if name in inputs])

        return run


def twin(t: Tensor) -> Tensor:
    """A copy with the same strides and offset in memory of its own."""
    if not t.numel():
        return t.clone()
    end = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    return t.detach().as_strided((end,), (1,), 0).clone().as_strided(t.shape, t.stride(), t.storage_offset())


def differentiable(inputs: Mapping[str, Any]) -> list[str]:
    return [k for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]


def leaf(t: Tensor) -> Tensor:
    """A leaf with the same data and strides."""
    return t.detach().as_strided(t.shape, t.stride(), t.storage_offset()).requires_grad_(t.requires_grad)


def fresh(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return tree_map_only(Tensor, leaf, dict(inputs))


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def evaluate(
    function: Callable[..., Any], inputs: Mapping[str, Any], upstream: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs and, for one fixed upstream gradient per output, the gradient of every input that wants one."""
    inputs = fresh(inputs)
    outputs = outputs_of(function(**inputs))
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    wanted = differentiable(inputs)
    if wanted:
        graded = [o for o in outputs if o.requires_grad]
        if upstream is None:  # by the place of the output, whichever others have a gradient
            upstream = [u for u, o in zip(upstream_like(outputs), outputs, strict=True) if o.requires_grad]
        grads = torch.autograd.grad(
            graded, [inputs[k] for k in wanted], [u.to(o) for u, o in zip(upstream, graded, strict=True)]
        )
        result |= {f"gradient of {k}": g for k, g in zip(wanted, grads, strict=True)}
    return result


def upstream_like(outputs: list[Tensor]) -> list[Tensor]:
    """A gradient for each output, different for every row and output, so that no two terms cancel."""
    weights = [torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).reshape(o.shape) for o in outputs]
    return [w * (-0.6) ** i for i, w in enumerate(weights)]


def as_double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    def convert(v: Tensor) -> Tensor:
        if v.is_floating_point():
            return v.detach().to("cpu", torch.float64).requires_grad_(v.requires_grad)
        return v.cpu()

    return tree_map_only(Tensor, convert, dict(inputs))


def error(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative error in norm, and the worst row's error relative to the largest row."""
    got, truth = got.detach().to("cpu", torch.float64), truth.detach().double()
    if truth.numel() == 0:
        return 0.0, 0.0
    rows, true_rows = got.reshape(len(got) if got.dim() else 1, -1), truth.reshape(len(truth) if truth.dim() else 1, -1)
    scale = true_rows.norm(dim=1).max().clamp_min(1e-30)
    return float((got - truth).norm() / truth.norm().clamp_min(1e-30)), float(
        (rows - true_rows).norm(dim=1).max() / scale
    )


def assert_accurate(what: str, got: Tensor, truth: Tensor, rival: Tensor, slack: float) -> None:
    """No worse than plain PyTorch in the same dtypes plus `slack`; both judged against float64."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if not truth.is_floating_point():
        assert torch.equal(got.cpu(), truth), f"{what} differs"
        return
    for kind, ours, theirs in zip(("norm-wise", "worst row"), error(got, truth), error(rival, truth), strict=True):
        allowed = 1.2 * theirs + slack
        assert ours <= allowed, f"{what}: {kind} error {ours:.2e}, plain PyTorch {theirs:.2e}, allowed {allowed:.2e}"


def mutations(t: Tensor) -> dict[str, Tensor]:
    """Wrong answers that every accuracy check must reject."""
    wrong = {"zero": torch.zeros_like(t), "doubled": t * 2, "nan": torch.full_like(t, torch.nan)}
    if t.dim() and len(t) > 1:
        dropped = t.clone()
        dropped[-1] = 0
        wrong |= {"last row dropped": dropped, "rows shifted": t.roll(1, 0)}
    return wrong
