"""The kernels of norm_act of the CPU, at every ISA level and on any number of threads, against float64."""

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
EPS, MOMENTUM = 1e-3, 0.25


class Kernel(NamedTuple):
    level: str
    threads: int = 1
    reverse: bool = False  # tasks from the last to the first

    def __call__(self, op: str, *arguments: Any) -> Any:
        return getattr(cpu, op)(*self, *arguments)


LEVELS = cpu.levels()
every_level = pytest.mark.parametrize("kernel", [Kernel(level) for level in LEVELS], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "tanh", "sigmoid")
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_order = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
PARAMETER = 0.75


def settings(activation: str, *, after: bool = False, training: bool = True) -> tuple:
    return training, after, ACTIVATIONS.index(activation), PARAMETER, EPS, MOMENTUM


def some(*shape: int, dtype: np.dtype = FLOAT32, size: float = 1.0, mean: float = 0.0) -> NDArray:
    return narrow(mean + size * RNG(shape).standard_normal(shape), dtype)


def wide(a: NDArray) -> NDArray:
    return widen(a).astype(np.float64)


def act(name: str, x: NDArray) -> NDArray:
    with np.errstate(over="ignore"):
        return {
            "identity": lambda: x,
            "relu": lambda: np.maximum(x, 0),
            "leaky_relu": lambda: np.where(x > 0, x, PARAMETER * x),
            "elu": lambda: np.where(x > 0, x, PARAMETER * np.expm1(x)),
            "tanh": lambda: np.tanh(x),
            "sigmoid": lambda: 1 / (1 + np.exp(-x)),
        }[name]()


def slope(name: str, x: NDArray) -> NDArray:
    return {
        "identity": lambda: np.ones_like(x),
        "relu": lambda: (x > 0) * 1.0,
        "leaky_relu": lambda: np.where(x > 0, 1, PARAMETER),
        "elu": lambda: np.where(x > 0, 1, PARAMETER * np.exp(np.minimum(x, 0))),
        "tanh": lambda: 1 - np.tanh(x) ** 2,
        "sigmoid": lambda: act(name, x) * act(name, -x),
    }[name]()


def channels(values: NDArray) -> NDArray:
    return values.astype(np.float64)[None, :, None]


class Truth(NamedTuple):
    """Of [outer, channels, inner], in float64."""

    output: NDArray
    mean: NDArray
    variance: NDArray
    grad_input: NDArray
    grad_weight: NDArray
    grad_bias: NDArray
    before: NDArray  # what is normalised, and what the activation sees: kinks are where it changes sign


def truth(x: NDArray, weight: NDArray, bias: NDArray, grad: NDArray, name: str, after: bool, given: Any) -> Truth:
    z = act(name, x) if after else x
    mean, variance = (z.mean((0, 2)), z.var((0, 2))) if given is None else given
    inverse = 1 / np.sqrt(channels(variance) + EPS)
    normal = (z - channels(mean)) * inverse
    y = normal * channels(weight) + channels(bias)
    g = grad if after else grad * slope(name, y)
    by_bias, by_weight = g.sum((0, 2)), (g * normal).sum((0, 2))
    dz = g * channels(weight) * inverse
    if given is None:
        count = x.shape[0] * x.shape[2]
        dz -= (channels(by_bias) + normal * channels(by_weight)) / count * channels(weight) * inverse
    dx = dz * slope(name, x) if after else dz
    return Truth(y if after else act(name, y), mean, variance, dx, by_weight, by_bias, x if after else y)


def close(got: NDArray, true: NDArray, dtype: np.dtype, size: float, where: Any = True) -> bool:
    """Within the rounding of the dtype, and of float32 arithmetic on numbers of a size."""
    allowed = ROUNDING[dtype] * np.abs(true) + 24 * 2.0**-24 * size + SMALLEST[dtype]
    return got.shape == true.shape and bool(((np.abs(wide(got) - true) <= allowed) | ~np.asarray(where)).all())


# Outer, channels, inner: planes of NCHW; then columns.
SIZES = [
    (3, 5, 2),
    (3, 5, 7),
    (9, 40, 49),  # several channels to a task
    (70, 3, 33),  # parts
    (1, 2, 9000),  # sums of several runs
    (5, 1, 3),
    (30, 1, 1),
    (300, 5, 1),
    (9, 33, 1),
    (6, 1300, 1),  # channels of several tasks
    (1500, 70, 1),  # parts
]
sizes = pytest.mark.parametrize("size", SIZES if not build.SANITIZED else SIZES[::2], ids=str)


def check(kernel: Kernel, size: tuple[int, ...], name: str, dtype: np.dtype, *, after: bool, training: bool) -> None:
    x, grad = some(*size, dtype=dtype, mean=0.5), some(*size[::-1], dtype=dtype).reshape(size)
    weight, bias = some(size[1], mean=1.0, size=0.3), some(size[1] + 1)[1:].copy()
    running_mean, running_var = some(size[1] + 2)[2:].copy(), 0.5 + np.abs(some(size[1] + 3)[3:])
    given = None if training else (running_mean, running_var)
    true = truth(wide(x), weight, bias, wide(grad), name, after, given)
    s = settings(name, after=after, training=training)

    output, mean, variance, moved_mean, moved_var = kernel("norm_act", x, weight, bias, running_mean, running_var, s)
    assert close(output, true.output, dtype, 8)
    assert close(mean, true.mean, FLOAT32, 0.25)
    assert close(variance, true.variance, FLOAT32, 0.25 + true.variance.max())
    keep, count = 1 - MOMENTUM, size[0] * size[2]
    unbiased = true.variance * count / (count - 1)
    expected = (running_mean, running_var)
    if training:
        expected = keep * running_mean + MOMENTUM * true.mean, keep * running_var + MOMENTUM * unbiased
    np.testing.assert_allclose(moved_mean, expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moved_var, expected[1], rtol=1e-6, atol=1e-6)

    found = kernel("norm_act_backward", grad, x, weight, bias, mean, variance, s, (True, True))
    clear = np.abs(true.before) > 1e-5  # of the activation's kink
    steep = np.abs(channels(weight) / np.sqrt(channels(true.variance) + EPS)).max()
    assert close(found[0], true.grad_input, dtype, 8 * steep, clear)
    size_of_sums = np.sqrt(count) * 4 + np.abs(~clear).sum() * 1e6
    assert close(found[1], true.grad_weight, FLOAT32, size_of_sums)
    assert close(found[2], true.grad_bias, FLOAT32, size_of_sums)


@sizes
@every_activation
@every_order
@every_level
def test_norm_and_activation_and_all_their_gradients(kernel, after, activation, size):
    for training in (True, False):
        check(kernel, size, activation, FLOAT32, after=after, training=training)


@pytest.mark.parametrize("size", [(3, 5, 7), (9, 40, 49), (9, 33, 1), (300, 70, 1)], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
@every_activation
@every_order
@every_level
def test_half_precision_is_rounded_once(kernel, after, activation, dtype, size):
    for training in (True, False):
        check(kernel, size, activation, dtype, after=after, training=training)


def alone(kernel: Kernel, name: str, x: NDArray) -> tuple[NDArray, NDArray]:
    """An activation and its derivative, behind a norm that changes nothing."""
    shape = (len(x), 1, 1)
    s = (False, False, ACTIVATIONS.index(name), PARAMETER, 0.0, MOMENTUM)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    output = kernel("norm_act", x.reshape(shape), None, None, zero, one, s)[0]
    grad = kernel("norm_act_backward", np.ones(shape, np.float32), x.reshape(shape), None, None, zero, one, s, (1, 0))
    return output.ravel(), grad[0].ravel()


@every_activation
@every_level
def test_functions_and_derivatives_to_the_last_digits(kernel, activation):
    tiny = 10.0 ** np.linspace(-30, 2, 4000)
    x = np.concatenate([tiny, -tiny, np.linspace(-90, 90, 5000)]).astype(np.float32)
    output, derivative = alone(kernel, activation, x)
    true = act(activation, x.astype(np.float64))
    # Exponentials end at e^-87.
    assert (np.abs(output - true) <= 4 * 2.0**-24 * np.abs(true) + 2e-38).all()
    true = slope(activation, x.astype(np.float64))
    # Of y (1 - y) and 1 - y^2 the errors are those of y, of the second twice.
    allowed = 4 * 2.0**-24 * {"sigmoid": 1, "tanh": 2}.get(activation, np.abs(true))
    assert (np.abs(derivative - true) <= allowed + 2e-38).all()


@every_activation
@every_level
def test_zeros_nan_and_infinities_as_torch_has_them(kernel, activation):
    output, derivative = alone(kernel, activation, np.array([0.0, -0.0, NAN, INF, -INF], np.float32))
    low = {"identity": -INF, "relu": 0, "leaky_relu": -INF, "elu": -PARAMETER, "tanh": -1, "sigmoid": 0}[activation]
    high = 1 if activation in ("tanh", "sigmoid") else INF
    middle = 0.5 if activation == "sigmoid" else 0
    np.testing.assert_allclose(output, [middle, middle, NAN, high, low], atol=1e-37)
    at_zero = {"identity": 1, "relu": 0, "leaky_relu": PARAMETER, "elu": PARAMETER, "tanh": 1, "sigmoid": 0.25}
    np.testing.assert_array_equal(derivative[:2], 2 * [at_zero[activation]])
    assert np.isnan(derivative[2]) == (activation in ("tanh", "sigmoid"))


@pytest.mark.parametrize("inner", [1, 225])
@pytest.mark.parametrize("odd", [None, 1e4, -1e6], ids=str)
@every_level
def test_the_variance_keeps_its_digits_far_from_zero(kernel, odd, inner):
    x = some(1800 // inner, 20, inner, mean=1e4 if odd is None else 0.0)
    if odd is not None:
        x[0, :, 0] = odd  # the element from which distances are measured
    zero = np.zeros(20, np.float32)
    _, mean, variance, *_ = kernel("norm_act", x, None, None, zero, zero, settings("relu"))
    true = wide(x).var((0, 2))
    # What counts of the mean's error is its size beside a deviation.
    np.testing.assert_allclose(mean, wide(x).mean((0, 2)), rtol=2e-7, atol=4 * 2.0**-24 * np.sqrt(true.min()))
    np.testing.assert_allclose(variance, true, rtol=2e-6 if odd is None else 4e-6)


@pytest.mark.parametrize("inner", [1, 40])
@every_level
def test_equal_numbers_have_no_variance(kernel, inner):
    x = np.full((77, 20, inner), 0.1, np.float32)
    zero, bias = np.zeros(20, np.float32), some(20)
    output, mean, variance, *_ = kernel("norm_act", x, None, bias, zero, zero, settings("identity"))
    assert (mean == np.float32(0.1)).all()
    assert (variance < 1e-16).all()
    np.testing.assert_array_equal(output, np.broadcast_to(bias[None, :, None], x.shape))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("inner", [1, 40])
@every_level
def test_what_is_not_a_number_stays_in_its_channel(kernel, inner, value):
    x, grad = some(50, 20, inner), some(20, 50, inner).reshape(50, 20, inner)
    x[0, 3, 0] = x[30, 7, inner - 1] = value
    zero, chosen = np.zeros(20, np.float32), np.isin(np.arange(20), (3, 7))
    output, mean, variance, *_ = kernel("norm_act", x, None, None, zero, zero, settings("leaky_relu"))
    np.testing.assert_array_equal(mean[chosen], 2 * [value])
    assert np.array_equal(np.isnan(variance), chosen)
    assert np.array_equal(np.isnan(output).all((0, 2)), chosen)
    assert np.array_equal(np.isnan(output).any((0, 2)), chosen)
    found = kernel("norm_act_backward", grad, x, None, None, mean, variance, settings("leaky_relu"), (True, True))
    for gradient in (found[0].sum((0, 2)), found[1]):
        assert np.array_equal(np.isnan(gradient), chosen)


@every_dtype
@pytest.mark.parametrize("inner", [1, 900, 901])
@every_level
def test_results_that_go_past_the_caches_are_the_same(kernel, dtype, inner):
    count, of_channels = (4600 if inner == 1 else 80), (1024 if inner == 1 else 64)
    few, grad = some(2, of_channels, inner, dtype=dtype), some(2, of_channels, inner + 1, dtype=dtype)[..., :-1].copy()
    mean, variance = some(of_channels), 0.5 + np.abs(some(of_channels + 1)[1:])
    s = settings("elu", training=False)
    many, upstream = np.tile(few, (count // 2, 1, 1)), np.tile(grad, (count // 2, 1, 1))
    assert many.nbytes > 8 << 20
    right = kernel("norm_act", few, None, None, mean, variance, s)[0]
    assert same(kernel("norm_act", many, None, None, mean, variance, s)[0], np.tile(right, (count // 2, 1, 1)))
    right = kernel("norm_act_backward", grad, few, None, None, mean, variance, s, (True, False))[0]
    found = kernel("norm_act_backward", upstream, many, None, None, mean, variance, s, (True, False))[0]
    assert same(found, np.tile(right, (count // 2, 1, 1)))


@pytest.mark.parametrize("size", [(9, 40, 49), (70, 3, 333), (6, 1300, 1), (1500, 70, 1)], ids=str)
@every_order
@every_level
def test_neither_threads_nor_the_order_of_tasks_change_a_bit(kernel, after, size):
    x, grad, zero = some(*size), some(*size[::-1]).reshape(size), np.zeros(size[1], np.float32)
    s = settings("elu", after=after)
    expected = kernel("norm_act", x, None, None, zero, zero, s)
    gradients = kernel("norm_act_backward", grad, x, None, None, *expected[1:3], s, (True, True))
    for threads, reverse in itertools.product((1, 3), (False, True)):
        other = Kernel(kernel.level, threads, reverse)
        found = other("norm_act", x, None, None, zero, zero, s)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        found = other("norm_act_backward", grad, x, None, None, *expected[1:3], s, (True, True))
        assert all(same(a, b) for a, b in zip(found, gradients, strict=True))


@pytest.mark.parametrize("inner", [1, 40])
@pytest.mark.parametrize("training", [True, False])
@every_level
def test_gradients_that_are_not_needed_are_not_made_and_others_do_not_change(kernel, training, inner):
    x, grad = some(30, 12, inner), some(30, inner, 12).reshape(30, 12, inner)
    weight, bias, mean, variance = some(12), some(13)[1:].copy(), some(14)[2:].copy(), np.full(12, 2.0, np.float32)
    s = settings("relu", training=training)
    both = kernel("norm_act_backward", grad, x, weight, bias, mean, variance, s, (True, True))
    for needed in ((True, False), (False, True)):
        found = kernel("norm_act_backward", grad, x, weight, bias, mean, variance, s, needed)
        for own, full, wanted in zip(found, both, (needed[0], needed[1], needed[1]), strict=True):
            assert same(own, full) if wanted else own.size == 0


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
