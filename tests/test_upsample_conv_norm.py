"""Upsampling, convolution, batch norm and activation in one module: as the modules it stands for, in every mode."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contracts.upsample_conv import ACTIVATIONS, SLACK, upsampled
from op_contract import assert_accurate
from torch import Tensor, nn

from perfvl import backends
from perfvl.nn import UpsampleConv2d
from perfvl.nn.upsample_conv import upsample_norm
from perfvl.ops import upsample_conv

HAS_KERNELS = not backends.CPU_MISSING


@pytest.fixture(params=["kernel", "transposed", "reference"])
def path(request, monkeypatch):
    """Each way to compute the convolution."""
    if request.param == "kernel" and not HAS_KERNELS:
        pytest.skip("needs the kernels")
    monkeypatch.setattr(upsample_conv, "_path", lambda *_: request.param)
    return request.param


def images(*shape: int, channels_last: bool = True) -> Tensor:
    x = torch.randn(shape)
    return x.to(memory_format=torch.channels_last) if channels_last else x


OPTIONS: dict[str, dict[str, Any]] = {
    "StackGAN's": {"bias": False, "activation": "relu"},
    "bias": {"bias": True, "activation": "leaky_relu"},
    "no activation": {"bias": False},
    "silu": {"bias": False, "activation": "silu"},
    "average over all steps": {"momentum": None, "activation": "relu6"},
    "momentum and eps": {"momentum": 0.4, "eps": 0.3, "activation": "hardswish"},
}


def block(channels: int = 12, outputs: int = 14, **options: Any) -> UpsampleConv2d:
    """One whose batch norm has been somewhere."""
    module = UpsampleConv2d(channels, outputs, batch_norm=True, **options)
    for name, tensor in module.bn.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if name.endswith(("weight", "var")) else nn.init.normal_(tensor)
    return module


class Plain(nn.Module):
    """The modules it stands for, on the same parameters."""

    def __init__(self, block: UpsampleConv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.bn, self.activation = block.weight, block.bias, block.bn, block.activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(nn.Upsample(scale_factor=2)(x), self.weight, self.bias, padding=1)
        return ACTIVATIONS[self.activation](self.bn(x))


def outcome(module: nn.Module, x: Tensor, steps: int = 3) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of some steps."""
    x = x.detach().clone().requires_grad_(torch.is_grad_enabled())
    for step in range(steps):
        y = module(x * (1 + step))
        if y.requires_grad:
            y.backward(torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape).sin().to(y.dtype))
    found = {"output": y.detach()} | ({} if x.grad is None else {"gradient": x.grad})
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("mode", ["train", "eval", "eval with gradients"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_block_is_the_modules_it_stands_for(path, options, channels_last, mode):
    module, x = block(**options).train(mode == "train"), images(3, 12, 5, 4, channels_last=channels_last)
    with torch.set_grad_enabled(mode != "eval"):
        plain = (Plain(copy.deepcopy(module)) for _ in range(2))
        truth, rival = outcome(next(plain).double(), x.double()), outcome(next(plain), x)
        found = outcome(copy.deepcopy(module), x)
    assert found.keys() == truth.keys()
    for what, value in found.items():
        assert value.dtype == rival[what].dtype, what
        if truth[what].is_floating_point() and truth[what].norm() < 1e-9:  # of a bias that batch norm takes away
            assert value.norm() < 1e-3, what
        else:
            assert_accurate(what, value, truth[what], rival[what], 2 * SLACK[torch.float32])


def test_float64_is_exact():
    x = images(3, 12, 5, 4).double()
    for training in (True, False):
        module = block(activation="relu").double().train(training)
        expected = outcome(Plain(copy.deepcopy(module)), x)
        for what, value in outcome(copy.deepcopy(module), x).items():
            torch.testing.assert_close(value, expected[what], rtol=1e-12, atol=1e-12, msg=what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_in_half_precision(dtype):
    module, x = block(bias=False).to(dtype), images(3, 12, 5, 4).to(dtype)
    truth = outcome(Plain(copy.deepcopy(module)).double(), x.double(), 1)
    rival = outcome(Plain(copy.deepcopy(module)), x, 1)
    for what, value in outcome(copy.deepcopy(module), x, 1).items():
        assert_accurate(what, value, truth[what], rival[what], 2 * SLACK[dtype])
    with torch.no_grad():
        found, expected, exact = (
            m.eval()(x.to(next(m.parameters()).dtype)) for m in (module, Plain(module), copy.deepcopy(module).double())
        )
    assert_accurate("evaluation", found, exact, expected, SLACK[dtype])


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
def test_evaluation_without_gradients_writes_the_output_alone():
    module, x = block(activation="relu").eval(), images(3, 12, 5, 4)
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x)
    names = [event.name for event in profile.events()]
    assert names.count("perfvl::upsample_conv") == 1
    assert not {"aten::batch_norm", "aten::relu", "aten::conv2d", "aten::upsample_nearest2d"} & set(names)


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
def test_training_never_makes_the_upsampled_image():
    module, x = block(bias=False, activation="relu"), images(3, 12, 5, 4).requires_grad_()
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.profiler.profile() as profile:
        y = module(x)
    assert 4 * x.numel() not in sizes
    assert sizes.count(y.numel()) == 2  # what batch norm reads, and what relu wrote
    names = [event.name for event in profile.events()]
    assert "aten::upsample_nearest2d" not in names
    assert "aten::relu_" in names


def test_one_value_per_channel_is_no_problem_after_upsampling():
    module, x = block(), images(1, 12, 1, 1)
    torch.testing.assert_close(module(x), Plain(module)(x), rtol=1e-4, atol=1e-4)


def test_a_changed_weight_or_statistic_is_seen_at_once():
    module, x = block().eval(), images(3, 12, 5, 4)
    with torch.no_grad():
        for change in (module.weight, module.bn.weight, module.bn.running_var, module.bn.running_mean):
            before = module(x)
            change.mul_(2)
            assert not torch.allclose(module(x), before)
            torch.testing.assert_close(module(x), Plain(module)(x), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_without_running_statistics_uses_those_of_the_batch():
    module = block(activation="relu").eval()
    module.bn = nn.BatchNorm2d(14, affine=False, track_running_stats=False).eval()
    x = images(3, 12, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(module(x), Plain(module)(x), rtol=1e-4, atol=1e-4)


def test_state_dict_is_that_of_a_convolution_and_a_batch_norm():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        conv, bn = nn.Conv2d(12, 14, 3, padding=1), nn.BatchNorm2d(14)
    torch.manual_seed(3)
    module = UpsampleConv2d(12, 14, batch_norm=True)
    assert torch.equal(module.weight, conv.weight)
    assert torch.equal(module.bias, conv.bias)
    assert list(module.state_dict()) == [*conv.state_dict(), *(f"bn.{name}" for name in bn.state_dict())]
    assert list(UpsampleConv2d(3, 2, bias=False).state_dict()) == ["weight"]
    x = images(2, 12, 3, 3)
    expected = module.eval()(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)


def test_a_layer_without_batch_norm_takes_an_image_without_a_batch():
    module, x = UpsampleConv2d(6, 4, activation="relu"), torch.randn(6, 3, 5)
    assert torch.equal(module(x), module(x[None])[0])
    torch.testing.assert_close(module(x), F.relu(upsampled(x, module.weight, module.bias)))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ((0, 4), ValueError, "`in_channels` got 0, expected at least 1"),
        ((4, 2.0), TypeError, "`out_channels` got 2.0, expected an int"),
        ((4, True), TypeError, "`out_channels` got True, expected an int"),
    ],
)
def test_bad_channels_are_named(given, kind, message):
    with pytest.raises(kind, match=f"^UpsampleConv2d: {message}"):
        UpsampleConv2d(*given)


def test_bad_calls_of_modules_are_named_and_move_no_statistics():
    with pytest.raises(ValueError, match=r"UpsampleConv2d: `activation` got 'gelu', expected one of none, relu"):
        UpsampleConv2d(4, 4, activation="gelu")
    module = block()
    with pytest.raises(ValueError, match=r"upsample_conv2d: `weight` got shape \(14, 12, 3, 3\), expected \(O, 5,"):
        module(images(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"upsample_conv2d: `bn` got 3 features, expected the weight's 14"):
        upsample_norm(images(2, 12, 4, 4), module.weight, None, nn.BatchNorm2d(3), "relu")
    with pytest.raises(ValueError, match=r"upsample_conv2d: `activation` got 'gelu'"):
        upsample_norm(images(2, 12, 4, 4), module.weight, None, module.bn, "gelu")
    assert module.bn.num_batches_tracked.item() == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_block_compiles_whole(training):
    torch._dynamo.reset()
    module, x = block(bias=False, activation="relu").train(training), images(3, 12, 5, 4)
    expected = outcome(copy.deepcopy(module), x)
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for what, value in outcome(compiled, x).items():
        torch.testing.assert_close(value, expected[what], msg=what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_under_autocast(dtype, training):
    module, x = block(bias=True, activation="relu").train(training), images(3, 12, 5, 4)
    plain = Plain(copy.deepcopy(module))
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=dtype):
        y, expected = module(x), plain(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=6e-2)
