"""Usage: ``.venv/bin/python tests/cuda_without_gpu/host_time.py [FILE.json]``.

Measures how long the host takes for the operators of a step, forward and backward, of kernels that do nothing. Add
about 5 µs a launch for Triton's own launcher and the driver. It prints the median of repeats in ms, per number of
tables and rule, and writes them to a file.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

TABLES = (3, 26)
RULES = ("sgd", "adagrad", "adam", "dense")
STEPS, REPEATS = 50, 9


def main(file: str | None) -> None:
    sys.path[:0] = map(str, Path(__file__).resolve().parents[:3])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        import torch
        from dry_launch import DryLaunches
        from dry_steps import Tables

        from benchmarks.machine import about
        from torchrec_qr.ops.backends import triton
        from torchrec_qr.ops.triton_kernels import launcher

        torch.set_num_threads(1)
        DryLaunches()
        # Launch compiled forms as on a GPU, without Triton's binding of arguments.
        launcher._compiled = {}
        # Tensors lie on the host, where the verdict on a batch would be read at once.
        triton._Call.done = lambda call: None  # type: ignore[method-assign]
        found = {}
        for number in TABLES:
            for rule in RULES:
                tables = Tables(number, rule=rule)
                times = []
                for _ in range(REPEATS + 1):
                    begin = perf_counter()
                    for _ in range(STEPS):
                        tables.step(hot=1)
                    times.append((perf_counter() - begin) / STEPS * 1e3)
                found[f"{number} tables, {rule}"] = round(median(times[1:]), 3)  # the first compiles
    result = {"machine": about(), "ms_per_step": found}
    print(json.dumps(result, indent=1))
    if file is not None:
        Path(file).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:] or [None])
