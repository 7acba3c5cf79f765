"""Batch norm and an activation in plain PyTorch, on either side of each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of the codes that kernels know them by. The float is the slope of leaky_relu, the alpha of elu.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, parameter: x,
    "relu": lambda x, parameter: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": lambda x, parameter: torch.tanh(x),
    "sigmoid": lambda x, parameter: torch.sigmoid(x),
}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    parameter: float,
    order: str,
) -> Tensor:
    r""":math:`y = \phi(\mathrm{bn}(x))` ("before"), or :math:`y = \mathrm{bn}(\phi(x))` ("after"), with
    :math:`\mathrm{bn}(z) = \gamma (z - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta` (Ioffe and Szegedy 2015,
    arXiv:1502.03167, algorithm 1) of z [N, C, ...] over all axes but that of C.

    In training of the batch's mean and biased variance, and the running ones, which are unbiased, move; else of those.
    """
    act = ACTIVATIONS[activation]
    x = act(input, parameter) if order == "after" else input
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return y if order == "after" else act(y, parameter)
