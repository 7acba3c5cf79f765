"""The compiled libraries: which symbols they need, which GPUs they hold code for, and that this code does not spill."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native import build
from torch._subclasses.fake_tensor import FakeTensorMode

import perfvl
from perfvl.ops.scale_rows import scale_rows

PACKAGE = Path(perfvl.__file__).parent
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"
# What a CPU build of torch does not have; on a CUDA build, libtorch.so brings libtorch_cuda, which does.
ONLY_IN_LIBTORCH_CUDA = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}
CUDA_OPS = ["perfvl::scale_rows"]


def library(name: str) -> Path:
    """The built library, or a skip that says why there is none."""
    file = PACKAGE / f"{name}.abi3.so"
    if not file.exists():
        info = json.loads((PACKAGE / "_build.json").read_text())
        assert info["cuda" if name == "_cuda" else "native"] is None, f"{file.name} should have been built"
        pytest.skip(info["cuda_reason" if name == "_cuda" else "native_reason"])
    return file


def run(*command: str | Path, **environment: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def undefined(file: Path) -> set[str]:
    """Symbols the library must find elsewhere, but for those of libc and the C++ runtime, which carry a version."""
    symbols = [line.split() for line in run("nm", "-D", "--undefined-only", file).splitlines()]
    return {name for kind, name in symbols if kind == "U" and "@" not in name}


@functools.cache
def exported_by_torch() -> set[str]:
    files = [TORCH_LIBRARIES / f"lib{name}.so" for name in ("torch_cpu", "c10")]
    lines = [line for file in files for line in run("nm", "-D", "--defined-only", file).splitlines()]
    return {line.split()[-1].split("@")[0] for line in lines}


# Symbols --------------------------------------------------------------------------------------------------------------


def test_cpu_library_needs_only_what_libtorch_cpu_exports():
    missing = undefined(library("_C")) - exported_by_torch()
    assert not missing


def test_cuda_library_needs_three_symbols_of_libtorch_cuda_and_nothing_else_beyond_libtorch_cpu():
    assert undefined(library("_cuda")) - exported_by_torch() == ONLY_IN_LIBTORCH_CUDA


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_libraries_use_no_python_and_no_unstable_cxx_symbol_of_torch(name):
    symbols = undefined(library(name))
    assert not [s for s in symbols if re.match(r"_?Py", s)]
    assert not [s for s in symbols if s.startswith("_ZN")], "a mangled C++ name of torch changes between its versions"


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_libraries_export_nothing_of_their_own(name):
    # Kernels of another extension in the process must neither replace ours nor be replaced.
    exported = [line.split()[-1] for line in run("nm", "-D", "-C", "--defined-only", library(name)).splitlines()]
    assert not [s for s in exported if "perfvl" in s or "cuda" in s]


def test_cuda_library_loads_and_registers_its_ops(tmp_path):
    file = library("_cuda")
    lines = ["import ctypes, torch, perfvl"]
    if torch.version.cuda is None:
        stub = tmp_path / "stub.c"
        stub.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(ONLY_IN_LIBTORCH_CUDA)))
        compiler = build.release()["compiler"]().split()
        run(*compiler, "-x", "c", "-shared", "-fPIC", stub, "-o", tmp_path / "stub.so")
        lines.append(f"ctypes.CDLL({str(tmp_path / 'stub.so')!r}, mode=ctypes.RTLD_GLOBAL)")
    lines.append("has = lambda op: torch._C._dispatch_has_kernel_for_dispatch_key(op, 'CUDA')")
    lines.append(f"before = [has(op) for op in {CUDA_OPS}]")
    lines.append(f"torch.ops.load_library({str(file)!r})")
    lines.append(f"print(before, [has(op) for op in {CUDA_OPS}])")
    printed = run(sys.executable, "-c", "\n".join(lines)).strip()
    assert printed == f"{[False] * len(CUDA_OPS)} {[True] * len(CUDA_OPS)}"


# Code for GPUs --------------------------------------------------------------------------------------------------------


@functools.cache
def cuda_tools() -> Path:
    """A folder with cuobjdump and nvdisasm: the CUDA toolkit's, else Triton's, which brings them along."""
    home = build.release()["cuda_home"]()
    triton = importlib.util.find_spec("triton")
    folders = [home / "bin"] if home else []
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if all((folder / tool).exists() for tool in ("cuobjdump", "nvdisasm")):
            return folder
    pytest.skip("cuobjdump and nvdisasm are neither in the CUDA toolkit nor in Triton")


@functools.cache
def cuobjdump(*options: str) -> str:
    tools = cuda_tools()
    return run(tools / "cuobjdump", *options, library("_cuda"), PATH=f"{tools}:{os.environ['PATH']}")


def archs() -> set[str]:
    return set(re.findall(r"^arch = sm_(\w+)", cuobjdump("--dump-resource-usage"), re.MULTILINE))


def test_every_arch_asked_for_has_code_and_the_newest_has_ptx():
    library("_cuda")
    asked = json.loads((PACKAGE / "_build.json").read_text())["cuda"]["archs"]
    assert archs() == set(asked)
    newest = max(asked, key=lambda arch: int(arch.rstrip("af")))
    assert set(re.findall(r"\.sm_(\w+)\.ptx", cuobjdump("--list-ptx"))) == {newest.rstrip("af")}


def test_no_kernel_spills_or_uses_local_memory():
    usage = re.findall(r"Function (\S+):\n\s*REG:\d+ STACK:(\d+) \S+ LOCAL:(\d+)", cuobjdump("--dump-resource-usage"))
    assert len(usage) >= len(archs()) * len(CUDA_OPS)
    assert not [kernel for kernel, stack, local in usage if (stack, local) != ("0", "0")]


@pytest.mark.parametrize("dtypes", ["ff", "f13__nv_bfloat16", "13__nv_bfloat16S", "13__nv_bfloat16f", "6__halfS"])
def test_scale_rows_moves_16_bytes_at_a_time_without_dividing(dtypes):
    functions = re.split(r"\n\s*Function : ", cuobjdump("--dump-sass"))
    vector = [f for f in functions if re.match(rf"\S*scale_rows_kernelI{dtypes}\w*Li[48]E", f)]
    assert len(vector) == len(archs())
    for code in vector:
        wide = {op for op in ("LDG", "STG") if re.search(rf"\b{op}\.E\.128\b", code)}
        assert wide >= {"STG" if dtypes.endswith("f") else "LDG"}
        assert not re.search(r"\b(CALL|MUFU|I2F)\b", code)  # what a division, or a loop's unrolling, would bring


def test_kernels_of_the_emulator_are_cuda(tmp_path):
    home = build.release()["cuda_home"]()
    if home is None:
        pytest.skip("no nvcc")
    compiler = build.release()["compiler"]()
    command = [home / "bin" / "nvcc", "-ccbin", compiler, "-std=c++20", "-arch=sm_80", f"-I{build.ROOT / 'csrc'}"]
    run(*command, "-c", build.NATIVE / "emulator_kernels.cu", "-o", tmp_path / "kernels.o")


# The op ---------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_scale_rows_is_dense_on_the_rows_device(dtype):
    with FakeTensorMode():
        rows, scale = torch.empty(7, 5, device="cuda").t(), torch.empty(1, device="cuda").expand(5)
        out = torch.ops.perfvl.scale_rows(rows, scale, dtype)
    assert (out.shape, out.stride(), out.dtype, out.device.type) == ((5, 7), (7, 1), dtype, "cuda")


@on_gpu
@pytest.mark.parametrize("shape", [(1, 1), (256, 128), (33, 129), (70000, 4), (3, 100000), (0, 8), (8, 0)])
def test_scale_rows_equals_torch_bit_for_bit_on_the_gpu(shape):
    count, dim = shape
    scale = torch.randn(2 * count, device="cuda")
    scales = [scale[:count], scale[::2], *([scale[:1].expand(count)] if count else [])]
    for source, to in itertools.product(DTYPES, DTYPES):
        dense = torch.randn(count, dim + 8, device="cuda").to(source)
        views = [dense[:, 8:], dense[:, 1 : 1 + dim], dense[:, 8:].t().contiguous().t()]
        views += [dense[:1, 8:].expand(shape)] if count else []
        for rows, factors in itertools.product(views, scales):
            out = torch.ops.perfvl.scale_rows(rows, factors, to)
            assert out.is_contiguous()
            assert torch.equal(out, (rows.float() * factors[:, None]).to(to))


@on_gpu
def test_scale_rows_is_captured_in_a_cuda_graph_on_any_stream():
    rows, scale = torch.randn(256, 128, device="cuda"), torch.randn(256, device="cuda")
    scale_rows(rows, scale, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = scale_rows(rows, scale, torch.bfloat16)
    rows.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, (rows * scale[:, None]).to(torch.bfloat16))
