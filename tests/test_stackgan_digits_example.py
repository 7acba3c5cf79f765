"""The StackGAN example draws the digits that captions ask for, and what it judges and trains with is what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "stackgan_digits.py"


@pytest.fixture
def example() -> ModuleType:
    for package in ("sklearn", "matplotlib", "rich", "PIL"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("stackgan_digits_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(example, monkeypatch):
    """The example with three batches an epoch, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = example.load_digits

    def few(captions, generator):
        seen, held_out = whole(captions, generator)
        return example.Digits(*(part[: 3 * example.BATCH + 5] for part in seen)), held_out

    monkeypatch.setattr(example, "load_digits", few)
    yield example
    torch.set_num_threads(threads)


def rows_of(output: str) -> dict[str, list[float]]:
    """Name -> accuracy and the accuracy of each digit, from the table."""
    lines = output[output.index("shows the digit of its caption") :].splitlines()[1:5]
    rows = {}
    for line in lines:
        name, digits, rest = line.split("|")
        rows[name.rsplit(maxsplit=1)[0]] = [
            float(name.split()[-1]),
            *map(float, digits.split()),
            float(rest.split()[0]),
        ]
    return rows


def test_a_few_epochs_draw_most_digits_that_captions_ask_for(example, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert example.main(["--quick", "--folder", str(tmp_path / "new" / "folder")]) == 0, "Stage I below 60 %"
    assert torch.get_num_threads() == threads
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == [
        "real digits, held out, 16 pixels",
        "Stage I, 10 epochs",
        "real digits, held out, 32 pixels",
        "Stage II, 1 epochs",
    ]
    assert rows["real digits, held out, 16 pixels"][0] > 95
    assert rows["Stage I, 10 epochs"][0] >= 60
    # Each digit has several images and not one.
    assert rows["Stage I, 10 epochs"][-1] > 0.5 * rows["real digits, held out, 16 pixels"][-1]
    written = {file.name for file in (tmp_path / "new" / "folder").iterdir()}
    assert written == {f"stage_i_{epoch:02}.png" for epoch in range(1, 11)} | {"stage_ii_01.png", "losses.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "new" / "folder").iterdir())


def test_stage_1_that_does_not_learn_fails_the_example(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiny, "RATES", (0.0, 0.0))
    assert tiny.main(["--epochs", "1", "1", "--folder", str(tmp_path)]) == 1
    assert "nan" not in capsys.readouterr().out


def test_equal_seeds_train_alike_and_others_do_not(tiny, tmp_path):
    def trained(seed: int) -> list[float]:
        stages, _ = tiny.train_both((1, 1), seed, tmp_path)
        return [float(step.generator_loss) for stage in stages.values() for step in stage.curve]

    first = trained(0)
    assert len(first) == 6
    assert trained(0) == first
    assert trained(1) != first


@pytest.mark.parametrize("package", ["sklearn.datasets", "rich.progress", "matplotlib"])
def test_without_an_extra_the_example_says_what_to_install(example, monkeypatch, capsys, package, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    assert example.main(["--folder", str(tmp_path / "unused")]) == 2
    assert "pip install 'perfvl[examples]'" in capsys.readouterr().err
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("arguments", [["--epochs", "0", "1"], ["--epochs", "1", "0"], ["--threads", "0"]])
def test_numbers_that_train_nothing_are_refused(example, capsys, arguments):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert "at least 1" in capsys.readouterr().err


def data(example: ModuleType):
    random = torch.Generator().manual_seed(0)
    captions = example.Captions(random)
    return captions, *example.load_digits(captions, random), random


def test_no_image_is_both_learned_from_and_judged_with(example):
    _, seen, held_out, _ = data(example)
    assert (len(seen.labels), len(held_out.labels)) == (1437, 360)
    both = torch.cat((seen.images, held_out.images)).flatten(1)
    apart = torch.cdist(both.double(), both.double()).fill_diagonal_(1.0)
    assert bool((apart > 0).all())


def test_captions_name_their_digit_and_differ(example):
    captions, seen, _, random = data(example)
    assert seen.captions.shape == (1437, example.CAPTIONS, example.TEXT)
    nearest = (seen.captions @ captions.meanings.T).argmax(-1)
    assert torch.equal(nearest, seen.labels[:, None].expand(-1, example.CAPTIONS))
    noise = captions.of(torch.zeros(5000, dtype=torch.int64), random) - captions.meanings[0]
    assert noise.std() / captions.meanings[0].square().mean().sqrt() == pytest.approx(0.4, abs=0.01)


def test_batches_pair_an_image_with_a_caption_of_its_own(example):
    _, seen, _, random = data(example)
    rows = torch.arange(20)
    images, texts = seen.batch(rows, 16, random)
    assert images.shape == (20, 3, 16, 16)
    own = (seen.captions[rows] == texts[:, None]).all(-1)
    assert own.any(1).all()
    assert len(own.nonzero()[:, 1].unique()) > 3
    enlarged = torch.nn.functional.interpolate(seen.images[rows].float(), (19, 19), mode="bilinear") / 127.5 - 1
    places = enlarged.unfold(2, 16, 1).unfold(3, 16, 1)  # [20, 3, 4, 4, 16, 16]
    distances = (places - images[:, :, None, None]).abs().amax((1, 4, 5))
    assert bool((distances.flatten(1).amin(1) < 1e-4).all())


def test_the_judge_knows_digits_from_each_other_and_sees_a_generator_that_draws_one(example):
    _, seen, held_out, random = data(example)
    judge = example.Judge(seen, held_out, 16, random)
    assert judge.real.accuracy > 0.95
    images, _ = held_out.batch(torch.arange(len(held_out.labels)), 16, random)
    wrong = judge(images, (held_out.labels + 1) % 10)
    assert wrong.accuracy < 0.05
    only = images[(held_out.labels == 3).nonzero()[:1, 0]].expand(100, -1, -1, -1)
    verdict = judge(only, torch.arange(100) % 10)
    assert verdict.accuracy == pytest.approx(0.1)
    assert verdict.digits.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert verdict.spread == pytest.approx(0, abs=1e-6)
