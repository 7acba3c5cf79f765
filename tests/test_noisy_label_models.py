"""The image networks of the noisy-label experiments: sizes, state names, layers, oddities."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import perfvl.models.noisy_label
from perfvl.models.noisy_label import (
    MLP,
    CoTeachingCNN,
    GenderCNN,
    JoCoRCNN,
    NewsNet,
    PreActBlock,
    PreActResNet18,
    SmallCNN,
)

KNOWN = json.loads((Path(__file__).parent / "data" / "small_loss_around.json").read_text())["networks"]


def multiply_adds(model: nn.Module, *image: int) -> int:
    counts = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, _, out: counts.append(out[0].numel() * m.weight[0].numel()))
    model.eval()(torch.empty(1, *image, device="meta"))
    return sum(counts)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "image", "macs", "size"),
    [
        (CoTeachingCNN, (3, 32, 32), KNOWN["cnn9"]["macs_32x32x3"], KNOWN["cnn9"]["params_K10"]),
        (lambda: CoTeachingCNN(10, 1), (1, 28, 28), KNOWN["cnn9"]["macs_28x28x1"], None),
        (JoCoRCNN, (3, 32, 32), KNOWN["cnn7"]["macs_32x32x3_K10"], KNOWN["cnn7"]["params_K10"]),
        (lambda: JoCoRCNN(100), (3, 32, 32), None, KNOWN["cnn7"]["params_K100"]),
        (SmallCNN, (3, 32, 32), KNOWN["cnn_small"]["macs"], KNOWN["cnn_small"]["params"]),
        (MLP, (1, 28, 28), KNOWN["mlp"]["macs"], KNOWN["mlp"]["params"]),
        # Counted by hand: the usual 11,171,146 of ten classes and 190 more; and layer by layer.
        (PreActResNet18, (3, 56, 56), None, 11_171_146 + 190 * 513),
        (GenderCNN, (3, 227, 227), None, 14_208 + 614_656 + 885_120 + 7_078_400 + 262_656 + 1_026),
    ],
)
def test_networks_have_the_published_size(build, image, macs, size):
    with torch.device("meta"):
        model = build()
    assert macs is None or multiply_adds(model, *image) == macs
    assert size is None or parameters(model) == size


def test_state_names_are_those_of_the_released_code():
    def layers(model):
        return {name.rsplit(".", 1)[0] for name in model.state_dict()}

    with torch.device("meta"):
        assert layers(CoTeachingCNN()) == {f"{kind}{i}" for kind in ("c", "bn") for i in range(1, 10)} | {"l_c1"}
        assert layers(JoCoRCNN()) == {f"{kind}{i}" for kind in ("c", "bn") for i in range(1, 7)} | {"linear1"}
        assert layers(SmallCNN()) == {"conv1", "conv2", "fc1", "fc2", "fc3"}
        assert layers(MLP()) == {"fc1", "fc2"}
        assert layers(NewsNet((9, 300))) == {"embedding", "fc1", "bn1", "fc2", "bn2", "fc3"}


@pytest.mark.parametrize(
    ("build", "image"),
    [
        (lambda: CoTeachingCNN(7, 1, dropout="none"), (1, 28, 28)),
        (lambda: JoCoRCNN(7, 1), (1, 32, 32)),
        (lambda: SmallCNN(7, 1), (1, 32, 32)),
        (lambda: MLP(7, 40), (5, 8)),
        (lambda: PreActResNet18(7, 1), (1, 28, 28)),
        (lambda: GenderCNN(7, 1), (1, 227, 227)),
    ],
)
def test_every_parameter_gets_a_gradient(build, image):
    model = build()
    logits = model(torch.randn(2, *image))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_cnn9_is_nine_blocks_written_out():
    model = CoTeachingCNN(5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    state = model.state_dict()
    images = torch.randn(1, 3, 28, 28)
    x = images
    for i in range(1, 10):
        x = F.conv2d(x, state[f"c{i}.weight"], state[f"c{i}.bias"], padding=1 if i <= 6 else 0)
        mean, var = state[f"bn{i}.running_mean"], state[f"bn{i}.running_var"]
        x = F.batch_norm(x, mean, var, state[f"bn{i}.weight"], state[f"bn{i}.bias"])
        x = torch.where(x > 0, x, 0.01 * x)
        if i in (3, 6):
            x = F.max_pool2d(x, 2, 2)
    expected = F.adaptive_avg_pool2d(x, 1).flatten(1) @ state["l_c1.weight"].T + state["l_c1.bias"]
    torch.testing.assert_close(model(images), expected)


def test_cnn9_drops_channels_in_training_alone():
    images = torch.randn(4, 3, 28, 28)
    model = CoTeachingCNN()
    model.train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    without = CoTeachingCNN(dropout="none")
    assert torch.equal(without(images), without(images))


@pytest.mark.parametrize(("channels", "stride"), [(6, 1), (9, 1), (6, 2)])
def test_preactivation_blocks_add_their_input_or_a_convolution_of_its_activation(channels, stride):
    block = PreActBlock(6, channels, stride).eval()
    nn.init.uniform_(block.bn1.running_mean)
    x = torch.randn(2, 6, 8, 8)
    activated = F.relu(block.bn1(x))
    inner = F.relu(block.bn2(F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)))
    shortcut = x
    if (channels, stride) != (6, 1):
        shortcut = F.conv2d(activated, block.state_dict()["shortcut.0.weight"], stride=stride)
    torch.testing.assert_close(block(x), F.conv2d(inner, block.conv2.weight, padding=1) + shortcut)


def test_preact_resnet_classifies_the_top_left_of_its_last_map():
    model = PreActResNet18(5).eval()
    last_map = []
    model.layer4.register_forward_hook(lambda _, __, out: last_map.append(out))
    logits = model(torch.randn(1, 3, 56, 56))
    assert last_map[0].shape == (1, 512, 7, 7)
    # The released code's way, and no batch-norm or ReLU on the way.
    assert last_map[0].min() < 0
    torch.testing.assert_close(logits, model.linear(F.avg_pool2d(last_map[0], 4).flatten(1)))


def test_networks_are_their_layers_in_order():
    def block(model, i):
        return model.get_submodule(f"c{i}"), model.get_submodule(f"bn{i}"), nn.ReLU()

    cnn7, small, gender = JoCoRCNN().eval(), SmallCNN(), GenderCNN().eval()
    relu, half, third, flat = nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.Flatten()
    norm = nn.LocalResponseNorm(11, alpha=11e-4)  # TensorFlow's, see the next test
    pairs = [layer for i in (1, 3, 5) for layer in (*block(cnn7, i), *block(cnn7, i + 1), half)]
    convolutions = [small.conv1, relu, half, small.conv2, relu, half]
    faces = [gender.conv1, relu, third, norm, gender.conv2, relu, third, norm, gender.conv3, relu, third]
    for model, layers, side in (
        (cnn7, [*pairs, flat, cnn7.linear1], 32),
        (small, [*convolutions, flat, small.fc1, relu, small.fc2, relu, small.fc3], 32),
        (gender, [*faces, flat, gender.fc1, relu, gender.fc2, relu, gender.fc3], 227),
    ):
        images = 10 * torch.randn(2, 3, side, side)
        torch.testing.assert_close(model(images), nn.Sequential(*layers)(images))


def test_gender_normalisation_is_tensorflows():
    x = torch.randn(1, 20, 2, 2)
    expected = torch.empty_like(x)
    for channel in range(20):
        squares = x[:, max(channel - 5, 0) : channel + 6].square().sum(1)
        expected[:, channel] = x[:, channel] / (1 + 1e-4 * squares) ** 0.75
    torch.testing.assert_close(GenderCNN().norm(x), expected)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (CoTeachingCNN(), (2, 3, 27, 28)),
        (CoTeachingCNN(), (2, 1, 28, 28)),
        (JoCoRCNN(), (2, 3, 28, 28)),
        (JoCoRCNN(), (3, 32, 32)),
        (SmallCNN(), (2, 3, 33, 32)),
        (MLP(), (2, 1, 28, 27)),
        (MLP(), (784,)),
        (PreActResNet18(), (2, 3, 64, 64)),
    ],
)
def test_networks_name_images_they_do_not_take(model, shape):
    with pytest.raises(ValueError, match=f"{type(model).__name__}: `images` got .*, expected"):
        model(torch.zeros(shape))


def test_cnn9_names_a_bad_dropout():
    with pytest.raises(ValueError, match="CoTeachingCNN: `dropout` got 'functional', expected"):
        CoTeachingCNN(dropout="functional")


def test_docstring_examples_run():
    result = doctest.testmod(perfvl.models.noisy_label)
    assert result.attempted > 0
    assert result.failed == 0
