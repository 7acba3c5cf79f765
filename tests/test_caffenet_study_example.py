"""The CaffeNet study trains, prints the published accuracies beside its own, and says when nothing was learned."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from perfvl.models.caffenet import CaffeNet128

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "caffenet_study.py"
PUBLISHED = json.loads((Path(__file__).parent / "data" / "caffenet.json").read_text())["published"]


@pytest.fixture
def example() -> ModuleType:
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("caffenet_study_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows_of(output: str) -> dict[str, list[str]]:
    """Name -> accuracy, range, published accuracy and seconds, as printed."""
    lines = output[output.index("ImageNet top-1") :].splitlines()[1:]
    rows = {line[:44].strip(): line[44:].replace(" - ", "-").split() for line in lines}
    return {name: row for name, row in rows.items() if len(row) == 4}


def test_a_quick_study_learns_from_lsuv_and_not_from_the_gaussian_start(example, tmp_path, capsys):
    assert example.main(["--quick", "--folder", str(tmp_path / "new" / "folder")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 6
    base = next(row for name, row in rows.items() if name.startswith("base"))
    start = next(row for name, row in rows.items() if name.startswith("start"))
    assert float(base[0]) >= 80
    assert float(start[0]) < 40
    assert (tmp_path / "new" / "folder" / "accuracies.png").stat().st_size > 10_000


def test_what_is_printed_as_published_is(example):
    trials = example.trials()
    assert [sum(trial.group == group for trial in trials) for group in ("activation", "pooling")] == [7, 3]
    assert {trial.schedule for trial in trials} == set(example.SCHEDULES)
    for trial in trials:
        if trial.published is not None:
            group, name = trial.published.split("/")
            assert trial.top1 == pytest.approx(100 * PUBLISHED[group][name]["accuracy"])


def test_every_network_of_the_study_takes_the_digits(example):
    seen, _ = example.load_digits(torch.Generator().manual_seed(0))
    assert seen.images.shape == (example.SEEN, 1, 32, 32)
    for trial in example.trials():
        model = CaffeNet128(**{**example.SMALL, **trial.changes})
        assert model(seen.images[:2]).shape == (2, 10)


def test_a_study_that_learned_nothing_fails(example, tmp_path, capsys):
    assert example.main(["--quick", "--epochs", "1", "--folder", str(tmp_path)]) == 1
    assert "base" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--epochs", "--seeds"])
def test_bad_options_are_refused(example, option, capsys):
    with pytest.raises(SystemExit):
        example.main([option, "0"])
    assert "at least 1" in capsys.readouterr().err


def test_missing_packages_are_named(example, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert example.main([]) == 2
    assert "perfvl[examples]" in capsys.readouterr().err
