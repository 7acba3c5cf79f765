"""What is special to norm and activation in one: the layer is `nn.BatchNorm2d` in all but speed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perfvl
from perfvl import backends
from perfvl.nn import NormAct2d, activation
from perfvl.ops.norm_act import norm_act

ISA_LEVELS = ["reference"] if backends.CPU_MISSING else ["reference", *torch.ops.perfvl._isa_levels()]
FUSED = ("identity", "relu", "vlrelu", "elu", "tanh", "sigmoid")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
every_order = pytest.mark.parametrize("order", ["before", "after"])
needs_kernels = pytest.mark.skipif(bool(backends.CPU_MISSING), reason="needs the kernels")


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


class TwoLayers(nn.Module):
    """What the layer stands for."""

    def __init__(self, name: str, order: str, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm, self.act, self.order = norm, activation(name, norm.num_features), order

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) if self.order == "before" else self.norm(self.act(x))


def image(*shape: int, mean: float = 0.5) -> Tensor:
    return mean + torch.randn(shape)


def both(name: str, order: str, channels: int = 12, **settings: Any) -> tuple[NormAct2d, TwoLayers]:
    """The layer and two layers, with the same numbers."""
    track = settings.pop("track_running_stats", True)
    ours = NormAct2d(channels, name, order=order, **settings)
    norm = nn.BatchNorm2d(channels, track_running_stats=track, **settings)
    if not track:
        ours.track_running_stats = False
        ours.running_mean = ours.running_var = ours.num_batches_tracked = None
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    ours.load_state_dict(norm.state_dict())
    return ours, TwoLayers(name, order, norm)


def calls_of_op(run: Callable[[], Any]) -> int:
    count = 0

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += func is torch.ops.perfvl.norm_act.default
            return func(*args, **(kwargs or {}))

    with Counter():
        run()
    return count


def gradients(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    wanted = [leaf, *(p for p in module.parameters())]
    return list(torch.autograd.grad(module(leaf), wanted, upstream))


def assert_same_gradients(ours: NormAct2d, theirs: TwoLayers, x: Tensor, upstream: Tensor) -> None:
    """As in float64: PyTorch adds thousands of float32 in channels_last, one by one."""
    exact = gradients(copy.deepcopy(theirs).double(), x.double(), upstream.double())
    for i, (a, b) in enumerate(zip(gradients(ours, x, upstream), exact, strict=True)):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-3 if i else 1e-5)


def assert_same_state(ours: NormAct2d, theirs: nn.BatchNorm2d) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert ours.state_dict()[name].dtype == value.dtype, name
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=name)


@every_backend
@every_layout
@every_order
@pytest.mark.parametrize("name", FUSED)
def test_training_and_evaluation_are_those_of_two_layers(name, order, layout):
    ours, theirs = both(name, order)
    for _ in range(3):
        x = image(6, 12, 31, 30).to(memory_format=layout)
        upstream = torch.randn(6, 12, 31, 30).to(memory_format=layout)
        assert_same_gradients(ours, theirs, x, upstream)
        theirs(x)
        assert_same_state(ours, theirs.norm)
    ours.eval(), theirs.eval()
    y = ours(x)
    torch.testing.assert_close(y, theirs(x))
    assert y.stride() == theirs(x).stride()
    assert_same_gradients(ours, theirs, x, upstream)
    assert_same_state(ours, theirs.norm)


@every_backend
@every_order
@pytest.mark.parametrize(
    "settings",
    [{"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_settings_of_the_norm(settings, order):
    ours, theirs = both("relu", order, **settings)
    for _ in range(3):
        x = image(6, 12, 31, 30)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
        assert_same_state(ours, theirs.norm)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)


@every_backend
def test_a_norm_that_is_frozen_while_training():
    ours, theirs = both("relu", "before")
    ours(x := image(6, 12, 31, 30)), theirs(x)
    for module in (ours, theirs):
        module.train()
        (module if isinstance(module, NormAct2d) else module.norm).eval()
        module.requires_grad_(False)
    before = copy.deepcopy(ours.state_dict())
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    grads = [
        torch.autograd.grad(m(leaf).square().sum(), leaf)[0] for m, leaf in zip((ours, theirs), leaves, strict=True)
    ]
    torch.testing.assert_close(*grads)
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


@needs_kernels
@pytest.mark.parametrize("name", FUSED)
@every_order
def test_the_kernels_run_where_they_can(name, order):
    for module, x in [
        (NormAct2d(12, name, order=order), image(6, 12, 62, 61)),
        (NormAct2d(12, name, order=order, affine=False), image(6, 12, 62, 61)),
        (NormAct2d(12, name, order=order), image(6, 12, 310, 310).bfloat16()),
        (NormAct2d(12, name, order=order), image(6, 12, 310, 310).to(memory_format=torch.channels_last)),
    ]:
        assert calls_of_op(lambda module=module, x=x: module(x)) == 1
        with perfvl.use_backend("reference"):
            assert calls_of_op(lambda module=module, x=x: module(x)) == 0
    inference = NormAct2d(12, name, order=order).eval()
    alone = name == "identity"  # a pass in PyTorch as well
    assert calls_of_op(lambda: inference(image(6, 12, 310, 310))) == (0 if alone else 1)


class Doubled(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked(module: NormAct2d) -> NormAct2d:
    module.activation.register_forward_hook(lambda m, i, o: o + 1)
    return module


def replaced(module: NormAct2d) -> NormAct2d:
    module.activation.forward = lambda x: x * 3  # type: ignore[method-assign, assignment]
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(NormAct2d(12, "relu")),
        lambda: replaced(NormAct2d(12, "relu")),
        lambda: NormAct2d(12, Doubled()),
        lambda: NormAct2d(12, nn.Softplus()),
        lambda: NormAct2d(12, "prelu"),
        lambda: NormAct2d(12, nn.ReLU(inplace=True), order="after"),
        lambda: NormAct2d(12, "relu").double(),
        lambda: NormAct2d(12, "relu").bfloat16(),
    ],
    ids=["hook", "forward", "subclass", "softplus", "prelu", "writes to the input", "float64", "bfloat16"],
)
def test_what_the_op_does_not_know_runs_layer_by_layer(make):
    module = make()
    dtype = module.weight.dtype
    x = image(6, 12, 31, 30).to(dtype)
    norm = copy.deepcopy(module)
    norm.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    given = x.clone()
    act = copy.deepcopy(module.activation) if "forward" not in module.activation.__dict__ else module.activation
    expected = act(norm(given)) if module.order == "before" else norm(act(given))
    output = None

    def run() -> None:
        nonlocal output
        output = module(x)

    assert calls_of_op(run) == 0
    assert torch.equal(output, expected)
    assert torch.equal(x, given)  # changed as it was


def test_global_hooks_see_the_activation():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        NormAct2d(12, "relu")(image(6, 12, 31, 30))
    finally:
        handle.remove()
    assert nn.ReLU in seen


def test_a_hook_on_the_norm_sees_what_comes_out():
    module = NormAct2d(12, "relu")
    module.register_forward_hook(lambda m, i, o: o + 1)
    assert module(image(6, 12, 31, 30)).min() >= 1


@every_backend
def test_errors_are_torch_s():
    module = NormAct2d(12, "relu")
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        module(image(12, 9, 9))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(image(1, 12, 1, 1))
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements not 12"):
        module(image(2, 5, 9, 9))
    assert torch.equal(module.running_mean, torch.zeros(12))
    module.eval()(image(1, 12, 1, 1))


@needs_kernels
@every_order
def test_backward_keeps_the_input_and_four_numbers_a_channel(order):
    module, x = NormAct2d(12, "elu", order=order), image(6, 12, 31, 30).requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    assert sum(kept.values()) == 4 * (x.numel() + 4 * 12)
    assert x.data_ptr() in kept


@needs_kernels
def test_the_output_may_be_changed_in_place():
    module, x = NormAct2d(12, "relu"), image(6, 12, 31, 30).requires_grad_()
    y = module(x)
    y.mul_(2)
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert grad.isfinite().all()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


@needs_kernels
def test_running_statistics_count_as_changed_in_training_alone():
    module, x = NormAct2d(12, "relu"), image(6, 12, 31, 30)
    versions = [t._version for t in (module.running_mean, module.running_var)]  # type: ignore[union-attr]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            module(x)
        moved = [t._version for t in (module.running_mean, module.running_var)]  # type: ignore[union-attr]
        assert all(a > b for a, b in zip(moved, versions, strict=True))
        versions = moved
    module.eval()(x)
    assert [t._version for t in (module.running_mean, module.running_var)] == versions  # type: ignore[union-attr]
    with torch.inference_mode():
        module.train()(x)
    assert int(module.num_batches_tracked) == 3  # type: ignore[arg-type]


@every_order
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_whole_and_moves_the_same_statistics(training, order):
    torch._dynamo.reset()
    ours, theirs = both("elu", order)
    ours.train(training), theirs.train(training)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, upstream = image(6, 12, 31, 30), torch.randn(6, 12, 31, 30)
        for a, b in zip(gradients(compiled, x, upstream), gradients(theirs, x, upstream), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-5, atol=1e-6)
        assert_same_state(ours, theirs.norm)


def test_inductor_moves_the_same_statistics():
    torch._dynamo.reset()
    ours, theirs = both("relu", "before")
    compiled = torch.compile(ours, fullgraph=True)
    for _ in range(2):
        x = image(6, 12, 31, 30)
        torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert_same_state(ours, theirs.norm)


@every_backend
@every_layout
def test_of_equal_numbers_and_of_nan(layout, request):
    module = NormAct2d(12, "relu")
    x = torch.full((6, 12, 31, 30), 0.1).to(memory_format=layout)
    plain = "reference" in request.node.callspec.id  # PyTorch's mean of them is rounded
    torch.testing.assert_close(module(x), torch.zeros_like(x), rtol=0, atol=1e-3 if plain else 0)
    x[3, 5, 2, 1] = torch.nan
    assert module(x).isnan().any(0).any(-1).any(-1).nonzero().tolist() == [[5]]
    assert module.running_var.isnan().nonzero().tolist() == [[5]]  # type: ignore[union-attr]


@every_backend
def test_empty_batches_go_through():
    module = NormAct2d(12, "relu")
    x = torch.empty(0, 12, 12, 12, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()


def test_autocast_leaves_it_in_the_input_s_dtype():
    module, x = NormAct2d(12, "relu"), image(6, 12, 31, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.float32
        assert module(x.bfloat16()).dtype == torch.bfloat16
    assert module.running_mean.dtype == torch.float32  # type: ignore[union-attr]


def test_nothing_outlives_a_step():
    module, shape = NormAct2d(12, "relu"), (7, 12, 11, 13)  # of this test alone
    module(image(*shape).requires_grad_()).sum().backward()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Tensor and o.shape == shape]


def test_few_elements_run_layer_by_layer():
    """There a call costs more than passes over memory: by sizes alone."""
    module = NormAct2d(12, "relu")
    assert calls_of_op(lambda: module(image(2, 12, 5, 5))) == 0


@every_backend
def test_the_function_takes_vectors_and_volumes():
    for shape in ((40, 12), (7, 12, 11), (3, 12, 2, 5, 4)):
        x, running = image(*shape), [torch.zeros(12), torch.ones(12)]
        y = norm_act(x, None, None, *running, order="after")
        norm: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}[len(shape)](12, affine=False)
        torch.testing.assert_close(y, norm(x.relu()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(running, [norm.running_mean, norm.running_var], rtol=1e-6, atol=1e-6)


def test_a_refused_call_moves_no_statistics():
    running = [torch.zeros(12), torch.ones(12)]
    versions = [t._version for t in running]
    with pytest.raises(ValueError, match=r"`bias` got shape \(11,\)"):
        norm_act(image(6, 12, 31, 30), torch.ones(12), torch.ones(11), *running)
    assert [t._version for t in running] == versions
    assert torch.equal(running[0], torch.zeros(12))


@needs_kernels
@every_layout
def test_where_pytorch_s_layers_are_faster_they_run(layout):
    few, some, many = (image(6, 12, size, 30).to(memory_format=layout) for size in (30, 31, 122))  # 2^16, 2^18 elements
    for name, of_training, of_inference in [
        ("identity", (0, 0, 1), (0, 0, 0)),
        ("relu", (0, 1, 1), (0, 0, 1)),
        ("elu", (0, 1, 1), (0, 1, 1)),
    ]:
        module = NormAct2d(12, name)
        assert tuple(calls_of_op(lambda x=x, module=module: module(x)) for x in (few, some, many)) == of_training, name
        module.eval()
        assert tuple(calls_of_op(lambda x=x, module=module: module(x)) for x in (few, some, many)) == of_inference, name
