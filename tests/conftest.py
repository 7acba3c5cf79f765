"""Poisoned memory for every test: what a kernel forgets to write shows up as NaN, in Python and in C++."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory():
    # Fills every torch allocation, those inside the compiled ops included, with NaN (integers: the largest value).
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
