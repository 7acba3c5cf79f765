"""Pre-train a small BriVL on handwritten digits and weakly correlated Chinese captions, then retrieve both ways.

    python examples/brivl_digits.py --loss both

Two thirds of the captions name the digit; the rest say less (its parity, or that it is a digit), as captions from the
web do. Trains image and text tower, their momentum copies and two queues of 1,024 keys with perfvl's kernels, with
plain PyTorch, or with both on equal seeds, and compares the loss curves. Prints recall on held-out images and saves a
plot. The loss cannot fall far: among 1,024 keys there are many of the same digit. It rises as the learning rate falls,
as recall does: the slower the towers move, the fresher, hence harder, the keys of earlier batches are.

A caption that names a digit is right for every image of it. So R@k is, image to text, how often one of the k best of
the 50 naming captions names the image's digit; text to image, how often one of the k best held-out images shows the
digit that the caption names. What a random order would give is printed beside it.

Needs scikit-learn, rich and matplotlib (pip install 'perfvl[examples]') and under two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from perfvl.benchmarks.moco_digits_training import augment, load_digits
from perfvl.benchmarks.workload import Unavailable
from torch import Tensor

import perfvl
from perfvl.models import BriVL, brivl_small, retrieve

SIZE = 8
BATCH = 128
QUEUE = 1024
LEARNING_RATE = 1e-3
NAMES = "零一二三四五六七八九"
NAMING = ("手写数字{}", "图中写的是{}", "这个数字是{}", "有人写了一个{}", "{},手写体")
PARITY = ("图中是一个偶数", "图中是一个奇数")
VAGUE = ("一个手写数字", "图中有一个数字")
PADDING = "\0"
ALPHABET = sorted({PADDING, *"".join((NAMES, *NAMING, *PARITY, *VAGUE)).replace("{}", "")})
LONGEST = max(len(caption.format("一")) for caption in (*NAMING, *PARITY, *VAGUE))
RANKS = (1, 5, 10)

Recalls = dict[str, list[float]]
"""R@k in [0, 1] for every k of RANKS, for "image to text" and "text to image"."""


def captions_for(labels: Tensor, generator: torch.Generator) -> list[str]:
    """A caption for every digit: 2/3 name it, 2/9 give its parity, 1/9 only say that it is one."""
    kinds = torch.randint(9, (len(labels),), generator=generator).tolist()
    choices = torch.randint(10, (len(labels),), generator=generator).tolist()
    captions = []
    for label, kind, choice in zip(labels.tolist(), kinds, choices, strict=True):
        if kind < 6:
            captions.append(NAMING[choice % len(NAMING)].format(NAMES[label]))
        else:
            captions.append(PARITY[label % 2] if kind < 8 else VAGUE[choice % len(VAGUE)])
    return captions


def tokenized(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """One token for each character: ids and mask [B, LONGEST]."""
    ids = torch.tensor([[ALPHABET.index(c) for c in caption.ljust(LONGEST, PADDING)] for caption in captions])
    return ids, ids != ALPHABET.index(PADDING)


def with_boxes(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 1, 8, 8] with the boxes of their four quarters and, last, of the whole image, as BriVL orders them."""
    half, boxes = SIZE / 2, torch.zeros(5, 4)
    for i in range(4):
        x, y = half * (i % 2), half * (i // 2)
        boxes[i] = torch.tensor([x, y, x + half, y + half])
    boxes[4, 2:] = SIZE
    return images, boxes.expand(len(images), 5, 4), torch.ones(len(images), 5)


@torch.no_grad()
def recalls(model: BriVL, images: Tensor, labels: Tensor) -> Recalls:
    """R@k of held-out images against the naming captions, both ways."""
    model.eval()
    captions = [template.format(name) for name in NAMES for template in NAMING]
    named = torch.arange(len(NAMES)).repeat_interleave(len(NAMING))
    image_features = model.get_image_features(with_boxes(images))
    text_features = model.get_text_features(tokenized(captions))
    model.train()
    found = {}
    for name, queries, candidates, wanted, shown in (
        ("image to text", image_features, text_features, labels, named),
        ("text to image", text_features, image_features, named, labels),
    ):
        best = shown[retrieve(queries, candidates, RANKS[-1]).indices]
        hits = best == wanted[:, None]
        found[name] = [float(hits[:, :k].any(1).float().mean()) for k in RANKS]
    return found


def chance(labels: Tensor) -> Recalls:
    """What a random order of the candidates gives."""
    counts, images, texts = torch.bincount(labels, minlength=10).tolist(), len(labels), len(NAMES) * len(NAMING)

    def hit(right: int, candidates: int, k: int) -> float:
        return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)

    return {
        "image to text": [hit(len(NAMING), texts, k) for k in RANKS],
        "text to image": [statistics.mean(hit(count, images, k) for count in counts) for k in RANKS],
    }


class Run:
    """A seeded training run. Equal seeds see equal pairs and augmentations on every backend."""

    def __init__(self, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = brivl_small(
            len(ALPHABET), image_size=SIZE, image_channels=1, max_tokens=LONGEST, queue_size=QUEUE, momentum=0.99
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        warmup = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))),
        )

    def step(self) -> float:
        """One step on a random batch; returns the loss of a pair, both directions together, before the update."""
        chosen = torch.randperm(len(self.images), generator=self.generator)[:BATCH]
        views = augment(self.images[chosen], self.generator)
        texts = tokenized(captions_for(self.labels[chosen], self.generator))
        loss = self.model(with_boxes(views), texts).loss / len(chosen)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def plot(losses: dict[str, list[float]], progress: dict[str, list[tuple[int, Recalls]]], file: Path) -> None:
    """Loss and R@1 over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for backend, curve in losses.items():
        left.plot(curve, label=backend, linestyle="--" if backend == "reference" else "-")
        for direction in progress[backend][0][1]:
            steps = [step for step, _ in progress[backend]]
            right.plot(
                steps,
                [100 * found[direction][0] for _, found in progress[backend]],
                label=f"{direction}, {backend}",
                linestyle="--" if backend == "reference" else "-",
            )
    left.set(xlabel="step", ylabel="loss of a pair, nats")
    right.set(xlabel="step", ylabel="R@1 on held-out images, %", ylim=(0, 100))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, plots, and returns 1 where two loss curves that should agree do not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loss", choices=("fused", "reference", "both"), default="both")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("brivl_digits.png"))
    options = parser.parse_args(argv)
    try:
        images, labels = load_digits()
        import matplotlib  # noqa: F401
        from rich.progress import track
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return 2
    except ImportError as reason:
        print(f"{reason}: pip install 'perfvl[examples]'", file=sys.stderr)
        return 2
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    images, labels = images[order], labels[order]
    train_count = int(0.8 * len(images))
    held_out = images[train_count:], labels[train_count:]
    print(f"{train_count} images, {options.steps} steps of {BATCH} pairs; R@k on the other {len(held_out[0])} images")

    losses: dict[str, list[float]] = {}
    progress: dict[str, list[tuple[int, Recalls]]] = {}
    found = {"chance": chance(held_out[1])}
    for name in ("fused", "reference") if options.loss == "both" else (options.loss,):
        run = Run(images[:train_count], labels[:train_count], options.steps, options.seed)
        losses[name], progress[name], seconds = [], [(0, recalls(run.model, *held_out))], []
        with perfvl.use_backend("reference" if name == "reference" else "auto"):
            for step in track(range(1, options.steps + 1), description=name):
                start = time.perf_counter()
                losses[name].append(run.step())
                seconds.append(time.perf_counter() - start)
                if step % max(1, options.steps // 10) == 0 or step == options.steps:
                    progress[name].append((step, recalls(run.model, *held_out)))
        found[name] = progress[name][-1][1]
        print(
            f"{name}: loss of a pair {losses[name][0]:.4f} -> {losses[name][-1]:.4f}, "
            f"median step {1e3 * statistics.median(seconds):.1f} ms"
        )
    for name, result in found.items():
        for direction, values in result.items():
            numbers = ", ".join(f"R@{k} {100 * value:.1f} %" for k, value in zip(RANKS, values, strict=True))
            print(f"{name:<9} {direction}: {numbers}")
    plot(losses, progress, options.plot)
    print(f"plot: {options.plot}")
    if len(losses) < 2:
        return 0
    differences = [abs(a - b) for a, b in zip(losses["fused"], losses["reference"], strict=True)]
    early = max(differences[:20])
    print(f"loss curves differ by at most {early:.1e} over the first 20 steps, {max(differences):.1e} over all of them")
    return 0 if early < 1e-4 * max(losses["reference"]) else 1


if __name__ == "__main__":
    sys.exit(main())
