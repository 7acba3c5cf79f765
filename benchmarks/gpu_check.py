"""Everything that only a GPU can prove, from a clean checkout and without a network: ``make gpu-check``.

Stages, which can be asked for by name: `build` for this GPU alone, `info`, `test` (the tests that run on CUDA: every
op under its contract, synchronisation and graph capture included, and the models' training steps), `sanitize`
(compute-sanitizer's memcheck and racecheck over small cases of every kernel), `bench` (the workloads that the README
reports). A stage that fails does not stop those behind it. Logs go to ``build/gpu-check``, results to
``benchmarks/results/<gpu>.json`` or ``--json``. Needs torch, triton, nvcc, pytest and ninja in the running Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_contract.py", "test_cuda_models.py", "test_info_nce.py", "test_twin_step.py")
WORKLOADS = (
    "moco-b256-k65536-d128-float32",
    "moco-b256-k65536-d128-bfloat16",
    "brivl-b16-k16384-*-bfloat16",
    "ema-resnet50-float32",
    "ema-12x4m-bfloat16",
    "enqueue-b256-k65536-d128-bfloat16",
    "brivl-step-b16-k16384",
    "co-teaching-g1-n128-k10",
    "jocor-g1-n1024-k1000",
    "small-loss-mask-g1-n1000000",
    "co-teaching-step-mlp-n128",
    "separable-728-728-19-*",
    "separable-128-128-147-*-bfloat16",
    "separable-64-128-512-*",
    "kernelbench-82",
    "xception-*",
    "upsample-256-128-16-*-fwd-bwd-*",
    "stackgan-1-training-*",
)
Stage = Callable[[argparse.Namespace], "list[list[str]]"]


def build(options: argparse.Namespace) -> list[list[str]]:
    """Installs the checkout in place. PERFVL_CUDA_ARCHS is set by :func:`environment`."""
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    return [[sys.executable, "-m", "pip", "install", *offline, "--editable", str(ROOT)]]


def info(options: argparse.Namespace) -> list[list[str]]:
    """What runs where."""
    return [["nvidia-smi"], [sys.executable, "-m", "perfvl", "info"]]


def test(options: argparse.Namespace) -> list[list[str]]:
    """In parallel where pytest-xdist is installed."""
    parallel = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    files = [str(ROOT / "tests" / name) for name in TESTS]
    one_thread = ["env", "TORCHINDUCTOR_COMPILE_THREADS=1", "OMP_NUM_THREADS=1"]
    return [[*one_thread, sys.executable, "-m", "pytest", *files, "-k", "cuda", "-q", *parallel]]


def sanitize(options: argparse.Namespace) -> list[list[str]]:
    """Without torch's cache of blocks, so that each tensor has bounds of its own."""
    cases = [sys.executable, str(ROOT / "tests" / "cuda_cases.py")]
    tool = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1", "--tool"]
    return [[*tool, "memcheck", *cases, "samples"], [*tool, "racecheck", *cases, "small"]]


def bench(options: argparse.Namespace) -> list[list[str]]:
    """The workloads of the README's tables."""
    command = [sys.executable, "-m", "perfvl", "bench", "--device", "cuda", "--seconds", options.seconds]
    return [[*command, "--json", options.json, *(f"--workload={name}" for name in options.workload or WORKLOADS)]]


STAGES: dict[str, Stage] = {"build": build, "info": info, "test": test, "sanitize": sanitize, "bench": bench}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns how many failed."""
    options = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    options.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")
    options.add_argument("--json", help="results of bench; default: benchmarks/results/<gpu>.json")
    options.add_argument("--seconds", default="2", help="time spent timing each workload")
    options.add_argument("--workload", action="append", metavar="TEXT", help="of bench, instead of the usual ones")
    given = options.parse_args(argv)
    if unknown := set(given.stages) - set(STAGES):
        options.error(f"STAGE: got {', '.join(sorted(unknown))}, expected of {', '.join(STAGES)}")
    if not (ROOT / "tests").is_dir():
        options.error(f"gpu-check builds and tests a checkout of perfvl, which {ROOT} is not")
    import torch

    if not torch.cuda.is_available():
        options.error("torch.cuda.is_available() is false: gpu-check needs a CUDA device, and a torch built for it")
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    given.json = given.json or str(ROOT / "benchmarks" / "results" / f"{slug}.json")
    results = {name: run(name, given) for name in given.stages or STAGES}
    print("\nstage      seconds  result")
    for name, (failed, seconds) in results.items():
        print(f"{name:9} {seconds:8.1f}  {'failed: ' + failed if failed else 'passed'}")
    return sum(bool(failed) for failed, _ in results.values())


def run(name: str, options: argparse.Namespace) -> tuple[str, float]:
    """Runs the commands of a stage and returns why it failed, or "", and the seconds it took."""
    logs = ROOT / "build" / "gpu-check"
    logs.mkdir(parents=True, exist_ok=True)
    failed, began = [], time.perf_counter()
    for number, command in enumerate(STAGES[name](options)):
        log = logs / f"{name}{number or ''}.log"
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        try:
            with log.open("w") as file:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT
                ).returncode
        except FileNotFoundError:
            log.write_text(f"{command[0]} was not found\n")
            code = 127
        text = log.read_text(errors="replace")
        print(text if name in ("info", "bench") else "\n".join(text.splitlines()[-12:]), flush=True)
        if code:
            failed.append(f"status {code}, see {log.relative_to(ROOT)}")
    return "; ".join(failed), time.perf_counter() - began


def environment() -> dict[str, str]:
    """For children: this GPU alone is compiled for."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major == 9 else ''}"
    return {"PERFVL_BUILD_CUDA": "1", "PERFVL_CUDA_ARCHS": arch, **os.environ}


if __name__ == "__main__":
    sys.exit(main())
