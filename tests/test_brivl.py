"""BriVL: the order of a step, both modes against eager code, state, errors, retrieval, several processes."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from brivl_support import (
    batch_for,
    image_tower,
    small,
    text_tower,
    train,
)
from torch import Tensor, nn

import perfvl
from perfvl.models import (
    BriVL,
    retrieve,
    similarity,
)


class EagerBriVL:
    """The released training step in plain PyTorch on Linear towers, with the paper's loss on demand."""

    def __init__(self, model: BriVL, *, top_k: int = 1) -> None:
        self.towers = [copy.deepcopy(model.image_tower), copy.deepcopy(model.text_tower)]
        self.slow = [copy.deepcopy(model.image_momentum.module), copy.deepcopy(model.text_momentum.module)]
        self.queues = [model.image_queue.keys.T.clone(), model.text_queue.keys.T.clone()]
        self.pointer = 0
        self.paper = model.mode == "paper"
        self.log_scale = model.loss.logit_scale.detach().clone().requires_grad_() if self.paper else None
        self.multi_label, self.top_k = model.multi_label, top_k

    def parameters(self) -> list[Tensor]:
        own = [parameter for tower in self.towers for parameter in tower.parameters()]
        return [*own, self.log_scale] if self.paper else own

    def step(self, image: Tensor, text: Tensor) -> Tensor:
        query = [F.normalize(tower(x), dim=-1) for tower, x in zip(self.towers, (image, text), strict=True)]
        with torch.no_grad():
            for fast, slow in zip(self.towers, self.slow, strict=True):
                for p, e in zip(fast.parameters(), slow.parameters(), strict=True):
                    e.data = e.data * 0.99 + p.data * (1.0 - 0.99)
            key = [F.normalize(tower(x), dim=-1) for tower, x in zip(self.slow, (image, text), strict=True)]
        size = self.queues[0].shape[1]
        mask = torch.zeros(len(image), size, dtype=torch.bool)
        if self.multi_label:
            near = []
            for k, queue in zip(key, self.queues, strict=True):
                similar = k.matmul(queue)
                near.append(torch.zeros_like(similar).scatter_(1, similar.topk(self.top_k, dim=1).indices, 1).bool())
            mask = near[0] & near[1]
        mask = torch.cat([torch.ones(len(image), 1, dtype=torch.bool), mask], dim=1)
        losses = []
        for q, k, queue in ((query[0], key[1], self.queues[1]), (query[1], key[0], self.queues[0])):
            positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
            logits = torch.cat([positive, torch.einsum("nc,ck->nk", q, queue.clone())], dim=-1)
            logits = logits * self.log_scale.exp() if self.paper else logits / 0.07
            loss = -F.log_softmax(logits, dim=1)
            losses.append(torch.masked_select(loss, mask).sum() / (1 if self.paper else len(image)))
        for queue, k in zip(self.queues, key, strict=True):
            queue[:, (self.pointer + torch.arange(len(k))) % size] = k.T
        self.pointer = (self.pointer + len(image)) % size
        return losses[0] + losses[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("paper", {}),
        ("paper", {"queue_size": 27}),
        ("reference", {}),
        ("reference", {"multi_label": True}),
        ("reference", {"multi_label": True, "top_k": 6}),
    ],
)
def test_training_is_that_of_eager_code(mode, settings, dtype, tolerance):
    model = small(mode, dtype, **settings)
    eager = EagerBriVL(model, top_k=settings.get("top_k", 1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(p, lr=0.01) for p in (trained, eager.parameters())]
    for _ in range(9):  # the queue of 24 wraps after 6
        image, text = batch_for(model)
        output, expected = model(image, text), eager.step(image, text)
        torch.testing.assert_close(output.loss, expected, rtol=tolerance, atol=0)
        for optimizer, loss in zip(optimizers, (output.loss, expected), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for mine, other in zip(trained, eager.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=50 * tolerance, atol=5 * tolerance)
    torch.testing.assert_close(model.image_queue.keys, eager.queues[0].T, rtol=50 * tolerance, atol=5 * tolerance)
    torch.testing.assert_close(model.text_queue.keys, eager.queues[1].T, rtol=50 * tolerance, atol=5 * tolerance)


def test_multi_label_adds_the_queued_pairs_that_are_near_by_image_and_by_text():
    settings = {"embed_dim": 4, "queue_size": 4, "mode": "reference", "temperature": 0.1}
    model = BriVL(nn.Identity(), nn.Identity(), multi_label=True, **settings).double()
    e = torch.eye(4, dtype=torch.float64)
    model.image_queue.keys.copy_(torch.stack([e[0], -e[1], e[2], e[3]]))  # row 0 is the first pair in both queues,
    model.text_queue.keys.copy_(torch.stack([e[0], e[1], e[2], e[3]]))  # row 1 is the second one's text alone
    output = model(e[:2], e[:2])
    lse = math.log(2 * math.exp(10) + 3)  # own key, its copy in the queue, three keys at right angles
    single = math.log(math.exp(10) + 3 + math.exp(-10))
    assert output.image_to_text.item() == pytest.approx(((2 * lse - 20) + (lse - 10)) / 2)
    assert output.text_to_image.item() == pytest.approx(((2 * lse - 20) + (single - 10)) / 2)
    assert output.image_to_text_accuracy == 0.5, "the copy of a positive is no negative, but for the second image it is"
    assert output.text_to_image_accuracy == 1.0


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_both_backends_give_the_same_step(mode):
    fused = small(mode)
    plain = copy.deepcopy(fused)
    image, text = batch_for(fused)
    outputs = []
    for model, backend in ((fused, "auto"), (plain, "reference")):
        with perfvl.use_backend(backend):
            outputs.append(model(image, text))
            outputs[-1].loss.backward()
    for mine, other in zip(*outputs, strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(other))
    for mine, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_query_towers_and_the_temperature_and_nothing_else():
    model = small()
    model(*batch_for(model)).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    towers = {f"{tower}.{kind}" for tower in ("image_tower", "text_tower") for kind in ("weight", "bias")}
    assert reached == {*towers, "loss.logit_scale"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)
    momentum = [*model.image_momentum.parameters(), *model.text_momentum.parameters()]
    assert momentum
    assert not any(parameter.requires_grad for parameter in momentum)
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_keys_come_from_momentum_towers_that_saw_the_last_optimiser_step():
    model = small()
    train(model, steps=1)
    image, text = batch_for(model)
    expected = []
    for tower, momentum, inputs in (
        (model.image_tower, model.image_momentum, image),
        (model.text_tower, model.text_momentum, text),
    ):
        moved = [0.99 * e + 0.01 * p for e, p in zip(momentum.parameters(), tower.parameters(), strict=True)]
        stale = F.normalize(F.linear(inputs, *momentum.parameters()), dim=1)
        expected.append(F.normalize(F.linear(inputs, *moved), dim=1))
        assert not torch.allclose(stale, expected[-1], rtol=0, atol=1e-6)
    model(image, text)
    torch.testing.assert_close(model.image_queue.keys[4:8], expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.text_queue.keys[4:8], expected[1], rtol=0, atol=1e-6)


def test_queues_are_written_after_both_losses_images_first(monkeypatch):
    model, order = small(), []
    before = {queue: queue.keys.clone() for queue in (model.image_queue, model.text_queue)}
    stats = model.loss.stats

    def recording_stats(query, key, queue):
        assert all(torch.equal(each.keys, keys) for each, keys in before.items())
        order.append("loss over images" if queue is model.image_queue else "loss over texts")
        return stats(query, key, queue)

    monkeypatch.setattr(model.loss, "stats", recording_stats)
    for name, queue in (("images", model.image_queue), ("texts", model.text_queue)):
        monkeypatch.setattr(
            queue, "enqueue", lambda keys, name=name, own=queue.enqueue: (order.append(f"enqueue {name}"), own(keys))
        )
    model(*batch_for(model))
    assert order == ["loss over texts", "loss over images", "enqueue images", "enqueue texts"]
    assert int(model.image_queue.cursor) == int(model.text_queue.cursor) == 4
    assert not any(torch.equal(queue.keys[:4], keys[:4]) for queue, keys in before.items())
    assert all(torch.equal(queue.keys[4:], keys[4:]) for queue, keys in before.items())


def test_the_loss_is_that_of_the_loss_module_and_the_log_says_what_it_should():
    model = small()
    image, text = batch_for(model)
    image_query, text_query = model.get_image_features(image), model.get_text_features(text)
    # Before the first optimiser step momentum and query towers are equal, so their features are.
    queues = model.image_queue.keys.clone(), model.text_queue.keys.clone()
    expected = model.loss(image_query, text_query, image_query.detach(), text_query.detach(), *queues)
    own = (image_query * text_query).sum(1)
    output = model(image, text)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.image_to_text + output.text_to_image, output.loss.detach())
    assert output.image_to_text_accuracy == (own > (image_query @ queues[1].T).amax(1)).float().mean()
    assert output.text_to_image_accuracy == (own > (text_query @ queues[0].T).amax(1)).float().mean()
    assert output.temperature.item() == pytest.approx(0.05)
    assert small("reference")(image, text).temperature == 0.07
    assert [value.requires_grad for value in output] == [True] + 5 * [False]


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_evaluation_changes_nothing_and_still_gives_the_loss(mode, multi_label):
    model = small("reference", multi_label=multi_label).train(mode == "no_grad")
    image, text = batch_for(model)
    before = copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(mode == "eval"):
        output = model(image, text)
    assert output.loss.isfinite()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(model.train()(image, text).loss.detach(), output.loss.detach())


@pytest.mark.parametrize("wrap", [tuple, list, dict])
def test_inputs_may_be_tensors_tuples_or_dicts(wrap):
    model = small()
    twin = copy.deepcopy(model)
    image, text = batch_for(model)
    wrapped = ({"input": image}, {"input": text}) if wrap is dict else (wrap([image]), wrap([text]))
    assert torch.equal(model(*wrapped).loss, twin(image, text).loss)


def test_whole_towers_train_with_boxes_and_masks():
    torch.manual_seed(1)
    model = BriVL(image_tower(), text_tower(), embed_dim=16, queue_size=16)
    losses = train(model, steps=3, batch=5, rate=1e-3)
    assert all(torch.tensor(losses).isfinite())
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == [], "DDP would wait for these"


@pytest.mark.parametrize("batch", [1, 5, 24, 31])
def test_the_papers_mode_takes_any_batch(batch):
    model = small()
    assert all(torch.tensor(train(model, steps=2, batch=batch)).isfinite())
    assert int(model.image_queue.cursor) == 2 * batch % 24


def test_half_precision_queues_halve_the_memory_and_keep_the_loss():
    towers = {"embed_dim": 8, "queue_size": 24}
    model = BriVL(nn.Linear(6, 8), nn.Linear(10, 8), queue_dtype=torch.bfloat16, **towers)
    twin = BriVL(nn.Linear(6, 8), nn.Linear(10, 8), **towers)
    twin.load_state_dict(model.state_dict())
    image, text = batch_for(model)
    output, expected = model(image, text), twin(image, text)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-2, atol=0)
    assert model.image_queue.keys.dtype == torch.bfloat16
    assert model.image_queue.keys.nbytes == twin.image_queue.keys.nbytes / 2


def test_step_under_autocast_keeps_the_loss_in_float32():
    for settings in ({}, {"multi_label": True}):
        model = small("reference", **settings)
        twin, (image, text) = copy.deepcopy(model), batch_for(model)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(image, text)
        assert output.loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, twin(image, text).loss, rtol=5e-2, atol=0)
        output.loss.backward()


# State


def test_a_run_that_stops_and_resumes_is_the_run_that_does_not(tmp_path):
    def run(model, optimizer, batches):
        for image, text in batches:
            optimizer.zero_grad()
            model(image, text).loss.backward()
            optimizer.step()

    model = small(queue_size=10)
    batches = [batch_for(model) for _ in range(7)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run(model, optimizer, batches[:4])  # 16 keys: the ring has wrapped
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    run(model, optimizer, batches[4:])

    resumed = small(queue_size=10)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    checkpoint = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    run(resumed, optimizer, batches[4:])
    expected = model.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_alike_and_apart(duplicate):
    model = small()
    train(model, steps=2)
    twin = duplicate(model)
    torch.manual_seed(3)
    losses = train(model, steps=3)
    torch.manual_seed(3)
    assert train(twin, steps=3) == losses
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
    frozen = copy.deepcopy(state)
    train(twin, steps=1)
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())
    assert not torch.equal(twin.image_momentum.module.weight, model.image_momentum.module.weight)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "released"}, "`mode` got 'released'"),
        ({"mode": "paper", "multi_label": True}, "`multi_label` got True in mode 'paper'"),
        ({"mode": "reference", "multi_label": True, "top_k": 25}, "`top_k` got 25, expected 1 to queue_size = 24"),
        ({"temperature": 0.0}, "`temperature` got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize(
    ("mode", "image", "text", "error", "message"),
    [
        ("paper", torch.zeros(4, 6), torch.zeros(3, 10), ValueError, "got 4 images and 3 texts, expected pairs"),
        ("reference", torch.zeros(5, 6), torch.zeros(5, 10), ValueError, "global batch of 5, expected a divisor of"),
        ("reference", torch.zeros(0, 6), torch.zeros(0, 10), ValueError, "global batch of 0, expected a divisor of"),
        ("paper", None, torch.zeros(4, 10), TypeError, "`image` got NoneType"),
        ("paper", torch.zeros(4, 6), (), TypeError, "`text` got tuple"),
    ],
)
def test_bad_batches_are_named_and_change_nothing(mode, image, text, error, message):
    model = small(mode)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        model(image, text)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_towers_of_another_width_are_named_before_anything_moves():
    model = BriVL(nn.Linear(6, 8), nn.Linear(10, 9), embed_dim=8, queue_size=24)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"`text_tower` returned shape \(4, 9\), expected \(B, 8\)"):
        model(torch.randn(4, 6), torch.randn(4, 10))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_takes_any_batch_in_reference_mode():
    model = small("reference").eval()
    assert model(torch.randn(5, 6), torch.randn(5, 10)).loss.isfinite()


# Retrieval


def test_retrieval_finds_the_nearest_candidates_best_first():
    model = small()
    image, text = batch_for(model, 20)
    images, texts = model.get_image_features(image).detach(), model.get_text_features(text).detach()
    torch.testing.assert_close(images.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(images, F.normalize(model.image_tower(image), dim=1))
    scores = similarity(images, texts)
    assert scores[3, 7].item() == pytest.approx(F.cosine_similarity(images[3], texts[7], dim=0).item(), abs=1e-6)
    found = retrieve(images, texts, 5)
    assert torch.equal(found.indices, scores.argsort(dim=1, descending=True)[:, :5])
    torch.testing.assert_close(found.scores, scores.gather(1, found.indices))
    assert torch.equal(retrieve(images, images, 1).indices.flatten(), torch.arange(20))
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"retrieve: `k` got {k}, expected 1 to 20"):
            retrieve(images, texts, k)


# Several processes

RANK = """
import copy, os, sys, torch, torch.distributed as dist
from torch import nn
from perfvl.models import BriVL
rank, file, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
model = BriVL(nn.Linear(6, 8), nn.Linear(10, 8), embed_dim=8, queue_size=12, mode=mode, group=dist.group.WORLD)
images, texts = torch.randn(6, 6), torch.randn(6, 10)
own = slice(3 * rank, 3 * rank + 3)
with torch.no_grad():
    expected = nn.functional.normalize(model.image_momentum(images), dim=1)
parallel = nn.parallel.DistributedDataParallel(model)
output = parallel(images[own], texts[own])
output.loss.backward()
torch.testing.assert_close(model.image_queue.keys[:6], expected)
assert int(model.text_queue.cursor) == 6
both = [torch.empty(8, 6) for _ in range(2)]
dist.all_gather(both, model.image_tower.weight.grad)
assert torch.equal(*both) and both[0].abs().sum() > 0
twin = copy.deepcopy(model)
assert twin(images[own], texts[own]).loss == model(images[own], texts[own]).loss
if mode == "reference":
    try:
        model(images[:4], texts[:4])
    except ValueError as error:
        assert "global batch of 8" in str(error), error
    else:
        raise AssertionError("8 does not divide 12")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # after DDP's backward torch itself, without perfvl, now and then aborts while the interpreter ends
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_every_rank_enqueues_the_keys_of_all_ranks_under_ddp(tmp_path, mode):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), mode], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
