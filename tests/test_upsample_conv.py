"""What is special to upsample_conv2d: phases, both ways to compute it, batch norm behind it, memory, odd numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from contracts.upsample_conv import ACTIVATIONS, SLACK, clear_of_zero, samples, tensors, upsampled
from hypothesis import given, settings
from hypothesis import strategies as st
from op_contract import as_double, assert_accurate, error, evaluate
from torch import Tensor

import perfvl
import perfvl.functional as pf
from perfvl import backends
from perfvl.ops import upsample_conv
from perfvl.ops import upsample_conv_transposed as transposed
from perfvl.reference.activation import CODES

KNOWN = json.loads((Path(__file__).parent / "data" / "stackgan.json").read_text())["upsample_conv"]
HAS_KERNELS = not backends.CPU_MISSING
NAMES = st.sampled_from(list(ACTIVATIONS))


@pytest.fixture(params=["kernel", "transposed", "reference"])
def path(request, monkeypatch):
    """Each way to compute it."""
    if request.param == "kernel" and not HAS_KERNELS:
        pytest.skip("needs the kernels")
    monkeypatch.setattr(upsample_conv, "_path", lambda *_: request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def images(*shape: int, channels_last: bool = True) -> Tensor:
    x = torch.randn(shape)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def integers(*shape: int) -> Tensor:
    """Sums and products of which are exact in float32."""
    return torch.randint(-8, 9, shape).float()


# Meaning --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_known_example(path, dtype):
    if path == "transposed" and dtype == torch.float16:
        pytest.skip("oneDNN has it on some CPUs only")
    x, w, y = (torch.tensor(KNOWN[name], dtype=dtype)[None, None] for name in "xwy")
    assert torch.equal(pf.upsample_conv2d(x, w), y)
    assert torch.equal(pf.upsample_conv2d(x[0], w), y[0])


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_kernel_of_the_transposed_convolution_is_the_known_one(channels_last):
    w = torch.tensor(KNOWN["w"])[None, None].expand(3, 2, 3, 3) * torch.tensor([1.0, 2, 3]).reshape(3, 1, 1, 1)
    k = transposed.transposed_weight(w, None, channels_last)
    assert k.shape == (2, 3, 4, 4)
    for o in range(3):
        assert torch.equal(k[1, o], (o + 1) * torch.tensor(KNOWN["K4"]))
    scaled = transposed.transposed_weight(w, torch.tensor([1.0, 0.5, -2.0]), channels_last)
    assert torch.equal(scaled[0], k[0] * torch.tensor([1.0, 0.5, -2.0]).reshape(3, 1, 1))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 7), (7, 1), (2, 2), (4, 4), (5, 3), (9, 16)])
def test_every_pixel_and_gradient_of_integers_is_exact(path, size, channels_last):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = integers(2, 5, *size).contiguous(memory_format=memory).requires_grad_()
    w, b = integers(7, 5, 3, 3).requires_grad_(), integers(7).requires_grad_()
    upstream = integers(2, 7, 2 * size[0], 2 * size[1])
    found, expected = (f(x, w, b) for f in (pf.upsample_conv2d, upsampled))
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(y, (x, w, b), upstream) for y in (found, expected))
    for name, got, right in zip(("input", "weight", "bias"), ours, theirs, strict=True):
        assert torch.equal(got, right), name


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 21)),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    NAMES,
)
def test_any_shape_gives_the_answer(shape, outputs, channels_last, bias, activation):
    torch.manual_seed(sum(shape) + outputs)
    inputs = tensors("cpu", shape, outputs, bias=bias, channels_last=channels_last) | {"activation": activation}
    truth = evaluate(upsampled, as_double(inputs))
    for what, value in evaluate(pf.upsample_conv2d, inputs).items():
        assert max(error(value, truth[what])) < 1e-5, what
    frozen = {name: t.detach() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    assert max(error(pf.upsample_conv2d(**frozen), truth["output 0"])) < 1e-5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck_of_every_activation(name):
    leaves = [torch.randn(shape).double().requires_grad_() for shape in ((2, 2, 2, 3), (3, 2, 3, 3), (3,))]
    assert torch.autograd.gradcheck(lambda *t: pf.upsample_conv2d(*t, activation=name), leaves)


def test_the_transposed_convolution_is_as_accurate_as_plain_pytorch(monkeypatch):
    """It is what runs on CUDA and, in bfloat16, on AMX."""
    for op in ("upsample_conv", "upsample_conv_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"perfvl::{op}", "CUDA")
    monkeypatch.setattr(upsample_conv, "_cpu_path", lambda *_: "transposed")
    for sample in samples("cpu"):
        if sample.inputs["input"].dtype == torch.float16:
            continue
        truth, rival = evaluate(upsampled, as_double(sample.inputs)), evaluate(upsampled, sample.inputs)
        for what, value in evaluate(pf.upsample_conv2d, sample.inputs).items():
            assert_accurate(f"{sample.name}: {what}", value, truth[what], rival[what], sample.slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2)])
def test_the_transposed_convolution_has_the_strides_of_the_fakes(size, channels_last, dtype):
    x, w = images(2, 3, *size, channels_last=channels_last).to(dtype), torch.randn(5, 3, 3, 3, dtype=dtype)
    y, shift = transposed.forward(x, w, None, None, 0), torch.randn(5)
    assert y.stride() == upsample_conv._fake(x, w, None, shift, 0).stride()
    for needed in [(True,) * 3, (True, False, False), (False, True, False), (False, False, True)]:
        upstream = torch.ones((), dtype=dtype).expand(y.shape)
        found, fake = (f(upstream, x, w, *needed) for f in (transposed.backward, upsample_conv._fake_backward))
        for got, expected in zip(found, fake, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_both_ways_apply_scale_shift_and_activation_alike(name):
    x, w, scale, shift = images(2, 6, 5, 4), torch.randn(9, 6, 3, 3) / 8, torch.rand(9) + 0.5, torch.randn(9)
    expected = ACTIVATIONS[name](upsampled(x, w) * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1))
    for function in (torch.ops.perfvl.upsample_conv.default, transposed.forward):
        found = function(x, w, scale, shift, CODES[name])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Memory and layouts ---------------------------------------------------------------------------------------------------


def test_only_the_input_and_weights_are_saved(path):
    if path == "reference":
        pytest.skip("plain PyTorch saves the upsampled image")
    x, w, b = images(2, 16, 9, 7).requires_grad_(), torch.randn(8, 16, 3, 3).requires_grad_(), torch.randn(8)
    saved = set()

    def pack(t: Tensor) -> Tensor:
        saved.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = pf.upsample_conv2d(x, w, b.requires_grad_())
        z = pf.upsample_conv2d(x, w, b, activation="relu")
    assert saved == {t.untyped_storage().data_ptr() for t in (x, w, z)}
    assert y.shape == z.shape


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_output_and_gradient_have_the_layout_of_the_input(path, channels_last, learns):
    x = images(2, 6, 4, 5, channels_last=channels_last).requires_grad_(learns)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    y = pf.upsample_conv2d(x, torch.randn(4, 6, 3, 3), activation="relu")
    assert y.is_contiguous(memory_format=memory)
    if learns:
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.is_contiguous(memory_format=memory)


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("needed", [(True,) * 3, (True, False, False), (False, True, False), (False, True, True)])
def test_opcheck_of_the_backward_op(channels_last, needed):
    x, w = images(2, 6, 3, 4, channels_last=channels_last), torch.randn(5, 6, 3, 3)
    for upstream in (images(2, 5, 6, 8, channels_last=channels_last), torch.ones(()).expand(2, 5, 6, 8)):
        torch.library.opcheck(torch.ops.perfvl.upsample_conv_backward.default, (upstream, x, w, *needed))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads, count):
    inputs = tensors("cpu", (3, 24, 9, 10), 20, bias=True)
    threads(count)
    truth, rival = evaluate(upsampled, as_double(inputs)), evaluate(upsampled, inputs)
    first, second = evaluate(pf.upsample_conv2d, inputs), evaluate(pf.upsample_conv2d, inputs)
    for what, value in first.items():
        assert torch.equal(value, second[what]), what
        assert_accurate(what, value, truth[what], rival[what], SLACK[torch.float32])


def test_layers_of_the_generator_give_the_answer():
    for channels, outputs, size in [(256, 128, 4), (64, 32, 32)]:
        inputs = tensors("cpu", (2, channels, size, size), outputs)
        truth, rival = evaluate(upsampled, as_double(inputs)), evaluate(upsampled, inputs)
        for what, value in evaluate(pf.upsample_conv2d, inputs).items():
            assert_accurate(what, value, truth[what], rival[what], SLACK[torch.float32])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("channels_last", [True, False])
def test_nan_and_infinity_are_not_lost(path, channels_last, value):
    x = images(2, 9, 6, 6, channels_last=channels_last)
    x[0, 3, 2, 2] = value
    w = torch.rand(7, 9, 3, 3) + 0.1
    found, expected = pf.upsample_conv2d(x, w), upsampled(x, w)
    assert not found[~expected.isfinite()].isfinite().any()
    assert found[1].isfinite().all()


# Compilers and autocast -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_transposed_convolution_compiles_whole(monkeypatch, name):
    torch._dynamo.reset()
    monkeypatch.setattr(upsample_conv, "_cpu_path", lambda *_: "transposed")
    inputs = clear_of_zero(tensors("cpu", (2, 6, 4, 5), 8)) | {"activation": name}
    expected = evaluate(pf.upsample_conv2d, inputs)
    compiled = torch.compile(pf.upsample_conv2d, fullgraph=True, backend="aot_eager")
    for what, value in evaluate(compiled, inputs).items():
        torch.testing.assert_close(value, expected[what], msg=what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_as_for_conv2d(dtype):
    x, w = images(2, 12, 4, 5).requires_grad_(), (torch.randn(5, 12, 3, 3) / 10).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y, expected = pf.upsample_conv2d(x, w), upsampled(x, w)
        kept = pf.upsample_conv2d(x.double(), w.double())
    assert y.dtype == expected.dtype == dtype
    assert kept.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), [x, w]))


def test_the_reference_can_be_forced():
    x, w = images(2, 6, 4, 5), torch.randn(4, 6, 3, 3)
    with perfvl.use_backend("reference"):
        assert torch.equal(pf.upsample_conv2d(x, w), upsampled(x, w))


class TestTheChoiceOfBackend:
    """By shape, dtype and device alone."""

    on_cpu = staticmethod(upsample_conv._cpu_path)  # before the tests' fixture takes its place

    @pytest.fixture(autouse=True)
    def _as_users_have_it(self, monkeypatch):
        monkeypatch.setattr(upsample_conv, "_cpu_path", self.on_cpu)

    @pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_kernel_runs_on_cpus_without_bfloat16_products(self, monkeypatch, dtype):
        monkeypatch.setattr(upsample_conv, "_BFLOAT16_PRODUCTS", False)
        for size in (1, 128):
            assert upsample_conv._path(torch.empty(2, 3, size, size, dtype=dtype)) == "kernel"

    @pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
    @pytest.mark.parametrize(("tiles", "few"), [(False, "kernel"), (True, "reference")])
    def test_with_products_or_tiles_bfloat16_stays_with_the_library(self, monkeypatch, tiles, few):
        monkeypatch.setattr(upsample_conv, "_BFLOAT16_PRODUCTS", True)
        monkeypatch.setattr(upsample_conv, "_AMX", tiles)
        assert upsample_conv._path(torch.empty(16, 3, 32, 32, dtype=torch.bfloat16)) == "transposed"
        assert upsample_conv._path(torch.empty(16, 3, 4, 4, dtype=torch.bfloat16)) == few
        assert upsample_conv._path(torch.empty(16, 3, 32, 32)) == "kernel"
        assert upsample_conv._path(torch.empty(16, 3, 32, 32, dtype=torch.float16)) == "kernel"

    def test_float64_and_what_has_no_kernel_run_plain_pytorch(self):
        assert upsample_conv._path(torch.empty(2, 3, 4, 4, dtype=torch.float64)) == "reference"
        assert upsample_conv._path(torch.empty(0, 3, 4, 4)) == "reference"
        assert upsample_conv._path(torch.empty(2, 3, 4, 4, device="meta")) == "reference"
