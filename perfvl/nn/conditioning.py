"""StackGAN's conditioning augmentation as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perfvl.ops.conditioning import ConditioningOutput, conditioning_augmentation
from perfvl.reference.conditioning import PROJECTIONS


class ConditioningAugmentation(nn.Module):
    """A condition drawn from a text: ``mu + eps exp(logvar / 2)``, ``[mu, logvar] = activation(fc(text))``.

    Child `fc`, an `nn.Linear`, as the published code's `CA_NET` has it. Behind its product one op computes everything,
    the divergence from N(0, 1) too; saved are the text, mu, logvar and the noise.

    Args:
        text_dim: T, width of the text embedding.
        condition_dim: e, width of the condition.
        activation: of the linear layer: "relu" (published code), "leaky_relu" (slope 0.2), "none" (paper) or "glu".

    Raises:
        ValueError: an unknown activation; text or eps of other shapes (on a call).
        TypeError: text or eps of other dtypes (on a call).

    Cost: that of the linear layer.

    Source: Zhang et al., StackGAN, arXiv:1612.03242, section 3.2.

    Example:
        >>> import torch
        >>> ConditioningAugmentation(1024, 128)(torch.randn(16, 1024)).condition.shape
        torch.Size([16, 128])
    """

    def __init__(
        self,
        text_dim: int = 1024,
        condition_dim: int = 128,
        *,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in PROJECTIONS:
            expected = f"one of {', '.join(PROJECTIONS)}"
            raise ValueError(f"ConditioningAugmentation: `activation` got {activation!r}, expected {expected}")
        self.condition_dim, self.activation = condition_dim, activation
        width = (4 if activation == "glu" else 2) * condition_dim
        self.fc = nn.Linear(text_dim, width, device=device, dtype=dtype)

    def forward(self, text: Tensor, eps: Tensor | None = None) -> ConditioningOutput:
        """Text [N, T] and noise [N, e], by default drawn from N(0, 1) -> condition, mu, logvar [N, e] and kl []."""
        if eps is None:
            eps = torch.randn(text.shape[0], self.condition_dim, dtype=text.dtype, device=text.device)
        return conditioning_augmentation(text, self.fc.weight, self.fc.bias, eps, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
