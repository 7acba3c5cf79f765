"""What is special to separable_conv2d: geometry, batch norm around it, memory, odd numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contracts.separable_conv import ACTIVATIONS, two_convolutions
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_contract import as_double, assert_accurate, error, evaluate
from torch import Tensor

import perfvl.functional as pf
from perfvl import backends
from perfvl.ops import separable_conv
from perfvl.ops.separable_conv import Affine, check_layer, run_with_statistics

HAS_KERNELS = not backends.CPU_MISSING
ISA_LEVELS = list(torch.ops.perfvl._isa_levels()) if HAS_KERNELS else ["reference"]
NAMES = st.sampled_from(list(ACTIVATIONS))


@pytest.fixture(params=ISA_LEVELS)
def isa_level(request):
    if not HAS_KERNELS:
        yield
        return
    before = torch.ops.perfvl._isa()
    torch.ops.perfvl._set_isa(request.param)
    yield
    torch.ops.perfvl._set_isa(before)


@pytest.fixture
def only_kernels(monkeypatch):
    """Plain PyTorch, were it asked instead, would be an error."""
    if HAS_KERNELS:
        monkeypatch.setattr(separable_conv, "_AMX", False)
        monkeypatch.setattr(separable_conv, "_reference", None)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def image(*shape: int, channels_last: bool = True) -> Tensor:
    x = torch.randn(shape)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def problem(channels: int = 20, outputs: int = 12, size: tuple[int, int] = (11, 9), batch: int = 2) -> dict[str, Any]:
    """Arguments of `normalized`."""
    found = {
        "input": image(batch, channels, *size),
        "scale": torch.rand(channels) + 0.5,
        "shift": torch.rand(channels) + 0.2,  # above 0: zeros around the image are not what batch norm makes of zeros
        "depthwise_weight": torch.randn(channels, 1, 3, 3) / 3,
        "pointwise_weight": torch.randn(outputs, channels, 1, 1) / channels**0.5,
        "bias": torch.randn(outputs),
    }
    return {name: t.requires_grad_() for name, t in found.items()}


def normalized(input, scale, shift, depthwise_weight, pointwise_weight, bias=None, stride=1, padding=1, pre="relu"):
    """Batch norm of the layer before, convolution, statistics for the batch norm behind it."""
    layer = check_layer("here", input, depthwise_weight, pointwise_weight, bias, stride, padding, 1, pre, "none")
    return run_with_statistics(layer, input, Affine(scale, shift), depthwise_weight, pointwise_weight, bias)


def composed(input, scale, shift, depthwise_weight, pointwise_weight, bias=None, stride=1, padding=1, pre="relu"):
    """The same by hand."""
    x = input if scale is None else input * scale[:, None, None]
    x = ACTIVATIONS[pre](x if shift is None else x + shift[:, None, None])
    y = two_convolutions(x, depthwise_weight, pointwise_weight, bias, stride=stride, padding=padding)
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return y, mean, variance


def assert_like_float64(ours: Any, truth: Any, inputs: dict[str, Any], slack: float = 4e-6) -> None:
    """Outputs and gradients, each no worse than those of the plain composition in the same dtype."""
    expected, rival = evaluate(truth, as_double(inputs)), evaluate(truth, inputs)
    for what, value in evaluate(ours, inputs).items():
        assert_accurate(what, value, expected[what], rival[what], slack)


@st.composite
def geometries(draw) -> dict[str, Any]:
    side = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(0, 4))
    height, width = draw(st.tuples(side, side))
    size = draw(st.tuples(st.integers(1, 13), st.integers(1, 20)))
    for (kernel, _, dilation, before, after), n in zip((height, width), size, strict=True):
        assume(n + before + after > dilation * (kernel - 1))
    return {
        "size": size,
        "kernel": (height[0], width[0]),
        "stride": (height[1], width[1]),
        "dilation": (height[2], width[2]),
        "padding": (*height[3:], *width[3:]),
    }


@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    geometries(),
    st.tuples(st.integers(1, 3), st.integers(1, 34), st.sampled_from([1, 1, 1, 2, 3]), st.integers(1, 40)),
    st.booleans(),
    NAMES,
    NAMES,
)
def test_any_geometry_gives_the_answer(geometry, sizes, channels_last, pre_activation, activation):
    batch, channels, multiplier, outputs = sizes
    inner = channels * multiplier
    torch.manual_seed(sum(sizes))
    inputs = {
        "input": image(batch, channels, *geometry["size"], channels_last=channels_last),
        "depthwise_weight": torch.randn(inner, 1, *geometry["kernel"]),
        "pointwise_weight": torch.randn(outputs, inner, 1, 1),
        "bias": torch.randn(outputs),
    }
    inputs = {name: t.requires_grad_() for name, t in inputs.items()}
    options = {name: geometry[name] for name in ("stride", "dilation", "padding")}
    options |= {"pre_activation": pre_activation, "activation": activation}
    truth = evaluate(pf.separable_conv2d, as_double(inputs) | options)
    for what, value in evaluate(pf.separable_conv2d, inputs | options).items():
        assert max(error(value, truth[what])) < 1e-5, what
    frozen = {name: t.detach() for name, t in inputs.items()}
    assert max(error(pf.separable_conv2d(**frozen, **options), truth["output 0"])) < 1e-5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck_of_every_activation(name):
    tensors = torch.randn(2, 2, 4, 3), torch.randn(4, 1, 3, 2), torch.randn(3, 4, 1, 1), torch.randn(3)
    tensors = [t.double().requires_grad_() for t in tensors]
    options = {"stride": (1, 2), "padding": (1, 2, 0, 1), "dilation": (2, 1)}

    def run(*tensors: Tensor) -> Tensor:
        return pf.separable_conv2d(*tensors, **options, pre_activation=name, activation=name)

    assert torch.autograd.gradcheck(run, tensors)


def test_gradcheck_of_batch_norm_and_statistics():
    tensors = as_double(problem(2, 3, (4, 3)))
    assert torch.autograd.gradcheck(lambda *t: normalized(*t, pre="silu"), list(tensors.values()))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 3), (1, (0, 2, 2, 0))])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_padding_comes_after_batch_norm_and_activation(name, stride, padding, channels_last):
    inputs = problem() | {"stride": stride, "padding": padding, "pre": name}
    inputs["input"] = image(2, 20, 11, 9, channels_last=channels_last).requires_grad_()
    assert_like_float64(normalized, composed, inputs)


def test_batch_norm_output_and_gradients_on_every_isa_level(isa_level):
    assert_like_float64(normalized, composed, problem(37, 50, (13, 10)))


@pytest.mark.parametrize("given", [{"scale": None}, {"shift": None}, {"scale": None, "shift": None}, {"bias": None}])
def test_what_is_absent_is_one_or_zero(given):
    assert_like_float64(normalized, composed, problem() | given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_batch_norm(dtype):
    inputs = problem(40, 24) | {"pre": "silu"}
    half = {k: v.detach().to(dtype).requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
    half |= {name: inputs[name] for name in ("scale", "shift")}

    def rival(**given: Any) -> Any:  # batch norm rounds to the dtype of its input
        x = given["input"]
        given |= {name: given[name].to(x.dtype) for name in ("scale", "shift")}
        return composed(**given, pre="silu")

    truth, theirs = evaluate(rival, as_double(half)), evaluate(rival, half)
    for what, value in evaluate(lambda **given: normalized(**given, pre="silu"), half).items():
        assert_accurate(what, value, truth[what], theirs[what], 4e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("offset", "pixels"), [(0.0, 600), (100.0, 600), (1e4, 600), (1e4, 2), (-1e4, 20_000)])
def test_statistics_are_those_of_the_stored_output_however_far_from_zero(isa_level, dtype, offset, pixels):
    inputs = problem(16, 20, (1, pixels), 1) | {"bias": torch.full((20,), offset)}
    inputs = {k: v.detach().to(dtype) if k not in ("scale", "shift") else v.detach() for k, v in inputs.items()}
    y, mean, variance = normalized(**inputs)
    expected_variance, expected_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [48, 44, 45])
def test_an_output_larger_than_the_caches_is_that_of_nchw(isa_level, only_kernels, dtype, outputs):
    """In channels_last it goes past them, where its vectors lie well; in NCHW it never does."""
    shapes = ((2, 8, 160, 160), (8, 1, 3, 3), (outputs, 8, 1, 1))
    x, depthwise, pointwise = ((torch.randn(shape) / 3).to(dtype) for shape in shapes)
    written = pf.separable_conv2d(x.to(memory_format=torch.channels_last), depthwise, pointwise, padding=1)
    assert written.nbytes > 4 << 20
    assert written.is_contiguous(memory_format=torch.channels_last)
    if HAS_KERNELS:
        assert torch.equal(written, pf.separable_conv2d(x, depthwise, pointwise, padding=1))
    truth = F.conv2d(F.conv2d(x.double(), depthwise.double(), padding=1, groups=8), pointwise.double())
    torch.testing.assert_close(written.double(), truth, rtol=2e-2, atol={torch.float32: 1e-5}.get(dtype, 5e-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_too_many_for_each_worker_to_pack_them_alone(isa_level, only_kernels, dtype):
    shapes = ((3, 400, 6, 5), (400, 1, 3, 3), (401, 400, 1, 1))
    x, depthwise, pointwise = (
        (torch.randn(shape) / scale).to(dtype) for shape, scale in zip(shapes, (1, 3, 20), strict=True)
    )
    assert pointwise.nbytes > 256 << 10
    found = pf.separable_conv2d(x.to(memory_format=torch.channels_last), depthwise, pointwise, padding=1)
    truth = F.conv2d(F.conv2d(x.double(), depthwise.double(), padding=1, groups=400), pointwise.double())
    torch.testing.assert_close(found.double(), truth, rtol=2e-2, atol={torch.float32: 1e-5}.get(dtype, 5e-2))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1, 2)])
def test_gradients_through_any_of_output_mean_and_variance(used):
    def only(function):
        return lambda **inputs: tuple(function(**inputs)[i] for i in used)

    assert_like_float64(only(normalized), only(composed), problem(), slack=1e-5)


def test_any_subset_of_tensors_may_learn():
    inputs = problem(6, 5, (5, 4))
    full = evaluate(normalized, inputs)
    for count in range(1, len(inputs)):
        for chosen in itertools.combinations(inputs, count):
            some = {name: t.detach().requires_grad_(name in chosen) for name, t in inputs.items()}
            found = evaluate(normalized, some)
            assert {what for what in found if what.startswith("gradient")} == {f"gradient of {n}" for n in chosen}
            for what, value in found.items():
                torch.testing.assert_close(value, full[what], rtol=1e-5, atol=1e-5)


def test_second_derivative_through_statistics_is_refused():
    if not HAS_KERNELS:
        pytest.skip("the reference has second derivatives")
    inputs = problem()
    y, _, variance = normalized(**inputs)
    (grad,) = torch.autograd.grad((y.square().mean() + variance.sum()), inputs["input"], create_graph=True)
    with pytest.raises(RuntimeError, match="separable_conv2d: second-order gradients are not supported"):
        grad.sum().backward()


def saved_tensors(run: Any) -> dict[int, int]:
    """Bytes by storage of what `run` saves for backward."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep_alive = run()  # else storages are freed and their addresses used again
    del keep_alive
    return found


@pytest.mark.skipif(not HAS_KERNELS, reason="plain PyTorch saves what it saves")
@pytest.mark.parametrize("multiplier", [1, 3])
def test_only_the_input_and_weights_are_saved(multiplier):
    x, inner = image(2, 16, 19, 17).requires_grad_(), 16 * multiplier
    weights = torch.randn(inner, 1, 3, 3).requires_grad_(), torch.randn(64, inner, 1, 1).requires_grad_()
    saved = saved_tensors(lambda: pf.separable_conv2d(x, *weights, padding=1, pre_activation="relu"))
    assert set(saved) == {t.untyped_storage().data_ptr() for t in (x, *weights)}


def test_two_runs_give_the_same_bits(threads):
    inputs = problem(64, 48, (37, 19), 3)
    for count in (1, 2, 3):
        threads(count)
        first, second = evaluate(normalized, inputs), evaluate(normalized, inputs)
        assert all(torch.equal(value, second[what]) for what, value in first.items()), count


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads_gives_the_answer(threads, count):
    threads(count)
    assert_like_float64(normalized, composed, problem(40, 33, (19, 10), 1))


def test_an_image_larger_than_the_caches():
    assert_like_float64(normalized, composed, problem(64, 128, (147, 147), 1), slack=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_not_lost(isa_level, dtype, value):
    x = image(1, 19, 9, 9)
    x[0, 3, 4, 4] = value
    weights = torch.randn(19, 1, 3, 3), torch.randn(21, 19, 1, 1), torch.randn(21)
    tensors = [t.to(dtype).requires_grad_() for t in (x, *weights)]
    for name in ACTIVATIONS:
        options = {"padding": 1, "pre_activation": name, "activation": name}
        both = pf.separable_conv2d, two_convolutions
        with torch.no_grad():
            found, expected = (f(*tensors, **options) for f in both)
        assert torch.equal(found.isfinite(), expected.isfinite()), name
        assert value == value or torch.equal(found.isnan(), expected.isnan()), name
        # That of the input is finite or not as it pleases PyTorch, from activation to activation.
        found, expected = (torch.autograd.grad(f(*tensors, **options).sum(), tensors[1:]) for f in both)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite()), name


def test_an_infinite_gradient_stays_infinite_where_it_belongs():
    inputs = problem()
    y, _, _ = normalized(**inputs)
    upstream = torch.ones_like(y)
    upstream[1, 4, 5, 5] = torch.inf
    found = torch.autograd.grad(y, list(inputs.values()), upstream)
    assert not found[0][0].isinf().any()
    assert not found[0][1].isfinite().all()
    assert found[5].isinf().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_as_for_conv2d(dtype):
    x, depthwise, pointwise = (
        t.requires_grad_() for t in (image(2, 12, 9, 8), torch.randn(12, 1, 3, 3), torch.randn(5, 12, 1, 1))
    )
    with torch.autocast("cpu", dtype=dtype):
        y = pf.separable_conv2d(x, depthwise, pointwise, padding=1)
        expected = F.conv2d(F.conv2d(x, depthwise, padding=1, groups=12), pointwise)
        kept = pf.separable_conv2d(x.double(), depthwise.double(), pointwise.double(), padding=1)
    assert y.dtype == expected.dtype == dtype
    assert kept.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), [x, depthwise, pointwise]))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    ("shape", "channels_last"), [((2, 6, 7, 5), True), ((2, 6, 7, 5), False), ((1, 6, 1, 1), False)]
)
def test_output_and_gradient_have_the_layout_of_the_input(shape, channels_last, learns):
    x = image(*shape, channels_last=channels_last).requires_grad_(learns)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    y = pf.separable_conv2d(x, torch.randn(6, 1, 3, 3), torch.randn(4, 6, 1, 1), padding=1, activation="relu")
    assert y.is_contiguous(memory_format=memory)
    if learns:
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.is_contiguous(memory_format=memory)


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("needed", [(True,) * 5, (False, True, False, True, False), (True, False, True, False, True)])
def test_opcheck_of_the_backward_op(channels_last, needed):
    inputs = {name: t.detach() for name, t in problem(6, 5, (7, 5)).items()}
    x = inputs["input"].contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    norm = [inputs["scale"], inputs["shift"]] if needed[1] else [None, None]
    weights = inputs["depthwise_weight"], inputs["pointwise_weight"]
    for line in (False, True):
        output = image(2, 5, 4, 5, channels_last=channels_last) if line else None
        slope, offset = (torch.randn(5) if line else None for _ in range(2))
        arguments = image(2, 5, 4, 5), output, slope, offset, x, *norm, *weights, [2, 1], [1, 1, 1, 1], [1, 1], 1
        torch.library.opcheck(torch.ops.perfvl.separable_conv_backward.default, (*arguments, *needed))


def test_an_image_without_a_batch_takes_a_residual_without_one():
    x, weights = torch.randn(6, 7, 5), (torch.randn(6, 1, 3, 3), torch.randn(4, 6, 1, 1))
    residual = torch.randn(4, 7, 5)
    with_batch = pf.separable_conv2d(x[None], *weights, padding=1, residual=residual[None])
    assert torch.equal(pf.separable_conv2d(x, *weights, padding=1, residual=residual), with_batch[0])


class TestTheChoiceOfBackend:
    """By weights, dtype and layout alone; where oneDNN was measured to be faster, it runs."""

    faster = staticmethod(separable_conv._is_faster)  # before the tests' fixture takes its place

    def chosen(self, channels, outputs, dtype=torch.float32, layout=torch.channels_last):
        x = torch.empty(2, channels, 5, 4, dtype=dtype, memory_format=layout)
        return self.faster(x, torch.empty(outputs, channels, 1, 1, dtype=dtype))

    def test_float32_channels_last_runs_the_kernel(self):
        assert self.chosen(1536, 2048)
        assert self.chosen(32, 16)

    def test_wide_nchw_layers_stay_with_torch(self):
        assert self.chosen(128, 256, layout=torch.contiguous_format)
        assert not self.chosen(728, 728, layout=torch.contiguous_format)

    def test_bfloat16_stays_with_torch_in_nchw_and_float16_never(self):
        assert self.chosen(728, 728, torch.bfloat16)
        assert self.chosen(32, 16, torch.bfloat16)
        assert not self.chosen(32, 16, torch.bfloat16, torch.contiguous_format)
        assert not self.chosen(728, 728, torch.bfloat16, torch.contiguous_format)
        assert self.chosen(3, 5, torch.float16, torch.contiguous_format)
