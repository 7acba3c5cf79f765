"""``python -m perfvl info`` (what runs where, and why), ``bench`` and ``gpu-check``."""

from __future__ import annotations

import sys


def main(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "info" and not rest:
        from perfvl.backends import info

        print(info())
        return 0
    if command == "bench":
        from perfvl.benchmarks.__main__ import main as bench

        return bench(rest)
    if command == "gpu-check":
        from perfvl.benchmarks.gpu_check import main as gpu_check

        return gpu_check(rest)
    print("usage: python -m perfvl info | bench [--help] | gpu-check [--help]", file=sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
