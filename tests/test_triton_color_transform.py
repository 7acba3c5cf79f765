"""The Triton kernels of `color_transform` without a GPU: right (interpreted), and fit for every target (compiled)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Triton")

from perfvl.kernels import _tiles, color_transform
from triton_support.compile_only import LIMITS, CompiledLaunch, compiled_launches
from triton_support.interpreter import run_interpreted

F32, BF16, BYTES = torch.float32, torch.bfloat16, torch.uint8
FORWARD, SUMS, MERGE, IMAGE = "_forward_kernel", "_sums_kernel", "_merge_kernel", "_image_kernel"


@pytest.fixture
def launches(monkeypatch, tmp_path_factory):
    """Compiles what one call of forward, and one of backward, would launch on a GPU of the given compute capability."""
    cache = tmp_path_factory.getbasetemp() / "triton_cache"

    def launches(
        capability: int, C=3, M=10, CO=3, *, size=(32, 32), N=2, image=F32, dtype=F32, last=False, backward=True
    ) -> list[CompiledLaunch]:
        gpu = _tiles.Gpu(capability, *LIMITS[capability])
        monkeypatch.setattr(_tiles, "gpu_limits", lambda device: gpu)
        memory = torch.channels_last if last else torch.contiguous_format
        x, upstream = (torch.zeros(N, c, *size).contiguous(memory_format=memory) for c in (C, CO))
        made = torch.zeros(M, C, 1, 1), torch.zeros(M), torch.zeros(CO, M, 1, 1), torch.zeros(CO)
        arguments = (x.to(image), *(t.to(dtype) for t in made), torch.zeros(C), 0.04, 0.5, False)

        def call():
            color_transform.color_transform(*arguments)
            if backward:
                needs_image = image != BYTES
                color_transform.color_transform_backward(upstream.to(dtype), *arguments, needs_image, True)

        return compiled_launches(capability, call, cache)

    return launches


def test_interpreted_kernels_match_float64():
    passed = run_interpreted(Path(__file__).parent / "triton_support" / "interpreted_color_transform.py")
    assert passed > 90


# name -> (C, M, CO): published nets, and one with as many channels as there may be.
NETS = {"F": (3, 10, 3), "E": (3, 16, 3), "D2": (9, 10, 3), "widest": (16, 4, 16)}


@pytest.mark.parametrize(
    ("capability", "net"), [(90, "F"), (80, "F"), (120, "F"), (90, "E"), (100, "D2"), (90, "widest")]
)
def test_every_target_gets_kernels_that_fit(launches, capability, net):
    compiled = launches(capability, *NETS[net])
    assert [launch.kernel for launch in compiled] == [FORWARD, SUMS, MERGE, IMAGE]
    for launch in compiled:
        assert launch.spills_in_loops == launch.local == 0, launch
        assert launch.stack <= 64, launch
        assert launch.registers * launch.warps * 32 <= 65_536, launch
    if net == "F":
        forward, sums, *_ = compiled
        assert forward.registers <= 128  # four programs of 1024 pixels on a multiprocessor
        assert 2 * sums.registers * sums.warps * 32 <= 65_536  # as many as are launched


@pytest.mark.parametrize(("image", "dtype"), [(F32, F32), (BYTES, F32), (BYTES, BF16)], ids=str)
def test_pixels_of_planes_are_read_and_written_in_vectors(launches, image, dtype):
    (forward,) = launches(90, image=image, dtype=dtype, backward=False)
    counts = forward.instructions
    # Eight pixels of a thread, up to 16 bytes at a time.
    read = {"LDG.E.128": 6} if image == F32 else {"LDG.E.64": 3}
    written = {"STG.E.128": 6 if dtype == F32 else 3}
    assert {op: counts[op] for op in (*read, *written)} == read | written
    assert sum(n for op, n in counts.items() if op.startswith("STG")) == sum(written.values())


def test_an_image_of_bytes_has_no_gradient_and_no_launch_for_it(launches):
    assert [launch.kernel for launch in launches(90, M=2, image=BYTES)] == [FORWARD, SUMS, MERGE]


def test_changing_sizes_and_batches_does_not_recompile(launches):
    for last in (False, True):
        sizes = ((32, 32), 2), ((128, 128), 64), ((224, 160), 3)
        builds = {launches(90, M=2, size=size, N=N, last=last, backward=False)[0].fingerprint for size, N in sizes}
        assert len(builds) == 1


@pytest.mark.parametrize(("N", "size"), [(1, (8, 8)), (64, (128, 128)), (2, (1024, 1024))])
def test_programs_fill_the_gpu_and_no_more(launches, N, size):
    forward, sums, merge, _ = launches(90, M=2, N=N, size=size)
    pixels = size[0] * size[1]
    assert forward.grid == (N * -(-pixels // 1024),)
    assert sums.grid == (min(2 * 132, -(-N * -(-pixels // 128) // 4)), 1)
    assert merge.grid == (2 * 4 + 3 * 3,)


@pytest.mark.parametrize(
    ("C", "M", "CO"), [(c, m, o) for c in (1, 3, 9, 16) for m in (1, 3, 10, 16) for o in (1, 3, 16)]
)
def test_programs_share_hidden_units_equally_and_keep_their_sums_in_registers(C, M, CO):
    units = color_transform._units(C, M, CO)
    assert 1 <= units <= M
    assert units * (C + 1 + CO) + CO <= 76
    chunks = -(-M // units)
    assert chunks == 1 or (units + 1) * (C + 1 + CO) + CO > 76 or -(-M // (units + 1)) == chunks
