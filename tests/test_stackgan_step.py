"""StackGAN's losses and iteration: in reference mode the published ones, and nothing that these throw away."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from perfvl.benchmarks import stackgan_peers as peers
from stackgan_support import DF, GF, KNOWN, E, R, T, Z, adams, batch, eps_of, gradients, networks, norms
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from perfvl.models.stackgan import Stage1Discriminator, Stage1Generator, Stage2Discriminator, Stage2Generator
from perfvl.models.stackgan_step import discriminator_loss, generator_loss, kl_divergence, train_step

LN2 = math.log(2)
HEADS = {
    1: ("real", "wrong", "fake"),
    2: ("real", "wrong", "fake", "uncond_real", "uncond_fake"),
}


def small(stage: int = 1):
    """Networks for 16 or 32 pixels, quicker than those of the published sizes."""
    stage1 = Stage1Generator(Z, E, GF, T, image_size=16)
    if stage == 1:
        return stage1, Stage1Discriminator(E, DF, image_size=16)
    generator = Stage2Generator(stage1, E, GF, T, R, image_size=32, stage1_bn="train")
    return generator, Stage2Discriminator(E, DF, image_size=32)


def small_batch(stage: int = 1, count: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, 16 * stage, 16 * stage) * 2 - 1, torch.randn(count, T)


def equal_logits(discriminator) -> None:
    """All probabilities are a half."""
    for head in (discriminator.get_cond_logits, discriminator.get_uncond_logits):
        if head is not None:
            for parameter in head.outlogits[-2].parameters():
                torch.nn.init.zeros_(parameter)


def bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


class TestKL:
    def test_known_values(self):
        zeros, ones = torch.zeros(3, 5), torch.ones(3, 5)
        known = KNOWN["kl"]
        for mu, logvar, name in ((zeros, zeros, "mu0_lv0"), (ones, zeros, "mu1_lv0"), (zeros, ones, "mu0_lv1")):
            assert kl_divergence(mu, logvar).item() == pytest.approx(known[name], abs=1e-6)

    def test_gradients_are_the_formula_s(self):
        mu, logvar = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_().unbind()
        mu.retain_grad()
        logvar.retain_grad()
        kl_divergence(mu, logvar).backward()
        torch.testing.assert_close(mu.grad, mu.detach() / 15)
        torch.testing.assert_close(logvar.grad, 0.5 * (logvar.detach().exp() - 1) / 15)


class TestDiscriminatorLoss:
    @pytest.mark.parametrize("stage", [1, 2])
    def test_reference_mode_is_the_published_loss(self, stage):
        nets, given = networks(stage), batch(stage, 4)
        fake, mu = given.images.flip(0), given.eps[0]
        found = discriminator_loss(nets.discriminator, given.images, fake, mu, mode="reference")
        expected = peers.discriminator_loss(nets.plain_discriminator, given.images, fake, mu)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-10, atol=0)
        torch.testing.assert_close(found.heads.double(), expected.heads, rtol=1e-6, atol=0)
        found.total.backward()
        expected.total.backward()
        torch.testing.assert_close(
            gradients(nets.discriminator), gradients(nets.plain_discriminator), rtol=1e-9, atol=1e-10
        )

    @pytest.mark.parametrize("mode", ["paper", "reference"])
    @pytest.mark.parametrize("stage", [1, 2])
    def test_weights_of_the_heads_are_the_published_and_sum_to_two(self, stage, mode):
        discriminator = small(stage)[1]
        images, _ = small_batch(stage)
        found = discriminator_loss(discriminator, images, -images, torch.randn(4, E), mode=mode)
        weights = torch.tensor([KNOWN["losses"][f"D_stage{stage}"][name] for name in HEADS[stage]])
        torch.testing.assert_close(found.total.detach(), found.heads @ weights)
        equal_logits(discriminator)
        found = discriminator_loss(discriminator, images, -images, torch.randn(4, E), mode=mode)
        torch.testing.assert_close(found.heads, torch.full((len(weights),), LN2))
        assert found.total.item() == pytest.approx(2 * LN2, rel=1e-6)

    @pytest.mark.parametrize("wrong", ["shift", "permute"])
    def test_wrong_pairs_have_another_condition(self, wrong):
        discriminator = small()[1].double().eval()
        images, condition = small_batch()[0].double(), torch.randn(4, E).double()
        order = torch.tensor([1, 2, 3, 0] if wrong == "shift" else [2, 1, 0, 3])
        options = {} if wrong == "shift" else {"permutation": order}
        heads = discriminator_loss(discriminator, images, -images, condition, wrong=wrong, **options).heads
        features = discriminator(images)
        logits = discriminator.get_cond_logits.logits
        expected = [
            bce(logits(features, condition), 1),
            bce(logits(features, condition[order]), 0),
            bce(logits(discriminator(-images), condition), 0),
        ]
        torch.testing.assert_close(heads.double(), torch.stack(expected).detach(), rtol=1e-6, atol=0)

    def test_reference_mode_shifts_without_the_last_image(self):
        discriminator = small()[1].double().eval()
        images, condition = small_batch()[0].double(), torch.randn(4, E).double()
        heads = discriminator_loss(discriminator, images, -images, condition, mode="reference").heads
        logits = discriminator.get_cond_logits.logits(discriminator(images[:3]), condition[1:])
        torch.testing.assert_close(heads[1].double(), bce(logits, 0).detach(), rtol=1e-6, atol=0)

    def test_random_permutations_are_permutations_and_differ(self):
        discriminator, seen = small()[1].eval(), []
        images, condition = small_batch(count=16)[0], torch.randn(16, E)
        pairs = discriminator.get_cond_logits.pairs
        discriminator.get_cond_logits.pairs = lambda *given: seen.append(given[1][1]) or pairs(*given)
        for _ in range(2):
            discriminator_loss(discriminator, images, -images, condition, wrong="permute")
        for found in seen:
            assert not torch.equal(found, condition)
            assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in condition.tolist()}
        assert not torch.equal(*seen)

    def test_wrong_images_keep_their_condition(self):
        discriminator = small()[1].double()
        images, condition = small_batch()[0].double(), torch.randn(4, E).double()
        others = torch.rand_like(images)
        copied = copy.deepcopy(discriminator)
        heads = discriminator_loss(discriminator, images, -images, condition, wrong="image", wrong_images=others).heads
        features = [copied(x) for x in (images, others, -images)]
        expected = [
            bce(copied.get_cond_logits.logits(x, condition), y) for x, y in zip(features, (1, 0, 0), strict=True)
        ]
        torch.testing.assert_close(heads.double(), torch.stack(expected).detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(discriminator.state_dict(), copied.state_dict())

    @pytest.mark.parametrize("stage", [1, 2])
    def test_smoothed_labels_are_those_of_real_images(self, stage):
        discriminator = small(stage)[1].double().eval()
        images, condition = small_batch(stage)[0].double(), torch.randn(4, E).double()
        hard, soft = (
            discriminator_loss(discriminator, images, -images, condition, label_smoothing=s).heads for s in (0.0, 0.2)
        )
        features = discriminator(images)
        real = {0: discriminator.get_cond_logits.logits(features, condition)}
        if stage == 2:
            real[3] = discriminator.get_uncond_logits.logits(features)
        for i in range(len(hard)):
            expected = bce(real[i], 0.8).detach() if i in real else hard[i].double()
            torch.testing.assert_close(soft[i].double(), expected, rtol=1e-6, atol=0)

    def test_neither_fakes_nor_conditions_get_gradients(self):
        discriminator = small()[1]
        images, fake, condition = (
            small_batch()[0],
            small_batch()[0].requires_grad_(),
            torch.randn(4, E, requires_grad=True),
        )
        discriminator_loss(discriminator, images, fake, condition).total.backward()
        assert fake.grad is None
        assert condition.grad is None

    def test_a_confident_discriminator_is_judged_by_its_logits(self):
        discriminator = small()[1]
        images, condition = small_batch()[0], torch.randn(4, E)
        last = discriminator.get_cond_logits.outlogits[3]
        equal_logits(discriminator)
        torch.nn.init.constant_(last.bias, 30.0)
        found = {
            m: discriminator_loss(discriminator, images, -images, condition, mode=m) for m in ("paper", "reference")
        }
        torch.testing.assert_close(found["paper"].heads, torch.tensor([0.0, 30.0, 30.0]))
        torch.testing.assert_close(found["reference"].heads, torch.tensor([0.0, 100.0, 100.0]))
        for mode, expected in (("paper", 1.0), ("reference", 0.0)):
            last.bias.grad = None
            found[mode].total.backward()
            assert last.bias.grad.item() == pytest.approx(expected, abs=1e-6)


class TestGeneratorLoss:
    @pytest.mark.parametrize("stage", [1, 2])
    def test_reference_mode_is_the_published_loss(self, stage):
        nets, given = networks(stage), batch(stage, 4)
        leaves = [
            [t.clone().requires_grad_() for t in (given.images, given.eps[0], given.eps[0] + 1)] for _ in range(2)
        ]
        (fake, mu, logvar), plain = leaves
        found = generator_loss(nets.discriminator, fake, mu, mu, logvar, mode="reference")
        expected = peers.generator_loss(nets.plain_discriminator, *plain)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-10, atol=0)
        torch.testing.assert_close(found.heads.double(), expected.heads, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.kl, expected.kl.detach())
        found.total.backward()
        expected.total.backward()
        torch.testing.assert_close([t.grad for t in leaves[0]], [t.grad for t in plain], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_it_is_the_sum_of_its_heads_and_the_weighted_divergence(self, stage):
        discriminator = small(stage)[1]
        images, mu, logvar = small_batch(stage)[0], torch.randn(4, E), torch.randn(4, E)
        for options, weight in (({}, 2.0), ({"kl_weight": 0.5}, 0.5)):
            found = generator_loss(discriminator, images, mu, mu, logvar, **options)
            torch.testing.assert_close(found.total, found.heads.sum() + weight * kl_divergence(mu, logvar))
            assert len(found.heads) == stage

    def test_the_discriminator_gets_no_gradients_and_stays_trainable(self):
        discriminator = small(2)[1]
        frozen = discriminator.encode_img[0].weight.requires_grad_(False)
        images, mu = small_batch(2)[0].requires_grad_(), torch.randn(4, E)
        loss = generator_loss(discriminator, images, mu, mu, mu)
        assert not frozen.requires_grad
        assert all(p.requires_grad for p in discriminator.parameters() if p is not frozen)
        loss.total.backward()
        assert set(gradients(discriminator).values()) == {None}
        assert images.grad.any()

    def test_the_discriminator_stays_trainable_where_the_call_fails(self):
        discriminator = small()[1]
        discriminator.encode_img.register_forward_hook(lambda *arguments: 1 / 0)
        images, mu = small_batch()[0], torch.randn(4, E)
        with pytest.raises(ZeroDivisionError):
            generator_loss(discriminator, images, mu, mu, mu)
        assert all(p.requires_grad for p in discriminator.parameters())


class TestTrainStep:
    @pytest.mark.parametrize("stage", [1, 2])
    def test_three_iterations_in_reference_mode_are_the_published(self, stage):
        nets = networks(stage, **({"stage1_bn": "train"} if stage == 2 else {}))
        ours, plain = adams(*nets[:2]), adams(*nets[2:])
        for seed in range(3):
            given = batch(stage, 4, seed=seed)
            found = train_step(
                *nets[:2], *ours, given.images, given.text, noise=given.noise, eps=eps_of(given), mode="reference"
            )
            first, second, fake = peers.train_step(*nets[2:], tuple(plain), *given)
            expected = [first.total, second.total, second.kl, fake]
            got = [found.discriminator_loss, found.generator_loss, found.kl, found.images]
            torch.testing.assert_close(got, [t.detach() for t in expected], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.discriminator_heads.double(), first.heads.detach(), rtol=1e-6, atol=0)
            torch.testing.assert_close(found.generator_heads.double(), second.heads.detach(), rtol=1e-6, atol=0)
        for network, twin in zip(nets[:2], nets[2:], strict=True):
            torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("stage1_bn", ["eval", "train"])
    def test_batch_norms_update_as_often_as_published(self, stage1_bn):
        generator, discriminator = networks(2, torch.float32, stage1_bn=stage1_bn)[:2]
        given = batch(2, dtype=torch.float32)
        train_step(generator, discriminator, *adams(generator, discriminator), given.images, given.text)
        counts = {name: norm.num_batches_tracked.item() for name, norm in norms(discriminator).items()}
        assert {n for name, n in counts.items() if name.startswith("encode_img")} == {3}
        assert {n for name, n in counts.items() if name.startswith("get_cond_logits")} == {4}
        counts = {name: norm.num_batches_tracked.item() for name, norm in norms(generator).items()}
        assert {n for name, n in counts.items() if not name.startswith("STAGE1_G")} == {1}
        assert {n for name, n in counts.items() if name.startswith("STAGE1_G")} == {int(stage1_bn == "train")}

    @pytest.mark.parametrize("mode", ["paper", "reference"])
    def test_running_statistics_are_those_of_each_group_one_after_the_other(self, mode):
        generator, discriminator = networks(1)[:2]
        given, expected = batch(1, 4), norms(copy.deepcopy(discriminator))
        seen = watched(discriminator)
        train_step(generator, discriminator, *adams(generator, discriminator), given.images, given.text, mode=mode)
        for name, norm in norms(discriminator).items():
            for group in seen[name]:
                expected[name](group)
            assert torch.equal(norm.running_mean, expected[name].running_mean)
            assert torch.equal(norm.running_var, expected[name].running_var)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_groups_come_in_the_published_order(self, stage):
        nets, given = networks(stage, **({"stage1_bn": "train"} if stage == 2 else {})), batch(stage, 4)
        found, expected = (watched(network) for network in (nets.discriminator, nets.plain_discriminator))
        train_step(*nets[:2], *adams(*nets[:2]), *given[:2], noise=given.noise, eps=eps_of(given), mode="reference")
        peers.train_step(*nets[2:], tuple(adams(*nets[2:])), *given)
        assert [len(group) for group in found["encode_img.3"]] == [4, 4, 4]
        assert [len(group) for group in found["get_cond_logits.outlogits.1"]] == [4, 3, 4, 4]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_gradients_of_the_discriminator_are_those_of_its_own_loss(self):
        generator, discriminator = networks(1)[:2]
        given, twin = batch(1), copy.deepcopy(discriminator)
        _, fake, mu, _ = copy.deepcopy(generator)(given.text, given.noise, given.eps[0])
        discriminator_loss(twin, given.images, fake, mu).total.backward()
        optimizers = adams(generator, discriminator)
        train_step(generator, discriminator, *optimizers, *given[:2], noise=given.noise, eps=given.eps[0])
        torch.testing.assert_close(gradients(discriminator), gradients(twin), rtol=1e-12, atol=1e-12)
        assert all(p.grad.any() for p in generator.parameters())

    @pytest.mark.parametrize("stage", [1, 2])
    def test_conditions_and_noise_are_drawn(self, stage):
        def images(seed: int) -> Tensor:
            torch.manual_seed(0)
            nets, given = small(stage), small_batch(stage)
            torch.manual_seed(seed)
            return train_step(*nets, *adams(*nets), *given).images

        assert torch.equal(images(1), images(1))
        assert not torch.equal(images(1), images(2))

    def test_what_it_returns_has_no_graph_and_later_steps_leave_it_alone(self):
        nets = small(2)
        optimizers = adams(*nets)
        first = train_step(*nets, *optimizers, *small_batch(2))
        kept = [t.clone() for t in first]
        train_step(*nets, *optimizers, *small_batch(2))
        assert not any(t.requires_grad for t in first)
        torch.testing.assert_close(list(first), kept, rtol=0, atol=0)

    def test_stage1_keeps_its_weights(self):
        generator, discriminator = small(2)
        before = [p.clone() for p in generator.STAGE1_G.parameters()]
        train_step(generator, discriminator, *adams(generator, discriminator), *small_batch(2))
        torch.testing.assert_close(list(generator.STAGE1_G.parameters()), before, rtol=0, atol=0)
        assert {p.grad for p in generator.STAGE1_G.parameters()} == {None}

    @pytest.mark.parametrize("options", [{}, {"wrong": "permute"}, {"mode": "reference"}], ids=str)
    @pytest.mark.parametrize("stage", [1, 2])
    def test_it_reads_no_data(self, stage, options):
        with FakeTensorMode():  # tensors without any
            nets = small(stage)
            optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in nets]
            out = train_step(*nets, *optimizers, *small_batch(stage), **options)
            with pytest.raises(DataDependentOutputException):
                out.kl.item()

    def test_autocast_around_many_steps_is_autocast_around_each(self):
        def trained(together: bool) -> list[dict]:
            torch.manual_seed(0)
            nets = small()
            optimizers = [torch.optim.SGD(network.parameters(), 0.5) for network in nets]
            batches = [small_batch() for _ in range(3)]
            with torch.autocast("cpu", torch.bfloat16, enabled=together):
                for given in batches:
                    with torch.autocast("cpu", torch.bfloat16):
                        out = train_step(*nets, *optimizers, *given)
            assert out.images.dtype == torch.bfloat16
            assert out.generator_loss.dtype == torch.float32
            return [network.state_dict() for network in nets]

        torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=0)

    def test_it_learns(self):
        nets = small()
        optimizers = adams(*nets)
        images, text = small_batch(count=8)
        images = images * 0.1 + 0.8
        first = train_step(*nets, *optimizers, images, text)
        for _ in range(15):
            last = train_step(*nets, *optimizers, images, text)
        assert last.discriminator_loss < first.discriminator_loss


def watched(network: torch.nn.Module) -> dict[str, list[Tensor]]:
    """What each batch norm will be given."""
    seen: dict[str, list[Tensor]] = {}
    for name, norm in norms(network).items():
        norm.register_forward_pre_hook(
            lambda module, arguments, name=name: seen.setdefault(name, []).append(arguments[0].detach().clone())
        )
    return seen


BAD_STEPS = [
    ({"images": torch.zeros(4, 3, 16, 15)}, ValueError, r"`images` got shape .*, expected \[N, 3, 16, 16\]"),
    ({"images": None}, TypeError, "`images` got NoneType, expected a torch.Tensor"),
    ({"text": torch.zeros(4, T - 1)}, ValueError, rf"`text` got shape \(4, {T - 1}\), expected \[4, {T}\]"),
    ({"text": torch.zeros(3, T)}, ValueError, rf"`text` got shape \(3, {T}\), expected \[4, {T}\]"),
    ({"noise": torch.zeros(4, Z + 1)}, ValueError, rf"`noise` got shape \(4, {Z + 1}\), expected \[4, {Z}\]"),
    ({"eps": torch.zeros(3, E)}, ValueError, rf"`eps` got shape \(3, {E}\), expected \[4, {E}\]"),
    ({"mode": "published"}, ValueError, '`mode` got \'published\', expected "paper" or "reference"'),
    ({"wrong": "roll"}, ValueError, "`wrong` got 'roll', expected one of shift, permute, image"),
    ({"wrong": "permute", "mode": "reference"}, ValueError, "`wrong` got 'permute', expected \"shift\""),
    ({"wrong": "image"}, TypeError, "`wrong_images` got NoneType"),
    ({"wrong_images": torch.zeros(4, 3, 16, 16)}, ValueError, "`wrong_images` got a value, expected None"),
    (
        {"wrong": "image", "wrong_images": torch.zeros(3, 3, 16, 16)},
        ValueError,
        r"`wrong_images` got shape .*, expected \[4, 3, 16, 16\]",
    ),
    ({"permutation": torch.arange(4)}, ValueError, "`permutation` got a value, expected None"),
    ({"wrong": "permute", "permutation": [0, 1]}, TypeError, "`permutation` got list, expected an int64 tensor"),
    (
        {"wrong": "permute", "permutation": torch.arange(3)},
        ValueError,
        r"`permutation` got shape \(3,\), expected \[4\]",
    ),
    ({"wrong": "permute", "permutation": torch.zeros(4)}, TypeError, "`permutation` got torch.float32"),
    ({"kl_weight": "2"}, TypeError, "`kl_weight` got str, expected a float"),
    ({"kl_weight": math.inf}, ValueError, "`kl_weight` got inf, expected a finite number"),
    ({"label_smoothing": 1.0}, ValueError, r"`label_smoothing` got 1.0, expected a number in \[0, 1\)"),
    ({"label_smoothing": None}, TypeError, "`label_smoothing` got NoneType, expected a float"),
    (
        {"images": torch.zeros(1, 3, 16, 16), "text": torch.zeros(1, T)},
        ValueError,
        "`images` got 1 of them, .* at least 2",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_STEPS)
def test_bad_steps_change_nothing(given, error, message):
    nets = small()
    optimizers, (images, text) = adams(*nets), small_batch()
    before = copy.deepcopy([thing.state_dict() for thing in (*nets, *optimizers)])
    arguments = {"images": images, "text": text, **given}
    with pytest.raises(error, match=message):
        train_step(*nets, *optimizers, arguments.pop("images"), arguments.pop("text"), **arguments)
    torch.testing.assert_close([t.state_dict() for t in (*nets, *optimizers)], before, rtol=0, atol=0)
    assert {p.grad for network in nets for p in network.parameters()} == {None}


def test_networks_that_do_not_fit_are_refused():
    generator, optimizers = small()[0], [None, None]
    for options, message in (
        ({"image_size": 32}, "`discriminator` got one of image_size 32, expected that of the generator, 16"),
        ({"condition_dim": E + 1}, f"`discriminator` got one of condition_dim {E + 1}, expected that of the"),
    ):
        other = Stage1Discriminator(**{"condition_dim": E, "df_dim": DF, "image_size": 16, **options})
        with pytest.raises(ValueError, match=message):
            train_step(generator, other, *optimizers, *small_batch())


def test_bad_losses_are_refused():
    discriminator, images, vectors = small()[1], small_batch()[0], torch.zeros(4, E)
    bad = [
        ({"fake": images[:3]}, r"`fake` got shape \(3, 3, 16, 16\), expected \[4, 3, 16, 16\]"),
        ({"condition": vectors[:3]}, rf"`condition` got shape \(3, {E}\), expected \[4, {E}\]"),
        ({"real": images[:1], "fake": images[:1], "condition": vectors[:1]}, "`real` got 1 of them, .* at least 2"),
    ]
    for given, message in bad:
        with pytest.raises(ValueError, match=message):
            discriminator_loss(discriminator, **{"real": images, "fake": images, "condition": vectors, **given})
    bad = [
        ({"fake": images[:, :2]}, r"`fake` got shape \(4, 2, 16, 16\), expected \[N, 3, 16, 16\]"),
        ({"condition": vectors[:3]}, rf"`condition` got shape \(3, {E}\), expected \[4, {E}\]"),
        ({"logvar": vectors[:, 1:]}, rf"`logvar` got shape \(4, {E - 1}\), expected \[4, {E}\]"),
        ({"mode": None}, "`mode` got None"),
    ]
    for given, message in bad:
        arguments = {"fake": images, "condition": vectors, "mu": vectors, "logvar": vectors, **given}
        with pytest.raises(ValueError, match=message):
            generator_loss(discriminator, **arguments)
    assert {norm.num_batches_tracked.item() for norm in norms(discriminator).values()} == {0}
