"""The conditioning kernels of the CPU, at every ISA level and on any number of threads, and those of CUDA, run by
tests/native/cuda_emulator.h, against float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT16, FLOAT32, far_apart, narrow, same, widen
from native.images import laid_out
from numpy.typing import NDArray

from perfvl.reference.conditioning import PROJECTION_CODES, PROJECTIONS

cpu, cuda = build.load("native_cpu"), build.load("native_cuda")
RNG = np.random.default_rng
ROUNDING = {FLOAT32: 2.0**-23, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}  # of one number, relative
SMALLEST = {FLOAT32: 1e-37, BFLOAT16: 1e-37, FLOAT16: 2.0**-24}  # and absolute
LAYOUTS = ("nchw", "channels_last", "sliced")


class Cpu(NamedTuple):
    level: str
    threads: int = 1
    reverse: bool = False  # tasks from the last to the first

    def __call__(self, op: str, *arguments: Any) -> Any:
        return getattr(cpu, op)(*self, *arguments)


class OneThread(NamedTuple):
    level: str

    def __call__(self, op: str, *arguments: Any) -> Any:
        return getattr(cpu, op)(*self, *arguments)


class Cuda(NamedTuple):
    reverse: bool = False  # blocks and threads last to first
    blocks: int = 0  # at most, in either direction of the grid; 0: as many as the launcher asks for

    def __call__(self, op: str, *arguments: Any) -> Any:
        cuda.set_order(self.reverse)
        cuda.set_grid_limit(self.blocks)
        try:
            return getattr(cuda, op)(*arguments)
        finally:
            cuda.set_order(False)
            cuda.set_grid_limit(0)


LEVELS = cpu.levels()
CUDAS = [Cuda(), Cuda(reverse=True)][: 1 if build.SANITIZED else 2]
OF_IMAGES = [*(Cpu(level) for level in LEVELS), *CUDAS]
OF_ROWS = [*(OneThread(level) for level in LEVELS), *CUDAS]
every_image_kernel = pytest.mark.parametrize("kernel", OF_IMAGES, ids=str)
every_row_kernel = pytest.mark.parametrize("kernel", OF_ROWS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_level = pytest.mark.parametrize("level", LEVELS)


class Case(NamedTuple):
    batch: int
    channels: int
    size: tuple[int, int]


CASES = [
    Case(1, 1, (1, 1)),
    Case(2, 5, (1, 1)),
    Case(3, 18, (1, 7)),
    Case(2, 33, (5, 1)),
    Case(2, 16, (2, 2)),
    Case(1, 1, (3, 2)),
    Case(3, 37, (4, 4)),
    Case(1, 140, (3, 5)),  # channels of two blocks
    Case(2, 3, (6, 40)),  # rows of several vectors
    Case(1, 17, (18, 17)),
    Case(1, 3, (30, 9)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.batch}-{case.channels}-{case.size}")


def some(*shape: int, dtype: np.dtype = FLOAT32) -> NDArray:
    return narrow(RNG(shape).standard_normal(shape), dtype)


def wide(a: NDArray) -> NDArray:
    return widen(a).astype(np.float64)


def seen(size: tuple[int, int]) -> NDArray:
    """[9, H, W]: 1 where a tap falls inside."""
    rows, columns = ([[0 <= i + k - 1 < n for i in range(n)] for k in range(3)] for n in size)
    return np.einsum("yh,xw->yxhw", np.array(rows, float), np.array(columns, float)).reshape(9, *size)


def in_order(got: NDArray, channels_last: bool) -> NDArray:
    return wide(got).transpose(0, 3, 1, 2) if channels_last else wide(got)


def close(got: NDArray, truth: NDArray, terms: NDArray, count: int, dtype: np.dtype) -> bool:
    """Every number within the rounding of float32 sums of `count` terms, of absolute sum `terms`, and of its dtype."""
    allowed = ROUNDING[dtype] * np.abs(truth) + count * 2.0**-24 * terms + SMALLEST[dtype]
    return got.shape == truth.shape and bool((np.abs(got - truth) <= allowed).all())


class TestTheTaps:
    @cases
    @every_dtype
    @every_image_kernel
    def test_pixels_get_the_taps_that_fall_inside(self, kernel, dtype, case):
        n, o, size = case
        taps, mask = some(n, 9, o), seen(size)
        for layout, strided in itertools.product(LAYOUTS, (False, True)):
            x = laid_out(some(n, o, *size, dtype=dtype), layout)
            given = np.repeat(np.repeat(taps, 2, 2), 3, 1)[:, ::3, ::2] if strided else taps
            parts = np.einsum("nto,thw->nohw", wide(taps), mask)
            terms = np.abs(wide(x)) + np.einsum("nto,thw->nohw", np.abs(wide(taps)), mask)
            channels_last = layout == "channels_last"
            got = in_order(kernel("add_taps", x, given, channels_last), channels_last)
            assert close(got, wide(x) + parts, terms, 12, dtype), (layout, strided)

    @cases
    @every_dtype
    @every_image_kernel
    def test_taps_get_the_pixels_that_see_them(self, kernel, dtype, case):
        n, o, size = case
        mask = seen(size)
        for layout in LAYOUTS:
            grad = laid_out(some(n, o, *size, dtype=dtype), layout)
            truth, terms = (np.einsum("nohw,thw->nto", f(wide(grad)), mask) for f in (np.array, np.abs))
            got = kernel("tap_sums", grad)
            assert close(wide(got), truth, terms, size[0] + size[1] + 20, FLOAT32), layout

    @every_image_kernel
    def test_layouts_without_memory_of_their_own(self, kernel):
        """Gradients of sums and means are expanded, images may be."""
        mask, full = seen((4, 5)), (3, 20, 4, 5)
        for shape in ((1, 1, 1, 1), (3, 1, 1, 1), (1, 20, 1, 1), (3, 1, 4, 5), (3, 20, 1, 5), (3, 20, 4, 1)):
            x = np.broadcast_to(some(*shape), full)
            truth, terms = (np.einsum("nohw,thw->nto", f(wide(x)), mask) for f in (np.array, np.abs))
            assert close(wide(kernel("tap_sums", x)), truth, terms, 30, FLOAT32), shape
            taps = some(3, 9, 20)
            for channels_last in (False, True):
                got = in_order(kernel("add_taps", x, taps, channels_last), channels_last)
                parts, sizes = (np.einsum("nto,thw->nohw", f(wide(taps)), mask) for f in (np.array, np.abs))
                assert close(got, wide(x) + parts, np.abs(wide(x)) + sizes, 12, FLOAT32), shape

    @every_image_kernel
    @every_dtype
    def test_samples_more_than_32_bits_apart(self, kernel, dtype):
        near = some(2, 6 * 3 * 4, dtype=dtype)
        steps = {False: (12, 4, 1), True: (1, 24, 6)}
        for channels_last, (c, h, w) in steps.items():
            images = [
                np.lib.stride_tricks.as_strided(
                    a, (2, 6, 3, 4), (a.strides[0], *(step * a.itemsize for step in (c, h, w)))
                )
                for a in (near, far_apart(near))
            ]
            taps = some(2, 9, 6)
            for arguments in (("add_taps", taps, channels_last), ("tap_sums",)):
                found = [kernel(arguments[0], x, *arguments[1:]) for x in images]
                assert same(*found), arguments[0]

    @every_image_kernel
    def test_what_is_not_finite_stays_in_its_channel(self, kernel):
        for value in (np.inf, -np.inf, np.nan):
            grad, taps = some(1, 20, 5, 19), some(1, 9, 20)
            grad[0, 7, 2, 3], taps[0, 0, 4] = value, value  # an inner pixel; a tap outside for the first row and column
            for layout in LAYOUTS:
                sums = kernel("tap_sums", laid_out(grad, layout))
                assert np.isfinite(sums).all((0, 1)).tolist() == [c != 7 for c in range(20)]
                last = layout == "channels_last"
                out = in_order(kernel("add_taps", laid_out(some(1, 20, 5, 19), layout), taps, last), last)
                finite = np.isfinite(out)
                assert finite[0, np.arange(20) != 4].all()
                assert (finite[0, 4] == (seen((5, 19))[0] == 0)).all()

    @every_level
    @every_dtype
    @pytest.mark.parametrize(
        ("batch", "dim", "outputs"),
        [(1, 1, 1), (2, 7, 5), (16, 64, 16), (17, 65, 33), (3, 130, 40), (40, 3, 20)],
    )
    def test_a_condition_has_nine_products(self, level, dtype, batch, dim, outputs):
        for i, layout in enumerate(LAYOUTS):
            condition, weight = some(batch, dim, dtype=dtype), some(outputs, dim, 3, 3, dtype=dtype)
            given = np.repeat(condition, 2, 1)[:, ::2] if i else condition
            truth, terms = (
                np.einsum("ne,oeyx->nyxo", f(wide(condition)), f(wide(weight))).reshape(batch, 9, outputs)
                for f in (np.array, np.abs)
            )
            got = Cpu(level)("condition_taps", given, laid_out(weight, layout))
            assert close(wide(got), truth, terms, dim + 2, FLOAT32), layout

    @every_level
    def test_condition_and_weight_of_two_dtypes(self, level):
        condition, weight = some(3, 20), some(7, 20, 3, 3, dtype=BFLOAT16)
        widened = Cpu(level)("condition_taps", condition, widen(weight))
        assert same(Cpu(level)("condition_taps", condition, weight), widened)

    @every_level
    def test_the_number_of_threads_changes_nothing(self, level):
        """Of problems that are worth three threads."""
        x, taps = some(3, 70, 32, 32), some(3, 9, 70)
        condition, weight = some(20, 32), some(70, 32, 3, 3)
        for layout in LAYOUTS:
            image, last = laid_out(x, layout), layout == "channels_last"
            calls = [
                ("condition_taps", condition, laid_out(weight, layout)),
                ("add_taps", image, taps, last),
                ("tap_sums", image),
            ]
            for call in calls:
                alone = Cpu(level)(*call)
                for schedule in ((2, False), (3, False), (3, True)):
                    assert same(Cpu(level, *schedule)(*call), alone), call[0]

    @every_level
    def test_a_batch_of_nothing(self, level):
        for threads in (1, 3):
            run = Cpu(level, threads)
            assert run("add_taps", some(0, 5, 4, 4), some(0, 9, 5), False).shape == (0, 5, 4, 4)
            assert run("tap_sums", some(0, 5, 4, 4)).shape == (0, 9, 5)
            assert run("condition_taps", some(0, 6), some(5, 6, 3, 3)).shape == (0, 9, 5)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_cuda_needs_no_particular_number_of_blocks(self, layout):
        x, taps = laid_out(some(3, 40, 5, 7), layout), some(3, 9, 40)
        for call in (("add_taps", x, taps, layout == "channels_last"), ("tap_sums", x)):
            many = Cuda()(*call)
            assert all(same(Cuda(blocks=blocks)(*call), many) for blocks in (1, 2)), call[0]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_one_launch_each(self, layout):
        x = laid_out(some(2, 20, 5, 6), layout)
        for call in (("add_taps", x, some(2, 9, 20), False), ("tap_sums", x)):
            before = cuda.launches()
            Cuda()(*call)
            assert cuda.launches() == before + 1


def sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def of_projection(x: NDArray, activation: str) -> NDArray:
    """[N, 2 e] in float64."""
    if activation == "glu":
        half = x.shape[1] // 2
        return x[:, :half] * sigmoid(x[:, half:])
    slope = {"none": 1.0, "relu": 0.0, "leaky_relu": float(np.float32(0.2))}[activation]
    return np.where(x > 0, x, slope * x)


def strided(a: NDArray, i: int) -> NDArray:
    """The same values: dense, transposed, with room between rows, with room between columns."""
    return (a, np.ascontiguousarray(a.T).T, np.repeat(a, 2, 0)[::2], np.repeat(a, 3, 1)[:, ::3])[i]


every_activation = pytest.mark.parametrize("activation", PROJECTIONS)
shapes = pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 5), (4, 16), (2, 33), (16, 128)])


class TestTheAugmentation:
    @shapes
    @every_dtype
    @every_activation
    @every_row_kernel
    def test_condition_and_divergence(self, kernel, activation, dtype, rows, dim):
        parts = 4 if activation == "glu" else 2
        for i in range(4):
            projected, eps = strided(some(rows, parts * dim, dtype=dtype), i), strided(some(rows, dim, dtype=dtype), i)
            found = kernel("augment", projected, eps, PROJECTION_CODES[activation])
            condition, mu, logvar = (wide(a) for a in found[:3])
            exact = of_projection(wide(projected), activation)
            slack = 1e-6 * np.abs(wide(projected)[:, : 2 * dim])
            allowed = ROUNDING[dtype] * np.abs(exact) + slack + SMALLEST[dtype]
            assert (np.abs(np.hstack([mu, logvar]) - exact) <= allowed).all()
            check_condition(condition, mu, logvar, wide(eps), dtype)
            divergence = 0.5 * (mu**2 + np.expm1(logvar) - logvar).mean()
            np.testing.assert_allclose(found[3], divergence, rtol=1e-6)

    @every_activation
    @every_row_kernel
    def test_numbers_are_stored_as_their_dtype_rounds_them(self, kernel, activation):
        """What is saved for backward is what the condition and the divergence were computed from."""
        for dtype in (BFLOAT16, FLOAT16):
            projected = some(3, (4 if activation == "glu" else 2) * 20, dtype=dtype)
            eps = some(3, 20, dtype=dtype)
            _, mu, logvar, kl = kernel("augment", projected, eps, PROJECTION_CODES[activation])
            again = kernel("augment", np.hstack([mu, logvar]), eps, PROJECTION_CODES["none"])
            np.testing.assert_allclose(kl, again[3], rtol=1e-6)

    @every_row_kernel
    def test_divergence_next_to_the_normal_distribution(self, kernel):
        for logvar in (1e-20, 1e-6, -1e-4, 1e-3, -0.03, 0.5, -0.999, 0.9999, 1.0, -1.0, 1.5, -30.0, 80.0):
            projected = np.zeros((2, 40), np.float32)
            projected[:, 20:] = logvar
            kl = kernel("augment", projected, some(2, 20), PROJECTION_CODES["none"])[3]
            v = np.float64(np.float32(logvar))
            # e^v - 1 - v: near 0 by its first terms, for float64 loses digits too.
            truth = 0.5 * (v**2 / 2 + v**3 / 6 + v**4 / 24 if abs(v) < 1e-2 else np.expm1(v) - v)
            np.testing.assert_allclose(kl, truth, rtol=5e-6 if abs(v) > 20 else 1e-6, atol=1e-37)

    @every_row_kernel
    def test_numbers_of_any_size(self, kernel):
        """Infinities, what is not a number, and exponentials that leave float32 on either side."""
        values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 88.0, 89.0, 180.0, -90.0, -250.0, 1e30], np.float32)
        mus, logvars = (a.reshape(1, -1) for a in np.meshgrid(values, values))
        for activation in ("none", "relu", "leaky_relu"):
            projected = np.hstack([mus, logvars])
            found = kernel("augment", projected, np.full_like(mus, 0.5), PROJECTION_CODES[activation])
            with np.errstate(all="ignore"):
                mu, logvar = of_numbers(mus, activation), of_numbers(logvars, activation)
                condition = mu + np.float32(0.5) * np.exp(logvar / 2).astype(np.float32)
            np.testing.assert_array_equal(found[1], mu)
            np.testing.assert_array_equal(found[2], logvar)
            np.testing.assert_allclose(found[0], condition, rtol=2e-5, atol=1e-37)

    @every_activation
    @every_dtype
    @shapes
    @every_row_kernel
    def test_gradients(self, kernel, activation, dtype, rows, dim):
        glu = activation == "glu"
        made = iter(RNG((rows, dim)).standard_normal((8, rows, 4 * dim)))
        x = narrow(next(made)[:, : (4 if glu else 2) * dim], dtype)
        grads = [narrow(next(made)[:, :dim], dtype) for _ in range(3)]
        eps, kl = narrow(next(made)[:, :dim], dtype), np.array(3.0, np.float32)
        stored = narrow(of_projection(wide(x), activation), dtype)
        for number, wanted in enumerate(itertools.product((True, False), repeat=4)):
            upstream = [g if w else None for g, w in zip((*grads, kl), wanted, strict=True)]
            given = [None if g is None or g.ndim != 2 else strided(g, number % 4) for g in upstream[:3]]
            mu, logvar = strided(stored[:, :dim], number % 4), strided(stored[:, dim:], number % 4)
            arguments = mu, logvar, strided(eps, (number + 1) % 4), x if glu else None, PROJECTION_CODES[activation]
            got = wide(kernel("augment_backward", (*given, upstream[3]), *arguments))
            truth, terms = gradient(wide(x), wide(stored), upstream, wide(eps), activation)
            assert close(got, truth, terms, 40, dtype), wanted

    @every_row_kernel
    def test_gradient_of_the_divergence_next_to_the_normal_distribution(self, kernel):
        for logvar in (1e-20, 1e-6, -1e-4, 1e-3, 0.5, -0.999, 1.0, -30.0, 60.0):
            v = np.full((1, 20), logvar, np.float32)
            upstream = (None, None, None, np.array(40.0, np.float32))
            got = kernel("augment_backward", upstream, 0 * v, v, v, None, PROJECTION_CODES["none"])
            np.testing.assert_allclose(got[:, 20:], np.expm1(v.astype(np.float64)), rtol=5e-6)
            assert not got[:, :20].any()

    @pytest.mark.parametrize(("rows", "launches"), [(128, 1), (129, 2)])
    def test_rows_for_one_block_and_for_several(self, rows, launches):
        projected, eps, none = some(rows, 256), some(rows, 128), PROJECTION_CODES["none"]
        before = cuda.launches()
        *_, kl = Cuda()("augment", projected, eps, none)
        assert cuda.launches() == before + launches
        exact = wide(projected)
        truth = 0.5 * (exact[:, :128] ** 2 + np.expm1(exact[:, 128:]) - exact[:, 128:]).mean()
        np.testing.assert_allclose(kl, truth, rtol=1e-6)
        assert same(Cuda(reverse=True)("augment", projected, eps, none)[3], kl)

    def test_backward_needs_no_particular_number_of_blocks(self):
        x, eps, upstream = some(9, 200), some(9, 100), [some(9, 100), None, None, np.array(1.0, np.float32)]
        arguments = upstream, x[:, :100], x[:, 100:], eps, None, PROJECTION_CODES["relu"]
        many = Cuda()("augment_backward", *arguments)
        assert same(Cuda(blocks=1)("augment_backward", *arguments), many)


def check_condition(condition: NDArray, mu: NDArray, logvar: NDArray, eps: NDArray, dtype: np.dtype) -> None:
    exact, size = mu + eps * np.exp(logvar / 2), np.abs(mu) + np.abs(eps) * np.exp(logvar / 2)
    assert (np.abs(condition - exact) <= ROUNDING[dtype] * np.abs(exact) + 1e-6 * size + SMALLEST[dtype]).all()


def of_numbers(x: NDArray, activation: str) -> NDArray:
    """Of numbers of any kind, in float32."""
    negative = {"none": x, "relu": np.zeros_like(x), "leaky_relu": x * np.float32(0.2)}[activation]
    return np.where(x < 0, negative, x)


def gradient(
    x: NDArray, stored: NDArray, upstream: list[NDArray | None], eps: NDArray, activation: str
) -> tuple[NDArray, NDArray]:
    """The projection's gradient, and the sum of its terms without their signs, from which its rounding comes."""
    dim = eps.shape[1]
    mu, logvar = stored[:, :dim], stored[:, dim:]
    condition, of_mu, of_logvar, kl = (0.0 if g is None else wide(g) for g in upstream)
    sigma, share = np.exp(logvar / 2), kl / mu.size
    whole = np.hstack([condition + of_mu + share * mu, condition * eps * sigma / 2 + of_logvar])
    whole[:, dim:] += share / 2 * np.expm1(logvar)
    size = np.hstack(
        [
            np.abs(condition) + np.abs(of_mu) + np.abs(share * mu),
            np.abs(condition * eps * sigma) + np.abs(of_logvar) + np.abs(share * np.expm1(logvar)),
        ]
    )
    if activation == "glu":
        value, gate = x[:, : 2 * dim], sigmoid(x[:, 2 * dim :])
        found = [np.hstack([g * gate, g * value * f]) for g, f in ((whole, gate * (1 - gate)), (size, gate))]
        return found[0], np.abs(found[1])
    slope = {"none": 1.0, "relu": 0.0, "leaky_relu": float(np.float32(0.2))}[activation]
    return np.where(stored > 0, whole, slope * whole), size


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
