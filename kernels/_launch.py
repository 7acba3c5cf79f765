"""Launches Triton kernels in a few microseconds of host time.

`kernel[grid](...)` types, specialises and binds every argument on every call: some 25 us for a kernel of 25 arguments
on a fast host, 60 on a slow one, which is longer than many kernels run. What that work decides depends on few things
(dtypes, alignment of pointers, sizes that the kernel is specialised for, constants). They make a key here; the first
launch of a key takes Triton's way, the others call the launcher of the compiled kernel, as Triton does in the end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# The versions whose JITFunction.run ends in the call that `launch` repeats; any other takes Triton's way.
_KNOWN = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)
_MOST_KEYS = 4096  # per process; strides of ever new layouts would fill the memory else
_INT32 = 1 << 31

# key -> launcher, function, metadata, constants in the order of the kernel's arguments
_compiled: dict[Hashable, tuple[Any, Any, Any, tuple]] = {}


def _observed(kernel: Any) -> bool:
    """Whether something interprets kernels, watches launches (profilers), or changes how kernels are compiled."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (
        not isinstance(kernel, JITFunction)
        or bool(kernel.pre_run_hooks)
        or (enter is not None and bool(getattr(enter, "calls", True)))  # in a chain of hooks there may be none
        or (leave is not None and bool(getattr(leave, "calls", True)))
        or runtime.debug
        or bool(knobs.compilation.instrumentation_mode)
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor | None],
    numbers: Sequence[float],
    sizes: tuple,
    num_warps: int,
    **constants: Any,
) -> None:
    """``kernel[grid](*tensors, *numbers, *sizes, **constants)`` on the device of the first tensor, which is current.

    numbers: arguments in `do_not_specialize`, and floats: they may change freely, each keeps its type. sizes: integers
    that the kernel is specialised for. The kernel's parameters come in this order, constants last.
    """
    first = tensors[0]
    if first.is_cuda and _KNOWN and max(numbers) < _INT32 and not _observed(kernel):
        index = first.get_device()
        pointers: list[int | None] = []
        layout: list[Any] = [kernel.fn, index, num_warps, sizes, *constants, *constants.values()]
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                layout.append(None)
            else:
                pointer = tensor.data_ptr()
                pointers.append(pointer)
                layout.append((tensor.dtype,) if pointer & 15 else tensor.dtype)
        key = tuple(layout)
        found = _compiled.get(key)
        if found is not None:
            run, function, metadata, values = found
            run(
                grid[0], grid[1] if len(grid) > 1 else 1, 1, driver.active.get_current_stream(index), function,
                metadata, None, None, None, *pointers, *numbers, *sizes, *values,
            )  # fmt: skip
            return
    else:
        key = None
    compiled = kernel[grid](*tensors, *numbers, *sizes, **constants, num_warps=num_warps, enable_fp_fusion=True)
    if key is not None and isinstance(compiled, CompiledKernel):
        if len(_compiled) >= _MOST_KEYS:
            _compiled.clear()
        values = tuple(constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) + len(sizes) :])
        _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata, values)
