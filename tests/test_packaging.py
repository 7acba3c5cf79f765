"""What is installed: the wheel's tag and contents, an import that needs nothing, and machines that lack something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "tools", "csrc", "perfvl", "kernels", "benchmarks"]
SMOKE = """
import torch, perfvl
from perfvl.functional import info_nce
q, n = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
info_nce(q, q.detach(), n).backward()
print(perfvl.backends.info())
"""


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PERFVL_", "PYTHONPATH"))} | (env or {})
    done = subprocess.run(list(map(str, command)), env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, so that building leaves this tree alone."""
    folder = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in SOURCES:
        path = ROOT / name
        shutil.copytree(path, folder / name, ignore=unwanted) if path.is_dir() else shutil.copy(path, folder / name)
    return folder


def install(source: Path, target: Path, **env: str) -> Path:
    """Builds a wheel offline with one command and unpacks it; returns the wheel."""
    wheels = target / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    run(*command, "-w", wheels, env=env, cwd=source)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target / "site")
    return wheel


def run_installed(target: Path, code: str, **env: str) -> str:
    return run(sys.executable, "-c", code, env={"PYTHONPATH": str(target / "site"), **env}, cwd=target)


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("native")
    return target, install(source, target, PERFVL_BUILD_CUDA="0")


def test_one_wheel_for_every_python_from_3_10(installed):
    _, wheel = installed
    assert "-cp310-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"perfvl/_C.abi3.so", "perfvl/py.typed", "perfvl/_build.json", "perfvl/kernels/info_nce.py"}
    assert expected | {"perfvl/benchmarks/info_nce.py", "perfvl/reference/info_nce.py"} <= names
    assert not [n for n in names if n.startswith(("kernels/", "benchmarks/", "tests/", "csrc/"))]


def test_installed_wheel_runs_native(installed):
    target, _ = installed
    out = run_installed(target, SMOKE)
    assert "cpu   native C++, level " in out
    assert "PERFVL_BUILD_CUDA=0" in out or "no CUDA GPU is available" in out


def test_installed_wheel_keeps_the_contract(installed):
    """Some of it; `tools/compatibility.py` runs all, beside any torch."""
    target, _ = installed
    shutil.copytree(ROOT / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    chosen = "kernels_run or same_bits or bad_input or nothing_to_do"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_contract.py", "-k", chosen]
    code = "import perfvl; print(perfvl.__file__)"
    assert str(target) in run_installed(target, code)
    assert " passed" in run(*command, env={"PYTHONPATH": str(target / "site")}, cwd=target)


def test_without_a_compiler_everything_runs_on_the_reference(source, tmp_path):
    tools = tmp_path / "bin"  # a PATH with Python's tools and no compiler
    tools.mkdir()
    wheel = install(source, tmp_path, PATH=str(tools), CXX="")
    assert "-none-any" in wheel.name
    out = run_installed(tmp_path, SMOKE)
    assert "cpu   reference (plain PyTorch): no C++ compiler was found when perfvl was installed" in out


def test_native_code_can_be_declined(source, tmp_path):
    install(source, tmp_path, PERFVL_BUILD_NATIVE="0")
    assert "reference (plain PyTorch): PERFVL_BUILD_NATIVE=0" in run_installed(tmp_path, SMOKE)


def test_source_folder_that_was_not_built_says_what_to_do(source):
    assert "which was not built in place: run `pip install -e .`" in run(sys.executable, "-c", SMOKE, cwd=source)


def test_library_of_another_kind_is_explained_not_fatal(installed, tmp_path):
    target, _ = installed
    shutil.copytree(target / "site", tmp_path / "site")
    (tmp_path / "site" / "perfvl" / "_C.abi3.so").write_bytes(b"not a library")
    assert "_C.abi3.so did not load with torch" in run_installed(tmp_path, SMOKE)


def test_import_is_light():
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import perfvl
print(time.perf_counter() - start, *sorted({m.split(".")[0] for m in set(sys.modules) - before}))
"""
    runs = [run(sys.executable, "-c", code).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.3
    assert not {"triton", "rich", "matplotlib", "sklearn"} & set(runs[0])


def test_info_names_backend_and_reason():
    out = run(sys.executable, "-m", "perfvl", "info")
    assert f"torch {torch.__version__}" in out
    assert "info_nce" in out
    assert ("native C++, level" in out) or ("reference (plain PyTorch): " in out)
    if not torch.cuda.is_available():
        assert "no CUDA GPU is available" in out


def test_unknown_command_shows_usage():
    done = subprocess.run([sys.executable, "-m", "perfvl", "fly"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: python -m perfvl info" in done.stderr


def test_build_metadata_is_readable():
    file = ROOT / "perfvl" / "_build.json"
    if file.exists():
        assert {"native", "cuda"} <= set(json.loads(file.read_text()))


def test_repository_stands_alone():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".toml", ".md", ".txt", ""} and path.is_file():
            text = path.read_text(errors="replace")
            assert "shared" + "/spec" not in text, name
            assert ".." + "/shared" not in text, name
