"""BriVL's towers against what the released towers compute, padding, frozen parts."""

from __future__ import annotations

import copy

import pytest
import torch
from brivl_support import (
    WIDE,
    image_tower,
    pairs,
    released_twin,
    text_tower,
    train,
)
from torch import nn

from perfvl.models import (
    BriVL,
    BriVLTextTower,
    load_released_state_dict,
)


@pytest.mark.parametrize("dtype", WIDE)
def test_towers_compute_what_the_released_towers_do(dtype):
    released, model = released_twin()
    load_released_state_dict(model, released.state_dict())
    released, model = released.to(dtype), model.to(dtype)
    image, text = pairs(5, dtype)
    for name, tower, inputs in (
        ("imgencoder", model.image_tower, image),
        ("imgencoder_mom", model.image_momentum, image),
        ("textencoder", model.text_tower, text),
        ("textencoder_mom", model.text_momentum, text),
    ):
        tolerance = {"rtol": 0, "atol": 10 * WIDE[dtype]}
        torch.testing.assert_close(tower(*inputs), released.learnable[name](*inputs), **tolerance)


def test_padding_changes_nothing():
    image, text = pairs(4)
    towers = ((image_tower(), image, lambda m, x: (x[0], torch.where(m, x[1], 7.0), x[2])), (text_tower(), text, None))
    for tower, inputs, repad in towers:
        valid = inputs[-1].bool()
        if repad:
            other = repad(valid.unsqueeze(-1), inputs)
        else:
            other = (torch.where(valid, inputs[0], 19), inputs[1])
        torch.testing.assert_close(tower(*inputs), tower(*other))


def test_inference_gives_what_training_gives():
    image, text = pairs(4)
    for tower, inputs in ((image_tower(), image), (text_tower(), text)):
        trained = tower(*inputs)
        with torch.no_grad():
            torch.testing.assert_close(tower.eval()(*inputs), trained, rtol=0, atol=1e-5)


def test_rows_without_any_member_are_finite_in_both_passes():
    (pixels, boxes, box_mask), (tokens, token_mask) = pairs(3)
    box_mask[1], token_mask[2] = 0, 0
    for tower, inputs, row in (
        (image_tower(), (pixels, boxes, box_mask), 1),
        (text_tower(), (tokens, token_mask), 2),
    ):
        out = tower(*inputs)
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in tower.parameters())
        torch.testing.assert_close(out[row], tower.head(torch.zeros(8)))
        torch.testing.assert_close(out[0], tower(*(value[:1] for value in inputs))[0])


def test_without_boxes_the_whole_image_is_the_only_box():
    tower, pixels = image_tower(), torch.randn(2, 3, 40, 40)
    whole = torch.tensor([0.0, 0, 380, 380]).expand(2, 1, 4)
    torch.testing.assert_close(tower(pixels), tower(pixels, whole, torch.ones(2, 1)))


def test_the_text_backbone_is_called_with_token_ids_alone():
    tower, (tokens, mask) = text_tower(), pairs(3)[1]
    calls = []
    tower.backbone.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    tower(tokens, mask)
    assert calls == [((tokens,), {})]


def test_a_mask_of_another_shape_is_refused():
    (pixels, boxes, _), _ = pairs(3)
    with pytest.raises(ValueError, match=r"BriVLImageTower: mask got shape \(3, 4\), expected \(3, 9\)"):
        image_tower()(pixels, boxes, torch.ones(3, 4))


def test_frozen_parts_are_all_but_those_named():
    backbone = nn.ModuleDict({"stem": nn.Linear(2, 2), "layer": nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])})
    BriVLTextTower(backbone, 8, 16, trainable=["layer.1", "layer.10"], layers=1, heads=1)
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {"layer.1.weight", "layer.1.bias", "layer.10.weight", "layer.10.bias"}
    with pytest.raises(ValueError, match=r"trainable: got 'layer\.12'"):
        BriVLTextTower(backbone, 8, 16, trainable=["layer.12"])


def test_frozen_backbones_stay_and_the_rest_trains():
    model = BriVL(image_tower(trainable=[]), text_tower(), embed_dim=16, queue_size=32)
    before = copy.deepcopy(model.image_tower.backbone.state_dict())
    train(model, steps=2)
    after = model.image_tower.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model.image_momentum.module.backbone.weight, before["weight"]), (
        "averaging equal weights is exact"
    )
    assert model.image_tower.projection.weight.grad is not None
