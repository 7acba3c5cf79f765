"""Poisoned memory for every test: what a kernel forgets to write shows up as NaN, in Python and in C++."""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms ask for
torch.backends.cudnn.allow_tf32 = False  # else tests of convolutions on CUDA would compare two roundings to 11 bits


@pytest.fixture(autouse=True)
def _poisoned_memory():
    # Fills every torch allocation, those inside the compiled ops included, with NaN (integers: the largest value).
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels_for_small_problems(monkeypatch):
    """Where oneDNN is faster than the kernels of a convolution it runs: of every small problem, tests would test it."""
    from perfvl.ops import conditioning, separable_conv, upsample_conv

    monkeypatch.setattr(conditioning, "_is_faster", lambda *_: True)
    monkeypatch.setattr(separable_conv, "_is_faster", lambda *_: True)
    monkeypatch.setattr(upsample_conv, "_cpu_path", lambda *_: "kernel")
