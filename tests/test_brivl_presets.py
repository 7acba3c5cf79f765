"""BriVL: checkpoints of the released code, presets, examples in docstrings."""

from __future__ import annotations

import copy
import doctest
import importlib.util
import io
import socket
import sys

import pytest
import torch
from brivl_support import (
    pairs,
    released_twin,
    small,
    train,
)
from torch import nn

from perfvl.models import (
    BriVL,
    brivl_paper,
    brivl_released,
    brivl_small,
    load_released_state_dict,
    released_state_dict,
    retrieve,
)

# Checkpoints of the released code


def test_released_states_load_and_give_the_released_features_and_queues():
    released, model = released_twin()
    model.image_queue.valid.fill_(3)
    assert load_released_state_dict(model, released.state_dict()) == []
    image, text = pairs(3)
    torch.testing.assert_close(model.image_tower(*image), released.learnable["imgencoder"](*image), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.text_tower(*text), released.learnable["textencoder"](*text), rtol=0, atol=1e-5)
    assert torch.equal(model.image_queue.keys, released.img_queue.T)
    assert torch.equal(model.text_queue.keys, released.text_queue.T)
    assert int(model.image_queue.cursor) == int(model.text_queue.cursor) == 5
    assert int(model.image_queue.valid) == 32
    train(model, steps=1)
    assert int(model.image_queue.cursor) == 9


def test_every_state_goes_out_and_comes_back():
    released, model = released_twin()
    train(model, steps=3)
    exported = released_state_dict(model)
    released.load_state_dict(exported)
    _, other = released_twin()
    load_released_state_dict(other, released.state_dict())
    own, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items() if "extra_state" not in name)


@pytest.mark.parametrize("kind", ["data parallel", "learnable alone", "published file"])
def test_states_load_however_they_were_saved(kind):
    released, model = released_twin()
    keys = model.image_queue.keys.clone()
    if kind == "data parallel":
        load_released_state_dict(model, {f"module.{name}": value for name, value in released.state_dict().items()})
        keys = released.img_queue.T
    elif kind == "learnable alone":
        load_released_state_dict(model, released.learnable.state_dict())
    else:
        load_released_state_dict(model, {"learnable": released.learnable.state_dict(), "epoch": 3})
    weights = released.learnable["textencoder_mom"].backbone.weight
    assert torch.equal(model.text_momentum.module.backbone.weight, weights)
    assert torch.equal(model.image_queue.keys, keys)


def test_what_the_released_backbones_do_not_use_is_left_out_and_told():
    released, model = released_twin()
    unused = [
        "learnable.imgencoder.backbone.classifier.weight",
        "learnable.textencoder_mom.backbone.bert.pooler.dense.bias",
        "learnable.textencoder.backbone.bert.embeddings.position_ids",
    ]
    assert load_released_state_dict(model, {**released.state_dict(), **dict.fromkeys(unused, torch.zeros(1))}) == unused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"learnable.imgencoder.extra": torch.zeros(1)}), "learnable.imgencoder.extra"),
        (lambda state: state.update({"img_queue": torch.zeros(16, 31)}), r"img_queue of shape \(16, 31\)"),
        (lambda state: state.update({"text_queue_ptr": torch.tensor([32])}), "text_queue_ptr = 32 outside"),
        (lambda state: state.update({"text_queue_ptr": torch.tensor([-1])}), "text_queue_ptr = -1 outside"),
        (lambda state: state.pop("img_queue_ptr"), "no img_queue_ptr"),
        (lambda state: state.pop("learnable.textencoder.learnable.textFC.fc1.bias"), "no learnable.textencoder.learn"),
        (lambda state: state.clear(), "no learnable.imgencoder.backbone.weight"),
    ],
)
def test_states_that_do_not_fit_are_told_and_change_nothing(change, message):
    released, model = released_twin()
    before, state = copy.deepcopy(model.state_dict()), dict(released.state_dict())
    change(state)
    with pytest.raises(ValueError, match=f"load_released_state_dict: .*{message}"):
        load_released_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_with_other_towers_have_no_released_state():
    with pytest.raises(ValueError, match="the model has no image_tower"):
        released_state_dict(small())


# Presets


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a preset opened a connection: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def extras() -> None:
    """timm and transformers, which import torchvision: even one built for CUDA, beside a torch built without."""
    for package in ("torchvision", "timm", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its library did not load, so operators are missing that it describes and no backbone uses
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        importlib.import_module("torchvision")


@pytest.mark.parametrize(
    ("preset", "size", "dim", "keys", "channels", "width", "blocks", "layers"),
    [
        (brivl_paper, 600, 2560, 16_384, 2560, 1024, 7, 24),
        (brivl_released, 380, 2048, 9_600, 2048, 768, 7, 12),
    ],
)
def test_presets_have_the_published_shapes(
    extras, no_network, preset, size, dim, keys, channels, width, blocks, layers
):
    with torch.device("meta"):
        model = preset()
        boxes = torch.zeros(2, 37, 4)
        image = model.get_image_features((torch.zeros(2, 3, size, size), boxes, torch.ones(2, 37)))
        text = model.get_text_features((torch.zeros(2, 80, dtype=torch.int64), torch.ones(2, 80)))
    assert image.shape == text.shape == (2, dim)
    assert model.image_queue.keys.shape == model.text_queue.keys.shape == (keys, dim)
    assert model.image_tower.projection.weight.shape == (channels, channels)
    assert len(model.image_tower.attention.layers) == len(model.text_tower.attention.layers) == 4
    assert model.text_tower.backbone.bert.config.hidden_size == width
    trained = {name.split(".")[1] for name, p in model.image_tower.backbone.named_parameters() if p.requires_grad}
    assert trained == {str(i) for i in range(3, blocks)}
    trained = {name.split(".")[3] for name, p in model.text_tower.backbone.named_parameters() if p.requires_grad}
    assert trained == {str(i) for i in range(layers - 4, layers)}
    assert preset is brivl_paper or model.loss.temperature == 0.07
    unused = ("pooler", "classifier")
    assert not [name for name, _ in model.named_parameters() if any(part in name for part in unused)], "DDP would wait"
    assert "learnable.imgencoder.backbone.conv_head.weight" in released_state_dict(model)
    assert "learnable.textencoder_mom.backbone.bert.encoder.layer.0.output.dense.bias" in released_state_dict(model)


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_presets_say_what_to_install(monkeypatch, package):
    backbones = {"image_backbone": nn.Conv2d(3, 2048, 1), "text_backbone": nn.ModuleDict()}
    del backbones["image_backbone" if package == "timm" else "text_backbone"]
    monkeypatch.setitem(sys.modules, package, None)
    with torch.device("meta"), pytest.raises(ImportError, match=rf"needs {package}: pip install 'perfvl\[models\]'"):
        brivl_released(freeze=False, **backbones)


def test_presets_take_given_backbones_without_the_extras(monkeypatch):
    for package in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    with torch.device("meta"):
        model = brivl_released(
            image_backbone=nn.Conv2d(3, 2048, 32, 32), text_backbone=nn.Embedding(9, 768), freeze=False, queue_size=16
        )
    assert model.image_queue.keys.shape == (16, 2048)
    assert isinstance(model.image_momentum.module.backbone, nn.Conv2d)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_modes_start_from_their_published_settings(mode):
    dim, keys, temperature = {"paper": (2560, 16_384, 0.05), "reference": (2048, 9_600, 0.07)}[mode]
    with torch.device("meta"):
        model = BriVL(nn.Linear(2, dim), nn.Linear(3, dim), mode=mode)
    assert model.text_queue.keys.shape == (keys, dim)
    assert model.image_momentum.momentum == model.text_momentum.momentum == 0.99
    assert (model.loss.reduction, model.loss.directions) == ("sum" if mode == "paper" else "mean", "sum")
    assert bool(model.loss.learnable) == (mode == "paper")
    small_one = small(mode)
    assert torch.as_tensor(small_one.loss.current_temperature()).item() == pytest.approx(temperature)
    norms = torch.cat([small_one.image_queue.keys, small_one.text_queue.keys]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(48))


def test_the_small_preset_learns_pairs_and_saves(no_network):
    settings = {"image_size": 8, "image_channels": 1, "max_tokens": 6, "embed_dim": 16, "queue_size": 64, "width": 16}
    model = brivl_small(30, **settings)
    kinds = torch.arange(64) % 4
    images = torch.randn(4, 1, 8, 8)[kinds] + 0.2 * torch.randn(64, 1, 8, 8)
    texts = torch.randint(4, 30, (64, 6))
    texts[torch.arange(64), torch.randint(6, (64,))] = kinds  # one of six tokens says what the image shows
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = torch.arange(16) + 16 * (step % 4)
        optimizer.zero_grad()
        model(images[batch], texts[batch]).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = retrieve(model.get_image_features(images), model.get_text_features(texts), 1).indices.flatten()
    assert (kinds[found] == kinds).float().mean() > 0.8
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = brivl_small(30, **settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other.eval().get_text_features(texts), model.get_text_features(texts))


@pytest.mark.parametrize(
    "module",
    ["models.brivl", "models.brivl_towers", "models.brivl_presets", "models.brivl_checkpoint", "nn.roi_pooling"],
)
def test_docstring_examples_run(module):
    result = doctest.testmod(importlib.import_module(f"perfvl.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
