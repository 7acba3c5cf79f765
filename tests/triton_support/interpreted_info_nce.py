"""The Triton kernels of `info_nce`, interpreted, against float64. `test_triton_info_nce.py` runs this file in a process
of its own.

Every case has the limits of a small GPU of compute capability 9.0, so that keys are split and merged. The interpreter
has no TF32: float32 products are exact to float32 here whatever precision is asked for.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from triton_support import interpreter

interpreter.install()

from perfvl.kernels import _info_nce_wide, _tiles, info_nce  # noqa: E402  (the interpreter has to be patched first)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 0.0, BF16: 2.0**-8, F16: 2.0**-10}
U = 2.0**-24
TINY = 1e-35  # where exp underflows
NONE, MEAN, SUM = 0, 1, 2


class Outputs(NamedTuple):
    loss: Tensor
    lse: Tensor
    positive_logit: Tensor
    rank: Tensor
    grad_query: Tensor
    positive_weight: Tensor


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch):
    def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:  # torch has mixed-dtype products on CUDA only
        out.copy_(a.float() @ b.float())

    monkeypatch.setattr(_tiles, "gpu_limits", lambda device: _tiles.Gpu(90, 4, 232_448))
    monkeypatch.setattr(_info_nce_wide, "_matmul", matmul)


def unit(rows: int, d: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, d), dim=1).to(dtype)


def run(
    query, positive, queue, *, temperature=0.07, learned=None, valid=None, compute=None, reduction=NONE, rank=True,
    grad=True, precision="tf32",
) -> Outputs:  # fmt: skip
    compute = compute or query.dtype
    return Outputs(
        *info_nce.info_nce(
            query, positive, queue, temperature, learned, valid, compute, reduction, rank, grad,
            input_precision=precision ) )  # fmt: skip


def truth(query, positive, queue, temperature, compute) -> tuple[Outputs, Tensor, Tensor, Tensor]:
    """float64 results with operands rounded as asked; logits, their reach and gradient terms to measure errors by."""
    q, k = query.double(), positive.double()
    rounded_q, rounded_n = query.to(compute).double(), queue.to(compute).double()
    scale = 1.0 / temperature
    first, logits = scale * (q * k).sum(1), scale * rounded_q @ rounded_n.T
    lse = torch.logsumexp(torch.cat([first[:, None], logits], 1), 1)
    odds = torch.logsumexp(logits, 1) - first
    loss = torch.where(odds < 0, torch.log1p(odds.exp()), lse - first)
    probability = (logits - lse[:, None]).exp()
    weight = probability.sum(1)
    grad = scale * (probability @ rounded_n - weight[:, None] * k)
    rank = (logits >= first[:, None]).sum(1)
    reach = abs(scale) * torch.cat([(q.abs() * k.abs()).sum(1)[:, None], rounded_q.abs() @ rounded_n.abs().T], 1).amax(
        1
    )
    terms = abs(scale) * (probability @ rounded_n.abs() + weight[:, None] * k.abs())
    if compute == F16:  # weights are relative to the row maximum; below 2^-14 of it fp16 has an absolute error of 2^-25
        terms = terms + abs(scale) * probability.amax(1, keepdim=True) * 2.0**-15 * rounded_n.abs().sum(0)
    return Outputs(loss, lse, first, rank, grad, weight), logits, reach, terms


def check(got: Outputs, query, positive, queue, *, temperature=0.07, compute=None, reduction=NONE) -> None:
    """Loss and weight may err relative to themselves, the gradient relative to the terms it is a sum of."""
    compute = compute or query.dtype
    true, logits, reach, terms = (
        truth(query, positive, queue, temperature, compute) if len(queue) else _no_keys(query, positive, temperature)
    )
    B = len(query)
    slack = 16 * U + 4 * U * reach  # a logit is off by a few U reach; exp, log and sums by a few U
    divisor = B if reduction == MEAN else 1
    if reduction == NONE:
        assert ((got.loss - true.loss).abs() <= slack * true.loss + TINY).all()
    else:
        assert (
            abs(got.loss - true.loss.sum() / divisor) <= (slack * true.loss).sum() / divisor + 4 * U * true.loss.sum()
        )
    assert ((got.lse - true.lse).abs() <= slack + 4 * U * true.lse.abs()).all()
    assert ((got.positive_logit - true.positive_logit).abs() <= 4 * U * reach).all()
    if len(got.rank):
        near = ((logits - true.positive_logit[:, None]).abs() <= 4 * U * reach[:, None]).sum(1)
        assert ((got.rank - true.rank).abs() <= near).all()
    if len(got.positive_weight):
        allowed = (ROUNDING[compute] + slack)[:, None] * terms + TINY
        assert ((got.grad_query * divisor - true.grad_query).abs() <= allowed).all()
        assert (
            (got.positive_weight * divisor - true.positive_weight).abs() <= slack * true.positive_weight + TINY
        ).all()


def _no_keys(query, positive, temperature):
    first = (query.double() * positive.double()).sum(1) / temperature
    zero = torch.zeros_like(first)
    empty = torch.zeros(len(query), 0, dtype=torch.float64)
    reach = (query.double() * positive.double()).abs().sum(1) / abs(temperature)
    return Outputs(zero, first, first, zero, torch.zeros(query.shape), zero), empty, reach, torch.zeros(query.shape)


DIMS = (1, 7, 16, 64, 123, 128, 256, 320, 520)
ROWS = (2, 17, 1, 33)
KEYS = (64, 1000, 31, 257, 0, 1)
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F16))
SHAPES = [
    (min(ROWS[(i + t) % 4], 33 if d <= 256 else 6), KEYS[(i + 5 * t) % 6], d, *dtypes)
    for (i, d), (t, dtypes) in itertools.product(enumerate(DIMS), enumerate(DTYPES))
]


@pytest.mark.parametrize(("B", "K", "d", "given", "compute"), SHAPES, ids=str)
def test_every_shape_and_dtype_matches_float64(B, K, d, given, compute):
    query, positive, queue = unit(B, d, given), unit(B, d, given), unit(K, d, given)
    got = run(query, positive, queue, compute=compute)
    check(got, query, positive, queue, compute=compute)
    assert all(x.is_contiguous() for x in got)
    assert [x.dtype for x in got] == [F32, F32, F32, torch.int32, F32, F32]


# (d, B, dtype) of the three routes: on the chip, two streaming kernels, library products.
ROUTES = {"chip": (64, 17, F32), "few rows": (320, 5, BF16), "library": (320, 5, F32)}
routes = pytest.mark.parametrize("route", ROUTES)


def sample(route: str, K: int = 150, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    d, B, dtype = ROUTES[route]
    return unit(B, d, dtype) * scale, unit(B, d, dtype), unit(K, d, dtype)


@routes
@pytest.mark.parametrize("count", [-3, 0, 1, 70, 150, 400])
def test_rows_beyond_valid_do_not_matter(route, count):
    query, positive, queue = sample(route)
    used = min(max(count, 0), 150)
    poisoned = queue.clone()
    poisoned[used:] = float("nan")
    got = run(query, positive, poisoned, valid=torch.tensor([count]))
    check(got, query, positive, queue[:used])


@routes
@pytest.mark.parametrize(("temperature", "dtype"), [(0.2, F32), (-0.3, torch.float64), (0.5, F16)])
def test_the_temperature_is_read_from_its_tensor(route, temperature, dtype):
    query, positive, queue = sample(route)
    got = run(query, positive, queue, temperature=1e9, learned=torch.tensor(temperature, dtype=dtype))
    check(got, query, positive, queue, temperature=float(torch.tensor(temperature, dtype=dtype)))


@routes
@pytest.mark.parametrize("temperature", [-1.0, -0.07, 1.0, 10.0])
def test_any_sign_and_size_of_temperature(route, temperature):
    query, positive, queue = sample(route)
    check(run(query, positive, queue, temperature=temperature), query, positive, queue, temperature=temperature)


@routes
@pytest.mark.parametrize("temperature", [0.5, -0.5])
def test_rank_counts_exact_ties(route, temperature):
    d, B, dtype = ROUTES[route]
    query, positive, queue = (torch.randint(-1, 2, (n, d)).to(dtype) for n in (B, B, 150))
    query[:, 3:], positive[:, 3:], queue[:, 3:] = 0, 0, 0  # logits take seven values: many ties
    got = run(query, positive, queue, temperature=temperature)
    first, logits = (query * positive).sum(1).float() / temperature, query.float() @ queue.float().T / temperature
    assert (logits == first[:, None]).sum() > B
    assert torch.equal(got.rank, (logits >= first[:, None]).sum(1, dtype=torch.int32))


@routes
@pytest.mark.parametrize("reduction", [MEAN, SUM])
@pytest.mark.parametrize("grad", [True, False])
def test_reductions(route, reduction, grad):
    query, positive, queue = sample(route)
    got = run(query, positive, queue, reduction=reduction, grad=grad, rank=grad)
    check(got, query, positive, queue, reduction=reduction)
    B, d = query.shape
    assert got.loss.shape == ()
    assert got.grad_query.shape == (B if grad else 0, d)
    assert len(got.rank) == len(got.positive_weight) == (B if grad else 0)


@routes
def test_without_gradient_the_values_are_the_same(route):
    query, positive, queue = sample(route)
    with_grad, without = run(query, positive, queue), run(query, positive, queue, grad=False)
    torch.testing.assert_close(without[:3], with_grad[:3])
    assert torch.equal(without.rank, with_grad.rank)


@routes
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "reversed rows of a wider buffer"])
def test_layouts_of_the_queue(route, layout):
    query, positive, queue = sample(route)
    K, d = queue.shape
    if layout == "transposed":
        queue = queue.t().contiguous().t()
    elif layout == "strided":
        queue = torch.stack([queue, queue * float("nan")], 2).reshape(K, 2 * d)[:, ::2]
    elif layout == "expanded":
        queue = queue[:1].expand(K, d)
    else:
        queue = torch.cat([queue, queue * float("nan")], 1)[:, :d][::2]
    query = torch.stack([query, query], 1).flatten(0, 1)[::2]
    check(run(query, positive.t().contiguous().t(), queue), query, positive, queue)


@pytest.mark.parametrize("d", [64, 320])
def test_a_full_precision_queue_is_rounded_on_the_way(d):
    query, positive, queue = unit(5, d), unit(5, d, F16), unit(150, d)
    got = run(query, positive, queue, compute=BF16)
    check(got, query, positive, queue, compute=BF16)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_both_float32_precisions(precision):
    query, positive, queue = unit(5, 64), unit(5, 64), unit(150, 64)
    check(run(query, positive, queue, precision=precision), query, positive, queue)


@routes
def test_a_sharp_temperature_with_small_cosines_stays_finite(route):
    query, positive, queue = sample(route)
    query, queue = query.clone(), queue.clone()
    query[:, 8:], queue[:, :8] = (
        0,
        queue[:, :8] * 0.1,
    )  # every cosine is small, so exp(logit - 1/temperature) underflows
    got = run(query, positive * 0, queue, temperature=0.01)
    assert got.loss.isfinite().all()
    check(got, query, positive * 0, queue, temperature=0.01)


@routes
def test_huge_logits(route):
    query, positive, queue = sample(route, scale=64.0)
    check(run(query, positive, queue, temperature=0.005), query, positive, queue, temperature=0.005)


@routes
def test_small_losses_keep_their_relative_accuracy(route):
    query, _, queue = sample(route)
    query = torch.nn.functional.pad(unit(len(query), 8, query.dtype), (0, query.shape[1] - 8))
    queue[:, :8] *= 0.25
    got = run(query, query, queue, temperature=0.05)  # the positive's cosine is the largest by far
    assert got.loss.min() < 1e-5
    check(got, query, query, queue, temperature=0.05)


@routes
def test_the_largest_logit_may_come_last(route):
    query, positive, queue = sample(route, K=300)
    queue = queue[(query[:1].float() @ queue.float().T)[0].argsort()]
    check(run(query, positive, queue, temperature=0.01), query, positive, queue, temperature=0.01)


@routes
def test_nan_in_a_query_poisons_that_row_alone(route):
    query, positive, queue = sample(route)
    query = query.clone()
    query[3, 1] = float("nan")
    got = run(query, positive, queue)
    clean = torch.arange(len(query)) != 3
    for value in (got.loss, got.lse, got.positive_logit, got.positive_weight, got.grad_query.sum(1)):
        assert value[3].isnan()
        assert value[clean].isfinite().all()
    assert run(query, positive, queue, reduction=MEAN).loss.isnan()


@routes
def test_nan_in_a_key_poisons_every_row(route):
    query, positive, queue = sample(route)
    queue = queue.clone()
    queue[149, 0] = float("nan")
    got = run(query, positive, queue)
    assert got.loss.isnan().all()
    assert got.lse.isnan().all()
    assert got.grad_query.isnan().all()


@routes
def test_a_positive_logit_of_minus_infinity(route):
    query, positive, queue = sample(route)
    positive = positive.clone()
    positive[2] = -torch.inf * query[2].sign()
    got = run(query, positive, queue)
    expected = torch.logsumexp(query[2].double() @ queue.double().T / 0.07, 0)
    assert got.positive_logit[2] == -torch.inf
    assert got.loss[2] == torch.inf
    assert abs(got.lse[2] - expected) < 1e-5
    assert got.positive_weight[2] == 1
    assert got.loss[:2].isfinite().all()


@pytest.mark.parametrize("K", [256, 300, 384])
def test_library_route_carries_the_state_from_chunk_to_chunk(monkeypatch, K):
    query, positive, queue = unit(3, 300), unit(3, 300), unit(K, 300)
    monkeypatch.setattr(_info_nce_wide, "_CHUNK_BYTES", 3 * 4 * 128)  # chunks of 128 keys
    for compute, counted in itertools.product((F32, BF16), (None, 200)):
        valid = None if counted is None else torch.tensor([counted])
        got = run(query, positive, queue, compute=compute, valid=valid, precision="ieee")
        check(got, query, positive, queue[:counted], compute=compute)
    monkeypatch.setattr(_info_nce_wide, "_FEW_ROWS", 0)
    query, positive, queue = query.half(), positive.half(), queue.half()
    check(run(query, positive, queue), query, positive, queue)


def test_more_rows_than_one_tile():
    for B, d in ((130, 16), (66, 258)):
        query, positive, queue = unit(B, d, BF16), unit(B, d, BF16), unit(200, d, BF16)
        check(run(query, positive, queue, reduction=MEAN), query, positive, queue, reduction=MEAN)


@pytest.mark.parametrize(("reduction", "expected"), [(NONE, None), (MEAN, float("nan")), (SUM, 0.0)])
def test_no_rows(reduction, expected):
    got = run(unit(0, 64), unit(0, 64), unit(31, 64), reduction=reduction)
    assert got.loss.shape == ((0,) if reduction == NONE else ())
    if expected is not None:
        torch.testing.assert_close(got.loss, torch.tensor(expected), equal_nan=True)
    assert got.grad_query.shape == (0, 64)


def test_equal_vectors_give_log_of_the_count():
    for K, B in itertools.product((1, 2, 15, 17), (1, 8)):
        query = unit(1, 16).expand(B, 16)
        got = run(query, query, query[:1].expand(K, 16), temperature=0.1)
        torch.testing.assert_close(got.loss, torch.full((B,), float(K + 1)).log())
        torch.testing.assert_close(got.grad_query, torch.zeros(B, 16), atol=1e-5, rtol=0)


def test_the_order_of_the_keys_does_not_matter():
    query, positive, queue = sample("chip", K=300)
    first, second = run(query, positive, queue), run(query, positive, queue[torch.randperm(300)])
    torch.testing.assert_close(first, second)
