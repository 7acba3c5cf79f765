"""The BriVL example runs, its two backends train alike, and its recall counts what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import perfvl.ops.info_nce
from perfvl import backends

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "brivl_digits.py"


@pytest.fixture
def example() -> ModuleType:
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("brivl_digits_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_backends_give_the_same_curve_and_a_plot(example, tmp_path, capsys):
    assert example.main(["--loss", "both", "--steps", "3", "--plot", str(tmp_path / "curves.png")]) == 0
    output = capsys.readouterr().out
    for words in (
        "fused: loss of a pair",
        "reference: loss of a pair",
        "chance    image to text: R@1 10.0 %",
        "fused     text to image: R@1",
        "loss curves differ by at most",
    ):
        assert words in output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_backend_alone_compares_nothing(example, tmp_path, capsys):
    assert example.main(["--loss", "reference", "--steps", "1", "--plot", str(tmp_path / "curves.png")]) == 0
    output = capsys.readouterr().out
    assert "reference: loss of a pair" in output
    assert "fused" not in output
    assert "differ" not in output


@pytest.mark.skipif(backends.CPU_MISSING is not None, reason=f"one backend only: {backends.CPU_MISSING}")
def test_backends_that_disagree_fail_the_example(example, tmp_path, monkeypatch):
    right = perfvl.ops.info_nce.reference.info_nce

    def one_percent_more(*arguments, **settings):
        loss, *rest = right(*arguments, **settings)
        return 1.01 * loss, *rest

    monkeypatch.setattr(perfvl.ops.info_nce.reference, "info_nce", one_percent_more)
    assert example.main(["--loss", "both", "--steps", "2", "--plot", str(tmp_path / "curves.png")]) == 1


@pytest.mark.parametrize("package", ["sklearn.datasets", "rich.progress", "matplotlib"])
def test_without_an_extra_the_example_says_what_to_install(example, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert example.main([]) == 2
    assert "pip install 'perfvl[examples" in capsys.readouterr().err


def test_equal_seeds_train_alike_and_others_do_not(example):
    images, labels = torch.rand(150, 1, 8, 8), torch.arange(150) % 10

    def losses(seed: int) -> list[float]:
        run = example.Run(images, labels, 3, seed)
        return [run.step() for _ in range(3)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_two_thirds_of_the_captions_name_their_digit_and_the_others_do_not_lie(example):
    labels = torch.arange(9000) % 10
    captions = example.captions_for(labels, torch.Generator().manual_seed(0))
    naming = 0
    for label, caption in zip(labels.tolist(), captions, strict=True):
        if caption in {template.format(example.NAMES[label]) for template in example.NAMING}:
            naming += 1
        else:
            assert caption in (example.PARITY[label % 2], *example.VAGUE)
    assert naming / len(captions) == pytest.approx(2 / 3, abs=0.02)
    assert "偶" in example.PARITY[0]
    assert "奇" in example.PARITY[1]


def test_captions_and_tokens_are_one_to_one(example):
    captions = [template.format(name) for template in example.NAMING for name in example.NAMES]
    captions += [*example.PARITY, *example.VAGUE]
    ids, mask = example.tokenized(captions)
    assert ids.shape == mask.shape == (len(captions), example.LONGEST)
    read = ["".join(example.ALPHABET[i] for i in row[kept]) for row, kept in zip(ids, mask, strict=True)]
    assert read == captions


def test_boxes_are_the_quarters_and_then_the_whole_image(example):
    _, boxes, mask = example.with_boxes(torch.zeros(2, 1, 8, 8))
    assert boxes[1].tolist() == [[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8], [0, 0, 8, 8]]
    assert mask.all()


class Oracle:
    """Features that are the digit itself, or that of the next digit for wrong answers."""

    def __init__(self, example: ModuleType, labels: torch.Tensor, shift: int) -> None:
        named = torch.arange(10).repeat_interleave(len(example.NAMING))
        self.images, self.texts = torch.eye(10)[labels], torch.eye(10)[(named + shift) % 10]

    def eval(self) -> None:
        self.evaluated = True

    def train(self) -> None:
        self.trains_again = self.evaluated

    def get_image_features(self, image: object) -> torch.Tensor:
        return self.images

    def get_text_features(self, text: object) -> torch.Tensor:
        return self.texts


def test_recall_is_one_where_features_are_right_and_zero_where_they_are_wrong(example):
    labels = torch.arange(200) % 10
    right, wrong = Oracle(example, labels, 0), Oracle(example, labels, 1)
    found = example.recalls(right, torch.zeros(200, 1, 8, 8), labels)
    assert found == {"image to text": [1.0] * 3, "text to image": [1.0] * 3}
    assert right.trains_again
    found = example.recalls(wrong, torch.zeros(200, 1, 8, 8), labels)
    assert found["text to image"] == [0.0] * 3
    assert found["image to text"][:2] == [0.0] * 2


def test_chance_is_what_random_features_reach(example):
    labels = torch.arange(300) % 10
    expected, trials = example.chance(labels), 60
    totals = {direction: torch.zeros(3) for direction in expected}
    for _ in range(trials):
        oracle = Oracle(example, labels, 0)
        oracle.images, oracle.texts = torch.randn(300, 64), torch.randn(50, 64)
        for direction, values in example.recalls(oracle, torch.zeros(300, 1, 8, 8), labels).items():
            totals[direction] += torch.tensor(values) / trials
    for direction, values in expected.items():
        torch.testing.assert_close(totals[direction], torch.tensor(values), rtol=0, atol=0.03)
