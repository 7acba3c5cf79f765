"""Installs perfvl's wheel into fresh environments, one for each Python and torch, and holds it to the contract there.

    python tools/compatibility.py --python python3.10 python3.13 --torch 2.11.0 2.13.0

Run it with a Python that has torch, setuptools and ninja: the wheel is built once, against that torch. Nothing but pip
is used, with its settings; where no index has a pair, that is what the table says.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("numpy", "pytest", "pytest-timeout", "hypothesis", "expecttest")  # by the contract's tests
CHECKS = "import perfvl, sys, torch; sys.exit(perfvl.backends.CPU_MISSING or 0)"


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Its output with it, whatever it returns."""
    return subprocess.run(
        list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def build(folder: Path) -> Path:
    """The wheel, of this checkout as it is."""
    done = run(sys.executable, "-m", "pip", "wheel", ROOT, "--no-build-isolation", "--no-deps", "-q", "-w", folder)
    if done.returncode:
        sys.exit(done.stdout)
    return next(folder.glob("perfvl-*.whl"))


def check(python: str, torch: str, wheel: Path, folder: Path, options: list[str]) -> tuple[bool, str]:
    """Whether the contract holds there, and pytest's last line or what went wrong before."""
    folder.mkdir()
    done = run(python, "-m", "venv", folder / "venv")
    own = folder / "venv" / "bin" / "python"
    for command in (
        (own, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"torch=={torch}", *NEEDED),
        (own, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", wheel),
        (own, "-c", CHECKS),
    ):
        if done.returncode == 0:
            done = run(*command, cwd=folder)
    if done.returncode:
        return False, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "failed without a word"
    shutil.copy(ROOT / "pyproject.toml", folder)  # pytest's settings; the sources stay behind
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    done = run(own, "-m", "pytest", "-q", "tests/test_contract.py", *options, cwd=folder)
    (folder / "pytest.txt").write_text(done.stdout)
    return done.returncode == 0, done.stdout.strip().splitlines()[-1]


def main() -> int:
    """A line for each pair; 1 where one of them fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters, default: this one")
    parser.add_argument("--torch", nargs="+", default=["2.11.0", "2.13.0"], help="versions")
    parser.add_argument("--options", default="", help='of pytest, as "-x -k info_nce"')
    chosen = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build(folder)
        print(wheel.name, flush=True)
        for number, (python, torch) in enumerate((p, t) for p in chosen.python for t in chosen.torch):
            began = time.monotonic()
            good, line = check(python, torch, wheel, folder / str(number), chosen.options.split())
            failed |= not good
            seconds = time.monotonic() - began
            print(f"{'ok    ' if good else 'FAILED'} {python}, torch {torch}: {line} [{seconds:.0f} s]", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
