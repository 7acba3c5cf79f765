"""What LSUV did to a model, and the magnitudes of its activations and gradients."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perfvl.nn.lsuv_layers import at_rest, find_layers, watched
from perfvl.ops._library import bad_type

Advance = Callable[[int, str], None]
"""Told how many layers are done, and the name of the last."""


class LSUVLayer(NamedTuple):
    """One layer: variance of its output before and after, by what its weight was multiplied, and in how many steps."""

    name: str
    variance_before: float
    variance_after: float
    scale: float
    iterations: int


class Magnitude(NamedTuple):
    """Root mean square of a layer's output, and of the gradient with respect to it."""

    name: str
    activation: float
    gradient: float


class LSUVReport:
    """What :func:`perfvl.nn.lsuv_init_` did. Its length is the number of layers initialised; `str()` is a table.

    It holds the model and the batch, for :meth:`magnitudes` and :meth:`plot`.

    Attributes:
        layers: one :class:`LSUVLayer` for each layer, in the order in which they were initialised.
        skipped: (name of the layer, why it was left alone).
    """

    def __init__(
        self,
        layers: list[LSUVLayer],
        skipped: list[tuple[str, str]],
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.layers, self.skipped = layers, skipped
        self._model, self._args, self._kwargs = model, args, kwargs

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        rows = [("layer", "variance before", "after", "scale", "iterations")]
        for layer in self.layers:
            numbers = f"{layer.variance_before:.4g}", f"{layer.variance_after:.4f}", f"{layer.scale:.4g}"
            rows.append((layer.name or "(model)", *numbers, str(layer.iterations)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [f"perfvl.nn.lsuv_init_: {len(self.layers)} layers initialised, {len(self.skipped)} left"]
        for name, *cells in rows:
            lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
        return "\n".join(lines + [f"left  {name}: {why}" for name, why in self.skipped])

    def __repr__(self) -> str:
        return f"<LSUVReport: {len(self.layers)} layers, {len(self.skipped)} left>"

    def magnitudes(self, loss: Callable[[Any], Tensor] | None = None) -> list[Magnitude]:
        """Magnitudes in the model as it is now, run on the batch it was initialised with and as it was run then.

        Args:
            loss: a scalar of what the model returns. By default its product with fixed normal noise, so that the
                gradient of the output has magnitude 1; the model then has to return a tensor.

        Raises:
            TypeError: a loss that is no scalar tensor; without a loss, a model that returns no tensor.

        Cost: one forward and one backward pass; a copy of every output.
        """
        model = self._model
        wanted = {row.name for row in self.layers}
        layers = [layer for layer in find_layers(model, None)[0] if layer.name in wanted]
        names = {id(module): layer.name for layer in layers for module in layer.modules}
        outputs: dict[str, list[Tensor]] = {}

        def visit(module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
            output = compute()
            if id(module) not in names:
                return output
            if not output.requires_grad:  # frozen layers
                output = output.detach().requires_grad_()
            outputs.setdefault(names[id(module)], []).append(output)
            return output.clone()  # what follows may write over it

        device = layers[0].weight.device
        with torch.enable_grad(), at_rest(model, device):
            with watched(model, [module for layer in layers for module in layer.modules], visit):
                result = model(*self._args, **self._kwargs)
            value = _noisy_sum(result) if loss is None else loss(result)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"a tensor of {value.numel()} numbers" if isinstance(value, Tensor) else type(value).__name__
                bad_type("magnitudes", "loss", got, "a function that returns a scalar tensor")
            flat = [output for calls in outputs.values() for output in calls]
            grads = iter(torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True))
        return [
            Magnitude(row.name, _rms(outputs[row.name]), _rms([next(grads) for _ in outputs[row.name]]))
            for row in sorted(self.layers, key=lambda row: list(outputs).index(row.name))
        ]

    def plot(self, path: str | Path, *, loss: Callable[[Any], Tensor] | None = None) -> None:
        """Draws :meth:`magnitudes` as two bar charts, layers from the first to the last.

        Args:
            path: file to write, in the format that its suffix says.
            loss: as :meth:`magnitudes` takes it.

        Raises:
            RuntimeError: matplotlib is not installed.
        """
        try:
            import matplotlib.figure
        except ImportError as error:
            raise RuntimeError("LSUVReport.plot needs matplotlib: pip install 'perfvl[examples]'") from error
        rows = self.magnitudes(loss)
        figure = matplotlib.figure.Figure(figsize=(max(6.0, 0.3 * len(rows)), 6.0), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        positions = range(len(rows))
        for axes, values, title in (
            (panels[0], [row.activation for row in rows], "Output before the activation, root mean square"),
            (panels[1], [row.gradient for row in rows], "Gradient of the loss with respect to it"),
        ):
            axes.bar(positions, values, color="#3b6fb6")
            # Bars have no zero on a logarithmic axis, so it is for what a linear one would hide.
            small, large = min(filter(None, values), default=1.0), max(values)
            wide = large > 30 * small
            axes.set(title=title, yscale="log" if wide else "linear", ylim=(small / 3 if wide else 0.0, None))
            axes.grid(axis="y", alpha=0.3)
        panels[1].set_xticks(positions, [row.name or "(model)" for row in rows], rotation=90)
        figure.savefig(path, dpi=150)


def _noisy_sum(result: object) -> Tensor:
    if not isinstance(result, Tensor):
        bad_type("magnitudes", "loss", "None", f"a function of what the model returns, a {type(result).__name__}")
    noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
    return (result * noise.to(result)).sum()


def _rms(parts: list[Tensor]) -> float:
    squares = sum(part.detach().double().square().sum().item() for part in parts)
    return (squares / max(1, sum(part.numel() for part in parts))) ** 0.5


@contextlib.contextmanager
def progress_bar(shown: bool, total: int) -> Iterator[Advance]:
    """On stderr: with rich where it is installed, a line for each layer where it is not."""
    if not shown:
        yield lambda done, name: None
        return
    try:
        import rich.console
        import rich.progress
    except ImportError:
        yield lambda done, name: print(f"lsuv_init_ [{done}/{total}] {name}", file=sys.stderr, flush=True)
        return
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("lsuv_init_", total=total)
        yield lambda done, name: bar.update(task, completed=done, description=f"lsuv_init_ {name}")
