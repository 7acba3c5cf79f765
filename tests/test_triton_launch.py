"""Launches that skip Triton's argument handling pass what Triton would have passed, and nothing stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton kernels need Triton")

import triton.language as tl  # noqa: E402
from perfvl.kernels import _launch  # noqa: E402
from triton import knobs  # noqa: E402
from triton_support.compile_only import _Driver  # noqa: E402


@triton.jit(do_not_specialize=("n", "step"))
def _kernel(out, bias, factor, n, step, stride, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * step + tl.arange(0, BLOCK)
    value = tl.full([BLOCK], 1.0, tl.float32)
    if bias is not None:
        value += tl.load(bias)
    if SCALED:
        value *= factor
    tl.store(out + index * stride, value, mask=index < n)


class OnDevice:
    """What a launch asks of a CUDA tensor."""

    is_cuda = True

    def __init__(self, pointer: int = 4096, dtype: torch.dtype = torch.float32) -> None:
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        return self.pointer

    def get_device(self) -> int:
        return 0


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}


class _RecordingDriver(_Driver):
    """Compiles for capability 9.0; launchers write down their arguments."""

    utils = _Utils()

    def __init__(self) -> None:
        super().__init__(90)
        self.launches = launches = []

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None: ...

            def __call__(self, *arguments: Any) -> None:
                launches.append(arguments)

        self.launcher_cls = Launcher

    def get_current_stream(self, device: int) -> int:
        return 77


@pytest.fixture
def driver(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_launch, "_compiled", {})
    recording = _RecordingDriver()
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(recording)
    _kernel.device_caches.clear()
    yield recording
    _kernel.device_caches.clear()
    triton.runtime.driver._active = previous


def launch(out=None, bias=None, factor=0.5, n=100, step=64, stride=1, grid=(2,), warps=4, **constants):
    constants = {"BLOCK": 64, "SCALED": True, **constants}  # not in the order of the kernel's parameters
    _launch.launch(_kernel, grid, (out or OnDevice(), bias), (factor, n, step), (stride,), warps, **constants)


def builds() -> int:
    return sum(len(cache[0]) for cache in _kernel.device_caches.values())


def test_a_repeated_launch_passes_what_triton_passed(driver):
    for bias in (None, OnDevice(8192, torch.bfloat16)):
        launch(bias=bias)
        launch(bias=bias)
    assert len(_launch._compiled) == 2
    for ordinary, repeated in (driver.launches[:2], driver.launches[2:]):
        *start, metadata, _, _, _ = ordinary[:9]
        assert repeated[:9] == (*start, metadata, None, None, None)
        assert start[:4] == [2, 1, 1, 77]
        assert repeated[9:] == tuple(a.pointer if isinstance(a, OnDevice) else a for a in ordinary[9:])


def test_numbers_grids_and_addresses_may_change_freely(driver):
    for i in range(4):
        launch(OnDevice(4096 * (i + 1)), factor=i / 2, n=10 + i, step=16 << i, grid=(i + 1, 3))
    assert builds() == len(_launch._compiled) == 1
    assert [arguments[:3] for arguments in driver.launches] == [(i + 1, 3, 1) for i in range(4)]
    assert driver.launches[3][9:14] == (4 * 4096, None, 1.5, 13, 128)


@pytest.mark.parametrize(
    "change",
    [
        {"out": OnDevice(4100)},
        {"out": OnDevice(dtype=torch.bfloat16)},
        {"bias": OnDevice()},
        {"stride": 16},
        {"stride": 3},
        {"n": 1 << 31},
        {"warps": 8},
        {"SCALED": False},
        {"BLOCK": 128},
    ],
    ids=str,
)
def test_what_kernels_are_specialised_for_is_not_confused(driver, change):
    launch()
    launch(**change)
    assert builds() == 2
    launch()
    launch(**change)
    assert builds() == 2
    assert driver.launches[0][4:6] == driver.launches[2][4:6]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(driver, hook, monkeypatch):
    launch()
    seen = []
    chain = knobs.HookChain()
    chain.add(seen.append)
    monkeypatch.setattr(knobs.runtime, hook, chain)
    launch()
    assert driver.launches[-1][7 if hook == "launch_enter_hook" else 8] is chain


def test_an_unknown_version_of_triton_takes_its_own_way(driver, monkeypatch):
    monkeypatch.setattr(_launch, "_KNOWN", False)
    launch()
    launch()
    assert not _launch._compiled
    assert isinstance(driver.launches[1][9], OnDevice)


def test_keys_do_not_pile_up(driver, monkeypatch):
    monkeypatch.setattr(_launch, "_MOST_KEYS", 3)
    for stride in range(16, 16 * 12, 16):
        launch(stride=stride)
    assert len(_launch._compiled) <= 3
    assert builds() == 1
