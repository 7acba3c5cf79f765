"""What is special to color_transform: bytes, what is saved, what has no kernel, and the published nets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contracts.color_transform import MEAN, published, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from op_contract import as_double, error, evaluate
from torch import Tensor, nn

import perfvl
import perfvl.functional as pf
from perfvl import backends
from perfvl.nn import ColorTransform
from perfvl.ops import color_transform

KNOWN = json.loads((Path(__file__).parent / "data" / "color_nets.json").read_text())
HAS_KERNELS = not backends.CPU_MISSING
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
BYTES = torch.uint8
VARIANTS = ("A", "B", "C", "D", "D2", "E", "F", "maxout")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def photos(*shape: int, channels_last: bool = False) -> Tensor:
    x = torch.randint(256, shape, dtype=BYTES)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


# The function ---------------------------------------------------------------------------------------------------------


def test_the_known_activation():
    """Once with each sign of the second weight: one of them passes the second activation unchanged."""
    x = torch.tensor(KNOWN["x"]).reshape(1, 1, 1, -1)
    signs = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    y = pf.color_transform(x, torch.ones(1, 1, 1, 1), None, signs, None, negative_slope=0.5)
    found = torch.where(x[0, 0, 0] > 0, y[0, 0, 0], -y[0, 1, 0])
    assert torch.equal(found, torch.tensor(KNOWN["leaky_relu_half"]))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 16), st.integers(1, 13), st.integers(1, 30)),
    st.integers(1, 18),
    st.integers(1, 16),
    st.sampled_from([torch.float32, BYTES]),
    st.booleans(),
    st.booleans(),
)
def test_any_shape_gives_the_answer(shape, hidden, outputs, of_image, biases, channels_last):
    torch.manual_seed(sum(shape) + 100 * hidden + outputs)
    inputs = tensors("cpu", shape, hidden, outputs, of_image=of_image, biases=biases, channels_last=channels_last)
    truth, rival = evaluate(published, as_double(inputs)), evaluate(published, inputs)
    for what, value in evaluate(pf.color_transform, inputs).items():
        assert max(error(value, truth[what])) < 1e-5 + 1.2 * max(error(rival[what], truth[what])), what


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_integers_are_exact(slope):
    image = photos(2, 3, 21, 17)
    leaves = [torch.randint(-4, 5, s).float().requires_grad_() for s in ((10, 3, 1, 1), (10,), (3, 10, 1, 1), (3,))]
    upstream = torch.randint(-4, 5, (2, 3, 21, 17)).float()
    found, expected = (f(image, *leaves, negative_slope=slope) for f in (pf.color_transform, published))
    assert torch.equal(found, expected)
    double = [t.detach().double().requires_grad_() for t in leaves]
    right = torch.autograd.grad(published(image, *double, negative_slope=slope), double, upstream.double())
    for got, exact in zip(torch.autograd.grad(found, leaves, upstream), right, strict=True):
        assert torch.equal(got, exact.float())


@needs_kernels
@pytest.mark.parametrize("of_image", [torch.float32, BYTES])
def test_the_image_is_saved_as_it_came_and_nothing_else_but_parameters(of_image):
    inputs = tensors("cpu", (2, 3, 30, 30), of_image=of_image)
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pf.color_transform(**inputs)
    mine = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, Tensor)}
    assert set(saved) == mine
    assert saved[inputs["image"].untyped_storage().data_ptr()].dtype == of_image


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("of_image", [torch.float32, BYTES])
def test_output_and_gradient_have_the_layout_of_the_image(of_image, channels_last):
    inputs = tensors("cpu", of_image=of_image, channels_last=channels_last)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = pf.color_transform(**inputs)
        assert y.is_contiguous(memory_format=memory)
        if grad and of_image != BYTES:
            assert torch.autograd.grad(y.sum(), inputs["image"])[0].is_contiguous(memory_format=memory)


@needs_kernels
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_opcheck_of_the_backward_op(channels_last, needed):
    for of_image, dtype in [(torch.float32, torch.float32), (BYTES, torch.bfloat16)]:
        if of_image == BYTES and needed[0]:
            continue
        t = tensors("cpu", (2, 3, 5, 4), of_image=of_image, dtype=dtype, channels_last=channels_last)
        inputs = [t[name].detach() for name in ("image", "weight1", "bias1", "weight2", "bias2")]
        op = torch.ops.perfvl.color_transform_backward.default
        for upstream in (torch.randn(2, 3, 5, 4).to(dtype), torch.ones((), dtype=dtype).expand(2, 3, 5, 4)):
            torch.library.opcheck(op, (upstream, *inputs, torch.tensor(MEAN), 0.04, 0.5, True, *needed))
            without = [*inputs[:2], None, inputs[3], None]
            torch.library.opcheck(op, (upstream, *without, None, 1.0, 0.0, False, *needed))


@needs_kernels
def test_any_number_of_threads_gives_the_same_bits(threads):
    inputs = tensors("cpu", (3, 3, 61, 90))
    threads(1)
    expected = evaluate(pf.color_transform, inputs)
    for count in (2, 3):
        threads(count)
        for what, value in evaluate(pf.color_transform, inputs).items():
            assert torch.equal(value, expected[what]), what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_image", [torch.float32, BYTES])
def test_autocast_casts_the_weights_and_reads_the_image_as_it_is(of_image, dtype):
    inputs = tensors("cpu", of_image=of_image)
    with torch.autocast("cpu", dtype=dtype):
        found, expected = evaluate(pf.color_transform, inputs), evaluate(published, inputs)
        kept = pf.color_transform(**as_double(inputs))
    assert kept.dtype == torch.float64
    truth = evaluate(published, as_double(inputs))
    for what, value in found.items():
        assert value.dtype == expected[what].dtype, what
        assert max(error(value, truth[what])) < 1.2 * max(error(expected[what], truth[what])) + 1e-3, what
    assert found["output 0"].dtype == dtype


@pytest.mark.parametrize("of_image", [torch.float32, BYTES])
def test_compiled_whole_it_gives_the_same(of_image):
    torch._dynamo.reset()
    inputs = tensors("cpu", of_image=of_image, channels_last=True)
    compiled = torch.compile(pf.color_transform, fullgraph=True, backend="aot_eager")
    expected = evaluate(pf.color_transform, inputs)
    for what, value in evaluate(compiled, inputs).items():
        assert torch.equal(value, expected[what]), what


def test_the_reference_can_be_forced():
    inputs = tensors("cpu", of_image=BYTES)
    with perfvl.use_backend("reference"):
        assert torch.equal(pf.color_transform(**inputs), published(**inputs))


@needs_kernels
def test_what_has_a_kernel_runs_it_and_the_rest_plain_pytorch():
    def runs(*shape: int, hidden: int = 10, outputs: int = 3, **options) -> bool:
        t = tensors("cpu", shape, hidden, outputs, **options)
        return color_transform._has_kernel(t["image"], t["weight1"], t["weight2"])

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for of_image in (torch.float32, torch.bfloat16, torch.float16, BYTES):
            assert runs(2, 3, 4, 4, dtype=dtype, of_image=of_image)
    assert runs(1, 16, 1, 1, hidden=16, outputs=16)
    assert not runs(2, 17, 4, 4)
    assert not runs(2, 3, 4, 4, hidden=17)
    assert not runs(2, 3, 4, 4, outputs=17)
    assert not runs(0, 3, 4, 4)
    assert not runs(2, 3, 4, 4, dtype=torch.float64)
    assert not runs(2, 3, 4, 4, of_image=torch.float64)
    on_meta = torch.empty(2, 3, 4, 4, device="meta")
    assert not color_transform._has_kernel(on_meta, torch.empty(3, 3, 1, 1), torch.empty(3, 3, 1, 1))


def test_the_layers_of_a_network_train():
    """Against the same layers of PyTorch, three steps of SGD."""
    ours = ColorTransform("F", mean=MEAN, scale=0.04)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.5)
    theirs = nn.Sequential(nn.Conv2d(3, 10, 1), nn.LeakyReLU(0.5), nn.Conv2d(10, 3, 1), nn.LeakyReLU(0.5))
    keys = {"conv1": "0", "conv2": "2"}
    theirs.load_state_dict({f"{keys[k[:5]]}{k[5:]}": v.clone() for k, v in ours.state_dict().items()})
    images = photos(4, 3, 16, 16)
    for network in (ours, theirs):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(3):
            x = images if network is ours else 0.04 * (images.float() - torch.tensor(MEAN)[:, None, None])
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# The nets -------------------------------------------------------------------------------------------------------------


def test_the_docstring_has_the_published_accuracies():
    rows = re.findall(r'^ *"(\w+)" .* (\.\d+)$', ColorTransform.__doc__ or "", flags=re.M)
    names = {"A": "A_10_3_tanh", "B": "B_3_3_vlrelu", "C": "C_10_3_residual_vlrelu", "D": "D_log_10_3_vlrelu"}
    names |= {
        "D2": "D2_log_logminus_10_3_vlrelu",
        "E": "E_16_3_vlrelu",
        "F": "F_10_3_vlrelu",
        "maxout": "F_10_3_maxout",
    }
    assert {name: float(top1) for name, top1 in rows} == {v: KNOWN["published_top1"][names[v]] for v in VARIANTS}


def drawn(variant: str, **options) -> ColorTransform:
    """With weights that are large enough to see."""
    net = ColorTransform(variant, **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_net_is_what_the_table_says(variant, channels_last):
    raw = variant in ("D", "D2")
    net = drawn(variant) if raw else drawn(variant, mean=MEAN, scale=0.04)
    images = photos(4, 3, 9, 8, channels_last=channels_last)
    x = images.float()
    if raw:
        x = torch.cat([x, (x + 1).log(), *([(256 - x).log()] if variant == "D2" else [])], 1)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    else:
        x = 0.04 * (x - torch.tensor(MEAN)[:, None, None])

    def layer(conv: nn.Conv2d, x: Tensor, beside: Tensor | None = None) -> Tensor:
        z = F.conv2d(x, conv.weight, conv.bias)
        if variant == "A":
            return z.tanh()
        if variant == "maxout":
            return z.unflatten(1, (2, -1)).amax(1)
        return F.leaky_relu(z if beside is None else z + beside, 0.5)

    expected = layer(net.conv2, layer(net.conv1, x), x if variant == "C" else None)
    found = net(images)
    assert found.shape == (4, 3, 9, 8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in net.parameters())
    net.eval()
    torch.testing.assert_close(net(images[0]), net(images[:1])[0])


@pytest.mark.parametrize(
    ("variant", "channels", "first", "second"),
    [("A", 3, 10, 3), ("B", 3, 3, 3), ("C", 3, 10, 3), ("D", 6, 10, 3), ("D2", 9, 10, 3), ("E", 3, 16, 3),
     ("F", 3, 10, 3), ("maxout", 3, 20, 6)],
)  # fmt: skip
def test_states_have_two_convolutions(variant, channels, first, second):
    state = {k: tuple(v.shape) for k, v in ColorTransform(variant, mean=None).state_dict().items()}
    hidden = 10 if variant == "maxout" else first
    norm = {"bn.running_mean": (channels,), "bn.running_var": (channels,), "bn.num_batches_tracked": ()}
    assert state == {
        **(norm if channels > 3 else {}),
        "conv1.weight": (first, channels, 1, 1),
        "conv1.bias": (first,),
        "conv2.weight": (second, hidden, 1, 1),
        "conv2.bias": (second,),
    }
    assert ColorTransform("F", mean=MEAN).state_dict().keys() == ColorTransform("F").state_dict().keys()


def test_weights_begin_as_published():
    net = ColorTransform("E")
    assert net.conv1.weight.std().item() == pytest.approx(0.01, rel=0.4)
    assert net.conv2.weight.std().item() == pytest.approx(0.01, rel=0.4)
    assert net.conv1.bias is not None
    assert not net.conv1.bias.any()
    assert not next(p for name, p in net.named_parameters() if name == "conv2.bias").any()


def test_the_batch_norm_is_caffe_s():
    net = ColorTransform("D2")
    images = photos(2, 3, 8, 8)
    net(images)
    x = images.float()
    features = torch.cat([x, x.log1p(), (256 - x).log()], 1)
    bn = net.get_submodule("bn")
    assert not list(bn.parameters())
    torch.testing.assert_close(bn.get_buffer("running_mean"), 0.05 * features.mean((0, 2, 3)))
    torch.testing.assert_close(bn.get_buffer("running_var"), 0.95 + 0.05 * features.var((0, 2, 3)))


def test_of_equal_pieces_of_maxout_the_second_gets_the_gradient():
    net = drawn("maxout")
    with torch.no_grad():
        for conv in (net.conv1, net.conv2):
            for p in conv.parameters():
                p[len(p) // 2 :] = p[: len(p) // 2]
    net(torch.randn(2, 3, 4, 4)).sum().backward()
    for p in net.parameters():
        assert p.grad is not None
        first, second = p.grad.chunk(2)
        assert not first.any()
        assert second.any()


def test_maxout_keeps_nan():
    net = drawn("maxout")
    image = torch.randn(1, 3, 4, 4)
    image[0, 1, 2, 3] = torch.nan
    assert net(image).isnan().nonzero().tolist() == [[0, c, 2, 3] for c in range(3)]


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_leaky_nets_run_the_kernel(variant):
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        ColorTransform(variant)(photos(2, 3, 4, 4))
    assert (torch.ops.perfvl.color_transform.default in called) == (variant not in ("A", "maxout"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "G"}, ValueError, "`variant` got 'G', expected one of A, B, C, D, D2, E, F, maxout"),
        ({"mean": (1.0, 2.0)}, ValueError, "`mean` got 2 numbers, expected one for each of 3 channels"),
        ({"scale": "1"}, TypeError, "`scale` got str, expected a float"),
        ({"negative_slope": None}, TypeError, "`negative_slope` got NoneType, expected a float"),
        ({"negative_slope": -0.5}, ValueError, "`negative_slope` got -0.5, expected at least 0"),
        ({"variant": "D", "mean": MEAN}, ValueError, 'none with "D": its logarithms are of the raw image'),
        ({"variant": "D2", "scale": 0.04}, ValueError, '`scale` got 0.04, expected none with "D2"'),
    ],
)
def test_bad_nets_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ColorTransform(**options)
