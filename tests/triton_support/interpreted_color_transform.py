"""The Triton kernels of `color_transform`, interpreted, against float64. `test_triton_color_transform.py` runs this
file in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from triton_support import interpreter

interpreter.install()

from perfvl.kernels import _tiles, color_transform  # noqa: E402  (the interpreter has to be patched first)

from perfvl.ops import color_transform as op  # noqa: E402
from perfvl.reference import color_transform as reference  # noqa: E402

F32, BF16, F16, BYTES = torch.float32, torch.bfloat16, torch.float16, torch.uint8
ROUNDING = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}


@pytest.fixture(autouse=True)
def _a_small_gpu(monkeypatch):
    monkeypatch.setattr(_tiles, "gpu_limits", lambda device: _tiles.Gpu(90, 2, 232_448))


class Case:
    """Random arguments of one call, its results and what float64 says. No sum is near an activation's kink."""

    def __init__(
        self, C=3, M=10, CO=3, size=(5, 7), *, N=2, image=F32, dtype=F32, mean=False, scale=1.0, slope=0.5,
        residual=False, biases=(True, True),
    ):  # fmt: skip
        x = torch.randint(256, (N, C, *size)) if image == BYTES else torch.randn(N, C, *size)
        self.image = x.to(image)
        made = torch.randn(M, C, 1, 1), torch.randn(M), torch.randn(CO, M, 1, 1), torch.randn(CO)
        self.parameters: list[Tensor | None] = [t.to(dtype) for t in made]
        for i, used in zip((1, 3), biases, strict=True):
            if not used:
                self.parameters[i] = None
        self.mean = torch.full((C,), 100.0) if mean else None
        self.settings = {"scale": scale, "negative_slope": slope, "residual": residual}
        self.upstream = torch.randn(N, CO, *size).to(dtype)

    def check(self) -> None:
        arguments = (self.image, *self.parameters, self.mean, *self.settings.values())
        output = color_transform.color_transform(*arguments)
        needs = self.image.dtype != BYTES, True
        found = color_transform.color_transform_backward(self.upstream, *arguments, *needs)
        for got, fake in zip(
            (output, *found),
            (op._fake(*arguments), *op._fake_backward(self.upstream, *arguments, *needs)),
            strict=True,
        ):
            assert (got.shape, got.stride(), got.dtype) == (fake.shape, fake.stride(), fake.dtype)
        leaves = [None if t is None else t.double().requires_grad_() for t in (self.image, *self.parameters)]
        right = reference.color_transform(*leaves, self.mean, **self.settings)
        near(output, right, self.upstream.dtype)
        present = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(right, present, self.upstream.double(), allow_unused=True))
        for leaf, got in zip(leaves, found, strict=True):
            if leaf is None:
                assert got.shape == (0,)
                continue
            grad = next(grads)
            if got.numel():
                near(got, grad, got.dtype)


def near(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - truth).norm() / truth.norm()
    assert error < 2e-6 + ROUNDING[dtype], float(error)


@pytest.mark.parametrize("image", [F32, BF16, F16, BYTES], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_dtype_matches_float64(image, dtype):
    Case(image=image, dtype=dtype, mean=True, scale=0.02, residual=True).check()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("C", "M", "CO"), [(3, 3, 3), (3, 16, 3), (1, 1, 1), (9, 10, 3), (6, 10, 6), (2, 11, 5), (16, 5, 16), (16, 16, 2)]
)
def test_every_width_matches_float64(C, M, CO, residual):
    Case(C, M, CO, (3, 6), N=1, residual=residual and C == CO).check()


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 130), (130, 1), (12, 11), (33, 47)])
def test_every_size_matches_float64(size, N):
    Case(M=4, size=size, N=N).check()


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
def test_biases_may_be_absent(biases):
    Case(biases=biases, mean=True).check()


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0, 3.0])
def test_every_slope_matches_float64(slope):
    Case(slope=slope).check()


LAYOUTS: dict[str, Any] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a window": lambda x: torch.nn.functional.pad(x, (2, 1, 1, 2))[..., 1:-2, 2:-1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second channel": lambda x: x.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2],
    "one column": lambda x: x[..., 3:4],
    "one row": lambda x: x[:, :, 2:3],
    "one pixel for all": lambda x: x[:, :, :1, :1].expand(-1, -1, 4, 6),
    "one image for all": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("which", ["image", "upstream", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", [F32, BYTES], ids=str)
def test_any_strides(image, layout, which):
    case = Case(M=4, image=image, mean=True, scale=0.01)
    changed = LAYOUTS[layout]
    case.image, case.upstream = changed(case.image), changed(case.upstream)
    if which == "image":
        case.upstream = case.upstream.contiguous()
    elif which == "upstream":
        case.image = case.image.contiguous()
    case.check()


def test_weights_of_any_strides():
    case = Case()
    case.parameters[0] = torch.randn(3, 10, 1, 1).transpose(0, 1)
    case.parameters[2] = torch.randn(6, 10, 1, 1)[::2]
    case.parameters[3] = torch.randn(1).expand(3)
    case.check()


def test_memory_around_the_image_is_not_read():
    case = Case(image=F32)
    for name in ("image", "upstream"):
        around = torch.full((2, 3, 9, 11), torch.nan)
        around[..., 2:7, 2:9] = getattr(case, name)
        setattr(case, name, around[..., 2:7, 2:9])
    case.check()


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_sums_of_any_number_of_programs(monkeypatch, multiprocessors):
    monkeypatch.setattr(_tiles, "gpu_limits", lambda device: _tiles.Gpu(90, multiprocessors, 232_448))
    Case(M=3, size=(37, 60)).check()


def test_sums_do_not_change_from_run_to_run():
    case = Case(M=3, size=(20, 31))
    arguments = (case.upstream, case.image, *case.parameters, None, *case.settings.values(), True, True)
    first, second = (color_transform.color_transform_backward(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
