"""What training stacks do to a library: threads of Python, forked workers, numbers of threads, ten thousand steps."""

from __future__ import annotations

import io
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from contracts import CONTRACTS
from op_contract import OpContract, evaluate
from torch import Tensor, nn

import perfvl.functional as pf
from perfvl.nn import KeyQueue, MomentumEncoder

every_op = pytest.mark.parametrize("op", CONTRACTS, ids=lambda op: op.name)


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[what].nan_to_num(), b[what].nan_to_num()) for what in a)


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    """But for the order of sums in products of matrices."""
    scale = float(expected.abs().max()) if expected.is_floating_point() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale, msg=lambda m: f"{what}: {m}")


def sized(op: OpContract) -> dict:
    """A problem of a few sizes more than the smallest: more than one task for the threads."""
    torch.manual_seed(0)
    return op.grow(op.small("cpu"))


@every_op
def test_threads_of_python_do_not_disturb_each_other(op):
    inputs = op.small("cpu"), sized(op)
    expected = [evaluate(op.function, i) for i in inputs]

    def work(thread: int) -> bool:
        return all(same(evaluate(op.function, inputs[n % 2]), expected[n % 2]) for n in range(thread, thread + 10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@every_op
@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads_gives_the_same(op):
    inputs = sized(op)
    torch.set_num_threads(1)
    expected = evaluate(op.function, inputs)
    for count in range(2, 9):
        torch.set_num_threads(count)
        found = evaluate(op.function, inputs)
        for what, value in expected.items():
            assert_near(found[what], value, what)


def forked(connection, names: list[str]) -> None:
    """As a worker of a DataLoader."""
    torch.set_num_threads(1)
    chosen = [op for op in CONTRACTS if op.name in names]
    found = [evaluate(op.function, sized(op)) for op in chosen]
    connection.send([{what: value.numpy() for what, value in results.items()} for results in found])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="cannot fork")
@pytest.mark.usefixtures("_threads")
def test_a_forked_worker_goes_on():
    torch.set_num_threads(4)
    expected = [evaluate(op.function, sized(op)) for op in CONTRACTS]  # the library and its threads are at work
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=forked, args=(theirs, [op.name for op in CONTRACTS]))
    worker.start()
    try:
        assert ours.poll(120), "the worker hangs"
        for op, a, b in zip(CONTRACTS, ours.recv(), expected, strict=True):
            for what, value in b.items():
                assert_near(torch.from_numpy(a[what]), value, f"{op.name}: {what}")
        worker.join(30)
        assert worker.exitcode == 0
    finally:
        worker.kill()


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Contrast(nn.Module):
    """A MoCo of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 8)
        self.key = MomentumEncoder(self.query, momentum=0.99)
        self.queue = KeyQueue(200, 8, payloads={"ids": torch.int64})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_thousand_steps_lose_nothing_and_keep_no_memory():
    torch.manual_seed(0)
    model = Contrast()
    optimizer = torch.optim.SGD(model.query.parameters(), lr=0.01)
    exact = [p.detach().double() for p in model.query.parameters()]
    batch, before = 7, 0
    for step in range(10_000):
        x = torch.randn(batch, 16)
        loss = pf.info_nce(model.query(x), model.key(x), model.queue.keys, temperature=0.2, valid=model.queue.valid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.key.update()
        model.queue.enqueue(model.key(x), ids=torch.arange(step * batch, (step + 1) * batch))
        for mean, p in zip(exact, model.query.parameters(), strict=True):
            mean.mul_(0.99).add_(p.detach().double(), alpha=0.01)
        if step % 2500 == 2499:  # on with what a checkpoint has
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], file)
            file.seek(0)
            model, (state, of_optimizer) = Contrast(), torch.load(file, weights_only=True)
            optimizer = torch.optim.SGD(model.query.parameters(), lr=0.01)
            model.load_state_dict(state), optimizer.load_state_dict(of_optimizer)
        if step == 1000:
            before = resident()
    assert resident() - before < 24 << 20
    assert loss.isfinite()
    last = 10_000 * batch
    assert sorted(model.queue.payloads["ids"].tolist()) == list(range(last - 200, last))
    for mean, p in zip(exact, model.key.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), mean, rtol=1e-4, atol=1e-5)
