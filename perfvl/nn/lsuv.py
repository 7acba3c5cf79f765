"""Layer-sequential unit-variance initialisation in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from perfvl.nn.lsuv_layers import OP, Layer, Visit, arguments, at_rest, find_layers, unwrapped, watched
from perfvl.nn.lsuv_numbers import moments, moments_together, orthonormal_
from perfvl.nn.lsuv_report import Advance, LSUVLayer, LSUVReport, progress_bar
from perfvl.ops._library import bad_type, bad_value


class Rules(NamedTuple):
    """When a layer is scaled, how often at most, and what else happens to it."""

    tolerance: float
    max_iterations: int
    # As the authors' PyTorch code has it: the deviation is compared with 1, not the variance; biases start from 0 and
    # take out the mean whenever the weight is scaled; layers go in order of registration; all is in evaluation mode.
    as_pytorch: bool

    def outside(self, variance: Tensor) -> Tensor:
        return ((variance.sqrt() if self.as_pytorch else variance) - 1).abs() > self.tolerance


RULES = {
    "paper": Rules(0.02, 21, as_pytorch=False),
    "reference": Rules(0.1, 11, as_pytorch=True),
}


def lsuv_init_(
    model: nn.Module,
    batch: Any,
    *,
    mode: Literal["paper", "reference"] = "paper",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    orthonormal: bool = True,
    layers: Sequence[str] | None = None,
    progress: bool = False,
) -> LSUVReport:
    r"""Initialises `model` in place so that every layer's output on `batch` has variance 1: :math:`W \leftarrow W /
    \operatorname{std}(W * x + b)`, layer after layer in the order in which the forward pass runs them.

    Convolutions, transposed convolutions and linear layers, those inside perfvl's own modules too. The variance is that
    of the whole output, before any activation, in float32 at least. Weights start from orthonormal rows or columns.

    The published procedure runs the model two times or more for each layer. Here one pass does: when a layer runs,
    those before it are done, so that its own output is scaled with its weight and goes on. Where a bias is not 0, or a
    class has a forward of its own, this layer alone runs again until its variance is 1. Where a layer runs twice, or
    shares its weight, the model is run as published; the variance is then that of all its outputs together.

    While the model runs, dropout (and whatever has neither children nor buffers) is in evaluation mode. Batch norms are
    not, if they train: they use the batch's statistics, as training will. Modes, buffers, devices, dtypes and gradients
    are afterwards what they were. Biases stay as they are; the study's start from 0.

    Args:
        model: any module, before it is wrapped in DistributedDataParallel: wrapping gives all processes the weights of
            the first. A compiled model runs eagerly.
        batch: what `model` is called with: a tensor, a tuple or list of arguments, or a dict of keyword arguments,
            on the model's device. Its statistics matter: images of mean 0 and variance 1, as many as train at once.
        mode: "paper" (arXiv:1511.06422 and its Caffe code), or "reference" for the rules of the authors' PyTorch code:
            the standard deviation is compared, biases start from 0 with `orthonormal` and, whenever a weight is
            scaled, take out the mean; layers go in order of registration, and everything is in evaluation mode.
        tolerance: scaled is what differs by more from 1: 0.02 of the variance, in "reference" 0.1 of the deviation.
        max_iterations: scalings of one layer at most: 21, in "reference" 11.
        orthonormal: False to keep the weights' directions, as for weights that were trained.
        layers: names of layers, or of modules with layers in them, as in `model.named_modules()`; None for all.
        progress: shows a bar on stderr, with rich where it is installed.

    Returns:
        What happened to each layer, and why some were left alone: ``print(lsuv_init_(model, batch))``.
        ``report.plot("lsuv.png")`` draws magnitudes of activations and gradients.

    Raises:
        TypeError: a `model`, `batch` or `layers` of another type; weights for a batch.
        ValueError: a batch whose numbers are all equal; a layer whose output has variance 0 or is not finite; a model
            without layers; a name in `layers` that is none, or of a layer that the pass does not run. The model is then
            what it was, as it is where its forward raises.

    Cost: one forward pass, two reads of every output, a copy of the weights, and for the orthonormal start
    :math:`2 n^2 (m - n/3)` FLOPs for each m x n weight, m >= n. A GPU is waited for before and after the pass, and once
    for each layer and scaling where biases are not 0.

    Source: Mishkin and Matas, All you need is a good init, arXiv:1511.06422, algorithm 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> report = lsuv_init_(model, torch.randn(16, 3, 8, 8))
        >>> [(layer.name, round(layer.variance_after, 1)) for layer in report.layers]
        [('0', 1.0), ('3', 1.0)]
    """
    if mode not in RULES:
        bad_value(OP, "mode", repr(mode), '"paper" or "reference"')
    rules = RULES[mode]
    if tolerance is not None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
            bad_type(OP, "tolerance", type(tolerance).__name__, "a float or None")
        if not 0 < tolerance < math.inf:
            bad_value(OP, "tolerance", tolerance, "a finite number above 0")
        rules = rules._replace(tolerance=tolerance)
    if max_iterations is not None:
        if isinstance(max_iterations, bool) or not isinstance(max_iterations, int):
            bad_type(OP, "max_iterations", type(max_iterations).__name__, "an int or None")
        if max_iterations < 1:
            bad_value(OP, "max_iterations", max_iterations, "at least 1")
        rules = rules._replace(max_iterations=max_iterations)
    model = unwrapped(model)
    found, left = find_layers(model, layers)
    args, kwargs, tensors = arguments(batch)
    devices = {layer.weight.device for layer in found}
    elsewhere = [t.device for t in tensors if t.is_floating_point() and t.device not in devices]
    if elsewhere and len(devices) == 1:
        bad_value(OP, "batch", f"device {elsewhere[0]}", f"the model's device {next(iter(devices))}")

    def run(modules: Sequence[nn.Module], visit: Visit) -> None:
        with watched(model, modules, visit):
            model(*args, **kwargs)

    with torch.no_grad(), at_rest(model, tensors[0].device, evaluating=rules.as_pytorch):
        if not any(t.numel() and bool((t != t.flatten()[0]).any()) for t in tensors):
            bad_value(OP, "batch", "numbers that are all equal (variance 0)", "numbers that vary")
        start = _Start(found, orthonormal, rules.as_pytorch)
        try:
            with progress_bar(progress, len(found)) as advance:
                one_pass = _OnePass(found, rules, start, advance)
                run(one_pass.modules, one_pass.visit)
                missed = [layer.name for layer in found if layer not in one_pass.order]
                if missed and layers is not None:
                    bad_value(OP, "layers", repr(missed[0]), "layers that the forward pass calls")
                order = one_pass.order
                if rules.as_pytorch:
                    order = [layer for layer in found if layer in order]
                if one_pass.repeated or order != one_pass.order:
                    start.restore()
                    done = _as_published(run, order, rules, start, advance)
                else:
                    done = one_pass.finish()
        except BaseException:
            start.restore()
            raise
    skipped = left + [(name, "the forward pass does not call it") for name in missed] + done.refused
    return LSUVReport(done.results, skipped, model, args, kwargs)


class _Start:
    """Brings layers to where the procedure starts from, and everything back to what it was."""

    def __init__(self, layers: list[Layer], orthonormal: bool, zero_biases: bool) -> None:
        self._orthonormal, self._zero_biases = orthonormal, orthonormal and zero_biases
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        flags = [bias.any().to(layers[0].weight.device) for layer in layers for bias in layer.biases]
        some = iter(torch.stack(flags).tolist() if flags else [])
        self._biased = {id(bias): next(some) for layer in layers for bias in layer.biases}

    def prepare(self, layer: Layer) -> None:
        for tensor in (layer.weight, *layer.biases):
            self._before.setdefault(id(tensor), (tensor, tensor.clone()))
        if self._orthonormal:
            orthonormal_(layer.weight)
        if self._zero_biases:
            for bias in layer.biases:
                bias.zero_()

    def is_proportional(self, layer: Layer) -> bool:
        """Whether the output scales as the weight does, without a bias and without rounding to half precision."""
        biased = not self._zero_biases and any(self._biased[id(bias)] for bias in layer.biases)
        return layer.plain and not biased and layer.weight.dtype in (torch.float32, torch.float64)

    def restore(self, layer: Layer | None = None) -> None:
        """One layer, or all."""
        chosen = None if layer is None else {id(tensor) for tensor in (layer.weight, *layer.biases)}
        for key, (tensor, value) in self._before.items():
            if chosen is None or key in chosen:
                tensor.copy_(value)


def _check(layer: Layer, variance: float) -> None:
    if not 0 < variance < math.inf:
        got = f"outputs of variance {variance:g} in layer {layer.name!r}"
        bad_value(OP, "batch", got, "a batch that every layer makes numbers of that vary")


def _fit(layer: Layer, measure: Callable[[], tuple[Tensor, Tensor]], rules: Rules, start: _Start) -> LSUVLayer | None:
    """Scales until `measure`, the variance and mean of the output, says enough; None where that changes nothing."""
    variance, mean = measure()
    before, scale, iterations = variance.item(), 1.0, 0
    while bool(rules.outside(variance)) and iterations < rules.max_iterations:
        _check(layer, variance.item())
        last, step = variance, variance.rsqrt()
        layer.weight.mul_(step)
        if rules.as_pytorch:
            for bias in layer.biases:
                bias.sub_(mean * step)
        scale *= step.item()
        iterations += 1
        variance, mean = measure()
        # Scaling would have changed it by the tolerance at least. So are convolutions that standardise their weight.
        if not layer.plain and bool((variance / last - 1).abs() < 0.1 * rules.tolerance):
            start.restore(layer)
            return None
    _check(layer, variance.item())
    return LSUVLayer(layer.name, before, variance.item(), scale, iterations)


class _Done:
    """What happened to the layers so far."""

    def __init__(self) -> None:
        self.results: list[LSUVLayer] = []
        self.refused: list[tuple[str, str]] = []

    def add(self, layer: Layer, fit: LSUVLayer | None) -> None:
        if fit is None:
            self.refused.append((layer.name, "its output does not follow the scale of its weight"))
        else:
            self.results.append(fit)


class _OnePass:
    """What every layer does to itself while the model runs once."""

    def __init__(self, layers: list[Layer], rules: Rules, start: _Start, advance: Advance) -> None:
        self._layer_of = {id(module): layer for layer in layers for module in layer.modules}
        self._rules, self._start, self._advance = rules, start, advance
        self._unread: list[tuple[Layer, Tensor, Tensor]] = []
        self._done = _Done()
        self.modules = [module for layer in layers for module in layer.modules]
        self.order: list[Layer] = []
        self.repeated = False

    def visit(self, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        layer = self._layer_of.get(id(module))
        if layer is None:
            return compute()
        self.repeated |= layer.shared or layer in self.order
        if layer not in self.order:
            self.order.append(layer)
        if self.repeated:  # the rest of the pass is to learn the order
            return compute()
        self._start.prepare(layer)
        if self._start.is_proportional(layer):
            output = self._scale_once(layer, compute())
        else:
            output = self._scale_until(layer, compute)
        self._advance(len(self.order), layer.name)
        return output

    def _scale_once(self, layer: Layer, output: Tensor) -> Tensor:
        """Nothing here waits for a GPU."""
        variance, mean = moments(output)
        outside = self._rules.outside(variance)
        scale = torch.where(outside, variance.rsqrt(), 1.0)
        layer.weight.mul_(scale)
        output.mul_(scale)
        if self._rules.as_pytorch and layer.biases:
            shift = torch.where(outside, -mean * scale, 0.0)
            output.add_(shift)
            for bias in layer.biases:
                bias.add_(shift)
        self._unread.append((layer, variance, scale))
        return output

    def _scale_until(self, layer: Layer, compute: Callable[[], Tensor]) -> Tensor:
        self._read()
        output: list[Tensor] = []

        def measure() -> tuple[Tensor, Tensor]:
            output[:] = [compute()]
            return moments(output[0])

        fit = _fit(layer, measure, self._rules, self._start)
        self._done.add(layer, fit)
        return compute() if fit is None else output[0]

    def _read(self) -> None:
        if not self._unread:
            return
        device = self._unread[0][1].device
        rows = [torch.stack((variance, scale)).float().to(device) for _, variance, scale in self._unread]
        for (layer, *_), (variance, scale) in zip(self._unread, torch.stack(rows).tolist(), strict=True):
            _check(layer, variance)
            self._done.add(layer, LSUVLayer(layer.name, variance, variance * scale**2, scale, int(scale != 1)))
        self._unread.clear()

    def finish(self) -> _Done:
        self._read()
        return self._done


def _as_published(
    run: Callable[[Sequence[nn.Module], Visit], None], order: list[Layer], rules: Rules, start: _Start, advance: Advance
) -> _Done:
    """The whole model, again and again for each layer in turn."""
    for layer in order:
        start.prepare(layer)
    done = _Done()
    for i, layer in enumerate(order):

        def measure(layer: Layer = layer) -> tuple[Tensor, Tensor]:
            seen: list[tuple[int, Tensor, Tensor]] = []

            def visit(module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
                output = compute()
                if module in layer.modules:
                    seen.append((output.numel(), *moments(output)))
                return output

            run(layer.modules, visit)
            return moments_together(seen)

        done.add(layer, _fit(layer, measure, rules, start))
        advance(i + 1, layer.name)
    return done
