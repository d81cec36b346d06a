"""Trains through Triton's interpreter what docs/status.md has in its column of GPUs; `test_status_page` runs this.

A process of its own, since whether kernels are interpreted is settled when they are imported. It prints a line of JSON:
the pairs of a kind and an operation, each with its two tables of given and of hashed ids, whose steps were right.
"""

import json
import os
import sys
from pathlib import Path

# Each with the number of its partitions.
KINDS = {
    "quotient_remainder, strided": ("strided", 2),
    "quotient_remainder, adjacent": ("adjacent", 2),
    "mixed_radix": ("mixed_radix", 3),
    "chinese_remainder": ("chinese_remainder", 3),
    "explicit": ("explicit", 2),
    "hash": ("hash", 1),
}
OPERATIONS = ("mult", "add", "concat")


def main() -> None:
    from kernel_reference import train
    from triton_checks import StepThroughTriton

    right = []
    for title, (kind, k) in KINDS.items():
        for operation in OPERATIONS:
            train(StepThroughTriton(kind, k, operation=operation, dim=4, num_bags=1, hashed=True), rtol=2e-5, steps=1)
            right.append([title, operation])
    print(json.dumps(right))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "ops")]
    main()
