"""Train five methods on handwritten digits with wrong labels, every kind of noise and every seed at once, and compare.

    python examples/noisy_digits.py

Standard training, Decoupling, Co-teaching, Co-teaching+ and JoCoR see scikit-learn's 8x8 digits with 20 % and 50 % of
the labels replaced by any other class (symmetric), and 45 % by the next class (pair flip). A network that trains long
enough learns the wrong labels too; two networks that select rows of small loss for one another learn fewer of them.

perfvl's losses take leading dimensions, forget rates included. So one step here trains G = noises x seeds pairs of
networks: parameters [G, in, out], logits [G, n, K], labels [G, n], forget rates [G]. The groups are independent, down
to their own split into training and test images. Prints the test accuracy of the last epochs, mean and standard
deviation over the seeds, and label precision: the clean share of the rows that trained network 1. Saves a plot. The
best epoch is picked with the right labels of the test images, which nobody has: it shows what the last epochs forgot.

The recipe is that of the papers at a smaller scale: Adam at 1e-3 with linear decay, a forget rate that rises to the
noise rate in ten epochs, plain training (Decoupling) or Co-teaching (Co-teaching+) in the first ten, and JoCoR's weight
of agreement for CIFAR-10. Width, batch size and epochs give standard training the time to learn wrong labels; no method
has settings of its own. Decoupling and Co-teaching+ train where the networks disagree, which in the end is mostly where
the labels are wrong: their label precision is below the share of clean labels.

Needs scikit-learn, rich and matplotlib (pip install 'perfvl[examples]') and under two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perfvl.label_noise import add_label_noise, label_precision
from perfvl.nn import CoTeachingLoss, CoTeachingPlusLoss, DecouplingLoss, JoCoRLoss, TwinStep
from perfvl.schedules import forget_rate, linear_decay

CLASSES = 10
HIDDEN = 256
BATCH = 32
LEARNING_RATE = 1e-3
FIRST_EPOCHS = 10  # of the forget rate's rise, and before Decoupling and Co-teaching+ look at disagreement
NOISES = (("symmetric", 0.2), ("symmetric", 0.5), ("pairflip", 0.45))


class Method(NamedTuple):
    criterion: nn.Module
    first: nn.Module | None = None
    """In the first epochs instead."""
    forgets: bool = True


# Co-teaching that forgets nothing is the plain mean of the cross-entropy.
METHODS = {
    "Standard": Method(CoTeachingLoss(), forgets=False),
    "Decoupling": Method(DecouplingLoss(), first=CoTeachingLoss(), forgets=False),
    "Co-teaching": Method(CoTeachingLoss()),
    "Co-teaching+": Method(CoTeachingPlusLoss(), first=CoTeachingLoss()),
    "JoCoR": Method(JoCoRLoss(co_lambda=0.9)),
}


class BatchedMLP(nn.Module):
    """G multi-layer perceptrons side by side: [G, n, in] -> [G, n, out]."""

    def __init__(self, groups: int, *sizes: int) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.weights = nn.ParameterList(uniform(groups, i, o, bound=i**-0.5) for i, o in pairs)
        self.biases = nn.ParameterList(uniform(groups, 1, o, bound=i**-0.5) for i, o in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight)
        return x


def uniform(*shape: int, bound: float) -> nn.Parameter:
    """As ``nn.Linear`` initialises."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Data(NamedTuple):
    """Every group's own split and noise; groups are ordered by noise, then by seed."""

    images: Tensor  # [G, n, 64]
    labels: Tensor  # [G, n], with noise
    clean: Tensor  # [G, n], where the label is right
    test_images: Tensor  # [G, m, 64]
    test_labels: Tensor  # [G, m], without noise
    rates: Tensor  # [G]


def corrupted(images: Tensor, labels: Tensor, seeds: int) -> Data:
    """A fifth of the images is held out with its right labels; seeds differ in which, and in the noise."""
    train_count, groups = int(0.8 * len(images)), []
    for kind, rate in NOISES:
        for seed in range(seeds):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            seen, held_out = order[:train_count], order[train_count:]
            noisy = add_label_noise(labels[seen], kind, rate, num_classes=CLASSES, seed=seed)
            mean, deviation = images[seen].mean(), images[seen].std()
            x, test_x = ((images[rows] - mean) / deviation for rows in (seen, held_out))
            groups.append((x, noisy.labels, noisy.clean, test_x, labels[held_out], torch.tensor(rate)))
    return Data(*map(torch.stack, zip(*groups, strict=True)))


def train(method: Method, data: Data, epochs: Iterable[int], last_epoch: int) -> tuple[Tensor, Tensor]:
    """Test accuracy [epochs, G], mean of the two networks, and label precision after the first epochs [G]."""
    torch.manual_seed(0)
    groups, count, pixels = data.images.shape
    networks = [BatchedMLP(groups, pixels, HIDDEN, CLASSES) for _ in range(2)]
    # JoCoR: one loss, one optimiser.
    trained = [nn.ModuleList(networks)] if isinstance(method.criterion, JoCoRLoss) else networks
    optimizers = [torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True) for module in trained]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda e: linear_decay(e, start=int(0.4 * last_epoch), epochs=last_epoch)
        )
        for optimizer in optimizers
    ]
    step = TwinStep(*networks, method.criterion, optimizers)
    first_step = TwinStep(*networks, method.first or method.criterion, optimizers)

    accuracies, kept, clean = [], [], []
    group = torch.arange(groups).unsqueeze(1)
    for epoch in epochs:
        now = first_step if epoch <= FIRST_EPOCHS else step
        if not isinstance(now.criterion, DecouplingLoss):
            rise = forget_rate(epoch, 1.0, gradual=FIRST_EPOCHS) if method.forgets else 0.0
            now.forget_rate = rise * data.rates
        order = torch.rand(groups, count).argsort(1)
        for rows in order.split(BATCH, dim=1):
            losses, _, _ = now(data.images[group, rows], data.labels[group, rows])
            if epoch > min(FIRST_EPOCHS, last_epoch - 1):
                kept.append(losses.kept1)
                clean.append(data.clean[group, rows])
        for scheduler in schedulers:
            scheduler.step()
        with torch.no_grad():
            right = [network(data.test_images).argmax(-1) == data.test_labels for network in networks]
        accuracies.append(torch.stack(right).float().mean((0, 2)))
    return torch.stack(accuracies), label_precision(torch.cat(kept, 1), torch.cat(clean, 1))


def last(epochs: int) -> int:
    """How many epochs the reported accuracy is the mean of."""
    return max(1, min(10, epochs // 4))


def by_noise(values: Tensor) -> Tensor:
    """[..., G] -> [..., noises, seeds]."""
    return values.unflatten(-1, (len(NOISES), -1))


def name_of(noise: tuple[str, float]) -> str:
    return f"{noise[0]} {100 * noise[1]:.0f} %"


def print_table(title: str, results: dict[str, Tensor]) -> None:
    """Results [G] of every method, in per cent, as mean and deviation over seeds."""
    print(f"\n{title:<35}" + "".join(f"{name_of(noise):>18}" for noise in NOISES))
    for method, values in results.items():
        table = 100 * by_noise(values)
        means, deviations = table.mean(-1).tolist(), table.std(-1, correction=int(table.shape[-1] > 1)).tolist()
        cells = (f"{f'{mean:.1f} +- {deviation:.1f}':>18}" for mean, deviation in zip(means, deviations, strict=True))
        print(f"{method:<35}" + "".join(cells))


def plot(curves: dict[str, Tensor], file: Path) -> None:
    """Accuracy over the epochs: mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(NOISES), figsize=(5 * len(NOISES), 4), sharex=True)
    for method, curve in curves.items():
        for axes, values in zip(panels, (100 * by_noise(curve)).unbind(1), strict=True):
            epochs = range(1, len(values) + 1)
            axes.plot(epochs, values.mean(1), label=method)
            axes.fill_between(epochs, values.amin(1), values.amax(1), alpha=0.15)
    for axes, noise in zip(panels, NOISES, strict=True):
        axes.set(title=name_of(noise), xlabel="epoch", ylabel="test accuracy, %")
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, plots, and returns 1 where selecting rows does not help against symmetric noise of 50 %."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20 epochs and 2 seeds")
    parser.add_argument("--threads", type=int, default=1, help="steps this small do not gain from more than one")
    parser.add_argument("--plot", type=Path, default=Path("noisy_digits.png"))
    options = parser.parse_args(argv)
    epochs, seeds = (20, 2) if options.quick else (options.epochs, options.seeds)
    if epochs < 1 or seeds < 1:
        parser.error("--epochs and --seeds must be at least 1")
    try:
        import matplotlib  # noqa: F401
        from rich.progress import track
        from sklearn.datasets import load_digits
    except ImportError as reason:
        print(f"{reason}: pip install 'perfvl[examples]'", file=sys.stderr)
        return 2
    digits = load_digits()
    data = corrupted(torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target), seeds)
    groups, count, _ = data.images.shape
    print(f"{groups} groups of {count} images, {epochs} epochs; accuracy on {data.test_labels.shape[1]} other images")

    threads, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(options.threads)
    curves: dict[str, Tensor] = {}
    precisions: dict[str, Tensor] = {}
    try:
        for name, method in METHODS.items():
            advancing = track(range(1, epochs + 1), description=f"{name:<12}")
            curves[name], precisions[name] = train(method, data, advancing, epochs)
    finally:
        torch.set_num_threads(threads)
    print(f"{len(METHODS)} methods in {time.perf_counter() - start:.0f} s")

    accuracies = {name: curve[-last(epochs) :].mean(0) for name, curve in curves.items()}
    print_table(f"accuracy, last {last(epochs)} epochs, %", accuracies)
    print_table("best epoch, by test accuracy, %", {name: curve.amax(0) for name, curve in curves.items()})
    print_table(f"label precision after epoch {FIRST_EPOCHS}, %", precisions)
    plot(curves, options.plot)
    print(f"\nplot: {options.plot}")
    half = NOISES.index(("symmetric", 0.5))
    standard, *selecting = (by_noise(accuracies[name])[half].mean() for name in ("Standard", "Co-teaching", "JoCoR"))
    return 0 if min(selecting) > standard else 1


if __name__ == "__main__":
    sys.exit(main())
