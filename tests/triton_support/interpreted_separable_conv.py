"""The Triton kernel of `separable_conv`, interpreted, against float64. `test_triton_separable_conv.py` runs this file
in a process of its own.

The interpreter has no TF32: float32 products are exact to float32 here whatever precision is asked for.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_support import interpreter

interpreter.install()

from perfvl.kernels import _tiles, separable_conv  # noqa: E402  (the interpreter has to be patched first)
from perfvl.kernels._separable_conv_statistics import PARTS, merge_statistics  # noqa: E402

from perfvl.reference import separable_conv as reference  # noqa: E402
from perfvl.reference.activation import ACTIVATIONS, CODES  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 0.0, BF16: 2.0**-8, F16: 2.0**-11}
U = 2.0**-24
STEEPEST = 1.5  # slope of hardswish, the steepest activation


@pytest.fixture(autouse=True)
def _some_gpu(monkeypatch):
    monkeypatch.setattr(_tiles, "gpu_limits", lambda device: _tiles.Gpu(90, 132, 232_448))


class Case:
    """Random arguments of one call, its result and what float64 says."""

    def __init__(
        self, C=16, CO=24, size=(7, 9), *, N=2, k=3, stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), dtype=F32,
        pre="none", mid="none", activation="none", norm=False, mid_norm=False, output_norm=False, biased=False,
        residual=False, statistics=False, layout=torch.channels_last,
    ):  # fmt: skip
        def vector(used: bool, length: int, offset: float = 0.0) -> Tensor | None:
            return torch.randn(length) + offset if used else None

        self.layout = layout
        self.input = torch.randn(N, C, *size).to(dtype).contiguous(memory_format=layout)
        self.depthwise = (torch.randn(C, 1, k, k) / k).to(dtype)
        self.pointwise = (torch.randn(CO, C, 1, 1) / C**0.5).to(dtype)
        self.norm = vector(norm, C), vector(norm, C, 2.0)
        self.mid_norm = vector(mid_norm, C), vector(mid_norm or biased, C)
        self.output_norm = vector(output_norm, CO), vector(output_norm or biased, CO)
        self.geometry = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}
        self.activations = {"pre_activation": pre, "mid_activation": mid, "activation": activation}
        self.statistics = statistics
        self.residual = torch.zeros(())
        self.residual = torch.randn(self.truth().shape).to(dtype) if residual else None

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        assert separable_conv.supports(self.input, self.depthwise, self.pointwise, *self.geometry.values())
        return separable_conv.fused_forward(
            self.input, *self.norm, self.depthwise, self.mid_norm[1], self.pointwise, self.output_norm[1],
            self.residual, *self.geometry.values(), *(CODES[name] for name in self.activations.values()),
            self.statistics, mid_scale=self.mid_norm[0], output_scale=self.output_norm[0],
        )  # fmt: skip

    def truth(self) -> Tensor:
        return reference.separable_conv(
            *map(_double, (self.input, *self.norm, self.depthwise, *self.mid_norm, self.pointwise)),
            *map(_double, (*self.output_norm, self.residual)), **self.geometry, **self.activations,
        )  # fmt: skip

    def allowed(self, truth: Tensor) -> Tensor:
        """One rounding between the convolutions, one of the output, and float32 sums."""
        depthwise, pointwise = self.depthwise.double(), self.pointwise.double()
        options = {**self.geometry, "scale": None, "shift": None, "pre_activation": "none", "activation": "none"}
        a = ACTIVATIONS[self.activations["pre_activation"]](reference.affine(self.input.double(), *self.norm))
        u = reference.depthwise_conv(a, depthwise, None, **options)
        terms = reference.affine(
            reference.depthwise_conv(a.abs(), depthwise.abs(), None, **options), *_absolute(self.mid_norm)
        )
        v = ACTIVATIONS[self.activations["mid_activation"]](reference.affine(u, *self.mid_norm))
        rounding = ROUNDING[self.input.dtype]
        error = F.conv2d(rounding * v.abs() + STEEPEST * 64 * U * terms, pointwise.abs())
        error += 64 * U * F.conv2d(v.abs(), pointwise.abs())
        error = reference.affine(error, _absolute(self.output_norm)[0], None)
        beside = sum(t.double().abs().amax() for t in (self.output_norm[1], self.residual) if t is not None)
        return STEEPEST * error + rounding * truth.abs() + 8 * U * (truth.abs() + beside + 1e-3)

    def check(self) -> None:
        output, mean, variance = self.run()
        truth = self.truth()
        assert output.shape == truth.shape
        assert output.dtype == self.input.dtype
        assert output.stride() == torch.empty(truth.shape, memory_format=self.layout).stride()
        error = (output.double() - truth).abs()
        allowed = self.allowed(truth)
        assert (error <= allowed).all(), float((error / allowed).max())
        if not self.statistics:
            assert mean.shape == variance.shape == (0,)
            return
        expected_mean, expected_variance = reference.channel_statistics(output.double())
        assert mean.dtype == variance.dtype == F32
        torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance.double(), expected_variance, rtol=1e-4, atol=1e-9)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _absolute(norm) -> tuple[Tensor | None, Tensor | None]:
    scale, shift = norm
    return None if scale is None else scale.double().abs(), None if shift is None else shift.double().abs()


CHANNELS = (3, 16, 24, 40)
OUTPUTS = (8, 24, 66, 128)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("C", "CO"), list(itertools.product(CHANNELS, OUTPUTS)))
def test_every_width_and_dtype_matches_float64(C, CO, dtype):
    Case(C, CO, dtype=dtype, pre="relu", biased=True).check()


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(
    ("stride", "dilation"), [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((3, 1), (2, 2)), ((1, 2), (3, 2))]
)
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 2, 2, 2), (0, 1, 3, 0), (4, 5, 0, 7)])
def test_every_geometry_matches_float64(k, stride, dilation, padding):
    Case(8, 16, (13, 15), k=k, stride=stride, dilation=dilation, padding=padding).check()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (70, 1), (19, 7), (10, 37), (9, 60)])
@pytest.mark.parametrize(("N", "CO"), [(1, 66), (3, 24)])
def test_every_size_matches_float64(size, N, CO):
    Case(8, CO, size, N=N, pre="relu", statistics=True).check()


@pytest.mark.parametrize("where", ["pre", "mid", "activation"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_matches_float64(where, name):
    case = Case(norm=True, mid_norm=True, output_norm=True, **{where: name})
    case.input *= 4  # both knees of relu6 and hardswish
    case.check()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_everything_at_once(dtype):
    Case(
        40, 24, k=5, stride=(2, 2), padding=(1, 2, 2, 1), dtype=dtype, pre="hardswish", mid="silu", activation="relu6",
        norm=True, mid_norm=True, output_norm=True, residual=True,
    ).check()  # fmt: skip


@pytest.mark.parametrize("pre", ["none", "relu"])
@pytest.mark.parametrize("only", ["scale", "shift", "both"])
def test_padding_is_zero_after_the_prologue(pre, only):
    case = Case(padding=(2, 1, 0, 3), pre=pre, norm=True)
    case.norm = (case.norm[0] if only != "shift" else None, case.norm[1] if only != "scale" else None)
    case.check()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_statistics_keep_their_digits_far_from_zero(dtype):
    case = Case(24, 40, (16, 17), dtype=dtype, statistics=True)
    case.output_norm = None, torch.full((40,), 1000.0)
    case.check()
    assert case.run()[2].min() > 0


def test_statistics_do_not_change_from_run_to_run():
    case = Case(24, 40, (16, 17), statistics=True)
    assert all(torch.equal(first, second) for first, second in zip(case.run(), case.run(), strict=True))


@pytest.mark.parametrize("parts", [1, PARTS, PARTS + 1, 3 * PARTS - 5])
def test_statistics_of_many_tiles_are_those_of_all_pixels(parts):
    values = torch.randn(parts, 7, 40, dtype=torch.float64) + 3 * torch.randn(parts, 1, 40, dtype=torch.float64) + 50
    counts = torch.randint(1, 8, (parts,))
    used = torch.arange(7)[None, :] < counts[:, None]
    means = torch.stack([rows[use].mean(0) for rows, use in zip(values, used, strict=True)])
    squares = torch.stack([((r[u] - m) ** 2).sum(0) for r, u, m in zip(values, used, means, strict=True)])
    mean, variance = merge_statistics(counts.float(), means.float(), squares.float())
    torch.testing.assert_close(mean.double(), values[used].mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), values[used].var(0, correction=0), rtol=1e-4, atol=1e-9)


RESIDUALS = {
    "NCHW": lambda r: r.contiguous(),
    "channels_last": lambda r: r.contiguous(memory_format=torch.channels_last),
    "one pixel for all": lambda r: r[:, :, :1, :1].expand_as(r),
    "one channel for all": lambda r: r[:, :1].expand_as(r),
    "transposed": lambda r: r.transpose(2, 3).contiguous().transpose(2, 3),
    "every second channel": lambda r: r.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2],
}


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("layout", RESIDUALS)
def test_a_residual_of_any_strides_is_added_after_the_activation(layout, dtype):
    case = Case(dtype=dtype, activation="relu", residual=True)
    case.residual = RESIDUALS[layout](case.residual)
    case.check()


INPUTS = {
    "some channels": lambda x: x[:, 3:19],
    "a window": lambda x: x[:, :16, 2:-2, 1:-3],
    "every second pixel": lambda x: x[:, :16, ::2, ::2],
    "one image for all": lambda x: x[:1, :16].expand(3, -1, -1, -1),
    "transposed": lambda x: x[:, :16].transpose(2, 3),
    "one row": lambda x: x[:, 8:24, :1],
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", INPUTS)
def test_inputs_of_any_strides_between_pixels(layout, dtype):
    case = Case(16, 24, dtype=dtype)
    case.input = INPUTS[layout](torch.randn(2, 24, 11, 13).to(dtype).contiguous(memory_format=torch.channels_last))
    case.check()


def test_weights_of_any_strides():
    case = Case(16, 24)
    case.depthwise = case.depthwise.transpose(2, 3)
    case.pointwise = torch.randn(16, 24, 1, 1).transpose(0, 1)
    case.check()


def test_memory_around_the_input_is_not_read():
    case = Case(10, 24, (6, 7), norm=True, pre="silu", padding=(2, 3, 2, 3), k=5)
    around = torch.full((4, 16, 12, 13), float("nan")).contiguous(memory_format=torch.channels_last)
    around[1:3, 3:13, 3:9, 3:10] = case.input
    case.input = around[1:3, 3:13, 3:9, 3:10]
    case.check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_reaches_the_pixels_that_read_it_alone(activation):
    case = Case(16, 24, (9, 9), pre=activation, activation=activation)
    case.input[1, 5, 4, 4] = float("nan")
    output = case.run()[0]
    expected = torch.zeros(2, 9, 9, dtype=torch.bool)
    expected[1, 3:6, 3:6] = True
    assert torch.equal(output.isnan(), expected[:, None].expand_as(output))


PLANES = torch.contiguous_format


@pytest.mark.parametrize(("C", "CO"), [(3, 8), (24, 66), (70, 128)])
def test_planes_of_every_width_match_float64(C, CO):
    Case(C, CO, pre="relu", biased=True, layout=PLANES).check()


@pytest.mark.parametrize("size", [(1, 100), (70, 1), (19, 7)])
@pytest.mark.parametrize("geometry", [((1, 1), (1, 1)), ((3, 1), (2, 2))])
def test_planes_of_every_size_match_float64(size, geometry):
    Case(8, 24, size, stride=geometry[0], dilation=geometry[1], padding=(2, 2, 2, 3), layout=PLANES).check()


def test_everything_at_once_in_planes():
    Case(
        40, 24, stride=(2, 2), padding=(1, 2, 2, 1), pre="hardswish", mid="silu", activation="relu6", norm=True,
        mid_norm=True, output_norm=True, residual=True, statistics=True, layout=PLANES,
    ).check()  # fmt: skip


def test_planes_of_any_strides():
    case = Case(16, 24, layout=PLANES)
    case.input = torch.randn(3, 24, 23, 17)[::2, 3:19, 1:-1:2, 2:-2]
    case.check()


@pytest.mark.parametrize(
    ("CO", "stride", "layout"), [(24, (1, 1), PLANES), (66, (1, 1), torch.channels_last), (24, (2, 2), PLANES)]
)
def test_the_shape_of_a_tile_does_not_matter(monkeypatch, CO, stride, layout):
    case = Case(16, CO, (9, 35), N=1, stride=stride, norm=True, pre="relu", residual=True, layout=layout)
    outputs, choose = [], separable_conv.choose_tiles
    for rows, columns in ((1, 64), (2, 32), (4, 16), (4, 32)):
        shape = {"rows": rows, "columns": columns}
        monkeypatch.setattr(separable_conv, "choose_tiles", lambda *a, shape=shape: choose(*a)._replace(**shape))
        outputs.append(case.run()[0])
    case.check()
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])
