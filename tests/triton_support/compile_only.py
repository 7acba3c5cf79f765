"""Compiles the real launches of Triton kernels for any NVIDIA GPU on a machine that has none.

`compiled_launches(90, call)` runs `call()`, for instance an op's launcher on CPU tensors, with a stand-in driver that
claims compute capability 9.0. Every kernel launch inside is compiled with the very arguments, specialisation and
options of the launch and nothing is executed. What comes back says what the GPU would be given: registers, shared
memory, spills, instructions.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

# Per compute capability: multiprocessors of a common part, and bytes of shared memory one program may use.
LIMITS = {
    80: (108, 166_912),
    86: (84, 101_376),
    89: (128, 101_376),
    90: (132, 232_448),
    100: (148, 232_448),
    120: (170, 101_376),
}

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE
)


class CompiledLaunch(NamedTuple):
    """One kernel as the GPU would get it. Bytes are per program (shared) or per thread (stack, local)."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    shared: int
    stack: int
    local: int
    fingerprint: str  # equal for launches of one build
    spills_in_loops: int  # local-memory instructions between a backward branch and its target
    instructions: collections.Counter  # full opcode, e.g. "HGMMA.64x128x16.F32.BF16" -> count

    def count(self, prefix: str) -> int:
        """Instructions whose opcode starts with `prefix`."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))

    @property
    def tensor_core_instructions(self) -> int:
        """wgmma (HGMMA), mma.sync (HMMA) or tcgen05 (UTC*MMA) instructions, whichever the target has."""
        return sum(n for opcode, n in self.instructions.items() if re.match(r"(UTC)?[HQ]G?MMA", opcode))


class _Driver:
    """The part of Triton's driver interface that compiling a launch asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # JITFunction caches per device number, so every target needs its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def get_benchmarker(self) -> None:
        raise RuntimeError("nothing can be timed without a GPU")


def _spills_in_loops(listing: str) -> int:
    """Loads and stores of spilled registers that run once per iteration of some loop."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    spilled: set[int] = set()
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if branch and branch[1] in labels:
                body = range(labels[branch[1]], len(instructions))
                spilled.update(i for i in body if re.search(r"\s(LDL|STL)\b", instructions[i]))
            instructions.append(line)
    return len(spilled)


def _inspect(kernel, grid: tuple[int, ...]) -> CompiledLaunch:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [_TOOLS / "cuobjdump", "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
        listing = subprocess.run([_TOOLS / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return CompiledLaunch(
        kernel.metadata.name,
        grid,
        kernel.metadata.num_warps,
        int(resources["REG"]),
        kernel.metadata.shared,
        int(resources["STACK"]),
        int(resources["LOCAL"]),
        kernel.hash,
        _spills_in_loops(listing),
        collections.Counter(_INSTRUCTION.findall(listing)),
    )


@contextlib.contextmanager
def _stand_in(capability: int, cache: str, launches: list) -> Iterator[None]:
    driver = triton.runtime.driver
    original_run = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original_run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((kernel, tuple(grid) if not callable(grid) else ()))
        return kernel

    def run_every_config(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    previous = driver._active
    driver.set_active(_Driver(capability))
    try:
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(Autotuner, "run", run_every_config),
            mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}),
        ):
            yield
    finally:
        driver._active = previous


def compiled_launches(capability: int, call: Callable[[], object], cache: str | Path) -> list[CompiledLaunch]:
    """The kernels `call()` launches, compiled for a compute capability; `cache` is Triton's cache folder meanwhile."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are being interpreted in this process, so nothing would be compiled")
    launches: list = []
    with _stand_in(capability, str(cache), launches):
        call()
    return [_inspect(kernel, grid) for kernel, grid in launches]
