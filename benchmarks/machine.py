"""The machine and the software a run was made with."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a run: device, versions, threads and commit. No host or user names."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "perfvl": _version("perfvl"),
        "commit": _commit(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep what this process frees, from now on; False where malloc is another.

    By default malloc returns large blocks to the kernel, which then maps and clears them anew at every call, page by
    page. Whether it does depends on the sizes that all contenders freed before, so it would be luck which of them pays.
    Allocators that are usual in training (jemalloc, tcmalloc) keep memory as well.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


class Interference:
    """Which part of the cores' time other processes take, from the moment this is made. Linux only.

    It matters more than it seems: a library whose threads wait for each other at every step (OpenMP loops around small
    matrix products) slows down tenfold next to another busy process, evenly enough for its percentiles to look calm.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def fraction(self) -> float | None:
        """Core time of others over all core time since the start; None where the system does not tell."""
        if self._start is None:
            return None
        busy, own, wall = (now - then for now, then in zip(self._now() or self._start, self._start, strict=True))
        return max(0.0, busy - own) / max(wall * (os.cpu_count() or 1), 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        statistics = Path("/proc/stat")
        if not statistics.exists():
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, statistics.read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.perf_counter()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name with its family and model: cloud machines of several generations have the same name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    lines = (re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model"))
    name, *numbers = (line.group(1).strip() if line else None for line in lines)
    if name is None:
        return platform.processor() or platform.machine()
    return f"{name} (family {numbers[0]}, model {numbers[1]})" if all(numbers) else name


def _commit() -> str | None:
    """The commit of the checkout this package runs from, marked where the tree differs from it; None elsewhere."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
