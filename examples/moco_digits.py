"""Train MoCo on handwritten digits with PyTorch's loss, with perfvl's, or with both on equal seeds, and compare.

    python examples/moco_digits.py --loss both

Needs scikit-learn (pip install 'perfvl[examples]'). Takes well under two minutes on two CPU cores. The training step
itself is in ``perfvl/benchmarks/moco_digits_training.py``: the only line that changes is the loss.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from perfvl.benchmarks.memory import MemoryProbe
from perfvl.benchmarks.moco_digits import WORKLOADS, eager_loss, fused_loss
from perfvl.benchmarks.moco_digits_training import Loss, MoCoTrainer, load_digits
from perfvl.benchmarks.workload import Unavailable


def train(images: torch.Tensor, loss: Loss, steps: int, seed: int) -> tuple[MoCoTrainer, list[float], list[float]]:
    """The trained run, its loss at every step, and the seconds every step took."""
    trainer = MoCoTrainer(images, loss, seed=seed)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(trainer.step()))
        seconds.append(time.perf_counter() - start)
    return trainer, losses, seconds


def neighbour_accuracy(features: torch.Tensor, labels: torch.Tensor, train_count: int) -> float:
    """Accuracy of a 5-nearest-neighbour classifier on the rows after ``train_count``, fitted on those before."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(5).fit(features[:train_count].numpy(), labels[:train_count].numpy())
    return float(classifier.score(features[train_count:].numpy(), labels[train_count:].numpy()))


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, and returns 1 where two loss curves that should agree do not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loss", choices=("eager", "fused", "both"), default="both")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--steps", type=int, help="stop after this many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    options = parser.parse_args(argv)
    try:
        images, labels = load_digits()
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return 2
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    images, labels = images[order], labels[order]
    train_count = int(0.8 * len(images))
    seen = images[:train_count]  # the held-out images are not trained on, with or without labels
    steps = options.steps or options.epochs * (len(seen) // 128)

    curves: dict[str, list[float]] = {}
    raw = neighbour_accuracy(images.flatten(1), labels, train_count)
    print(
        f"{train_count} images, {steps} steps; 5-nearest-neighbour accuracy on the other images "
        f"from raw pixels: {100 * raw:.1f} %"
    )
    losses = {"eager": eager_loss, "fused": fused_loss()}
    for name in losses if options.loss == "both" else [options.loss]:
        trainer, curves[name], seconds = train(seen, losses[name], steps, options.seed)
        with torch.no_grad():
            accuracy = neighbour_accuracy(trainer.encoder(images), labels, train_count)
        print(
            f"{name}: loss {curves[name][0]:.4f} -> {curves[name][-1]:.4f}, "
            f"median step {1e3 * statistics.median(seconds):.2f} ms, "
            f"accuracy from the learnt embedding {100 * accuracy:.1f} %"
        )
    if not options.no_memory:
        with MemoryProbe() as probe:
            for name in curves:
                contender = "perfvl" if name == "fused" else "eager"
                peak = probe.contender(WORKLOADS[0], contender, options.seed).get("peak_bytes")
                print(
                    f"{name}: peak extra memory of a step {'not measured' if peak is None else f'{peak / 1e6:.1f} MB'}"
                )
    if len(curves) < 2:
        return 0
    differences = [abs(a - b) for a, b in zip(curves["eager"], curves["fused"], strict=True)]
    early = max(differences[:20])
    print(f"loss curves differ by at most {early:.1e} over the first 20 steps, {max(differences):.1e} over all {steps}")
    return 0 if early < 1e-4 * max(curves["eager"]) else 1


if __name__ == "__main__":
    sys.exit(main())
