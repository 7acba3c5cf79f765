"""The single-file HTML report: summary, bars, table and errors per workload, roofline, machine. Needs no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import charts, text
from .html_style import STYLE
from .results import Record, Row, best_peer, eager_row, first_perfvl_row, median, noisy, speedup, times_faster

METHOD = """All contenders of a workload run in one process, one after another in random order, on the same tensors
and with gradients cleared the same way; medians with 20th and 80th percentiles. On the CPU glibc's malloc keeps freed
memory meanwhile, as jemalloc and tcmalloc do, so that no contender pays for pages that another one gave back. Memory
on the CPU is the peak of the resident set of a fresh process beyond the inputs; on CUDA it is the peak of torch's
allocator."""


def write_html(results: Record, path: str | Path) -> None:
    """Writes the report of one results document. Raises RuntimeError where matplotlib is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(render(results), encoding="utf-8")


def render(results: Record) -> str:
    """The report as one HTML document."""
    device_type = results["machine"]["device_type"]
    sections = [
        "<h1>perfvl benchmarks</h1>",
        f"<p class='soft'>{_text(text.machine_line(results['machine']))}<br>{_text(results['created'])}. "
        f"Measured ceilings: {_text(text.ceilings_line(results['ceilings']))}.</p>",
        "<h2>Summary</h2>",
        _summary(results, device_type),
        "<h2>Workloads</h2>",
        *[_workload(workload, device_type) for workload in results["workloads"]],
        "<h2>Roofline</h2>",
        _roofline(results),
        "<h2>Error against float64</h2>",
        _errors(results),
        "<h2>Machine and method</h2>",
        _machine(results),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>perfvl benchmarks</title>"
        f"<style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], left: set[int], *, kind: str = "") -> str:
    """``rows`` are (class, cells), cells being HTML already; ``left`` are the columns aligned to the left."""
    side = [" class='left'" if index in left else "" for index in range(len(header))]
    label = [f" data-label='{_text(name)}'" for name in header]
    head = "".join(f"<th{side[i]}>{_text(name)}</th>" for i, name in enumerate(header))
    body = ""
    for name, cells in rows:
        columns = "".join(f"<td{side[i]}{label[i]}>{cell}</td>" for i, cell in enumerate(cells))
        body += f"<tr class='{name}'>{columns}</tr>"
    table = f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _coloured(value: float | None, *rows: Row | None) -> str:
    if value is None:
        return text.EMPTY
    kind = "" if noisy(*rows) else "win" if value > 1.02 else "loss" if value < 0.98 else ""
    return f"<span class='{kind}'>{text.ratio(value, *rows)}</span>"


def _summary(results: Record, device_type: str) -> str:
    """One line per workload: perfvl's time, and how it stands to eager, to its best rival and to the roofline."""
    rows: list[tuple[str, Sequence[str]]] = []
    for workload in results["workloads"]:
        title = _text(workload["title"])
        ours = first_perfvl_row(workload)
        if ours is None or ours["status"] != "ok" or not ours["match"]:
            rows.append(("wrong", [title, _text(text.verdict(workload)), *[text.EMPTY] * 5]))
            continue
        rival = best_peer(workload, ours)
        cells = [
            title,
            text.seconds(median(ours)),
            _coloured(speedup(workload, ours), ours, eager_row(workload)),
            _coloured(times_faster(rival, ours), ours, rival),
            _text(rival["contender"]) if rival else text.EMPTY,
            text.percentage(ours["roofline_fraction"]),
            text.memory(ours, device_type=device_type),
        ]
        rows.append(("", cells))
    header = ("workload", "perfvl", "vs eager", "vs best rival", "best rival", "of roofline", "memory")
    return (
        "<div class='card'><p class='soft'>Above 1x perfvl is faster, below 1x slower, ~ is noisy. The best rival is "
        f"the fastest other contender with a right answer.</p>{_table(header, rows, {0, 4}, kind='wide')}</div>"
    )


def _workload(workload: Record, device_type: str) -> str:
    rows = []
    for row in workload["rows"]:
        state = "missing" if row["status"] != "ok" else "wrong" if row["match"] is False else row["role"]
        rows.append((state, [_text(cell) for cell in text.cells(workload, row, device_type=device_type)]))
    table = _table(text.HEADER, rows, {0, 1, len(text.HEADER) - 1})
    return (
        f"<div class='card'><h3>{_text(workload['title'])}</h3><p>{_text(text.verdict(workload))}</p>"
        f"<div class='pair'><div><h4>Median time (shorter is better)</h4>{charts.time_bars(workload)}</div>"
        f"<div><h4>Peak extra memory of a call</h4>{charts.memory_bars(workload, device_type)}</div></div>"
        f"<details><summary>All numbers</summary>{table}</details></div>"
    )


def _roofline(results: Record) -> str:
    points = charts.roofline_points(results)
    if not points:
        return "<p class='none'>No workload with a known least work was run.</p>"
    wide = charts.roofline(results, width=9.0, height=4.8, salt="desktop")
    tall = charts.roofline(results, width=4.4, height=5.0, salt="tall")
    names = "".join(f"<li>{_text(workload['title'])}</li>" for _, workload in points)
    return (
        "<div class='card'><p class='soft'>Filled: perfvl; hollow: eager. Rates count the least work a call needs, so "
        "that doing more work does not look faster. Inputs that stay in cache may pass the bandwidth ceiling, which is "
        f"that of a large copy.</p><div class='desktop'>{wide}</div><div class='tall'>{tall}</div>"
        f"<ol class='numbers'>{names}</ol></div>"
    )


def _errors(results: Record) -> str:
    rows = []
    for workload in results["workloads"]:
        for row in workload["rows"]:
            for name, error in (row["error"] or {}).items():
                numbers = [text.EMPTY if error[k] is None else f"{error[k]:.1e}" for k in ("relative", "max_abs")]
                verdict = "yes" if row["match"] else "NO"
                cells = (workload["name"], row["contender"], row["precision"], name, *numbers, verdict)
                rows.append((row["role"] if row["match"] else "wrong", [_text(cell) for cell in cells]))
    header = ("workload", "contender", "products", "tensor", "relative", "largest", "match")
    return (
        "<div class='card'><p class='soft'>Relative: norm of the difference over the norm of the truth. Largest: the "
        f"largest absolute difference.</p><details><summary>{len(rows)} tensors compared</summary>"
        f"{_table(header, rows, {0, 1, 2, 3})}</details></div>"
    )


def _machine(results: Record) -> str:
    facts = {**results["machine"], **{f"run: {name}": value for name, value in results["settings"].items()}}
    check = results["memory_check"]
    if check:
        measured = ", ".join(f"{kind} {text.size(value)}" for kind, value in check["measured_bytes"].items())
        facts["memory check"] = f"{text.size(check['allocated_bytes'])} allocated; measured: {measured}"
    listed = "".join(
        f"<dt>{_text(name.replace('_', ' '))}</dt><dd>{_text(value)}</dd>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<div class='card'><p class='soft'>{METHOD}</p><dl>{listed}</dl></div>"
