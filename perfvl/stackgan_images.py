"""StackGAN's images: cropped around an object, scaled and cropped for training, and written side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perfvl.ops._library import FLOATING, bad_type, bad_value
from perfvl.schedules import _check_count

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageT = TypeVar("ImageT", Tensor, Image)


def crop_to_box(image: ImageT, box: Sequence[float]) -> ImageT:
    r"""The square of half-width :math:`R = \lfloor 0.75 \max(w, h) \rfloor` around the box's centre, inside the image.

    Args:
        image: a PIL image, or a tensor [C, H, W].
        box: (left, top, width, height) in pixels; fractions are dropped.

    Returns: an image like `image`; of a tensor a view. Up to 2R pixels high and wide, and not square at the border.

    Raises:
        TypeError, ValueError: an argument that is not as said above, or a square without a pixel of the image.

    Source: StackGAN (Zhang et al. 2017, arXiv:1612.03242), released code: birds fill a small part of CUB's photos.

    Example:
        >>> import torch
        >>> crop_to_box(torch.zeros(3, 300, 400), (100, 200, 80, 40)).shape
        torch.Size([3, 120, 120])
        >>> crop_to_box(torch.zeros(3, 300, 400), (100, 250, 80, 40)).shape
        torch.Size([3, 90, 120])
    """
    name = "crop_to_box"
    width, height = _width_and_height(name, image)
    expected = "four finite numbers: left, top, and a positive width and height"
    if isinstance(box, (str, bytes)) or not isinstance(box, Sequence) or len(box) != 4:
        bad_value(name, "box", repr(box)[:80], expected)
    try:
        x, y, w, h = (int(number) for number in box)
    except (TypeError, ValueError, OverflowError):
        bad_value(name, "box", repr(box)[:80], expected)
    if w <= 0 or h <= 0:
        bad_value(name, "box", tuple(box), expected)
    radius = int(0.75 * max(w, h))
    center_x, center_y = int((2 * x + w) / 2), int((2 * y + h) / 2)
    left, right = max(0, center_x - radius), min(width, center_x + radius)
    top, bottom = max(0, center_y - radius), min(height, center_y + radius)
    if left >= right or top >= bottom:
        bad_value(name, "box", tuple(box), f"a box whose square meets the image of {width} x {height} pixels")
    if isinstance(image, Tensor):
        return image[:, top:bottom, left:right]
    return image.crop((left, top, right, bottom))


def training_crop(image: Tensor | Image, size: int, *, generator: torch.Generator, flip: bool = True) -> Tensor:
    r"""Resize to :math:`\lfloor 76/64 \cdot \text{size} \rfloor` squared, crop at random, mirror every other time.

    Args:
        image: a PIL image, or a uint8 tensor [C, H, W], on any device. Its aspect ratio is not kept, as published.
        size: of the networks' images: 64 for Stage I (resized to 76), 256 for Stage II (304).
        generator: on the CPU; three numbers are drawn for an image, two without `flip`. The global random state stays
            as it is.
        flip: False where left and right mean something, as in digits.

    Returns: float32 [C, size, size] in [-1, 1].

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Cost: bilinear with the triangle as wide as the step, as PIL resizes, without PIL's rounding to whole levels.

    Source: StackGAN (Zhang et al. 2017, arXiv:1612.03242), released code.

    Example:
        >>> import torch
        >>> photo = torch.randint(256, (3, 120, 90), dtype=torch.uint8)
        >>> crop = training_crop(photo, 64, generator=torch.Generator().manual_seed(0))
        >>> crop.shape, bool(crop.abs().max() <= 1)
        (torch.Size([3, 64, 64]), True)
    """
    name = "training_crop"
    _width_and_height(name, image)
    _check_count(name, "size", size, 1)
    if not isinstance(generator, torch.Generator):
        bad_type(name, "generator", type(generator).__name__, "a torch.Generator")
    if generator.device.type != "cpu":
        bad_value(name, "generator", f"one on {generator.device}", "one on the CPU")
    if not isinstance(image, Tensor):
        image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    elif image.dtype is not torch.uint8:
        bad_type(name, "image", image.dtype, "a uint8 tensor")
    scaled = size * 76 // 64
    resized = F.interpolate(image[None].float(), (scaled, scaled), mode="bilinear", align_corners=False, antialias=True)
    top, left = torch.randint(scaled - size + 1, (2,), generator=generator).tolist()
    crop = resized[0, :, top : top + size, left : left + size]
    if flip and torch.rand((), generator=generator) < 0.5:
        crop = crop.flip(-1)
    return crop.mul(1 / 127.5).sub_(1).clamp_(-1, 1)


def save_image_grid(images: Tensor, path: str | PathLike[str], columns: int = 8) -> None:
    r"""Writes images in rows of `columns` to a PNG file, as :math:`\lfloor 127.5\,(x + 1) \rfloor`.

    Args:
        images: floating [N, 3, H, W] in [-1, 1], as generators return them, on any device; values outside are clamped.
        path: of the file, in a folder that exists.
        columns: of the grid; the last row may be shorter, and the rest of it is black.

    Raises:
        TypeError, ValueError: an argument that is not as said above.
        ImportError: Pillow is not installed.
        OSError: the file cannot be written.

    Example:
        >>> import os, tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "grid.png")
        ...     save_image_grid(torch.zeros(10, 3, 16, 16), path)
        ...     os.path.exists(path)
        True
    """
    name = "save_image_grid"
    if not isinstance(images, Tensor):
        bad_type(name, "images", type(images).__name__, "a torch.Tensor")
    if images.dtype not in FLOATING:
        bad_type(name, "images", images.dtype, "a floating-point tensor")
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        bad_value(name, "images", f"shape {tuple(images.shape)}", "shape [N, 3, H, W], none of them 0")
    _check_count(name, "columns", columns, 1)
    try:
        from PIL import Image
    except ImportError as reason:
        raise ImportError(f"{name}: {reason}, expected Pillow: pip install pillow") from reason
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    levels = images.detach().float().add(1).mul(127.5).clamp(0, 255).to(torch.uint8).cpu()
    grid = torch.zeros(rows * columns, 3, height, width, dtype=torch.uint8)
    grid[:count] = levels
    grid = grid.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    Image.fromarray(grid.reshape(rows * height, columns * width, 3).numpy()).save(path, format="PNG")


def _width_and_height(function: str, image: object) -> tuple[int, int]:
    """Of a PIL image or a tensor [C, H, W]; Pillow is not imported, for who has such an image has done it."""
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.numel() == 0:
            bad_value(function, "image", f"shape {tuple(image.shape)}", "shape [C, H, W], none of them 0")
        return image.shape[2], image.shape[1]
    pillow = sys.modules.get("PIL.Image")
    if pillow is None or not isinstance(image, pillow.Image):
        bad_type(function, "image", type(image).__name__, "a torch.Tensor or a PIL image")
    return image.size
