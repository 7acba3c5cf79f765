"""Where the build finds torch's headers and libraries, and whether it needs them at all."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def find() -> Path | None:
    """The folder of the torch package, or None. Never imports torch: its headers are all the build needs."""
    spec = importlib.util.find_spec("torch")
    candidates = list(spec.submodule_search_locations or []) if spec else []
    candidates += [os.path.join(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib")]
    for folder in map(Path, candidates):
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    return None


def cxx() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name.split()[0]))), None)


def native_wanted() -> bool:
    """False with PERFVL_BUILD_NATIVE=0 or where no C++ compiler is found: the package then runs on its reference."""
    return os.environ.get("PERFVL_BUILD_NATIVE", "auto") != "0" and cxx() is not None
