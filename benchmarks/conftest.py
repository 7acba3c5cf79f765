"""``pytest benchmarks/``: which workloads run under pytest-benchmark."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """By default the quick subset runs."""
    parser.addoption("--all-workloads", action="store_true", help="run every workload, not only the quick ones")
