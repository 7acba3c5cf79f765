"""The pooling CPU kernels at every ISA level, in guarded memory, on any number of threads.

Scratch and what lies between the elements of an array is NaN: whatever reads it is found by the result.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from native import build
from native.floats import BFLOAT16, FLOAT16, FLOAT32, narrow, same, widen
from native.images import distance, double, laid_out, nchw
from torch import Tensor

from perfvl.ops.pooling import output_size
from perfvl.reference import pooling as reference

module = build.load("native_cpu")
LEVELS = module.levels() if not build.SANITIZED else module.levels()[:1]
RNG = np.random.default_rng(7)
TOLERANCE = {FLOAT32: 2e-7, BFLOAT16: 4e-3, FLOAT16: 5e-4}
THREADS = ((1, False), (3, True))
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = True

    @property
    def windows(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.size

    @property
    def size(self) -> list[int]:
        return output_size(self.shape[2:], *map(list, self[1:4]), self.ceil_mode)


CASES = [
    Case((1, 1, 1, 1), (1, 1), (1, 1)),
    Case((2, 17, 15, 15)),
    Case((3, 33, 7, 7)),
    Case((1, 40, 12, 13), padding=(1, 1)),
    Case((1, 20, 8, 11), (2, 2), ceil_mode=False),
    Case((2, 5, 9, 7), stride=(1, 1), padding=(1, 1)),
    Case((1, 6, 9, 17), (2, 5), (3, 1), (1, 2), False),
    Case((1, 18, 13, 14), (2, 2), (5, 3), (1, 0)),  # pixels in no window
    Case((1, 16, 90, 70)),  # bands of rows
    Case((1, 2, 3, 2500)),  # rows longer than a block
    Case((1, 19, 16, 18), (15, 15), (2, 2), (7, 7), False),
    Case((1, 3, 40, 5), (40, 5), (1, 1)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.shape}-{c.kernel}-{c.stride}")


def some(*shape: int, dtype: np.dtype = FLOAT32) -> np.ndarray:
    """Many of them equal."""
    return narrow(np.round(4 * RNG.standard_normal(shape)) / 4, dtype)


def layout_of(i: int) -> tuple[np.dtype, str, bool]:
    """dtype, layout of images that are read, and whether what is written is channels_last."""
    return DTYPES[i], ("channels_last", "nchw", "sliced")[i], i != 1


def positions_in(got: np.ndarray, channels_last: bool) -> np.ndarray:
    return got.transpose(0, 3, 1, 2) if channels_last else got


def both_pools(case: Case, x: Tensor) -> Tensor:
    return reference.max_avg_pool(x, *map(list, case[1:4]), ceil_mode=case.ceil_mode)


@cases
def test_outputs_and_positions(case):
    for i in range(3):
        dtype, layout, channels_last = layout_of(i)
        x = laid_out(some(*case.shape, dtype=dtype), layout)
        truth = both_pools(case, double(x))
        _, index = F.max_pool2d(double(x), *case[1:4], ceil_mode=case.ceil_mode, return_indices=True)
        begin = [torch.arange(n).mul(s).sub(p) for n, s, p in zip(case.size, case.stride, case.padding, strict=True)]
        row, column = index // case.shape[3] - begin[0][:, None], index % case.shape[3] - begin[1]
        for level, (threads, reverse) in itertools.product(LEVELS, THREADS):
            arguments = level, threads, reverse, x, *case.windows
            got, positions = module.max_avg_pool(*arguments, True, channels_last)
            if threads == 1:
                alone = got
            assert same(got, alone), "the number of threads must not change an output"
            assert distance(nchw(got, channels_last), truth) < TOLERANCE[dtype]
            assert np.array_equal(positions_in(positions, channels_last), row * case.kernel[1] + column)
            bare, none = module.max_avg_pool(*arguments, False, channels_last)
            assert same(bare, got)
            assert none is None


@cases
@pytest.mark.parametrize("average", [True, False])
def test_gradients(case, average):
    for i in range(3):
        dtype, layout, channels_last = layout_of(i)
        x = some(*case.shape)
        _, positions = module.max_avg_pool(LEVELS[0], 1, False, x, *case.windows, True, channels_last)
        positions = positions_in(positions, channels_last)
        leaf = double(x).requires_grad_()
        pooled = both_pools(case, leaf) if average else F.max_pool2d(leaf, *case[1:4], ceil_mode=case.ceil_mode)
        upstream = laid_out(some(*pooled.shape, dtype=dtype), layout)
        (truth,) = torch.autograd.grad(pooled, leaf, double(upstream))
        for level, (threads, reverse), last in itertools.product(LEVELS, THREADS, (True, False)):
            got = module.pool_backward(
                level, threads, reverse, upstream, positions, *case.windows[:3], case.shape[2:], average, last
            )
            assert distance(nchw(got, last), truth) < TOLERANCE[dtype]


@cases
def test_stochastic_pooling(case):
    for i in range(3):
        dtype, layout, channels_last = layout_of(i)
        x = laid_out(narrow(np.abs(some(*case.shape)), dtype), layout)  # quarters: sums are exact
        uniform = laid_out(RNG.random((*case.shape[:2], *case.size)).astype(np.float32), layout)
        leaf = double(x).float().requires_grad_()
        windows = [*map(list, case[1:4]), case.size]
        truth = reference.stochastic_pool(leaf, torch.from_numpy(uniform), *windows)
        (expected,) = torch.autograd.grad(truth.sum(), leaf)
        expectation = reference.stochastic_pool(double(x), None, *windows)
        for level, (threads, reverse) in itertools.product(LEVELS, THREADS):
            arguments = level, threads, reverse, x
            got, picked = module.stochastic_pool(*arguments, uniform, *case.windows, channels_last)
            assert torch.equal(nchw(got, channels_last), truth.detach().double())
            grad = module.pool_backward(
                level, threads, reverse, np.ones((*case.shape[:2], *case.size), np.float32),
                positions_in(picked, channels_last), *case.windows[:3], case.shape[2:], False, channels_last,
            )  # fmt: skip
            assert torch.equal(nchw(grad, channels_last), expected.double())
            got, none = module.stochastic_pool(*arguments, None, *case.windows, channels_last)
            assert distance(nchw(got, channels_last), expectation) < 2 * TOLERANCE[dtype]
            assert none is None


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_nan_and_infinities_are_those_of_pytorch(layout):
    """The last NaN has the gradient; of infinities of both signs the average is none."""
    case, last = Case((2, 20, 9, 10), padding=(1, 1)), layout == "channels_last"
    x = some(*case.shape)
    x[0, 1, 2, 2] = x[0, 1, 3, 3] = x[1, 2, 0, 0] = x[1, 17, 8, 9] = np.nan
    x[1, 3], x[1, 4, 4, 4], x[1, 4, 4, 5] = -np.inf, np.inf, -np.inf
    leaf = torch.from_numpy(x).requires_grad_()
    largest = F.max_pool2d(leaf, *case[1:4], ceil_mode=True)
    (truth,) = torch.autograd.grad(largest.sum(), leaf)
    expected = both_pools(case, leaf.detach())
    ones = np.ones(tuple(largest.shape), np.float32)
    for level in LEVELS:
        got, positions = module.max_avg_pool(level, 1, False, laid_out(x, layout), *case.windows, True, last)
        torch.testing.assert_close(nchw(got, last).float(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        positions = positions_in(positions, last)
        grad = module.pool_backward(level, 1, False, ones, positions, *case.windows[:3], (9, 10), False, last)
        assert torch.equal(nchw(grad, last).float(), truth)
        uniform = np.full_like(ones, 0.5)
        got, _ = module.stochastic_pool(level, 1, False, laid_out(np.abs(x), layout), uniform, *case.windows, last)
        assert torch.equal(nchw(got, last).isnan(), largest.isnan())


def test_float32_is_rounded_as_pytorch_rounds_it():
    case = Case((2, 33, 15, 17), padding=(1, 1))
    x = RNG.standard_normal(case.shape).astype(np.float32)
    expected = both_pools(case, torch.from_numpy(x))
    for level, layout in itertools.product(LEVELS, ("channels_last", "nchw")):
        got, _ = module.max_avg_pool(level, 1, False, laid_out(x, layout), *case.windows, False, False)
        assert np.array_equal(widen(got), expected.numpy())


@pytest.mark.skipif(build.SANITIZED, reason="this test starts the sanitized one")
def test_under_the_sanitizers():
    selected = "test_outputs or test_gradients or test_stochastic or test_nan"
    done = build.run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", selected)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
