"""The Triton kernels of `maxout` and `apl` without a GPU: right (interpreted), and fit for every target (compiled)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Triton")

from perfvl.kernels import _tiles, activation
from triton_support.compile_only import LIMITS, CompiledLaunch, compiled_launches
from triton_support.interpreter import run_interpreted

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def launches(monkeypatch, tmp_path_factory):
    """Compiles what forward and backward would launch on a GPU of the given compute capability."""
    cache = tmp_path_factory.getbasetemp() / "triton_cache"

    def launches(capability: int, call) -> list[CompiledLaunch]:
        gpu = _tiles.Gpu(capability, *LIMITS[capability])
        monkeypatch.setattr(_tiles, "gpu_limits", lambda device: gpu)
        return compiled_launches(capability, call, cache)

    return launches


def image(*shape: int, dtype: torch.dtype, last: bool) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )


def test_interpreted_kernels_match_float64():
    passed = run_interpreted(Path(__file__).parent / "triton_support" / "interpreted_activation.py")
    assert passed > 280


def check(launch: CompiledLaunch) -> None:
    assert launch.stack == launch.local == launch.spills_in_loops == 0, launch
    assert launch.registers <= 128, launch  # four programs share a multiprocessor, or more


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize(("dtype", "last"), [(F32, False), (BF16, True)])
def test_maxout_fits_every_target(launches, capability, dtype, last):
    size = (32, 96, 30, 30)
    x, grad = image(32, 192, 30, 30, dtype=dtype, last=last), image(*size, dtype=dtype, last=last)
    winner = image(*size, dtype=torch.uint8, last=last)

    def call():
        activation.maxout(x, 2, True)
        activation.maxout_backward(grad, winner, 2)

    forward, backward = launches(capability, call)
    assert (forward.kernel, backward.kernel) == ("_maxout_kernel", "_maxout_backward_kernel")
    for launch in (forward, backward):
        check(launch)
        assert launch.count("LDG.E.128") + launch.count("LDG.E.64") > 0, launch.instructions


KINDS = [(s, *kind) for s in (2, 5) for kind in ((F32, False, False), (BF16, True, False), (F32, True, True))]
# Every kind on sm_90 and every target with some: all of them would take most of a minute.
PAIRS = [(c, *kind) for i, kind in enumerate(KINDS) for j, c in enumerate(LIMITS) if c == 90 or (i + j) % 3 == 0]


@pytest.mark.parametrize(("capability", "segments", "dtype", "last", "positions"), PAIRS)
def test_units_fit_every_target(launches, capability, segments, dtype, last, positions):
    x, grad = (image(32, 96, 30, 30, dtype=dtype, last=last) for _ in range(2))
    slope, hinge = (image(segments, 96, *((30, 30) if positions else (1, 1)), dtype=F32, last=last) for _ in range(2))

    def call():
        activation.apl(x, slope, hinge)
        activation.apl_backward(grad, x, slope, hinge)

    forward, backward = launches(capability, call)
    assert (forward.kernel, backward.kernel) == ("_apl_kernel", "_apl_backward_kernel")
    for launch in (forward, backward):
        check(launch)
        assert not [name for name in launch.instructions if name.startswith(("ATOM", "RED"))], launch.instructions
