"""swap replaces what it can in place, says why it leaves the rest, and its modules stay what they were to others."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle

import pytest
import torch
from swap_support import close, predict, ran, step, varied
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import perfvl
from perfvl import backends
from perfvl.nn.fused_blocks import FusedForward


class Inverted(nn.Module):
    """An inverted residual with whatever between its convolutions."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.conv_dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU6(inplace=True)
        self.between = nn.Sequential(*between)
        self.conv_pw = nn.Conv2d(8, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.use_residual = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv_pw(self.between(self.act(self.bn(self.conv_dw(self.expand(x)))))))
        return x + y if self.use_residual else y


def pure(start: nn.Module | None = None) -> nn.Sequential:
    layers = [
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4),
    ]
    return nn.Sequential(*layers) if start is None else nn.Sequential(start, *layers)


def image() -> Tensor:
    return torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(1))


def same(model: nn.Module, expected: nn.Module, x: Tensor | None = None) -> None:
    x = image() if x is None else x
    close(predict(model, x), predict(expected, x), 1e-5)
    got, want = step(model, x), step(expected, x)
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], 1e-4, name)


def test_report_names_what_was_replaced_and_what_was_not():
    model = nn.Sequential(pure(), Inverted(), Inverted(nn.Dropout(0.5)), nn.Conv2d(4, 4, 3, groups=4))
    report = perfvl.swap(model)
    layer = "depthwise 3x3 > pointwise > norm"
    assert report.replaced == [
        ("0", f"{layer} | relu > {layer}"),
        ("1", "relu6 > depthwise 3x3 > norm > relu6 > pointwise > norm + residual, in evaluation"),
    ]
    assert report.skipped == [
        ("2.conv_dw", "Dropout reads it, not a pointwise convolution"),
        ("3", "no pointwise convolution follows it"),
    ]
    assert len(report) == 2
    assert report
    assert str(report).splitlines() == [
        "perfvl.swap: 2 modules replaced, 2 depthwise convolutions left",
        f"replaced  0          {layer} | relu > {layer}",
        "replaced  1          relu6 > depthwise 3x3 > norm > relu6 > pointwise > norm + residual, in evaluation",
        "left      2.conv_dw  Dropout reads it, not a pointwise convolution",
        "left      3          no pointwise convolution follows it",
    ]
    assert not perfvl.swap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"swap: `model` got function, expected a torch\.nn\.Module"):
        perfvl.swap(pure)


def test_second_call_replaces_nothing():
    model = nn.Sequential(pure(), Inverted(), Inverted(nn.Dropout(0.5)))
    first = perfvl.swap(model)
    second = perfvl.swap(model)
    assert not second.replaced
    assert second.skipped == first.skipped


def test_undo_gives_back_the_forward_and_the_class():
    model = nn.Sequential(pure(), Inverted())
    before = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    report = perfvl.swap(model)
    assert [type(module) for module in model.modules()] != before
    report.undo()
    report.undo()
    assert [type(module) for module in model.modules()] == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert len(perfvl.swap(model)) == 2


def test_undo_wants_what_came_later_undone_first():
    model = pure()
    report = perfvl.swap(model)
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(RuntimeError, match="undo: Wrapped was FusedSequential after swap"):
        report.undo()


def test_modules_parameters_and_keys_stay_the_same_objects():
    model = nn.Sequential(pure(), Inverted())
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    perfvl.swap(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], nn.Sequential)
    assert isinstance(model[1], Inverted)
    before = model[1].conv_dw.weight.clone()
    model(image()).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].conv_dw.weight, before)


def test_swapping_changes_no_buffer_and_no_random_state():
    class Counting(Inverted):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = x
            return super().forward(x)

    model = nn.Sequential(Counting(), Inverted())
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    report = perfvl.swap(model)
    assert [name for name, _ in report.replaced] == ["1"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].seen is None
    assert torch.equal(torch.get_rng_state(), random)


def test_training_mode_frozen_norms_and_gradients_choose_what_runs(monkeypatch):
    model = nn.Sequential(varied(pure()), varied(Inverted()))
    expected = copy.deepcopy(model)
    perfvl.swap(model)
    both, first = ["FusedSequential", "FusedInverted"], ["FusedSequential"]
    x = image()

    def names() -> list[str]:
        return ran(monkeypatch, model, x)

    same(model, expected)
    assert names() == first
    model.eval()
    assert names() == first  # with gradients
    with torch.no_grad():
        assert names() == both
    model.requires_grad_(False)
    assert names() == both
    model[1].bn.train()
    assert names() == first
    expected.load_state_dict(model.state_dict())
    for network in (model.requires_grad_(True), expected):
        network.train()
        for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.eval()
    assert names() == first
    close(model(x), expected(x), 1e-5)


def test_without_a_kernel_modules_run_their_own_layers(monkeypatch):
    model = nn.Sequential(varied(pure()), varied(Inverted())).eval()
    perfvl.swap(model)
    with torch.no_grad():
        assert len(ran(monkeypatch, model, image())) == 2
        assert ran(monkeypatch, model.double(), image().double()) == [] or backends.CPU_MISSING
        with perfvl.use_backend("reference"):
            assert len(ran(monkeypatch, model, image().double())) == 2
        monkeypatch.setattr(backends, "choose", lambda *_, **__: "reference")
        monkeypatch.setattr(backends, "CPU_MISSING", None)
        assert ran(monkeypatch, model.float(), image()) == []


def test_other_arguments_reach_the_modules_own_forward(monkeypatch):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.pointwise = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)

        def forward(self, pixels: Tensor, double: bool = False) -> Tensor:
            y = self.pointwise(self.depthwise(pixels))
            return y * 2 if double else y

    model = Named()
    expected = copy.deepcopy(model)
    assert len(perfvl.swap(model)) == 1
    x = image()
    assert ran(monkeypatch, model, x) == ["FusedNamed"]
    for call in (lambda m: m(pixels=x), lambda m: m(x, double=True), lambda m: m(x, True), lambda m: m(x[0])):
        close(call(model), call(expected), 1e-5)
    assert model(x[0]).shape == (2, 5, 7)


def test_a_first_activation_in_place_still_writes_the_input():
    model = nn.Sequential(varied(pure(nn.ReLU(inplace=True)))).eval()
    expected = copy.deepcopy(model)
    report = perfvl.swap(model)
    assert report.replaced[0][1].startswith("depthwise")
    x, y = image(), image()
    with torch.no_grad():
        close(model(x), expected(y), 1e-5)
    assert torch.equal(x, y)
    assert x.min() == 0
    report = perfvl.swap(nn.Sequential(pure(nn.ReLU())))
    assert report.replaced[0][1].startswith("relu > depthwise")


HOOKS = [
    lambda module, hook: module.register_forward_hook(hook),
    lambda module, hook: module.register_forward_pre_hook(hook),
    lambda module, hook: module.register_full_backward_hook(hook),
    lambda module, hook: module.register_full_backward_pre_hook(hook),
]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("name", ["expand", "conv_dw", "bn", "act", "between", "conv_pw", "bn2"])
def test_hooks_that_come_later_fire(monkeypatch, register, name):
    model = nn.Sequential(varied(Inverted()))
    perfvl.swap(model)
    calls: list[str] = []

    def hook(module: nn.Module, *_: object) -> None:
        calls.append(type(module).__name__)

    handle = register(model[0].get_submodule(name), hook)
    model[0].act.inplace = model[0].expand[2].inplace = False  # backward hooks do not bear what writes in place
    model.eval()
    y = model(image().requires_grad_())
    y.sum().backward()
    assert calls
    with torch.no_grad():
        assert ran(monkeypatch, model, image()) == []
        handle.remove()
        assert ran(monkeypatch, model, image()) == ["FusedInverted"]


def test_hooks_on_the_replaced_module_and_everywhere_fire(monkeypatch):
    model = nn.Sequential(varied(Inverted())).eval()
    perfvl.swap(model)
    calls: list[str] = []
    model[0].register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    with torch.no_grad():
        assert ran(monkeypatch, model, image()) == ["FusedInverted"]
        assert calls == ["FusedInverted"]
        calls.clear()
        everywhere = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m).__name__))
        try:
            model(image())
        finally:
            everywhere.remove()
    assert calls.count("Conv2d") == 3


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def strided_pointwise(block: Inverted) -> None:
    block.conv_pw = nn.Conv2d(8, 4, 1, padding=1, bias=False)


REFUSALS = {
    "forward hook": (lambda b: b.conv_dw.register_forward_hook(print), "it has hooks"),
    "pre-hook of the pointwise": (
        lambda b: b.conv_pw.register_forward_pre_hook(print),
        "0.conv_pw (Conv2d) follows it: it has hooks",
    ),
    "backward hook of the norm": (
        lambda b: b.bn.register_full_backward_hook(print),
        "0.bn (BatchNorm2d) follows it: it has hooks",
    ),
    "replaced forward": (lambda b: setattr(b.conv_dw, "forward", lambda x: x), "its forward was replaced"),
    "weight_norm": (
        lambda b: parametrizations.weight_norm(b.conv_dw),
        "parametrized (weight_norm, spectral_norm, ...)",
    ),
    "spectral_norm": (
        lambda b: parametrizations.spectral_norm(b.conv_pw),
        "0.conv_pw (ParametrizedConv2d) follows it: parametrized (weight_norm, spectral_norm, ...)",
    ),
    "old spectral_norm": (
        lambda b: nn.utils.spectral_norm(b.conv_dw),
        "its weight is computed by a hook (weight_norm, spectral_norm, pruning)",
    ),
    "subclass": (
        lambda b: setattr(b, "conv_dw", Doubling(8, 8, 3, padding=1, groups=8)),
        "a subclass of Conv2d that perfvl does not know",
    ),
    "subclass of BatchNorm2d": (
        lambda b: setattr(b, "bn", type("Other", (nn.BatchNorm2d,), {})(8)),
        "0.bn (Other) follows it: a batch norm that perfvl does not know",
    ),
    "SyncBatchNorm": (
        lambda b: setattr(b, "bn", nn.SyncBatchNorm(8)),
        "0.bn (SyncBatchNorm) follows it: its statistics are those of all processes",
    ),
    "padding_mode": (
        lambda b: setattr(b, "conv_dw", nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect")),
        "padding_mode is reflect",
    ),
    "padded pointwise": (
        strided_pointwise,
        "0.conv_pw (Conv2d) follows it: a 1x1 convolution with groups, stride or padding",
    ),
    "grouped pointwise": (
        lambda b: setattr(b, "conv_pw", nn.Conv2d(8, 4, 1, groups=2)),
        "0.conv_pw (Conv2d) follows it: a 1x1 convolution with groups, stride or padding",
    ),
    "wide second convolution": (
        lambda b: setattr(b, "conv_pw", nn.Conv2d(8, 4, 3, padding=1)),
        "Conv2d reads it, not a pointwise convolution",
    ),
    "dtype": (
        lambda b: b.conv_pw.to(torch.bfloat16),
        "its dtype is torch.float32, that of the pointwise convolution torch.bfloat16",
    ),
    "device": (
        lambda b: b.conv_pw.to("meta"),
        "its device is cpu, that of the pointwise convolution meta",
    ),
    "scripted": (
        lambda b: setattr(b, "conv_pw", torch.jit.script(b.conv_pw)),
        "0.conv_pw (RecursiveScriptModule) follows it: scripted or traced",
    ),
    "unknown activation": (
        lambda b: setattr(b, "act", nn.GELU()),
        "GELU reads it, not a pointwise convolution",
    ),
    "slope": (
        lambda b: setattr(b, "act", nn.LeakyReLU(0.2)),
        "0.act (LeakyReLU) follows it: its slope is not 0.01",
    ),
    "anti-aliasing": (
        lambda b: setattr(b, "aa", nn.AvgPool2d(2)) or setattr(b, "between", b.aa),
        "AvgPool2d reads it, not a pointwise convolution",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("change", "why"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(change, why):
    model = nn.Sequential(Inverted())
    change(model[0])
    report = perfvl.swap(model)
    assert not report
    assert dict(report.skipped)["0.conv_dw"] == why
    assert not any(isinstance(module, FusedForward) for module in model.modules())


def test_old_weight_norm_is_refused():
    model = pure()
    with pytest.warns(FutureWarning):
        weight_norm(model[4])
    report = perfvl.swap(model)
    assert report.replaced == [("", "depthwise 3x3 > pointwise > norm > relu")]
    assert report.skipped == [("4", "its weight is computed by a hook (weight_norm, spectral_norm, pruning)")]


def test_shared_layers_are_refused():
    first, second = Inverted(), Inverted()
    second.conv_dw = first.conv_dw
    report = perfvl.swap(nn.Sequential(first, second))
    assert report.skipped == [("0.conv_dw", "shared: it stands in more than one place")]
    block = Inverted()
    report = perfvl.swap(nn.Sequential(block, block))
    assert not report
    assert report.skipped == [("0.conv_dw", "shared: it stands in more than one place")]


def test_layers_whose_output_others_read_are_refused():
    class Twice(Inverted):
        def forward(self, x: Tensor) -> Tensor:
            u = self.conv_dw(self.expand(x))
            return self.bn2(self.conv_pw(self.act(self.bn(u)))) + u.mean()

    class Depends(Inverted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    class Changes(Inverted):
        def forward(self, x: Tensor) -> Tensor:
            y = self.expand(x)
            if self.training:
                y = self.act(y)
            return self.bn2(self.conv_pw(self.act(self.bn(self.conv_dw(y)))))

    report = perfvl.swap(nn.Sequential(Twice(), Depends(), Changes()))
    assert not report
    assert [why.partition(": ")[2] for _, why in report.skipped] == [
        "it is no chain of layers (conv_dw is read twice)",
        "it cannot be traced (TraceError)",
        "it does another thing in training",
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_models_and_those_of_perfvl_stay():
    model = nn.Sequential(torch.jit.script(pure()), perfvl.nn.SeparableConv2d(4, 4, padding=1))
    report = perfvl.swap(model)
    assert not report
    assert report.skipped == [("0", "scripted or traced")]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "use_residual", False),
        lambda b: setattr(b, "between", nn.Dropout(0.5)),
        lambda b: b.between.append(nn.Tanh()),
        lambda b: setattr(b, "bn", nn.Identity()),
        lambda b: parametrizations.weight_norm(b.conv_dw),
        lambda b: setattr(b, "conv_pw", Doubling(8, 4, 1)),
        lambda b: b.add_module("more", nn.ReLU()),
    ],
)
def test_what_changes_after_swap_is_seen(monkeypatch, change):
    block = varied(Inverted()).eval()
    perfvl.swap(block)
    torch.manual_seed(0)
    change(block)
    block.eval()
    expected = copy.deepcopy(block)
    expected.__class__ = Inverted
    with torch.no_grad():
        assert ran(monkeypatch, block, image()) == []
        assert torch.equal(block(image()), expected(image()))


def test_new_values_are_seen():
    model = nn.Sequential(varied(pure()), varied(Inverted())).eval()
    expected = copy.deepcopy(model)
    perfvl.swap(model)
    predict(model, image())
    for changed in (model, expected):
        changed[1].bn.running_mean.add_(0.5)
        changed[1].conv_dw.weight.data.mul_(1.5)
        changed[1].act = nn.ReLU6()
        changed[1].conv_dw.stride = changed[0][0].stride = (2, 2)
        changed[1].use_residual = False
    close(predict(model, image()), predict(expected, image()), 1e-5)


def test_copies_and_pickles_stay_fused_and_independent(monkeypatch):
    model = nn.Sequential(varied(pure()), varied(Inverted()))
    original = copy.deepcopy(model)
    perfvl.swap(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        pickle.loads(pickle.dumps(copy.deepcopy(model))),
    ):
        assert type(copied[1]) is type(model[1])
        assert isinstance(copied[1], Inverted)
        with torch.no_grad():
            assert len(ran(monkeypatch, copied.eval(), image())) == 2
            copied[1].conv_dw.weight.zero_()
        assert not torch.equal(predict(copied, image()), predict(model, image()))
    same(model, original)


# Of the three convolutions below; without the library their definition is in the graph.
FUSED = [] if backends.CPU_MISSING else ["perfvl.separable_conv.default"] * 3


def graphs_of(model: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    """What the compiled model returns, and the perfvl ops in its graphs."""
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        ops.extend(str(node.target) for node in graph.graph.nodes if "perfvl" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        return compiled(x), ops


def test_swapped_models_compile_to_one_graph():
    model = nn.Sequential(varied(pure()), varied(Inverted())).eval()
    expected = predict(model, image())
    perfvl.swap(model)
    got, ops = graphs_of(model, image())
    close(got, expected, 1e-5)
    assert ops == FUSED


def test_compiled_models_are_swapped_and_compiled_anew():
    model = nn.Sequential(varied(pure()), varied(Inverted())).eval()
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        ops.extend(str(node.target) for node in graph.graph.nodes if "perfvl" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = compiled(image())
        assert not ops
        report = perfvl.swap(compiled)
        assert [name for name, _ in report.replaced] == ["0", "1"]
        close(compiled(image()), expected, 1e-5)
        assert ops == FUSED
        report.undo()
        ops.clear()
        close(compiled(image()), expected, 1e-6)
        assert not ops


def test_compiled_training_step_is_that_of_the_model():
    model = nn.Sequential(varied(pure()), varied(Inverted()))
    expected = copy.deepcopy(model)
    perfvl.swap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    got, want = step(compiled, image()), step(expected, image())
    for name in want:
        key = name if name in got else f"_orig_mod.{name}"
        close(got[key], want[name], 1e-4, name)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_distributed_data_parallel(process_group, when):
    model = nn.Sequential(varied(pure()), varied(Inverted()))
    expected = copy.deepcopy(model)
    if when == "before":
        perfvl.swap(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    if when == "after":
        assert [name for name, _ in perfvl.swap(parallel).replaced] == ["0", "1"]
    got, want = step(parallel, image()), step(expected, image())
    for name in want:
        key = name if name in got else f"module.{name}"
        close(got[key], want[name], 1e-4, name)


def test_autocast_gives_the_dtypes_of_the_model():
    model = nn.Sequential(varied(pure()), varied(Inverted())).eval()
    expected = copy.deepcopy(model)
    perfvl.swap(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = predict(model, image()), predict(expected, image())
    assert got.dtype == want.dtype
    close(got.float(), want.float(), 2e-2)


def test_the_module_and_the_function_share_a_name():
    module = importlib.import_module("perfvl.swap")
    assert doctest.testmod(module).failed == 0
    assert module.swap is perfvl.swap

    assert callable(perfvl.swap)
    assert isinstance(perfvl.swap(nn.ReLU()), perfvl.SwapReport)
