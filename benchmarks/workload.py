"""What a workload is: inputs, contenders that compute the same thing, and the float64 truth they are judged against."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

Tensors = dict[str, torch.Tensor]
Step = Callable[[], Any]
"""One forward pass. Returns the output tensor, whose ``backward()`` the runner calls where the workload asks for it."""

Role = Literal["perfvl", "eager", "peer", "bound"]
Precision = Literal["float32", "tf32", "bfloat16"]


def in_layout(inputs: Tensors, memory: torch.memory_format) -> Tensors:
    """Copies of a contender's own, images in its layout."""
    return {
        name: t.detach().clone(memory_format=memory if t.dim() == 4 else torch.preserve_format)
        for name, t in inputs.items()
    }


def step_of(
    call: Callable[[], torch.Tensor], leaves: Mapping[str, torch.Tensor], upstream: torch.Tensor, backward: bool
) -> Step:
    """A call, and the gradients of `leaves` where they are wanted: what is timed, and what is compared."""

    def step() -> Tensors:
        if not backward:
            with torch.no_grad():
                return {"output": call()}
        output = call()
        grads = torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

    return step


class Unavailable(Exception):
    """Raised by a contender's ``build`` where it cannot run here; the message is the reason shown to the reader."""


def imported(module: str, requirement: str) -> Any:
    """An optional module. Raises Unavailable where it is missing (``requirement`` says what to install) or broken."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library built for another torch raises what it likes
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        raise Unavailable(f"needs {requirement}" if missing else f"importing {module} failed: {error}") from None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a workload.

    ``build(inputs)`` does everything a training run does once (its own queue layout, scratch buffers, compilation) and
    returns the step to time. The inputs are everybody's: what a step writes to is a copy of its own. ``precision`` is
    that of the matrix products' operands: it picks the tolerance and the roofline. A ``bound`` does part of the work on
    purpose: its time is a limit to compare with, and its answer is not checked.
    """

    build: Callable[[Tensors], Step]
    role: Role = "peer"
    precision: Precision = "float32"
    compiles: bool = False


@dataclasses.dataclass(frozen=True)
class Workload:
    """A fixed problem, solved by every contender on the same tensors.

    ``make(params, generator)`` builds the inputs on the CPU (so every device gets the same numbers); the runner moves
    them to the device and lets ``leaves`` require grad. ``truth(inputs)`` returns, in float64, the output (under
    ``output``) and the gradient of every leaf. Of a problem that ``convolves``, rows in float32 are TF32 rows on a GPU,
    where torch lets convolutions round their operands to that. ``evaluate(call, inputs)`` collects the same from a
    contender, by default from one call; where it is given, ``truth`` may hold anything it collects. ``bytes`` and
    ``flops`` are the least any implementation must move and compute; None where no such bound is known. ``shrink`` are
    the parameters of a small copy of the problem with which libraries are warmed up before memory is measured.
    ``repeats`` calls make one timing sample, for calls too short for the clock.
    """

    op: str
    name: str
    title: str
    params: Mapping[str, Any]
    make: Callable[[Mapping[str, Any], torch.Generator], Tensors]
    contenders: Mapping[str, Contender]
    truth: Callable[[Tensors], Tensors]
    leaves: tuple[str, ...] = ()
    backward: bool = True
    convolves: bool = False
    output: str = "loss"
    evaluate: Callable[[Workload, Step, Tensors], Tensors] | None = None
    tolerance: Mapping[Precision, float] = dataclasses.field(
        default_factory=lambda: {"float32": 1e-4, "tf32": 2e-3, "bfloat16": 3e-2}
    )
    bytes: int | None = None
    flops: int | None = None
    shrink: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeats: int = 1
    memory: bool = True
    quick: bool = False

    def inputs(self, device: torch.device, seed: int) -> Tensors:
        """The tensors of this workload on ``device``; equal seeds give equal numbers on every device."""
        tensors = self.make(self.params, torch.Generator().manual_seed(seed))
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        for name in self.leaves:
            moved[name].requires_grad_()
        return moved

    def precision(self, contender: Contender, device: torch.device) -> Precision:
        """What the operands of a contender's products are rounded to on ``device``."""
        if self.convolves and contender.precision == "float32" and device.type == "cuda":
            return "tf32" if torch.backends.cudnn.allow_tf32 else "float32"
        return contender.precision

    def shrunk(self) -> Workload:
        """The same problem with the parameters in ``shrink``."""
        return dataclasses.replace(self, params={**self.params, **self.shrink})

    def call(self, step: Step, inputs: Tensors) -> Step:
        """What is timed: gradients cleared (for every contender alike), the step, and its backward pass."""
        if not self.backward:
            return step
        leaves = [inputs[name] for name in self.leaves]

        def forward_backward() -> Any:
            for leaf in leaves:
                leaf.grad = None
            output = step()
            output.backward()
            return output

        return forward_backward

    def expected(self, truth: Tensors) -> Tensors:
        """The part of the truth this workload asks of a contender: no gradients where there is no backward pass."""
        if self.evaluate is not None:
            return dict(truth)
        return {name: truth[name] for name in (self.output, *(self.leaves if self.backward else ()))}

    def results(self, call: Step, inputs: Tensors) -> Tensors:
        """The output and the gradient of every leaf, as this contender computes them."""
        if self.evaluate is not None:
            return self.evaluate(self, call, inputs)
        found = {self.output: call().detach()}
        if self.backward:
            found.update({name: grad for name in self.leaves if (grad := inputs[name].grad) is not None})
        return found
