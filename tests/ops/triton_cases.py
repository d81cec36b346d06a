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
    "kind": (("hash", 1), ("explicit", 2), ("mixed_radix", 4)),
    "operation": ("mult", "add", "concat"),
    "dim": (4, 8, 12),
    "rule": ("sgd", "adagrad", "rowwise_adagrad", "adam", "amsgrad"),
    "dtype": ("float32", "float16", "bfloat16"),
    "weighted": (False, True),
    "id_dtype": ("int64", "int32"),
    "offset_dtype": ("int64", "int32"),
    "hashed": (False, True),
}
DECAYED: dict[str, tuple[Any, ...]] = {
    **FACTORS,
    "kind": (("hash", 1), ("explicit", 2)),
    "rule": (*FACTORS["rule"], "partial_rowwise_adam", "lamb", "partial_rowwise_lamb"),
    "decay": ((0.0, "l2"), (0.25, "l2"), (0.25, "decoupled")),
}


def named(factors: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    return {"-".join(map(str, (*c["kind"], *list(c.values())[1:]))): c for c in pairwise(factors)}


STEPS, DECAYED_STEPS = named(FACTORS), named(DECAYED)
OTHERS = (
    "several_steps",
    "hot_rows",
    "hot_rows_of_every_shape",
    "dense_gradients_and_touched_rows",
    "gradients_that_share_memory",
    "sequences",
    "codes",
    "rows_given",
    "replicas_given",
    "ids_that_are_sent",
    "ids_that_are_refused",
    "any_id",
    "ids_out_of_range",
    "ids_out_of_range_of_named_features",
    "offsets_that_do_not_cover_the_ids",
    "nothing_to_look_up",
    "a_warm_up_changes_nothing",
    "every_warm_up_changes_nothing",
)
NAMES = [*STEPS, *DECAYED_STEPS, *OTHERS]
# Those that compare with the CPU kernels, which are not on every machine.
AGAINST_CPU = (
    *("dense_gradients_and_touched_rows", "gradients_that_share_memory"),
    *("sequences", "codes", "rows_given", "replicas_given"),
)


def step(case: dict[str, Any]) -> None:
    """Against the float64 reference. In bf16 the interpreter truncates, by up to one unit in the last place."""
    import torch
    from triton_checks import StepThroughTriton, train

    (kind, k), dtype = case["kind"], getattr(torch, case["dtype"])
    types = {name: getattr(torch, case[name]) for name in ("dtype", "id_dtype", "offset_dtype")}
    given = {name: value for name, value in case.items() if name not in ("kind", "decay", *types)}
    given["weight_decay"], given["mode"] = case.get("decay", (0.0, "l2"))
    rtol = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    train(StepThroughTriton(kind, k, num_bags=3, **given, **types), rtol, 1)


def tests() -> dict[str, Callable[[], None]]:
    import triton_checks

    found = {name: getattr(triton_checks, name) for name in OTHERS}
    return {name: partial(step, case) for name, case in (STEPS | DECAYED_STEPS).items()} | found


def main(names: list[str]) -> None:
    found = tests()
    for name in names:
        try:
            found[name]()
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps([name, failure]), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1:] or NAMES)
