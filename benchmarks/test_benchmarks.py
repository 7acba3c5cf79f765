"""The workloads under pytest-benchmark: one benchmark per workload and contender, grouped by workload.

``python -m perfvl bench`` interleaves contenders and measures memory as well; this form is for pytest-benchmark's own
comparing, saving and plotting (``pytest benchmarks/ --benchmark-autosave``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from perfvl.benchmarks import registry
from perfvl.benchmarks.accuracy import errors, matches
from perfvl.benchmarks.workload import Tensors, Unavailable, Workload

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per workload and contender, workload by workload so that inputs are built once."""
    chosen = registry.workloads(quick=not metafunc.config.getoption("--all-workloads", default=False))
    cases = [(workload, contender) for workload in chosen for contender in workload.contenders]
    metafunc.parametrize(("workload", "contender"), cases, ids=[f"{w.name}-{c}" for w, c in cases])


@pytest.fixture(scope="module")
def problems() -> dict[str, Any]:
    """Inputs and truth of the last workload asked for."""
    return {}


def _problem(problems: dict[str, Any], workload: Workload) -> tuple[Tensors, Tensors]:
    if workload.name not in problems:
        problems.clear()
        inputs = workload.inputs(DEVICE, seed=0)
        problems[workload.name] = inputs, workload.truth(inputs)
    return problems[workload.name]


def test_contender(benchmark: Any, problems: dict[str, Any], workload: Workload, contender: str) -> None:
    """Times one contender once its answer has been found right."""
    chosen = workload.contenders[contender]
    try:
        inputs, truth = _problem(problems, workload)
        call = workload.call(chosen.build(inputs), inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))
    found = workload.results(call, inputs)
    if chosen.role != "bound":
        report = errors(found, workload.expected(truth))
        assert matches(report, workload.tolerance[workload.precision(chosen, DEVICE)]), report
    benchmark.group = workload.name

    def timed() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, iterations=workload.repeats, warmup_rounds=1)
