"""CaffeNet128: the network of "Systematic evaluation of CNN advances on the ImageNet", and every variant of it.

Mishkin, Sergievskiy and Matas 2016, arXiv:1606.02228, and the tables and network definitions of its benchmark. Each
design choice is a field of :class:`CaffeNetConfig`; :meth:`CaffeNet128.variants` has the networks of the study by name,
with the accuracy that each one reached on ImageNet.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from perfvl.models.caffenet_builder import Builder, LayerRow
from perfvl.models.caffenet_config import CaffeNetConfig, check
from perfvl.models.caffenet_parts import WithImage
from perfvl.models.caffenet_variants import PUBLISHED, Variant
from perfvl.ops._library import bad_type, bad_value


class CaffeNet128(nn.Sequential):
    r"""Five convolutions, three pools and three fully connected layers, for images of 128 pixels.

    conv1 (11x11, stride 4, 96), pool1, conv2 (5x5, 256), pool2, conv3 to conv5 (3x3; 384, 384, 256), pool5 (maps of
    30-15-15-7-7-7-7-3 pixels), fc6 and fc7 (2048 each, dropout), fc8; conv2, conv4 and conv5 in two groups. 208,986,240
    multiply-adds and 13,300,072 parameters, as `layers` has them by layer. Modules have their Caffe names; `bn1` to
    `bn7`, `act1` to `act7` and `drop6`, `drop7` stand beside the layer of their number; where norm and activation are
    neighbours behind a convolution, both are `bn1` to `bn5`.

    A max pool of an activation that never falls is that activation of a max pool: the pool runs first, and a fourth of
    the activations is left. Max + average pools, learned colour spaces, maxout and APL are perfvl's fused layers.

    Args:
        variant: a name of :meth:`variants`, such as ``"pooling/max_plus_avg"``, or a :class:`CaffeNetConfig`.
        **changes: fields of :class:`CaffeNetConfig` that differ from the variant's.

    Shapes: images [N, C, n, n], bytes or floats -> logits [N, num_classes]. Images are pixels of blue, green and red, 0
    to 255, and centred and scaled here; give ``mean=(0, 0, 0), scale=1`` for images that have been.

    Weights start as published, normal with a deviation of 0.01 (fc6 and fc7 0.005) and biases of 0, which the study
    then scales with :func:`perfvl.nn.lsuv_init_`; :func:`parameter_groups` has its learning rates. Batch norms have
    PyTorch's running statistics with a momentum of 0.05; Caffe divides them by the weight of the batches seen, which
    after 100 batches differs by less than 1 %.

    Raises:
        TypeError: a change that is no field of the config, or of the wrong type.
        ValueError: an unknown variant; a field out of range; images too small for their pools. In the call: images of
            another shape.

    Example:
        >>> import torch
        >>> model = CaffeNet128("activation/elu", num_classes=10)
        >>> model(torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)).shape
        torch.Size([2, 10])
        >>> CaffeNet128.variants()["activation/elu"].top1
        0.488
    """

    def __init__(self, variant: str | CaffeNetConfig = "base", **changes: Any) -> None:
        super().__init__()
        self.config = config = _config_of(variant, changes)
        check(config)
        self.layers: list[LayerRow] = []
        build = Builder(self, self.layers, config)
        build.input()
        for stage in range(1, 6):
            build.convolution(stage)
        build.classifier()
        self.reset_parameters()

    @staticmethod
    def variants() -> dict[str, Variant]:
        """The networks of the study by ``"group/name"``, each with `top1`, `log_loss`, `config` and a `note`.

        Accuracies are of the ImageNet validation set, single centre crop, one run each: two pairs of rows that are the
        same function differ by 0.003 and 0.005, so smaller differences are noise.

        Example:
            >>> best = max(CaffeNet128.variants().items(), key=lambda item: item[1].top1)
            >>> best[0], best[1].top1
            ('all_in/caffenet256_all', 0.613)
        """
        return {name: variant for name, variant in PUBLISHED.items() if variant.config is not None}

    @property
    def macs(self) -> int:
        """Multiply-adds for one image, of convolutions and products; those of the colour space are not counted."""
        return sum(row.macs for row in self.layers)

    def reset_parameters(self) -> None:
        """As published: normal weights of deviation 0.01, in fc6 and fc7 0.005, and biases of 0."""
        for name, module in self.named_children():
            for layer in module.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.normal_(layer.weight, std=0.005 if name in ("fc6", "fc7") else 0.01)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, in_channels, n, n] -> logits [N, num_classes]."""
        config = self.config
        expected = (config.in_channels, config.input_size, config.input_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            bad_value("CaffeNet128", "images", f"shape {tuple(images.shape)}", f"[N, {', '.join(map(str, expected))}]")
        x = image = images
        for name, module in self.named_children():
            x = module(x, image) if isinstance(module, WithImage) else module(x)
            if name == "color":
                image = x
        return x


def _config_of(variant: object, changes: Mapping[str, Any]) -> CaffeNetConfig:
    if isinstance(variant, CaffeNetConfig):
        config = variant
    elif not isinstance(variant, str):
        bad_type("CaffeNet128", "variant", type(variant).__name__, "a name or a CaffeNetConfig")
    elif variant == "base":
        config = CaffeNetConfig()
    else:
        found = PUBLISHED.get(variant)
        if found is None:
            near = difflib.get_close_matches(variant, CaffeNet128.variants(), 3, 0.4)
            hint = f"such as {', '.join(near)}" if near else 'such as "pooling/max_plus_avg"'
            bad_value("CaffeNet128", "variant", repr(variant), f"a name of CaffeNet128.variants(), {hint}")
        if found.config is None:
            bad_value("CaffeNet128", "variant", repr(variant), f"a network of this class ({found.note})")
        config = CaffeNetConfig(**found.config)
    fields = {field.name for field in dataclasses.fields(CaffeNetConfig)}
    for name in changes:
        if name not in fields:
            bad_type("CaffeNet128", name, "an argument of this name", f"a field of {', '.join(sorted(fields))}")
    return dataclasses.replace(config, **changes)


def parameter_groups(
    model: nn.Module, lr: float = 0.01, weight_decay: float = 5e-4, bias_lr: float = 2.0
) -> list[dict[str, Any]]:
    """What an optimiser is given for the study's recipe: biases learn `bias_lr` times as fast and do not decay.

    SGD with a momentum of 0.9 and batches of 256, 320,000 iterations. Biases of batch norms learn at `lr`.

    Args:
        model: any.
        lr, weight_decay: of weights.
        bias_lr: factor of biases.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch
        >>> groups = parameter_groups(CaffeNet128(num_classes=10))
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)
        >>> [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.01, 0.0005, 8), (0.02, 0.0, 8)]
    """
    if not isinstance(model, nn.Module):
        bad_type("parameter_groups", "model", type(model).__name__, "an nn.Module")
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            bias = name.endswith("bias")
            fast = bias and not isinstance(module, nn.modules.batchnorm._BatchNorm)
            key = (lr * bias_lr if fast else lr, 0.0 if bias else weight_decay)
            kinds.setdefault(key, []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in kinds.items()]


def image_transform(train: bool, size: int = 128) -> Callable[[Any], Tensor]:
    """The study's way from an image to pixels [3, size, size], bytes of blue, green and red, as torchvision transforms.

    The shorter side is made 144 pixels (for 128), cubic; then a random crop, half of them mirrored, while training, and
    the crop in the middle otherwise.

    Args:
        train: whether crops and mirrors are random.
        size: of the crop.

    Returns:
        A callable of a PIL image or of an RGB tensor [3, H, W] of bytes.

    Raises:
        ImportError: torchvision is not installed (pip install 'perfvl[models]').
    """
    try:
        from torchvision.transforms import v2
    except ImportError as reason:
        raise ImportError(f"image_transform needs torchvision: pip install 'perfvl[models]' ({reason})") from reason
    crops = [v2.RandomCrop(size), v2.RandomHorizontalFlip()] if train else [v2.CenterCrop(size)]
    resize = v2.Resize(round(size * 144 / 128), v2.InterpolationMode.BICUBIC)
    return v2.Compose([v2.PILToTensor(), resize, *crops, v2.Lambda(_to_bgr)])


def _to_bgr(image: Tensor) -> Tensor:
    return image.flip(-3)
