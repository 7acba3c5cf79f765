"""Builds the kernels of csrc without torch, bound to numpy: once as released, once under AddressSanitizer and UBSan.

Modules land in build/native-tests/<flavour>; ninja rebuilds only what changed. A sanitized module needs its run-time
library in the process from the start, so those tests run in a process of their own: `run_sanitized`.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from unittest import mock

import pybind11

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"
FLAVOUR = "sanitized" if os.environ.get("PERFVL_SANITIZED") else "plain"
SANITIZED = FLAVOUR == "sanitized"

_FLAGS = {
    "plain": "-O3",
    "sanitized": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer",
}
_COMMON = (
    "-std=c++20 -fPIC -g1 -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-maybe-uninitialized"
)
_INCLUDE = f"-I{ROOT}/csrc -I{NATIVE} -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"


@functools.cache
def release() -> dict:
    """What setup.py knows: the compiler and the flags of every ISA level."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def load(module: str) -> ModuleType:
    """`native_cpu` or `native_cuda`, up to date with the sources, in this process's flavour."""
    file = _build(module)
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` with the sanitizers' libraries loaded first and the sanitized modules chosen."""
    for module in ("native_cpu", "native_cuda"):
        _build(module, "sanitized")
    libraries = [_library(name) for name in ("libasan.so", "libstdc++.so.6")]  # the latter: its throw is intercepted
    environment = os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PERFVL_SANITIZED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600)


def _library(name: str) -> str:
    command = [*release()["compiler"]().split(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def _build(module: str, flavour: str = FLAVOUR) -> Path:
    folder = ROOT / "build" / "native-tests" / flavour
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several test processes may come here at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / f"{module}.ninja"
        _write_if_changed(file, _rules(module, flavour, folder))
        ninja = shutil.which("ninja")
        command = [*([ninja] if ninja else [sys.executable, "-m", "ninja"]), "-f", str(file), "-j2"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{module} ({flavour}) did not build:\n{done.stdout}{done.stderr}")
    return folder / f"{module}.so"


def _rules(module: str, flavour: str, folder: Path) -> str:
    compiler, flags = release()["compiler"](), _FLAGS[flavour]
    if flavour == "sanitized":
        flags += " -fsanitize-sections=cuda_shared"
    text = f"""ninja_required_version = 1.5
builddir = {folder}/{module}.ninja-state
rule cxx
  command = {compiler} {_COMMON} {flags} {_INCLUDE} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} {flags} -shared $in -pthread -o $out
"""
    edges = _cpu_edges() if module == "native_cpu" else _cuda_edges()
    objects = []
    for name, source, extra in edges:
        objects.append(f"{folder}/{name}.o")
        text += f"build {objects[-1]}: cxx {source}\n  flags = {extra}\n"
    return text + f"build {folder}/{module}.so: link {' '.join(objects)}\n"


def _cpu_edges() -> list[tuple[str, Path, str]]:
    levels = release()["isa_levels"]()
    have = " ".join(f"-DPVL_HAVE_{level}" for level in levels)
    edges = [("cpu_bindings", NATIVE / "cpu_bindings.cpp", have)]
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        edges += [(f"{source.stem}.{level}", source, f"-DPVL_ISA={level} {flags}") for level, flags in levels.items()]
    return edges


def _cuda_edges() -> list[tuple[str, Path, str]]:
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), NATIVE / "emulator_kernels.cu"]
    as_cpp = "-x c++ -Wno-unknown-pragmas"
    return [("cuda_bindings", NATIVE / "cuda_bindings.cpp", ""), *((source.name, source, as_cpp) for source in sources)]


def _write_if_changed(file: Path, text: str) -> None:
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
