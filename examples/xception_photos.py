"""Run Xception over photographs before and after `perfvl.swap`, then train a small one on handwritten digits.

    python examples/xception_photos.py

Part one: timm's `legacy_xception` sees crops of scikit-learn's two photographs in evaluation, as it is and with its
separable convolutions fused in place. Prints what was replaced, by how much the logits differ, images per second and
the peak of torch's CPU allocator. Weights are random, and batch norms have the statistics of these crops: without them
activations die out over 36 layers, and any two networks agree. Where timm cannot be imported, perfvl's own Xception
runs with plain PyTorch instead, then with the kernels.

Part two: perfvl's Xception at an eighth of its width, with two blocks in the middle and no stride in the stem, learns
8x8 digits enlarged to 32x32, and is tested on the fifth that it did not see.

Needs scikit-learn, Pillow and rich (pip install 'perfvl[examples]') and under three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from perfvl.benchmarks.memory_worker import _torch_peak
from torch import Tensor, nn

import perfvl
from perfvl.models import xception

CROP = 299
BATCH = 64
LEARNING_RATE = 3e-3
TOLERANCE = 1e-3


def crops_of(photographs: Sequence[Tensor], count: int, size: int) -> Tensor:
    """`count` crops [count, 3, size, size] at random places of photographs [H, W, 3] in 0..255, at mean = std = 0.5."""
    crops = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        top, left = (int(torch.randint(n - size + 1, ())) for n in photograph.shape[:2])
        crops.append(photograph[top : top + size, left : left + size])
    return (torch.stack(crops).permute(0, 3, 1, 2) / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def network() -> tuple[nn.Module, bool]:
    """Xception, and whether it is timm's."""
    try:
        import timm
    except (ImportError, RuntimeError) as reason:  # RuntimeError: timm imports a torchvision made for another torch
        print(f"timm cannot be imported ({reason}): perfvl's Xception runs with plain PyTorch, then with kernels")
        return xception(), False
    return timm.create_model("legacy_xception"), True


@torch.no_grad()
def adapt_statistics(model: nn.Module, images: Tensor) -> None:
    """Gives all batch norms the statistics of `images`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the average over all steps, of which there is one
    model.train()(images)
    model.eval()


@torch.no_grad()
def measured(name: str, model: nn.Module, images: Tensor, rounds: int) -> Tensor:
    """Logits; prints speed and memory."""

    def call() -> Tensor:
        return model(images)

    logits, seconds = call(), []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    print(f"{name:<7} {len(images) / statistics.median(seconds):6.2f} images/s, peak memory {peak(call)}")
    return logits


def peak(call: Callable[[], Tensor]) -> str:
    found = _torch_peak(call)
    return "not measured" if found is None else f"{found / 1e6:.0f} MB"


def compare(photographs: Sequence[Tensor], count: int, size: int, rounds: int) -> float:
    """The largest difference between logits before and after, over the largest logit."""
    images = crops_of(photographs, count, size)
    model, is_timm = network()
    model = model.to(memory_format=torch.channels_last)
    adapt_statistics(model, images)
    print(f"{count} crops of {size} x {size} pixels")
    with contextlib.nullcontext() if is_timm else perfvl.use_backend("reference"):
        before = measured("before", model, images, rounds)
    report = perfvl.swap(model)
    after = measured("after", model, images, rounds)
    print(report)
    difference = ((after - before).abs().amax() / before.abs().amax()).item()
    print(f"logits differ by {difference:.1e} of the largest")
    return difference


def train(images: Tensor, labels: Tensor, epochs: int) -> float:
    """Trains on four fifths of digits [n, 8, 8] in 0..16; returns the accuracy on the others."""
    from rich.progress import track

    images = F.interpolate(images[:, None] / 8 - 1, size=(32, 32), mode="bilinear", align_corners=False)
    train_count = int(0.8 * len(images))
    seen, held_out = torch.randperm(len(images)).split([train_count, len(images) - train_count])
    model = xception(10, 1, width=0.125, middle_blocks=2, stem_stride=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = train_count // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    start = time.perf_counter()
    for _ in track(range(epochs), description="digits"):
        for rows in seen[torch.randperm(train_count)[: steps * BATCH]].split(BATCH):
            loss = F.cross_entropy(model(images[rows].contiguous(memory_format=torch.channels_last)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = model.eval()(images[held_out]).argmax(1) == labels[held_out]
    accuracy = right.double().mean().item()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {epochs} epochs of {train_count} digits in "
        f"{seconds:.0f} s; accuracy on {len(held_out)} others {100 * accuracy:.1f} %"
    )
    return accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, trains, and returns 1 where logits differ or the digits were not learnt."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="2 crops of 96 pixels, 6 epochs")
    parser.add_argument("--threads", type=int, default=1, help="of the training, whose steps are small")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    crops, size, rounds, epochs = (2, 96, 1, 6) if options.quick else (options.crops, CROP, 5, options.epochs)
    if min(crops, epochs, options.threads) < 1:
        parser.error("--crops, --epochs and --threads must be at least 1")
    try:
        import rich  # noqa: F401
        from sklearn.datasets import load_digits, load_sample_images

        photographs = [torch.tensor(image) for image in load_sample_images().images]
    except ImportError as reason:
        print(f"{reason}: pip install 'perfvl[examples]'", file=sys.stderr)
        return 2
    torch.manual_seed(options.seed)
    difference = compare(photographs, crops, size, rounds)

    digits, threads = load_digits(), torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        accuracy = train(torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target), epochs)
    finally:
        torch.set_num_threads(threads)
    return 0 if difference < TOLERANCE and accuracy >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
