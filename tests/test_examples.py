"""The examples run, and their two losses train alike."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from perfvl.benchmarks import registry
from perfvl.benchmarks.moco_digits import eager_loss, fused_loss
from perfvl.benchmarks.moco_digits_training import MoCoTrainer, augment
from perfvl.benchmarks.runner import run_workload
from perfvl.benchmarks.timing import cpu_clock

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def moco_digits() -> ModuleType:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("moco_digits_example", EXAMPLES / "moco_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(count: int = 40) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_both_losses_give_the_same_curve(moco_digits: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert moco_digits.main(["--steps", "4", "--no-memory"]) == 0
    output = capsys.readouterr().out
    assert "eager: loss" in output
    assert "fused: loss" in output
    assert "loss curves differ by at most" in output


def test_one_loss_alone_prints_its_memory(moco_digits: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert moco_digits.main(["--steps", "1", "--loss", "fused"]) == 0
    output = capsys.readouterr().out
    assert "fused: peak extra memory" in output
    assert "eager" not in output


def test_a_wrong_loss_fails_the_example(moco_digits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moco_digits, "eager_loss", lambda q, k, n: 1.01 * eager_loss(q, k, n))
    assert moco_digits.main(["--steps", "2", "--no-memory"]) == 1


def test_without_scikit_learn_the_example_says_what_to_install(
    moco_digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert moco_digits.main([]) == 2
    assert "perfvl[examples]" in capsys.readouterr().err


def test_equal_seeds_train_alike_and_others_do_not() -> None:
    def losses(seed: int) -> list[float]:
        trainer = MoCoTrainer(images(), fused_loss(), batch=8, queue_size=64, width=16, seed=seed)
        return [float(trainer.step()) for _ in range(3)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_a_step_trains_the_encoder_follows_with_the_key_encoder_and_fills_the_queue() -> None:
    trainer = MoCoTrainer(images(), fused_loss(), batch=8, queue_size=16, width=16, momentum=0.5)
    weight, slow = (m.projection.weight.detach().clone() for m in (trainer.encoder, trainer.key_encoder))
    before = trainer.queue.clone()
    trainer.step()
    trainer.step()
    assert not torch.equal(trainer.encoder.projection.weight, weight)
    assert not torch.equal(trainer.key_encoder.projection.weight, slow)
    assert all(parameter.grad is None for parameter in trainer.key_encoder.parameters())
    assert not torch.equal(trainer.queue[:8], before[:8])
    assert not torch.equal(trainer.queue[8:], before[8:])
    assert trainer.cursor == 0, "the ring is full after two batches of 8"
    torch.testing.assert_close(trainer.queue.norm(dim=1), torch.ones(16))


def test_augmentation_shifts_by_at_most_one_pixel_and_keeps_the_shape() -> None:
    point = torch.zeros(500, 1, 8, 8)
    point[:, :, 4, 4] = 10.0
    seen = augment(point, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    assert set(seen.tolist()) == {8 * y + x for y in (3, 4, 5) for x in (3, 4, 5)}


def test_a_queue_that_batches_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the batch size"):
        MoCoTrainer(images(), fused_loss(), batch=8, queue_size=60)


def test_the_training_workload_finds_equal_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("perfvl.benchmarks.moco_digits.STEPS_COMPARED", 4)
    (workload,) = registry.workloads("moco_digits")
    record = run_workload(workload, torch.device("cpu"), cpu_clock, seconds=0.1, measure_memory=False)
    assert {row["contender"]: row["match"] for row in record["rows"]} == {"perfvl": True, "eager": True}
