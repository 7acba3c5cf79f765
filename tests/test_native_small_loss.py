"""The small_loss kernels of the CPU, at every ISA level and on any number of threads, and those of CUDA, run by
tests/native/cuda_emulator.h: one and the same choice of rows by all of them, and the numbers of float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from native import build
from native.floats import BFLOAT16, DTYPES, FLOAT16, FLOAT32, far_apart, narrow, same, widen
from native.small_loss_truth import SETTINGS, Settings, candidates_of, gradients, mask, row_losses, twin_loss

cpu, cuda = build.load("native_cpu"), build.load("native_cuda")
RNG = np.random.default_rng
SHARE = 16 << 10  # of csrc/cpu/small_loss.cpp: elements that are worth a thread
ONE_BLOCK = 2048  # of csrc/cuda/small_loss_select.cuh: rows


class Cpu(NamedTuple):
    level: str
    threads: int
    reverse: bool  # tasks from the last to the first

    def __call__(self, op: str, *arguments: Any, **options: Any) -> Any:
        return getattr(cpu, op)(*self, *arguments, **options)


class Cuda(NamedTuple):
    reverse: bool = False  # blocks and threads last to first
    blocks: int = 0  # at most, in either direction of the grid; 0: as many as the launcher asks for

    def __call__(self, op: str, *arguments: Any, **options: Any) -> Any:
        cuda.set_order(self.reverse)
        cuda.set_grid_limit(self.blocks)
        try:
            return getattr(cuda, op)(*arguments, **options)
        finally:
            cuda.set_order(False)
            cuda.set_grid_limit(0)


SCHEDULES = ((3, True),) if build.SANITIZED else ((1, False), (2, True), (3, False), (3, True))
CPUS = [Cpu(level, *schedule) for level in cpu.levels() for schedule in SCHEDULES]
CUDAS = [Cuda(), Cuda(reverse=True)][: 1 if build.SANITIZED else 2]
ONE_OF_EACH = [Cpu(cpu.levels()[0], 2, False), CUDAS[0]]


def tuned(out: dict) -> dict:
    """The outputs, without what may differ: the largest logit of a row that is not a number, and the sign of zero."""
    stats = out["stats"].copy()
    stats[..., 0] = np.where(np.isnan(stats[..., 1]), np.nan, stats[..., 0]) + 0.0
    return out | {"losses": np.stack(out["losses"]), "kept": np.stack(out["kept"]), "stats": stats}


def run(kernels, z1, z2, labels, settings: Settings, **options: Any) -> dict:
    return tuned(kernels("twin_loss", z1, z2, labels, *settings.arguments, **options))


def on_all(z1, z2, labels, settings: Settings, kernels=(*CPUS, *CUDAS), **options: Any) -> dict:
    """What every one of the kernels gives, bit for bit."""
    first = run(kernels[0], z1, z2, labels, settings, **options)
    for other in kernels[1:]:
        out = run(other, z1, z2, labels, settings, **options)
        for name, value in first.items():
            equal = (value == out[name]).all() if name == "kept" else same(value, out[name])
            assert equal, f"{name} of {other} differs from that of {kernels[0]}"
    return first


def check(z1, z2, labels, settings: Settings, rates, kernels=(*CPUS, *CUDAS), **options: Any) -> dict:
    """All kernels alike, and as the definition has it."""
    out = on_all(z1, z2, labels, settings, kernels, **options)
    known = {name: options[name] for name in ("sample_ids",) if name in options}
    step = int(options["step_tensor"][0]) if "step_tensor" in options else options.get("step", 0)
    truth = twin_loss(widen(z1), widen(z2), labels, settings, np.broadcast_to(rates, len(z1)), step=step, **known)
    assert (out["kept"] == truth.kept).all()
    assert np.allclose(out["coefficients"], truth.coefficients, rtol=1e-6, atol=0)
    assert np.allclose(out["losses"], truth.losses, rtol=2e-6, atol=1e-6, equal_nan=True)
    return out


def problem(groups: int, rows: int, classes: int, dtype=FLOAT32, seed: int = 0):
    """Logits of two networks that are right about most rows, and agree on many."""
    rng = RNG((groups, rows, classes, seed))
    labels = rng.integers(classes, size=(groups, rows))
    shared = rng.standard_normal((groups, rows, classes)) + 2 * (np.arange(classes) == labels[..., None])
    z1, z2 = (narrow(3 * (shared + 0.5 * rng.standard_normal(shared.shape)), dtype) for _ in range(2))
    return z1, z2, labels


def id_of(settings: Settings) -> str:
    return str(settings)


TESTED = [SETTINGS[i] for i in (1, 2, 5, 6)] if build.SANITIZED else SETTINGS  # one of each kind
every_setting = pytest.mark.parametrize("settings", TESTED, ids=id_of)
SHAPES = [
    (1, 1, 1),
    (1, 2, 3),
    (3, 31, 10),
    (1, 33, 16),
    (2, 33, 17),
    (1, 65, 2),
    (2, 9, 32),
    (1, 70, 33),
    (1, 5, 1000),
]
if build.SANITIZED:
    SHAPES = [shape for shape in SHAPES if shape[1] < 35]

# Rows, coefficients, losses -------------------------------------------------------------------------------------------


@every_setting
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_chooses_the_same_rows(shape, settings):
    check(*problem(*shape), settings, 0.3, forget_rate=0.3)
    check(*problem(*shape), settings, 0.97, ONE_OF_EACH, forget_rate=0.97)


@every_setting
def test_at_the_size_of_a_batch(settings):
    for shape in ((1, 128, 10),) if build.SANITIZED else ((1, 128, 10), (1, 300, 10), (1, 130, 100)):
        kernels = (*CPUS, CUDAS[0]) if shape[1] == 130 or settings.released else CPUS
        check(*problem(*shape), settings, 0.25, kernels, forget_rate=0.25)


@every_setting
def test_shares_of_threads_meet(settings):
    z1, z2, labels = problem(2, 700, 40)
    assert 2 * z1.size > 3 * SHARE
    check(z1, z2, labels, settings, 0.4, CPUS, forget_rate=0.4)


@every_setting
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_16_bits(settings, dtype):
    # Few distinct numbers: many ties, which float32 sums of equal numbers in another order would break.
    for shape in ((2, 40, 7), (1, 33, 35)):
        on_all(*problem(*shape, DTYPES[dtype]), settings, forget_rate=0.5)
    check(*problem(1, 12, 40, DTYPES[dtype]), settings, 0.5, forget_rate=0.5)


@every_setting
def test_ties_go_to_the_lower_row(settings):
    z1, z2, labels = problem(2, 4, 6)
    z2 = z2[:, :, [1, 0, 2, 3, 5, 4]]
    repeat = RNG(1).integers(4, size=45)  # each row some 11 times
    z1, z2, labels = z1[:, repeat], z2[:, repeat], labels[:, repeat]
    for rate in (0.1, 0.45, 0.8):
        check(z1, z2, labels, settings, rate, (CPUS[0], CPUS[-1], CUDAS[-1]), forget_rate=rate)
    same_everywhere = [np.repeat(x[:1, :1], 77, 1) for x in (z1, z2, labels)]
    check(*same_everywhere, settings, 0.5, (CPUS[0], CPUS[-1], *CUDAS), forget_rate=0.5)


WILD = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 1.0, 88.0, -104.0], np.float32)


@every_setting
@pytest.mark.parametrize("classes", [5] if build.SANITIZED else [1, 5, 40])
def test_rows_of_infinities_zeros_and_nan(settings, classes):
    rng = RNG(classes)
    z1, z2, labels = problem(1, 60, classes)
    for z in (z1, z2):
        wild = rng.random(z.shape) < 0.4 * (rng.random((1, 60, 1)) < 0.6)
        z[wild] = rng.choice(WILD, wild.sum())
    z1[0, 3], z1[0, 5] = -np.inf, np.nan  # nothing else in the row
    for rate in (0.0, 0.6):
        out = on_all(z1, z2, labels, settings, (*CPUS, CUDAS[0]) if rate else ONE_OF_EACH, forget_rate=rate)
        losses = row_losses(z1, z2, labels, settings)
        assert np.isfinite(losses).any() or classes == 1
        if rate and settings.method == "co_teaching" and not settings.released:
            kept_last = [np.isnan(losses[1 - i][out["kept"][i] == 1]) for i in range(2)]
            assert not np.concatenate(kept_last).any() or np.isnan(losses).mean() > 0.4
    assert not np.isfinite(out["stats"][0, 0, [3, 5], 1]).any()


@every_setting
def test_classes_that_are_masked_out_of_both_networks(settings):
    z1, z2, labels = problem(2, 30, 21)
    z1[..., 13:], z2[..., 13:], labels = -np.inf, -np.inf, labels % 13
    check(z1, z2, labels, settings, 0.3, forget_rate=0.3)


def test_predictions_differ_by_the_first_of_the_largest_and_nan_is_the_largest():
    inf, nan = np.inf, np.nan
    rows = [
        ([1, 1, 0], [0, 1, 1]),  # 0 and 1
        ([0.0, -0.0, -1], [-0.0, 0.0, -1]),  # 0 both
        ([nan, 5, nan], [1, inf, nan]),  # 0 and 2
        ([-inf, -inf, -inf], [2, 2, 2]),  # 0 both
        ([1, inf, inf], [1, 3, inf]),  # 1 and 2
        ([1, nan, inf], [1, nan, nan]),  # 1 both
    ]
    z1, z2 = (np.array([[row[i] for row in rows]], np.float32) for i in range(2))
    out = on_all(z1, z2, np.zeros((1, 6), np.int64), Settings("decoupling"))
    assert (out["kept"] == [1, 0, 1, 0, 1, 0]).all()
    wide = [np.pad(z, ((0, 0), (0, 0), (29, 3)), constant_values=-inf) for z in (z1, z2)]  # across lanes
    out = on_all(*wide, np.full((1, 6), 29), Settings("decoupling"))
    assert (out["kept"] == [1, 0, 1, 1, 1, 0]).all()  # of a row of -inf the first is the first of those before


@every_setting
def test_where_two_networks_are_one(settings):
    z1, _, labels = problem(2, 20, 10)
    for step in (4999, 5000):
        out = check(z1, z1, labels, settings, 0.2, (*CPUS, CUDAS[0]), step=step, forget_rate=0.2)
        tensor = check(z1, z1, labels, settings, 0.2, ONE_OF_EACH, step_tensor=np.array([step]), forget_rate=0.2)
        assert same(out["coefficients"], tensor["coefficients"])
    if settings.method in ("decoupling", "co_teaching_plus"):
        assert not out["kept"].any()
        assert not out["losses"].any()


@every_setting
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_groups_have_forget_rates_of_their_own(settings, dtype):
    rates = np.array([0.0, 0.1, 0.5, 0.999, 1.0, np.nan, 2.0, -1.0], dtype)
    z1, z2, labels = problem(8, 13, 6)
    check(z1, z2, labels, settings, rates, (*CPUS, CUDAS[0]), forget_rate=0.123, forget_rates=rates)
    check(z1, z2, labels, settings, rates, ONE_OF_EACH, forget_rates=np.repeat(rates, 3)[::3])
    check(z1, z2, labels, settings, rates[2], ONE_OF_EACH, forget_rates=rates[2:3])
    alone = [
        check(*(x[g : g + 1] for x in (z1, z2, labels)), settings, rates[g], ONE_OF_EACH, forget_rate=rates[g])
        for g in range(8)
    ]
    together = on_all(z1, z2, labels, settings, ONE_OF_EACH, forget_rates=rates)
    for name in ("kept", "coefficients", "stats"):
        assert (np.concatenate([out[name] for out in alone], 1) == together[name]).all()


@pytest.mark.parametrize("zeros", [0, 1, 5, 40])
def test_released_co_teaching_plus_loses_rows_by_sample_id(zeros):
    settings = Settings("co_teaching_plus", True)
    z1, z2, labels = problem(2, 40, 5)
    ids = RNG(zeros).permutation(80).reshape(2, 40) + 1
    ids[:, RNG(zeros).permutation(40)[:zeros]] = 0
    for step in (0, 6000):
        options = {"forget_rate": 0.3, "step": step}
        out = check(z1, z2, labels, settings, 0.3, sample_ids=ids, **options)
        strided = np.repeat(ids, 2, 1)[:, ::2]
        every_other = on_all(z1, z2, labels, settings, ONE_OF_EACH, sample_ids=strided, **options)
        assert (out["kept"] == every_other["kept"]).all()
    if zeros == 40:
        assert not candidates_of(z1, z2, settings, ids).any()


VIEWS = {
    "transposed": lambda z: np.ascontiguousarray(z.transpose(2, 1, 0)).transpose(2, 1, 0),
    "classes first": lambda z: np.ascontiguousarray(z.transpose(0, 2, 1)).transpose(0, 2, 1),
    "rows first": lambda z: np.ascontiguousarray(z.transpose(1, 0, 2)).transpose(1, 0, 2),
    "every other class": lambda z: np.repeat(z, 2, 2)[..., ::2],
    "every third row of a wider buffer": lambda z: np.repeat(np.pad(z, ((0, 0), (0, 0), (0, 3))), 3, 1)[:, ::3, :-3],
    "one row for all": lambda z: np.broadcast_to(z[:, :1], z.shape),
    "one group for all": lambda z: np.broadcast_to(z[:1], z.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_tensors_of_any_strides(view, dtype):
    for settings in (SETTINGS[1], SETTINGS[5], SETTINGS[6]):
        z1, z2, labels = problem(2, 9, 19, DTYPES[dtype])
        z1, labels = VIEWS[view](z1), VIEWS[view](labels[..., None])[..., 0]
        dense = run(CPUS[0], z1.copy(), z2, labels.copy(), settings, forget_rate=0.4)
        out = on_all(z1, z2, labels, settings, (CPUS[0], CPUS[-1], CUDAS[0]), forget_rate=0.4)
        assert all(np.array_equal(dense[name], out[name], equal_nan=name != "kept") for name in dense)
        scales = np.full(2, 2.0, np.float32)
        for kernels in (CPUS[0], CUDAS[0]):
            expected = backward(kernels, z1.copy(), z2, labels.copy(), settings, dense, (scales, scales))
            got = backward(kernels, z1, z2, labels, settings, dense, (scales, scales))
            assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_and_groups_more_than_2_to_the_31_elements_apart():
    z1, z2, labels = problem(1, 3, 8, BFLOAT16)
    for settings in (SETTINGS[2], SETTINGS[6]):
        dense = run(CPUS[0], z1, z2, labels, settings, forget_rate=0.4)
        scales = np.ones(1, np.float32)
        for kernels in ONE_OF_EACH:
            far = far_apart(z1[0])[None]
            out = run(kernels, far, z2, labels, settings, forget_rate=0.4)
            assert all(np.array_equal(dense[name], out[name]) for name in dense)
            expected = backward(kernels, z1, z2, labels, settings, dense, (scales, scales))
            got = backward(kernels, far, z2, labels, settings, dense, (scales, scales))
            assert all(same(a, b) for a, b in zip(got, expected, strict=True))
            by_group = run(kernels, far_apart(z1[0])[:, None], z2[0][:, None], labels[0][:, None], settings)
            assert np.array_equal(by_group["stats"][:, :, 0], dense["stats"][:, 0])


@pytest.mark.parametrize("label", [-1, 10, -(1 << 63)])
@every_setting
def test_a_label_that_is_no_class(settings, label):
    z1, z2, labels = problem(2, 12, 10)
    right = run(CUDAS[0], z1, z2, labels, settings, forget_rate=0.0)
    labels[1, 7] = label
    with pytest.raises(ValueError, match="not a class"):
        run(CPUS[0], z1, z2, labels, settings)
    out = run(CUDAS[0], z1, z2, labels, settings, forget_rate=0.0)
    kept = out["kept"][0, 1, 7] == 1
    assert (out["kept"] == right["kept"]).all()
    assert (np.isnan(out["losses"]) == [[False, kept], [False, kept]]).all()
    scales = np.ones(2, np.float32)
    grads = backward(CUDAS[0], z1, z2, labels, settings, out, (scales, scales))
    for grad in grads:
        assert np.isnan(grad[1, 7]).all() == kept
        assert np.isfinite(np.delete(grad.reshape(24, 10), 19, 0)).all()
    out = run(CUDAS[0], z1, z2, labels, settings, forget_rate=0.5)
    assert settings.method == "decoupling" or not out["kept"][:, 1, 7].any()


# Sizes of CUDA --------------------------------------------------------------------------------------------------------


def launches(kernels, *arguments: Any, **options: Any) -> int:
    before = cuda.launches()
    kernels(*arguments, **options)
    return cuda.launches() - before


@every_setting
@pytest.mark.parametrize("shape", [(1, 40, 3), (2, 80, 35)], ids=str)
def test_up_to_2048_rows_forward_is_one_launch_and_backward_another(shape, settings):
    z1, z2, labels = problem(*shape)
    before, scales = cuda.launches(), np.ones(shape[0], np.float32)
    out = run(CUDAS[0], z1, z2, labels, settings, forget_rate=0.3)
    assert cuda.launches() == before + 1
    backward(CUDAS[0], z1, z2, labels, settings, out, (scales, scales))
    assert cuda.launches() == before + 2


@pytest.mark.parametrize(
    ("shape", "blocks", "threads"),
    [((1, 128, 10), 1, 1024), ((1, 128, 100), 16, 256), ((130, 3, 100), 1, 96), ((1, 8, 100), 1, 256)],
)
def test_a_small_batch_is_one_block_and_a_larger_one_is_spread(shape, blocks, threads):
    z1, z2, labels = problem(*shape)
    before = (z1, z2, labels, *SETTINGS[2].arguments)
    Cuda(blocks=0 if shape[0] == 1 else 1)("twin_loss", *before, forget_rate=0.3)
    (x, _, _), (width, _, _) = cuda.last_launch()
    assert (x, width) == (blocks, threads)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_any_number_of_blocks_gives_the_same(blocks):
    for shape in ((2, 70, 40), (3, 25, 3)):
        for settings in (SETTINGS[1], SETTINGS[5]):
            z1, z2, labels = problem(*shape)
            limits = [CPUS[0], Cuda(), Cuda(blocks=blocks), Cuda(True, blocks)]
            out = on_all(z1, z2, labels, settings, limits, forget_rate=0.3)
            scales = np.ones(shape[0], np.float32)
            first, *others = (backward(k, z1, z2, labels, settings, out, (scales, scales)) for k in limits[1:])
            assert all(same(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(build.SANITIZED, reason="long")
def test_2048_rows_are_still_one_block_to_choose_from():
    z1, z2, labels = problem(1, ONE_BLOCK, 2)
    check(z1, z2, labels, SETTINGS[2], 0.3, [CPUS[0], CPUS[-1], CUDAS[0]], forget_rate=0.3)
    assert launches(CUDAS[-1], "twin_loss", z1, z2, labels, *SETTINGS[1].arguments) == 1


LARGE = [s for s in SETTINGS if not build.SANITIZED or s in (SETTINGS[1], SETTINGS[5])]


@pytest.mark.parametrize("settings", LARGE, ids=id_of)
def test_more_than_2048_rows_are_shared_by_blocks(settings):
    z1, z2, labels = problem(1, ONE_BLOCK + 1, 2)
    z1, z2 = narrow(z1, BFLOAT16), narrow(z2, BFLOAT16)  # ties, on either side of where tiles meet
    options = {"forget_rate": 0.35}
    if settings.of_probabilities:
        options["sample_ids"] = RNG(0).integers(3, size=labels.shape)
    before = cuda.launches()
    on_all(z1, z2, labels, settings, [CPUS[0], Cuda(settings.released)], **options)
    count = cuda.launches() - before
    assert count == (3 if settings.method == "decoupling" else 7 if settings.of_probabilities else 6)


@pytest.mark.skipif(build.SANITIZED, reason="long")
def test_large_groups_of_their_own():
    z1, z2, labels = problem(1, ONE_BLOCK + 40, 1)
    out = on_all(z1, z2, labels, SETTINGS[5], [CPUS[0], CUDAS[0]], forget_rate=0.5)
    assert out["kept"].all()  # of one class, nobody disagrees: everything, as step 0 has it
    z1, z2, labels = problem(2, 2 * ONE_BLOCK + 3, 2)
    out = on_all(z1, z2, labels, SETTINGS[4], [CPUS[0], Cuda(True, 2)], forget_rates=np.array([0.5, 1.0]))
    assert out["kept"][:, 0].any()
    assert not out["kept"][:, 1].any()


# Gradients ------------------------------------------------------------------------------------------------------------


def backward(kernels, z1, z2, labels, settings: Settings, out: dict, upstream, needed=(True, True)) -> tuple:
    given = upstream if settings.method != "jocor" else (upstream[0], None)
    return kernels(
        "twin_loss_backward", z1, z2, labels, out["coefficients"], out["stats"], *given, needed, *settings.arguments
    )


def scales_of(out: dict, upstream, settings: Settings) -> np.ndarray:
    second = upstream[0] if settings.method == "jocor" else upstream[1]
    return out["coefficients"].astype(np.float64) * np.stack([upstream[0], second])[:, :, None]


@every_setting
def test_gradients_of_the_truth_are_the_slopes_of_its_losses(settings):
    rng = RNG(3)
    z1, z2, labels = (x[:1, :4] for x in problem(1, 4, 5))
    z1, z2 = z1.astype(np.float64), z2.astype(np.float64)
    scales = rng.standard_normal((2, 1, 4))
    if settings.method == "jocor":
        scales[1] = scales[0]
    found, eps = gradients(z1, z2, labels, settings, scales), 1e-6
    for network in range(2):
        for at in np.ndindex(z1.shape):
            values = []
            for sign in (1, -1):
                moved = [z1.copy(), z2.copy()]
                moved[network][at] += sign * eps
                losses = row_losses(*moved, labels, settings)
                joint = settings.method == "jocor"
                values.append((scales[0] * losses[0]).sum() + (0 if joint else (scales[1] * losses[1]).sum()))
            assert abs((values[0] - values[1]) / (2 * eps) - found[network][at]) < 1e-7


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 10), (1, 31, 17), (3, 5, 33), (1, 3, 1000)], ids=str)
def test_gradients_are_those_of_float64(shape, dtype, settings):
    z1, z2, labels = problem(*shape, DTYPES[dtype])
    upstream = tuple(RNG(i).standard_normal(shape[0]).astype(np.float32) for i in range(2))
    out = run(CPUS[0], z1, z2, labels, settings, forget_rate=0.3)
    true = gradients(widen(z1), widen(z2), labels, settings, scales_of(out, upstream, settings))
    kernels = (*CPUS, *CUDAS) if dtype == "float32" else (CPUS[0], CPUS[-1], CUDAS[0])
    for kernel in kernels:
        for network, grad in enumerate(backward(kernel, z1, z2, labels, settings, out, upstream)):
            size = np.abs(true[network]).max()
            rounding = {FLOAT32: 0, FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}[DTYPES[dtype]]
            allowed = 1e-6 * size + rounding * np.abs(true[network]) + (6e-8 if dtype == "float16" else 1e-30)
            assert grad.dtype == z1.dtype
            assert (np.abs(widen(grad) - true[network]) <= allowed).all(), kernel
            rejected = out["kept"][network] == 0
            assert not grad[rejected].view(np.uint8).any()


@every_setting
def test_gradients_of_one_network_alone(settings):
    z1, z2, labels = problem(2, 20, 13)
    upstream = (np.array([2.0, -1.0], np.float32), np.array([0.5, 3.0], np.float32))
    out = run(CPUS[0], z1, z2, labels, settings, forget_rate=0.4)
    for kernels in ONE_OF_EACH:
        both = backward(kernels, z1, z2, labels, settings, out, upstream)
        joint = settings.method == "jocor"
        first, none = backward(kernels, z1, z2 if joint else None, labels, settings, out, upstream, (True, False))
        assert none is None
        assert same(first, both[0])
        none, second = backward(kernels, z1 if joint else None, z2, labels, settings, out, upstream, (False, True))
        assert none is None
        assert same(second, both[1])
        one = np.float32(0.75)
        expanded = backward(kernels, z1, z2, labels, settings, out, (np.broadcast_to(one, 2),) * 2)
        dense = backward(kernels, z1, z2, labels, settings, out, (np.full(2, one),) * 2)
        assert all(same(a, b) for a, b in zip(expanded, dense, strict=True))


@every_setting
def test_rejected_rows_have_gradients_of_zero_whatever_they_hold(settings):
    z1, z2, labels = problem(1, 40, 9)
    z1[0, ::3, 2], z2[0, 1::3, 4] = np.nan, np.inf
    out = run(CPUS[0], z1, z2, labels, settings, forget_rate=0.7)
    upstream = (np.array([np.inf], np.float32), np.array([np.nan], np.float32))
    for kernels in (*CPUS, *CUDAS):
        for network, grad in enumerate(backward(kernels, z1, z2, labels, settings, out, upstream)):
            rejected = out["kept"][network] == 0
            assert rejected.any()
            assert not grad[rejected].view(np.uint8).any()


# small_loss_mask ------------------------------------------------------------------------------------------------------


def losses_of(groups: int, rows: int, dtype: str, seed: int = 0) -> np.ndarray:
    """With ties, infinities, both zeros and NaN."""
    rng = RNG((groups, rows, seed))
    x = np.round(rng.standard_normal((groups, rows)) * 20) / 8
    wild = rng.random(x.shape) < 0.1
    x[wild] = rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45], wild.sum())
    with np.errstate(under="ignore", over="ignore"):
        return narrow(x.astype(np.float32), DTYPES[dtype])


def check_mask(losses, rates, candidates=None, kernels=(*CPUS, *CUDAS), **options: Any) -> None:
    counted = np.ones(losses.shape, bool) if candidates is None else candidates
    expected = mask(widen(losses), np.broadcast_to(rates, len(losses)), counted)
    if "keep_rates" not in options:
        options["keep_rate"] = rates
    for kernel in kernels:
        got = kernel("small_loss_mask", losses, candidates=candidates, **({"keep_rate": 0.123} | options))
        assert (got == expected).all(), kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 31, 33, 128, 300, 1000])
def test_mask_is_that_of_a_stable_sort(rows, dtype):
    losses = losses_of(2, rows, dtype)
    some = RNG(rows).random((2, rows)) < 0.5
    for rate in (0.0, 0.1, 0.5, 0.77, 1.0):
        kernels = (*CPUS, *CUDAS) if rate == 0.5 else ONE_OF_EACH
        check_mask(losses, rate, None, kernels)
        check_mask(losses, rate, some, kernels)
    check_mask(losses, 0.5, np.zeros_like(some))


def test_mask_counts_as_python_does():
    losses = losses_of(1, 100, "float32")
    for k in range(101):
        check_mask(losses, k / 100, None, ONE_OF_EACH)  # 0.29 * 100 is 28.999999999999996


def test_mask_with_rates_of_its_own_for_each_group():
    rates = np.array([0.0, 0.25, 1.0, np.nan, 7.0, -0.5, np.inf, 0.5])
    losses, some = losses_of(8, 50, "float32"), RNG(0).random((8, 50)) < 0.7
    for dtype in (np.float32, np.float64):
        own = rates.astype(dtype)
        check_mask(losses, own, some, keep_rates=own)
        check_mask(losses, own, None, keep_rates=np.repeat(own, 2)[::2])
        check_mask(losses, 0.25, some, keep_rates=own[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_of_losses_of_any_strides(dtype):
    losses, some = losses_of(5, 40, dtype), RNG(1).random((5, 40)) < 0.6
    for view in (lambda x: np.ascontiguousarray(x.T).T, lambda x: np.repeat(x, 3, 1)[:, ::3], lambda x: x[::2]):
        check_mask(view(losses), 0.4, view(some), (CPUS[0], CPUS[-1], *CUDAS))
    for broadcast in (losses[:1], losses[:, :1]):
        check_mask(np.broadcast_to(broadcast, losses.shape), 0.4, some, (CPUS[0], CPUS[-1], *CUDAS))
    check_mask(far_apart(losses[:3]), 0.4, some[:3], ONE_OF_EACH)
    check_mask(far_apart(losses[:, :1]).T, 0.4, some[:, :1].T, ONE_OF_EACH)


@pytest.mark.parametrize(("groups", "rows"), [(1, 2048), (2, 2049), (1, 6200)])
def test_mask_of_many_rows(groups, rows):
    losses = losses_of(groups, rows, "float32")
    some = RNG(rows).random(losses.shape) < 0.8
    smooth = RNG(1).standard_normal(losses.shape).astype(np.float32)
    kernels = [CPUS[0], CPUS[-1], CUDAS[0], CUDAS[-1], Cuda(blocks=2)]
    for rate in (0.3, 0.51, 1.0):
        check_mask(losses, rate, some, kernels)
    check_mask(smooth, 0.9, None, kernels)
    check_mask(smooth * 0 + 1, 0.7, some, kernels)
    assert launches(CUDAS[0], "small_loss_mask", smooth, 0.5) == (1 if rows == 2048 else 5)


def test_mask_of_many_rows_on_the_cpu():
    losses = losses_of(3, 20_000, "float32")
    for rate in (0.1, 0.5, 0.999):
        check_mask(losses, rate, None, CPUS)
        check_mask(losses, rate, RNG(2).random(losses.shape) < 0.5, CPUS)
    check_mask(RNG(1).standard_normal((2, 9000)).astype(np.float32), 0.3, None, CPUS)
    check_mask(np.zeros((2, 9000), np.float32), 0.3, None, CPUS)


@pytest.mark.skipif(build.SANITIZED, reason="is that process")
def test_everything_above_under_the_sanitizers():
    done = build.run_sanitized("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout + done.stderr
