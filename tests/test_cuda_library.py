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
from perfvl.ops.key_queue import enqueue_
from perfvl.ops.momentum_update import momentum_update_
from perfvl.ops.scale_rows import scale_rows
from perfvl.ops.small_loss import co_teaching_loss, co_teaching_plus_loss, decoupling_loss, jocor_loss, small_loss_mask
from perfvl.reference.key_queue import enqueue_ as reference_enqueue
from perfvl.reference.momentum_update import momentum_update as reference_momentum

PACKAGE = Path(perfvl.__file__).parent
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"
# What a CPU build of torch does not have; on a CUDA build, libtorch.so brings libtorch_cuda, which does.
ONLY_IN_LIBTORCH_CUDA = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}
CUDA_OPS = [
    "perfvl::gan_loss",
    "perfvl::add_taps",
    "perfvl::conditioning_augmentation",
    "perfvl::conditioning_augmentation_backward",
    "perfvl::tap_sums",
    "perfvl::scale_rows",
    "perfvl::upsample_weight",
    "perfvl::upsample_weight_backward",
    "perfvl::momentum_update_",
    "perfvl::enqueue_",
    "perfvl::small_loss_mask",
    "perfvl::twin_loss",
    "perfvl::twin_loss_backward",
    "perfvl::depthwise_conv",
    "perfvl::depthwise_conv_backward",
]


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


@functools.cache
def functions() -> list[str]:
    return re.split(r"\n\s*Function : ", cuobjdump("--dump-sass"))


def sass(kernel: str) -> list[str]:
    """The instructions of the kernel whose mangled name matches, one text for every arch."""
    found = [f for f in functions() if re.match(rf"\S*{kernel}", f)]
    assert len(found) == len(archs())
    return found


@pytest.mark.parametrize("dtypes", ["ff", "f13__nv_bfloat16", "13__nv_bfloat16S", "13__nv_bfloat16f", "6__halfS"])
def test_scale_rows_moves_16_bytes_at_a_time_without_dividing(dtypes):
    for code in sass(rf"scale_rows_kernelI{dtypes}\w*Li[48]E"):
        wide = {op for op in ("LDG", "STG") if re.search(rf"\b{op}\.E\.128\b", code)}
        assert wide >= {"STG" if dtypes.endswith("f") else "LDG"}
        assert not re.search(r"\b(CALL|MUFU|I2F)\b", code)  # what a division, or a loop's unrolling, would bring


@pytest.mark.parametrize("capacity", [100, 880])
def test_momentum_update_reads_two_vectors_of_each_operand_before_it_stores_one(capacity):
    for code in sass(rf"momentum_update_kernelINS\d?_5TableILi{capacity}E"):
        order = " ".join("".join(access) for access in re.findall(r"\b(LDG|STG)\.E\.(128|64)\b", code))
        assert "LDG128 LDG128 LDG128 LDG128 STG" in order
        assert len(re.findall(r"\bLDC(?:\.\w+)? R\d+, c\[0x0\]\[R\d+", code)) >= 5  # the table is never copied


@pytest.mark.parametrize("dtypes", ["ff", "13__nv_bfloat16f", "f13__nv_bfloat16", "13__nv_bfloat16S", "6__halfS"])
def test_enqueue_moves_four_vectors_at_a_time(dtypes):
    narrow = {"13__nv_bfloat16f": "STG", "f13__nv_bfloat16": "LDG"}.get(dtypes)  # beside float32
    for code in sass(rf"key_queue_kernelI{dtypes}\w*Li[48]E"):
        for op in ("LDG", "STG"):
            assert len(re.findall(rf"\b{op}\.E\.{64 if op == narrow else 128}\b", code)) >= 4
        assert len(re.findall(r"\bATOMG?\.E\.ADD\.64\b", code)) == 1


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("dtype", ["f", "13__nv_bfloat16", "6__half"])
def test_row_losses_are_rounded_operation_by_operation_with_eight_loads_in_flight(dtype, width):
    for code in sass(rf"\w*twin_kernelI{dtype}Li{width}E"):
        fused = re.findall(r"\bFFMA\S* R\d+, (\w+)", code)
        assert set(fused) <= {"RZ"}  # with zero: how a float64 division looks at its operands
        assert not re.search(r"\.FTZ\b", code)
        order = re.findall(r"\b(LDG|FSETP|SHFL)\b", code)
        assert "LDG " * 8 in " ".join(order) + " "
        assert "ATOMS.POPC.INC" in code  # digits: equal ones of a warp are counted at once


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("dtype", ["f", "13__nv_bfloat16", "6__half"])
def test_kernels_of_the_small_loss_add_no_floating_point_numbers_atomically(dtype, width):
    for code in sass(rf"\w*twin_kernelI{dtype}Li{width}E") + sass(rf"\w*backward_kernelI{dtype}Li{width}E"):
        assert not re.search(r"\b(ATOM|ATOMG|RED|REDG)\S*\.F(16|32|64)", code)


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


@on_gpu
@pytest.mark.parametrize("m", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("strict", [None, "moco"])
def test_momentum_update_of_a_thousand_tensors_on_the_gpu(strict, m):
    sizes = [(1 << 22) + 3, 0, *(7 * i % 5000 for i in range(1000))]
    pairs = [
        (torch.randn(n, device="cuda").to(DTYPES[i % 3]), torch.randn(n, device="cuda").to(DTYPES[i // 3 % 3]))
        for i, n in enumerate(sizes)
    ]
    targets, sources = [t for t, _ in pairs], [s for _, s in pairs]
    copies = [torch.full((n,), torch.nan, device="cuda", dtype=DTYPES[i // 9 % 3]) for i, n in enumerate(sizes)]
    expected = [reference_momentum(t, s, m, convex=strict == "moco") for t, s in pairs]
    momentum_update_(targets, sources, torch.tensor(m, device="cuda") if m == 0.3 else m, copies=copies, strict=strict)
    for target, right, copy in zip(targets, expected, copies, strict=True):
        if strict == "moco" and m != 0.3:
            assert torch.equal(target, right)
        else:
            torch.testing.assert_close(target, right)
        assert torch.equal(copy, target.to(copy.dtype))


@on_gpu
def test_momentum_update_is_captured_in_a_cuda_graph():
    targets, sources = ([torch.randn(n, device="cuda") for n in range(1, 1000)] for _ in range(2))
    momentum = torch.tensor(0.5, device="cuda")
    before = [t.clone() for t in targets]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        momentum_update_(targets, sources, momentum)
    momentum.fill_(0.75)
    graph.replay()
    torch.cuda.synchronize()
    for target, old, source in zip(targets, before, sources, strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * source)


@on_gpu
@pytest.mark.parametrize("drop_tail", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "dim"), [(16384, 2560), (5000, 128), (97, 7), (1, 1)])
def test_enqueue_on_the_gpu_is_what_the_definition_says(size, dim, masked, drop_tail):
    queue, ids = torch.randn(size, dim), torch.zeros(size, dtype=torch.int64)
    cursor, valid = torch.tensor(size - 1), torch.tensor(0)
    rings = [queue, cursor, valid, ids]
    on_device = [t.cuda() for t in rings]
    for batch in (1, 2048, 33, 6000, 2048):
        keys, rows = torch.randn(batch, dim), torch.randint(1 << 40, (batch,))
        mask = torch.rand(batch) < 0.6 if masked else None
        options = {"normalize": False, "drop_tail": drop_tail}
        reference_enqueue(queue, cursor, keys, valid=valid, mask=mask, payload_queues=[ids], payloads=[rows], **options)
        device_queue, device_cursor, device_valid, device_ids = on_device
        enqueue_(
            device_queue,
            device_cursor,
            keys.cuda(),
            valid=device_valid,
            mask=None if mask is None else mask.cuda(),
            payload_queues=[device_ids],
            payloads=[rows.cuda()],
            **options,
        )
        for mine, right in zip(on_device, rings, strict=True):
            assert torch.equal(mine.cpu(), right)


@on_gpu
def test_enqueue_is_captured_in_a_cuda_graph_and_advances_at_every_replay():
    queue, cursor = torch.zeros(10, 640, device="cuda", dtype=torch.bfloat16), torch.tensor(8, device="cuda")
    keys = torch.randn(3, 640, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue_(queue, cursor, keys, normalize=True)
    seen = torch.zeros(10, 640, device="cuda")
    for step in range(7):
        keys.normal_()
        graph.replay()
        seen[(8 + 3 * step + torch.arange(3)) % 10] = torch.nn.functional.normalize(keys, dim=1)
    torch.cuda.synchronize()
    assert cursor.item() == (8 + 21) % 10
    torch.testing.assert_close(queue.float(), seen, rtol=2**-8, atol=1e-6)


TWIN_LOSSES = {
    "decoupling": lambda z1, z2, labels, rate, mode: decoupling_loss(z1, z2, labels, mode=mode),
    "co_teaching": lambda z1, z2, labels, rate, mode: co_teaching_loss(z1, z2, labels, rate, mode=mode),
    "co_teaching_plus": lambda z1, z2, labels, rate, mode: co_teaching_plus_loss(z1, z2, labels, rate, mode=mode),
    "jocor": lambda z1, z2, labels, rate, mode: jocor_loss(z1, z2, labels, rate, co_lambda=0.9, mode=mode),
}


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("loss", TWIN_LOSSES)
def test_losses_of_two_networks_choose_the_same_rows_on_the_gpu_as_on_the_cpu(loss, mode, dtype):
    run = TWIN_LOSSES[loss]
    for shape in [
        (128, 10),
        (1, 1),
        (300, 100),
        (1024, 1000),
        (2048, 7),
        (2049, 7),
        (100_000, 3),
        (5, 40, 10),
        (300, 9, 65),
    ]:
        z1, z2 = (3 * torch.randn(shape).to(dtype) for _ in range(2))
        labels = torch.randint(shape[-1], shape[:-1])
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        device_leaves = [z.cuda().requires_grad_() for z in (z1, z2)]
        right, got = run(*leaves, labels, 0.3, mode), run(*device_leaves, labels.cuda(), 0.3, mode)
        again = run(*device_leaves, labels.cuda(), 0.3, mode)
        for i in range(4):
            torch.testing.assert_close(got[i], again[i], rtol=0, atol=0, equal_nan=True)
        for i in (2, 3):
            assert torch.equal(got[i].cpu(), right[i])
        for i in (0, 1):
            torch.testing.assert_close(got[i].cpu(), right[i], rtol=3e-7, atol=0, equal_nan=True)
        (right.loss1 if loss == "jocor" else right.loss1 + right.loss2).sum().backward()
        (got.loss1 if loss == "jocor" else got.loss1 + got.loss2).sum().backward()
        for mine, true in zip(device_leaves, leaves, strict=True):
            torch.testing.assert_close(
                mine.grad.cpu(), true.grad, rtol=2e-5 if dtype == torch.float32 else 0.02, atol=1e-7
            )


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_loss_mask_on_the_gpu_is_that_of_the_cpu(dtype):
    for shape in [(1,), (128,), (7, 2048), (2049,), (3, 70_000), (5_000_000,), (70_000, 3)]:
        losses = torch.randn(shape).to(dtype)
        losses[torch.rand(shape) < 0.05] = torch.nan
        some = torch.rand(shape) < 0.7
        for rate in (0.0, 0.3, 1.0):
            for candidates in (None, some):
                right = small_loss_mask(losses, rate, candidates=candidates)
                counted = None if candidates is None else candidates.cuda()
                assert torch.equal(small_loss_mask(losses.cuda(), rate, candidates=counted).cpu(), right)


@on_gpu
@pytest.mark.parametrize("rows", [128, 1024, 5000])
def test_losses_of_two_networks_are_captured_in_a_cuda_graph(rows):
    z1, z2 = (torch.randn(rows, 100, device="cuda", requires_grad=True) for _ in range(2))
    labels, rate = torch.randint(100, (rows,), device="cuda"), torch.tensor(0.2, device="cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def losses():
        out = co_teaching_plus_loss(z1, z2, labels, rate, step=step, mode="reference")
        return out, torch.autograd.grad(out.loss1 + out.loss2, (z1, z2))

    losses()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = losses()
    for forget in (0.0, 0.5, 0.9):
        with torch.no_grad():
            z1.normal_()
            rate.fill_(forget)
        graph.replay()
        right, right_grads = losses()
        assert all(torch.equal(a, b) for a, b in zip((*out, *grads), (*right, *right_grads), strict=True))
