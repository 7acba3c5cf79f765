"""Train StackGAN's two stages on handwritten digits and ask for digits by caption.

    python examples/stackgan_digits.py

Stage I makes images of 16 pixels from caption and noise; Stage II makes 32 pixels of Stage I's, with the caption again.
A classifier that has seen real digits only says how often an image shows the digit that its caption asks for. Prints a
table, and saves grids of images after every epoch and a plot of the losses.

What is small here, and what is not real. The images are scikit-learn's, of 8x8 pixels, enlarged: at 32 pixels there is
no more to see than at 16, so Stage II has no detail to add and can only draw what Stage I drew once more. The captions
are no text: each digit has a fixed random embedding of 64 numbers, and each caption of it adds noise, 0.4 of the
embedding's size, as one digit is described in several ways. That is easier than embeddings of sentences.

The recipe is the published one (Adam, betas 0.5 and 0.999, crops out of 76/64 of the size) but for a batch of 32 (64),
learning rates of 1e-3 and 4e-4 of generator and discriminator (2e-4 for both), a weight of 0.1 of the divergence (2.0),
and a Stage II that starts with Stage I's conditioning (with one of its own): digits get a thousand steps, not 600
epochs. Under a larger weight mu stays near 0 for hundreds of steps, and mu is all that the discriminator sees of a
caption.

Needs scikit-learn, rich and matplotlib (pip install 'perfvl[examples]') and under four minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.models.stackgan import Stage1Discriminator, Stage1Generator, Stage2Discriminator, Stage2Generator
from perfvl.models.stackgan_step import StepOutput, train_step
from perfvl.stackgan_data import save_image_grid, training_crop

if TYPE_CHECKING:
    from sklearn.svm import SVC

CLASSES = 10
SIZES = (16, 32)  # Stage I, Stage II
TEXT, CAPTIONS, WORDING = 64, 10, 0.4
NOISE, CONDITION = 32, 32
BATCH = 32
RATES = (1e-3, 4e-4)  # of generator and discriminator
KL_WEIGHT = 0.1
GRID_ROWS, MAGNIFIED = 6, 64
WANTED = 0.6  # share of Stage I's images that show the digit asked for


class Digits(NamedTuple):
    """Images with their captions, as a data set of StackGAN has them."""

    images: Tensor  # uint8 [N, 3, 10, 10]
    labels: Tensor  # [N]
    captions: Tensor  # [N, CAPTIONS, TEXT]

    def batch(self, rows: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crops [B, 3, size, size] and one caption of each image [B, TEXT]. Mirrored digits would be none."""
        crops = [training_crop(self.images[row], size, generator=generator, flip=False) for row in rows.tolist()]
        chosen = torch.randint(CAPTIONS, (len(rows),), generator=generator)
        return torch.stack(crops), self.captions[rows, chosen]


class Captions:
    """Embeddings of sentences that name a digit."""

    def __init__(self, generator: torch.Generator) -> None:
        self.meanings = TEXT**0.5 * F.normalize(torch.randn(CLASSES, TEXT, generator=generator), dim=1)

    def of(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """[...] -> [..., TEXT], worded differently each time."""
        return self.meanings[labels] + WORDING * torch.randn(*labels.shape, TEXT, generator=generator)


class Judge:
    """A classifier of real digits, and how much real digits of one kind differ, at the size of a stage."""

    def __init__(self, seen: Digits, held_out: Digits, size: int, generator: torch.Generator) -> None:
        from sklearn.svm import SVC

        rows = torch.arange(len(seen.labels)).repeat(3)
        self.classifier: SVC = SVC(C=10).fit(pixels(seen.batch(rows, size, generator)[0]), seen.labels[rows].numpy())
        images, _ = held_out.batch(torch.arange(len(held_out.labels)), size, generator)
        self.real = self(images, held_out.labels)

    def __call__(self, images: Tensor, labels: Tensor) -> Verdict:
        features = pixels(images)
        right = torch.from_numpy(self.classifier.predict(features)) == labels
        digits = torch.stack([right[labels == digit].float().mean() for digit in range(CLASSES)])
        spread = torch.stack([features[labels == digit].std(0).mean() for digit in range(CLASSES)])
        return Verdict(right.float().mean().item(), digits, spread.mean().item())


class Verdict(NamedTuple):
    accuracy: float
    digits: Tensor  # [10], the accuracy of each
    spread: float
    """Standard deviation of a pixel over images of one digit: a generator that knows one image for each has none."""


class Stage(NamedTuple):
    """A trained stage."""

    curve: list[StepOutput]
    accuracies: list[float]
    verdict: Verdict
    seconds: float


Row = tuple[Verdict, float | None]
"""What a row of the table says: a verdict, and the seconds of training."""


def pixels(images: Tensor) -> Tensor:
    """[N, 3, S, S] -> [N, 64], the size that the digits have."""
    return F.adaptive_avg_pool2d(images.mean(1), 8).flatten(1)


def load_digits(captions: Captions, generator: torch.Generator) -> tuple[Digits, Digits]:
    """Digits to learn from, and a fifth to judge with. A margin of one pixel keeps crops from cutting strokes off."""
    from sklearn.datasets import load_digits as load

    raw = load()
    images = F.pad(torch.tensor(raw.images, dtype=torch.float32), (1, 1, 1, 1)).mul(255 / 16).round().to(torch.uint8)
    labels = torch.tensor(raw.target)
    texts = captions.of(labels[:, None].expand(-1, CAPTIONS), generator)
    order = torch.randperm(len(labels), generator=generator)
    count = int(0.8 * len(labels))
    seen, held_out = (
        Digits(images[rows, None].expand(-1, 3, -1, -1), labels[rows], texts[rows])
        for rows in (order[:count], order[count:])
    )
    return seen, held_out


@torch.no_grad()
def drawn(network: Stage1Generator | Stage2Generator, texts: Tensor, noise: Tensor) -> Tensor:
    """Images for captions, with the running statistics, as one samples."""
    network.eval()
    images = network(texts, noise)[1]
    network.train()
    return images


def train(
    name: str,
    generator: Stage1Generator | Stage2Generator,
    discriminator: Stage1Discriminator | Stage2Discriminator,
    data: Digits,
    captions: Captions,
    judge: Judge,
    epochs: int,
    folder: Path,
    random: torch.Generator,
) -> Stage:
    """Trains a stage; after every epoch its images are judged and a grid of them is saved, a column for each digit."""
    from rich.progress import track

    start, size = time.perf_counter(), generator.image_size
    learning = [
        torch.optim.Adam((p for p in network.parameters() if p.requires_grad), lr=rate, betas=(0.5, 0.999), fused=True)
        for network, rate in zip((generator, discriminator), RATES, strict=True)
    ]
    halving = [torch.optim.lr_scheduler.StepLR(optimizer, max(1, epochs // 2), 0.5) for optimizer in learning]
    labels = torch.arange(CLASSES).repeat(50)
    shown = slice(0, GRID_ROWS * CLASSES)
    texts, noise = captions.of(labels, random), torch.randn(len(labels), NOISE, generator=random)
    curve, accuracies = [], []
    for epoch in track(range(1, epochs + 1), description=name):
        order = torch.randperm(len(data.labels), generator=random)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            images, text = data.batch(rows, size, random)
            output = train_step(generator, discriminator, *learning, images, text, kl_weight=KL_WEIGHT)
            curve.append(output._replace(images=output.images[:0]))
        for schedule in halving:
            schedule.step()
        made = drawn(generator, texts, noise)
        verdict = judge(made, labels)
        accuracies.append(verdict.accuracy)
        magnified = F.interpolate(made[shown], (MAGNIFIED, MAGNIFIED))
        save_image_grid(magnified, folder / f"{name.lower().replace(' ', '_')}_{epoch:02}.png", columns=CLASSES)
    return Stage(curve, accuracies, verdict, time.perf_counter() - start)


def plot(stages: dict[str, Stage], file: Path) -> None:
    """Losses over the steps, and accuracy over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(stages) + 1, figsize=(5 * len(stages) + 5, 4))
    for axes, (name, stage) in zip(panels, stages.items(), strict=False):
        for label, values in (
            ("discriminator", [step.discriminator_loss for step in stage.curve]),
            ("generator", [step.generator_loss for step in stage.curve]),
            ("divergence", [step.kl for step in stage.curve]),
        ):
            axes.plot(torch.stack(values), label=label, linewidth=0.8)
        axes.set(title=name, xlabel="step", ylabel="loss, nats")
        panels[-1].plot(range(1, len(stage.accuracies) + 1), [100 * share for share in stage.accuracies], label=name)
    panels[-1].set(xlabel="epoch", ylabel="images that show their caption's digit, %", ylim=(0, 100))
    for axes in panels:
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def print_table(rows: dict[str, Row]) -> None:
    digits = "".join(f"{digit:>5}" for digit in range(CLASSES))
    print(f"\n{'shows the digit of its caption, %':<34}{'all':>6} |{digits} | spread  seconds")
    for name, (verdict, seconds) in rows.items():
        each = "".join(f"{100 * share:>5.0f}" for share in verdict.digits.tolist())
        spent = "" if seconds is None else f"{seconds:.0f}"
        print(f"{name:<34}{100 * verdict.accuracy:>6.1f} |{each} |{verdict.spread:>7.2f}{spent:>9}")


def train_both(epochs: tuple[int, int], seed: int, folder: Path) -> tuple[dict[str, Stage], dict[str, Row]]:
    """Stage I, then Stage II on top of it; and the rows of the table."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    captions = Captions(random)
    seen, held_out = load_digits(captions, random)
    print(f"{len(seen.labels)} digits of 8x8 pixels, {CAPTIONS} captions each; judged by {len(held_out.labels)} others")

    rows: dict[str, Row] = {}
    stages: dict[str, Stage] = {}
    stage1 = Stage1Generator(NOISE, CONDITION, 12, TEXT, image_size=SIZES[0])
    for name, size, count in zip(("Stage I", "Stage II"), SIZES, epochs, strict=True):
        judge = Judge(seen, held_out, size, random)
        if name == "Stage I":
            generator, discriminator = stage1, Stage1Discriminator(CONDITION, 32, image_size=size)
        else:
            generator = Stage2Generator(stage1, CONDITION, 16, TEXT, 1, image_size=size)
            generator.ca_net.load_state_dict(stage1.ca_net.state_dict())
            discriminator = Stage2Discriminator(CONDITION, 16, image_size=size)
        stages[name] = train(name, generator, discriminator, seen, captions, judge, count, folder, random)
        rows[f"real digits, held out, {size} pixels"] = judge.real, None
        rows[f"{name}, {count} epochs"] = stages[name].verdict, stages[name].seconds
    return stages, rows


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, plots, and returns 1 where too few of Stage I's images show the digit asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, nargs=2, default=(25, 20), metavar=("I", "II"), help="of each stage")
    parser.add_argument("--quick", action="store_true", help="few epochs: 10 and 1")
    parser.add_argument("--threads", type=int, default=1, help="steps this small do not gain from more than one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("stackgan_digits"), help="for grids and plot")
    options = parser.parse_args(argv)
    epochs = (10, 1) if options.quick else tuple(options.epochs)
    if min(*epochs, options.threads) < 1:
        parser.error("--epochs and --threads must be at least 1")
    try:
        import matplotlib  # noqa: F401
        import rich.progress  # noqa: F401
        import sklearn.datasets  # noqa: F401
    except ImportError as reason:
        print(f"{reason}: pip install 'perfvl[examples]'", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        stages, rows = train_both(epochs, options.seed, options.folder)
    finally:
        torch.set_num_threads(threads)
    print_table(rows)
    plot(stages, options.folder / "losses.png")
    print(f"\ngrids and plot: {options.folder}")
    return 0 if stages["Stage I"].verdict.accuracy >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
