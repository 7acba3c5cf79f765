"""The separable_conv CPU kernels at every ISA level, in guarded memory, on any number of threads.

Scratch and what lies between the elements of an array is NaN: whatever reads it is found by the result.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from native import build
from native.floats import BFLOAT16, FLOAT16, FLOAT32, narrow, same, widen
from native.images import distance, double, laid_out, nchw

from perfvl.reference import separable_conv as reference
from perfvl.reference.activation import ACTIVATIONS

module = build.load("native_cpu")
NAMES = list(ACTIVATIONS)
LEVELS = module.levels() if not build.SANITIZED else module.levels()[:1]
RNG = np.random.default_rng(5)
TOLERANCE = {FLOAT32: 2e-6, BFLOAT16: 6e-3, FLOAT16: 2e-3}


class Case(NamedTuple):
    batch: int
    channels: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    pre: str = "none"
    mid: str = "none"
    post: str = "none"


CASES = [
    Case(1, 1, 1, (1, 1)),
    Case(2, 3, 5, (7, 5)),
    Case(1, 16, 24, (10, 10), pre="relu"),
    Case(3, 24, 16, (19, 19), pre="silu", post="relu"),
    Case(1, 33, 40, (13, 9), stride=(2, 2), post="hardswish"),
    Case(2, 40, 130, (12, 17), stride=(2, 1), padding=(0, 1, 1, 0), mid="relu6"),
    Case(1, 728, 24, (3, 4)),
    Case(1, 17, 9, (11, 11), kernel=(5, 5), padding=(2, 2, 2, 2), pre="leaky_relu"),
    Case(1, 12, 20, (15, 14), kernel=(5, 5), stride=(2, 2), padding=(1, 2, 1, 2)),
    Case(1, 8, 6, (9, 9), kernel=(7, 7), padding=(3, 3, 3, 3), pre="relu6"),
    Case(2, 6, 7, (9, 8), kernel=(3, 1), padding=(1, 1, 0, 0)),
    Case(1, 5, 3, (6, 20), kernel=(3, 7), padding=(0, 2, 3, 1), dilation=(1, 2)),
    Case(1, 7, 4, (20, 20), dilation=(6, 6), padding=(6, 6, 6, 6), pre="relu"),
    Case(1, 4, 6, (8, 8), kernel=(2, 4), padding=(3, 4, 4, 3), stride=(3, 2)),
    Case(2, 3, 8, (9, 9), multiplier=3, pre="relu", mid="silu"),
    Case(2, 11, 13, (6, 6), kernel=(1, 1), padding=(2, 2, 2, 2)),
    Case(1, 20, 18, (147, 5), pre="hardswish"),
    Case(1, 8, 90, (160, 160), post="relu"),  # an output that is written past the caches
]
NAMED = ("input", "scale", "shift", "depthwise", "pointwise", "bias")
THREADS = ((1, False), (3, True))


def some(*shape: int, dtype: np.dtype = FLOAT32) -> np.ndarray:
    return narrow(RNG.standard_normal(shape).astype(np.float32), dtype)


def inputs_of(case: Case, dtype: np.dtype, layout: str, affine: bool) -> tuple[np.ndarray, ...]:
    inner = case.channels * case.multiplier
    x = laid_out(some(case.batch, case.channels, *case.size, dtype=dtype), layout)
    depthwise = some(inner, 1, *case.kernel, dtype=dtype)
    pointwise = narrow(widen(some(case.outputs, inner, 1, 1)) / inner**0.5, dtype)
    scales = [
        some(n) + np.float32(0.5 * (i % 2 == 0)) if affine else None
        for i, n in enumerate([case.channels] * 2 + [inner] * 2 + [case.outputs] * 2)
    ]
    return x, depthwise, pointwise, scales


def geometry(case: Case) -> dict[str, Any]:
    return {"stride": list(case.stride), "padding": list(case.padding), "dilation": list(case.dilation)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.channels}-{c.outputs}-{c.kernel}-{c.stride}-{c.size}")
def test_outputs_and_statistics(case):
    codes = tuple(NAMES.index(name) for name in (case.pre, case.mid, case.post))
    for i, dtype in enumerate((FLOAT32, BFLOAT16, FLOAT16)):
        layout, channels_last, affine = ("channels_last", "nchw", "sliced")[i], i != 1, i != 2
        x, depthwise, pointwise, scales = inputs_of(case, dtype, layout, affine)
        truth = reference.separable_conv(
            double(x),
            *map(double, scales[:2]),
            double(depthwise),
            *map(double, scales[2:4]),
            double(pointwise),
            *map(double, scales[4:]),
            None,
            **geometry(case),
            pre_activation=case.pre,
            mid_activation=case.mid,
            activation=case.post,
        )
        residual = some(*truth.shape, dtype=dtype) if i != 1 else None
        if residual is not None:
            truth = truth + double(residual)
            residual = laid_out(residual, "channels_last")
        for level, (threads, reverse) in itertools.product(LEVELS, THREADS):
            got, mean, variance = module.separable_conv(
                level,
                threads,
                reverse,
                x,
                depthwise,
                pointwise,
                case.stride,
                case.padding,
                case.dilation,
                codes,
                scales,
                residual,
                True,
                channels_last,
            )
            if threads == 1:
                alone = got
            assert same(got, alone), "the number of threads must not change an output"
            found = nchw(got, channels_last)
            assert distance(found, truth) < TOLERANCE[dtype]
            true_variance, true_mean = torch.var_mean(found, (0, 2, 3), correction=0)
            torch.testing.assert_close(torch.from_numpy(mean).double(), true_mean, rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(torch.from_numpy(variance).double(), true_variance, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.channels}-{c.outputs}-{c.kernel}-{c.stride}-{c.size}")
def test_gradients(case):
    for i, dtype in enumerate((FLOAT32, BFLOAT16, FLOAT16)):
        layout, channels_last, affine = ("channels_last", "nchw", "sliced")[i], i != 1, i != 2
        x, depthwise, pointwise, scales = inputs_of(case, dtype, layout, affine)
        pointwise = narrow(widen(pointwise) / 4, dtype)  # sums of float16 stay in its range
        bias = torch.zeros(case.outputs, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in (*map(double, (x, depthwise, pointwise)), bias)]
        given = [double(s).requires_grad_() if s is not None else None for s in scales[:2]]
        z = reference.separable_conv(
            leaves[0],
            *given,
            leaves[1],
            None,
            None,
            leaves[2],
            None,
            leaves[3],
            None,
            **geometry(case),
            pre_activation=case.pre,
            mid_activation="none",
            activation="none",
        )
        upstream = narrow(RNG.standard_normal(z.shape).astype(np.float32) / 4, dtype)
        total, output, line = double(upstream), None, (None, None)
        if affine:
            output = narrow(z.detach().float().numpy(), dtype)
            line = some(case.outputs) / 4, some(case.outputs) / 4
            slope, offset = (double(v).reshape(-1, 1, 1) for v in line)
            total = total + slope * double(output) + offset
            output = laid_out(output, layout)
        wanted = [*leaves, *(t for t in given if t is not None)]
        truth = dict(
            zip(
                ["input", "depthwise", "pointwise", "bias", "scale", "shift"],
                torch.autograd.grad(z, wanted, total),
                strict=False,
            )
        )
        for level, (threads, reverse) in itertools.product(LEVELS, THREADS):
            for needed in ((True, affine, True, True, True), (threads == 1, False, threads > 1, False, True)):
                got = module.separable_conv_backward(
                    level,
                    threads,
                    reverse,
                    laid_out(upstream, layout),
                    x,
                    depthwise,
                    pointwise,
                    case.stride,
                    case.padding,
                    case.dilation,
                    NAMES.index(case.pre),
                    scales[:2],
                    output,
                    line,
                    needed,
                    channels_last,
                )
                asked = dict(zip(NAMED, (*needed[:1], *needed[1:2] * 2, *needed[2:]), strict=True))
                for name, value in got.items():
                    if not asked[name]:
                        assert value.size == 0
                        continue
                    found = nchw(value, channels_last and name == "input")
                    assert distance(found, truth[name]) < 3 * TOLERANCE[dtype], name


def test_sums_are_the_same_in_every_run():
    x, depthwise, pointwise, _ = inputs_of(CASES[3], FLOAT32, "channels_last", False)
    upstream = some(3, 16, 19, 19)
    arguments = (upstream, x, depthwise, pointwise, (1, 1), (1, 1, 1, 1), (1, 1), 0, (None, None), None, (None, None))
    first, second = (
        module.separable_conv_backward(LEVELS[0], 3, reverse, *arguments, (True, False, True, True, True), True)
        for reverse in (False, True)
    )
    for name in first:
        assert same(first[name], second[name]), name


@pytest.mark.skipif(build.SANITIZED, reason="this test starts the sanitized one")
def test_under_the_sanitizers():
    selected = "test_outputs_and_statistics or test_gradients"
    done = build.run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", selected)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
