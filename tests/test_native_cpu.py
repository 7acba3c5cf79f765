"""The CPU kernels of every ISA level this machine can run, against float64, in memory guarded on both sides."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT16, FLOAT32, far_apart, narrow
from native.info_nce_truth import excess, truth

kernels = build.load("native_cpu")
LEVELS = kernels.levels()
TILES = {"avx512_bf16", "amx"}  # levels with bfloat16 products; the others compute them in float32, which is closer

BATCHES = (1, 33) if build.SANITIZED else (1, 31, 33, 257)
DIMS = (1, 33, 128) if build.SANITIZED else (1, 16, 31, 33, 128)
KEYS = (0, 1, 31, 513) if build.SANITIZED else (0, 1, 31, 513, 1500)
SCALE = float(np.float32(1 / 0.07))
OUTPUTS = ("loss", "lse", "positive_logit", "positive_weight", "grad_query", "rank")


def unit_rows(rows: int, dim: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def problem(batch: int, dim: int, keys: int, dtypes: tuple = (FLOAT32, FLOAT32, FLOAT32)):
    """Query, positive and queue as a trained encoder gives them: unit rows, the positive closer than most keys."""
    query, queue = unit_rows(batch, dim, 1), unit_rows(keys, dim, 2)
    positive = 0.3 * query + 0.7 * unit_rows(batch, dim, 3)
    return tuple(narrow(x, dtype) for x, dtype in zip((query, positive, queue), dtypes, strict=True))


_truth = functools.cache(lambda shape, dtypes, scale, rounded: truth(*problem(*shape, dtypes), scale, rounded))


class Kernel(NamedTuple):
    level: str
    bfloat16: bool  # with products of bfloat16 operands

    def run(self, *tensors, scale=SCALE, **options):
        return kernels.info_nce(self.level, *tensors, scale=scale, bfloat16_products=self.bfloat16, **options)

    def check(self, tensors, *, scale=SCALE, true=None, equal_terms=0, **options):
        """Runs, holds every output to its bound, and returns the outputs."""
        got = self.run(*tensors, scale=scale, **options)
        true = truth(*tensors, scale, self.bfloat16) if true is None else true
        ratios = excess(got, true, self.bfloat16, options.get("row_factor", 1.0), equal_terms)
        assert all(ratio <= 1 for ratio in ratios.values()), f"error as a multiple of what is allowed: {ratios}"
        return got

    def check_shape(self, shape, dtypes=(FLOAT32,) * 3, **options):
        """The same on the problem of this shape, whose truth is computed once for all kernels."""
        return self.check(problem(*shape, dtypes), true=_truth(shape, dtypes, SCALE, self.bfloat16), **options)


KERNELS = [Kernel(level, bfloat16) for level in LEVELS for bfloat16 in (False, True) if level in TILES or not bfloat16]


@pytest.fixture(params=KERNELS, ids=lambda k: f"{k.level}{'-bfloat16' * k.bfloat16}")
def kernel(request) -> Kernel:
    return request.param


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("batch", BATCHES)
def test_all_outputs_are_right_at_ragged_sizes(kernel, batch, dim, keys):
    kernel.check_shape((batch, dim, keys))


@pytest.mark.parametrize("queue", DTYPES)
@pytest.mark.parametrize("positive", DTYPES)
@pytest.mark.parametrize("query", DTYPES)
def test_any_mix_of_dtypes(kernel, query, positive, queue):
    dtypes = tuple(DTYPES[name] for name in (query, positive, queue))
    for shape in ((33, 33, 513), (2, 64, 96)):
        kernel.check_shape(shape, dtypes)


VIEWS = {
    "transposed buffer": lambda x: np.asfortranarray(x),
    "transposed buffer of a longer queue": lambda x: np.asfortranarray(np.pad(x, ((0, 7), (0, 0))))[: x.shape[0]],
    "columns of a wider buffer": lambda x: np.pad(x, ((0, 0), (0, 5)))[:, : x.shape[1]],
    "every other column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "every third row": lambda x: np.repeat(x, 3, axis=0)[::3],
    "one row for all": lambda x: np.broadcast_to(x[:1], x.shape),
    "overlapping rows": lambda x: np.lib.stride_tricks.as_strided(x, x.shape, (x.itemsize, x.itemsize)),
    "one number": lambda x: np.broadcast_to(x[:1, :1], x.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("argument", [0, 1, 2], ids=["query", "positive", "queue"])
def test_any_strides(kernel, argument, view, dtype):
    for shape in ((5, 31, 513), (33, 32, 64)):
        tensors = list(problem(*shape, (DTYPES[dtype],) * 3))
        tensors[argument] = VIEWS[view](tensors[argument])
        # Equal keys round alike, so that the errors of their sum do not cancel.
        kernel.check(tensors, equal_terms=shape[2] if argument == 2 and view.startswith("one") else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("argument", [0, 1, 2], ids=["query", "positive", "queue"])
def test_rows_may_be_more_than_2_to_the_31_elements_apart(kernel, argument, dtype):
    tensors = list(problem(3, 32, 3, (DTYPES[dtype],) * 3))
    tensors[argument] = far_apart(tensors[argument])
    kernel.check(tensors)


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_of_no_width_have_logits_of_zero(kernel, dim):
    got = kernel.check([np.zeros((rows, dim), np.float32) for rows in (33, 33, 40)], equal_terms=40)
    assert np.abs(got["loss"] - np.log(41)).max() < 1e-6


@pytest.mark.parametrize("factor", [0.1, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_logits_and_negative_temperatures(kernel, sign, factor):
    # Up to 1000 above or below the positive: the running maximum moves, the positive's exp underflows.
    for largest in (0, 20, 512):
        tensors, true = with_large_logits(sign, factor, largest, kernel.bfloat16)
        kernel.check(tensors, scale=sign, true=true)


@functools.cache
def with_large_logits(sign: float, factor: float, largest: int, rounded: bool):
    tensors = [np.float32(factor) * x for x in problem(33, 33, 513)]
    tensors[2][largest] *= 4
    return tensors, truth(*tensors, sign, rounded)


def test_losses_near_zero_are_accurate_relative_to_themselves(kernel):
    query, _, queue = problem(33, 33, 513)
    for gap in (5.0, 20.0, 60.0):
        got = kernel.check((query, query * np.float32(gap), queue), scale=1.0)
        assert 0 < got["loss"].max() < 600 * np.exp(2 - gap)


@pytest.mark.skipif(build.SANITIZED, reason="accuracy alone")
def test_a_long_queue_of_equal_keys_is_summed_in_parts(kernel):
    # One float32 sum over 2^15 equal terms is off by up to 2^15 / 2 roundings, parts of some hundred by some hundred.
    query, positive, _ = problem(32, 16, 1)
    for seed in range(2):
        kernel.check((query, positive, np.repeat(unit_rows(1, 16, seed), 1 << 15, axis=0)), equal_terms=1000)


@pytest.mark.parametrize("dtypes", [(FLOAT32,) * 3, (BFLOAT16,) * 3], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_neither_bounds_nor_repeatability(kernel, threads, dtypes):
    shapes = ((33, 33, 513),) if build.SANITIZED else ((257, 32, 1500), (1, 512, 1500), (65, 33, 1500))
    for shape in shapes:
        one = kernel.check_shape(shape, dtypes, threads=threads)
        two = kernel.check_shape(shape, dtypes, threads=threads, reverse=True)
        assert all(np.array_equal(one[name], two[name]) for name in OUTPUTS)


def test_levels_without_bfloat16_products_compute_them_in_float32(kernel):
    if kernel.level not in TILES:
        tensors = problem(33, 31, 513)
        plain, asked = kernel.run(*tensors), kernel._replace(bfloat16=True).run(*tensors)
        assert all(np.array_equal(plain[name], asked[name]) for name in OUTPUTS)


def test_outputs_left_out_change_no_other(kernel):
    tensors = problem(33, 31, 513)
    whole = kernel.run(*tensors)
    for rank in (False, True):
        for grad in (False, True):
            part = kernel.run(*tensors, with_rank=rank, with_grad=grad)
            left_out = [] if rank else ["rank"]
            left_out += [] if grad else ["grad_query", "positive_weight"]
            assert set(OUTPUTS) - set(part) == set(left_out)
            assert all(np.array_equal(part[name], whole[name]) for name in part)


def test_row_factor_scales_gradient_and_weight_alone(kernel):
    kernel.check_shape((33, 31, 513), row_factor=1 / 33)


def test_without_keys_there_is_nothing_to_learn(kernel):
    got = kernel.check_shape((33, 31, 0))
    assert np.array_equal(got["lse"], got["positive_logit"])
    assert not any(np.any(got[name]) for name in ("loss", "rank", "grad_query", "positive_weight"))


def test_rank_counts_ties(kernel):
    # Small integers: every product is exact, so equal scores are equal.
    rng = np.random.default_rng(0)
    query, positive, queue = (rng.integers(-2, 3, (rows, 20)).astype(np.float32) for rows in (65, 65, 600))
    expected = (query @ queue.T >= (query * positive).sum(1, keepdims=True)).sum(1)
    for scale in (1.0, 1 / 0.07):
        got = kernel.run(query, positive, queue, scale=scale)
        assert np.array_equal(got["rank"], expected)


@pytest.mark.parametrize("keys", [31, 513])
def test_nan_poisons_its_row_or_from_the_queue_all_rows(kernel, keys):
    poisonable = ("loss", "lse", "positive_weight", "grad_query")
    clean = problem(33, 31, keys)
    poisoned = [x.copy() for x in clean]
    poisoned[0][7, 3] = poisoned[1][20, 30] = np.nan
    got, want = kernel.run(*poisoned), kernel.run(*clean)
    for name in poisonable:
        bad = np.isnan(got[name].reshape(33, -1)).any(1)
        assert np.flatnonzero(bad).tolist() == [7, 20], name
        assert np.array_equal(got[name][~bad], want[name][~bad])
    for at in (0, keys // 2, keys - 1):
        queue = clean[2].copy()
        queue[at, 5] = np.nan
        got = kernel.run(*clean[:2], queue)
        assert all(np.isnan(got[name].reshape(33, -1)).any(1).all() for name in poisonable)


MUTATIONS = {
    "a key left out": lambda run, t: run(t[0], t[1], t[2][:-1]),
    "a key seen twice": lambda run, t: run(t[0], t[1], np.concatenate([t[2], t[2][:1]])),
    "gradient of zero": lambda run, t: run(*t) | {"grad_query": np.zeros_like(t[0])},
    "gradient without its positive": lambda run, t: run(t[0], 0 * t[1], t[2]),
    "gradient doubled": lambda run, t: {k: v * (1 + (k == "grad_query")) for k, v in run(*t).items()},
    "last row forgotten": lambda run, t: {k: np.concatenate([v[:-1], 0 * v[-1:]]) for k, v in run(*t).items()},
    "rows exchanged": lambda run, t: {k: v[::-1] for k, v in run(*t).items()},
    "inputs rounded to float16": lambda run, t: run(*(narrow(x, FLOAT16) for x in t)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_bounds_reject_wrong_results(kernel, mutation):
    tensors = problem(33, 33, 513)
    got = MUTATIONS[mutation](kernel.run, tensors)
    assert max(excess(got, truth(*tensors, SCALE, kernel.bfloat16), kernel.bfloat16).values()) > 3


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_the_guard_stops_an_access_one_past_the_end(write):
    code = f"from native import build; build.load('native_cpu').one_past(10, {write})"
    done = subprocess.run([sys.executable, "-c", code], cwd=build.NATIVE.parent, capture_output=True)
    assert done.returncode in (-signal.SIGSEGV, 1)  # 1: AddressSanitizer's report of the same
    assert build.SANITIZED or done.returncode == -signal.SIGSEGV
