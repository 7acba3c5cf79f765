"""A small CaffeNet study on handwritten digits: one design choice at a time, beside what each one did on ImageNet.

    python examples/caffenet_study.py

Trains 18 small relatives of CaffeNet128 with its activations, poolings, batch norms, initialisations and learning
rates, on a third of scikit-learn's digits, enlarged to 32 pixels, and prints the accuracy on the others next to the
published top-1 on ImageNet. Saves bar charts.

What is small here: the network (conv1 of 3x3 at stride 1 as the study's for 32 pixels, a sixth of its channels), the
data (600 digits, half of what ImageNet has of each class) and the training (batches of 32, Nesterov's momentum, no
dropout, 216 steps). So the order of the rows is not that of ImageNet, and need not be. Each network is trained with
three seeds, and rows whose ranges overlap are not to be told apart. What does carry over: nothing is learned in this
time from the published Gaussian start, and everything from LSUV.

Needs scikit-learn, rich and matplotlib (pip install 'perfvl[examples]') and under five minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from perfvl import schedules
from perfvl.models.caffenet import CaffeNet128, parameter_groups
from perfvl.models.caffenet_variants import PUBLISHED
from perfvl.nn import lsuv_init_

SIZE, BATCH, SEEN = 32, 32, 600
LEARNED = 80.0  # percent, of the base
SMALL: dict[str, Any] = {
    "num_classes": 10,
    "in_channels": 1,
    "input_size": SIZE,
    "mean": (78.0,),  # of the digits, 0 to 255, and one over their deviation
    "scale": 1 / 92,
    "conv1_kernel": 3,
    "conv1_stride": 1,
    "channels": (16, 40, 64, 64, 40),
    "fc": 128,
    "dropout": 0.0,
}
Schedule = Callable[[torch.optim.Optimizer, int], LambdaLR]
SCHEDULES: dict[str, tuple[Schedule, str | None]] = {
    "steps": (lambda optimizer, count: schedules.step(optimizer, max(1, count * 100 // 320)), "lr_policy/step_100k"),
    "square root": (schedules.square_root, "lr_policy/sqrt"),
    "square": (schedules.square, "lr_policy/square"),
    "linear": (schedules.linear, "lr_policy/linear"),
    "linear times cosine": (schedules.linear_cosine, None),
}


class Trial(NamedTuple):
    """A network to train: what differs from the base, and the row of the study that it stands for."""

    group: str
    name: str
    published: str | None
    changes: Mapping[str, Any] = {}
    schedule: str = "steps"
    lsuv: bool = True

    @property
    def top1(self) -> float | None:
        """On ImageNet, in percent."""
        return None if self.published is None else 100 * PUBLISHED[self.published].top1


def trials() -> list[Trial]:
    """The base, and every choice on its own."""
    found = [Trial("base", "ReLU, max pools, LSUV, steps", "activation/relu")]
    activations = ("tanh", "vlrelu", "rrelu", "prelu", "elu", "maxout_same_complexity", "apl2")
    for name in activations:
        changes = {k: v for k, v in (PUBLISHED[f"activation/{name}"].config or {}).items() if k == "activation"}
        if name == "maxout_same_complexity":  # widths divided by the square root of two
            changes |= {"channels": (12, 28, 44, 44, 28), "fc": 90}
        found.append(Trial("activation", name, f"activation/{name}", changes))
    for name in ("avg", "stochastic", "max_plus_avg"):
        found.append(Trial("pooling", name, f"pooling/{name}", PUBLISHED[f"pooling/{name}"].config or {}))
    for name in ("before", "after"):
        found.append(Trial("batch norm", name, f"batchnorm/{name}", PUBLISHED[f"batchnorm/{name}"].config or {}))
    found.append(Trial("start", "Gaussian, without LSUV", None, lsuv=False))
    for name, (_, published) in SCHEDULES.items():
        if name != "steps":  # the base's
            found.append(Trial("learning rate", name, published, schedule=name))
    return found


class Digits(NamedTuple):
    """Pixels uint8 [N, 1, 32, 32], of 0 to 255, and labels [N]."""

    images: Tensor
    labels: Tensor


def load_digits(generator: torch.Generator) -> tuple[Digits, Digits]:
    """Digits to learn from, and the others."""
    from sklearn.datasets import load_digits as load

    raw = load()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, (SIZE, SIZE), mode="bilinear").round().to(torch.uint8)
    order = torch.randperm(len(images), generator=generator)
    seen, held_out = (Digits(images[rows], torch.tensor(raw.target)[rows]) for rows in (order[:SEEN], order[SEEN:]))
    return seen, held_out


class Result(NamedTuple):
    """Accuracies on the held-out digits by seed, in percent, and the seconds of training."""

    trial: Trial
    accuracies: list[float]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Mean."""
        return sum(self.accuracies) / len(self.accuracies)


def train(trial: Trial, seen: Digits, held_out: Digits, epochs: int, seed: int) -> float:
    """One network, from its start to its accuracy."""
    torch.manual_seed(seed)
    model = CaffeNet128(**{**SMALL, **trial.changes}).to(memory_format=torch.channels_last)
    if trial.lsuv:
        lsuv_init_(model, seen.images[:256])
    optimizer = torch.optim.SGD(parameter_groups(model), momentum=0.9, nesterov=True, fused=True)
    batches = len(seen.labels) // BATCH
    schedule = SCHEDULES[trial.schedule][0](optimizer, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(seen.labels))[: batches * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(seen.images[rows]), seen.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(part) for part in held_out.images.split(256)]).argmax(1) == held_out.labels
    return 100 * right.float().mean().item()


def train_all(trials: Sequence[Trial], epochs: int, seeds: int) -> list[Result]:
    """Every network with every seed."""
    from rich.progress import track

    seen, held_out = load_digits(torch.Generator().manual_seed(0))
    print(f"{len(trials)} networks, {epochs} epochs of {len(seen.labels)} digits; {len(held_out.labels)} to judge by")
    results = []
    for trial in track(trials, description="training"):
        start = time.perf_counter()
        accuracies = [train(trial, seen, held_out, epochs, seed) for seed in range(seeds)]
        results.append(Result(trial, accuracies, time.perf_counter() - start))
    return results


def print_table(results: Sequence[Result]) -> None:
    """A row for each trial; ImageNet's accuracies are of the whole network and recipe."""
    print(f"\n{'':<44}{'digits, %':>10}{'from - to':>14}{'ImageNet top-1, %':>20}{'seconds':>10}")
    for result in results:
        trial, accuracies = result.trial, result.accuracies
        published = "-" if trial.top1 is None else f"{trial.top1:.1f}"
        name, span = f"{trial.group}: {trial.name}", f"{min(accuracies):.1f} - {max(accuracies):.1f}"
        print(f"{name:<44}{result.accuracy:>10.1f}{span:>14}{published:>20}{result.seconds:>10.1f}")


def plot(results: Sequence[Result], file: Path) -> None:
    """Bars by group with the range of their seeds, beside ImageNet's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{result.trial.group}: {result.trial.name}" for result in results]
    columns = {
        "digits here": [result.accuracy for result in results],
        "ImageNet, published": [result.trial.top1 or 0.0 for result in results],
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 0.32 * len(names) + 1), sharey=True)
    for axes, (title, values) in zip(panels, columns.items(), strict=True):
        bars = axes.barh(names, values, color="tab:blue" if title.startswith("digits") else "tab:gray")
        if title.startswith("digits"):
            lowest, highest = ([f(result.accuracies) for result in results] for f in (min, max))
            axes.hlines(names, lowest, highest, color="black", linewidth=1)
        axes.bar_label(bars, [f"{value:.1f}" if value else "-" for value in values], padding=3)
        axes.set(title=f"accuracy, %: {title}", xlim=(0, 1.15 * max(values)))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, plots, and returns 1 where LSUV did not learn or the Gaussian start did not stay behind."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12, help="of each network")
    parser.add_argument("--seeds", type=int, default=3, help="how often each network is trained")
    parser.add_argument("--quick", action="store_true", help="one seed of the base and one choice of each kind")
    parser.add_argument("--folder", type=Path, default=Path("caffenet_study"), help="for the chart")
    options = parser.parse_args(argv)
    if min(options.epochs, options.seeds) < 1:
        parser.error("--epochs and --seeds must be at least 1")
    try:
        import matplotlib  # noqa: F401
        import rich.progress  # noqa: F401
        import sklearn.datasets  # noqa: F401
    except ImportError as reason:
        print(f"{reason}: pip install 'perfvl[examples]'", file=sys.stderr)
        return 2
    chosen, seeds = trials(), options.seeds
    if options.quick:
        groups = [trial.group for trial in chosen]
        chosen, seeds = [trial for i, trial in enumerate(chosen) if trial.group not in groups[:i]], 1
    results = train_all(chosen, options.epochs, seeds)
    print_table(results)
    options.folder.mkdir(parents=True, exist_ok=True)
    plot(results, options.folder / "accuracies.png")
    print(f"chart: {options.folder / 'accuracies.png'}")
    learned = results[0].accuracy
    stayed = next(result.accuracy for result in results if not result.trial.lsuv)
    return 0 if learned >= LEARNED and stayed < learned else 1


if __name__ == "__main__":
    sys.exit(main())
