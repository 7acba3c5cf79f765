"""The contract every op keeps. Adding an op means adding its entry in tests/contracts, nothing here."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from contracts import CONTRACTS
from op_contract import (
    DEVICES,
    OpContract,
    as_double,
    assert_accurate,
    differentiable,
    evaluate,
    fresh,
    mutations,
    outputs_of,
    twin,
    upstream_like,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import perfvl
from perfvl import backends

pytestmark = [
    pytest.mark.parametrize("op", CONTRACTS, ids=lambda op: op.name),
    pytest.mark.parametrize("device", DEVICES),
]
ISA_LEVELS = ["reference"] if backends.CPU_MISSING else list(torch.ops.perfvl._isa_levels())


@pytest.fixture
def isa_level(request):
    """Runs the CPU kernels of one instruction-set level."""
    if request.param == "reference":
        yield request.param
        return
    before = torch.ops.perfvl._isa()
    torch.ops.perfvl._set_isa(request.param)
    yield request.param
    torch.ops.perfvl._set_isa(before)


@pytest.fixture
def differentiable_op(op):
    if not differentiable(op.small("cpu")):
        pytest.skip("has no gradients")
    return op


def has_kernels(op: OpContract, device: str) -> bool:
    return backends.choose(torch.empty(0, device=device), cuda=op.cuda) != "reference"


def calls_of_raw_op(op: OpContract, run):
    """How often `run` reached the op's kernels: a right answer from the wrong backend does not count."""
    count = 0

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += func is op.raw_op
            return func(*args, **(kwargs or {}))

    with Counter():
        run()
    return count


@pytest.mark.parametrize("isa_level", ISA_LEVELS, indirect=True)
def test_every_sample_is_as_accurate_as_plain_pytorch(op, device, isa_level):
    if device == "cuda" and isa_level != ISA_LEVELS[0]:
        pytest.skip("ISA levels are a CPU matter")
    failures = []
    for sample in op.samples(device):
        truth = evaluate(sample.rival, as_double(sample.inputs))
        rival = evaluate(sample.rival, sample.inputs)
        got = evaluate(op.function, sample.inputs)
        assert list(got) == list(truth), sample.name
        for what, value in got.items():
            try:
                assert_accurate(f"{sample.name}: {what}", value, truth[what], rival[what], sample.slack)
            except AssertionError as problem:
                failures.append(str(problem))
    assert not failures, "\n".join(failures)


def test_the_reference_means_the_same(op, device):
    for sample in op.samples(device):
        truth = evaluate(sample.rival, as_double(sample.inputs))
        with perfvl.use_backend("reference"):
            for what, value in evaluate(op.function, as_double(sample.inputs)).items():
                assert_accurate(f"{sample.name}: {what}", value, truth[what], truth[what], 1e-12)


def test_accuracy_check_rejects_wrong_answers(op, device):
    sample = op.samples(device)[4]
    truth, rival = evaluate(sample.rival, as_double(sample.inputs)), evaluate(sample.rival, sample.inputs)
    for what, value in truth.items():
        if not value.is_floating_point() or value.norm() == 0:
            continue
        for wrong in mutations(value).values():
            if torch.equal(wrong, value):  # such as the last row dropped, where it is 0
                continue
            with pytest.raises(AssertionError):
                assert_accurate(what, wrong, value, rival[what], sample.slack)


def test_kernels_run_and_reference_does_not(op, device):
    if not has_kernels(op, device):
        pytest.skip("no kernels here")
    inputs = op.small(device)
    assert calls_of_raw_op(op, lambda: op.function(**inputs)) == 1
    with perfvl.use_backend("reference"):
        assert calls_of_raw_op(op, lambda: op.function(**inputs)) == 0


def test_opcheck(op, device):
    for arguments in op.raw_samples(device):
        torch.library.opcheck(op.raw_op, arguments)


def test_same_inputs_give_same_bits(op, device):
    for sample in op.samples(device):
        first, second = evaluate(op.function, sample.inputs), evaluate(op.function, sample.inputs)
        for what, value in first.items():
            assert torch.equal(value, second[what]), f"{sample.name}: {what}"


def test_a_call_on_cuda_is_traced_to_its_kernels_without_a_gpu(op, device, monkeypatch):
    if device == "cuda":
        pytest.skip("the next tests trace it, and run it")
    if op.name == "enqueue_" and not torch.version.cuda:
        pytest.skip("a CPU build of torch cannot index a fake CUDA tensor")
    monkeypatch.setattr(backends, "_reason", lambda cuda, device_index: None)
    torch._dynamo.reset()
    found = []

    def backend(graph, _):
        found.extend(node.target for node in graph.graph.nodes)
        return graph

    inputs = op.small("cpu")
    with FakeTensorMode():
        inputs = tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"), inputs
        )
        torch.compile(op.call, fullgraph=True, backend=backend)(**inputs)
    assert op.raw_op in found


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_whole_without_recompiling(op, device, dynamic):
    torch._dynamo.reset()
    inputs = op.small(device)
    expected = evaluate(op.function, inputs)
    compiled = op.pure(torch.compile(op.call, fullgraph=True, dynamic=dynamic, backend="aot_eager"))
    evaluate(compiled, inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = evaluate(compiled, inputs)
        if dynamic:
            evaluate(compiled, op.resize(inputs))
    for what, value in expected.items():
        torch.testing.assert_close(got[what], value)


def test_inductor_gives_the_same(op, device):
    torch._dynamo.reset()
    inputs = op.small(device)
    got, expected = evaluate(op.pure(torch.compile(op.call, fullgraph=True)), inputs), evaluate(op.function, inputs)
    for what, value in expected.items():
        torch.testing.assert_close(got[what], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_gradient_dtypes_and_nests(op, device, dtype):
    inputs = op.small(device)
    exact = evaluate(op.function, inputs)
    with torch.autocast(device, dtype=dtype):
        rounded = evaluate(op.function, inputs)
        with torch.autocast(device, enabled=False):
            off = evaluate(op.function, inputs)
    for what, value in exact.items():
        assert rounded[what].dtype == (dtype if op.autocast_output and what.startswith("output") else value.dtype), what
        assert torch.equal(off[what], value), what
        if value.is_floating_point():
            torch.testing.assert_close(rounded[what], value, rtol=5e-2, atol=5e-2, check_dtype=False)


def test_nothing_to_do_is_done_right(op, device):
    inputs = op.empty(op.small(device))
    with perfvl.use_backend("reference"):
        expected = evaluate(op.function, inputs)
    for what, value in evaluate(op.function, inputs).items():
        torch.testing.assert_close(value, expected[what], rtol=1e-6, atol=1e-6, msg=lambda m, what=what: f"{what}: {m}")
        assert not value.is_floating_point() or not value.isnan().any(), what


@pytest.mark.parametrize("kind", ["sum", "mean", "broadcast", "sliced", "transposed"])
def test_upstream_gradients_of_any_layout(op, differentiable_op, device, kind):
    inputs = op.small(device) | op.per_row

    def upstream(output: Tensor) -> Tensor:
        n = output.numel()
        return {
            "sum": lambda: torch.ones((), device=device).expand(n),
            "mean": lambda: torch.full((n,), 1 / n, device=device),
            "broadcast": lambda: torch.tensor([0.7], device=device).expand(n),
            "sliced": lambda: torch.randn(2 * n, device=device)[::2],
            "transposed": lambda: torch.randn(n, 3, device=device).T[1],
        }[kind]().reshape(output.shape)

    outputs = [o for o in outputs_of(op.function(**fresh(inputs))) if o.requires_grad]
    ups = [upstream(o) for o in outputs]
    got = evaluate(op.function, inputs, ups)
    with perfvl.use_backend("reference"):
        expected = evaluate(op.function, inputs, [u.contiguous() for u in ups])
    for what, value in expected.items():
        torch.testing.assert_close(got[what], value, rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")


def test_each_output_alone(op, differentiable_op, device):
    inputs = op.small(device)
    count = len([o for o in outputs_of(op.function(**fresh(inputs))) if o.requires_grad])
    for index in range(count):
        grads = []
        for backend in ("auto", "reference"):
            with perfvl.use_backend(backend):
                run = fresh(inputs)
                output = [o for o in outputs_of(op.function(**run)) if o.requires_grad][index]
                output.sum().backward()
                grads.append([run[k].grad for k in differentiable(run)])
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_any_subset_of_inputs_may_want_gradients(op, differentiable_op, device):
    inputs = op.small(device)
    full = evaluate(op.function, inputs)
    names = differentiable(inputs)
    for size in range(len(names) + 1):
        for chosen in itertools.combinations(names, size):
            run = {k: v.detach().requires_grad_(k in chosen) if k in names else v for k, v in inputs.items()}
            got = evaluate(op.function, run)
            assert {k for k in got if k.startswith("gradient")} == {f"gradient of {k}" for k in chosen}
            for what, value in got.items():
                torch.testing.assert_close(value, full[what], rtol=1e-5, atol=1e-6)


def test_gradcheck_in_float64(op, differentiable_op, device):
    if device != "cpu":
        pytest.skip("the float64 path is plain PyTorch everywhere")
    inputs = op.double()
    names = differentiable(inputs)

    def run(*values):
        outputs = outputs_of(op.function(**(inputs | dict(zip(names, values, strict=True)))))
        return tuple(o for o in outputs if o.requires_grad)

    assert torch.autograd.gradcheck(run, [inputs[n] for n in names])
    assert torch.autograd.gradgradcheck(run, [inputs[n] for n in names])


def test_second_derivative_is_refused(op, differentiable_op, device):
    if not has_kernels(op, device):
        pytest.skip("the reference has second derivatives")
    inputs = fresh(op.small(device))
    wanted = [inputs[k] for k in differentiable(inputs)]
    loss = sum(o.sum() for o in outputs_of(op.function(**inputs)) if o.requires_grad)
    grads = torch.autograd.grad(loss, wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients are not supported"):
        (loss + sum(g.square().sum() for g in grads)).backward()


def test_nothing_is_written_but_what_the_schema_says(op, device):
    inputs = op.small(device)
    before = {k: [(t, t.detach().clone(), t._version) for t in tensors_of(v)] for k, v in inputs.items()}
    op.call(**inputs)
    for name, tensors in before.items():
        for tensor, value, version in tensors:
            changed = name in op.mutates
            assert (tensor._version > version) == changed, name
            assert torch.equal(tensor, value) != changed, name


def tensors_of(value) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def test_bad_input_is_named_and_nothing_modified(op, device):
    if device != "cpu":
        pytest.skip("checks read no device data")
    for bad in op.bad_inputs:
        inputs = op.small(device) | dict(bad.change)
        tensors = [t for t in tensors_of(inputs) if t.device.type == "cpu" and t.layout == torch.strided]
        before = [t.detach().clone() for t in tensors]
        with pytest.raises(bad.error, match=bad.message):
            op.call(**inputs)
        for tensor, value in zip(tensors, before, strict=True):
            assert torch.equal(tensor, value), f"{bad.name}: a tensor was modified"


def test_unknown_keyword_is_refused(op, device):
    with pytest.raises(TypeError, match="tau"):
        op.call(**op.small(device), tau=1)


def test_saved_bytes_do_not_grow(op, differentiable_op, device):
    if not has_kernels(op, device):
        pytest.skip("plain PyTorch saves what it saves")
    for grow in (lambda inputs: inputs, op.grow):
        storages: dict[int, int] = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        inputs = grow(op.small(device))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs_of(op.function(**inputs))[0]
        assert 0 < sum(storages.values()) <= op.saved_bytes(inputs)


def test_no_grad_and_inference_mode(op, device):
    inputs = op.small(device)
    expected = evaluate(op.function, inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for i, output in enumerate(outputs_of(op.function(**inputs))):
                assert not output.requires_grad
                assert torch.equal(output, expected[f"output {i}"])


def test_backward_twice_with_retained_graph(op, differentiable_op, device):
    inputs = fresh(op.small(device))
    wanted = [inputs[k] for k in differentiable(inputs)]
    outputs = [o for o in outputs_of(op.function(**inputs)) if o.requires_grad]
    ups = [u.to(o) for u, o in zip(upstream_like(outputs), outputs, strict=True)]
    first = torch.autograd.grad(outputs, wanted, ups, retain_graph=True)
    second = torch.autograd.grad(outputs, wanted, [2 * u for u in ups])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, 2 * a)


def test_modules_survive_copies_and_checkpoints(op, device):
    inputs = op.small(device)
    for module in op.modules():
        module.to(device)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        loaded = copy.deepcopy(module)
        with torch.no_grad():
            for value in loaded.state_dict().values():
                value.fill_(0.9)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        others = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded
        expected = op.call_module(module, inputs)  # last: it may move the module's own state
        for other in others:
            assert torch.equal(op.call_module(other, inputs), expected), module


def test_no_host_sync(op, device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    inputs = op.small(device)
    evaluate(op.function, inputs)  # compiles the kernels
    run = fresh(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graded = [o for o in outputs_of(op.function(**run)) if o.requires_grad]
        if graded:
            sum(o.sum() for o in graded).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_on_new_data(op, device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    inputs = tree_map_only(Tensor, Tensor.detach, op.small(device))
    op.call(**tree_map_only(Tensor, twin, inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op.call(**inputs)
    for value in tensors_of(inputs):
        if value.is_floating_point():
            value.mul_(0.9)
    expected = outputs_of(op.function(**inputs))  # of the inputs before the replay writes to any of them
    graph.replay()
    captured = tree_leaves([inputs[name] for name in op.mutates]) if op.mutates else outputs_of(outputs)
    for ours, theirs in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
