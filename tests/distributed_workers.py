"""What the ranks of test_distributed.py run, and the two processes that run it."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from perfvl.nn import InfoNCELoss, KeyQueue, MomentumEncoder, prepare_queues

WORLD = 2
BATCH, INPUTS, DIM = 4, 6, 5

# The processes


class Ranks:
    """Processes that stay for many calls, as importing torch takes seconds; one that hangs or fails takes all down."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 60.0) -> list[Any]:
        """``function(rank, *arguments)`` on every rank, in a process group of its own -> what each returns."""
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:  # ranks meet in a file: no port to be taken by others
            for pipe in self._pipes:
                pipe.send((function, arguments, str(Path(folder) / "store")))
            answers = [_answer(rank, pipe, seconds) for rank, pipe in enumerate(self._pipes)]
        failures = [answer for answer in answers if isinstance(answer, str)]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [torch.load(io.BytesIO(answer), weights_only=True) for answer in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _answer(rank: int, pipe: Connection, seconds: float) -> bytes | str:
    try:
        return pipe.recv() if pipe.poll(seconds) else f"rank {rank}: no answer in {seconds} s"
    except (EOFError, OSError):
        return f"rank {rank}: the process died"


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that was not written shows as NaN
    while True:
        try:
            function, arguments, store = pipe.recv()
        except EOFError:
            return
        try:
            distributed.init_process_group(
                "gloo",
                store=distributed.FileStore(store, WORLD),
                rank=rank,
                world_size=WORLD,
                timeout=datetime.timedelta(seconds=30),
            )
            torch.manual_seed(0)
            answer = io.BytesIO()
            torch.save(function(rank, *arguments), answer)
            distributed.barrier()
            distributed.destroy_process_group()
            pipe.send(answer.getvalue())
        except Exception:
            pipe.send(f"rank {rank}: {traceback.format_exc()}")
            return


# What both sides need


def batch(step: int, rank: int | None, *shape: int) -> Tensor:
    """What a rank brings to a step, or all ranks together."""
    parts = [torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(100 * step + r)) for r in range(WORLD)]
    return torch.cat(parts) if rank is None else parts[rank]


class MoCo(nn.Module):
    def __init__(self, group: Any, *, size: int = 28, init: Any = "random", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(INPUTS, 7), nn.Tanh(), Scale(), nn.Linear(7, DIM))
        self.momentum = MomentumEncoder(self.encoder, 0.9)
        self.queue = KeyQueue(size, DIM, group=group, init=init)
        self.loss = InfoNCELoss(0.2)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        query = F.normalize(self.encoder(images), dim=1)
        self.momentum.update()
        keys = F.normalize(self.momentum(others), dim=1)
        loss = self.loss(query, keys, self.queue)
        self.queue.enqueue(keys)
        return loss


class Scale(nn.Module):
    """One number, so that one of two shards is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.scale


def train(model: nn.Module, rank: int | None, steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    """The loss of every step."""
    losses = []
    for step in steps:
        loss = model(batch(step, rank, INPUTS), batch(step + 50, rank, INPUTS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fill(queue: KeyQueue, rank: int | None, steps: int, *, ids: bool, masked: bool) -> None:
    for step in range(steps):
        extra: dict[str, Tensor] = {}
        if ids:
            extra = {"ids": (1000 * batch(step, rank)).long(), "scores": batch(step, rank, 2)}
        queue.enqueue(batch(step, rank, queue.dim), mask=batch(step, rank) > 0 if masked else None, **extra)


# What ranks run


def fill_queue(rank: int, settings: dict, ids: bool, masked: bool) -> dict[str, Tensor]:
    queue = KeyQueue(dim=DIM, group=distributed.group.WORLD, **settings)
    fill(queue, rank, 10, ids=ids, masked=masked)
    return dict(queue.state_dict())


def versions_rise(rank: int, size: int) -> list[bool]:
    queue = KeyQueue(size, DIM, group=distributed.group.WORLD, payloads={"ids": torch.int64})
    written = [*queue.buffers()]
    before = [buffer._version for buffer in written]
    queue.enqueue(batch(0, rank, DIM), ids=torch.arange(BATCH))
    return [buffer._version > old for buffer, old in zip(written, before, strict=True)]


def refuses(rank: int, strict: str, size: int) -> list[str]:
    queue = KeyQueue(size, DIM, group=distributed.group.WORLD, strict=strict)
    try:
        queue.enqueue(batch(0, rank, DIM))
    except ValueError as error:
        return [str(error)]
    return []


def train_with_ddp(rank: int, steps: int) -> dict[str, Any]:
    model = MoCo(distributed.group.WORLD, seed=rank)
    prepare_queues(model)
    parallel = DistributedDataParallel(model)
    first = train(parallel, rank, range(1), sgd(model))
    after_one = gradients(model)
    model = MoCo(distributed.group.WORLD)
    prepare_queues(model)
    losses = train(DistributedDataParallel(model), rank, range(steps), sgd(model))
    return {"first": first, "gradients": after_one, "losses": losses, "state": dict(model.state_dict())}


class WithStatistics(nn.Module):
    """A buffer that DDP should send, a queue with a payload that it should not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(DIM, DIM)
        self.register_buffer("statistics", torch.zeros(3))
        self.queue = KeyQueue(8, DIM, init="random", payloads={"ids": torch.int64})

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


def change_buffers_and_forward(rank: int, prepared: bool, compiled: bool) -> dict[str, Any]:
    """Buffers become the rank's number, then one forward under DDP."""
    module = WithStatistics(seed=rank)
    model: nn.Module = torch.compile(module, backend="eager") if compiled else module  # type: ignore[assignment]
    names = prepare_queues(model) if prepared else []
    at_start = module.queue.keys.clone()
    parallel = DistributedDataParallel(model)
    with torch.no_grad():
        for buffer in module.buffers():
            buffer.fill_(rank)
    parallel(torch.ones(2, DIM)).sum().backward()
    return {"names": names, "at_start": at_start, "now": {name: b.clone() for name, b in module.named_buffers()}}


def exclude_without_synchronising(rank: int) -> Tensor:
    model = WithStatistics(seed=rank)
    names = [name for name, _ in model.named_buffers() if name.startswith("queue.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model).module.queue.keys


def prepare_wrapped(rank: int) -> list[str]:
    errors = []
    model = DistributedDataParallel(WithStatistics(seed=0))
    for wrapped in (model, nn.ModuleDict({"inner": model})):
        try:
            prepare_queues(wrapped)
        except ValueError as error:
            errors.append(str(error))
    return errors


def resume(rank: int, folder: str, stop: int, steps: int) -> list[Any]:
    """An uninterrupted run, and one of the same data that rank 0 saves and both ranks load into other models."""

    def start(seed: int) -> tuple[MoCo, nn.Module, torch.optim.Optimizer]:
        model = MoCo(distributed.group.WORLD, size=21, init="empty", seed=seed)
        prepare_queues(model)
        return model, DistributedDataParallel(model), sgd(model)

    whole, parallel, optimizer = start(seed=0)
    losses = train(parallel, rank, range(steps), optimizer)
    first, parallel, optimizer = start(seed=0)
    resumed = train(parallel, rank, range(stop), optimizer)
    path = Path(folder) / "checkpoint.pt"
    if rank == 0:
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, path)
    distributed.barrier()
    checkpoint = torch.load(path, weights_only=True)
    second, parallel, optimizer = start(seed=7)
    second.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    resumed += train(parallel, rank, range(stop, steps), optimizer)
    return [
        losses,
        resumed,
        dict(whole.state_dict()),
        dict(second.state_dict()),
        int(checkpoint["model"]["queue.cursor"]),
    ]


def train_with_fsdp(rank: int, steps: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    model = MoCo(distributed.group.WORLD)
    with torch.no_grad():  # as ranks of different seeds start
        model.queue.keys.add_(rank)
    for part in (model.encoder, model.momentum.module):
        for layer in (part[0], part[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(part, mesh=mesh)
    prepare_queues(model)
    losses = train(model, rank, range(steps), sgd(model))
    shards = {name: value for name, value in model.state_dict().items() if isinstance(value, DTensor)}
    empty = [name for name, value in shards.items() if value.to_local().numel() == 0]
    state = {name: value.full_tensor() for name, value in shards.items()}
    return {"losses": losses, "state": state, "queue": dict(model.queue.state_dict()), "empty": empty}


def average_shards(rank: int, dtype: torch.dtype | None, compute_dtype: torch.dtype | None) -> list[Tensor]:
    """The average of a module after three changes -> averaged in shards, averaged whole."""
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = nn.Sequential(nn.Linear(INPUTS, 7), nn.BatchNorm1d(7), Scale())
    sharded = nn.Sequential(nn.Linear(INPUTS, 7), nn.BatchNorm1d(7), Scale())
    sharded.load_state_dict(whole.state_dict())
    averages = [
        MomentumEncoder(module, 0.9, buffers="average", dtype=dtype, compute_dtype=compute_dtype)
        for module in (whole, sharded)
    ]
    fully_shard(sharded, mesh=mesh)
    fully_shard(averages[1].module, mesh=mesh)
    for module in averages[1]._compute:
        fully_shard(module, mesh=mesh)
    for step in range(3):
        change = {name: batch(step + i, 0)[0] for i, name in enumerate(whole.state_dict())}
        with torch.no_grad():
            for module in (whole, sharded):
                for name, tensor in module.state_dict().items():
                    tensor.add_(change[name].to(tensor.dtype))
        for average in averages:
            average.update()
    results = []
    for average in averages:
        tensors = [*average.module.state_dict().values(), *average.compute_module.state_dict().values()]
        results.append([t.full_tensor() if isinstance(t, DTensor) else t for t in tensors])
    return results


def average_one_side_sharded(rank: int) -> str:
    module = nn.Linear(INPUTS, DIM)
    average = MomentumEncoder(module, 0.9)
    fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    before = average.module.weight.clone()
    try:
        average.update()
    except ValueError as error:
        assert torch.equal(before, average.module.weight)
        return str(error)
    return "no error"


def follow_wrapped(rank: int, wrapper: str, first: bool) -> list[Tensor]:
    """The average of a wrapped module after one change, and what it should be."""
    module = nn.Sequential(nn.Linear(INPUTS, DIM), nn.BatchNorm1d(DIM))
    wrap: Callable[[nn.Module], Any] = {
        "ddp": DistributedDataParallel,
        "compile": lambda m: torch.compile(m, backend="eager"),
        "ddp of compile": lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
        "compile of ddp": lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
    }[wrapper]
    wrapped = wrap(module) if first else None
    average = MomentumEncoder(wrapped if first else module, 0.75)
    before = [p.clone() for p in average.module.parameters()]
    wrapped = wrapped if first else wrap(module)
    wrapped(batch(0, rank, INPUTS)).sum().backward()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    average.update()
    expected = [torch.lerp(old, p.detach(), 0.25) for old, p in zip(before, module.parameters(), strict=True)]
    return [[p.detach() for p in average.module.parameters()], expected]
