"""StackGAN's data: the published files of its data sets, read; and its images, cropped, scaled and saved.

The data sets (birds, flowers, COCO) come as pickles of Python 2: char-CNN-RNN-embeddings.pickle, filenames.pickle and
class_info.pickle in a folder for each split; birds also as the text files of CUB-200-2011 with a box around every bird.
Pickles are read without running anything in them (:mod:`perfvl.inert_pickle`). Images are the subject of
:mod:`perfvl.stackgan_images`, whose functions are here too.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from perfvl import inert_pickle
from perfvl.inert_pickle import Refused
from perfvl.ops._library import bad_type, bad_value
from perfvl.stackgan_images import crop_to_box, save_image_grid, training_crop

__all__ = [
    "crop_to_box",
    "load_boxes",
    "load_class_info",
    "load_filenames",
    "load_text_embeddings",
    "save_image_grid",
    "training_crop",
]

Result = TypeVar("Result")
FilePath = str | PathLike[str]


def load_text_embeddings(path: FilePath) -> Tensor | list[Tensor]:
    """The text embeddings of a data set, several captions for every image: ``char-CNN-RNN-embeddings.pickle``.

    Args:
        path: a pickle of Python 2 or 3 that holds a list of N arrays [captions, D], or of N lists of arrays [D], or one
            array [N, captions, D], floating.

    Returns: float32 [N, captions, D], or N tensors [captions of this image, D] where their numbers differ.

    Raises:
        ValueError: the file holds anything else. Nothing in it is run.
        OSError: it cannot be read.

    Cost: the file and the result in memory.

    Source: StackGAN (Zhang et al. 2017, arXiv:1612.03242), released data; embeddings of Reed et al. 2016,
        arXiv:1605.05395. Training picks one caption of an image at random.

    Example:
        >>> import os, pickle, tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "char-CNN-RNN-embeddings.pickle")
        ...     with open(path, "wb") as file:
        ...         pickle.dump([np.zeros((10, 1024), np.float32)] * 3, file, protocol=2)
        ...     load_text_embeddings(path).shape
        torch.Size([3, 10, 1024])
    """

    def read(value: object) -> Tensor | list[Tensor]:
        rows = value if isinstance(value, (list, tuple)) else list(_floating(value, 3))
        captions = [_captions(row) for row in rows]
        shapes = {row.shape for row in captions}
        if len({width for _, width in shapes}) != 1:
            raise Refused(f"embeddings of {len(shapes)} widths" if shapes else "no embeddings")
        if len(shapes) > 1:
            return [torch.from_numpy(row.astype(np.float32)) for row in captions]
        embeddings = torch.empty(len(captions), *captions[0].shape, dtype=torch.float32)
        for row, numbers in zip(embeddings.numpy(), captions, strict=True):
            row[...] = numbers
        return embeddings

    expected = "N floating arrays [captions, D], or one [N, captions, D], and nothing else"
    return _read("load_text_embeddings", path, read, expected)


def load_filenames(path: FilePath) -> list[str]:
    """The names of a data set's images, without ".jpg", in the order of its embeddings: ``filenames.pickle``.

    Args:
        path: a pickle of Python 2 or 3 that holds a list of str.

    Raises:
        ValueError: the file holds anything else. Nothing in it is run.
        OSError: it cannot be read.

    Example:
        >>> import os, pickle, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "filenames.pickle")
        ...     with open(path, "wb") as file:
        ...         pickle.dump(["001.Black_footed_Albatross/Black_Footed_Albatross_0046_18"], file, protocol=2)
        ...     load_filenames(path)
        ['001.Black_footed_Albatross/Black_Footed_Albatross_0046_18']
    """

    def read(value: object) -> list[str]:
        return [inert_pickle.as_text(name) for name in _elements(value)]

    return _read("load_filenames", path, read, "a list of at least one str")


def load_class_info(path: FilePath) -> Tensor:
    """The class of every image of a data set, in the order of its embeddings: ``class_info.pickle``.

    Args:
        path: a pickle of Python 2 or 3 that holds a list of N ints, or an integer array [N].

    Returns: int64 [N].

    Raises:
        ValueError: the file holds anything else. Nothing in it is run.
        OSError: it cannot be read.

    Example:
        >>> import os, pickle, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "class_info.pickle")
        ...     with open(path, "wb") as file:
        ...         pickle.dump([2, 2, 7], file, protocol=2)
        ...     load_class_info(path)
        tensor([2, 2, 7])
    """

    def read(value: object) -> Tensor:
        if isinstance(value, inert_pickle.Call):
            return torch.from_numpy(_integers(value, 1).astype(np.int64))
        numbers = [row if type(row) is int else int(_integers(row, 0)) for row in _elements(value)]
        if not all(-(2**63) <= number < 2**63 for number in numbers):
            raise Refused("a class beyond 64 bits")
        return torch.tensor(numbers, dtype=torch.int64)

    return _read("load_class_info", path, read, "a list of at least one int, or an integer array [N]")


def load_boxes(folder: FilePath) -> dict[str, tuple[int, int, int, int]]:
    """The boxes around the birds of CUB-200-2011: name, as in filenames.pickle -> (left, top, width, height) in pixels.

    Args:
        folder: CUB_200_2011, with ``images.txt`` (``1 001.Black_footed_Albatross/....jpg``) and ``bounding_boxes.txt``
            (``1 60.0 27.0 325.0 304.0``).

    Raises:
        ValueError: a line without its fields, numbers that are not finite, an image without a box or the reverse.
        OSError: a file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "images.txt").write_text("1 001.Albatross/Albatross_0046.jpg")
        ...     _ = pathlib.Path(folder, "bounding_boxes.txt").write_text("1 60.0 27.0 325.0 304.0")
        ...     load_boxes(folder)
        {'001.Albatross/Albatross_0046': (60, 27, 325, 304)}
    """
    images, boxes = Path(folder, "images.txt"), Path(folder, "bounding_boxes.txt")
    names = {
        number: text.rpartition(".")[0] for number, text in _numbered(images, str.strip, "a number and a file name")
    }
    found = dict(_numbered(boxes, _box, "a number and the four of a box"))
    if names.keys() != found.keys():
        alone = sorted(names.keys() ^ found.keys())
        expected = f"a line for each image of {images.name} and for no other"
        bad_value("load_boxes", "folder", f"{boxes} that differs in {len(alone)} images, such as {alone[0]}", expected)
    return {name: found[number] for number, name in names.items()}


def _read(function: str, path: FilePath, read: Callable[[object], Result], expected: str) -> Result:
    """What `read` makes of the pickle; where it refuses, a message that names the file."""
    if not isinstance(path, (str, PathLike)):
        bad_type(function, "path", type(path).__name__, "a path")
    try:
        return read(inert_pickle.load(path))
    except Refused as found:
        bad_value(function, "path", f"{str(path)!r} with {found}", expected)


def _elements(value: object) -> list | tuple:
    if not isinstance(value, (list, tuple)) or not value:
        raise Refused("an empty list" if value == [] else inert_pickle.described(value))
    return value


def _floating(value: object, dimensions: int) -> np.ndarray:
    return _numbers(value, "f", dimensions)


def _integers(value: object, dimensions: int) -> np.ndarray:
    return _numbers(value, "iu", dimensions)


def _numbers(value: object, kinds: str, dimensions: int) -> np.ndarray:
    array = inert_pickle.as_array(value)
    if array.dtype.kind not in kinds or array.ndim != dimensions:
        raise Refused(f"an array of {array.dtype} and shape {list(array.shape)}")
    return array


def _captions(row: Any) -> np.ndarray:
    """The captions of an image: [captions, D]."""
    if isinstance(row, np.ndarray):
        return row
    if not isinstance(row, (list, tuple)):
        return _floating(row, 2)
    captions = [_floating(caption, 1) for caption in _elements(row)]
    if len({len(caption) for caption in captions}) != 1:
        raise Refused("captions of several widths")
    return np.stack(captions)


def _numbered(path: Path, read: Callable[[str], Result], expected: str) -> list[tuple[int, Result]]:
    """The lines of one of CUB's files: a number, and what `read` makes of the rest."""
    lines = []
    for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            number, rest = line.split(maxsplit=1)
            lines.append((int(number), read(rest)))
        except (ValueError, OverflowError):
            bad_value("load_boxes", "folder", f"{path} with {line[:80]!r} in line {i}", expected)
    return lines


def _name(text: str) -> str:
    return text.strip().removesuffix(".jpg")


def _box(text: str) -> tuple[int, int, int, int]:
    left, top, width, height = (int(float(number)) for number in text.split())
    return left, top, width, height
