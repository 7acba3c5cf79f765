"""Reads arrays, numbers and text out of a pickle that nobody vouches for, and runs nothing that it asks for.

``pickle.load`` calls whatever a file names. Here a name is a :class:`Name` and calling it makes a :class:`Call`: a note
of what was asked for. :func:`as_array` reads an array out of such a note by itself. So not even numpy's own
reconstruction runs, and what a file can do is take time and memory. Pickles of Python 2 and 3 and of numpy 1 and 2 are
read alike.
"""

from __future__ import annotations

import math
import pickle
from os import PathLike
from typing import Any, NoReturn

import numpy as np

_MODULES = ("numpy.core", "numpy._core")
_RECONSTRUCT = {f"{module}.multiarray._reconstruct" for module in _MODULES}
_SCALAR = {f"{module}.multiarray.scalar" for module in _MODULES}
_FROM_BUFFER = {f"{module}.numeric._frombuffer" for module in _MODULES}  # protocol 5
_ENCODE = "_codecs.encode"  # bytes, as Python 3 writes them for Python 2
_ALLOWED = {*_RECONSTRUCT, *_SCALAR, *_FROM_BUFFER, _ENCODE, "numpy.ndarray", "numpy.dtype"}
_TYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}
_MOST_DIMENSIONS = 32


class Refused(ValueError):
    """What was found in the file instead of arrays, numbers and text."""


class Name:
    """What a pickle calls a function or class."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *arguments: object) -> Call:
        return Call(self.path, arguments)

    def __setstate__(self, state: object) -> NoReturn:
        # Without it the unpickler would set whatever attributes the file asks for.
        raise Refused(f"a state for {self.path}")


class Call:
    """A call that a pickle asks for, and the state it would give to the result."""

    __slots__ = ("arguments", "path", "state")

    def __init__(self, path: str, arguments: tuple[object, ...]) -> None:
        self.path, self.arguments = path, arguments
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        path = f"{module_name}.{global_name}"
        if path not in _ALLOWED:
            raise Refused(f"the name {path[:80]!r}")
        return Name(path)


def load(path: str | PathLike[str]) -> object:
    """The pickle's object: lists, tuples, dicts, sets, numbers, str, bytes (a str of Python 2 too), and :class:`Call`.

    Raises:
        Refused: a name other than those of numpy's arrays, or what is no pickle.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return _Unpickler(file, encoding="bytes").load()
        except (OSError, Refused):
            raise
        except Exception as reason:  # a damaged pickle raises almost anything, MemoryError and IndexError included
            raise Refused(f"a damaged pickle ({type(reason).__name__})") from reason


def as_array(value: object) -> np.ndarray:
    """The array of floating-point numbers or integers that `value` describes, read-only; of shape [] for a scalar.

    Raises:
        Refused: where it describes something else, or holds more or fewer bytes than its shape needs.
    """
    if not isinstance(value, Call):
        raise Refused(described(value))
    if value.path in _RECONSTRUCT:
        # (version, shape, dtype, is_fortran, data); the first numpy had no version.
        if not isinstance(value.state, tuple) or len(value.state) not in (4, 5):
            raise Refused("an array without its data")
        shape, dtype, fortran, data = value.state[-4:]
    elif value.path in _SCALAR and len(value.arguments) == 2:
        dtype, data = value.arguments
        shape, fortran = (), False
    elif value.path in _FROM_BUFFER and len(value.arguments) == 4:
        data, dtype, shape, order = value.arguments
        if order not in ("C", "F"):
            raise Refused("an array of unknown order")
        fortran = order == "F"
    else:
        raise Refused(described(value))
    numpy_dtype, buffer = _dtype(dtype), _bytes(data)
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(size) is int and size > 0 for size in shape)
    ):
        raise Refused("an array of impossible or empty shape")
    if math.prod(shape) * numpy_dtype.itemsize != len(buffer):
        raise Refused(f"an array of {len(buffer)} bytes and another shape")
    return np.frombuffer(buffer, numpy_dtype).reshape(shape, order="F" if fortran else "C")


def as_text(value: object) -> str:
    """A str; those of Python 2 as latin-1."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("latin-1")
    raise Refused(described(value))


def described(value: object) -> str:
    """What a message says of `value`: never its contents, which may be long, or deep."""
    if isinstance(value, (Name, Call)):
        return f"{value.path} where no such thing belongs"
    return f"an object of type {type(value).__name__}"


def _dtype(value: object) -> np.dtype:
    if not isinstance(value, Call) or value.path != "numpy.dtype" or not value.arguments:
        raise Refused("an array without a dtype")
    code = value.arguments[0]
    name = as_text(code) if isinstance(code, (str, bytes)) else described(code)
    if name not in _TYPES:
        kind = "objects" if name.startswith("O") else f"dtype {name[:20]!r}"
        raise Refused(f"an array of {kind}")
    order = "="
    if value.state is not None:
        # (version, byte order, subarray, names, fields, size, alignment, flags): those of a plain number are None.
        if not isinstance(value.state, tuple) or len(value.state) < 5 or any(x is not None for x in value.state[2:5]):
            raise Refused("an array of structured dtype")
        order = as_text(value.state[1])
        if order not in ("<", ">", "=", "|"):
            raise Refused("an array of unknown byte order")
    return np.dtype(name).newbyteorder(order)  # type: ignore[arg-type]


def _bytes(value: object) -> bytes | bytearray:
    if isinstance(value, Call) and value.path == _ENCODE and len(value.arguments) == 2:
        text, encoding = value.arguments
        if isinstance(text, str) and encoding in ("latin1", "latin-1"):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError as reason:
                raise Refused("an array of text") from reason
    if isinstance(value, (bytes, bytearray)):
        return value
    raise Refused("an array of objects" if isinstance(value, list) else "an array without its data")
