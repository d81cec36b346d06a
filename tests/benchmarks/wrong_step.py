"""The step benchmark with one variant that goes wrong, on one rank: ``wrong_step.py KIND VARIANT RANK CALLS ...``.

``output``: after CALLS lookups all outputs are 0.1 % off. ``rows``: after CALLS steps a table is 0.001 off.
"""

import os
import sys
from typing import Any

from benchmarks import step
from benchmarks.step_variants import VARIANTS


def main(kind: str, name: str, rank: int, calls: int, argv: list[str]) -> int:
    variant = VARIANTS[name]
    method = "out" if kind == "output" else "backward"
    right = getattr(variant, method)

    def wrong(self: Any, *args: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        result = right(self, *args)
        if self.calls <= calls or rank != int(os.environ.get("RANK", 0)):
            return result
        if kind == "output":
            return result * 1.001
        next(iter(self.state().values())).add_(0.001)
        return result

    setattr(variant, method, wrong)
    return step.main(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]))
