"""What a step of the Stage-II generator holds in memory, beside the plain modules' with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from perfvl.benchmarks.memory_worker import _torch_peak
from stackgan_support import batch, eps_of, networks
from torch import Tensor, nn

SHARE = 0.75  # of the plain modules' bytes, at most
Pair = tuple[tuple[nn.Module, Callable[[], Tensor]], ...]


@pytest.fixture(scope="module")
def generators() -> Pair:
    """Ours and the plain one, each with its loss."""
    nets, given = networks(2, torch.float32), batch(2, 4, torch.float32)

    def with_loss(network: Any, eps: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
        def loss() -> Tensor:
            _, image, mu, logvar = network(given.text, given.noise, eps)
            return image.square().mean() + mu.mean() + logvar.mean()

        return network.train(), loss

    return with_loss(nets.generator, eps_of(given)), with_loss(nets.plain_generator, given.eps)


def saved_bytes(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that backward waits for, each once, without parameters and running statistics."""
    own = {t.untyped_storage().data_ptr() for t in network.state_dict().values()}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is nobody else's
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss()
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """The most that torch's allocator holds during forward and backward, gradients of the parameters included."""
    loss().backward()
    network.zero_grad(set_to_none=True)
    peak = _torch_peak(lambda: loss().backward())
    assert peak is not None
    return peak


@pytest.mark.parametrize("measured", [saved_bytes, peak_bytes])
def test_a_step_of_the_second_generator_holds_a_quarter_less_than_plain_modules(generators, measured):
    ours, plain = (measured(*pair) for pair in generators)
    image = 4 * 4 * 3 * 256 * 256
    assert image < ours <= SHARE * plain  # it cannot do without the last image


def test_no_enlarged_input_waits_for_backward(generators):
    (network, loss), _ = generators
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        loss()
    channels, size = network.get_submodule("upsample1")[1].in_channels, 2 * network.STAGE1_G.image_size // 4
    for block in range(network.blocks):
        assert not any(shape[1:] == (channels >> block, size << block, size << block) for shape in shapes)
        assert any(shape[1:] == (channels >> block + 1, size << block, size << block) for shape in shapes)
