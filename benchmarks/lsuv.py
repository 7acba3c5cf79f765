"""Workloads of ``perfvl.nn.lsuv_init_``: CaffeNet128, from Gaussian weights and from orthonormal ones.

The published procedure runs the model twice or more for each of 8 layers, copies every output to the host, and takes an
orthonormal start from a singular value decomposition. What is timed includes setting the weights back. Answers are the
variances of all outputs, in float64, of the network that a contender made: from given weights also the norms of the
new weights. What must move through memory depends on the caches, so no bound on bytes is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perfvl.models.caffenet import CaffeNet128
from perfvl.nn import lsuv_init_

from .workload import Contender, Step, Tensors, Workload

TOLERANCE, MOST = 0.02, 21
LAYERS = (nn.Conv2d, nn.Linear)
WIDTHS = {"full": (96, 256, 384, 384, 256, 2048), "quarter": (24, 64, 96, 96, 64, 512)}


def caffenet(widths: tuple[int, ...]) -> CaffeNet128:
    """The base network, of images that are centred, with dropout at rest."""
    return CaffeNet128(channels=widths[:5], fc=widths[5], mean=(0.0, 0.0, 0.0), scale=1.0).eval()


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model if isinstance(module, LAYERS)]  # type: ignore[attr-defined]


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Images of unit variance, and the study's first weights, normal: deviation 0.01, in fc6 and fc7 0.005."""
    layers = layers_of(caffenet(WIDTHS[params["widths"]]))
    found = {"images": torch.randn(params["N"], 3, 128, 128, generator=generator)}
    for i, layer in enumerate(layers):
        deviation = 0.005 if i in (5, 6) else 0.01
        found[f"weight{i}"] = deviation * torch.randn(layer.weight.shape, generator=generator)
    return found


def one_pass(model: nn.Module, images: Tensor, orthonormal: bool) -> None:
    """perfvl."""
    lsuv_init_(model, images, orthonormal=orthonormal)


def on_host(output: Tensor) -> float:
    """The variance as the published PyTorch code takes it: a copy of the output in numpy."""
    return float(output.cpu().numpy().var())


def on_device(output: Tensor) -> float:
    return output.var(correction=0).item()


def sequential(variance_of: Callable[[Tensor], float]) -> Callable[[nn.Module, Tensor, bool], None]:
    """The published procedure: the whole model runs for every look at a layer."""

    @torch.no_grad()
    def initialise(model: nn.Module, images: Tensor, orthonormal: bool) -> None:
        layers = layers_of(model)
        if orthonormal:
            for layer in layers:
                start_from_svd(layer.weight)
        for layer in layers:
            variance = 0.0

            def look(module: nn.Module, inputs: object, output: Tensor) -> None:
                nonlocal variance
                variance = variance_of(output)

            handle = layer.register_forward_hook(look)
            model(images)
            scalings = 0
            while abs(variance - 1) > TOLERANCE and scalings < MOST:
                layer.weight /= variance**0.5
                model(images)
                scalings += 1
            handle.remove()

    return initialise


def start_from_svd(weight: Tensor) -> None:
    """Singular vectors of normal numbers, whichever have the weight's shape."""
    matrix = weight.flatten(1)
    left, _, right = torch.linalg.svd(torch.randn_like(matrix), full_matrices=False)
    matrix.copy_(left if left.shape == matrix.shape else right)


def contender(
    initialise: Callable[[nn.Module, Tensor, bool], None], params: Mapping[str, Any], role: Any = "peer"
) -> Contender:
    """A way to initialise a model of its own, from the same weights each time."""

    def build(inputs: Tensors) -> Step:
        images = inputs["images"]
        model = caffenet(WIDTHS[params["widths"]]).to(images.device, images.dtype)
        layers = layers_of(model)
        with torch.no_grad():
            for layer in layers:
                layer.bias.zero_()

        def step() -> nn.Module:
            with torch.no_grad():
                for i, layer in enumerate(layers):
                    layer.weight.copy_(inputs[f"weight{i}"])
            initialise(model, images, params["start"] == "orthonormal")
            return model

        return step

    return Contender(build, role=role)


def answer(model: nn.Module, inputs: Tensors, norms: bool) -> Tensors:
    """Variances of all layers, and the norms of their weights."""
    wide = caffenet(tuple(layer.weight.shape[0] for layer in layers_of(model))[:6])
    wide.to(inputs["images"].device, torch.float64).load_state_dict(model.state_dict())
    seen: list[Tensor] = []
    for layer in layers_of(wide):
        layer.register_forward_hook(lambda module, given, output: seen.append(output.var(correction=0)))
    with torch.no_grad():
        wide(inputs["images"].double())
    found = {"variances": torch.stack(seen)}
    if norms:
        found["norms"] = torch.stack([layer.weight.detach().norm() for layer in layers_of(wide)])
    return found


def workload(start: str, widths: str, count: int, **settings: Any) -> Workload:
    """One network, start and batch."""
    params = {"start": start, "widths": widths, "N": count}
    given = start == "Gaussian"

    def truth(inputs: Tensors) -> Tensors:
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        return answer(contender(sequential(on_device), params).build(wide)(), wide, given)

    return Workload(
        op="lsuv",
        name=f"lsuv-caffenet-{widths}-{start.lower()}-n{count}",
        title=f"LSUV of CaffeNet128, {widths} width, {start} start, {count} images",
        params=params,
        make=make,
        contenders={
            "perfvl": contender(one_pass, params, "perfvl"),
            "published": contender(sequential(on_host), params, "eager"),
            "published, variance on the device": contender(sequential(on_device), params),
        },
        truth=truth,
        backward=False,
        convolves=True,
        evaluate=lambda workload, step, inputs: answer(step(), inputs, given),
        # Drawn weights differ, and a layer that is near enough from the start stays as it is.
        tolerance={"float32": 1e-4, "tf32": 2e-3} if given else {"float32": TOLERANCE, "tf32": TOLERANCE},
        shrink={"N": 2},
        **settings,
    )


WORKLOADS = (
    workload("Gaussian", "full", 32, quick=True),
    workload("Gaussian", "full", 128, memory=False),
    workload("orthonormal", "quarter", 32),
)
