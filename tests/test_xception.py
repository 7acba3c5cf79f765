"""Xception is timm's `legacy_xception` in keys, outputs and steps; its variants are what the paper describes."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from swap_support import require
from torch import Tensor, nn

import perfvl
from perfvl.models import Xception, xception

POINTS = ("act2", "block2.rep.0", "block3.rep.0", "block12.rep.0", "act4")


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    require("timm")
    return importlib.import_module("timm")


@pytest.fixture(scope="module")
def legacy(timm) -> nn.Module:
    """timm's network at an eighth of its width, with running statistics of data: else activations die out."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = timm.create_model("legacy_xception", num_classes=10)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            sizes = (narrow(module.in_channels), narrow(module.out_channels), module.kernel_size, module.stride)
            groups = 1 if module.groups == 1 else sizes[0]
            model.set_submodule(name, nn.Conv2d(*sizes, module.padding, groups=groups, bias=False))
        elif isinstance(module, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(narrow(module.num_features), momentum=None)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            model.set_submodule(name, norm)
    model.fc = nn.Linear(narrow(2048), 10)
    with torch.no_grad():
        model(images(8, 3, 64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def narrow(channels: int) -> int:
    return channels if channels == 3 else max(8, 8 * round(channels / 64))


def images(count: int, channels: int, size: int) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def small(**options) -> Xception:
    """A narrow network whose batch norms have something to do."""
    torch.manual_seed(0)
    model = Xception(10, **{"width": 0.125, "middle_blocks": 1} | options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def twin_of(legacy: nn.Module) -> Xception:
    model = Xception(10, width=0.125)
    model.load_state_dict(legacy.state_dict(), strict=True)
    return model.train(legacy.training)


def composed(model: Xception, x: Tensor, between=lambda x: x) -> Tensor:
    """The network as separate operations, one module at a time."""

    def call(module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.ReLU):
            return F.relu(x)
        if hasattr(module, "pointwise"):
            return module.pointwise(between(module.conv1(x)))
        return module(x)

    def sequence(modules, x: Tensor) -> Tensor:
        for module in modules:
            x = call(module, x)
        return x

    x = sequence((model.conv1, model.bn1, model.act1, model.conv2, model.bn2, model.act2), x)
    for block in [m for name, m in model.named_children() if name.startswith("block")]:
        y = sequence(block.rep, x)
        if hasattr(block, "skip"):
            y = y + block.skipbn(block.skip(x))
        elif model.block4.residual:
            y = y + x
        x = y
    x = sequence((model.conv3, model.bn3, model.act3, model.conv4, model.bn4, model.act4), x)
    return model.fc(model.hidden(x.mean((2, 3))))


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def statistics(model: nn.Module) -> Tensor:
    return torch.cat([b.double().flatten() for b in model.buffers()])


def assert_same_step(model: Xception, x: Tensor, between=lambda x: x) -> None:
    """Logits, gradients and running statistics of one step: no further from float64 than separate operations."""
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    logits = [composed(exact, x.double(), between), composed(plain, x, between), model(x)]
    for value in logits:
        value.square().mean().backward()
    for measure in (gradients, statistics):
        error, allowed = relative(measure(model), measure(exact)), relative(measure(plain), measure(exact))
        assert error <= 4 * allowed + 1e-6, measure
    assert relative(logits[2], logits[0]) <= 4 * relative(logits[1], logits[0]) + 1e-6


def assert_same_evaluation(model: Xception, x: Tensor, between=lambda x: x) -> None:
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), composed(model, x, between), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(x), composed(model, x, between), rtol=1e-3, atol=1e-4)


class TestAsTimm:
    def test_size_is_that_of_the_paper(self):
        with torch.device("meta"):
            model = xception()
        assert sum(p.numel() for p in model.parameters()) == 22_855_952
        assert len(model.state_dict()) == 276
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        pairs = [m for m in model.modules() if hasattr(m, "pointwise")]
        assert len(pairs) == 34
        assert len(convolutions) == 2 + 2 * 34 + 4

    def test_weights_load_both_ways(self, timm):
        with torch.device("meta"):
            ours, theirs = xception(), timm.create_model("legacy_xception")
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)

    def test_initial_weights_have_its_spread(self, timm):
        ours, theirs = xception(), timm.create_model("legacy_xception")
        for name, weight in theirs.state_dict().items():
            if weight.numel() > 5000:
                assert ours.state_dict()[name].std().item() == pytest.approx(weight.std().item(), rel=0.1), name

    def test_logits_in_evaluation(self, legacy):
        x, model = images(2, 3, 48), twin_of(legacy)
        with torch.no_grad():
            expected = copy.deepcopy(legacy).double()(x.double())
            assert expected.std() > 0.1, "activations died out, so the test would see nothing"
            assert relative(copy.deepcopy(model).double()(x.double()), expected) < 1e-12
            allowed = relative(legacy(x), expected)
            assert relative(model(x), expected) <= 4 * allowed + 1e-6
            channels_last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
            assert relative(channels_last, expected) <= 4 * allowed + 1e-6

    def test_a_step_of_sgd(self, legacy):
        x, labels = images(4, 3, 48), torch.tensor([1, 2, 3, 4])

        def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), 0.045, momentum=0.9)
            F.cross_entropy(model(x), labels).backward()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            moves = [(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]
            return torch.cat(moves), statistics(model)

        expected = step(copy.deepcopy(legacy).double(), x.double())
        with perfvl.use_backend("reference"):
            exact = step(twin_of(legacy).double(), x.double())
        for got, value in zip(exact, expected, strict=True):
            assert relative(got, value) < 1e-9
        allowed = step(copy.deepcopy(legacy), x)
        for got, plain, value in zip(step(twin_of(legacy), x), allowed, expected, strict=True):
            assert relative(got, value) <= 4 * relative(plain, value) + 1e-6

    def test_features_at_its_five_points(self, legacy):
        x, model = images(1, 3, 48), twin_of(legacy)
        assert [point["module"] for point in model.feature_info] == list(POINTS)
        for got, expected in zip(model.feature_info, legacy.feature_info, strict=True):
            assert got == expected | {"num_chs": narrow(expected["num_chs"])}
        found: dict[nn.Module, list[Tensor]] = {}
        for network in (model, legacy):
            handles = [
                network.get_submodule(name).register_forward_hook(
                    lambda module, arguments, output, network=network: found.setdefault(network, []).append(output)
                )
                for name in POINTS
            ]
            with torch.no_grad():
                network(x)
            for handle in handles:
                handle.remove()
        assert len(found[model]) == 5
        for got, expected in zip(found[model], found[legacy], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    def test_a_middle_block_saves_little_for_backward(self, timm):
        x = torch.randn(2, 728, 19, 19).to(memory_format=torch.channels_last)
        if perfvl.backends.choose(x, cuda="native") == "reference":
            pytest.skip("the reference saves what PyTorch saves")
        with torch.device("meta"):
            ours = xception().block5
        theirs = importlib.import_module("timm.models.xception").Block(728, 728, 3, 1)
        ours = ours.to_empty(device="cpu")
        ours.load_state_dict(theirs.state_dict())

        def saved(block: nn.Module) -> int:
            storages = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
                return tensor

            block = block.train().to(memory_format=torch.channels_last)
            parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = block(x.clone().requires_grad_())
            assert output.requires_grad
            return sum(size for pointer, (size, _) in storages.items() if pointer not in parameters)

        assert saved(ours) <= 0.55 * saved(theirs)


class TestVariants:
    def test_keras_changes_batch_norm_and_pools(self):
        with torch.device("meta"):
            plain, keras = xception(), xception(keras=True)
        for model, eps, momentum in ((plain, 1e-5, 0.1), (keras, 1e-3, 0.01)):
            norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
            assert len(norms) == 40
            assert {(m.eps, m.momentum) for m in norms} == {(eps, momentum)}
        assert list(plain.state_dict()) == list(keras.state_dict())

    @pytest.mark.parametrize("size", [(74, 74), (147, 147), (37, 19), (10, 7), (4, 1)])
    def test_keras_pools_pad_as_tensorflow(self, size):
        x, pool = torch.randn(1, 2, *size), small(keras=True).block2.rep[-1]
        height, width = ((n + 1) // 2 for n in size)
        before = [max((out - 1) * 2 + 3 - n, 0) // 2 for out, n in zip((height, width), size, strict=True)]
        expected = torch.empty(1, 2, height, width)
        for i in range(height):
            for j in range(width):
                top, left = 2 * i - before[0], 2 * j - before[1]
                expected[:, :, i, j] = x[:, :, max(top, 0) : top + 3, max(left, 0) : left + 3].amax((2, 3))
        assert torch.equal(pool(x), expected)
        # At 299 pixels the networks differ at 74 -> 37 alone.
        assert torch.equal(small().block2.rep[-1](x), expected) == all(n % 2 == 1 for n in size)

    def test_keras_pools_are_in_the_network(self):
        x = images(2, 3, 64)
        assert_same_evaluation(small(keras=True), x)
        plain, keras = small().eval(), small(keras=True).eval()
        for module in keras.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-5
        assert not torch.allclose(plain(x), keras(x))

    def test_without_residual_connections(self):
        model = small(residual=False)
        assert not [name for name in model.state_dict() if "skip" in name]
        assert_same_step(model, images(4, 3, 48))
        assert_same_evaluation(model, images(4, 3, 48))

    @pytest.mark.parametrize(("name", "between"), [("relu", F.relu), ("elu", F.elu)])
    def test_activation_between_depthwise_and_pointwise(self, name, between):
        x, model, plain = images(4, 3, 48), small(intermediate_activation=name), small()
        model.load_state_dict(plain.state_dict(), strict=True)
        assert not torch.allclose(model.eval()(x), plain.eval()(x))
        assert_same_evaluation(model, x, between)
        assert_same_step(model.train(), x, between)

    def test_fully_connected_layers_before_the_last(self):
        with torch.device("meta"):
            paper = xception(17_000, hidden_features=(4096, 4096))
        assert [m.weight.shape for m in (paper.hidden[0], paper.hidden[2], paper.fc)] == [
            (4096, 2048),
            (4096, 4096),
            (17_000, 4096),
        ]
        model = small(hidden_features=(24, 12)).eval()
        features = model.forward_features(images(2, 3, 48))
        expected = features.mean((2, 3))
        for linear in (model.hidden[0], model.hidden[2]):
            expected = F.relu(linear(expected))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
        torch.testing.assert_close(model.forward_head(features), model.fc(expected))

    def test_dropout_drops_while_training_alone(self):
        model, features = small(drop_rate=0.5), torch.rand(2, 256, 3, 3) + 1
        dropped = model.forward_head(features, pre_logits=True)
        assert 0.3 < (dropped == 0).float().mean() < 0.7
        torch.testing.assert_close(model.eval().forward_head(features, pre_logits=True), features.mean((2, 3)))

    def test_classifier_can_be_replaced_and_left_out(self):
        model = small().eval()
        model.reset_classifier(7)
        assert model.get_classifier() is model.fc
        assert model(images(2, 3, 48)).shape == (2, 7)
        model.reset_classifier(0)
        assert model(images(2, 3, 48)).shape == (2, model.num_features)

    def test_width_and_depth(self):
        model = Xception(10, 1, width=0.25, middle_blocks=3, stem_stride=1)
        channels = [model.get_submodule(f"block{i}").rep[-2].num_features for i in (1, 2, 3, 7)]
        assert channels == [32, 64, 184, 256]
        assert [m["module"] for m in model.feature_info][3] == "block7.rep.0"
        assert [m["reduction"] for m in model.feature_info] == [1, 2, 4, 8, 16]
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


class TestFusedRuns:
    @pytest.mark.parametrize(("size", "layout"), [(71, torch.contiguous_format), (96, torch.channels_last)])
    def test_step_and_evaluation_are_those_of_separate_operations(self, size, layout):
        model, x = small().to(memory_format=layout), images(4, 3, size).to(memory_format=layout)
        assert_same_step(model, x)
        assert_same_evaluation(model, x)

    def test_the_smallest_image(self):
        assert small().eval()(images(2, 3, 7)).shape == (2, 10)
        assert small(stem_stride=1).eval()(images(2, 3, 5)).shape == (2, 10)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("block4.rep", "forward"),
            ("block4.rep.1", "forward_pre"),
            ("block4.rep.1.conv1", "forward"),
            ("block4.rep.4.pointwise", "full_backward"),
            ("bn3", "full_backward"),
            ("act4", "forward"),
        ],
    )
    def test_hooks_inside_fire_and_change_nothing(self, name, kind):
        model, calls, x = small(), [], images(2, 3, 48)
        expected = copy.deepcopy(model)
        hook = getattr(model.get_submodule(name), f"register_{kind}_hook")(lambda *arguments: calls.append(1))
        for network in (model, expected):
            network(x).square().mean().backward()
        assert calls == [1]
        assert relative(gradients(model), gradients(expected)) < 1e-3
        hook.remove()
        model(x)
        assert calls == [1]

    @pytest.mark.parametrize("name", ["block4.rep.1.conv1", "block4.rep.2", "conv3", "block2.rep.6"])
    def test_replaced_modules_are_called(self, name):
        class Twice(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner, self.weight = inner, getattr(inner, "weight", None)

            def forward(self, x: Tensor) -> Tensor:
                return 2 * self.inner(x)

        model, x = small().eval(), images(2, 3, 48)
        before = model(x)
        doubled = copy.deepcopy(model)
        doubled.set_submodule(name, Twice(doubled.get_submodule(name)))
        assert not torch.allclose(doubled(x), before)

    def test_without_a_last_batch_norm_a_block_runs_what_is_left(self):
        model, x = small().eval(), images(2, 3, 48)
        del model.block4.rep[8]
        torch.testing.assert_close(model(x), composed(model, x), rtol=1e-3, atol=1e-4)

    def test_checkpointing_computes_the_same_and_keeps_less(self):
        model, x = small(), images(4, 3, 48)
        saving = copy.deepcopy(model)
        saving.set_grad_checkpointing()
        counts = []
        for network in (model, saving):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
            ):
                loss = network(x).square().mean()
            loss.backward()
            counts.append(sum(kept))
        assert counts[1] < 0.6 * counts[0]
        torch.testing.assert_close(gradients(saving), gradients(model))
        torch.testing.assert_close(saving.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert {m.momentum for m in saving.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
        saving.set_grad_checkpointing(False)
        assert not saving.grad_checkpointing

    def test_copies_and_files(self):
        model, x = small().eval(), images(2, 3, 48)
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        other = Xception(10, width=0.125, middle_blocks=1).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(x), expected)

    def test_new_weights_count_at_once(self):
        model, x = small().eval(), images(2, 3, 48)
        with torch.no_grad():
            before = model(x)
            model.block4.rep[2].weight.mul_(2)
            assert not torch.allclose(model(x), before)
            torch.testing.assert_close(model(x), composed(model, x), rtol=1e-3, atol=1e-4)

    def test_bfloat16_autocast(self):
        model, x = small(), images(4, 3, 48)
        exact = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        assert logits.dtype == torch.bfloat16
        logits.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert relative(logits, exact(x)) < 0.1
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert relative(model.eval()(x), composed(model.float(), x)) < 0.1

    @pytest.mark.parametrize("training", [True, False])
    def test_compiles_whole(self, training):
        torch._dynamo.reset()
        model, x = small().train(training), images(4, 3, 48)
        compiled = copy.deepcopy(model)
        call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        if not training:
            with torch.no_grad():
                torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-5)
            return
        call(x).square().mean().backward()
        model(x).square().mean().backward()
        assert relative(gradients(compiled), gradients(model)) < 1e-3
        torch.testing.assert_close(compiled.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "`num_classes` got -1, expected at least 0"),
        ({"in_channels": 0}, "`in_channels` got 0, expected at least 1"),
        ({"hidden_features": (10, 0)}, r"`hidden_features` got \(10, 0\), expected widths of at least 1"),
        ({"intermediate_activation": "silu"}, "`intermediate_activation` got 'silu', expected one of none, relu, elu"),
        ({"drop_rate": 1.0}, "`drop_rate` got 1.0, expected at least 0 and below 1"),
        ({"width": 0.0}, "`width` got 0.0, expected above 0"),
        ({"middle_blocks": -1}, "`middle_blocks` got -1, expected at least 0"),
        ({"stem_stride": 0}, "`stem_stride` got 0, expected at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        xception(**options)


@pytest.mark.parametrize("shape", [(3, 71, 71), (1, 4, 71, 71), (1, 3, 6, 71), (1, 3, 71, 6)])
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"`images` got shape .*, expected \[B, 3, H, W\] with H and W of at least 7"):
        small()(torch.zeros(shape))


def test_docstring_examples_run():
    result = doctest.testmod(sys.modules[Xception.__module__])
    assert result.attempted > 0
    assert result.failed == 0
