"""Writes the README's benchmark tables from recorded runs.

    python -m perfvl.benchmarks.tables README.md benchmarks/results/*.json

replaces what stands between ``<!-- benchmarks:begin -->`` and ``<!-- benchmarks:end -->``. Every workload of a run gets
its line, whether perfvl wins it or not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import text
from .results import Record, best_peer, eager_row, first_perfvl_row, load, median, speedup, times_faster

BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"
HEADER = ("workload", "perfvl", "eager", "vs eager", "vs best rival", "memory: perfvl / eager", "of roofline")


def markdown(results: Record) -> str:
    """The table of one recorded run."""
    device_type = results["machine"]["device_type"]
    lines = [
        f"**{text.machine_line(results['machine'])}**; {text.ceilings_line(results['ceilings'])}.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
    ]
    lines += [f"| {' | '.join(_cells(workload, device_type))} |" for workload in results["workloads"]]
    return "\n".join(lines)


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
    options = parser.parse_args(argv)
    content = "\n\n".join(markdown(load(path)) for path in sorted(options.results))
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
