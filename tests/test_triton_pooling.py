"""The Triton kernels of `pooling` without a GPU: right numbers (interpreted), fit for every target (compiled)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Triton")

from perfvl.kernels import pooling
from triton_support.compile_only import LIMITS, CompiledLaunch, compiled_launches
from triton_support.interpreter import run_interpreted

from perfvl.ops.pooling import empty_gradient, empty_outputs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CAFFE = ([3, 3], [2, 2], [0, 0], True)


@pytest.fixture
def launches(tmp_path_factory):
    """Compiles what one call, forward or backward, would launch on a GPU of the given compute capability."""
    cache = tmp_path_factory.getbasetemp() / "triton_cache"

    def launches(
        capability: int, shape: tuple[int, ...], *, windows=CAFFE, dtype=F32, channels_last=True, backward=False,
        stochastic=False, uniform=True,
    ) -> CompiledLaunch:  # fmt: skip
        memory = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory)
        output, positions = empty_outputs(x, *windows, True)
        kernel, stride, padding, _ = windows
        drawn = torch.zeros(output.shape) if stochastic and uniform else None

        def call():
            if backward:
                grad = empty_gradient(output, positions, list(x.shape[2:]))
                pooling.backward(output, positions, grad, kernel, stride, padding, average=not stochastic)
            else:
                wanted = positions if uniform else None
                pooling.forward(x, drawn, output, wanted, kernel, stride, padding, stochastic=stochastic)

        (launch,) = compiled_launches(capability, call, cache)
        return launch

    return launches


def test_interpreted_kernels_match_float64():
    passed = run_interpreted(Path(__file__).parent / "triton_support" / "interpreted_pooling.py")
    assert passed > 50


# name -> shape, windows
LAYERS = {
    "CaffeNet's pool1": ((4, 96, 30, 30), CAFFE),
    "ResNet's": ((2, 64, 112, 112), ([3, 3], [2, 2], [1, 1], False)),
    "side by side": ((2, 24, 14, 14), ([2, 2], [2, 2], [0, 0], False)),
    "the whole image": ((2, 256, 7, 7), ([7, 7], [7, 7], [0, 0], False)),
}


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_target_gets_kernels_that_fit(launches, capability, layer):
    shape, windows = LAYERS[layer]
    dtype, channels_last = ((F32, True), (BF16, False), (F16, True), (F32, False))[list(LIMITS).index(capability) % 4]
    for options in ({}, {"backward": True}, {"stochastic": True}, {"stochastic": True, "uniform": False}):
        launch = launches(capability, shape, windows=windows, dtype=dtype, channels_last=channels_last, **options)
        assert launch.local == launch.spills_in_loops == 0, launch
        assert launch.stack <= 32, launch
        assert launch.registers <= 128, launch  # four programs and more of a multiprocessor: loads of all are in flight
        assert launch.shared <= 32 << 10, launch


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_channels_are_read_and_written_16_bytes_at_a_time(launches, dtype):
    forward, backward = (launches(90, (4, 96, 30, 30), dtype=dtype, backward=b) for b in (False, True))
    assert forward.count("LDG.E.128") >= 6
    assert forward.count("LDG") == forward.count("LDG.E.128")
    assert backward.count("STG.E.128") == backward.count("STG") >= 4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_there_is_little_to_compute(launches, backward, channels_last):
    """Instructions for a thread's eight windows or four cells of four pixels; half as many in NCHW."""
    launch = launches(90, (4, 96, 30, 30), dtype=BF16, channels_last=channels_last, backward=backward)
    assert sum(launch.instructions.values()) < (1200 if backward else 900), launch


def test_changing_images_and_batches_does_not_recompile(launches):
    for backward in (False, True):
        for channels_last in (False, True):
            sizes = ((2, 96, 29, 29), (5, 96, 21, 21), (1, 96, 17, 19))
            builds = {launches(90, s, channels_last=channels_last, backward=backward).fingerprint for s in sizes}
            assert len(builds) == 1


@pytest.mark.parametrize(("width", "columns"), [(3, 4), (15, 16), (24, 32), (56, 64), (96, 32), (256, 128), (300, 64)])
def test_few_columns_of_a_tile_are_idle(width, columns):
    grid, tile = pooling._tile(1000, width, 1024)
    assert tile["BLOCK_C"] == columns
    assert grid == (math.ceil(1000 / tile["BLOCK_R"]), math.ceil(width / columns))
    assert tile["EVEN"] == (width % columns == 0)


def test_rows_beyond_32_bits_are_counted_in_64():
    assert [pooling._tile(rows, 16, 1024)[1]["WIDE"] for rows in (2**31 - 100, 2**31 - 10, 2**33)] == [
        False,
        True,
        True,
    ]
