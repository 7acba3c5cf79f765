"""InfoNCE: known answers, NaN and limits, the loss modules, and what a training step relies on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from op_contract import DEVICES

import perfvl
from perfvl import backends
from perfvl.functional import info_nce, info_nce_stats
from perfvl.nn import CrossModalInfoNCELoss, InfoNCELoss

pytestmark = pytest.mark.parametrize("device", DEVICES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unit(*shape, device="cpu"):
    return F.normalize(torch.randn(*shape), dim=-1).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 2, 8, 15, 16, 17, 4097])
def test_keys_equal_to_the_positive_give_log_of_their_number_and_no_gradient(device, dtype, keys):
    query = unit(5, 64, device=device).to(dtype).requires_grad_()
    positive = unit(1, 64, device=device).to(dtype)
    loss = info_nce(query, positive.expand(5, 64), positive.expand(keys, 64), temperature=0.07)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + keys), rel=1e-5)
    assert query.grad.abs().max() < (1e-5 if dtype == torch.float32 else 5e-2) * 1 / 0.07


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0, -1.0])
def test_collinear_features(device, batch, dim, temperature):
    ones = F.normalize(torch.ones(batch, dim, device=device), dim=1)
    assert info_nce(ones, ones, ones[:1].expand(16, dim), temperature=temperature).item() == pytest.approx(
        math.log(17), rel=1e-5
    )


def test_limits_of_the_scale(device):
    query, keys = unit(4, 32, device=device), unit(100, 32, device=device)
    assert info_nce(query, query, keys, temperature=1e8).item() == pytest.approx(math.log(101), rel=1e-5)
    assert info_nce(query, query, -query[:1].expand(100, 32), temperature=1e-3)[None].isfinite().all()
    assert info_nce(query[:1], query[:1], -query[:1].expand(100, 32), temperature=0.01).item() == 0.0


def test_sharp_temperature_with_small_cosines_stays_finite(device):
    # At scale 100 a softmax that subtracts the largest possible logit would take log(0) here.
    query, keys = torch.zeros(2, 64, device=device), torch.zeros(50, 64, device=device)
    query[:, 0] = 1
    keys[:, 1] = 1
    assert info_nce(query, keys[:2], keys, temperature=0.01).item() == pytest.approx(math.log(51), rel=1e-5)


def test_converged_rows_keep_their_digits(device):
    # loss = log(1 + x) with x of order 1e-11: lse - positive logit would round to zero in float32.
    query = torch.eye(3, 8, device=device)
    keys = torch.eye(8, device=device)[4:]
    loss = info_nce(query.requires_grad_(), query.detach(), keys, temperature=0.04)
    expected = math.log1p(4 * math.exp(-25))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert query.grad[0, 0].item() == pytest.approx(-4 * math.exp(-25) / 0.04 / 3, rel=1e-4)


def test_no_keys_no_loss(device):
    query = unit(4, 8, device=device).requires_grad_()
    for keys, valid in (
        (torch.empty(0, 8, device=device), None),
        (unit(5, 8, device=device), torch.zeros(1, dtype=torch.int64, device=device)),
    ):
        loss = info_nce(query, query.detach(), keys, valid=valid)
        (grad,) = torch.autograd.grad(loss, query)
        assert loss == 0
        assert not grad.any()


def test_mean_of_an_empty_batch_is_nan_as_in_cross_entropy(device):
    empty = torch.empty(0, 8, device=device)
    assert info_nce(empty, empty, unit(5, 8, device=device)).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_queue_order_does_not_matter(device, dtype):
    query, positive, queue = (
        unit(9, 48, device=device),
        unit(9, 48, device=device),
        unit(1000, 48, device=device).to(dtype),
    )
    shuffled = queue[torch.randperm(1000)]
    torch.testing.assert_close(
        info_nce(query, positive, queue), info_nce(query, positive, shuffled), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_pytorch_would_have_it(device, dtype):
    query, positive, queue = (unit(n, 40, device=device).to(dtype) for n in (37, 37, 600))
    poisoned = query.clone()
    poisoned[5, 3] = torch.nan
    poisoned.requires_grad_()
    clean = info_nce(query, positive, queue, reduction="none")
    loss = info_nce(poisoned, positive, queue, reduction="none")
    loss.sum().backward()
    others = torch.arange(37, device=device) != 5
    assert loss[5].isnan()
    assert poisoned.grad[5].isnan().all()
    torch.testing.assert_close(loss[others], clean[others])  # other tiles where there are gradients
    assert poisoned.grad[others].isfinite().all()
    queue[-1, -1] = torch.nan
    assert info_nce(query, positive, queue, reduction="none").isnan().all()
    assert torch.equal(
        info_nce(query, positive, queue, valid=599, reduction="none").isnan(),
        torch.zeros(37, dtype=torch.bool, device=device),
    )
    count = torch.tensor(599, device=device)
    assert info_nce(query, positive, queue, valid=count, label_smoothing=0.1).isfinite()


def test_infinite_logits_do_as_cross_entropy(device):
    query, queue = torch.ones(2, 4, device=device), torch.ones(3, 4, device=device)
    positive = torch.ones(2, 4, device=device)
    positive[0, 0] = -torch.inf
    loss = info_nce(query, positive, queue, reduction="none")
    assert loss[0] == torch.inf
    assert loss[1].isfinite()


def test_rank_counts_ties_against_the_positive(device):
    generator = torch.Generator().manual_seed(3)
    # Small integers: every dot product is exact in every order of summation, so ties are exact too.
    query, positive, queue = (
        torch.randint(-2, 3, (n, 24), generator=generator).float().to(device) for n in (70, 70, 900)
    )
    for dtype in DTYPES:
        for temperature in (0.25, -0.25):
            out = info_nce_stats(query.to(dtype), positive.to(dtype), queue.to(dtype), temperature=temperature)
            scores, score = (query @ queue.T) / temperature, (query * positive).sum(1, keepdim=True) / temperature
            assert torch.equal(out.rank.long(), (scores >= score).sum(1)), (dtype, temperature)
            assert out.rank.dtype == torch.int32


def test_stats_agree_with_the_loss(device):
    query, positive, queue = unit(9, 16, device=device), unit(9, 16, device=device), unit(200, 16, device=device)
    out = info_nce_stats(query, positive, queue, reduction="none")
    torch.testing.assert_close(out.loss, out.lse - out.positive_logit, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.positive_logit, (query * positive).sum(1) / 0.07)
    assert torch.equal(out.loss, info_nce(query, positive, queue, reduction="none"))


def test_lse_serves_as_z_loss(device):
    query, positive, queue = (
        unit(9, 16, device=device).requires_grad_(),
        unit(9, 16, device=device),
        unit(200, 16, device=device),
    )
    out = info_nce_stats(query, positive, queue)
    (ours,) = torch.autograd.grad(out.loss + 1e-2 * out.lse.square().mean(), query)
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ queue.T], 1) / 0.07
    lse = logits.logsumexp(1)
    (theirs,) = torch.autograd.grad((lse - logits[:, 0]).mean() + 1e-2 * lse.square().mean(), query)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queue_may_be_overwritten_before_backward(device, dtype):
    """MoCo enqueues between forward and backward; eager code clones the queue for that."""
    query, positive, queue = (
        unit(9, 16, device=device).to(dtype).requires_grad_(),
        unit(9, 16, device=device).to(dtype),
        unit(200, 16, device=device).to(dtype),
    )
    info_nce(query, positive, queue).backward()
    expected, query.grad = query.grad, None
    loss = info_nce(query, positive, queue)
    queue.fill_(torch.nan)
    loss.backward()
    assert torch.equal(query.grad, expected)


def test_gradient_scaler_does_not_lose_small_gradients_of_half_queries(device):
    query = unit(64, 32, device=device).half().requires_grad_()
    positive, queue = query.detach().clone(), unit(4096, 32, device=device).half()
    info_nce(query, positive, queue, temperature=0.05).backward()
    scaled = query.detach().clone().requires_grad_()
    (info_nce(scaled, positive, queue, temperature=0.05) * 65536).backward()
    reference = query.detach().double().requires_grad_()
    info_nce(reference, positive.double(), queue.double(), temperature=0.05).backward()
    torch.testing.assert_close(scaled.grad.double() / 65536, reference.grad, rtol=5e-3, atol=2e-7)


def test_positive_gradient_flows_through_normalisation(device):
    raw = torch.randn(6, 12, device=device, requires_grad=True)
    key, queue = torch.randn(6, 12, device=device, requires_grad=True), unit(50, 12, device=device)
    info_nce(raw, key, queue, normalize=True).backward()
    # Moving along itself does not change a normalised vector.
    torch.testing.assert_close((raw * raw.grad).sum(1), torch.zeros(6, device=device), atol=1e-5, rtol=0)
    torch.testing.assert_close((key * key.grad).sum(1), torch.zeros(6, device=device), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_offsets_are_64_bit(device, dtype, tmp_path):
    if device != "cpu":
        pytest.skip("a sparse file backs this queue")
    stride = 2**31 + 64  # rows two gigaelements apart; only the touched pages exist
    size = 2 * stride + 32
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(size * dtype.itemsize)
    queue = torch.from_file(str(path), shared=True, size=size, dtype=dtype).as_strided((3, 32), (stride, 1))
    rows = unit(3, 32).to(dtype)
    queue.copy_(rows)
    query, positive = unit(4, 32), unit(4, 32)
    assert torch.equal(info_nce(query, positive, queue), info_nce(query, positive, rows))


class TestModules:
    def tensors(self, device):
        return [unit(n, 16, device=device) for n in (8, 8, 100)]

    @pytest.mark.parametrize("learnable", [False, True, "log_scale"])
    def test_temperature_kinds_agree_and_learn(self, device, learnable):
        query, positive, queue = self.tensors(device)
        loss = InfoNCELoss(0.2, learnable=learnable).to(device)
        value = loss(query, positive, queue)
        torch.testing.assert_close(value.detach(), info_nce(query, positive, queue, temperature=0.2))
        if not learnable:
            assert not list(loss.parameters())
            return
        (parameter,) = loss.parameters()
        value.backward()
        step, before = 1e-3, parameter.detach().clone()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(before + sign * step)
            values.append(loss(query, positive, queue).item())
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)

    def test_state_dict_names(self, device):
        assert list(InfoNCELoss().state_dict()) == []
        assert list(InfoNCELoss(learnable=True).state_dict()) == ["temperature"]
        assert list(InfoNCELoss(learnable="log_scale").state_dict()) == ["logit_scale"]

    def test_logits_are_moco_s(self, device):
        query, positive, queue = self.tensors(device)
        loss = InfoNCELoss(0.2)
        logits, labels = loss.logits(query, positive, queue)
        expected = (
            torch.cat(
                [torch.einsum("nc,nc->n", query, positive)[:, None], torch.einsum("nc,ck->nk", query, queue.T)], 1
            )
            / 0.2
        )
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(F.cross_entropy(logits, labels), loss(query, positive, queue))

    def test_accepts_a_queue_object(self, device):
        class Queue:
            keys, valid = unit(100, 16, device=device), torch.tensor(60, device=device)

        query, positive, _ = self.tensors(device)
        loss = InfoNCELoss(0.2)
        torch.testing.assert_close(loss(query, positive, Queue()), loss(query, positive, Queue.keys[:60]))
        torch.testing.assert_close(
            F.cross_entropy(*loss.logits(query, positive, Queue())), loss(query, positive, Queue())
        )

    @pytest.mark.parametrize("directions", ["sum", "mean"])
    def test_both_directions(self, device, directions):
        image, text, image_key, text_key = unit(4, 8, 16, device=device)
        image_queue, text_queue = unit(2, 100, 16, device=device)
        loss = CrossModalInfoNCELoss(0.05, directions=directions)
        expected = info_nce(image, text_key, text_queue, temperature=0.05) + info_nce(
            text, image_key, image_queue, temperature=0.05
        )
        got = loss(image, text, image_key, text_key, image_queue, text_queue)
        torch.testing.assert_close(got, expected / (2 if directions == "mean" else 1))

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"temperature": 0.0}, ValueError, "`temperature` got 0.0, expected"),
            ({"temperature": "x"}, TypeError, "`temperature` got str, expected"),
            (
                {"temperature": -1.0, "learnable": "log_scale"},
                ValueError,
                "`temperature` got -1.0, expected a positive",
            ),
            ({"learnable": "exp"}, ValueError, "`learnable` got 'exp', expected"),
            ({"reduction": "avg"}, ValueError, "`reduction` got 'avg', expected"),
            ({"label_smoothing": 2.0}, ValueError, "`label_smoothing` got 2.0, expected"),
        ],
    )
    def test_bad_settings(self, device, settings, error, message):
        for module in (InfoNCELoss, CrossModalInfoNCELoss):
            with pytest.raises(error, match=f"^{module.__name__}: {message}"):
                module(**settings)

    def test_bad_directions(self, device):
        with pytest.raises(ValueError, match="`directions` got 'max', expected"):
            CrossModalInfoNCELoss(directions="max")

    def test_compiles_inside_a_model(self, device):
        torch._dynamo.reset()
        loss = InfoNCELoss(0.2, learnable="log_scale").to(device)
        encoder = torch.nn.Linear(16, 16).to(device)
        query, positive, queue = self.tensors(device)

        def step(x):
            return loss(F.normalize(encoder(x), dim=1), positive, queue)

        torch.testing.assert_close(torch.compile(step, fullgraph=True)(query), step(query))


def test_use_backend_nests_and_rejects_unknown_names(device):
    with perfvl.use_backend("reference"), perfvl.use_backend("auto"):
        pass
    assert perfvl.backends._forced == "auto"
    with pytest.raises(ValueError, match="`name` got 'gpu', expected"):
        perfvl.use_backend("gpu")


@pytest.mark.parametrize("isa_level", [] if backends.CPU_MISSING else torch.ops.perfvl._isa_levels())
@pytest.mark.parametrize("factor", [1e5, 1e10, 1e12, 1e20])
def test_logits_of_any_size_are_a_softmax(device, isa_level, factor):
    """Products of so many digits are no longer exact: terms of the largest must still be 1."""
    if device != "cpu":
        pytest.skip("of the CPU's levels")
    query, positive, queue = torch.randn(5, 16), torch.randn(5, 16), torch.randn(300, 16)
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ queue.T], 1).double() * factor
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    before = torch.ops.perfvl._isa()
    torch.ops.perfvl._set_isa(isa_level)
    try:
        scaled = (query * factor).requires_grad_()
        for keys, slack in ((queue, 1e-5), (queue.bfloat16(), 2e-2)):
            loss = info_nce(scaled, positive, keys, temperature=1.0)
            torch.testing.assert_close(loss.double(), expected, rtol=slack, atol=0)
            assert torch.autograd.grad(loss, scaled)[0].isfinite().all()
    finally:
        torch.ops.perfvl._set_isa(before)


def test_a_positive_of_minus_infinity_leaves_the_others_sum(device):
    positive = torch.randn(3, 16, device=device)
    positive[0, 0] = -torch.inf
    stats = info_nce_stats(torch.rand(3, 16, device=device), positive, torch.randn(50, 16, device=device))
    assert stats.lse.isfinite().all()
