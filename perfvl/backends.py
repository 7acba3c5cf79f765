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
    "activation": "triton",
    "color_transform": "triton",
    "conditioned_conv2d": "native",
    "gan_loss": "native",
    "info_nce": "triton",
    "momentum_update_": "native",
    "enqueue_": "native",
    "small_loss": "native",
    "max_avg_pool2d": "triton",
    "norm_act": "triton",
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
# Loaded here, which touches no GPU, and not with the first CUDA tensor: a traced or exported call finds its kernels.
CUDA_MISSING = _load("_cuda", "cuda_reason") if torch.version.cuda else "torch was built without CUDA"
TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"
_ARCHS = tuple((_build_info().get("cuda") or {}).get("archs", ()))


def _runs_on(capability: int) -> bool:
    """Whether the library holds machine code for a GPU, or PTX of its newest architecture that the driver compiles."""
    for arch in _ARCHS:
        number, only_there = int(arch.rstrip("af")), arch.endswith("a")
        family = number // 10 == capability // 10 or arch == _ARCHS[-1]
        if number == capability or (family and number <= capability and not only_there):
            return True
    return False


def _reason(cuda: Literal["native", "triton"], device_index: int) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    reason = TRITON_MISSING if cuda == "triton" else CUDA_MISSING
    if reason is not None:
        return reason
    properties = torch.cuda.get_device_properties(device_index)
    capability = 10 * properties.major + properties.minor
    if capability < 80:
        return f"compute capability {properties.major}.{properties.minor} is below 8.0"
    if cuda == "native" and not _runs_on(capability):
        return f"built for sm_{', sm_'.join(_ARCHS)}, not for this GPU's sm_{capability}"
    return None


@functools.cache
def missing(cuda: Literal["native", "triton"], device_index: int = 0) -> str | None:
    """Why CUDA kernels of this kind cannot run on a device, or None. Asked when a CUDA tensor arrives."""
    return _reason(cuda, device_index)


def choose(tensor: torch.Tensor, cuda: Literal["native", "triton"]) -> Backend:
    """The backend for an op on `tensor` whose CUDA kernels are of kind `cuda`. Never depends on data."""
    if _forced == "reference":
        return "reference"
    if tensor.is_cpu:
        return "reference" if CPU_MISSING else "native"
    if tensor.is_cuda:
        ask = _reason if torch.compiler.is_compiling() else missing  # Dynamo traces into caches, with a warning
        return "reference" if ask(cuda, tensor.device.index or 0) else cuda
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
    for name, reason in (("triton", missing("triton")), ("c++", missing("native"))):
        lines.append(f"cuda  {name}: {'reference instead, ' + reason if reason else torch.cuda.get_device_name()}")
    if build.get("cuda"):
        lines.append(f"      C++ kernels built for sm_{', sm_'.join(build['cuda']['archs'])}")
    lines += ["", f"{'op':<18} {'cpu':<10} cuda"]
    cpu = "reference" if CPU_MISSING else "native"
    for op, kind in OPS.items():
        lines.append(f"{op:<18} {cpu:<10} {'reference' if missing(kind) else kind}")
    lines.append("float64 inputs always run the reference.")
    return "\n".join(lines)
