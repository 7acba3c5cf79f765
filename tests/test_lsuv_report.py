"""The report of LSUV: table, magnitudes, charts, progress."""

from __future__ import annotations

import sys

import pytest
import torch
from lsuv_support import images, small_net
from torch import Tensor, nn

from perfvl.nn import SeparableConv2d, UpsampleConv2d, lsuv_init_
from perfvl.nn.lsuv_layers import LAYERS


class TestReport:
    def test_its_table(self):
        report = lsuv_init_(small_net(), images())
        lines = str(report).splitlines()
        assert lines[0] == "perfvl.nn.lsuv_init_: 4 layers initialised, 0 left"
        assert lines[1].split() == ["layer", "variance", "before", "after", "scale", "iterations"]
        assert [line.split()[0] for line in lines[2:]] == ["0", "2", "6", "8"]
        assert len({len(line) for line in lines[1:]}) == 1
        assert repr(report) == "<LSUVReport: 4 layers, 0 left>"
        assert "(model)" in str(lsuv_init_(nn.Linear(4, 4), torch.randn(8, 4)))

    def test_scale_and_variances_belong_together(self):
        for row in lsuv_init_(small_net(), 3 * images()).layers:
            assert row.variance_before * row.scale**2 == pytest.approx(row.variance_after, rel=1e-5)

    def test_magnitudes_are_those_of_hooks_and_autograd(self):
        model, batch = small_net(), images()
        report = lsuv_init_(model, batch)
        model[0].weight.requires_grad_(False)
        outputs: list[Tensor] = []
        x = batch
        for module in model:
            module = nn.ReLU() if isinstance(module, nn.ReLU) else module
            x = module(x)
            if isinstance(module, LAYERS):
                x.requires_grad_() if x.is_leaf else x.retain_grad()
                outputs.append(x)
        x.square().mean().backward()
        found = report.magnitudes(lambda output: output.square().mean())
        assert [row.name for row in found] == ["0", "2", "6", "8"]
        for row, output in zip(found, outputs, strict=True):
            assert row.activation == pytest.approx(output.square().mean().sqrt().item(), rel=1e-4)
            assert row.gradient == pytest.approx(output.grad.square().mean().sqrt().item(), rel=1e-4)
        assert model[0].weight.grad is None

    def test_magnitudes_of_repeated_layers_and_of_perfvls_modules(self):
        shared = nn.Conv2d(3, 3, 1, bias=False)
        model = nn.Sequential(shared, nn.ReLU(), shared, SeparableConv2d(3, 2), UpsampleConv2d(2, 2))
        found = lsuv_init_(model, images()).magnitudes()
        assert [row.name for row in found] == ["0", "3.conv1", "3.pointwise", "4"]
        assert found[-1].gradient == pytest.approx(1, abs=0.05)
        assert all(row.gradient > 0 for row in found)

    def test_without_a_loss_the_model_returns_a_tensor(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                return self.fc(x), x

        report = lsuv_init_(Pair(), torch.randn(8, 4))
        with pytest.raises(TypeError, match="`loss` got None, expected a function of what the model returns, a tuple"):
            report.magnitudes()
        with pytest.raises(TypeError, match="`loss` got a tensor of 32 numbers, expected"):
            report.magnitudes(lambda output: output[0])
        assert report.magnitudes(lambda output: output[0].sum())[0].gradient == 1

    @pytest.mark.parametrize("suffix", ["png", "svg"])
    def test_its_charts(self, tmp_path, suffix):
        pytest.importorskip("matplotlib")
        report = lsuv_init_(small_net(), images())
        file = tmp_path / f"lsuv.{suffix}"
        report.plot(file)
        assert file.stat().st_size > 3000
        if suffix == "svg":
            assert file.read_text().count("<path") > 8

    @pytest.mark.parametrize(("factor", "scale"), [(1.0, "linear"), (1e-3, "log")])
    def test_charts_start_at_zero_where_all_bars_can_be_seen(self, factor, scale, tmp_path, monkeypatch):
        figure = pytest.importorskip("matplotlib.figure").Figure
        drawn = []
        monkeypatch.setattr(figure, "savefig", lambda self, *arguments, **options: drawn.append(self))
        model = small_net()
        report = lsuv_init_(model, images())
        with torch.no_grad():
            model[-1].weight.mul_(factor)
        report.plot(tmp_path / "lsuv.png")
        axes = drawn[0].axes[0]
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == pytest.approx([row.activation for row in report.magnitudes()])
        assert axes.get_yscale() == scale
        assert axes.get_ylim()[0] == pytest.approx(0 if scale == "linear" else min(heights) / 3)

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(RuntimeError, match=r"needs matplotlib: pip install 'perfvl\[examples\]'"):
            lsuv_init_(small_net(), images()).plot("nowhere.png")

    @pytest.mark.parametrize("installed", [True, False])
    def test_progress_on_stderr(self, installed, monkeypatch, capsys):
        if installed:
            pytest.importorskip("rich")
        else:
            for name in ("rich", "rich.console", "rich.progress"):
                monkeypatch.setitem(sys.modules, name, None)
        lsuv_init_(small_net(), images(), progress=True)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("100%" in err) if installed else (err.splitlines()[-1] == "lsuv_init_ [4/4] 8")
        lsuv_init_(small_net(), images())
        assert capsys.readouterr() == ("", "")
