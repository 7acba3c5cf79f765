"""Builds the native libraries by writing one build.ninja: several ISA levels of one source, nvcc without a CUDA torch.

Environment: PERFVL_BUILD_NATIVE=0 (no C++ at all), PERFVL_BUILD_CUDA=0|1|auto (auto: where nvcc is found; a GPU is not
needed), PERFVL_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST ("8.0;9.0a;12.0"), CUDA_HOME, CXX, MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import torch_paths  # noqa: E402

TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the oldest torch the binary runs on: 2.11
CUDA_ARCHS = "80;86;89;90a;100;120"  # no 103: sm_103 code of nvcc 13 is publicly reported to give wrong output
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}


def isa_levels() -> dict[str, str]:
    """The levels this compiler can emit: baseline alone off x86-64; an old compiler lacks the newest."""

    def accepted(flags: str) -> bool:
        command = [*compiler().split(), *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

    x86 = platform.machine() in ("x86_64", "AMD64")
    return {level: flags for level, flags in ISA_FLAGS.items() if level == "baseline" or (x86 and accepted(flags))}


def cuda_home() -> Path | None:
    """The CUDA toolkit with nvcc and headers; `which nvcc` may be a wrapper script far from both."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for folder in (Path(c) for c in candidates if c):
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            return folder
    return None


def cuda_archs() -> list[str]:
    """The GPUs to compile for: those asked for, else those of CUDA_ARCHS that this nvcc knows."""
    given = os.environ.get("PERFVL_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not given:
        listed = subprocess.run(
            [f"{cuda_home()}/bin/nvcc", "--list-gpu-code"], stdout=subprocess.PIPE, text=True, check=True
        )
        return [arch for arch in CUDA_ARCHS.split(";") if f"sm_{arch.rstrip('af')}" in listed.stdout.split()]
    archs = [arch.removesuffix("+PTX").replace(".", "") for arch in given.replace(" ", ";").split(";") if arch]
    if not archs or not all(re.fullmatch(r"\d+[af]?", arch) for arch in archs):
        raise SystemExit(f'PERFVL_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST is {given!r}, expected numbers such as "8.0;9.0a"')
    return archs


def gencode(archs: list[str]) -> str:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    newest = max(archs, key=lambda a: int(a.rstrip("af")))
    return " ".join([*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"])  # PTX for GPUs to come


def compiler() -> str:
    return os.environ.get("CXX") or torch_paths.cxx() or "c++"


def extensions() -> tuple[list[Extension], dict[str, object]]:
    """What can be built here, and what `python -m perfvl info` says about it."""
    info: dict[str, object] = {"native": None, "cuda": None}
    if not torch_paths.native_wanted():
        reason = "PERFVL_BUILD_NATIVE=0" if torch_paths.cxx() else "no C++ compiler was found when perfvl was installed"
        return [], info | {"native_reason": reason, "cuda_reason": reason}
    found = [Extension("perfvl._C", sources=[], py_limited_api=True)]
    info["native"] = {"compiler": compiler(), "isa": list(isa_levels())}
    want, home = os.environ.get("PERFVL_BUILD_CUDA", "auto"), cuda_home()
    if want == "1" and home is None:
        raise SystemExit("PERFVL_BUILD_CUDA=1, but no nvcc was found: set CUDA_HOME or put nvcc on the PATH")
    if want != "0" and home is not None:
        found.append(Extension("perfvl._cuda", sources=[], py_limited_api=True))
        info["cuda"] = {"nvcc": str(home / "bin" / "nvcc"), "archs": cuda_archs()}
    else:
        info["cuda_reason"] = "PERFVL_BUILD_CUDA=0" if want == "0" else "no nvcc was found when perfvl was installed"
    return found, info


class BuildInfo(build_py):
    """Leaves beside the package what was built, and why the rest was not."""

    def run(self) -> None:
        super().run()
        folder = ROOT / "perfvl" if self.editable_mode else Path(self.build_lib) / "perfvl"
        for stale in folder.glob("*.so"):  # of an earlier build with other settings: it would slip into the wheel
            stale.unlink()
        (folder / "_build.json").write_text(json.dumps(BUILD_INFO, indent=1) + "\n")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = torch_paths.find()
        if torch is None:
            raise SystemExit(
                "torch's headers were not found: pip install 'torch>=2.11' first, or drop --no-build-isolation"
            )
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        work = (
            ROOT / "build" / "ninja" / ext.name
        )  # a fixed folder: pip's own are thrown away, nothing would be incremental
        work.mkdir(parents=True, exist_ok=True)
        rules = cuda_rules if ext.name.endswith("_cuda") else cpu_rules
        (work / "build.ninja").write_text(f"ninja_required_version = 1.5\nbuilddir = {work}\n" + rules(torch, work))
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*command, "-f", str(work / "build.ninja"), *jobs], cwd=ROOT).returncode:
            which = "CUDA" if ext.name.endswith("_cuda") else "NATIVE"
            raise SystemExit(
                f"building {ext.name} failed (see above); PERFVL_BUILD_{which}=0 installs perfvl without it"
            )
        shutil.copyfile(work / "out.so", output)


def torch_flags(torch: Path) -> str:
    return f"{TARGET} -isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"


def ninja_file(rules: dict[str, str], edges: list[tuple[Path, str, Path, str]], link: list[Path], work: Path) -> str:
    text = "".join(
        f"rule {name}\n  command = {command}\n  depfile = $out.d\n  deps = gcc\n"
        for name, command in rules.items()
        if name != "link"
    )
    text += f"rule link\n  command = {rules['link']}\n"
    for obj, rule, source, flags in edges:
        text += f"build {obj}: {rule} {source}\n  flags = {flags}\n"
    return text + f"build {work}/out.so: link {' '.join(map(str, link))}\ndefault {work}/out.so\n"


def cpu_rules(torch: Path, work: Path) -> str:
    # No -ffast-math: gcc < 13 would link crtfastmath and flush denormals to zero in the whole process.
    common = (
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math "
        "-Wall -Wextra -Wno-maybe-uninitialized -Icsrc"
    )
    rules = {
        "cxx": f"{compiler()} {common} $flags -MMD -MF $out.d -c $in -o $out",
        "link": f"{compiler()} -shared -Wl,--no-as-needed $in -L{torch}/lib -ltorch_cpu -Wl,-z,defs -o $out",
    }
    levels = isa_levels()
    have = " ".join(f"-DPVL_HAVE_{level}" for level in levels)
    edges = [
        (work / f"{source.stem}.o", "cxx", source, f"{torch_flags(torch)} {have}")
        for source in sorted((ROOT / "csrc/ops").glob("*.cpp"))
    ]
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        for isa, flags in levels.items():
            edges.append((work / f"{source.stem}.{isa}.o", "cxx", source, f"-DPVL_ISA={isa} {flags}"))
    return ninja_file(rules, edges, [edge[0] for edge in edges], work)


def cuda_rules(torch: Path, work: Path) -> str:
    home = cuda_home()
    common = "-std=c++20 -O3 -Icsrc"
    rules = {
        "cxx": f"{compiler()} {common} -fPIC -fvisibility=hidden -Wall -DUSE_CUDA $flags -isystem {home}/include "
        "-MMD -MF $out.d -c $in -o $out",
        # -compress-all: line numbers for profilers would make the library six times as large.
        "nvcc": f"{home}/bin/nvcc -ccbin {compiler()} {common} -lineinfo -Xfatbin -compress-all "
        "-Xcompiler -fPIC,-fvisibility=hidden "
        f"{gencode(cuda_archs())} -MD -MF $out.d -c $in -o $out",
        # libtorch.so is NEEDed on purpose: on a CUDA torch it brings libtorch_cuda, whose symbols this library calls.
        "link": f"{compiler()} -shared $in -Wl,--no-as-needed -L{torch}/lib -ltorch -ltorch_cpu "
        f"-L{home}/lib64 -L{home}/lib -lcudart_static -lrt -ldl -lpthread -Wl,--exclude-libs,ALL -o $out",
    }
    edges = [(work / "ops.o", "cxx", ROOT / "csrc/cuda/ops.cpp", torch_flags(torch))]
    edges += [(work / f"{s.stem}.cu.o", "nvcc", s, "") for s in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    return ninja_file(rules, edges, [edge[0] for edge in edges], work)


class AbiWheel(bdist_wheel):
    """One wheel for every CPython from 3.10 on: the libraries need no Python symbol (see csrc/tensor.h)."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()


EXTENSIONS, BUILD_INFO = extensions()
setup(ext_modules=EXTENSIONS, cmdclass={"build_py": BuildInfo, "build_ext": NinjaBuild, "bdist_wheel": AbiWheel})
