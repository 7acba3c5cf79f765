"""The Triton kernel of `separable_conv` without a GPU: right numbers (interpreted), fit for every target (compiled)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Triton")

from perfvl.kernels import _tiles, separable_conv
from triton_support.compile_only import LIMITS, CompiledLaunch, compiled_launches
from triton_support.interpreter import run_interpreted

from perfvl.reference.activation import CODES

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ONE, NONE = [1, 1], [0, 0, 0, 0]


def pixels_of(N: int, C: int, *size: int, dtype=BF16, planes=False) -> torch.Tensor:
    memory = torch.contiguous_format if planes else torch.channels_last
    return torch.zeros(N, C, *size, dtype=dtype).contiguous(memory_format=memory)


@pytest.fixture
def launches(monkeypatch, tmp_path_factory):
    """Compiles what one call of the op would launch on a GPU of the given compute capability."""
    cache = tmp_path_factory.getbasetemp() / "triton_cache"

    def launches(
        capability: int, C: int, CO: int, size: int, *, N=2, k=3, stride=1, dtype=BF16, pre="none", mid="none",
        activation="none", norm=False, residual=False, statistics=False, planes=False,
    ) -> list[CompiledLaunch]:  # fmt: skip
        gpu = _tiles.Gpu(capability, *LIMITS[capability])
        monkeypatch.setattr(_tiles, "gpu_limits", lambda device: gpu)
        weight = torch.zeros(C, 1, k, k, dtype=dtype)
        pointwise = torch.zeros(CO, C, 1, 1, dtype=dtype)
        scale, shift = (torch.zeros(C), torch.zeros(C)) if norm else (None, None)
        between = torch.zeros(C) if mid != "none" else None
        out = -(-size // stride)
        added = pixels_of(N, CO, out, out, dtype=dtype, planes=planes) if residual else None
        x = pixels_of(N, C, size, size, dtype=dtype, planes=planes)
        codes = (CODES[name] for name in (pre, mid, activation))

        def call():
            separable_conv.fused_forward(
                x, scale, shift, weight, between, pointwise, torch.zeros(CO), added, [stride] * 2, [k // 2] * 4, ONE,
                *codes, statistics, mid_scale=between, output_scale=torch.zeros(CO),
            )  # fmt: skip

        return compiled_launches(capability, call, cache)

    return launches


def test_interpreted_kernels_match_float64():
    passed = run_interpreted(Path(__file__).parent / "triton_support" / "interpreted_separable_conv.py")
    assert passed > 170


# name -> (C, CO, size, options): layers of Xception in training, MobileNetV2, EfficientNet and KernelBench.
LAYERS = {
    "Xception 128->128": (128, 128, 147, {"pre": "relu"}),
    "Xception 128->128, norm": (128, 128, 147, {"N": 1, "pre": "relu", "norm": True, "statistics": True}),
    "MobileNetV2 192->32": (192, 32, 28, {"mid": "relu6", "residual": True}),
    "MobileNetV2 96->24, float16": (96, 24, 112, {"stride": 2, "dtype": F16, "mid": "relu6"}),
    "EfficientNet 240->40, 5 x 5": (240, 40, 28, {"k": 5, "mid": "silu", "residual": True}),
    "KernelBench 86": (64, 128, 64, {"dtype": F32, "planes": True}),
    "KernelBench 86, channels_last": (64, 128, 64, {"dtype": F32}),
    "many steps": (728, 128, 37, {"pre": "relu"}),
    "many steps, float32, norm": (728, 128, 37, {"dtype": F32, "pre": "relu", "norm": True, "residual": True}),
    "planes, stride 2, norm": (64, 128, 64, {"dtype": F32, "planes": True, "stride": 2, "norm": True}),
}


# Every layer on sm_90 and on some others, every target with some layers: all of them would take most of a minute.
PAIRS = [(c, name) for i, name in enumerate(LAYERS) for j, c in enumerate(LIMITS) if c == 90 or (i + j) % 3 == 0]


@pytest.mark.parametrize(("capability", "layer"), PAIRS)
def test_every_target_gets_kernels_that_fit(launches, capability, layer):
    C, CO, size, options = LAYERS[layer]
    fused, *merges = launches(capability, C, CO, size, **options)
    assert fused.kernel == "_fused_kernel"
    assert [merge.kernel for merge in merges] == ["_merge_kernel"] * (2 * options.get("statistics", False))
    assert all(merge.stack == merge.local == 0 for merge in merges), merges
    assert fused.spills_in_loops == fused.local == 0, fused
    assert fused.stack <= 64, fused
    assert fused.shared <= LIMITS[capability][1], fused
    assert fused.registers * fused.warps * 32 <= 65_536, fused
    assert fused.tensor_core_instructions > 0, fused
    if capability == 90 or not (capability == 100 or options.get("planes")):
        assert fused.registers <= 128, fused  # two programs share a multiprocessor
        assert 2 * fused.shared <= LIMITS[capability][1], fused


def test_hopper_and_blackwell_use_their_own_matrix_instructions(launches):
    (hopper,), (blackwell,) = (launches(capability, 64, 128, 147) for capability in (90, 100))
    assert hopper.count("HGMMA") > 0
    assert hopper.count("HMMA") == 0
    assert blackwell.count("UTCHMMA") > 0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("C", "CO"), [(64, 128), (24, 40), (728, 128)])
def test_pixels_are_read_and_written_16_bytes_at_a_time(launches, C, CO, dtype):
    (launch,) = launches(90, C, CO, 14, dtype=dtype, residual=True)
    narrow = {op: n for op, n in launch.instructions.items() if op.startswith(("LDG", "STG")) and "128" not in op}
    per_channel = 2 * 16  # output scale and shift, a few numbers of each for a thread
    assert sum(narrow.values()) <= per_channel, narrow
    assert not any(op.startswith("STG") for op in narrow), narrow


def test_changing_images_and_batches_does_not_recompile(launches):
    sizes = ((56, 1), (57, 8), (112, 3), (147, 2))
    assert len({launches(90, 24, 40, size, N=N)[0].fingerprint for size, N in sizes}) == 1


def test_nothing_is_stored_number_by_number_for_the_product(launches):
    for capability in (80, 90):
        (launch,) = launches(capability, 128, 128, 147)
        assert launch.count("STS.U16") == launch.count("STS.U8") == 0, launch
        assert launch.count("STS.128") > 0, launch


def test_tiles_fit_the_image():
    def shape(size: int, planes: bool = False, k: int = 3, CO: int = 128) -> tuple[int, int]:
        square = ((k, k), (1, 1), (1, 1))
        return separable_conv.choose_tiles(64, CO, (size, size), *square, planes, False, 90)[:2]

    assert [shape(size) for size in (14, 28, 74, 147)] == [(4, 16)] * 4
    assert shape(32, k=5) == (2, 32)
    assert shape(512, planes=True) == (4, 32)


def test_steps_waste_few_channels():
    def step(C: int, affine: bool = False) -> int:
        return separable_conv.choose_tiles(C, 64, (147, 147), (3, 3), (1, 1), (1, 1), False, affine, 90).channels

    assert [step(C) for C in (16, 32, 64, 96, 128, 192, 728)] == [16, 32, 64, 128, 128, 64, 128]
    assert step(128, affine=True) == 64


def supports(x, depthwise=None, pointwise=None, stride=ONE, padding=NONE, dilation=ONE) -> bool:
    depthwise = torch.zeros(x.shape[1], 1, 3, 3, dtype=x.dtype) if depthwise is None else depthwise
    pointwise = torch.zeros(8, x.shape[1], 1, 1, dtype=x.dtype) if pointwise is None else pointwise
    return separable_conv.supports(x, depthwise, pointwise, stride, padding, dilation)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_supported_layers(dtype):
    x = pixels_of(2, 6, 9, 9, dtype=dtype)
    assert supports(x)
    assert supports(x, torch.zeros(6, 1, 5, 5, dtype=dtype), stride=[2, 3], padding=[1, 0, 2, 3], dilation=[2, 1])
    assert supports(x, pointwise=torch.zeros(128, 6, 1, 1, dtype=dtype))
    assert supports(x[:, 1:4, ::2])


def test_offsets_inside_an_image_have_32_bits():
    weights = torch.zeros(6, 1, 3, 3), torch.zeros(8, 6, 1, 1)
    for channel, row, fits in ((2**28, 16, False), (2**20, 16, True), (2**20, 2**25, False)):
        image = torch.empty_strided((2, 6, 9, 9), (2**40, channel, row, 1), device="meta")
        assert separable_conv.supports(image, *weights, ONE, NONE, ONE) == fits


def test_unsupported_layers():
    x = pixels_of(2, 6, 9, 9)
    assert not supports(x.contiguous())
    assert supports(x.contiguous().float())
    assert not supports(x.contiguous().float().transpose(2, 3))
    assert not supports(x.contiguous().float(), torch.zeros(6, 1, 5, 5))
    assert not supports(x[:, :1])
    assert not supports(x[:0])
    assert not supports(x.double())
    assert not supports(x, torch.zeros(6, 1, 3, 3))
    assert not supports(x, torch.zeros(12, 1, 3, 3, dtype=BF16), torch.zeros(8, 12, 1, 1, dtype=BF16))
    for kernel in ((1, 1), (3, 5), (7, 7)):
        assert not supports(x, torch.zeros(6, 1, *kernel, dtype=BF16))
    assert not supports(x, pointwise=torch.zeros(129, 6, 1, 1, dtype=BF16))
