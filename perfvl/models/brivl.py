"""BriVL: two towers, their momentum copies, two queues and cross-modal InfoNCE, in one training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.nn import CrossModalInfoNCELoss, KeyQueue, MomentumEncoder

Inputs = Tensor | tuple | list | Mapping
"""What a tower is called with: its only argument, its positional arguments, or its keyword arguments."""


class BriVLOutput(NamedTuple):
    """What a step of :class:`BriVL` returns. Only ``loss`` carries a gradient; the rest is for the log."""

    loss: Tensor
    """0-d: the sum of both directions."""
    image_to_text: Tensor
    """0-d: the loss of images against text keys."""
    text_to_image: Tensor
    """0-d: the loss of texts against image keys."""
    image_to_text_accuracy: Tensor
    """0-d: the fraction of images that score higher with their own text than with every text of the queue."""
    text_to_image_accuracy: Tensor
    """0-d: the fraction of texts that score higher with their own image than with every image of the queue."""
    temperature: Tensor | float
    """The temperature of this step."""


class Retrieval(NamedTuple):
    """What :func:`retrieve` returns: for every query its best candidates, the best first."""

    scores: Tensor
    """[N, k] cosine similarities."""
    indices: Tensor
    """[N, k] int64 rows of the candidates."""


class _Defaults(NamedTuple):
    embed_dim: int
    queue_size: int
    momentum: float
    temperature: float
    learnable: Literal[False, "log_scale"]
    reduction: str


_MODES = {
    "paper": _Defaults(2560, 16_384, 0.99, 0.05, "log_scale", "sum"),
    "reference": _Defaults(2048, 9_600, 0.99, 0.07, False, "mean"),
}


class BriVL(nn.Module):
    r"""Image-text contrastive pre-training with momentum towers and queues (BriVL, Huo et al. 2021, arXiv:2103.06561):
    :math:`L = \text{InfoNCE}(z_I, p_T, Q_T) + \text{InfoNCE}(z_T, p_I, Q_I)`.

    One call in training mode, in the order of the released code: both query towers; momentum update of both momentum
    towers, which therefore sees the weights of the last optimiser step; both momentum towers, without gradient; both
    losses; then image keys and text keys are enqueued. The gradient reaches the query towers and the temperature.
    Momentum and queues stay as they are in eval mode and without grad mode. Under activation checkpointing wrap the
    towers, never this module: its recomputation would be a second step.

    Where the paper and the released code disagree, `mode` decides:

    ================ ================================ ======================================
    ..               "paper"                          "reference"
    ================ ================================ ======================================
    embed_dim        2560                             2048
    queue_size       16,384                           9,600
    temperature      learnable from 0.05, as          constant 0.07
                     :math:`e^{-\text{logit\_scale}}`
                     (the paper gives no form)
    loss             summed over the batch            averaged over the batch
    batch size       any                              must divide queue_size
    momentum update  exact, frozen weights stay       three roundings, as in MoCo
    ================ ================================ ======================================

    Both: momentum 0.99, queues that start as random unit rows, momentum towers that follow ``train()`` (dropout on) and
    keep their own batch-norm statistics. Images are not shuffled over ranks for batch norm.

    Args:
        image_tower, text_tower: modules that return [B, embed_dim], not normalised; :class:`BriVLImageTower` and
            :class:`BriVLTextTower`, or your own.
        embed_dim: d, the width of both towers' output.
        queue_size: K, the keys in each queue.
        momentum: a number, tensor or schedule, as in :class:`perfvl.nn.MomentumEncoder`.
        temperature: a number other than 0; in mode "paper" the start of the learnable one, positive.
        mode: "paper" or "reference".
        multi_label: mode "reference" only, the released code's flag: a queued pair is also positive where it is among
            the `top_k` nearest of the batch's pair both by text and by image. The sum over the positives is not
            divided by their number. This is the slow path: plain PyTorch that stores several B x K matrices.
        top_k: see `multi_label`.
        queue_dtype: of the stored keys; bfloat16 halves the queues' memory.
        group: a torch.distributed process group whose ranks' keys are all enqueued, in rank order. Call
            :func:`perfvl.nn.prepare_queues` before wrapping in DDP.

    Raises:
        ValueError, TypeError: on bad settings here; on batches of different sizes, features of another width, and in
            mode "reference" a global batch that does not divide `queue_size`. Nothing is updated or enqueued then.

    Cost of a step: the towers' forward twice (backward once), the momentum update, and 8 B K d FLOP in the losses,
    which read each queue once and store (B, d + 1) floats each, whatever K is.

    Example:
        >>> import torch
        >>> model = BriVL(torch.nn.Linear(12, 8), torch.nn.Linear(20, 8), embed_dim=8, queue_size=64)
        >>> output = model(torch.randn(4, 12), torch.randn(4, 20))
        >>> output.loss.backward()
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        *,
        embed_dim: int | None = None,
        queue_size: int | None = None,
        momentum: float | Tensor | Callable[[int], float] | None = None,
        temperature: float | None = None,
        mode: Literal["paper", "reference"] = "paper",
        multi_label: bool = False,
        top_k: int = 1,
        queue_dtype: torch.dtype = torch.float32,
        group: Any = None,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise ValueError(f'BriVL: `mode` got {mode!r}, expected "paper" or "reference"')
        if multi_label and mode != "reference":
            raise ValueError(f'BriVL: `multi_label` got True in mode {mode!r}, expected mode "reference"')
        defaults = _MODES[mode]
        self.mode = mode
        self.embed_dim = defaults.embed_dim if embed_dim is None else embed_dim
        self.queue_size = defaults.queue_size if queue_size is None else queue_size
        if multi_label and not 1 <= top_k <= self.queue_size:
            raise ValueError(f"BriVL: `top_k` got {top_k}, expected 1 to queue_size = {self.queue_size}")
        self.multi_label = multi_label
        self.top_k = top_k
        self.image_tower = image_tower
        self.text_tower = text_tower
        momentum = defaults.momentum if momentum is None else momentum
        rounding: Literal["moco"] | None = "moco" if mode == "reference" else None
        self.image_momentum = MomentumEncoder(image_tower, momentum, buffers="skip", strict=rounding)
        self.text_momentum = MomentumEncoder(text_tower, momentum, buffers="skip", strict=rounding)
        self.image_queue = KeyQueue(self.queue_size, self.embed_dim, dtype=queue_dtype, group=group, init="random")
        self.text_queue = KeyQueue(self.queue_size, self.embed_dim, dtype=queue_dtype, group=group, init="random")
        self.loss = CrossModalInfoNCELoss(
            defaults.temperature if temperature is None else temperature,
            learnable=defaults.learnable,
            reduction=defaults.reduction,
        )

    def forward(self, image: Inputs, text: Inputs) -> BriVLOutput:
        """One step on B pairs. ``image`` and ``text`` go to the towers: a tensor, or a tuple or dict of arguments."""
        trains = self.training and torch.is_grad_enabled()
        self._check_batch(image, text, trains)
        image_query, text_query = self.get_image_features(image), self.get_text_features(text)
        with torch.no_grad():
            if trains:
                self.image_momentum.update()
                self.text_momentum.update()
            image_key = F.normalize(_call(self.image_momentum, image), dim=1)
            text_key = F.normalize(_call(self.text_momentum, text), dim=1)
        if self.multi_label:
            directions = self._multi_label_losses(image_query, text_query, image_key, text_key)
        else:
            to_text = self.loss.stats(image_query, text_key, self.text_queue)
            to_image = self.loss.stats(text_query, image_key, self.image_queue)
            directions = (to_text.loss, to_text.rank), (to_image.loss, to_image.rank)
        if trains:
            self.image_queue.enqueue(image_key)
            self.text_queue.enqueue(text_key)
        (image_to_text, image_rank), (text_to_image, text_rank) = directions
        temperature = self.loss.current_temperature()
        return BriVLOutput(
            image_to_text + text_to_image,
            image_to_text.detach(),
            text_to_image.detach(),
            (image_rank == 0).float().mean(),
            (text_rank == 0).float().mean(),
            temperature.detach() if isinstance(temperature, Tensor) else temperature,
        )

    def get_image_features(self, image: Inputs) -> Tensor:
        """L2-normalised output [B, d] of the image tower (the query tower, not its momentum copy)."""
        return self._features("image_tower", image)

    def get_text_features(self, text: Inputs) -> Tensor:
        """L2-normalised output [B, d] of the text tower (the query tower, not its momentum copy)."""
        return self._features("text_tower", text)

    def _features(self, name: str, inputs: Inputs) -> Tensor:
        features = _call(getattr(self, name), inputs)
        if features.dim() != 2 or features.shape[1] != self.embed_dim:
            raise ValueError(f"BriVL: `{name}` returned shape {tuple(features.shape)}, expected (B, {self.embed_dim})")
        return F.normalize(features, dim=1)

    def _check_batch(self, image: Inputs, text: Inputs, trains: bool) -> None:
        batch, texts = _batch_size("image", image), _batch_size("text", text)
        if batch != texts:
            raise ValueError(f"BriVL: got {batch} images and {texts} texts, expected pairs")
        group = self.image_queue.group
        world = 1 if group is None else group.size()
        if trains and self.mode == "reference" and (batch == 0 or self.queue_size % (batch * world)):
            raise ValueError(
                f"BriVL: got a global batch of {batch * world}, expected a divisor of queue_size = {self.queue_size} "
                'in mode "reference"'
            )

    def _multi_label_losses(
        self, image_query: Tensor, text_query: Tensor, image_key: Tensor, text_key: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Loss and rank of both directions where queued pairs may be positive too."""
        wide = torch.float64 if image_query.dtype == torch.float64 else torch.float32
        with torch.autocast(image_query.device.type, enabled=False):
            image_query, text_query = image_query.to(wide), text_query.to(wide)
            image_key, text_key = image_key.to(wide), text_key.to(wide)
            # Copies, because these logits keep the queues for backward and this step's enqueue comes before it.
            image_keys, text_keys = (q.keys.to(wide, copy=True) for q in (self.image_queue, self.text_queue))
            near = [
                torch.zeros(len(key), self.queue_size, dtype=torch.bool, device=key.device).scatter_(
                    1, (key @ keys.T).topk(self.top_k, dim=1).indices, True
                )
                for key, keys in ((text_key, text_keys), (image_key, image_keys))
            ]
            positive = near[0] & near[1]
            temperature = self.loss.current_temperature()
            return (
                multi_label_loss(image_query, text_key, text_keys, positive, temperature),
                multi_label_loss(text_query, image_key, image_keys, positive, temperature),
            )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, queue_size={self.queue_size}, mode={self.mode!r}"


def multi_label_loss(
    query: Tensor, key: Tensor, queue: Tensor, positive: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    r"""InfoNCE with several positives, :math:`\frac1B \sum_i (n_i\, \text{lse}_i - \sum_{j \in \text{pos}_i} l_{ij})`,
    and the rank [B] of the key among the queue's negatives.

    query, key [B, d], queue [K, d], positive bool [B, K]: which rows of the queue are positive beside the key, so that
    :math:`n_i \ge 1`. Not divided by :math:`n_i`: the released code of BriVL. Stores B x K numbers.
    """
    key_logit = (query * key).sum(1, keepdim=True) / temperature
    queue_logits = query @ queue.T / temperature
    lse = torch.cat([key_logit, queue_logits], dim=1).logsumexp(1)
    own = key_logit.squeeze(1) + torch.where(positive, queue_logits, 0).sum(1)
    rank = ((queue_logits >= key_logit) & ~positive).sum(1)
    return ((1 + positive.sum(1)) * lse - own).mean(), rank


def similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosine similarities [N, M] of normalised features [N, d] and [M, d].

    Example:
        >>> import torch
        >>> similarity(torch.eye(3), torch.eye(3)[:2]).shape
        torch.Size([3, 2])
    """
    return image_features @ text_features.T


def retrieve(query_features: Tensor, candidate_features: Tensor, k: int) -> Retrieval:
    """The `k` candidates [M, d] most similar to every query [N, d], both normalised. Stores N x M similarities.

    Raises:
        ValueError: `k` outside [1, M].

    Example:
        >>> import torch
        >>> retrieve(torch.eye(3), torch.eye(3), 1).indices.flatten()
        tensor([0, 1, 2])
    """
    if not 1 <= k <= len(candidate_features):
        raise ValueError(f"retrieve: `k` got {k}, expected 1 to {len(candidate_features)}, the number of candidates")
    return Retrieval(*similarity(query_features, candidate_features).topk(k, dim=1))


def _call(tower: nn.Module, inputs: Inputs) -> Tensor:
    if isinstance(inputs, Mapping):
        return tower(**inputs)
    return tower(*inputs) if isinstance(inputs, (tuple, list)) else tower(inputs)


def _batch_size(name: str, inputs: Inputs) -> int:
    arguments = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
    for value in arguments if isinstance(arguments, (tuple, list)) else (arguments,):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise TypeError(f"BriVL: `{name}` got {type(inputs).__name__}, expected a tensor, or a tuple or dict with one")
