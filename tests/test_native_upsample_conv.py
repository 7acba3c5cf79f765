"""The upsample_conv CPU kernels at every ISA level, in guarded memory, on any number of threads, and those of CUDA for
weights, run by tests/native/cuda_emulator.h.

Scratch and what lies between the elements of an array is NaN: whatever reads it is found by the result.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from native import build
from native.floats import BFLOAT16, FLOAT16, FLOAT32, narrow, same, widen
from native.images import distance, double, laid_out, nchw

from perfvl.reference.activation import ACTIVATIONS
from perfvl.reference.upsample_conv import upsample_conv

module, cuda = build.load("native_cpu"), build.load("native_cuda")
NAMES = list(ACTIVATIONS)
LEVELS = module.levels() if not build.SANITIZED else module.levels()[:1]
RNG = np.random.default_rng(6)
TOLERANCE = {FLOAT32: 2e-6, BFLOAT16: 6e-3, FLOAT16: 2e-3}
THREADS = ((1, False), (3, True))


class Case(NamedTuple):
    batch: int
    channels: int
    outputs: int
    size: tuple[int, int]
    activation: str = "none"


CASES = [
    Case(1, 1, 1, (1, 1)),
    Case(2, 3, 5, (5, 3), "relu"),
    Case(3, 17, 33, (1, 7)),
    Case(1, 33, 16, (7, 1), "silu"),
    Case(37, 12, 20, (2, 2), "relu"),  # tiles of several images, and a last one of fewer
    Case(2, 64, 70, (4, 4), "hardswish"),
    Case(1, 140, 24, (8, 8), "leaky_relu"),  # channels in two runs
    Case(1, 24, 300, (4, 4)),  # outputs in several runs
    Case(1, 16, 16, (33, 35), "relu6"),  # tiles with ragged ends both ways
    Case(1, 8, 8, (2, 130)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.batch}-{c.channels}-{c.outputs}-{c.size}")


def some(*shape: int, dtype: np.dtype = FLOAT32) -> np.ndarray:
    return narrow(RNG.standard_normal(shape).astype(np.float32), dtype)


def problem(case: Case, i: int) -> tuple[np.ndarray, np.ndarray, str, bool]:
    """Input, weights, layout of images, and whether results are channels_last: others for each of three dtypes."""
    dtype, layout = (FLOAT32, BFLOAT16, FLOAT16)[i], ("channels_last", "nchw", "sliced")[i]
    x = laid_out(some(case.batch, case.channels, *case.size, dtype=dtype), layout)
    weight = narrow(widen(some(case.outputs, case.channels, 3, 3)) / (9 * case.channels) ** 0.5, dtype)
    return x, laid_out(weight, ("nchw", "channels_last", "sliced")[i]), layout, i != 1


@cases
def test_outputs(case):
    for i, affine in enumerate((True, False, True)):
        x, weight, _, channels_last = problem(case, i)
        scale, shift = (some(case.outputs) if affine else None for _ in range(2))
        truth = upsample_conv(*map(double, (x, weight, scale, shift)), activation=case.activation)
        code = NAMES.index(case.activation)
        for level, (threads, reverse) in itertools.product(LEVELS, THREADS):
            got = module.upsample_conv(level, threads, reverse, x, weight, scale, shift, code, channels_last)
            if threads == 1:
                alone = got
            assert same(got, alone), "the number of threads must not change an output"
            assert distance(nchw(got, channels_last), truth) < TOLERANCE[x.dtype]


@cases
def test_gradients(case):
    for i in range(3):
        x, weight, layout, channels_last = problem(case, i)
        leaves = [t.requires_grad_() for t in (double(x), double(weight), torch.zeros(case.outputs).double())]
        z = upsample_conv(*leaves[:2], None, leaves[2], activation="none")
        upstream = narrow(widen(some(*z.shape)) / 4, x.dtype)  # sums of float16 stay in its range
        truth = dict(zip(("input", "weight", "bias"), torch.autograd.grad(z, leaves, double(upstream)), strict=True))
        for level, (threads, reverse) in itertools.product(LEVELS, THREADS):
            for needed in ((True, True, True), (threads == 1, threads > 1, False)):
                got = module.upsample_conv_backward(
                    level, threads, reverse, laid_out(upstream, layout), x, weight, needed, channels_last
                )
                for (name, value), asked in zip(got.items(), needed, strict=True):
                    if not asked:
                        assert value.size == 0
                        continue
                    found = nchw(value, channels_last and name == "input")
                    assert distance(found, truth[name]) < 3 * TOLERANCE[x.dtype], name


def test_sums_are_the_same_in_every_run():
    x, weight, _, _ = problem(CASES[4], 0)
    upstream = some(37, 20, 4, 4)
    first, second = (
        module.upsample_conv_backward(LEVELS[0], 3, reverse, upstream, x, weight, (True, True, True), True)
        for reverse in (False, True)
    )
    for name in first:
        assert same(first[name], second[name]), name


def test_what_is_not_finite_stays_where_it_is():
    """An output is not finite exactly where a pixel that it sees is not."""
    x, weight = some(1, 20, 9, 40), some(24, 20, 3, 3)
    x[0, 3, 4, 7], x[0, 5, 0, 39] = np.inf, np.nan
    truth = upsample_conv(double(x), double(weight), None, None, activation="none")
    for level in LEVELS:
        got = nchw(module.upsample_conv(level, 1, False, x, weight, None, None, 0, False), False)
        assert torch.equal(got.isfinite(), truth.isfinite())


M = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float64)  # k = M w M^T


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (33, 70), (64, 32)])
def test_weights_of_the_transposed_convolution(sizes, reverse):
    """Outputs and channels in whole and ragged tiles, any layout in, either out."""
    cuda.set_order(reverse)
    try:
        for dtype, layout, channels_last in itertools.product(
            TOLERANCE, ("channels_last", "nchw", "sliced"), (False, True)
        ):
            weight, scale = some(*sizes, 3, 3, dtype=dtype), some(sizes[0])
            for factor in (None, scale):
                scaled = double(weight) * (1 if factor is None else double(factor).reshape(-1, 1, 1, 1))
                truth = torch.einsum("ij,ocjk,lk->coil", torch.from_numpy(M), scaled, torch.from_numpy(M))
                got = cuda.upsample_weight(laid_out(weight, layout), factor, channels_last)
                assert distance(double(got), truth) < TOLERANCE[dtype]
            grad = some(sizes[1], sizes[0], 4, 4, dtype=dtype)
            truth = torch.einsum("ij,coil,lk->ocjk", torch.from_numpy(M), double(grad), torch.from_numpy(M))
            got = cuda.upsample_weight_backward(laid_out(grad, layout), channels_last)
            assert distance(double(got), truth) < TOLERANCE[dtype]
    finally:
        cuda.set_order(False)


@pytest.mark.skipif(build.SANITIZED, reason="this test starts the sanitized one")
def test_under_the_sanitizers():
    selected = "test_outputs or test_gradients or test_weights"
    done = build.run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", selected)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
