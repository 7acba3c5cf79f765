"""MoCo on handwritten digits in several processes: DDP, a queue gathered from all ranks, one momentum update a step.

    torchrun --nproc-per-node 2 examples/moco_ddp.py
    python examples/moco_ddp.py

Prints the loss, whether all ranks end with the same queue, and the accuracy of a 5-nearest-neighbour classifier on
images that were not trained on. Needs scikit-learn (pip install 'perfvl[examples]'). Takes under half a minute on two
CPU cores; runs on GPUs where there is one for each process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from perfvl.benchmarks.moco_digits_training import Encoder, augment, load_digits
from perfvl.benchmarks.workload import Unavailable
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from perfvl.nn import InfoNCELoss, KeyQueue, MomentumEncoder, prepare_queues

TEMPERATURE, MOMENTUM, WIDTH, LEARNING_RATE = 0.07, 0.99, 64, 5e-4


class MoCo(nn.Module):
    """Encoder, momentum encoder and queue, as algorithm 1 of He et al. (2020) uses them in one step."""

    def __init__(self, queue_size: int, group: Any) -> None:
        super().__init__()
        self.encoder = Encoder(WIDTH)
        self.momentum = MomentumEncoder(self.encoder, MOMENTUM)
        self.queue = KeyQueue(queue_size, WIDTH, group=group, init="random")
        self.loss = InfoNCELoss(TEMPERATURE)

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        """Two views of the same images [B, 1, 8, 8] -> loss of this rank's rows."""
        query = self.encoder(view)
        self.momentum.update()
        key = self.momentum(other)
        loss = self.loss(query, key, self.queue)
        self.queue.enqueue(key)
        return loss


def train(images: Tensor, options: argparse.Namespace, device: torch.device) -> tuple[MoCo, list[float]]:
    """The trained model, and the mean loss over all ranks at every step."""
    started = distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if started else (0, 1)
    torch.manual_seed(options.seed + rank)
    model = MoCo(options.queue_size, distributed.group.WORLD if started else None).to(device)
    prepare_queues(model)
    wrapped = DistributedDataParallel(model) if started else model
    optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(options.seed)  # equal on all ranks, which take different rows of each batch
    noise = torch.Generator().manual_seed(options.seed + rank)
    losses = []
    for _ in range(options.steps):
        rows = torch.randperm(len(images), generator=order)[rank : world * options.batch : world]
        views = [augment(images[rows], noise).to(device) for _ in range(2)]
        loss = wrapped(*views)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        if started:
            distributed.all_reduce(mean)
        losses.append(mean.item())
    return model, losses


def queues_agree(queue: KeyQueue) -> bool:
    """Whether every rank holds bit for bit the same buffers."""
    for buffer in queue.buffers():
        everywhere = [torch.empty_like(buffer) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everywhere, buffer)
        if not all(torch.equal(buffer, other) for other in everywhere):
            return False
    return True


@torch.no_grad()
def neighbour_accuracy(encoder: nn.Module, images: Tensor, labels: Tensor, train_count: int) -> float:
    """Accuracy on the images after ``train_count`` of a 5-nearest-neighbour classifier fitted on those before."""
    from sklearn.neighbors import KNeighborsClassifier

    features = F.normalize(encoder(images), dim=1).cpu().numpy()
    classifier = KNeighborsClassifier(5).fit(features[:train_count], labels[:train_count].numpy())
    return float(classifier.score(features[train_count:], labels[train_count:].numpy()))


def run(options: argparse.Namespace, device: torch.device) -> bool:
    """Trains, prints on rank 0, and returns whether the ranks' queues agree."""
    images, labels = load_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    images, labels = images[order], labels[order]
    train_count = int(0.8 * len(images))
    model, losses = train(images[:train_count], options, device)
    agree, rank, world = True, 0, 1
    if distributed.is_initialized():
        agree, rank, world = queues_agree(model.queue), distributed.get_rank(), distributed.get_world_size()
    # On every rank: one that ends right after its last collective can abort, before gloo's threads let go of it.
    raw = neighbour_accuracy(nn.Flatten(), images, labels, train_count)
    learnt = neighbour_accuracy(model.encoder, images.to(device), labels, train_count)
    if rank == 0:
        print(f"processes {world}, steps {options.steps} of {world * options.batch} images")
        print(f"loss {max(losses):.4f} at its highest (the queue starts with random rows) -> {losses[-1]:.4f}")
        print(f"queues of all ranks are {'equal' if agree else 'NOT equal'}")
        print(f"5-nearest-neighbour accuracy on held-out images {100 * learnt:.1f} %, of raw pixels {100 * raw:.1f} %")
    return agree


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where the ranks' queues differ, 2 without scikit-learn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64, help="images of each rank in a step")
    parser.add_argument("--queue-size", type=int, default=1000, help="keys; no need for batches to divide it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.device_count() > local_rank:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if distributed.is_torchelastic_launched():
        distributed.init_process_group()
    try:
        return 0 if run(options, device) else 1
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
