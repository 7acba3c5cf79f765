"""The kernels of maxout and apl of the CPU, at every ISA level and on any number of threads, against float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT16, FLOAT32, narrow, same, widen
from numpy.typing import NDArray

cpu = build.load("native_cpu")
RNG = np.random.default_rng
ROUNDING = {FLOAT32: 2.0**-24, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}  # of one number, relative
SMALLEST = {FLOAT32: 1e-37, BFLOAT16: 1e-37, FLOAT16: 2.0**-24}  # and absolute
NAN, INF = np.nan, np.inf


class Kernel(NamedTuple):
    level: str
    threads: int = 1
    reverse: bool = False  # tasks from the last to the first

    def __call__(self, op: str, *arguments: Any) -> Any:
        return getattr(cpu, op)(*self, *arguments)


LEVELS = cpu.levels()
every_level = pytest.mark.parametrize("kernel", [Kernel(level) for level in LEVELS], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def some(*shape: int, dtype: np.dtype = FLOAT32, size: float = 1.0) -> NDArray:
    return narrow(size * RNG(shape).standard_normal(shape), dtype)


def wide(a: NDArray) -> NDArray:
    return widen(a).astype(np.float64)


# Maxout ---------------------------------------------------------------------------------------------------------------

# Rows, columns, pieces: around whole vectors, rows of a task together, one row in two tasks.
TABLES = [(1, 1, 1), (3, 5, 1), (3, 5, 2), (2, 16, 3), (5, 33, 5), (1000, 17, 2), (7, 300, 3), (1, 16390, 2)]
tables = pytest.mark.parametrize("table", TABLES, ids=str)


def last_largest(values: NDArray) -> NDArray:
    """The place of the last of the largest along axis 1."""
    return values.shape[1] - 1 - np.flip(values, 1).argmax(1)


@tables
@every_dtype
@every_level
def test_the_last_of_the_largest_pieces_wins(kernel, dtype, table):
    rows, columns, pieces = table
    x = some(rows, pieces, columns, dtype=dtype)
    place = last_largest(wide(x))
    output, winner = kernel("maxout", x, True)
    assert same(output, np.take_along_axis(x, place[:, None], 1)[:, 0])
    assert np.array_equal(winner, place)
    alone, nothing = kernel("maxout", x, False)
    assert same(alone, output)
    assert nothing.size == 0


@tables
@every_dtype
@every_level
def test_the_winner_alone_gets_the_gradient(kernel, dtype, table):
    *shape, pieces = table
    grad = some(*shape, dtype=dtype)
    winner = RNG(pieces).integers(0, pieces, shape).astype(np.uint8)
    expected = np.where(winner[:, None] == np.arange(pieces)[:, None], grad[:, None], np.zeros((), dtype))
    assert same(kernel("maxout_backward", grad, winner, pieces), expected)


@every_dtype
@every_level
def test_as_many_pieces_as_a_byte_can_name(kernel, dtype):
    x = some(2, 256, 9, dtype=dtype)
    x[0, 255], x[1, 0] = narrow(np.full(9, 99.0), dtype), narrow(np.full(9, 99.0), dtype)
    output, winner = kernel("maxout", x, True)
    assert (wide(output) == 99).all()
    assert winner[:, 0].tolist() == [255, 0]
    grad = kernel("maxout_backward", some(2, 9, dtype=dtype), winner, 256)
    assert grad[0, 255].any()
    assert not grad[0, :255].any()


@every_dtype
@every_level
def test_zeros_of_both_signs_are_equal_and_nan_and_infinity_win(kernel, dtype):
    first = [1.0, 0.0, -0.0, NAN, 3.0, NAN, INF, -INF, INF, -INF]
    second = [1.0, -0.0, 0.0, 5.0, NAN, NAN, INF, -INF, -INF, INF]
    expected = [1, 1, 1, 0, 1, 1, 1, 1, 0, 1]
    # Every place of a vector.
    x = np.stack([np.tile(narrow(np.array(row), dtype), 7) for row in (first, second)])[None]
    output, winner = kernel("maxout", x, True)
    assert winner[0].tolist() == 7 * expected
    assert same(output[0], np.where(winner[0] == 1, x[0, 1], x[0, 0]))
    assert np.array_equal(np.signbit(wide(output[0]))[1:3], [True, False])


@every_dtype
@every_level
def test_the_smallest_numbers_are_kept(kernel, dtype):
    bits = np.arange(1, 40, dtype=np.uint16).view(dtype) if dtype != FLOAT32 else np.arange(1, 40, dtype=np.uint32)
    x = np.stack([bits.view(dtype), np.zeros(39, dtype)])[None]
    output, winner = kernel("maxout", x, True)
    assert np.array_equal(output[0].view(bits.dtype), bits)
    assert not winner.any()
    assert np.array_equal(kernel("maxout_backward", output, winner, 2)[0, 0].view(bits.dtype), bits)


# APL ------------------------------------------------------------------------------------------------------------------

# Outer, parameters, inner: planes of NCHW; then columns with parameters of their own.
UNITS = [
    (1, 1, 2),
    (3, 5, 7),
    (2, 40, 49),  # parameters of two tasks
    (70, 3, 33),
    (1, 2, 9000),
    (1, 1, 1),
    (3, 5, 1),
    (9, 33, 1),
    (300, 96, 1),
    (6, 2500, 1),  # parameters of several tasks
    (500, 70, 1),  # parts
]
units = pytest.mark.parametrize("unit", UNITS, ids=str)
every_segment = pytest.mark.parametrize("segments", [2, 5] if build.SANITIZED else [1, 2, 5, 6])


def parameters(segments: int, count: int) -> tuple[NDArray, NDArray]:
    return some(segments, count, size=0.3), some(segments, count + 1, size=0.5)[:, :count].copy()


class Truth(NamedTuple):
    """Of [outer, parameters, inner], in float64; and the sums of its terms without their signs."""

    output: NDArray
    grad_input: NDArray
    grad_slope: NDArray
    grad_hinge: NDArray
    output_terms: NDArray
    input_terms: NDArray
    slope_terms: NDArray
    hinge_terms: NDArray


def truth(x: NDArray, slope: NDArray, hinge: NDArray, grad: NDArray) -> Truth:
    a, b = slope[:, None, :, None].astype(np.float64), hinge[:, None, :, None].astype(np.float64)
    below, passed = np.maximum(0, b - x), x < b
    positive = np.maximum(0, x)
    return Truth(
        positive + (a * below).sum(0),
        grad * ((x > 0) - (a * passed).sum(0)),
        (grad * below).sum((1, 3)),
        slope * (grad * passed).sum((1, 3)),
        positive + (np.abs(a) * below).sum(0),
        np.abs(grad) * (1 + np.abs(a).sum(0)),
        (np.abs(grad) * below).sum((1, 3)),
        np.abs(slope) * (np.abs(grad) * passed).sum((1, 3)),
    )


def close(got: NDArray, true: NDArray, terms: NDArray, count: float, dtype: np.dtype) -> bool:
    """Within the rounding of float32 sums of `count` terms, of absolute sum `terms`, and of the dtype."""
    allowed = ROUNDING[dtype] * np.abs(true) + (count + 4) * 2.0**-24 * terms + SMALLEST[dtype]
    return got.shape == true.shape and bool((np.abs(wide(got) - true) <= allowed).all())


@units
@every_segment
@every_dtype
@every_level
def test_units_and_all_their_gradients(kernel, dtype, segments, unit):
    x, grad = some(*unit, dtype=dtype), some(*unit[::-1], dtype=dtype).reshape(unit)
    slope, hinge = parameters(segments, unit[1])
    true = truth(wide(x), slope, hinge, wide(grad))
    assert close(kernel("apl", x, slope, hinge), true.output, true.output_terms, segments, dtype)
    found = kernel("apl_backward", grad, x, slope, hinge)
    assert close(found[0], true.grad_input, true.input_terms, segments, dtype)
    count = np.sqrt(unit[0] * unit[2]) + 16  # sums of lanes and parts
    assert close(found[1], true.grad_slope, true.slope_terms, count, FLOAT32)
    assert close(found[2], true.grad_hinge, true.hinge_terms, count, FLOAT32)


@every_dtype
@every_level
@pytest.mark.parametrize("columns", [1024, 1001])
def test_results_that_go_past_the_caches_are_the_same(kernel, dtype, columns):
    rows = 2200 if dtype != FLOAT32 else 1100  # more than four megabytes
    few, slope, hinge = some(11, columns, 1, dtype=dtype), *parameters(2, columns)
    x = np.tile(few, (rows // 11, 1, 1))
    grad = x[::-1].copy()
    for many, right in (
        (kernel("apl", x, slope, hinge), kernel("apl", few, slope, hinge)),
        (kernel("apl_backward", grad, x, slope, hinge)[0], kernel("apl_backward", grad[:11], few, slope, hinge)[0]),
    ):
        assert same(many, np.tile(right, (rows // 11, 1, 1)))


@every_level
@pytest.mark.parametrize("unit", [(2, 40, 49), (70, 3, 233), (6, 2500, 1), (500, 70, 1)], ids=str)
def test_neither_threads_nor_the_order_of_tasks_change_a_bit(kernel, unit):
    x, grad, (slope, hinge) = some(*unit), some(*unit[::-1]).reshape(unit), parameters(2, unit[1])
    expected = [kernel("apl", x, slope, hinge), *kernel("apl_backward", grad, x, slope, hinge)]
    for threads, reverse in itertools.product((1, 3), (False, True)):
        other = Kernel(kernel.level, threads, reverse)
        found = [other("apl", x, slope, hinge), *other("apl_backward", grad, x, slope, hinge)]
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        table = some(300, 2, 170)
        assert all(same(a, b) for a, b in zip(other("maxout", table, True), kernel("maxout", table, True), strict=True))


@every_level
@pytest.mark.parametrize("inner", [1, 40])
def test_what_is_at_a_kink_passes_nothing(kernel, inner):
    x = np.zeros((1, 20, inner), np.float32)
    slope, hinge = np.ones((1, 20), np.float32), np.zeros((1, 20), np.float32)
    assert not kernel("apl", x, slope, hinge).any()
    assert not any(g.any() for g in kernel("apl_backward", np.ones_like(x), x, slope, hinge))


@every_level
@pytest.mark.parametrize("inner", [1, 40])
def test_nan_and_infinities_as_torch_has_them(kernel, inner):
    x = np.zeros((3, 4, inner), np.float32)
    x[0, 1, 0], x[1, 2, 0], x[2, 3, 0] = NAN, INF, -INF
    slope, hinge = np.full((2, 4), 0.5, np.float32), np.full((2, 4), 0.25, np.float32)
    output = kernel("apl", x, slope, hinge)
    assert np.array_equal(np.isnan(output), np.isnan(x))
    assert output[1, 2, 0] == output[2, 3, 0] == INF
    grad_input, grad_slope, grad_hinge = kernel("apl_backward", np.ones_like(x), x, slope, hinge)
    assert grad_input[0, 1, 0] == 0  # 1 - 0.5 - 0.5
    assert grad_input[1, 2, 0] == 1
    assert grad_input[2, 3, 0] == -1
    assert np.isnan(grad_slope).tolist() == 2 * [[False, True, False, False]]
    assert np.isinf(grad_slope).tolist() == 2 * [[False, False, False, True]]
    np.testing.assert_allclose(grad_hinge, 2 * [[1.5 * inner, 1.5 * inner, 1.5 * inner - 0.5, 1.5 * inner]])


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
