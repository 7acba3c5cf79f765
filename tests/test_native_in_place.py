"""The CPU kernels that write in place, at every ISA level, in guarded memory, on any number of threads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT16, FLOAT32, far_apart, narrow, same, widen
from native.in_place_truth import RNG, VIEWS, Ring, check_momentum_update, operands, some

module = build.load("native_cpu")


class Kernels(NamedTuple):
    level: str
    threads: int
    reverse: bool  # shares from the last to the first

    def momentum_update(self, *tensors: Any, **options: Any) -> None:
        module.momentum_update(*self, *tensors, **options)

    def key_queue(self, *tensors: Any, **options: Any) -> None:
        module.key_queue(*self, *tensors, **options)


SCHEDULES = ((1, False), (3, True))
KERNELS = [Kernels(level, *schedule) for level in module.levels() for schedule in SCHEDULES]


@pytest.fixture(params=KERNELS, ids=lambda k: f"{k.level}-{k.threads}")
def kernels(request) -> Kernels:
    return request.param


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_every_mix_of_dtypes_is_averaged(kernels, target, source):
    for copy in (None, *DTYPES.values()):
        for n in (1, 7, 15, 16, 17, 33, 1027):
            check_momentum_update(kernels, *operands(target, source, n), copy)
        for offsets in ((4, 0, 0), (0, 2, 0), (8, 8, 6)):
            check_momentum_update(kernels, *operands(target, source, 100), copy, offsets=offsets)


@pytest.mark.parametrize("m", [0.0, 0.3, 0.5, 0.75, 0.999, 1.0])
def test_the_momentum_may_be_in_memory(kernels, m):
    for dtype in (np.float32, np.float64):
        value = float(dtype(m))
        expected, source = operands("float32", "float32", 200)
        target = expected.copy()
        kernels.momentum_update([expected], [source], momentum=value)
        kernels.momentum_update([target], [source], momentum=0.123, tensor=np.array([m], dtype))
        assert same(target, expected)
        check_momentum_update(kernels, *operands("float32", "float32", 200), m=value)


def test_momentum_of_0_or_1_is_exact_whatever_the_other_end_holds(kernels):
    wild, tame = np.tile(np.array([np.nan, np.inf, -np.inf, 6e4], np.float32), 11), some(44)
    for target in DTYPES.values():
        for source in DTYPES.values():
            for m, (t, s) in ((0.0, (wild, tame)), (1.0, (tame, wild))):
                t, s = narrow(t, target), narrow(s, source)
                expected = t.copy() if m else narrow(widen(s), target)
                copy = np.zeros(44, np.float32)
                kernels.momentum_update([t], [s], [copy], momentum=m)
                assert same(t, expected)
                assert same(copy, widen(expected))


@pytest.mark.parametrize("m", [0.25, 0.99])
def test_the_convex_form_rounds_three_times(kernels, m):
    for target in DTYPES:
        for source in DTYPES:
            t, s = operands(target, source, 517)
            left, right = narrow(widen(t) * np.float32(m), t.dtype), narrow(widen(s) * np.float32(1 - m), s.dtype)
            expected = narrow(widen(left) + widen(right), t.dtype)
            kernels.momentum_update([t], [s], convex=True, momentum=m)
            assert same(t, expected)


@pytest.mark.parametrize("value", [65519.0, 65520.0, 1e6, 2.0**-14, 2.0**-15 + 2.0**-26, 2.0**-25, 2.0**-26, np.nan])
def test_float16_rounds_at_its_ends(kernels, value):
    source = np.array([value, -value, 1.5 * value] * 7, np.float32)
    target = np.zeros(21, FLOAT16)
    kernels.momentum_update([target], [source], momentum=0.0)
    assert same(target, narrow(source, FLOAT16))


@pytest.mark.parametrize("level", module.levels())
def test_shares_meet_at_any_number_of_threads(level):
    # A megabyte, so that there are shares, cut inside tensors and at their ends.
    sizes = (3, 70_001, 1, 0, 63, 64, 65, 120_000, 5)
    kinds = [(target, source) for target in DTYPES for source in DTYPES]
    results = []
    for threads in (1, 2, 3, 4, 7):
        pairs = [operands(*kinds[i], n) for i, n in enumerate(sizes)]
        copies = [np.zeros(n, BFLOAT16) for n in sizes]
        lists = [t for t, _ in pairs], [s for _, s in pairs], copies
        Kernels(level, threads, threads % 2 == 0).momentum_update(*lists, momentum=0.9)
        results.append([*lists[0], *copies])
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))
    for (t, _), i in zip(pairs, range(len(sizes)), strict=True):
        check_momentum_update(Kernels(level, 1, False), *operands(*kinds[i], sizes[i]))
        assert same(copies[i], narrow(widen(t), BFLOAT16))


@pytest.mark.skipif(build.SANITIZED, reason="17 MB, element by element")
def test_copies_of_a_list_larger_than_the_caches_are_written_past_them(kernels):
    for copy, offset in ((BFLOAT16, 0), (FLOAT16, 32), (FLOAT32, 64), (BFLOAT16, 6)):  # the last to no vector
        check_momentum_update(kernels, *operands("float32", "bfloat16", 1_400_009), copy, offsets=(0, 0, offset))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("to", DTYPES)
def test_keys_are_cast_and_wrap(kernels, to, source):
    for dim in (1, 3, 16, 17, 40, 516):
        ring = Ring(7, dim, DTYPES[to], cursor=5)
        for batch in (3, 1, 6):
            ring.enqueue(kernels, narrow(some(batch, dim), DTYPES[source])).check()


@pytest.mark.parametrize("cursor", [0, 6, 7, -40, (1 << 62) + 3, -(1 << 63)])
def test_any_batch_at_any_cursor_is_one_row_at_a_time(kernels, cursor):
    for batch in (0, 1, 2, 7, 8, 20, 150):
        for drop_tail in (False, True):
            ring = Ring(7, 4, cursor=cursor)
            for _ in range(3):
                ring.enqueue(kernels, some(batch, 4), drop_tail=drop_tail).check()


@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_rows_of_the_mask_are_kept(kernels, keep):
    for drop_tail in (False, True):
        ring = Ring(11, 5, cursor=9, widths=[8, 3])
        for batch in (1, 4, 13, 300):
            mask = RNG(batch).random(batch) < keep
            ring.enqueue(kernels, some(batch, 5), mask, drop_tail=drop_tail).check()
            ring.enqueue(kernels, some(batch, 5), np.repeat(mask, 3)[::3], drop_tail=drop_tail).check()


def test_shares_of_a_large_batch_meet(kernels):
    # 300 x 400 elements: shared by threads; more rows than the ring has, and a mask.
    for size in (1000, 250):
        ring = Ring(size, 400, BFLOAT16, cursor=900, widths=[8])
        ring.enqueue(kernels, some(300, 400)).check()
        ring.enqueue(kernels, some(300, 400), RNG(1).random(300) < 0.6).check()


@pytest.mark.skipif(build.SANITIZED, reason="17 MB, element by element")
def test_a_ring_larger_than_the_caches_is_written_past_them(kernels):
    for offset in (0, 4):  # of the first row to a vector
        ring = Ring(16_400, 257, cursor=16_390)
        ring.enqueue(kernels, some(40, 257), ring_offset=offset).check()


def test_keys_are_normalised(kernels):
    for to in DTYPES.values():
        keys = some(6, 75) * 1e3
        keys[2], keys[4, 9] = 0, np.nan
        Ring(9, 75, to, cursor=7).enqueue(kernels, keys, normalize=True).check(1e-6 if to == FLOAT32 else 2.0**-7)


@pytest.mark.parametrize("view", VIEWS)
def test_rings_and_keys_may_have_any_strides(kernels, view):
    for to in DTYPES.values():
        if view != "one row for all":
            ring = Ring(9, 24, to, cursor=7, view=VIEWS[view])
            ring.enqueue(kernels, narrow(some(5, 24), to)).enqueue(kernels, some(3, 24)).check()
        ring = Ring(9, 24, to, cursor=7)
        ring.enqueue(kernels, VIEWS[view](narrow(some(5, 24), to))).enqueue(kernels, VIEWS[view](some(3, 24))).check()


def test_rows_may_be_more_than_2_to_the_31_elements_apart(kernels):
    keys = some(3, 8)
    ring, cursor = far_apart(np.zeros((3, 8), np.float32)), np.array([1])
    kernels.key_queue(ring, cursor, far_apart(keys))
    assert same(np.ascontiguousarray(ring), keys[[2, 0, 1]])


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout + done.stderr
