"""Numbers and sentences shared by the terminal, the HTML report and the README's tables."""

from __future__ import annotations

from typing import Any

from .memory import RESOLUTION
from .results import (
    BUSY,
    NOISY,
    Record,
    Row,
    best_peer,
    eager_row,
    first_perfvl_row,
    median,
    noisy,
    perfvl_against,
    perfvl_at,
    speedup,
    times_faster,
    worst_error,
)

EMPTY = "–"
HEADER = (
    "contender",
    "products",
    "median",
    "p20 – p80",
    "vs eager",
    "perfvl is",
    "of roofline",
    "memory",
    "worst error",
    "match",
)


def seconds(value: float | None) -> str:
    """A time with three significant digits and its unit."""
    if value is None:
        return EMPTY
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1.0 or unit == "µs":
            return f"{_three_digits(value * factor)} {unit}"
    raise AssertionError


def size(value: float | None) -> str:
    """Bytes in decimal units, as the rest of the project counts them."""
    if value is None:
        return EMPTY
    if value >= 1e9:
        return f"{_three_digits(value / 1e9)} GB"
    return f"{_three_digits(value / 1e6)} MB"


def ratio(value: float | None, *rows: Row | None) -> str:
    """A speed-up, as about so much where one of the rows it was made from is noisy."""
    if value is None:
        return EMPTY
    return f"{'~' if noisy(*rows) else ''}{value:.{2 if value < 10 else 1}f}x"


def against(value: float | None, *rows: Row | None) -> str:
    """perfvl against a peer, in words: 5.8x faster, 1.3x slower."""
    if value is None:
        return EMPTY
    if 0.98 <= value <= 1.02:
        return "as fast"
    return f"{ratio(value, *rows)} faster" if value > 1.0 else f"{ratio(1.0 / value, *rows)} slower"


def percentage(fraction: float | None) -> str:
    """A fraction of the roofline."""
    return EMPTY if fraction is None else f"{100 * fraction:.0f} %"


def memory(row: Row | None, *, device_type: str) -> str:
    """Peak extra memory; a reading below the method's resolution is not given as a number."""
    peak = ((row and row["memory"]) or {}).get("peak_bytes")
    if peak is not None and device_type == "cpu" and peak < RESOLUTION:
        return "< 1 MB"
    return size(peak)


def cells(workload: Record, row: Row, *, device_type: str) -> tuple[str, ...]:
    """One table row, in the order of ``HEADER``."""
    if row["status"] != "ok":
        return (row["contender"], row["precision"], row["status"], *[EMPTY] * 6, row["reason"])
    spread = f"{seconds(row['seconds']['p20'])} – {seconds(row['seconds']['p80'])}"
    worst = worst_error(row)
    error = EMPTY if worst is None else "not finite" if worst[1] is None else f"{worst[1]:.0e} {worst[0]}"
    match = {True: "yes", False: "NO: invalid", None: "bound"}[row["match"]]
    return (
        row["contender"],
        row["precision"],
        seconds(median(row)),
        spread,
        ratio(speedup(workload, row), row, eager_row(workload)),
        against(perfvl_against(workload, row), row, perfvl_at(workload, row["precision"])),
        percentage(row["roofline_fraction"]),
        memory(row, device_type=device_type),
        error,
        match,
    )


def verdict(workload: Record) -> str:
    """One sentence per workload: perfvl against eager and against its best rival, wins and losses alike."""
    ours = first_perfvl_row(workload)
    if ours is None:
        return "perfvl was not run."
    if ours["status"] != "ok":
        return f"perfvl {ours['status']}: {ours['reason']}."
    if not ours["match"]:
        return "perfvl's answer is wrong here: its time does not count."
    parts = [f"perfvl {seconds(median(ours))}"]
    eager, rival = eager_row(workload), best_peer(workload, ours)
    if speedup(workload, ours) is not None:
        parts.append(f"{_than(against(speedup(workload, ours), ours, eager))} eager")
    if rival is not None and rival["role"] != "eager":
        word = _than(against(times_faster(rival, ours), ours, rival))
        parts.append(f"{word} its best rival ({rival['contender']})")
    return ", ".join(parts) + "." + noise(workload)


def noise(workload: Record) -> str:
    """A warning that names the contenders whose timings spread too far to be trusted; empty where there are none."""
    others = max((row["seconds"]["interference"] or 0.0 for row in workload["rows"] if row["seconds"]), default=0.0)
    if others > BUSY:
        return f" NOISY: other processes took {100 * others:.0f} % of the cores."
    spread = [row["contender"] for row in workload["rows"] if noisy(row)]
    return f" NOISY (p80 above {NOISY} x p20): {'; '.join(spread)}." if spread else ""


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    parts = [machine["device"]]
    if machine["device_type"] == "cpu":
        parts.append(f"{machine['cores']} cores, {machine['threads']} threads, {machine['cpu_capability']}")
    parts.append(f"torch {machine['torch']}")
    if machine["device_type"] == "cuda":
        parts.append(f"triton {machine['triton']}")
    parts.append(f"perfvl {machine['perfvl']} ({machine['commit'] or 'no commit'})")
    return ", ".join(parts)


def ceilings_line(ceilings: dict[str, float]) -> str:
    """The ceilings in one line."""
    products = [
        f"{ceilings[name] / 1e12:.2f} TFLOP/s {precision}"
        for precision in ("float32", "tf32", "bfloat16")
        if (name := f"{precision}_flops_per_second") in ceilings
    ]
    return f"copy {ceilings['bytes_per_second'] / 1e9:,.0f} GB/s, matrix products {', '.join(products)}"


def _than(words: str) -> str:
    return f"{words} {'as' if words == 'as fast' else 'than'}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
