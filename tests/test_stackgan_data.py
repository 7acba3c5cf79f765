"""StackGAN's data files are read without running what they ask for, and images are cropped and saved as published."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from perfvl import stackgan_data

LOADERS = [stackgan_data.load_text_embeddings, stackgan_data.load_filenames, stackgan_data.load_class_info]
EVENTS: list[str] = []


def ran(*arguments: object) -> list[str]:
    """What no file may call."""
    EVENTS.append("ran")
    return ["image"]


class Reduced:
    """Pickles as a call of `function`, with a state where one is given."""

    def __init__(self, function: object, *arguments: object, state: object = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class OldPython:
    """Protocols 0 and 2 as cPickle of Python 2 wrote them: str without an encoding, arrays by their strings."""

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol

    def text(self, data: bytes) -> bytes:
        if self.protocol == 0:
            return b"S" + b"'" + b"".join(b"\\x%02x" % byte for byte in data) + b"'\n"
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data

    def integer(self, value: int) -> bytes:
        return b"I%d\n" % value

    def tuple(self, *parts: bytes) -> bytes:
        return b"(" + b"".join(parts) + b"t"

    def dtype(self, dtype: np.dtype) -> bytes:
        code = self.text(dtype.str[1:].encode())
        state = self.tuple(
            self.integer(3), self.text(dtype.str[:1].encode()), b"NNN", *[self.integer(-1)] * 2, self.integer(0)
        )
        return b"cnumpy\ndtype\n" + self.tuple(code, self.integer(0), self.integer(1)) + b"R" + state + b"b"

    def array(self, array: np.ndarray) -> bytes:
        made = self.tuple(b"cnumpy\nndarray\n", self.tuple(self.integer(0)), self.text(b"b"))
        shape = self.tuple(*map(self.integer, array.shape))
        data = self.text(array.tobytes("A"))
        fortran = self.integer(int(array.flags.fnc))
        state = self.tuple(self.integer(1), shape, self.dtype(array.dtype), fortran, data)
        return b"cnumpy.core.multiarray\n_reconstruct\n" + made + b"R" + state + b"b"

    def scalar(self, number: np.generic) -> bytes:
        arguments = self.tuple(self.dtype(number.dtype), self.text(number.tobytes()))
        return b"cnumpy.core.multiarray\nscalar\n" + arguments + b"R"

    def file(self, *elements: bytes) -> bytes:
        return (b"\x80\x02" if self.protocol else b"") + b"(" + b"".join(elements) + b"l."


@pytest.fixture
def write(tmp_path):
    def written(content: object, protocol: int = 2) -> Path:
        path = tmp_path / "data.pickle"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path

    return written


@pytest.fixture(autouse=True)
def nothing_runs():
    EVENTS.clear()
    yield
    assert not EVENTS, "the file ran code"


def embeddings(*shape: int, dtype: str = "<f4") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("protocol", [0, 2])
def test_files_of_python_2_are_read(write, protocol):
    old, rows = OldPython(protocol), embeddings(3, 5, 7)
    content = old.file(*map(old.array, rows))
    np.testing.assert_array_equal(pickle.loads(content, encoding="latin1"), rows, "not what Python 2 would write")
    loaded = stackgan_data.load_text_embeddings(write(content))
    assert loaded.dtype is torch.float32
    np.testing.assert_array_equal(loaded.numpy(), rows)
    names = ["001.Albatross/Albatross_0046", "caf\xe9"]
    content = old.file(*(old.text(name.encode("latin-1")) for name in names))
    assert stackgan_data.load_filenames(write(content)) == names
    for elements in ([old.integer(7), old.integer(2)], [old.scalar(np.int64(7)), old.scalar(np.uint8(2))]):
        classes = stackgan_data.load_class_info(write(old.file(*elements)))
        assert classes.dtype is torch.int64
        assert classes.tolist() == [7, 2]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_files_of_this_python_are_read(write, protocol):
    rows = embeddings(3, 5, 7)
    for value in (list(rows), tuple(rows), rows, np.asfortranarray(rows), [list(row) for row in rows]):
        loaded = stackgan_data.load_text_embeddings(write(value, protocol))
        np.testing.assert_array_equal(loaded.numpy(), rows)
    assert stackgan_data.load_filenames(write(["a/b", "c"], protocol)) == ["a/b", "c"]
    for classes in ([3, 1], [np.int64(3), np.int32(1)], np.array([3, 1], np.int32)):
        assert stackgan_data.load_class_info(write(classes, protocol)).tolist() == [3, 1]


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
def test_every_floating_dtype_becomes_float32(write, dtype):
    rows = embeddings(2, 3, 4, dtype=dtype)
    loaded = stackgan_data.load_text_embeddings(write(list(rows)))
    np.testing.assert_array_equal(loaded.numpy(), rows.astype(np.float32))


def test_images_with_different_numbers_of_captions_become_a_list(write):
    rows = [embeddings(5, 4), embeddings(6, 4), embeddings(5, 4)]
    loaded = stackgan_data.load_text_embeddings(write(rows))
    assert isinstance(loaded, list)
    for tensor, row in zip(loaded, rows, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), row)
        tensor.add_(1)  # the result's own memory


MALICIOUS = {
    "os.system": pickle.dumps(Reduced(os.system, "exit 1")),
    "builtins.eval": pickle.dumps(Reduced(eval, "1 + 1"), 2),
    "builtins.getattr": pickle.dumps(Reduced(getattr, "a", "upper")),
    "this test's function": pickle.dumps(Reduced(ran)),
    "inside of a list": pickle.dumps([embeddings(2, 3), Reduced(ran)]),
    "as an argument": pickle.dumps([Reduced(np.dtype, Reduced(ran))]),
    "as a state": pickle.dumps([Reduced(np.dtype, "f4", state=Reduced(ran))]),
    "objects in an array": pickle.dumps(np.array([Reduced(ran)], object)),
    "objects in a scalar": pickle.dumps([Reduced(np._core.multiarray.scalar, np.dtype("O"), b"\x01" * 8)]),
    "by its dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.__new__\x93\x8c\x01O\x85R.",
    "a new object": b"\x80\x02cnumpy\nndarray\n(K\x02ttR\x81.",
    "an instance of protocol 0": b"(S'exit 1'\nios\nsystem\n.",
    "an object of protocol 1": b"(cos\nsystem\nS'exit 1'\no.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "a persistent name": b"Pname\n.",
    "attributes of a class": b"cnumpy\ndtype\n(N}S'__call__'\nNstb.",
}


@pytest.mark.parametrize("loader", LOADERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("content", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_a_file_that_names_code_is_refused_and_runs_nothing(write, monkeypatch, loader, content):
    for module in ("os", os.name):  # pickles know it by the second
        monkeypatch.setattr(f"{module}.system", ran)
    path = write(content)
    with pytest.raises(ValueError, match=rf"{loader.__name__}: `path` got .*data\.pickle.*expected"):
        loader(path)


def test_the_message_names_file_finding_and_expectation(write):
    path = write(pickle.dumps(Reduced(eval, "1"), 4))
    message = f"load_filenames: `path` got '{path}' with the name 'builtins.eval', expected a list of at least one str"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        stackgan_data.load_filenames(path)


def test_an_array_that_is_read_is_not_made_by_the_files_calls(write, monkeypatch):
    content = pickle.dumps([embeddings(2, 3)], 2)
    for name in ("_reconstruct", "scalar"):
        monkeypatch.setattr(np._core.multiarray, name, ran)
    assert stackgan_data.load_text_embeddings(write(content)).shape == (1, 2, 3)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_file_cut_anywhere_is_refused(write, protocol):
    content = pickle.dumps([embeddings(2, 3)], protocol)
    for length in range(0, len(content), 7):
        with pytest.raises(ValueError, match="damaged pickle"):
            stackgan_data.load_text_embeddings(write(content[:length]))


def test_a_file_with_one_wrong_byte_is_read_or_refused(write):
    content = pickle.dumps([embeddings(1, 2)], 2)
    refused = 0
    for i in range(len(content)):
        for flip in (1, 128):
            damaged = bytearray(content)
            damaged[i] ^= flip
            try:
                stackgan_data.load_text_embeddings(write(bytes(damaged)))
            except ValueError:
                refused += 1
    assert refused > len(content)


def array_call(shape: object = (1, 2), code: object = "f4", order: object = "<", data: object = b"\0" * 8) -> Reduced:
    """An array's pickle with parts of it replaced."""
    state = (3, order, None, None, None, -1, -1, 0)
    described = Reduced(np.dtype, code, False, True, state=state)
    made = np._core.multiarray._reconstruct
    return Reduced(made, np.ndarray, (0,), b"b", state=(1, shape, described, False, data))


def test_the_array_of_the_next_test_is_read_as_it_is(write):
    assert stackgan_data.load_text_embeddings(write([array_call()])).shape == (1, 1, 2)


@pytest.mark.parametrize(
    "part",
    [
        {"shape": (1, 3)},
        {"shape": (1, 10**30)},
        {"shape": (-1, -2)},
        {"shape": (True, 2)},
        {"shape": (0, 2), "data": b""},
        {"shape": [1, 2]},
        {"shape": (1,) * 80 + (2,)},
        {"code": "O"},
        {"code": "V4"},
        {"code": "M8"},
        {"code": [("x", "f4")]},
        {"order": "?"},
        {"order": 1},
        {"data": [1.0, 2.0]},
        {"data": "text"},
        {"data": Reduced(np.dtype, "f4")},
    ],
    ids=lambda part: ", ".join(f"{name} {str(value)[:20]}" for name, value in part.items()),
)
def test_an_array_that_cannot_be_is_refused(write, part):
    with pytest.raises(ValueError, match="load_text_embeddings: `path` got"):
        stackgan_data.load_text_embeddings(write([array_call(**part)]))


@pytest.mark.parametrize(
    ("loader", "value"),
    [
        (0, []),
        (0, {}),
        (0, [[0.5, 1.0]]),
        (0, ["text"]),
        (0, [[]]),
        (0, embeddings(3, 4)),
        (0, [embeddings(3)]),
        (0, [np.zeros((2, 3), np.int64)]),
        (0, [embeddings(2, 3), embeddings(2, 4)]),
        (0, [[embeddings(3), embeddings(4)]]),
        (0, [np.zeros((2, 3), [("x", "f4")])]),
        (0, None),
        (1, []),
        (1, "name"),
        (1, ["name", 1]),
        (1, {"name": 1}),
        (1, embeddings(3)),
        (2, []),
        (2, [1.0]),
        (2, [True]),
        (2, ["1"]),
        (2, [2**63]),
        (2, embeddings(3)),
        (2, np.zeros((3, 1), np.int64)),
        (2, {1: 2}),
    ],
)
def test_a_file_that_holds_something_else_is_refused(write, loader, value):
    function = LOADERS[loader]
    with pytest.raises(ValueError, match=rf"{function.__name__}: `path` got .*data\.pickle' with .*, expected "):
        function(write(value))


def test_a_file_of_endless_depth_is_refused(write):
    nested = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    for loader in LOADERS:
        with pytest.raises(ValueError, match="with an object of type list, expected"):
            loader(write(nested))


@pytest.mark.parametrize("loader", LOADERS, ids=lambda f: f.__name__)
def test_a_path_that_is_none_or_leads_nowhere_says_so(loader, tmp_path):
    with pytest.raises(FileNotFoundError):
        loader(tmp_path / "missing.pickle")
    with pytest.raises(TypeError, match="`path` got bytes, expected a path"):
        loader(b"data.pickle")


@pytest.fixture
def birds(tmp_path):
    def written(
        images: str = "1 001.A/x.y_1.jpg\n2 002.B/z.jpg\n", boxes: str = "1 60.0 27.0 325.5 304.0\n2 1 2 3 4\n"
    ):
        (tmp_path / "images.txt").write_text(images)
        (tmp_path / "bounding_boxes.txt").write_text(boxes)
        return tmp_path

    return written


def test_boxes_are_found_by_the_names_of_images(birds):
    assert stackgan_data.load_boxes(birds()) == {"001.A/x.y_1": (60, 27, 325, 304), "002.B/z": (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"boxes": "1 60 27 325 304\n2 1 2 3\n"},
            r"bounding_boxes\.txt with '2 1 2 3' in line 2, expected a number and",
        ),
        ({"boxes": "1 60 27 325 304 5\n"}, "in line 1"),
        ({"boxes": "1 60 27 325 inf\n"}, "in line 1"),
        ({"boxes": "1 60 27 325 nan\n"}, "in line 1"),
        ({"boxes": "1 60 27 325 304\n"}, r"bounding_boxes\.txt that differs in 1 images, such as 2, expected a line"),
        ({"images": "1 001.A/x.jpg\n2\n"}, r"images\.txt with '2' in line 2, expected a number and a file name"),
        ({"images": "first 001.A/x.jpg\n"}, "in line 1"),
    ],
)
def test_a_line_without_its_fields_is_named(birds, part, message):
    with pytest.raises(ValueError, match=f"load_boxes: `folder` got .*{message}"):
        stackgan_data.load_boxes(birds(**part))


def pixels(height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pil(image: torch.Tensor):
    return pytest.importorskip("PIL.Image").fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((20, 10, 10, 8), (7, 21), (18, 32)),  # R = 7 around (25, 14)
        ((21, 11, 9, 9), (9, 21), (19, 31)),  # halves are dropped
        ((0, 0, 20, 20), (0, 25), (0, 25)),  # clipped above and on the left
        ((40, 25, 20, 15), (17, 40), (35, 60)),  # clipped below and on the right
        ((20.9, 10.9, 10.9, 8.9), (7, 21), (18, 32)),
        ((0, 0, 60, 40), (0, 40), (0, 60)),
    ],
)
def test_a_crop_is_the_published_square_inside_the_image(box, rows, columns):
    image = pixels()
    expected = image[:, slice(*rows), slice(*columns)]
    assert torch.equal(stackgan_data.crop_to_box(image, box), expected)
    cropped = stackgan_data.crop_to_box(pil(image), box)
    np.testing.assert_array_equal(np.array(cropped), expected.permute(1, 2, 0))


@pytest.mark.parametrize(
    "box",
    [(100, 10, 10, 8), (0, -90, 10, 8), (5, 5, 1, 1), (0, 0, 0, 9), (1, 2, 3), None, "1234", (0, 0, float("nan"), 1)],
)
def test_a_box_without_an_image_is_refused(box):
    with pytest.raises(ValueError, match="crop_to_box: `box` got"):
        stackgan_data.crop_to_box(pixels(), box)


@pytest.mark.parametrize("function", [stackgan_data.crop_to_box, stackgan_data.training_crop])
def test_what_is_no_image_is_refused(function):
    arguments = {"box": (0, 0, 4, 4)} if function is stackgan_data.crop_to_box else {"size": 4, "generator": seeded()}
    for image in (torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(3, 0, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="`image` got shape"):
            function(image, **arguments)
    with pytest.raises(TypeError, match=r"`image` got ndarray, expected a torch.Tensor or a PIL image"):
        function(np.zeros((3, 4, 4), np.uint8), **arguments)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_training_crops_are_crops_of_the_resized_image():
    image = pixels()
    resized = np.array(pil(image).resize((19, 19), 2)).astype(np.float32)  # 2 is bilinear
    resized = torch.from_numpy(resized).permute(2, 0, 1) / 127.5 - 1
    generator, seen = seeded(), set()
    for _ in range(300):
        crop = stackgan_data.training_crop(image, 16, generator=generator)
        assert crop.shape == (3, 16, 16)
        places = [
            (top, left, mirrored)
            for top in range(4)
            for left in range(4)
            for mirrored in (False, True)
            if ((crop.flip(-1) if mirrored else crop) - resized[:, top : top + 16, left : left + 16]).abs().max() < 0.01
        ]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 32, "some places were never drawn"


def test_training_crops_of_a_pil_image_and_a_tensor_are_equal():
    image = pixels()
    first, second = (stackgan_data.training_crop(x, 16, generator=seeded()) for x in (image, pil(image)))
    assert torch.equal(first, second)


def test_a_generator_repeats_its_crops_and_the_global_one_stays():
    state = torch.random.get_rng_state()
    first, second, other = (
        torch.stack([stackgan_data.training_crop(pixels(), 16, generator=generator) for _ in range(4)])
        for generator in (seeded(), seeded(), seeded(1))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_flip_nothing_is_mirrored():
    image = torch.arange(0, 240, 4, dtype=torch.uint8).expand(3, 40, 60).contiguous()
    crops = [stackgan_data.training_crop(image, 16, generator=seeded(s), flip=False) for s in range(20)]
    assert all(bool((crop.diff(dim=-1) > 0).all()) for crop in crops)


def test_training_crops_stay_in_their_range():
    for value, expected in ((0, -1.0), (255, 1.0)):
        crop = stackgan_data.training_crop(torch.full((3, 9, 7), value, dtype=torch.uint8), 16, generator=seeded())
        assert crop.eq(expected).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": 0}, ValueError, "`size` got 0, expected at least 1"),
        ({"size": 16.0}, TypeError, "`size` got float"),
        ({"generator": None}, TypeError, "`generator` got NoneType"),
        ({"image": torch.zeros(3, 4, 4)}, TypeError, r"`image` got torch.float32, expected a uint8 tensor"),
    ],
)
def test_a_wrong_argument_of_a_training_crop_is_named(change, error, message):
    arguments = {"image": pixels(), "size": 16, "generator": seeded()} | change
    with pytest.raises(error, match=f"training_crop: {message}"):
        stackgan_data.training_crop(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_grid_holds_the_images_in_rows(tmp_path, dtype):
    image_module = pytest.importorskip("PIL.Image")
    levels = torch.linspace(-1, 1, 5).to(dtype)
    images = levels.view(5, 1, 1, 1).repeat(1, 3, 4, 6)
    images[:, 1] = -1
    images[0, 2] = 7.0  # outside
    stackgan_data.save_image_grid(images.requires_grad_(), tmp_path / "grid.png", columns=3)
    content = (tmp_path / "grid.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    grid = np.array(image_module.open(io.BytesIO(content)))
    assert grid.shape == (8, 18, 3)
    for i, level in enumerate((0, 63, 127, 191, 255)):
        tile = grid[4 * (i // 3) : 4 * (i // 3) + 4, 6 * (i % 3) : 6 * (i % 3) + 6]
        assert (tile == [level, 0, 255 if i == 0 else level]).all()
    assert (grid[4:, 12:] == 0).all()


def test_a_grid_is_not_wider_than_its_images(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    stackgan_data.save_image_grid(torch.zeros(2, 3, 4, 4), tmp_path / "grid.png")
    assert image_module.open(tmp_path / "grid.png").size == (8, 4)


@pytest.mark.parametrize(
    ("images", "columns", "error"),
    [
        (torch.zeros(2, 1, 4, 4), 8, ValueError),
        (torch.zeros(3, 4, 4), 8, ValueError),
        (torch.zeros(0, 3, 4, 4), 8, ValueError),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 8, TypeError),
        (np.zeros((2, 3, 4, 4)), 8, TypeError),
        (torch.zeros(2, 3, 4, 4), 0, ValueError),
    ],
)
def test_what_is_no_grid_is_refused_and_nothing_is_written(tmp_path, images, columns, error):
    with pytest.raises(error, match=r"save_image_grid: `(images|columns)` got"):
        stackgan_data.save_image_grid(images, tmp_path / "grid.png", columns)
    assert not list(tmp_path.iterdir())


def test_without_pillow_a_grid_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"save_image_grid: .*pip install pillow"):
        stackgan_data.save_image_grid(torch.zeros(1, 3, 4, 4), tmp_path / "grid.png")
