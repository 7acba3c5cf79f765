"""The process that measures memory on the CPU: one JSON request per line in, one JSON answer per line out.

It imports what the requests need but never computes anything itself, so that it stays single-threaded and can fork.
Every request is measured in a fork of its own, which starts with no freed memory to reuse. See ``memory.py`` for the
method.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
Target = Callable[..., tuple[Call, Call]]
"""Called in the fork; returns a warm-up that loads libraries, and the call to measure."""

PR_SET_THP_DISABLE = 41


def main() -> int:
    """Answers requests until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing a contender prints may look like an answer
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    _torch_peak(lambda: None)  # the profiler takes most of a second to start: once here, not in every fork
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_in_fork(request["target"], request["arguments"])) + "\n")
        answers.flush()
    return 0


def known_allocation(size: int, kind: str) -> tuple[Call, Call]:
    """A call that holds ``size`` touched bytes for a moment, from torch's allocator or from malloc."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]

    def from_torch(size: int = size) -> None:
        torch.ones(size, dtype=torch.uint8)

    def from_malloc() -> None:
        block = libc.malloc(ctypes.c_size_t(size))
        ctypes.memset(block, 1, size)
        libc.free(block)

    return (lambda: from_torch(1 << 20)), {"torch": from_torch, "malloc": from_malloc}[kind]


def _in_fork(target: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, name = target.partition(":")
    prepare: Target = getattr(importlib.import_module(module), name)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            answer = _measure(prepare, arguments)
        except Exception as error:
            answer = {"reason": f"{type(error).__name__}: {error}"}
        with os.fdopen(send, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"reason": "the measuring process died"}


def _measure(prepare: Target, arguments: dict[str, Any]) -> dict[str, Any]:
    warm_up, call = prepare(**arguments)
    warm_up()
    _settle()
    before = _status("VmRSS")
    call()  # what stays allocated after this call is part of its price: `before` was taken ahead of it
    _settle()
    if before is None or not _reset_peak():
        return {
            "torch_peak_bytes": _torch_peak(call),
            "reason": "this system keeps no resettable peak of the resident set",
        }
    call()
    peak = _status("VmHWM") or before
    return {"peak_bytes": max(0, peak - before), "torch_peak_bytes": _torch_peak(call)}


def _settle() -> None:
    """Gives freed memory back to the kernel."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found.group(1)) * 1024 if found else None


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _torch_peak(call: Call) -> int | None:
    """Peak of torch's CPU allocator during a call, from the profiler's allocation events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    sys.exit(main())
