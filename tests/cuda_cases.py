"""Small cases of every CUDA kernel, forward and backward, for compute-sanitizer: ``cuda_cases.py small|samples``.

Needs no check of the numbers (the contract has that), and as few launches as reach every kernel.
"""

from __future__ import annotations

import sys
import time

import torch
from contracts import CONTRACTS
from op_contract import OpContract, evaluate

LIMIT = 14  # samples of an op: evenly spaced, so that dtypes and layouts are among them


def inputs_of(op: OpContract, which: str) -> list[dict]:
    if which == "small":
        return [op.small("cuda")]
    samples = op.samples("cuda")
    return [sample.inputs for sample in samples[:: max(1, len(samples) // LIMIT)]]


def main(which: str) -> None:
    for op in CONTRACTS:
        began = time.perf_counter()
        cases = inputs_of(op, which)
        for inputs in cases:
            evaluate(op.function, inputs)
        for arguments in op.raw_samples("cuda"):
            op.raw_op(*arguments)
        torch.cuda.synchronize()
        print(f"{op.name}: {len(cases)} cases, {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
