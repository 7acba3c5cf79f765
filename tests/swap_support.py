"""Models before and after swap, compared."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import sys

import pytest
import torch
from torch import Tensor, nn

import perfvl
from perfvl import backends
from perfvl.nn import fused_blocks


def require(package: str) -> None:
    """Skips without the package. timm imports torchvision: even one built for CUDA, beside a torch built without."""
    for name in {"torchvision", package}:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its library did not load, so operators are missing that it describes and no model here uses
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        importlib.import_module("torchvision")


def varied(model: nn.Module) -> nn.Module:
    """Batch norms that do something in evaluation, and whose shift shows at the borders."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, 0.1, 0.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model


def predict(model: nn.Module, x: Tensor) -> Tensor:
    was_training = model.training
    with torch.no_grad():
        out = model.eval()(x)
    model.train(was_training)
    return out


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step of training."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = model.train()(x)
    y.square().mean().backward()
    found = {"output": y.detach(), "input.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.named_buffers())
    model.zero_grad(set_to_none=True)
    return found


def check_same(model: nn.Module, x: Tensor) -> perfvl.SwapReport:
    """Swaps a copy; float64 on the definition is exact, float32 on the kernels near float64's truth."""
    varied(model)
    truth = copy.deepcopy(model).double()
    swapped = copy.deepcopy(truth)
    keys = list(model.state_dict())
    perfvl.swap(swapped)
    with perfvl.use_backend("reference"):
        wide = x.double()
        close(predict(swapped, wide), predict(truth, wide), 1e-10)
        expected, got = step(truth, wide), step(swapped, wide)
    assert expected.keys() == got.keys()
    for name in expected:
        close(got[name], expected[name], 1e-10, name)
    fused = copy.deepcopy(model)
    report = perfvl.swap(fused)
    assert list(fused.state_dict()) == keys
    fused.load_state_dict(model.state_dict())
    model.load_state_dict(fused.state_dict())
    assert not perfvl.swap(fused)
    truth = copy.deepcopy(model).double()
    near(predict(fused, x), predict(model, x), predict(truth, wide))
    expected, plain, got = step(truth, wide), step(model, x), step(fused, x)
    assert plain.keys() == got.keys()
    for name in plain:
        near(got[name], plain[name], expected[name], name)
    return report


def close(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    scale = max(expected.abs().max().item(), 1e-3)
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance * scale, what


def near(got: Tensor, plain: Tensor, truth: Tensor, what: str = "") -> None:
    """No further from float64 than a few times what float32 in plain PyTorch is."""
    allowed = 4 * (plain.double() - truth).abs().max().item() + 1e-5 * max(truth.abs().max().item(), 1e-3)
    assert got.dtype == plain.dtype
    assert got.shape == plain.shape
    assert (got.double() - truth).abs().max().item() <= allowed, what


def ran(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> list[str]:
    """The classes of the modules that run fused; others run their own forward."""
    names: list[str] = []
    run_plan = fused_blocks._run_plan

    def counting(module: nn.Module, plan: fused_blocks.Plan, x: Tensor) -> Tensor:
        names.append(type(module).__name__)
        return run_plan(module, plan, x)

    with monkeypatch.context() as patch:
        patch.setattr(fused_blocks, "_run_plan", counting)
        with perfvl.use_backend("reference") if backends.CPU_MISSING else contextlib.nullcontext():
            model(x)
    return names
