"""Runs one workload: checks every contender against float64, times them interleaved, measures their memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .accuracy import errors, matches
from .machine import Interference
from .memory import MemoryProbe, cuda_memory
from .timing import Clock, interleave, summary
from .workload import Contender, Step, Tensors, Unavailable, Workload

Report = Callable[[str, float], None]
"""Told what is being done and which fraction of the workload is done."""


def run_workload(
    workload: Workload,
    device: torch.device,
    clock: Clock,
    *,
    seconds: float = 6.0,
    seed: int = 0,
    probe: MemoryProbe | None = None,
    measure_memory: bool = True,
    leave_out: Callable[[Contender], bool] = lambda contender: False,
    report: Report = lambda what, fraction: None,
) -> dict[str, Any]:
    """The record of one workload (see ``results.py``), with one row per contender in the order they were declared.

    A contender that cannot be built or fails is a row with its reason, never a missing row.
    """
    try:
        inputs = workload.inputs(device, seed)
    except Unavailable as reason:
        return _record(
            workload, [_row(workload, name, device, "unavailable", str(reason)) for name in workload.contenders]
        )
    report("float64 truth", 0.0)
    truth = workload.expected(workload.truth(inputs))
    chosen = {name: contender for name, contender in workload.contenders.items() if not leave_out(contender)}
    if any(contender.compiles for contender in chosen.values()):
        torch.compiler.reset()  # what was compiled before counts against dynamo's limit of versions of a function
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Step] = {}
    call: Step | None = None
    for done, name in enumerate(chosen):
        report(f"checking {name}", 0.3 * done / len(chosen))
        rows[name], call = _check(workload, name, device, inputs, truth)
        if call is not None:
            calls[name] = call
    interference = Interference()
    samples = interleave(
        calls,
        clock,
        seconds=seconds,
        repeats=workload.repeats,
        on_round=lambda fraction: report("timing", 0.3 + 0.4 * fraction),
    )
    others = interference.fraction() if device.type == "cpu" else None
    for name, values in samples.items():
        rows[name]["seconds"] = {**summary(values), "interference": others}
    call = None  # frees what contenders hold before memory is measured elsewhere on this machine
    calls.clear()
    for done, name in enumerate(samples):
        if measure_memory and workload.memory and (device.type == "cuda" or probe is not None):
            report(f"memory of {name}", 0.7 + 0.3 * done / len(samples))
            rows[name]["memory"] = _memory(workload, name, device, seed, probe)
    return _record(workload, list(rows.values()))


def _record(workload: Workload, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "op": workload.op,
        "name": workload.name,
        "title": workload.title,
        "params": dict(workload.params),
        "backward": workload.backward,
        "bytes": workload.bytes,
        "flops": workload.flops,
        "rows": rows,
    }


def _row(
    workload: Workload, name: str, device: torch.device, status: str = "ok", reason: str | None = None
) -> dict[str, Any]:
    contender = workload.contenders[name]
    return {
        "contender": name,
        "role": contender.role,
        "precision": workload.precision(contender, device),
        "status": status,
        "reason": reason,
        "seconds": None,
        "memory": None,
        "error": None,
        "match": None,
    }


def _check(
    workload: Workload, name: str, device: torch.device, inputs: Tensors, truth: Tensors
) -> tuple[dict[str, Any], Step | None]:
    contender, row = workload.contenders[name], _row(workload, name, device)
    try:
        call = workload.call(contender.build(inputs), inputs)
        found = workload.results(call, inputs)
        call()  # a second call, so that nothing lazy is left for the clock
    except Unavailable as reason:
        return _row(workload, name, device, "unavailable", str(reason)), None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return _row(workload, name, device, "failed", f"{type(error).__name__}: {lines[0]}"), None
    if contender.role != "bound":
        report = errors(found, truth)
        row["match"] = matches(report, workload.tolerance[row["precision"]])
        row["error"] = {
            name: {kind: value if math.isfinite(value) else None for kind, value in error.items()}
            for name, error in report.items()
        }
    return row, call


def _memory(
    workload: Workload, contender: str, device: torch.device, seed: int, probe: MemoryProbe | None
) -> dict[str, Any]:
    if device.type == "cuda":
        return dict(cuda_memory(workload, workload.contenders[contender], device, seed))
    assert probe is not None
    return probe.contender(workload, contender, seed)
