"""StackGAN as its layer tables read, with PyTorch's modules one after another, and the published training iteration.

Keys and order of state_dict are those of the published checkpoints. The forward passes repeat the condition over space
and concatenate it, sigmoid and binary cross-entropy are two modules, and the generator's step computes weight gradients
of the discriminator and throws them away: what users run today.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False)


def conv4(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=False)


def up(in_channels: int, out_channels: int) -> nn.Sequential:
    """Twice the size, half the channels."""
    layers = nn.Upsample(scale_factor=2, mode="nearest"), conv3(in_channels, out_channels)
    return nn.Sequential(*layers, nn.BatchNorm2d(out_channels), nn.ReLU(True))


def joined(image: Tensor, condition: Tensor) -> Tensor:
    """[N, C, H, W] and [N, e] -> [N, C + e, H, W], the condition behind the image."""
    size = image.shape[2:]
    return torch.cat((image, condition[:, :, None, None].expand(-1, -1, *size)), 1)


class Conditioning(nn.Module):
    """Linear, ReLU, mean and log-variance, a sample of them."""

    def __init__(self, text_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(text_dim, 2 * condition_dim)
        self.relu = nn.ReLU()

    def forward(self, text: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.relu(self.fc(text)).chunk(2, 1)
        return eps * (0.5 * logvar).exp() + mu, mu, logvar


class Stage1G(nn.Module):
    """Text and noise -> 64 x 64."""

    def __init__(self, z_dim: int = 100, condition_dim: int = 128, gf_dim: int = 128, text_dim: int = 1024) -> None:
        super().__init__()
        self.gf = 8 * gf_dim
        self.ca_net = Conditioning(text_dim, condition_dim)
        fc = nn.Linear(z_dim + condition_dim, 16 * self.gf, bias=False)
        self.fc = nn.Sequential(fc, nn.BatchNorm1d(16 * self.gf), nn.ReLU(True))
        for i in range(4):
            self.add_module(f"upsample{i + 1}", up(self.gf >> i, self.gf >> i + 1))
        self.img = nn.Sequential(conv3(self.gf >> 4, 3), nn.Tanh())

    def forward(self, text: Tensor, noise: Tensor, eps: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        condition, mu, logvar = self.ca_net(text, eps[0])
        x = self.fc(torch.cat((noise, condition), 1)).view(-1, self.gf, 4, 4)
        for i in range(1, 5):
            x = self.get_submodule(f"upsample{i}")(x)
        return None, self.img(x), mu, logvar


class ResBlock(nn.Module):
    """Two convolutions and the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first = conv3(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(True)
        self.block = nn.Sequential(*first, conv3(channels, channels), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        out += x
        return self.relu(out)


class Stage2G(nn.Module):
    """64 x 64 and text -> 256 x 256."""

    def __init__(
        self,
        stage1: Stage1G,
        condition_dim: int = 128,
        gf_dim: int = 128,
        text_dim: int = 1024,
        residual_blocks: int = 4,
    ) -> None:
        super().__init__()
        gf = gf_dim
        self.STAGE1_G = stage1.requires_grad_(False)
        self.ca_net = Conditioning(text_dim, condition_dim)
        down = (
            layer for i in (1, 2) for layer in (conv4(gf * i, gf * 2 * i), nn.BatchNorm2d(gf * 2 * i), nn.ReLU(True))
        )
        self.encoder = nn.Sequential(conv3(3, gf), nn.ReLU(True), *down)
        joint = conv3(4 * gf + condition_dim, 4 * gf), nn.BatchNorm2d(4 * gf), nn.ReLU(True)
        self.hr_joint = nn.Sequential(*joint)
        self.residual = nn.Sequential(*(ResBlock(4 * gf) for _ in range(residual_blocks)))
        for i in range(4):
            self.add_module(f"upsample{i + 1}", up(4 * gf >> i, 4 * gf >> i + 1))
        self.img = nn.Sequential(conv3(4 * gf >> 4, 3), nn.Tanh())

    def forward(self, text: Tensor, noise: Tensor, eps: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        stage1 = self.STAGE1_G(text, noise, eps[:1])[1].detach()
        condition, mu, logvar = self.ca_net(text, eps[-1])
        x = self.residual(self.hr_joint(joined(self.encoder(stage1), condition)))
        for i in range(1, 5):
            x = self.get_submodule(f"upsample{i}")(x)
        return stage1, self.img(x), mu, logvar


class Logits(nn.Module):
    """Probabilities [N] of features, with a condition where it is made for one."""

    def __init__(self, channels: int, condition_dim: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if condition_dim:
            layers += [conv3(channels + condition_dim, channels), nn.BatchNorm2d(channels), nn.LeakyReLU(0.2, True)]
        self.outlogits = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 4), nn.Sigmoid())

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.outlogits(features if condition is None else joined(features, condition)).view(-1)


class Discriminator(nn.Module):
    """Image -> features; the heads are called on those."""

    def __init__(self, levels: int, condition_dim: int, df_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv4(3, df_dim), nn.LeakyReLU(0.2, True)]
        channels = [df_dim << i for i in range(levels)]
        convolutions = [conv4(a, 2 * a) for a in channels[:-1]]
        convolutions += [conv3(df_dim << i, df_dim << i - 1) for i in range(levels - 1, 3, -1)]
        for convolution in convolutions:
            layers += [convolution, nn.BatchNorm2d(convolution.out_channels), nn.LeakyReLU(0.2, True)]
        self.encode_img = nn.Sequential(*layers)
        self.get_cond_logits = Logits(8 * df_dim, condition_dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.encode_img(image)


class Stage1D(Discriminator):
    """Of 64 x 64."""

    get_uncond_logits = None

    def __init__(self, condition_dim: int = 128, df_dim: int = 64) -> None:
        super().__init__(4, condition_dim, df_dim)


class Stage2D(Discriminator):
    """Of 256 x 256."""

    def __init__(self, condition_dim: int = 128, df_dim: int = 64) -> None:
        super().__init__(6, condition_dim, df_dim)
        self.get_uncond_logits = Logits(8 * df_dim)


class Parts(NamedTuple):
    """A loss, the binary cross-entropies that it weighs in the order of their computation, and the KL divergence."""

    total: Tensor
    heads: Tensor
    kl: Tensor | None = None


def discriminator_loss(net: nn.Module, real: Tensor, fake: Tensor, mu: Tensor) -> Parts:
    """Matching pairs against wrong ones (the next row's condition) and fakes, each pair encoded once."""
    n = len(real)
    mu = mu.detach()
    ones, zeros = real.new_ones(n), real.new_zeros(n)
    bce = nn.functional.binary_cross_entropy
    real_features, fake_features = net(real), net(fake.detach())
    right = bce(net.get_cond_logits(real_features, mu), ones)
    wrong = bce(net.get_cond_logits(real_features[: n - 1], mu[1:]), zeros[1:])
    made = bce(net.get_cond_logits(fake_features, mu), zeros)
    if net.get_uncond_logits is None:
        return Parts(right + (made + wrong) * 0.5, torch.stack((right, wrong, made)))
    seen = bce(net.get_uncond_logits(real_features), ones)
    found = bce(net.get_uncond_logits(fake_features), zeros)
    total = (right + seen) / 2 + (made + wrong + found) / 3
    return Parts(total, torch.stack((right, wrong, made, seen, found)))


def generator_loss(net: nn.Module, fake: Tensor, mu: Tensor, logvar: Tensor, kl_weight: float = 2.0) -> Parts:
    """Fakes that pass for real, and the divergence of the conditions from the standard normal distribution."""
    bce, ones = nn.functional.binary_cross_entropy, fake.new_ones(len(fake))
    features = net(fake)
    heads = [bce(net.get_cond_logits(features, mu.detach()), ones)]
    if net.get_uncond_logits is not None:
        heads.append(bce(net.get_uncond_logits(features), ones))
    kl = (1 + logvar - mu.pow(2) - logvar.exp()).mean() * -0.5
    return Parts(sum(heads, kl * kl_weight), torch.stack(heads), kl)


def adam(network: nn.Module) -> torch.optim.Adam:
    """The published optimiser, of what learns."""
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 2e-4, (0.5, 0.999))


def train_step(
    generator: Callable[..., tuple[Tensor | None, ...]],
    discriminator: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    images: Tensor,
    text: Tensor,
    noise: Tensor,
    eps: tuple[Tensor, ...],
    *,
    of_discriminator: Callable[..., Parts] = discriminator_loss,
    of_generator: Callable[..., Parts] = generator_loss,
) -> tuple[Parts, Parts, Tensor]:
    """One iteration: the generator's optimiser comes first of the two, and learns last."""
    _, fake, mu, logvar = generator(text, noise, eps)
    optimizers[1].zero_grad()
    first = of_discriminator(discriminator, images, fake, mu)
    first.total.backward()
    optimizers[1].step()
    optimizers[0].zero_grad()
    discriminator.zero_grad()  # else the generator's step would add to what nobody reads, and take longer
    second = of_generator(discriminator, fake, mu, logvar)
    second.total.backward()
    optimizers[0].step()
    return first, second, fake.detach()
