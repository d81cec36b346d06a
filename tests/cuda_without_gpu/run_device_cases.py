"""Usage: ``run_device_cases.py [CASE ...]``. A program, because the library of `noop_cuda` must come before torch."""

import sys
from pathlib import Path

import noop_cuda


def main() -> None:
    sys.path[:0] = map(str, Path(__file__).parents[1:3])
    library = noop_cuda.load()
    import device_steps

    device_steps.run_all(library, sys.argv[1:])


if __name__ == "__main__":
    main()
