"""The Xception example runs: swapped networks agree with what they were, and the digits are learnt."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from swap_support import require
from torch import nn

import perfvl
from perfvl.models import Xception

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "xception_photos.py"


@pytest.fixture
def example() -> ModuleType:
    for package in ("sklearn", "PIL", "rich"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("xception_photos_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(example: ModuleType, monkeypatch: pytest.MonkeyPatch, is_timm: bool) -> Xception:
    model = Xception(10, width=0.125, middle_blocks=1)
    monkeypatch.setattr(example, "network", lambda: (model, is_timm))
    return model


def test_whole_example(example, monkeypatch, capsys):
    small(example, monkeypatch, False)
    threads = torch.get_num_threads()
    assert example.main(["--quick"]) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    for name in ("before", "after"):
        line = next(line for line in output.splitlines() if line.startswith(name))
        assert float(line.split()[1]) > 0
        assert float(line.split()[-2]) > 0
    assert "logits differ by" in output
    assert "accuracy on 360 others" in output


def test_before_is_plain_pytorch_where_timm_is_missing(example, monkeypatch):
    model, backends = small(example, monkeypatch, False), []
    chosen = perfvl.backends._forced
    model.register_forward_pre_hook(lambda *arguments: backends.append(perfvl.backends._forced))
    example.compare([torch.randint(256, (96, 120, 3))], 2, 64, 1)
    assert backends[1:] == ["reference"] * 3 + [chosen] * 3  # the first adapted batch norm


def test_timms_network_agrees_after_swap(example, capsys):
    require("timm")
    assert example.network()[1]
    assert example.compare([torch.randint(256, (96, 120, 3))], 2, 71, 1) < example.TOLERANCE
    output = capsys.readouterr().out
    assert "block12.rep" in output
    assert "0 depthwise convolutions left" in output


def test_logits_that_differ_fail_the_example(example, monkeypatch):
    model = small(example, monkeypatch, True)

    def wrong_swap(given: nn.Module) -> str:
        assert given is model
        with torch.no_grad():
            given.fc.weight.mul_(1.01)
        return ""

    monkeypatch.setattr(perfvl, "swap", wrong_swap)
    monkeypatch.setattr(example, "train", lambda *arguments: 1.0)
    assert example.main(["--quick"]) == 1


def test_digits_not_learnt_fail_the_example(example, monkeypatch):
    small(example, monkeypatch, True)
    monkeypatch.setattr(example, "train", lambda *arguments: 0.9)
    assert example.main(["--quick"]) == 1


def test_crops_are_from_the_photographs(example):
    column = torch.arange(40).expand(30, 40)
    row = torch.arange(100, 130)[:, None].expand(30, 40)
    crops = example.crops_of([torch.stack((row, column, column), 2)], 5, 16)
    assert crops.shape == (5, 3, 16, 16)
    pixels = (crops + 1) * 127.5
    assert torch.allclose(pixels[:, 0, 1:] - pixels[:, 0, :-1], torch.tensor(1.0), atol=1e-3)
    assert torch.allclose(pixels[:, 1, :, 1:] - pixels[:, 1, :, :-1], torch.tensor(1.0), atol=1e-3)
    assert len(pixels[:, 0, 0, 0].unique()) > 1


def test_statistics_are_those_of_the_crops(example, monkeypatch):
    model, images = small(example, monkeypatch, True), torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        expected = model.train()(images)
        example.adapt_statistics(model, images)
        assert not model.training
        assert (model(images) - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("package", ["sklearn.datasets", "rich"])
def test_without_an_extra_the_example_says_what_to_install(example, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert example.main([]) == 2
    assert "pip install 'perfvl[examples" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [None, RuntimeError("operator torchvision::nms does not exist")])
def test_without_timm_the_network_is_perfvls(example, monkeypatch, capsys, failure):
    if failure is None:
        monkeypatch.setitem(sys.modules, "timm", None)
    else:

        class Broken:
            def find_spec(self, name: str, *arguments: object) -> None:
                if name == "timm":
                    raise failure

        monkeypatch.delitem(sys.modules, "timm", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with torch.device("meta"):
        model, is_timm = example.network()
    assert isinstance(model, Xception)
    assert not is_timm
    assert "timm cannot be imported" in capsys.readouterr().out


def test_numbers_that_run_nothing_are_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])
    assert "at least 1" in capsys.readouterr().err
