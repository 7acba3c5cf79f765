"""Peak extra memory of one call.

On CUDA every allocation of a contender goes through torch's allocator, which keeps the peak itself.

On the CPU no allocator sees everything: torch's profiler misses what a C++ kernel or a BLAS takes with malloc. So the
number is the peak of the resident set (``VmHWM``, reset through ``/proc/self/clear_refs``), which counts every page
however it was obtained, and torch's own count is recorded beside it. Three things would make the resident set lie, and
``memory_worker.py`` removes them: memory that malloc kept from earlier calls (each measurement is a fresh fork, large
blocks go back to the kernel when freed), huge pages (off: they round small buffers up to 2 MB), and library start-up
(done beforehand on a small copy of the problem). What a contender keeps after its first call, such as cached scratch,
is counted as well. The kernel batches its counters, so differences under about 1 MB are not resolved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from .workload import Contender, Workload

RESOLUTION = 1 << 20
"""Bytes below which the resident-set measurement says nothing."""


class MemoryProbe:
    """A worker process that measures the memory of calls on the CPU. Use as a context manager."""

    def __init__(self) -> None:
        # glibc then serves every block from 64 kB up by mmap, and munmap on free makes the resident set exact.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the probe
        self._worker = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.memory_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env=environment,
        )

    def __enter__(self) -> MemoryProbe:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._worker.stdin is not None:
            self._worker.stdin.close()
        self._worker.wait(timeout=60)
        self._messages.close()

    def ask(self, target: str, **arguments: Any) -> dict[str, Any]:
        """Measures ``target`` (``"module:function"``, see ``memory_worker``) called with JSON-able ``arguments``."""
        stdin, stdout = self._worker.stdin, self._worker.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"target": target, "arguments": arguments}) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"reason": f"the memory worker ended: {self._last_message()}"}

    def _last_message(self) -> str:
        self._messages.seek(0)
        return (self._messages.read().strip().splitlines() or ["no message"])[-1]

    def contender(self, workload: Workload, contender: str, seed: int) -> dict[str, Any]:
        """Peak extra bytes of one call of a registered workload's contender."""
        target = f"{__package__}.registry:memory_calls"
        return self.ask(target, op=workload.op, workload=workload.name, contender=contender, seed=seed)

    def check(self, size: int = 64 << 20) -> dict[str, Any]:
        """Measures buffers of a known size, one from torch and one from malloc, so that a reader can trust the rest."""
        target = f"{__package__}.memory_worker:known_allocation"
        found = {kind: self.ask(target, size=size, kind=kind).get("peak_bytes") for kind in ("torch", "malloc")}
        return {"allocated_bytes": size, "measured_bytes": found}


def cuda_memory(workload: Workload, contender: Contender, device: torch.device, seed: int) -> Mapping[str, Any]:
    """Peak extra bytes of one call on a CUDA device, inputs not included."""
    inputs = workload.inputs(device, seed)
    call = workload.call(contender.build(inputs), inputs)
    for _ in range(2):
        call()
    for name in workload.leaves:
        inputs[name].grad = None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return {"peak_bytes": peak, "torch_peak_bytes": peak}
