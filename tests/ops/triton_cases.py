"""Runs the Triton kernels through Triton's interpreter, one test after the other; `test_triton` runs this as a process.

A process of its own, since whether kernels are interpreted is settled when they, and Triton, are imported. It prints a
line of JSON per test: its name, and the traceback of its failure or an empty string.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pairwise import pairwise

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": (("hash", 1), ("strided", 2), ("explicit", 2), ("wide", 2), ("chinese_remainder", 3), ("mixed_radix", 4)),
    "operation": ("mult", "add", "concat"),
    "dim": (4, 8, 12),
    "rule": ("sgd", "adagrad", "rowwise_adagrad", "adam", "amsgrad"),
    "dtype": ("float32", "float16", "bfloat16"),
    "weighted": (False, True),
    "pooling": ("sum", "mean"),
    "id_dtype": ("int64", "int32"),
    "offset_dtype": ("int64", "int32"),
}
STEPS = {"-".join(str(v) for v in case.values()): case for case in pairwise(FACTORS)}
OTHERS = (
    "hot_rows",
    "hot_rows_of_every_shape",
    "dense_gradients_and_touched_rows",
    "unique_rows",
    "sequences",
    "codes",
    "rows_given",
    "any_id",
    "ids_out_of_range",
    "offsets_that_do_not_cover_the_ids",
    "nothing_to_look_up",
)
NAMES = [*STEPS, *OTHERS]


def steps(case: dict[str, Any]) -> None:
    """Against the float64 reference, over steps between which rows move. In bf16 the interpreter truncates, by up to
    one unit in the last place per step."""
    import torch
    from triton_checks import StepThroughTriton, close

    (kind, k), dtype = case["kind"], getattr(torch, case["dtype"])
    types = {name: getattr(torch, case[name]) for name in ("dtype", "id_dtype", "offset_dtype")}
    given = {name: value for name, value in case.items() if name not in ("kind", *types)}
    rtol = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    step_case = StepThroughTriton(kind, k, num_bags=4, **given, **types)
    for step in range(2):
        out, expected, gradient, exact = step_case.run(step)
        close(out, expected, rtol, f"step {step}: output")
        if gradient is not None:
            close(gradient, exact, rtol, f"step {step}: gradient of the weights")
    for i, (w, exact) in enumerate(zip(step_case.stored, step_case.exact, strict=True)):
        close(w.detach(), exact.detach(), rtol, f"weight {i}")
        for name, state in step_case.states[i].items():
            close(state, step_case.exact_states[i][name], rtol, f"state {name} of weight {i}")


def tests() -> dict[str, Callable[[], None]]:
    import triton_checks

    found = {name: getattr(triton_checks, name) for name in OTHERS}
    return {name: partial(steps, case) for name, case in STEPS.items()} | found


def main() -> None:
    for name, test in tests().items():
        try:
            test()
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps([name, failure]), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
