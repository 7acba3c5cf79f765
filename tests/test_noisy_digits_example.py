"""The noisy-digits example runs, selecting rows helps in it, and its groups are what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "noisy_digits.py"


@pytest.fixture
def example() -> ModuleType:
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("noisy_digits_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(output: str, title: str) -> dict[str, list[float]]:
    """The means in one of the tables."""
    lines = output[output.index(title) :].splitlines()
    names = ("Standard", "Decoupling", "Co-teaching", "Co-teaching+", "JoCoR")
    rows = {}
    for name, line in zip(names, lines[1:], strict=False):
        assert line.startswith(name)
        words = line.split()
        rows[name] = [float(words[i - 1]) for i, word in enumerate(words) if word == "+-"]
    return rows


def test_selecting_rows_keeps_wrong_labels_out(example, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert example.main(["--quick", "--plot", str(tmp_path / "curves.png")]) == 0, "Standard was not the worst"
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    accuracy, precision = rows_of(output, "accuracy, last"), rows_of(output, "label precision")
    for name in ("Co-teaching", "JoCoR"):
        assert accuracy[name][1] > accuracy["Standard"][1]
        for noise, share in ((0, 80), (1, 50)):
            assert precision["Standard"][noise] == pytest.approx(share, abs=3)
            assert precision[name][noise] > share + 10
        assert precision[name][2] > precision["Standard"][2]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_epoch_and_one_seed_are_enough_to_run(example, tmp_path, capsys):
    assert example.main(["--epochs", "1", "--seeds", "1", "--plot", str(tmp_path / "curves.png")]) in (0, 1)
    output = capsys.readouterr().out
    assert all(len(row) == 3 for row in rows_of(output, "accuracy, last").values())
    assert "nan" not in output


@pytest.mark.parametrize("package", ["sklearn.datasets", "rich.progress", "matplotlib"])
def test_without_an_extra_the_example_says_what_to_install(example, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert example.main([]) == 2
    assert "pip install 'perfvl[examples" in capsys.readouterr().err


def test_numbers_that_train_nothing_are_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_every_group_has_its_own_split_and_its_noise(example):
    images, labels = torch.arange(4000.0).unsqueeze(1).expand(-1, 64), torch.arange(4000) % 10
    data = example.corrupted(images, labels, seeds=2)
    assert data.images.shape == (6, 3200, 64)
    assert data.test_images.shape == (6, 800, 64)
    torch.testing.assert_close((~data.clean).double().mean(1), data.rates.double(), rtol=0, atol=0.03)
    assert data.rates.tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.45, 0.45])
    assert not torch.equal(data.test_labels[0], data.test_labels[1])
    torch.testing.assert_close(data.images.mean((1, 2)), torch.zeros(6), rtol=0, atol=1e-4)
    for group in range(6):
        # The images tell which they are, up to the group's standardisation: none is in both parts.
        both = torch.cat((data.images[group, :, 0], data.test_images[group, :, 0]))
        assert len(both.unique()) == 4000
        right = both.argsort().argsort() % 10
        assert torch.equal(data.labels[group] == right[:3200], data.clean[group])
        assert torch.equal(data.test_labels[group], right[3200:])


def test_a_group_of_the_batched_network_is_a_network(example):
    network, images = example.BatchedMLP(3, 7, 5, 4), torch.randn(3, 6, 7)
    together = network(images)
    for group in range(3):
        first, second = torch.nn.Linear(7, 5), torch.nn.Linear(5, 4)
        for i, layer in enumerate((first, second)):
            layer.weight.data, layer.bias.data = network.weights[i][group].T, network.biases[i][group, 0]
        torch.testing.assert_close(together[group], second(first(images[group]).relu()))


def test_groups_are_independent(example):
    data = example.corrupted(torch.randn(200, 64), torch.randint(10, (200,)), seeds=1)
    other = data._replace(images=data.images.clone(), labels=data.labels.clone())
    other.images[1].neg_()
    other.labels[1] = (other.labels[1] + 1) % 10
    for method in example.METHODS.values():
        first, _ = example.train(method, data, range(1, 3), 2)
        second, _ = example.train(method, other, range(1, 3), 2)
        assert torch.equal(first[:, [0, 2]], second[:, [0, 2]])
