"""StackGAN's training: the discriminator's step, the generator's, and whole iterations of both, with Adam.

Peers are the same networks and losses with PyTorch's modules one after another. All compute what is published, sigmoid
before binary cross-entropy and N - 1 wrong pairs, on given noise, so that the losses of the first two steps can be
compared; of Stage II those of the first, since float32 rounding alone moves the next ones by 1 or 2 % in any layout.
What must move through memory depends on the caches, so no bound on bytes is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perfvl.models import stackgan
from perfvl.models.stackgan_step import discriminator_loss, generator_loss, train_step

from . import stackgan_peers as peers
from .workload import Contender, Step, Tensors, Workload

STEPS_COMPARED = {1: 2, 2: 1}  # by stage
KINDS = {"discriminator": "the discriminator's step", "generator": "the generator's step", "training": "training step"}
Z, E, T = 100, 128, 1024
Prepare = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What is done to each part of a step once: compiled, or nothing."""


def networks(params: Mapping[str, Any], fused: bool) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of a stage, with fixed weights."""
    gf, df = params["gf"], params["df"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator: nn.Module = stackgan.Stage1Generator(Z, E, gf, T)
        if params["stage"] == 1:
            discriminator: nn.Module = stackgan.Stage1Discriminator(E, df)
        else:
            generator = stackgan.Stage2Generator(generator, E, gf, T, params["R"], stage1_bn="train")
            discriminator = stackgan.Stage2Discriminator(E, df)
    if fused:
        return generator, discriminator
    plain: nn.Module = peers.Stage1G(Z, E, gf, T)
    if params["stage"] == 1:
        judge: nn.Module = peers.Stage1D(E, df)
    else:
        plain, judge = peers.Stage2G(plain, E, gf, T, params["R"]), peers.Stage2D(E, df)
    plain.load_state_dict(generator.state_dict())
    judge.load_state_dict(discriminator.state_dict())
    return plain, judge


def make(params: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Noise in place of images, of embeddings and of what the generator made."""
    n, size = params["N"], 64 if params["stage"] == 1 else 256

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    found = {"images": normal(3, size, size).tanh(), "fake": normal(3, size, size).tanh(), "mu": normal(E).relu()}
    found |= {"text": normal(T), "noise": normal(Z)}
    return found | {f"eps{stage}": normal(E) for stage in range(1, params["stage"] + 1)}


def fused(kind: str, generator: Any, discriminator: Any, inputs: Tensors) -> Step:
    """perfvl's step; returns its losses."""
    adams = peers.adam(generator), peers.adam(discriminator)
    images, text, noise = inputs["images"], inputs["text"], inputs["noise"]
    eps: Any = (inputs["eps1"], inputs["eps2"]) if "eps2" in inputs else inputs["eps1"]

    def train_discriminator() -> Tensor:
        adams[1].zero_grad()
        total = discriminator_loss(discriminator, images, inputs["fake"], inputs["mu"], mode="reference").total
        total.backward()
        adams[1].step()
        return total.detach()[None]

    def train_generator() -> Tensor:
        adams[0].zero_grad()
        _, fake, mu, logvar = generator(text, noise, eps)
        total = generator_loss(discriminator, fake, mu, mu, logvar, mode="reference").total
        total.backward()
        adams[0].step()
        return total.detach()[None]

    def train_both() -> Tensor:
        out = train_step(generator, discriminator, *adams, images, text, noise=noise, eps=eps, mode="reference")
        return torch.stack((out.discriminator_loss, out.generator_loss))

    return {"discriminator": train_discriminator, "generator": train_generator, "training": train_both}[kind]


def plain(kind: str, generator: Any, discriminator: Any, inputs: Tensors, prepare: Prepare) -> Step:
    """What users run; returns its losses."""
    adams = peers.adam(generator), peers.adam(discriminator)
    eps = tuple(inputs[name] for name in ("eps1", "eps2") if name in inputs)
    make_images = prepare(generator)
    of_discriminator, of_generator = prepare(peers.discriminator_loss), prepare(peers.generator_loss)

    def train_discriminator() -> Tensor:
        adams[1].zero_grad()
        total = of_discriminator(discriminator, inputs["images"], inputs["fake"], inputs["mu"]).total
        total.backward()
        adams[1].step()
        return total.detach()[None]

    def train_generator() -> Tensor:
        adams[0].zero_grad()
        discriminator.zero_grad()
        _, fake, mu, logvar = make_images(inputs["text"], inputs["noise"], eps)
        total = of_generator(discriminator, fake, mu, logvar).total
        total.backward()
        adams[0].step()
        return total.detach()[None]

    def train_both() -> Tensor:
        given = inputs["images"], inputs["text"], inputs["noise"], eps
        losses = {"of_discriminator": of_discriminator, "of_generator": of_generator}
        first, second, _ = peers.train_step(make_images, discriminator, adams, *given, **losses)
        return torch.stack((first.total, second.total)).detach()

    return {"discriminator": train_discriminator, "generator": train_generator, "training": train_both}[kind]


def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with its defaults."""
    return torch.compile(part, dynamic=False)


def workload(kind: str, stage: int, count: int, gf: int = 128, df: int = 64, blocks: int = 4) -> Workload:
    """One kind of step, of one stage."""
    params = {"stage": stage, "N": count, "gf": gf, "df": df, "R": blocks, "steps_compared": STEPS_COMPARED[stage]}

    def contender(
        build: Callable[..., Step],
        role: Any = "peer",
        memory: torch.memory_format = torch.contiguous_format,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Contender:
        def build_step(inputs: Tensors) -> Step:
            device = inputs["images"].device
            sizes = params | {"gf": gf, "df": df}
            pair = (m.to(device, dtype) for m in networks(sizes, build is fused))
            given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
            if memory == torch.channels_last:
                pair = (m.to(memory_format=memory) for m in pair)
                given |= {name: given[name].contiguous(memory_format=memory) for name in ("images", "fake")}
            return build(kind, *pair, given, **options)

        return Contender(build_step, role=role, compiles=options.get("prepare") is compiled)

    def eager(part: Callable[..., Any]) -> Callable[..., Any]:
        return part

    channels_last = torch.channels_last
    return Workload(
        op="stackgan_step",
        name=f"stackgan-{stage}-{kind}-n{count}",
        title=f"StackGAN, Stage {'I' * stage}, {KINDS[kind]}: {count} images of {64 if stage == 1 else 256} pixels",
        params=params,
        make=make,
        contenders={
            "perfvl": contender(fused, "perfvl"),
            "eager, NCHW": contender(plain, "eager", prepare=eager),
            "eager, channels_last": contender(plain, memory=channels_last, prepare=eager),
            "torch.compile": contender(plain, memory=channels_last, prepare=compiled),
        },
        truth=lambda inputs: {
            "losses": losses_of(contender(plain, dtype=torch.float64, prepare=eager).build(inputs), params)
        },
        backward=False,
        convolves=True,
        evaluate=lambda workload, step, inputs: {"losses": losses_of(step, params)},
        tolerance={"float32": 5e-3},  # of a loss after an update, in which rounding tells
        shrink={"N": 2},
    )


def losses_of(step: Step, params: Mapping[str, Any]) -> Tensor:
    """The losses of the first steps."""
    return torch.stack([step() for _ in range(params["steps_compared"])])


COUNTS = {1: 64, 2: 16} if torch.cuda.is_available() else {1: 16, 2: 2}
WORKLOADS = tuple(workload(kind, stage, count) for stage, count in COUNTS.items() for kind in KINDS)
