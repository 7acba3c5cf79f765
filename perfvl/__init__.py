"""perfvl: fused layers and losses for vision and vision-language training.

Functions live in :mod:`perfvl.functional`, layers and losses in :mod:`perfvl.nn`, models in :mod:`perfvl.models`, and
beside them :mod:`perfvl.schedules` and :mod:`perfvl.label_noise`. :func:`perfvl.swap` puts fused layers into a model.
Importing needs neither a GPU, nor Triton, nor a compiled library: ``python -m perfvl info`` says what runs where, and
why.
"""

from importlib.metadata import PackageNotFoundError, version

from perfvl import functional, label_noise, models, nn, schedules
from perfvl.backends import use_backend
from perfvl.swap import SwapReport, swap

try:
    __version__ = version("perfvl")
except PackageNotFoundError:  # a source folder on sys.path
    __version__ = "0.0.0"

__all__ = ["SwapReport", "functional", "label_noise", "models", "nn", "schedules", "swap", "use_backend"]
