"""The axes of the CaffeNet128 study as one immutable record, and what may be said in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from perfvl.nn.activation_names import ACTIVATION_NAMES, MODES
from perfvl.ops._library import bad_type, bad_value

COLOR_SPACES = (
    *("rgb", "rgb_bn", "ycrcb_bn", "hsv_bn", "gray", "learned_gray", "concat_rgb"),
    *("A", "B", "C", "D", "D2", "E", "F", "maxout"),
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": MODES,
    "table": ("definition", "slides"),
    "color": COLOR_SPACES,
    "activation": ACTIVATION_NAMES,
    "batch_norm": ("none", "before", "after"),
    "pooling": ("max", "avg", "max_avg", "stochastic", "strided"),
    "average": ("last", "fc6", "scores_and_maximum"),
}
_LEAST = {
    "num_classes": 1,
    "in_channels": 1,
    "input_size": 1,
    "conv1_kernel": 1,
    "conv1_stride": 1,
    "conv1_depth": 0,
    "conv1_depth_kernel": 1,
    "groups": 1,
    "pool_size": 1,
    "pool_padding": 0,
    "spp": 0,
}
_MEAN = (104.0, 117.0, 124.0)


@dataclasses.dataclass(frozen=True)
class CaffeNetConfig:
    """A network of the CaffeNet128 study: the defaults are its base, and each field is a choice that it varies.

    Args:
        num_classes: of the logits.
        in_channels: of images; the colour spaces other than "rgb" and "rgb_bn" want 3.
        input_size: side of the images.
        mean, scale: what is subtracted from pixels by channel, and multiplies what is left. Empty: the study's (104,
            117, 124) of blue, green and red, and 117 for one channel.
        mode: "paper", what slides and paper say; "reference", the networks as they were trained: constants of
            activations, and 4 instead of 3 windows a side in the third level of spatial pyramids.
        table: "slides" is the layer table of the slides, which says stride 2 of conv2 and 4096 in fc6 and fc7. No
            quoted result comes from it.
        channels: of conv1 to conv5.
        conv1_kernel, conv1_stride: of conv1.
        conv1_depth, conv1_depth_kernel: how many convolutions of conv1's width follow it, and of which size.
        conv1_residual: whether each two of them have their input added.
        groups: of conv2, conv4 and conv5.
        conv_padding: whether conv2 to conv5 keep the size.
        activation: a name of :func:`perfvl.nn.activation`; of maxout, convolutions have twice the channels.
        activation_options: its options.
        fc_activation: another behind fc6 and fc7.
        batch_norm: "before" or "after" each of the 7 activations, without weight and bias unless `bn_affine` (then
            layers before their norm have no bias).
        lrn: local response normalisation behind pool1 and pool2.
        pooling: "max", "avg", "max_avg" (their sum), "stochastic", or "strided": none, and stride 2 of conv2, conv3 and
            conv5.
        pool_size, pool_padding: of the windows, 2 apart.
        ceil_mode: rounding of the sizes behind pools. Caffe rounds up; down, 30-14-14-6-6-6-6-2 are left.
        color: what conv1 sees: "rgb"; batch norm of the pixels, "rgb_bn", or of their YCrCb or HSV; gray, fixed or
            learned; "concat_rgb", the image beside each pool (whose conv2 has one group, since 99 channels have no
            halves); or a net of :class:`perfvl.nn.ColorTransform`, "A" to "F", "D2", "maxout".
        fc: widths of fc6, fc7 (and fc7a).
        fc_kernels: sizes, where these are convolutions.
        fc_padding: whether those keep the size.
        pool5: False leaves it out.
        spp: levels of a spatial pyramid instead of pool5: 2 or 3; with "max_avg" pools, of maximum and mean.
        average: where fully convolutional ends are averaged: before fc8 ("last"; the published networks that average
            scores are the same function), behind fc6, or the scores, with their maximum added.
        dropout: behind fc6, fc7 (and fc7a): one probability or one each.
        conv_dropout: behind the activations of conv1 to conv5.
    """

    num_classes: int = 1000
    in_channels: int = 3
    input_size: int = 128
    mean: Sequence[float] = ()
    scale: float = 0.04
    mode: Literal["paper", "reference"] = "paper"
    table: Literal["definition", "slides"] = "definition"
    channels: tuple[int, ...] = (96, 256, 384, 384, 256)
    conv1_kernel: int = 11
    conv1_stride: int = 4
    conv1_depth: int = 0
    conv1_depth_kernel: int = 1
    conv1_residual: bool = False
    groups: int = 2
    conv_padding: bool = True
    activation: str = "relu"
    activation_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fc_activation: str | None = None
    batch_norm: Literal["none", "before", "after"] = "none"
    bn_affine: bool = False
    lrn: bool = False
    pooling: Literal["max", "avg", "max_avg", "stochastic", "strided"] = "max"
    pool_size: int = 3
    pool_padding: int = 0
    ceil_mode: bool = True
    color: str = "rgb"
    fc: int | tuple[int, ...] | None = None
    fc_kernels: tuple[int, ...] = ()
    fc_padding: bool = True
    pool5: bool = True
    spp: int = 0
    average: Literal["last", "fc6", "scores_and_maximum"] = "last"
    dropout: float | tuple[float, ...] = 0.5
    conv_dropout: tuple[float, ...] = (0.0,) * 5

    @property
    def spp_levels(self) -> tuple[int, ...]:
        """Windows a side of each level of the pyramid."""
        return (1, 2, 4 if self.mode == "reference" else 3)[: self.spp]

    @property
    def fc_widths(self) -> tuple[int, ...]:
        """Of fc6, fc7 (and fc7a)."""
        fc = (4096 if self.table == "slides" else 2048) if self.fc is None else self.fc
        return (fc, fc) if isinstance(fc, int) else tuple(fc)

    @property
    def fc_dropout(self) -> tuple[float, ...]:
        """Behind each of them."""
        one = not isinstance(self.dropout, Sequence)
        return (self.dropout,) * len(self.fc_widths) if one else tuple(self.dropout)  # type: ignore[arg-type, return-value]

    @property
    def means(self) -> tuple[float, ...]:
        """Of the channels."""
        return tuple(self.mean) or (_MEAN if self.in_channels == 3 else _MEAN[1:2] * self.in_channels)

    @property
    def pools_last(self) -> bool:
        """Whether there is a pool5."""
        return self.pool5 and not self.spp


def check(config: CaffeNetConfig) -> None:
    """An error that names the first field that is out of range."""
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            _bad(name, repr(getattr(config, name)), f"one of {', '.join(choices)}")
    if config.fc_activation not in (None, *ACTIVATION_NAMES):
        _bad("fc_activation", repr(config.fc_activation), f"None or one of {', '.join(ACTIVATION_NAMES)}")
    for name, least in _LEAST.items():
        _check_whole(name, getattr(config, name), least)
    _check_all("channels", config.channels, 5)
    if config.spp not in (0, 2, 3):
        _bad("spp", config.spp, "0, 2 or 3")
    if config.spp and (config.fc_kernels or config.pooling == "strided"):
        _bad("spp", config.spp, "0 with convolutions for fc6 and fc7, and without pools")
    if config.in_channels != 3 and config.color not in ("rgb", "rgb_bn"):
        _bad("color", repr(config.color), f'"rgb" or "rgb_bn" for {config.in_channels} channels')
    if config.average != "last" and not config.fc_kernels:
        _bad("average", repr(config.average), '"last" where fc6 is no convolution (`fc_kernels`)')

    _check_all("fc", config.fc_widths)
    count = len(config.fc_widths)
    if not 1 <= count <= 3:
        _bad("fc", config.fc, "1 to 3 widths")
    if config.fc_kernels:
        _check_all("fc_kernels", config.fc_kernels, count)
    if len(config.fc_dropout) != count:
        _bad("dropout", config.dropout, f"one probability, or {count}")
    if len(config.conv_dropout) != 5:
        _bad("conv_dropout", config.conv_dropout, "5 probabilities")
    for name, probabilities in (("dropout", config.fc_dropout), ("conv_dropout", config.conv_dropout)):
        if any(not 0 <= p < 1 for p in probabilities):
            _bad(name, getattr(config, name), "at least 0 and below 1")
    if len(config.means) != config.in_channels:
        _bad("mean", f"{len(config.means)} numbers", f"one for each of {config.in_channels} channels")


def _check_all(name: str, values: Sequence[int], count: int | None = None) -> None:
    if count is not None and len(values) != count:
        _bad(name, values, f"{count} numbers")
    for value in values:
        _check_whole(name, value, 1)


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        bad_type("CaffeNet128", name, type(value).__name__, "an int")
    if value < least:
        _bad(name, value, f"at least {least}")


def _bad(name: str, got: object, expected: str) -> None:
    bad_value("CaffeNet128", name, got, expected)
