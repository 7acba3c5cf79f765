"""MoCo on scikit-learn's 1,797 handwritten digits (8 x 8 pixels): a whole training run that fits two CPU cores.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (2020), algorithm 1, with MoCo v2's
temperature. GroupNorm in place of BatchNorm, so that no shuffling over GPUs is needed to keep positives from leaking
through the statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .workload import Unavailable

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``loss(query [B, d], positive [B, d], queue [K, d])``."""


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] and labels [1797]. Raises Unavailable without scikit-learn."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError:
        raise Unavailable("needs scikit-learn: pip install 'perfvl[examples]'") from None
    digits = bundled()
    images = torch.from_numpy(digits.images).float().div(16.0).unsqueeze(1)
    return images, torch.from_numpy(digits.target).long()


class Encoder(nn.Module):
    """Three 3 x 3 convolutions and a projection to unit vectors of width d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.projection = nn.Linear(128 * 2 * 2, width)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.projection(self.features(images)), dim=1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts every image by up to one pixel each way, changes its contrast by up to 30 % and adds noise."""
    count = len(images)
    shifts = torch.randint(0, 3, (2, count), generator=generator)
    contrast = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    shifted = windows[torch.arange(count), :, shifts[0], shifts[1]]
    return shifted * contrast.to(images.dtype) + noise.to(images.dtype)


class MoCoTrainer:
    """A seeded training run. Equal seeds see equal batches and augmentations whatever the loss and the dtype."""

    def __init__(
        self,
        images: Tensor,
        loss: Loss,
        *,
        batch: int = 128,
        queue_size: int = 4096,
        width: int = 64,
        momentum: float = 0.99,
        learning_rate: float = 5e-4,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if queue_size % batch:
            raise ValueError(f"queue_size: got {queue_size}, expected a multiple of the batch size {batch}")
        self.images = images.cpu().to(dtype)
        self.loss = loss
        self.batch = batch
        self.momentum = momentum
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(width).to(dtype)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        queue = torch.randn(queue_size, width, generator=self.generator)
        self.queue = F.normalize(queue, dim=1).to(dtype)
        self.cursor = 0
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=learning_rate)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data."""
        return len(self.images) // self.batch

    def step(self) -> Tensor:
        """One training step on a random batch; returns the loss before the update."""
        chosen = torch.randperm(len(self.images), generator=self.generator)[: self.batch]
        views = [augment(self.images[chosen], self.generator) for _ in range(2)]
        with torch.no_grad():
            for slow, fast in zip(self.key_encoder.parameters(), self.encoder.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - self.momentum)
            positive = self.key_encoder(views[1])
        loss = self.loss(self.encoder(views[0]), positive, self.queue)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.queue[self.cursor : self.cursor + self.batch] = positive
        self.cursor = (self.cursor + self.batch) % len(self.queue)
        return loss.detach()
