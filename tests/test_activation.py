"""What is special to the activations: published values, ties and kinks, random slopes, names, norms beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perfvl
from perfvl import backends
from perfvl.nn import (
    APL,
    FELU,
    Asinh,
    ELULeaky,
    FReLU,
    Maxout,
    NormAct2d,
    RReLU,
    ScaledTanh,
    ShiftedSoftplus,
    VLReLU,
    activation,
)
from perfvl.nn.activation_names import ACTIVATION_NAMES
from perfvl.ops.activation import apl, maxout
from perfvl.reference import activation as reference

KNOWN = json.loads((Path(__file__).parent / "data" / "activation_vectors.json").read_text())
X = torch.tensor(KNOWN["x"], dtype=torch.float64)
ISA_LEVELS = ["reference"] if backends.CPU_MISSING else ["reference", *torch.ops.perfvl._isa_levels()]


@pytest.fixture(params=ISA_LEVELS)
def _backend(request):
    """Everything by the definition, and by the kernels of every instruction-set level."""
    if request.param == "reference":
        with perfvl.use_backend("reference"):
            yield
        return
    before = torch.ops.perfvl._isa()
    torch.ops.perfvl._set_isa(request.param)
    yield
    torch.ops.perfvl._set_isa(before)


every_backend = pytest.mark.usefixtures("_backend")


def by_channel(module: nn.Module) -> Tensor:
    """Of the known inputs, in one channel."""
    return module.double().eval()(X[:, None])[:, 0]


PUBLISHED = {
    "relu": activation("relu"),
    "vlrelu_slope03": VLReLU(0.3),
    "vlrelu_slope05_colour": VLReLU(0.5),
    "tanh": activation("tanh"),
    "scaled_tanh_1759": activation("scaled_tanh", mode="reference"),
    "elu": activation("elu"),
    "elu_alpha05": activation("elu", alpha=0.5),
    "elu_lrelu_mean": ELULeaky(),
    "shifted_softplus": ShiftedSoftplus(),
    "selu": activation("selu"),
    "asinh": Asinh(),
    "frelu_init": FReLU(1),
    "felu_init": FELU(1),
    "prelu_init03": activation("prelu", 1),
    "rrelu_eval_divide_10_30": activation("rrelu", mode="reference"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    expected = torch.tensor(KNOWN[name], dtype=torch.float64)
    # Constants such as 0.3 are float32 in modules that learn; the SELU's are known to 7 digits.
    torch.testing.assert_close(by_channel(PUBLISHED[name]), expected, rtol=1e-7, atol=1e-8)


def test_every_published_vector_is_compared():
    assert {*PUBLISHED, "x", "apl2_a025_m04_b05_m025"} == set(KNOWN)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_published_values_of_a_unit_with_two_segments(dtype):
    slope, hinge = torch.tensor([[0.25], [-0.4]]), torch.tensor([[0.5], [-0.25]])
    found = apl(X[:, None].to(dtype), slope, hinge)
    rtol = 4e-3 if dtype == torch.bfloat16 else 1e-6
    expected = torch.tensor(KNOWN["apl2_a025_m04_b05_m025"])
    torch.testing.assert_close(found[:, 0].float(), expected, rtol=rtol, atol=1e-7)


# Maxout ---------------------------------------------------------------------------------------------------------------


@every_backend
def test_of_equal_pieces_the_last_alone_gets_the_gradient():
    x = torch.zeros(2, 6, 3, 3, requires_grad=True)
    maxout(x, 3).sum().backward()
    assert x.grad is not None
    assert x.grad.unflatten(1, (3, 2)).sum((0, 2, 3, 4)).tolist() == [0.0, 0.0, 36.0]


@every_backend
def test_nan_reaches_its_output_alone():
    x = torch.randn(2, 8, 5, 5)
    x[1, 6, 2, 3] = torch.nan
    assert maxout(x).isnan().nonzero().tolist() == [[1, 2, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(3, 10, 7, 5), (2, 82, 41, 53)], ids=str)  # few elements, and enough for the kernel
def test_without_gradients_the_larger_of_two_pieces_is_that_of_pytorch(shape, memory, dtype):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory)
    x[1, 3, 2, 1] = x[0, 9, 1, 1] = torch.nan
    found, expected = maxout(x), torch.maximum(*x.chunk(2, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.is_contiguous(memory_format=memory)
    if backends.choose(x, cuda="triton") != "reference":
        with torch.profiler.profile() as profile:
            maxout(x)
        ran = {event.key for event in profile.key_averages()}
        assert ("perfvl::maxout" in ran) == (dtype != torch.float32 and x.numel() > 2**17)


def test_one_layer_of_double_width_is_two_layers_and_a_maximum():
    first, second, both = (nn.Conv2d(3, out, 3) for out in (5, 5, 10))
    with torch.no_grad():
        both.weight.copy_(torch.cat([first.weight, second.weight]))
        both.bias.copy_(torch.cat([first.bias, second.bias]))  # type: ignore[union-attr, list-item, arg-type]
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(nn.Sequential(both, Maxout())(x), torch.maximum(first(x), second(x)))


def test_maxout_does_not_keep_its_input():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        maxout(x)
    if not backends.CPU_MISSING:
        assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, x.numel() // 2)]


# APL ------------------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shared_parameters_are_those_of_positions_repeated(layout):
    x = torch.randn(3, 5, 6, 7).contiguous(memory_format=layout)
    slope, hinge = torch.rand(2, 5) - 0.5, torch.randn(2, 5)
    everywhere = [t[:, :, None, None].expand(-1, -1, 6, 7) for t in (slope, hinge)]
    torch.testing.assert_close(apl(x, slope, hinge), apl(x, *everywhere), rtol=1e-6, atol=1e-6)


@every_backend
def test_what_lies_at_a_kink_passes_no_gradient():
    x = torch.tensor([[0.0, 0.5]], requires_grad=True)
    slope, hinge = torch.ones(1, 2, requires_grad=True), torch.tensor([[0.0, 0.5]], requires_grad=True)
    grads = torch.autograd.grad(apl(x, slope, hinge).sum(), (x, slope, hinge))
    assert [g.flatten().tolist() for g in grads] == [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


def test_parameters_start_as_published():
    torch.manual_seed(0)
    unit = APL(40_000, segments=2)
    assert unit.slope.min() >= -0.5
    assert unit.slope.max() <= 0.5
    assert abs(unit.slope.std() - 1 / 12**0.5) < 0.01
    assert abs(unit.hinge.mean()) < 0.01
    assert abs(unit.hinge.std() - 0.5) < 0.01


def test_parameters_of_positions_have_the_sizes_of_a_sample():
    unit = APL((4, 5, 6), segments=5, shared="position")
    assert unit.slope.shape == unit.hinge.shape == (5, 4, 5, 6)
    assert unit(torch.randn(2, 4, 5, 6)).shape == (2, 4, 5, 6)
    assert APL(7, shared="position")(torch.randn(3, 7)).shape == (3, 7)
    with pytest.raises(ValueError, match=r"apl: `slope` got shape \(5, 4, 5, 6\), expected"):
        unit(torch.randn(2, 4, 6, 5))


def test_parameters_may_have_another_dtype_than_activations():
    unit = APL(4)
    x = torch.randn(2, 4, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    y = unit(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert unit.slope.grad is not None
    assert (x.grad.dtype, unit.slope.grad.dtype) == (torch.bfloat16, torch.float32)


# RReLU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("convention", "lower", "upper"), [("divide", 10.0, 30.0), ("slope", 0.1, 0.5)])
def test_slopes_are_drawn_for_every_negative_element(convention, lower, upper):
    torch.manual_seed(0)
    x = torch.randn(100_000, requires_grad=True)
    y = RReLU(lower, upper, convention)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    negative = x < 0
    assert torch.equal(y[~negative], x[~negative])
    assert (grad[~negative] == 1).all()
    torch.testing.assert_close(y / x, grad)
    drawn = 1 / grad[negative] if convention == "divide" else grad[negative]
    assert drawn.min() >= lower * (1 - 1e-6)
    assert drawn.max() <= upper * (1 + 1e-6)
    torch.testing.assert_close(drawn.mean(), torch.tensor((lower + upper) / 2), rtol=1e-2, atol=0)
    torch.testing.assert_close(drawn.std(), torch.tensor((upper - lower) / 12**0.5), rtol=2e-2, atol=0)


def test_a_seed_repeats_the_slopes():
    layer, x = RReLU(10, 30), -torch.ones(50)
    torch.manual_seed(3)
    first, other = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(other, first)


def test_the_mean_slope_of_evaluation_is_that_of_torch():
    x = torch.randn(50)
    assert torch.equal(RReLU(0.1, 0.5, "slope").eval()(x), nn.RReLU(0.1, 0.5).eval()(x))
    torch.testing.assert_close(RReLU(10, 30).eval()(x), torch.where(x < 0, x * 2 / (10 + 30), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_slopes_are_kept_in_the_input_s_dtype(dtype):
    x = torch.randn(64, 64).to(dtype).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = RReLU(10, 30)(x)
    assert y.dtype == dtype
    assert [(t.dtype, t.numel()) for t in saved] == [(dtype, x.numel())]


# The others -----------------------------------------------------------------------------------------------------------


def test_asinh_and_softplus_keep_their_digits_far_from_zero():
    far = torch.tensor([-1e6, -1e3, 1e3, 1e6])
    torch.testing.assert_close(Asinh()(far), torch.asinh(far.double()).float(), rtol=1e-6, atol=0)
    near = torch.linspace(15, 45, 61, dtype=torch.float64)
    expected = near + torch.log1p(torch.exp(-near)) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(ShiftedSoftplus()(near), expected, rtol=1e-15, atol=0)
    assert ShiftedSoftplus()(torch.zeros(1)).abs() < 1e-7


@pytest.mark.parametrize("layer", [FReLU(6), FELU(6)], ids=["FReLU", "FELU"])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 4), (5, 6, 3, 2)], ids=str)
def test_the_bias_of_a_channel_gets_the_sum_of_its_gradients(layer, shape):
    grad = torch.randn(shape)
    (found,) = torch.autograd.grad(layer(torch.randn(shape)), layer.bias, grad)
    torch.testing.assert_close(found, grad.transpose(0, 1).flatten(1).sum(1))


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_every_name_builds_a_layer_that_learns(name, mode):
    torch.manual_seed(0)
    sizes = (4, 3, 3) if mode == "reference" and name.startswith("apl") else 4
    layer = activation(name, sizes, mode=mode)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 2 if name == "maxout" else 4, 3, 3)
    y.square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *layer.parameters()))


def test_the_constants_of_the_slides_and_of_the_trained_networks():
    paper, trained = (
        {name: activation(name, mode=mode) for name in ("vlrelu", "rrelu", "scaled_tanh")}
        for mode in ("paper", "reference")
    )
    assert [str(layer) for layer in paper.values()] == [
        "VLReLU(negative_slope=0.3333333333333333)",
        "RReLU(lower=0.1, upper=0.5, convention='slope')",
        "ScaledTanh(a=1.73, b=0.6666666666666666)",
    ]
    assert [str(layer) for layer in trained.values()] == [
        "VLReLU(negative_slope=0.3)",
        "RReLU(lower=10.0, upper=30.0, convention='divide')",
        "ScaledTanh(a=1.759, b=0.6666667)",
    ]
    assert str(activation("apl5", 8)) == "APL(8, segments=5, shared='channel')"
    assert str(activation("apl2", (8, 3, 3), mode="reference")) == "APL((8, 3, 3), segments=2, shared='position')"
    assert activation("rrelu", mode="reference", upper=20.0).upper == 20.0  # an option goes before a default


BAD = [
    (lambda: activation("gelu"), ValueError, "activation: `name` got 'gelu', expected one of relu, tanh"),
    (lambda: activation("relu", mode="slides"), ValueError, "activation: `mode` got 'slides', expected \"paper\""),
    (lambda: activation("prelu"), ValueError, "activation: `num_parameters` got None, expected the channels"),
    (lambda: activation("vlrelu", alpha=0.1), TypeError, "alpha"),
    (lambda: Maxout(0), ValueError, "Maxout: `pieces` got 0, expected at least 1"),
    (lambda: Maxout(2.0), TypeError, "Maxout: `pieces` got float, expected an int"),
    (lambda: APL(4, 0), ValueError, "APL: `segments` got 0, expected at least 1"),
    (lambda: APL(0), ValueError, "APL: `num_parameters` got 0, expected at least 1"),
    (lambda: APL(4.0), TypeError, "APL: `num_parameters` got float, expected an int or a sequence of them"),
    (lambda: APL((4, 2, 2)), ValueError, r"APL: `num_parameters` got \(4, 2, 2\), expected the channels"),
    (lambda: APL(4, shared="layer"), ValueError, 'APL: `shared` got \'layer\', expected "channel" or "position"'),
    (lambda: RReLU(1, 2, "times"), ValueError, 'RReLU: `convention` got \'times\', expected "divide" or "slope"'),
    (lambda: RReLU(0, 2), ValueError, "RReLU: `lower` got 0, expected above 0"),
    (lambda: RReLU(3, 2), ValueError, "RReLU: `upper` got 2, expected at least `lower`, 3"),
    (lambda: RReLU("1", 2), TypeError, "RReLU: `lower` got str, expected a float"),
    (lambda: VLReLU(float("nan")), ValueError, "VLReLU: `slope` got nan, expected a finite number"),
    (lambda: ScaledTanh(b=None), TypeError, "ScaledTanh: `b` got NoneType, expected a float"),
    (lambda: FReLU(0), ValueError, "FReLU: `num_parameters` got 0, expected at least 1"),
    (lambda: FELU(True), TypeError, "FELU: `num_parameters` got bool, expected an int"),
    (lambda: NormAct2d(4, "relu", order="both"), ValueError, "NormAct2d: `order` got 'both', expected \"before\""),
    (lambda: NormAct2d(4, "gelu"), ValueError, "activation: `name` got 'gelu'"),
    (lambda: NormAct2d(4, F.relu), TypeError, "NormAct2d: `activation` got function, expected a name or an nn.Module"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


# Beside a norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["relu", "elu", "vlrelu", "selu", "prelu", "tanh", "apl2"])
def test_a_norm_and_an_activation_are_torch_s_own(name, order, training, affine):
    torch.manual_seed(1)
    fused = NormAct2d(4, name, order=order, affine=affine).train(training)
    norm, act = nn.BatchNorm2d(4, affine=affine).train(training), activation(name, 4)
    for _ in range(2):
        x = torch.randn(6, 4, 5, 5) + 1
        act.load_state_dict(fused.activation.state_dict())
        results = []
        for module in (fused, lambda t: act(norm(t)) if order == "before" else norm(act(t))):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append((y, torch.autograd.grad(y.square().sum() + y.sum(), leaf)[0]))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(norm.state_dict().values(), fused.state_dict().values(), strict=False):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_state_is_that_of_the_norm(order):
    norm = nn.BatchNorm2d(4)
    norm(torch.randn(3, 4, 2, 2))
    fused = NormAct2d(4, "relu", order=order)
    assert list(fused.state_dict()) == list(norm.state_dict())
    fused.load_state_dict(norm.state_dict())
    x = torch.randn(3, 4, 2, 2)
    expected = F.relu(norm.eval()(x)) if order == "before" else norm.eval()(F.relu(x))
    assert torch.equal(fused.eval()(x), expected)


def test_a_module_that_was_given_is_left_as_it_is():
    relu = nn.ReLU()
    assert NormAct2d(4, relu).activation is relu
    assert not relu.inplace
    assert NormAct2d(4, "relu").activation.inplace
    assert not NormAct2d(4, "relu", order="after").activation.inplace  # the input is somebody else's


def test_maxout_halves_the_channels_behind_a_norm_and_before_one():
    x = torch.randn(3, 8, 5, 5)
    assert NormAct2d(8, "maxout")(x).shape == NormAct2d(4, "maxout", order="after")(x).shape == (3, 4, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_definition_of_a_unit_is_rounded_once(dtype):
    x, slope, hinge = torch.randn(40, 6).to(dtype), torch.rand(3, 6), torch.randn(3, 6)
    assert torch.equal(reference.apl(x, slope, hinge), reference.apl(x.float(), slope, hinge).to(dtype))
