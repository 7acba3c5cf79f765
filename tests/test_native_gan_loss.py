"""The gan_loss kernels of the CPU, at every ISA level, and those of CUDA, run by tests/native/cuda_emulator.h, against
float64 and, in exact mode, against the same steps in numpy's float32."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT32, far_apart, narrow, same, widen
from numpy.typing import NDArray

cpu, cuda = build.load("native_cpu"), build.load("native_cuda")
RNG = np.random.default_rng


class Cpu(NamedTuple):
    level: str

    def __call__(self, *arguments, **options):
        return cpu.gan_loss(self.level, *arguments, **options)


class Cuda(NamedTuple):
    reverse: bool = False  # threads last to first

    def __call__(self, *arguments, **options):
        cuda.set_order(self.reverse)
        try:
            return cuda.gan_loss(*arguments, **options)
        finally:
            cuda.set_order(False)


KERNELS = [*(Cpu(level) for level in cpu.levels()), Cuda(), Cuda(reverse=True)]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)
both_modes = pytest.mark.parametrize("exact", [False, True], ids=["stable", "exact"])


def rows_of(x: NDArray, target: float, exact: bool) -> tuple[NDArray, NDArray]:
    """Loss and gradient of every row."""
    with np.errstate(all="ignore"):
        if exact:
            x = x.astype(np.float32)
            p = (1 / (1 + np.exp(-x))).astype(np.float32)
            p64 = p.astype(np.float64)
            logs = np.log(p64), np.log1p(-p64)
            product = (np.float32(1) - p) * p
            grad = (p64 - target) * (product / np.maximum(product, np.float32(1e-12))).astype(np.float64)
        else:
            x = x.astype(np.float64)
            logs = -np.logaddexp(0, -x), -np.logaddexp(0, x)
            grad = (1 - target) * np.exp(logs[0]) - target * np.exp(logs[1])
        least = -100 if exact else -np.inf
        terms = [y * np.maximum(log, least) for y, log in zip((target, 1 - target), logs, strict=True) if y != 0]
    return -sum(terms), grad


def truth(logits: list[NDArray], targets: list[float], weights: list[float], exact: bool):
    """Total, means, gradient."""
    rows = [rows_of(widen(x), y, exact) for x, y in zip(logits, targets, strict=True)]
    means = np.array([loss.mean() for loss, _ in rows])
    grads = [w * grad / len(grad) for (_, grad), w in zip(rows, weights, strict=True)]
    return means @ np.array(weights), means, np.concatenate(grads)


def problem(*rows: int, dtype=FLOAT32, size: float = 3.0) -> tuple[list[NDArray], list[float], list[float]]:
    rng = RNG(rows)
    logits = [narrow(size * rng.standard_normal(n), dtype) for n in rows]
    targets = [(1.0, 0.0, 0.75)[k % 3] for k in range(len(rows))]
    return logits, targets, [1.0 / (1 + k) for k in range(len(rows))]


def check(kernel, logits, targets, weights, exact: bool, slack: float = 1.2e-7) -> None:
    """`slack`: of a probability, where its last bit decides about its difference to the target."""
    total, means, grad = kernel(logits, targets, weights, exact)
    true_total, true_means, true_grad = truth(logits, targets, weights, exact)
    np.testing.assert_allclose(means, true_means, rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(total, true_total, rtol=1e-6, atol=1e-37)
    factors = [np.full(len(x), abs(w) / len(x)) for x, w in zip(logits, weights, strict=True)]
    rounded = [exact or y not in (0.0, 1.0) for y in targets]
    allowed = np.concatenate([slack * f * r for f, r in zip(factors, rounded, strict=True)])
    assert (np.abs(grad - true_grad) <= 1e-6 * np.abs(true_grad) + allowed + 1e-37).all()


@both_modes
@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (64, 63, 64), (16, 17, 31, 32, 33), (2, 500), (3,) * 16], ids=str)
def test_any_heads(rows, dtype, kernel, exact):
    check(kernel, *problem(*rows, dtype=DTYPES[dtype]), exact)


@both_modes
@every_kernel
def test_more_rows_than_threads(kernel, exact):
    check(kernel, *problem(2500, 40, 1100), exact)


@every_kernel
def test_logits_of_every_size_keep_their_precision(kernel):
    logits = np.concatenate([np.linspace(-86, 86, 1201), 10.0 ** np.arange(-30, 2)]).astype(np.float32)
    for target in (0.0, 0.3, 1.0):
        for x in np.array_split(logits, 12):
            check(kernel, [x[i : i + 1] for i in range(16)], [target] * 16, [1.0] * 16, exact=False)
            check(kernel, [x], [target], [1.0], exact=False)


@every_kernel
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_exact_mode_rounds_and_clamps_as_float32_does(kernel, target):
    # Not where the last bit of an exponential decides: next to 16.6355 a probability becomes 1.
    logits = np.array([-200, -104, -101, -95, -88, -80, -40, -30, -28, -27, -10, -1, 0, 1, 5, 15, 17, 40, 104, 200])
    for x in logits.astype(np.float32):
        check(kernel, [x[None]], [target], [1.0], exact=True, slack=0 if target in (0.0, 1.0) else 1.2e-7)


@both_modes
@every_kernel
def test_infinities_and_nan(kernel, exact):
    logits = np.array([np.inf, -np.inf, np.nan, 2.0], np.float32)
    for target, losses in ((0.0, [np.inf, 0, np.nan]), (1.0, [0, np.inf, np.nan]), (0.75, [np.inf, np.inf, np.nan])):
        _, means, grad = kernel([logits[i : i + 1] for i in range(4)], [target] * 4, [1.0] * 4, exact)
        expected = np.minimum(losses, [100 * (1 - target), 100 * target, np.nan]) if exact else losses
        np.testing.assert_allclose(means[:3], expected, rtol=1e-6)
        assert np.isnan(grad).tolist() == [False, False, True, False]
        assert np.isfinite(means[3])
    # A row that is no number leaves the others of its head as they are.
    _, means, grad = kernel([logits[[3, 2, 3]]], [1.0], [1.0], exact)
    assert np.isnan(means).all()
    assert np.isnan(grad).tolist() == [False, True, False]
    assert grad[0] == grad[2]


@both_modes
@every_kernel
def test_a_head_without_rows(kernel, exact):
    logits = [np.ones(3, np.float32), np.ones(0, np.float32), np.ones(2, np.float32)]
    total, means, grad = kernel(logits, [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], exact)
    assert np.isnan(means).tolist() == [False, True, False]
    assert np.isnan(total)
    np.testing.assert_allclose(grad, truth([logits[0], logits[2]], [1.0, 0.0], [1.0, 1.0], exact)[2], rtol=1e-6)


@both_modes
@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(kernel, exact, dtype):
    (dense, *_), *_ = problem(77, dtype=DTYPES[dtype])
    expected = kernel([dense], [1.0], [2.0], exact)
    strided = np.repeat(dense, 3)[::3]
    far = far_apart(dense[:3, None])[:, 0]
    assert all(same(a, b) for a, b in zip(kernel([strided], [1.0], [2.0], exact), expected, strict=True))
    assert same(kernel([far], [1.0], [2.0], exact)[2], kernel([dense[:3]], [1.0], [2.0], exact)[2])
    one = np.broadcast_to(dense[:1], 77)
    assert same(kernel([one], [1.0], [2.0], exact)[2], kernel([one.copy()], [1.0], [2.0], exact)[2])


@both_modes
@every_kernel
def test_without_a_gradient_the_loss_is_the_same(kernel, exact):
    arguments = problem(64, 63, 64)
    total, means, _ = kernel(*arguments, exact)
    alone = kernel(*arguments, exact, with_grad=False)
    assert same(alone[0], total)
    assert same(alone[1], means)
    assert alone[2] is None


@both_modes
def test_the_order_of_threads_changes_nothing(exact):
    arguments = problem(200, 63, 1, 5, dtype=BFLOAT16)
    for a, b in zip(Cuda()(*arguments, exact), Cuda(reverse=True)(*arguments, exact), strict=True):
        assert same(a, b)


def test_one_launch_of_as_many_warps_as_there_are_rows():
    for rows, block in (((64, 63, 64), (64, 3)), ((1,), (32, 1)), ((5000,), (1024, 1)), ((100,) * 16, (64, 16))):
        before = cuda.launches()
        Cuda()(*problem(*rows), False)
        assert cuda.launches() == before + 1
        assert cuda.last_launch() == ((1, 1, 1), (*block, 1))


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout + done.stderr
