"""What LSUV does not take is named, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lsuv_support import check_unit, images, small_net
from torch import nn

from perfvl.nn import lsuv_init_


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.used(x)


def refused(model: nn.Module, batch: Any, error: type[Exception], message: str, **options: Any) -> None:
    """The call fails with this message and leaves the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        lsuv_init_(model, batch, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class TestBatches:
    @pytest.mark.parametrize("kind", [tuple, list, dict])
    def test_arguments_of_the_model(self, kind):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.image, self.text = nn.Linear(6, 4, bias=False), nn.Linear(3, 4, bias=False)

            def forward(self, image, text, flag=True):
                return self.image(image) + self.text(text) if flag else None

        model, image, text = Two(), torch.randn(32, 6), torch.zeros(32, 3).normal_()
        batch = {"image": image, "text": text, "flag": True} if kind is dict else kind((image, text, True))
        lsuv_init_(model, batch)
        check_unit(model, image, text)

    @pytest.mark.parametrize(
        "batch",
        [None, 3.0, "images", [1, 2], {"x": 1}, {1: torch.ones(2)}, nn.Parameter(torch.randn(8, 4)), [[[1.0]]]],
    )
    def test_what_is_no_batch_is_named(self, batch):
        with pytest.raises(TypeError, match=r"lsuv_init_: `batch` got .*, expected a tensor"):
            lsuv_init_(nn.Linear(4, 4), batch)


class TestErrors:
    @pytest.mark.parametrize("value", [0.0, 3.5])
    def test_a_batch_of_equal_numbers(self, value):
        refused(small_net(), torch.full((4, 3, 11, 11), value), ValueError, r"`batch` got .*equal \(variance 0\)")
        refused(small_net(), torch.empty(0, 3, 11, 11), ValueError, "`batch` got .*equal")

    @pytest.mark.parametrize("bias", [False, True])
    def test_a_layer_without_variance(self, bias):
        class Dead(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.norm = nn.Linear(4, 4, bias=bias), nn.BatchNorm1d(4)
                self.second, self.third = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=bias)

            def forward(self, x):
                return self.third(self.second(0 * self.norm(self.first(x))))

        refused(Dead(), torch.randn(8, 4), ValueError, "`batch` got outputs of variance 0 in layer 'second'")
        again = nn.Sequential(Dead(), nn.Linear(4, 4))
        again.append(again[1])
        refused(again, torch.randn(8, 4), ValueError, "`batch` got outputs of variance 0 in layer '0.second'")

    def test_numbers_that_are_not_finite(self):
        batch = images()
        batch[0, 0, 0, 0] = float("nan")
        refused(small_net(), batch, ValueError, "`batch` got outputs of variance nan in layer '0'")
        batch[0, 0, 0, 0] = float("inf")
        refused(small_net(bias=True), batch, ValueError, "`batch` got outputs of variance (nan|inf) in layer '0'")

    def test_models(self):
        refused(nn.Sequential(nn.ReLU()), images(), ValueError, "`model` got a Sequential without layers")
        refused(nn.DataParallel(small_net()), images(), ValueError, "`model` got DataParallel, expected the module")
        for model in (nn.LazyLinear(4), nn.Linear(4, 4, device="meta")):
            with pytest.raises(ValueError, match="`model` got a weight without data in ''"):
                lsuv_init_(model, torch.randn(3, 4))
        with pytest.raises(TypeError, match=r"`model` got function, expected a torch\.nn\.Module"):
            lsuv_init_(lambda x: x, images())

    def test_layers(self):
        message = "`layers` got 'nine', expected modules with layers; the layers are 0, 2, 6, 8"
        refused(small_net(), images(), ValueError, message, layers=["0", "nine"])
        refused(small_net(), images(), ValueError, "`layers` got '1', expected", layers=["1"])
        refused(small_net(), images(), ValueError, "`layers` got no names", layers=[])
        refused(small_net(), images(), TypeError, "`layers` got str", layers="0")
        refused(small_net(), images(), TypeError, "`layers` got a int", layers=[0])
        refused(Uncalled(), torch.randn(8, 4), ValueError, "`layers` got 'unused', expected", layers=["used", "unused"])
        computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
        refused(computed, torch.randn(8, 4), ValueError, "`layers` got '0', expected", layers=["0"])
        refused(computed, torch.randn(8, 4), ValueError, "`model` got computed weights only")

    def test_numbers_among_the_options(self):
        for options, error, name in (
            ({"mode": "caffe"}, ValueError, "mode"),
            ({"tolerance": 0}, ValueError, "tolerance"),
            ({"tolerance": float("nan")}, ValueError, "tolerance"),
            ({"tolerance": "0.1"}, TypeError, "tolerance"),
            ({"max_iterations": 0}, ValueError, "max_iterations"),
            ({"max_iterations": 2.0}, TypeError, "max_iterations"),
        ):
            refused(small_net(), images(), error, f"`{name}` got .*, expected", **options)

    def test_a_forward_that_raises(self):
        model = nn.Sequential(small_net(), nn.BatchNorm1d(10), nn.Linear(11, 2))
        refused(model, images(), RuntimeError, "shapes cannot be multiplied")
        refused(model, images().to(torch.uint8), RuntimeError, "type")
