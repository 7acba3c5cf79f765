"""Clocks, interleaving and order statistics."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Clock = Callable[[Callable[[], Any], int], float]
"""Runs a call ``repeats`` times and returns the seconds one call took."""


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The given quantile with linear interpolation between the two nearest samples (numpy's default rule)."""
    if not samples:
        raise ValueError("percentile: no samples")
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """The order statistics that go into the results document, in seconds."""
    return {
        "median": percentile(samples, 0.5),
        "p20": percentile(samples, 0.2),
        "p80": percentile(samples, 0.8),
        "min": min(samples),
        "rounds": len(samples),
    }


def rounds(names: Sequence[str]) -> Iterator[list[str]]:
    """Endless running orders, drawn with a fixed seed: no contender has a place or a predecessor of its own.

    What a contender finds in the caches is what the one before it left there.
    """
    draw = random.Random(0)
    while True:
        yield draw.sample(names, len(names))


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    clock: Clock,
    *,
    seconds: float,
    repeats: int = 1,
    min_rounds: int = 5,
    max_rounds: int = 200,
    on_round: Callable[[float], None] = lambda fraction: None,
) -> dict[str, list[float]]:
    """Times all calls in turn until ``seconds`` are spent, and returns every sample of every contender.

    A machine that slows down for a while slows down all contenders of those rounds, so their medians stay comparable.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    if not calls:
        return samples
    began = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn, order in enumerate(rounds(list(calls))):
            calls[order[-1]]()  # untimed, so that the first finds the machine as the others do: busy with a contender
            for name in order:
                samples[name].append(clock(calls[name], repeats))
            spent = time.perf_counter() - began
            on_round(min(1.0, max(spent / max(seconds, 1e-9), (turn + 1) / max_rounds)))
            if turn + 1 >= max_rounds or (turn + 1 >= min_rounds and spent >= seconds):
                return samples
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    raise AssertionError("rounds() is endless")


def cpu_clock(call: Callable[[], Any], repeats: int) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / repeats


class CudaClock:
    """Seconds of one call between two CUDA events.

    The device is kept waiting ahead of the first event for as long as the host took to launch the call the last time,
    and half of that more, so that the host is done before the device starts; otherwise the events would time the host.
    That is what they do of a call that waits for the device itself, or takes longer than ``LEAD`` to launch. With
    ``cold`` a buffer larger than the L2 cache is written first, so that the call finds its inputs in device memory, as
    it does in a training step.
    """

    LEAD = 5e-3  # seconds

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        level2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(max(1 << 28, 4 * level2) if cold else 0, dtype=torch.uint8, device=device)
        self.host: weakref.WeakKeyDictionary[Callable[[], Any], float] = weakref.WeakKeyDictionary()  # of a launch
        self.cycles = 10_000_000
        self.rate = self.cycles / self(lambda: torch.cuda._sleep(self.cycles), 1)

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        if call in self.host:
            torch.cuda._sleep(int(min(1.5 * self.host[call], self.LEAD) * self.rate))
        start.record()
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        self.host[call] = time.perf_counter() - began
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats


def clock_for(device: torch.device, *, cold: bool) -> Clock:
    """The clock for a device."""
    return CudaClock(device, cold=cold) if device.type == "cuda" else cpu_clock
