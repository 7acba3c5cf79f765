"""RoI grid pooling: the released model's grid sampling as one matrix product."""

from __future__ import annotations

import pytest
import torch
from brivl_support import (
    WIDE,
    boxes_of_every_kind,
)
from torch import Tensor

from perfvl.nn.roi_pooling import RoIGridPool
from perfvl.reference.roi_pooling import roi_grid_pool


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", [(12, 12), (2, 2), (7, 13), (13, 7)])
@pytest.mark.parametrize("grid_size", [4, 1, 5])
def test_pooling_is_grid_sampling_with_its_mismatched_corners(dtype, shape, grid_size):
    features = torch.randn(2, 6, *shape, dtype=dtype, requires_grad=True)
    boxes = boxes_of_every_kind(2, dtype)
    pooled = RoIGridPool(380, grid_size)(features, boxes)
    expected = roi_grid_pool(features, boxes, 380, grid_size)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=WIDE[dtype])
    upstream = torch.randn_like(pooled)
    (grad,) = torch.autograd.grad(pooled, features, upstream)
    (expected_grad,) = torch.autograd.grad(expected, features, upstream)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=WIDE[dtype])


def test_pooling_samples_where_the_released_model_does():
    # On a ramp a bilinear sample is its position. The centre of the whole 12 x 12 map would be at 6.0 if the samples
    # were aligned like the coefficients are.
    ramp = torch.arange(12.0, dtype=torch.float64).expand(1, 1, 12, 12)
    whole = torch.tensor([[[0.0, 0.0, 380.0, 380.0]]], dtype=torch.float64)
    (sample,) = RoIGridPool(380, 1)(ramp, whole).flatten().tolist()
    assert sample == pytest.approx(((1 / 11 + 1) * 12 - 1) / 2)


def test_pooling_takes_channels_last_and_other_strides():
    features, boxes = torch.randn(2, 6, 12, 12), boxes_of_every_kind(2)
    expected = RoIGridPool(380)(features, boxes)
    for other in (
        features.to(memory_format=torch.channels_last),
        features.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        torch.testing.assert_close(RoIGridPool(380)(other, boxes), expected)


def test_pooling_copies_no_feature_map():
    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        copies: list

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() >= 2 * 64 * 12 * 12:
                self.copies.append((func, out.untyped_storage().data_ptr()))
            return out

    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = torch.randn(2, 64, 12, 12).to(memory_format=memory_format)
        with Allocations() as watch:
            watch.copies = []
            RoIGridPool(380)(features, boxes_of_every_kind(2)[:, :1])
        assert {pointer for _, pointer in watch.copies} <= {features.untyped_storage().data_ptr()}, watch.copies


def test_half_precision_maps_are_pooled_in_float32():
    features, boxes = torch.randn(2, 6, 12, 12).bfloat16(), boxes_of_every_kind(2)
    expected = RoIGridPool(380)(features.float(), boxes).bfloat16()
    assert torch.equal(RoIGridPool(380)(features, boxes), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(RoIGridPool(380)(features, boxes), expected)


@pytest.mark.parametrize(("batch", "boxes"), [(0, 3), (2, 0), (2, 1)])
def test_pooling_of_no_image_no_box_and_one_box(batch, boxes):
    features = torch.randn(batch, 6, 5, 5)
    rois = torch.tensor([10.0, 20, 200, 300]).expand(batch, boxes, 4)
    pooled = RoIGridPool(380)(features, rois)
    assert pooled.shape == (batch, boxes, 6)
    torch.testing.assert_close(pooled, roi_grid_pool(features, rois, 380, 4))


@pytest.mark.parametrize(
    ("features", "boxes", "error", "names"),
    [
        (torch.zeros(2, 6, 1, 5), torch.zeros(2, 3, 4), ValueError, "features"),
        (torch.zeros(6, 5, 5), torch.zeros(2, 3, 4), ValueError, "features"),
        (torch.zeros(2, 6, 5, 5), torch.zeros(1, 3, 4), ValueError, "boxes"),
        (torch.zeros(2, 6, 5, 5), torch.zeros(2, 3, 5), ValueError, "boxes"),
        (torch.zeros(2, 6, 5, 5), torch.zeros(2, 3, 4, dtype=torch.int64), TypeError, "boxes"),
        (None, torch.zeros(2, 3, 4), TypeError, "features"),
        (torch.zeros(2, 6, 5, 5), torch.zeros(2, 3, 4, device="meta"), ValueError, "boxes"),
    ],
)
def test_pooling_names_what_it_does_not_take(features, boxes, error, names):
    with pytest.raises(error, match=f"RoIGridPool: `{names}` got .*, expected"):
        RoIGridPool(380)(features, boxes)


@pytest.mark.parametrize(("settings", "error"), [((0,), ValueError), (("380",), TypeError), ((380, 2.5), TypeError)])
def test_pooling_names_bad_settings(settings, error):
    with pytest.raises(error, match=r"RoIGridPool: `(image|grid)_size` got"):
        RoIGridPool(*settings)
