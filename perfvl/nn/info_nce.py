"""InfoNCE losses over a queue of keys."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from perfvl.ops.info_nce import InfoNCEOutput, info_nce, info_nce_stats


class Queue(Protocol):
    """What :class:`perfvl.nn.KeyQueue` offers a loss."""

    @property
    def keys(self) -> Tensor: ...
    @property
    def valid(self) -> int | Tensor | None: ...


class InfoNCELoss(nn.Module):
    r"""InfoNCE of queries against a positive key each and a queue of negatives, see :func:`perfvl.functional.info_nce`.

    Replaces ``cross_entropy(cat([q.k, q @ queue], 1) / tau, zeros)`` of MoCo and its kin.

    Args:
        temperature: :math:`\tau`, a number other than 0. With `learnable`, its start, which must be positive for
            "log_scale".
        learnable: False (a constant); True (a parameter ``temperature``, as in ALBEF); "log_scale" (a parameter
            ``logit_scale`` with :math:`\tau = e^{-\text{logit\_scale}}`, as in CLIP).
        normalize: L2-normalise query and positive first.
        label_smoothing: epsilon in [0, 1].
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError, TypeError: on bad settings here, on bad tensors in the call.

    Example:
        >>> import torch
        >>> loss = InfoNCELoss(0.2)(torch.randn(8, 64), torch.randn(8, 64), torch.randn(1024, 64))
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool | Literal["log_scale"] = False,
        normalize: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"{name}: `temperature` got {type(temperature).__name__}, expected a float")
        if temperature == 0 or not math.isfinite(temperature):
            raise ValueError(f"{name}: `temperature` got {temperature}, expected a finite number other than 0")
        if learnable not in (False, True, "log_scale"):
            raise ValueError(f'{name}: `learnable` got {learnable!r}, expected False, True or "log_scale"')
        if learnable == "log_scale" and temperature < 0:
            raise ValueError(f"{name}: `temperature` got {temperature}, expected a positive number for a log scale")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'{name}: `reduction` got {reduction!r}, expected "mean", "sum" or "none"')
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"{name}: `label_smoothing` got {label_smoothing}, expected a number in [0, 1]")
        self.learnable = learnable
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.temperature: float | nn.Parameter
        if learnable == "log_scale":
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        elif learnable:
            self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        else:
            self.temperature = float(temperature)

    def current_temperature(self) -> float | Tensor:
        """The temperature in use: the constant, or a 0-d tensor that carries the parameter's gradient."""
        return torch.exp(-self.logit_scale) if self.learnable == "log_scale" else self.temperature

    def forward(self, query: Tensor, positive: Tensor, queue: Tensor | Queue) -> Tensor:
        """query [B, d], positive [B, d], queue [K, d] or a KeyQueue -> loss (0-d, or [B] for reduction "none")."""
        return info_nce(query, positive, **self._arguments(queue))

    def stats(self, query: Tensor, positive: Tensor, queue: Tensor | Queue) -> InfoNCEOutput:
        """The loss with lse, positive logit and rank, from the same pass: what a trainer logs."""
        return info_nce_stats(query, positive, **self._arguments(queue))

    def logits(self, query: Tensor, positive: Tensor, queue: Tensor | Queue) -> tuple[Tensor, Tensor]:
        """The slow path, for code that wants MoCo's own output: logits [B, 1 + K] (divided by tau) and zero labels [B].

        Stores B x K numbers. ``F.cross_entropy(*loss.logits(...))`` is the loss without label smoothing.
        """
        keys = queue if isinstance(queue, Tensor) else queue.keys
        valid = None if isinstance(queue, Tensor) else queue.valid
        if self.normalize:
            query, positive = nn.functional.normalize(query, dim=1), nn.functional.normalize(positive, dim=1)
        logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ keys.to(query.dtype).T], dim=1)
        if valid is not None:
            columns = torch.arange(keys.shape[0] + 1, device=keys.device)
            logits = logits.masked_fill(columns > valid, -math.inf)
        return logits / self.current_temperature(), torch.zeros(len(query), dtype=torch.int64, device=query.device)

    def _arguments(self, queue: Tensor | Queue) -> dict:
        return {
            "queue": queue if isinstance(queue, Tensor) else queue.keys,
            "valid": None if isinstance(queue, Tensor) else queue.valid,
            "temperature": self.current_temperature(),
            "normalize": self.normalize,
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
        }

    def extra_repr(self) -> str:
        if self.learnable == "log_scale":
            temperature = f"temperature={math.exp(-self.logit_scale.item()):.4g}"
        else:
            temperature = f"temperature={float(self.temperature):.4g}"
        return f"{temperature}, learnable={self.learnable}, normalize={self.normalize}, reduction={self.reduction!r}"


class CrossModalInfoNCELoss(InfoNCELoss):
    r"""Both directions of image-text InfoNCE, each modality's queries against the other's queue:
    :math:`L = \text{InfoNCE}(z_I, p_T, Q_T) + \text{InfoNCE}(z_T, p_I, Q_I)` (BriVL, arXiv:2103.06561, eq. 2-4).

    Args:
        temperature, learnable, normalize, label_smoothing, reduction: as in :class:`InfoNCELoss`; one temperature for
            both directions.
        directions: "sum" of the two directions (BriVL) or their "mean" (CLIP, ALBEF).

    Example:
        >>> import torch
        >>> image, text, image_key, text_key = torch.randn(4, 8, 64).unbind()
        >>> image_queue, text_queue = torch.randn(2, 512, 64).unbind()
        >>> loss = CrossModalInfoNCELoss(0.05)(image, text, image_key, text_key, image_queue, text_queue)
    """

    def __init__(
        self, temperature: float = 0.07, *, directions: Literal["sum", "mean"] = "sum", **settings: Any
    ) -> None:
        super().__init__(temperature, **settings)
        if directions not in ("sum", "mean"):
            raise ValueError(f'CrossModalInfoNCELoss: `directions` got {directions!r}, expected "sum" or "mean"')
        self.directions = directions

    def forward(  # type: ignore[override]
        self,
        image_query: Tensor,
        text_query: Tensor,
        image_key: Tensor,
        text_key: Tensor,
        image_queue: Tensor | Queue,
        text_queue: Tensor | Queue,
    ) -> Tensor:
        """Queries and keys [B, d] (keys from the momentum encoders), queues [K, d] or KeyQueues -> loss."""
        image_to_text = super().forward(image_query, text_key, text_queue)
        text_to_image = super().forward(text_query, image_key, image_queue)
        return (image_to_text + text_to_image) * (0.5 if self.directions == "mean" else 1.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, directions={self.directions!r}"
