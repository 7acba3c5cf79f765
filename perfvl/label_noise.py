"""Label noise to train against, and what a selection of rows made of it.

Noise is drawn once, before training, on the CPU with a generator of its own: a seed gives the same labels on every
device, and the global random state stays as it is. The metrics run where their tensors are and never synchronise.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from perfvl.ops._library import bad_type, bad_value
from perfvl.schedules import _check_count, _check_number

ASYMMETRIC = {
    "asymmetric_mnist": (10, {7: 1, 2: 7, 3: 8, 5: 6, 6: 5}),
    "asymmetric_cifar10": (10, {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}),
    # Groups of five indices, as in the released code: not CIFAR-100's superclasses.
    "asymmetric_cifar100": (100, {i: i // 5 * 5 + (i + 1) % 5 for i in range(100)}),
}
KINDS = ("symmetric", "pairflip", *ASYMMETRIC)


class NoisyLabels(NamedTuple):
    """Labels after noise.

    Attributes:
        labels: int64 [n], on the device of the labels that went in.
        clean: bool [n], True where the label is unchanged.
        rate: the share of changed labels, NaN for n = 0.
    """

    labels: Tensor
    clean: Tensor
    rate: float


def transition_matrix(kind: str, num_classes: int, rate: float) -> Tensor:
    r"""The probabilities :math:`P_{ij} = P(\tilde y = j \mid y = i)`, with :math:`1 - \varepsilon` on the diagonal for
    every class that flips.

    As in the experiments of Co-teaching (arXiv:1804.06872) and JoCoR (arXiv:2003.02752), released code:

    - "symmetric": :math:`P_{ij} = \varepsilon / (K - 1)` off the diagonal.
    - "pairflip": :math:`P_{i,\,i+1 \bmod K} = \varepsilon`.
    - "asymmetric_mnist": 7 to 1, 2 to 7, 3 to 8, 5 to 6 and back. Needs K = 10.
    - "asymmetric_cifar10": 9 to 1, 2 to 0, 4 to 7, 3 to 5 and back. Needs K = 10.
    - "asymmetric_cifar100": to the next index inside groups of five indices, cyclic. Needs K = 100.

    Args:
        kind: one of the above.
        num_classes: K, an int of at least 2.
        rate: :math:`\varepsilon` in [0, 1], per class that flips: under "asymmetric_mnist" and "asymmetric_cifar10"
            half of the classes do not.

    Returns: float64 [K, K], rows sum to 1.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Example:
        >>> transition_matrix("pairflip", 3, 0.25)[0].tolist()
        [0.75, 0.25, 0.0]
    """
    name = "transition_matrix"
    if not isinstance(kind, str):
        bad_type(name, "kind", type(kind).__name__, "a str")
    if kind not in KINDS:
        bad_value(name, "kind", repr(kind), f"one of {', '.join(KINDS)}")
    _check_count(name, "num_classes", num_classes, 2)
    _check_number(name, "rate", rate, 0.0, 1.0)
    if kind == "symmetric":
        matrix = torch.full((num_classes, num_classes), rate / (num_classes - 1), dtype=torch.float64)
        return matrix.fill_diagonal_(1.0 - rate)
    if kind == "pairflip":
        flips = {i: (i + 1) % num_classes for i in range(num_classes)}
    else:
        classes, flips = ASYMMETRIC[kind]
        if num_classes != classes:
            bad_value(name, "num_classes", num_classes, f"{classes} for {kind!r}")
    matrix = torch.eye(num_classes, dtype=torch.float64)
    for label, other in flips.items():
        matrix[label, label] = 1.0 - rate
        matrix[label, other] = rate
    return matrix


def add_label_noise(
    labels: Tensor,
    kind: str | Tensor,
    rate: float | None = None,
    *,
    num_classes: int,
    backend: Literal["vectorized", "legacy"] = "vectorized",
    seed: int = 0,
    unbiased: bool = True,
) -> NoisyLabels:
    r"""Draws every label anew from its row of a transition matrix: :math:`\tilde y_i \sim P_{y_i}`.

    Args:
        labels: int64 [n] in [0, K), on any device.
        kind: as in :func:`transition_matrix`, or a matrix of one's own: floating [K, K], rows sum to 1.
        rate: :math:`\varepsilon` in [0, 1]; left out for a matrix of one's own.
        num_classes: K.
        backend: "vectorized" draws one uniform number per label and inverts the row's cumulative distribution.
            "legacy" reproduces the labels of the released code of Co-teaching, Co-teaching+ and JoCoR, which loop over
            the labels with ``numpy.random.RandomState(seed).multinomial``: 1 to 2 microseconds per label. Their image
            data sets use seed 0 in every trial.
        seed: of the generator, an int of at least 0.
        unbiased: False for the convention of the Co-learning code, "symmetric" and "vectorized" only: a random share
            :math:`\varepsilon` of the labels is drawn anew from all K classes, so a share of
            :math:`\varepsilon (K - 1) / K` changes.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Cost: 24 bytes per label beside the result, in "vectorized"; time for a sort of the labels.

    Example:
        >>> import torch
        >>> noisy = add_label_noise(torch.arange(10000) % 10, "symmetric", 0.2, num_classes=10)
        >>> round(noisy.rate, 1), bool((noisy.labels[noisy.clean] == (torch.arange(10000) % 10)[noisy.clean]).all())
        (0.2, True)
    """
    name = "add_label_noise"
    _check_count(name, "num_classes", num_classes, 2)
    if backend not in ("vectorized", "legacy"):
        bad_value(name, "backend", repr(backend), '"vectorized" or "legacy"')
    if isinstance(kind, Tensor):
        if rate is not None:
            bad_value(name, "rate", rate, "None beside a matrix")
        matrix = _checked_matrix(name, kind, num_classes)
    else:
        if rate is None:
            bad_type(name, "rate", "None", "a float, or a matrix as `kind`")
        matrix = transition_matrix(kind, num_classes, rate)
    if not unbiased and (isinstance(kind, Tensor) or kind != "symmetric" or backend != "vectorized"):
        bad_value(name, "unbiased", unbiased, 'True for all but kind="symmetric", backend="vectorized"')
    clean_labels = _checked_labels(name, labels, num_classes)
    generator = _generator(name, seed)

    if backend == "legacy":
        state, rates = np.random.RandomState(seed), matrix.numpy()
        drawn = [int(state.multinomial(1, rates[label]).argmax()) for label in clean_labels.tolist()]
        noisy = torch.tensor(drawn, dtype=torch.int64)
    elif unbiased:
        uniform = torch.rand(len(clean_labels), dtype=torch.float64, generator=generator)
        noisy = torch.empty_like(clean_labels)
        for label, rows in enumerate(_rows_of_classes(clean_labels, num_classes)):
            noisy[rows] = _invert_cdf(matrix[label], uniform[rows])
    else:
        chosen = torch.randperm(len(clean_labels), generator=generator)[: int((rate or 0.0) * len(clean_labels))]
        noisy = clean_labels.clone()
        noisy[chosen] = torch.randint(num_classes, chosen.shape, generator=generator)
    return _result(labels, clean_labels, noisy)


def instance_dependent_noise(
    features: Tensor, labels: Tensor, rate: float, *, num_classes: int, deviation: float = 0.1, seed: int = 0
) -> NoisyLabels:
    r"""Flips label i with a probability of its own to a class that its features favour:
    :math:`q_i \sim N(\tau, \sigma^2)` in [0, 1], :math:`P(\tilde y_i = j) = q_i\,
    \text{softmax}_{j \ne y_i}(x_i W_{y_i})_j`.

    Every :math:`W_y` [S, K] is drawn from the standard normal distribution ("Part-dependent label noise", Xia et al.
    2020, arXiv:2006.07836, algorithm 2).

    The normal distribution is truncated, so its mean is not :math:`\tau` but :math:`\tau + \sigma\,
    \frac{\varphi(a) - \varphi(b)}{\Phi(b) - \Phi(a)}` with :math:`a = -\tau/\sigma`, :math:`b = (1 - \tau)/\sigma`. For
    :math:`\sigma = 0.1` the labels of a share 0.080 flip at rate 0, 0.129 at 0.1, 0.206 at 0.2, 0.300 at 0.3 and 0.500
    at 0.5. With `deviation` 0 every label flips with probability `rate`.

    Args:
        features: floating [n, ...], flattened to [n, S], on any device: the images themselves, in the scale they are
            trained with. The larger they are, the closer the flip is to one class per instance.
        labels: int64 [n] in [0, K).
        rate: :math:`\tau` in [0, 1].
        num_classes: K.
        deviation: :math:`\sigma` in [0, 1].
        seed: of the generator, an int of at least 0.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Cost: 2 n S K FLOP in float64; 8 S K bytes for one :math:`W_y` at a time.

    Example:
        >>> import torch
        >>> features, labels = torch.randn(5000, 20), torch.arange(5000) % 10
        >>> noisy = instance_dependent_noise(features, labels, 0.4, num_classes=10)
        >>> 0.37 < noisy.rate < 0.43
        True
    """
    name = "instance_dependent_noise"
    _check_count(name, "num_classes", num_classes, 2)
    _check_number(name, "rate", rate, 0.0, 1.0)
    _check_number(name, "deviation", deviation, 0.0, 1.0)
    clean_labels = _checked_labels(name, labels, num_classes)
    if not isinstance(features, Tensor):
        bad_type(name, "features", type(features).__name__, "a torch.Tensor")
    if not features.is_floating_point():
        bad_type(name, "features", features.dtype, "a floating-point tensor")
    if features.dim() < 2 or len(features) != len(clean_labels):
        bad_value(name, "features", f"shape {tuple(features.shape)}", f"[{len(clean_labels)}, ...]")
    if not features.isfinite().all():
        bad_value(name, "features", "numbers that are not finite", "finite numbers")
    generator = _generator(name, seed)

    count = len(clean_labels)
    flip_rate = torch.full((count,), float(rate), dtype=torch.float64)
    uniform = torch.rand(2, count, dtype=torch.float64, generator=generator)
    if deviation > 0:
        low, high = (torch.special.ndtr(torch.tensor((x - rate) / deviation, dtype=torch.float64)) for x in (0.0, 1.0))
        normal = torch.special.ndtri(low + uniform[0] * (high - low))
        flip_rate = (flip_rate + deviation * normal).clamp(0.0, 1.0)
    flat = features.detach().reshape(count, -1) if count else features.detach().flatten(1)
    noisy = torch.empty_like(clean_labels)
    for label, rows in enumerate(_rows_of_classes(clean_labels, num_classes)):
        weight = torch.randn(flat.shape[1], num_classes, dtype=torch.float64, generator=generator)
        scores = flat[rows.to(flat.device)].to("cpu", torch.float64) @ weight
        scores[:, label] = -math.inf
        probabilities = scores.softmax(1) * flip_rate[rows, None]
        probabilities[:, label] = 1.0 - flip_rate[rows]
        noisy[rows] = _invert_cdf(probabilities, uniform[1, rows])
    return _result(labels, clean_labels, noisy)


def label_precision(kept: Tensor, clean: Tensor) -> Tensor:
    r"""The clean share of the kept rows, :math:`|\text{kept} \cap \text{clean}| / |\text{kept}|`.

    Args:
        kept: bool [..., n], the rows a loss kept. For the figures in Co-teaching (arXiv:1804.06872) the network's
            own picks: the rows that train the other network.
        clean: bool [..., n], True for rows whose label is right.

    Returns: float32 [...] over the broadcast leading dimensions, NaN where nothing is kept. No synchronisation.

    Raises:
        TypeError, ValueError: tensors that are not bool, of different n or on different devices.

    Example:
        >>> import torch
        >>> label_precision(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        tensor(0.5000)
    """
    _check_masks("label_precision", kept, clean)
    return (kept & clean).sum(-1) / kept.sum(-1)


def noise_recall(kept: Tensor, clean: Tensor) -> Tensor:
    r"""The rejected share of the noisy rows, :math:`|\overline{\text{kept}} \cap \overline{\text{clean}}| /
    |\overline{\text{clean}}|`.

    Args:
        kept: bool [..., n], the rows a loss kept.
        clean: bool [..., n], True for rows whose label is right.

    Returns: float32 [...] over the broadcast leading dimensions, NaN where no row is noisy. No synchronisation.

    Raises:
        TypeError, ValueError: tensors that are not bool, of different n or on different devices.

    Example:
        >>> import torch
        >>> noise_recall(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        tensor(0.5000)
    """
    _check_masks("noise_recall", kept, clean)
    return (~(kept | clean)).sum(-1) / (~clean).sum(-1)


def _rows_of_classes(labels: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    return labels.argsort().split(torch.bincount(labels, minlength=num_classes).tolist())


def _invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """probabilities [K] or [m, K], uniform [m] in [0, 1) -> class [m]."""
    cdf = probabilities.cumsum(-1)
    # After the division the last class with a probability, and all after it, are at exactly 1: above every draw.
    cdf = cdf / cdf[..., -1:]
    if cdf.dim() == 1:
        return torch.searchsorted(cdf, uniform, right=True)
    return torch.searchsorted(cdf, uniform[:, None], right=True)[:, 0]


def _result(labels: Tensor, clean_labels: Tensor, noisy: Tensor) -> NoisyLabels:
    clean = noisy == clean_labels
    rate = (~clean).double().mean().item()
    return NoisyLabels(noisy.to(labels.device), clean.to(labels.device), rate)


def _generator(name: str, seed: int) -> torch.Generator:
    _check_count(name, "seed", seed, 0)
    if seed >= 2**32:  # NumPy's limit
        bad_value(name, "seed", seed, "below 2**32")
    return torch.Generator().manual_seed(seed)


def _checked_labels(name: str, labels: Tensor, num_classes: int) -> Tensor:
    if not isinstance(labels, Tensor):
        bad_type(name, "labels", type(labels).__name__, "a torch.Tensor")
    if labels.dtype != torch.int64:
        bad_type(name, "labels", labels.dtype, "an int64 tensor")
    if labels.dim() != 1:
        bad_value(name, "labels", f"shape {tuple(labels.shape)}", "1 dimension")
    labels = labels.cpu()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        bad_value(name, "labels", f"labels in [{labels.min()}, {labels.max()}]", f"labels in [0, {num_classes})")
    return labels


def _checked_matrix(name: str, matrix: Tensor, num_classes: int) -> Tensor:
    if not matrix.is_floating_point():
        bad_type(name, "kind", matrix.dtype, "a floating-point matrix")
    if matrix.shape != (num_classes, num_classes):
        bad_value(name, "kind", f"shape {tuple(matrix.shape)}", f"[{num_classes}, {num_classes}]")
    matrix = matrix.detach().to("cpu", torch.float64)
    off = float((matrix.sum(1) - 1).abs().max())
    if not (bool((matrix >= 0).all()) and off < 1e-5):
        bad_value(name, "kind", f"entries from {matrix.min():g}, row sums off by {off:g}", "rows of probabilities")
    return matrix / matrix.sum(1, keepdim=True)


def _check_masks(name: str, kept: Tensor, clean: Tensor) -> None:
    for argument, mask in (("kept", kept), ("clean", clean)):
        if not isinstance(mask, Tensor):
            bad_type(name, argument, type(mask).__name__, "a torch.Tensor")
        if mask.dtype != torch.bool:
            bad_type(name, argument, mask.dtype, "a bool tensor")
    if kept.dim() < 1 or clean.dim() < 1 or kept.shape[-1] != clean.shape[-1]:
        bad_value(name, "clean", f"shape {tuple(clean.shape)}", f"[..., n] as in `kept`, shape {tuple(kept.shape)}")
    if kept.device != clean.device:
        bad_value(name, "clean", f"device {clean.device}", f"the device of `kept`, {kept.device}")
