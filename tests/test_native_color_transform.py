"""The color_transform kernels of the CPU, at every ISA level and on any number of threads, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT16, FLOAT32, far_apart, narrow, same, widen
from native.images import laid_out
from numpy.typing import NDArray

cpu = build.load("native_cpu")
LEVELS = cpu.levels()
every_level = pytest.mark.parametrize("level", LEVELS)
BYTES = np.dtype(np.uint8)
ROUNDING = {FLOAT32: 2e-6, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-10}


def some(*shape: int, dtype: np.dtype = FLOAT32) -> NDArray:
    rng = np.random.default_rng(shape)
    return (
        rng.integers(256, size=shape, dtype=np.uint8) if dtype == BYTES else narrow(rng.standard_normal(shape), dtype)
    )


def wide(a: NDArray) -> NDArray:
    return a.astype(np.float64) if a.dtype == BYTES else widen(a).astype(np.float64)


class Case:
    """One problem, its results and what float64 says."""

    def __init__(
        self, n=2, c=3, m=10, o=3, size=(6, 7), *, image=FLOAT32, dtype=FLOAT32, slope=0.5, scale=None, residual=False
    ):  # fmt: skip
        self.image = some(n, c, *size, dtype=image)
        self.parameters: dict[str, NDArray | None] = {
            "weight1": some(m, c, dtype=dtype),
            "bias1": some(m, dtype=dtype),
            "weight2": some(o, m, dtype=dtype),
            "bias2": some(o, dtype=dtype),
            "mean": np.linspace(90, 120, c, dtype=np.float32) if image == BYTES else None,
        }
        self.scale = scale or (0.02 if image == BYTES else 1.0)
        self.slope, self.residual = slope, residual
        self.upstream = some(n, o, *size, dtype=dtype)

    def settings(self) -> tuple[Any, ...]:
        return list(self.parameters.values()), self.scale, self.slope, self.residual

    def output(self, level: str, threads: int = 1, reverse: bool = False, *, channels_last: bool = False) -> NDArray:
        return cpu.color_transform(level, threads, reverse, self.image, *self.settings(), channels_last)

    def gradients(
        self, level: str, threads: int = 1, reverse: bool = False, *, needed=None, channels_last: bool = False
    ) -> dict[str, NDArray]:
        needed = (self.image.dtype != BYTES, True) if needed is None else needed
        return cpu.color_transform_backward(
            level, threads, reverse, self.upstream, self.image, *self.settings(), needed, channels_last
        )

    def truth(self) -> tuple[NDArray, dict[str, NDArray], dict[str, NDArray]]:
        """The output, every gradient, and the sums of the terms' sizes of those that are sums over pixels."""
        w1, b1, w2, b2, mean = (None if p is None else wide(p) for p in self.parameters.values())

        def leaky(positive: NDArray, x: NDArray) -> NDArray:
            return np.where(positive, x, np.float64(np.float32(self.slope)) * x)

        scale = np.float64(np.float32(self.scale))
        x = (wide(self.image) - (0 if mean is None else mean[:, None, None])) * scale
        z1 = np.einsum("mc,nchw->nmhw", w1, x) + (0 if b1 is None else b1[:, None, None])
        h = leaky(z1 > 0, z1)
        z2 = np.einsum("om,nmhw->nohw", w2, h) + (0 if b2 is None else b2[:, None, None])
        z2 = z2 + x if self.residual else z2
        g2 = leaky(z2 > 0, wide(self.upstream))
        g1 = leaky(z1 > 0, np.einsum("om,nohw->nmhw", w2, g2))
        g0 = np.einsum("mc,nmhw->nchw", w1, g1) + (g2 if self.residual else 0)

        def sums(f: Any) -> dict[str, NDArray]:
            a1, a2 = f(g1), f(g2)
            return {
                "weight1": np.einsum("nmhw,nchw->mc", a1, f(x)),
                "bias1": a1.sum((0, 2, 3)),
                "weight2": np.einsum("nohw,nmhw->om", a2, f(h)),
                "bias2": a2.sum((0, 2, 3)),
            }

        return leaky(z2 > 0, z2), {"image": g0 * scale, **sums(np.asarray)}, sums(np.abs)

    def check(self, level: str, threads: int = 1, reverse: bool = False, *, channels_last: bool = False) -> None:
        output, grads, terms = self.truth()
        options: dict[str, Any] = {"channels_last": channels_last}
        near(in_order(self.output(level, threads, reverse, **options), channels_last), output, self.upstream.dtype)
        found = self.gradients(level, threads, reverse, **options)
        if "image" in found:
            near(in_order(found.pop("image"), channels_last), grads["image"], self.image.dtype)
        assert list(found) == ["weight1", "weight2", *(b for b in ("bias1", "bias2") if self.parameters[b] is not None)]
        for name, got in found.items():
            near(wide(got), grads[name], FLOAT32, terms[name])


def in_order(got: NDArray, channels_last: bool) -> NDArray:
    return wide(got).transpose(0, 3, 1, 2) if channels_last else wide(got)


def near(got: NDArray, truth: NDArray, dtype: np.dtype, terms: NDArray | None = None) -> None:
    assert got.shape == truth.shape
    allowed = ROUNDING[dtype] * np.linalg.norm(truth) + (0 if terms is None else 2.0**-22 * np.linalg.norm(terms))
    assert np.linalg.norm(got - truth) <= allowed


@every_level
@pytest.mark.parametrize("image", [*DTYPES.values(), BYTES], ids=[*DTYPES, "bytes"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_in_every_layout(level, dtype, image):
    for layout, channels_last, residual in itertools.product(
        ("nchw", "channels_last", "sliced"), (False, True), (False, True)
    ):
        case = Case(image=image, dtype=dtype, residual=residual)
        case.image, case.upstream = laid_out(case.image, layout), laid_out(case.upstream, layout)
        case.check(level, channels_last=channels_last)


@every_level
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (16, 8), (9, 15), (1, 300), (131, 1), (40, 33)])
def test_every_size(level, size, n):
    for image, channels_last in itertools.product((FLOAT32, BYTES), (False, True)):
        case = Case(n, size=size, image=image)
        layout = "channels_last" if channels_last else "nchw"
        case.image, case.upstream = laid_out(case.image, layout), laid_out(case.upstream, layout)
        case.check(level, channels_last=channels_last)


@every_level
@pytest.mark.parametrize("c", [1, 2, 3, 4, 9, 16])
@pytest.mark.parametrize("m", [1, 3, 5, 6, 10, 11, 16])
def test_every_width(level, c, m):
    for o, channels_last in itertools.product((1, 3, 7, 16), (False, True)):
        Case(1, c, m, o, residual=c == o).check(level, channels_last=channels_last)


@every_level
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0, 4.0])
def test_every_slope(level, slope):
    Case(slope=slope).check(level)
    Case(slope=slope, image=BYTES, residual=True).check(level)


@every_level
def test_biases_and_the_mean_may_be_absent(level):
    for absent in itertools.chain.from_iterable(
        itertools.combinations(("bias1", "bias2", "mean"), k) for k in (1, 2, 3)
    ):
        case = Case(image=BYTES, scale=0.01)
        case.parameters |= dict.fromkeys(absent)
        case.check(level)


@every_level
def test_a_scale_without_a_mean(level):
    Case(scale=0.25, residual=True).check(level)


@every_level
def test_parameters_of_any_strides(level):
    case = Case()
    for name, p in case.parameters.items():
        if p is not None:
            case.parameters[name] = np.repeat(p.T, 2, 0)[::2].T if p.ndim == 2 else np.repeat(p, 3)[::3]
    case.check(level)
    case.parameters["bias1"] = np.broadcast_to(some(1), 10)
    case.check(level)


@every_level
def test_images_without_memory_of_their_own(level):
    for shape in ((1, 1, 1, 1), (3, 1, 1, 1), (1, 3, 1, 1), (3, 1, 4, 5), (3, 3, 1, 5), (3, 3, 4, 1)):
        case = Case(3, size=(4, 5))
        case.image, case.upstream = (np.broadcast_to(some(*shape), (3, 3, 4, 5)) for _ in range(2))
        case.check(level)


@every_level
@pytest.mark.parametrize("dtype", [*DTYPES.values(), BYTES], ids=[*DTYPES, "bytes"])
def test_samples_more_than_32_bits_apart(level, dtype):
    case = Case(size=(5, 4), image=dtype)
    near_by = case.image
    flat = far_apart(near_by.reshape(2, -1))
    expected = case.output(level), case.gradients(level)
    case.image = np.lib.stride_tricks.as_strided(flat, near_by.shape, (flat.strides[0], *near_by.strides[1:]))
    assert same(case.output(level), expected[0])
    for name, grad in case.gradients(level).items():
        assert same(grad, expected[1][name]), name


@every_level
@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(level, needed):
    case = Case()
    everything = case.gradients(level)
    found = case.gradients(level, needed=needed)
    assert set(found) == {name for name in everything if needed[name != "image"]}
    assert all(same(grad, everything[name]) for name, grad in found.items())


@every_level
def test_threads_and_the_order_of_tasks_change_nothing(level):
    case = Case(3, size=(90, 61))
    expected = case.output(level), case.gradients(level)
    for threads, reverse in ((1, True), (2, False), (5, True)):
        assert same(case.output(level, threads, reverse), expected[0])
        for name, grad in case.gradients(level, threads, reverse).items():
            assert same(grad, expected[1][name]), name


@every_level
def test_sums_over_many_pixels_keep_their_digits(level):
    """All of one sign, which a float32 sum in order would lose."""
    case = Case(1, 3, 2, 1, size=(700, 500), image=BYTES)
    case.upstream = np.ones_like(case.upstream)
    case.parameters["bias2"] = np.full(1, 50, np.float32)
    _, truth, terms = case.truth()
    for name, got in case.gradients(level, 2).items():
        assert (np.abs(wide(got) - truth[name]) <= 2.0**-21 * terms[name]).all(), name
    assert case.gradients(level)["bias2"] == case.upstream.size


@every_level
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_pixel(level, value):
    for channels_last in (False, True):
        case = Case(2, size=(20, 33))
        case.image[1, 2, 7, 30] = value
        case.image = laid_out(case.image, "channels_last" if channels_last else "nchw")
        broken = np.zeros((2, 20, 33), bool)
        broken[1, 7, 30] = True
        output = in_order(case.output(level, channels_last=channels_last), channels_last)
        assert (~np.isfinite(output)).any(1).tolist() == broken.tolist()
        if np.isnan(value):
            assert (np.isnan(output).all(1) == broken).all()


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
