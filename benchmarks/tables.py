"""Writes benchmark tables from recorded runs into documents.

    python -m perfvl.benchmarks.tables docs/measured.md benchmarks/results/*.json
    python -m perfvl.benchmarks.tables --digest README.md benchmarks/results/*.json

replaces what stands between ``<!-- benchmarks:begin -->`` and ``<!-- benchmarks:end -->``. Every workload of a run gets
its line, whether perfvl wins it or not; in a digest every op of a run has one, with how many of its workloads are lost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from . import text
from .results import Record, best_peer, eager_row, first_perfvl_row, load, median, speedup, times_faster

BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"
DIGEST = (
    "op",
    "workloads",
    "vs eager: median (worst to best)",
    "vs best rival: median (worst to best)",
    "slower than it",
    "wrong or not timed",
)
LOST = 0.97  # of the rival's speed: less is no noise
HEADER = ("workload", "perfvl", "eager", "vs eager", "vs best rival", "memory: perfvl / eager", "of roofline")


def markdown(results: Record) -> str:
    """The table of one recorded run."""
    device_type = results["machine"]["device_type"]
    kept = "; malloc keeps freed memory" if results["settings"].get("keeps_freed_memory") else ""
    lines = [
        f"**{text.machine_line(results['machine'])}**; {text.ceilings_line(results['ceilings'])}{kept}.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
    ]
    lines += [f"| {' | '.join(_cells(workload, device_type))} |" for workload in results["workloads"]]
    return "\n".join(lines)


def digest(results: Record) -> str:
    """One line for each op of a recorded run. Workloads whose answer was wrong, or not timed, are counted apart."""
    lines = [
        f"**{text.machine_line(results['machine'])}**",
        "",
        f"| {' | '.join(DIGEST)} |",
        f"|{'---|' * len(DIGEST)}",
    ]
    for op in dict.fromkeys(workload["op"] for workload in results["workloads"]):
        against_eager, against_rival = [], []
        workloads = [workload for workload in results["workloads"] if workload["op"] == op]
        counted = 0
        for workload in workloads:
            ours = first_perfvl_row(workload)
            if ours is None or ours["status"] != "ok" or not ours["match"]:
                continue
            counted += 1
            for ratios, row in ((against_eager, eager_row(workload)), (against_rival, best_peer(workload, ours))):
                ratio = times_faster(row, ours)
                if ratio is not None:
                    ratios.append(ratio)
        lost = sum(ratio < LOST for ratio in against_rival)
        cells = (
            f"`{op}`",
            str(len(workloads)),
            _spread(against_eager),
            _spread(against_rival),
            str(lost or "none"),
            str(len(workloads) - counted or "none"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return text.EMPTY
    return f"**{statistics.median(ratios):.2f}x** ({min(ratios):.2f}x to {max(ratios):.2f}x)"


def replace(document: str, content: str) -> str:
    """``document`` with ``content`` between the markers. Raises ValueError unless each is there once, in order."""
    begin, end = document.find(BEGIN), document.find(END)
    if document.count(BEGIN) != 1 or document.count(END) != 1 or end < begin:
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    return f"{document[: begin + len(BEGIN)]}\n{content}\n{document[end:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites the document from the given runs."""
    parser = argparse.ArgumentParser(
        prog="perfvl.benchmarks.tables", description="Write benchmark tables into a document."
    )
    parser.add_argument("document", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--digest", action="store_true", help="a line for each op instead of each workload")
    options = parser.parse_args(argv)
    table = digest if options.digest else markdown
    content = "\n\n".join(table(load(path)) for path in sorted(options.results))
    options.document.write_text(replace(options.document.read_text(encoding="utf-8"), content), encoding="utf-8")
    return 0


def _cells(workload: Record, device_type: str) -> tuple[str, ...]:
    ours = first_perfvl_row(workload)
    title = workload["title"].replace("|", "\\|")
    if ours is None or ours["status"] != "ok" or not ours["match"]:
        return (title, text.verdict(workload), *[text.EMPTY] * 5)
    eager, rival = eager_row(workload), best_peer(workload, ours)
    against_rival = text.EMPTY
    if rival is not None:
        against_rival = f"{text.ratio(times_faster(rival, ours), ours, rival)} ({rival['contender']})"
    return (
        title,
        text.seconds(median(ours)),
        text.seconds(median(eager)),
        text.ratio(speedup(workload, ours), ours, eager),
        against_rival,
        f"{text.memory(ours, device_type=device_type)} / {text.memory(eager, device_type=device_type)}",
        text.percentage(ours["roofline_fraction"]),
    )


if __name__ == "__main__":
    sys.exit(main())
