"""Small StackGANs for their tests: each network beside the plain modules that it stands for, with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from perfvl.benchmarks import stackgan_peers as peers
from torch import Tensor, nn

from perfvl.models import stackgan

KNOWN = json.loads((Path(__file__).parent / "data" / "stackgan_keys.json").read_text())
Z, E, GF, DF, T, R = 6, 8, 8, 4, 12, 2
SIZES = {1: 64, 2: 256}


class Batch(NamedTuple):
    """What one iteration reads. `eps` is a pair in Stage II."""

    images: Tensor
    text: Tensor
    noise: Tensor
    eps: tuple[Tensor, ...]


def batch(stage: int, count: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, dtype=dtype, generator=generator)

    images = normal(3, SIZES[stage], SIZES[stage]).tanh()
    return Batch(images, normal(T), normal(Z), tuple(normal(E) for _ in range(stage)))


def eps_of(given: Batch) -> Any:
    """As our generators take it."""
    return given.eps if len(given.eps) == 2 else given.eps[0]


class Networks(NamedTuple):
    generator: Any
    discriminator: Any
    plain_generator: Any
    plain_discriminator: Any


def networks(stage: int, dtype: torch.dtype = torch.float64, **options: Any) -> Networks:
    """Ours and the plain ones, with running statistics that are not the initial ones. Options are the generator's."""
    generator: nn.Module = stackgan.Stage1Generator(Z, E, GF, T)
    plain_generator: nn.Module = peers.Stage1G(Z, E, GF, T)
    if stage == 1:
        discriminator: nn.Module = stackgan.Stage1Discriminator(E, DF)
        plain_discriminator: nn.Module = peers.Stage1D(E, DF)
    else:
        generator = stackgan.Stage2Generator(generator, E, GF, T, R, **options)
        plain_generator = peers.Stage2G(plain_generator, E, GF, T, R)
        discriminator, plain_discriminator = stackgan.Stage2Discriminator(E, DF), peers.Stage2D(E, DF)
    for ours, plain in ((generator, plain_generator), (discriminator, plain_discriminator)):
        liven(ours)
        plain.load_state_dict(ours.state_dict(), strict=True)
    found = Networks(generator, discriminator, plain_generator, plain_discriminator)
    return Networks(*(network.to(dtype) for network in found))


def liven(network: nn.Module) -> None:
    """Weights five times as large: at their start activations are so small that little depends on them."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.bias.normal_(0.0, 0.3)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.mul_(5)


def adams(*nets: nn.Module) -> list[torch.optim.Optimizer]:
    return [peers.adam(network) for network in nets]


def norms(network: nn.Module) -> dict[str, nn.Module]:
    """Batch norms by name."""
    kinds = nn.modules.batchnorm._BatchNorm
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}
