"""Makes Triton's interpreter compute what a GPU would, for processes started with TRITON_INTERPRET=1.

The interpreter keeps bfloat16 as uint16 bit patterns. Two of its operations then give wrong numbers: tl.dot
multiplies the bit patterns as integers, and the cast from float32 truncates where hardware rounds to nearest even.
Both are replaced here. Products are summed in float64, more exactly than on a GPU: in float32 numpy's BLAS gives, on
some processors, the same row other bits in a matrix of other height, and tiles of two shapes could not be compared.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Patches the interpreter. Refuses to run where kernels would be compiled instead of interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("start the process with TRITON_INTERPRET=1")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original_dot = InterpreterBuilder.create_dot
    original_cast = InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(_widen(operand.data), tl.float32) for operand in (a, b))
        a, b, wide = (TensorHandle(t.data.astype(np.float64), tl.float64) for t in (a, b, d))
        total = original_dot(self, a, b, wide, input_precision, max_num_imprecise_acc)
        return TensorHandle(total.data.astype(d.data.dtype), d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(_round_to_bf16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(_widen(src.data), target)
        return original_cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


def run_interpreted(test_file: Path) -> int:
    """Runs a file of tests in a pytest of its own, interpreting all kernels; returns how many passed.

    A process of its own because Triton decides between compiling and interpreting when it is imported.
    """
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test_file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=test_file.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    summary = re.search(r"(\d+) passed", result.stdout)
    if result.returncode != 0 or summary is None:
        raise AssertionError(result.stdout[-20_000:] + result.stderr[-2_000:])
    return int(summary[1])
