"""StackGAN's networks are the published ones in keys and outputs, at other sizes too, and write less memory."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from perfvl.benchmarks import stackgan_peers as peers
from stackgan_support import DF, GF, KNOWN, SIZES, E, R, T, Z, batch, eps_of, gradients, networks, norms
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import perfvl
from perfvl.models.stackgan import (
    Stage1Discriminator,
    Stage1Generator,
    Stage2Discriminator,
    Stage2Generator,
    initialize,
)

CONFIGS = {"gf128_df64_R4": (128, 64, 4), "gf192_df96_R2": (192, 96, 2)}
NAMES = ("STAGE1_G", "STAGE1_D", "STAGE2_G", "STAGE2_D")
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def build(name: str, gf: int, df: int, blocks: int) -> nn.Module:
    with torch.device("meta"):
        if name == "STAGE1_G":
            return Stage1Generator(gf_dim=gf)
        if name == "STAGE2_G":
            return Stage2Generator(Stage1Generator(gf_dim=gf), gf_dim=gf, residual_blocks=blocks)
        return (Stage1Discriminator if name == "STAGE1_D" else Stage2Discriminator)(df_dim=df)


def published(name: str, gf: int, df: int, blocks: int) -> dict[str, list[int]]:
    """Keys in their order, and shapes."""
    sizes = {"t": 1024, "e": 128, "z": 100, "gf": gf, "df": df}
    keys = KNOWN["keys"]
    if name == "STAGE2_G":
        found = {f"STAGE1_G.{key}": shape for key, shape in keys["STAGE1_G"].items()}
        own = keys["STAGE2_G_own"].items()
        first = next(i for i, (key, _) in enumerate(own) if key.startswith("residual"))
        rest = [(key, shape) for key, shape in own if not key.startswith("residual")]
        block = [(key, shape) for key, shape in own if key.startswith("residual")]
        blocked = [(key.replace(".0.", f".{i}.", 1), shape) for i in range(blocks) for key, shape in block]
        found.update([*rest[:first], *blocked, *rest[first:]])
    else:
        found = keys[name]
    return {key: [int(eval(n, {"__builtins__": {}}, sizes)) for n in shape] for key, shape in found.items()}


def assert_same(found: tuple, expected: tuple, tolerance: float) -> None:
    """Up to a share of the largest number."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


class TestStateDict:
    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("name", NAMES)
    def test_keys_order_and_shapes_are_the_published(self, name, config):
        state = build(name, *CONFIGS[config]).state_dict()
        expected = published(name, *CONFIGS[config])
        assert list(state) == list(expected)
        assert {key: list(value.shape) for key, value in state.items()} == expected
        blocks = CONFIGS[config][2]
        assert len(state) == {"STAGE1_G": 33, "STAGE1_D": 27, "STAGE2_G": 79 + 12 * blocks, "STAGE2_D": 53}[name]

    @pytest.mark.parametrize("config", CONFIGS)
    def test_numbers_of_parameters_are_the_published(self, config):
        counts = {}
        for name in NAMES:
            network = build(name, *CONFIGS[config])
            total = sum(p.numel() for p in network.parameters())
            counts[f"{name}_total" if name == "STAGE2_G" else name] = total
            if name == "STAGE2_G":
                counts["STAGE2_G_trainable"] = sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert counts == KNOWN["params"][config]

    @pytest.mark.parametrize("stage", [1, 2])
    def test_checkpoints_load_in_both_directions(self, stage):
        generator, discriminator, plain_generator, plain_discriminator = networks(stage)
        for ours, plain in ((generator, plain_generator), (discriminator, plain_discriminator)):
            for parameter in plain.parameters():
                parameter.data.normal_()
            ours.load_state_dict(plain.state_dict(), strict=True)
            torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_old_checkpoints_without_counters_load(self, stage):
        for network in networks(stage)[:2]:
            for norm in norms(network).values():
                norm.num_batches_tracked.fill_(3)
            saved = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
            fresh = copy.deepcopy(network)
            fresh.load_state_dict(saved, strict=True)
            assert not set(saved) & {k for k in fresh.state_dict() if k.endswith("num_batches_tracked")}
            torch.testing.assert_close({k: fresh.state_dict()[k] for k in saved}, saved, rtol=0, atol=0)

    def test_copies_and_files(self):
        given = batch(1)
        for network, inputs in zip(networks(1)[:2], ((given.text, given.noise, *given.eps), given[:1]), strict=True):
            network.eval()
            expected = network(*inputs)
            for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
                torch.testing.assert_close(copied(*inputs), expected, rtol=0, atol=0)


class TestInitialize:
    def test_weights_start_as_published(self):
        network = Stage1Generator(gf_dim=32)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert (module.weight - 1).abs().max() < 0.1
                assert module.weight.std() > 0.01
                assert not module.bias.any()
                assert not module.running_mean.any()
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                assert module.weight.mean().abs() < 0.003
                assert 0.018 < module.weight.std() < 0.022
        assert not network.ca_net.fc.bias.any()

    def test_biases_of_convolutions_stay(self):
        convolution = nn.Conv2d(4, 8, 3)
        before = convolution.bias.clone()
        initialize(convolution)
        assert torch.equal(convolution.bias, before)
        assert convolution.weight.std() < 0.03

    def test_stage2_leaves_the_trained_stage1_alone(self):
        stage1 = Stage1Generator(Z, E, GF, T)
        before = copy.deepcopy(stage1.state_dict())
        network = Stage2Generator(stage1, E, GF, T, R)
        torch.testing.assert_close(network.STAGE1_G.state_dict(), before, rtol=0, atol=0)
        assert 0.015 < network.residual[0].block[0].weight.std() < 0.025


class TestOutputs:
    @pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
    @pytest.mark.parametrize("dtype", CLOSE)
    @pytest.mark.parametrize("stage", [1, 2])
    def test_evaluation_equals_plain_modules(self, stage, dtype, grad):
        generator, discriminator, plain_generator, plain_discriminator = (m.eval() for m in networks(stage, dtype))
        given = batch(stage, dtype=dtype)
        with torch.set_grad_enabled(grad):
            found = generator(given.text, given.noise, eps_of(given))
            expected = plain_generator(given.text, given.noise, given.eps)
            assert (found[0] is None) == (stage == 1)
            assert_same(found[stage == 1 :], expected[stage == 1 :], CLOSE[dtype])
            features, plain_features = discriminator(given.images), plain_discriminator(given.images)
            assert_same((features,), (plain_features,), CLOSE[dtype])
            head, plain_head = discriminator.get_cond_logits, plain_discriminator.get_cond_logits
            condition = given.eps[0]
            assert_same((head(features, condition),), (plain_head(plain_features, condition),), CLOSE[dtype])
            assert torch.equal(head(features, condition), head.logits(features, condition).sigmoid())
            if stage == 1:
                assert discriminator.get_uncond_logits is None
            else:
                head, plain_head = discriminator.get_uncond_logits, plain_discriminator.get_uncond_logits
                assert_same((head(features),), (plain_head(plain_features),), CLOSE[dtype])
                assert torch.equal(head(features), head.logits(features).sigmoid())

    @pytest.mark.parametrize("stage", [1, 2])
    def test_training_equals_plain_modules_with_gradients_and_statistics(self, stage):
        nets = networks(stage, **({"stage1_bn": "train"} if stage == 2 else {}))
        given = batch(stage)
        for ours, generator, discriminator in ((True, *nets[:2]), (False, *nets[2:])):
            eps = eps_of(given) if ours else given.eps
            _, image, mu, logvar = generator(given.text, given.noise, eps)
            scores = discriminator.get_cond_logits(discriminator(image), given.eps[0])
            (scores.square().sum() + (mu * 2 + logvar).square().sum()).backward()
        for ours, plain in zip(nets[:2], nets[2:], strict=True):
            torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_a_permuted_batch_gives_permuted_outputs(self, stage):
        generator, discriminator = (m.eval() for m in networks(stage)[:2])
        given, order = batch(stage, 4), torch.tensor([2, 0, 3, 1])
        permuted = type(given)(*(t[order] for t in given[:3]), tuple(e[order] for e in given.eps))
        outputs = [generator(b.text, b.noise, eps_of(b))[1:] for b in (given, permuted)]
        assert_same(outputs[1], tuple(t[order] for t in outputs[0]), 1e-12)
        scores = [discriminator.get_cond_logits(discriminator(b.images), b.eps[0]) for b in (given, permuted)]
        torch.testing.assert_close(scores[1], scores[0][order])

    def test_pairs_are_the_head_applied_to_each(self):
        head, features = networks(1).discriminator.get_cond_logits.eval(), torch.randn(2, 4, 8 * DF, 4, 4).double()
        condition = torch.randn(4, E).double()
        pairs = [(features[0], condition), (features[1], condition)]
        first = features[0]
        found = head.pairs((first, condition), (first, condition[1:]), (pairs[1]))
        expected = [head.logits(*pairs[0]), head.logits(first[:3], condition[1:]), head.logits(*pairs[1])]
        assert_same(tuple(found), tuple(expected), 1e-12)
        assert [len(logits) for logits in found] == [4, 3, 4]

    def test_one_tensor_of_eps_is_for_both_stages(self):
        generator, given = networks(2).generator.eval(), batch(2)
        one = given.eps[0]
        assert_same(generator(given.text, given.noise, one), generator(given.text, given.noise, (one, one)), 0)
        apart = generator(given.text, given.noise, given.eps)
        assert torch.equal(apart[0], generator(given.text, given.noise, one)[0])
        assert not torch.equal(apart[1], generator(given.text, given.noise, one)[1])

    @pytest.mark.parametrize("stage", [1, 2])
    def test_without_eps_conditions_are_drawn(self, stage):
        generator, given = networks(stage).generator.eval(), batch(stage)
        images = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            images.append(generator(given.text, given.noise)[1])
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])


class TestSizes:
    @pytest.mark.parametrize("size", [8, 16, 32, 128])
    def test_stage1_at_other_sizes(self, size):
        generator = Stage1Generator(Z, E, GF, T, image_size=size)
        discriminator = Stage1Discriminator(E, DF, image_size=size)
        _, image, mu, logvar = generator(torch.randn(2, T), torch.randn(2, Z))
        assert image.shape == (2, 3, size, size)
        assert mu.shape == logvar.shape == (2, E)
        features = discriminator(image)
        assert features.shape == (2, DF * size // 8, 4, 4) == (2, discriminator.feature_channels, 4, 4)
        assert discriminator.get_cond_logits(features, mu).shape == (2,)
        doublings = int(math.log2(size // 4))
        assert generator.get_submodule(f"upsample{doublings}")[1].out_channels == 8 * GF >> doublings
        assert not hasattr(generator, f"upsample{doublings + 1}")

    @pytest.mark.parametrize(("first", "size"), [(16, 8), (16, 32), (32, 32), (16, 64), (64, 128)])
    def test_stage2_at_other_sizes(self, first, size):
        stage1 = Stage1Generator(Z, E, GF, T, image_size=first)
        generator = Stage2Generator(stage1, E, GF, T, R, image_size=size)
        small, image, *_ = generator(torch.randn(2, T), torch.randn(2, Z))
        assert small.shape == (2, 3, first, first)
        assert image.shape == (2, 3, size, size)
        discriminator = Stage2Discriminator(E, DF, image_size=size)
        features = discriminator(image)
        assert features.shape == (2, min(8, size // 8) * DF, 4, 4)
        assert discriminator.get_uncond_logits(features).shape == (2,)

    @pytest.mark.parametrize(("activation", "factor"), [("leaky_relu", 2), ("none", 2), ("glu", 4)])
    def test_other_conditioning_augmentation(self, activation, factor):
        generator = Stage1Generator(Z, E, GF, T, image_size=8, ca_activation=activation)
        assert generator.ca_net.fc.out_features == factor * E
        _, image, mu, _ = generator(torch.randn(4, T), torch.randn(4, Z))
        assert image.isfinite().all()
        assert (mu < 0).any()  # which ReLU would not have

    def test_images_are_channels_last_and_in_range(self):
        generator = networks(1, torch.float32).generator
        _, image, *_ = generator(torch.randn(2, T), torch.randn(2, Z))
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image.abs().max() <= 1


class TestStage1InStage2:
    def test_it_is_frozen(self):
        generator, given = networks(2).generator, batch(2)
        before = copy.deepcopy(generator.STAGE1_G.state_dict())
        small, image, *_ = generator.train()(given.text, given.noise)
        assert not small.requires_grad
        image.sum().backward()
        grads = gradients(generator)
        assert {grad is None for name, grad in grads.items() if name.startswith("STAGE1_G")} == {True}
        assert {grad is None for name, grad in grads.items() if not name.startswith("STAGE1_G")} == {False}
        torch.testing.assert_close(generator.STAGE1_G.state_dict(), before, rtol=0, atol=0)

    def test_it_stays_in_evaluation_mode(self):
        generator = networks(2).generator
        assert not generator.STAGE1_G.training
        for mode in (True, False):
            assert generator.train(mode) is generator
            assert generator.training is generator.encoder.training is mode
            assert not any(module.training for module in generator.STAGE1_G.modules())

    def test_published_it_keeps_normalising_by_the_batch(self):
        generator, given = networks(2, stage1_bn="train").generator, batch(2)
        before = copy.deepcopy(generator.STAGE1_G)
        generator.train()(given.text, given.noise)
        for name, norm in norms(generator.STAGE1_G).items():
            assert norm.num_batches_tracked == 1
            assert not torch.equal(norm.running_mean, norms(before)[name].running_mean)
        for name, parameter in generator.STAGE1_G.named_parameters():
            assert torch.equal(parameter, before.get_parameter(name))
            assert not parameter.requires_grad
        assert not generator.eval().STAGE1_G.training


class TestFusedRuns:
    @pytest.mark.parametrize("stage", [1, 2])
    def test_nothing_enlarged_or_repeated_is_written(self, stage):
        nets, given = networks(stage, torch.float32), batch(stage, dtype=torch.float32)
        if perfvl.backends.choose(given.text, cuda="native") == "reference":
            pytest.skip("the reference enlarges and repeats")
        enlarged = (3, nets.generator.get_submodule("upsample3")[1].in_channels) + (SIZES[stage] // 2,) * 2
        repeated = (3, 8 * DF + E, 4, 4)
        seen = {True: Shapes(), False: Shapes()}
        for ours, generator, discriminator in ((True, *nets[:2]), (False, *nets[2:])):
            with seen[ours]:
                _, image, mu, _ = generator(given.text, given.noise, eps_of(given) if ours else given.eps)
                discriminator.get_cond_logits(discriminator(image), mu).sum().backward()
        assert {enlarged, repeated} <= seen[False].found
        assert not {enlarged, repeated} & seen[True].found

    @pytest.mark.parametrize("index", range(4))
    def test_hooks_inside_a_block_fire_and_change_nothing(self, index):
        generator, given, calls = networks(1).generator, batch(1), []
        watched = copy.deepcopy(generator)
        watched.upsample2[index].register_forward_hook(lambda *arguments: calls.append(1))
        inputs = given.text, given.noise, *given.eps
        assert_same(watched(*inputs)[1:], generator(*inputs)[1:], 1e-10)
        assert calls == [1]

    def test_replaced_modules_of_a_block_are_called(self):
        generator, given = networks(1).generator.eval(), batch(1)
        silu = copy.deepcopy(generator)
        silu.upsample2[3] = nn.SiLU()
        plain = nn.Sequential(*silu.upsample2)
        x = torch.randn(2, 4 * GF, 8, 8).double()
        torch.testing.assert_close(silu.upsample2(x), plain(x), rtol=0, atol=0)
        inputs = given.text, given.noise, *given.eps
        assert not torch.equal(silu(*inputs)[1], generator(*inputs)[1])

    @pytest.mark.parametrize("stage", [1, 2])
    def test_compiles_whole(self, stage):
        torch._dynamo.reset()
        generator, discriminator = networks(stage, torch.float32)[:2]
        given = batch(stage, dtype=torch.float32)

        def score(text: Tensor, noise: Tensor, *eps: Tensor) -> Tensor:
            _, image, mu, _ = generator(text, noise, eps if len(eps) == 2 else eps[0])
            return discriminator.get_cond_logits(discriminator(image), mu)

        before = copy.deepcopy(generator.state_dict()), copy.deepcopy(discriminator.state_dict())
        inputs = given.text, given.noise, *given.eps
        expected = score(*inputs)
        generator.load_state_dict(before[0])
        discriminator.load_state_dict(before[1])
        found = torch.compile(score, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_bfloat16_autocast(self):
        generator, discriminator, plain_generator, _ = (m.eval() for m in networks(1, torch.float32))
        given = batch(1, dtype=torch.float32)
        exact = plain_generator(given.text, given.noise, given.eps)[1]
        with torch.autocast("cpu", torch.bfloat16):
            _, image, mu, _ = generator(given.text, given.noise, *given.eps)
            scores = discriminator.get_cond_logits(discriminator(image), mu)
        assert image.dtype == torch.bfloat16
        scores.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in generator.parameters())
        assert (image.float() - exact).square().mean() < 1e-3 * exact.square().mean()


class Shapes(TorchDispatchMode):
    """The shapes of everything that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.found.add(tuple(tensor.shape))
        return out


def stage2(**options) -> Stage2Generator:
    return Stage2Generator(Stage1Generator(Z, E, GF, T, image_size=16), E, GF, T, R, **options)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Stage1Generator(z_dim=0), ValueError, "`z_dim` got 0, expected an int of at least 1"),
        (lambda: Stage1Generator(gf_dim=2.5), ValueError, "`gf_dim` got 2.5, expected an int of at least 1"),
        (lambda: Stage1Generator(image_size=48), ValueError, "`image_size` got 48, expected 4 times a power of two"),
        (lambda: Stage1Generator(image_size=4), ValueError, "`image_size` got 4, .* at least 8"),
        (
            lambda: Stage1Generator(gf_dim=1),
            ValueError,
            "`gf_dim` got 1, expected a number whose 8-fold can be halved",
        ),
        (lambda: Stage1Generator(8, 8, 8, 8, ca_activation="gelu"), ValueError, "`activation` got 'gelu'"),
        (lambda: Stage1Discriminator(df_dim=-1), ValueError, "`df_dim` got -1"),
        (lambda: Stage2Discriminator(image_size="64"), ValueError, "`image_size` got '64'"),
        (lambda: Stage2Generator(nn.Identity()), TypeError, "`stage1` got Identity, expected a Stage1Generator"),
        (lambda: stage2(stage1_bn="both"), ValueError, '`stage1_bn` got \'both\', expected "eval" or "train"'),
        (lambda: stage2(image_size=4), ValueError, "`image_size` got 4, expected 4 times a power of two, at least 8"),
        (
            lambda: Stage2Generator(Stage1Generator(Z, E, GF, T), text_dim=T + 1),
            ValueError,
            f"`text_dim` got {T + 1}, expected that of Stage I, {T}",
        ),
    ],
)
def test_bad_options_are_refused(build, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"text": torch.zeros(3, T + 1)},
            ValueError,
            rf"`text_embedding` got shape \(3, {T + 1}\), expected \[N, {T}\]",
        ),
        ({"text": [1.0]}, TypeError, "`text_embedding` got list, expected a torch.Tensor"),
        ({"noise": torch.zeros(3, Z - 1)}, ValueError, rf"`noise` got shape \(3, {Z - 1}\), expected \[3, {Z}\]"),
        ({"noise": torch.zeros(2, Z)}, ValueError, rf"`noise` got shape \(2, {Z}\), expected \[3, {Z}\]"),
        ({"eps": torch.zeros(3, E, 1)}, ValueError, rf"`eps` got shape \(3, {E}, 1\), expected \[3, {E}\]"),
        ({"eps": (torch.zeros(3, E),) * 3}, (ValueError, TypeError), "`eps` got (3 tensors|tuple)"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_bad_inputs_are_refused_before_anything_changes(stage, given, error, message):
    generator = networks(stage, torch.float32, **({"stage1_bn": "train"} if stage == 2 else {})).generator.train()
    before = copy.deepcopy(generator.state_dict())
    inputs = {"text": torch.zeros(3, T), "noise": torch.zeros(3, Z), "eps": torch.zeros(3, E), **given}
    with pytest.raises(error, match=message):
        generator(inputs["text"], inputs["noise"], inputs["eps"])
    torch.testing.assert_close(generator.state_dict(), before, rtol=0, atol=0)


def test_bad_images_and_conditions_are_refused():
    discriminator = Stage1Discriminator(E, DF)
    with pytest.raises(ValueError, match=r"`image` got shape \(2, 3, 32, 64\), expected \[N, 3, 64, 64\]"):
        discriminator(torch.zeros(2, 3, 32, 64))
    with pytest.raises(TypeError, match="`image` got NoneType"):
        discriminator(None)
    with pytest.raises(ValueError, match=rf"`condition` got shape \(2, {E}\), expected \[3, {E}\]"):
        discriminator.get_cond_logits(torch.zeros(3, 8 * DF, 4, 4), torch.zeros(2, E))


def test_the_plain_modules_have_the_published_keys():
    with torch.device("meta"):
        plain = {
            "STAGE1_G": peers.Stage1G(),
            "STAGE1_D": peers.Stage1D(),
            "STAGE2_G": peers.Stage2G(peers.Stage1G()),
            "STAGE2_D": peers.Stage2D(),
        }
    for name, network in plain.items():
        assert list(network.state_dict()) == list(published(name, 128, 64, 4))
