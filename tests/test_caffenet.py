"""CaffeNet128 and its variants: the study's shapes, costs, parameters and accuracies, and what each choice computes."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from swap_support import require
from torch import nn

from perfvl.models.caffenet import CaffeNet128, image_transform, parameter_groups
from perfvl.models.caffenet_config import CaffeNetConfig
from perfvl.models.caffenet_parts import FixedColorSpace, SpatialPyramidPool2d
from perfvl.models.caffenet_variants import PUBLISHED
from perfvl.nn import lsuv_init_

KNOWN = json.loads((Path(__file__).parent / "data" / "caffenet.json").read_text())
SMALL = {"num_classes": 7, "channels": (8, 12, 16, 16, 8), "fc": 24}
GROUPS = {"in": "input_size/s", "k": "conv1/k", "nin": "conv1_depth/nin", "c3x": "conv1_depth/c3x", "w": "width/x"}
# What a known answer calls otherwise than the study's tables.
NAMED = {
    "base": ("base", {}),
    "fc4096": ("classifier/fc4096", {}),
    "slide_table": ("base", {"table": "slides"}),
    "floor_pool": ("base", {"ceil_mode": False}),
    "no_group": ("width/no_group", {}),
    "maxout_same_complexity": ("activation/maxout_same_complexity", {}),
    "maxout_same_width": ("activation/maxout_same_width", {}),
    "fc_maxout": ("activation/conv_relu_fc_maxout", {}),
    "pool2x2": ("pooling/max_2x2", {}),
    "pool3x3_pad1": ("pooling/max_3x3_pad1", {}),
    "nopool": ("pooling/strided_conv", {}),
    "spp2": ("classifier/spp2", {}),
    "spp3": ("classifier/spp3", {"mode": "reference"}),
    "spp_md": ("classifier/spp3", {}),
    "no_pad_stride2": ("padding/no_conv_padding", {}),
    "in224": ("base", {"input_size": 224}),
    "in224_4096": ("base", {"input_size": 224, "fc": 4096}),
    "in227_4096": ("base", {"input_size": 227, "fc": 4096}),
}


def on_meta(variant: str, **changes) -> CaffeNet128:
    with torch.device("meta"):
        return CaffeNet128(variant, **changes)


def pixels(model: CaffeNet128, count: int = 2) -> torch.Tensor:
    side = model.config.input_size
    return torch.randint(256, (count, model.config.in_channels, side, side), dtype=torch.uint8)


def small(variant: str = "base", **changes) -> CaffeNet128:
    """A narrow network of a variant, with LSUV's weights."""
    fc = (PUBLISHED[variant].config or {}).get("fc", 24) if variant != "base" else 24
    widths = SMALL | {"fc": 24 if isinstance(fc, int) else tuple(24 for _ in fc)}
    torch.manual_seed(0)
    model = CaffeNet128(variant, **(widths | changes))
    lsuv_init_(model, pixels(model, 8))
    return model.eval()


@pytest.mark.parametrize("name", KNOWN["variants"])
def test_shapes_multiply_adds_and_parameters_are_those_of_the_layer_tables(name):
    known = KNOWN["variants"][name]
    prefix = next((p for p in sorted(GROUPS, key=len, reverse=True) if name.startswith(p)), "")
    variant, changes = NAMED.get(name) or (GROUPS[prefix] + name[len(prefix) :], {})
    model = on_meta(variant, **changes)
    rows = [[row.layer, row.channels, row.size] for row in model.layers]
    assert rows == [[layer, channels, None if layer == "spp" else size] for layer, channels, size in known["spatial"]]
    assert model.fc6.in_features == known["fc6_in"]
    assert model.macs == known["macs"]
    assert sum(p.numel() for p in model.parameters()) == known["params"]
    assert sum(row.parameters for row in model.layers) == known["params"]


def test_base_costs_by_layer_are_the_study_s():
    layers = {row.layer: row for row in on_meta("base").layers}
    assert {name: layers[name].macs for name in KNOWN["base_macs_by_layer"]} == KNOWN["base_macs_by_layer"]
    assert {name: layers[name].parameters for name in KNOWN["base_params_by_layer"]} == KNOWN["base_params_by_layer"]


def test_every_published_accuracy_is_there():
    published = {f"{group}/{name}": row for group, rows in KNOWN["published"].items() for name, row in rows.items()}
    assert {name: (row.top1, row.log_loss) for name, row in PUBLISHED.items()} == {
        name: (row["accuracy"], row["logloss"]) for name, row in published.items()
    }


def test_variants_are_networks_and_the_others_say_why_not():
    networks = CaffeNet128.variants()
    assert {"activation/elu", "pooling/max_plus_avg", "batchnorm/after", "all_in/caffenet128_all"} < set(networks)
    for name, variant in PUBLISHED.items():
        if name not in networks:
            assert variant.note, name
            with pytest.raises(ValueError, match="variant"):
                CaffeNet128(name)


@pytest.mark.parametrize("name", CaffeNet128.variants())
def test_every_variant_runs_its_layers_in_the_sizes_that_it_lists(name):
    """Forward with hooks, then backward: each parameter learns."""
    model = small(name)
    seen = {}
    for layer, module in model.named_modules():
        layer = layer.replace("deeper.conv", "conv1x").removesuffix(".pool")
        module.register_forward_hook(lambda _, __, out, layer=layer: seen.update({layer: out.shape}))
    logits = model(pixels(model))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for row in model.layers:
        if row.size is not None:
            assert seen[row.layer][2:] == (row.size, row.size), row


@pytest.mark.parametrize(
    "variant", ["base", "activation/elu", "activation/tanh", "activation/vlrelu", "activation/felu"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_before_the_activation_is_pooling_after_it(variant, layout):
    """Bit for bit, where the activation itself rounds alike in vectors and in what is left of them."""
    model = small(variant).to(memory_format=layout)
    names = [name for name, _ in model.named_children()]
    assert names.index("pool1") < names.index("act1")
    images = pixels(model)
    logits = model(images)
    x = images
    published = [f"{kind}{i}" for i in range(1, 6) for kind in ("conv", "act", "pool") if f"{kind}{i}" in names]
    for name in ["color", *published, *(n for n in names if n not in published and n != "color")]:
        module = getattr(model, name)
        x = copy.deepcopy(module)(x)
    exact = variant in ("base", "activation/vlrelu")
    torch.testing.assert_close(x, logits, **({"rtol": 0, "atol": 0} if exact else {}))


def test_gradients_of_the_pool_before_the_activation_are_those_after_it():
    torch.manual_seed(0)
    values = torch.randn(2, 8, 31, 31, dtype=torch.float64)
    for activation in (F.relu, F.elu, torch.tanh, functools.partial(F.leaky_relu, negative_slope=0.3)):
        first, second = (values.clone().requires_grad_() for _ in range(2))
        activation(F.max_pool2d(first, 3, 2)).square().sum().backward()
        F.max_pool2d(activation(second), 3, 2).square().sum().backward()
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-14, atol=1e-14)


def test_an_activation_that_can_fall_stays_before_its_pool():
    for changes in ({"activation": "vlrelu", "activation_options": {"slope": -0.1}}, {"activation": "prelu"}):
        names = [name for name, _ in on_meta("base", **changes).named_children()]
        assert names.index("act1") < names.index("pool1")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maxout_of_a_grouped_convolution_is_two_grouped_convolutions(layout):
    model = small("activation/maxout_same_width").to(memory_format=layout)
    x = torch.randn(3, 8, 9, 9).contiguous(memory_format=layout)
    conv, act = model.conv2, model.act2
    weight, bias = conv.weight.unflatten(0, (2, 2, -1)), conv.bias.unflatten(0, (2, 2, -1))
    pieces = [
        F.conv2d(x, weight[:, piece].flatten(0, 1), bias[:, piece].flatten(), padding=2, groups=2) for piece in (0, 1)
    ]
    torch.testing.assert_close(act(conv(x)), torch.maximum(*pieces))


def test_averaging_before_the_last_layer_is_averaging_the_scores():
    model = small("classifier/elu_pad_fc6_fc7_clf_avg")
    seen = {}
    model.average.register_forward_hook(lambda module, given, out: seen.update(features=given[0]))
    logits = model(pixels(model))
    scores = F.conv2d(seen["features"], model.fc8.weight[:, :, None, None], model.fc8.bias)
    torch.testing.assert_close(logits, scores.mean((2, 3)))


def test_spatial_pyramids_have_caffe_s_windows():
    known = KNOWN["spp_7x7"]
    image = torch.arange(49.0).view(1, 1, 7, 7)
    pooled = SpatialPyramidPool2d(known["levels"])(image)
    assert pooled[0].tolist() == known["max_of_arange49"]
    both = SpatialPyramidPool2d(known["levels"], average=True)(torch.ones(1, 1, 7, 7))
    assert (both - 1)[0].tolist() == known["avg_of_ones"]
    for level, windows in known["windows"].items():
        assert SpatialPyramidPool2d.windows(int(level), 7) == (windows["kernel"], windows["stride"], windows["pad"])


def test_colour_spaces_are_opencv_s():
    """Blue, green, red, gray and a mixture; hue is half of the angle."""
    bgr = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90], [60, 20, 100]], dtype=torch.uint8)
    image = bgr.T[None, :, None, :]
    hsv = FixedColorSpace("hsv")(image)[0, :, 0].T
    expected = [[120, 255, 255], [60, 255, 255], [0, 255, 255], [0, 0, 90], [165, 204, 100]]
    torch.testing.assert_close(hsv, torch.tensor(expected, dtype=torch.float32))
    gray = 0.114 * 60 + 0.587 * 20 + 0.299 * 100
    ycrcb = FixedColorSpace("ycrcb")(image)[0, :, 0, 4]
    expected = [gray, (100 - gray) * 0.713 + 128, (60 - gray) * 0.564 + 128]
    torch.testing.assert_close(ycrcb, torch.tensor(expected))
    torch.testing.assert_close(FixedColorSpace("gray")(image)[0, 0, 0, 4], torch.tensor(gray))


@pytest.mark.parametrize("color", ["rgb", "F", "D", "hsv_bn", "gray"])
def test_bytes_and_floats_of_the_same_pixels_give_the_same_logits(color):
    model = small(color=color)
    images = pixels(model)
    torch.testing.assert_close(model(images.float()), model(images), rtol=1e-4, atol=1e-4)


def test_base_centres_pixels_as_published():
    model = small()
    images = pixels(model).float()
    centred = CaffeNet128(**SMALL, mean=(0, 0, 0), scale=1.0).eval()
    centred.load_state_dict(model.state_dict())
    expected = centred((images - torch.tensor([104.0, 117.0, 124.0])[:, None, None]) * 0.04)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_modes_have_the_constants_of_slides_and_of_trained_networks():
    assert on_meta("activation/vlrelu").act1.negative_slope == pytest.approx(1 / 3)
    assert on_meta("activation/vlrelu", mode="reference").act1.negative_slope == 0.3
    assert on_meta("activation/apl2").act3.slope.shape == (2, 384)
    assert on_meta("activation/apl2", mode="reference").act3.slope.shape == (2, 384, 7, 7)
    assert on_meta("activation/apl2", mode="reference").act6.slope.shape == (2, 2048)


def test_first_weights_are_the_published_ones():
    torch.manual_seed(0)
    model = CaffeNet128()
    for name, deviation in (("conv1", 0.01), ("conv5", 0.01), ("fc6", 0.005), ("fc7", 0.005), ("fc8", 0.01)):
        layer = getattr(model, name)
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.02)
        assert not layer.bias.any()


def test_biases_learn_twice_as_fast_and_do_not_decay_but_those_of_norms():
    model = CaffeNet128("batchnorm/after_affine", **SMALL)
    groups = {(g["lr"], g["weight_decay"]): g["params"] for g in parameter_groups(model)}
    assert {key: len(found) for key, found in groups.items()} == {(0.01, 5e-4): 15, (0.02, 0.0): 8, (0.01, 0.0): 7}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    with pytest.raises(TypeError, match="`model` got int"):
        parameter_groups(3)


def test_layers_before_an_affine_norm_have_no_bias():
    model = on_meta("batchnorm/before_affine")
    assert model.conv3.bias is None
    assert model.fc7.bias is None
    assert on_meta("batchnorm/before").conv3.bias is not None
    assert on_meta("batchnorm/after_affine").conv3.bias is not None


@pytest.mark.parametrize("variant", ["base", "all_in/caffenet128_all", "activation/maxout_same_width"])
def test_the_step_compiles_whole_and_gives_the_same_losses(variant):
    model = small(variant)
    images = pixels(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_state_dict_and_copies_keep_the_answer(tmp_path):
    model = small("colour/F_10_3_maxout")
    images = pixels(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = CaffeNet128(model.config)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other.eval()(images), model(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_dtypes_follow_the_model():
    model = small("all_in/caffenet128_all").bfloat16()
    images = pixels(model)
    assert model(images).dtype == torch.bfloat16
    assert small(color="hsv_bn").double()(images).dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "relu7"}, ValueError, "`activation` got 'relu7'"),
        ({"color": "lab"}, ValueError, "`color` got 'lab'"),
        ({"pooling": "gated"}, ValueError, "`pooling` got 'gated'"),
        ({"batch_norm": "both"}, ValueError, "`batch_norm`"),
        ({"mode": "slides"}, ValueError, "`mode`"),
        ({"fc_activation": "max"}, ValueError, "`fc_activation`"),
        ({"channels": (96, 256, 384)}, ValueError, "`channels`"),
        ({"channels": (96, 256, 384, 384, 25.6)}, TypeError, "`channels` got float"),
        ({"fc": 0}, ValueError, "`fc` got 0"),
        ({"fc": (1, 2, 3, 4)}, ValueError, "`fc`"),
        ({"fc_kernels": (3,)}, ValueError, "`fc_kernels`"),
        ({"average": "fc6"}, ValueError, "`average`"),
        ({"spp": 4}, ValueError, "`spp` got 4"),
        ({"spp": 3, "pooling": "strided"}, ValueError, "`spp`"),
        ({"dropout": 1.0}, ValueError, "`dropout`"),
        ({"dropout": (0.5,)}, ValueError, "`dropout`"),
        ({"conv_dropout": (0.5,)}, ValueError, "`conv_dropout`"),
        ({"in_channels": 1, "color": "F"}, ValueError, "`color`"),
        ({"mean": (1.0,)}, ValueError, "`mean` got 1 numbers"),
        ({"input_size": 20}, ValueError, "`input_size` got 20, expected images that leave pixels"),
        ({"input_size": True}, TypeError, "`input_size` got bool"),
        ({"colour": "F"}, TypeError, "`colour`"),
    ],
)
def test_bad_choices_are_named(changes, error, message):
    with pytest.raises(error, match=f"CaffeNet128: {message}".replace("(", r"\(")):
        CaffeNet128(**changes)


def test_unknown_variants_name_near_ones():
    with pytest.raises(ValueError, match=r"'pooling/max_plus_average'.*pooling/max_plus_avg"):
        CaffeNet128("pooling/max_plus_average")
    with pytest.raises(ValueError, match="a pool under a patent"):
        CaffeNet128("pooling/gated_max_avg")
    with pytest.raises(TypeError, match="`variant` got int"):
        CaffeNet128(3)


@pytest.mark.parametrize("shape", [(2, 3, 127, 127), (2, 1, 128, 128), (3, 128, 128), (2, 3, 128, 129)])
def test_images_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match="`images` got shape"):
        small()(torch.zeros(shape))


def test_images_of_the_study_are_cropped_bytes_of_blue_green_and_red():
    require("torchvision")
    from PIL import Image

    image = Image.new("RGB", (200, 150), (10, 20, 30))
    for train in (True, False):
        pixels_ = image_transform(train)(image)
        assert pixels_.dtype == torch.uint8
        assert pixels_.shape == (3, 128, 128)
        assert pixels_[:, 5, 7].tolist() == [30, 20, 10]


def test_a_config_and_changes_make_a_variant():
    config = CaffeNetConfig(**SMALL, activation="elu")
    assert CaffeNet128(config, pooling="max_avg").config.pooling == "max_avg"
    assert CaffeNet128(config).config.activation == "elu"
    assert isinstance(CaffeNet128(config).pool1, nn.MaxPool2d)
