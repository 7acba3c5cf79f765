"""Queues and momentum encoders in two processes: gather, DDP, FSDP2, resumed runs, the example."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import distributed_workers as workers
from distributed_workers import BATCH, DIM, WORLD, MoCo, Ranks, WithStatistics

from perfvl.nn import KeyQueue, prepare_queues

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "moco_ddp.py"
QUEUE = ["queue.keys", "queue.cursor", "queue.valid", "queue.payloads.ids"]
TIGHT = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks()
    yield processes
    processes.stop()


@pytest.fixture
def moco_ddp() -> Iterator[ModuleType]:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("moco_ddp_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on cores that others use too, threads that wait for each other are 20 times slower
    yield module
    torch.set_num_threads(threads)


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Gathered queues


@pytest.mark.parametrize("ids", [False, True], ids=["keys", "payloads"])
@pytest.mark.parametrize(
    ("settings", "masked"),
    [
        ({"size": 24}, False),  # the 8 rows of a step divide it
        ({"size": 21}, False),
        ({"size": 40}, False),  # the last step ends where the ring ends
        ({"size": 5}, False),  # fewer rows than a step brings
        ({"size": 200}, False),  # never full
        ({"size": 21, "dtype": torch.bfloat16}, False),
        ({"size": 24, "dtype": torch.float16}, False),
        ({"size": 21}, True),
        ({"size": 24, "dtype": torch.bfloat16}, True),
        ({"size": 21, "strict": "drop_tail"}, False),
        ({"size": 24, "strict": "assert"}, False),
    ],
)
def test_every_rank_holds_what_one_process_with_all_rows_holds(ranks, settings, masked, ids):
    first, second = ranks.run(workers.fill_queue, settings, ids, masked)
    alone = KeyQueue(dim=DIM, **settings)
    workers.fill(alone, None, 10, ids=ids, masked=masked)
    assert equal(first, second)
    assert equal(first, dict(alone.state_dict()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_keys_are_the_same_on_every_rank(ranks, dtype, masked):
    settings = {"size": 21, "dtype": dtype, "normalize": True}
    first, second = ranks.run(workers.fill_queue, settings, True, masked)
    alone = KeyQueue(dim=DIM, **settings)
    workers.fill(alone, None, 10, ids=True, masked=masked)
    assert equal(first, second)
    torch.testing.assert_close(first["keys"], alone.keys)
    assert torch.equal(first["payloads.ids"], alone.payloads["ids"])


@pytest.mark.parametrize("size", [64, 5])
def test_a_gathered_write_shows_in_every_version_counter(ranks, size):
    assert ranks.run(workers.versions_rise, size) == [[True] * 4] * WORLD


@pytest.mark.parametrize(("strict", "size"), [("assert", 3 * BATCH), ("modulo", BATCH + 1)])
def test_strict_rules_count_the_rows_of_all_ranks(ranks, strict, size):
    for errors in ranks.run(workers.refuses, strict, size):
        assert len(errors) == 1
        assert f"got {WORLD * BATCH} rows" in errors[0]


# DDP


def test_two_ranks_train_as_one_process_with_both_batches(ranks):
    first, second = ranks.run(workers.train_with_ddp, 6)
    assert equal(first["state"], second["state"])
    alone = MoCo(None)
    losses = workers.train(alone, None, range(6), workers.sgd(alone))
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(losses, rel=2e-5)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2), "nothing was learnt"
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first["state"][name], value, **TIGHT, msg=name)


def test_gradients_under_ddp_are_those_of_one_process_though_ranks_had_other_seeds(ranks):
    first, second = ranks.run(workers.train_with_ddp, 1)
    alone = MoCo(None)
    (loss,) = workers.train(alone, None, range(1), workers.sgd(alone))
    expected = workers.gradients(alone)
    assert (first["first"][0] + second["first"][0]) / 2 == pytest.approx(loss, rel=2e-5)
    for rank in (first, second):
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(rank["gradients"][name], gradient, **TIGHT, msg=name)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_prepared_queues_start_alike_and_are_not_sent_at_every_forward(ranks, compiled):
    first, second = ranks.run(workers.change_buffers_and_forward, True, compiled)
    assert first["names"] == [f"_orig_mod.{name}" if compiled else name for name in QUEUE]
    assert torch.equal(first["at_start"], second["at_start"])
    for name, buffer in second["now"].items():
        assert (buffer == (1 if name in QUEUE else 0)).all(), f"{name}: rank 0's would be 0"
    assert all((buffer == 0).all() for buffer in first["now"].values())


def test_without_preparation_rank_0_overwrites_the_queues_of_the_others(ranks):
    _, second = ranks.run(workers.change_buffers_and_forward, False, False)
    assert all((buffer == 0).all() for buffer in second["now"].values())


def test_exclusion_alone_would_leave_random_queues_different(ranks):
    first, second = ranks.run(workers.exclude_without_synchronising)
    assert not torch.equal(first, second)


def test_a_wrapped_model_is_refused_because_it_is_too_late(ranks):
    direct, inner = ranks.run(workers.prepare_wrapped)[0]
    assert "`model` got DistributedDataParallel, expected a module that is not wrapped yet" in direct
    assert "got DistributedDataParallel at inner," in inner


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_resumed_in_the_middle_of_the_ring_continues_as_if_uninterrupted(ranks, tmp_path, stop):
    answers = ranks.run(workers.resume, str(tmp_path), stop, 7)
    for losses, resumed, whole, second, cursor in answers:
        assert losses == resumed
        assert equal(whole, second)
        assert cursor == (stop * WORLD * BATCH) % 21 != 0
    assert equal(answers[0][3], answers[1][3])


# FSDP2


def test_a_sharded_model_trains_as_one_process(ranks):
    first, second = ranks.run(workers.train_with_fsdp, 6)
    assert second["empty"], "one rank should hold an empty shard"
    assert equal(first["queue"], second["queue"])
    assert equal(first["state"], second["state"])
    alone = MoCo(None)
    losses = workers.train(alone, None, range(6), workers.sgd(alone))
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(losses, rel=2e-5)
    expected = {name: value.detach() for name, value in alone.named_parameters()}
    assert first["state"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(first["state"][name], value, **TIGHT, msg=name)
    torch.testing.assert_close(first["queue"]["keys"], alone.queue.keys, **TIGHT)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"), [(None, None), (torch.float64, None), (None, torch.bfloat16)], ids=str
)
def test_averaging_shard_by_shard_is_averaging_the_whole(ranks, dtype, compute_dtype):
    for whole, sharded in ranks.run(workers.average_shards, dtype, compute_dtype):
        assert len(whole) == len(sharded) == 2 * 8
        for expected, value in zip(whole, sharded, strict=True):
            assert expected.dtype == value.dtype
            assert torch.equal(expected, value)


def test_a_module_that_is_sharded_alone_is_refused(ranks):
    for message in ranks.run(workers.average_one_side_sharded):
        assert "shard the module and `.module` alike" in message


# Wrapped modules


@pytest.mark.parametrize("first", [True, False], ids=["wrapped before", "wrapped after"])
@pytest.mark.parametrize("wrapper", ["ddp", "compile", "ddp of compile", "compile of ddp"])
def test_a_momentum_encoder_follows_a_wrapped_module(ranks, wrapper, first):
    for average, expected in ranks.run(workers.follow_wrapped, wrapper, first):
        assert len(average) == len(expected) == 4
        for value, wanted in zip(average, expected, strict=True):
            torch.testing.assert_close(value, wanted)


# One process


def test_without_a_process_group_names_are_excluded_and_nothing_is_sent(caplog):
    model = WithStatistics(seed=0)
    before = model.queue.keys.clone()
    with caplog.at_level(logging.INFO, logger="perfvl"):
        assert prepare_queues(model) == QUEUE
    assert set(model._ddp_params_and_buffers_to_ignore) == set(QUEUE)
    assert torch.equal(model.queue.keys, before)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("perfvl", "INFO")
    assert all(name in record.getMessage() for name in QUEUE)


def test_names_that_ddp_was_told_before_stay_and_none_is_listed_twice():
    model = WithStatistics(seed=0)
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["statistics"])
    for _ in range(2):
        assert prepare_queues(model) == QUEUE
    assert list(model._ddp_params_and_buffers_to_ignore) == ["statistics", *QUEUE]


def test_a_queue_is_prepared_alone_and_a_model_without_queues_is_left_as_it_is():
    assert prepare_queues(KeyQueue(8, 4)) == ["keys", "cursor", "valid"]
    assert prepare_queues(nn.Linear(2, 2)) == []


def test_a_queue_in_two_places_is_named_once():
    queue = KeyQueue(8, 4)
    assert prepare_queues(nn.ModuleDict({"a": queue, "b": queue})) == ["a.keys", "a.cursor", "a.valid"]


def test_a_torch_without_distributed_gets_the_names(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert prepare_queues(WithStatistics(seed=0)) == QUEUE


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match=r"prepare_queues: `model` got list, expected a torch\.nn\.Module"):
        prepare_queues([])  # type: ignore[arg-type]


# The example


def test_the_example_runs_under_torchrun_and_its_ranks_end_with_equal_queues():
    pytest.importorskip("sklearn")
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(WORLD),
        str(EXAMPLE),
        "--steps",
        "8",
    ]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "processes 2, steps 8 of 128 images" in run.stdout
    assert "queues of all ranks are equal" in run.stdout


def test_the_example_runs_alone_and_learns(moco_ddp, capsys):
    assert moco_ddp.main(["--steps", "60"]) == 0
    output = capsys.readouterr().out
    assert "processes 1, steps 60 of 64 images" in output
    highest, last = map(float, re.findall(r"loss ([\d.]+) at its highest .* -> ([\d.]+)", output)[0])
    assert last < highest - 0.1
    (accuracy,) = re.findall(r"accuracy on held-out images ([\d.]+) %", output)
    assert float(accuracy) > 70, "chance is 10"


def test_queues_that_differ_fail_the_example(moco_ddp, monkeypatch):
    monkeypatch.setattr(moco_ddp, "queues_agree", lambda queue: False)
    monkeypatch.setattr(moco_ddp.distributed, "is_torchelastic_launched", lambda: True)
    store = torch.distributed.HashStore()
    start = torch.distributed.init_process_group
    monkeypatch.setattr(
        moco_ddp.distributed, "init_process_group", lambda: start("gloo", store=store, rank=0, world_size=1)
    )
    assert moco_ddp.main(["--steps", "1"]) == 1
    assert not torch.distributed.is_initialized()


def test_without_scikit_learn_the_example_says_what_to_install(moco_ddp, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert moco_ddp.main([]) == 2
    assert "perfvl[examples]" in capsys.readouterr().err
