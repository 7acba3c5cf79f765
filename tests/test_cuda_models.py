"""Training steps of every model on CUDA: the same as with the definitions, without synchronising, in one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perfvl
from perfvl.models import BriVL, Xception
from perfvl.models.noisy_label import SmallCNN
from perfvl.models.stackgan import Stage1Discriminator, Stage1Generator, Stage2Discriminator, Stage2Generator
from perfvl.models.stackgan_step import train_step
from perfvl.nn import CoTeachingLoss


class Problem(NamedTuple):
    """Networks, and the step that trains them: gives its losses."""

    networks: nn.ModuleList
    step: Callable[[], Tensor]


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def xception(device: str) -> Problem:
    model = Xception(10, width=0.125, middle_blocks=1).to(device).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 75, 75, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(4, device=device)
    optimizer = sgd(model)

    def step() -> Tensor:
        loss = F.cross_entropy(model(images), labels)
        update(optimizer, loss)
        return loss.detach()[None]

    return Problem(nn.ModuleList([model]), step)


def brivl(device: str) -> Problem:
    model = BriVL(nn.Linear(24, 32), nn.Linear(40, 32), embed_dim=32, queue_size=256).to(device)
    images, texts = torch.randn(16, 24, device=device), torch.randn(16, 40, device=device)
    optimizer = sgd(model)

    def step() -> Tensor:
        loss = model(images, texts).loss
        update(optimizer, loss)
        return loss.detach()[None]

    return Problem(nn.ModuleList([model]), step)


def co_teaching(device: str) -> Problem:
    pair = nn.ModuleList([SmallCNN(10, 3) for _ in range(2)]).to(device)
    images, labels = torch.randn(32, 3, 32, 32, device=device), torch.arange(32, device=device) % 10
    criterion, optimizer = CoTeachingLoss(0.25), sgd(pair)

    def step() -> Tensor:
        losses = criterion(pair[0](images), pair[1](images), labels)
        update(optimizer, losses.loss1 + losses.loss2)
        return torch.stack([losses.loss1, losses.loss2]).detach()

    return Problem(pair, step)


def stackgan(device: str, stage: int) -> Problem:
    generator: nn.Module = Stage1Generator(6, 8, 8, 12, image_size=16)
    discriminator: nn.Module = Stage1Discriminator(8, 4, image_size=16)
    if stage == 2:
        generator = Stage2Generator(generator, 8, 8, 12, 1, image_size=32)
        discriminator = Stage2Discriminator(8, 4, image_size=32)
    networks = nn.ModuleList([generator, discriminator]).to(device)
    optimizers = [sgd(network) for network in networks]
    images = torch.rand(4, 3, 16 * stage, 16 * stage, device=device) * 2 - 1
    text, noise = torch.randn(4, 12, device=device), torch.randn(4, 6, device=device)
    eps = [torch.randn(4, 8, device=device) for _ in range(stage)]
    given = tuple(eps) if stage == 2 else eps[0]

    def step() -> Tensor:
        out = train_step(generator, discriminator, *optimizers, images, text, noise=noise, eps=given)
        return torch.stack([out.discriminator_loss, out.generator_loss])

    return Problem(networks, step)


PROBLEMS = {
    "xception": xception,
    "brivl": brivl,
    "co_teaching": co_teaching,
    "stackgan 1": lambda device: stackgan(device, 1),
    "stackgan 2": lambda device: stackgan(device, 2),
}
every_model = pytest.mark.parametrize("name", PROBLEMS)


def trained(name: str, device: str, steps: int = 3) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    problem = PROBLEMS[name](device)
    losses = [problem.step() for _ in range(steps)]
    return losses, problem.networks.state_dict()


@every_model
def test_training_is_that_of_the_definitions(cuda, name):
    losses, state = trained(name, cuda)
    with perfvl.use_backend("reference"):
        expected, expected_state = trained(name, cuda)
    torch.testing.assert_close(losses, expected, rtol=2e-4, atol=1e-5)
    for key, value in state.items():
        torch.testing.assert_close(
            value, expected_state[key], rtol=2e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


@every_model
def test_a_step_does_not_synchronise(cuda, name):
    problem = PROBLEMS[name](cuda)
    problem.step()  # compiles kernels, makes the optimiser's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_model
def test_a_graph_trains_as_one_step_after_another(cuda, name):
    torch.use_deterministic_algorithms(True, warn_only=True)
    expected, expected_state = trained(name, cuda, 5)
    torch.manual_seed(0)
    problem = PROBLEMS[name](cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses = [problem.step() for _ in range(3)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = problem.step()
    for _ in range(2):
        graph.replay()
        losses.append(output.clone())
    torch.testing.assert_close(losses, expected)
    for key, value in problem.networks.state_dict().items():
        if not key.endswith("_extra_state"):  # a count of calls on the host, which a replay is none of
            torch.testing.assert_close(value, expected_state[key])
