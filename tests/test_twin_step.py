"""TwinStep trains as the loop that it replaces, says what it refuses, and knows which steps one graph can run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perfvl.functional import TwinLoss, co_teaching_loss, jocor_loss
from perfvl.nn import CoTeachingLoss, CoTeachingPlusLoss, DecouplingLoss, JoCoRLoss, TwinStep
from perfvl.nn.twin_step import _check_capturable

CLASSES = 5
CRITERIA = {
    "decoupling": DecouplingLoss(),
    "co_teaching": CoTeachingLoss(),
    "co_teaching_plus": CoTeachingPlusLoss(),
    "jocor": JoCoRLoss(0.7),
    "a function": lambda logits1, logits2, labels, rate: co_teaching_loss(logits1, logits2, labels, rate / 2),
}


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("captures on CUDA alone")
    torch.use_deterministic_algorithms(False)  # cuBLAS would ask for an environment variable
    return "cuda"


def twins(device: str = "cpu") -> list[nn.Module]:
    """Two networks with all that a step may change: parameters, running statistics, the generator's state."""
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)).to(
            device
        )
        for _ in range(2)
    ]


def batches(device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """The last one is smaller."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 12, generator=generator).to(device),
            torch.randint(CLASSES, (n,), generator=generator).to(device),
        )
        for n in (24, 24, 7)
    ]


def adams(networks: list[nn.Module], joint: bool = False, **settings: Any) -> list[torch.optim.Optimizer]:
    modules: list[nn.Module] = [nn.ModuleList(networks)] if joint else networks
    return [torch.optim.Adam(module.parameters(), **{"lr": 1e-2, **settings}) for module in modules]


def loop(
    networks: list[nn.Module],
    criterion: Callable[..., TwinLoss],
    optimizers: list[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    *rate: float,
) -> tuple[TwinLoss, Tensor, Tensor]:
    """What users write."""
    logits1, logits2 = networks[0](images), networks[1](images)
    losses = criterion(logits1, logits2, labels, *rate)
    for optimizer in optimizers:
        optimizer.zero_grad()
    losses.loss1.backward()
    if losses.loss2 is not losses.loss1:
        losses.loss2.backward()
    for optimizer in optimizers:
        optimizer.step()
    return losses, logits1, logits2


def assert_equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def states(*things: Any) -> list[dict]:
    return [copy.deepcopy(thing.state_dict()) for thing in things]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("joint", [False, True], ids=["two optimisers", "one optimiser"])
def test_training_is_the_plain_loop_bit_for_bit(name, joint):
    def trained(by_hand: bool) -> tuple[list, list]:
        networks, criterion, outputs = twins(), CRITERIA[name], []
        optimizers = adams(networks, joint)
        step = TwinStep(*networks, criterion, optimizers[0] if joint else optimizers)
        for epoch in range(2):
            rate = () if name == "decoupling" else (0.15 * epoch,)
            for images, labels in batches():
                if by_hand:
                    outputs.append(loop(networks, criterion, optimizers, images, labels, *rate))
                else:
                    outputs.append(step(images, labels, *rate))
        return outputs, states(*networks, *optimizers)

    (outputs, state), (expected_outputs, expected_state) = trained(False), trained(True)
    assert_equal(state, expected_state)
    for (losses, *logits), (expected_losses, *expected_logits) in zip(outputs, expected_outputs, strict=True):
        assert isinstance(losses, TwinLoss)
        assert_equal([*losses, *logits], [t.detach() for t in (*expected_losses, *expected_logits)])


def test_results_have_no_graph_and_later_steps_leave_them_alone():
    networks = twins()
    step = TwinStep(*networks, CoTeachingLoss(), adams(networks), forget_rate=0.25)
    (images, labels), (more, others) = batches()[:2]
    first = step(images, labels)
    tensors = [*first.losses, first.logits1, first.logits2]
    before = [t.clone() for t in tensors]
    step(more, others)
    assert_equal(tensors, before)
    assert not any(t.requires_grad for t in tensors)
    assert first.losses.kept1.sum() == 18


def test_gradients_of_the_step_stay_readable():
    networks = twins()
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.5) for network in networks]
    step = TwinStep(*networks, CoTeachingLoss(), optimizers, forget_rate=0.25)
    before = [p.detach().clone() for n in networks for p in n.parameters()]
    step(*batches()[0])
    after = [p for n in networks for p in n.parameters()]
    assert_equal([p.detach() for p in after], [b - 0.5 * p.grad for b, p in zip(before, after, strict=True)])


def test_groups_train_as_they_would_alone():
    class Linears(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, images: Tensor) -> Tensor:
            return images @ self.weight

    weights, images = torch.randn(2, 3, 12, CLASSES), torch.randn(4, 3, 20, 12)
    labels, rates = torch.randint(CLASSES, (4, 3, 20)), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    together = [Linears(weight) for weight in weights]
    step = TwinStep(*together, CoTeachingLoss(), adams(together), forget_rate=rates)
    for x, y in zip(images, labels, strict=True):
        kept = step(x, y).losses.kept1.sum(-1)
    assert kept.tolist() == [18, 10, 3]
    for group in range(3):
        alone = [Linears(weight[group]) for weight in weights]
        step = TwinStep(*alone, CoTeachingLoss(), adams(alone), forget_rate=float(rates[group]))
        for x, y in zip(images[:, group], labels[:, group], strict=True):
            step(x, y)
        for network, grouped in zip(alone, together, strict=True):
            torch.testing.assert_close(network.weight, grouped.weight[group], rtol=1e-4, atol=1e-6)


def test_one_autocast_context_around_all_steps_is_one_around_each():
    def trained(by_hand: bool) -> list[dict]:
        networks = twins()
        optimizers = adams(networks)
        step = TwinStep(*networks, JoCoRLoss(0.5), optimizers)
        if by_hand:
            for images, labels in batches():
                with torch.autocast("cpu", torch.bfloat16):
                    logits1, logits2 = networks[0](images), networks[1](images)
                    losses = jocor_loss(logits1, logits2, labels, 0.2, co_lambda=0.5)
                losses.loss1.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            with torch.autocast("cpu", torch.bfloat16):
                for images, labels in batches():
                    assert step(images, labels, 0.2).logits1.dtype == torch.bfloat16
        return states(*networks, *optimizers)

    assert_equal(trained(False), trained(True))


def test_the_forget_rate_is_one_tensor_however_it_is_set():
    networks = twins()
    step = TwinStep(*networks, CoTeachingLoss(), adams(networks))
    assert step.forget_rate is None
    images, labels = batches()[0]
    assert step(images, labels, 0.5).losses.kept1.sum() == 12
    rate = step.forget_rate
    assert rate.dtype == torch.float64
    for value, kept in ((0.25, 18), (1, 0), (torch.tensor([0.75]), 6), (torch.tensor(0.5).double(), 12)):
        step.forget_rate = value
        assert step(images, labels).losses.kept1.sum() == kept
    assert step(images, labels, torch.tensor(0.25)).losses.kept2.sum() == 18
    assert step.forget_rate is rate
    with pytest.raises(ValueError, match="forget_rate"):
        step(images, labels, torch.tensor([0.1, 0.2]))
    assert step(images, labels, 0.5).losses.kept1.sum() == 12


def test_the_criterion_gets_its_keywords_and_networks_all_their_inputs():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, CLASSES)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.linear(first + second)

    networks: list[nn.Module] = [Sum(), Sum()]
    seen = {}

    def criterion(*arguments, **keywords):
        seen.update(keywords)
        return CoTeachingPlusLoss(mode="reference")(*arguments, **keywords)

    images, labels = batches()[0]
    twin = copy.deepcopy(networks)
    ids, count = torch.arange(24), torch.tensor(3)
    step = TwinStep(*networks, criterion, adams(networks))
    out = step((images, 2 * images), labels, 0.2, sample_ids=ids, step=count)
    assert set(seen) == {"sample_ids", "step"}
    assert_equal(seen, {"sample_ids": ids, "step": count})
    assert_equal(out.logits2, twin[1](images, 2 * images).detach())


def test_a_step_that_is_refused_trains_nothing():
    networks = twins()
    optimizers = adams(networks)
    step = TwinStep(*networks, CoTeachingLoss(), optimizers)
    images, labels = batches()[0]
    parameters = [p.detach().clone() for n in networks for p in n.parameters()]
    for arguments, error, named in (
        ((images.numpy(), labels, 0.2), TypeError, "inputs"),
        ((images, labels.tolist(), 0.2), TypeError, "labels"),
        ((images, labels, "0.2"), TypeError, "forget_rate.*str"),
        ((images, labels, True), TypeError, "forget_rate.*bool"),
        ((images, labels, 1.2), ValueError, "forget_rate.*1.2"),
        ((images, labels + CLASSES, 0.2), ValueError, "labels"),
        ((images, labels, torch.tensor([0.1, 0.2])), ValueError, r"forget_rate.*\(2,\)"),
        ((images, labels[1:], 0.2), ValueError, "labels"),
    ):
        with pytest.raises(error, match=named):
            step(*arguments)
    with pytest.raises(TypeError, match=r"int, expected torch.Tensor"):
        step(images, labels, 0.2, step=1)
    assert_equal([p.detach() for n in networks for p in n.parameters()], parameters)
    assert not any(optimizer.state for optimizer in optimizers)


def test_what_is_no_twin_step_is_refused():
    networks = twins()
    optimizers = adams(networks)
    good: dict[str, Any] = {
        "network1": networks[0],
        "network2": networks[1],
        "criterion": CoTeachingLoss(),
        "optimizers": optimizers,
    }
    for argument, value, error in (
        ("network1", lambda x: x, TypeError),
        ("network2", None, TypeError),
        ("network2", nn.Linear(12, CLASSES, device="meta"), ValueError),
        ("criterion", "co_teaching", TypeError),
        ("optimizers", [], ValueError),
        ("optimizers", optimizers * 2, ValueError),
        ("optimizers", networks, TypeError),
        ("optimizers", None, TypeError),
        ("warmup", 0, ValueError),
        ("warmup", 1.5, ValueError),
        ("max_graphs", 0, ValueError),
        ("forget_rate", -0.1, ValueError),
    ):
        with pytest.raises(error, match=f"TwinStep: .*{argument}.* got .*, expected"):
            TwinStep(**{**good, argument: value})
    with pytest.raises(ValueError, match=r"forget_rate.*DecouplingLoss"):
        TwinStep(*networks, DecouplingLoss(), optimizers, forget_rate=0.2)
    step = TwinStep(*networks, lambda *_: (torch.zeros(()),) * 4, optimizers)
    with pytest.raises(TypeError, match=r"criterion.*tuple, expected a TwinLoss"):
        step(*batches()[0])


def test_only_optimisers_that_a_graph_can_hold_are_captured():
    networks = twins()
    _check_capturable(adams(networks, capturable=True))
    _check_capturable([torch.optim.SGD(networks[0].parameters(), lr=0.1)])  # has no such option
    with pytest.raises(ValueError, match=r"optimizers.*AdamW without capturable=True"):
        _check_capturable([*adams(networks, capturable=True), torch.optim.AdamW(networks[1].parameters())])


def test_steps_share_a_graph_until_something_changes_that_graphs_cannot():
    networks = twins()
    optimizers = adams(networks, lr=torch.tensor(1e-2))
    step = TwinStep(*networks, CoTeachingLoss(), optimizers, forget_rate=0.2, max_graphs=100)
    images, labels = batches()[0]

    def slot(*tensors: Tensor, names: tuple[str, ...] = ()) -> object:
        return step._slot(tensors or (images, labels), names)

    first = slot()
    step.forget_rate = 0.3
    step(images, labels)
    assert slot(images + 1, labels) is first

    found = [first]
    for name, change in (
        ("batch", lambda: None),
        ("lr", lambda: optimizers[0].param_groups[0]["lr"].fill_(1e-3)),  # on the CPU: a graph reads it once
        ("betas", lambda: optimizers[1].param_groups[0].update(betas=(0.1, 0.999))),
        ("mode", lambda: networks[1][1].eval()),
        ("frozen", lambda: networks[0][0].weight.requires_grad_(False)),
        ("loaded", lambda: optimizers[0].load_state_dict(optimizers[0].state_dict())),
        ("added", lambda: optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})),
    ):
        change()
        now = slot(images[:7], labels[:7]) if name == "batch" else slot()
        assert all(now is not other for other in found), name
        assert name == "batch" or slot() is now, name
        found.append(now)
    assert slot(images, labels, labels, names=("sample_ids",)) is not found[-1]
    assert slot(images, labels, labels) is not slot(images, labels, labels, names=("sample_ids",))


def test_the_graphs_used_last_are_kept_and_reset_forgets_all():
    networks = twins()
    step = TwinStep(*networks, CoTeachingLoss(), adams(networks), max_graphs=2)
    images, labels = batches()[0]

    def slot(rows: int) -> object:
        return step._slot((images[:rows], labels[:rows]), ())

    full, half = slot(24), slot(12)
    assert slot(24) is full
    slot(6)
    assert slot(24) is full
    assert slot(12) is not half
    step.reset()
    assert slot(12) is not half


@pytest.mark.parametrize("name", CRITERIA)
def test_a_captured_step_trains_as_one_without_a_graph(cuda, name):
    def trained(cuda_graph: bool) -> tuple[list, list]:
        networks = twins(cuda)
        optimizers = adams(networks, name == "jocor", capturable=True)
        step = TwinStep(*networks, CRITERIA[name], optimizers, cuda_graph=cuda_graph, warmup=2)
        torch.cuda.manual_seed(0)
        outputs = []
        for epoch in range(4):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = 1e-2 / (1 + epoch // 2)
            for images, labels in batches(cuda):
                outputs.append(step(images, labels, *(() if name == "decoupling" else (0.15 * epoch,))))
        assert cuda_graph == any(slot.graph for slot in step._slots.values())
        return outputs, states(*networks, *optimizers)

    (outputs, state), (expected_outputs, expected_state) = trained(True), trained(False)
    assert_equal(state, expected_state)
    assert_equal(outputs, expected_outputs)


def test_a_learning_rate_in_a_tensor_changes_without_a_new_graph(cuda):
    networks = twins(cuda)
    rate = torch.tensor(1e-2, device=cuda)
    step = TwinStep(*networks, CoTeachingLoss(), adams(networks, lr=rate, capturable=True), forget_rate=0.2)
    images, labels = batches()[0]  # from the CPU
    for _ in range(5):
        step(images, labels)
    for optimizer in step.optimizers:
        for group in optimizer.param_groups:
            group["lr"].zero_()
    before = [p.detach().clone() for n in networks for p in n.parameters()]
    step(images, labels)
    assert_equal([p.detach() for n in networks for p in n.parameters()], before)
    assert len(step._slots) == 1


def test_a_criterion_that_synchronises_cannot_be_captured(cuda):
    networks = twins(cuda)

    def criterion(logits1, logits2, labels, rate):
        return co_teaching_loss(logits1, logits2, labels, rate.item())

    step = TwinStep(*networks, criterion, adams(networks, capturable=True), forget_rate=0.2, warmup=1)
    images, labels = batches(cuda)[0]
    step(images, labels)
    with pytest.raises(RuntimeError, match="TwinStep: capture failed"):
        step(images, labels)
