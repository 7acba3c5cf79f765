"""FitNet4 and its residual form, the thin deep networks on which LSUV is compared with other initialisations."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from perfvl.nn.activation_names import IN_PLACE, activation
from perfvl.ops._library import bad_value

_STAGES = ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6)
_FULLY_CONNECTED = 500


class FitNet4(nn.Module):
    r"""17 convolutions of 3x3 (three of 32 and two of 48 channels, six of 80, six of 128), a maximum over each quarter
    of the pixels behind the first and second stage and over all behind the third, 500 units, logits.

    Romero et al. 2015, arXiv:1412.6550; as trained for "All you need is a good init" (Mishkin and Matas 2016,
    arXiv:1511.06422): dropout of 0.2 of the image, behind the pools and before the logits. CIFAR-10 accuracy there with
    LSUV: maxout 93.94, ReLU 92.11, VLReLU 92.97, tanh 89.28; with `residual`, 94.16, 92.82, 93.36, 89.17. With batch
    norm before and after the activation (Mishkin et al. 2016): tanh 88.1 and 89.2, ReLU 92.6 and 92.5, maxout 92.3 and
    92.9. Modules have their Caffe names.

    Args:
        num_classes: of the logits.
        in_channels: of images.
        activation: a name of :func:`perfvl.nn.activation`. Of maxout, convolutions have 2 pieces and ip1 has 5.
        residual: adds its input to what each second convolution gives, where both have as many channels (He et al.
            2016, arXiv:1512.03385). Which pairs the published network had is not published: within a stage, those that
            end with its last convolution.
        batch_norm: "before" or "after" each activation, without weight and bias.
        dropout: probability.
        **options: of the activation.

    Shapes: images [N, in_channels, H, W], of mean 0 and variance 1, H and W at least 4 -> logits [N, num_classes].

    Raises:
        ValueError: an argument out of range; in the call, images of another shape.

    Example:
        >>> import torch
        >>> FitNet4("maxout")(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        activation: str = "relu",
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        residual: bool = False,
        batch_norm: Literal["none", "before", "after"] = "none",
        dropout: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__()
        if batch_norm not in ("none", "before", "after"):
            bad_value("FitNet4", "batch_norm", repr(batch_norm), '"none", "before" or "after"')
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                bad_value("FitNet4", name, value, "at least 1")
        self.in_channels, self.residual = in_channels, residual
        pieces = options.pop("pieces", 2) if activation == "maxout" else 1
        self.data_drop = nn.Dropout(dropout)
        for stage, widths in enumerate(_STAGES, 1):
            for i, width in enumerate(widths, 1):
                convolution = nn.Conv2d(in_channels, pieces * width, 3, padding=1)
                block = _Block(convolution, width, activation, pieces, batch_norm, options)
                self.add_module(f"conv{stage}_{i}", block)
                in_channels = width
            self.add_module(f"pool{stage}", nn.MaxPool2d(2) if stage < 3 else nn.AdaptiveMaxPool2d(1))
            self.add_module(f"pool{stage}_drop", nn.Dropout(dropout))
        pieces = 5 if activation == "maxout" else 1
        product = nn.Linear(in_channels, pieces * _FULLY_CONNECTED)
        self.ip1 = _Block(product, _FULLY_CONNECTED, activation, pieces, batch_norm, options)
        self.ip1_drop = nn.Dropout(dropout)
        self.clf = nn.Linear(_FULLY_CONNECTED, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                module.bias.detach().zero_()  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        """images [N, in_channels, H, W] -> logits [N, num_classes]."""
        if images.dim() != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < 4:
            expected = f"[N, {self.in_channels}, H, W] with H and W of at least 4"
            bad_value("FitNet4", "images", f"shape {tuple(images.shape)}", expected)
        x = self.data_drop(images)
        for stage, widths in enumerate(_STAGES, 1):
            before = None  # a pair's input
            for i in range(1, len(widths) + 1):
                second = (len(widths) - i) % 2 == 0
                before = before if second else x
                x = self.get_submodule(f"conv{stage}_{i}")(x)
                if self.residual and second and before is not None and before.shape == x.shape:
                    x = x + before
            x = self.get_submodule(f"pool{stage}_drop")(self.get_submodule(f"pool{stage}")(x))
        return self.clf(self.ip1_drop(self.ip1(x.flatten(1))))


class _Block(nn.Sequential):
    """A layer, its norm and its activation."""

    def __init__(
        self, layer: nn.Module, width: int, name: str, pieces: int, batch_norm: str, options: dict[str, Any]
    ) -> None:
        if name == "maxout":
            options = options | {"pieces": pieces}
        module = activation(name, width, **options)
        if isinstance(module, IN_PLACE):
            module.inplace = True
        super().__init__()
        norm = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
        self.add_module("layer", layer)
        if batch_norm == "before":
            self.add_module("bn", norm(pieces * width, momentum=0.05, affine=False))
        self.add_module("act", module)
        if batch_norm == "after":
            self.add_module("bn", norm(width, momentum=0.05, affine=False))
