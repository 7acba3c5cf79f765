"""Checkpoints of the released BriVL code, in and out."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from perfvl.models.brivl import BriVL

# Released name -> name here; every one stands for the module and all that is below it.
_TOWERS = {
    "learnable.imgencoder": "image_tower",
    "learnable.imgencoder_mom": "image_momentum.module",
    "learnable.textencoder": "text_tower",
    "learnable.textencoder_mom": "text_momentum.module",
}
_IMAGE_PARTS = {
    "backbone": "backbone",
    "learnable.max_pool.0": "projection",
    "learnable.imgAtt": "attention",
    "learnable.imgFC.fc1": "head.0",
    "learnable.imgFC.fc2": "head.2",
}
_TEXT_PARTS = {
    "backbone": "backbone",
    "learnable.textAtt": "attention",
    "learnable.textFC.fc1": "head.0",
    "learnable.textFC.fc2": "head.2",
}
_QUEUES = {
    "img_queue": "image_queue.keys",
    "img_queue_ptr": "image_queue.cursor",
    "text_queue": "text_queue.keys",
    "text_queue_ptr": "text_queue.cursor",
}
# What the backbones of the released code carry and do not use: timm's classifier, BERT's pooler, a constant.
_UNUSED = re.compile(r"\.backbone\.(classifier\.|bert\.pooler\.|bert\.embeddings\.position_ids$)")


def load_released_state_dict(model: BriVL, state_dict: Mapping) -> list[str]:
    """Loads a state_dict of the released code's model (github.com/BAAI-WuDao/BriVL) into `model`, towers built alike.

    Takes that of the whole model (``learnable.imgencoder...``, ``img_queue`` [d, K] and so on), with ``module.`` in
    front of every name or not; that of its ``learnable`` alone (``imgencoder...``), which holds no queues; and a
    checkpoint dict that holds the latter under "learnable", as the published file does. Queues are transposed and count
    as full. Without queues those of `model` stay. Values are cast to the model's dtypes.

    Args:
        model: :func:`brivl_released`, or a :class:`BriVL` of :class:`BriVLImageTower` and :class:`BriVLTextTower`.
        state_dict: name -> tensor.

    Returns:
        The names left out because the released model does not use them either: timm's classifier, BERT's pooler and
        position_ids, where `model` has none.

    Raises:
        ValueError: names without a place in `model`, tensors of the model without a value, other shapes, a queue
            pointer outside [0, K): all of them listed. Nothing is modified then.

    Example:
        >>> from perfvl.models import brivl_small
        >>> source, model = brivl_small(100), brivl_small(100)
        >>> load_released_state_dict(model, released_state_dict(source))
        []
    """
    released = _with_full_names(state_dict)
    own = model.state_dict()
    names = {there: here for here, there in _names(own).items()}
    loaded: dict[str, Tensor] = {}
    left_out: list[str] = []
    problems: list[str] = []
    for there, value in released.items():
        if there not in names:
            (left_out if _UNUSED.search(there) else problems).append(there)
            continue
        here = names[there]
        value = _converted(there, value)
        if value.shape != own[here].shape:
            problems.append(f"{there} of shape {tuple(released[there].shape)} for {here} {tuple(own[here].shape)}")
        elif there in ("img_queue_ptr", "text_queue_ptr") and not 0 <= int(value) < model.queue_size:
            problems.append(f"{there} = {int(value)} outside of the queue of {model.queue_size}")
        loaded[here] = value
    queued = [there for there in _QUEUES if there in released]
    for there, here in names.items():
        if here not in loaded and (queued or there not in _QUEUES):
            problems.append(f"no {there}")
    if problems:
        raise ValueError(
            f"load_released_state_dict: `state_dict` got {len(problems)} entries that do not fit, expected those of "
            f"released_state_dict(model): {', '.join(problems)}"
        )
    if queued:
        for name in ("image_queue.valid", "text_queue.valid"):
            loaded[name] = torch.full_like(own[name], model.queue_size)
    model.load_state_dict({**own, **loaded})
    return left_out


def released_state_dict(model: BriVL) -> dict[str, Tensor]:
    """The model's state under the names and in the shapes of the released code: what its ``load_state_dict`` takes.

    A learnable temperature and the number of momentum updates have no place there and are left out. Tensors share
    memory with the model's.

    Raises:
        ValueError: where the towers are not :class:`BriVLImageTower` and :class:`BriVLTextTower`.

    Example:
        >>> from perfvl.models import brivl_small
        >>> released_state_dict(brivl_small(100))["img_queue"].shape
        torch.Size([64, 1024])
    """
    state = model.state_dict()
    exported = {}
    for here, there in _names(state).items():
        value = state[here]
        if there.endswith("max_pool.0.weight"):
            value = value[:, :, None, None]
        elif there in _QUEUES:
            value = value.T if value.dim() == 2 else value.reshape(1)
        exported[there] = value
    return exported


def _names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name here -> released name, for all of the state that the released code has too."""
    names = {here: there for there, here in _QUEUES.items()}
    for there, here in _TOWERS.items():
        for part_there, part_here in (_IMAGE_PARTS if "img" in there else _TEXT_PARTS).items():
            prefix = f"{here}.{part_here}."
            found = [name for name in state if name.startswith(prefix)]
            if not found:
                raise ValueError(f"BriVL: the model has no {prefix[:-1]}, expected BriVL's own image and text towers")
            names |= {name: f"{there}.{part_there}.{name[len(prefix) :]}" for name in found}
    return names


def _with_full_names(state_dict: Mapping) -> dict[str, Tensor]:
    """The entries as the whole released model names them."""
    entries = dict(state_dict)
    if isinstance(entries.get("learnable"), Mapping):
        entries = dict(entries["learnable"])
    entries = {name.removeprefix("module."): value for name, value in entries.items()}
    heads = tuple(name.removeprefix("learnable.") + "." for name in _TOWERS)
    return {f"learnable.{name}" if name.startswith(heads) else name: value for name, value in entries.items()}


def _converted(there: str, value: Tensor) -> Tensor:
    """A released tensor in the shape it has here."""
    if there.endswith("max_pool.0.weight") and value.dim() == 4:
        return value.squeeze(-1).squeeze(-1)
    if there in ("img_queue", "text_queue"):
        return value.T
    return value.reshape(()) if there in _QUEUES and value.numel() == 1 else value
