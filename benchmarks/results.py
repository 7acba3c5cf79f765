"""The results document: its schema, and the numbers that tables and charts derive from it.

    {"schema": "perfvl-benchmark", "schema_version": 1, "created", "machine": {...}, "settings": {...},
     "ceilings": {"bytes_per_second", "float32_flops_per_second", "bfloat16_flops_per_second",
                  on a GPU "tf32_flops_per_second"},
     "memory_check": {"allocated_bytes", "measured_bytes": {...}},
     "workloads": [{"op", "name", "title", "params", "backward", "bytes", "flops", "rows": [
         {"contender", "role": perfvl|eager|peer|bound, "precision", "status": ok|unavailable|failed, "reason",
          "seconds": {"median", "p20", "p80", "min", "rounds", "interference"}, "roofline_fraction",
          "memory": {"peak_bytes", "torch_peak_bytes"} or {"reason"},
          "error": {name: {"max_abs", "relative"}}, "match"}]}]}

Times are in seconds; ``interference`` is the part of the cores that others took meanwhile. ``match`` is null for
bounds, and false where any tensor is outside the tolerance: such a row has no speed-up. What was not measured or is not
finite is null.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .ceilings import roofline_seconds

SCHEMA = "perfvl-benchmark"
SCHEMA_VERSION = 1
NOISY = 1.5
"""p80 over p20 above which a timing is called noisy."""
BUSY = 0.1
"""Part of the cores that other processes may take while a workload is timed."""

Record = dict[str, Any]
Row = Mapping[str, Any]


def document(
    workloads: Sequence[Record],
    *,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    ceilings: Mapping[str, float],
    memory_check: Mapping[str, Any] | None,
) -> Record:
    """A results document from the records of the runner; fills in the fraction of the roofline every row reaches."""
    for workload in workloads:
        for row in workload["rows"]:
            least = roofline_seconds(workload["bytes"], workload["flops"], row["precision"], dict(ceilings))
            timed = row["seconds"] is not None and least is not None
            row["roofline_fraction"] = least / row["seconds"]["median"] if timed else None
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "settings": dict(settings),
        "ceilings": dict(ceilings),
        "memory_check": memory_check,
        "workloads": list(workloads),
    }


def save(results: Record, path: str | Path) -> None:
    """Writes the document; NaN and infinity are refused, since JSON has neither."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def load(path: str | Path) -> Record:
    """Reads a document, and refuses what is not one or has another schema version."""
    results = json.loads(Path(path).read_text())
    found = (results.get("schema"), results.get("schema_version")) if isinstance(results, dict) else None
    if found != (SCHEMA, SCHEMA_VERSION):
        raise ValueError(f"{path}: expected schema {SCHEMA} version {SCHEMA_VERSION}, got {found}")
    return results


def median(row: Row | None) -> float | None:
    """Median seconds of a row, None where there is no such row or it was not timed."""
    return row["seconds"]["median"] if row and row["seconds"] else None


def times_faster(slow: Row | None, fast: Row | None) -> float | None:
    """How many times the time of ``fast`` the other row takes; None where either was not timed."""
    numerator, denominator = median(slow), median(fast)
    return None if numerator is None or denominator is None else numerator / denominator


def noisy(*rows: Row | None) -> bool:
    """Whether any of the rows spreads too far, or ran beside too busy others, for a ratio with it to mean much."""
    return any(
        row["seconds"]["p80"] > NOISY * row["seconds"]["p20"] or (row["seconds"]["interference"] or 0.0) > BUSY
        for row in rows
        if row and row["seconds"]
    )


def first_perfvl_row(workload: Record) -> Row | None:
    """The row that speaks for perfvl in summaries."""
    return next((row for row in workload["rows"] if row["role"] == "perfvl"), None)


def sound(workload: Record) -> bool:
    """Whether perfvl ran and was right. Rows of perfvl beside the first may need an extra that is not there."""
    first = first_perfvl_row(workload)
    if first is None or first["status"] != "ok":
        return False
    ours = (row for row in workload["rows"] if row["role"] == "perfvl" and row["status"] != "unavailable")
    return all(row["status"] == "ok" and bool(row["match"]) for row in ours)


def eager_row(workload: Record) -> Row | None:
    """The row every speed-up is relative to."""
    return next((row for row in workload["rows"] if row["role"] == "eager"), None)


def speedup(workload: Record, row: Row) -> float | None:
    """How many times faster than eager a row is; None where either was not timed or the row's answer is wrong."""
    return times_faster(eager_row(workload), row) if row["match"] and row["role"] != "bound" else None


def perfvl_at(workload: Record, precision: str) -> Row | None:
    """perfvl's timed row at a precision, or its first where it has none at that precision."""
    rows = [ours for ours in workload["rows"] if ours["role"] == "perfvl" and ours["seconds"]]
    return next((ours for ours in rows if ours["precision"] == precision), rows[0] if rows else None)


def perfvl_against(workload: Record, row: Row) -> float | None:
    """How many times faster perfvl is than a peer (below 1: slower), at the peer's precision where perfvl has such a
    row.

    None where perfvl's answer is wrong (its time is then worth nothing), or the peer's is, or either was not timed.
    """
    ours = perfvl_at(workload, row["precision"])
    if ours is None or row["role"] == "perfvl" or not ours["match"] or row["match"] is False:
        return None
    return times_faster(row, ours)


def best_peer(workload: Record, ours: Row) -> Row | None:
    """The fastest contender with a right answer at perfvl's precision or a better one, eager included."""
    precisions = ("float32", "tf32", "bfloat16")
    allowed = precisions[: precisions.index(ours["precision"]) + 1]
    peers = [
        row
        for row in workload["rows"]
        if row["role"] in ("eager", "peer") and row["match"] and row["precision"] in allowed and row["seconds"]
    ]
    return min(peers, key=lambda row: row["seconds"]["median"], default=None)


def worst_error(row: Row) -> tuple[str, float | None] | None:
    """The tensor with the largest relative error, and that error (None where it is not finite)."""
    if not row["error"]:
        return None

    def size(item: tuple[str, Mapping[str, float | None]]) -> float:
        relative = item[1]["relative"]
        return math.inf if relative is None else relative

    name, error = max(row["error"].items(), key=size)
    return name, error["relative"]
