"""Usage: ``run_device_cases.py [CASE ...] [--part I N]``.

A program, because the library of `noop_cuda` must come before torch. Part I of N takes every N-th case from the I-th.
"""

import argparse
import sys
from pathlib import Path

import noop_cuda


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--part", nargs=2, type=int, default=[0, 1])
    arguments = parser.parse_args()
    sys.path[:0] = map(str, Path(__file__).parents[1:3])
    library = noop_cuda.load()
    import device_steps

    device_steps.run_all(library, arguments.cases, *arguments.part)


if __name__ == "__main__":
    main()
