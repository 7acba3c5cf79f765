"""What the tests of LSUV share: a small network, the variances of a model's layers, the published loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perfvl.nn.lsuv_layers import LAYERS


def small_net(bias: bool = False) -> nn.Sequential:
    """As CaffeNet begins and ends."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, 2, bias=bias),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 16, 3, padding=1, groups=2, bias=bias),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32, bias=bias),
        nn.ReLU(inplace=True),
        nn.Linear(32, 10, bias=bias),
    )


def images(count: int = 32, size: int = 11) -> Tensor:
    return torch.randn(count, 3, size, size)


def variances(model: nn.Module, *batch: Tensor, **named: Tensor) -> dict[str, float]:
    """Of every layer's output in a plain forward pass as the model stands; of all calls together."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.setdefault(name, []).append(output.double().flatten().clone())

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    handles = [module.register_forward_hook(keep(name)) for name, module in layers]
    with torch.no_grad():
        model(*batch, **named)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(calls).var(correction=0).item() for name, calls in outputs.items()}


def published(model: nn.Module, batch: Tensor, mode: str = "paper", most: int = 21) -> dict[str, tuple[float, int]]:
    """The whole model once for every look at a layer: {name: (product of its scales, how many)}."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS):
            continue
        scale, count = 1.0, 0
        while True:
            seen: list[Tensor] = []
            handle = module.register_forward_hook(lambda m, i, output, seen=seen: seen.append(output.clone()))
            with torch.no_grad():
                model(batch)
            handle.remove()
            output = torch.cat([o.double().flatten() for o in seen])
            std, mean = output.std(correction=0), output.mean()
            off = abs(std - 1) > 0.1 if mode == "reference" else abs(std**2 - 1) > 0.02
            if not off or count == most:
                break
            module.weight.data /= std.float()
            if mode == "reference" and module.bias is not None:
                module.bias.data -= (mean / std).float()
            scale, count = scale / std.item(), count + 1
        found[name] = (scale, count)
    return found


class Counted(nn.Module):
    """How often the model runs."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.body(*args, **kwargs)


def check_unit(model: nn.Module, *batch: Tensor, tolerance: float = 0.02, **named: Tensor) -> None:
    found = variances(model, *batch, **named)
    assert found
    for name, variance in found.items():
        assert variance == pytest.approx(1, abs=tolerance), name
