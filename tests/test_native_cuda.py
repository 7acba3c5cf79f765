"""The CUDA kernels run on the CPU by tests/native/cuda_emulator.h, and what the emulator itself promises."""

from __future__ import annotations

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT16, FLOAT32, far_apart, narrow, same, widen

ORDERS = ["first to last", "last to first"]
RNG = np.random.default_rng


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


def some(*shape: int) -> np.ndarray:
    return RNG(sum(shape)).standard_normal(shape).astype(np.float32)


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


VIEWS = {
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "every other column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "columns of a wider buffer": lambda x: np.pad(x, ((0, 0), (0, 8)))[:, : x.shape[1]],
    "columns of a buffer of odd width": lambda x: np.pad(x, ((0, 0), (0, 1)))[:, : x.shape[1]],
    "one row for all": lambda x: np.broadcast_to(x[:1], x.shape),
    "every third row": lambda x: np.repeat(x, 3, axis=0)[::3],
}


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
