"""FitNet4: the layers of its definition, where its sums are, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from perfvl.models.fitnet import FitNet4
from perfvl.nn import lsuv_init_


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def test_layers_are_those_of_the_definition():
    model = FitNet4()
    convolutions = [module for module in layers(model) if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [32, 32, 32, 48, 48, *[80] * 6, *[128] * 6]
    assert {(c.kernel_size, c.padding) for c in convolutions} == {((3, 3), (1, 1))}
    assert (model.ip1.layer.in_features, model.ip1.layer.out_features, model.clf.out_features) == (128, 500, 10)
    maxout = FitNet4("maxout")
    assert [c.out_channels for c in layers(maxout)[:17]] == [2 * c.out_channels for c in convolutions]
    assert maxout.ip1.layer.out_features == 5 * 500


@pytest.mark.parametrize("activation", ["relu", "maxout", "vlrelu", "tanh", "prelu"])
@pytest.mark.parametrize("batch_norm", ["none", "before", "after"])
def test_every_form_learns(activation, batch_norm):
    model = FitNet4(activation, batch_norm=batch_norm, residual=True)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_residual_adds_the_input_of_each_pair_of_equal_width():
    torch.manual_seed(0)
    model = FitNet4(residual=True).eval()
    images = torch.randn(2, 3, 16, 16)
    x = images
    for stage, pairs in ((1, [(1,), (2, 3), (4, 5)]), (2, [(1, 2), (3, 4), (5, 6)]), (3, [(1, 2), (3, 4), (5, 6)])):
        for pair in pairs:
            before = x
            for i in pair:
                x = getattr(model, f"conv{stage}_{i}")(x)
            if len(pair) == 2 and x.shape == before.shape:
                x = x + before
        x = getattr(model, f"pool{stage}")(x)
    expected = model.clf(model.ip1(x.flatten(1)))
    assert torch.equal(model(images), expected)
    assert not torch.allclose(FitNet4().eval()(images), expected)


def test_lsuv_gives_every_layer_unit_variance():
    torch.manual_seed(0)
    report = lsuv_init_(FitNet4("maxout"), torch.randn(16, 3, 32, 32))
    assert len(report.layers) == 19
    assert all(abs(layer.variance_after - 1) < 0.02 for layer in report.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": "both"}, "`batch_norm`"),
        ({"activation": "max"}, "`name`"),
        ({"num_classes": 0}, "`num_classes`"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FitNet4(**options)


def test_images_of_another_shape_are_named():
    with pytest.raises(ValueError, match="FitNet4: `images` got shape"):
        FitNet4()(torch.zeros(2, 1, 32, 32))
