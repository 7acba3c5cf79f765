"""Which backend runs what on this machine, and why not another."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Literal

import torch

Backend = Literal["native", "triton", "reference"]
# The kind of CUDA kernels of every op.
OPS: dict[str, Literal["triton", "native"]] = {
    "conditioned_conv2d": "native",
    "gan_loss": "native",
    "info_nce": "triton",
    "momentum_update_": "native",
    "enqueue_": "native",
    "small_loss": "native",
    "separable_conv2d": "native",
    "upsample_conv2d": "native",
}
_PACKAGE = Path(__file__).parent
_forced = "auto"


class use_backend:
    """Sets the backend of every op: "auto" (the fastest right one) or "reference" (plain PyTorch).

    Takes effect at once; as a context manager it is undone on leaving.

    Raises:
        ValueError: for any other name.
    """

    def __init__(self, name: str) -> None:
        global _forced
        if name not in ("auto", "reference"):
            raise ValueError(f'use_backend: `name` got {name!r}, expected "auto" or "reference"')
        self._before = _forced
        _forced = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._before


def _build_info() -> dict:
    file = _PACKAGE / "_build.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _load(name: str, missing: str) -> str | None:
    """Loads one of the package's libraries; returns why it could not, or None."""
    file = _PACKAGE / f"{name}.abi3.so"
    if not file.exists():
        if not (_PACKAGE / "_build.json").exists():
            return (
                f"perfvl was imported from its source folder {_PACKAGE}, which was not built in place: "
                "run `pip install -e .` there, or leave this folder"
            )
        return str(_build_info().get(missing, f"{file.name} is missing"))
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"{file.name} did not load with torch {torch.__version__}: {error}"
    return None


CPU_MISSING = _load("_C", "native_reason")


@functools.cache
def cuda_missing() -> str | None:
    """Why the CUDA C++ kernels are not there, or None. Asked when a CUDA tensor arrives: import touches no GPU."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    return _load("_cuda", "cuda_reason")


@functools.cache
def triton_missing(device_index: int = 0) -> str | None:
    """Why Triton kernels cannot run on this CUDA device, or None."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def choose(tensor: torch.Tensor, cuda: Literal["native", "triton"]) -> Backend:
    """The backend for an op on `tensor` whose CUDA kernels are of kind `cuda`. Never depends on data."""
    if _forced == "reference":
        return "reference"
    if tensor.is_cpu:
        return "reference" if CPU_MISSING else "native"
    if tensor.is_cuda:
        missing = triton_missing(tensor.device.index or 0) if cuda == "triton" else cuda_missing()
        return "reference" if missing else cuda
    return "reference"


def info() -> str:
    """What ``python -m perfvl info`` prints: versions, and for CPU and CUDA the backend and the reason."""
    import perfvl

    lines = [
        f"perfvl {perfvl.__version__}   torch {torch.__version__}   python {sys.version.split()[0]}   {_PACKAGE}",
        f"forced backend: {_forced}",
        "",
    ]
    build = _build_info()
    if CPU_MISSING:
        lines.append(f"cpu   reference (plain PyTorch): {CPU_MISSING}")
    else:
        levels = list(torch.ops.perfvl._isa_levels())
        level, threads = torch.ops.perfvl._isa(), torch.get_num_threads()
        lines.append(f"cpu   native C++, level {level} of {', '.join(levels)}; {threads} threads")
        lines.append(f"      built with {build['native']['compiler']}")
    for name, missing in (("triton", triton_missing()), ("c++", cuda_missing())):
        lines.append(f"cuda  {name}: {'reference instead, ' + missing if missing else torch.cuda.get_device_name()}")
    if build.get("cuda"):
        lines.append(f"      C++ kernels built for sm_{', sm_'.join(build['cuda']['archs'])}")
    lines += ["", f"{'op':<18} {'cpu':<10} cuda"]
    cpu = "reference" if CPU_MISSING else "native"
    lacking = {"triton": triton_missing(), "native": cuda_missing()}
    for op, kind in OPS.items():
        lines.append(f"{op:<18} {cpu:<10} {'reference' if lacking[kind] else kind}")
    lines.append("float64 inputs always run the reference.")
    return "\n".join(lines)
