"""Progress and tables in the terminal: with rich where it is installed, as plain lines where it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from . import text
from .results import Record

try:
    import rich.box
    import rich.console
    import rich.progress
    import rich.table
except ImportError:  # the optional extra
    rich = None  # type: ignore[assignment]

Advance = Callable[[str, float], None]


class Progress:
    """A progress bar over workloads on stderr, so that stdout holds the tables alone. Use as a context manager."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._bar: Any = None
        if rich is not None and sys.stderr.isatty():
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(),
            )
            self._bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self.total)
        return self

    def __exit__(self, *unused: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, name: str) -> Advance:
        """A callback for the runner: what is being done in the workload ``name``, and how far it is."""

        def report(what: str, fraction: float) -> None:
            if self._bar is not None:
                self._bar.update(self._task, description=f"{name}: {what}", completed=self.done + fraction)

        return report

    def finish(self, name: str, verdict: str) -> None:
        """Tells that a workload is done, and how it went."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        line = f"[{self.done}/{self.total}] {name}: {verdict}"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


def print_tables(results: Record) -> None:
    """One table per workload, with the machine and its ceilings above."""
    device_type = results["machine"]["device_type"]
    print(text.machine_line(results["machine"]))
    print(f"Measured ceilings: {text.ceilings_line(results['ceilings'])}")
    for workload in results["workloads"]:
        rows = [text.cells(workload, row, device_type=device_type) for row in workload["rows"]]
        print()
        if rich is None:
            _print_plain(workload["title"], rows)
        else:
            _print_rich(workload, rows)
        print(text.verdict(workload))


def _print_rich(workload: Record, rows: list[tuple[str, ...]]) -> None:
    table = rich.table.Table(
        title=workload["title"], title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD
    )
    for index, name in enumerate(text.HEADER):
        table.add_column(name, justify="left" if index in (0, 1, len(text.HEADER) - 1) else "right", no_wrap=index == 0)
    for row, values in zip(workload["rows"], rows, strict=True):
        style = {"perfvl": "bold green", "bound": "dim"}.get(row["role"], "")
        if row["status"] != "ok" or row["match"] is False:
            style = "red"
        table.add_row(*values, style=style)
    # Piped output has no width of its own: wide enough for every column.
    console = rich.console.Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)


def _print_plain(title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [text.HEADER, *rows]) for i in range(len(text.HEADER) - 1)]
    print(title)
    for row in [text.HEADER, *rows]:
        print("  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
