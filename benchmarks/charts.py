"""Charts of the HTML report: the roofline as inline SVG (matplotlib), bars as plain HTML that reflows on a phone."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

from . import text
from .results import Record, Row, median

PRECISION_COLOURS = {"float32": "#3b5ba5", "tf32": "#3b9ba5", "bfloat16": "#8a3ba5"}


def bars(workload: Record, value: Callable[[Row], float | None], label: Callable[[Row], str]) -> str:
    """Horizontal bars, one per contender that has a value, in table order; a wrong answer is hatched and says so."""
    rows = [(row, amount) for row in workload["rows"] if (amount := value(row)) is not None]
    if not rows:
        return "<p class='none'>Not measured.</p>"
    longest = max(amount for _, amount in rows) or 1.0
    lines = []
    for row, amount in rows:
        wrong = row["match"] is False
        note = " <b>wrong answer</b>" if wrong else ""
        lines.append(
            f"<div class='bar {row['role']}{' wrong' if wrong else ''}'>"
            f"<span class='who'>{html.escape(row['contender'])}</span>"
            f"<span class='track'><span class='fill' style='width:{100 * amount / longest:.2f}%'></span></span>"
            f"<span class='amount'>{html.escape(label(row))}{note}</span></div>"
        )
    return "\n".join(lines)


def time_bars(workload: Record) -> str:
    """Median time of every contender."""
    return bars(workload, median, lambda row: text.seconds(median(row)))


def memory_bars(workload: Record, device_type: str) -> str:
    """Peak extra memory of every contender."""
    return bars(
        workload,
        lambda row: (row["memory"] or {}).get("peak_bytes"),
        lambda row: text.memory(row, device_type=device_type),
    )


def roofline_points(results: Record) -> list[tuple[int, Record]]:
    """The workloads that have bytes and FLOPs, numbered as in the chart."""
    return list(enumerate((w for w in results["workloads"] if w["bytes"] and w["flops"]), start=1))


def require_matplotlib() -> Any:
    """matplotlib's modules, or a RuntimeError that says how to get them."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise RuntimeError("the HTML report needs matplotlib: pip install 'perfvl[bench]'") from error
    return matplotlib


def roofline(results: Record, *, width: float, height: float, salt: str) -> str:
    """Achieved FLOP/s over arithmetic intensity (least FLOP over least bytes), under this machine's ceilings."""
    matplotlib = require_matplotlib()
    points = roofline_points(results)
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 10}
    ):
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        _draw_ceilings(axes, results["ceilings"], points)
        for number, workload in points:
            intensity = workload["flops"] / workload["bytes"]
            for row in workload["rows"]:
                if row["role"] in ("perfvl", "eager") and row["match"] and median(row):
                    _draw_point(axes, number, row, intensity, workload["flops"] / median(row))
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
        for axis, unit in ((axes.xaxis, 1.0), (axes.yaxis, 1e12)):
            low, high = axis.get_view_interval()
            between = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)  # few powers of ten may be no tick at all
            axis.set_major_locator(matplotlib.ticker.LogLocator(subs=between))
            axis.set_major_formatter(lambda value, _, unit=unit: f"{value / unit:g}")
            axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.grid(True, which="major", color="#e6e9ef", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False, fontsize=9)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"^.*?(?=<svg)", "", target.getvalue(), flags=re.DOTALL)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"',
        r"<svg \1",
        re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1),
        count=1,
    )


def _draw_ceilings(axes: Any, ceilings: dict[str, float], points: list[tuple[int, Record]]) -> None:
    intensities = [w["flops"] / w["bytes"] for _, w in points] or [1.0]
    left, right = min(intensities) / 4, max(intensities) * 4
    bandwidth = ceilings["bytes_per_second"]
    for precision, colour in PRECISION_COLOURS.items():
        peak = ceilings.get(f"{precision}_flops_per_second")
        if peak is None:
            continue
        corner = min(max(peak / bandwidth, left), right)
        axes.plot([left, corner, right], [min(left * bandwidth, peak), min(corner * bandwidth, peak), peak],
                  color=colour, linewidth=1.4, label=f"ceiling, {precision}")  # fmt: skip


def _draw_point(axes: Any, number: int, row: Row, intensity: float, rate: float) -> None:
    ours = row["role"] == "perfvl"
    colour = PRECISION_COLOURS[row["precision"]]
    _, labels = axes.get_legend_handles_labels()
    label = f"{'perfvl' if ours else 'eager'}, {row['precision']}"
    axes.plot(intensity, rate, marker="o", markersize=7, linestyle="none", markeredgecolor=colour,
              markerfacecolor=colour if ours else "white", label=None if label in labels else label)  # fmt: skip
    axes.annotate(str(number), (intensity, rate), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8,
                  color="#333b49")  # fmt: skip
