"""Key queues in models that several processes train."""

from __future__ import annotations

import logging
from typing import Any

from torch import distributed, nn

from perfvl.nn.key_queue import KeyQueue


def prepare_queues(model: nn.Module, group: Any = None) -> list[str]:
    """Starts every :class:`KeyQueue` of `model` alike on all ranks, and takes it out of what DDP sends at each forward.

    By default DistributedDataParallel sends every buffer from rank 0 to all ranks before each forward: 33.5 MB a step
    for MoCo's queue, 157 MB for BriVL's two in the released configuration and 335 MB in the paper's. Ranks that gather
    (``KeyQueue(group=...)``) write equal rows anyway; where each rank keeps keys of its own, rank 0's replace them.
    Buffers that DDP leaves alone also lose its first synchronisation, so random queues would differ on every rank:
    hence the one broadcast here. FSDP2 (``fully_shard``) sends no buffers and needs that broadcast alone.

    Call it on all ranks, on the very module that will be wrapped (after ``torch.compile``, which changes names), after
    it was moved to its device and a checkpoint was loaded, before ``DistributedDataParallel(model)``. Payloads that are
    not in ``KeyQueue(payloads=...)`` are made by the first enqueue, too late for this function: declare them. Without
    an initialised ``torch.distributed`` nothing is sent.

    Args:
        model: a module with queues anywhere below it, or a queue.
        group: the process group whose rank 0 sends its queues to the others, None for the default group.

    Returns:
        The names of the queues' buffers, payloads included: what DDP will leave alone, beside the names that
        it was told before.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` is, or contains, a DistributedDataParallel. Nothing is sent then.

    Cost: one broadcast of every buffer of every queue.

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(8, 4), "queue": KeyQueue(64, 4, init="random")})
        >>> prepare_queues(model)
        ['queue.keys', 'queue.cursor', 'queue.valid']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare_queues: `model` got {type(model).__name__}, expected a torch.nn.Module")
    buffers = {
        f"{path}.{name}" if path else name: buffer
        for path, queue in model.named_modules()
        if isinstance(queue, KeyQueue)
        for name, buffer in queue.named_buffers()
    }
    if distributed.is_available():
        # A torch that is built without torch.distributed has no such module.
        from torch.nn.parallel import DistributedDataParallel

        for path, module in model.named_modules():
            if isinstance(module, DistributedDataParallel):
                raise ValueError(
                    f"prepare_queues: `model` got DistributedDataParallel{f' at {path}' if path else ''}, expected a "
                    "module that is not wrapped yet: DDP asks what to leave alone when it is made"
                )
        known = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        # There is no public way: a tensor cannot be excluded through the arguments of DDP.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, list(dict.fromkeys([*known, *buffers]))
        )
        if distributed.is_initialized():
            for buffer in buffers.values():
                distributed.broadcast(buffer, group=group, group_src=0)
    logging.getLogger("perfvl").info(
        "left out of DDP's broadcast at every forward: %s", ", ".join(buffers) or "nothing"
    )
    return list(buffers)
