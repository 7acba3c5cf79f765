"""The command line of the benchmarks: ``python -m perfvl bench``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

import torch

from . import registry, terminal, text
from .ceilings import measure_ceilings
from .machine import describe, keep_freed_memory
from .memory import MemoryProbe
from .results import Record, document, save, sound
from .runner import run_workload
from .timing import clock_for
from .workload import Workload


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="perfvl bench",
        description="Time perfvl against what you would otherwise run, with memory and error against float64.",
    )
    options.add_argument(
        "--op", action="append", choices=sorted(registry.MODULES), help="only this op (default: all); may be repeated"
    )
    options.add_argument(
        "--workload",
        action="append",
        metavar="TEXT",
        help="only workloads whose name has or matches TEXT; repeatable",
    )
    options.add_argument("--quick", action="store_true", help="a short subset")
    options.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA where available"
    )
    options.add_argument(
        "--seconds", type=float, metavar="S", help="time spent timing each workload (default 8; quick 3)"
    )
    options.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    options.add_argument("--warm", action="store_true", help="CUDA: leave the L2 cache warm between calls")
    options.add_argument("--no-compile", action="store_true", help="leave out the torch.compile contenders")
    options.add_argument("--no-memory", action="store_true", help="do not measure memory")
    options.add_argument("--json", metavar="FILE", help="write the results document")
    options.add_argument("--html", metavar="FILE", help="write a single-file report (needs matplotlib)")
    options.add_argument("--list", action="store_true", help="list the workloads and leave")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 where perfvl failed or gave a wrong answer, or 2 where nothing could be run."""
    options = parser().parse_args(argv)
    ops = options.op or [None]
    chosen = [w for op in ops for w in registry.workloads(op, *options.workload or (), quick=options.quick)]
    if not chosen:
        print("No workload has such a name; see --list.", file=sys.stderr)
        return 2
    if options.list:
        for workload in chosen:
            print(f"{workload.op}  {workload.name}\n    {workload.title}\n    {', '.join(workload.contenders)}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here (torch.cuda.is_available() is false).", file=sys.stderr)
        return 2
    if options.html:
        from .charts import require_matplotlib

        try:
            require_matplotlib()  # say so before minutes are spent
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
    results = run(chosen, options)
    terminal.print_tables(results)
    if options.json:
        save(results, options.json)
    if options.html:
        from .html_report import write_html

        write_html(results, options.html)
    return 0 if all(map(sound, results["workloads"])) else 1


def run(chosen: Sequence[Workload], options: argparse.Namespace) -> Record:
    """Runs workloads one after another and returns the results document."""
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    seconds = options.seconds if options.seconds is not None else 3.0 if options.quick else 8.0
    kept = keep_freed_memory() if device.type == "cpu" else None
    clock = clock_for(device, cold=not options.warm)
    machine = describe(device)
    if device.type == "cpu" and (machine["load_average"] or 0.0) > 0.5 * machine["cores"]:
        print(f"This machine is busy (load {machine['load_average']}): expect noisy timings.", file=sys.stderr)
    ceilings = measure_ceilings(device)
    records = []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(terminal.Progress(len(chosen)))
        probe = stack.enter_context(MemoryProbe()) if device.type == "cpu" and not options.no_memory else None
        memory_check = probe.check() if probe is not None else None
        for workload in chosen:
            record = run_workload(
                workload,
                device,
                clock,
                seconds=seconds,
                seed=options.seed,
                probe=probe,
                measure_memory=not options.no_memory,
                leave_out=lambda contender: options.no_compile and contender.compiles,
                report=progress.advance(workload.name),
            )
            records.append(record)
            # Again after every workload, keeping the best: a ceiling lowered by a busy moment would flatter us.
            again = measure_ceilings(device, seconds=0.15)
            ceilings = {rate: max(ceilings[rate], again[rate]) for rate in ceilings}
            progress.finish(workload.name, text.verdict(record))
    settings = {
        "seconds": seconds,
        "seed": options.seed,
        "quick": options.quick,
        "cache": None if not cuda else "warm" if options.warm else "cold",
        "keeps_freed_memory": kept,
    }
    return document(records, machine=machine, settings=settings, ceilings=ceilings, memory_check=memory_check)
