"""A ring of keys for contrastive losses, written in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfvl.ops.key_queue import MAX_PAYLOADS, check, enqueue_

Strict = Literal["assert", "drop_tail", "modulo"]
NO_ID = -100
"""What integer payloads hold in rows that have not been written, as in ALBEF."""


class KeyQueue(nn.Module):
    r"""A ring of the last K keys and of what belongs to them, see :func:`perfvl.functional.enqueue_`.

    Replaces the queue buffers of MoCo (He et al. 2020, arXiv:1911.05722), BriVL, ALBEF and their kin: no ``int(ptr)``,
    no ``K % batch == 0``, no clone; any batch size, also above K. Pass it to :class:`InfoNCELoss` as the queue.

    ``keys`` [K, d], ``cursor`` (0-d int64, the row written next) and ``valid`` (0-d int64, how many rows hold keys) are
    persistent buffers: a run that saves in the middle of the ring and loads continues as if it had not stopped.
    Payloads are in ``payloads["name"]`` [K, ...] and are saved with them.

    Args:
        size: K, at least 1.
        dim: d, at least 1.
        dtype: of the keys: float32, bfloat16 or float16 (float64 runs the plain PyTorch reference). Keys are rounded to
            it once.
        normalize: L2-normalise keys as they are written.
        group: a ``torch.distributed`` process group (``torch.distributed.group.WORLD`` for all ranks) whose keys and
            payloads are gathered in rank order, so that every rank writes the same rows: on the CPU straight into the
            ring where the rows do not wrap, elsewhere through one buffer (their place is known to the device alone).
            Every rank must bring the same number of rows. None: each rank keeps its own keys.
        init: "empty" (no valid rows) or "random" (K random unit rows, all valid, as MoCo starts; call
            :func:`prepare_queues` so that all ranks start alike).
        payloads: what moves with the keys: name -> dtype, or name -> (dtype, shape of one row). Names that first appear
            in :meth:`enqueue`, before anything was written, are added by it.
        strict: None, or the rule of another system: "assert" raises where K % B != 0 (MoCo, BriVL, ALBEF, BLIP),
            "drop_tail" drops rows that would wrap (lightly), "modulo" raises where B > K (pytorch-metric-learning).

    Raises:
        TypeError, ValueError: on bad settings; on bad keys or payloads; on loading a cursor outside [0, K), a count
            outside [0, K] or keys of another shape. Nothing is modified then.

    Example:
        >>> import torch
        >>> queue = KeyQueue(1024, 64, normalize=True)
        >>> queue.enqueue(torch.randn(96, 64), ids=torch.arange(96))
        >>> queue.valid, queue.payloads["ids"][:3]
        (tensor(96), tensor([0, 1, 2]))
    """

    keys: Tensor
    cursor: Tensor
    valid: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        normalize: bool = False,
        group: Any = None,
        init: Literal["empty", "random"] = "empty",
        payloads: Mapping[str, torch.dtype | tuple[torch.dtype, tuple[int, ...]]] | None = None,
        strict: Strict | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"KeyQueue: `{name}` got {type(value).__name__}, expected an int")
            if value < 1:
                raise ValueError(f"KeyQueue: `{name}` got {value}, expected at least 1")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"KeyQueue: `dtype` got {dtype}, expected a floating-point torch.dtype")
        if init not in ("empty", "random"):
            raise ValueError(f'KeyQueue: `init` got {init!r}, expected "empty" or "random"')
        if strict not in (None, "assert", "drop_tail", "modulo"):
            raise ValueError(f'KeyQueue: `strict` got {strict!r}, expected None, "assert", "drop_tail" or "modulo"')
        self.size, self.dim = size, dim
        self.normalize, self.strict = normalize, strict
        self.group = group
        keys = F.normalize(torch.randn(size, dim), dim=1).to(dtype) if init == "random" else torch.zeros(size, dim)
        self.register_buffer("keys", keys.to(dtype))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("valid", torch.tensor(size if init == "random" else 0))
        self.payloads = _Payloads(size)
        for name, kind in (payloads or {}).items():
            dtype_, shape = kind if isinstance(kind, tuple) else (kind, ())
            self.payloads.register_buffer(name, self.payloads.make(name, dtype_, shape))
        self._written = init == "random"  # whether rows without a new payload may exist

    def enqueue(self, keys: Tensor, *, mask: Tensor | None = None, **payload: Tensor) -> None:
        """Writes keys [B, d] (and a tensor [B, ...] for every payload), cast to the ring's dtype.

        ``mask`` (bool [B]) keeps rows. Does nothing in eval mode, so that validation leaves the queue as it is. Call it
        after the loss (or before it, as pytorch-metric-learning does); the loss saves no reference to the keys. Under
        activation checkpointing, call it outside the checkpointed part: that runs twice.
        """
        if not self.training:
            return
        if self.strict is not None:
            self._check_strict(keys, mask)
        # Module attributes that are tensors cost as much to look up as a small batch to write.
        buffers: dict[str, Any] = self._buffers
        rings: dict[str, Any] = self._modules["payloads"]._buffers  # type: ignore[union-attr]
        new: dict[str, Tensor] = {}
        if payload.keys() != rings.keys():
            self._check_payload(keys, payload)
            for name in [name for name in payload if name not in rings]:
                rows = payload[name]
                new[name] = self.payloads.make(name, rows.dtype, tuple(rows.shape[1:]), self.keys.device)
            rings = rings | new
        payload_queues, payloads = [rings[name] for name in payload], list(payload.values())
        try:
            if self.group is not None:
                self._gather(keys, mask, payload_queues, payloads)
            else:
                enqueue_(
                    buffers["keys"],
                    buffers["cursor"],
                    keys,
                    normalize=self.normalize,
                    valid=buffers["valid"],
                    mask=mask,
                    payload_queues=payload_queues,
                    payloads=payloads,
                    drop_tail=self.strict == "drop_tail",
                )
        except (TypeError, ValueError):
            self._check_payload(keys, payload)  # says it by name
            raise
        for name, ring in new.items():
            self.payloads.register_buffer(name, ring)
        if not self._written:  # a module's attribute costs a microsecond to set
            self._written = True

    @torch.no_grad()
    def _gather(self, keys: Tensor, mask: Tensor | None, rings: list[Tensor], payloads: list[Tensor]) -> None:
        """Enqueues the rows of all ranks."""
        check(self.keys, self.cursor, keys, self.valid, mask, rings, payloads)
        if self.normalize:  # before the gather, which then moves no more than the queue's dtype
            keys = F.normalize(keys if keys.dtype == torch.float64 else keys.float(), dim=1)
        keys = keys.to(self.keys.dtype).contiguous()
        payloads = [rows.to(ring.dtype).contiguous() for rows, ring in zip(payloads, rings, strict=True)]
        if mask is None and self._gather_into_rows(keys, rings, payloads):
            return
        enqueue_(
            self.keys,
            self.cursor,
            _gather(keys, self.group),
            valid=self.valid,
            mask=None if mask is None else _gather(mask, self.group),
            payload_queues=rings,
            payloads=[_gather(rows, self.group) for rows in payloads],
            drop_tail=self.strict == "drop_tail",
        )

    def _gather_into_rows(self, keys: Tensor, rings: list[Tensor], payloads: list[Tensor]) -> bool:
        """Gathers straight into the ring where that is one block whose place the host knows: on the CPU."""
        if self.keys.device.type != "cpu" or not self.keys.is_contiguous():
            return False
        first, count = int(self.cursor), len(keys) * _world_size(self.group)
        if first < 0 or first + count > self.size:
            return False
        written = [self.keys, *rings]
        for ring, rows in zip(written, [keys, *payloads], strict=True):
            _all_gather(ring[first : first + count], rows, self.group)
        self.cursor.fill_((first + count) % self.size)
        self.valid.add_(count).clamp_(max=self.size)
        torch.autograd.graph.increment_version(written)  # the gather writes through views without a version
        return True

    def _check_strict(self, keys: Tensor, mask: Tensor | None) -> None:
        if self.strict == "drop_tail" or mask is not None:
            return
        rows = len(keys) * (1 if self.group is None else _world_size(self.group))
        if self.strict == "modulo" and rows > self.size:
            expected = "at most"
        elif self.strict == "assert" and rows and self.size % rows:
            expected = "a divisor of"
        else:
            return
        raise ValueError(f"KeyQueue.enqueue: `keys` got {rows} rows, expected {expected} the size {self.size} (strict)")

    def _check_payload(self, keys: Tensor, payload: dict[str, Tensor]) -> None:
        missing = [name for name in self.payloads if name not in payload]
        if missing:
            raise ValueError(f"KeyQueue.enqueue: got no {', '.join(missing)}, expected every payload of this queue")
        for name, rows in payload.items():
            if not isinstance(rows, Tensor):
                raise TypeError(f"KeyQueue.enqueue: `{name}` got {type(rows).__name__}, expected a torch.Tensor")
            if rows.dim() == 0 or len(rows) != len(keys):
                raise ValueError(
                    f"KeyQueue.enqueue: `{name}` got shape {tuple(rows.shape)}, expected ({len(keys)}, ...)"
                )
            if name not in self.payloads and self._written:
                raise ValueError(
                    f"KeyQueue.enqueue: `{name}` got a payload that rows in the queue do not have, "
                    "expected it from the first call on, or in `payloads`"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        found = {name: state_dict[prefix + name] for name in ("keys", "cursor", "valid") if prefix + name in state_dict}
        if "keys" in found and tuple(found["keys"].shape) != (self.size, self.dim):
            _refuse("keys", f"shape {tuple(found['keys'].shape)}", f"({self.size}, {self.dim})")
        for name, most in (("cursor", self.size - 1), ("valid", self.size)):
            if name in found and found[name].numel() != 1:
                _refuse(name, f"shape {tuple(found[name].shape)}", "one element")
            if name in found and not 0 <= int(found[name]) <= most:
                _refuse(name, int(found[name]), f"a number in [0, {most}]")
        for name, rows in _payloads_in(state_dict, f"{prefix}payloads."):
            if rows.dim() == 0 or len(rows) != self.size:
                _refuse(f"payloads.{name}", f"shape {tuple(rows.shape)}", f"({self.size}, ...)")
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._written = True

    def __deepcopy__(self, memo: dict) -> KeyQueue:
        memo[id(self.group)] = self.group  # a communicator is shared, not copied
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, dtype={self.keys.dtype}, normalize={self.normalize}, strict={self.strict!r}"


class _Payloads(nn.Module):
    """Buffers by name, [K, ...] each; those of a checkpoint are made on loading."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def make(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: Any = None) -> Tensor:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"KeyQueue: `payloads[{name!r}]` got {dtype!r}, expected a torch.dtype or (dtype, shape)")
        if hasattr(self, name) or not name.isidentifier():
            raise ValueError(f"KeyQueue: `payloads` got the name {name!r}, expected an identifier not in use")
        if len(self) == MAX_PAYLOADS:
            raise ValueError(
                f"KeyQueue: `payloads` got more than {MAX_PAYLOADS} names, expected at most {MAX_PAYLOADS}"
            )
        fill = 0 if dtype.is_floating_point or dtype in (torch.bool, torch.uint8) else NO_ID
        return torch.full((self.size, *shape), fill, dtype=dtype, device=device)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, rows in _payloads_in(state_dict, prefix):
            if name not in self:
                self.register_buffer(name, self.make(name, rows.dtype, tuple(rows.shape[1:]), rows.device))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _payloads_in(state_dict: Mapping[str, Any], prefix: str) -> list[tuple[str, Tensor]]:
    return [(key[len(prefix) :], rows) for key, rows in state_dict.items() if key.startswith(prefix)]


def _refuse(name: str, got: object, expected: str) -> None:
    raise ValueError(f"KeyQueue.load_state_dict: `{name}` got {got}, expected {expected}")


def _world_size(group: Any) -> int:
    from torch import distributed

    return distributed.get_world_size(group)


def _gather(rows: Tensor, group: Any) -> Tensor:
    """The rows of every rank in rank order, in one buffer."""
    gathered = rows.new_empty((_world_size(group) * len(rows), *rows.shape[1:]))
    _all_gather(gathered, rows, group)
    return gathered


def _all_gather(into: Tensor, rows: Tensor, group: Any) -> None:
    from torch import distributed

    # Renamed in torch 2.13, which warns about the old name.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(into, rows, group=group)
