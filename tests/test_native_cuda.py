"""The CUDA kernels run on the CPU by tests/native/cuda_emulator.h, and what the emulator itself promises."""

from __future__ import annotations

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT16, FLOAT32, far_apart, narrow, same, widen
from native.in_place_truth import RNG, VIEWS, Ring, check_momentum_update, operands, some

ORDERS = ["first to last", "last to first"]


@pytest.fixture(scope="module")
def module():
    return build.load("native_cuda")


@pytest.fixture(params=ORDERS)
def cuda(module, request):
    """The kernels, with blocks and threads run in either order: a missing barrier gives two different results."""
    module.set_order(request.param == "last to first")
    yield module
    module.set_order(False)
    module.set_grid_limit(0)


# scale_rows -----------------------------------------------------------------------------------------------------------


def check_scale_rows(cuda, rows: np.ndarray, scale: np.ndarray, dtype: np.dtype, **shifts: int) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        expected = narrow(scale[:, None] * widen(rows), dtype)
    assert same(cuda.scale_rows(rows, scale, dtype, **shifts), expected)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 8), (2, 31), (33, 16), (130, 1), (3, 129), (2, 1032), (7, 515)])
def test_scale_rows_rounds_the_product_once(cuda, source, to, shape):
    rows, scale = narrow(some(*shape), DTYPES[source]), some(shape[0])
    check_scale_rows(cuda, rows, scale, DTYPES[to])


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_scale_rows_takes_any_strides(cuda, view, source):
    rows = VIEWS[view](narrow(some(9, 24), DTYPES[source]))
    for to in DTYPES.values():
        check_scale_rows(cuda, rows, some(9), to)
        check_scale_rows(cuda, rows, np.broadcast_to(some(1), (9,)), to)
        check_scale_rows(cuda, rows, some(18)[::2], to)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shift", [1, 2, 3, 4, 5])
def test_scale_rows_takes_pointers_of_any_alignment(cuda, source, shift):
    rows = narrow(some(4, 32), DTYPES[source])
    for to in DTYPES.values():
        check_scale_rows(cuda, rows, some(4), to, row_shift=shift, scale_shift=shift % 2)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("shape", [(300, 4), (2, 2100), (7, 1041), (40, 320)])
def test_scale_rows_needs_no_particular_number_of_blocks(cuda, shape, blocks):
    cuda.set_grid_limit(blocks)
    check_scale_rows(cuda, some(*shape), some(shape[0]), FLOAT32)
    check_scale_rows(cuda, some(*shape), some(shape[0]), BFLOAT16)


@pytest.mark.parametrize(("to", "vectors"), [(FLOAT32, 32), (BFLOAT16, 32)])
def test_scale_rows_gives_every_thread_one_vector_at_the_size_of_a_loss(module, to, vectors):
    check_scale_rows(module, some(256, 128), some(256), to)
    (blocks, one, _), (lanes, rows, _) = module.last_launch()
    assert (lanes, lanes * rows, blocks * rows, one) == (vectors, 128, 256, 1)
    check_scale_rows(module, narrow(some(256, 128), to), some(256), BFLOAT16)
    assert module.last_launch()[1][0] == (16 if to == BFLOAT16 else 32)


@pytest.mark.parametrize("columns", [16, 17], ids=["vectors", "elements"])
def test_scale_rows_takes_rows_more_than_2_to_the_31_elements_apart(cuda, columns):
    check_scale_rows(cuda, far_apart(narrow(some(3, columns), BFLOAT16)), some(3), BFLOAT16)


def test_scale_rows_keeps_nan_infinity_and_what_overflows(cuda):
    rows = np.array([[1, -1, np.nan, np.inf, 65504, 65520, 3e38, 1e-45]] * 4, np.float32)
    for to in DTYPES.values():
        check_scale_rows(cuda, rows, np.array([1, -2, np.nan, 0], np.float32), to)


# momentum_update ------------------------------------------------------------------------------------------------------

SMALLEST_CHUNK, LARGE_TABLE = 4096, 880  # of csrc/cuda/momentum_update.cu: what the sizes below straddle


@pytest.mark.parametrize("copy", [None, *DTYPES])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_momentum_update_averages_every_mix_of_dtypes(cuda, target, source, copy):
    for n in (1, 7, 8, 9, 31, 1027):
        for offsets in ((0, 0, 0), (-1, -1, -1)):
            check_momentum_update(cuda, *operands(target, source, n), DTYPES.get(copy), offsets=offsets)


@pytest.mark.parametrize("n", [SMALLEST_CHUNK - 1, SMALLEST_CHUNK, SMALLEST_CHUNK + 1, 3 * SMALLEST_CHUNK + 3])
def test_momentum_update_meets_at_the_borders_of_chunks(cuda, n):
    for target, source in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        check_momentum_update(cuda, *operands(target, source, n), BFLOAT16, offsets=(0, 0, 0))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("offsets", [(4, 0, 0), (0, 4, 0), (0, 0, 4), (8, 8, 8), (12, 8, 4)])
def test_momentum_update_takes_pointers_of_any_alignment(cuda, target, offsets):
    for source in DTYPES:
        for copy in DTYPES.values():
            check_momentum_update(cuda, *operands(target, source, 300), copy, offsets=offsets)


@pytest.mark.parametrize("m", [0.0, 0.3, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_momentum_update_reads_the_momentum_where_it_is(cuda, m, dtype):
    m = float(dtype(m))
    expected, source = operands("float32", "float32", 200)
    target = expected.copy()
    cuda.momentum_update([expected], [source], momentum=m)
    cuda.momentum_update([target], [source], momentum=0.123, tensor=np.array([m], dtype))
    assert same(target, expected)
    check_momentum_update(cuda, *operands("float32", "float32", 200), m=m)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_momentum_of_0_or_1_is_exact_whatever_the_other_end_holds(cuda, target, source, on_device):
    wild, tame = np.tile(np.array([np.nan, np.inf, -np.inf, 6e4], np.float32), 11), some(44)
    for m, (t, s) in ((0.0, (wild, tame)), (1.0, (tame, wild))):
        t, s = narrow(t, DTYPES[target]), narrow(s, DTYPES[source])
        expected = t.copy() if m else narrow(widen(s), t.dtype)
        copy = np.zeros(44, np.float32)
        cuda.momentum_update([t], [s], [copy], **({"tensor": np.array([m])} if on_device else {"momentum": m}))
        assert same(t, expected)
        assert same(copy, widen(expected))


@pytest.mark.parametrize("m", [0.3, 0.5, 0.9, 0.995])
def test_momentum_update_leaves_frozen_tensors_alone(cuda, m):
    for dtype in DTYPES.values():
        source = narrow(some(130), dtype)
        target = source.copy()
        for _ in range(3):
            cuda.momentum_update([target], [source], momentum=m)
        assert same(target, source)


@pytest.mark.parametrize("m", [0.0, 0.25, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_convex_momentum_update_rounds_three_times(cuda, target, source, m):
    for options in ({"momentum": m}, {"tensor": np.array([m])}):
        t, s = operands(target, source, 517)
        left = narrow(widen(t) * np.float32(m), t.dtype)
        right = narrow(widen(s) * np.float32(1 - m), s.dtype)
        expected = narrow(widen(left) + widen(right), t.dtype)
        cuda.momentum_update([t], [s], convex=True, offsets=(0, 0, 0), **options)
        assert same(t, expected)


def test_momentum_update_of_many_tensors_is_one_launch(cuda):
    pairs = [operands("float32", "bfloat16", 256) for _ in range(500)]
    cuda.momentum_update([t for t, _ in pairs], [s for _, s in pairs], momentum=0.5)
    assert cuda.last_launch()[0] == (500, 1, 1)


@pytest.mark.parametrize("count", [99, 100, 101, LARGE_TABLE, LARGE_TABLE + 40])
def test_momentum_update_finds_every_tensor_of_its_tables(cuda, count):
    kinds = [(target, source) for target in DTYPES for source in DTYPES]
    pairs = [operands(*kinds[i % 9], i % 13) for i in range(count)]
    pairs[50] = operands("float32", "float32", 2 * SMALLEST_CHUNK + 5)
    copies = [np.zeros(t.shape, FLOAT16) for t, _ in pairs]
    expected = [t.copy() for t, _ in pairs]
    cuda.momentum_update([t for t, _ in pairs], [s for _, s in pairs], copies, momentum=0.75)
    alone = {}  # one pair at a time; most are alike
    for i, ((t, s), copy) in enumerate(zip(pairs, copies, strict=True)):
        kind = (t.dtype, s.dtype, len(t))
        if kind not in alone:
            cuda.momentum_update([expected[i]], [s], momentum=0.75)
            alone[kind] = expected[i]
        assert same(t, alone[kind])
        assert same(copy, narrow(widen(t), FLOAT16))


def test_momentum_update_of_nothing_launches_nothing(cuda):
    cuda.launch_only(7, 32, 0)
    cuda.momentum_update([], [], momentum=0.9)
    cuda.momentum_update([np.zeros(0, np.float32)], [np.zeros(0, np.float32)], momentum=0.9)
    assert cuda.last_launch()[0][0] == 7


@pytest.mark.skipif(build.SANITIZED, reason="16 million elements")
def test_chunks_of_momentum_update_grow_with_the_list(module):
    n = 4096 * SMALLEST_CHUNK + SMALLEST_CHUNK
    target, source = np.zeros(n, np.float32), np.arange(n, dtype=np.float32)
    module.momentum_update([target], [source], momentum=0.5, offsets=(0, 0, 0))
    assert module.last_launch()[0][0] == 2049
    assert same(target, source / 2)


@pytest.mark.parametrize("m", [0.9, 0.99, 0.995])
def test_momentum_update_approaches_a_constant_source_as_m_to_the_n(cuda, m):
    source, target = some(40), 3 * some(41)[1:]
    start = target.astype(np.float64)
    for n in range(1, 21):
        cuda.momentum_update([target], [source], momentum=m)
        assert np.abs(target - (source + m**n * (start - source))).max() < 1e-6 * n


# key_queue ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 40, 516, 1032])
def test_enqueue_casts_and_wraps(cuda, to, source, dim):
    ring = Ring(7, dim, DTYPES[to], cursor=5)
    for batch in (3, 1, 6):
        ring.enqueue(cuda, narrow(some(batch, dim), DTYPES[source]), ring_offset=0).check()


@pytest.mark.parametrize("drop_tail", [False, True])
@pytest.mark.parametrize("cursor", [0, 1, 6, 7, 16, -1, -40, (1 << 40) + 3, -(1 << 46)])
@pytest.mark.parametrize("batch", [0, 1, 2, 7, 8, 20])
def test_enqueue_of_any_batch_at_any_cursor_is_one_row_at_a_time(cuda, batch, cursor, drop_tail):
    ring = Ring(7, 4, cursor=cursor)
    if batch == 0:
        ring.cursor[:] = ring.twin_cursor  # without rows nothing runs, and a cursor outside the ring stays there
    for _ in range(3):
        ring.enqueue(cuda, some(batch, 4), drop_tail=drop_tail).check()


@pytest.mark.parametrize("cursor", [(1 << 63) - 1, -(1 << 63), 1 << 47, 5 << 48, -(7 << 48) - 1])
def test_garbage_for_a_cursor_never_writes_outside_the_ring(cuda, cursor):
    ring = Ring(7, 4, cursor=cursor, widths=[8])
    ring.enqueue(cuda, some(9, 4))  # the guards around all memory speak up
    assert np.isin(ring.keys[:, 0], [*some(9, 4)[:, 0], *ring.twin[:, 0], *(10 * some(7, 4))[:, 0]]).all()


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
@pytest.mark.parametrize("drop_tail", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_enqueue_keeps_the_rows_of_the_mask(cuda, keep, drop_tail, blocks):
    cuda.set_grid_limit(blocks)
    ring = Ring(11, 5, cursor=9, widths=[8, 3])
    for batch in (1, 4, 13, 300):
        mask = RNG(batch).random(batch) < keep
        ring.enqueue(cuda, some(batch, 5), mask, drop_tail=drop_tail).check()
        ring.enqueue(cuda, some(batch, 5), np.repeat(mask, 3)[::3], drop_tail=drop_tail).check()


@pytest.mark.parametrize("dim", [3, 640])
def test_enqueue_needs_no_particular_number_of_blocks(cuda, dim):
    for blocks in (1, 2, 5):
        cuda.set_grid_limit(blocks)
        ring = Ring(60, dim, cursor=50)
        ring.enqueue(cuda, some(23, dim)).enqueue(cuda, some(37, dim), normalize=True).check(1e-6)


@pytest.mark.parametrize("widths", [[1], [3], [4], [8], [16], [24], [600], [], [8, 1, 24, 4, 3, 16, 8, 2]])
def test_payloads_move_with_their_keys(cuda, widths):
    ring = Ring(10, 6, BFLOAT16, cursor=8, widths=widths)
    ring.enqueue(cuda, some(4, 6)).check()
    ring.enqueue(cuda, some(25, 6), RNG(0).random(25) < 0.7).check()
    ring.enqueue(cuda, some(25, 6), drop_tail=True).check()


def test_payloads_of_any_stride_move_as_bytes(cuda):
    ids, labels = np.zeros((6, 4), np.int64)[:, :1], np.zeros((6, 2, 3), np.float32)[:, 0]
    rows, wide = np.arange(24).reshape(8, 3)[::2, 1:2], some(4, 5)[:, 1:4]
    cuda.key_queue(
        np.zeros((6, 2), np.float32), np.array([4]), some(4, 2), payload_rings=[ids, labels], payloads=[rows, wide]
    )
    assert (ids[:, 0] == [13, 19, 0, 0, 1, 7]).all()
    assert same(labels[[4, 5, 0, 1]].copy(), wide.copy())
    assert not labels.base[:, 1].any()
    assert not ids.base[:, 1:].any()


RING_VIEWS = {name: view for name, view in VIEWS.items() if name != "one row for all"}


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("view", RING_VIEWS)
def test_enqueue_writes_rings_of_any_strides(cuda, view, to):
    for source in DTYPES.values():
        ring = Ring(9, 24, DTYPES[to], cursor=7, view=RING_VIEWS[view])
        ring.enqueue(cuda, narrow(some(5, 24), source), ring_offset=0).check()
        ring.enqueue(cuda, narrow(some(5, 24), source), normalize=True).check(2.0**-7)


@pytest.mark.parametrize("to", DTYPES)
def test_enqueue_of_a_width_that_is_no_multiple_of_a_vector_writes_to_the_end(cuda, to):
    def inside(x: np.ndarray) -> np.ndarray:  # rows as far apart as whole vectors
        return np.pad(x, ((0, 0), (0, 3)))[:, : x.shape[1]]

    ring = Ring(5, 21, DTYPES[to], cursor=3, view=inside)
    ring.enqueue(cuda, inside(narrow(some(3, 21), DTYPES[to])), ring_offset=0, key_offset=0).check()
    Ring(1, 3, DTYPES[to]).enqueue(cuda, narrow(some(1, 3), DTYPES[to]), ring_offset=0, key_offset=0).check()


@pytest.mark.parametrize("view", VIEWS)
def test_enqueue_reads_keys_of_any_strides(cuda, view):
    for source in DTYPES.values():
        for to in DTYPES.values():
            ring, keys = Ring(9, 24, to, cursor=7), VIEWS[view](narrow(some(6, 24), source))
            for offset in (-1, 0):
                ring.enqueue(cuda, keys, ring_offset=0, key_offset=offset).check()


@pytest.mark.parametrize("key_offset", [0, 4, 8, 12])
def test_enqueue_takes_pointers_of_any_alignment(cuda, key_offset):
    for source in DTYPES.values():
        for to in DTYPES.values():
            ring = Ring(5, 16, to, cursor=4)
            for offset in (0, 4, 8):
                ring.enqueue(cuda, narrow(some(3, 16), source), key_offset=key_offset, ring_offset=offset).check()


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize(("to", "tolerance"), [("float32", 5e-7), ("bfloat16", 2.0**-7), ("float16", 2.0**-10)])
@pytest.mark.parametrize("dim", [1, 5, 24, 128, 513, 1024])
def test_enqueue_normalizes_in_float32(cuda, dim, to, tolerance, source):
    keys = narrow(some(6, dim) * np.float32([[1], [0], [1e-3], [100], [1], [1]]), DTYPES[source])
    ring = Ring(9, dim, DTYPES[to], cursor=6)
    ring.enqueue(cuda, keys, normalize=True).enqueue(cuda, keys[:2], normalize=True, ring_offset=0)
    if to == "float16":  # of unit rows, elements below its normal range
        small = np.abs(widen(ring.twin)) < 2.0**-14
        ring.keys[small] = ring.twin[small]
    ring.check(tolerance)


@pytest.mark.parametrize("dim", [4, 640])
def test_a_row_that_is_not_a_number_spoils_itself_alone(cuda, dim):
    keys = some(5, dim)
    keys[1, 2], keys[3, 0] = np.nan, np.inf
    ring = Ring(6, dim).enqueue(cuda, keys, normalize=True)
    assert np.isnan(ring.keys[1]).all()
    assert np.isnan(ring.keys[3, 0])
    assert not ring.keys[3, 1:].any()
    assert np.allclose(np.linalg.norm(ring.keys[[0, 2, 4]], axis=1), 1)
    Ring(6, dim).enqueue(cuda, keys).check()


@pytest.mark.parametrize("dim", [0, 4])
def test_cursor_and_count_move_without_columns_too(cuda, dim):
    ring = Ring(5, dim, cursor=3, widths=[8])
    for batch in (1, 3, 2):
        ring.enqueue(cuda, np.zeros((batch, dim), np.float32), normalize=True).check()


def test_a_count_is_kept_only_where_one_is_given(cuda):
    ring, cursor = np.zeros((3, 2), np.float32), np.array([2])
    cuda.key_queue(ring, cursor, np.ones((2, 2), np.float32))
    assert (ring[:, 0] == [1, 0, 1]).all()
    assert cursor[0] == 1


@pytest.mark.parametrize("columns", [16, 17], ids=["vectors", "elements"])
def test_enqueue_takes_rows_more_than_2_to_the_31_elements_apart(cuda, columns):
    x = narrow(some(3, columns), BFLOAT16)
    Ring(3, columns, BFLOAT16, cursor=1).enqueue(cuda, far_apart(x), ring_offset=0).check()
    ring, cursor = far_apart(np.zeros_like(x)), np.array([1])
    cuda.key_queue(ring, cursor, x, ring_offset=0)
    assert same(np.roll(x, 1, axis=0), ring.copy())


# The emulator ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [32, 64, 256])
@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (1000, 3), (5000, 4)])
def test_block_reduction_by_shuffles_and_shared_memory(cuda, n, blocks, threads):
    x = some(n)
    whole = np.zeros(-(-n // (blocks * threads)) * blocks * threads)
    whole[:n] = x
    expected = whole.reshape(-1, blocks, threads).sum((0, 2))
    assert np.abs(cuda.block_sums(x, blocks, threads) - expected).max() < 1e-6 * np.abs(x).sum()
    cuda.set_grid_limit(1)
    assert np.abs(cuda.block_sums(x, blocks, threads) - expected).max() < 1e-6 * np.abs(x).sum()


def test_barrier_orders_writes_to_dynamic_shared_memory(cuda):
    assert same(cuda.reversed(some(96), True), some(96)[::-1])


def test_a_missing_barrier_shows(cuda):
    assert not same(cuda.reversed(some(96), False), some(96)[::-1])


def test_shared_memory_is_not_a_number_at_the_start_of_every_block(cuda):
    assert np.isnan(cuda.shared_at_start(3)).all()


def test_ballot_and_atomics(cuda):
    x = some(20)
    kept, count = cuda.kept_positive(x)
    assert same(kept[:-count], x[x > 0])
    assert np.isnan(kept[-count:]).all()
    assert -count == (x > 0).sum()


def test_shuffles_read_the_lane_the_programming_guide_names(cuda):
    lane = np.arange(32)
    indexed, up, down, crossed, narrow_crossed = cuda.shuffles().reshape(5, 32)
    assert (indexed == lane // 8 * 8 + 5).all()
    assert (up == np.where(lane % 16 < 3, lane, lane - 3)).all()
    assert (down == np.where(lane % 16 > 12, lane, lane + 3)).all()
    assert (crossed == (lane ^ 7)).all()
    assert (narrow_crossed == np.where((lane ^ 12) // 8 <= lane // 8, lane ^ 12, lane)).all()


def test_halves_of_a_warp_shuffle_on_their_own(cuda):
    lane = np.arange(32) ^ 16
    assert (cuda.two_groups() == np.where(lane < 16, 100 + (lane ^ 3), 200 + (lane ^ 1))).all()


def test_vector_types(cuda):
    assert same(cuda.scaled_by_four(some(1000)), 4 * some(1000))


def test_half_and_bfloat16_round_as_ieee_says(cuda):
    every = np.arange(1 << 16, dtype=np.uint32)
    halves, bfloats = every.astype(np.uint16).view(np.float16), every.astype(np.uint16)
    ties, below = (every << 16) | 0x8000, (every << 16) | 0x7FFF  # of bfloat16; half's are among every << 12
    edges = np.concatenate([every << 16, ties, below, every << 12, (every << 13) | 0x0FFF]).astype(np.uint32)
    floats = np.concatenate([edges.view(np.float32), widen(halves), some(1000) * np.float32(1e-6)])
    if build.SANITIZED:
        floats = floats[::97]
    half, bfloat, from_half, from_bfloat = cuda.to_half_and_back(floats)
    assert same(half, narrow(floats, FLOAT16))
    assert same(bfloat, narrow(floats, BFLOAT16))
    assert same(from_half, widen(half))
    assert same(from_bfloat, widen(bfloat))
    assert build.SANITIZED or set(half) >= set(halves[np.isfinite(halves)])  # every half was met
    assert build.SANITIZED or set(bfloat) >= set(bfloats[np.isfinite(widen(bfloats))])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda m: m.barrier_in_a_branch(64),
            r"divergence in block \(0, 0, 0\): thread 0 waits .*thread 32 left the kernel",
        ),
        (
            lambda m: m.different_barriers(64),
            r"divergence.* thread 0 waits at \S+cu:\d+: .*thread 32 waits at \S+cu:\d+: ",
        ),
        (lambda m: m.shuffle_without_everybody(64), r"divergence.* thread 7 left the kernel"),
        (lambda m: m.shuffle_from_outside_the_mask(), r"lane 0 reads lane 9, which takes no part"),
    ],
    ids=["barrier in a branch", "different barriers", "shuffle without everybody", "shuffle from outside the mask"],
)
def test_divergence_is_reported_and_leaves_no_trace(cuda, mistake, message):
    with pytest.raises(RuntimeError, match=message):
        mistake(cuda)
    assert same(cuda.reversed(some(96), True), some(96)[::-1])


def test_impossible_launches_are_refused_as_cuda_refuses_them(cuda):
    invalid_value, invalid_configuration = 1, 9
    assert cuda.launch_only(1, 1024, 48 << 10) == 0
    assert cuda.launch_only(1, 1025, 0) == invalid_configuration
    assert cuda.launch_only(0, 32, 0) == invalid_configuration
    assert cuda.launch_only(1, 32, (48 << 10) + 1) == invalid_value


# Sanitizers -----------------------------------------------------------------------------------------------------------


def in_sanitized_process(statement: str) -> str:
    code = "import sys; sys.path.insert(0, 'tests'); from native import build; m = build.load('native_cuda'); "
    done = build.run_sanitized("-c", code + statement)
    return done.stderr if done.returncode else "nothing was noticed"


@pytest.mark.skipif(build.SANITIZED, reason="starts such processes")
def test_sanitizers_see_into_kernels():
    assert "global-buffer-overflow" in in_sanitized_process("m.one_past_shared()")
    assert "misaligned address" in in_sanitized_process("import numpy; m.misaligned_vector(numpy.zeros(8))")
    assert in_sanitized_process("m.shuffles()") == "nothing was noticed"


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout + done.stderr
