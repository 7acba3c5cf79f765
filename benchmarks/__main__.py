"""``python -m perfvl.benchmarks``: the same command as ``python -m perfvl bench``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
