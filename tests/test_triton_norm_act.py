"""The Triton kernels of `norm_act` without a GPU: right (interpreted), and fit for every target (compiled)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Triton")

from perfvl.kernels import _tiles, norm_act
from triton_support.compile_only import LIMITS, CompiledLaunch, compiled_launches
from triton_support.interpreter import run_interpreted

F32, BF16 = torch.float32, torch.bfloat16
RELU, ELU, TANH = 1, 3, 4


@pytest.fixture
def launches(monkeypatch, tmp_path_factory):
    """Compiles what forward and backward would launch on a GPU of the given compute capability."""
    cache = tmp_path_factory.getbasetemp() / "triton_cache"

    def launches(capability: int, call) -> list[CompiledLaunch]:
        gpu = _tiles.Gpu(capability, *LIMITS[capability])
        monkeypatch.setattr(_tiles, "gpu_limits", lambda device: gpu)
        return compiled_launches(capability, call, cache)

    return launches


def test_interpreted_kernels_match_float64():
    passed = run_interpreted(Path(__file__).parent / "triton_support" / "interpreted_norm_act.py")
    assert passed > 110


# Every kind on sm_90, the first on every target: all of them would take most of a minute.
KINDS = [(F32, False, RELU, False), (BF16, True, RELU, False), (BF16, False, ELU, True), (F32, True, TANH, True)]
PAIRS = [(c, *kind) for i, kind in enumerate(KINDS) for c in LIMITS if c == 90 or i == 0]


@pytest.mark.parametrize(("capability", "dtype", "last", "activation", "after"), PAIRS)
def test_norms_fit_every_target(launches, capability, dtype, last, activation, after):
    memory = torch.channels_last if last else torch.contiguous_format
    x, grad = (torch.zeros(32, 96, 30, 30, dtype=dtype).contiguous(memory_format=memory) for _ in range(2))
    weight, bias, mean, variance = (torch.ones(96) for _ in range(4))
    shared = (1e-5, activation, 0.5, after)

    def call():
        norm_act.norm_act(x, weight, bias, mean, variance, True, 0.1, *shared)
        norm_act.norm_act_backward(grad, x, weight, bias, mean, variance, True, *shared, True, True)

    found = launches(capability, call)
    names = ["_statistics_kernel", "_merge_kernel", "_move_kernel", "_apply_kernel", "_sums_kernel", "_grad_kernel"]
    assert list(dict.fromkeys(launch.kernel for launch in found)) == names
    for launch in found:
        assert launch.stack == launch.local == launch.spills_in_loops == 0, launch
        assert launch.registers <= 128, launch  # four programs share a multiprocessor, or more
        assert not [name for name in launch.instructions if name.startswith(("ATOM", "RED."))], launch.instructions
    if last:  # planes of 900 elements begin anywhere
        passes = [launch for launch in found if launch.kernel not in ("_merge_kernel", "_move_kernel")]
        assert all(launch.count("LDG.E.128") + launch.count("LDG.E.64") > 0 for launch in passes), passes
