"""The Triton kernels of `info_nce` without a GPU: right numbers (interpreted) and fit for every target (compiled)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Triton")

from perfvl.kernels import _info_nce_narrow, _info_nce_wide, _tiles, info_nce
from triton_support.compile_only import LIMITS, CompiledLaunch, compiled_launches
from triton_support.interpreter import run_interpreted

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SWEEPS = {"_stream_kernel", "_logits_kernel", "_gradient_kernel"}


@pytest.fixture
def launches(monkeypatch, tmp_path_factory):
    """Compiles what one call of the op would launch on a GPU of the given compute capability."""
    cache = tmp_path_factory.getbasetemp() / "triton_cache"
    monkeypatch.setattr(_info_nce_wide, "_matmul", lambda a, b, out: None)

    def launches(
        capability: int, B: int, K: int, d: int, *, given=BF16, queue=None, compute=BF16, learned=False, reduction=1,
        with_rank=True, with_grad=True, precision="tf32",
    ) -> list[CompiledLaunch]:  # fmt: skip
        multiprocessors, shared_memory = LIMITS[capability]
        gpu = _tiles.Gpu(capability, multiprocessors, shared_memory)
        monkeypatch.setattr(_tiles, "gpu_limits", lambda device: gpu)
        rows = torch.zeros(B, d, dtype=given)
        keys = torch.zeros(K, d, dtype=given) if queue is None else queue
        temperature = torch.ones(()) if learned else None

        def call():
            info_nce.info_nce(
                rows, rows, keys, 0.07, temperature, None, compute, reduction, with_rank, with_grad,
                input_precision=precision,
            )  # fmt: skip

        return compiled_launches(capability, call, cache)

    return launches


def test_interpreted_kernels_match_float64():
    passed = run_interpreted(Path(__file__).parent / "triton_support" / "interpreted_info_nce.py")
    assert passed > 140


# name -> (B, K, d, options): MoCo, MoCo with a float32 queue under autocast, ALBEF, BriVL per GPU, a large batch,
# rows that do not vectorise.
WORKLOADS = {
    "MoCo B=256": (256, 8192, 128, {}),
    "MoCo B=32, float32 queue": (32, 8192, 128, {"given": F32, "learned": True}),
    "ALBEF B=256, float16": (256, 4096, 256, {"given": F16, "compute": F16, "with_rank": False}),
    "loss only": (64, 8192, 128, {"with_grad": False, "reduction": 0}),
    "BriVL B=16": (16, 1024, 2560, {}),
    "BriVL B=64, float32 queue": (64, 1024, 2560, {"given": F32}),
    "BriVL B=256": (256, 1024, 2560, {}),
    "float32 as TF32": (64, 4096, 128, {"given": F32, "compute": F32}),
    "odd width": (16, 4096, 123, {}),
}


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_target_gets_kernels_that_fit(launches, capability, workload):
    B, K, d, options = WORKLOADS[workload]
    compiled = launches(capability, B, K, d, **options)
    assert compiled[-1].kernel == "_merge_kernel"
    for launch in compiled:
        # Register allocators differ between Triton versions: a value or two may be parked on the stack around a loop.
        assert launch.spills_in_loops == launch.local == 0, launch
        assert launch.stack <= 32, launch
        assert launch.shared <= LIMITS[capability][1], launch
        assert launch.registers * launch.warps * 32 <= 65_536, launch
        if launch.kernel in SWEEPS:
            assert launch.tensor_core_instructions > 0, launch


def test_hopper_and_blackwell_use_their_own_matrix_instructions(launches):
    (hopper, _), (blackwell, _) = (launches(capability, 256, 8192, 128) for capability in (90, 100))
    assert hopper.count("HGMMA") > 0
    assert hopper.count("HMMA") == 0
    assert blackwell.count("UTCHMMA") > 0
    # Keys arrive by asynchronous 16-byte copies, the query tile once, and nothing goes through registers on the way.
    assert hopper.count("LDGSTS.E.BYPASS.128") > 0
    assert hopper.count("LDGSTS") == hopper.count("LDGSTS.E.BYPASS.128")


def test_two_launches_while_rows_fit_on_the_chip(launches):
    for B, d in ((1, 1), (32, 128), (256, 128), (2048, 256)):
        assert [launch.kernel for launch in launches(90, B, 1000, d)] == ["_stream_kernel", "_merge_kernel"]


def test_routes(launches):
    few_rows = ["_logits_kernel", "_gradient_kernel", "_merge_kernel"]
    library = ["_rows_kernel", "_merge_kernel"]
    cases = [
        (16, 320, {}, few_rows),
        (64, 2560, {}, few_rows),
        (16, 2560, {"with_grad": False}, ["_logits_kernel", "_merge_kernel"]),
        (65, 2560, {}, library),
        (16, 2560, {"given": F32, "compute": F32}, library),
        (16, 64, {"given": F32, "compute": F32, "precision": "ieee"}, library),
    ]
    for B, d, options, expected in cases:
        assert [launch.kernel for launch in launches(90, B, 200, d, **options)] == expected


def test_no_keys_launch_only_the_merge(launches):
    for d in (64, 2560):
        assert [launch.kernel for launch in launches(90, 4, 0, d)] == ["_merge_kernel"]
    assert launches(90, 0, 64, 64) == []


def test_changing_sizes_does_not_recompile(launches):
    for d, sizes in ((128, ((200, 1000), (256, 8192), (2048, 77), (133, 1))), (512, ((3, 1000), (16, 4096), (7, 1)))):
        builds = {tuple(launch.fingerprint for launch in launches(90, B, K, d)) for B, K in sizes}
        assert len(builds) == 1


def test_one_build_serves_every_temperature_and_count(launches):
    first, second = (launches(90, 16, 100, 64, learned=learned) for learned in (False, True))
    assert first[0].fingerprint != second[0].fingerprint  # read from the device or passed: two builds in all
    assert launches(90, 16, 100, 64)[0].fingerprint == first[0].fingerprint


def test_transposed_queues_are_read_along_their_rows(launches):
    sweep, _ = launches(90, 256, 8192, 128, queue=torch.zeros(128, 8192, dtype=BF16).t())
    assert sweep.count("LDGSTS.E.BYPASS.128") > 0
    assert sweep.stack == 0


@pytest.mark.parametrize(
    ("rows", "K", "programs"),
    [(256, 65_536, 132), (32, 65_536, 264), (4096, 65_536, 132), (33_000, 65_536, 132), (256, 100, 132)],
)
def test_splits_fill_the_gpu_without_idle_programs(rows, K, programs):
    row_tiles, key_tiles = -(-rows // 128), -(-K // 128)
    splits = _info_nce_narrow.split_count(row_tiles, key_tiles, programs)
    assert 1 <= splits <= key_tiles
    waves = -(-row_tiles * splits // programs)
    busy = row_tiles * key_tiles / (waves * programs * -(-key_tiles // splits))
    assert busy > 0.9 or splits == key_tiles
