"""Known answers of the momentum update, and what MomentumEncoder promises around it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import perfvl
import perfvl.functional as pf
from perfvl import backends
from perfvl.nn import MomentumEncoder

needs_kernels = pytest.mark.skipif(backends.CPU_MISSING is not None, reason="no CPU kernels")


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with perfvl.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("m", [0.0, 0.9, 0.99, 0.995, 1.0])
def test_a_constant_source_is_approached_as_m_to_the_n(backend, m):
    source, start = torch.randn(300), torch.randn(300)
    target = start.clone()
    for n in range(1, 31):
        pf.momentum_update_([target], [source], m)
        expected = source.double() + m**n * (start.double() - source.double())
        assert (target - expected).abs().max() < 3e-7 * n
    assert m not in (0.0, 1.0) or torch.equal(target, source if m == 0 else start)


def test_half_of_the_distance_is_left_after_the_half_life(backend):
    # ln 2 / -ln 0.99 = 69 steps: reversed or shifted momentum gives another number.
    target = torch.zeros(1)
    for _ in range(round(math.log(2) / -math.log(0.99))):
        pf.momentum_update_([target], [torch.ones(1)], 0.99)
    assert target.item() == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("m", [0.3, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_tensors_do_not_drift(backend, m, dtype):
    frozen = torch.randn(1000).to(dtype)
    average = frozen.clone()
    for _ in range(100):
        pf.momentum_update_([average], [frozen], m)
    assert torch.equal(average, frozen)


def test_a_float32_average_of_a_bfloat16_model_moves_where_a_bfloat16_average_stalls(backend):
    source, wide, narrow = torch.tensor([1.5]).bfloat16(), torch.ones(1), torch.ones(1).bfloat16()
    for _ in range(1000):
        pf.momentum_update_([wide, narrow], [source, source], 0.999)
    assert wide.item() == pytest.approx(1.5 - 0.5 * 0.999**1000, rel=1e-5)  # 1.316
    assert narrow.item() == 1.0


@pytest.mark.parametrize("m", [0.9, 0.999, 1 / 3])
@pytest.mark.parametrize(("target", "source"), [("float32",) * 2, ("bfloat16",) * 2, ("float16",) * 2,
                                                ("float32", "bfloat16"), ("bfloat16", "float32")])  # fmt: skip
def test_the_strict_form_is_bit_equal_to_the_code_of_moco(backend, m, target, source):
    t, s = torch.randn(10_007).to(getattr(torch, target)), torch.randn(10_007).to(getattr(torch, source))
    expected = (t.data * m + s.data * (1.0 - m)).to(t.dtype)
    pf.momentum_update_([t], [s], m, strict="moco")
    assert torch.equal(t, expected)


def test_the_interpolation_differs_from_the_convex_form_in_rounding_alone(backend):
    t, s = torch.randn(2, 10_000)
    convex = t * 0.99 + s * 0.01
    pf.momentum_update_([t], [s], 0.99)
    assert not torch.equal(t, convex)
    torch.testing.assert_close(t, convex, rtol=3e-7, atol=3e-7)


def test_tied_tensors_are_updated_once(backend):
    tied, source, other = torch.zeros(5), torch.ones(5), torch.zeros(3)
    pf.momentum_update_([tied, other, tied], [source, torch.ones(3), source], 0.75)
    assert torch.equal(tied, torch.full((5,), 0.25))
    assert torch.equal(other, torch.full((3,), 0.25))


def test_views_of_one_buffer_that_do_not_overlap_are_updated(backend):
    flat = torch.zeros(10)
    matrix = torch.zeros(4, 6)
    pf.momentum_update_(
        [flat[:5], flat[5:], matrix[:, :3], matrix[:, 3:]],
        [torch.ones(5), torch.ones(5), torch.ones(4, 3), torch.ones(4, 3)],
        0.5,
    )
    assert torch.equal(flat, torch.full((10,), 0.5))
    assert torch.equal(matrix, torch.full((4, 6), 0.5))


@needs_kernels
def test_a_list_found_in_order_is_checked_again_when_its_memory_moves():
    # The kernel remembers lists it has checked by their addresses: other lists must not pass as one of these.
    flat, sources = torch.zeros(8), [torch.ones(4), torch.full((4,), 2.0)]
    for _ in range(2):
        pf.momentum_update_([flat[:4], flat[4:]], sources, 0.5)
    with pytest.raises(ValueError, match="share memory"):
        pf.momentum_update_([flat[:4], flat[2:6]], sources, 0.5)
    assert torch.equal(flat, torch.tensor([0.75] * 4 + [1.5] * 4))


def test_gradients_are_not_recorded_and_a_saved_target_is_noticed(backend):
    target, source = torch.randn(4), torch.randn(4, requires_grad=True)
    x = torch.randn(4, requires_grad=True)
    loss = (x * target).sum()
    pf.momentum_update_([target], [source], 0.9)
    assert not target.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_sum_of_all_threads_is_the_result_of_one():
    targets = [torch.randn(n) for n in (70_001, 3, 400_000, 1, 123_457)]
    sources = [torch.randn_like(t) for t in targets]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        got = [t.clone() for t in targets]
        pf.momentum_update_(got, sources, 0.99)
        results.append(got)
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# MomentumEncoder --------------------------------------------------------------------------------------------------


def model(**kwargs) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).to(**kwargs)


def images() -> Tensor:
    return torch.randn(8, 3, 3, 3)


def train(online: nn.Module) -> None:
    """One step of a kind: every parameter moves, the statistics too."""
    online(images().to(next(online.parameters()).dtype))
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_copy_starts_equal_without_gradients_and_follows():
    online = model()
    slow = MomentumEncoder(online, 0.75)
    before = copy.deepcopy(online.state_dict())
    assert all(torch.equal(v, online.state_dict()[k]) for k, v in slow.module.state_dict().items())
    assert not any(p.requires_grad for p in slow.parameters())
    train(online)
    slow.update()
    for name, parameter in online.named_parameters():
        torch.testing.assert_close(slow.module.get_parameter(name), 0.75 * before[name] + 0.25 * parameter)


@pytest.mark.parametrize("buffers", ["copy", "average", "skip"])
def test_buffers_are_copied_averaged_or_left_alone(buffers):
    online = model()
    slow = MomentumEncoder(online, 0.75, buffers=buffers)
    before = slow.module[1].running_mean.clone()
    train(online)
    slow.update()
    new, got = online[1].running_mean, slow.module[1].running_mean
    torch.testing.assert_close(got, {"copy": new, "average": 0.75 * before + 0.25 * new, "skip": before}[buffers])
    assert slow.module[1].num_batches_tracked == (0 if buffers == "skip" else 1)


def test_calls_run_the_copy_without_gradients_and_leave_the_module_alone():
    online = model()
    slow = MomentumEncoder(online, 0.9)
    assert not slow(images()).requires_grad
    assert online[1].num_batches_tracked == 0
    assert slow.module[1].num_batches_tracked == 1


def test_the_module_itself_is_not_in_the_state_dict_nor_among_the_parameters():
    online = model()
    slow = MomentumEncoder(online, 0.9, compute_dtype=torch.bfloat16)
    assert {k.removeprefix("module.") for k in slow.state_dict()} == {*online.state_dict(), "_extra_state"}
    assert len(list(slow.parameters())) == len(list(online.parameters()))


def test_schedules_count_updates_and_resume():
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return min(0.999, (1 + step) / (10 + step))

    online = model()
    slow = MomentumEncoder(online, schedule)
    for _ in range(3):
        slow.update()
    resumed = MomentumEncoder(online, schedule)
    resumed.load_state_dict(slow.state_dict())
    resumed.update()
    assert seen == [0, 1, 2, 3]


def test_momentum_may_be_a_tensor_that_changes():
    online = model()
    momentum = torch.tensor(1.0)
    slow = MomentumEncoder(online, momentum)
    before = slow.module[3].weight.clone()
    train(online)
    slow.update()
    assert torch.equal(slow.module[3].weight, before)
    momentum.fill_(0.0)
    slow.update()
    assert torch.equal(slow.module[3].weight, online[3].weight)


def test_every_n_steps_and_a_start_that_copies():
    online = model()
    slow = MomentumEncoder(online, 0.5, every_n_steps=2, update_after_step=3)
    follows = []
    for _ in range(6):
        train(online)
        before = slow.module[3].weight.clone()
        slow.update()
        now = slow.module[3].weight
        follows.append("stays" if torch.equal(now, before) else "copy" if torch.equal(now, online[3].weight) else "mix")
    assert follows == ["copy", "stays", "copy", "stays", "mix", "stays"]


def test_a_bfloat16_model_gets_a_float32_average_and_a_bfloat16_copy_to_run():
    online = model(dtype=torch.bfloat16)
    slow = MomentumEncoder(online, 0.999, dtype=torch.float32, compute_dtype=torch.bfloat16)
    start = slow.module[3].weight.clone()
    train(online)
    slow.update()
    for name, buffer in slow.module.named_buffers():  # of this very update, not of the one before
        assert torch.equal(slow.compute_module.get_buffer(name), buffer.to(slow.compute_module.get_buffer(name).dtype))
    for _ in range(9):
        slow.update()
    weight, moved = slow.module[3].weight, online[3].weight.float()
    torch.testing.assert_close(weight, moved + 0.999**10 * (start - moved))
    assert torch.equal(slow.compute_module[3].weight, weight.bfloat16())
    assert slow.compute_module[1].num_batches_tracked == 1
    assert slow(images().bfloat16()).dtype == torch.bfloat16
    assert slow.eval().compute_module.training is False
    fresh = MomentumEncoder(online, 0.999, dtype=torch.float32, compute_dtype=torch.bfloat16)
    fresh.load_state_dict(slow.state_dict())
    assert torch.equal(fresh.compute_module[3].weight, weight.bfloat16())
    assert fresh.double().compute_module[3].weight.dtype == torch.bfloat16


def test_names_pair_through_wrappers():
    online = model()
    slow = MomentumEncoder(online, 0.5)

    class Wrapper(nn.Module):
        def __init__(self, name: str, inner: nn.Module) -> None:
            super().__init__()
            self.add_module(name, inner)

    for wrapped in (
        Wrapper("module", online),
        Wrapper("_orig_mod", online),
        Wrapper("_fsdp_wrapped_module", Wrapper("module", online)),
        nn.Sequential(*(Wrapper("_orig_mod", part) for part in online)),
    ):
        slow._online, slow._plan = (wrapped,), None
        train(online)
        expected = 0.5 * slow.module[3].weight + 0.5 * online[3].weight
        slow.update()
        torch.testing.assert_close(slow.module[3].weight, expected)


def test_a_compiled_module_stays_paired():
    online = model()
    compiled = torch.compile(online, backend="eager")
    slow = MomentumEncoder(compiled, 0.0)
    train(online)
    slow.update()
    assert torch.equal(slow.module.get_parameter("_orig_mod.3.weight"), online[3].weight)


def test_a_name_without_partner_is_an_error_and_nothing_moves():
    online = model()
    slow = MomentumEncoder(online, 0.5)
    train(online)
    before = copy.deepcopy(slow.module.state_dict())
    online.add_module("extra", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`parameters` got no partner for extra.weight, extra.bias, expected the mom"):
        slow.update()
    del online.extra, online[0]
    with pytest.raises(ValueError, match=r"no partner for .*, expected"):
        slow.update()
    assert all(torch.equal(v, slow.module.state_dict()[k]) for k, v in before.items())


def test_another_shape_is_an_error_that_names_the_parameter():
    online = model()
    slow = MomentumEncoder(online, 0.5)
    online[3] = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"`3.weight` got shape \(3, 4\), expected the momentum copy's shape \(2, 4\)"):
        slow.update()


def test_a_parameter_that_is_replaced_or_rebound_is_followed():
    online = model()
    slow = MomentumEncoder(online, 0.0)
    slow.update()
    online[3] = nn.Linear(4, 2)
    slow.update()
    assert torch.equal(slow.module[3].weight, online[3].weight)
    online[3].weight.data = torch.full((2, 4), 7.0)
    slow.module[3].weight.data = torch.zeros(2, 4)
    slow.update()
    assert torch.equal(slow.module[3].weight, torch.full((2, 4), 7.0))


def test_a_parameter_that_gets_another_name_is_noticed():
    online = model()
    slow = MomentumEncoder(online, 0.0)
    slow.update()
    online[3].register_parameter("gain", online[3]._parameters.pop("weight"))
    with pytest.raises(ValueError, match=r"`parameters` got no partner for 3.weight, expected the module"):
        slow.update()


def test_tied_parameters_of_a_module_move_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    online = Tied()
    slow = MomentumEncoder(online, 0.5)
    before = slow.module.head.weight.clone()
    with torch.no_grad():
        online.head.weight.add_(1.0)
    slow.update()
    assert slow.module.head.weight is slow.module.embedding.weight
    torch.testing.assert_close(slow.module.head.weight, before + 0.5)


def test_channels_last_models_are_averaged_element_by_element():
    online = model().to(memory_format=torch.channels_last)
    slow = MomentumEncoder(online, 0.75)
    plain = MomentumEncoder(online, 0.75)
    plain.module.to(memory_format=torch.contiguous_format)
    train(online)
    slow.update()
    plain.update()
    assert plain.module[0].weight.is_contiguous()
    assert torch.equal(slow.module[0].weight, plain.module[0].weight)


def test_updates_inside_a_compiled_step_do_not_recompile_it():
    torch._dynamo.reset()
    online = nn.Linear(4, 2)
    slow, twin = MomentumEncoder(online, 0.75), MomentumEncoder(online, 0.75)

    def step(x: Tensor) -> Tensor:
        slow.update()
        return slow(x) + online(x)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    slow.update()
    twin.update()
    for i in range(5):
        train_linear(online)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            compiled(torch.randn(3, 4))
        twin.update()
    assert torch.equal(slow.module.weight, twin.module.weight)
    assert slow.step == 6


def train_linear(online: nn.Linear) -> None:
    with torch.no_grad():
        online.weight.add_(torch.randn_like(online.weight))


def test_a_copy_of_the_whole_model_stays_paired_within_itself():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online = model()
            self.slow = MomentumEncoder(self.online, 0.0)

    whole = Whole()
    twin = copy.deepcopy(whole)
    train(twin.online)
    twin.slow.update()
    whole.slow.update()
    assert torch.equal(twin.slow.module[3].weight, twin.online[3].weight)
    assert not torch.equal(whole.slow.module[3].weight, twin.online[3].weight)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"momentum": 0.001}, ValueError, r"`momentum` got 0.001, expected 0, or a number in \[0.5, 1\]"),
        ({"momentum": -0.999}, ValueError, "`momentum` got -0.999, expected"),
        ({"momentum": 1.999}, ValueError, "`momentum` got 1.999, expected"),
        ({"momentum": "0.9"}, TypeError, "`momentum` got str, expected a float"),
        ({"buffers": "lerp"}, ValueError, "`buffers` got 'lerp', expected \"copy\""),
        ({"dtype": torch.int8}, TypeError, "`dtype` got torch.int8, expected a floating"),
        ({"compute_dtype": "bf16"}, TypeError, "`compute_dtype` got bf16, expected a floating"),
        ({"strict": "timm"}, ValueError, "`strict` got 'timm', expected None"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` got 0, expected at least 1"),
        ({"update_after_step": 1.5}, TypeError, "`update_after_step` got float, expected an int"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match="MomentumEncoder: " + message):
        MomentumEncoder(model(), **settings)


def test_a_schedule_that_leaves_the_range_is_an_error_and_nothing_moves():
    online = model()
    slow = MomentumEncoder(online, lambda step: 1.5)
    train(online)
    before = slow.module[3].weight.clone()
    with pytest.raises(ValueError, match="`momentum` got 1"):
        slow.update()
    assert torch.equal(slow.module[3].weight, before)
    assert slow.step == 0
