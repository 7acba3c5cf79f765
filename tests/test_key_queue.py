"""Known answers of the key ring, and what KeyQueue promises around it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import perfvl
import perfvl.functional as pf
from perfvl.nn import InfoNCELoss, KeyQueue


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with perfvl.use_backend(request.param):
        yield request.param


def numbered(first: int, count: int, dim: int = 3) -> Tensor:
    """Rows that say which key they are."""
    return torch.arange(first, first + count).float()[:, None].expand(count, dim).contiguous()


@pytest.mark.parametrize(
    ("size", "batches"), [(7, [3] * 9), (8, [8] * 3), (4, [9, 1, 6]), (5, [1] * 12), (6, [4, 0, 13, 2])]
)
def test_the_ring_holds_the_last_keys(backend, size, batches):
    queue = KeyQueue(size, 3)
    done = 0
    for batch in batches:
        queue.enqueue(numbered(done, batch), ids=torch.arange(done, done + batch))
        done += batch
        assert queue.cursor == done % size
        assert queue.valid == min(done, size)
        held = queue.keys[: int(queue.valid), 0]
        assert sorted(held.tolist()) == list(range(max(done - size, 0), done))
        assert torch.equal(queue.payloads["ids"][: int(queue.valid)].float(), held)
        assert all(queue.keys[i % size, 0] == i for i in range(max(done - size, 0), done))


def test_two_batches_are_one_batch_of_both(backend):
    keys = torch.randn(11, 3)
    apart, together = KeyQueue(7, 3), KeyQueue(7, 3)
    apart.enqueue(keys[:4])
    apart.enqueue(keys[4:])
    together.enqueue(keys)
    for name, value in apart.state_dict().items():
        assert torch.equal(value, together.state_dict()[name]), name


def test_the_memory_bank_of_lightly_drops_what_would_wrap(backend):
    # Bank (5, 2), batches of 3: rows 0-2 = x0, 3-4 = the first two of x1 and the cursor 0, then 0-2 = x2.
    queue = KeyQueue(5, 2, strict="drop_tail")
    x0, x1, x2 = numbered(0, 3, 2), numbered(10, 3, 2), numbered(20, 3, 2)
    queue.enqueue(x0)
    assert torch.equal(queue.keys[:3], x0)
    queue.enqueue(x1)
    assert torch.equal(queue.keys, torch.cat([x0, x1[:2]]))
    assert queue.cursor == 0
    queue.enqueue(x2)
    assert torch.equal(queue.keys, torch.cat([x2, x1[:2]]))


def test_the_memory_of_pytorch_metric_learning_wraps_with_and_without_mask(backend):
    queue = KeyQueue(7, 2, strict="modulo")
    for i in range(5):
        queue.enqueue(numbered(3 * i, 3, 2))
    assert queue.keys[:, 0].tolist() == [14, 8, 9, 10, 11, 12, 13]
    queue.enqueue(numbered(100, 9, 2), mask=torch.arange(9) % 2 == 0)
    assert queue.keys[:, 0].tolist() == [14, 100, 102, 104, 106, 108, 13]
    with pytest.raises(ValueError, match=r"`keys` got 8 rows, expected at most the size 7 \(strict\)"):
        queue.enqueue(numbered(0, 8, 2))


def test_the_assertion_of_moco_is_a_named_error():
    queue = KeyQueue(8, 2, strict="assert")
    queue.enqueue(numbered(0, 4, 2))
    with pytest.raises(ValueError, match=r"`keys` got 3 rows, expected a divisor of the size 8 \(strict\)"):
        queue.enqueue(numbered(4, 3, 2))
    assert queue.cursor == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_are_normalised_in_float32_and_rounded_once(backend, dtype):
    keys = torch.randn(6, 200) * 1000
    queue = KeyQueue(6, 200, dtype=dtype, normalize=True)
    queue.enqueue(keys.to(dtype))
    expected = F.normalize(keys.to(dtype).float(), dim=1)
    torch.testing.assert_close(
        queue.keys, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6
    )
    assert (queue.keys.float().norm(dim=1) - 1).abs().max() < {torch.float32: 1e-6}.get(dtype, 4e-3)


def test_saving_in_the_middle_of_the_ring_and_loading_is_not_noticed():
    def run(queue: KeyQueue, first: int, last: int) -> None:
        for i in range(first, last):
            keys = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
            queue.enqueue(keys, ids=torch.arange(5 * i, 5 * i + 5), label=keys[:, :2] > 0)

    whole, part = KeyQueue(13, 4, dtype=torch.bfloat16), KeyQueue(13, 4, dtype=torch.bfloat16)
    run(whole, 0, 9)
    run(part, 0, 4)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    resumed = KeyQueue(13, 4, dtype=torch.bfloat16)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, 4, 9)
    assert list(whole.state_dict()) == ["keys", "cursor", "valid", "payloads.ids", "payloads.label"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cursor": torch.tensor(7)}, r"`cursor` got 7, expected a number in \[0, 6\]"),
        ({"cursor": torch.tensor(-1)}, "`cursor` got -1, expected"),
        ({"cursor": torch.tensor([1, 2])}, r"`cursor` got shape \(2,\), expected one element"),
        ({"valid": torch.tensor(8)}, r"`valid` got 8, expected a number in \[0, 7\]"),
        ({"keys": torch.zeros(7, 4)}, r"`keys` got shape \(7, 4\), expected \(7, 3\)"),
        ({"keys": torch.zeros(3, 7)}, r"`keys` got shape \(3, 7\), expected \(7, 3\)"),
        ({"payloads.ids": torch.zeros(6)}, r"`payloads.ids` got shape \(6,\), expected \(7, ...\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(change, message):
    queue = KeyQueue(7, 3)
    queue.enqueue(numbered(1, 4))
    before = copy.deepcopy(queue.state_dict())
    good = KeyQueue(7, 3, init="random").state_dict()
    with pytest.raises(ValueError, match="KeyQueue.load_state_dict: " + message):
        queue.load_state_dict({**good, **change})
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


def test_eval_mode_enqueues_nothing():
    queue = KeyQueue(7, 3).eval()
    queue.enqueue(numbered(0, 4))
    assert queue.cursor == queue.valid == 0
    assert not queue.keys.any()


def test_keys_with_gradients_are_taken_without():
    queue = KeyQueue(7, 3)
    queue.enqueue(torch.randn(4, 3, requires_grad=True))
    assert not queue.keys.requires_grad
    pf.enqueue_(queue.keys, queue.cursor, torch.randn(4, 3, requires_grad=True))
    assert not queue.keys.requires_grad


def test_a_loss_sees_the_valid_rows_and_may_be_enqueued_before_its_backward():
    queue, loss = KeyQueue(16, 8, normalize=True), InfoNCELoss(0.2)
    query, key = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    assert loss(query, key, queue) == 0
    queue.enqueue(torch.randn(6, 8))
    expected = loss(query, key, queue.keys[:6].clone())
    (gradient,) = torch.autograd.grad(expected, query)
    got = loss(query, key, queue)
    queue.enqueue(torch.randn(9, 8))
    (mine,) = torch.autograd.grad(got, query)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(mine, gradient)


def test_a_compiled_step_of_loss_and_enqueue_does_not_recompile():
    torch._dynamo.reset()
    queue, loss, encoder = KeyQueue(32, 8, normalize=True), InfoNCELoss(0.2), torch.nn.Linear(8, 8)

    def step(x: Tensor) -> Tensor:
        features = encoder(x)
        result = loss(features, features.detach(), queue)
        queue.enqueue(features, ids=torch.arange(len(x)))
        return result

    step(torch.randn(5, 8))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(4):
        twin, x = copy.deepcopy(queue), torch.randn(5, 8)
        expected = loss(encoder(x), encoder(x).detach(), twin)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(x), expected)
        twin.enqueue(encoder(x), ids=torch.arange(5))
        for name, value in queue.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name])


def test_writing_a_queue_that_a_backward_still_reads_is_noticed(backend):
    queue = KeyQueue(8, 3, init="random")
    query = torch.randn(2, 3, requires_grad=True)
    logits = query @ queue.keys.T
    queue.enqueue(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_random_queues_hold_unit_rows_all_valid():
    queue = KeyQueue(50, 16, init="random")
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(50))
    assert queue.valid == 50


def test_payloads_declared_with_shapes_start_with_no_ids():
    queue = KeyQueue(4, 2, payloads={"ids": torch.int64, "box": (torch.float32, (4,))})
    assert queue.payloads["ids"].tolist() == [-100] * 4
    queue.enqueue(torch.ones(3, 2), box=torch.ones(3, 4), ids=torch.arange(3))
    assert queue.payloads["ids"].tolist() == [0, 1, 2, -100]
    assert queue.payloads["box"][:, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: q.enqueue(torch.ones(2, 3)), ValueError, "got no ids, expected every payload"),
        (lambda q: q.enqueue(torch.ones(2, 3), ids=[1, 2]), TypeError, "`ids` got list, expected a torch.Tensor"),
        (lambda q: q.enqueue(torch.ones(2, 3), ids=torch.arange(3)), ValueError, r"`ids` got shape \(3,\), expected"),
        (lambda q: q.enqueue(torch.ones(2, 3), ids=torch.arange(2), new=torch.ones(2)), ValueError,
         "`new` got a payload that rows in the queue do not have"),
        (lambda q: q.enqueue(torch.ones(2, 4), ids=torch.arange(2)), ValueError, r"`keys` got shape \(2, 4\)"),
        (lambda q: q.enqueue([1.0], ids=torch.arange(1)), TypeError, "`keys` got list, expected a torch.Tensor"),
    ],
)  # fmt: skip
def test_bad_calls_are_named_and_nothing_is_written(call, error, message):
    queue = KeyQueue(7, 3)
    queue.enqueue(numbered(1, 4), ids=torch.arange(4))
    before = copy.deepcopy(queue.state_dict())
    with pytest.raises(error, match=message):
        call(queue)
    assert list(queue.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": 0}, ValueError, "`size` got 0, expected at least 1"),
        ({"size": -5}, ValueError, "`size` got -5, expected at least 1"),
        ({"size": 4.0}, TypeError, "`size` got float, expected an int"),
        ({"dim": True}, TypeError, "`dim` got bool, expected an int"),
        ({"dtype": torch.int8}, TypeError, "`dtype` got torch.int8, expected a floating"),
        ({"init": "zeros"}, ValueError, "`init` got 'zeros', expected"),
        ({"strict": "wrap"}, ValueError, "`strict` got 'wrap', expected"),
        ({"payloads": {"ids": int}}, TypeError, "`payloads\\['ids'\\]` got <class 'int'>, expected a torch.dtype"),
        ({"payloads": {"size": torch.int64}}, ValueError, "`payloads` got the name 'size', expected an identifier"),
        ({"payloads": dict.fromkeys("abcdefghi", torch.int64)}, ValueError, "`payloads` got more than 8 names"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match="KeyQueue: " + message):
        KeyQueue(**{"size": 8, "dim": 2, **settings})


def test_half_of_a_parent_module_takes_the_queue_with_it():
    queue = KeyQueue(6, 2)
    torch.nn.Sequential(queue).bfloat16()
    queue.enqueue(torch.ones(2, 2))
    assert queue.keys.dtype == torch.bfloat16
    assert queue.cursor.dtype == torch.int64
