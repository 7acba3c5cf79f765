"""What the tests of benchmarks share: rows of short runs, and what must be true of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from perfvl.benchmarks import timing
from perfvl.benchmarks.runner import run_workload
from perfvl.benchmarks.workload import Contender, Workload

CPU = torch.device("cpu")


def rows_of(workload: Workload) -> dict[str, Any]:
    """The rows of a short run without memory and without what has to be compiled."""
    record = run_workload(
        workload,
        CPU,
        timing.cpu_clock,
        seconds=0.01,
        measure_memory=False,
        leave_out=lambda contender: contender.compiles,
    )
    return {row["contender"]: row for row in record["rows"]}


def row_of(workload: Workload, contender: Contender) -> dict[str, Any]:
    """The row of one more contender."""
    return rows_of(dataclasses.replace(workload, contenders={"one more": contender}))["one more"]


def check_rows(rows: dict[str, Any], may_be_missing: set[str]) -> None:
    """All run and match, but for the bounds, which are not checked, and for peers that say why they do not run."""
    missing = {name: row["reason"] for name, row in rows.items() if row["status"] != "ok"}
    assert set(missing) <= may_be_missing, missing
    assert all(missing.values())
    assert {name for name, row in rows.items() if row["match"] is False} == set()
    assert {row["role"] for row in rows.values() if row["status"] == "ok" and row["match"] is None} <= {"bound"}
