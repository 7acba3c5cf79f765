"""Separable convolution layers and batch norm between them: as the modules they replace, in every mode and option."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts.separable_conv import ACTIVATIONS
from op_contract import assert_accurate
from torch import Tensor, nn

from perfvl import backends
from perfvl.nn import SeparableConv2d, SeparableConvBNAct2d
from perfvl.nn.separable_chain import run_chain
from perfvl.nn.separable_conv import separable_deferred, separable_norm

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "average over all steps": {"momentum": None},
    "momentum 0.4": {"momentum": 0.4},
    "no weight": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "large eps": {"eps": 0.3},
    "bias": {"bias": True},
    "relu around it": {"pre_activation": "relu", "activation": "relu"},
    "silu around it": {"pre_activation": "silu", "activation": "silu"},
    "stride 2": {"kernel_size": 5, "stride": 2, "padding": 2},
    "same": {"padding": "same", "dilation": 2},
}
Forward = Callable[..., Tensor]


def layer(channels: int = 12, outputs: int = 14, **options: Any) -> SeparableConvBNAct2d:
    """One whose batch norm has been somewhere."""
    module = SeparableConvBNAct2d(channels, outputs, **{"padding": 1, **options})
    for name, tensor in module.bn.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if name.endswith(("weight", "var")) else nn.init.normal_(tensor)
    return module


def composition(module: SeparableConvBNAct2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """PyTorch's modules, one after another."""
    x = module.pointwise(module.conv1(ACTIVATIONS[module.pre_activation](x)))
    y = ACTIVATIONS[module.activation](module.bn(x))
    return y if residual is None else y + residual


def fused(module: SeparableConvBNAct2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return module(x, residual)


def outcome(forward: Forward, module: nn.Module, *inputs: Tensor, steps: int = 1) -> dict[str, Tensor]:
    """Outputs, all gradients and all buffers of some steps."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    for step in range(steps):
        y = forward(module, *(x * (1 + step) for x in inputs))
        upstream = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape).sin()
        if y.requires_grad:
            y.backward(upstream.to(y.dtype))
    found = {"output": y.detach()}
    found |= {f"gradient {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_alike(ours: Forward, theirs: Forward, module: nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Judged by the modules' own float64; no worse than the modules in the dtype of `module`."""
    slack, steps = options.get("slack", 6e-6), options.get("steps", 1)
    copies = [copy.deepcopy(module) for _ in range(3)]
    truth = outcome(theirs, copies[0].double(), *(x.double() for x in inputs), steps=steps)
    rival, found = outcome(theirs, copies[1], *inputs, steps=steps), outcome(ours, copies[2], *inputs, steps=steps)
    assert found.keys() == truth.keys()
    for what, value in found.items():
        assert value.dtype == rival[what].dtype, what
        if truth[what].is_floating_point() and truth[what].norm() < 1e-9:  # of a bias that batch norm takes away
            assert value.norm() < 1e-3, what
        else:
            assert_accurate(what, value, truth[what], rival[what], slack)


def images(channels: int = 12, size: tuple[int, int] = (9, 10), batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_layer_is_the_modules_it_stands_for(options, mode):
    module = layer(**options)
    if mode == "eval":
        module.eval()
    elif mode == "frozen":
        module.bn.eval()
    x = images()
    with torch.set_grad_enabled(mode != "eval"):
        residual = torch.randn_like(composition(copy.deepcopy(module), x).detach())
        assert_alike(fused, composition, module, x, residual, steps=3)
        assert_alike(fused, composition, module, x.contiguous(), steps=3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float64_is_exact(options):
    x = images().double()
    for training in (True, False):
        module = layer(**options).double().train(training)
        first, second = (outcome(f, copy.deepcopy(module), x, steps=3) for f in (fused, composition))
        for what, value in first.items():
            torch.testing.assert_close(value, second[what], rtol=1e-10, atol=1e-10, msg=what)


def test_evaluation_without_gradients_writes_the_output_alone():
    if backends.CPU_MISSING:
        pytest.skip("needs the kernels")
    module, x = layer(pre_activation="relu", activation="relu").eval(), images()
    residual = torch.randn(3, 14, 9, 10)
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x, residual.to(memory_format=torch.channels_last))
    names = [event.name for event in profile.events()]
    assert names.count("perfvl::separable_conv") == 1
    assert not {"aten::batch_norm", "aten::relu", "aten::conv2d"} & set(names)


def test_running_statistics_after_three_steps():
    module = layer(momentum=0.2)
    theirs = copy.deepcopy(module)
    for step in range(3):
        x = images() * (step + 1) + step
        module(x), composition(theirs, x)
    assert module.bn.num_batches_tracked.item() == 3
    for name, buffer in module.bn.named_buffers():
        torch.testing.assert_close(buffer, theirs.bn.get_buffer(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}])
def test_one_value_per_channel_is_refused_as_batch_norm_does(options):
    module, x = layer(**options), images(batch=1, size=(1, 1))
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        composition(copy.deepcopy(module), x)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        module(x)
    assert str(ours.value) == str(theirs.value)
    assert module.bn.num_batches_tracked is None or module.bn.num_batches_tracked.item() == 0
    if not options:
        assert module.eval()(x).shape == (1, 14, 1, 1)


@pytest.mark.parametrize("name", ["pre_activation", "activation"])
def test_an_unknown_activation_is_named(name):
    with pytest.raises(ValueError, match=f"SeparableConvBNAct2d: `{name}` got 'gelu', expected one of none, relu"):
        SeparableConvBNAct2d(4, 4, **{name: "gelu"})


def test_a_changed_weight_or_statistic_is_seen_at_once():
    module, x = layer().eval(), images()
    with torch.no_grad():
        for change in (module.conv1.weight, module.pointwise.weight, module.bn.weight, module.bn.running_var):
            before = module(x)
            change.mul_(2)
            assert not torch.allclose(module(x), before)
            torch.testing.assert_close(module(x), composition(module, x), rtol=1e-4, atol=1e-4)


def test_state_dict_is_that_of_the_modules():
    module = layer(bias=True)
    plain = nn.ModuleDict({
        "conv1": nn.Conv2d(12, 12, 3, padding=1, groups=12),
        "pointwise": nn.Conv2d(12, 14, 1),
        "bn": nn.BatchNorm2d(14),
    })  # fmt: skip
    assert list(module.state_dict()) == list(plain.state_dict())
    module.load_state_dict(plain.state_dict())
    x = images()
    expected = plain["bn"](plain["pointwise"](plain["conv1"](x)))
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)


def test_a_pair_with_biases_is_its_two_convolutions():
    module = SeparableConv2d(12, 14, 3, 2, 1, bias=True)

    def pair(module: SeparableConv2d, x: Tensor) -> Tensor:
        return module.pointwise(module.conv1(x))

    assert_alike(lambda module, x: module(x), pair, module, images())
    assert_alike(lambda module, x: module(x), pair, module, images()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_modules_and_autocast(dtype, training):
    module, x = layer(24, 33, pre_activation="silu", activation="silu").train(training), images(24)
    half = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert_alike(fused, composition, copy.deepcopy(module).to(dtype), x.to(dtype), slack=half)

    def under_autocast(forward: Forward) -> Forward:
        def run(module: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return forward(module, x)

        return run

    assert_alike(under_autocast(fused), under_autocast(composition), module, x, slack=half)


class Chain(nn.Module):
    """(ReLU, separable convolution, batch norm) three times."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(channels, channels, pre_activation="relu") for _ in range(3))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layers = [(m.pre_activation, m.conv1, m.pointwise, m.bn) for m in self.layers]
        return run_chain(x, layers, activation="relu", residual=residual)


def chain_composition(chain: Chain, x: Tensor, residual: Tensor | None = None) -> Tensor:
    for module in chain.layers:
        x = composition(module, x)
    return x.relu() if residual is None else x.relu() + residual


@pytest.mark.parametrize("mode", ["train", "eval", "frozen", "eval with gradients"])
def test_a_chain_is_its_layers_one_after_another(mode):
    chain, x = Chain().train(mode == "train"), images(16)
    if mode == "frozen":
        chain.train()
        for module in chain.layers[::2]:
            module.bn.eval()
    with torch.set_grad_enabled(mode != "eval"):
        assert_alike(Chain.forward, chain_composition, chain, x, images(16), steps=2, slack=2e-5)
        assert_alike(Chain.forward, chain_composition, chain, x.contiguous(), slack=2e-5)


def test_a_deferred_batch_norm_has_several_readers():
    first, second = layer(), layer(14, 10, pre_activation="relu")
    both = nn.ModuleList([first, second])

    def ours(both: nn.ModuleList, x: Tensor) -> Tensor:
        a, b = both
        deferred = separable_deferred(x, a.conv1, a.pointwise, a.bn)
        y = separable_norm(deferred, b.conv1, b.pointwise, b.bn, pre_activation="relu", activation="silu")
        return torch.cat([y, deferred.write()], 1)

    def theirs(both: nn.ModuleList, x: Tensor) -> Tensor:
        x = composition(both[0], x)
        return torch.cat([ACTIVATIONS["silu"](composition(both[1], x)), x], 1)

    assert_alike(ours, theirs, both, images(), slack=1e-5)


@pytest.mark.skipif(bool(backends.CPU_MISSING), reason="plain PyTorch saves what it saves")
def test_a_chain_saves_less_than_half_of_what_its_layers_save():
    chain = Chain()

    def saved(forward: Forward) -> int:
        known = {p.untyped_storage().data_ptr() for p in chain.parameters()}
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            keep_alive = forward(chain, images(16, (37, 37)).requires_grad_())  # else addresses are used again
        del keep_alive
        return sum(found.values())

    def without_last_activation(chain: Chain, x: Tensor) -> Tensor:
        return run_chain(x, [(m.pre_activation, m.conv1, m.pointwise, m.bn) for m in chain.layers])

    def modules(chain: Chain, x: Tensor) -> Tensor:
        for module in chain.layers:
            x = composition(module, x)
        return x

    assert saved(without_last_activation) <= 0.45 * saved(modules)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_and_a_chain_compile_whole(training):
    for module, x in ((layer(activation="relu"), images()), (Chain(), images(16))):
        module.train(training)
        expected = outcome(lambda m, x: m(x), copy.deepcopy(module), x)
        torch._dynamo.reset()
        compiled = torch.compile(module.__class__.forward, fullgraph=True, backend="aot_eager")
        for what, value in outcome(compiled, copy.deepcopy(module), x).items():
            torch.testing.assert_close(value, expected[what], rtol=1e-5, atol=1e-5, msg=what)


@pytest.mark.parametrize("training", [True, False])
def test_an_image_without_a_batch_is_refused_by_name(training):
    layer = SeparableConvBNAct2d(4, 6, padding=1).train(training)
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=r"`input` got shape \(4, 5, 5\)"):
        layer(torch.randn(4, 5, 5))
