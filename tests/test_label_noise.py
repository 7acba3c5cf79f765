"""Label noise: the published draws, the distribution of the fast ones, and the metrics of a selection."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest
import torch

import perfvl.label_noise
from perfvl.label_noise import (
    KINDS,
    add_label_noise,
    instance_dependent_noise,
    label_precision,
    noise_recall,
    transition_matrix,
)

KNOWN = json.loads((Path(__file__).parent / "data" / "small_loss_around.json").read_text())["noise"]


def labels_of(description: str) -> torch.Tensor:
    """ "arange(20) mod 10" or "5*arange(20)", as the known answers put it."""
    step, count, modulus = re.fullmatch(r"(?:(\d+)\*)?arange\((\d+)\)(?: mod (\d+))?", description).groups()
    return torch.arange(int(count)) * int(step or 1) % int(modulus or 1000)


def classes_of(kind: str) -> int:
    return 100 if kind == "asymmetric_cifar100" else 10


@pytest.mark.parametrize("case", KNOWN["vectors"], ids=lambda c: f"{c['kind']}-{c['rate']}-{c['K']}")
def test_legacy_draws_are_those_of_the_released_code(case):
    labels = labels_of(case["y"])
    noisy = add_label_noise(labels, case["kind"], case["rate"], num_classes=case["K"], backend="legacy")
    assert noisy.labels.tolist() == case["noisy"]
    assert torch.equal(noisy.clean, noisy.labels == labels)
    assert noisy.rate == pytest.approx((noisy.labels != labels).double().mean().item())


@pytest.mark.parametrize("case", [c for c in KNOWN["flipped_of_50000"] if c != "y"])
def test_legacy_noise_flips_as_many_of_50000_labels_as_the_released_code(case):
    kind, rate = case.rsplit("_", 1)
    noisy = add_label_noise(
        labels_of(KNOWN["flipped_of_50000"]["y"]), kind, float(rate), num_classes=10, backend="legacy"
    )
    assert (~noisy.clean).sum() == KNOWN["flipped_of_50000"][case]


@pytest.mark.parametrize("kind", ["asymmetric_mnist", "asymmetric_cifar10"])
def test_asymmetric_noise_confuses_the_published_pairs(kind):
    expected = torch.eye(10, dtype=torch.float64)
    for label, other in KNOWN["maps"][kind].items():
        expected[int(label), int(label)], expected[int(label), other] = 0.75, 0.25
    assert torch.equal(transition_matrix(kind, 10, 0.25), expected)


def test_asymmetric_cifar100_noise_walks_around_groups_of_five():
    matrix = transition_matrix("asymmetric_cifar100", 100, 1.0)
    assert matrix.argmax(1).tolist()[:11] == [1, 2, 3, 4, 0, 6, 7, 8, 9, 5, 11]
    assert torch.equal(matrix.sum(1), torch.ones(100, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_rows_of_transition_matrices_are_distributions(kind, rate):
    matrix = transition_matrix(kind, classes_of(kind), rate)
    assert matrix.dtype == torch.float64
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_vectorized_noise_follows_the_matrix(kind):
    classes = classes_of(kind)
    labels = torch.arange(400_000) % classes
    noisy = add_label_noise(labels, kind, 0.4, num_classes=classes)
    matrix = transition_matrix(kind, classes, 0.4)
    counts = torch.bincount(labels * classes + noisy.labels, minlength=classes**2).view(classes, classes)
    per_class = len(labels) / classes
    # Five standard deviations of a binomial share; impossible confusions never happen.
    deviation = (matrix * (1 - matrix) / per_class).sqrt()
    assert ((counts / per_class - matrix).abs() <= 5 * deviation + 1e-12).all()
    assert (counts[matrix == 0] == 0).all()


@pytest.mark.parametrize("backend", ["vectorized", "legacy"])
def test_a_matrix_of_ones_own_is_followed(backend):
    matrix = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.arange(3000) % 3
    noisy = add_label_noise(labels, matrix, num_classes=3, backend=backend).labels
    assert (noisy[labels == 0] == 1).all()
    assert (noisy[labels == 2] == 2).all()
    assert noisy[labels == 1].float().mean() == pytest.approx(0.5, abs=0.08)
    assert noisy[labels == 1].max() == 1


def test_draws_at_the_very_ends_hit_no_impossible_class(monkeypatch):
    # 0 and the largest number below 1, on a row with impossible classes at both ends whose running sum stays below 1.
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, **settings: ends.expand(size))
    row = torch.tensor([0.0] + [0.1] * 10 + [0.0], dtype=torch.float64)
    assert row.cumsum(0)[-1] <= ends[1]
    labels = torch.zeros(2, dtype=torch.int64)
    assert add_label_noise(labels, row.expand(12, 12), num_classes=12).labels.tolist() == [1, 10]
    for label, ends_of_others in ((0, [1, 11]), (11, [0, 10])):
        features = torch.zeros(2, 3)
        noisy = instance_dependent_noise(features, labels + label, 1.0, num_classes=12, deviation=0.0)
        assert noisy.labels.tolist() == ends_of_others


@pytest.mark.parametrize("settings", [{}, {"backend": "legacy"}, {"unbiased": False}])
def test_a_rate_of_zero_changes_nothing(settings):
    labels = torch.arange(500) % 10
    noisy = add_label_noise(labels, "symmetric", 0.0, num_classes=10, **settings)
    assert torch.equal(noisy.labels, labels)
    assert noisy.clean.all()
    assert noisy.rate == 0.0


def test_a_rate_of_one_leaves_no_label():
    labels = torch.arange(500) % 10
    assert add_label_noise(labels, "symmetric", 1.0, num_classes=10).rate == 1.0


def test_biased_noise_redraws_a_share_from_all_classes():
    labels = torch.arange(100_000) % 4
    noisy = add_label_noise(labels, "symmetric", 0.4, num_classes=4, unbiased=False)
    assert noisy.rate == pytest.approx(0.4 * 3 / 4, abs=0.008)
    changed = torch.bincount((noisy.labels - labels)[~noisy.clean] % 4, minlength=4)
    assert changed[0] == 0
    assert (changed[1:] / 30_000).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    # Drawn without regard to position: both halves get their share.
    assert (~noisy.clean[:50_000]).double().mean() == pytest.approx(0.3, abs=0.012)


def test_noise_depends_on_the_seed_and_on_no_global_state():
    labels, features = torch.arange(1000) % 10, torch.randn(1000, 5)
    for draw in (
        lambda seed: add_label_noise(labels, "symmetric", 0.5, num_classes=10, seed=seed),
        lambda seed: add_label_noise(labels, "symmetric", 0.5, num_classes=10, seed=seed, unbiased=False),
        lambda seed: add_label_noise(labels, "symmetric", 0.5, num_classes=10, seed=seed, backend="legacy"),
        lambda seed: instance_dependent_noise(features, labels, 0.5, num_classes=10, seed=seed),
    ):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = draw(3).labels
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(draw(3).labels, first)
        assert not torch.equal(draw(4).labels, first)


def test_no_label_gives_no_label_and_no_rate():
    empty = torch.empty(0, dtype=torch.int64)
    for noisy in (
        add_label_noise(empty, "symmetric", 0.2, num_classes=10),
        add_label_noise(empty, "symmetric", 0.2, num_classes=10, backend="legacy"),
        instance_dependent_noise(torch.empty(0, 4), empty, 0.2, num_classes=10),
    ):
        assert noisy.labels.shape == noisy.clean.shape == (0,)
        assert noisy.labels.dtype == torch.int64
        assert noisy.rate != noisy.rate


def test_noise_leaves_the_labels_that_went_in():
    labels = torch.arange(20) % 10
    add_label_noise(labels, "symmetric", 0.9, num_classes=10)
    assert torch.equal(labels, torch.arange(20) % 10)


@pytest.mark.parametrize(("rate", "mean"), [(0.0, 0.0798), (0.1, 0.1288), (0.2, 0.2055), (0.3, 0.3004), (0.5, 0.5)])
def test_instance_dependent_rates_average_to_the_truncated_mean(rate, mean):
    labels = torch.arange(60_000) % 10
    noisy = instance_dependent_noise(torch.randn(60_000, 4), labels, rate, num_classes=10)
    assert noisy.rate == pytest.approx(mean, abs=5 * (mean * (1 - mean) / 60_000) ** 0.5)


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_instance_dependent_rates_without_deviation_are_the_rate(rate):
    labels = torch.arange(40_000) % 10
    noisy = instance_dependent_noise(torch.randn(40_000, 4), labels, rate, num_classes=10, deviation=0.0)
    assert noisy.rate == pytest.approx(rate, abs=0.011)
    assert rate == 0.25 or noisy.rate == rate


def test_instances_alike_flip_alike():
    # The class that a flip goes to is a function of features and label: a large instance has one, copies share it.
    labels = torch.tensor([0, 1]).repeat_interleave(500)
    features = 1e3 * torch.randn(2, 3, 6).repeat_interleave(500, 0)
    noisy = instance_dependent_noise(features, labels, 0.5, num_classes=10)
    for label in (0, 1):
        assert noisy.labels[(labels == label) & ~noisy.clean].unique().numel() == 1
    # Without features there is nothing to prefer.
    flat = instance_dependent_noise(torch.zeros(20_000, 6), torch.zeros(20_000, dtype=torch.int64), 1.0, num_classes=5)
    shares = torch.bincount(flat.labels[~flat.clean], minlength=5) / (~flat.clean).sum()
    assert shares.tolist() == pytest.approx([0.0] + [0.25] * 4, abs=0.02)


def test_instance_dependent_rates_differ_between_instances():
    # The same uniform number decides with and without deviation: only the instances' own rates can tell them apart.
    labels, features = torch.arange(20_000) % 10, torch.zeros(20_000, 3)
    wide = instance_dependent_noise(features, labels, 0.5, num_classes=10, deviation=0.3)
    narrow = instance_dependent_noise(features, labels, 0.5, num_classes=10, deviation=0.0)
    assert (wide.clean != narrow.clean).double().mean() > 0.1


def test_precision_and_recall_count_rows():
    kept = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
    clean = torch.tensor([1, 1, 0, 0, 0, 1]).bool()
    torch.testing.assert_close(label_precision(kept, clean), torch.tensor([2 / 3, 1.0]))
    torch.testing.assert_close(noise_recall(kept, clean), torch.tensor([2 / 3, 1.0]))
    assert label_precision(kept[0], clean).shape == noise_recall(kept[0], clean).shape == ()
    both = label_precision(kept, clean.expand(2, 6))
    assert torch.equal(both, label_precision(kept, clean))


def test_shares_of_nothing_are_nan():
    none, every = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert label_precision(none, every).isnan()
    assert noise_recall(every, every).isnan()
    assert noise_recall(none, none) == 1.0


def test_metrics_read_no_value():
    # Meta tensors have none.
    kept, clean = torch.empty(2, 3, 8, dtype=torch.bool, device="meta"), torch.empty(8, dtype=torch.bool, device="meta")
    assert label_precision(kept, clean).shape == noise_recall(kept, clean).shape == (2, 3)


LABELS = torch.arange(10)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: transition_matrix("uniform", 10, 0.2), ValueError, "kind"),
        (lambda: transition_matrix(None, 10, 0.2), TypeError, "kind"),
        (lambda: transition_matrix("symmetric", 1, 0.2), ValueError, "num_classes"),
        (lambda: transition_matrix("asymmetric_mnist", 9, 0.2), ValueError, "num_classes"),
        (lambda: transition_matrix("symmetric", 10, 1.2), ValueError, "rate"),
        (lambda: add_label_noise(LABELS, "symmetric", num_classes=10), TypeError, "rate"),
        (lambda: add_label_noise(LABELS, torch.eye(10), 0.2, num_classes=10), ValueError, "rate"),
        (lambda: add_label_noise(LABELS, torch.eye(9), num_classes=10), ValueError, "kind"),
        (lambda: add_label_noise(LABELS, torch.eye(10) * 0.9, num_classes=10), ValueError, "kind"),
        (lambda: add_label_noise(LABELS, torch.eye(10).long(), num_classes=10), TypeError, "kind"),
        (lambda: add_label_noise(LABELS, torch.eye(10) * torch.nan, num_classes=10), ValueError, "kind"),
        (lambda: add_label_noise(LABELS, "symmetric", 0.2, num_classes=9), ValueError, "labels"),
        (lambda: add_label_noise(LABELS - 1, "symmetric", 0.2, num_classes=10), ValueError, "labels"),
        (lambda: add_label_noise(LABELS[:, None], "symmetric", 0.2, num_classes=10), ValueError, "labels"),
        (lambda: add_label_noise(LABELS.int(), "symmetric", 0.2, num_classes=10), TypeError, "labels"),
        (lambda: add_label_noise([0, 1], "symmetric", 0.2, num_classes=10), TypeError, "labels"),
        (lambda: add_label_noise(LABELS, "symmetric", 0.2, num_classes=10, backend="fast"), ValueError, "backend"),
        (lambda: add_label_noise(LABELS, "symmetric", 0.2, num_classes=10, seed=-1), ValueError, "seed"),
        (lambda: add_label_noise(LABELS, "symmetric", 0.2, num_classes=10, seed=2**32), ValueError, "seed"),
        (lambda: add_label_noise(LABELS, "pairflip", 0.2, num_classes=10, unbiased=False), ValueError, "unbiased"),
        (
            lambda: add_label_noise(LABELS, "symmetric", 0.2, num_classes=10, backend="legacy", unbiased=False),
            ValueError,
            "unbiased",
        ),
        (lambda: instance_dependent_noise(torch.randn(9, 3), LABELS, 0.2, num_classes=10), ValueError, "features"),
        (lambda: instance_dependent_noise(torch.randn(10), LABELS, 0.2, num_classes=10), ValueError, "features"),
        (lambda: instance_dependent_noise(LABELS[:, None], LABELS, 0.2, num_classes=10), TypeError, "features"),
        (
            lambda: instance_dependent_noise(torch.full((10, 3), torch.nan), LABELS, 0.2, num_classes=10),
            ValueError,
            "features",
        ),
        (
            lambda: instance_dependent_noise(torch.randn(10, 3), LABELS, 0.2, num_classes=10, deviation=-1.0),
            ValueError,
            "deviation",
        ),
        (lambda: label_precision(LABELS, LABELS > 3), TypeError, "kept"),
        (lambda: label_precision(LABELS > 3, None), TypeError, "clean"),
        (lambda: noise_recall(LABELS > 3, LABELS[:1] > 3), ValueError, "clean"),
        (lambda: noise_recall(LABELS > 3, (LABELS > 3).to("meta")), ValueError, "clean"),
    ],
)
def test_label_noise_names_what_it_does_not_take(call, error, argument):
    with pytest.raises(error, match=f"`{argument}` got .*, expected"):
        call()


def test_docstring_examples_run():
    result = doctest.testmod(perfvl.label_noise)
    assert result.attempted > 0
    assert result.failed == 0
