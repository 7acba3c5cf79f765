"""Checkpoints of key queues as other systems write them, in and out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from perfvl.nn.key_queue import KeyQueue, Strict
from perfvl.ops._library import bad_type, bad_value


@dataclasses.dataclass(frozen=True)
class _Format:
    queues: dict[str, str]  # name of the queue here -> entry that holds its keys; one entry may hold two
    pointers: dict[str, str]  # likewise; empty where the system does not save any
    axes: Literal["dK", "Kd", "2dK"] = "dK"
    payload: tuple[str, str, tuple[int, ...]] | None = None  # name here, entry, what its shape has in front of K
    prefix: str = ""  # in front of every entry that is written; any is read

    @property
    def entries(self) -> list[str]:
        """All that a checkpoint in this format holds of the queues."""
        payload = [] if self.payload is None else [self.payload[1]]
        return list(dict.fromkeys([*self.queues.values(), *payload, *self.pointers.values()]))

    @property
    def payload_names(self) -> set[str]:
        return set() if self.payload is None else {self.payload[0]}


def _image_and_text(pointer: str, *, ids: bool) -> _Format:
    return _Format(
        {"image": "image_queue", "text": "text_queue"},
        {"image": pointer, "text": pointer},
        payload=("ids", "idx_queue", (1,)) if ids else None,
    )


_ALBEF = (_image_and_text("queue_ptr", ids=True), _image_and_text("queue_ptr", ids=False))
# A system's variants: loading takes the first whose entries are all there, writing that with the queues' payloads.
_FORMATS: dict[str, tuple[_Format, ...]] = {
    "moco": (_Format({"keys": "queue"}, {"keys": "queue_ptr"}, prefix="module."),),
    "brivl": (
        _Format({"image": "img_queue", "text": "text_queue"}, {"image": "img_queue_ptr", "text": "text_queue_ptr"}),
    ),
    "albef": _ALBEF,
    "lavis": _ALBEF,
    "blip": (_image_and_text("ptr_queue", ids=True), *_ALBEF),
    "solo-learn": (
        _Format({"view1": "queue", "view2": "queue"}, {"view1": "queue_ptr", "view2": "queue_ptr"}, axes="2dK"),
    ),
    "lightly": (_Format({"keys": "bank"}, {"keys": "bank_ptr"}, axes="Kd"),),
    "pytorch-metric-learning": (
        _Format({"keys": "embedding_memory"}, {}, axes="Kd", payload=("labels", "label_memory", ())),
    ),
}


def load_queues(
    state_dict: Mapping[str, Any],
    system: str,
    *,
    dtype: torch.dtype | None = None,
    cursor: int | None = None,
    valid: int | None = None,
    normalize: bool = False,
    group: Any = None,
    strict: Strict | None = None,
) -> dict[str, KeyQueue]:
    """The queues in another system's checkpoint, as :class:`KeyQueue` of (K, d).

    =========================  ==========================================================  ===================
    `system`                   entries                                                     queues
    =========================  ==========================================================  ===================
    "moco"                     queue (d, K), queue_ptr                                     "keys"
    "brivl"                    img_queue, text_queue (d, K), img_queue_ptr,                "image", "text"
                               text_queue_ptr
    "albef", "lavis", "blip"   image_queue, text_queue (d, K), queue_ptr (ptr_queue in     "image", "text"
                               BLIP's retrieval), for retrieval also idx_queue (1, K)
    "solo-learn"               queue (2, d, K), queue_ptr                                  "view1", "view2"
    "lightly"                  bank (K, d), bank_ptr (saved by hand: its state_dict has    "keys"
                               neither; transpose a bank from before version 1.4.25)
    "pytorch-metric-learning"  embedding_memory (K, d), label_memory (K,)                  "keys"
    =========================  ==========================================================  ===================

    idx_queue becomes the payload "ids" of both queues, label_memory the payload "labels". To continue in a model that
    has a queue: ``model.queue.load_state_dict(load_queues(checkpoint["state_dict"], "moco")["keys"].state_dict())``.

    Args:
        state_dict: name -> tensor. What stands in front of the entries (``module.``, ``criterion.``) is found; other
            entries do not matter.
        system: one of the above.
        dtype: of the queues' keys, None for that of the checkpoint.
        cursor: "pytorch-metric-learning" alone, which does not save it: the row that is written next (its `queue_idx`).
        valid: how many rows hold keys, None for K: no system saves it. "pytorch-metric-learning" needs it (K where
            `has_been_filled`, else `queue_idx`).
        normalize, group, strict: as in :class:`KeyQueue`.

    Raises:
        TypeError: an entry of the wrong type or dtype.
        ValueError: unknown `system`; entries missing, or there under several prefixes; wrong shapes, queues of unequal
            shape; a pointer outside [0, K) (BLIP leaves such behind where K was changed); `valid` outside [0, K], or
            below K and not the cursor; `cursor` given where the checkpoint has it.

    Cost: one copy of the keys.

    Example:
        >>> checkpoint = {"module.queue": torch.randn(64, 256), "module.queue_ptr": torch.tensor([32])}
        >>> load_queues(checkpoint, "moco")["keys"]
        KeyQueue(
          256, 64, dtype=torch.float32, normalize=False, strict=None
          (payloads): _Payloads()
        )
    """
    op = "load_queues"
    if not isinstance(state_dict, Mapping):
        bad_type(op, "state_dict", type(state_dict).__name__, "a mapping of names to tensors")
    form, prefix = _find(state_dict, system)
    for name in form.entries:
        if not isinstance(state_dict[prefix + name], Tensor):
            bad_type(op, prefix + name, type(state_dict[prefix + name]).__name__, "a torch.Tensor")
    keys = _keys(state_dict, form, prefix)
    size, dim = next(iter(keys.values())).shape
    if not form.pointers:
        for argument, value in (("cursor", cursor), ("valid", valid)):
            if value is None:
                bad_value(op, argument, None, f"a number: {system} does not save it")
    elif cursor is not None:
        bad_value(op, "cursor", cursor, f"None: {system} saves it as {next(iter(form.pointers.values()))}")
    queues = {}
    for name, rows in keys.items():
        if name in form.pointers:
            first = _pointer(state_dict, prefix + form.pointers[name], size)
        else:
            first = _number("cursor", cursor, size - 1)
        count = size if valid is None else _number("valid", valid, size)
        if count < size and count != first:
            bad_value(op, "valid", count, f"{size}, or {first}: the row written next follows those that hold keys")
        state = {"keys": rows, "cursor": torch.tensor(first), "valid": torch.tensor(count)}
        if form.payload is not None:
            payload, entry, leading = form.payload
            state[f"payloads.{payload}"] = _payload(state_dict, prefix + entry, (*leading, size))
        queue = KeyQueue(
            size, dim, dtype=rows.dtype if dtype is None else dtype, normalize=normalize, group=group, strict=strict
        )
        queue.to(rows.device).load_state_dict(state)
        queues[name] = queue
    return queues


def dump_queues(queues: Mapping[str, KeyQueue], system: str) -> dict[str, Tensor]:
    """The entries of another system's checkpoint for these queues: the reverse of :func:`load_queues`.

    Names, shapes and dtypes are those that the system saves: "moco" with ``module.`` in front, keys in float32 (those
    of "pytorch-metric-learning" as they are), pointers int64 [1]. "blip" gets ``ptr_queue`` with ids, ``queue_ptr``
    without. In pytorch-metric-learning set `queue_idx` to the cursor and `has_been_filled` where all K rows are valid.

    Args:
        queues: by the names of :func:`load_queues`.
        system: as there.

    Returns:
        Name -> tensor, to merge into the rest of the state_dict. Nothing shares memory with the queues.

    Raises:
        TypeError: one of `queues` is not a KeyQueue.
        ValueError: unknown `system`, other names, or what its format cannot hold: rows that hold no keys yet, queues
            of unequal shape, two cursors or two lists of ids where it has one, float64 keys, payloads it does not know
            or lacks.

    Cost: one copy of the keys.

    Example:
        >>> dump_queues({"keys": KeyQueue(256, 64, init="random")}, "moco")["module.queue"].shape
        torch.Size([64, 256])
    """
    op = "dump_queues"
    names = _FORMATS[_known(op, system)][0].queues
    if not isinstance(queues, Mapping):
        bad_type(op, "queues", type(queues).__name__, "a mapping of names to queues")
    if set(queues) != set(names):
        bad_value(op, "queues", list(queues), f"{list(names)}, the queues of {system}")
    for name, queue in queues.items():
        if not isinstance(queue, KeyQueue):
            bad_type(op, name, type(queue).__name__, "a KeyQueue")
    first = next(iter(names))
    form = _variant_with_payloads(first, queues[first], system)
    _check_alike(queues, form, system)
    exported: dict[str, Tensor] = {}
    for entry in dict.fromkeys(names.values()):
        keys = [queues[name].keys for name, there in names.items() if there == entry]
        rows = torch.stack([k if form.axes == "Kd" else k.T for k in keys])
        exported[entry] = (rows if form.axes == "2dK" else rows[0]).to(torch.float32 if form.pointers else rows.dtype)
    if form.payload is not None:
        payload, entry, leading = form.payload
        exported[entry] = queues[first].payloads[payload].to(torch.int64, copy=True).reshape(*leading, -1)
    for name, entry in form.pointers.items():
        exported[entry] = queues[name].cursor.reshape(1).clone()
    return {form.prefix + entry: value for entry, value in exported.items()}


def _known(op: str, system: str) -> str:
    if system not in _FORMATS:
        bad_value(op, "system", repr(system), f"one of {', '.join(_FORMATS)}")
    return system


def _find(state_dict: Mapping[str, Any], system: str) -> tuple[_Format, str]:
    """The variant of the format that the checkpoint is in, and what stands in front of its entries."""
    variants = _FORMATS[_known("load_queues", system)]
    for form in variants:
        first = form.entries[0]
        prefixes = [name[: -len(first)] for name in state_dict if name == first or name.endswith(f".{first}")]
        prefixes = [prefix for prefix in prefixes if all(prefix + name in state_dict for name in form.entries)]
        if len(prefixes) > 1:
            several = " and ".join(prefix + first for prefix in prefixes)
            bad_value("load_queues", "state_dict", several, f"one {first}: pass the entries of one model alone")
        if prefixes:
            return form, prefixes[0]
    there = [name for name in state_dict if re.search("queue|bank|memory|ptr", name)] or list(state_dict)
    shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    expected = " or ".join(", ".join(form.entries) for form in variants)
    bad_value("load_queues", "state_dict", shown or "nothing", f"{expected} ({system}), all with one prefix or none")


def _keys(state_dict: Mapping[str, Tensor], form: _Format, prefix: str) -> dict[str, Tensor]:
    """Name -> keys [K, d], views of the checkpoint's."""
    op, keys = "load_queues", {}
    first = prefix + next(iter(form.queues.values()))
    for entry in dict.fromkeys(form.queues.values()):
        value = state_dict[prefix + entry]
        if not value.is_floating_point():
            bad_type(op, prefix + entry, value.dtype, "a floating-point tensor")
        if value.dim() != len(form.axes) or 0 in value.shape or (form.axes == "2dK" and len(value) != 2):
            bad_value(op, prefix + entry, f"shape {tuple(value.shape)}", f"({', '.join(form.axes)})")
        if value.shape != state_dict[first].shape:
            expected = f"the shape of {first}, {tuple(state_dict[first].shape)}"
            bad_value(op, prefix + entry, f"shape {tuple(value.shape)}", expected)
        names = [name for name, there in form.queues.items() if there == entry]
        for name, rows in zip(names, value if form.axes == "2dK" else [value], strict=True):
            keys[name] = rows if form.axes == "Kd" else rows.T
    return keys


def _pointer(state_dict: Mapping[str, Tensor], name: str, size: int) -> int:
    value = state_dict[name]
    if value.dtype != torch.int64:
        bad_type("load_queues", name, value.dtype, "an int64 tensor")
    if value.numel() != 1:
        bad_value("load_queues", name, f"shape {tuple(value.shape)}", "one element")
    return _number(name, int(value), size - 1)


def _number(name: str, value: int | None, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        bad_type("load_queues", name, type(value).__name__, "an int")
    if not 0 <= value <= most:
        bad_value("load_queues", name, value, f"a number in [0, {most}]")
    return value


def _payload(state_dict: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """[K] of integers."""
    value = state_dict[name]
    if value.dtype not in (torch.int64, torch.int32):
        bad_type("load_queues", name, value.dtype, "an int64 or int32 tensor")
    if value.shape != shape:
        bad_value("load_queues", name, f"shape {tuple(value.shape)}", str(shape))
    return value.reshape(-1)


def _variant_with_payloads(name: str, queue: KeyQueue, system: str) -> _Format:
    for form in _FORMATS[system]:
        if form.payload_names == set(queue.payloads):
            break
    else:
        accepted = [", ".join(form.payload_names) or "none" for form in _FORMATS[system]]
        expected = f"{' or '.join(dict.fromkeys(accepted))}: {system} holds no others"
        bad_value("dump_queues", name, f"payloads {', '.join(queue.payloads) or 'none'}", expected)
    for payload in form.payload_names:
        values = queue.payloads[payload]
        if values.dim() != 1 or values.dtype not in (torch.int64, torch.int32):
            got = f"payload {payload} of shape {tuple(values.shape)} and {values.dtype}"
            bad_value("dump_queues", name, got, f"({queue.size},) and int64")
    return form


def _check_alike(queues: Mapping[str, KeyQueue], form: _Format, system: str) -> None:
    """Refuses queues that the format cannot hold together, or without rows that hold no keys."""
    op = "dump_queues"
    first_name, first = next(iter(queues.items()))
    for name, queue in queues.items():
        if queue.keys.shape != first.keys.shape:
            bad_value(op, name, f"shape {tuple(queue.keys.shape)}", f"that of {first_name}, {tuple(first.keys.shape)}")
        if set(queue.payloads) != form.payload_names:
            expected = f"those of {first_name}: {', '.join(form.payload_names) or 'none'}"
            bad_value(op, name, f"payloads {', '.join(queue.payloads) or 'none'}", expected)
        for payload in form.payload_names:
            if not torch.equal(queue.payloads[payload], first.payloads[payload]):
                bad_value(op, name, f"other {payload} than {first_name}", f"equal ones: {system} holds one list")
        if not form.pointers:
            continue
        if queue.keys.dtype == torch.float64:
            bad_value(op, name, "float64 keys", f"float32 or less: {system} saves float32")
        if int(queue.valid) < queue.size:
            expected = f"{queue.size}: {system} takes every row for a key"
            bad_value(op, name, f"{int(queue.valid)} rows that hold keys", expected)
        if len(set(form.pointers.values())) < len(queues) and int(queue.cursor) != int(first.cursor):
            expected = f"{int(first.cursor)} as in {first_name}: {system} has one pointer"
            bad_value(op, name, f"the cursor {int(queue.cursor)}", expected)
